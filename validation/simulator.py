"""Reference simulator: continuous batching on several replicas, request by request, from event to event.

One engine step serves every running sequence one token, continues the prompts in progress, and admits waiting requests
in order of arrival while the step's token budget (`max_num_batched_tokens`), the batch limit (`max_num_seqs`) and the
KV blocks last: the scheduler of vLLM's engine core. A sequence that needs a block when none is free costs the most
recently admitted one its place: its blocks are freed, it returns to the head of the queue and computes its tokens
again. Between two events (an arrival, an end, a prompt, a full cache) all steps are alike but for the growing cache,
so that k of them are one sum: time goes from event to event, and equals a step-by-step walk to rounding.

Nothing is drawn here, but for the random router's seed: the same input gives the same rows. Rows are plain stamps;
metrics are computed by :mod:`servecast.validation.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Literal, Protocol, get_args

import numpy as np

from servecast.model.batch_steps import Chunk, GroupStepTimes, StepTimes, Work
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.validation.scheduler import EngineLimits, Prompt, RequestLog, Scheduler

__all__ = [
    "ROUTERS",
    "Engine",
    "EngineLimits",
    "Lockstep",
    "Router",
    "check_routing",
    "serve",
    "simulate",
]

Router = Literal["round_robin", "least_loaded", "random"]
ROUTERS: tuple[Router, ...] = get_args(Router)
NEVER = math.inf
REPORT_EVERY = 4096
"""Requests between two calls of `progress`."""


def simulate(
    trace: Trace,
    steps: StepTimes,
    limits: EngineLimits,
    *,
    replicas: int = 1,
    router: Router = "round_robin",
    data_parallel: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RequestRows:
    """Serve every request of `trace`; the queue is unbounded, and the run ends when the last request has.

    Parameters
    ----------
    steps : step times, the same for every replica.
    limits : of each replica.
    replicas : engines behind one router.
    data_parallel : attention replicas inside one engine, in lockstep; `limits` are each one's, and `steps` must know
        `lockstep`.
    router : ``round_robin``; ``least_loaded`` (fewest requests waiting and running, the lowest number of equals);
        ``random`` (uniform, from `seed`).
    progress : called with (requests routed, requests) now and then.
    """
    check_routing(replicas, router)
    log = RequestLog(trace, limits)
    engines = [_engine(steps, limits, log, data_parallel) for _ in range(replicas)]
    serve(trace, log, engines, router=router, seed=seed, progress=progress)
    return log.rows(trace)


def check_routing(replicas: int, router: str) -> None:
    """Refuse what `serve` cannot route."""
    if replicas < 1:
        raise ValueError(f"replicas must be >= 1, got {replicas}")
    if router not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")


class Served(Protocol):
    """What a router needs of an engine."""

    @property
    def load(self) -> int:
        """Requests waiting and running."""
        ...

    def receive(self, number: int, at: float) -> None:
        """A request that arrives now."""
        ...

    def advance(self, until: float) -> None:
        """Run every step that starts before `until`."""
        ...


def serve(
    trace: Trace,
    log: RequestLog,
    engines: Sequence[Served],
    *,
    router: Router,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Route every request of `trace` in order of arrival, and run the engines until the last has ended."""
    count, replicas = len(trace.t_s), len(engines)
    choice = np.random.default_rng(seed).integers(0, replicas, count).tolist() if router == "random" else None
    turn = 0
    for number, at in enumerate(trace.t_s.tolist()):
        if progress is not None and number % REPORT_EVERY == 0:
            progress(number, count)
        if log.refused[number]:
            continue
        if router == "round_robin":
            target, turn = turn, (turn + 1) % replicas
        elif choice is not None:
            target = choice[number]
        else:
            for engine in engines:
                engine.advance(at)
            target = min(range(replicas), key=lambda one: engines[one].load)
        log.replica[number] = target
        engines[target].advance(at)
        engines[target].receive(number, at)
    for engine in engines:
        engine.advance(NEVER)
    if progress is not None:
        progress(count, count)


def _engine(steps: StepTimes, limits: EngineLimits, log: RequestLog, data_parallel: int) -> Engine | Lockstep:
    if data_parallel == 1:
        return Engine(steps, limits, log)
    if not isinstance(steps, GroupStepTimes):
        raise ValueError(f"data_parallel must be 1 with step times of a single replica, got {data_parallel}")
    return Lockstep(steps, limits, log, data_parallel)


class _PlannedStep:
    """What one scheduler puts into a step."""

    __slots__ = ("finished", "work")

    def __init__(self, work: Work, finished: list[Prompt]) -> None:
        self.work, self.finished = work, finished


class Engine(Scheduler):
    """One engine whose sequences get a token each in every step; `advance` runs it up to a time."""

    __slots__ = ("_cached", "_ends", "_offsets", "_step", "_steps")

    def __init__(self, steps: StepTimes, limits: EngineLimits, log: RequestLog) -> None:
        super().__init__(limits, log, steps.first_token_s)
        self._steps = steps
        # a decoding sequence's number in `_admitted` is its tokens less the step number
        self._ends: list[tuple[int, int]] = []
        """(step at whose end it is done, request) of every decoding sequence, a heap."""
        self._cached = 0
        """Cached tokens of the decoding sequences."""
        self._offsets = [0] * limits.block_size
        """Decoding sequences by (cached tokens - step) modulo the block size: who needs a block at which step."""
        self._step = 0

    def advance(self, until: float) -> None:
        """Run every step that starts before `until`."""
        while self.now < until:
            chunks, finished = self._schedule()
            if chunks:
                self._mixed_step(chunks, finished)
            elif self._ends:
                self._decode_steps(until)
            else:
                return

    def plan_step(self) -> _PlannedStep:
        """Chunks and running sequences of the next step, for one that is timed outside; `end_step` must follow."""
        chunks, finished = self._schedule()
        if not chunks:
            self._make_room()
        return _PlannedStep((chunks, len(finished), len(self._ends), self._cached), finished)

    def end_step(self, step: _PlannedStep) -> None:
        """The planned step ends now."""
        self._complete(step.finished)

    def _mixed_step(self, chunks: list[Chunk], finished: list[Prompt]) -> None:
        """One step: every running sequence a token, and the chunks."""
        self.now += self._steps.mixed(chunks, len(finished), len(self._ends), self._cached)
        self._complete(finished)

    def _complete(self, finished: list[Prompt]) -> None:
        """What a step that ends now has done: every running sequence a token, and the first one of `finished`."""
        self._step_done(1, len(self._ends))
        self._end_prompts(finished)

    def _decode_steps(self, until: float) -> None:
        """Decode steps up to the next end, full cache or `until`, whichever is first."""
        batch = len(self._ends)
        most = self._ends[0][0] - self._step
        possible = self._steps_before_full(most)
        if not possible:
            self._make_room()
            return
        now, more, holds = self._steps.decode(batch, self._cached)
        most = min(possible, holds)
        growth = more * batch
        if until < NEVER:
            most = min(most, _steps_until(until - self.now, now, growth))
        self.now += most * now + growth * (most * (most - 1) / 2)
        self._step_done(most, batch)

    def _step_done(self, count: int, batch: int) -> None:
        """Every running sequence has `count` more tokens; those that are complete leave."""
        if not batch:
            return
        self._kv.grow(self._growth(count))
        self._step += count
        self._cached += count * batch
        ends, step = self._ends, self._step
        while ends and ends[0][0] == step:
            number = heappop(ends)[1]
            tokens = self._admitted[number] + step
            self._cached -= tokens
            self._offsets[(tokens - step) % self._limits.block_size] -= 1
            self._leave(number, tokens)

    def _decode(self, number: int, tokens: int, left: int) -> None:
        self._admitted[number] = tokens - self._step
        heappush(self._ends, (self._step + left, number))
        self._cached += tokens
        self._offsets[(tokens - self._step) % self._limits.block_size] += 1

    def _stop_decoding(self, number: int, held: int) -> tuple[int, int]:
        tokens = held + self._step
        at = next(i for i, end in enumerate(self._ends) if end[1] == number)
        self._ends.pop(at)
        self._ends.sort()
        self._cached -= tokens
        self._offsets[(tokens - self._step) % self._limits.block_size] -= 1
        return tokens, tokens - self._log.n_in[number] + 1

    def _next_blocks(self) -> int:
        return self._growth(1)

    def _growth(self, count: int) -> int:
        """Blocks that the running sequences take in the next `count` steps."""
        size, offsets = self._limits.block_size, self._offsets
        whole, rest = divmod(count, size)
        # a sequence takes a block in the step that starts with its blocks full: tokens = 0 modulo the size
        taken = whole * len(self._ends)
        for ahead in range(rest):
            taken += offsets[-(self._step + ahead) % size]
        return taken

    def _steps_before_full(self, most: int) -> int:
        """How many of the next `most` steps the free blocks allow."""
        free = self._kv.free
        batch, size = len(self._ends), self._limits.block_size
        if (most // size + 1) * batch <= free:
            return most
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._growth(middle) <= free else (low, middle - 1)
        return low


class Lockstep:
    """Attention replicas of one engine whose experts are shared: every step is one of all of them, the slowest counts.

    A request goes to the replica of least 4 x waiting + running, as in vLLM's data-parallel balancer. Time goes step by
    step, since any replica's prompt is an event of all.
    """

    def __init__(self, steps: GroupStepTimes, limits: EngineLimits, log: RequestLog, replicas: int) -> None:
        self._steps = steps
        self._ranks = [Engine(steps, limits, log) for _ in range(replicas)]
        self.now = 0.0

    @property
    def load(self) -> int:
        """Requests waiting and running."""
        return sum(rank.load for rank in self._ranks)

    def receive(self, number: int, at: float) -> None:
        """A request that arrives now."""
        self.now = max(self.now, at)
        min(self._ranks, key=lambda rank: 3 * rank.waiting + rank.load).receive(number, at)

    def advance(self, until: float) -> None:
        """Run every step that starts before `until`."""
        while self.now < until:
            planned = []
            for rank in self._ranks:
                rank.now = self.now
                planned.append(rank.plan_step())
            work = [step.work for step in planned]
            if not any(chunks or batch for chunks, _, batch, _ in work):
                return
            self.now += self._steps.lockstep(work)
            for rank, step in zip(self._ranks, planned, strict=True):
                rank.now = self.now
                rank.end_step(step)


def _steps_until(span: float, first: float, growth: float) -> int:
    """Fewest steps that take at least `span` seconds, the j-th taking first + (j - 1) growth."""
    if growth <= 0.0:
        return max(math.ceil(span / first), 1)
    linear = first - growth / 2.0
    steps = max(math.ceil((math.sqrt(linear * linear + 2.0 * growth * span) - linear) / growth), 1)
    # the root is good to rounding: one step too many or too few would be a step that starts after an arrival
    while steps > 1 and (steps - 1) * first + growth * ((steps - 1) * (steps - 2) / 2) >= span:
        steps -= 1
    while steps * first + growth * (steps * (steps - 1) / 2) < span:
        steps += 1
    return steps

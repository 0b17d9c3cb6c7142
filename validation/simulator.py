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
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from servecast.model.batch_steps import Chunk, GroupStepTimes, StepTimes, Work
from servecast.model.workload import Trace
from servecast.validation.kv_blocks import KvBlocks

Router = Literal["round_robin", "least_loaded", "random"]
ROUTERS: tuple[Router, ...] = get_args(Router)
NEVER = math.inf
REPORT_EVERY = 4096
"""Requests between two calls of `progress`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one engine may hold at once; names as vLLM's arguments."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: float
    """Capacity of the KV cache. [tokens]"""
    block_size: int = 16
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be >= 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be >= max_num_seqs {self.max_num_seqs}, got {self.max_num_batched_tokens}"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {self.block_size}")
        if not self.kv_tokens >= self.block_size:
            raise ValueError(f"kv_tokens must be >= block_size {self.block_size}, got {self.kv_tokens:g}")

    @property
    def blocks(self) -> int:
        return int(self.kv_tokens) // self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRows:
    """Stamps of every request, in order of arrival; NaN where the engine refused it. [s]"""

    arrival_s: NDArray[np.float64]
    scheduled_s: NDArray[np.float64]
    """First admitted to the running batch."""
    first_token_s: NDArray[np.float64]
    last_token_s: NDArray[np.float64]
    n_in: NDArray[np.int64]
    n_out: NDArray[np.int64]
    replica: NDArray[np.int32]
    preemptions: NDArray[np.int32]
    cached_tokens: NDArray[np.int64]
    """Prompt tokens found in the prefix cache when it was first admitted."""
    refused: NDArray[np.bool_]
    """Longer than the whole KV cache: an engine answers it with an error."""


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


class RequestLog:
    """Requests and their stamps, by number; flat arrays, so that a million requests take tens of megabytes."""

    def __init__(self, trace: Trace, limits: EngineLimits) -> None:
        count = len(trace.t_s)
        nothing = array("d", [math.nan]) * count
        self.n_in = array("q", trace.n_in.tobytes())
        self.n_out = array("q", trace.n_out.tobytes())
        self.scheduled, self.first, self.last = nothing[:], nothing[:], nothing[:]
        self.replica = array("i", [-1]) * count
        self.preemptions = array("i", [0]) * count
        self.hits = array("q", [0]) * count
        # the last token is never fed back, so its cache entry is never needed
        self.refused: list[bool] = (trace.n_in + trace.n_out - 1 > limits.blocks * limits.block_size).tolist()
        self.shared = trace.block_tokens if limits.enable_prefix_caching and trace.prefix_blocks is not None else 0
        self.prefixes = trace.prefix_blocks if self.shared else None

    def ids(self, number: int) -> Sequence[int]:
        """Prefix ids of the whole blocks of a prompt."""
        if self.prefixes is None:
            return ()
        return self.prefixes[number][: self.n_in[number] // self.shared]

    def rows(self, trace: Trace) -> RequestRows:
        refused = np.array(self.refused, dtype=np.bool_)
        return RequestRows(
            arrival_s=trace.t_s,
            scheduled_s=np.array(self.scheduled),
            first_token_s=np.array(self.first),
            last_token_s=np.array(self.last),
            n_in=trace.n_in,
            n_out=trace.n_out,
            replica=np.array(self.replica, dtype=np.int32),
            preemptions=np.array(self.preemptions, dtype=np.int32),
            cached_tokens=np.array(self.hits, dtype=np.int64),
            refused=refused,
        )


class Prompt:
    """A prompt in progress, or one that a preemption sends back: tokens to compute before the next one comes out."""

    __slots__ = ("done", "number", "tokens")

    def __init__(self, number: int, tokens: int, done: int) -> None:
        self.number, self.tokens, self.done = number, tokens, done


class _PlannedStep:
    """What one scheduler puts into a step."""

    __slots__ = ("finished", "work")

    def __init__(self, work: Work, finished: list[Prompt]) -> None:
        self.work, self.finished = work, finished


class Scheduler:
    """Queue, prompts and KV cache of one engine: who is admitted, whose prompt a step computes, who loses its place.

    How the admitted sequences decode is the subclass's.
    """

    __slots__ = (
        "_admitted",
        "_blocked",
        "_kv",
        "_limits",
        "_log",
        "_prompts",
        "_rows_each",
        "_shown_s",
        "_waiting",
        "now",
    )

    def __init__(self, limits: EngineLimits, log: RequestLog, first_token_s: float) -> None:
        self._limits, self._log, self._shown_s = limits, log, first_token_s
        self._kv = KvBlocks(
            limits.blocks, limits.block_size, shared_tokens=log.shared, caching=limits.enable_prefix_caching
        )
        self.now = 0.0
        self._waiting: deque[tuple[int, int]] = deque()
        """(request, tokens it had produced when it lost its place)."""
        self._prompts: list[Prompt] = []
        self._admitted: dict[int, int] = {}
        """Every request that holds blocks, in order of admission, and a number of the subclass's once it decodes; a
        preemption takes the last."""
        self._rows_each = 1
        """Tokens of the step's budget that a decoding sequence takes."""
        self._blocked = False
        """Nothing can be admitted before something ends."""

    @property
    def load(self) -> int:
        """Requests waiting and running."""
        return len(self._waiting) + len(self._admitted)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def receive(self, number: int, at: float) -> None:
        """A request that arrives now."""
        self.now = max(self.now, at)
        self._waiting.append((number, 0))

    def _next_blocks(self) -> int:
        """Blocks that the decoding sequences take in the next step."""
        raise NotImplementedError

    def _decode(self, number: int, tokens: int, left: int) -> None:
        """A prompt of `tokens` has given a token, and `left` more are to come."""
        raise NotImplementedError

    def _stop_decoding(self, number: int, held: int) -> tuple[int, int]:
        """Take a decoding sequence out, `held` its number in `_admitted`: tokens it has cached, tokens produced."""
        raise NotImplementedError

    def _schedule(self) -> tuple[list[Chunk], list[Prompt]]:
        """Chunks of the next step, and the prompts they complete; makes room for the running sequences first."""
        if not self._prompts and (self._blocked or not self._waiting):
            return [], []
        limits, kv, log = self._limits, self._kv, self._log
        reserved = self._next_blocks()
        preempted = reserved > kv.free and self._make_room()
        if preempted:
            reserved = self._next_blocks()
        decoding = len(self._admitted) - len(self._prompts)
        budget = max(limits.max_num_batched_tokens - decoding * self._rows_each, 0)
        chunks: list[Chunk] = []
        finished: list[Prompt] = []
        kept: list[Prompt] = []
        for prompt in self._prompts:
            end = min(prompt.done + budget, prompt.tokens)
            if end > prompt.done:
                chunks.append((prompt.done, end))
                budget -= end - prompt.done
                prompt.done = end
            (finished if end == prompt.tokens else kept).append(prompt)
        # blocks that the running sequences take in this very step are not for newcomers
        spare = kv.free - reserved
        while self._waiting and budget > 0 and not preempted:
            if len(self._admitted) >= limits.max_num_seqs:
                self._blocked = True
                break
            number, produced = self._waiting[0]
            tokens = log.n_in[number] + produced
            ids = log.ids(number)
            need = kv.need(ids, tokens)
            if need > spare:
                self._blocked = True
                break
            self._waiting.popleft()
            hit = kv.cached_tokens(number, ids, tokens) if ids or produced else 0
            kv.take(number, ids, tokens)
            spare -= need
            self._admitted[number] = 0
            if not produced and math.isnan(log.scheduled[number]):
                log.scheduled[number] = self.now
                log.hits[number] = hit
            prompt = Prompt(number, tokens, hit)
            end = min(hit + budget, tokens)
            chunks.append((hit, end))
            budget -= end - hit
            prompt.done = end
            (finished if end == tokens else kept).append(prompt)
        self._prompts = kept
        return chunks, finished

    def _end_prompts(self, finished: list[Prompt]) -> None:
        """The step that ends now has completed these prompts: each gives its first token."""
        log = self._log
        shown = self.now + self._shown_s
        for prompt in finished:
            number = prompt.number
            if math.isnan(log.first[number]):
                log.first[number] = shown
            left = log.n_in[number] + log.n_out[number] - prompt.tokens - 1
            if left:
                self._decode(number, prompt.tokens, left)
            else:
                self._leave(number, prompt.tokens)

    def _leave(self, number: int, tokens: int) -> None:
        self._log.last[number] = self.now + self._shown_s
        del self._admitted[number]
        self._kv.give_back(number, self._log.ids(number), tokens)
        self._blocked = False

    def _make_room(self) -> bool:
        """Preempt, last admitted first, until the next step fits; whether anyone had to go."""
        someone = False
        while self._next_blocks() > self._kv.free:
            number, held = self._admitted.popitem()
            self._preempt(number, held)
            someone = True
        return someone

    def _preempt(self, number: int, held: int) -> None:
        log = self._log
        prompt = next((one for one in self._prompts if one.number == number), None)
        if prompt is not None:
            self._prompts.remove(prompt)
            tokens = prompt.tokens
            produced = tokens - log.n_in[number]
        else:
            tokens, produced = self._stop_decoding(number, held)
        self._kv.give_back(number, log.ids(number), tokens, returns=True)
        log.preemptions[number] += 1
        self._waiting.appendleft((number, produced))
        self._blocked = False


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

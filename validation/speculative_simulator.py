"""Reference simulator of speculative decoding: continuous batching where a step drafts, verifies and emits in rounds.

Queue, admission, prompt chunks, prefix cache and preemption are those of :mod:`servecast.validation.simulator`. A
decode step is one round: a controller decides the draft lengths, the target verifies them, and every running sequence
emits its accepted drafts and one token of the target's own, cut at the end of its output. Time goes round by round:

    T = verify(rows, requests, cached) + draft(requests, length, cached) + prefill(chunks)

with idle(requests, cached) in place of the draft where its length is 0.

Memory: a round needs blocks for each sequence's cached tokens, its next one and `num_speculative_tokens` lookahead
slots, whatever length is drafted, as engines reserve them; slots of rejected tokens are used again in the next round.
The step's token budget is charged with the drafts of the round before, since an engine drafts a round ahead of its
scheduler; where drafts do not fit into what is left, the last admitted sequences verify fewer.

Which drafts are right is a property of the text (:mod:`servecast.validation.acceptance_draws`), not of the policy.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from servecast.model.batch_steps import Chunk
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.validation.acceptance_draws import LONGEST, AcceptanceDraws, Text
from servecast.validation.draft_controllers import DraftController, RoundState
from servecast.validation.scheduler import EngineLimits, Prompt, RequestLog, Scheduler
from servecast.validation.simulator import Router, check_routing, serve
from servecast.validation.speculative_steps import SpeculativeStepTimes

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeRows(RequestRows):
    """Stamps and rounds of every request, and what the engines did."""

    rounds: Ints
    """Verifications that a request took part in."""
    drafted: Ints
    """Its draft tokens that were verified."""
    accepted: Ints
    """Those of them that became output; each round emits one token more."""
    rounds_by_length: Ints
    """Decode steps of all engines by the tokens drafted, from 0 on."""
    switches: int
    """Decode steps whose draft length was not that of the engine's decode step before."""
    peak_blocks: int
    """Most KV blocks that one engine had in use."""


def simulate_speculative(
    trace: Trace,
    steps: SpeculativeStepTimes,
    limits: EngineLimits,
    acceptance: AcceptanceDraws,
    controller_factory: Callable[[], DraftController],
    *,
    num_speculative_tokens: int,
    replicas: int = 1,
    router: Router = "round_robin",
    slo_s: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SpeculativeRows:
    """Serve every request of `trace`; as :func:`servecast.validation.simulator.simulate` where not said otherwise.

    Parameters
    ----------
    acceptance : right and wrong drafts of every request, the same under every policy.
    controller_factory : makes the controller of one replica.
    num_speculative_tokens : longest draft; its slots are reserved in every round.
    slo_s : limit that controllers are told of. [s]
    seed : of the random router; `acceptance` has its own.
    """
    check_routing(replicas, router)
    if not 0 <= num_speculative_tokens <= LONGEST:
        raise ValueError(f"num_speculative_tokens must be between 0 and {LONGEST}, got {num_speculative_tokens}")
    if slo_s is not None and not slo_s > 0.0:
        raise ValueError(f"slo_s must be > 0, got {slo_s}")
    log = RoundLog(trace, limits, num_speculative_tokens)
    engines = [
        SpeculativeEngine(steps, limits, log, acceptance, controller_factory(), slo_s=slo_s) for _ in range(replicas)
    ]
    serve(trace, log, engines, router=router, seed=seed, progress=progress)
    return log.rows(trace)


class RoundLog(RequestLog):
    """Stamps of the requests, and their rounds."""

    def __init__(self, trace: Trace, limits: EngineLimits, longest: int) -> None:
        super().__init__(trace, limits)
        nothing = array("q", [0]) * len(trace.t_s)
        self.rounds, self.drafted, self.accepted = nothing[:], nothing[:], nothing[:]
        self.longest = longest
        self.rounds_by_length = [0] * (longest + 1)
        self.switches = 0
        self.peak_blocks = 0

    def rows(self, trace: Trace) -> SpeculativeRows:
        """What is known of every request at the end."""
        stamps = super().rows(trace)
        return SpeculativeRows(
            **{field.name: getattr(stamps, field.name) for field in fields(stamps)},
            rounds=np.array(self.rounds, dtype=np.int64),
            drafted=np.array(self.drafted, dtype=np.int64),
            accepted=np.array(self.accepted, dtype=np.int64),
            rounds_by_length=np.array(self.rounds_by_length, dtype=np.int64),
            switches=self.switches,
            peak_blocks=self.peak_blocks,
        )


class _Sequence:
    """A decoding sequence; its cache holds `offset` + `at` tokens."""

    __slots__ = ("at", "drafted", "enough", "number", "offset", "rounds", "slots", "start", "stop", "text")

    def __init__(self, number: int, at: int, stop: int, cached: int, text: Text) -> None:
        self.number, self.text = number, text
        self.at = self.start = at
        """Tokens of its output so far, hence the place of the next one."""
        self.stop = stop
        self.offset = cached - at
        self.rounds = self.drafted = 0
        self.slots = 0
        """Tokens that its blocks hold."""
        self.enough = 0
        """Largest `at` at which they hold a whole round."""


class SpeculativeEngine(Scheduler):
    """One engine whose sequences go from round to round; `advance` runs it up to a time."""

    __slots__ = (
        "_acceptance",
        "_batch",
        "_cached",
        "_capacity",
        "_controller",
        "_depth",
        "_length",
        "_rounds_log",
        "_short",
        "_slo_s",
        "_steps",
        "_tight",
    )

    def __init__(
        self,
        steps: SpeculativeStepTimes,
        limits: EngineLimits,
        log: RoundLog,
        acceptance: AcceptanceDraws,
        controller: DraftController,
        *,
        slo_s: float | None,
    ) -> None:
        super().__init__(limits, log, steps.first_token_s)
        self._steps, self._rounds_log, self._acceptance = steps, log, acceptance
        self._controller, self._slo_s = controller, slo_s
        self._batch: list[_Sequence] = []
        """The decoding sequences, in the order in which their prompts ended."""
        self._cached = 0
        """Their cached tokens."""
        self._short = 0
        """Blocks that they lack for the next round."""
        self._capacity = limits.blocks * limits.block_size
        self._tight = 0
        """Sequences whose last rounds do not fit into the whole cache."""
        self._length = -1
        """Tokens drafted in the last decode step."""
        self._depth = 0
        """Draft tokens that the controller has seen in this round."""
        self._rows_each = 1 + log.longest

    def advance(self, until: float) -> None:
        """Run every step that starts before `until`."""
        while self.now < until:
            chunks, finished = self._schedule()
            if self._short > self._kv.free:
                self._make_room()
            if chunks or self._short:
                self._take_slots()
            if self._batch:
                self._round(chunks, finished)
            elif chunks:
                self.now += self._steps.prefill_s(chunks)
                self._end_prompts(finished)
            else:
                return

    def _round(self, chunks: list[Chunk], finished: list[Prompt]) -> None:
        """One step: every running sequence a round, and the chunks."""
        batch = self._batch
        requests, chunk_tokens = len(batch), sum(end - start for start, end in chunks)
        self._depth = 0
        decision = self._controller.round(
            RoundState(
                batch=requests,
                cached=self._cached,
                chunk_tokens=chunk_tokens,
                prefills=len(chunks),
                slo_s=self._slo_s,
                contexts=[one.offset + one.at for one in batch],
            ),
            self._next_confidence,
        )
        lengths, drafted = decision.lengths, decision.drafted
        verified: list[int] = lengths.tolist()
        self._check(verified, drafted)
        room = self._limits.max_num_batched_tokens - chunk_tokens - requests
        drafts = sum(verified)
        if self._tight or drafts > room:
            verified = self._cut(verified, room)
            lengths, drafts = np.array(verified, dtype=np.int64), sum(verified)
        seconds = self._seconds(requests + drafts, drafted, chunks)
        self.now += seconds
        self._count(drafted)
        accepted = self._emit(verified)
        self._end_prompts(finished)
        self._controller.observe(np.array(accepted, dtype=np.int64), lengths, seconds)

    def _seconds(self, rows: int, drafted: int, chunks: list[Chunk]) -> float:
        steps, requests, cached = self._steps, len(self._batch), self._cached
        seconds = steps.verify_s(rows, requests, cached)
        seconds += steps.draft_s(requests, drafted, cached) if drafted else steps.idle_s(requests, cached)
        return seconds + steps.prefill_s(chunks) if chunks else seconds

    def _emit(self, verified: list[int]) -> list[int]:
        """Every sequence its accepted drafts and one token more; accepted drafts, those behind the output included."""
        accepted = []
        done = []
        cached = self._cached
        for one, length in zip(self._batch, verified, strict=True):
            at = one.at
            right = one.text.accepted[at]
            if right > length:
                right = length
            accepted.append(right)
            one.rounds += 1
            one.drafted += length
            after = at + right + 1
            if after >= one.stop:
                cached += one.stop - at
                one.at = one.stop
                done.append(one)
                continue
            cached += after - at
            one.at = after
            if after > one.enough:
                self._short += self._lacking(one)
        self._cached = cached
        for one in done:
            self._remove(one)
            self._leave(one.number, one.slots)
        return accepted

    def _next_confidence(self) -> NDArray[np.float64]:
        depth = self._depth
        if depth >= self._rounds_log.longest:
            raise ValueError(f"drafted must be <= num_speculative_tokens {self._rounds_log.longest}, got {depth + 1}")
        self._depth = depth + 1
        return np.array([one.text.confidence(one.at + depth, depth) for one in self._batch])

    def _check(self, verified: list[int], drafted: int) -> None:
        """A controller's answer."""
        if len(verified) != len(self._batch):
            raise ValueError(f"lengths must be one per request of {len(self._batch)}, got {len(verified)}")
        if not 0 <= drafted <= self._rounds_log.longest:
            raise ValueError(f"drafted must be between 0 and {self._rounds_log.longest}, got {drafted}")
        if min(verified) < 0 or max(verified) > drafted:
            raise ValueError(f"lengths must be between 0 and drafted {drafted}, got {verified}")

    def _cut(self, verified: list[int], room: int) -> list[int]:
        """Lengths with no more than `room` drafts in all, the first come first, nor more than the whole cache holds."""
        cut = []
        for one, length in zip(self._batch, verified, strict=True):
            kept = min(length, room, self._capacity - one.offset - one.at - 1)
            cut.append(kept)
            room -= kept
        return cut

    def _count(self, drafted: int) -> None:
        log = self._rounds_log
        log.rounds_by_length[drafted] += 1
        if drafted != self._length:
            log.switches += self._length >= 0
            self._length = drafted
            self._rows_each = 1 + drafted

    # The cache

    def _lacking(self, one: _Sequence) -> int:
        """Blocks that a sequence needs for its next round and does not hold."""
        wanted = min(one.offset + one.at + 1 + self._rounds_log.longest, self._capacity)
        return max(-(-(wanted - one.slots) // self._limits.block_size), 0)

    def _take_slots(self) -> None:
        """The blocks that the coming round needs."""
        self._kv.grow(self._short)
        self._short = 0
        for one in self._batch:
            if one.at > one.enough:
                self._hold(one, one.slots + self._lacking(one) * self._limits.block_size)
        log = self._rounds_log
        log.peak_blocks = max(log.peak_blocks, self._limits.blocks - self._kv.free)

    def _hold(self, one: _Sequence, slots: int) -> None:
        one.slots = slots
        one.enough = one.stop if slots >= self._capacity else slots - one.offset - 1 - self._rounds_log.longest

    # What the scheduler asks

    def _next_blocks(self) -> int:
        return self._short

    def _decode(self, number: int, tokens: int, left: int) -> None:
        size, log = self._limits.block_size, self._rounds_log
        stop = log.n_out[number]
        text = self._acceptance.text(number, stop, log.longest)
        one = _Sequence(number, stop - left, stop, tokens, text)
        self._hold(one, -(-tokens // size) * size)
        self._batch.append(one)
        self._cached += tokens
        self._short += self._lacking(one)
        self._tight += self._is_tight(one)

    def _is_tight(self, one: _Sequence) -> bool:
        return one.offset + one.stop + self._rounds_log.longest > self._capacity

    def _stop_decoding(self, number: int, held: int) -> tuple[int, int]:  # noqa: ARG002 (the batch knows)
        one = next(one for one in self._batch if one.number == number)
        tokens, size = one.offset + one.at, self._limits.block_size
        self._short -= self._lacking(one)
        self._remove(one)
        # blocks behind the cached tokens have nothing in them that it could find again
        self._kv.give_back(number, (), one.slots - -(-tokens // size) * size)
        return tokens, one.at

    def _remove(self, one: _Sequence) -> None:
        """Out of the batch, its rounds into the log."""
        self._batch.remove(one)
        self._cached -= one.offset + one.at
        self._tight -= self._is_tight(one)
        log, number = self._rounds_log, one.number
        log.rounds[number] += one.rounds
        log.drafted[number] += one.drafted
        log.accepted[number] += one.at - one.start - one.rounds

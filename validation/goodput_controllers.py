r"""Draft lengths that weigh expected tokens against seconds: SpecServe, SmartSpec, vLLM's adaptive verification.

All maximise :math:`(B + \sum_i \sum_{j \le k_i} S_{ij}) / (T_d + T_v)`, the expected tokens per second of the step at
hand; they differ in where S comes from, in when they decide, and in what they search. SpecServe and SmartSpec follow
the code released with the former (cerebellumking/AdaSpec, arXiv 2503.05096; SmartSpec is arXiv 2406.14066), vLLM its
PR 47808.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from servecast.model.speculation_cost import SpeculationCost
from servecast.solvers.verification import trim_optimal, trim_released, verification_plan
from servecast.validation.draft_controllers import (
    USUAL_CAP,
    DraftDecision,
    NextConfidence,
    RoundState,
    check_length,
    drafted_confidence,
    uniform,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SloForm = Literal["off", "step", "token"]
"""What meets the limit: nothing (the released code), the whole step, or the step per emitted token of a request."""
Trim = Literal["off", "released", "best"]
"""After drafting: keep all, the released code's one candidate, or the best number of rows of all."""

FIRST_CONFIDENCE = 0.6
"""SpecServe's guess of a confidence before it has seen one."""
SMARTSPEC_ALPHA, SMARTSPEC_LOW, SMARTSPEC_RESET = 0.7, 0.3, 0.65
"""Start of SmartSpec's acceptance in that code, the value under which it is set again, and to what."""
SMARTSPEC_PLAIN_BONUS = 1.1
"""Factor on the goodput without drafts there."""
PROFILE_CONTEXT = 8192
"""Cached tokens per request at which vLLM profiles the two tables. [tokens]"""
INFEASIBLE = -1.0
"""Goodput that the released code gives to a length that misses the limit."""


class RoundTimes(Protocol):
    """What a controller believes a round takes."""

    def draft_s(self, state: RoundState, gamma: int, *, overhead: bool = True) -> float:
        """Drafting `gamma` tokens for each request; `overhead` as far as it is known apart. [s]"""
        ...

    def verify_s(self, state: RoundState, gamma: int) -> float:
        """Target pass over `gamma` drafts of every request. [s]"""
        ...

    def ragged_s(self, state: RoundState, lengths: Ints) -> float:
        """Target pass over `lengths` drafts. [s]"""
        ...

    def rows_s(self, state: RoundState, rows: Ints) -> Floats:
        """[rows]: target pass over so many rows of decoding requests. [s]"""
        ...


class CostTimes:
    """A step cost as it is: whole rows, a request's cache read once, the step's prompt tokens included."""

    def __init__(self, cost: SpeculationCost) -> None:
        self.cost = cost

    def draft_s(self, state: RoundState, gamma: int, *, overhead: bool = True) -> float:  # noqa: ARG002 (the protocol's signature)
        return float(self.cost.draft(state.batch, gamma, state.cached / state.batch)) if gamma else 0.0

    def verify_s(self, state: RoundState, gamma: int) -> float:
        return float(self.rows_s(state, np.array((gamma + 1) * state.batch)))

    def ragged_s(self, state: RoundState, lengths: Ints) -> float:
        return float(self.rows_s(state, np.array(state.batch + int(np.sum(lengths)))))

    def rows_s(self, state: RoundState, rows: Ints) -> Floats:
        found = self.cost.verify(rows + state.chunk_tokens, state.batch, state.cached / state.batch)
        return np.asarray(found, dtype=np.float64)


class SpecServe:
    """SpecServe's three parts: a gate before drafting, a drafter that stops by itself, a verifier that trims.

    Lengths are of the batch until the verifier trims them. The confidence of a token not yet drafted is the mean of
    all seen on steps that went on. `watch` is told every estimate: what for, the length, the tokens per second.
    `released` trimming charges one draft token too many after the drafter has stopped on a prediction, as the code
    does, and heeds no limit.
    """

    def __init__(
        self,
        times: RoundTimes,
        *,
        max_length: int = USUAL_CAP,
        slo: SloForm = "off",
        trim: Trim = "released",
        watch: Callable[[str, int, float], None] | None = None,
    ) -> None:
        for name, value, known in (("slo", slo, get_args(SloForm)), ("trim", trim, get_args(Trim))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
        self.times, self.slo, self.trim, self.watch = times, slo, trim, watch
        self.max_length = check_length("max_length", max_length)
        self._confidence_sum, self._confidence_count = 0.0, 0

    @property
    def mean_confidence(self) -> float:
        """Of all requests and rounds so far; never forgotten."""
        return self._confidence_sum / self._confidence_count if self._confidence_count else FIRST_CONFIDENCE

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:
        batch = state.batch
        goodput = self._goodput("plain", state, 0, batch)
        if not self.max_length or not self._goodput("gate", state, 1, batch * (1 + self.mean_confidence)) > goodput:
            return uniform(batch, 0)
        survival, goodput, charged = self._draft(state, next_confidence, goodput)
        drafted = survival.shape[1]
        if self.trim == "off":
            return uniform(batch, drafted)
        if self.trim == "released":
            return DraftDecision(lengths=self._released(state, survival, goodput, charged), drafted=drafted)
        return DraftDecision(lengths=self._best(state, survival), drafted=drafted)

    def observe(self, accepted: Ints, lengths: Ints, step_s: float) -> None:
        """Nothing is learnt: confidences stand for acceptance."""

    def _draft(self, state: RoundState, next_confidence: NextConfidence, goodput: float) -> tuple[Floats, float, int]:
        """Survival [request, position], goodput with all of it, and the length last put to the time model."""
        columns: list[Floats] = []
        last, tokens = np.ones(state.batch), float(state.batch)
        for length in range(1, self.max_length + 1):
            if columns:
                guess = self._goodput("predicted", state, length, tokens + self.mean_confidence * float(last.sum()))
                if guess < goodput:
                    return np.stack(columns, axis=1), goodput, length
            confidence = drafted_confidence(next_confidence, state.batch)
            last = last * confidence
            columns.append(last)
            tokens += float(last.sum())
            before, goodput = goodput, self._goodput("drafted", state, length, tokens)
            if goodput < before:
                break  # the token is paid for and stays
            self._confidence_sum += float(confidence.sum())
            self._confidence_count += state.batch
        return np.stack(columns, axis=1), goodput, len(columns)

    def _released(self, state: RoundState, survival: Floats, goodput: float, charged: int) -> Ints:
        """Down to the next lower captured size, if that is no worse."""
        batch, drafted = survival.shape
        lengths = trim_released(survival)
        tokens = batch + float(survival[np.arange(drafted) < lengths[:, np.newaxis]].sum())
        draft_s = self.times.draft_s(state, charged, overhead=bool(lengths.any()))
        found = tokens / (draft_s + self.times.ragged_s(state, lengths))
        self._tell("trimmed", int(lengths.sum()), found)
        return lengths if found >= goodput else np.full(batch, drafted, dtype=np.int64)

    def _best(self, state: RoundState, survival: Floats) -> Ints:
        """The best number of rows of all, within the limit."""
        batch, drafted = survival.shape
        cost = np.full(batch * (drafted + 1) + 1, np.nan)
        cost[batch:] = self.times.rows_s(state, np.arange(batch, cost.size))
        plan = verification_plan(
            survival,
            cost,
            batch,
            self.times.draft_s(state, drafted),
            step_limit_s=self._limit(state, "step"),
            token_limit_s=self._limit(state, "token"),
        )
        self._tell("trimmed", plan.rows - batch, plan.goodput)
        return plan.lengths

    def _goodput(self, event: str, state: RoundState, gamma: int, tokens: float) -> float:
        """Tokens per second of a uniform length; a length that misses the limit is worth less than any. [tok/s]

        A step of length 0 cannot break a limit on steps. It can break one per token, and by more than a draft would:
        of lengths that all do, the one that misses by least is worth most.
        """
        seconds = self.times.draft_s(state, gamma) + self.times.verify_s(state, gamma)
        over = seconds * state.batch / tokens / self._limit(state, "token")
        if over > 1.0:
            found = -over
        else:
            found = INFEASIBLE if gamma and seconds > self._limit(state, "step") else tokens / seconds
        self._tell(event, gamma, found)
        return found

    def _limit(self, state: RoundState, form: SloForm) -> float:
        return state.slo_s if self.slo == form and state.slo_s is not None else math.inf

    def _tell(self, event: str, gamma: int, goodput: float) -> None:
        if self.watch:
            self.watch(event, gamma, goodput)


class SmartSpec:
    """One acceptance probability for all, and the best length of a full search before drafting.

    As in SpecServe's repository: no drafts gain a tenth, the acceptance is set again when it is low, and at 1 the
    bonus token is forgotten. That engine judges every drafted position on its own, those behind a rejection too;
    the same mean is taken here over the positions whose outcome is known.
    """

    def __init__(self, times: RoundTimes, *, max_length: int = USUAL_CAP) -> None:
        self.times, self.max_length = times, check_length("max_length", max_length)
        self.alpha = SMARTSPEC_ALPHA
        self._accepted, self._judged = 0, 0

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:  # noqa: ARG002 (the protocol's signature)
        goodput = [self.goodput(state, k) for k in range(self.max_length + 1)]
        return uniform(state.batch, int(np.argmax(goodput)))

    def goodput(self, state: RoundState, k: int) -> float:
        """Tokens per second at a draft length, as the code ranks them. [tok/s]"""
        alpha = self.alpha
        tokens: float = state.batch * (k if alpha == 1.0 else (1 - alpha ** (k + 1)) / (1 - alpha))
        rate = tokens / (self.times.draft_s(state, k) + self.times.verify_s(state, k))
        return rate if k else rate * SMARTSPEC_PLAIN_BONUS

    def observe(self, accepted: Ints, lengths: Ints, step_s: float) -> None:  # noqa: ARG002 (the protocol's signature)
        self._accepted += int(accepted.sum())
        self._judged += int(np.minimum(accepted + 1, lengths).sum())
        if self._judged:
            alpha = self._accepted / self._judged
            self.alpha = SMARTSPEC_RESET if alpha < SMARTSPEC_LOW else alpha


class VllmTopR:
    """vLLM's adaptive verification: always draft in full, then verify the best rows up to a budget.

    The budget is the best one for the confidences of the step before, since it has to be known when the step is put
    together; the rows themselves go where the present confidences are best. The first step uses its own. Times are of
    the two tables profiled at one context: seconds never fall with rows.
    """

    def __init__(
        self, cost: SpeculationCost, *, max_length: int = USUAL_CAP, profile_context: int = PROFILE_CONTEXT
    ) -> None:
        self.cost, self.max_length = cost, check_length("max_length", max_length)
        if self.max_length < 1:
            raise ValueError(f"max_length must be >= 1, got {max_length}")
        self.profile_context = profile_context
        self._before: Floats | None = None
        self._tables: dict[int, Floats] = {}

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:
        drafted = [drafted_confidence(next_confidence, state.batch) for _ in range(self.max_length)]
        survival: Floats = np.cumprod(np.stack(drafted, axis=1), axis=1, dtype=np.float64)
        budget = min(self.budget(state, survival if self._before is None else self._before), survival.size)
        self._before = survival
        return DraftDecision(lengths=trim_optimal(survival, survival.size - budget), drafted=self.max_length)

    def observe(self, accepted: Ints, lengths: Ints, step_s: float) -> None:
        """Nothing is learnt: confidences stand for acceptance."""

    def budget(self, state: RoundState, survival: Floats) -> int:
        """Draft tokens to verify in this step, for survivals that may be of another batch. [tokens]"""
        best = np.sort(survival, axis=None)[::-1]
        tokens = state.batch + np.concatenate([[0.0], np.cumsum(best)])
        first = state.chunk_tokens
        seconds = self._seconds(state.batch, first + best.size)[first:]
        return int(np.argmax(tokens / seconds))

    def _seconds(self, batch: int, most: int) -> Floats:
        """[0..most]: of the step, by the rows beyond one per request. [s]"""
        known = self._tables.get(batch)
        if known is None or known.size <= most:
            # some more than asked for: prompt chunks differ from step to step
            rows = np.arange(batch, batch + 2 * most + 1)
            verify = np.asarray(self.cost.verify(rows, batch, self.profile_context), dtype=np.float64)
            draft = float(self.cost.draft(batch, self.max_length, self.profile_context))
            known = self._tables[batch] = draft + np.maximum.accumulate(verify)
        return known[: most + 1]

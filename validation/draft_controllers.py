"""Draft lengths decided step by step: what engines and papers do online, one class each, behind one interface.

Before a decode step a simulator calls :meth:`DraftController.round`; after it :meth:`DraftController.observe`. A
controller that looks at the drafter's confidences asks for them one token at a time, each call drafting one more token
for every request. One that does not never asks: `drafted` of its decision says how many tokens were drafted, and the
simulator draws them itself.

Here are the controllers that need no time model: a fixed length, a table by batch (vLLM), an acceptance average
(SGLang), a confidence threshold. Those that weigh tokens against seconds are in
:mod:`servecast.validation.goodput_controllers`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NextConfidence = Callable[[], Floats]
"""Drafts one more token for every request of the batch: the drafter's own probability of each. [request]"""

STOP_BELOW = 0.6
"""Mean confidence under which drafting stops, of SpecServe's scripted baseline and of vLLM PR 35301."""
USUAL_CAP = 8
"""Longest draft in SpecServe's experiments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """A decode step about to run."""

    batch: int
    """Requests that decode, at least one."""
    cached: int
    """Sum of their cached tokens. [tokens]"""
    chunk_tokens: int = 0
    """Prompt tokens computed in the same step. [tokens]"""
    prefills: int = 0
    """Requests these prompt tokens belong to."""
    slo_s: float | None = None
    """Limit that a controller may heed; what is compared with it is the controller's affair. [s]"""
    contexts: Sequence[int] | None = None
    """Cached tokens of each request where known; all are taken as the mean otherwise. [tokens]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftDecision:
    """What one step drafts and verifies."""

    lengths: Ints
    """[request]: draft tokens to verify."""
    drafted: int
    """Draft tokens spent on every request, at least the longest of `lengths`."""


class DraftController(Protocol):
    """One engine's way to choose draft lengths; keeps what it has seen."""

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:
        """Decide the step, drafting as many tokens as it takes."""
        ...

    def observe(self, accepted: Ints, lengths: Ints, step_s: float) -> None:
        """Accepted draft tokens of each request, bonus tokens not counted, and the seconds the step took."""
        ...


def uniform(batch: int, length: int) -> DraftDecision:
    """The same length for every request, drafted and verified."""
    return DraftDecision(lengths=np.full(batch, length, dtype=np.int64), drafted=length)


def drafted_confidence(next_confidence: NextConfidence, batch: int) -> Floats:
    """One more drafted token; its confidences, refused where they are not one probability per request."""
    confidence = np.asarray(next_confidence(), dtype=np.float64)
    if confidence.shape != (batch,):
        raise ValueError(f"confidence must be one value per request of {batch}, got shape {confidence.shape}")
    if not (confidence.min() >= 0.0 and confidence.max() <= 1.0):
        raise ValueError(f"confidence must be in [0, 1], got {confidence.tolist()}")
    return confidence


def check_length(name: str, value: int) -> int:
    """A draft length: a whole number of tokens."""
    if value != int(value) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value}")
    return int(value)


class StaticLength:
    """The same draft length whatever happens; 0 for none."""

    def __init__(self, length: int) -> None:
        self.length = check_length("length", length)

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:  # noqa: ARG002 (the protocol's signature)
        return uniform(state.batch, self.length)

    def observe(self, accepted: Ints, lengths: Ints, step_s: float) -> None:
        """Nothing is learnt."""


class ScheduleTable:
    """Draft length by the number of scheduled requests, prefills included, as vLLM's schedule (PR 32374).

    `lengths` is dense, for 1, 2, ... requests; the last one holds beyond. With `lagged` (vLLM) the length found in a
    step is drafted at its end and verified in the next one; the first step uses its own.
    """

    def __init__(self, lengths: Sequence[int], *, lagged: bool = True) -> None:
        if not len(lengths):
            raise ValueError("lengths must have a value for one request, got none")
        self.lengths = [check_length("lengths", one) for one in lengths]
        self.lagged = lagged
        self._next: int | None = None

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:  # noqa: ARG002 (the protocol's signature)
        found = self.lengths[min(state.batch + state.prefills, len(self.lengths)) - 1]
        used = found if not self.lagged or self._next is None else self._next
        self._next = found
        return uniform(state.batch, used)

    def observe(self, accepted: Ints, lengths: Ints, step_s: float) -> None:
        """Nothing is learnt."""


class ConfidenceStop:
    """Draft until the mean confidence of the batch falls below a threshold; that token is still verified."""

    def __init__(self, *, threshold: float = STOP_BELOW, max_length: int = USUAL_CAP) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        self.threshold, self.max_length = threshold, check_length("max_length", max_length)

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:
        drafted = 0
        while drafted < self.max_length:
            drafted += 1
            if drafted_confidence(next_confidence, state.batch).mean() < self.threshold:
                break
        return uniform(state.batch, drafted)

    def observe(self, accepted: Ints, lengths: Ints, step_s: float) -> None:
        """Nothing is learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaRules:
    """Settings of one batch range of SGLang's adaptive speculation (adaptive_spec_params.py); names as its keys."""

    candidate_steps: tuple[int, ...]
    ema_alpha: float = 0.2
    update_interval: int = 5
    warmup_batches: int = 10
    up_hysteresis: float = 0.0
    down_hysteresis: float = -0.25
    ceiling_coeff: float = 0.0

    def __post_init__(self) -> None:
        if not self.candidate_steps or any(one != int(one) or one < 0 for one in self.candidate_steps):
            raise ValueError(f"candidate_steps must be integers >= 0, got {self.candidate_steps}")
        if not 0.0 < self.ema_alpha <= 1.0:
            raise ValueError(f"ema_alpha must be in (0, 1], got {self.ema_alpha}")
        if self.update_interval < 1 or self.warmup_batches < 0:
            raise ValueError(
                "update_interval must be >= 1 and warmup_batches >= 0, "
                f"got {self.update_interval} and {self.warmup_batches}"
            )
        if not all(map(math.isfinite, (self.up_hysteresis, self.down_hysteresis, self.ceiling_coeff))):
            raise ValueError("up_hysteresis, down_hysteresis and ceiling_coeff must be finite, got nan or inf")


SGLANG_DEFAULT: Mapping[int, EmaRules] = {
    1: EmaRules(candidate_steps=(1, 3, 5, 7)),
    8: EmaRules(candidate_steps=(0, 1, 3), down_hysteresis=0.0),
    32: EmaRules(candidate_steps=(0, 1), down_hysteresis=0.0),
    64: EmaRules(candidate_steps=(0,), down_hysteresis=0.0),
}
"""What SGLang uses without a file."""


class SglangEma:
    """SGLang's adaptive draft length: a moving average of accepted drafts, one per batch range.

    `rules` by the smallest batch they hold for; below the smallest key the smallest holds. A batch is rounded up to
    `captured` sizes first, where given.
    """

    def __init__(
        self,
        rules: Mapping[int, EmaRules] = SGLANG_DEFAULT,
        *,
        initial_steps: int | None = None,
        captured: Sequence[int] = (),
    ) -> None:
        if not rules or min(rules) < 0:
            raise ValueError(f"rules must have keys >= 0, got {sorted(rules)}")
        union = sorted({one for each in rules.values() for one in each.candidate_steps})
        first = union[len(union) // 2] if initial_steps is None else initial_steps
        if first not in union:
            raise ValueError(f"initial_steps must be one of {union}, got {initial_steps}")
        self._keys, self._captured = sorted(rules), sorted(captured)
        self._slots = {key: EmaSlot(rules[key], first) for key in self._keys}

    def slot(self, batch: int) -> EmaSlot:
        """What holds for a batch of this size."""
        at = bisect_left(self._captured, batch)
        size = self._captured[at] if at < len(self._captured) else batch
        return self._slots[self._keys[max(bisect_right(self._keys, size) - 1, 0)]]

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:  # noqa: ARG002 (the protocol's signature)
        return uniform(state.batch, self.slot(state.batch).steps)

    def observe(self, accepted: Ints, lengths: Ints, step_s: float) -> None:  # noqa: ARG002 (the protocol's signature)
        if accepted.size:
            self.slot(accepted.size).update(float(accepted.mean()))


@dataclass(slots=True)
class EmaSlot:
    """State of one batch range: the draft length in force and the average of accepted drafts."""

    rules: EmaRules
    steps: int
    ema: float = field(init=False)
    batches: int = field(init=False, default=0)
    _candidates: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._candidates = sorted(set(self.rules.candidate_steps))
        if self.steps not in self._candidates:
            self.steps = self._candidates[len(self._candidates) // 2]
        self.ema = self.steps - 1.0

    def update(self, accepted: float) -> None:
        """One verified batch with a mean of `accepted` drafts."""
        rules = self.rules
        if self.steps > 0:
            self.ema += rules.ema_alpha * (accepted - self.ema)
        self.batches += 1
        past = self.batches - rules.warmup_batches
        if past > 0 and past % rules.update_interval == 0:
            self.steps = self._probe() if self.steps == 0 else self._walk()

    def _probe(self) -> int:
        """After an interval without drafts the next candidate is tried, from a neutral average if there is none."""
        target = self._candidates[min(1, len(self._candidates) - 1)]
        if target > 0 and self.ema < 0.0:
            self.ema = target - 1.0
        return target

    def _walk(self) -> int:
        """Down while the average is low for the candidate below, else up while it is high for the present one."""
        candidates, start = self._candidates, self._candidates.index(self.steps)
        at = start
        while at and self.ema <= self._lowest(candidates[at - 1]):
            at -= 1
        if at == start:
            while at < len(candidates) - 1 and self.ema > candidates[at] - 0.5 + self.rules.up_hysteresis:
                at += 1
        if self.rules.ceiling_coeff > 0 and at <= start:
            ceiling = max(1, math.ceil(self.ema * self.rules.ceiling_coeff))
            while at and candidates[at] > ceiling:
                at -= 1
        return candidates[at]

    def _lowest(self, below: int) -> float:
        """Average up to which the candidate below is preferred; none is reached at half an accepted draft."""
        return (below - 0.5 if below else 0.5) + self.rules.down_hysteresis

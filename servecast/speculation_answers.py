"""Records of a draft-length plan: what is asked of it, and the answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.model.operator_steps import GRAPH_SIZES
from servecast.model.prediction import Prediction
from servecast.solvers.draft_length import DraftLengthSchedule
from servecast.speculation_tables import SpeedTable

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """What a decode step must keep; None is no limit."""

    tpot_mean_s: float | None = None
    """Mean seconds per output token."""
    tpot_quantiles: tuple[tuple[float, float], ...] = ()
    """(percentile, seconds): over requests of `output_tokens`."""
    step_s: float | None = None
    """No speculative step may take longer (steps of length 0 are exempt): the stall between two bursts of tokens."""
    output_tokens: float = 256.0

    def __post_init__(self) -> None:
        limits = [self.tpot_mean_s, self.step_s, self.output_tokens, *(limit for _, limit in self.tpot_quantiles)]
        for limit in limits:
            if limit is not None and not 0.0 < limit < np.inf:
                raise ValueError(f"a decode limit must be positive and finite, got {limit}")
        for percentile, _ in self.tpot_quantiles:
            if not 0.0 < percentile < 100.0:
                raise ValueError(f"percentile must be between 0 and 100, got {percentile}")

    @property
    def names(self) -> tuple[str, ...]:
        """As a user writes them."""
        quantiles = tuple(f"tpot_p{percentile:g}" for percentile, _ in self.tpot_quantiles)
        mean = ("tpot_mean",) if self.tpot_mean_s is not None else ()
        return mean + quantiles + (("step",) if self.step_s is not None else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests that arrive at random at `rate_rps` and leave after `output_tokens`: how often each batch occurs."""

    rate_rps: float
    output_tokens: float
    switch_s: float = 0.0
    """Seconds that one change of draft length costs."""

    def __post_init__(self) -> None:
        for name in ("rate_rps", "output_tokens"):
            if not 0.0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0.0 <= self.switch_s < np.inf:
            raise ValueError(f"switch_s must be >= 0 and finite, got {self.switch_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRules:
    """What the table may look like."""

    max_lengths: int = 3
    """Distinct lengths: each needs its own captured graphs."""
    max_segments: int = 4
    non_increasing: bool = False
    """TensorRT-LLM pads graphs as if the length never rose with the batch."""
    allow_zero: bool = True
    operating: tuple[int, int] | None = None
    """Batches within which no edge from or to length 0 may lie; from the load where None."""
    captured: tuple[int, ...] = GRAPH_SIZES
    """Edges lie at captured batch sizes, which engines pad the batch or its rows to."""
    captured_only: bool = False
    """Nowhere else: SGLang pads the batch before it looks the length up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchForecast:
    """One batch size under the schedule."""

    batch: int
    context: float
    """NaN where the table knows one context only. [tokens]"""
    draft_length: int
    goodput_tok_s: Prediction
    tpot_s: Prediction
    step_s: float
    over_static: float
    """Goodput over that of the best static length - 1. [-]"""
    over_off: float
    """Goodput over that without speculation - 1. [-]"""
    meets: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationAnswer:
    """A schedule with what it is predicted to do."""

    table: SpeedTable
    schedule: DraftLengthSchedule
    """For all contexts together: engines know the batch alone."""
    by_context: tuple[DraftLengthSchedule, ...]
    """What each context by itself would choose."""
    weights: Floats
    """Share of steps at each batch."""
    limits: DecodeLimits
    load: Load | None
    feasible: Bools
    """[context, batch, length]"""
    best_static: int
    forecasts: tuple[BatchForecast, ...]
    gain_over_static: float
    """Weighted mean goodput over that of the best static length - 1. [-]"""
    gain_over_off: float
    """The same over a server without a drafter. [-]"""
    gain_over_off_lo: float
    gain_over_off_hi: float
    """Its 90 % interval."""
    advice: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Draft length by batch size, from 1 on."""
        return self.schedule.lengths

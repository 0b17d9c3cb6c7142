"""Requests and the statistics that queueing needs of them.

Symbols (docs/nomenclature): T gap between arrivals, cv = std(T)/mean(T); N(w) arrivals in a window of w seconds,
IDC(w) = var N(w) / mean N(w), index of dispersion of counts, 1 for Poisson at every w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Z99 = 2.3263478740408408
"""Standard normal quantile of 0.99 (Abramowitz & Stegun, table 26.5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Recorded requests, one element each, in order of arrival."""

    name: str
    t_s: NDArray[np.float64]
    """Arrival since the first one, non-decreasing. [s]"""
    n_in: NDArray[np.int64]
    """Prompt tokens, >= 1."""
    n_out: NDArray[np.int64]
    """Generated tokens, >= 1."""
    prefix_blocks: tuple[tuple[int, ...], ...] | None = None
    """Chained prefix block ids of each request, where the source has them."""
    block_tokens: int = 0
    """Tokens of one prefix block; 0 where there are none."""
    notes: tuple[str, ...] = ()
    """What the reader changed or left out (failed requests dropped, quantised stamps spread, ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalStatistics:
    """How requests arrive; every field of a trace is printed beside an answer that rests on it."""

    rate_rps: float
    gap_cv: float
    idc: tuple[tuple[float, float], ...]
    """(window [s], index of dispersion of counts); windows longer than a fifth of the span are left out."""
    peak_to_mean: tuple[tuple[float, float], ...]
    """(window [s], largest count / mean count)."""
    lag1_gap_correlation: float
    zero_gap_share: float
    """Share of gaps that are exactly zero; above 0.2 the stamps are quantised."""
    span_s: float
    requests: int
    short_idc: tuple[tuple[float, float], ...] = ()
    """The same as `idc` at windows below a second, the scale of an engine's steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Arrival process and joint lengths: what a forecast consumes, from a trace or from parameters."""

    name: str
    arrivals: ArrivalStatistics
    n_in: NDArray[np.float64]
    """Prompt lengths, a joint sample with `n_out`. [tokens]"""
    n_out: NDArray[np.float64]
    warnings: tuple[str, ...] = ()
    """Where the trace leaves the range of the stationary formulas, in words."""
    windows: tuple[tuple[float, NDArray[np.float64]], ...] = ()
    """(window [s], arrival rate in each consecutive window [1/s]); empty for a stationary process."""

    @property
    def rate_rps(self) -> float:
        return self.arrivals.rate_rps

    @property
    def mean_in(self) -> float:
        return float(self.n_in.mean())

    @property
    def mean_out(self) -> float:
        return float(self.n_out.mean())

    @property
    def mean_context(self) -> float:
        """Mean context of a running sequence, by residence: E[n_out n_in + n_out^2 / 2] / E[n_out]. [tokens]"""
        return float((self.n_out * (self.n_in + self.n_out / 2.0)).mean() / self.n_out.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatistics:
    """Prompt and output lengths of one trace. [tokens] but for the ratios"""

    mean_in: float
    p50_in: float
    p90_in: float
    p99_in: float
    max_in: float
    cv_in: float
    """Standard deviation over mean. [-]"""
    mean_out: float
    p50_out: float
    p90_out: float
    p99_out: float
    max_out: float
    cv_out: float
    spearman: float
    """Rank correlation of prompt and output length; 0 where one of them is constant. [-]"""


class LengthDistribution(Protocol):
    """A marginal distribution of token counts, known by its quantile function."""

    def quantile(self, u: ArrayLike) -> NDArray[np.float64]:
        """Tokens at probability `u` in (0, 1), before rounding to whole tokens."""
        ...


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Every request has `tokens` tokens."""

    tokens: float

    def __post_init__(self) -> None:
        _require_length("tokens", self.tokens)

    def quantile(self, u: ArrayLike) -> NDArray[np.float64]:
        return np.full(np.shape(u), float(self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalLength:
    """Log-normal lengths, cut off at `maximum` where the model or the service has a limit.

    ln n is normal with sigma^2 = ln(1 + cv^2) and mu = ln(mean) - sigma^2 / 2. `mean` and `cv` are those before the
    cut-off: requests above it are served with `maximum` tokens, as a service with an output limit does.
    """

    mean: float
    cv: float
    maximum: float = math.inf

    def __post_init__(self) -> None:
        _require_length("mean", self.mean)
        if not 0.0 <= self.cv < math.inf:
            raise ValueError(f"cv must be >= 0 and finite, got {self.cv!r}")
        if not self.maximum >= 1.0:
            raise ValueError(f"maximum must be at least 1 token, got {self.maximum!r}")

    @classmethod
    def from_percentiles(cls, p50: float, p99: float, *, maximum: float = math.inf) -> LognormalLength:
        """The log-normal through a median and a 99th percentile. [tokens]"""
        _require_length("p50", p50)
        _require_length("p99", p99)
        if p99 < p50:
            raise ValueError(f"p99 must be at least p50 = {p50:g}, got {p99:g}")
        variance = (math.log(p99 / p50) / _Z99) ** 2
        return cls(mean=p50 * math.exp(variance / 2.0), cv=math.sqrt(math.expm1(variance)), maximum=maximum)

    def quantile(self, u: ArrayLike) -> NDArray[np.float64]:
        from scipy.special import ndtri  # here, so that importing the records does not pay for scipy

        variance = math.log1p(self.cv**2)
        normal = np.asarray(ndtri(np.asarray(u, dtype=np.float64)), dtype=np.float64)
        tokens: NDArray[np.float64] = np.exp(math.log(self.mean) - variance / 2.0 + math.sqrt(variance) * normal)
        return np.minimum(tokens, self.maximum)


@dataclass(frozen=True, slots=True)
class UniformLength:
    """Every length between `low` and `high` tokens, both included, is equally likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_length("low", self.low)
        _require_length("high", self.high)
        if self.high < self.low:
            raise ValueError(f"high must be at least low = {self.low:g}, got {self.high:g}")

    def quantile(self, u: ArrayLike) -> NDArray[np.float64]:
        # half a token wider on both sides, so that after rounding the end values are as likely as the others
        return self.low - 0.5 + (self.high - self.low + 1.0) * np.asarray(u, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class EmpiricalLength:
    """Lengths by their quantiles at equally spaced probabilities 0, 1/(k-1), ..., 1; linear in between. [tokens]"""

    quantiles: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.quantiles) < 2:
            raise ValueError(f"quantiles must be at least 2 values (minimum, maximum), got {len(self.quantiles)}")
        for value in self.quantiles:
            _require_length("quantiles", value)
        if any(right < left for left, right in pairwise(self.quantiles)):
            raise ValueError("quantiles must not decrease, got a smaller value after a larger one")

    def quantile(self, u: ArrayLike) -> NDArray[np.float64]:
        grid = np.linspace(0.0, 1.0, len(self.quantiles))
        tokens: NDArray[np.float64] = np.interp(np.asarray(u, dtype=np.float64), grid, self.quantiles)
        return tokens


def _require_length(name: str, value: float) -> None:
    if not 1.0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 1 token and finite, got {value!r}")

"""Requests and the statistics that queueing needs of them.

Symbols (docs/nomenclature): T gap between arrivals, cv = std(T)/mean(T); N(w) arrivals in a window of w seconds,
IDC(w) = var N(w) / mean N(w), index of dispersion of counts, 1 for Poisson at every w.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
        """Mean context of a running sequence, weighted by residence: E[n_out n_in + n_out^2 / 2] / E[n_out]. [tokens]"""
        return float((self.n_out * (self.n_in + self.n_out / 2.0)).mean() / self.n_out.mean())

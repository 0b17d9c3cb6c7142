r"""Is the rate of arrivals steady, and if not, where to cut.

Two tests of a steady rate, given the process that the gaps suggest:

- Dispersion of counts (Cox & Lewis, 1966): the counts of M windows have the model's IDC. Observed over modelled IDC,
  times its degrees of freedom, is chi-square, with 2 M / (kurtosis - 1) instead of M degrees where counts have heavier
  tails than normal ones (Satterthwaite, Biometrics Bulletin 2, 1946).
- Trend (Lewis & Robinson, 1974): Laplace's mean arrival time against the middle of the trace, its variance times IDC.

Cuts are those of the piecewise-constant Poisson rate with the largest penalised likelihood, found exactly by optimal
partitioning (Jackson et al., IEEE Signal Processing Letters 12, 2005) of counts in at most 1000 bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.model.arrival_processes import ArrivalProcess
from servecast.model.arrivals import IDC_SLACK
from servecast.model.gamma_functions import lower_gamma

Floats = NDArray[np.float64]

SIGNIFICANCE = 0.01
"""Of every test here."""
LEAST_WINDOWS = 30
"""Windows of a dispersion test."""
MINUTE_S = 60.0
TREND_LIMIT = 0.1
"""Smaller differences between the rates of the two halves do not move a plan."""
LEAST_ARRIVALS = 100
"""Fewer arrivals cannot tell a change of rate from chance."""
MOST_BINS = 1000
ARRIVALS_PER_BIN = 4.0
"""Finest bin of the search for cuts, in mean arrivals."""
LEAST_SEGMENT_BINS = 3
PENALTY = 2.0
"""Cost of a cut in units of dispersion x ln(bins): twice that of BIC, since the place of a cut is chosen, too."""
MOST_WINDOWS = 60
"""Longer lists of windows are no summary; the penalty is raised until they are this short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateTest:
    """One test of a steady rate."""

    name: str
    window_s: float | None
    """Window of the counts, where there is one. [s]"""
    observed: float
    expected: float
    p_value: float
    rejects: bool
    """Significant, and large enough to matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateWindow:
    """A stretch of constant rate."""

    start_s: float
    end_s: float
    rate_rps: float
    requests: int


def rate_tests(t: Floats, process: ArrivalProcess) -> tuple[RateTest, ...]:
    """Tests of a steady rate for arrivals that start at 0; `process` is what the gaps suggest."""
    span = float(t[-1])
    if t.size < LEAST_ARRIVALS:
        return ()
    longest = span / LEAST_WINDOWS
    windows = sorted({min(MINUTE_S, longest), longest})
    tests = [_dispersion_test(t, process, window, SIGNIFICANCE / len(windows)) for window in windows]
    return (*tests, _trend_test(t, float(process.idc(longest))))


def rate_windows(t: Floats) -> tuple[RateWindow, ...]:
    """Consecutive windows of constant rate that cover the trace, which starts at 0."""
    span = float(t[-1])
    bins = int(min(MOST_BINS, t.size / ARRIVALS_PER_BIN))
    if bins < 2 * LEAST_SEGMENT_BINS:
        return (RateWindow(start_s=0.0, end_s=span, rate_rps=(t.size - 1) / span, requests=t.size),)
    counts = _counts(t, span, bins)
    # neighbouring bins differ by noise and not by drift (von Neumann): overdispersion that a cut must not pay for
    noise = float(np.sum(np.diff(counts) ** 2)) / (2.0 * float(counts.mean()) * (bins - 1))
    penalty = PENALTY * max(1.0, noise) * math.log(bins)
    cuts = optimal_cuts(counts, penalty)
    while cuts.size - 1 > MOST_WINDOWS:
        penalty *= 1.5
        cuts = optimal_cuts(counts, penalty)
    edges = cuts * (span / bins)
    requests = np.add.reduceat(counts, cuts[:-1]).astype(int)
    return tuple(
        RateWindow(start_s=float(start), end_s=float(end), rate_rps=float(n / (end - start)), requests=int(n))
        for start, end, n in zip(edges[:-1], edges[1:], requests, strict=True)
    )


def optimal_cuts(counts: Floats, penalty: float) -> NDArray[np.intp]:
    """Edges 0 = e_0 < ... < e_k = bins of the segments with the least sum of -N ln(N / L) + penalty, exactly."""
    bins = counts.size
    total = np.concatenate([[0.0], np.cumsum(counts)])
    best = np.full(bins + 1, np.inf)
    best[0] = -penalty
    previous = np.zeros(bins + 1, dtype=np.intp)
    lengths = np.arange(bins, 0, -1, dtype=np.float64)
    for end in range(LEAST_SEGMENT_BINS, bins + 1):
        last = end - LEAST_SEGMENT_BINS + 1
        inside = total[end] - total[:last]
        # an empty segment costs nothing: N ln N -> 0
        gain = inside * np.log(np.maximum(inside, 1.0) / lengths[bins - end : bins - end + last])
        candidate = best[:last] - gain
        previous[end] = int(np.argmin(candidate))
        best[end] = candidate[previous[end]] + penalty
    edges = [bins]
    while edges[-1] > 0:
        edges.append(int(previous[edges[-1]]))
    return np.array(edges[::-1], dtype=np.intp)


def operational_times(t: Floats, windows: tuple[RateWindow, ...]) -> Floats:
    """Arrivals on the clock that runs with the windows' rates, in mean gaps: steady if the windows tell it all. [-]"""
    edges = np.array([windows[0].start_s, *(one.end_s for one in windows)])
    clock = np.concatenate([[0.0], np.cumsum([one.requests for one in windows])])
    return np.asarray(np.interp(t, edges, clock), dtype=np.float64)


def _counts(t: Floats, span: float, bins: int) -> Floats:
    """Arrivals per bin; the last arrival belongs to the last bin."""
    index = np.minimum((t * (bins / span)).astype(np.int64), bins - 1)
    return np.bincount(index, minlength=bins).astype(np.float64)


def _dispersion_test(t: Floats, process: ArrivalProcess, window_s: float, level: float) -> RateTest:
    span = float(t[-1])
    windows = int(span / window_s)
    counts = _counts(t[t < windows * window_s], windows * window_s, windows)
    deviation = (counts - counts.mean()) ** 2
    variance = float(deviation.mean())
    observed = variance / float(counts.mean())
    expected = float(process.idc(window_s))
    p_value = 1.0
    if variance > 0.0:
        kurtosis = max(3.0, float((deviation**2).mean()) / variance**2)
        freedom = 2.0 * windows / (kurtosis - 1.0)
        p_value = 1.0 - float(lower_gamma(freedom / 2.0, freedom / 2.0 * observed / expected))
    return RateTest(
        name="dispersion of counts",
        window_s=window_s,
        observed=observed,
        expected=expected,
        p_value=p_value,
        rejects=p_value < level and observed > expected + IDC_SLACK * max(1.0, expected),
    )


def _trend_test(t: Floats, dispersion: float) -> RateTest:
    """Observed is the rate of the second half over that of the first."""
    span = float(t[-1])
    inner = t[1:-1]
    score = (float(inner.mean()) / span - 0.5) * math.sqrt(12.0 * inner.size / dispersion)
    first = int(np.count_nonzero(inner < span / 2.0))
    ratio = (inner.size - first) / first if first else math.inf
    p_value = math.erfc(abs(score) / math.sqrt(2.0))
    large = ratio > 1.0 + TREND_LIMIT or ratio < 1.0 / (1.0 + TREND_LIMIT)
    return RateTest(
        name="trend",
        window_s=None,
        observed=ratio,
        expected=1.0,
        p_value=p_value,
        rejects=p_value < SIGNIFICANCE and large,
    )

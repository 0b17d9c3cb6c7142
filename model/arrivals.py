"""Burstiness of arrivals and the workload that a forecast consumes.

Symbols (docs/nomenclature): T gap between neighbouring arrivals, cv = std(T) / mean(T); N(w) arrivals in a window of w
seconds, IDC(w) = var N(w) / mean N(w): 1 at every w for Poisson arrivals, cv^2 at long w for a renewal process, growing
with w where the rate itself varies (Cox & Lewis, The Statistical Analysis of Series of Events, 1966, chapter 4).

Assumptions: stamps are arrivals at the service, in seconds, in order. Variances are those of the population (divided by
n): with five windows the other convention would report a quarter more. Windows start at the first arrival and an
incomplete last one is left out, since it would count as a lull.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.workload import ArrivalStatistics, LengthDistribution, LengthStatistics, Trace, Workload

WINDOWS_S: tuple[float, ...] = (1.0, 10.0, 60.0, 300.0, 600.0)
"""Windows of the index of dispersion. [s]"""
SHORT_WINDOWS_S: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
"""Windows of the length of an engine's steps. [s]"""
MINIMUM_WINDOWS = 5
"""Fewer complete windows than this say nothing about a variance."""
ZERO_GAP_LIMIT = 0.2
"""Share of zero gaps above which stamps are taken as rounded to a grid."""
IDC_RATIO_LIMIT = 3.0
"""IDC(60 s) / IDC(1 s) above which no renewal process describes the arrivals."""
IDC_SLACK = 0.3
"""Smaller differences of IDC move a two-moment mean wait, (IDC + cs^2) / 2, by less than 15 % of the Poisson one."""
PEAK_LIMIT = 3.0
"""Peak minute / mean minute above which the mean rate has no steady state to size for."""
SAMPLE_POINTS = 610
"""Joint length sample of a workload from parameters: a Fibonacci number, see `_lattice`."""
_LATTICE_STEP = 377
"""The Fibonacci number before 610."""


RATE_WINDOWS_S = (1.0, 10.0, 60.0, 300.0)
"""Windows within which a rate may be taken as steady, for requests that stay much shorter. [s]"""


def arrival_statistics(t_s: ArrayLike) -> ArrivalStatistics:
    """Rate, gap and count statistics of recorded arrivals.

    Parameters
    ----------
    t_s : arrival times, finite, non-decreasing, at least two, not all equal. [s]

    Returns
    -------
    The rate is that of the gaps, (n - 1) / span. IDC and peak/mean hold the windows of `WINDOWS_S` that fit at least
    five times into the span. The lag-1 correlation is 0 where there are fewer than three gaps or all are equal.

    >>> arrival_statistics([0.0, 1.0, 2.0, 4.0]).rate_rps
    0.75
    """
    t = _checked_times(t_s)
    t = t - t[0]
    gaps = np.diff(t)
    span_s = float(t[-1])
    counted = [
        (window_s, *_count_dispersion(t, window_s)) for window_s in WINDOWS_S if span_s >= MINIMUM_WINDOWS * window_s
    ]
    return ArrivalStatistics(
        rate_rps=gaps.size / span_s,
        gap_cv=float(gaps.std() / gaps.mean()),
        idc=tuple((window_s, idc) for window_s, idc, _ in counted),
        peak_to_mean=tuple((window_s, peak) for window_s, _, peak in counted),
        lag1_gap_correlation=_correlation(gaps[:-1], gaps[1:]),
        zero_gap_share=float(np.mean(gaps == 0.0)),
        span_s=span_s,
        requests=t.size,
        short_idc=tuple(
            (window_s, _count_dispersion(t, window_s)[0])
            for window_s in SHORT_WINDOWS_S
            if span_s >= MINIMUM_WINDOWS * window_s
        ),
    )


def length_statistics(n_in: ArrayLike, n_out: ArrayLike) -> LengthStatistics:
    """Mean, percentiles (linear interpolation), cv and rank correlation of prompt and output lengths. [tokens]"""
    prompt, output = np.asarray(n_in, dtype=np.float64), np.asarray(n_out, dtype=np.float64)
    if prompt.ndim != 1 or prompt.shape != output.shape or not prompt.size:
        raise ValueError(f"n_in and n_out must be equally long lists, got shapes {prompt.shape} and {output.shape}")
    if not (np.all(prompt >= 1.0) and np.all(output >= 1.0)):
        raise ValueError("n_in and n_out must be at least 1 token everywhere")
    p50_in, p90_in, p99_in, max_in = np.percentile(prompt, [50, 90, 99, 100]).tolist()
    p50_out, p90_out, p99_out, max_out = np.percentile(output, [50, 90, 99, 100]).tolist()
    return LengthStatistics(
        mean_in=float(prompt.mean()),
        p50_in=p50_in,
        p90_in=p90_in,
        p99_in=p99_in,
        max_in=max_in,
        cv_in=float(prompt.std() / prompt.mean()),
        mean_out=float(output.mean()),
        p50_out=p50_out,
        p90_out=p90_out,
        p99_out=p99_out,
        max_out=max_out,
        cv_out=float(output.std() / output.mean()),
        spearman=_correlation(_ranks(prompt), _ranks(output)),
    )


def range_warnings(statistics: ArrivalStatistics) -> tuple[str, ...]:
    """Where arrivals leave the range of stationary queueing formulas, one sentence each; empty inside the range."""
    idc, peak = dict(statistics.idc), dict(statistics.peak_to_mean)
    warnings: list[str] = []
    if statistics.zero_gap_share > ZERO_GAP_LIMIT:
        warnings.append(
            f"{statistics.zero_gap_share:.0%} of the gaps are zero: the stamps are quantised (or requests come in "
            "batches), and gap statistics of the recorded stamps mean nothing"
        )
    if 60.0 not in idc:
        warnings.append(f"the trace spans {statistics.span_s:.3g} s: burstiness at the scale of a minute is unknown")
    elif idc[60.0] > IDC_RATIO_LIMIT * idc[1.0] and idc[60.0] - idc[1.0] > IDC_SLACK:
        warnings.append(
            f"non-stationary: IDC grows from {idc[1.0]:.3g} at 1 s to {idc[60.0]:.3g} at 60 s; a renewal formula with "
            "the cv of the gaps is out of range"
        )
    if peak.get(60.0, 0.0) > PEAK_LIMIT:
        warnings.append(
            f"the busiest minute has {peak[60.0]:.3g} times the mean load: no steady state at the mean rate, "
            "size by peak"
        )
    return tuple(warnings)


def grid_quantum(t_s: ArrayLike) -> float:
    """Grid that the stamps were rounded to, or 0 where there is none. [s]

    A grid is the smallest step between distinct stamps of which 95 % of all steps are whole multiples (5 % tolerance,
    since a logger wakes up a little late). Equal stamps on a grid far finer than the mean gap are batches, not
    rounding: with Poisson arrivals a zero-gap share of 20 % takes 0.46 requests per grid cell, so below 0.05 the
    answer is 0.
    """
    t = _checked_times(t_s)
    steps = np.diff(t)
    steps = steps[steps > 0.0]
    smallest = float(steps.min())
    quantum = float(steps[steps < 1.5 * smallest].mean())
    multiples = steps / quantum
    on_grid = float(np.mean(np.abs(multiples - np.round(multiples)) <= 0.05))
    requests_per_cell = (t.size - 1) / float(t[-1] - t[0]) * quantum
    return quantum if on_grid >= 0.95 and requests_per_cell >= 0.05 else 0.0


def spread_quantised(t_s: ArrayLike, quantum: float) -> NDArray[np.float64]:
    r"""Arrivals with equal stamps spread uniformly over the `quantum` that follows the stamp, in order.

    Notes
    -----
    The m requests of one stamp get m positions that look like independent uniform numbers, sorted, taken from a fixed
    hash of the request's index: the same input gives the same output, and nothing is drawn. Equal spacing would be
    simpler, and wrong: it makes the stream more regular than any service sees, so IDC(1 s) of a rounded Poisson stream
    falls to nearly 0 and every such trace looks non-stationary. Counts between the stamps stay as recorded.
    """
    t = _checked_times(t_s)
    if not 0.0 < quantum < math.inf:
        raise ValueError(f"quantum must be positive and finite, got {quantum!r}")
    first_of_stamp = np.concatenate([[True], np.diff(t) > 0.0])
    stamp = np.cumsum(first_of_stamp) - 1
    # a stamp that follows earlier than one quantum bounds the spread, so that the order of arrivals is kept
    starts = t[first_of_stamp]
    width = np.append(np.minimum(np.diff(starts), quantum), quantum)
    position = _hashed_uniform(t.size)
    position = position[np.lexsort((position, stamp))]
    spread: NDArray[np.float64] = t + position * width[stamp]
    return spread


def settled_stamps(t_s: ArrayLike) -> tuple[NDArray[np.float64], str]:
    """Stamps as a service sees them: those on a grid, with more than 20 % zero gaps, spread over it; and a word on it.

    The word is empty where nothing was changed, and says so where many gaps are zero on no grid.
    """
    t = np.asarray(t_s, dtype=np.float64)
    zero = float(np.mean(np.diff(t) == 0.0)) if t.size > 1 else 0.0
    if zero <= ZERO_GAP_LIMIT:
        return t, ""
    # requests that all come at once have no grid
    quantum = grid_quantum(t) if t[-1] > t[0] else 0.0
    if not quantum:
        return t, f"{zero:.0%} of the gaps are zero, but the stamps lie on no coarse grid: taken as batches"
    return spread_quantised(t, quantum), (
        f"{zero:.0%} of the gaps are zero: the stamps are quantised to {quantum:.3g} s and were spread over it; "
        "burstiness below that scale is an assumption"
    )


def workload_from_trace(trace: Trace) -> Workload:
    """Workload of a recorded trace: its statistics, its joint lengths, and where stationary formulas do not hold.

    Stamps on a grid with more than 20 % zero gaps are spread over the grid first; `zero_gap_share` stays as recorded.
    """
    recorded = arrival_statistics(trace.t_s)
    stamps, word = settled_stamps(trace.t_s)
    seen = recorded if stamps is trace.t_s else arrival_statistics(stamps)
    # what the word says is not said twice
    judged = replace(seen, zero_gap_share=0.0) if word else seen
    warnings = (*((word,) if word else ()), *range_warnings(judged))
    arrivals = replace(seen, zero_gap_share=recorded.zero_gap_share)
    return Workload(
        name=trace.name,
        arrivals=arrivals,
        n_in=trace.n_in.astype(np.float64),
        n_out=trace.n_out.astype(np.float64),
        warnings=warnings,
        windows=tuple((window_s, window_rates(stamps, window_s)) for window_s in RATE_WINDOWS_S),
    )


def window_rates(t_s: ArrayLike, window_s: float) -> NDArray[np.float64]:
    """Arrival rate in consecutive windows, the last one cut at the last arrival and left out if it is
    shorter than half. [1/s]

    A trace shorter than a window gives one window of its whole span.
    """
    t = np.asarray(t_s, dtype=np.float64)
    span = float(t[-1])
    whole = int(span // window_s)
    if whole == 0:
        return np.array([len(t) / span])
    edges = np.arange(whole + 1) * window_s
    rest = span - edges[-1]
    if rest >= window_s / 2.0:
        edges = np.append(edges, np.nextafter(span, np.inf))
    return np.asarray(np.histogram(t, edges)[0] / np.diff(edges), dtype=np.float64)


def workload_from_parameters(
    rate_rps: float,
    *,
    n_in: LengthDistribution,
    n_out: LengthDistribution,
    gap_cv: float = 1.0,
    name: str = "parameters",
) -> Workload:
    """Workload of a stationary renewal process with independent prompt and output lengths.

    Parameters
    ----------
    rate_rps : mean arrival rate, > 0. [requests/s]
    n_in, n_out : distributions of the lengths, sampled at 610 points and rounded to whole tokens, at least 1. [tokens]
    gap_cv : coefficient of variation of the gaps, >= 0; 1 is Poisson. [-]
    name : what a report calls it.

    Returns
    -------
    IDC is cv^2 at every window, its limit at long windows. Nothing was recorded: no span, no peaks, 0 requests.
    """
    if not 0.0 < rate_rps < math.inf:
        raise ValueError(f"rate_rps must be positive and finite, got {rate_rps!r}")
    if not 0.0 <= gap_cv < math.inf:
        raise ValueError(f"gap_cv must be >= 0 and finite, got {gap_cv!r}")
    u_in, u_out = _lattice()
    # what the limit at long windows leaves out: from single steps to where the index has reached it
    windows = tuple(w for w in (*SHORT_WINDOWS_S, 1.0, 3.0) if gap_cv != 1.0)
    return Workload(
        name=name,
        arrivals=ArrivalStatistics(
            rate_rps=rate_rps,
            gap_cv=gap_cv,
            idc=tuple((window_s, gap_cv**2) for window_s in WINDOWS_S),
            peak_to_mean=(),
            lag1_gap_correlation=0.0,
            zero_gap_share=0.0,
            span_s=0.0,
            requests=0,
            short_idc=tuple(zip(windows, _gamma_dispersion(rate_rps, gap_cv, windows), strict=True)),
        ),
        n_in=_whole_tokens(n_in.quantile(u_in)),
        n_out=_whole_tokens(n_out.quantile(u_out)),
    )


def _gamma_dispersion(rate_rps: float, gap_cv: float, windows: tuple[float, ...]) -> tuple[float, ...]:
    """IDC of renewal arrivals with gamma gaps; of perfectly regular ones, 0."""
    if not windows:
        return ()
    if gap_cv == 0.0:
        return (0.0,) * len(windows)
    from servecast.model.arrival_processes import GammaRenewal

    return tuple(GammaRenewal.from_cv(rate_rps, gap_cv).idc(np.array(windows)).tolist())


def scaled(workload: Workload, factor: float) -> Workload:
    """The workload at `factor` times its rate, with the same IDC at every window and the same lengths.

    That is what k independent services of this kind bring together: variance and mean of every count grow by k, so
    burstiness neither shrinks nor grows. Thinning (each request kept with probability p) would move IDC - 1 by the
    factor p; playing the trace faster would keep cv and shorten the windows; one common rate drift, k times as strong,
    would multiply IDC - 1 by k. Peak to mean is kept too: right for a drift that all share, too high otherwise.
    """
    if not 0.0 < factor < math.inf:
        raise ValueError(f"factor must be positive and finite, got {factor!r}")
    recorded = workload.arrivals
    arrivals = replace(recorded, rate_rps=recorded.rate_rps * factor, requests=round(recorded.requests * factor))
    windows = tuple((window_s, rates * factor) for window_s, rates in workload.windows)
    return replace(workload, arrivals=arrivals, windows=windows)


def _checked_times(t_s: ArrayLike) -> NDArray[np.float64]:
    t = np.asarray(t_s, dtype=np.float64)
    if t.ndim != 1 or t.size < 2:
        raise ValueError(f"t_s must hold at least 2 arrivals, got shape {t.shape}")
    if not np.all(np.isfinite(t)):
        raise ValueError("t_s must be finite")
    if np.any(np.diff(t) < 0.0):
        raise ValueError(f"t_s must not decrease, but does after arrival {int(np.argmax(np.diff(t) < 0.0))}")
    if t[-1] == t[0]:
        raise ValueError(f"t_s must not be all equal (a rate is undefined), got {t.size} arrivals at {t[0]:g} s")
    return t


def _count_dispersion(t: NDArray[np.float64], window_s: float) -> tuple[float, float]:
    """IDC and peak/mean of the counts in complete windows; `t` starts at 0."""
    windows = math.floor(t[-1] / window_s)
    index = np.floor(t / window_s)
    index = index[index < windows]
    # only occupied windows are held: one stray stamp years later must not cost an array of years
    starts = np.flatnonzero(np.diff(index, prepend=-1.0))
    counts = np.diff(np.append(starts, index.size)).astype(np.float64)
    mean = index.size / windows
    variance = float(np.sum((counts - mean) ** 2) + (windows - counts.size) * mean**2) / windows
    return variance / mean, float(counts.max()) / mean


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if x.size < 2:
        return 0.0
    dx, dy = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(dx @ dx) * float(dy @ dy))
    # gaps that differ by rounding only are equal gaps
    negligible = 1e-18 * x.size * max(float(np.abs(x).max()), float(np.abs(y).max())) ** 2
    return float(dx @ dy) / scale if scale > negligible else 0.0


def _ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, ties get their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_rank: NDArray[np.float64] = ends - (counts + 1) / 2.0
    return mean_rank[inverse]


def _hashed_uniform(n: int) -> NDArray[np.float64]:
    """n numbers in (0, 1) from the indices 1..n, mixed as in SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniform: NDArray[np.float64] = ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return uniform


def _lattice() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two coordinates of the 610-point Fibonacci lattice, moved to cell centres.

    Each margin is exactly the 610 mid-probabilities, so a margin of the sample is as good as a one-dimensional quantile
    list, and the plane is filled evenly (Sloan & Joe, Lattice Methods for Multiple Integration, 1994, section 4.3).
    """
    i = np.arange(SAMPLE_POINTS)
    return (i + 0.5) / SAMPLE_POINTS, (i * _LATTICE_STEP % SAMPLE_POINTS + 0.5) / SAMPLE_POINTS


def _whole_tokens(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(np.rint(tokens), 1.0)

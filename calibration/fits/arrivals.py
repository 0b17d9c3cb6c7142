"""Which arrival process a trace follows, how well, and over which stretches of time.

Candidates are fitted to the gaps by maximum likelihood (Poisson, Gamma, Weibull; batches where equal stamps are no
rounding) and to the counts by moments (two-state modulation). A candidate is judged twice: its gaps by
Kolmogorov-Smirnov with a parametric bootstrap, its counts by IDC at 1, 10 and 60 s. Where the rate is not steady, the
trace is cut into windows of constant rate, and the candidates are fitted and judged again on the clock that runs with
the windows' rates.

Limits: p-values take gaps as independent. Within windows the rates were fitted, too, which the bootstrap does not
repeat (a window holds many arrivals). No p-value is given for modulated arrivals, whose gaps depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.calibration.fits.gap_fits import (
    REPLICATES,
    GapFit,
    fit_gamma,
    fit_poisson,
    fit_weibull,
    ks_distance,
)
from servecast.calibration.fits.modulation import fit_modulated
from servecast.calibration.fits.rate_windows import (
    LEAST_ARRIVALS,
    SIGNIFICANCE,
    RateTest,
    RateWindow,
    operational_times,
    rate_tests,
    rate_windows,
)
from servecast.model.arrival_processes import (
    ArrivalProcess,
    BatchArrivals,
    EmpiricalBatch,
    GeometricBatch,
    MarkovModulated,
)
from servecast.model.arrivals import IDC_SLACK, arrival_statistics, grid_quantum, spread_quantised

Floats = NDArray[np.float64]

COUNT_WINDOWS_S = (1.0, 10.0, 60.0)
"""Windows at which counts are judged. [s]"""
COUNT_ERRORS = 3.0
"""Standard errors that an observed IDC may lie away from the model's."""
NEAR_DISTANCE = 0.05
"""A Kolmogorov-Smirnov distance of that size, however significant, is that of a Weibull process from a Poisson one when
cv^2 differs by 0.3 (0.048; Gamma: 0.059), `IDC_SLACK`. It does not bound the tail of the gaps; the counts do."""
KOLMOGOROV_1_PERCENT = 1.63
"""sqrt(n) D beyond which 1 % of samples lie (Kolmogorov's limit law)."""
RATE_SLACK = 0.1
"""A fitted mean rate that is further off misses the trace's load."""
LEAST_GAPS = 30
"""Fewer gaps tell no model from another."""
MOST_GAPS = 50_000
"""Gaps of a longer trace are thinned to about so many, evenly over it."""
REGULAR_CV = 0.03
"""Gaps more even than that come from a timer."""
BATCH_SHARE = 0.01
"""Zero gaps below this share are coincidences of rounding."""
BATCH_EXCESS = 3.0
"""Zero gaps are batches above this multiple of what rounding to the smallest step explains."""
RELAXATIONS = 100.0
"""Switching is a steady process where the trace has seen its relaxation time so often."""
WINDOW_SHARE = 5.0
"""Within windows, counts are judged up to the median window over this: fitted rates flatten what is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountCheck:
    """Dispersion of counts, observed and modelled."""

    window_s: float
    observed: float
    modelled: float
    tolerance: float
    """Largest difference that passes: three standard errors, or 0.3 (relative above 1) where that is more."""

    @property
    def agrees(self) -> bool:
        """Observed lies within the tolerance."""
        return abs(self.observed - self.modelled) <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalCandidate:
    """One process fitted to the arrivals and judged."""

    process: ArrivalProcess
    method: str
    standard_errors: dict[str, float]
    """Of the process' parameters, where they are known."""
    log_likelihood: float | None
    aic: float | None
    """Comparable among candidates with a density of gaps only."""
    ks_distance: float
    """Of the gaps; of the gaps between batches for batches."""
    ks_p: float | None
    counts: tuple[CountCheck, ...]
    accepted: bool
    near: bool
    """Accepted although the gaps differ significantly: the distance is small, and the counts agree."""
    verdict: str

    @property
    def count_misfit(self) -> float:
        """Mean distance of observed and modelled IDC, as logarithms; infinite where a count never varies."""
        distances = [abs(math.log(one.observed / one.modelled)) if one.observed else math.inf for one in self.counts]
        return float(np.mean(distances)) if distances else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalFit:
    """The arrival model of a trace, with what speaks for and against it."""

    requests: int
    span_s: float
    chosen: ArrivalCandidate
    by_window: bool
    """The chosen process runs on the clock of `windows`: its rate is the mean one, and each window has its own."""
    reason: str
    """Why this one, in one sentence."""
    stationary: bool
    tests: tuple[RateTest, ...]
    windows: tuple[RateWindow, ...]
    """Stretches of constant rate from the first arrival on; empty where the rate is steady."""
    candidates: tuple[ArrivalCandidate, ...]
    """Fitted to the whole trace."""
    candidates_by_window: tuple[ArrivalCandidate, ...]
    """Fitted on the clock of the windows; empty where the rate is steady or was not cut."""
    notes: tuple[str, ...]

    @property
    def process(self) -> ArrivalProcess:
        """The chosen process."""
        return self.chosen.process

    @property
    def name(self) -> str:
        """The chosen model in words."""
        return f"{self.process.name} in {len(self.windows)} windows" if self.by_window else self.process.name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stamps:
    """Arrivals that start at 0, and how to read equal ones."""

    t: Floats
    batches: bool
    notes: tuple[str, ...]


def fit_arrivals(t_s: ArrayLike) -> ArrivalFit:
    """Fit and judge arrival models of recorded arrivals.

    Parameters
    ----------
    t_s : arrival times, finite, non-decreasing, at least two, not all equal. [s]

    Returns
    -------
    The simplest accepted model; within windows of constant rate where the rate is not steady. Where none is accepted,
    the one whose counts come nearest, with the verdict "rejected: ...". Stamps rounded to a grid are spread over it
    first.
    """
    stamps = _stamps(np.asarray(t_s, dtype=np.float64))
    t, span = stamps.t, float(stamps.t[-1])
    candidates = _candidates(t, stamps.batches, COUNT_WINDOWS_S)
    tests = rate_tests(t, _likeliest(candidates).process)
    modulated = _modulation_explains(candidates, tests, span)
    stationary = modulated or not any(test.rejects for test in tests)
    windows = () if stationary else rate_windows(t)
    by_window: tuple[ArrivalCandidate, ...] = ()
    if len(windows) > 1:
        by_window = _candidates(_steady_clock(t, windows), stamps.batches, _short_windows(windows))
    chosen = _chosen(candidates, by_window)
    in_windows = any(chosen is one for one in by_window)
    return ArrivalFit(
        requests=t.size,
        span_s=span,
        chosen=chosen,
        by_window=in_windows,
        reason=_reason(chosen, candidates, in_windows),
        stationary=stationary,
        tests=tests,
        windows=windows,
        candidates=candidates,
        candidates_by_window=by_window,
        notes=(*stamps.notes, *_fit_notes(t, tests, windows)),
    )


def arrival_summary(fit: ArrivalFit) -> dict[str, Any]:
    """The fit in the types of JSON; keys as in docs/json.md."""
    return {
        "name": fit.name,
        "accepted": fit.chosen.accepted,
        "verdict": fit.chosen.verdict,
        "reason": fit.reason,
        "by_window": fit.by_window,
        "process": _process_summary(fit.chosen),
        "stationary": fit.stationary,
        "tests": [asdict(test) for test in fit.tests],
        "windows": [asdict(window) for window in fit.windows],
        "candidates": [_candidate_summary(one) for one in fit.candidates],
        "candidates_by_window": [_candidate_summary(one) for one in fit.candidates_by_window],
        "notes": list(fit.notes),
    }


def _stamps(recorded: Floats) -> _Stamps:
    statistics = arrival_statistics(recorded)  # refuses what is no list of arrivals
    t = recorded - recorded[0]
    if not statistics.zero_gap_share:
        return _Stamps(t=t, batches=False, notes=())
    share = f"{statistics.zero_gap_share:.1%} of the gaps are zero"
    if quantum := grid_quantum(t):
        note = f"{share}: stamps rounded to {quantum:.3g} s were spread over it"
        return _Stamps(t=_from_zero(spread_quantised(t, quantum)), batches=False, notes=(note,))
    gaps = np.diff(t)
    smallest = float(gaps[gaps > 0.0].min())
    # of a Poisson stream in cells of q, about lambda q / 2 of the gaps stay inside a cell
    explained = 0.5 * statistics.rate_rps * smallest
    if statistics.zero_gap_share > max(BATCH_SHARE, BATCH_EXCESS * explained):
        return _Stamps(t=t, batches=True, notes=(f"{share}, on no coarse grid: taken as batches",))
    note = f"{share}: equal stamps were spread over {smallest:.3g} s, the smallest step"
    return _Stamps(t=_from_zero(spread_quantised(t, smallest)), batches=False, notes=(note,))


def _from_zero(t: Floats) -> Floats:
    return np.asarray(t - t[0], dtype=np.float64)


def _steady_clock(t: Floats, windows: tuple[RateWindow, ...]) -> Floats:
    """Arrivals on the windows' clock, in seconds at the mean rate."""
    clock = operational_times(t, windows)
    return _from_zero(clock * (float(t[-1]) / float(clock[-1])))


def _short_windows(windows: tuple[RateWindow, ...]) -> tuple[float, ...]:
    median = float(np.median([one.end_s - one.start_s for one in windows]))
    return tuple(window for window in COUNT_WINDOWS_S if window <= median / WINDOW_SHARE)


def _candidates(t: Floats, batches: bool, windows_s: Sequence[float]) -> tuple[ArrivalCandidate, ...]:
    """All that can be fitted, in order of simplicity."""
    observed = _observed_counts(t, windows_s)
    gaps = np.diff(np.unique(t))
    if gaps.size > MOST_GAPS:
        gaps = gaps[:: math.ceil(gaps.size / MOST_GAPS)]
    found = [_batches(t, gaps)] if batches else [_by_likelihood(fit) for fit in _gap_fits(gaps)]
    if not batches and t.size > LEAST_GAPS and (modulated := _modulated(t, gaps)):
        found.append(modulated)
    rate = (t.size - 1) / float(t[-1])
    return tuple(_judged(one, observed, rate, float(t[-1]), gaps.size) for one in found)


def _gap_fits(gaps: Floats) -> list[GapFit]:
    fits = [fit_poisson(gaps)]
    if gaps.size >= LEAST_GAPS and gaps.std() > REGULAR_CV * gaps.mean():
        # both have two parameters: the likelier one first
        fits += sorted((fit_gamma(gaps), fit_weibull(gaps)), key=lambda fit: fit.aic)
    return fits


def _by_likelihood(fit: GapFit) -> ArrivalCandidate:
    return ArrivalCandidate(
        process=fit.process,
        method="maximum likelihood",
        standard_errors=fit.standard_errors,
        log_likelihood=fit.log_likelihood,
        aic=fit.aic,
        ks_distance=fit.ks_distance,
        ks_p=fit.ks_p,
        counts=(),
        accepted=False,
        near=False,
        verdict="",
    )


def _modulated(t: Floats, gaps: Floats) -> ArrivalCandidate | None:
    fit = fit_modulated(t)
    if fit is None:
        return None
    return ArrivalCandidate(
        process=fit.process,
        method="moments of counts" + (", quiet rate bounded by 0" if fit.interrupted else ""),
        standard_errors=fit.standard_errors,
        log_likelihood=None,
        aic=None,
        ks_distance=ks_distance(gaps, fit.process),
        ks_p=None,
        counts=(),
        accepted=False,
        near=False,
        verdict="",
    )


def _batches(t: Floats, epoch_gaps: Floats) -> ArrivalCandidate:
    """Epochs by their exponential gaps, sizes by their mean, or as counted where they are not geometric."""
    epochs = fit_poisson(epoch_gaps)
    sizes, times = np.unique(np.unique(t, return_counts=True)[1], return_counts=True)
    count = int(times.sum())
    mean = float((sizes * times).sum()) / count
    geometric = GeometricBatch(mean=mean)
    counted = np.cumsum(times) / count
    expected = 1.0 - (1.0 - 1.0 / mean) ** sizes
    distance = float(np.abs(counted - expected).max())
    batch: GeometricBatch | EmpiricalBatch = geometric
    deviation = math.sqrt(mean * (mean - 1.0))
    # Kolmogorov's bound is wide for whole numbers and a fitted mean: only clear misfits lose the formula
    if distance > KOLMOGOROV_1_PERCENT / math.sqrt(count):
        batch = EmpiricalBatch(sizes=tuple(sizes.tolist()), shares=tuple((times / count).tolist()))
        deviation = math.sqrt(max(0.0, batch.second_moment - mean**2))
    rate = epochs.process.rate_rps
    return ArrivalCandidate(
        process=BatchArrivals(epoch_rate_per_s=rate, batch=batch),
        method="maximum likelihood" if batch is geometric else "maximum likelihood, batch sizes as counted",
        standard_errors={
            "epoch_rate_per_s": rate / math.sqrt(epoch_gaps.size),
            "mean_batch": deviation / math.sqrt(count),
        },
        log_likelihood=None,
        aic=None,
        ks_distance=epochs.ks_distance,
        ks_p=epochs.ks_p,
        counts=(),
        accepted=False,
        near=False,
        verdict="",
    )


def _observed_counts(t: Floats, windows_s: Sequence[float]) -> tuple[tuple[float, float], ...]:
    return tuple((window, idc) for window, idc in arrival_statistics(t).idc if window in windows_s)


def _judged(
    one: ArrivalCandidate, observed: Sequence[tuple[float, float]], rate_rps: float, span_s: float, n: int
) -> ArrivalCandidate:
    """The candidate with its counts, whether it is accepted, and why."""
    counts = tuple(_count_check(one.process, window, idc, span_s) for window, idc in observed)
    if n < LEAST_GAPS:
        return replace(one, counts=counts, verdict=f"undecided: too few gaps to judge ({n})")
    p = one.ks_p
    fits = p >= SIGNIFICANCE if p is not None else one.ks_distance <= KOLMOGOROV_1_PERCENT / math.sqrt(n)
    near = not fits and one.ks_distance <= NEAR_DISTANCE
    shown = f"KS {one.ks_distance:.2g}" + ("" if p is None else f", p {_p_text(p)}")
    faults = [] if fits or near else [f"gaps ({shown})"]
    if abs(one.process.rate_rps / rate_rps - 1.0) > RATE_SLACK:
        faults.append(f"mean rate ({rate_rps:.3g}/s observed, {one.process.rate_rps:.3g}/s modelled)")
    if misses := [check for check in counts if not check.agrees]:
        faults.append(f"counts ({_miss_words(misses)})")
    if faults:
        verdict = f"rejected: {'; '.join(faults)}"
    elif near:
        verdict = f"accepted as near: gaps differ significantly, but little ({shown}); {_count_words(counts)}"
    else:
        verdict = f"accepted: gaps fit ({shown}); {_count_words(counts)}"
    return replace(one, counts=counts, accepted=not faults, near=near and not faults, verdict=verdict)


def _p_text(p: float) -> str:
    return f"{p:.2g}" if p > 1.0 / (1 + REPLICATES) else f"<= {p:.2g}"


def _count_words(counts: Sequence[CountCheck]) -> str:
    if not counts:
        return "too short to judge counts"
    return f"counts agree up to {max(check.window_s for check in counts):g} s"


def _miss_words(misses: Sequence[CountCheck]) -> str:
    """Such as: IDC 3.86, 16.1 at 10, 60 s; modelled 1, 1."""
    observed, modelled, windows = (
        ", ".join(f"{getattr(one, field):.3g}" for one in misses) for field in ("observed", "modelled", "window_s")
    )
    return f"IDC {observed} at {windows} s; modelled {modelled}"


def _count_check(process: ArrivalProcess, window_s: float, observed: float, span_s: float) -> CountCheck:
    modelled = float(process.idc(window_s))
    # windows within a relaxation time are not independent
    memory_s = 2.0 / process.relaxation_per_s if isinstance(process, MarkovModulated) else 0.0
    error = modelled * math.sqrt(2.0 * max(window_s, memory_s) / span_s)
    return CountCheck(
        window_s=window_s,
        observed=observed,
        modelled=modelled,
        tolerance=max(IDC_SLACK * max(1.0, modelled), COUNT_ERRORS * error),
    )


def _likeliest(candidates: Sequence[ArrivalCandidate]) -> ArrivalCandidate:
    """The one that the gaps prefer; batches, where they are the only one."""
    return min(candidates, key=lambda one: math.inf if one.aic is None else one.aic)


def _modulation_explains(candidates: Sequence[ArrivalCandidate], tests: Sequence[RateTest], span_s: float) -> bool:
    """Counts are over-dispersed, but by a switching that the trace has seen often, and without a trend."""
    if any(test.rejects and test.name == "trend" for test in tests):
        return False
    return any(
        one.accepted
        and isinstance(one.process, MarkovModulated)
        and one.process.relaxation_per_s * span_s >= RELAXATIONS
        for one in candidates
    )


def _chosen(whole: Sequence[ArrivalCandidate], by_window: Sequence[ArrivalCandidate]) -> ArrivalCandidate:
    """The simplest that fits, else the simplest that is near, else the nearest in counts; windows go first."""
    for pool in (by_window, whole):
        for one in sorted((one for one in pool if one.accepted), key=lambda one: one.near):
            return one
    return min([*by_window, *whole], key=lambda one: (one.count_misfit, one.ks_distance))


def _reason(chosen: ArrivalCandidate, whole: Sequence[ArrivalCandidate], in_windows: bool) -> str:
    if chosen.verdict.startswith("undecided"):
        return f"{chosen.process.name} is assumed: {chosen.verdict.removeprefix('undecided: ')}."
    where = " within windows of constant rate" if in_windows else ""
    if not chosen.accepted:
        return (
            f"No model is accepted; {chosen.process.name}{where} comes nearest in the dispersion of counts: replay the "
            "trace itself where its bursts matter."
        )
    if in_windows:
        return f"{chosen.process.name} is the simplest model that gaps and counts accept{where}; no single rate does."
    simpler = [one.process.name for one in whole[: whole.index(chosen)] if not one.accepted]
    tail = f"; {' and '.join(simpler)} {'is' if len(simpler) == 1 else 'are'} rejected" if simpler else ""
    return f"{chosen.process.name} is the simplest model that gaps and counts accept{tail}."


def _fit_notes(t: Floats, tests: Sequence[RateTest], windows: Sequence[RateWindow]) -> tuple[str, ...]:
    notes = []
    if not tests:
        notes.append(f"fewer than {LEAST_ARRIVALS} arrivals: whether the rate is steady was not tested")
    if len(windows) == 1:
        notes.append("the rate is not steady, but no cut is worth its penalty: the trace was left whole")
    gaps = t.size - 1
    if gaps > MOST_GAPS:
        notes.append(f"gaps were judged by every {math.ceil(gaps / MOST_GAPS)}th of {gaps}")
    mean_gap = float(t[-1]) / gaps
    if gaps >= LEAST_GAPS and float(np.diff(t).std()) <= REGULAR_CV * mean_gap:
        notes.append("gaps are even, as of a timer: Poisson arrivals overstate every wait")
    return tuple(notes)


def _process_summary(one: ArrivalCandidate) -> dict[str, Any]:
    process = one.process
    return {
        "name": process.name,
        "rate_rps": process.rate_rps,
        "gap_cv": process.gap_cv,
        "parameters": process.parameters,
        "standard_errors": one.standard_errors,
    }


def _candidate_summary(one: ArrivalCandidate) -> dict[str, Any]:
    return {
        **_process_summary(one),
        "method": one.method,
        "log_likelihood": one.log_likelihood,
        "aic": one.aic,
        "ks_distance": one.ks_distance,
        "ks_p": one.ks_p,
        "counts": [asdict(check) | {"agrees": check.agrees} for check in one.counts],
        "accepted": one.accepted,
        "verdict": one.verdict,
    }

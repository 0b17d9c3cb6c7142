"""Fits of arrival models: round trips over drawn arrivals, size of the tests, cuts by brute force, public traces."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from servecast.calibration.fits.arrivals import ArrivalFit, arrival_summary, fit_arrivals
from servecast.calibration.fits.gap_fits import fit_gamma, fit_poisson, fit_weibull
from servecast.calibration.fits.modulation import factorial_cumulants, fit_modulated, third_cumulant
from servecast.calibration.fits.rate_windows import (
    LEAST_SEGMENT_BINS,
    operational_times,
    optimal_cuts,
    rate_tests,
    rate_windows,
)
from servecast.model.arrival_processes import (
    ArrivalProcess,
    BatchArrivals,
    EmpiricalBatch,
    GammaRenewal,
    GeometricBatch,
    MarkovModulated,
    Poisson,
    WeibullRenewal,
)
from servecast.readers.traces import read_trace
from servecast.validation.sampling import arrival_times

DataPath = Callable[..., Path]
Floats = NDArray[np.float64]

PROCESSES: tuple[ArrivalProcess, ...] = (
    Poisson(rate_rps=7.0),
    GammaRenewal.from_cv(7.0, 2.0),
    GammaRenewal.from_cv(7.0, 0.5),
    WeibullRenewal.from_cv(7.0, 3.0),
    WeibullRenewal.from_cv(7.0, 0.6),
    MarkovModulated(low_rps=1.0, high_rps=8.0, to_high_per_s=0.1, to_low_per_s=0.3),
    MarkovModulated(low_rps=4.0, high_rps=20.0, to_high_per_s=0.5, to_low_per_s=0.5),
    BatchArrivals(epoch_rate_per_s=2.0, batch=GeometricBatch(mean=3.0)),
    BatchArrivals(epoch_rate_per_s=2.0, batch=EmpiricalBatch(sizes=(1, 8), shares=(0.5, 0.5))),
)


def drawn(process: ArrivalProcess, n: int, seed: int) -> Floats:
    t = arrival_times(process, n, np.random.default_rng(seed))
    return t - t[0]


def piecewise(rates: list[float], seconds: float, seed: int) -> Floats:
    """Poisson arrivals whose rate steps every `seconds`."""
    rng = np.random.default_rng(seed)
    parts = [
        np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds))) + index * seconds
        for index, rate in enumerate(rates)
    ]
    t = np.concatenate(parts)
    return t - t[0]


# ---- round trips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=[f"{i}" for i in range(len(PROCESSES))])
@pytest.mark.parametrize("seed", [1, 2])
def test_round_trip(process: ArrivalProcess, seed: int) -> None:
    """fit(sample(theta)) finds the family, accepts it, and theta within 4 standard errors."""
    fit = fit_arrivals(drawn(process, 10_000, seed))
    assert fit.stationary
    assert fit.windows == ()
    assert fit.chosen.accepted
    assert type(fit.process) is type(process)
    assert fit.chosen.standard_errors
    for name, error in fit.chosen.standard_errors.items():
        assert error > 0.0
        assert abs(fit.process.parameters[name] - process.parameters[name]) < 4.0 * error
    if isinstance(process, BatchArrivals) and isinstance(fit.process, BatchArrivals):
        assert type(fit.process.batch) is type(process.batch)


@pytest.mark.parametrize(
    ("call", "process"),
    [
        (fit_poisson, Poisson(rate_rps=2.0)),
        (fit_gamma, GammaRenewal(rate_rps=2.0, shape=0.5)),
        (fit_weibull, WeibullRenewal(rate_rps=2.0, shape=0.7)),
    ],
)
def test_standard_errors_by_monte_carlo(call: Callable, process: ArrivalProcess) -> None:
    """Monte Carlo: 200 samples of 400 gaps spread as the standard error says; 200 samples know a spread to 5 %, 4 of
    which are allowed, and large-sample formulas are a little short at 400."""
    fits = [call(np.diff(drawn(process, 401, seed))) for seed in range(200)]
    for name, error in fits[0].standard_errors.items():
        found = np.array([fit.process.parameters[name] for fit in fits])
        errors = np.array([fit.standard_errors[name] for fit in fits])
        assert error > 0.0
        assert float(errors.mean()) == pytest.approx(float(found.std(ddof=1)), rel=0.2)


def test_likelihood_fits_against_scipy() -> None:
    """Independent code: scipy.stats fits with the location fixed at 0."""
    gaps = np.random.default_rng(4).weibull(0.6, 3000) * 0.3
    k, _, theta = stats.gamma.fit(gaps, floc=0)
    found = fit_gamma(gaps)
    assert found.process.parameters["shape"] == pytest.approx(k, rel=1e-6)
    assert found.log_likelihood == pytest.approx(float(stats.gamma.logpdf(gaps, k, scale=theta).sum()), rel=1e-8)
    c, _, scale = stats.weibull_min.fit(gaps, floc=0)
    weibull = fit_weibull(gaps)
    assert weibull.process.parameters["shape"] == pytest.approx(c, rel=1e-4)
    assert weibull.log_likelihood == pytest.approx(
        float(stats.weibull_min.logpdf(gaps, c, scale=scale).sum()), rel=1e-6
    )
    expected = stats.kstest(gaps, stats.weibull_min(c, scale=scale).cdf).statistic
    assert weibull.ks_distance == pytest.approx(expected, rel=1e-3)


# ---- the tests keep their size -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "process"),
    [
        (fit_poisson, Poisson(rate_rps=2.0)),
        (fit_gamma, GammaRenewal(rate_rps=2.0, shape=0.5)),
        (fit_weibull, WeibullRenewal(rate_rps=2.0, shape=0.7)),
    ],
)
def test_p_values_are_uniform_under_the_model(call: Callable, process: ArrivalProcess) -> None:
    """Theory: a p-value that knows of the fit is at most 0.1 in a tenth of 300 samples, to 4 errors;
    the plain Kolmogorov p-value would almost never."""
    low = np.mean([call(np.diff(drawn(process, 601, 1000 + seed))).ks_p <= 0.1 for seed in range(300)])
    assert abs(low - 0.1) < 4.0 * math.sqrt(0.09 / 300)


def test_lilliefors_quantile() -> None:
    """Published: Stephens (JASA 69, 1974), exponential with fitted mean: the 5 % point of (D - 0.2/n) (sqrt n + 0.26 +
    0.5 / sqrt n) is 1.094. At that distance the bootstrap's p-value is 5 %, to its own 4 standard errors (1.6 %)."""
    from servecast.calibration.fits.gap_fits import _exponential_null, _p_value

    n = 300
    distance = 1.094 / (math.sqrt(n) + 0.26 + 0.5 / math.sqrt(n)) + 0.2 / n
    assert _p_value(distance, n, _exponential_null(n)) == pytest.approx(0.05, abs=4.0 * math.sqrt(0.0475 / 199))


@pytest.mark.parametrize("process", PROCESSES[:5], ids=[f"{i}" for i in range(5)])
def test_a_steady_rate_is_rarely_rejected(process: ArrivalProcess) -> None:
    """Theory: two tests at 1 % reject a steady process in at most 2 % of 100 samples, to 4 standard errors."""
    rejected = [any(test.rejects for test in rate_tests(drawn(process, 2000, seed), process)) for seed in range(100)]
    assert np.mean(rejected) <= 0.02 + 4.0 * math.sqrt(0.0196 / 100)


# ---- modulation ----------------------------------------------------------------------------------------


def test_third_cumulant_by_quadrature() -> None:
    """Independent: 6 times the integral of (w - s) s e^(-r s) over 0 <= s <= w by Simpson's rule."""
    from scipy.integrate import simpson

    for r, w in ((0.5, 1e-3), (0.5, 0.03), (0.5, 3.0), (2.0, 40.0)):
        s = np.linspace(0.0, w, 20_001)
        expected = 6.0 * simpson((w - s) * s * np.exp(-r * s), x=s)
        assert float(third_cumulant(np.array(w), r)) == pytest.approx(float(expected), rel=1e-6)


def test_third_cumulant_against_monte_carlo() -> None:
    """Monte Carlo: third factorial cumulant of counts, g sigma^3 times the form; 4 standard errors by 20 blocks."""
    process = MarkovModulated(low_rps=1.0, high_rps=8.0, to_high_per_s=0.1, to_low_per_s=0.3)
    t = drawn(process, 400_000, 3)
    window = 2.0
    counts = np.bincount(np.floor(t / window).astype(int))[1:-1].astype(float)
    blocks = counts[: counts.size // 20 * 20].reshape(20, -1)
    found = np.array([factorial_cumulants(block)[2] for block in blocks])
    skewness = (1.0 - 2.0 * 0.25) / math.sqrt(0.25 * 0.75)
    expected = skewness * 9.1875**1.5 * float(third_cumulant(np.array(window), 0.4))
    assert abs(found.mean() - expected) < 4.0 * found.std(ddof=1) / math.sqrt(20)


def test_interrupted_process() -> None:
    """Round trip with a quiet rate of 0, which the fit may reach only as a bound."""
    process = MarkovModulated(low_rps=0.0, high_rps=8.0, to_high_per_s=0.1, to_low_per_s=0.3)
    fit = fit_modulated(drawn(process, 20_000, 5))
    assert fit is not None
    for name in ("high_rps", "to_high_per_s", "to_low_per_s"):
        error = fit.standard_errors[name]
        assert abs(fit.process.parameters[name] - process.parameters[name]) < 4.0 * error
    assert fit.process.low_rps < 0.1


def test_nothing_to_modulate() -> None:
    """Rule: counts of Poisson arrivals, and of a timer, are not over-dispersed."""
    assert fit_modulated(drawn(Poisson(rate_rps=5.0), 20_000, 6)) is None
    assert fit_modulated(np.arange(500) * 0.5) is None


# ---- windows -------------------------------------------------------------------------------------------


def test_cuts_are_optimal() -> None:
    """Brute force: all segmentations of 12 bins into segments of at least three."""
    rng = np.random.default_rng(8)
    for _ in range(20):
        counts = rng.poisson(rng.choice([0.5, 4.0, 12.0], 4).repeat(3)).astype(float)
        penalty = float(rng.uniform(0.5, 6.0))
        found = optimal_cuts(counts, penalty)
        assert segment_cost(counts, tuple(found.tolist()), penalty) == pytest.approx(
            cheapest(counts, penalty), rel=1e-12
        )


def segment_cost(counts: Floats, edges: tuple[int, ...], penalty: float) -> float:
    total = -penalty
    for start, end in itertools.pairwise(edges):
        inside = float(counts[start:end].sum())
        total += penalty - (inside * math.log(inside / (end - start)) if inside else 0.0)
    return total


def cheapest(counts: Floats, penalty: float) -> float:
    bins = counts.size
    inner = range(1, bins)
    edges = [
        (0, *cuts, bins)
        for size in range(bins // LEAST_SEGMENT_BINS)
        for cuts in itertools.combinations(inner, size)
        if min(np.diff((0, *cuts, bins))) >= LEAST_SEGMENT_BINS
    ]
    return min(segment_cost(counts, one, penalty) for one in edges)


def test_steps_are_found() -> None:
    """Truth of the draw: rates 3, 9, 5 for 400 s each; cuts within a few bins, rates within 4 standard errors."""
    t = piecewise([3.0, 9.0, 5.0], 400.0, seed=1)
    fit = fit_arrivals(t)
    assert not fit.stationary
    assert [round(one.end_s) for one in fit.windows[:2]] == [pytest.approx(400, abs=8), pytest.approx(800, abs=8)]
    for window, rate in zip(fit.windows, (3.0, 9.0, 5.0), strict=True):
        assert abs(window.rate_rps - rate) < 4.0 * math.sqrt(rate / 400.0) + 8.0 / 400.0 * 6.0
    assert fit.by_window
    assert isinstance(fit.process, Poisson)
    assert fit.chosen.accepted
    assert fit.name == "Poisson in 3 windows"


def test_windows_cover_the_trace() -> None:
    """Rule: consecutive, from 0 to the last arrival, with all requests; an idle stretch is a window of rate 0."""
    t = np.concatenate([piecewise([6.0], 300.0, seed=2), 900.0 + piecewise([6.0], 300.0, seed=3)])
    windows = rate_windows(t)
    assert windows[0].start_s == 0.0
    assert windows[-1].end_s == pytest.approx(t[-1], rel=1e-12)
    assert all(left.end_s == right.start_s for left, right in itertools.pairwise(windows))
    assert sum(one.requests for one in windows) == t.size
    assert len(windows) == 3
    assert windows[1].rate_rps < 0.05
    clock = operational_times(t, windows)
    assert np.all(np.diff(clock) >= 0.0)


def test_a_trend_is_found() -> None:
    """Truth of the draw: the rate doubles slowly over the trace."""
    rng = np.random.default_rng(9)
    # inverse of the integral of 4 (1 + x) over x in [0, 1], 1000 s long
    u = np.sort(rng.uniform(0.0, 1.5, 6000))
    t = 1000.0 * (np.sqrt(1.0 + 2.0 * u) - 1.0)
    fit = fit_arrivals(t)
    assert not fit.stationary
    assert any(test.name == "trend" and test.rejects for test in fit.tests)
    rates = [one.rate_rps for one in fit.windows]
    assert rates == sorted(rates)


# ---- public traces -------------------------------------------------------------------------------------


def fit_of(path: Path, run: str | None = None) -> ArrivalFit:
    return fit_arrivals(read_trace(path, run=run).t_s)


def test_azure_code(data_path: DataPath) -> None:
    """Published counts by minute: an on/off process with empty minutes; no renewal model describes it."""
    fit = fit_of(data_path("azure-llm-2023", "code.csv.gz"))
    assert not fit.stationary
    assert len(fit.windows) > 5
    assert min(one.rate_rps for one in fit.windows) < 0.1 * fit.requests / fit.span_s
    renewal = [one for one in fit.candidates if not isinstance(one.process, MarkovModulated)]
    assert len(renewal) == 3
    assert all(one.verdict.startswith("rejected: gaps") for one in renewal)


def test_azure_conversation(data_path: DataPath) -> None:
    """workloads, section 4: Poisson-like below a second, IDC 16 at a minute from a drifting rate."""
    fit = fit_of(data_path("azure-llm-2023", "conv.csv.gz"))
    assert not fit.stationary
    poisson = fit.candidates[0]
    assert isinstance(poisson.process, Poisson)
    assert poisson.ks_distance < 0.03
    assert not poisson.accepted
    assert fit.by_window
    assert fit.chosen.accepted
    assert abs(fit.process.gap_cv - 1.0) < 0.1
    assert {one.window_s: one.observed for one in poisson.counts}[60.0] == pytest.approx(16.1, rel=0.01)


def test_mooncake_synthetic(data_path: DataPath) -> None:
    """workloads, section 5: stationary, cv near 1, flat IDC: Poisson."""
    fit = fit_of(data_path("mooncake", "synthetic.csv.gz"))
    assert fit.stationary
    assert isinstance(fit.process, Poisson)
    assert fit.chosen.accepted


def test_mooncake_conversation(data_path: DataPath) -> None:
    """workloads, section 4: stamps on a 3 s grid; once spread, gaps are close to Poisson's and counts are not quite."""
    fit = fit_of(data_path("mooncake", "conversation.csv.gz"))
    assert any("rounded to 3 s" in note for note in fit.notes)
    assert fit.candidates[0].ks_distance < 0.02
    assert not fit.candidates[0].accepted
    assert fit.chosen.accepted


def test_sharegpt_runs(data_path: DataPath) -> None:
    """Published: the load generator drew Poisson arrivals at 10 requests/s; 4 standard errors."""
    path = data_path("llmservingsim-vllm", "requests_input.csv")
    fit = fit_of(path, run="rtx4090-llama31-8b")
    assert fit.stationary
    assert isinstance(fit.process, Poisson)
    assert fit.chosen.accepted
    assert abs(fit.process.rate_rps - 10.0) < 4.0 * 10.0 / math.sqrt(300)


# ---- edges ---------------------------------------------------------------------------------------------


def test_coarse_stamps_are_spread() -> None:
    """Rule: Poisson arrivals rounded down to 2 s are found to be Poisson; to 1 ms likewise."""
    t = drawn(Poisson(rate_rps=4.0), 6000, 12)
    for quantum in (2.0, 1e-3):
        fit = fit_arrivals(np.floor(t / quantum) * quantum)
        assert isinstance(fit.process, Poisson)
        assert fit.chosen.accepted
        assert len(fit.notes) == 1


def test_seconds_scale() -> None:
    """Homogeneity: gaps at twice the speed give the same shape and distance, and twice the rate."""
    gaps = np.diff(drawn(WeibullRenewal(rate_rps=3.0, shape=0.6), 3000, 13))
    for call in (fit_poisson, fit_gamma, fit_weibull):
        slow, fast = call(gaps), call(gaps / 2.0)
        assert fast.process.rate_rps == pytest.approx(2.0 * slow.process.rate_rps, rel=1e-9)
        assert fast.process.gap_cv == pytest.approx(slow.process.gap_cv, rel=1e-9)
        assert fast.ks_distance == pytest.approx(slow.ks_distance, rel=1e-6)


@pytest.mark.parametrize("t_s", [[0.0, 1.0], [0.0, 0.0, 1.0], [3.0, 4.0, 6.0, 9.0, 13.0]])
def test_few_arrivals(t_s: list[float]) -> None:
    """Rule: nothing is judged on a few gaps; Poisson is assumed and that is said."""
    fit = fit_arrivals(t_s)
    assert isinstance(fit.process, Poisson)
    assert fit.chosen.verdict.startswith("undecided")
    assert not fit.chosen.accepted
    assert "too few gaps" in fit.reason
    assert any("not tested" in note for note in fit.notes)


def test_a_timer() -> None:
    """Rule: even gaps are no Poisson process, and that is said."""
    fit = fit_arrivals(np.arange(400) * 0.25)
    assert not fit.chosen.accepted
    assert any("timer" in note for note in fit.notes)


def test_long_traces_are_thinned() -> None:
    """Rule: 300,000 arrivals are judged by every sixth gap, which a note says; the rate is that of all to 4 errors."""
    fit = fit_arrivals(drawn(Poisson(rate_rps=50.0), 300_000, 14))
    assert isinstance(fit.process, Poisson)
    assert any("every 6th of 299999" in note for note in fit.notes)
    assert abs(fit.process.rate_rps - 50.0) < 4.0 * 50.0 / math.sqrt(50_000)


def test_the_same_trace_gets_the_same_answer() -> None:
    """Rule: the bootstrap's seed is fixed; nothing depends on what was fitted before."""
    t = drawn(MarkovModulated(low_rps=1.0, high_rps=8.0, to_high_per_s=0.1, to_low_per_s=0.3), 2000, 15)
    first = arrival_summary(fit_arrivals(t))
    fit_arrivals(t[:500])
    assert arrival_summary(fit_arrivals(t)) == first


def test_summary_is_json() -> None:
    """Rule: the types of JSON, with what was used and why."""
    summary = arrival_summary(fit_arrivals(piecewise([3.0, 9.0, 5.0], 400.0, seed=1)))
    again = json.loads(json.dumps(summary, allow_nan=False))
    assert again["by_window"] is True
    assert again["stationary"] is False
    assert again["process"]["name"] == "Poisson"
    assert len(again["windows"]) == 3
    assert set(again["windows"][0]) == {"start_s", "end_s", "rate_rps", "requests"}
    assert {"verdict", "reason", "accepted", "tests", "candidates", "candidates_by_window", "notes"} <= set(again)


def test_refuses_what_is_no_list_of_arrivals() -> None:
    for t_s in ([1.0], [0.0, math.nan], [1.0, 0.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="t_s must"):
            fit_arrivals(t_s)

"""Arrival processes against closed forms of special cases, numerical integrals and Monte Carlo."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

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
from servecast.validation.sampling import arrival_times

MODULATED = MarkovModulated(low_rps=1.0, high_rps=8.0, to_high_per_s=0.1, to_low_per_s=0.3)
PROCESSES: tuple[ArrivalProcess, ...] = (
    Poisson(rate_rps=3.0),
    GammaRenewal(rate_rps=3.0, shape=0.4),
    GammaRenewal(rate_rps=3.0, shape=4.0),
    WeibullRenewal(rate_rps=3.0, shape=0.6),
    WeibullRenewal(rate_rps=3.0, shape=2.0),
    MODULATED,
    BatchArrivals(epoch_rate_per_s=2.0, batch=GeometricBatch(mean=2.5)),
    BatchArrivals(epoch_rate_per_s=2.0, batch=EmpiricalBatch(sizes=(1, 8), shares=(0.75, 0.25))),
)
IDS = [f"{index}-{one.name.replace(' ', '-')}" for index, one in enumerate(PROCESSES)]
every = pytest.mark.parametrize("process", PROCESSES, ids=IDS)
WINDOWS = np.array([0.01, 0.3, 1.0, 10.0, 60.0])


def sped_up(process: ArrivalProcess, factor: float) -> ArrivalProcess:
    """The same process with every second divided by `factor`: all fields that are rates grow."""
    changes = {
        field.name: getattr(process, field.name) * factor
        for field in dataclasses.fields(process)  # type: ignore[arg-type]  # the protocol's members are dataclasses
        if field.name.endswith(("_rps", "_per_s"))
    }
    return dataclasses.replace(process, **changes)  # type: ignore[type-var]  # likewise


# ---- gaps ----------------------------------------------------------------------------------------------


@every
def test_moments_of_the_gap_by_integration(process: ArrivalProcess) -> None:
    """Independent: E[T] and E[T^2] as integrals of the survival function; rate 1 / E[T]."""

    def survival(x: float) -> float:
        return 1.0 - float(process.gap_cdf(x))

    points = [1e-3, 0.05, 1.0, 5.0]
    edges = [0.0, *points, 60.0]
    mean = sum(integrate.quad(survival, a, b)[0] for a, b in pairwise(edges))
    square = sum(integrate.quad(lambda x: 2.0 * x * survival(x), a, b)[0] for a, b in pairwise(edges))
    assert 1.0 / mean == pytest.approx(process.rate_rps, rel=1e-6)
    assert math.sqrt(square / mean**2 - 1.0) == pytest.approx(process.gap_cv, rel=1e-5)


@every
def test_gap_cdf_is_a_distribution(process: ArrivalProcess) -> None:
    """Rule: starts at 0 (batches: at the share of gaps inside one), never falls, ends at 1; vector = map of scalars."""
    x = np.linspace(0.0, 200.0, 2001)
    cdf = process.gap_cdf(x)
    start = 1.0 - 1.0 / process.batch.mean if isinstance(process, BatchArrivals) else 0.0
    assert cdf[0] == pytest.approx(start, abs=1e-15)
    assert np.all(np.diff(cdf) >= -1e-15)
    assert cdf[-1] == pytest.approx(1.0, abs=1e-8)
    np.testing.assert_allclose(cdf[:20], [float(process.gap_cdf(one)) for one in x[:20]], rtol=1e-14)


def test_gap_cdf_against_scipy() -> None:
    """Independent code: scipy.stats."""
    x = np.array([0.001, 0.1, 0.5, 3.0])
    gamma, weibull = GammaRenewal(rate_rps=3.0, shape=0.4), WeibullRenewal(rate_rps=3.0, shape=0.6)
    np.testing.assert_allclose(gamma.gap_cdf(x), stats.gamma.cdf(x, 0.4, scale=1.0 / 1.2), rtol=1e-10)
    scale = 1.0 / (3.0 * math.gamma(1.0 + 1.0 / 0.6))
    np.testing.assert_allclose(weibull.gap_cdf(x), stats.weibull_min.cdf(x, 0.6, scale=scale), rtol=1e-12)


@pytest.mark.parametrize("cv", [0.2, 0.7, 1.0, 2.0, 8.6])
def test_from_cv(cv: float) -> None:
    """Round trip; shape 1 at cv 1 (both are then Poisson)."""
    for family in (GammaRenewal, WeibullRenewal):
        process = family.from_cv(2.0, cv)
        assert process.gap_cv == pytest.approx(cv, rel=1e-9)
        assert process.rate_rps == 2.0
        assert (process.shape == pytest.approx(1.0, rel=1e-9)) == (cv == 1.0)


# ---- counts --------------------------------------------------------------------------------------------


def test_shape_one_is_poisson() -> None:
    """Limit: IDC 1 at every window, to the grid's 1 / (6 x 16^2)."""
    for family in (GammaRenewal, WeibullRenewal):
        np.testing.assert_allclose(family(rate_rps=3.0, shape=1.0).idc(WINDOWS), 1.0, rtol=1e-3)
    np.testing.assert_array_equal(Poisson(rate_rps=3.0).idc(WINDOWS), np.ones(5))


def test_erlang_two() -> None:
    """Cox, Renewal Theory: Gamma gaps of shape 2 have H(u) = lambda u - (1 - e^(-4 lambda u)) / 4; integral by hand."""
    rate = 3.0
    expected = 0.5 - np.expm1(-4.0 * rate * WINDOWS) / (8.0 * rate * WINDOWS)
    np.testing.assert_allclose(GammaRenewal(rate_rps=rate, shape=2.0).idc(WINDOWS), expected, rtol=2e-3)


@pytest.mark.parametrize(
    "process",
    [GammaRenewal(rate_rps=2.0, shape=0.3), WeibullRenewal(rate_rps=2.0, shape=0.5)],
    ids=["gamma", "weibull"],
)
def test_renewal_limits(process: ArrivalProcess) -> None:
    """Limits: 1 for short windows (at most one arrival), cv^2 for long ones; numeric and asymptotic branches meet."""
    # a second arrival within the window is as rare as F(w), the two shapes give 0.07 and 0.04
    assert float(process.idc(1e-5)) == pytest.approx(1.0, abs=0.08)
    assert float(process.idc(1e7)) == pytest.approx(process.gap_cv**2, rel=1e-5)
    below, above = process.idc([1023.9, 1024.1])
    assert below == pytest.approx(above, rel=2e-3)


def test_interrupted_poisson_is_renewal() -> None:
    """Independent: with a quiet rate of 0 each gap starts busy, and H(u) solves its renewal equation H = F + F * h,
    here by the mid-point scheme of Xie (Communications in Statistics B 18, 1989); the closed form must agree."""
    process = MarkovModulated(low_rps=0.0, high_rps=4.0, to_high_per_s=0.5, to_low_per_s=1.0)
    window, steps = 6.0, 3000
    step = window / steps
    cdf = process.gap_cdf(np.arange(steps + 1) * step)
    middle = process.gap_cdf((np.arange(steps) + 0.5) * step)
    renewals = np.zeros(steps + 1)
    for n in range(1, steps + 1):
        past = float(middle[n - 1 : 0 : -1] @ np.diff(renewals[:n]))
        renewals[n] = (cdf[n] + past - middle[0] * renewals[n - 1]) / (1.0 - middle[0])
    area = step * (renewals.sum() - 0.5 * renewals[-1])
    expected = 1.0 + 2.0 * area / window - process.rate_rps * window
    assert float(process.idc(window)) == pytest.approx(expected, rel=1e-3)


def test_modulated_limits() -> None:
    """Hand: rate 0.75 x 1 + 0.25 x 8 = 2.75, variance 0.1875 x 49; IDC from 1 to 1 + 2 x 9.1875 / (2.75 x 0.4)."""
    assert MODULATED.rate_rps == pytest.approx(2.75, rel=1e-14)
    assert MODULATED.rate_variance == pytest.approx(9.1875, rel=1e-14)
    assert float(MODULATED.idc(1e-9)) == pytest.approx(1.0, rel=1e-8)
    assert float(MODULATED.idc(1e9)) == pytest.approx(1.0 + 18.375 / 1.1, rel=1e-8)
    # both forms of (1 - (1 - e^-x) / x) at their border, x = 1e-4
    low, high = MODULATED.idc([0.99999e-4 / 0.4, 1.00001e-4 / 0.4])
    assert high - low == pytest.approx(2e-9 * 0.5 * 18.375 / 1.1, rel=1e-2)


def test_modulated_from_moments() -> None:
    """Round trip."""
    again = MarkovModulated.from_moments(2.75, 9.1875, 0.4, 0.25)
    for name, value in MODULATED.parameters.items():
        assert again.parameters[name] == pytest.approx(value, rel=1e-12)


def test_batches() -> None:
    """Hand: geometric of mean 2.5: E[B^2] = 2.5 x 4 = 10, IDC 4, cv^2 4; sizes 1, 8: moments 2.75, 16.75, cv^2 4.5."""
    geometric, counted = PROCESSES[-2:]
    np.testing.assert_allclose(geometric.idc(WINDOWS), 4.0, rtol=1e-14)
    assert geometric.gap_cv == pytest.approx(2.0, rel=1e-14)
    assert geometric.rate_rps == 5.0
    np.testing.assert_allclose(counted.idc(WINDOWS), 16.75 / 2.75, rtol=1e-14)
    assert counted.gap_cv == pytest.approx(math.sqrt(4.5), rel=1e-14)


@every
def test_idc_against_monte_carlo(process: ArrivalProcess) -> None:
    """Monte Carlo: counts of neighbouring windows in one long sample; 4 standard errors by 20 blocks."""
    t = arrival_times(process, 400_000, np.random.default_rng(7))
    for window in (0.3, 2.0, 10.0):
        estimate, error = counted_idc(t, window)
        assert abs(float(process.idc(window)) - estimate) < 4.0 * error + 1e-3


def counted_idc(t: NDArray[np.float64], window_s: float) -> tuple[float, float]:
    """IDC of counts and its standard error from 20 blocks; the first window, which starts at a renewal, is left out."""
    index = np.floor(t / window_s).astype(int)
    counts = np.bincount(index)[1:-1].astype(float)
    blocks = counts[: counts.size // 20 * 20].reshape(20, -1)
    squares = ((blocks - counts.mean()) ** 2).mean(axis=1) / counts.mean()
    return float(squares.mean()), float(squares.std(ddof=1) / math.sqrt(20))


@every
def test_seconds_scale(process: ArrivalProcess) -> None:
    """Homogeneity: time 10 times as fast, windows a tenth: the same ratios, 10 times the rate."""
    fast = sped_up(process, 10.0)
    assert fast.rate_rps == pytest.approx(10.0 * process.rate_rps, rel=1e-12)
    assert fast.gap_cv == pytest.approx(process.gap_cv, rel=1e-9)
    np.testing.assert_allclose(fast.idc(WINDOWS / 10.0), process.idc(WINDOWS), rtol=1e-9)
    np.testing.assert_allclose(fast.gap_cdf(WINDOWS / 10.0), process.gap_cdf(WINDOWS), rtol=1e-9)


@every
def test_idc_is_a_map_of_scalars(process: ArrivalProcess) -> None:
    """Vector equals a map of scalars, shapes kept; parameters are finite numbers."""
    together = process.idc(WINDOWS.reshape(5, 1))
    assert together.shape == (5, 1)
    np.testing.assert_allclose(together.ravel(), [float(process.idc(one)) for one in WINDOWS], rtol=1e-12)
    assert all(math.isfinite(value) for value in process.parameters.values())


def test_more_variable_gaps_are_more_dispersed() -> None:
    """Monotone: IDC at a minute grows with cv."""
    for family in (GammaRenewal, WeibullRenewal):
        found = [float(family.from_cv(5.0, cv).idc(60.0)) for cv in (0.5, 0.8, 1.0, 1.5, 3.0)]
        assert found == sorted(found)


# ---- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Poisson(rate_rps=0.0), "rate_rps must be positive"),
        (lambda: Poisson(rate_rps=math.nan), "rate_rps must be positive"),
        (lambda: GammaRenewal(rate_rps=1.0, shape=-1.0), "shape must be positive"),
        (lambda: GammaRenewal.from_cv(1.0, 0.0), "gap_cv must be positive"),
        (lambda: WeibullRenewal.from_cv(1.0, 1e-9), "gap_cv must be in"),
        (lambda: MarkovModulated(low_rps=2.0, high_rps=2.0, to_high_per_s=1.0, to_low_per_s=1.0), "low_rps must be in"),
        (lambda: MarkovModulated(low_rps=1.0, high_rps=2.0, to_high_per_s=0.0, to_low_per_s=1.0), "to_high_per_s must"),
        (lambda: MarkovModulated.from_moments(1.0, 0.1, 1.0, 1.0), "busy_share must be in"),
        (lambda: GeometricBatch(mean=0.5), "mean must be at least 1"),
        (lambda: EmpiricalBatch(sizes=(), shares=()), "shares must be one per size"),
        (lambda: EmpiricalBatch(sizes=(0, 1), shares=(0.5, 0.5)), "sizes must be at least 1"),
        (lambda: EmpiricalBatch(sizes=(1, 2), shares=(0.5, 0.4)), "sum to 1"),
        (lambda: BatchArrivals(epoch_rate_per_s=0.0, batch=GeometricBatch(mean=2.0)), "epoch_rate_per_s must"),
        (lambda: Poisson(rate_rps=1.0).idc(0.0), "window_s must be positive"),
        (lambda: Poisson(rate_rps=1.0).gap_cdf(-1.0), "gap_s must be >= 0"),
    ],
)
def test_refusals(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]

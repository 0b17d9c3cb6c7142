"""Error bands: quantiles against the normal distribution, pooling of small samples, and no leak from held-out units."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from servecast.calibration.fits.bands import MIN_ROWS, bands_from, held_out_predictions
from servecast.calibration.fits.engine import CENTRE, HIGH, LOW, Runs, fit_engine, predict
from servecast.calibration.profile import load_profile
from servecast.model.forecast import Metric, Points, kernel_passes
from servecast.model.formats import ENGINES
from servecast.readers.deployments import deployment

Z95 = 1.6448536269514722  # standard normal quantile of 0.95 (Abramowitz & Stegun, table 26.5)


@cache
def base(size: int = 60) -> Runs:
    """Runs of a dense and of a mixture-of-experts deployment; times are filled in by each test."""
    made = (
        deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=4),
        deployment("openai/gpt-oss-120b", "h200_sxm", "sglang", tp=2),
    )
    rng = np.random.default_rng(0)
    at = Points(
        deployments=made,
        engines=("vllm", "sglang"),
        index=np.arange(size) % 2,
        clients=np.round(2.0 ** rng.uniform(0, 6, size)),
        isl=np.round(2.0 ** rng.uniform(7, 12, size)),
        osl=np.round(2.0 ** rng.uniform(7, 10, size)),
    )
    kernels = load_profile().kernels
    runs = Runs(
        passes=kernel_passes(kernels, [load_profile().kernel_set(one.gpu) for one in made], at),
        engine=np.array([ENGINES.index("vllm"), ENGINES.index("sglang")])[at.index],
        moe=np.array([False, True])[at.index],
        measured=np.ones(size, dtype=bool),
        clients=at.clients,
        osl=at.osl,
        ttft_s=np.ones(size),
        tpot_s=np.ones(size),
        weight=np.ones(size),
    )
    ttft, tpot = predict(np.clip(CENTRE, LOW, HIGH), runs)
    noise = rng.normal(scale=0.05, size=(2, size))
    return replace(runs, ttft_s=ttft * np.exp(noise[0]), tpot_s=tpot * np.exp(noise[1]))


def with_errors(moe: np.ndarray, ttft_log: np.ndarray, tpot_log: np.ndarray) -> Runs:
    """Records whose prediction is 1 s and whose measured value is exp(log)."""
    runs = base()
    return replace(runs, moe=moe, ttft_s=np.exp(ttft_log), tpot_s=np.exp(tpot_log))


NORMAL: tuple[tuple[tuple[Metric, bool], float, float], ...] = (
    (("ttft", True), 0.2, 0.5),
    (("ttft", False), -0.1, 0.3),
    (("tpot", True), 0.0, 0.1),
    (("tpot", False), 0.0, 0.1),
)


def normal_errors(size: int) -> tuple[Runs, np.ndarray]:
    rng = np.random.default_rng(size)
    moe = np.arange(size) % 2 == 0
    ttft = np.where(moe, rng.normal(0.2, 0.5, size), rng.normal(-0.1, 0.3, size))
    return with_errors(moe, ttft, rng.normal(0.0, 0.1, size)), np.ones(size)


def test_bands_of_normal_errors() -> None:
    # Origin: theory. With endless units the quantiles are mean +- 1.645 sd; that of n values has standard error
    # sqrt(0.05 x 0.95 / n) / density(q95), density 0.1031 / sd: 4 sem.
    size = 40_000
    runs, ones = normal_errors(size)
    found = bands_from(runs, ones, ones, ones.astype(bool), units=10**9)
    assert set(found) == {key for key, _, _ in NORMAL}
    for key, mean, deviation in NORMAL:
        sem = (0.05 * 0.95 / (size / 2)) ** 0.5 / (0.1031 / deviation)
        assert abs(found[key].lo - (mean - Z95 * deviation)) < 4.0 * sem
        assert abs(found[key].hi - (mean + Z95 * deviation)) < 4.0 * sem
        assert found[key].n == size // 2


def test_fewer_units_make_wider_bands() -> None:
    # Origin: theory of prediction intervals. The bias of a unit not drawn yet adds sd / sqrt(units) at least: the half
    # width grows by sqrt(1 + 1 / units) or more.
    runs, ones = normal_errors(10_000)
    widths = {
        units: bands_from(runs, ones, ones, ones.astype(bool), units=units)["ttft", False]
        for units in (2, 4, 15, 10**9)
    }
    plain = widths[10**9].hi - widths[10**9].lo
    for units in (2, 4, 15):
        assert widths[units].hi - widths[units].lo >= (1.0 + 1.0 / units) ** 0.5 * plain * (1.0 - 1e-9)
    assert widths[2].hi >= widths[4].hi >= widths[15].hi
    assert widths[2].lo <= widths[4].lo <= widths[15].lo


def test_a_band_holds_nine_in_ten_of_its_own_errors() -> None:
    # Origin: definition, before the widening, which many units make negligible.
    rng = np.random.default_rng(1)
    errors = rng.standard_t(3, size=5000) * 0.2
    found = bands_from(
        with_errors(np.zeros(5000, bool), errors, errors),
        np.ones(5000),
        np.ones(5000),
        np.ones(5000, bool),
        units=10**9,
    )
    band = found["tpot", False]
    assert np.mean((errors >= band.lo) & (errors <= band.hi)) == pytest.approx(0.90, rel=0.001)


def test_few_runs_of_one_class_take_the_pooled_band() -> None:
    # Origin: documented rule; 99 dense runs with errors of their own among 1 000 others.
    rng = np.random.default_rng(2)
    size = 1000 + MIN_ROWS - 1
    moe = np.arange(size) < 1000
    errors = np.where(moe, rng.normal(0.0, 0.1, size), 5.0)
    found = bands_from(with_errors(moe, errors, errors), np.ones(size), np.ones(size), np.ones(size, bool), units=5)
    assert found["tpot", False].n == size
    assert found["tpot", True].n == 1000


def test_only_chosen_rows_count() -> None:
    errors = np.where(np.arange(400) < 200, 0.1, 9.0)
    chosen = np.arange(400) < 200
    found = bands_from(
        with_errors(np.zeros(400, bool), errors, errors), np.ones(400), np.ones(400), chosen, units=10**9
    )
    assert found["ttft", False].lo == pytest.approx(0.1, rel=1e-9)
    assert found["ttft", False].hi == pytest.approx(0.1, rel=1e-9)


THIRDS = np.arange(60) % 3
USABLE = np.arange(60) % 7 != 0


@cache
def held_out_thirds() -> tuple[np.ndarray, np.ndarray]:
    return held_out_predictions(base(), [f"unit {number}" for number in THIRDS], USABLE)


def test_held_out_predictions_are_a_fit_without_the_unit() -> None:
    # Origin: slow obvious form for one unit.
    runs, held = base(), THIRDS == 1
    theta = fit_engine(runs.take(np.flatnonzero(USABLE & ~held))).theta
    expected = predict(theta, runs.take(np.flatnonzero(held)))
    for found, times in zip(held_out_thirds(), expected, strict=True):
        assert np.all(np.isfinite(found))
        np.testing.assert_allclose(found[held], times, rtol=1e-9)


def test_what_a_unit_measured_does_not_reach_its_own_prediction() -> None:
    # Origin: definition of a hold-out. One unit twice as slow: its predictions stay, those of the others move.
    runs = base()
    slow = replace(runs, tpot_s=np.where(THIRDS == 1, 2.0, 1.0) * runs.tpot_s)
    before = held_out_thirds()[1]
    after = held_out_predictions(slow, list(THIRDS), USABLE)[1]
    np.testing.assert_array_equal(before[THIRDS == 1], after[THIRDS == 1])
    assert np.all(before[THIRDS != 1] != after[THIRDS != 1])


def test_units_are_dealt_into_bins_whole() -> None:
    # Origin: definition. Two bins of four units: a bin is held out at once, so a unit's own data reach neither its own
    # predictions nor those of its companion in the bin.
    runs = base()
    unit = np.arange(len(runs.osl)) % 4
    usable = np.ones(len(unit), dtype=bool)
    slow = replace(runs, tpot_s=np.where(unit == 0, 2.0, 1.0) * runs.tpot_s)
    before, after = (held_out_predictions(each, list(unit), usable, bins=2)[1] for each in (runs, slow))
    same = [number for number in range(4) if np.array_equal(before[unit == number], after[unit == number])]
    assert 0 in same
    assert len(same) == 2

"""Fit of step times. Truth: samples of known constants with known noise and drift; seeds fixed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servecast.calibration.fits.engine_steps import (
    RIVALS,
    TILES,
    Floats,
    Integers,
    StepSamples,
    constant_names,
    fit_steps,
    near_pace,
    point_medians,
    point_scatter,
)
from servecast.model.engine_steps import EngineSteps, StepWork, decode_work, with_chunk

TRUTH = EngineSteps(
    knots=(1.0, 8.0, 64.0),
    base_s=0.012,
    row_s=(0.0006, 0.0003, 0.0009),
    sequence_s=0.0001,
    cached_token_s=1e-6,
    pair_s=0.0,
    draft_pass_s=0.0006,
    draft_row_s=5e-5,
)


def _works() -> list[StepWork]:
    works = [decode_work(b, c) for b in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) for c in (64, 512)]
    works += [decode_work(b, 128, k, armed=True) for b in (1, 4, 8, 16, 32) for k in (0, 1, 2, 3, 5)]
    works += [with_chunk(StepWork(rows=0.0), 0, n) for n in (16, 48, 96, 128, 192, 256)]
    return works


def _samples(*, noise: float, drift: float, blocks: int, seed: int, works: list[StepWork] | None = None) -> StepSamples:
    rng = np.random.default_rng(seed)
    works = works or _works()
    pace = np.exp(drift * rng.standard_normal(blocks))
    rows = [(work, block) for block in range(blocks) for work in works]
    seconds = [float(TRUTH.seconds(work)) * pace[block] * np.exp(noise * rng.standard_normal()) for work, block in rows]
    columns = {name: np.array([float(getattr(w, name)) for w, _ in rows]) for name in StepWork.__dataclass_fields__}
    return StepSamples(**columns, block=np.array([block for _, block in rows]), seconds=np.array(seconds))


def test_exact_samples_give_the_constants_back() -> None:
    """The pull between slopes moves them a little: 2 %."""
    fit = fit_steps(_samples(noise=0.0, drift=0.0, blocks=2, seed=1))
    new = [decode_work(b, c, k, armed=True) for b in (5, 10, 20, 28) for c in (100, 300) for k in (0, 2, 4)]
    for work in new:
        assert float(fit.steps.seconds(work)) == pytest.approx(float(TRUTH.seconds(work)), rel=0.03)
    assert fit.steps.base_s == pytest.approx(TRUTH.base_s, rel=0.02)


def test_a_rounds_pace_is_taken_out() -> None:
    """Drift of 20 % between rounds, scatter of 1 %: what is left of a point is the scatter."""
    samples = _samples(noise=0.01, drift=0.2, blocks=9, seed=2)
    medians = point_medians(samples)
    assert float(np.median(medians.cv)) == pytest.approx(0.01, rel=0.4)
    assert float(np.std(np.log(medians.block_factor))) > 0.1


@pytest.mark.parametrize("rounds", [3, 4, 5, 8, 9, 12, 24])
def test_scatter_of_few_rounds_is_neither_too_small_nor_too_large(rounds: int) -> None:
    """Monte Carlo: 4,000 points of one true scatter, 2 %. Without its correction 4 rounds would say 1.5 %."""
    rng = np.random.default_rng(rounds)
    points = 1.0 + 0.02 * rng.standard_normal((4000, rounds))
    found = np.array([point_scatter(one) for one in points])
    assert found.mean() == pytest.approx(0.02, rel=0.03)
    # what a gate goes by is the middling point's, which lies below the mean: 9 % for 4 rounds, 3 % for 12
    below = {4: 0.91, 12: 0.97}.get(rounds)
    if below is not None:
        assert np.median(found) == pytest.approx(0.02 * below, rel=0.025)


def test_scatter_beside_few_others_is_not_too_small() -> None:
    """Monte Carlo: blocks of 6 points, each with a pace of its own, in 4 rounds; scatter 2 %. What 6 samples say
    of a pace is itself scattered, and takes a sixth of each one's variance; without its return 15 % would be lost."""
    together = 6
    rng = np.random.default_rng(together)
    found = []
    for _ in range(300):
        point = np.tile(np.arange(together), 4)
        block = np.repeat(np.arange(4), together)
        pace = np.exp(0.1 * rng.standard_normal(4))
        seconds = (1.0 + point) * pace[block] * np.exp(0.02 * rng.standard_normal(point.size))
        flat = np.zeros(point.size)
        works = dict.fromkeys(StepWork.__dataclass_fields__, flat) | {"rows": 1.0 + point}
        found.append(point_medians(StepSamples(**works, block=block, seconds=seconds)).cv.mean())
    assert np.mean(found) == pytest.approx(0.02, rel=0.08)


def test_scatter_of_two_rounds_is_not_known() -> None:
    assert np.isnan(point_scatter(np.array([1.0, 1.1])))


def _moving(seed: int, *, spell: float) -> tuple[Floats, Integers, Floats]:
    """Twenty points in eight shuffled rounds on a machine whose pace wanders within a round; its truth last."""
    rng = np.random.default_rng(seed)
    point = np.concatenate([rng.permutation(20) for _ in range(8)])
    wander = np.convolve(rng.standard_normal(point.size + 20), np.ones(21) / np.sqrt(21.0), mode="valid")
    truth = np.exp(spell * wander)
    return (0.01 + 0.002 * point) * truth * np.exp(0.03 * rng.standard_normal(point.size)), point, truth


def test_pace_within_a_round_is_seen_by_the_neighbours() -> None:
    """A pace that wanders by 10 % over twenty samples, 3 % of scatter: what is left is the scatter and little more."""
    with_pace, without = [], []
    for seed in range(10):
        seconds, point, _ = _moving(seed, spell=0.1)
        steady = seconds / (0.01 + 0.002 * point)
        without.append(np.std(np.log(steady)))
        with_pace.append(np.std(np.log(steady / near_pace(seconds, point))))
    # hand: sqrt(0.1^2 + 0.03^2); twelve neighbours, 3.5 of 21 away on average, leave a third of the wandering
    assert np.mean(without) > 0.08
    assert np.mean(with_pace) < 0.05


def test_scatter_is_not_taken_for_pace() -> None:
    """A steady machine: no sample says of itself what its pace was, so that nothing of its 3 % is lost."""
    left = []
    for seed in range(20):
        seconds, point, _ = _moving(seed, spell=0.0)
        left.append(np.std(np.log(seconds / near_pace(seconds, point) / (0.01 + 0.002 * point))))
    assert 0.03 <= np.mean(left) < 0.034


def test_medians_use_the_pace_of_every_sample() -> None:
    """Samples of one point at a pace of 1, 2 and 4, told so: no scatter, and the first one's seconds."""
    samples = _samples(noise=0.0, drift=0.0, blocks=3, seed=1)
    told = np.repeat([1.0, 2.0, 4.0], samples.seconds.size // 3)
    medians = point_medians(replace(samples, seconds=samples.seconds * told, pace=told))
    np.testing.assert_allclose(medians.seconds, point_medians(samples).seconds, rtol=1e-12)
    np.testing.assert_allclose(medians.cv, 0.0, atol=1e-12)
    # what the rounds differed by is still told
    np.testing.assert_allclose(medians.block_factor / medians.block_factor[0], [1.0, 2.0, 4.0], rtol=1e-12)


def test_few_samples_have_no_neighbours() -> None:
    assert near_pace(np.array([1.0, 2.0, 3.0]), np.array([0, 1, 0])).tolist() == [1.0, 1.0, 1.0]


def test_one_disturbed_point_does_not_bend_the_others() -> None:
    samples = _samples(noise=0.01, drift=0.0, blocks=5, seed=3)
    seconds = samples.seconds.copy()
    hit = (samples.rows == 12) & (samples.cached == 12 * 64)
    seconds[hit] *= 3.0
    bent = StepSamples(
        **{name: getattr(samples, name) for name in StepSamples.__slots__ if name != "seconds"}, seconds=seconds
    )
    work = decode_work(20, 200)
    assert float(fit_steps(bent).steps.seconds(work)) == pytest.approx(float(TRUTH.seconds(work)), rel=0.04)


def test_plain_data_are_foretold_as_well_as_by_a_line() -> None:
    """Truth: a line, 1 % of scatter. The knots are there and the pull makes nothing of them: 2 % at new batches."""
    line = EngineSteps(knots=(1.0,), base_s=0.02, row_s=(0.001,))
    samples = _samples(noise=0.0, drift=0.0, blocks=3, seed=5)
    rng = np.random.default_rng(6)
    seconds = line.seconds(samples.work) * np.exp(0.01 * rng.standard_normal(samples.rows.size))
    fit = fit_steps(
        StepSamples(
            **{name: getattr(samples, name) for name in StepSamples.__slots__ if name != "seconds"}, seconds=seconds
        )
    )
    for batch in (5, 10, 20, 28):
        work = decode_work(batch, 200)
        assert float(fit.steps.seconds(work)) == pytest.approx(float(line.seconds(work)), rel=0.02)


def test_the_largest_steps_count_though_they_are_few() -> None:
    """Truth: rows cost half as much again from 128 on, where 2 of 34 row counts lie; 1 % of scatter."""
    bent = EngineSteps(knots=(1.0, 128.0), base_s=0.02, row_s=(0.001, 0.0015))
    samples = _samples(noise=0.0, drift=0.0, blocks=4, seed=12)
    rng = np.random.default_rng(13)
    seconds = bent.seconds(samples.work) * np.exp(0.01 * rng.standard_normal(samples.rows.size))
    fit = fit_steps(
        StepSamples(
            **{name: getattr(samples, name) for name in StepSamples.__slots__ if name != "seconds"}, seconds=seconds
        )
    )
    work = with_chunk(decode_work(14, 80), 0, 210)
    assert float(fit.steps.seconds(work)) == pytest.approx(float(bent.seconds(work)), rel=0.02)


def test_kernels_that_compute_tiles_are_recognised() -> None:
    """Truth: a line and 4 ms where rows are no multiple of 4, 2 % of scatter; a batch of 5 was not measured."""
    tiled = EngineSteps(knots=(1.0,), base_s=0.02, row_s=(0.001,), tile=4, edge_s=0.004)
    works = [decode_work(b, c) for b in (1, 2, 3, 4, 6, 7, 8, 11, 12, 16, 17, 22, 24, 32) for c in (64, 448)]
    samples = _samples(noise=0.0, drift=0.0, blocks=6, seed=10, works=works)
    rng = np.random.default_rng(11)
    seconds = tiled.seconds(samples.work) * np.exp(0.02 * rng.standard_normal(samples.rows.size))
    fit = fit_steps(
        StepSamples(
            **{name: getattr(samples, name) for name in StepSamples.__slots__ if name != "seconds"}, seconds=seconds
        )
    )
    assert (fit.form, fit.steps.tile) == ("octaves, tiles of 4", 4)
    assert fit.steps.edge_s == pytest.approx(0.004, rel=0.15)
    for batch in (5, 20):
        found = fit.steps.seconds(decode_work(batch, 100))
        assert found == pytest.approx(float(tiled.seconds(decode_work(batch, 100))), rel=0.02)


def test_intervals_cover_the_truth() -> None:
    """90 % intervals of new points over 30 drawn calibrations, within 4 standard errors; too wide passes."""
    work = [decode_work(b, 200, k, armed=True) for b in (5, 20) for k in (0, 3)]
    inside = []
    for seed in range(30):
        fit = fit_steps(_samples(noise=0.03, drift=0.03, blocks=4, seed=100 + seed))
        for one in work:
            found = fit.steps.predict(one)
            inside.append(found.lo <= float(TRUTH.seconds(one)) <= found.hi)
    assert np.mean(inside) > 0.9 - 4.0 * np.sqrt(0.09 / len(inside))


def test_every_second_k_times_as_long_is_every_constant_k_times_as_large() -> None:
    samples = _samples(noise=0.02, drift=0.02, blocks=3, seed=7)
    slow = StepSamples(
        **{name: getattr(samples, name) for name in StepSamples.__slots__ if name != "seconds"},
        seconds=7.0 * samples.seconds,
    )
    one, other = fit_steps(samples), fit_steps(slow)
    assert one.form == other.form
    np.testing.assert_allclose(other.steps.constants, 7.0 * one.steps.constants, rtol=1e-6, atol=1e-12)


def test_names_follow_the_features() -> None:
    fit = fit_steps(_samples(noise=0.01, drift=0.0, blocks=3, seed=8))
    assert list(fit.standard_errors) == constant_names(fit.steps.knots)
    assert len(fit.held_out) == len(RIVALS) * len(TILES)
    assert set(RIVALS) < set(fit.held_out)


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_points_are_refused(count: int) -> None:
    samples = _samples(noise=0.0, drift=0.0, blocks=1, seed=9, works=_works()[:count] or _works()[:1])
    if not count:
        samples = StepSamples(**{name: getattr(samples, name)[:0] for name in StepSamples.__slots__})
    with pytest.raises(ValueError, match="samples must"):
        fit_steps(samples)

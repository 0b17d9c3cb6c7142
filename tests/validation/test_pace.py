"""The machine's pace over a load: by hand, by a queue whose steps truly slow down, and by drawn probes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.engine_steps import EngineSteps
from servecast.model.workload import Trace
from servecast.validation.executors import EXECUTORS, figures_at
from servecast.validation.pace import (
    DRAWS,
    STEADY,
    Pace,
    Probe,
    drawn_paces,
    in_time,
    in_work,
    pace_of,
)
from servecast.validation.scheduler import EngineLimits
from servecast.validation.simulator import simulate

LIMITS = EngineLimits(
    max_num_seqs=8, max_num_batched_tokens=256, kv_tokens=1e6, block_size=1, enable_prefix_caching=False
)


def test_means_and_errors_by_hand() -> None:
    """Decode probes 1, 1.2, 1.1, 1.5: mean 1.2, standard error 0.2160 / 2. Prompts 0.8, 1.2."""
    decode = [Probe(float(i), ratio) for i, ratio in enumerate((1.0, 1.2, 1.1, 1.5))]
    pace = pace_of(decode)
    assert pace.decode == pace.prompts == pytest.approx(1.2)
    assert pace.error == pytest.approx(0.2160247 / 2.0, rel=1e-6)
    assert math.isinf(pace.width)
    np.testing.assert_allclose(pace.relative, 1.0, rtol=1e-12)
    mixed = pace_of([*decode, Probe(4.0, 0.8, prompts=True), Probe(5.0, 1.2, prompts=True)])
    assert (mixed.decode, mixed.prompts) == pytest.approx((1.2, 1.0))
    assert mixed.error == pytest.approx(0.2, rel=1e-6)
    assert pace_of([]) is STEADY


def test_a_probe_that_failed_leaves_the_mean_of_the_others() -> None:
    probes = [Probe(0.0, 1.1), Probe(9.0, math.nan)]
    assert pace_of(probes).decode == pytest.approx(1.1)


def test_work_by_hand() -> None:
    # hand: twice as slow from 4 s on: 4 s of work by then, half a second a second after; beyond the table likewise
    pace = Pace(
        decode=1.0,
        prompts=1.0,
        error=0.0,
        width=0.1,
        at_s=np.array([0.0, 4.0, 4.0 + 1e-9, 8.0]),
        relative=np.array([1.0, 1.0, 2.0, 2.0]),
    )
    np.testing.assert_allclose(pace.work([0.0, 3.0, 6.0, 10.0]), [0.0, 3.0, 5.0, 7.0], atol=1e-8)
    np.testing.assert_allclose(pace.clock([0.0, 3.0, 5.0, 7.0]), [0.0, 3.0, 6.0, 10.0], atol=1e-8)


def test_pace_over_a_load_by_hand() -> None:
    # hand: mean 1.2; constant, and so from the start of the load to its end, whenever the probes were made
    over = pace_of([Probe(-5.0, 1.1), Probe(7.0, 1.3)]).over(3.0)
    np.testing.assert_allclose(over, 1.2, rtol=1e-12)
    moving = Pace(
        decode=2.0, prompts=1.0, error=0.0, width=0.1, at_s=np.array([0.0, 4.0]), relative=np.array([1.0, 2.0])
    )
    # hand: from 2 at the start to 3 in the middle of the table
    assert moving.over(2.0)[[0, -1]] == pytest.approx([2.0, 3.0])


class _Slowing:
    """Steps of 0.1 s and 1 ms a row at an engine whose pace is c(t): the simulator asks in order of time."""

    first_token_s = 0.0

    def __init__(self, pace: Pace) -> None:
        self._pace, self.done = pace, 0.0

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:  # noqa: ARG002 (the protocol's)
        return self._timed(0.1 + 0.001 * batch), 0.0, 1

    def mixed(self, chunks: list[tuple[int, int]], finishing: int, batch: int, cached: int) -> float:  # noqa: ARG002 (the protocol's)
        return self._timed(0.1 + 0.001 * (batch + sum(end - start for start, end in chunks)))

    def _timed(self, work: float) -> float:
        begun = self.done
        self.done += work
        return float(np.diff(self._pace.clock([begun, self.done]))[0])


def test_a_busy_engine_whose_steps_slow_down() -> None:
    """All requests at once, so that the engine never idles: stamps are those of the steps truly slowed, one by one."""
    at = np.linspace(0.0, 30.0, 61)
    pace = Pace(decode=1.0, prompts=1.0, error=0.0, width=0.1, at_s=at, relative=1.0 + 0.5 * np.sin(at / 3.0))
    rng = np.random.default_rng(1)
    trace = Trace(name="all", t_s=np.zeros(30), n_in=rng.integers(30, 90, 30), n_out=rng.integers(5, 40, 30))
    slowing = simulate(trace, _Slowing(pace), LIMITS)  # type: ignore[arg-type] (a list for a sequence)
    steps = EngineSteps(knots=(0.0,), base_s=0.1, row_s=(0.001,))
    rows = in_time(simulate(in_work(trace, pace), steps, LIMITS), trace, pace)
    np.testing.assert_allclose(rows.first_token_s, slowing.first_token_s, rtol=1e-9)
    np.testing.assert_allclose(rows.last_token_s, slowing.last_token_s, rtol=1e-9)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_slow_spell_is_in_the_latencies(executor: str) -> None:
    """Half as fast through the second quarter of a load that fills 0.8 of it: a mean pace misses the waits."""
    at = np.arange(0.0, 40.0, 0.2)
    probes = [Probe(float(one), 2.0 if 10.0 <= one < 20.0 else 1.0) for one in at]
    rng = np.random.default_rng(2)
    trace = Trace(name="busy", t_s=np.sort(rng.uniform(0, 40, 200)), n_in=np.full(200, 60), n_out=np.full(200, 20))
    steps = EngineSteps(knots=(0.0,), base_s=0.02, row_s=(0.001,))
    pace = pace_of(probes)
    assert pace.width < 0.1
    assert np.interp([5.0, 15.0, 30.0], pace.at_s, pace.relative) == pytest.approx([0.8, 1.6, 0.8], abs=0.02)
    flat = figures_at(executor, trace, steps, LIMITS, pace_of(probes, width=math.inf))
    moving = figures_at(executor, trace, steps, LIMITS, pace)
    assert moving["ttft_p95_s"] > 1.2 * flat["ttft_p95_s"]


def test_a_steady_pace_stays_steady() -> None:
    """Probes that scatter by 10 % about a steady pace: in most draws it is taken as constant, in all nearly so."""
    wide = 0
    for seed in range(40):
        ratio = 1.1 * np.exp(0.1 * np.random.default_rng(seed).standard_normal(100))
        pace = pace_of([Probe(0.3 * i, float(one)) for i, one in enumerate(ratio)])
        wide += math.isinf(pace.width)
        assert np.std(pace.relative) < 0.06
    assert wide >= 32


@pytest.mark.parametrize("count", [2, 3, 8, 50])
def test_drawn_paces_scatter_as_a_mean_does(count: int) -> None:
    """Means of the draws about the mean of the probes, with the standard error of one: over 200 seeds of 16 draws."""
    ratio = np.random.default_rng(3).uniform(0.8, 1.3, count)
    probes = [Probe(float(i), float(one)) for i, one in enumerate(ratio)]
    drawn = np.array([one.decode for seed in range(200) for one in drawn_paces(probes, seed=seed)])
    assert len(drawn) == 200 * DRAWS
    error = ratio.std(ddof=1) / math.sqrt(count)
    assert drawn.mean() == pytest.approx(ratio.mean(), abs=0.06 * error)
    # of two probes the least shape leaves 1 / sqrt(1.1) of it
    assert drawn.std() == pytest.approx(error, rel=0.07)


def test_draws_need_probes_that_were_all_made() -> None:
    assert drawn_paces([], seed=1) == [STEADY]
    assert len(drawn_paces([Probe(0.0, 1.1)], seed=1)) == 1
    assert len(drawn_paces([Probe(0.0, 1.1), Probe(9.0, math.nan), Probe(10.0, 1.0)], seed=1)) == 1


@given(
    st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.2, 5.0), st.booleans()), min_size=1, max_size=60),
    st.lists(st.floats(0.0, 500.0), min_size=1, max_size=10),
)
def test_work_and_clock_are_each_others_inverse(drawn: list[tuple[float, float, bool]], times: list[float]) -> None:
    pace = pace_of([Probe(at, ratio, prompts=kind) for at, ratio, kind in sorted(drawn)])
    work = pace.work(np.sort(times))
    assert (np.diff(work) >= 0.0).all()
    assert work.min() >= 0.0
    np.testing.assert_allclose(pace.clock(work), np.sort(times), rtol=1e-9, atol=1e-9)

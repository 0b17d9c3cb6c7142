"""What a live run on the PyTorch engine calibrates and probes; the bench is one whose times are known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from live_samples import TRUTH, scenario

pytest.importorskip("torch", reason="the PyTorch engine needs torch (extra live)")

from servecast.calibration.fits.engine_steps import point_medians
from servecast.validation.torch_engine.cells import StepPoint, StepSample, measure
from servecast.validation.torch_live import (
    PROBE_BATCH,
    PaceProbe,
    as_samples,
    calibration_points,
    probed_points,
)


def _seconds(point: StepPoint) -> float:
    return float(TRUTH.seconds(as_samples([StepSample(point=point, block=0, seconds=1.0)], [point]).work)[0])


class _Bench:
    """Decode steps take 1.2 times what they took, steps with prompts 0.9 times."""

    def __init__(self) -> None:
        self.asked: list[StepPoint] = []

    def seconds(self, point: StepPoint) -> float:
        assert np.mean(point.contexts) == pytest.approx(point.context, abs=0.5)
        assert point.batch == 1 or min(point.contexts) < point.context < max(point.contexts)
        point = replace(point, spread=0)
        self.asked.append(point)
        return _seconds(point) * (0.9 if point.chunks else 1.2)


@pytest.mark.parametrize("name", ["torch", "torch-quick"])
def test_pace_is_that_of_calibrated_points(name: str) -> None:
    plan = scenario(name)
    assert plan.steps is not None
    points = calibration_points(plan.steps, plan.speculation, plan.engine.max_model_len)
    samples = [StepSample(point=one, block=block, seconds=_seconds(one)) for block in range(2) for one in points]
    probed = probed_points(points, point_medians(as_samples(samples, points)))
    assert set(probed) <= set(points)
    assert all(one.batch and not one.armed for one in probed)
    assert all(one.chunks or one.batch <= PROBE_BATCH for one in probed)
    assert min(sum(bool(one.chunks) is kind for one in probed) for kind in (True, False)) > 4
    for one, seconds in probed.items():
        assert seconds == pytest.approx(_seconds(one), rel=1e-12)
    bench = _Bench()
    probe = PaceProbe(bench, probed, seed=3)  # type: ignore[arg-type] (a bench without an engine)
    for number in range(3 * len(probed)):
        probe(0.5 * number)
    for prompts, ratio in ((False, 1.2), (True, 0.9)):
        np.testing.assert_allclose([one.ratio for one in probe.made if one.prompts is prompts], ratio, rtol=1e-12)
    np.testing.assert_array_equal([one.at_s for one in probe.made], 0.5 * np.arange(3 * len(probed)))
    # every round visits every point, in an order of its own
    rounds = [bench.asked[i : i + len(probed)] for i in range(0, len(bench.asked), len(probed))]
    assert all(set(one) == set(probed) for one in rounds)
    assert rounds[0] != rounds[1]


def test_a_visit_counts_by_the_median_of_its_repeats_by_hand() -> None:
    """Steps of 1, 2, 3, ... s: one to warm up, then visits of one untimed step and three whose middle counts."""
    ticks = itertools.count(1)

    class Counting:
        def seconds(self, point: StepPoint) -> float:  # noqa: ARG002 (the bench's)
            return float(next(ticks))

    found = measure(Counting(), [StepPoint(1, 64)], blocks=2, seed=1, repeats=3)  # type: ignore[arg-type] (no engine)
    # hand: 1 warms; 2 is untimed, 3 4 5 count; 6 is untimed, 7 8 9 count
    assert [(one.block, one.seconds) for one in found] == [(0, 4.0), (1, 8.0)]


def test_contexts_of_a_point_by_hand() -> None:
    assert StepPoint(3, 64).contexts == [64, 64, 64]
    assert StepPoint(3, 64, spread=32).contexts == [32, 64, 96]
    assert StepPoint(1, 64, spread=32).contexts == [64]
    assert StepPoint(0, 0).contexts == []


def test_no_judged_point_is_calibrated() -> None:
    """A point in both would be foretold by itself; contexts and batches of the shipped scenarios keep apart."""
    for name in ("torch", "torch-quick"):
        plan = scenario(name)
        assert plan.steps is not None
        points = calibration_points(plan.steps, plan.speculation, plan.engine.max_model_len)
        judged = {StepPoint(batch, context) for batch, context in plan.steps.validated.cells()}
        assert not judged & set(points)

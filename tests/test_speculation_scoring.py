"""A fit scored on other cells, by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from speculation_plans import LENGTHS, sweep, true_speed

from servecast.calibration.fits.speculation_cells import CellsFit, fit_cells
from servecast.cli.output import to_json
from servecast.model.speculation_cells import SpeculationCells
from servecast.speculation_document import score_cells


@pytest.fixture(scope="module")
def fit() -> CellsFit:
    return fit_cells(sweep())


def wanted(rows: Sequence[tuple[float, int, float]], *, armed: bool = False) -> SpeculationCells:
    batch, gamma, speed = (np.array(one) for one in zip(*rows, strict=True))
    size = len(rows)
    return SpeculationCells(
        batch=batch.astype(np.float64),
        gamma=gamma.astype(np.int64),
        tok_s_per_request=speed.astype(np.float64),
        mean_acceptance_length=np.full(size, math.nan),
        context=np.full(size, math.nan),
        armed=np.full(size, armed),
    )


def test_scores_by_hand(fit: CellsFit) -> None:
    # Origin: hand. Speeds are the true ones of the sweep's cost times known factors: what is measured is 10 % more
    # than predicted, 20 % less, not at all. At batch 8 length 3 is truly faster than length 0 (and so predicted) and
    # is said to be slower: the loss is what was measured.
    truth = {(b, k): float(true_speed(b, k)) for b in (8, 32) for k in (0, 3)}
    assert truth[8, 3] > truth[8, 0]
    found = score_cells(
        fit,
        wanted([(8, 0, truth[8, 0] * 1.1), (8, 3, truth[8, 0] * 0.99), (32, 3, truth[32, 3] * 0.8), (32, 2, math.nan)]),
    )
    assert set(found) == {
        "schema",
        "mape",
        "max_error",
        "regret_max",
        "covered",
        "regrets",
        "cells",
        "fit",
    }
    assert found["schema"] == "servecast.speculation-score/1"
    predicted = [one["predicted_tok_s_per_request"] for one in found["cells"]]
    assert predicted == pytest.approx([truth[8, 0], truth[8, 3], truth[32, 3], float(true_speed(32, 2))], rel=0.02)
    errors = [1 / 1.1 - 1, truth[8, 3] / truth[8, 0] / 0.99 - 1, 1 / 0.8 - 1]
    assert [one["error"] for one in found["cells"]][:3] == pytest.approx(errors, rel=0.0, abs=0.03)
    exact = [
        predicted[0] / (truth[8, 0] * 1.1) - 1,
        predicted[1] / (truth[8, 0] * 0.99) - 1,
        predicted[2] / (truth[32, 3] * 0.8) - 1,
    ]
    assert found["mape"] == pytest.approx(sum(abs(one) for one in exact) / 3, rel=1e-12)
    assert found["max_error"] == pytest.approx(max(abs(one) for one in exact), rel=1e-12)
    (only,) = found["regrets"]
    assert only["batch_size"] == 8.0
    assert math.isnan(only["context"])
    assert only["regret"] == pytest.approx(1 - 0.99 / 1.1, rel=1e-12)
    assert found["regret_max"] == pytest.approx(0.1, rel=1e-12)
    assert found["covered"] == 0.0  # the nearest is 9 % away
    assert math.isnan(found["cells"][3]["error"])
    assert json.loads(to_json(found))["cells"][3]["measured_tok_s_per_request"] is None


def test_scores_of_the_truth(fit: CellsFit) -> None:
    # Origin: round trip; measured as it is, everything is within its interval and nothing is lost.
    rows = [(b, k, float(true_speed(b, k))) for b in (2, 8, 32) for k in (0, 2, 4)]
    found = score_cells(fit, wanted(rows))
    assert found["mape"] < 0.01
    assert found["regret_max"] < 0.01
    assert found["covered"] == 1.0
    assert all(one["calibrated"] for one in found["cells"])


def test_scores_without_measurements(fit: CellsFit) -> None:
    # Origin: rule, a missing metric is missing and never 0.
    found = score_cells(fit, wanted([(8, 1, math.nan), (500, 3, math.nan)]))
    assert [found[name] for name in ("mape", "max_error", "regret_max", "covered")] == [None] * 4
    assert [one["calibrated"] for one in found["cells"]] == [True, False]
    assert all(one["lo"] < one["predicted_tok_s_per_request"] < one["hi"] for one in found["cells"])


def test_contexts_are_decided_apart(fit: CellsFit) -> None:
    # Origin: hand. Length 3 is predicted to be faster; at 1,000 tokens it has 80 against 100, at 2,000 90 against 60.
    rows = wanted([(8, 0, 100.0), (8, 3, 80.0), (8, 0, 60.0), (8, 3, 90.0)])
    found = score_cells(fit, replace(rows, context=np.array([1000.0, 1000.0, 2000.0, 2000.0])))
    assert [(one["batch_size"], one["context"], one["regret"]) for one in found["regrets"]] == [
        (8.0, 1000.0, pytest.approx(0.2, rel=1e-12)),
        (8.0, 2000.0, 0.0),
    ]


def test_scores_of_armed_cells(fit: CellsFit) -> None:
    # Origin: the fit's own prediction of an armed step, slower than one without a drafter; regret is among cells
    # that draft or are switched off.
    armed, off = (score_cells(fit, wanted([(8, 0, 50.0)], armed=one)) for one in (True, False))
    speed = [one["cells"][0]["predicted_tok_s_per_request"] for one in (armed, off)]
    direct = fit.predict(np.array([8.0]), np.array([0]), armed=True).tok_s_per_request[0]
    assert speed[0] == pytest.approx(float(direct), rel=1e-12)
    assert speed[0] < speed[1]
    mixed = wanted([(8, 0, 60.0), (8, 3, 90.0)], armed=False)
    both = replace(mixed, armed=np.array([True, False]))
    assert score_cells(fit, both)["regrets"] == []
    assert LENGTHS[3] > 2.0  # length 3 pays at batch 8, so a mix would have shown a regret

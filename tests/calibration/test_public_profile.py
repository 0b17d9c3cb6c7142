"""The shipped profile against the public data it was made from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from servecast.calibration.profile import from_document, load_profile, read_document
from servecast.calibration.public import (
    PublicRuns,
    constant_table,
    load_runs,
    public_profile,
    silicon_points,
)
from servecast.calibration.public_document import document
from servecast.model.engine import EngineConstants
from servecast.model.forecast import METRICS, NOVELTY, Points, forecast
from servecast.readers.silicon import read_silicon


@pytest.fixture(scope="module")
def public(data_path: Callable[..., Path]) -> PublicRuns:
    return load_runs(data_path("aic-silicon").parent, load_profile().kernels)


def test_points_of_rows_are_the_rows(data_path: Callable[..., Path]) -> None:
    # Origin: the rows themselves; equal deployments are shared.
    rows = read_silicon(data_path("aic-silicon", "agg.csv"))[::17]
    points = silicon_points(rows)
    assert len(points.deployments) < len(rows)
    for i, row in enumerate(rows):
        one = points.deployments[points.index[i]]
        assert (one.gpu.name, one.tp, one.dp, one.ep, one.pp) == (row.system, row.tp, row.dp, row.ep, row.pp)
        assert points.engines[points.index[i]] == row.engine
        assert (points.clients[i], points.isl[i], points.osl[i]) == (row.clients, row.isl, row.osl)


def test_the_shipped_profile_predicts_the_dense_rows_it_was_fitted_to(public: PublicRuns) -> None:
    # Origin: measured servers, in sample: a loose bar that a wrong file, unit or kernel would miss at once. Held-out
    # errors are in tests/validation.
    found = forecast(load_profile(), public.points)
    chosen = public.usable & ~public.runs.moe
    error = np.abs(found.tpot_s[chosen] / public.runs.tpot_s[chosen] - 1.0)
    assert np.isfinite(error).all()
    assert np.median(error) < 0.07
    assert error.mean() < 0.10
    moe = public.usable & public.runs.moe
    assert np.nanmedian(np.abs(found.tpot_s[moe] / public.runs.tpot_s[moe] - 1.0)) < 0.20


def test_ranges_are_those_of_the_usable_rows(public: PublicRuns) -> None:
    # Origin: independent: minima and maxima over the rows.
    ranges = load_profile().ranges
    for name, values in (("clients", public.points.clients), ("isl", public.points.isl), ("osl", public.points.osl)):
        assert ranges[name] == pytest.approx((values[public.usable].min(), values[public.usable].max()), rel=1e-5)


def test_known_models_are_those_of_the_usable_rows(public: PublicRuns) -> None:
    names = {public.points.deployments[number].llm.name for number in public.points.index[public.usable]}
    assert load_profile().known_models == names


def test_constants_by_engine_class_and_kernels() -> None:
    # Origin: definition: 3 engines x 2 model classes x kernels measured or not.
    table = constant_table(np.zeros(200))
    assert len(table) == 12
    for k in table.values():
        assert {field.name for field in fields(EngineConstants)} == set(EngineConstants.__slots__)
        assert np.asarray(k.layer_gap_s) == pytest.approx(1.0, rel=1e-12)  # exp(0)


def test_the_command_needs_its_arguments() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "servecast.calibration.public_document"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--data, --out, --date" in done.stderr


@pytest.mark.slow
def test_the_shipped_profile_is_a_rebuild_from_public_data(data_path: Callable[..., Path]) -> None:
    # Origin: the public tables, fitted anew: predictions on all rows within 2 %, interval ends within 3 points.
    profile, fit, reports, public = public_profile(data_path("aic-silicon").parent)
    shipped = load_profile()
    points: Points = public.points
    rebuilt, found = forecast(profile, points), forecast(shipped, points)
    np.testing.assert_array_equal(np.isnan(rebuilt.tpot_s), np.isnan(found.tpot_s))
    np.testing.assert_allclose(found.tpot_s, rebuilt.tpot_s, rtol=0.02)
    np.testing.assert_allclose(found.ttft_s, rebuilt.ttft_s, rtol=0.02)
    for metric in METRICS:
        for moe in (False, True):
            for level in NOVELTY:
                ours, theirs = shipped.bands[metric, moe, level], profile.bands[metric, moe, level]
                assert (ours.lo, ours.hi) == pytest.approx((theirs.lo, theirs.hi), abs=0.03)
    assert shipped.known_gpus == profile.known_gpus
    assert shipped.known_models == profile.known_models
    # and the document of the rebuild reads back as the profile itself
    again = from_document(document(profile, fit, reports, public, date="2026-11-22"))
    np.testing.assert_allclose(forecast(again, points).tpot_s, rebuilt.tpot_s, rtol=1e-9)
    assert read_document("public-2026.11").provenance.runs_fitted == fit.n

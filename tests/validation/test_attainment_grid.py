"""Closed form against simulator. Expected values: the reference simulator, with the tolerance written beforehand; the
range from the rules stated in docs/mechanisms/slo_attainment.md; counts and arithmetic by hand."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from servecast.validation.attainment_grid import (
    FIGURES,
    GRIDS,
    GridPoint,
    GridScore,
    csv_text,
    main,
    markdown,
    score_grid,
    score_point,
    simulate_point,
    spaced,
)

SMALL, SEEDS = 4_000, (21, 22, 23)
TOLERANCE = 0.15
"""Of the simulated value, beside four standard errors of its mean over seeds."""
STEADY = [one for points in GRIDS.values() for one in points if one.gap_cv == 1.0 and one.utilisation in {0.4, 0.5}]
"""Poisson arrivals at half load: every mix with every model of its grid."""


def name(point: GridPoint) -> str:
    return f"{point.mix}-{point.gpu}-{point.gap_cv:g}-{point.utilisation:g}"


def only(mix: str, gap_cv: float, utilisation: float) -> GridPoint:
    """The first point of a mix at a load."""
    return next(
        one
        for points in GRIDS.values()
        for one in points
        if (one.mix, one.gap_cv, one.utilisation) == (mix, gap_cv, utilisation)
    )


def flags(point: GridPoint) -> dict[tuple[str, float], bool]:
    """In range or not; the simulation beside it as short as can be."""
    return {(one.metric, one.percentile): one.in_range for one in score_point(point, requests=400, seeds=(1,))}


def test_grids_share_nothing() -> None:
    """Hand: 3 mixes x 2 models x 4 cvs x 8 loads, and 3 x 2 x 6 x 7; no mix and no pair of model and GPU in both."""
    chosen, held_out = GRIDS["chosen"], GRIDS["second"]
    assert (len(set(chosen)), len(set(held_out))) == (192, 252)
    assert not {one.mix for one in chosen} & {one.mix for one in held_out}
    assert not {(one.model, one.gpu) for one in chosen} & {(one.model, one.gpu) for one in held_out}


@pytest.mark.parametrize("point", STEADY, ids=name)
def test_half_load_within_the_tolerance(point: GridPoint) -> None:
    """Simulator: in range within 15 % and four standard errors over three seeds of 4 000 requests."""
    runs = simulate_point(point, requests=SMALL, seeds=SEEDS)
    inside = [one for one in score_point(point, requests=SMALL, seeds=SEEDS) if one.in_range]
    assert {one.percentile for one in inside if one.metric == "ttft"} == {50.0, 95.0, 99.0}
    for one in inside:
        seen = runs[one.metric, one.percentile]
        assert one.simulated_s == pytest.approx(seen.mean(), rel=1e-12)
        sem = float(seen.std(ddof=1)) / np.sqrt(len(seen))
        assert abs(one.closed_form_s - one.simulated_s) <= TOLERANCE * one.simulated_s + 4.0 * sem, one


@pytest.mark.parametrize("mix", ["chat", "reasoning", "assistant", "retrieval", "agent"])
def test_bursts_near_saturation_are_outside(mix: str) -> None:
    """Rule: arrivals of cv 4 have an index of dispersion near 16 at the memory of a busy prompt queue; the range ends
    at 2.6."""
    assert not any(flags(only(mix, 4.0, 0.95)).values())


def test_a_batch_limit_that_binds_is_outside() -> None:
    """Rule: a slot wait likelier than 0.2 (1 - p). At 95 % of capacity far more than 1 % of Poisson arrivals wait."""
    found = flags(only("assistant", 1.0, 0.95))
    assert not found["ttft", 99.0]
    assert not found["tpot", 99.0]


def test_short_outputs_leave_only_the_pace_outside() -> None:
    """Rule: fewer than 8 prompts in a median request. Code has outputs of 28 tokens, and a fifth of its capacity."""
    found = flags(only("code", 1.0, 0.2))
    assert [found[figure] for figure in FIGURES] == [True, True, True, False, False]


def test_the_same_seed_gives_the_same_rows() -> None:
    point = only("chat", 1.0, 0.5)
    assert score_point(point, requests=500, seeds=(3,)) == score_point(point, requests=500, seeds=(3,))


def test_points_are_spread_through_a_grid() -> None:
    """Hand: 4 of 192 are the numbers 0, 48, 96 and 144; more than there are is all."""
    chosen = GRIDS["chosen"]
    assert spaced(chosen, 4) == (chosen[0], chosen[48], chosen[96], chosen[144])
    assert spaced(chosen, 1000) == chosen
    with pytest.raises(ValueError, match="points must be >= 1, got 0"):
        spaced(chosen, 0)


def row(error: float, *, in_range: bool) -> GridScore:
    return GridScore(
        grid="chosen",
        mix="chat",
        model="a",
        gpu="b",
        tp=1,
        cap=8,
        gap_cv=1.0,
        utilisation=0.5,
        metric="ttft",
        percentile=50.0,
        simulated_s=2.0,
        spread=0.0,
        closed_form_s=2.0 * (1.0 + error),
        error=error,
        in_range=in_range,
    )


def test_table_by_hand() -> None:
    """Hand: |errors| of 1, 2 and 5 % have the median 2 and, linear, the 95th percentile 2 + 0.9 (5 - 2) = 4.7."""
    rows = [row(error, in_range=True) for error in (0.01, -0.02, 0.05)] + [row(-0.5, in_range=False)]
    lines = markdown(rows).splitlines()
    assert "| chosen | TTFT p50 | 3 | 2.0 | 4.7 | 1 | 50.0 | 50.0 |" in lines
    assert "| chosen | **all** | 3 | 2.0 | 4.7 | 1 | 50.0 | 50.0 |" in lines


def test_csv_has_four_digits() -> None:
    (found,) = csv.DictReader(io.StringIO(csv_text([replace(row(0.0, in_range=True), simulated_s=1.23456)])))
    assert (found["simulated_s"], found["percentile"], found["in_range"]) == ("1.235", "50", "True")


def test_the_command_refuses_no_points(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--points", "0"])
    assert stopped.value.code == 2
    assert "points must be >= 1, got 0" in capsys.readouterr().err


def test_the_command_scores_some_points(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Documented: --points takes so many of each grid. Scoring itself is replaced: it is tested above."""
    asked: list[GridPoint] = []

    def scored(points: list[GridPoint], **_: object) -> list[GridScore]:
        asked.extend(points)
        return [row(0.01, in_range=True)]

    monkeypatch.setattr("servecast.validation.attainment_grid.score_grid", scored)
    assert main(["--points", "2", "--json"]) == 0
    assert asked == [*spaced(GRIDS["chosen"], 2), *spaced(GRIDS["second"], 2), *spaced(GRIDS["fresh"], 2)]
    assert [one["error"] for one in json.loads(capsys.readouterr().out)] == [0.01]


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["second", "fresh"])
def test_bars_of_the_other_grids(grid: str) -> None:
    """Bars: of all percentiles in range, the median |error| is at most 5 %, the 95th percentile at most 15 %."""
    errors = [abs(one.error) for one in score_grid(GRIDS[grid]) if one.in_range]
    assert len(errors) >= 300
    assert float(np.median(errors)) <= 0.05
    assert float(np.percentile(errors, 95.0)) <= 0.15

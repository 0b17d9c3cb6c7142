"""Seconds of a speculative step: formula and table against numbers by hand and public step costs, and shared laws."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.model.speculation_cost import (
    FormulaCost,
    RowForm,
    SpeculationCost,
    TableCost,
    experts_read,
    padded,
    rise,
    step_seconds,
)

FORMS = list(RowForm)
TIMES = ("base_s", "rise_s", "row_s", "request_s", "round_s", "draft_s", "cached_token_s", "idle_request_s", "eager_s")


def formula(form: RowForm = RowForm.SATURATING, **changes: Any) -> FormulaCost:
    numbers: dict[str, Any] = {
        "base_s": 0.010,
        "rise_s": 0.008,
        "rise_rows": 40.0,
        "row_s": 5e-5,
        "request_s": 2e-5,
        "round_s": 0.001,
        "draft_s": 0.0005,
    }
    return FormulaCost(form=form, **(numbers | changes))


def table(**changes: Any) -> TableCost:
    numbers: dict[str, Any] = {
        "rows": np.array([1.0, 8.0, 16.0]),
        "verify_s": np.array([0.005, 0.006, 0.008]),
        "draft_requests": np.array([1.0, 8.0]),
        "draft_pass_s": np.array([0.001, 0.0017]),
        "parallel": False,
        "eager_rows": np.array([32.0, 64.0]),
        "eager_verify_s": np.array([0.020, 0.036]),
    }
    return TableCost(**(numbers | changes))


@pytest.fixture
def measured(data_path: Callable[..., Path]) -> TableCost:
    """Step costs of DeepSeek-V4-Flash, TP4 on B300 (public, vLLM blog 2026-08-14, figure 2)."""
    with data_path("speculation", "other", "step_cost_dsv4_flash_tp4_b300.csv").open(encoding="utf-8") as stream:
        points = list(csv.DictReader(stream))

    def column(phase: str, mode: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([float(one[name]) for one in points if (one["phase"], one["mode"]) == (phase, mode)])

    return TableCost(
        rows=column("verify", "cuda_graph", "n"),
        verify_s=column("verify", "cuda_graph", "step_s"),
        draft_requests=column("draft", "cuda_graph", "n"),
        draft_pass_s=column("draft", "cuda_graph", "step_s"),
        parallel=True,
        eager_rows=column("verify", "eager", "n"),
        eager_verify_s=column("verify", "eager", "step_s"),
    )


# ---- mixtures of experts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "per_token", "rows", "expected"),
    [(128, 8, 1, 8.0), (128, 8, 8, 51.620), (128, 8, 64, 125.94), (256, 8, 16, 101.96)],
)
def test_experts_woken(experts: int, per_token: int, rows: int, expected: float) -> None:
    # Origin: reference page 4.9, to the digits printed there.
    assert float(experts_read(experts, per_token, rows)) == pytest.approx(expected, rel=5e-5)


def test_experts_woken_in_draws() -> None:
    # Origin: Monte Carlo; every token takes 8 distinct experts of 256, uniformly.
    rng = np.random.default_rng(11)
    picks = np.argpartition(rng.random((2000, 16, 256)), 8, axis=-1)[..., :8].reshape(2000, -1)
    distinct = np.array([np.unique(one).size for one in picks])
    error = distinct.std(ddof=1) / math.sqrt(distinct.size)
    assert abs(distinct.mean() - float(experts_read(256, 8, 16))) < 4.0 * error


@settings(max_examples=60)
@given(experts=st.integers(1, 512), share=st.floats(0.001, 1.0), rows=st.integers(0, 4096))
def test_experts_woken_bounds(experts: int, share: float, rows: int) -> None:
    # Origin: definition. None by no token, t by one, at most min(t n, E), never fewer by one token more.
    active = max(1, math.floor(share * experts))
    assert float(experts_read(experts, active, 0)) == 0.0
    assert float(experts_read(experts, active, 1)) == pytest.approx(active, rel=1e-12)
    here, more = experts_read(experts, active, [rows, rows + 1])
    assert 0.0 <= here <= min(active * rows, experts) * (1.0 + 1e-12)
    assert more >= here


def test_every_expert_active() -> None:
    # Origin: limit t = E.
    assert experts_read(8, 8, [0, 1, 5]).tolist() == [0.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 9, 1), r"^per_token must be > 0 and <= experts, got 9\.0 of 8\.0$"),
        ((8, 0, 1), "per_token must be > 0"),
        ((8, math.nan, 1), "per_token must be > 0"),
        ((8, 2, -1), r"^rows must be >= 0, got -1\.0$"),
        ((8, 2, math.nan), "rows must be >= 0"),
    ],
)
def test_experts_refused(arguments: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experts_read(*arguments)


# ---- the row forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (RowForm.SATURATING, 1.0 - math.exp(-2.0)),
        (RowForm.HYPERBOLIC, 2.0 / 3.0),
        (RowForm.LOGARITHMIC, math.log(3.0) / math.log(1.0 + 256.0 / 32.0)),
    ],
)
def test_rise_by_hand(form: RowForm, expected: float) -> None:
    # Origin: hand, 64 rows over tau = 32.
    assert float(rise(form, 64, 32)) == pytest.approx(expected, rel=1e-14)


def test_rise_at_its_ends() -> None:
    # Origin: limits. 0 rows do not rise; the bounded forms end at 1; the logarithm passes 1 at 256 rows for any tau.
    for form in FORMS:
        assert float(rise(form, 0, 7)) == 0.0
    for form in (RowForm.SATURATING, RowForm.HYPERBOLIC):
        assert float(rise(form, 1e12, 7)) == pytest.approx(1.0, rel=1e-10)
    np.testing.assert_allclose(rise(RowForm.LOGARITHMIC, 256, [1.0, 30.0, 900.0]), 1.0, rtol=1e-14)


# ---- the formula ---------------------------------------------------------------------------------------


def test_step_by_hand() -> None:
    # Origin: hand, B = 16 and gamma = 3, 64 rows: 10 + 8 (1 - e^-1.6) + 3.2 + 0.32 + 1 + 1.5 ms, e^-1.6 = 0.20189652.
    assert float(step_seconds(formula(), 16, 3)) == pytest.approx(0.02240482786, rel=1e-9)
    # the same without speculation, 16 rows: 10 + 8 (1 - e^-0.4) + 0.8 + 0.32 ms, e^-0.4 = 0.67032005
    assert float(step_seconds(formula(), 16, 0)) == pytest.approx(0.01375743963, rel=1e-9)


def test_linear_step_of_published_constants() -> None:
    # Origin: reference page 4.8, constants of SpecDecode-Bench for Llama-3.1-8B on H100: 7.114 ms without speculation
    # at batch 1, the overhead of a step included.
    cost = formula(
        base_s=5.88591e-3 + 1.20684e-3, rise_s=0.0, row_s=2.10103e-5, request_s=0.0, cached_token_s=3.92646e-8
    )
    assert float(step_seconds(cost, 1, 0)) == pytest.approx(7.114e-3, rel=5e-5)
    # 1,000 cached tokens of each of 10 requests at 10 x 4 rows: 5.88591 + 1.20684 + 0.840412 + 0.392646 ms
    assert float(cost.verify(40, 10, 1000)) == pytest.approx(8.325808e-3, rel=1e-9)


def test_context_counts_once_per_request() -> None:
    # Origin: definition. The cache of a request is read once for all of its rows: kappa B (l - l0).
    cost = formula(cached_token_s=3e-8, reference_context=500.0)
    for rows in (8, 32, 64):
        added = cost.verify(rows, 8, 4500) - cost.verify(rows, 8, 500)
        assert float(added) == pytest.approx(3e-8 * 8 * 4000, rel=1e-9)
    doubled = cost.verify(64, 16, 4500) - cost.verify(64, 16, 500)
    assert float(doubled) == pytest.approx(3e-8 * 16 * 4000, rel=1e-9)
    assert float(cost.verify(64, 8, 0) - cost.verify(64, 8, 500)) == pytest.approx(-3e-8 * 8 * 500, rel=1e-9)


def test_armed_but_idle() -> None:
    # Origin: reference page 4.10, T(B, 0 armed) = T(B, off) + d_0 + d_1 B; d_0 where nothing was measured.
    batch = np.array([1.0, 8.0, 64.0])
    plain, known = formula(), formula(idle_s=0.0004, idle_request_s=2e-6)
    off = step_seconds(plain, batch, 0)
    np.testing.assert_allclose(step_seconds(plain, batch, 0, armed=True) - off, 0.001, rtol=1e-9)
    np.testing.assert_allclose(step_seconds(known, batch, 0, armed=True) - off, 0.0004 + 2e-6 * batch, rtol=1e-9)
    np.testing.assert_array_equal(step_seconds(known, batch, 2, armed=True), step_seconds(known, batch, 2))


def test_graph_sizes_and_the_limit_above_them() -> None:
    # Origin: hand. 33 rows pay for 64, 65 are computed as they are and pay the eager step once.
    cost = formula(captured=(64, 8, 32), eager_s=0.05)
    smooth = formula()
    assert float(cost.verify(33, 11, 0)) == pytest.approx(float(smooth.verify(64, 11, 0)), rel=1e-14)
    assert float(cost.verify(64, 16, 0)) == pytest.approx(float(smooth.verify(64, 16, 0)), rel=1e-14)
    assert float(cost.verify(65, 13, 0)) == pytest.approx(float(smooth.verify(65, 13, 0)) + 0.05, rel=1e-14)


@settings(max_examples=60)
@given(rows=st.integers(1, 600), sizes=st.sets(st.integers(1, 512), max_size=12))
def test_padding_against_a_search(rows: int, sizes: set[int]) -> None:
    # Origin: slow obvious code.
    enough = [size for size in sizes if size >= rows]
    assert float(padded(rows, list(sizes))) == (min(enough) if enough else rows)


@pytest.mark.parametrize("name", [*TIMES, "idle_s", "reference_context", "rise_rows"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_formula_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be finite and >= 0, got {value}$"):
        formula(**{name: value})


def test_formula_refuses_a_scale_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"^rise_rows must be > 0, got 0\.0$"):
        formula(rise_rows=0.0)
    with pytest.raises(ValueError, match=r"^captured must be sizes > 0, got \(8, 0\)$"):
        formula(captured=(8, 0))


# ---- the table -----------------------------------------------------------------------------------------


def test_public_staircase(measured: TableCost) -> None:
    # Origin: reference page 4.8: 121 tokens pay for 128; the printed costs of single sizes.
    rows = [1, 16, 64, 121, 128, 256, 1024]
    expected = [5.11e-3, 5.59e-3, 7.90e-3, 9.47e-3, 9.47e-3, 11.51e-3, 20.63e-3]
    np.testing.assert_allclose(measured.verify(rows, 1, 0), expected, rtol=1e-12)
    np.testing.assert_allclose(measured.draft([1, 64, 256], 5, 0), [0.88e-3, 2.27e-3, 5.38e-3], rtol=1e-12)


def test_public_cliff(measured: TableCost) -> None:
    # Origin: reference page 4.8: 2047 tokens run eagerly at 104.5 ms, 16384 at 234.9. Just above the largest graph no
    # eager pass was measured; the nearest one stands for it. 3072 lies half way from 2047 to 4097 (133.5 ms).
    np.testing.assert_allclose(measured.verify([2047, 16384, 3072], 1, 0), [0.1045, 0.2349, 0.119], rtol=1e-12)
    assert float(measured.verify(1025, 1, 0)) == pytest.approx(0.1045, rel=1e-12)
    slope = (0.2349 - 0.1357) / (16384 - 8185)
    assert float(measured.verify(20000, 1, 0)) == pytest.approx(0.2349 + slope * 3616, rel=1e-12)


def test_table_without_eager_points() -> None:
    # Origin: hand. The last slope of the graphs, 2 ms per 8 rows, goes on.
    cost = table(eager_rows=np.array([]), eager_verify_s=np.array([]))
    np.testing.assert_allclose(cost.verify([16, 24, 32], 1, 0), [0.008, 0.010, 0.012], rtol=1e-12)


def test_eager_pass_is_never_cheaper_than_the_largest_graph() -> None:
    # Origin: hand. An eager point below the graphs' last one would make a step above the limit cheaper than below it.
    cost = table(eager_rows=np.array([32.0]), eager_verify_s=np.array([0.007]))
    assert float(cost.verify(17, 1, 0)) == pytest.approx(0.008, rel=1e-12)


def test_drafting_in_one_pass_or_in_many() -> None:
    # Origin: hand. One pass of 4 requests is 1 + 0.7 x 3/7 = 1.3 ms; 8 more requests than measured add 0.8 ms.
    one, many = table(parallel=True), table()
    np.testing.assert_allclose(one.draft(4, [0, 1, 6], 0), [0.0, 1.3e-3, 1.3e-3], rtol=1e-12)
    np.testing.assert_allclose(many.draft(4, [0, 1, 6], 0), [0.0, 1.3e-3, 7.8e-3], rtol=1e-12)
    assert float(one.draft(16, 3, 0)) == pytest.approx(2.5e-3, rel=1e-12)
    assert float(step_seconds(many, 4, 0, armed=True) - step_seconds(many, 4, 0)) == pytest.approx(1.3e-3, rel=1e-9)


def test_one_draft_measurement_holds_for_any_batch() -> None:
    cost = table(draft_requests=np.array([1.0]), draft_pass_s=np.array([0.001]))
    np.testing.assert_allclose(cost.draft([1, 50], 2, 0), 0.002, rtol=1e-12)


def test_table_context_counts_once_per_request() -> None:
    cost = table(cached_token_s=1e-8, reference_context=100.0)
    np.testing.assert_allclose(cost.verify([8, 16], 4, 1100) - cost.verify([8, 16], 4, 100), 4e-5, rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.array([1.0, 8.0])}, "verify_s must have one value per size and at least 2, got 3 for 2"),
        (
            {"rows": np.array([1.0]), "verify_s": np.array([0.005])},
            "verify_s must have one value per size and at least 2, got 1 for 1",
        ),
        (
            {"draft_requests": np.array([]), "draft_pass_s": np.array([])},
            "draft_pass_s must have one value per size and at least 1, got 0 for 0",
        ),
        (
            {"rows": np.array([1.0, 8.0, 8.0])},
            r"sizes of verify_s must be finite, > 0 and increase, got \[1.0, 8.0, 8.0\]",
        ),
        ({"rows": np.array([1.0, math.nan, 16.0])}, "sizes of verify_s must be finite, > 0 and increase"),
        ({"eager_rows": np.array([0.0, 64.0])}, "sizes of eager_verify_s must be finite, > 0 and increase"),
        ({"verify_s": np.array([0.005, 0.0, 0.008])}, "verify_s must be finite and > 0"),
        ({"draft_pass_s": np.array([0.001, math.nan])}, "draft_pass_s must be finite and > 0"),
        ({"cached_token_s": -1.0}, r"cached_token_s must be finite and >= 0, got -1.0"),
        ({"reference_context": math.nan}, "reference_context must be finite and >= 0, got nan"),
    ],
)
def test_table_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        table(**changes)


# ---- laws of both --------------------------------------------------------------------------------------

COSTS: list[SpeculationCost] = [
    *(formula(form, cached_token_s=1e-8, captured=(8, 64, 256), eager_s=0.01) for form in FORMS),
    *(formula(form) for form in FORMS),
    table(cached_token_s=1e-8),
    table(parallel=True, eager_rows=np.array([]), eager_verify_s=np.array([])),
]


@pytest.mark.parametrize("cost", COSTS)
@settings(max_examples=40)
@given(rows=st.integers(1, 5000), more=st.integers(0, 5000), requests=st.integers(1, 500))
def test_no_pass_is_cheaper_with_more_rows(cost: SpeculationCost, rows: int, more: int, requests: int) -> None:
    fewer, many = cost.verify([rows, rows + more], requests, 700)
    assert many >= fewer * (1.0 - 1e-14)


@pytest.mark.parametrize("cost", COSTS)
def test_arrays_are_maps_of_scalars(cost: SpeculationCost) -> None:
    batch, gamma, context = np.array([[1.0], [7.0], [300.0]]), np.array([0.0, 1.0, 5.0]), 900.0
    seconds = step_seconds(cost, batch, gamma, context, armed=True)
    assert seconds.shape == (3, 3)
    one = [[float(step_seconds(cost, b, k, context, armed=True)) for k in gamma] for b in batch[:, 0]]
    np.testing.assert_allclose(seconds, one, rtol=1e-14)
    assert cost.draft(batch, gamma, np.zeros((2, 1, 1))).shape == (2, 3, 3)
    assert cost.idle(batch, gamma).shape == (3, 3)


@settings(max_examples=40)
@given(scale=st.floats(1e-3, 1e3), form=st.sampled_from(FORMS), batch=st.integers(1, 400), gamma=st.integers(0, 16))
def test_seconds_scale_and_ratios_do_not(scale: float, form: RowForm, batch: int, gamma: int) -> None:
    # Origin: dimensions. Every constant in seconds times k gives a step times k.
    formulas = formula(form, cached_token_s=2e-8, idle_request_s=1e-6, idle_s=3e-4, captured=(8, 64), eager_s=0.02)
    seconds = {name: getattr(formulas, name) * scale for name in (*TIMES, "idle_s")}
    tables = table(cached_token_s=1e-8)
    slower = dataclasses.replace(
        tables,
        verify_s=tables.verify_s * scale,
        draft_pass_s=tables.draft_pass_s * scale,
        eager_verify_s=tables.eager_verify_s * scale,
        cached_token_s=tables.cached_token_s * scale,
    )
    pairs: list[tuple[SpeculationCost, SpeculationCost]] = [
        (formulas, dataclasses.replace(formulas, **seconds)),
        (tables, slower),
    ]
    for before, after in pairs:
        expected = scale * step_seconds(before, batch, gamma, 800.0, armed=True)
        np.testing.assert_allclose(step_seconds(after, batch, gamma, 800.0, armed=True), expected, rtol=1e-9)

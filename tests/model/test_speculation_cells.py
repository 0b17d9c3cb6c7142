"""Cells of a sweep: what the record refuses, and how repeated measurements of one cell become one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.model.speculation_cells import SpeculationCells, merged


def cells(**changes: Any) -> SpeculationCells:
    """Three cells: batch 1 without speculation, batch 1 and 8 at draft length 2."""
    columns: dict[str, Any] = {
        "batch": [1.0, 1.0, 8.0],
        "gamma": [0, 2, 2],
        "tok_s_per_request": [100.0, 180.0, 140.0],
        "mean_acceptance_length": [math.nan, 2.2, math.nan],
        "context": [math.nan] * 3,
        "armed": [False] * 3,
    }
    columns |= changes
    return SpeculationCells(
        batch=np.array(columns["batch"], dtype=np.float64),
        gamma=np.array(columns["gamma"], dtype=np.int64),
        tok_s_per_request=np.array(columns["tok_s_per_request"], dtype=np.float64),
        mean_acceptance_length=np.array(columns["mean_acceptance_length"], dtype=np.float64),
        context=np.array(columns["context"], dtype=np.float64),
        armed=np.array(columns["armed"], dtype=np.bool_),
    )


def rows(table: SpeculationCells) -> list[tuple[float, ...]]:
    columns = (
        table.batch,
        table.gamma,
        table.tok_s_per_request,
        table.mean_acceptance_length,
        table.context,
        table.armed,
    )
    return [tuple(float(value) for value in row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": [0, 2]}, "gamma must have one value per cell, got 2 for 3"),
        ({"context": [1.0]}, "context must have one value per cell, got 1 for 3"),
        ({"batch": [1.0, 0.5, 8.0]}, "batch must be >= 1, got 0.5 at batch_size 0.5, draft_length 2"),
        ({"batch": [1.0, math.nan, 8.0]}, "batch must be >= 1, got nan at"),
        ({"batch": [1.0, 1.0, math.inf]}, "batch must be >= 1, got inf at"),
        ({"gamma": [0, 2, -1]}, "gamma must be >= 0, got -1 at batch_size 8, draft_length -1"),
        ({"tok_s_per_request": [100.0, 0.0, 140.0]}, "tok_s_per_request must be > 0, got 0.0 at"),
        ({"tok_s_per_request": [100.0, 180.0, math.inf]}, "tok_s_per_request must be > 0, got inf at"),
        (
            {"mean_acceptance_length": [math.nan, 3.01, math.nan]},
            r"mean_acceptance_length must lie in \[1, draft_length \+ 1\], got 3.01 at batch_size 1, draft_length 2",
        ),
        ({"mean_acceptance_length": [math.nan, 0.99, math.nan]}, "mean_acceptance_length must lie in"),
        ({"mean_acceptance_length": [1.5, 2.2, math.nan]}, "mean_acceptance_length must lie in"),
        ({"context": [math.nan, -1.0, math.nan]}, "context must be >= 0, got -1.0 at batch_size 1, draft_length 2"),
        ({"armed": [True, True, False]}, "armed goes with draft_length 0 only, got True at batch_size 1"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        cells(**changes)


def test_ends_of_the_ranges_are_legal() -> None:
    ends = cells(mean_acceptance_length=[1.0, 3.0, 1.0], context=[0.0, 0.0, math.nan], armed=[True, False, False])
    assert ends.size == 3
    assert cells(tok_s_per_request=[math.nan] * 3).size == 3  # to be predicted


def test_take_by_index_and_by_mask() -> None:
    table = cells()
    assert rows(table.take(np.array([2, 0])))[0][:3] == (8.0, 2.0, 140.0)
    assert table.take(np.array([False, True, True])).gamma.tolist() == [2, 2]


def test_cells_measured_twice() -> None:
    # Origin: hand. sqrt(100 x 104) = 101.9804; the acceptance length is the mean of the two that were measured, 2.3;
    # the order is that of the first appearance.
    table = cells(
        batch=[8.0, 1.0, 8.0, 8.0],
        gamma=[2, 0, 2, 2],
        tok_s_per_request=[100.0, 90.0, 104.0, math.sqrt(100.0 * 104.0)],
        mean_acceptance_length=[2.2, math.nan, 2.4, math.nan],
        context=[math.nan] * 4,
        armed=[False] * 4,
    )
    one = merged(table)
    assert one.batch.tolist() == [8.0, 1.0]
    np.testing.assert_allclose(one.tok_s_per_request, [101.9803902719, 90.0], rtol=1e-10)
    np.testing.assert_allclose(one.mean_acceptance_length, [2.3, math.nan], rtol=1e-12)


def test_measurements_that_disagree_are_refused() -> None:
    # Origin: the rule, 5 % of the slower one.
    kept = merged(cells(batch=[1.0, 8.0, 8.0], tok_s_per_request=[90.0, 100.0, 104.9]))
    assert kept.size == 2
    message = "cells of batch_size 8, draft_length 2 must agree within 5%, got tok_s_per_request 100 and 105.1"
    with pytest.raises(ValueError, match=f"^{message}$"):
        merged(cells(batch=[1.0, 8.0, 8.0], tok_s_per_request=[90.0, 105.1, 100.0]))


def test_context_and_armed_tell_cells_apart() -> None:
    differing = cells(
        batch=[1.0] * 4,
        gamma=[0] * 4,
        tok_s_per_request=[100.0, 90.0, 50.0, 80.0],
        mean_acceptance_length=[math.nan] * 4,
        context=[math.nan, 0.0, 4000.0, 0.0],
        armed=[False, False, False, True],
    )
    np.testing.assert_array_equal(rows(merged(differing)), rows(differing))


cell = st.tuples(st.sampled_from([1.0, 4.0, 16.0]), st.integers(0, 3), st.sampled_from([math.nan, 500.0]))


@settings(max_examples=60)
@given(keys=st.lists(cell, min_size=1, max_size=12), seed=st.integers(0, 99))
def test_merging_is_idempotent_and_blind_to_order(keys: list[tuple[float, int, float]], seed: int) -> None:
    # Origin: definition; against a dictionary of lists.
    rng = np.random.default_rng(seed)
    base = [50.0 + 10.0 * b + 7.0 * k + (0.0 if math.isnan(c) else 3.0) for b, k, c in keys]
    speed = np.array(base) * rng.uniform(1.0, 1.04, len(keys))
    table = cells(
        batch=[b for b, _, _ in keys],
        gamma=[k for _, k, _ in keys],
        tok_s_per_request=speed,
        mean_acceptance_length=[math.nan] * len(keys),
        context=[c for _, _, c in keys],
        armed=[False] * len(keys),
    )
    grouped: dict[tuple[float, int, str], list[float]] = {}
    for (b, k, c), y in zip(keys, speed, strict=True):
        grouped.setdefault((b, k, str(c)), []).append(float(y))
    expected = [math.prod(group) ** (1.0 / len(group)) for group in grouped.values()]
    once = merged(table)
    np.testing.assert_allclose(once.tok_s_per_request, expected, rtol=1e-12)
    np.testing.assert_array_equal(merged(once).tok_s_per_request, once.tok_s_per_request)
    shuffled = merged(table.take(rng.permutation(len(keys))))
    np.testing.assert_allclose(np.sort(shuffled.tok_s_per_request), np.sort(expected), rtol=1e-12)

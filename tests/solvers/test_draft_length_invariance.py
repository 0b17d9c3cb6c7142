"""Draft length by batch size: changes of a problem that must not matter to its answer, or only in one direction.
Expected values: the solver itself on the problem unchanged, and the best static length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.solvers.draft_length import DraftLengthProblem, broken_rules, cost_of, solve_draft_length


@st.composite
def plain_problems(draw: st.DrawFn) -> DraftLengthProblem:
    rows, width = draw(st.integers(1, 8)), draw(st.integers(2, 5))
    cell = st.floats(1.0, 100.0)
    return DraftLengthProblem(
        batches=np.arange(1, rows + 1),
        goodput=np.array(draw(st.lists(cell, min_size=rows * width, max_size=rows * width))).reshape(rows, width),
        weights=np.array(draw(st.lists(st.floats(0.01, 1.0), min_size=rows, max_size=rows))),
        max_lengths=draw(st.sampled_from([None, 1, 2, 3])),
        max_segments=draw(st.sampled_from([None, 1, 2, 4])),
        switch_cost=draw(st.sampled_from([0.0, 0.01, 0.1])),
        length_cost=draw(st.sampled_from([0.0, 0.02])),
        non_increasing=draw(st.booleans()),
        protected=draw(st.sampled_from([None, (2, 5)])),
    )


@given(plain_problems(), st.floats(1.0, 2.0), st.data())
@settings(max_examples=40)
def test_achieved_goodput_rises_with_any_goodput(p: DraftLengthProblem, factor: float, data: st.DataObject) -> None:
    """Without rules and costs each batch runs at its best length, so a better cell costs no batch anything."""
    p = DraftLengthProblem(batches=p.batches, goodput=p.goodput, weights=p.weights)
    row, column = (data.draw(st.integers(0, size - 1)) for size in p.goodput.shape)
    risen = p.goodput.copy()
    risen[row, column] *= factor
    better = replace(p, goodput=risen)
    rows = np.arange(len(p.batches))
    before = p.goodput[rows, solve_draft_length(p).lengths]
    assert (risen[rows, solve_draft_length(better).lengths] >= before).all()


@given(plain_problems(), st.floats(0.0, 1.0), st.data())
@settings(max_examples=40)
def test_objective_falls_as_a_length_comes_nearer_to_the_best(
    p: DraftLengthProblem, share: float, data: st.DataObject
) -> None:
    """Under any rules; beyond the best it would raise every other length's regret, and the objective may rise."""
    row, column = (data.draw(st.integers(0, size - 1)) for size in p.goodput.shape)
    risen = p.goodput.copy()
    risen[row, column] += share * (risen[row].max() - risen[row, column])
    nearer = replace(p, goodput=np.minimum(risen, p.goodput.max(axis=1, keepdims=True)))
    before = solve_draft_length(p).objective
    assert solve_draft_length(nearer).objective <= before + 1e-12


@given(plain_problems(), st.sampled_from([0.125, 7.0, 1e6]))
@settings(max_examples=25)
def test_unit_of_goodput_does_not_matter(p: DraftLengthProblem, factor: float) -> None:
    one, other = solve_draft_length(p), solve_draft_length(replace(p, goodput=p.goodput * factor))
    np.testing.assert_allclose(other.objective, one.objective, rtol=1e-9, atol=1e-12)


@given(plain_problems(), st.data())
@settings(max_examples=40)
def test_row_split_in_two(p: DraftLengthProblem, data: st.DataObject) -> None:
    """Two rows alike with half the weight each, where the one was: nothing is gained by an edge between them."""
    row = data.draw(st.integers(0, len(p.batches) - 1))
    weights = np.insert(p.weights, row, p.weights[row] / 2)
    weights[row + 1] /= 2
    p = replace(p, protected=None)
    split = replace(
        p,
        batches=np.arange(1, len(p.batches) + 2),
        goodput=np.insert(p.goodput, row, p.goodput[row], axis=0),
        weights=weights,
    )
    whole, parts = solve_draft_length(p), solve_draft_length(split)
    np.testing.assert_allclose(parts.objective, whole.objective, rtol=1e-9, atol=1e-12)
    if p.switch_cost != 0.0:
        assert parts.lengths[row] == parts.lengths[row + 1]


@given(plain_problems())
@settings(max_examples=40)
def test_relaxing_a_rule_never_costs(p: DraftLengthProblem) -> None:
    found = solve_draft_length(p)
    looser: list[dict[str, Any]] = [
        {"non_increasing": False},
        {"protected": None},
        {"switch_cost": float(p.switch_cost) / 2},
        {"length_cost": p.length_cost / 2},
        {"max_lengths": None if p.max_lengths is None else p.max_lengths + 1},
        {"max_segments": None if p.max_segments is None else p.max_segments + 1},
    ]
    for change in looser:
        assert solve_draft_length(replace(p, **change)).objective <= found.objective + 1e-12


@given(plain_problems())
@settings(max_examples=40)
def test_answer_keeps_the_rules_and_is_its_own_cost(p: DraftLengthProblem) -> None:
    found = solve_draft_length(p)
    assert broken_rules(p, found.lengths.tolist()) == []
    assert cost_of(p, found.lengths)[2] == found.objective
    spread = np.repeat([k for *_, k in found.segments], [hi - lo + 1 for lo, hi, _ in found.segments])
    np.testing.assert_array_equal(spread, found.lengths)


@given(plain_problems())
@settings(max_examples=40)
def test_no_drafts_where_they_never_pay(p: DraftLengthProblem) -> None:
    """Goodput that falls with the length at every batch."""
    falling = -np.sort(-p.goodput, axis=1) - 1e-3 * np.arange(p.goodput.shape[1])
    assert not solve_draft_length(replace(p, goodput=falling)).lengths.any()


@given(plain_problems())
@settings(max_examples=40)
def test_single_length_is_the_best_static_one(p: DraftLengthProblem) -> None:
    """One length allowed, or switches too dear to make: the best row of the table of static lengths."""
    for change in ({"max_lengths": 1}, {"switch_cost": 1e3}):
        found = solve_draft_length(replace(p, length_cost=0.0, **change))
        best = min(one.mean_regret for one in found.static) * p.weights.sum()
        np.testing.assert_allclose(found.objective, best, rtol=1e-9, atol=1e-12)
        assert len(found.segments) == 1

"""Draft length by batch size: what is said of the answer, and what is refused. Expected values: hand, and goodputs
drawn from their intervals."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servecast.solvers import draft_length_paths
from servecast.solvers.draft_length import (
    DraftLengthProblem,
    StaticLength,
    Status,
    broken_rules,
    cost_of,
    solve_draft_length,
)
from servecast.solvers.draft_length_milp import solve_draft_length_milp

GOODPUT = np.array(
    [
        [50.0, 80.0, 100.0],
        [60.0, 100.0, 90.0],
        [100.0, 90.0, 50.0],
    ]
)
"""Regret, by hand: .5 .2 0; .4 0 .1; 0 .1 .5."""


def problem(**changed: Any) -> DraftLengthProblem:
    given: dict[str, Any] = {"batches": np.array([1, 2, 3]), "goodput": GOODPUT, "weights": np.ones(3)}
    return DraftLengthProblem(**{**given, **changed})


# ---- the record ----------------------------------------------------------------------------------------


def test_record_by_hand() -> None:
    """Batch 2 counts twice. Lengths {1, 2} lose .1 at batch 3, {0, 2} .1 twice at batch 2, {0, 1} .2 at batch 1."""
    found = solve_draft_length(problem(max_lengths=2, weights=np.array([1.0, 2.0, 1.0])))
    assert found.lengths.tolist() == [2, 1, 1]
    assert found.segments == ((1, 1, 2), (2, 3, 1))
    np.testing.assert_allclose(found.regret, [0.0, 0.0, 0.1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose([found.objective, found.mean_regret, found.worst_regret], [0.1, 0.025, 0.1], rtol=1e-12)
    assert (found.status, found.gap, found.infeasible_batches, found.binding) == (Status.OPTIMAL, 0.0, (), ())
    assert np.isnan(found.regret_bound)


def test_static_lengths_by_hand() -> None:
    """Means of the columns of the regrets; the limits are met by length 1 alone, and length 2 lacks a batch."""
    feasible = np.array([[True, True, True], [False, True, True], [True, True, True]])
    goodput = GOODPUT.copy()
    goodput[2, 2] = np.nan
    static = solve_draft_length(problem(goodput=goodput, feasible=feasible)).static
    assert [(one.length, one.feasible) for one in static] == [(0, False), (1, True), (2, False)]
    np.testing.assert_allclose([one.mean_regret for one in static], [0.3, 0.1, np.nan], rtol=1e-12)
    np.testing.assert_allclose([one.worst_regret for one in static], [0.5, 0.2, np.nan], rtol=1e-12)
    assert isinstance(static[0], StaticLength)


def test_switches_and_lengths_are_paid() -> None:
    """Hand: 2, 1, 0 without regret costs two switches and three lengths: 2 x 0.01 + 3 x 0.02."""
    found = solve_draft_length(problem(switch_cost=0.01, length_cost=0.02))
    assert found.lengths.tolist() == [2, 1, 0]
    np.testing.assert_allclose(found.objective, 0.08, rtol=1e-12)


def test_ties_within_the_standard_error() -> None:
    """Hand: at batch 1 the regret of length 1 is .2; sigma .1 of it and .15 of the best make .1803 at z = 1 and .216
    at z = 1.2. Ties choose the shorter length, and the regret shown is the one that was not forgiven."""
    sigma = np.array([[0.0, 0.1, 0.15], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert solve_draft_length(problem(sigma=sigma)).lengths.tolist() == [2, 1, 0]
    found = solve_draft_length(problem(sigma=sigma, tie_z=1.2))
    assert found.lengths.tolist() == [1, 1, 0]
    assert found.objective == 0.0
    np.testing.assert_allclose(found.regret, [0.2, 0.0, 0.0], rtol=1e-12, atol=1e-15)


def test_unseen_batches_take_their_best_length() -> None:
    """No weight at batch 2: its choice costs nothing, and is the best one all the same."""
    assert solve_draft_length(problem(weights=np.array([1.0, 0.0, 1.0]))).lengths.tolist() == [2, 1, 0]


def test_regret_bound_by_hand() -> None:
    """10 % either way. Chosen 2, 1, 0 with lower end 90; largest rivals 88, 99 and 99: (99 - 90) / 99."""
    found = solve_draft_length(problem(goodput_lo=0.9 * GOODPUT, goodput_hi=1.1 * GOODPUT))
    np.testing.assert_allclose(found.regret_bound, 9.0 / 99.0, rtol=1e-12)


def test_regret_bound_holds_and_is_reached() -> None:
    """Goodputs drawn from their intervals never lose more; the worst corner loses just that."""
    rng = np.random.default_rng(3)
    goodput = rng.uniform(50.0, 100.0, (6, 4))
    lo, hi = goodput * rng.uniform(0.8, 1.0, (6, 4)), goodput * rng.uniform(1.0, 1.2, (6, 4))
    p = problem(
        batches=np.arange(1, 7), goodput=goodput, weights=np.ones(6), max_lengths=2, goodput_lo=lo, goodput_hi=hi
    )
    found = solve_draft_length(p)
    rows = np.arange(6)
    drawn = rng.uniform(lo, hi, (2000, 6, 4))
    lost = 1.0 - drawn[:, rows, found.lengths] / drawn.max(axis=2)
    assert lost.max() <= found.regret_bound
    corner = hi.copy()
    corner[rows, found.lengths] = lo[rows, found.lengths]
    worst = 1.0 - corner[rows, found.lengths] / corner.max(axis=1)
    np.testing.assert_allclose(worst.max(), found.regret_bound, rtol=1e-12)


# ---- rules ---------------------------------------------------------------------------------------------


def test_operating_range_keeps_zero_out_or_in() -> None:
    """Hand: best is 2, 1, 0. No edge to 0 between batch 2 and 3: all of them without it lose 0.1 at batch 3."""
    assert solve_draft_length(problem(protected=(2, 3))).lengths.tolist() == [2, 1, 1]
    assert solve_draft_length(problem(protected=(1, 2))).lengths.tolist() == [2, 1, 0]
    # mostly at batch 3, where 0 is best: then 0 from batch 2 on, as the edge before batch 2 is outside the range
    heavy = problem(protected=(2, 3), weights=np.array([1.0, 0.1, 10.0]))
    assert solve_draft_length(heavy).lengths.tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    ("protected", "guarded"),
    [
        ((1, 4), [True, False]),
        ((2, 3), [True, False]),  # the edge may lie between 2 and 3
        ((4, 8), [False, True]),
        ((3, 5), [True, True]),
        ((8, 20), [False, False]),
        ((4, 4), [False, False]),
        ((6, 6), [False, False]),  # nothing changes inside a single batch
    ],
)
def test_rows_that_skip_batches_guard_all_between_them(protected: tuple[int, int], guarded: list[bool]) -> None:
    p = problem(batches=np.array([1, 4, 8]), protected=protected)
    assert p.edge_guarded.tolist() == guarded


def test_edges_only_where_allowed() -> None:
    """Hand: batches 2 and 3 are one block; together they lose .4, .1, .6 with length 0, 1, 2."""
    assert solve_draft_length(problem(edges=np.array([True, False]))).lengths.tolist() == [2, 1, 1]


def test_lengths_that_do_not_rise() -> None:
    """Hand: best is 0, 1, 2 of the rows turned round; not rising, one length: means .3, .1, .2, so 1."""
    found = solve_draft_length(problem(goodput=GOODPUT[::-1], non_increasing=True))
    assert found.lengths.tolist() == [1, 1, 1]


def test_zero_left_out() -> None:
    """Without 0 the reference at batch 3 is length 1."""
    found = solve_draft_length(problem(allow_zero=False))
    assert found.lengths.tolist() == [2, 1, 1]
    assert found.objective == 0.0


def test_broken_rules_are_named() -> None:
    p = problem(max_lengths=2, max_segments=2, non_increasing=True, edges=np.array([True, False]), protected=(1, 3))
    assert broken_rules(p, [1, 1, 1]) == []
    assert broken_rules(p, [2, 1]) == ["3 rows need a length, got 2"]
    assert broken_rules(p, [3, 3, 3])[0] == "length 3 is not available at batch 1"
    assert broken_rules(p, [0, 1, 2]) == [
        "the length rises between batch 1 and 2",
        "no edge from or to 0 may be between batch 1 and 2",
        "no edge may be between batch 2 and 3",
        "the length rises between batch 2 and 3",
        "at most 2 segments, got 3",
        "at most 2 lengths, got 3",
    ]


# ---- limits --------------------------------------------------------------------------------------------


def test_limits_choose_among_what_meets_them() -> None:
    """Hand: only 0 and 1 meet them; regrets against the best of these are .375, 0; .4, 0; 0, .1."""
    found = solve_draft_length(problem(feasible=np.array([[True, True, False]] * 3)))
    assert (found.status, found.lengths.tolist(), found.objective) == (Status.OPTIMAL, [1, 1, 0], 0.0)


def test_batch_without_a_feasible_length_takes_the_least_violating() -> None:
    feasible = np.array([[True, True, True], [False, False, False], [True, True, True]])
    violation = np.array([[0.0] * 3, [0.1, 0.3, 0.2], [0.0] * 3])
    found = solve_draft_length(problem(feasible=feasible, violation=violation))
    assert (found.status, found.infeasible_batches) == (Status.INFEASIBLE_SOMEWHERE, (2,))
    assert (found.lengths.tolist(), found.violation) == ([2, 0, 0], 0.1)
    # without amounts every length is as wrong as any other, and the fastest is taken
    assert solve_draft_length(problem(feasible=feasible)).lengths.tolist() == [2, 1, 0]


def test_fewest_batches_miss_before_least_violation() -> None:
    """Hand, one length for all: 0 misses twice by .1 each, 2 misses once by 5; length 1 misses everywhere."""
    feasible = np.array([[False, False, True], [False, False, True], [True, False, False]])
    violation = np.array([[0.1, 1.0, 0.0], [0.1, 1.0, 0.0], [0.0, 1.0, 5.0]])
    found = solve_draft_length(problem(feasible=feasible, violation=violation, max_lengths=1), explain=True)
    assert (found.lengths.tolist(), found.infeasible_batches, found.violation) == ([2, 2, 2], (3,), 5.0)
    assert found.binding == ("max_lengths", "slo")


def test_no_batch_meets_its_limits() -> None:
    found = solve_draft_length(problem(feasible=np.zeros((3, 3), dtype=bool)))
    assert (found.status, found.infeasible_batches) == (Status.INFEASIBLE, (1, 2, 3))
    assert found.lengths.tolist() == [2, 1, 0]


def test_regret_beyond_the_reference_is_none() -> None:
    """Hand: forced to length 2 at batch 1, where only 0 meets the limits and has half its goodput."""
    feasible = np.array([[True, False, False], [False, False, True], [False, False, True]])
    found = solve_draft_length(problem(feasible=feasible, max_lengths=1))
    assert (found.lengths.tolist(), found.infeasible_batches) == ([2, 2, 2], (1,))
    np.testing.assert_allclose(found.regret, [-1.0, 0.0, 0.0], rtol=1e-12, atol=1e-15)
    assert found.objective == 0.0


def test_no_choice_keeps_the_rules() -> None:
    """Batches 1 and 3 have no length in common, and one length is allowed."""
    goodput = np.array([[np.nan, 80.0, 100.0], [60.0, 100.0, 90.0], [100.0, np.nan, np.nan]])
    found = solve_draft_length(problem(goodput=goodput, max_lengths=1), explain=True)
    assert (found.status, found.lengths.tolist(), found.segments) == (Status.INFEASIBLE, [], ())
    assert np.isnan([found.objective, found.bound, found.gap, found.mean_regret]).all()
    assert found.binding == ("max_lengths",)
    assert solve_draft_length_milp(problem(goodput=goodput, max_lengths=1)) is None


def test_no_pair_of_lengths_keeps_the_rules() -> None:
    """Hand: 2, 1, 3 is the only choice. Of two lengths {0, 2} alone have every batch, and 2 to 0 is forbidden."""
    nan = np.nan
    goodput = np.array([[nan, nan, 1.0, nan], [1.0, 1.0, nan, nan], [1.0, nan, nan, 1.0]])
    p = problem(goodput=goodput, protected=(1, 3))
    assert solve_draft_length(p).lengths.tolist() == [2, 1, 3]
    found = solve_draft_length(replace(p, max_lengths=2), explain=True)
    assert (found.status, found.lengths.tolist()) == (Status.INFEASIBLE, [])
    assert found.binding == ("max_lengths", "protected")


# ---- what binds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "binding"),
    [
        ({}, ()),
        ({"max_lengths": 2}, ("max_lengths",)),
        ({"max_lengths": 3, "max_segments": 3}, ()),
        ({"max_segments": 2}, ("max_segments",)),
        ({"max_lengths": 2, "max_segments": 2}, ()),  # either alone still allows no more than two
        ({"switch_cost": 0.01}, ()),  # paid, and changes nothing
        ({"switch_cost": 0.2}, ("switch_cost",)),
        ({"length_cost": 0.2}, ("length_cost",)),
        ({"non_increasing": True}, ()),
        ({"goodput": GOODPUT[::-1], "non_increasing": True}, ("non_increasing",)),
        ({"edges": np.array([True, False])}, ("edges",)),
        ({"protected": (2, 3)}, ("protected",)),
        ({"feasible": np.array([[True, True, False]] * 3)}, ("slo",)),
        ({"feasible": np.array([[True, True, True], [True, True, True], [True, True, False]])}, ()),
    ],
)
def test_what_binds_by_hand(changed: dict[str, Any], binding: tuple[str, ...]) -> None:
    """Origin: 2, 1, 0 loses nothing, and only what forbids or outweighs it binds."""
    assert solve_draft_length(problem(**changed), explain=True).binding == binding


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batches": np.array([1, 3, 2])}, "batches must be increasing and at least 1, got [1, 3, 2]"),
        ({"batches": np.array([0, 1, 2])}, "batches must be increasing and at least 1, got [0, 1, 2]"),
        ({"batches": np.array([1.0, 2.5, 3.0])}, "batches must be whole numbers, got float64"),
        ({"batches": np.array([1, 2])}, "goodput must be 2 batches x lengths, got shape (3, 3)"),
        ({"goodput": GOODPUT - 50.0}, "goodput must be positive and finite, or NaN, got 0.0"),
        ({"goodput": GOODPUT * np.inf}, "goodput must be positive and finite, or NaN, got inf"),
        ({"goodput": GOODPUT * np.nan}, "goodput must have a length to choose at every batch, got none at batch 1"),
        ({"goodput": GOODPUT[:, :1], "allow_zero": False}, "goodput must have a length to choose at every batch"),
        ({"weights": np.array([1.0, -1.0, 1.0])}, "weights must be >= 0 and finite, got -1.0"),
        ({"weights": np.array([1.0, np.nan, 1.0])}, "weights must be >= 0 and finite, got nan"),
        ({"weights": np.zeros(3)}, "weights must have a positive sum, got 0"),
        ({"weights": np.ones(2)}, "weights must have shape (3,), got (2,)"),
        ({"sigma": np.full((3, 3), np.nan)}, "sigma must be >= 0 and finite, got nan"),
        ({"sigma": np.zeros((3, 2))}, "sigma must have shape (3, 3), got (3, 2)"),
        ({"tie_z": -1.0}, "tie_z must be >= 0 and finite, got -1.0"),
        ({"feasible": np.ones((3, 3))}, "feasible must be truth values, got float64"),
        ({"violation": np.full((3, 3), -1.0)}, "violation must be >= 0 and finite, got -1.0"),
        ({"max_lengths": 0}, "max_lengths must be at least 1, got 0"),
        ({"max_segments": 0}, "max_segments must be at least 1, got 0"),
        ({"switch_cost": np.nan}, "switch_cost must be >= 0 and finite, got nan"),
        ({"switch_cost": np.zeros(3)}, "switch_cost must have shape (2,), got (3,)"),
        ({"length_cost": -0.1}, "length_cost must be >= 0 and finite, got -0.1"),
        ({"edges": np.array([True])}, "edges must have shape (2,), got (1,)"),
        ({"protected": (3, 2)}, "protected must be (lowest, highest) batch, got (3, 2)"),
        ({"goodput_lo": GOODPUT}, "goodput_lo and goodput_hi must be given together, got one of them"),
        (
            {"goodput_lo": GOODPUT, "goodput_hi": GOODPUT - 1.0},
            "goodput must lie between goodput_lo and goodput_hi, got 50.0 in [50.0, 49.0] at batch 1, length 0",
        ),
    ],
)
def test_malformed_problems_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        problem(**changed)


def test_lists_are_taken_for_arrays() -> None:
    found = solve_draft_length(problem(batches=[1, 2, 3], goodput=GOODPUT.tolist(), weights=[1, 1, 1]))
    assert found.lengths.tolist() == [2, 1, 0]


def test_too_many_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_length_paths, "MAX_SETS", 2)
    message = "max_lengths must leave at most 2 sets of lengths to try, got 3"
    with pytest.raises(ValueError, match=message):
        solve_draft_length(problem(max_lengths=2))


def test_cost_of_any_choice() -> None:
    """Hand: 1, 1, 0 loses .2, one switch of .01 and two lengths at .02; batch 3 misses its limits by 4."""
    feasible = np.array([[True, True, True], [True, True, True], [False, True, True]])
    p = problem(switch_cost=0.01, length_cost=0.02, feasible=feasible, violation=np.full((3, 3), 4.0))
    missed, violation, objective = cost_of(p, np.array([1, 1, 0]))
    assert (missed, violation) == (1, 4.0)
    np.testing.assert_allclose(objective, 0.25, rtol=1e-12)
    assert cost_of(replace(p, feasible=None), np.array([1, 1, 0]))[0] == 0

"""The adapter to PuLP and HiGHS. Expected values: hand calculation, and what its words promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pulp
import pytest

from servecast.solvers.ilp import Outcome, Status, solve


def knapsack(*, whole: bool = True) -> tuple[Any, list[Any]]:
    """min 2 a + 3 b + c with a + 2 b + 0.3 c >= 3.7."""
    program = pulp.LpProblem("knapsack", pulp.LpMinimize)
    kind = pulp.LpInteger if whole else pulp.LpContinuous
    a, b, c = (program.add_variable(name, 0, cat=kind) for name in "abc")
    program += 2.0 * a + 3.0 * b + c
    program += a + 2.0 * b + 0.3 * c >= 3.7, "C1"
    return program, [a, b, c]


def test_integers_by_hand() -> None:
    """Hand: cost per unit of the row is 2, 1.5 and 3.33; b = 1 needs 1.7 more (4 dearer), b = 2 does for 6."""
    program, (a, b, c) = knapsack()
    found = solve(program, time_limit_s=10.0)
    assert found.status is Status.OPTIMAL
    np.testing.assert_allclose([found.objective, found.bound], 6.0, rtol=1e-9)
    np.testing.assert_allclose([a.value(), b.value(), c.value()], [0.0, 2.0, 0.0], rtol=0.0, atol=1e-6)


def test_fractions_by_hand() -> None:
    """Hand: b = 1.85 alone, 5.55; without integers the optimum is its own bound."""
    found = solve(knapsack(whole=False)[0], time_limit_s=10.0)
    assert found.status is Status.OPTIMAL
    np.testing.assert_allclose([found.objective, found.bound], 5.55, rtol=1e-9)


@pytest.mark.parametrize("kind", [pulp.LpInteger, pulp.LpContinuous])
def test_nothing_meets_the_rows(kind: str) -> None:
    """Hand: x >= 3 and x <= 2."""
    program = pulp.LpProblem("none", pulp.LpMinimize)
    x = program.add_variable("x", 0, 2, kind)
    program += 1.0 * x
    program += x >= 3.0, "C1"
    found = solve(program, time_limit_s=10.0)
    assert found.status is Status.INFEASIBLE
    assert math.isnan(found.objective)
    assert math.isnan(found.bound)


def test_an_unbounded_program_is_a_defect() -> None:
    program = pulp.LpProblem("endless", pulp.LpMinimize)
    x = program.add_variable("x")
    program += -1.0 * x
    program += x >= 0.0, "C1"
    with pytest.raises(RuntimeError, match="endless"):
        solve(program, time_limit_s=10.0)


def hard_program() -> Any:
    """Market split (Cornuejols and Dawande, 1998), 5 rows of 40 binaries with slacks: far from proved in a second."""
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 100, (5, 40))
    program = pulp.LpProblem("split", pulp.LpMinimize)
    x = [program.add_variable(f"x_{j}", 0, 1, pulp.LpInteger) for j in range(40)]
    over = [program.add_variable(f"s_{i}", 0) for i in range(5)]
    under = [program.add_variable(f"t_{i}", 0) for i in range(5)]
    program += pulp.lpSum(over) + pulp.lpSum(under)
    for i in range(5):
        left = pulp.lpSum(int(weights[i, j]) * x[j] for j in range(40)) + over[i] - under[i]
        program += left == int(weights[i].sum()) // 2, f"C{i}"
    return program


def test_a_limit_hit_with_an_incumbent_is_a_result() -> None:
    """Rule: the incumbent is returned with a bound below it; market split instances defy branch and bound."""
    found = solve(hard_program(), time_limit_s=0.5)
    assert found.status is Status.FEASIBLE
    assert found.bound < found.objective < math.inf


def test_a_limit_hit_before_any_solution() -> None:
    found = solve(hard_program(), time_limit_s=1e-9)
    assert found.status is Status.UNKNOWN
    assert math.isnan(found.objective)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_must_be_positive(limit: float) -> None:
    with pytest.raises(ValueError, match="time_limit_s must be positive"):
        solve(knapsack()[0], time_limit_s=limit)


def test_the_solver_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Rule: standard output belongs to the command; the library writes to the descriptor, not to sys.stdout."""
    solve(knapsack()[0], time_limit_s=10.0)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_same_program_has_the_same_answer() -> None:
    """Rule: one thread, fixed seed."""

    def answer() -> tuple[Outcome, list[float]]:
        program, variables = knapsack()
        return solve(program, time_limit_s=10.0), [one.value() for one in variables]

    assert answer() == answer()

"""The integer program of `draft_length`, constraint by constraint: slow, and the same answer.

Where the limits cannot be kept everywhere, the program is solved up to three times, each time with the optimum of the
level before as a constraint: batches that miss their limits, by how much in all, and the objective. Of several optima
it returns any; the shortest lengths are not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from servecast.solvers.draft_length import DraftLengthSchedule, schedule_of
from servecast.solvers.draft_length_problem import DraftLengthProblem, broken_rules
from servecast.solvers.ilp import FEASIBILITY_TOLERANCE, solve
from servecast.solvers.ilp import Status as Solved

Column = dict[tuple[int, int], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    built: Any
    """``pulp.LpProblem``"""
    x: Column
    """By row and length."""
    levels: tuple[Any, ...]
    """Linear expressions to be minimised one after the other."""


def solve_draft_length_milp(problem: DraftLengthProblem, *, time_limit_s: float = 60.0) -> DraftLengthSchedule | None:
    """Schedule of the integer program; None where no choice keeps the rules.

    Raises
    ------
    RuntimeError : a program was not solved to the end within `time_limit_s`.
    """
    program = _program(problem)
    for place, level in enumerate(program.levels):
        program.built.setObjective(level)
        outcome = solve(program.built, time_limit_s=time_limit_s)
        if outcome.status is Solved.INFEASIBLE:
            return None
        if outcome.status is not Solved.OPTIMAL:
            raise RuntimeError(f"the program was not solved within {time_limit_s:g} s: {outcome.status}")
        reached = outcome.objective + FEASIBILITY_TOLERANCE * max(1.0, abs(outcome.objective))
        if level is not program.levels[-1]:
            program.built.addConstraint(level <= reached, f"level_{place}")
    lengths = np.zeros(len(problem.batches), dtype=np.int64)
    for (b, k), one in program.x.items():
        if one.value() > 0.5:
            lengths[b] = k
    faults = broken_rules(problem, lengths.tolist())
    if faults:
        raise RuntimeError(f"the program's schedule breaks its own rules: {faults[0]}")
    return schedule_of(problem, lengths)


def _program(problem: DraftLengthProblem) -> _Program:
    import pulp  # type: ignore[import-untyped]  # ships no types

    available, meets, rho = problem.available, problem.meets, problem.counted_regret()
    rows, lengths = range(len(problem.batches)), np.flatnonzero(available.any(axis=0)).tolist()
    built = pulp.LpProblem("draft_length", pulp.LpMinimize)
    cells = [(b, k) for b in rows for k in lengths]
    x = {(b, k): built.add_variable(f"x_{b}_{k}", 0, int(available[b, k]), pulp.LpInteger) for b, k in cells}
    y = {k: built.add_variable(f"y_{k}", 0, 1, pulp.LpInteger) for k in lengths}
    z = [built.add_variable(f"z_{b}", 0, int(b > 0 and problem.edge_allowed[b - 1]), pulp.LpInteger) for b in rows]

    regret = pulp.lpSum(problem.weights[b] * rho[b, k] * x[b, k] for b, k in cells if available[b, k])
    switches = pulp.lpSum(problem.switch_costs[b - 1] * z[b] for b in rows[1:])
    objective = regret + switches + problem.length_cost * pulp.lpSum(y.values())
    for b in rows:
        built += pulp.lpSum(x[b, k] for k in lengths) == 1, f"C1_{b}"
    for b, k in cells:
        built += x[b, k] <= y[k], f"C3_{b}_{k}"
    if problem.max_lengths is not None:
        built += pulp.lpSum(y.values()) <= problem.max_lengths, "C4"
    for b, k in cells[len(lengths) :]:
        built += z[b] >= x[b, k] - x[b - 1, k], f"C5_{b}_{k}"
    if problem.max_segments is not None:
        built += pulp.lpSum(z) <= problem.max_segments - 1, "C6"
    for b in rows[1:]:
        if problem.non_increasing:
            now, before = (pulp.lpSum(k * x[at, k] for k in lengths) for at in (b, b - 1))
            built += now <= before, f"C7_{b}"
        if problem.edge_guarded[b - 1] and 0 in lengths:
            built += x[b, 0] == x[b - 1, 0], f"C8_{b}"
    missed = [(b, k) for b, k in cells if available[b, k] and not meets[b, k]]
    if not missed:
        return _Program(built=built, x=x, levels=(objective,))
    misses = pulp.lpSum(x[cell] for cell in missed)
    if problem.violation is None:
        return _Program(built=built, x=x, levels=(misses, objective))
    amount = pulp.lpSum(problem.violation[cell] * x[cell] for cell in missed)
    return _Program(built=built, x=x, levels=(misses, amount, objective))

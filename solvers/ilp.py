"""The one place where a linear program, with or without integers, meets its solver: PuLP builds it, HiGHS solves it.

Gaps are asked to be zero, so `OPTIMAL` means that the bound met the objective within the solver's tolerances. A limit
hit with an incumbent is a result, not an error. The solver runs on one thread with its own fixed seed, so the same
program has the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SOLVER_TOLERANCE = 1e-9
"""On rows and on the integrality of columns; HiGHS' own 1e-6 can hide that much of a replica's load in none."""
FEASIBILITY_TOLERANCE = 1e-6
"""With which a solution, its integers rounded, is checked."""


class Status(StrEnum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    """Nothing better exists."""
    FEASIBLE = "feasible"
    """The time limit was hit; the incumbent is returned, `bound` says how much better an answer could be."""
    INFEASIBLE = "infeasible"
    """Nothing meets the constraints."""
    UNKNOWN = "unknown"
    """The time limit was hit before a solution was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the solver says of a program; the values stay in the program's variables."""

    status: Status
    objective: float
    """Of the solution; NaN without one."""
    bound: float
    """No solution is better; NaN where none is known."""


def solve(program: Any, *, time_limit_s: float) -> Outcome:
    """Solve a ``pulp.LpProblem`` to be minimised, in silence.

    Raises
    ------
    ValueError : the limit is not positive.
    RuntimeError : the program is unbounded or the solver failed, which is a defect of whoever built it.
    """
    import highspy
    import pulp  # type: ignore[import-untyped]

    if not time_limit_s > 0.0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s!r}")
    solver = pulp.HiGHS(
        msg=False,
        gapRel=0.0,
        gapAbs=0.0,
        timeLimit=time_limit_s,
        parallel="off",
        primal_feasibility_tolerance=SOLVER_TOLERANCE,
        mip_feasibility_tolerance=SOLVER_TOLERANCE,
    )
    program.solve(solver)
    engine = program.solverModel
    info, ended = engine.getInfo(), engine.getModelStatus()
    integer = any(one.cat == pulp.LpInteger for one in program.variables())
    if ended == highspy.HighsModelStatus.kOptimal:
        objective = float(info.objective_function_value)
        # without integers no bound is reported: the optimum is it; rounding may lift a bound past the optimum
        bound = min(float(info.mip_dual_bound), objective) if integer else objective
        return Outcome(status=Status.OPTIMAL, objective=objective, bound=bound)
    if ended == highspy.HighsModelStatus.kInfeasible:
        return Outcome(status=Status.INFEASIBLE, objective=float("nan"), bound=float("nan"))
    if ended == highspy.HighsModelStatus.kTimeLimit:
        bound = float(info.mip_dual_bound) if integer else float("-inf")
        if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
            objective = float(info.objective_function_value)
            return Outcome(status=Status.FEASIBLE, objective=objective, bound=min(bound, objective))
        return Outcome(status=Status.UNKNOWN, objective=float("nan"), bound=bound)
    raise RuntimeError(f"the program {program.name} could not be solved: {engine.modelStatusToString(ended)}")

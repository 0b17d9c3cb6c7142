r"""Draft length by batch size: the table that loses least against the best length at every batch.

Sets      b batch sizes, K draft lengths
Data      :math:`w_b` share of steps, :math:`\rho_{bK}` regret of the goodput (`draft_length_problem`),
          :math:`s_b` cost of a change between b - 1 and b, c cost of a distinct length; F what meets the limits
Decide    :math:`x_{bK}` length K at batch b, :math:`y_K` length used, :math:`z_b` change before b; all 0 or 1

.. math::

   \min \sum_{b,K} w_b \rho_{bK} x_{bK} + \sum_b s_b z_b + c \sum_K y_K \quad \text{subject to} \quad
   &\sum_K x_{bK} = 1                             && (C1) \\
   &x_{bK} = 0                                    && (b, K) \notin F \qquad (C2) \\
   &x_{bK} \le y_K                                && (C3) \\
   &\sum_K y_K \le M                              && (C4) \\
   &z_b \ge x_{bK} - x_{b-1,K}, \; z_b = 0 \text{ where no edge may be} && (C5) \\
   &\sum_b z_b \le R - 1                          && (C6) \\
   &\sum_K K x_{bK} \le \sum_K K x_{b-1,K}        && \text{if non-increasing} \qquad (C7) \\
   &x_{b0} = x_{b-1,0}                            && \text{inside the operating range} \qquad (C8)

C2 gives way where it must: of all choices the one is returned that misses the limits at the fewest batches, then by
the least amount in all, then has the least objective, then the shortest lengths, weighted. C8 keeps an engine whose
unspeculated steps are dear while drafting is armed from going in and out of them at the operating point.

Solved exactly by shortest paths (`draft_length_paths`); `draft_length_milp` is the program above, to be read and to be
compared with. A change of length costs the same whatever the lengths, and is paid where it happens: a table has no
hysteresis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from servecast.solvers.batch_occupancy import birth_death_occupancy, crossing_weights, little_batch
from servecast.solvers.draft_length_paths import best_lengths
from servecast.solvers.draft_length_problem import (
    DraftLengthProblem,
    Floats,
    Integers,
    broken_rules,
    cost_of,
)

__all__ = [
    "EDGE_WORTH",
    "DraftLengthProblem",
    "DraftLengthSchedule",
    "StaticLength",
    "Status",
    "birth_death_occupancy",
    "broken_rules",
    "cost_of",
    "crossing_weights",
    "little_batch",
    "schedule_of",
    "solve_draft_length",
]

EDGE_WORTH = 0.002
"""Switch cost of a table that an engine loads, of all weight: what mean goodput a change of length has to gain. A step
that flips is not free, and a table with fewer edges is easier to trust."""
WORTH_NAMING = 1e-9
"""Share of all weight below which a better objective is rounding."""


class Status(StrEnum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    """Every batch meets its limits; nothing that does is better."""
    INFEASIBLE_SOMEWHERE = "infeasible_somewhere"
    """Some batches miss their limits, as few of them as can be; they are listed."""
    INFEASIBLE = "infeasible"
    """Every batch misses its limits, or, with no lengths returned, no choice keeps the rules of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticLength:
    """What one length at every batch would lose."""

    length: int
    mean_regret: float
    """Weighted; NaN where the length is not available at every batch. [-]"""
    worst_regret: float
    """Likewise. [-]"""
    feasible: bool
    """Whether it meets the limits at every batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLengthSchedule:
    """Answer: a length for every batch, and what it loses. Without lengths the numbers are NaN."""

    status: Status
    lengths: Integers
    """[n]; empty where no choice keeps the rules, as is the regret. [tokens]"""
    segments: tuple[tuple[int, int, int], ...]
    """Runs of one length: lowest and highest batch of the rows, length."""
    objective: float
    """Regret with ties counted as none, switches, distinct lengths. [weighted regret]"""
    bound: float
    """No choice that misses as few limits has a lower objective. [weighted regret]"""
    gap: float
    """0: the search is exact. [-]"""
    regret: Floats
    """[n], of goodput, ties not forgiven; negative where a limit is missed by a length faster than all that meet it."""
    mean_regret: float
    """Weighted. [-]"""
    worst_regret: float
    regret_bound: float
    """Largest regret over batches that goodputs anywhere within their intervals could show; NaN without them. [-]"""
    infeasible_batches: tuple[int, ...]
    """Where the length misses its limits."""
    violation: float
    """By how much in all, in the problem's unit."""
    static: tuple[StaticLength, ...]
    """Every length by itself."""
    binding: tuple[str, ...]
    """Fields of the problem without which another choice would be better; empty where it was not asked for."""


def solve_draft_length(problem: DraftLengthProblem, *, explain: bool = False) -> DraftLengthSchedule:
    """Best length for every batch.

    Parameters
    ----------
    explain : find what binds, by solving again without each rule, cost and limit.

    Raises
    ------
    ValueError : so many lengths are allowed that their sets cannot be gone through. A problem without a schedule is
        an answer, not an error.

    >>> problem = DraftLengthProblem(
    ...     batches=np.array([1, 8, 64]), weights=np.ones(3), max_lengths=2,
    ...     goodput=np.array([[90.0, 150.0, 190.0], [600.0, 800.0, 810.0], [2900.0, 2500.0, 2000.0]]))
    >>> found = solve_draft_length(problem)
    >>> found.segments, found.objective
    (((1, 8, 2), (64, 64, 0)), 0.0)
    """
    lengths = best_lengths(problem)
    if lengths is None:
        found = _no_schedule(problem)
    else:
        faults = broken_rules(problem, lengths.tolist())
        if faults:
            raise RuntimeError(f"the schedule breaks its own rules: {faults[0]}")
        found = schedule_of(problem, lengths)
    return replace(found, binding=_binding(problem, found)) if explain else found


def schedule_of(problem: DraftLengthProblem, lengths: Integers) -> DraftLengthSchedule:
    """The record of a choice known to be the best one; the choice is not checked."""
    row = np.arange(len(lengths))
    missed = ~problem.meets[row, lengths]
    _, violation, objective = cost_of(problem, lengths)
    regret = problem.regret()[row, lengths]
    return DraftLengthSchedule(
        status=_status(int(missed.sum()), len(lengths)),
        lengths=lengths,
        segments=_segments(problem, lengths),
        objective=objective,
        bound=objective,
        gap=0.0,
        regret=regret,
        mean_regret=float(np.average(regret, weights=problem.weights)),
        worst_regret=float(regret.max()),
        regret_bound=_regret_bound(problem, lengths),
        infeasible_batches=tuple(problem.batches[missed].tolist()),
        violation=violation,
        static=_static(problem),
        binding=(),
    )


def _status(missed: int, rows: int) -> Status:
    if not missed:
        return Status.OPTIMAL
    return Status.INFEASIBLE if missed == rows else Status.INFEASIBLE_SOMEWHERE


def _segments(problem: DraftLengthProblem, lengths: Integers) -> tuple[tuple[int, int, int], ...]:
    first = np.flatnonzero(np.append(True, lengths[1:] != lengths[:-1]))
    last = np.append(first[1:], len(lengths)) - 1
    columns = (problem.batches[first].tolist(), problem.batches[last].tolist(), lengths[first].tolist())
    return tuple(zip(*columns, strict=True))


def _static(problem: DraftLengthProblem) -> tuple[StaticLength, ...]:
    regret = problem.regret()
    mean, worst = np.average(regret, axis=0, weights=problem.weights), regret.max(axis=0)
    met = problem.meets
    return tuple(
        StaticLength(length=k, mean_regret=float(mean[k]), worst_regret=float(worst[k]), feasible=bool(met[:, k].all()))
        for k in range(met.shape[1])
    )


def _regret_bound(problem: DraftLengthProblem, lengths: Integers) -> float:
    """Regret where the choice is at its lower end and every other length at its upper end."""
    if problem.goodput_lo is None or problem.goodput_hi is None:
        return float("nan")
    row = np.arange(len(lengths))
    rivals = np.where(problem.compared, problem.goodput_hi, 0.0)
    rivals[row, lengths] = 0.0
    lowest = problem.goodput_lo[row, lengths]
    # a choice that beats every rival even so loses nothing
    best = np.maximum(rivals.max(axis=1), lowest)
    return float(np.divide(best - lowest, best, out=np.zeros_like(best), where=best > 0.0).max())


def _no_schedule(problem: DraftLengthProblem) -> DraftLengthSchedule:
    nan = float("nan")
    return DraftLengthSchedule(
        status=Status.INFEASIBLE,
        lengths=np.empty(0, dtype=np.int64),
        segments=(),
        objective=nan,
        bound=nan,
        gap=nan,
        regret=np.empty(0),
        mean_regret=nan,
        worst_regret=nan,
        regret_bound=nan,
        infeasible_batches=(),
        violation=nan,
        static=_static(problem),
        binding=(),
    )


# ---- what binds ----------------------------------------------------------------------------------------

_RELAXED: dict[str, dict[str, Any]] = {
    "max_lengths": {"max_lengths": None},
    "max_segments": {"max_segments": None},
    "switch_cost": {"switch_cost": 0.0},
    "length_cost": {"length_cost": 0.0},
    "non_increasing": {"non_increasing": False},
    "edges": {"edges": None},
    "protected": {"protected": None},
    "slo": {"feasible": None, "violation": None},
}
"""Names of what may bind, and the problem without it."""


def _binding(problem: DraftLengthProblem, found: DraftLengthSchedule) -> tuple[str, ...]:
    stated = {
        name: without
        for name, without in _RELAXED.items()
        if not all(np.array_equal(getattr(problem, field), value) for field, value in without.items())
    }
    return tuple(name for name, without in stated.items() if _binds(replace(problem, **without), found))


def _binds(relaxed: DraftLengthProblem, found: DraftLengthSchedule) -> bool:
    """Whether the relaxed problem has a better choice, both measured by its costs and its best lengths."""
    other = best_lengths(relaxed)
    if other is None or not len(found.lengths):
        return other is not None
    missed, violation, objective = cost_of(relaxed, found.lengths)
    least_missed, least_violation, least = cost_of(relaxed, other)
    if missed != least_missed:
        return missed > least_missed
    if abs(violation - least_violation) > WORTH_NAMING * max(violation, least_violation):
        return violation > least_violation
    return objective - least > WORTH_NAMING * float(relaxed.weights.sum())

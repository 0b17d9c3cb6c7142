r"""Mixed fleet: which GPU types, how many replicas of each, and which share of which request class goes where.

Sets      i request classes, j replica types (a GPU type at one parallel degree and batch limit), f GPU families
Data      :math:`\lambda_i` rate of a class; :math:`T_{ij}` largest rate of it that one replica serves within the
          limits; :math:`c_j` price and :math:`g_j` GPUs of a replica; :math:`N_f` GPUs on offer
Decide    :math:`y_j` replicas, whole; :math:`x_{ij} \ge 0` share of class i that type j serves

.. math::

   \min \sum_j c_j y_j \quad \text{subject to} \quad
   &\sum_j x_{ij} = 1                                   && \forall i \qquad (C1) \\
   &\sum_i (\lambda_i / T_{ij})\, x_{ij} \le y_j        && \forall j \qquad (C2) \\
   &\sum_{j \in f} g_j y_j \le N_f                      && \forall f \qquad (C3) \\
   &x_{ij} \le y_j                                      && \forall i, j \text{ of tiny load} \qquad (C4)

The program of Melange (Griggs et al., arXiv 2404.14527, section 5) with two changes. Shares are real numbers: a router
splits a stream in any proportion, every assignment of Melange's slices is one such split, and so the optimum is never
dearer; `slices` asks for Melange's form. And types of one family share its availability (C3), which Melange lacks.

C4 follows from C2 and whole replicas; it is stated where a class is so small that rounding could lose it.
Assumption of C2, as in Melange: a replica that serves several classes is full when the shares of its time add up to 1.
Of the cheapest fleets the shares returned are those whose busiest type is least busy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.solvers.ilp import FEASIBILITY_TOLERANCE, Status, solve

__all__ = [
    "Binding",
    "FleetPlan",
    "FleetProblem",
    "ReplicaType",
    "Status",
    "broken_constraints",
    "explained",
    "solve_fleet",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SMALL_LOAD = 1e-3
"""Replicas that a class takes below which C4 is stated."""
WORTH_NAMING = 1e-6
"""Relative saving below which a relaxed constraint made no difference: the solver's tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaType:
    """One kind of engine instance that can be rented."""

    name: str
    family: str
    """GPU type, whose availability it draws on."""
    gpus: int
    """Of one replica."""
    usd_per_hour: float
    """Of one replica. [USD/h]"""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus of {self.name} must be at least 1, got {self.gpus}")
        if not 0.0 < self.usd_per_hour < math.inf:
            raise ValueError(f"usd_per_hour of {self.name} must be positive and finite, got {self.usd_per_hour!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetProblem:
    """The data of the program."""

    classes: tuple[str, ...]
    rates_rps: Floats
    """[class]. [1/s]"""
    types: tuple[ReplicaType, ...]
    throughput_rps: Floats
    """[class, type]: largest rate of the class on one replica within the limits; 0 or NaN where it cannot be
    served. [1/s]"""
    available: Mapping[str, int] = field(default_factory=dict)
    """GPUs on offer by family; a family that is not named has no limit."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why no type serves a class, by class, in words."""

    def __post_init__(self) -> None:
        shape = (len(self.classes), len(self.types))
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be one or more distinct names, got {list(self.classes)}")
        if not self.types or len({one.name for one in self.types}) < len(self.types):
            raise ValueError(f"types must be one or more with distinct names, got {[one.name for one in self.types]}")
        if np.shape(self.rates_rps) != shape[:1]:
            raise ValueError(f"rates_rps must be one per class, got shape {np.shape(self.rates_rps)}")
        if not np.all((np.asarray(self.rates_rps) > 0.0) & np.isfinite(self.rates_rps)):
            raise ValueError("rates_rps must be positive and finite (leave out a class without requests)")
        if np.shape(self.throughput_rps) != shape:
            raise ValueError(
                f"throughput_rps must be {shape[0]} classes x {shape[1]} types, got shape "
                f"{np.shape(self.throughput_rps)}"
            )
        if np.any(np.asarray(self.throughput_rps) < 0.0) or np.any(np.isinf(self.throughput_rps)):
            raise ValueError("throughput_rps must be >= 0 and finite, or NaN where a class cannot be served")
        for family, limit in self.available.items():
            if limit < 0:
                raise ValueError(f"available of {family} must be >= 0 GPUs, got {limit}")

    @property
    def serves(self) -> NDArray[np.bool_]:
        """Whether a type serves a class, [class, type]."""
        return np.asarray(np.nan_to_num(self.throughput_rps, nan=0.0) > 0.0)

    @property
    def load(self) -> Floats:
        """Replicas that the whole of a class takes, [class, type]; 0 where it is not served."""
        rate = np.asarray(self.rates_rps, dtype=np.float64)[:, np.newaxis]
        return np.divide(rate, self.throughput_rps, out=np.zeros(self.serves.shape), where=self.serves)

    @property
    def families(self) -> tuple[str, ...]:
        """In order of first appearance."""
        return tuple(dict.fromkeys(one.family for one in self.types))


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What a constraint costs: how much cheaper the fleet would be without it."""

    constraint: str
    """A GPU family, whose availability it is, or ``integrality``."""
    saves_usd_per_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """Answer of the fleet program. Without a fleet the counts are 0 and the numbers NaN."""

    status: Status
    usd_per_hour: float
    """Of the fleet. [USD/h]"""
    bound: float
    """No fleet is cheaper. [USD/h]"""
    gap: float
    """(cost - bound) / cost. [-]"""
    replicas: Integers
    """[type]"""
    share: Floats
    """[class, type]: rows add up to 1."""
    utilisation: Floats
    """[type]: load over replicas; 0 where there are none."""
    binds: str
    """The constraint that costs most, or that cannot be met, in words; empty where it was not asked for."""
    bindings: tuple[Binding, ...]
    """Every constraint whose relaxation makes the fleet cheaper, dearest first."""


def solve_fleet(
    problem: FleetProblem, *, time_limit_s: float = 60.0, slices: int | None = None, explain: bool = True
) -> FleetPlan:
    """Cheapest fleet that serves every class.

    Parameters
    ----------
    time_limit_s : of each program solved: the fleet's, its shares' and one per relaxed constraint. [s]
    slices : split each class into this many equal parts, each served by one type, as Melange does; None splits freely.
    explain : find what binds, by solving again without each availability and without whole replicas.

    Raises
    ------
    ValueError : `slices` or the limit is not positive. A problem without a fleet is an answer, not an error.
    """
    if slices is not None and slices < 1:
        raise ValueError(f"slices must be at least 1, got {slices}")
    lost = np.flatnonzero(~problem.serves.any(axis=1))
    if len(lost):
        name = problem.classes[lost[0]]
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        return _no_fleet(problem, Status.INFEASIBLE, f"class {name}: {_reason(problem, name)}{more}")
    program = _program(problem, problem.available, slices=slices)
    outcome = solve(program.built, time_limit_s=time_limit_s)
    if outcome.status is Status.INFEASIBLE:
        return _no_fleet(problem, outcome.status, _too_few(problem, slices, time_limit_s))
    if outcome.status is Status.UNKNOWN:
        return _no_fleet(problem, outcome.status, f"no fleet was found within {time_limit_s:g} s", outcome.bound)
    replicas = np.array([round(one.value()) for one in program.replicas], dtype=np.int64)
    share = _shares(problem, replicas, time_limit_s) if slices is None else _slice_shares(program, slices)
    plan = _answer(problem, outcome.status, outcome.bound, replicas, share)
    if not explain:
        return plan
    return explained(problem, plan, time_limit_s=time_limit_s, slices=slices)


def explained(
    problem: FleetProblem, plan: FleetPlan, *, time_limit_s: float = 60.0, slices: int | None = None
) -> FleetPlan:
    """The plan of a solved problem with what binds it; one without a fleet says so already."""
    if plan.status not in {Status.OPTIMAL, Status.FEASIBLE}:
        return plan
    bindings = _bindings(problem, plan.usd_per_hour, slices, time_limit_s)
    return replace(plan, binds=_binds(problem, bindings, plan.usd_per_hour), bindings=bindings)


def broken_constraints(problem: FleetProblem, replicas: Integers, share: Floats) -> list[str]:
    """What a fleet breaks, in words; empty for a feasible one. Independent of the solver, within its tolerance."""
    found = []
    counts, share = np.asarray(replicas), np.asarray(share, dtype=np.float64)
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        found.append("replicas are not whole numbers >= 0")
    for i, name in enumerate(problem.classes):
        if (share[i] < -FEASIBILITY_TOLERANCE).any() or abs(share[i].sum() - 1.0) > FEASIBILITY_TOLERANCE:
            found.append(f"C1: class {name} is served to {share[i].sum():.9g}")
    for j, one in enumerate(problem.types):
        used = [i for i in range(len(problem.classes)) if share[i, j] > FEASIBILITY_TOLERANCE]
        if any(not problem.throughput_rps[i, j] > 0.0 for i in used):
            found.append(f"C2: {one.name} is given a class that it cannot serve")
            continue
        load = sum(problem.rates_rps[i] / problem.throughput_rps[i, j] * share[i, j] for i in used)
        if load > counts[j] + FEASIBILITY_TOLERANCE * max(1.0, load):
            found.append(f"C2: {one.name} carries {load:.9g} replicas' load on {counts[j]}")
    for family, limit in problem.available.items():
        gpus = sum(one.gpus * int(counts[j]) for j, one in enumerate(problem.types) if one.family == family)
        if gpus > limit:
            found.append(f"C3: {gpus} {family} taken, {limit} on offer")
    return found


# ---- the program ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    built: Any
    """``pulp.LpProblem``"""
    replicas: list[Any]
    parts: dict[tuple[int, int], Any]
    """x_ij, or its whole number of slices."""
    extra: dict[str, Any]
    """GPUs beyond the availability, where `elastic`."""


def _program(
    problem: FleetProblem,
    available: Mapping[str, int],
    *,
    slices: int | None = None,
    whole: bool = True,
    elastic: bool = False,
) -> _Program:
    """The program on paper; `whole` = False relaxes the integrality of replicas, and `elastic` asks for the fewest
    GPUs beyond what is on offer instead of the lowest price.

    The slices of one class are alike, so Melange's binary variables of a class add up to a whole number of slices.
    """
    import pulp  # type: ignore[import-untyped]

    classes, types = range(len(problem.classes)), range(len(problem.types))
    serves, load = problem.serves, problem.load
    built = pulp.LpProblem("fleet", pulp.LpMinimize)
    y = [built.add_variable(f"y_{j}", 0, cat=pulp.LpInteger if whole else pulp.LpContinuous) for j in types]
    kind, parts = (pulp.LpContinuous, 1) if slices is None else (pulp.LpInteger, slices)
    x = {(i, j): built.add_variable(f"x_{i}_{j}", 0, parts, kind) for i in classes for j in types if serves[i, j]}
    limited = {family: limit for family, limit in available.items() if family in problem.families}
    extra = {family: built.add_variable(f"s_{k}", 0) for k, family in enumerate(limited)} if elastic else {}

    if elastic:
        built += pulp.lpSum(extra.values())
    else:
        built += pulp.lpSum(problem.types[j].usd_per_hour * y[j] for j in types)
    for i in classes:
        built += pulp.lpSum(x[i, j] for j in types if serves[i, j]) == parts, f"C1_{i}"
    for j in types:
        built += pulp.lpSum(load[i, j] / parts * x[i, j] for i in classes if serves[i, j]) <= y[j], f"C2_{j}"
    for k, (family, limit) in enumerate(limited.items()):
        taken = pulp.lpSum(one.gpus * y[j] for j, one in enumerate(problem.types) if one.family == family)
        built += taken - extra.get(family, 0) <= limit, f"C3_{k}"
    for i, j in zip(*np.nonzero(serves & (load < SMALL_LOAD)), strict=True) if whole else ():
        built += x[i, j] <= parts * y[j], f"C4_{i}_{j}"
    return _Program(built=built, replicas=y, parts=x, extra=extra)


def _shares(problem: FleetProblem, replicas: Integers, time_limit_s: float) -> Floats:
    """Shares on a given fleet that leave the busiest type least busy: min u, C1, and C2 with u y_j on its right."""
    import pulp

    classes, types = range(len(problem.classes)), np.flatnonzero(replicas)
    serves, load = problem.serves, problem.load
    built = pulp.LpProblem("shares", pulp.LpMinimize)
    u = built.add_variable("u", 0)
    x = {(i, j): built.add_variable(f"x_{i}_{j}", 0, 1) for i in classes for j in types if serves[i, j]}
    built += pulp.lpSum([u])
    for i in classes:
        built += pulp.lpSum(x[i, j] for j in types if serves[i, j]) == 1, f"C1_{i}"
    for j in types:
        carried = pulp.lpSum(load[i, j] * x[i, j] for i in classes if serves[i, j])
        built += carried <= int(replicas[j]) * u, f"C2_{j}"
    outcome = solve(built, time_limit_s=time_limit_s)
    if outcome.status is not Status.OPTIMAL:
        raise RuntimeError(f"the shares of a feasible fleet could not be found: {outcome.status}")
    share = np.zeros(serves.shape)
    for (i, j), one in x.items():
        share[i, j] = one.value()
    return share


def _slice_shares(program: _Program, slices: int) -> Floats:
    rows = 1 + max(i for i, _ in program.parts)
    share = np.zeros((rows, len(program.replicas)))
    for (i, j), one in program.parts.items():
        share[i, j] = round(one.value()) / slices
    return share


# ---- the answer ----------------------------------------------------------------------------------------


def _answer(
    problem: FleetProblem,
    status: Status,
    bound: float,
    replicas: Integers,
    share: Floats,
) -> FleetPlan:
    broken = broken_constraints(problem, replicas, share)
    if broken:
        raise RuntimeError(f"the solver's fleet is not feasible: {broken[0]}")
    cost = math.fsum(one.usd_per_hour * int(n) for one, n in zip(problem.types, replicas, strict=True))
    # replicas are whole here and nearly so in the solver: its bound may lie above this cost by its tolerance
    bound = min(bound, cost)
    if status is Status.OPTIMAL and cost - bound <= WORTH_NAMING * cost:
        bound = cost
    carried = (problem.load * share).sum(axis=0)
    return FleetPlan(
        status=status,
        usd_per_hour=cost,
        bound=bound,
        gap=(cost - bound) / cost,
        replicas=replicas,
        share=share,
        utilisation=np.divide(carried, replicas, out=np.zeros(len(replicas)), where=replicas > 0),
        binds="",
        bindings=(),
    )


def _bindings(problem: FleetProblem, cost: float, slices: int | None, time_limit_s: float) -> tuple[Binding, ...]:
    """What each availability and the integrality cost, by solving without it."""
    relaxed = {
        family: _program(problem, {f: n for f, n in problem.available.items() if f != family}, slices=slices)
        for family in problem.available
        if family in problem.families
    }
    relaxed["integrality"] = _program(problem, problem.available, whole=False)
    found = []
    for constraint, program in relaxed.items():
        outcome = solve(program.built, time_limit_s=time_limit_s)
        if outcome.status in {Status.OPTIMAL, Status.FEASIBLE}:
            found.append(Binding(constraint=constraint, saves_usd_per_hour=cost - outcome.objective))
    worth = [one for one in found if one.saves_usd_per_hour > WORTH_NAMING * cost]
    return tuple(sorted(worth, key=lambda one: -one.saves_usd_per_hour))


def _binds(problem: FleetProblem, bindings: Sequence[Binding], cost: float) -> str:
    """Availability first: whole replicas always cost something, GPUs on offer only where they are short."""
    for one in bindings:
        if one.constraint != "integrality":
            without = cost - one.saves_usd_per_hour
            limit = problem.available[one.constraint]
            return f"{one.constraint}: {limit} on offer; with more the fleet would cost {without:.2f} USD/h"
    for one in bindings:
        without = cost - one.saves_usd_per_hour
        return f"integrality: replicas are whole; in fractions the fleet would cost {without:.2f} USD/h"
    return "the load: every replica is full"


def _no_fleet(problem: FleetProblem, status: Status, why: str, bound: float = math.nan) -> FleetPlan:
    return FleetPlan(
        status=status,
        usd_per_hour=math.nan,
        bound=bound,
        gap=math.nan,
        replicas=np.zeros(len(problem.types), dtype=np.int64),
        share=np.zeros(problem.serves.shape),
        utilisation=np.zeros(len(problem.types)),
        binds=why,
        bindings=(),
    )


def _reason(problem: FleetProblem, name: str) -> str:
    return problem.reasons.get(name, "no type on offer serves it")


def _too_few(problem: FleetProblem, slices: int | None, time_limit_s: float) -> str:
    """Which availability is short and by how much, and the class that asks for most of it."""
    program = _program(problem, problem.available, slices=slices, elastic=True)
    outcome = solve(program.built, time_limit_s=time_limit_s)
    if outcome.status is not Status.OPTIMAL:
        return "the GPUs on offer are too few"
    short = {family: round(one.value()) for family, one in program.extra.items() if round(one.value()) > 0}
    if len(short) == 1:
        family, more = next(iter(short.items()))
        limit = problem.available[family]
        what = f"{family}: {limit} on offer, at least {limit + more} are needed"
    else:
        offered = ", ".join(f"{family} {problem.available[family]}" for family in short)
        what = f"{' and '.join(short)}: {offered} on offer, at least {sum(short.values())} more are needed together"
    return f"{what}; {_hungriest(problem)}"


def _hungriest(problem: FleetProblem) -> str:
    """The class that cannot do without the limited families and takes most of their GPUs, even on its best type."""
    gpus = problem.load * np.array([one.gpus for one in problem.types])
    free = np.array([one.family not in problem.available for one in problem.types])
    fewest = np.where(problem.serves, gpus, np.inf).min(axis=1)
    fewest[(problem.serves & free).any(axis=1)] = 0.0
    most = int(np.argmax(fewest))
    return f"class {problem.classes[most]} alone takes {fewest[most]:.1f} GPUs"

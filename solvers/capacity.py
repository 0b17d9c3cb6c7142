"""Cheapest way to serve a workload within its latency limits: GPU type, parallel degrees, batch limit, replicas.

The space is every GPU on offer x TP x PP x batch limit x number of replicas. Step times and queues of all systems are
solved at once; attainment rises with replicas, so the smallest fleet of each system is found by bisection and the
search is exact for the model: no member that is cheaper meets the limits. (Where TPOT's normal tail dips by a part in
a thousand as replicas are added, the fleet found still meets the limits and one of one replica fewer does not.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from servecast.model.attainment import (
    Fleet,
    attainment,
    fleets,
    joint_attainment,
)
from servecast.model.forecast import Profile
from servecast.model.service import service_curves
from servecast.model.slo import Slo
from servecast.solvers.capacity_outcome import (
    candidates_of,
    load_curve_of,
    nothing_fits,
    out_of_reach,
    pareto_first,
    range_warnings,
    risk_warning,
    what_binds,
)
from servecast.solvers.capacity_space import (
    DEFAULT_CAPS,
    DEFAULT_PP,
    DEFAULT_TP,
    CapacityRequest,
    Space,
    build_space,
    fleet_cost,
    split_deployments,
)
from servecast.solvers.results import Candidate, CapacityPlan, Status

__all__ = ["DEFAULT_CAPS", "DEFAULT_PP", "DEFAULT_TP", "CapacityRequest", "plan_capacity", "resized"]

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

ALTERNATIVES, FEWEST_ALTERNATIVES = 12, 5
SPARE = (1.0, 1.25, 1.6)
"""Fleet sizes from the smallest on that are offered as alternatives, as factors."""
SPARED = 4
"""Best deployments whose larger fleets are offered, too."""
DEAR = 8.0
"""Times the cheapest cost found so far beyond which a system is not followed."""


def plan_capacity(profile: Profile, request: CapacityRequest, *, load_curve: bool = True) -> CapacityPlan:
    """Solve the request.

    Returns a plan with status ``infeasible`` (and the bound that cannot be met) where nothing in the space will do;
    `load_curve` adds the chosen plan's percentiles from light load to saturation.

    Raises
    ------
    ValueError : no offer or no limit given, or no degree that the model allows.
    """
    if not request.offers:
        raise ValueError("gpus must name at least one offer, got none")
    if not request.slos:
        raise ValueError("slo must state at least one limit, got none")
    deployments, offers = split_deployments(request)
    curves = service_curves(profile, deployments, request.engine, request.workload, max_batch=max(request.caps))
    if not (curves.kv_batch > 0).any():
        return nothing_fits(deployments, request, float(curves.inputs.tokens[-1]))
    space = build_space(request, profile, deployments, offers, curves)
    smallest, feasible = _smallest_fleets(space)
    if not feasible.any():
        return out_of_reach(space)
    return _answer(space, smallest, feasible, load_curve=load_curve)


def resized(
    profile: Profile, request: CapacityRequest, one: Candidate, replicas: int, *, load_curve: bool = False
) -> CapacityPlan:
    """What the closed form says of `one` with another number of replicas: nothing is searched, nothing compared."""
    narrowed = replace(
        request,
        offers=tuple(offer for offer in request.offers if offer.gpu.name == one.gpu),
        tp=(one.tp,),
        pp=(one.pp,),
        caps=(one.max_num_seqs,),
    )
    deployments, offers = split_deployments(narrowed)
    curves = service_curves(profile, deployments, request.engine, request.workload, max_batch=one.max_num_seqs)
    space = build_space(narrowed, profile, deployments, offers, curves)
    plan = candidates_of(space, np.array([0]), np.array([replicas]))[0]
    return CapacityPlan(
        status=Status.OPTIMAL,
        plan=plan,
        alternatives=(),
        binds=what_binds(space, 0, replicas),
        gap=0.0,
        evaluated=1,
        load_curve=load_curve_of(space, 0, replicas) if load_curve else (),
        warnings=(*request.workload.warnings, *range_warnings(space, 0, plan)),
    )


def _meets(fleet: Fleet, slos: Sequence[Slo]) -> NDArray[np.bool_]:
    good = np.ones(fleet.utilisation.shape, dtype=bool)
    for slo in slos:
        good &= attainment(fleet, slo.metric, slo.limit_s) >= slo.percentile / 100.0
    return good


def _smallest_fleets(space: Space) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Fewest replicas of each system that meet every limit, and whether any number does."""
    slos = space.request.slos
    low = space.least - 1
    possible = space.least <= space.most
    high = np.where(possible, space.most, 1)
    good = np.zeros(len(space.most), dtype=bool)
    open_ones = np.flatnonzero(possible)
    # first twice, four times, ... the least: far cheaper than starting from the largest fleet
    reach = np.minimum(space.least, high)
    cheapest = np.inf
    while len(open_ones):
        # a fleet far dearer than one that will do is neither the answer nor an alternative to show
        open_ones = open_ones[fleet_cost(space, open_ones, reach[open_ones]) <= DEAR * cheapest]
        if not len(open_ones):
            break
        met = _meets(fleets(space.systems, space.windows, open_ones, reach[open_ones]), slos)
        done = open_ones[met]
        good[done], high[done] = True, reach[done]
        if len(done):
            cheapest = min(cheapest, float(fleet_cost(space, done, reach[done]).min()))
        low[open_ones[~met]] = reach[open_ones[~met]]
        open_ones = open_ones[~met & (reach[open_ones] < high[open_ones])]
        reach[open_ones] = np.minimum(reach[open_ones] * 2, high[open_ones])
    open_ones = np.flatnonzero(good & (high - low > 1))
    while len(open_ones):
        middle = (low[open_ones] + high[open_ones]) // 2
        met = _meets(fleets(space.systems, space.windows, open_ones, middle), slos)
        high[open_ones[met]], low[open_ones[~met]] = middle[met], middle[~met]
        open_ones = open_ones[(high - low)[open_ones] > 1]
    return high, good


def _answer(
    space: Space, smallest: NDArray[np.int64], feasible: NDArray[np.bool_], *, load_curve: bool
) -> CapacityPlan:
    system = np.flatnonzero(feasible)
    cost = fleet_cost(space, system, smallest[system])
    # of equal cost, the fleet that is further from its limits
    margin = -joint_attainment(fleets(space.systems, space.windows, system, smallest[system]), space.request.slos)
    order = np.lexsort((space.systems.cap[system], np.round(margin, 4), np.round(cost, 6)))
    ranked = system[order]
    best, replicas = int(ranked[0]), int(smallest[ranked[0]])
    chosen, counts = _shortlist(space, ranked, smallest)
    candidates = candidates_of(space, chosen, counts)
    plan = candidates[0]
    warnings = [*space.request.workload.warnings, *range_warnings(space, best, plan)]
    warnings += risk_warning(plan, candidates[1:], space.request.slos)
    return CapacityPlan(
        status=Status.OPTIMAL,
        plan=plan,
        alternatives=pareto_first(candidates[1:])[:ALTERNATIVES],
        binds=what_binds(space, best, replicas),
        gap=0.0,
        evaluated=int((space.most - space.least + 1).clip(min=0).sum()),
        load_curve=load_curve_of(space, best, replicas) if load_curve else (),
        warnings=tuple(warnings),
    )


def _shortlist(space: Space, ranked: Indices, smallest: NDArray[np.int64]) -> tuple[Indices, NDArray[np.int64]]:
    """The winner, the best system of every other deployment, and larger fleets of the leaders."""
    leaders: dict[int, int] = {}
    for system in ranked:
        leaders.setdefault(int(space.systems.deployment[system]), int(system))
    chosen: list[tuple[int, int]] = []
    for rank, system in enumerate(list(leaders.values())[: ALTERNATIVES + 1]):
        for factor in SPARE if rank < SPARED else SPARE[:1]:
            count = min(int(np.ceil(smallest[system] * factor)), int(space.most[system]))
            if (system, count) not in chosen:
                chosen.append((system, count))
    # few deployments or a tight count: other batch limits of the same ones are choices, too
    for system in ranked:
        if len(chosen) > FEWEST_ALTERNATIVES:
            break
        if (int(system), int(smallest[system])) not in chosen:
            chosen.append((int(system), int(smallest[system])))
    systems, counts = np.array(chosen).T
    return systems.astype(np.intp), counts.astype(np.int64)

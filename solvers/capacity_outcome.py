"""What a capacity search answers with: candidates with intervals, what binds, warnings, and why nothing will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.attainment import (
    FORM_BAND,
    Fleet,
    Windows,
    attainment,
    fleets,
    joint_attainment,
    out_of_range,
    quantile,
    rate_windows,
    slowed_systems,
)
from servecast.model.deployment import Deployment
from servecast.model.forecast import CHUNK_TOKENS, error_band, novelties
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.prediction import Prediction
from servecast.model.slo import Slo
from servecast.model.workload import Workload
from servecast.solvers.capacity_space import CapacityRequest, Space, fleet_cost
from servecast.solvers.results import Candidate, CapacityPlan, LoadPoint, Status

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

Z95 = 1.6448536269514722
"""Standard normal quantile of 0.95 (Abramowitz & Stegun, table 26.5)."""
SCENARIOS = 5
IDLE = 0.05
"""Mean utilisation below which a plan deserves a word of warning."""
LOADS = np.array([0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.98, 1.03])
"""Loads of the load curve, as shares of saturation."""


@dataclass(frozen=True, slots=True)
class _Scenarios:
    """The fleets as predicted, and at the ends of what is uncertain about them, stacked: one call serves all."""

    stacked: Fleet
    """Rows: every fleet as predicted, then all with fast steps, slow steps, a light and a heavy load. The step time's
    90 % interval is that of errors on held-out runs, covariance of the constants included."""
    step_factor: Floats
    """Slow steps over those predicted. [-]"""
    rate_factor: float

    def parts(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """`values` of the stacked fleets, by scenario."""
        return np.split(values, SCENARIOS)


def _scenarios(space: Space, system: Indices, replicas: Floats, windows: Windows, load: ArrayLike = 1.0) -> _Scenarios:
    profile, systems = space.profile, space.systems
    rows = systems.deployment[system]
    bands = np.array([error_band(profile, space.deployments[row], "tpot") for row in rows])
    rate = rate_factor(space.request.workload)
    one = np.ones(len(rows))
    slow = np.exp(bands[:, 1])
    factor = np.concatenate([one, np.exp(bands[:, 0]), slow, one, one])
    loads = np.asarray(load, dtype=np.float64) * np.array([one, one, one, one / rate, one * rate])
    slowed = slowed_systems(systems, np.tile(system, SCENARIOS), factor)
    rows_of_all = np.arange(len(factor))
    stacked = fleets(slowed, windows, rows_of_all, np.tile(replicas, SCENARIOS), load=loads.ravel())
    return _Scenarios(stacked, slow, rate)


def rate_factor(workload: Workload) -> float:
    """Upper end over middle of the 90 % interval of the mean rate: counts vary by sqrt(IDC / n); 1 where stated. [-]"""
    arrivals = workload.arrivals
    if not arrivals.requests:
        return 1.0
    longest = arrivals.idc[-1][1] if arrivals.idc else arrivals.gap_cv**2
    return float(np.exp(Z95 * np.sqrt(longest / arrivals.requests)))


def _interval(found: _Scenarios, metric: str, p: float, known: Sequence[bool]) -> list[Prediction]:
    """A percentile with what steps, arrivals and the closed form itself leave open, their logarithms in quadrature."""
    value, fast, slow, light, heavy = found.parts(quantile(found.stacked, metric, p))
    inside = found.parts(~out_of_range(found.stacked, metric, p))[0]
    form = np.where(inside[:, np.newaxis], FORM_BAND[metric, True], FORM_BAND[metric, False])
    up = np.sqrt(_apart(slow, value) ** 2 + _apart(heavy, value) ** 2 + form[:, 1] ** 2)
    down = np.sqrt(_apart(value, fast) ** 2 + _apart(value, light) ** 2 + form[:, 0] ** 2)
    columns = (value, value * np.exp(-down), value * np.exp(up), inside, known)
    return [
        Prediction(value=float(v), lo=float(lo), hi=float(hi), calibrated=bool(held and one))
        for v, lo, hi, held, one in zip(*columns, strict=True)
    ]


def _apart(high: Floats, low: Floats) -> Floats:
    """Logarithm of a ratio that is at least 1."""
    return np.asarray(np.log(np.maximum(high / low, 1.0)))


def candidates_of(space: Space, system: Indices, replicas: NDArray[np.int64]) -> list[Candidate]:
    found = _scenarios(space, system, replicas.astype(np.float64), space.windows)
    cost = fleet_cost(space, system, replicas)
    request, profile = space.request, space.profile
    ones = [space.deployments[row] for row in space.systems.deployment[system]]
    known = ["gpu" not in novelties(profile, one) for one in ones]
    value, fast, slow, light, heavy = found.parts(joint_attainment(found.stacked, request.slos))
    met = [value, np.minimum(slow, heavy), np.maximum(fast, light)]
    utilisation, running = (found.parts(of)[0] for of in (found.stacked.utilisation, found.stacked.running))
    ttft50, ttft99 = _interval(found, "ttft", 0.5, known), _interval(found, "ttft", 0.99, known)
    tpot50, tpot99 = _interval(found, "tpot", 0.5, known), _interval(found, "tpot", 0.99, known)
    # steps and arrivals at their upper ends: independent, so their logarithms add in quadrature
    upper = np.exp(np.hypot(np.log(found.step_factor), np.log(found.rate_factor))) * utilisation
    return [
        Candidate(
            gpu=one.gpu.name,
            tp=one.tp,
            pp=one.pp,
            replicas=int(replicas[i]),
            max_num_seqs=int(space.systems.cap[system[i]]),
            max_num_batched_tokens=int(CHUNK_TOKENS),
            precision=request.trunk_format if not one.llm.is_moe else request.expert_format,
            kv_format=one.kv_format,
            usd_per_hour=float(cost[i]),
            ttft_p50_s=ttft50[i],
            ttft_p99_s=ttft99[i],
            tpot_p50_s=tpot50[i],
            tpot_p99_s=tpot99[i],
            slo_attainment=Prediction(
                value=float(met[0][i]),
                lo=float(min(met[0][i], met[1][i])),
                hi=float(max(met[0][i], met[2][i])),
                calibrated=known[i],
            ),
            utilisation=float(utilisation[i]),
            utilisation_hi=float(upper[i]),
            headroom=float(1.0 / utilisation[i] - 1.0),
            running_mean=float(running[i]),
            calibrated=known[i],
        )
        for i, one in enumerate(ones)
    ]


def pareto_first(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Members that no other beats in cost and both tails come first; each group by cost."""

    def point(one: Candidate) -> tuple[float, float, float]:
        return one.usd_per_hour, one.ttft_p99_s.value, one.tpot_p99_s.value

    def beaten(one: Candidate) -> bool:
        mine = point(one)
        return any(
            all(theirs <= own for theirs, own in zip(point(other), mine, strict=True)) and point(other) != mine
            for other in candidates
        )

    front = [one for one in candidates if not beaten(one)]
    rest = [one for one in candidates if beaten(one)]
    return tuple(sorted(front, key=point) + sorted(rest, key=point))


def what_binds(space: Space, system: int, replicas: int) -> str:
    """What a fleet of one replica fewer would break."""
    slos, one = space.request.slos, np.array([system])
    cache = int(space.systems.cap[system]) == int(space.curves.kv_batch[space.systems.deployment[system]])
    note = " (batch limited by KV memory)" if cache else ""
    if replicas == 1:
        fleet = fleets(space.systems, space.windows, one, [1.0])
        tightest = min(slos, key=lambda slo: attainment(fleet, slo.metric, slo.limit_s)[0] - slo.percentile / 100.0)
        return f"one replica is the smallest fleet; {tightest.name} is the limit nearest to it{note}"
    if replicas - 1 < space.least[system]:
        return f"throughput: a fleet of {replicas - 1} cannot sustain the mean rate{note}"
    fleet = fleets(space.systems, space.windows, one, [replicas - 1.0])
    missed = {slo: slo.percentile / 100.0 - float(attainment(fleet, slo.metric, slo.limit_s)[0]) for slo in slos}
    worst = max(missed, key=lambda slo: missed[slo])
    reached = float(quantile(fleet, worst.metric, worst.percentile / 100.0)[0])
    return f"{worst.name} <= {worst.limit_s:g} s: a fleet of {replicas - 1} would reach {reached:.3g} s{note}"


def range_warnings(space: Space, system: int, plan: Candidate) -> list[str]:
    found = []
    one = space.deployments[space.systems.deployment[system]]
    profile = space.profile
    if not profile.kernels[profile.kernel_set(one.gpu)].measured:
        found.append(f"{one.gpu.name} has no kernel table: closed-form efficiencies, wider intervals")
    elif (one.gpu.name, one.llm.is_moe) not in profile.known_gpus:
        kind = "mixture of experts" if one.llm.is_moe else "dense model"
        found.append(f"no server run of a {kind} on {one.gpu.name} is in the profile: intervals of an unseen GPU type")
    if one.llm.name not in profile.known_models:
        found.append(f"no server run of {one.llm.name} is in the profile: intervals are those of an unseen model")
    largest = profile.ranges["params_active"][1]
    if one.llm.params_active > 2.0 * largest:
        found.append(f"{one.llm.name} is {one.llm.params_active / largest:.1f} times the largest model of the profile")
    longest = float(space.curves.inputs.tokens[-1])
    if longest > profile.ranges["isl"][1]:
        found.append(f"prompts up to {longest:.0f} tokens leave the profile's range ({profile.ranges['isl'][1]:.0f})")
    if one.llm.max_context and longest > one.llm.max_context:
        found.append(f"prompts up to {longest:.0f} tokens exceed the model's context of {one.llm.max_context}")
    if plan.utilisation < 1.0 <= plan.utilisation_hi:
        found.append(
            f"saturation: with steps and arrivals at their upper ends utilisation is {plan.utilisation_hi:.2f}; "
            "the queue would then grow without end"
        )
    if plan.utilisation < IDLE:
        found.append(
            f"the fleet is {plan.utilisation:.0%} busy on average: the limits lie near what idle replicas reach or the "
            "peaks far above the mean"
        )
    fleet = fleets(space.systems, space.windows, np.array([system]), [float(plan.replicas)])
    outside = [slo.name for slo in space.request.slos if out_of_range(fleet, slo.metric, slo.percentile / 100.0)[0]]
    if outside:
        found.append(
            f"{' and '.join(outside)} of this fleet: outside the range in which the closed form is known to hold "
            "(bursts, a batch limit that binds, or short outputs): the simulator has the last word"
        )
    stay = plan.ttft_p50_s.value + plan.tpot_p50_s.value * space.request.workload.mean_out
    if space.request.workload.windows and space.windows.window_s < 5.0 * stay:
        found.append(
            f"a typical request stays {stay:.2g} s, longer than a fifth of the {space.windows.window_s:g} s rate "
            "windows"
        )
    return found


def risk_warning(plan: Candidate, others: Sequence[Candidate], slos: Sequence[Slo]) -> list[str]:
    """What the upper end of the step time's interval would mean, and the cheapest plan that holds even there."""
    wanted = float(np.prod([slo.percentile / 100.0 for slo in slos]))
    if plan.slo_attainment.lo >= wanted:
        return []
    text = (
        f"with steps at the upper end of their interval only {plan.slo_attainment.lo:.1%} of requests meet the limits"
    )
    safe = [one for one in others if one.slo_attainment.lo >= wanted]
    if safe:
        best = min(safe, key=lambda one: one.usd_per_hour)
        text += f"; {best.name} at {best.usd_per_hour:.2f} USD/h would hold even there"
    return [text]


def load_curve_of(space: Space, system: int, replicas: int) -> tuple[LoadPoint, ...]:
    """Percentiles of the chosen fleet as a steady load rises to saturation."""
    capacity = replicas * float(space.systems.capacity_rps[system])
    rates = LOADS * capacity
    ones = np.full(len(rates), system)
    windows = rate_windows(replace(space.request.workload, windows=()), 1.0)
    load = rates / space.request.workload.rate_rps
    found = _scenarios(space, ones, np.full(len(rates), float(replicas)), windows, load)
    known = [True] * len(rates)

    middle, fast, slow, light, heavy = found.parts(joint_attainment(found.stacked, space.request.slos))
    low, high = np.minimum(slow, heavy), np.maximum(fast, light)
    shares = [
        Prediction(value=value, lo=lo, hi=hi)
        for value, lo, hi in zip(middle.tolist(), low.tolist(), high.tolist(), strict=True)
    ]

    points = zip(
        rates.tolist(),
        _interval(found, "ttft", 0.99, known),
        _interval(found, "tpot", 0.99, known),
        shares,
        strict=True,
    )
    return tuple(
        LoadPoint(rate_rps=rate, ttft_p99_s=ttft, tpot_p99_s=tpot, slo_attainment=met)
        for rate, ttft, tpot, met in points
    )


def nothing_fits(deployments: Sequence[Deployment], request: CapacityRequest, longest: float) -> CapacityPlan:
    def room(one: Deployment) -> float:
        return memory_budget(one, MEMORY_RULES[request.engine]).kv_bytes

    one = max(deployments, key=room)
    where = f"{one.gpu.name} tp{one.tp} pp{one.pp}"
    if room(one) > 0.0:
        tokens = memory_budget(one, MEMORY_RULES[request.engine]).kv_tokens
        reason = f"prompts of {longest:.0f} tokens exceed the {tokens:.0f} tokens of KV cache on {where}"
    else:
        need, have = one.weight_bytes_per_gpu / 1e9, one.gpu.memory_bytes / 1e9
        reason = (
            f"{request.llm.name} in {request.trunk_format} needs {need:.0f} GB per GPU for its weights on {where}, "
        )
        reason += f"which has {have:.0f} GB"
    return _infeasible(f"memory: {reason}", request)


def out_of_reach(space: Space) -> CapacityPlan:
    """Name the limit that the largest fleets miss, and the best that can be reached."""
    usable = np.flatnonzero(space.least <= space.most)
    if len(usable) == 0:
        gpus = np.array([one.gpus for one in space.deployments])[space.systems.deployment]
        number = int(np.argmin(space.least * gpus / np.maximum(space.most * gpus, 0.5)))
        one = space.deployments[space.systems.deployment[number]]
        offered = space.offers[space.systems.deployment[number]].limit or space.request.max_replicas * one.gpus
        return _infeasible(
            f"count: the mean rate alone needs {space.least[number] * one.gpus} {one.gpu.name} "
            f"(tp{one.tp} pp{one.pp}), {offered} are on offer",
            space.request,
        )
    # enough to be idle: what more GPUs can no longer improve
    idle = np.minimum(space.most[usable], space.least[usable] * 64)
    fleet = fleets(space.systems, space.windows, usable, idle)
    for slo in space.request.slos:
        reached = quantile(fleet, slo.metric, slo.percentile / 100.0)
        if (reached > slo.limit_s).all():
            best = int(np.argmin(reached))
            one = space.deployments[space.systems.deployment[usable[best]]]
            return _infeasible(
                f"{slo.name} <= {slo.limit_s:g} s: the best achievable is {reached[best]:.3g} s "
                f"({one.gpu.name} tp{one.tp} pp{one.pp})",
                space.request,
            )
    names = " and ".join(slo.name for slo in space.request.slos)
    return _infeasible(f"{names} cannot be met together, though each can alone", space.request)


def _infeasible(binds: str, request: CapacityRequest) -> CapacityPlan:
    return CapacityPlan(
        status=Status.INFEASIBLE,
        plan=None,
        alternatives=(),
        binds=binds,
        gap=0.0,
        evaluated=0,
        load_curve=(),
        warnings=request.workload.warnings,
    )

"""The mixed-fleet query from Python: a load, GPUs on offer and limits in; GPU types, counts and routing out.

Requests fall into classes by prompt and output length. For every class and every replica type (GPU, tensor-parallel
degree, batch limit) the predictor gives the largest rate within the limits, and the program of
:mod:`servecast.solvers.fleet` picks replicas and shares. It takes a mix for the time-weighted sum of its classes; so
afterwards the mix of each type is predicted as what it is, and where it misses a limit the type's rates are lowered by
what the mix lacks and the program is solved again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.arrivals import RATE_WINDOWS_S, scaled, workload_from_trace
from servecast.model.deployment import Deployment
from servecast.model.forecast import Profile
from servecast.model.hardware import Offer
from servecast.model.llm import Llm
from servecast.model.slo import Slo
from servecast.model.state_queue import interpolate_idc
from servecast.model.workload import Trace, Workload
from servecast.readers.deployments import serving_formats
from servecast.solvers.capacity_space import DEFAULT_CAPS, DEFAULT_TP, CapacityRequest, split_deployments
from servecast.solvers.fleet import FleetPlan, FleetProblem, ReplicaType, Status, explained, solve_fleet
from servecast.solvers.replica_rates import MixForecast, mix_forecast, replica_rates

Floats = NDArray[np.float64]

RESULT_SCHEMA = "servecast.fleet-result/1"
"""Name and major version of the JSON that a fleet is printed as."""
INPUT_EDGES: tuple[int, ...] = (512, 2048, 8192)
OUTPUT_EDGES: tuple[int, ...] = (128, 512)
"""Upper ends of the classes; the last class is open. [tokens]"""
MELANGE_SLICES = 4
"""Slices per class that Melange's authors found to suffice."""
COMPARISON_LIMIT_S = 2.0
"""Time for each fleet that is only compared with. [s]"""
FORECAST_WINDOW_S = 300.0
"""Length of the windows whose rates the forecast error is read from, or of the one it is computed for. [s]"""
SHORTEST_WINDOW_S = 60.0
"""Counts of shorter windows are chance, not a forecast's error. [s]"""
FEWEST_WINDOWS = 20
ALIKE = 6e-4
"""Batch limits whose rates lie so near below another's, for every class, are left out: twice their precision. [-]"""
ROUNDS = 6
"""Solves at most, while mixes miss a limit."""
MIX_SAMPLE = 4000
"""Requests that stand for a mix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """Requests whose prompt and output lengths lie in one bucket."""

    name: str
    """For instance ``513-2048 x 1-128``: prompt x output tokens."""
    members: NDArray[np.intp]
    """Positions in the workload's sample of lengths."""
    mean_rate_rps: float
    rate_rps: float
    """That is planned for: the mean, or its upper quantile. [1/s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeForecast:
    """Replicas of one type in the fleet, and what they are predicted to do with their mix."""

    gpu: str
    tp: int
    max_num_seqs: int
    replicas: int
    usd_per_hour: float
    """Of all of them. [USD/h]"""
    rate_rps: float
    """That is routed to them. [1/s]"""
    utilisation: float
    """Load of the program over replicas; 1 is as much as the limits allow. [-]"""
    derating: float
    """What the rates of this type were multiplied by because mixes missed a limit; 1 where none did. [-]"""
    met: tuple[float, ...]
    """Predicted share within each limit, in the order of the limits. [-]"""
    slo_attainment: float
    """Within all of them. [-]"""

    @property
    def gpus(self) -> int:
        return self.replicas * self.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Another fleet for the same classes with the same rates per replica."""

    what: str
    status: Status
    usd_per_hour: float
    """NaN without a fleet. [USD/h]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAnswer:
    """A mixed fleet with what it was asked."""

    plan: FleetPlan
    problem: FleetProblem
    """As last solved, deratings included."""
    classes: tuple[RequestClass, ...]
    types: tuple[TypeForecast, ...]
    """Those with replicas, in the order of the offers."""
    single_type: Comparison | None
    """Cheapest fleet of one GPU type; None where not compared."""
    melange: Comparison | None
    """Melange's form: each class in four slices, each slice on one type."""
    nominal_usd_per_hour: float | None
    """Cost at the mean rates, where an upper quantile was served: the difference is the price of robustness."""
    rate_basis: str
    """Which rate is served, in words."""
    warnings: tuple[str, ...]
    slos: tuple[Slo, ...]
    model: str
    engine: str
    profile: str
    wall_s: float
    """Building and solving the fleet's program, all rounds, with what binds. [s]"""


def plan_fleet(
    load: Trace | Workload,
    llm: Llm,
    offers: Sequence[Offer],
    slos: Sequence[Slo],
    *,
    input_edges: Sequence[int] = INPUT_EDGES,
    output_edges: Sequence[int] = OUTPUT_EDGES,
    rate_quantile: float | None = None,
    rate_scale: float = 1.0,
    engine: str = "vllm",
    engine_version: str | None = None,
    precision: str = "auto",
    kv_precision: str = "auto",
    tp: Sequence[int] = DEFAULT_TP,
    max_num_seqs: Sequence[int] = DEFAULT_CAPS,
    profile: str = SHIPPED,
    slices: int | None = None,
    time_limit_s: float = 60.0,
    compare: bool = True,
) -> FleetAnswer:
    """Cheapest mix of GPU types that serves every class of requests within the limits.

    Parameters
    ----------
    load : a trace, or a workload (from :func:`servecast.model.arrivals.workload_from_parameters`).
    offers : GPUs with price and availability. [USD/h per GPU]
    slos : percentile limits, met by every class alone and by the mix of every type.
    input_edges, output_edges : upper ends of the length classes, rising; the last class is open. [tokens]
    rate_quantile : serve this quantile of each class's rate, in (0.5, 1), instead of its mean (see `planned_rates`).
    slices : split classes as Melange does; None splits freely.
    compare : also solve for one GPU type and in Melange's form.

    Raises
    ------
    ValueError : a malformed request. A request that no fleet can meet is an answer with status ``infeasible``.
    """
    from servecast.policies import parse_engine

    if not offers:
        raise ValueError("gpus must name at least one offer, got none")
    if not slos:
        raise ValueError("slo must state at least one limit, got none")
    name, version = parse_engine(engine if engine_version is None else f"{engine}@{engine_version}")
    workload = load if isinstance(load, Workload) else workload_from_trace(load)
    if rate_scale != 1.0:
        workload = scaled(workload, rate_scale)
    loaded = load_profile(profile)
    members = length_classes(workload, input_edges, output_edges)
    planned, basis = planned_rates(load, workload, list(members.values()), rate_quantile)
    if rate_quantile is not None:
        basis += f", together {planned.sum() / workload.rate_rps:.2f} times the mean"
    classes = tuple(
        RequestClass(
            name=key,
            members=at,
            mean_rate_rps=workload.rate_rps * len(at) / len(workload.n_in),
            rate_rps=float(rate),
        )
        for (key, at), rate in zip(members.items(), planned, strict=True)
    )
    request = _request(workload, llm, offers, slos, name, precision, kv_precision, tp, max_num_seqs)
    space = _Space.of(loaded, request, classes)
    problem, plan, mixes, derating, wall_s = _settled(space, slices, time_limit_s)
    served = plan.status in {Status.OPTIMAL, Status.FEASIBLE}
    nominal = None
    if rate_quantile is not None and served:
        mean = np.array([one.mean_rate_rps for one in classes])
        nominal = solve_fleet(replace(problem, rates_rps=mean), time_limit_s=time_limit_s, explain=False).usd_per_hour
    return FleetAnswer(
        plan=plan,
        problem=problem,
        classes=classes,
        types=_types(space, plan, mixes, derating),
        single_type=_single_type(problem) if compare and served else None,
        melange=_melange(problem) if compare and served else None,
        nominal_usd_per_hour=nominal,
        rate_basis=basis,
        warnings=(*workload.warnings, *_mix_warnings(space, mixes)),
        slos=tuple(slos),
        model=llm.name,
        engine=f"{name}@{version}",
        profile=loaded.name,
        wall_s=wall_s,
    )


# ---- classes and rates ---------------------------------------------------------------------------------


def length_classes(
    workload: Workload, input_edges: Sequence[int], output_edges: Sequence[int]
) -> dict[str, NDArray[np.intp]]:
    """Requests by bucket of prompt and output length, buckets without requests left out.

    Edges are upper ends: ``(512, 2048)`` makes 1-512, 513-2048 and 2049+; a leading 0 changes nothing.
    """
    inputs, outputs = _edges("input_edges", input_edges), _edges("output_edges", output_edges)
    row = np.searchsorted(inputs, workload.n_in, side="left")
    column = np.searchsorted(outputs, workload.n_out, side="left")
    found = {}
    for i in range(len(inputs) + 1):
        for j in range(len(outputs) + 1):
            at = np.flatnonzero((row == i) & (column == j))
            if len(at):
                found[f"{_range(inputs, i)} x {_range(outputs, j)}"] = at
    return found


def _edges(name: str, edges: Sequence[int]) -> list[int]:
    given = [int(edge) for edge in edges]
    if any(edge < 0 for edge in given) or any(right <= left for left, right in pairwise(given)):
        raise ValueError(f"{name} must be rising numbers of tokens, got {list(edges)}")
    return [edge for edge in given if edge > 0]


def _range(edges: Sequence[int], index: int) -> str:
    low = edges[index - 1] + 1 if index else 1
    return f"{low}-{edges[index]}" if index < len(edges) else f"{low}+"


def planned_rates(
    load: Trace | Workload, workload: Workload, members: Sequence[NDArray[np.intp]], rate_quantile: float | None
) -> tuple[Floats, str]:
    r"""Rate that each class is served at, and which one that is in words. [1/s]

    Without a quantile the mean. With one, from a trace of at least 20 windows of 60 or 300 s (and enough that the
    quantile is not their maximum): the quantile of the class's rate over the longest such windows, linear between them,
    and the mean where the quantile is below it. Otherwise the normal approximation over 300 s,

    .. math:: \lambda_i + z_q \sqrt{\lambda_i (1 + p_i (I - 1)) / w}

    with I the workload's index of dispersion and :math:`p_i` the share of the class, which thins it (1 for Poisson).
    Classes are taken at their quantile all at once, which is more than the quantile of the sum.
    """
    share = np.array([len(at) for at in members]) / len(workload.n_in)
    mean = workload.rate_rps * share
    if rate_quantile is None:
        return mean, "mean rate"
    if not 0.5 < rate_quantile < 1.0:
        raise ValueError(f"rate_quantile must be between 0.5 and 1, got {rate_quantile:g}")
    if isinstance(load, Trace):
        # a quantile of few windows is their maximum
        fewest = max(FEWEST_WINDOWS, math.ceil(1.0 / (1.0 - rate_quantile)))
        span = float(load.t_s[-1])
        lengths = [w for w in RATE_WINDOWS_S if SHORTEST_WINDOW_S <= w <= FORECAST_WINDOW_S and span >= fewest * w]
        if lengths:
            window, count = lengths[-1], int(span // lengths[-1])
            edges = np.arange(count + 1) * window
            counts = np.array([np.histogram(load.t_s[at], edges)[0] for at in members])
            # rates relative to the class's own mean over those windows, so that scaling and the cut end do not matter
            upper = np.quantile(counts, rate_quantile, axis=1)
            typical = counts.mean(axis=1)
            ratio = np.divide(upper, typical, out=np.ones(len(mean)), where=typical > 0.0)
            basis = f"{rate_quantile:g} quantile of {count} windows of {window:g} s, class by class"
            return mean * np.maximum(ratio, 1.0), basis
    from scipy.special import ndtri

    idc = workload.arrivals.idc or ((1.0, workload.arrivals.gap_cv**2),)
    dispersion = float(interpolate_idc(idc, np.array([FORECAST_WINDOW_S]))[0])
    sigma = np.sqrt(mean * np.maximum(1.0 + share * (dispersion - 1.0), 0.0) / FORECAST_WINDOW_S)
    basis = f"{rate_quantile:g} quantile of the rate over {FORECAST_WINDOW_S:g} s, normal with IDC {dispersion:.3g}"
    return mean + float(ndtri(rate_quantile)) * sigma, basis


# ---- coefficients --------------------------------------------------------------------------------------


def _request(
    workload: Workload,
    llm: Llm,
    offers: Sequence[Offer],
    slos: Sequence[Slo],
    engine: str,
    precision: str,
    kv_precision: str,
    tp: Sequence[int],
    caps: Sequence[int],
) -> CapacityRequest:
    def formats(compute_capability: int | None) -> tuple[str, str, str]:
        return serving_formats(llm, engine, precision, kv_precision, compute_capability=compute_capability)

    trunk, experts, cache = formats(None)
    return CapacityRequest(
        llm=llm,
        trunk_format=trunk,
        expert_format=experts,
        kv_format=cache,
        kv_overrides=tuple((one.gpu.name, formats(one.gpu.compute_capability)[2]) for one in offers),
        engine=engine,
        workload=workload,
        slos=tuple(slos),
        offers=tuple(offers),
        tp=tuple(tp),
        pp=(1,),
        caps=tuple(sorted(caps)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Space:
    """Replica types with their coefficients."""

    profile: Profile
    request: CapacityRequest
    classes: tuple[RequestClass, ...]
    deployments: tuple[Deployment, ...]
    """Of each type."""
    caps: tuple[int, ...]
    """Batch limit of each type."""
    problem: FleetProblem

    @classmethod
    def of(cls, profile: Profile, request: CapacityRequest, classes: tuple[RequestClass, ...]) -> _Space:
        deployments, offers = split_deployments(request)
        rates: list[Floats] = []
        reasons: dict[str, str] = {}
        for one in classes:
            lengths = _with_lengths(request.workload, one.members)
            found = replica_rates(profile, deployments, request.engine, lengths, request.slos, request.caps)
            rates.append(found.rates_rps)
            reasons |= {one.name: found.reason} if found.reason else {}
        table = np.array(rates)
        kept = [(d, c) for d in range(len(deployments)) for c in _undominated(table[:, d, :])]
        # no class is served anywhere: the reasons say why
        kept = kept or [(0, 0)]
        types = tuple(
            ReplicaType(
                name=f"{deployments[d].gpu.name} tp{deployments[d].tp} batch {request.caps[c]}",
                family=deployments[d].gpu.name,
                gpus=deployments[d].gpus,
                usd_per_hour=offers[d].usd_per_hour * deployments[d].gpus,
            )
            for d, c in kept
        )
        problem = FleetProblem(
            classes=tuple(one.name for one in classes),
            rates_rps=np.array([one.rate_rps for one in classes]),
            types=types,
            throughput_rps=np.array([table[:, d, c] for d, c in kept]).T,
            available={one.gpu.name: one.limit for one in request.offers if one.limit is not None},
            reasons=reasons,
        )
        return cls(
            profile=profile,
            request=request,
            classes=classes,
            deployments=tuple(deployments[d] for d, _ in kept),
            caps=tuple(request.caps[c] for _, c in kept),
            problem=problem,
        )


def _with_lengths(workload: Workload, members: NDArray[np.intp]) -> Workload:
    """The same arrivals, as if all requests were of the members' lengths."""
    return replace(workload, n_in=workload.n_in[members], n_out=workload.n_out[members])


def _undominated(rates: Floats) -> list[int]:
    """Batch limits of one deployment, [class, cap], without those that another one beats for every class.

    Rates within their precision of each other are alike.
    """
    kept: list[int] = []
    for cap in np.argsort(-rates.sum(axis=0), kind="stable"):
        column = rates[:, cap] * (1.0 - ALIKE)
        if column.any() and not any((rates[:, other] >= column).all() for other in kept):
            kept.append(int(cap))
    return sorted(kept)


# ---- solving -------------------------------------------------------------------------------------------


def _settled(
    space: _Space, slices: int | None, time_limit_s: float
) -> tuple[FleetProblem, FleetPlan, dict[int, MixForecast], Floats, float]:
    """Solve, predict the mixes, lower the rates of types whose mix misses a limit, and again until none does."""
    derating = np.ones(len(space.problem.types))
    wall_s = 0.0
    for left in reversed(range(ROUNDS)):
        problem = replace(space.problem, throughput_rps=space.problem.throughput_rps * derating)
        begun = perf_counter()
        plan = solve_fleet(problem, time_limit_s=time_limit_s, slices=slices, explain=False)
        wall_s += perf_counter() - begun
        mixes = {int(j): _mix(space, plan, int(j)) for j in np.flatnonzero(plan.replicas)}
        missed = {j: mix for j, mix in mixes.items() if not _good(space, mix)}
        if not missed or not left or not all(mix.largest_rps > 0.0 for mix in missed.values()):
            break
        for j, mix in missed.items():
            derating[j] *= plan.utilisation[j] * mix.largest_rps / _replica_rate(space, plan, j)
    begun = perf_counter()
    plan = explained(problem, plan, time_limit_s=time_limit_s, slices=slices)
    wall_s += perf_counter() - begun
    return problem, plan, mixes, derating, wall_s


def _routed(space: _Space, plan: FleetPlan, j: int) -> Floats:
    """Rate of each class at one type. [1/s]"""
    return np.asarray(space.problem.rates_rps * plan.share[:, j], dtype=np.float64)


def _replica_rate(space: _Space, plan: FleetPlan, j: int) -> float:
    return float(_routed(space, plan, j).sum() / plan.replicas[j])


def _mix(space: _Space, plan: FleetPlan, j: int) -> MixForecast:
    """Predict the mix of one type."""
    routed = _routed(space, plan, j)
    counts = np.round(MIX_SAMPLE * routed / routed.sum()).astype(np.intp)
    # evenly spaced members of each class stand for it
    parts = [
        one.members[(np.arange(n) * len(one.members)) // n]
        for one, n in zip(space.classes, counts.tolist(), strict=True)
        if n
    ]
    request = space.request
    return mix_forecast(
        space.profile,
        space.deployments[j],
        request.engine,
        _with_lengths(request.workload, np.concatenate(parts)),
        request.slos,
        space.caps[j],
        _replica_rate(space, plan, j),
    )


def _good(space: _Space, mix: MixForecast) -> bool:
    return all(met >= slo.percentile / 100.0 for met, slo in zip(mix.met, space.request.slos, strict=True))


def _types(space: _Space, plan: FleetPlan, mixes: dict[int, MixForecast], derating: Floats) -> tuple[TypeForecast, ...]:
    return tuple(
        TypeForecast(
            gpu=space.deployments[j].gpu.name,
            tp=space.deployments[j].tp,
            max_num_seqs=space.caps[j],
            replicas=int(plan.replicas[j]),
            usd_per_hour=space.problem.types[j].usd_per_hour * int(plan.replicas[j]),
            rate_rps=float(_routed(space, plan, j).sum()),
            utilisation=float(plan.utilisation[j]),
            derating=float(derating[j]),
            met=mix.met,
            slo_attainment=mix.slo_attainment,
        )
        for j, mix in mixes.items()
    )


def _mix_warnings(space: _Space, mixes: dict[int, MixForecast]) -> list[str]:
    found = []
    for j, mix in mixes.items():
        for slo, met in zip(space.request.slos, mix.met, strict=True):
            if met < slo.percentile / 100.0:
                found.append(
                    f"{space.problem.types[j].name}: its mix meets {slo.name} <= {slo.limit_s:g} s for {met:.2%} of "
                    f"requests only, after {ROUNDS} rounds"
                )
    return found


# ---- comparison ----------------------------------------------------------------------------------------


def _single_type(problem: FleetProblem) -> Comparison:
    """Cheapest fleet of one GPU type, over its degrees and batch limits; infeasible where no type serves all alone."""
    best = Comparison(what="none", status=Status.INFEASIBLE, usd_per_hour=math.nan)
    for family in problem.families:
        at = [j for j, one in enumerate(problem.types) if one.family == family]
        alone = replace(
            problem, types=tuple(problem.types[j] for j in at), throughput_rps=problem.throughput_rps[:, at]
        )
        plan = solve_fleet(alone, time_limit_s=COMPARISON_LIMIT_S, explain=False)
        found = Comparison(what=family, status=plan.status, usd_per_hour=plan.usd_per_hour)
        if found.usd_per_hour < best.usd_per_hour or (
            math.isnan(best.usd_per_hour) and not math.isnan(found.usd_per_hour)
        ):
            best = found
    return best


def _melange(problem: FleetProblem) -> Comparison:
    plan = solve_fleet(problem, time_limit_s=COMPARISON_LIMIT_S, slices=MELANGE_SLICES, explain=False)
    return Comparison(what=f"{MELANGE_SLICES} slices", status=plan.status, usd_per_hour=plan.usd_per_hour)


# ---- the document --------------------------------------------------------------------------------------


def result_document(answer: FleetAnswer) -> dict[str, Any]:
    """The answer as the documented JSON object (docs/json.md); US dollars, requests per second, shares."""
    plan = answer.plan
    nominal = answer.nominal_usd_per_hour
    return {
        "schema": RESULT_SCHEMA,
        "status": str(plan.status),
        "model": answer.model,
        "engine": answer.engine,
        "cost_usd_per_hour": plan.usd_per_hour,
        "bound": plan.bound,
        "gap": plan.gap,
        "binds": plan.binds,
        "bindings": [
            {"constraint": one.constraint, "saves_usd_per_hour": one.saves_usd_per_hour} for one in plan.bindings
        ],
        "types": [_type_document(one, answer.slos) for one in answer.types],
        "classes": [
            {
                "name": one.name,
                "requests": len(one.members),
                "mean_rate_rps": one.mean_rate_rps,
                "rate_rps": one.rate_rps,
                "shares": _share_documents(answer, i),
            }
            for i, one in enumerate(answer.classes)
        ],
        "rate_basis": answer.rate_basis,
        "robustness": None
        if nominal is None
        else {"mean_rate_usd_per_hour": nominal, "price_usd_per_hour": plan.usd_per_hour - nominal},
        "comparison": {
            name: None
            if one is None
            else {"what": one.what, "status": str(one.status), "cost_usd_per_hour": one.usd_per_hour}
            for name, one in (("single_type", answer.single_type), ("melange", answer.melange))
        },
        "slo": [{"name": slo.name, "limit_s": slo.limit_s} for slo in answer.slos],
        "warnings": list(answer.warnings),
        "profile": answer.profile,
        "wall_s": answer.wall_s,
    }


def _type_document(one: TypeForecast, slos: Sequence[Slo]) -> dict[str, Any]:
    return {
        "gpu": one.gpu,
        "tp": one.tp,
        "max_num_seqs": one.max_num_seqs,
        "replicas": one.replicas,
        "gpus": one.gpus,
        "usd_per_hour": one.usd_per_hour,
        "rate_rps": one.rate_rps,
        "utilisation": one.utilisation,
        "derating": one.derating,
        "predicted": {
            "slo_attainment": one.slo_attainment,
            "met": {slo.name: met for slo, met in zip(slos, one.met, strict=True)},
        },
    }


def shares_of(answer: FleetAnswer, i: int) -> list[tuple[TypeForecast, float]]:
    """Where class `i` goes: the types of the fleet that serve a part of it, and the part."""
    at = np.flatnonzero(answer.plan.replicas)
    parts = answer.plan.share[i, at].tolist()
    return [(one, part) for one, part in zip(answer.types, parts, strict=True) if part > 0.0]


def _share_documents(answer: FleetAnswer, i: int) -> list[dict[str, Any]]:
    return [
        {"gpu": one.gpu, "tp": one.tp, "max_num_seqs": one.max_num_seqs, "share": share}
        for one, share in shares_of(answer, i)
    ]

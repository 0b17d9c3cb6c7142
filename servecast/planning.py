"""The planning query from Python: request in, plan out, as records and as the documented JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.arrivals import scaled
from servecast.model.deployment import Deployment
from servecast.model.formats import BYTES_PER_ELEMENT
from servecast.model.hardware import Offer
from servecast.model.llm import Llm
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.prediction import Prediction
from servecast.model.slo import Slo
from servecast.model.workload import Trace, Workload
from servecast.policies.table import PolicyTable, from_dict
from servecast.readers.deployments import serving_formats
from servecast.solvers.capacity import DEFAULT_CAPS, DEFAULT_PP, DEFAULT_TP, CapacityRequest, plan_capacity
from servecast.solvers.results import Candidate, CapacityPlan, Confirmation, Replay

RESULT_SCHEMA = "servecast.plan-result/1"
"""Name and major version of the JSON that a plan is printed as."""
CONTEXT_STEP = 256
"""Context limits are rounded up to a multiple of this. [tokens]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan with what it was asked."""

    plan: CapacityPlan
    request: CapacityRequest
    engine_version: str
    profile: str
    precision: str
    """As requested."""
    kv_precision: str = "auto"
    """As requested."""
    rate_scale: float = 1.0
    simulated: Confirmation | None = None
    """None where no trace was replayed."""
    arrival_model: Mapping[str, Any] | None = None
    """Which arrival process describes the trace, and why; None where the load was stated."""


def plan(
    workload: Workload,
    llm: Llm,
    offers: Sequence[Offer],
    slos: Sequence[Slo],
    *,
    engine: str = "vllm",
    engine_version: str | None = None,
    precision: str = "auto",
    kv_precision: str = "auto",
    rate_scale: float = 1.0,
    tp: Sequence[int] | None = None,
    pp: Sequence[int] | None = None,
    max_num_seqs: Sequence[int] | None = None,
    max_replicas: int = 1000,
    profile: str = SHIPPED,
    load_curve: bool = True,
) -> Answer:
    """Cheapest deployment of `llm` on the GPUs on offer that serves `workload` within the limits.

    Parameters
    ----------
    workload : from :func:`servecast.model.arrivals.workload_from_trace` or ``workload_from_parameters``.
    offers : GPUs with their price. [USD/h per GPU]
    slos : percentile limits, all to be met.
    precision, kv_precision : weight and cache formats; ``auto`` keeps the checkpoint's.
    rate_scale : plan for this multiple of the workload's rate. [-]
    profile : a shipped profile or the path of one.

    Raises
    ------
    ValueError : a malformed request. A request that nothing can meet is an answer with status ``infeasible``.
    """
    from servecast.policies import parse_engine

    name, newest = parse_engine(engine if engine_version is None else f"{engine}@{engine_version}")

    def formats(compute_capability: int | None) -> tuple[str, str, str]:
        return serving_formats(llm, name, precision, kv_precision, compute_capability=compute_capability)

    trunk, experts, cache = formats(None)
    request = CapacityRequest(
        llm=llm,
        trunk_format=trunk,
        expert_format=experts,
        kv_format=cache,
        kv_overrides=tuple((one.gpu.name, formats(one.gpu.compute_capability)[2]) for one in offers),
        engine=name,
        workload=workload if rate_scale == 1.0 else scaled(workload, rate_scale),
        slos=tuple(slos),
        offers=tuple(offers),
        tp=tuple(tp or DEFAULT_TP),
        pp=tuple(pp or DEFAULT_PP),
        caps=tuple(max_num_seqs or DEFAULT_CAPS),
        max_replicas=max_replicas,
    )
    loaded = load_profile(profile)
    return Answer(
        plan=plan_capacity(loaded, request, load_curve=load_curve),
        request=request,
        engine_version=newest,
        profile=loaded.name,
        precision=precision,
        kv_precision=kv_precision,
        rate_scale=rate_scale,
    )


def with_arrivals(answer: Answer, trace: Trace) -> Answer:
    """The answer with the arrival process that describes its trace, and why."""
    from servecast.calibration.fits.arrivals import arrival_summary, fit_arrivals

    return replace(answer, arrival_model=arrival_summary(fit_arrivals(trace.t_s)))


def result_document(answer: Answer) -> dict[str, Any]:
    """The answer as the documented JSON object (docs/json.md); seconds, US dollars, shares."""
    found, request = answer.plan, answer.request
    arrivals = request.workload.arrivals
    chosen = found.plan
    return {
        "schema": RESULT_SCHEMA,
        "status": str(found.status),
        "model": request.llm.name,
        "engine": f"{request.engine}@{answer.engine_version}",
        "plan": _decision(chosen) if chosen else None,
        "predicted": _predicted(chosen) if chosen else None,
        "binds": found.binds,
        "headroom": chosen.headroom if chosen else None,
        "utilisation": chosen.utilisation if chosen else None,
        "utilisation_hi": chosen.utilisation_hi if chosen else None,
        "may_saturate": chosen.utilisation_hi >= 1.0 if chosen else None,
        "alternatives": [{**_decision(one), "predicted": _predicted(one)} for one in found.alternatives],
        "load_curve": [
            {
                "rate_rps": point.rate_rps,
                "ttft_p99_s": _interval(point.ttft_p99_s),
                "tpot_p99_s": _interval(point.tpot_p99_s),
                "slo_attainment": _interval(point.slo_attainment),
            }
            for point in found.load_curve
        ],
        "workload": {
            "name": request.workload.name,
            "rate_rps": arrivals.rate_rps,
            "requests": arrivals.requests,
            "gap_cv": arrivals.gap_cv,
            "idc": [{"window_s": window, "idc": value} for window, value in arrivals.idc],
            "peak_to_mean": [{"window_s": window, "ratio": value} for window, value in arrivals.peak_to_mean],
            "mean_input_tokens": request.workload.mean_in,
            "mean_output_tokens": request.workload.mean_out,
            "arrival_model": answer.arrival_model,
        },
        "slo": [{"name": slo.name, "limit_s": slo.limit_s} for slo in request.slos],
        "simulated": _simulated(answer),
        "warnings": list(found.warnings),
        "profile": answer.profile,
        "solver": {"gap": found.gap, "evaluated": found.evaluated},
    }


def policy_table(answer: Answer, *, trace: str, date: str, version: str, seed: int) -> PolicyTable:
    """The chosen plan as the table that engine files are written from.

    Raises
    ------
    ValueError : the plan is infeasible.
    """
    chosen, request = answer.plan.plan, answer.request
    if chosen is None:
        raise ValueError(f"an infeasible plan has no policy: {answer.plan.binds}")
    llm = request.llm
    gpu = next(offer.gpu for offer in request.offers if offer.gpu.name == chosen.gpu)
    deployment = Deployment(
        llm=llm,
        gpu=gpu,
        trunk_format=request.trunk_format,
        expert_format=request.expert_format,
        kv_format=chosen.kv_format,
        tp=chosen.tp,
        pp=chosen.pp,
    )
    budget = memory_budget(
        deployment,
        MEMORY_RULES[request.engine],
        max_batched_tokens=chosen.max_num_batched_tokens,
        max_num_seqs=chosen.max_num_seqs,
    )
    if not math.isfinite(chosen.tpot_p99_s.value):
        raise ValueError("a workload of one-token outputs has no TPOT, which the policy table states")
    longest = int((request.workload.n_in + request.workload.n_out).max())
    context = -(-longest // CONTEXT_STEP) * CONTEXT_STEP
    return from_dict(
        {
            "schema": "servecast.policy/1",
            "model": llm.name,
            "engine": request.engine,
            "engine_version": answer.engine_version,
            "gpu": chosen.gpu,
            "precision": _loadable(request),
            "checkpoint_format": llm.expert_format or llm.native_format,
            "kv_format": chosen.kv_format,
            "tp": chosen.tp,
            "pp": chosen.pp,
            "replicas": chosen.replicas,
            "max_num_seqs": chosen.max_num_seqs,
            "max_num_batched_tokens": max(chosen.max_num_batched_tokens, chosen.max_num_seqs),
            "max_model_len": min(context, llm.max_context) if llm.max_context else context,
            "gpu_memory_utilization": 0.9,
            "memory": {
                "gpu_bytes": budget.device_bytes,
                "weight_bytes": budget.weight_bytes,
                "overhead_bytes": budget.overhead_bytes,
            },
            "enable_chunked_prefill": True,
            "enable_prefix_caching": False,
            "cost_usd_per_hour": chosen.usd_per_hour,
            "predicted": {
                name: _interval(getattr(chosen, name))
                for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")
            },
            "slo": [{"name": slo.name, "limit_s": slo.limit_s} for slo in request.slos],
            "provenance": {
                "servecast": version,
                "profile": answer.profile,
                "trace": trace,
                "date": date,
                "seed": seed,
            },
        }
    )


def _loadable(request: CapacityRequest) -> str:
    """The format a checkpoint is loaded in: the narrower of trunk and experts."""
    return min(request.trunk_format, request.expert_format, key=BYTES_PER_ELEMENT.__getitem__)


def _simulated(answer: Answer) -> dict[str, Any] | None:
    """The replay beside the closed form: how far the second is from the first, as a share of the first."""
    found, chosen = answer.simulated, answer.plan.plan
    if found is None or chosen is None:
        return None
    names = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")
    replayed = {name: getattr(found.plan, name) for name in names}
    return {
        "router": found.router,
        "seed": found.seed,
        "confirms": found.plan.holds,
        **_replay(found.plan),
        "disagreement": {
            name: getattr(chosen, name).value / value - 1.0 if value else None for name, value in replayed.items()
        },
        "one_fewer": None if found.one_fewer is None else _replay(found.one_fewer),
        "closed_form_choice": found.closed_form,
        "others": [_replay(one) for one in found.others],
    }


def _replay(one: Replay) -> dict[str, Any]:
    return {
        "name": one.name,
        "replicas": one.replicas,
        "cost_usd_per_hour": one.usd_per_hour,
        "holds": one.holds,
        "missed": one.missed,
        "slo_attainment": one.slo_attainment,
        "attainment": one.attainment,
        "ttft_p50_s": one.ttft_p50_s,
        "ttft_p99_s": one.ttft_p99_s,
        "tpot_p50_s": one.tpot_p50_s,
        "tpot_p99_s": one.tpot_p99_s,
        "refused": one.refused,
        "preemptions": one.preemptions,
    }


def _decision(one: Candidate) -> dict[str, Any]:
    return {
        "gpu": one.gpu,
        "tp": one.tp,
        "pp": one.pp,
        "replicas": one.replicas,
        "gpus": one.gpus,
        "max_num_seqs": one.max_num_seqs,
        "max_num_batched_tokens": one.max_num_batched_tokens,
        "precision": one.precision,
        "kv_precision": one.kv_format,
        "cost_usd_per_hour": one.usd_per_hour,
        "calibrated": one.calibrated,
    }


def _predicted(one: Candidate) -> dict[str, Any]:
    names = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "slo_attainment")
    return {name: _interval(getattr(one, name)) for name in names}


def _interval(prediction: Prediction) -> dict[str, float]:
    return {"value": prediction.value, "lo": prediction.lo, "hi": prediction.hi}

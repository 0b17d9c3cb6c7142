"""Capacity plans as a search returns them, for the tests of the reports; the figures are invented but plausible."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from servecast.model.arrivals import workload_from_trace
from servecast.model.prediction import Prediction
from servecast.model.slo import Slo
from servecast.model.workload import Trace, Workload
from servecast.reports.plan_page import ReportContext
from servecast.solvers.results import Candidate, CapacityPlan, LoadPoint, Status

PRICES = {"h100_sxm": 2.8, "h200_sxm": 3.5, "b200_sxm": 5.6, "l40s": 1.1}


def predicted(value: float, spread: float = 0.18) -> Prediction:
    """A prediction whose interval is a factor wide."""
    return Prediction(value=value, lo=value * (1.0 - spread), hi=value * (1.0 + 1.3 * spread))


def share(value: float, low: float, high: float) -> Prediction:
    return Prediction(value=value, lo=low, hi=high)


def candidate(
    gpu: str = "h200_sxm",
    tp: int = 2,
    replicas: int = 4,
    *,
    ttft_p99_s: float = 1.31,
    tpot_p99_s: float = 0.0412,
    pp: int = 1,
    headroom: float = 0.343,
    attainment: Prediction | None = None,
) -> Candidate:
    return Candidate(
        gpu=gpu,
        tp=tp,
        pp=pp,
        replicas=replicas,
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        precision="fp8",
        kv_format="bf16",
        usd_per_hour=replicas * tp * pp * PRICES.get(gpu, 3.0),
        ttft_p50_s=predicted(ttft_p99_s * 0.22),
        ttft_p99_s=predicted(ttft_p99_s),
        tpot_p50_s=predicted(tpot_p99_s * 0.7, 0.09),
        tpot_p99_s=predicted(tpot_p99_s, 0.12),
        slo_attainment=attainment or share(0.9943, 0.981, 0.9991),
        utilisation=1.0 / (1.0 + headroom) if headroom > -1.0 else math.inf,
        utilisation_hi=1.2 / (1.0 + headroom),
        headroom=headroom,
        running_mean=31.4,
        calibrated=gpu != "b200_sxm",
    )


def trace(requests: int = 19_366, span_s: float = 3_502.0) -> Trace:
    """An hour of chat: a slowly changing rate, log-normal prompts, short outputs."""
    rng = np.random.default_rng(7)
    times = rng.uniform(0.0, span_s, 4 * requests)
    kept = rng.uniform(0.0, 1.0, times.size) < 0.5 * (1.0 + 0.5 * np.sin(times / span_s * 9.0))
    t_s = np.sort(times[kept][:requests])
    return Trace(
        name="azure-conv",
        t_s=t_s - t_s[0],
        n_in=np.clip(np.rint(rng.lognormal(6.9, 0.8, t_s.size)), 1, 14_000).astype(np.int64),
        n_out=np.clip(np.rint(rng.lognormal(5.1, 0.7, t_s.size)), 1, 1_000).astype(np.int64),
        notes=("3 requests without output tokens were dropped",),
    )


def workload() -> Workload:
    return workload_from_trace(trace())


def context() -> ReportContext:
    return ReportContext(
        model="Llama-3.1-70B-Instruct",
        engine="vLLM",
        engine_version="0.11.0",
        slos=(Slo(metric="ttft", percentile=99.0, limit_s=2.0), Slo(metric="tpot", percentile=99.0, limit_s=0.05)),
        profile="public-2025-10 (vllm 0.11.0)",
        servecast_version="0.1.0",
        date="2026-01-15",
        command="servecast plan --trace conv.csv.gz --model llama-3.1-70b --gpu h200=3.5 --gpu h100=2.8 --gpu b200=5.6 "
        "--gpu l40s=1.1 --slo ttft_p99=2s --slo tpot_p99=50ms --report out.html",
        seed=0,
        offers=(("h200_sxm", 3.5, None), ("h100_sxm", 2.8, 32), ("b200_sxm", 5.6, None), ("l40s", 1.1, 64)),
        files=("policy.json", "vllm.yaml"),
    )


def load_curve(rate_rps: float, saturation_rps: float, *, saturated: bool = False) -> tuple[LoadPoint, ...]:
    """Light load to just below saturation; with `saturated`, upper bounds there are infinite."""
    points = []
    for load in (0.05, 0.15, 0.3, 0.45, 0.6, rate_rps / saturation_rps, 0.8, 0.86, 0.91, 0.95, 0.98):
        ttft = 0.52 + 0.487 * load**3 / (1.0 - load)
        tpot = 0.0195 + 0.015 * load + 0.0087 * load**4 / (1.0 - load)
        attained = 1.0 / (1.0 + (ttft / 4.5) ** 4)
        point = LoadPoint(
            rate_rps=load * saturation_rps,
            ttft_p99_s=Prediction(value=ttft, lo=0.82 * ttft, hi=ttft * (1.2 + 0.5 * load**6)),
            tpot_p99_s=Prediction(value=tpot, lo=0.9 * tpot, hi=tpot * (1.1 + 0.2 * load**6)),
            slo_attainment=share(attained, 0.97 * attained, min(1.01 * attained, 1.0)),
        )
        if saturated and load > 0.85:
            point = replace(
                point,
                ttft_p99_s=replace(point.ttft_p99_s, hi=math.inf),
                tpot_p99_s=replace(point.tpot_p99_s, hi=math.inf),
            )
        points.append(point)
    if saturated:
        never = Prediction(value=math.inf, lo=3.0, hi=math.inf)
        points.append(replace(points[-1], rate_rps=saturation_rps, ttft_p99_s=never, tpot_p99_s=never))
    return tuple(points)


def feasible_plan() -> CapacityPlan:
    chosen = candidate()
    rate_rps = workload().rate_rps
    alternatives = (
        candidate("h200_sxm", 4, 3, ttft_p99_s=0.98, tpot_p99_s=0.0301),
        candidate("h100_sxm", 2, 6, ttft_p99_s=1.22, tpot_p99_s=0.0402, headroom=0.28),
        candidate("h200_sxm", 2, 5, ttft_p99_s=0.91, tpot_p99_s=0.0357, headroom=0.68),
        candidate("h100_sxm", 4, 4, ttft_p99_s=0.81, tpot_p99_s=0.0282, headroom=0.41),
        candidate("b200_sxm", 2, 4, ttft_p99_s=0.52, tpot_p99_s=0.0214, headroom=1.2),
        candidate("b200_sxm", 4, 3, ttft_p99_s=0.41, tpot_p99_s=0.0149, headroom=1.6),
        candidate("b200_sxm", 8, 2, ttft_p99_s=0.37, tpot_p99_s=0.0118, headroom=1.5),
        candidate("h200_sxm", 2, 3, ttft_p99_s=4.7, tpot_p99_s=0.0489, headroom=0.06),
        candidate("l40s", 4, 10, pp=2, ttft_p99_s=3.9, tpot_p99_s=0.0912, headroom=0.11),
        candidate("h200_sxm", 1, 6, ttft_p99_s=math.inf, tpot_p99_s=math.inf, headroom=-0.08),
        candidate("h100_sxm", 8, 3, ttft_p99_s=0.74, tpot_p99_s=0.0203, headroom=0.38),
        candidate("h100_sxm", 2, 8, ttft_p99_s=0.88, tpot_p99_s=0.0349, headroom=0.7),
    )
    return CapacityPlan(
        status=Status.OPTIMAL,
        plan=chosen,
        alternatives=(chosen, *alternatives),
        binds="TTFT p99 ≤ 2 s: 3 × H200 SXM (tp 2) would cost 21.00 USD/h but reaches 4.7 s.",
        gap=0.0,
        evaluated=2_184,
        load_curve=load_curve(rate_rps, rate_rps * (1.0 + chosen.headroom)),
        warnings=("b200_sxm has no kernel table of its own: its efficiencies are extrapolated",),
    )


def saturated_plan() -> CapacityPlan:
    """Interval ends, and points of the load curve, that are infinite."""
    plan = feasible_plan()
    chosen = candidate(headroom=0.3, ttft_p99_s=1.9)
    chosen = replace(
        chosen,
        ttft_p99_s=Prediction(value=1.9, lo=1.1, hi=math.inf, calibrated=False),
        tpot_p99_s=Prediction(value=0.0412, lo=0.036, hi=math.inf),
    )
    rate_rps = workload().rate_rps
    curve = load_curve(rate_rps, rate_rps * 1.3, saturated=True)
    return replace(
        plan,
        plan=chosen,
        alternatives=(chosen, *plan.alternatives[1:]),
        load_curve=tuple(sorted(curve, key=lambda point: point.rate_rps)),
    )


def infeasible_plan() -> CapacityPlan:
    reached = (
        candidate(
            "b200_sxm", 8, 2, ttft_p99_s=0.37, tpot_p99_s=0.0618, headroom=0.5, attainment=share(0.41, 0.3, 0.55)
        ),
        candidate("h200_sxm", 8, 4, ttft_p99_s=0.61, tpot_p99_s=0.0894, headroom=0.4, attainment=share(0.12, 0.1, 0.2)),
        candidate("l40s", 8, 8, ttft_p99_s=math.inf, tpot_p99_s=math.inf, headroom=-0.3, attainment=share(0, 0, 0)),
    )
    return CapacityPlan(
        status=Status.INFEASIBLE,
        plan=None,
        alternatives=reached,
        binds="TPOT p99 ≤ 50 ms: the weights alone take 58 ms to read on the fastest configuration offered.",
        gap=0.0,
        evaluated=2_184,
        load_curve=(),
        warnings=(),
    )


def impossible_plan() -> CapacityPlan:
    """Not even one configuration holds the model."""
    return replace(infeasible_plan(), alternatives=(), binds="The weights (141 GB) do not fit any offered GPU group.")

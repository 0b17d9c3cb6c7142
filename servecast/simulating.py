"""The simulation query from Python: a trace on a named fleet, request by request, as records, JSON and a table.

The closed forms of :mod:`servecast.planning` answer for a workload's statistics; here the trace itself is replayed
through :mod:`servecast.validation.simulator`, with the same step times and the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.arrivals import settled_stamps
from servecast.model.batch_steps import StepTimes, tabulated_steps
from servecast.model.deployment import Deployment, divisibility_error
from servecast.model.hardware import Gpu
from servecast.model.llm import Llm
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.request_rows import RequestRows
from servecast.model.slo import Slo
from servecast.model.workload import Trace
from servecast.readers.deployments import serving_formats
from servecast.validation.ensemble import Backend, Spread, member_seeds, resampled, run_ensemble, spread
from servecast.validation.metrics import Summary, latencies, summary
from servecast.validation.simulator import ROUTERS, EngineLimits, Router, simulate

SCHEMA = "servecast.simulation/1"
"""Name and major version of the JSON that a simulation is printed as."""
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A trace and what serves it, ready to run."""

    trace: Trace
    """As simulated: stamps spread and scaled."""
    deployment: Deployment
    """Of one replica."""
    engine: str
    engine_version: str
    profile: str
    steps: StepTimes
    limits: EngineLimits
    replicas: int
    router: Router
    rate_scale: float
    seed: int
    slos: tuple[Slo, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """One run of a fleet."""

    fleet: Fleet
    rows: RequestRows
    summary: Summary

    @property
    def limits(self) -> EngineLimits:
        """Of each replica."""
        return self.fleet.limits

    @property
    def deployment(self) -> Deployment:
        """One replica."""
        return self.fleet.deployment

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was changed, and what is served that a real engine would not serve."""
        return self.fleet.warnings


def simulate_fleet(
    trace: Trace,
    llm: Llm,
    gpu: Gpu,
    *,
    replicas: int,
    tp: int = 1,
    pp: int = 1,
    engine: str = "vllm",
    precision: str = "auto",
    kv_precision: str = "auto",
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    router: Router = "round_robin",
    prefix_caching: bool | None = None,
    rate_scale: float = 1.0,
    seed: int = 1,
    slos: Sequence[Slo] = (),
    profile: str = SHIPPED,
    progress: Report | None = None,
) -> Simulated:
    """Serve every request of `trace` by `replicas` engines behind one router.

    Parameters
    ----------
    trace : requests; stamps that were rounded to a grid are spread over it, as in a plan.
    replicas, tp, pp : engine instances, and the GPUs of each.
    engine : ``vllm``, ``sglang`` or ``trtllm``, optionally ``@version``: step times and memory rule; the scheduler is
        vLLM's for all.
    precision, kv_precision : weight and cache formats; ``auto`` keeps the checkpoint's.
    router : ``round_robin``, ``least_loaded`` or ``random``.
    prefix_caching : None: where the trace has prefix blocks.
    rate_scale : play the trace this many times as fast. [-]
    seed : of the random router; nothing else is drawn.
    slos : limits to count requests against.
    profile : a shipped profile or the path of one.
    progress : called with (requests routed, requests) now and then.

    Raises
    ------
    ValueError : a malformed request, or weights that do not fit on the GPU.
    """
    fleet = prepare_fleet(
        trace,
        llm,
        gpu,
        replicas=replicas,
        tp=tp,
        pp=pp,
        engine=engine,
        precision=precision,
        kv_precision=kv_precision,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        router=router,
        prefix_caching=prefix_caching,
        rate_scale=rate_scale,
        seed=seed,
        slos=slos,
        profile=profile,
    )
    rows = _run(fleet, fleet.trace, fleet.seed, progress)
    return Simulated(fleet=fleet, rows=rows, summary=summary(rows, fleet.slos))


def prepare_fleet(
    trace: Trace,
    llm: Llm,
    gpu: Gpu,
    *,
    replicas: int,
    tp: int = 1,
    pp: int = 1,
    engine: str = "vllm",
    precision: str = "auto",
    kv_precision: str = "auto",
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    router: Router = "round_robin",
    prefix_caching: bool | None = None,
    rate_scale: float = 1.0,
    seed: int = 1,
    slos: Sequence[Slo] = (),
    profile: str = SHIPPED,
) -> Fleet:
    """What `simulate_fleet` runs, with the same arguments."""
    from servecast.policies import parse_engine

    name, version = parse_engine(engine)
    _check(trace, replicas=replicas, tp=tp, pp=pp, router=router, rate_scale=rate_scale, seed=seed)
    caching = trace.prefix_blocks is not None if prefix_caching is None else prefix_caching
    if caching and trace.prefix_blocks is None:
        raise ValueError(f"prefix_caching must be off for a trace without prefix blocks, got {trace.name!r} without")
    trunk, experts, cache = serving_formats(
        llm, name, precision, kv_precision, compute_capability=gpu.compute_capability
    )
    uneven = divisibility_error(llm, tp, pp)
    if uneven is not None:
        raise ValueError(uneven)
    deployment = Deployment(llm=llm, gpu=gpu, trunk_format=trunk, expert_format=experts, kv_format=cache, tp=tp, pp=pp)
    limits = EngineLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_tokens=_kv_tokens(deployment, name, max_num_batched_tokens, max_num_seqs),
        enable_prefix_caching=caching,
    )
    stamps, changed = settled_stamps(trace.t_s)
    loaded = load_profile(profile)
    steps = tabulated_steps(
        loaded,
        deployment,
        name,
        max_batch=min(max_num_seqs, len(stamps)),
        longest=float((trace.n_in + trace.n_out).max()),
        chunk_tokens=float(max_num_batched_tokens),
    )
    return Fleet(
        trace=replace(trace, t_s=stamps / rate_scale),
        deployment=deployment,
        engine=name,
        engine_version=version,
        profile=loaded.name,
        steps=steps,
        limits=limits,
        replicas=replicas,
        router=router,
        rate_scale=rate_scale,
        seed=seed,
        slos=tuple(slos),
        warnings=(*((changed,) if changed else ()), *_too_long(trace, limits, llm)),
    )


def _check(trace: Trace, *, replicas: int, tp: int, pp: int, router: str, rate_scale: float, seed: int) -> None:
    """Refuse what the records below do not."""
    if not len(trace.t_s):
        raise ValueError("trace must hold at least 1 request, got 0")
    for name, value in (("replicas", replicas), ("tp", tp), ("pp", pp)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if router not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
    if not 0.0 < rate_scale < math.inf:
        raise ValueError(f"rate_scale must be positive and finite, got {rate_scale}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")


def _kv_tokens(deployment: Deployment, engine: str, max_num_batched_tokens: int, max_num_seqs: int) -> float:
    """Capacity of one replica's KV cache. [tokens]"""
    budget = memory_budget(
        deployment, MEMORY_RULES[engine], max_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
    )
    if budget.kv_bytes <= 0.0:
        raise ValueError(
            f"{deployment.llm.name} does not fit on {deployment.gpu.name} at tp {deployment.tp}, pp {deployment.pp}: "
            f"{budget.weight_bytes / 1e9:.1f} GB of weights and {budget.overhead_bytes / 1e9:.1f} GB of workspace per "
            f"GPU leave no room for a cache in {budget.device_bytes / 1e9:.0f} GB"
        )
    return budget.kv_tokens


def _too_long(trace: Trace, limits: EngineLimits, llm: Llm) -> tuple[str, ...]:
    """Requests that an engine with these limits would answer with an error; numbers count from 0."""
    total = trace.n_in + trace.n_out
    # the last token is never fed back
    capacity = limits.blocks * limits.block_size
    found = [_named(trace, total - 1 > capacity, f"the KV cache of {capacity} tokens", "refused")]
    if llm.max_context:
        longer = (total > llm.max_context) & (total - 1 <= capacity)
        found.append(
            _named(trace, longer, f"the context of {llm.max_context} tokens of {llm.name}", "served all the same")
        )
    return tuple(word for word in found if word)


def _named(trace: Trace, which: NDArray[np.bool_], limit: str, fate: str) -> str:
    if not which.any():
        return ""
    first = int(which.argmax())
    return (
        f"{int(which.sum())} of {which.size} requests are longer than {limit} and {fate}; the first is request {first} "
        f"with {trace.n_in[first]} prompt and {trace.n_out[first]} output tokens"
    )


def _run(fleet: Fleet, trace: Trace, seed: int, progress: Report | None) -> RequestRows:
    return simulate(
        trace,
        fleet.steps,
        fleet.limits,
        replicas=fleet.replicas,
        router=fleet.router,
        seed=seed,
        progress=progress,
    )


# ---- ensembles ---------------------------------------------------------------------------------------


def simulate_ensemble(
    fleet: Fleet,
    members: int,
    *,
    backend: Backend = "processes",
    jobs: int = -1,
    progress: Report | None = None,
) -> dict[str, Spread]:
    """Median and 5 to 95 % of every figure over resampled traces (:func:`servecast.validation.ensemble.resampled`).

    The seeds are children of the fleet's: neither `backend` nor `jobs` changes a number.
    """
    results = run_ensemble(
        _Member(fleet), member_seeds(fleet.seed, members), backend=backend, jobs=jobs, progress=progress
    )
    return {name: spread([one[name] for one in results]) for name in results[0]}


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """One member's work; a record and not a closure, so that it travels to other processes."""

    fleet: Fleet

    def __call__(self, seed: np.random.SeedSequence) -> dict[str, float]:
        lengths, routing = seed.spawn(2)
        trace = resampled(self.fleet.trace, np.random.default_rng(lengths))
        rows = _run(self.fleet, trace, int(routing.generate_state(1)[0]), None)
        return figures(summary(rows, self.fleet.slos))


# ---- what is printed and written ---------------------------------------------------------------------


def figures(found: Summary) -> dict[str, float]:
    """Every figure of a run under one flat name with its unit."""
    flat = {name: float(getattr(found, name)) for name in _COUNTS}
    for metric, mean in found.mean.items():
        flat[f"{metric}_mean_s"] = mean
        flat |= {f"{metric}_p{p:g}_s": value for p, value in found.percentiles[metric].items()}
    if found.attainment:
        flat |= {"slo_attainment": found.slo_attainment, "goodput_rps": found.goodput_rps}
        flat |= {f"attainment.{name}": share for name, share in found.attainment.items()}
    return flat


_COUNTS = (
    "requests",
    "refused",
    "preemptions",
    "cached_share",
    "makespan_s",
    "throughput_rps",
    "output_tokens_per_s",
)


def result_document(
    simulated: Simulated, *, ensemble: Mapping[str, Spread] | None = None, members: int = 0, wall_s: float | None = None
) -> dict[str, Any]:
    """The run as the documented JSON object (docs/json.md); seconds, tokens, shares."""
    fleet, found = simulated.fleet, simulated.summary
    one, limits = fleet.deployment, fleet.limits
    return {
        "schema": SCHEMA,
        "model": one.llm.name,
        "gpu": one.gpu.name,
        "engine": f"{fleet.engine}@{fleet.engine_version}",
        "tp": one.tp,
        "pp": one.pp,
        "replicas": fleet.replicas,
        "gpus": fleet.replicas * one.tp * one.pp,
        "precision": one.trunk_format,
        "kv_precision": one.kv_format,
        "router": fleet.router,
        "seed": fleet.seed,
        "rate_scale": fleet.rate_scale,
        "trace": fleet.trace.name,
        "limits": {
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "block_size": limits.block_size,
            "enable_prefix_caching": limits.enable_prefix_caching,
        },
        "kv_tokens": limits.blocks * limits.block_size,
        "metrics": {
            **{name: getattr(found, name) for name in _COUNTS},
            **{
                metric: {
                    "mean_s": found.mean[metric],
                    **{f"p{p:g}_s": value for p, value in found.percentiles[metric].items()},
                }
                for metric in found.mean
            },
            "slo_attainment": found.slo_attainment,
            "goodput_rps": found.goodput_rps,
            "attainment": dict(found.attainment),
        },
        "slo": [{"name": slo.name, "limit_s": slo.limit_s} for slo in fleet.slos],
        "ensemble": None
        if ensemble is None
        else {
            "members": members,
            "metrics": {
                name: {"median": value.median, "lo": value.lo, "hi": value.hi} for name, value in ensemble.items()
            },
        },
        "warnings": [*fleet.trace.notes, *fleet.warnings],
        "profile": fleet.profile,
        "wall_s": wall_s,
    }


def rows_table(rows: RequestRows) -> dict[str, NDArray[Any]]:
    """Columns of one row per request, in order of arrival; NaN where a request has no such time. [s]"""
    return {
        "request": np.arange(rows.arrival_s.size),
        "arrival_s": rows.arrival_s,
        "scheduled_s": rows.scheduled_s,
        "first_token_s": rows.first_token_s,
        "last_token_s": rows.last_token_s,
        **{f"{metric}_s": latencies(rows, metric) for metric in ("ttft", "tpot", "e2e")},
        "n_in": rows.n_in,
        "n_out": rows.n_out,
        "replica": rows.replica,
        "preemptions": rows.preemptions,
        "cached_tokens": rows.cached_tokens,
        "status": np.where(rows.refused, "refused", "ok"),
    }

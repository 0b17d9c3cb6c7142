"""Fit of the engines' constants to measured TTFT and TPOT, pooled over engines.

Every constant is a global value times a deviation of the engine times a deviation of mixture-of-experts models, each
with a prior in its logarithm (maximum a posteriori; Cauchy tails for runs and priors alike): an engine with few dense
runs leans on the others instead of on noise. Prior centres come from independent sources (BLIS: 32 us per layer, 126 us
per step; a first-come scheduler serves few bursts, a prefill-first one such as SGLang's keeps equal requests in step)
or are neutral.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from servecast.model.engine import EngineConstants, closed_loop, decode_seconds, prefill_seconds
from servecast.model.forecast import Passes
from servecast.model.formats import ENGINES

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

TPOT_SCALE, TTFT_SCALE = 0.08, 0.12
"""Log-residual that counts as one unit: TTFT depends on the load generator and weighs less."""
CAUCHY_SCALE = 1.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """Centre, and widths in log units of the global value, the engine's deviation and that of MoE models."""

    centre: float
    width: float
    engine: float
    moe: float


POOLED: dict[str, Prior] = {
    "layer_gap_s": Prior(centre=32e-6, width=0.3, engine=0.3, moe=0.4),
    "sequence_s": Prior(centre=10e-6, width=0.7, engine=0.7, moe=0.7),
    "prefill_factor": Prior(centre=0.95, width=0.15, engine=0.1, moe=1.0),
    "prefill_layer_gap_s": Prior(centre=60e-6, width=0.3, engine=0.36, moe=0.9),
    "prefill_passes": Prior(centre=2.0, width=0.4, engine=0.4, moe=0.5),
    "burst_share": Prior(centre=0.2, width=0.5, engine=0.6, moe=0.6),
    "first_token_s": Prior(centre=0.03, width=0.4, engine=0.8, moe=0.6),
}
SHARED: dict[str, Prior] = {
    "moe_layer_gap_s": Prior(centre=30e-6, width=0.7, engine=0.0, moe=0.0),
    "expert_bandwidth_efficiency": Prior(centre=0.6, width=0.4, engine=0.0, moe=0.0),
    "expert_bandwidth_efficiency_unmeasured": Prior(centre=0.6, width=0.4, engine=0.0, moe=0.0),
    "expert_compute_efficiency": Prior(centre=0.4, width=0.7, engine=0.0, moe=0.0),
    "kernel_factor": Prior(centre=1.0, width=0.2, engine=0.0, moe=0.0),
    "step_s": Prior(centre=1.3e-4, width=0.7, engine=0.0, moe=0.0),
    "expert_prefill_factor": Prior(centre=1.0, width=0.3, engine=0.0, moe=0.0),
    "replica_coupling": Prior(centre=0.3, width=0.7, engine=0.0, moe=0.0),
}
ENGINE_CENTRE: dict[tuple[str, str], float] = {("burst_share", "sglang"): 2.0}
"""Where an engine's scheduler is known to differ, the centre of its deviation."""
LARGEST: dict[str, float] = {
    "expert_bandwidth_efficiency": 1.0,
    "expert_bandwidth_efficiency_unmeasured": 1.0,
    "expert_compute_efficiency": 0.9,
    "expert_prefill_factor": 3.0,
}
SMALLEST: dict[str, float] = {"expert_prefill_factor": 0.7, "prefill_factor": 0.8}
"""Physics bounds a few constants: no kernel beats the datasheet, whatever would fit."""
DEVIATION_BOUNDS: dict[str, tuple[float, float]] = {"prefill_factor": (0.8, 1.25), "prefill_factor/moe": (0.8, 3.0)}


def _layout() -> tuple[list[str], Floats, Floats]:
    """Names, prior centres (log) and widths of the parameter vector."""
    names: list[str] = []
    centre: list[float] = []
    width: list[float] = []
    for name, prior in POOLED.items():
        names.append(name)
        centre.append(np.log(prior.centre))
        width.append(prior.width)
        for engine in ENGINES:
            names += [f"{name}/{engine}", f"{name}/{engine}/moe"]
            centre += [np.log(ENGINE_CENTRE.get((name, engine), 1.0)), 0.0]
            width += [prior.engine, prior.moe]
    for name, prior in SHARED.items():
        names.append(name)
        centre.append(np.log(prior.centre))
        width.append(prior.width)
    return names, np.array(centre), np.array(width)


def _bounds(names: list[str]) -> tuple[Floats, Floats]:
    """Box of the parameter vector, log units."""
    low, high = np.full(len(names), -np.inf), np.full(len(names), np.inf)
    for position, name in enumerate(names):
        pooled, *deviation = name.split("/")
        if deviation:
            key = f"{pooled}/moe" if deviation[-1] == "moe" else pooled
            least, most = DEVIATION_BOUNDS.get(key, (0.0, np.inf))
        else:
            least, most = SMALLEST.get(name, 0.0), LARGEST.get(name, np.inf)
        low[position] = np.log(least) if least > 0.0 else -np.inf
        high[position] = np.log(most)
    return low, high


NAMES, CENTRE, WIDTH = _layout()
LOW, HIGH = _bounds(NAMES)
_AT = {name: position for position, name in enumerate(NAMES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Measured closed-loop runs with their kernel sums; arrays over runs."""

    passes: Passes
    engine: NDArray[np.intp]
    """Index into ENGINES."""
    moe: Mask
    measured: Mask
    """Kernels of this GPU type were measured."""
    clients: Floats
    osl: Floats
    ttft_s: Floats
    tpot_s: Floats
    weight: Floats
    """Relative weight; rows of a large group are near copies."""

    def take(self, rows: NDArray[np.intp]) -> Runs:
        return Runs(
            passes=_take_passes(self.passes, rows),
            **{
                name: getattr(self, name)[rows]
                for name in ("engine", "moe", "measured", "clients", "osl", "ttft_s", "tpot_s", "weight")
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFit:
    """Posterior mode in log units, its standard errors, and the residuals of the fit."""

    theta: Floats
    covariance: Floats
    """Of `theta`, at the mode: the relative covariance of the constants' factors."""
    n: int
    log_residual_ttft: Floats
    log_residual_tpot: Floats


def constants(theta: Floats, engine: NDArray[np.intp], moe: Mask, measured: Mask) -> EngineConstants:
    """Constants of points by engine index, model class and whether their kernels were measured."""

    def pooled(name: str) -> Floats:
        deviation = np.array([theta[_AT[f"{name}/{one}"]] for one in ENGINES])[engine]
        of_moe = np.array([theta[_AT[f"{name}/{one}/moe"]] for one in ENGINES])[engine]
        return np.asarray(np.exp(theta[_AT[name]] + deviation + np.where(moe, of_moe, 0.0)), dtype=np.float64)

    def shared(name: str) -> float:
        return float(np.exp(theta[_AT[name]]))

    return EngineConstants(
        **{name: pooled(name) for name in POOLED},
        moe_layer_gap_s=np.full(len(engine), shared("moe_layer_gap_s")),
        step_s=np.full(len(engine), shared("step_s")),
        kernel_factor=np.where(measured, 1.0, shared("kernel_factor")),
        expert_prefill_factor=np.full(len(engine), shared("expert_prefill_factor")),
        expert_bandwidth_efficiency=np.where(
            measured, shared("expert_bandwidth_efficiency"), shared("expert_bandwidth_efficiency_unmeasured")
        ),
        expert_compute_efficiency=np.full(len(engine), shared("expert_compute_efficiency")),
        replica_coupling=np.full(len(engine), shared("replica_coupling")),
    )


def relative_error(fit: EngineFit, name: str, engine: str, *, moe: bool, measured: bool) -> float:
    """Standard error of the logarithm of one constant, that is its relative error."""
    if name in POOLED:
        parts = [name, f"{name}/{engine}"] + ([f"{name}/{engine}/moe"] if moe else [])
    elif name == "expert_bandwidth_efficiency" and not measured:
        parts = [f"{name}_unmeasured"]
    elif name == "kernel_factor" and measured:
        return 0.0  # not fitted
    else:
        parts = [name]
    at = [_AT[part] for part in parts]
    return float(np.sqrt(fit.covariance[np.ix_(at, at)].sum()))


def predict(theta: Floats, runs: Runs) -> tuple[Floats, Floats]:
    """Mean TTFT and TPOT of the runs, by the model's own functions. [s], [s]"""
    k = constants(theta, runs.engine, runs.moe, runs.measured)
    d, passes = runs.passes.stacked, runs.passes
    decode = decode_seconds(passes.decode, k, d.layers, d.moe_layers, passes.batch)
    prefill = prefill_seconds(passes.prefill, k, d.layers)
    return closed_loop(decode, prefill, k, batch=passes.batch, clients=runs.clients, replicas=d.dp, osl=runs.osl)


def fit_engine(runs: Runs) -> EngineFit:
    """Posterior mode from the prior centres; about 0.5 s for 2,000 runs."""
    log_ttft, log_tpot = np.log(runs.ttft_s), np.log(runs.tpot_s)

    def residuals(theta: Floats) -> Floats:
        ttft, tpot = predict(theta, runs)
        data = [(np.log(tpot) - log_tpot) / TPOT_SCALE, (np.log(ttft) - log_ttft) / TTFT_SCALE]
        return np.concatenate([runs.weight * part for part in data] + [(theta - CENTRE) / WIDTH])

    start = np.clip(CENTRE, LOW + 1e-3, HIGH - 1e-3)
    solution = least_squares(residuals, start, bounds=(LOW, HIGH), loss="cauchy", f_scale=CAUCHY_SCALE)
    # curvature of the posterior at its mode; the prior's rows keep it invertible
    jacobian = np.asarray(solution.jac, dtype=np.float64)
    covariance = np.asarray(np.linalg.inv(jacobian.T @ jacobian), dtype=np.float64)
    ttft, tpot = predict(solution.x, runs)
    return EngineFit(
        theta=solution.x,
        covariance=covariance,
        n=len(runs.tpot_s),
        log_residual_ttft=np.log(runs.ttft_s / ttft),
        log_residual_tpot=np.log(runs.tpot_s / tpot),
    )


def _take_passes(passes: Passes, rows: NDArray[np.intp]) -> Passes:
    return Passes(
        stacked=passes.stacked.rows(rows),
        decode=passes.decode.take(rows),
        prefill=passes.prefill.take(rows),
        batch=passes.batch[rows],
        kv_tokens=passes.kv_tokens[rows],
    )

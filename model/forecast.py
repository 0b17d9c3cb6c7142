"""A profile in memory, and what it predicts for many operating points at once.

An operating point is one engine instance (a :class:`Deployment`) under a closed loop of `clients` per attention replica
with prompts of `isl` and outputs of `osl` tokens. Points are evaluated as arrays: a table of 100,000 rows is one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.deployment import Deployment, Deployments, stack
from servecast.model.engine import EngineConstants, closed_loop, decode_seconds, prefill_seconds
from servecast.model.hardware import Gpu
from servecast.model.memory import MEMORY_RULES, memory_budget, running_batch
from servecast.model.step_time import KernelSet, PassTerms, decode_pass, prefill_pass

Floats = NDArray[np.float64]

CHUNK_TOKENS = 8192.0
"""Tokens of one prefill step: the default of all three engines on data-centre GPUs."""

Metric = Literal["ttft", "tpot"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot")
Novelty = Literal["group", "gpu", "model"]
NOVELTY: tuple[Novelty, ...] = ("group", "gpu", "model")
"""How far a point is from the fitted runs: another width of a known pair, an unseen GPU type, an unseen model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """5 % and 95 % quantiles of log(measured / predicted) on runs that were held out."""

    lo: float
    hi: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Calibrated truth of one source: kernels by GPU, constants by engine, error bands by novelty."""

    name: str
    kernels: tuple[KernelSet, ...]
    """The last one is the closed form that serves every GPU without a table."""
    constants: Mapping[tuple[str, bool, bool], EngineConstants]
    """By (engine, mixture of experts, kernels taken as they are)."""
    bands: Mapping[tuple[Metric, bool, Novelty], Band]
    """By (metric, mixture of experts, novelty)."""
    known_gpus: frozenset[tuple[str, bool]]
    """(GPU type, mixture of experts) pairs with enough end-to-end runs in the fit."""
    fitted_generations: frozenset[int]
    """Generations (compute capability / 10) without a kernel table whose kernels the fit has scaled by
    end-to-end runs."""
    known_models: frozenset[str]
    ranges: Mapping[str, tuple[float, float]]
    """Smallest and largest fitted value of clients, isl, osl, gpus, params_active."""

    def kernel_set(self, gpu: Gpu) -> int:
        """Index into `kernels`: the GPU's own, its generation's, or the closed form."""
        names = [kset.name for kset in self.kernels]
        if gpu.name in names:
            return names.index(gpu.name)
        # another Hopper part runs the same kernels; the table of the nearer bandwidth, scaled by its own datasheet
        sibling = "h200_sxm" if gpu.bandwidth_bytes_per_s > 4.0e12 else "h100_sxm"
        if gpu.compute_capability == 90 and sibling in names:
            return names.index(sibling)
        return len(names) - 1

    def plain_kernels(self, gpu: Gpu) -> bool:
        """The kernels stand as they are: measured, or a closed form that no run of this generation has scaled."""
        measured = self.kernels[self.kernel_set(gpu)].measured
        return measured or (gpu.compute_capability or 0) // 10 not in self.fitted_generations


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Operating points: point i runs ``deployments[index[i]]`` on ``engines[index[i]]``."""

    deployments: tuple[Deployment, ...]
    engines: tuple[str, ...]
    index: NDArray[np.intp]
    clients: Floats
    """In flight on one attention replica."""
    isl: Floats
    osl: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Arrays over points. [s]"""

    ttft_s: Floats
    tpot_s: Floats
    decode_s: Floats
    prefill_s: Floats
    batch: Floats
    """Sequences that run at once on one attention replica, <= clients."""
    kv_tokens: Floats
    """0 where the weights do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Kernel sums of points: all that a fit of the engine's constants needs."""

    stacked: Deployments
    decode: PassTerms
    prefill: PassTerms
    batch: Floats
    kv_tokens: Floats


def forecast(profile: Profile, points: Points) -> Forecast:
    """Mean TTFT and TPOT of every point; NaN where the weights do not fit. [s]"""
    passes = kernel_passes(profile.kernels, [profile.kernel_set(one.gpu) for one in points.deployments], points)
    k = point_constants(profile, points)
    d = passes.stacked
    decode = decode_seconds(passes.decode, k, d.layers, d.moe_layers, passes.batch)
    prefill = prefill_seconds(passes.prefill, k, d.layers)
    ttft, tpot = closed_loop(
        decode, prefill, k, batch=passes.batch, clients=points.clients, replicas=d.dp, osl=points.osl
    )
    fits = passes.kv_tokens >= points.isl + 1.0
    return Forecast(
        ttft_s=np.where(fits, ttft, np.nan),
        tpot_s=np.where(fits, tpot, np.nan),
        decode_s=decode,
        prefill_s=prefill,
        batch=passes.batch,
        kv_tokens=passes.kv_tokens,
    )


def kernel_passes(kernels: tuple[KernelSet, ...], kernel_sets: Sequence[int], points: Points) -> Passes:
    """Admission by memory, then the kernel sums of one decode step and of one prompt."""
    rules = [MEMORY_RULES[engine] for engine in points.engines]
    budgets = [memory_budget(one, rule) for one, rule in zip(points.deployments, rules, strict=True)]
    kv_tokens = np.array([budget.kv_tokens for budget in budgets])[points.index]
    full = np.array([rule.full_length for rule in rules])[points.index]
    batch = running_batch(kv_tokens, points.isl, points.osl, points.clients, full_length=full)
    stacked = stack(points.deployments, kernel_sets, points.index)
    # with pipeline stages a token passes all stages, each holding its share of the batch
    decode = decode_pass(stacked, kernels, np.maximum(batch / stacked.pp, 1.0), points.isl + points.osl / 2.0)
    prefill = prefill_pass(stacked, kernels, points.isl, chunk_tokens=CHUNK_TOKENS)
    return Passes(stacked=stacked, decode=decode, prefill=prefill, batch=batch, kv_tokens=kv_tokens)


def point_constants(profile: Profile, points: Points) -> EngineConstants:
    """Constants of every point, gathered from the profile."""
    keys = [
        (engine, one.llm.is_moe, profile.plain_kernels(one.gpu))
        for one, engine in zip(points.deployments, points.engines, strict=True)
    ]
    return EngineConstants(
        **{
            field.name: np.array([getattr(profile.constants[key], field.name) for key in keys])[points.index]
            for field in fields(EngineConstants)
        }
    )


def novelties(profile: Profile, one: Deployment) -> tuple[Novelty, ...]:
    """Which held-out experiences a deployment's error band comes from; an unseen GPU and an unseen model are two."""
    found: list[Novelty] = []
    if (one.gpu.name, one.llm.is_moe) not in profile.known_gpus:
        found.append("gpu")
    if one.llm.name not in profile.known_models:
        found.append("model")
    return tuple(found) or ("group",)


def error_band(profile: Profile, one: Deployment, metric: Metric) -> tuple[float, float]:
    """Ends of log(measured / predicted) for a deployment: the widest of its novelties, 0 inside. [-]"""
    bands = [profile.bands[metric, one.llm.is_moe, novelty] for novelty in novelties(profile, one)]
    # an interval holds its own prediction, whatever the bias of the runs it was taken from
    return min(0.0, *(band.lo for band in bands)), max(0.0, *(band.hi for band in bands))


def bounds(profile: Profile, points: Points, metric: Metric, value: ArrayLike) -> tuple[Floats, Floats]:
    """90 % interval of `metric` around `value`. [s], [s]"""
    bands = np.array([error_band(profile, one, metric) for one in points.deployments])[points.index]
    value = np.asarray(value, dtype=np.float64)
    return value * np.exp(bands[:, 0]), value * np.exp(bands[:, 1])

r"""What one engine instance can do with a workload: step times by batch, prefill times by prompt length, completion
rates.

With B requests in service each of them needs m output tokens and one prefill, and the engine works for all in turn, so
B complete in one cycle of :math:`m\,t_{dec}(B) + B\,E[t_{pre}]` (:mod:`servecast.model.engine`):

.. math:: \mu_B = B / (m\,t_{dec}(B) + B\,E[t_{pre}])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.deployment import Deployment, Deployments, stack
from servecast.model.engine import EngineConstants, decode_seconds, prefill_seconds
from servecast.model.forecast import CHUNK_TOKENS, Points, Profile, point_constants
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.step_time import decode_pass, prefill_pass
from servecast.model.workload import Workload

Floats = NDArray[np.float64]

BATCH_GRID = np.array([1.0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512])
"""Batches at which the decode step is evaluated; between them it is linear to 2 %."""
LENGTH_SHARES = np.array([0.1] * 9 + [0.05, 0.03, 0.01, 0.005, 0.005])
"""Requests per length node, by rising length: the tail is resolved, because p99 lives there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthNodes:
    """Means of consecutive quantile classes of a length, and the share of requests in each."""

    tokens: Floats
    share: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceCurves:
    """One row per deployment. [s] unless stated"""

    decode_s: Floats
    """[deployment, B - 1]: one decode step with B running at the workload's mean context."""
    prefill_s: Floats
    """[deployment, length node]: one prompt alone."""
    prefill_mean_s: Floats
    prefill_m2_s2: Floats
    """Second moment of a prompt's prefill time. [s^2]"""
    prefill_m3_s3: Floats
    """Third moment. [s^3]"""
    full_chunk_s: Floats
    """A chunk of the largest size alone: what prompts can add to one step."""
    completion_rps: Floats
    """[deployment, B - 1]: mu_B. [1/s]"""
    kv_batch: NDArray[np.int64]
    """Sequences of mean residence context that the KV cache holds; 0 where the weights do not fit."""
    first_token_s: Floats
    """Per request before and after the forward passes of the prompt."""
    inputs: LengthNodes
    outputs: LengthNodes


def length_nodes(tokens: ArrayLike) -> LengthNodes:
    """Quantile classes of a sample of lengths."""
    ordered = np.sort(np.asarray(tokens, dtype=np.float64))
    edges = np.round(np.concatenate([[0.0], np.cumsum(LENGTH_SHARES)]) * len(ordered)).astype(np.intp)
    kept = np.flatnonzero(np.diff(edges) > 0)
    sums = np.add.reduceat(ordered, edges[kept])
    counts = np.diff(np.append(edges[kept], len(ordered)))
    return LengthNodes(tokens=sums / counts, share=counts / len(ordered))


def service_curves(
    profile: Profile, deployments: Sequence[Deployment], engine: str, workload: Workload, *, max_batch: int = 256
) -> ServiceCurves:
    """Curves of every deployment for one workload; vectorised over deployments, batches and lengths."""
    inputs, outputs = length_nodes(workload.n_in), length_nodes(workload.n_out)
    rule = MEMORY_RULES[engine]
    kv_tokens = np.array([memory_budget(one, rule).kv_tokens for one in deployments])
    # an engine that reserves a sequence's whole length holds it for the request's whole stay
    reserved = float((workload.n_out * workload.n_out).mean() / workload.mean_out / 2.0) if rule.full_length else 0.0
    kv_batch = np.floor(kv_tokens / (workload.mean_context + reserved)).astype(np.int64)
    kv_batch[kv_tokens < float(inputs.tokens[-1])] = 0
    grid = BATCH_GRID[: max(int(np.searchsorted(BATCH_GRID, max_batch)) + 1, 2)]
    lengths = np.append(inputs.tokens, CHUNK_TOKENS)
    decode, prompts, first_token = _times(profile, deployments, engine, grid, lengths, workload.mean_context)
    prefill, chunk = prompts[:, :-1], prompts[:, -1]
    batches = np.arange(1.0, max_batch + 1.0)
    at = np.clip(np.searchsorted(grid, batches, side="right") - 1, 0, len(grid) - 2)
    right = (batches - grid[at]) / (grid[at + 1] - grid[at])
    decode_s = decode[:, at] * (1.0 - right) + decode[:, at + 1] * right
    mean = (prefill * inputs.share).sum(axis=1)
    return ServiceCurves(
        decode_s=decode_s,
        prefill_s=prefill,
        prefill_mean_s=mean,
        prefill_m2_s2=(prefill**2 * inputs.share).sum(axis=1),
        prefill_m3_s3=(prefill**3 * inputs.share).sum(axis=1),
        full_chunk_s=chunk,
        completion_rps=batches / (workload.mean_out * decode_s + batches * mean[:, np.newaxis]),
        kv_batch=kv_batch,
        first_token_s=first_token,
        inputs=inputs,
        outputs=outputs,
    )


def slowed(curves: ServiceCurves, rows: NDArray[np.intp], factor: Floats) -> ServiceCurves:
    """The engines at `rows` with every step `factor` times as long; one factor per row."""
    column = factor[:, np.newaxis]
    return ServiceCurves(
        decode_s=curves.decode_s[rows] * column,
        prefill_s=curves.prefill_s[rows] * column,
        prefill_mean_s=curves.prefill_mean_s[rows] * factor,
        prefill_m2_s2=curves.prefill_m2_s2[rows] * factor**2,
        prefill_m3_s3=curves.prefill_m3_s3[rows] * factor**3,
        full_chunk_s=curves.full_chunk_s[rows] * factor,
        completion_rps=curves.completion_rps[rows] / column,
        kv_batch=curves.kv_batch[rows],
        first_token_s=curves.first_token_s[rows] * factor,
        inputs=curves.inputs,
        outputs=curves.outputs,
    )


def step_seconds(
    profile: Profile,
    deployment: Deployment,
    engine: str,
    batches: Floats,
    contexts: Floats,
    lengths: Floats,
    chunk_tokens: float = CHUNK_TOKENS,
) -> tuple[Floats, Floats, float]:
    """Decode steps [batch, context], prompts alone [length] and the first token's extra, of one deployment. [s]"""
    batch, context = (x.ravel() for x in np.meshgrid(batches, contexts, indexing="ij"))
    sets = [profile.kernel_set(deployment.gpu)]

    def stacked(count: int) -> tuple[Deployments, EngineConstants]:
        index = np.zeros(count, dtype=np.intp)
        nothing = np.ones(count)
        points = Points(
            deployments=(deployment,), engines=(engine,), index=index, clients=nothing, isl=nothing, osl=nothing
        )
        return stack((deployment,), sets, index), point_constants(profile, points)

    d, k = stacked(batch.size)
    decode = decode_seconds(
        decode_pass(d, profile.kernels, np.maximum(batch / d.pp, 1.0), context), k, d.layers, d.moe_layers, batch
    )
    d, k = stacked(lengths.size)
    prompt = prefill_seconds(prefill_pass(d, profile.kernels, lengths, chunk_tokens=chunk_tokens), k, d.layers)
    first = float(np.asarray(k.first_token_s)[0])
    return decode.reshape(len(batches), len(contexts)), prompt, first


def _times(
    profile: Profile,
    deployments: Sequence[Deployment],
    engine: str,
    grid: Floats,
    lengths: Floats,
    context: float,
) -> tuple[Floats, Floats, Floats]:
    """Decode seconds [deployment, grid], prefill seconds [deployment, length], first-token seconds [deployment]."""
    count = len(deployments)
    sets = [profile.kernel_set(one.gpu) for one in deployments]

    def points(values: Floats) -> tuple[Points, Floats]:
        index = np.repeat(np.arange(count), len(values))
        tiled = np.tile(values, count)
        made = Points(
            deployments=tuple(deployments),
            engines=(engine,) * count,
            index=index,
            clients=tiled,
            isl=tiled,
            osl=tiled,
        )
        return made, tiled

    at_batches, batch = points(grid)
    d = stack(deployments, sets, at_batches.index)
    k = point_constants(profile, at_batches)
    terms = decode_pass(d, profile.kernels, np.maximum(batch / d.pp, 1.0), np.full_like(batch, context))
    decode = decode_seconds(terms, k, d.layers, d.moe_layers, batch).reshape(count, len(grid))
    at_lengths, length = points(lengths)
    d = stack(deployments, sets, at_lengths.index)
    k = point_constants(profile, at_lengths)
    prompt = prefill_seconds(prefill_pass(d, profile.kernels, length, chunk_tokens=CHUNK_TOKENS), k, d.layers)
    first = np.asarray(k.first_token_s).reshape(count, len(lengths))[:, 0]
    return decode, prompt.reshape(count, len(lengths)), first

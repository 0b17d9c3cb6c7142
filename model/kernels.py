"""Seconds of the kernels a transformer step consists of: GEMM, attention over a cache, prefill attention, all-reduce.

Each is a closed form in bytes and operations over datasheet rates, with fitted efficiencies, times the correction of a
fitted surface where one was measured (:mod:`servecast.model.surfaces`). The closed form alone is what a GPU without a
kernel table gets. Forms and magnitudes: reference figures of AIConfigurator's kernel tables (H100, H200; Apache-2.0);
the smooth maximum ``(a^q + b^q)^(1/q)`` of memory and compute time is the roofline with a rounded ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.surfaces import Surface, interpolate

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelParameters:
    """Efficiencies of one kernel in one number format."""

    floor_s: float
    """Time of an empty problem inside a captured graph. [s]"""
    bandwidth_efficiency: float
    """Share of the datasheet bandwidth that is reached. [-]"""
    compute_efficiency: float
    """Share of the dense datasheet rate that is reached. [-]"""
    exponent: float = 2.0
    """Sharpness q of the roofline's ridge. [-]"""
    surface: Surface | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceCurve:
    """Time of one all-reduce against message size for one number of ranks, piecewise linear in both logarithms."""

    ranks: int
    log2_bytes: Floats
    log_seconds: Floats


def roofline_seconds(
    parameters: KernelParameters, flops: ArrayLike, nbytes: ArrayLike, peak_flops: ArrayLike, bandwidth: ArrayLike
) -> Floats:
    """``floor + ((bytes / e_b BW)^q + (flop / e_f F)^q)^(1/q)``. [s]"""
    q = parameters.exponent
    memory = np.asarray(nbytes, dtype=np.float64) / (parameters.bandwidth_efficiency * np.asarray(bandwidth))
    compute = np.asarray(flops, dtype=np.float64) / (parameters.compute_efficiency * np.asarray(peak_flops))
    high, low = np.maximum(memory, compute), np.minimum(memory, compute)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(high > 0.0, low / high, 0.0)
    return np.asarray(parameters.floor_s + high * np.power(1.0 + np.power(ratio, q), 1.0 / q), dtype=np.float64)


def gemm_seconds(
    parameters: KernelParameters,
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    *,
    weight_bytes_per_element: ArrayLike,
    activation_bytes_per_element: ArrayLike,
    peak_flops: ArrayLike,
    bandwidth: ArrayLike,
) -> Floats:
    """C[m, n] = A[m, k] B[k, n]; m tokens, the result in 16 bit. [s]"""
    m, n, k = (np.asarray(x, dtype=np.float64) for x in (m, n, k))
    nbytes = (
        np.asarray(weight_bytes_per_element) * n * k + np.asarray(activation_bytes_per_element) * m * k + 2.0 * m * n
    )
    seconds = roofline_seconds(parameters, 2.0 * m * n * k, nbytes, peak_flops, bandwidth)
    if parameters.surface is None:
        return seconds
    return seconds * np.exp(interpolate(parameters.surface, *(np.log2(np.maximum(x, 1.0)) for x in (m, n, k))))


def decode_attention_seconds(
    parameters: KernelParameters,
    batch: ArrayLike,
    context: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
    *,
    kv_bytes_per_element: ArrayLike,
    peak_flops: ArrayLike,
    bandwidth: ArrayLike,
) -> Floats:
    """One new token per sequence over `context` cached tokens, one layer; heads are those of one GPU. [s]"""
    batch, context, heads, kv_heads = (np.asarray(x, dtype=np.float64) for x in (batch, context, heads, kv_heads))
    nbytes = 2.0 * batch * context * kv_heads * np.asarray(head_dim) * np.asarray(kv_bytes_per_element)
    flops = 4.0 * batch * context * heads * np.asarray(head_dim)
    seconds = roofline_seconds(parameters, flops, nbytes, peak_flops, bandwidth)
    if parameters.surface is None:
        return seconds
    group = np.log2(np.maximum(heads / np.maximum(kv_heads, 1.0), 1.0))
    return seconds * np.exp(
        interpolate(
            parameters.surface, np.log2(np.maximum(nbytes, 1.0)), group, np.log2(np.maximum(batch * kv_heads, 1.0))
        )
    )


def prefill_attention_seconds(
    parameters: KernelParameters,
    batch: ArrayLike,
    length: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
    *,
    peak_flops: ArrayLike,
    bandwidth: ArrayLike,
) -> Floats:
    """Causal self-attention of `batch` prompts of `length` tokens, one layer: 2 n_h d_h n^2 FLOP. [s]"""
    batch, length, heads, kv_heads = (np.asarray(x, dtype=np.float64) for x in (batch, length, heads, kv_heads))
    head_dim = np.asarray(head_dim, dtype=np.float64)
    flops = 2.0 * batch * heads * head_dim * length * length
    nbytes = 4.0 * batch * length * head_dim * (heads + kv_heads)
    seconds = roofline_seconds(parameters, flops, nbytes, peak_flops, bandwidth)
    if parameters.surface is None:
        return seconds
    return seconds * np.exp(
        interpolate(
            parameters.surface,
            np.log2(np.maximum(length, 1.0)),
            np.log2(np.maximum(batch * heads, 1.0)),
            np.log2(np.maximum(head_dim, 1.0)),
        )
    )


def all_reduce_seconds(
    curves: tuple[AllReduceCurve, ...], nbytes: ArrayLike, ranks: ArrayLike, *, bandwidth_ratio: ArrayLike = 1.0
) -> Floats:
    """One all-reduce of `nbytes` over `ranks` GPUs of a node; 0 for one rank. [s]

    `bandwidth_ratio` is the link's bandwidth over that of the GPU the curves were measured on: a faster link shifts the
    bandwidth-bound part and leaves the latency-bound part where it is. Ranks between two measured counts interpolate
    linearly in log2; beyond the largest the last increment continues.
    """
    size = np.asarray(nbytes, dtype=np.float64) / np.asarray(bandwidth_ratio, dtype=np.float64)
    size, count = np.broadcast_arrays(size, np.asarray(ranks, dtype=np.float64))
    log_size = np.log2(np.maximum(size, 1.0))
    log_ranks = np.log2(np.maximum(count, 1.0))
    at = np.array([np.log2(curve.ranks) for curve in curves])
    table = np.stack([_curve(curve, log_size) for curve in curves])
    if len(curves) == 1:
        return np.where(count > 1.0, np.exp(table[0]), 0.0)
    left = np.clip(np.searchsorted(at, log_ranks, side="right") - 1, 0, len(at) - 2)
    weight = np.maximum((log_ranks - at[left]) / (at[left + 1] - at[left]), 0.0)
    low = np.take_along_axis(table, left[np.newaxis], axis=0)[0]
    high = np.take_along_axis(table, left[np.newaxis] + 1, axis=0)[0]
    return np.where(count > 1.0, np.exp(low + weight * (high - low)), 0.0)


def _curve(curve: AllReduceCurve, log2_bytes: Floats) -> Floats:
    """Log seconds at `log2_bytes`: flat below the first knot, proportional to the size beyond the last."""
    inside = np.interp(log2_bytes, curve.log2_bytes, curve.log_seconds)
    return np.asarray(inside + np.log(2.0) * np.maximum(log2_bytes - curve.log2_bytes[-1], 0.0), dtype=np.float64)

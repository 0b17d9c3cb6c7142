r"""Seconds of one engine step: kernel sums over a transformer's layers plus a few constants of the engine.

A forward pass over m tokens of one attention replica costs, per layer (h hidden, n_h heads, n_kv KV heads, d_h head
size):

====================  ================================================================================================
qkv, output           GEMM [m, (n_h + 2 n_kv) d_h / tp, h] and [m, h, n_h d_h / tp]; latent attention by its ranks
attention             reads the KV cache (decode) or is causal over the prompt (prefill)
gate-up, down         GEMM [m, 2 ff / tp, h] and [m, h, ff / tp]
routed experts        grouped GEMM; E / ep (1 - (1 - k / E)^M) experts of a GPU are read for M tokens (coverage)
collectives           two all-reduces of m h 2 bytes over tp ranks; with attention data parallelism the second one
                      gathers and scatters the tokens of all replicas
====================  ================================================================================================

plus the language-model head once. What an engine adds to these sums, and TTFT and TPOT of a closed loop, are in
:mod:`servecast.model.engine`.

Sources: the composition of AIConfigurator (docs, static mode) and BLIS (inference-sim, "trained physics"); constants
are fitted (:mod:`servecast.calibration.fits.engine`). Every argument may be an array of operating points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.deployment import Deployments
from servecast.model.kernels import (
    AllReduceCurve,
    KernelParameters,
    all_reduce_seconds,
    decode_attention_seconds,
    gemm_seconds,
    prefill_attention_seconds,
    roofline_seconds,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """Kernel parameters of one GPU type; `measured` is false for the closed form that serves GPUs without a table."""

    name: str
    measured: bool
    gemm: Mapping[str, KernelParameters]
    """By weight format."""
    decode_attention: Mapping[str, KernelParameters]
    """By KV format."""
    prefill_attention: KernelParameters
    latent_attention: KernelParameters
    """Decode attention over a compressed cache (MLA)."""
    all_reduce: tuple[AllReduceCurve, ...]
    link_bandwidth_bytes_per_s: float
    """Peer bandwidth of the GPU that `all_reduce` was measured on. [B/s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTerms:
    """Kernel seconds of one forward pass through all layers, by kind.

    Routed experts are given at datasheet rates, memory and compute apart: their efficiencies are fitted end to end.
    """

    gemm_s: Floats
    attention_s: Floats
    collectives_s: Floats
    experts_memory_s: Floats
    experts_compute_s: Floats

    def take(self, rows: NDArray[np.intp]) -> PassTerms:
        """The points at `rows`."""
        return PassTerms(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def decode_pass(
    d: Deployments,
    kernels: tuple[KernelSet, ...],
    batch: ArrayLike,
    context: ArrayLike,
    rows: ArrayLike | None = None,
) -> PassTerms:
    """One token for each of `batch` sequences of every attention replica, `context` tokens cached on average. [s]

    `rows` tokens in all where sequences have several each, as in the verification of drafts: the cache of a sequence
    is read once for all of its rows.
    """
    rows = batch if rows is None else rows
    batch, context, rows = np.broadcast_arrays(*(np.asarray(one, dtype=np.float64) for one in (batch, context, rows)))
    return _per_kernel_set(
        d,
        kernels,
        (batch, context, rows),
        lambda part, kset, b, c, n: _pass(part, kset, n, n, _decode_attention(part, kset, b, c)),
    )


def prefill_pass(
    d: Deployments, kernels: tuple[KernelSet, ...], length: ArrayLike, *, chunk_tokens: float = 8192.0
) -> PassTerms:
    """One prompt of `length` tokens on one attention replica, in chunks of at most `chunk_tokens`. [s]"""
    length = np.asarray(length, dtype=np.float64)

    def prompt(part: Deployments, kset: KernelSet, n: Floats) -> PassTerms:
        chunks = np.maximum(n / chunk_tokens, 1.0)
        return _pass(part, kset, n / chunks, np.ones_like(n), _prefill_attention(part, kset, n), chunks=chunks)

    return _per_kernel_set(d, kernels, (length,), prompt)


def _per_kernel_set(
    d: Deployments, kernels: tuple[KernelSet, ...], inputs: tuple[Floats, ...], evaluate: Callable[..., PassTerms]
) -> PassTerms:
    """Evaluate each group of points that shares kernel parameters in one vectorised call."""
    size = np.broadcast_shapes(d.layers.shape, *(x.shape for x in inputs))
    inputs = tuple(np.broadcast_to(x, size) for x in inputs)
    if len(d.groups) == 1:
        return evaluate(d, kernels[d.groups[0].kernel_set], *inputs)
    out = {field.name: np.empty(size) for field in fields(PassTerms)}
    for group in d.groups:
        terms = evaluate(d.part(group), kernels[group.kernel_set], *(x[group.rows] for x in inputs))
        for name, column in out.items():
            column[group.rows] = getattr(terms, name)
    return PassTerms(**out)


def _gemm(d: Deployments, kset: KernelSet, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Floats:
    return gemm_seconds(
        kset.gemm[d.groups[0].trunk_format],
        m,
        n,
        k,
        weight_bytes_per_element=d.trunk_bytes,
        activation_bytes_per_element=np.minimum(d.trunk_bytes * d.trunk_activation_ratio, 2.0),
        peak_flops=d.trunk_flops,
        bandwidth=d.bandwidth,
    )


def _head_gemm(d: Deployments, kset: KernelSet, rows: Floats) -> Floats:
    """Language-model head: kept in 16 bit by every engine."""
    return gemm_seconds(
        kset.gemm["bf16"],
        rows,
        d.vocabulary / d.tp,
        d.hidden,
        weight_bytes_per_element=2.0,
        activation_bytes_per_element=2.0,
        peak_flops=d.bf16_flops,
        bandwidth=d.bandwidth,
    )


def _pass(
    d: Deployments, kset: KernelSet, m: Floats, head_rows: Floats, attention_s: Floats, *, chunks: Floats | float = 1.0
) -> PassTerms:
    """`m` tokens of one replica through all layers, `chunks` times."""
    gemm = d.attention_layers * _attention_gemms(d, kset, m) + _mlp_gemms(d, kset, m)
    memory, compute = _experts(d, m)
    return PassTerms(
        gemm_s=chunks * gemm + _head_gemm(d, kset, head_rows),
        attention_s=attention_s,
        collectives_s=chunks * _collectives(d, kset, m),
        experts_memory_s=chunks * memory,
        experts_compute_s=chunks * compute,
    )


def _attention_gemms(d: Deployments, kset: KernelSet, m: Floats) -> Floats:
    if not d.groups[0].latent:
        query = d.heads * d.head_dim / d.tp
        # a KV head is not split: more ranks than KV heads replicate them
        key_value = 2.0 * np.maximum(d.kv_heads / d.tp, 1.0) * d.head_dim
        return _gemm(d, kset, m, query * d.query_width + key_value, d.hidden) + _gemm(d, kset, m, d.hidden, query)
    heads = d.heads / d.tp
    down = _gemm(d, kset, m, d.q_rank + d.kv_rank + d.rope_dim, d.hidden)
    query = _gemm(d, kset, m, heads * (d.nope_dim + d.rope_dim), d.q_rank)
    # the two halves of the KV up-projection, absorbed into query and output in decode
    up = _gemm(d, kset, m, heads * (d.nope_dim + d.value_dim), d.kv_rank)
    output = _gemm(d, kset, m, d.hidden, heads * d.value_dim)
    return down + query + up + output


def _mlp_gemms(d: Deployments, kset: KernelSet, m: Floats) -> Floats:
    """Dense layers, shared experts and linear-attention projections."""
    total = np.zeros(np.broadcast_shapes(m.shape, d.layers.shape))
    up = d.mlp_matrices - 1.0
    if d.groups[0].dense:
        width = d.intermediate / d.tp
        total = total + d.dense_layers * (_gemm(d, kset, m, up * width, d.hidden) + _gemm(d, kset, m, d.hidden, width))
    if d.groups[0].shared:
        width = np.maximum(d.shared_intermediate / d.tp, 1.0)
        total = total + d.moe_layers * (_gemm(d, kset, m, up * width, d.hidden) + _gemm(d, kset, m, d.hidden, width))
    if d.groups[0].linear:
        total = total + d.linear_layers * (
            _gemm(d, kset, m, d.linear_width / d.tp, d.hidden) + _gemm(d, kset, m, d.hidden, d.linear_values / d.tp)
        )
    return total


def _experts(d: Deployments, m: Floats) -> tuple[Floats, Floats]:
    """Routed experts of one GPU for the tokens of all attention replicas: memory and compute time at
    datasheet rates."""
    if not d.groups[0].moe:
        zero = np.zeros(np.broadcast_shapes(m.shape, d.layers.shape))
        return zero, zero
    tokens = m * d.dp
    width = d.expert_intermediate / d.moe_tp
    visits = tokens * d.experts_per_token / d.ep
    # each token visits k of E experts; those that no token of the step visits are not read
    active = d.experts / d.ep * -np.expm1(tokens * np.log1p(-np.minimum(d.experts_per_token / d.experts, 1.0 - 1e-12)))
    matrices = d.mlp_matrices * d.hidden * width
    nbytes = active * matrices * d.expert_bytes + 2.0 * visits * (2.0 * d.hidden + d.mlp_matrices * width)
    memory = d.moe_layers * nbytes / d.bandwidth
    return memory, d.moe_layers * 2.0 * visits * matrices / d.expert_flops


def _collectives(d: Deployments, kset: KernelSet, m: Floats) -> Floats:
    ratio = d.link_bandwidth / kset.link_bandwidth_bytes_per_s
    attention = all_reduce_seconds(kset.all_reduce, 2.0 * m * d.hidden, d.tp, bandwidth_ratio=ratio)
    mlp = attention
    if d.groups[0].replicated:
        mlp = all_reduce_seconds(kset.all_reduce, 2.0 * m * d.dp * d.hidden, d.tp * d.dp, bandwidth_ratio=ratio)
    hops = (d.pp - 1.0) * (2.0 * m * d.hidden / d.link_bandwidth + 10e-6)
    return d.layers * (attention + mlp) + hops


def _decode_attention(d: Deployments, kset: KernelSet, batch: Floats, context: Floats) -> Floats:
    common = {"peak_flops": d.bf16_flops, "bandwidth": d.bandwidth}
    if d.groups[0].latent:
        seen = np.minimum(context, d.index_topk)
        nbytes = batch * (seen * (d.kv_rank + d.rope_dim) * d.kv_bytes + context * d.index_dim)
        flops = 2.0 * batch * seen * (2.0 * d.kv_rank + d.rope_dim) * d.heads / d.tp
        return d.attention_layers * roofline_seconds(kset.latent_attention, flops, nbytes, d.bf16_flops, d.bandwidth)
    parameters = kset.decode_attention[d.groups[0].kv_format]
    kv_heads = np.maximum(d.kv_heads / d.tp, 1.0)
    arguments = (d.heads / d.tp, kv_heads, d.head_dim)
    total = (d.attention_layers - d.windowed_layers) * decode_attention_seconds(
        parameters, batch, context, *arguments, kv_bytes_per_element=d.kv_bytes, **common
    )
    if d.groups[0].windowed:
        total = total + d.windowed_layers * decode_attention_seconds(
            parameters, batch, np.minimum(context, d.window), *arguments, kv_bytes_per_element=d.kv_bytes, **common
        )
    if d.groups[0].linear:
        state = 2.0 * 4.0 * batch * d.linear_values * d.linear_head_dim / d.tp
        total = total + d.linear_layers * (parameters.floor_s + state / (0.7 * d.bandwidth))
    return total


def _prefill_attention(d: Deployments, kset: KernelSet, length: Floats) -> Floats:
    common = {"peak_flops": d.bf16_flops, "bandwidth": d.bandwidth}
    if d.groups[0].latent:
        head_dim = (d.nope_dim + d.rope_dim + d.value_dim) / 2.0
        heads = d.heads / d.tp
        # a token reads at most k others: n k - k^2 / 2 pairs, those of a full causal square of this side
        topk = np.minimum(length, d.index_topk)
        seen = np.sqrt(2.0 * length * topk - topk**2)
        return d.attention_layers * prefill_attention_seconds(
            kset.prefill_attention, 1.0, seen, heads, heads, head_dim, **common
        )
    arguments = (d.heads / d.tp, np.maximum(d.kv_heads / d.tp, 1.0), d.head_dim)
    total = (d.attention_layers - d.windowed_layers) * prefill_attention_seconds(
        kset.prefill_attention, 1.0, length, *arguments, **common
    )
    if d.groups[0].windowed:
        # n tokens that each see `window` do the work of n / w full squares of side w, causal twice
        side = np.minimum(length, np.sqrt(2.0 * d.window * length))
        total = total + d.windowed_layers * prefill_attention_seconds(
            kset.prefill_attention, 1.0, side, *arguments, **common
        )
    if d.groups[0].linear:
        work = 6.0 * length * d.linear_values * d.linear_head_dim / d.tp
        total = total + d.linear_layers * (kset.prefill_attention.floor_s + work / (0.3 * d.bf16_flops))
    return total

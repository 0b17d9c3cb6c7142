"""Deployments: model x GPU x precision x parallel degrees, one per array element, ready for vectorised step times.

A *replica* here is one engine instance on ``tp * pp * dp`` GPUs: attention is split over `tp` and replicated `dp`
times, routed experts are spread over ``ep`` groups of ``moe_tp = tp * dp / ep`` GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from servecast.model.formats import BYTES_PER_ELEMENT, COMPUTE_CLASS
from servecast.model.hardware import Gpu
from servecast.model.llm import Llm

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One way to run one engine instance."""

    llm: Llm
    gpu: Gpu
    trunk_format: str
    expert_format: str
    kv_format: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def weight_bytes_per_gpu(self) -> float:
        """Attention and dense weights are replicated over dp, experts are not; tables are split over tp. [B]"""
        llm = self.llm
        total = llm.weight_bytes(self.trunk_format, self.expert_format)
        routed = llm.routed_params * BYTES_PER_ELEMENT[self.expert_format]
        return ((total - routed) / self.tp + routed / (self.tp * self.dp)) / self.pp

    def kv_bytes_per_token_per_gpu(self) -> float:
        """Cache of one token on each GPU of its attention replica; heads are not split below one, nor is a
        latent. [B]"""
        llm = self.llm
        split = 1.0 if llm.is_mla else float(min(self.tp, llm.kv_heads))
        return llm.kv_bytes_per_token(self.kv_format) / split / self.pp


def divisibility_error(llm: Llm, tp: int, pp: int = 1, dp: int = 1, ep: int = 1) -> str | None:
    """Why the model cannot be split so, in words, or None where it can."""
    if llm.heads % tp:
        return f"tp must divide the {llm.heads} attention heads of {llm.name}, got {tp}"
    if llm.kv_heads % tp and tp % llm.kv_heads and not llm.is_mla:
        return f"tp must divide or be a multiple of the {llm.kv_heads} KV heads of {llm.name}, got {tp}"
    if pp > llm.layers:
        return f"pp must be at most the {llm.layers} layers of {llm.name}, got {pp}"
    if ep > 1 and not llm.is_moe:
        return f"ep must be 1 for {llm.name}, which has no experts, got {ep}"
    if (tp * dp) % ep:
        return f"ep must divide tp x dp = {tp * dp}, got {ep}"
    if ep > 1 and llm.experts % ep:
        return f"ep must divide the {llm.experts} experts of {llm.name}, got {ep}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Points that share kernel parameters, and the parts of the composition that apply to them."""

    kernel_set: int
    trunk_format: str
    kv_format: str
    dense: bool
    moe: bool
    shared: bool
    latent: bool
    windowed: bool
    linear: bool
    replicated: bool
    rows: NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployments:
    """Struct of arrays of :class:`Deployment`; field names as in :class:`Llm`, rates in B/s and FLOP/s."""

    groups: tuple[Group, ...]
    layers: Floats
    attention_layers: Floats
    windowed_layers: Floats
    window: Floats
    linear_layers: Floats
    linear_width: Floats
    linear_values: Floats
    linear_head_dim: Floats
    dense_layers: Floats
    moe_layers: Floats
    hidden: Floats
    heads: Floats
    kv_heads: Floats
    head_dim: Floats
    query_width: Floats
    intermediate: Floats
    mlp_matrices: Floats
    experts: Floats
    experts_per_token: Floats
    expert_intermediate: Floats
    shared_intermediate: Floats
    vocabulary: Floats
    kv_rank: Floats
    q_rank: Floats
    rope_dim: Floats
    nope_dim: Floats
    value_dim: Floats
    index_dim: Floats
    index_topk: Floats
    bandwidth: Floats
    bf16_flops: Floats
    trunk_flops: Floats
    expert_flops: Floats
    link_bandwidth: Floats
    trunk_bytes: Floats
    trunk_activation_ratio: Floats
    expert_bytes: Floats
    kv_bytes: Floats
    tp: Floats
    pp: Floats
    dp: Floats
    ep: Floats
    moe_tp: Floats

    def part(self, group: Group) -> Deployments:
        """The points of one of `groups`."""
        return Deployments(groups=(group,), **self._at(group.rows))

    def rows(self, rows: NDArray[np.intp]) -> Deployments:
        """The points at `rows`, in that order."""
        member = np.empty(len(self.layers), dtype=np.intp)
        for number, group in enumerate(self.groups):
            member[group.rows] = number
        kept = [(g, np.flatnonzero(member[rows] == number)) for number, g in enumerate(self.groups)]
        groups = tuple(replace(group, rows=at) for group, at in kept if len(at))
        return Deployments(groups=groups, **self._at(rows))

    def _at(self, rows: NDArray[np.intp]) -> dict[str, Floats]:
        return {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "groups"}


def stack(deployments: Sequence[Deployment], kernel_sets: Sequence[int], index: NDArray[np.intp]) -> Deployments:
    """Arrays over points; point i runs ``deployments[index[i]]`` with kernel set ``kernel_sets[index[i]]``."""
    table = [_row(one) for one in deployments]
    columns = {name: np.array([row[name] for row in table], dtype=np.float64) for name in table[0]}
    keys = [_group_key(one, kset) for one, kset in zip(deployments, kernel_sets, strict=True)]
    distinct = sorted(set(keys))
    member = np.array([distinct.index(key) for key in keys])[index]
    groups = tuple(
        Group(
            kernel_set=key[0],
            trunk_format=key[1],
            kv_format=key[2],
            dense=key[3],
            moe=key[4],
            shared=key[5],
            latent=key[6],
            windowed=key[7],
            linear=key[8],
            replicated=key[9],
            rows=np.flatnonzero(member == number),
        )
        for number, key in enumerate(distinct)
        if np.any(member == number)
    )
    return Deployments(groups=groups, **{name: column[index] for name, column in columns.items()})


GroupKey = tuple[int, str, str, bool, bool, bool, bool, bool, bool, bool]


def _group_key(one: Deployment, kernel_set: int) -> GroupKey:
    llm = one.llm
    return (
        kernel_set,
        one.trunk_format,
        one.kv_format,
        llm.intermediate > 0 and llm.dense_layers > 0,
        llm.is_moe,
        llm.shared_intermediate > 0,
        llm.is_mla,
        llm.windowed_layers > 0,
        llm.linear_layers > 0,
        one.dp > 1,
    )


def _row(one: Deployment) -> dict[str, float]:
    llm, gpu = one.llm, one.gpu
    linear_keys, linear_values = (n * llm.linear_head_dim for n in (llm.linear_key_heads, llm.linear_value_heads))
    weight_only = COMPUTE_CLASS[one.trunk_format] == "bf16" or (gpu.fp4_flops is None and one.trunk_format == "nvfp4")
    return {
        "layers": llm.layers,
        "attention_layers": llm.attention_layers,
        "windowed_layers": llm.windowed_layers,
        "window": max(llm.window, 1),
        "linear_layers": llm.linear_layers,
        "linear_width": 2 * linear_keys + 2 * linear_values,
        "linear_values": linear_values,
        "linear_head_dim": llm.linear_head_dim,
        "dense_layers": llm.dense_layers,
        "moe_layers": llm.moe_layers,
        "hidden": llm.hidden,
        "heads": llm.heads,
        "kv_heads": llm.kv_heads,
        "head_dim": llm.head_dim,
        "query_width": 2.0 if llm.query_gate else 1.0,
        "intermediate": llm.intermediate,
        "mlp_matrices": llm.mlp_matrices,
        "experts": max(llm.experts, 1),
        "experts_per_token": llm.experts_per_token,
        "expert_intermediate": llm.expert_intermediate,
        "shared_intermediate": llm.shared_intermediate,
        "vocabulary": llm.vocabulary,
        "kv_rank": llm.kv_rank,
        "q_rank": llm.q_rank or llm.hidden,
        "rope_dim": llm.rope_dim,
        "nope_dim": llm.nope_dim,
        "value_dim": llm.value_dim,
        "index_dim": llm.index_dim,
        "index_topk": llm.index_topk or np.inf,
        "bandwidth": gpu.bandwidth_bytes_per_s,
        "bf16_flops": gpu.bf16_flops,
        "trunk_flops": _matrix_rate(gpu, one.trunk_format),
        "expert_flops": _matrix_rate(gpu, one.expert_format),
        "link_bandwidth": (gpu.peer if one.tp * one.dp <= gpu.gpus_per_node else gpu.inter_node).bandwidth_bytes_per_s,
        "trunk_bytes": BYTES_PER_ELEMENT[one.trunk_format],
        "trunk_activation_ratio": 2.0 / BYTES_PER_ELEMENT[one.trunk_format] if weight_only else 1.0,
        "expert_bytes": BYTES_PER_ELEMENT[one.expert_format],
        "kv_bytes": BYTES_PER_ELEMENT[one.kv_format],
        "tp": one.tp,
        "pp": one.pp,
        "dp": one.dp,
        "ep": one.ep,
        "moe_tp": one.tp * one.dp / one.ep,
    }


def _matrix_rate(gpu: Gpu, weight_format: str) -> float:
    """Rate of the GEMM units; 4-bit weights on a GPU without 4-bit units are expanded to 16 bit, not to
    fp8. [FLOP/s]"""
    if COMPUTE_CLASS[weight_format] == "fp4" and gpu.fp4_flops is None:
        return gpu.bf16_flops
    return gpu.peak_flops(weight_format)

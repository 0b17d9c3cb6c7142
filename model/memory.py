"""What fits on a GPU: weights, workspace, captured graphs, and the KV cache that is left.

vLLM gives its cache what `memory_fraction` of the device leaves after weights and a profiled peak of activations (vLLM
documentation, "conserving memory"); SGLang reserves a static share computed from its chunk size; TensorRT-LLM takes a
fraction of what is free after loading. The peak of activations is counted from shapes: the widest layer's inputs and
outputs for all tokens of a step, and the logits of the sampled rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.deployment import Deployment

Floats = NDArray[np.float64]

CONTEXT_BYTES = 0.9e9
"""CUDA context and libraries of one process. [B]"""
COLLECTIVE_BYTES = 0.6e9
"""Buffers of NCCL and of custom all-reduce where tp x dp > 1. [B]"""
GRAPH_BYTES = 0.5e9
"""Captured graphs of the usual batch sizes. [B]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRule:
    """How an engine divides the memory of a device."""

    fraction: float
    """Share of device memory (or of what is free after loading) that the engine may use. [-]"""
    of_free: bool = False
    """The fraction applies to what is free after loading (TensorRT-LLM), not to the device."""
    reserve_bytes_per_chunk_token: float = 0.0
    """Static reserve per token of a prefill chunk, outside the fraction (SGLang). [B]"""
    full_length: bool = False
    """A sequence is admitted only if its whole length fits (TensorRT-LLM's guaranteed-no-evict)."""


MEMORY_RULES: dict[str, MemoryRule] = {
    "vllm": MemoryRule(fraction=0.9),
    "sglang": MemoryRule(fraction=0.98, reserve_bytes_per_chunk_token=1.6e6),
    "trtllm": MemoryRule(fraction=0.9, of_free=True, full_length=True),
}
"""Defaults of each engine: vLLM `gpu_memory_utilization` 0.9; SGLang about 1.5 MB per chunk token plus graphs
(its server arguments); TensorRT-LLM `free_gpu_memory_fraction` 0.9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes of one GPU."""

    device_bytes: float
    weight_bytes: float
    overhead_bytes: float
    """Context, collectives, graphs and the peak of activations."""
    kv_bytes: float
    """What is left for the cache; 0 or less: does not fit."""
    kv_tokens: float
    """Tokens of one attention replica's cache."""


def memory_budget(
    deployment: Deployment, rule: MemoryRule, *, max_batched_tokens: float = 8192.0, max_num_seqs: float = 256.0
) -> MemoryBudget:
    """Memory of one GPU of `deployment`, and how many tokens its KV cache holds."""
    weights = deployment.weight_bytes_per_gpu
    overhead = _overhead_bytes(deployment, max_batched_tokens, max_num_seqs)
    device = deployment.gpu.memory_bytes
    if rule.of_free:
        left = rule.fraction * (0.98 * device - weights - overhead)
    else:
        left = rule.fraction * device - weights - overhead - rule.reserve_bytes_per_chunk_token * max_batched_tokens
    tokens = max(left, 0.0) / deployment.kv_bytes_per_token_per_gpu()
    return MemoryBudget(
        device_bytes=device, weight_bytes=weights, overhead_bytes=overhead, kv_bytes=left, kv_tokens=tokens
    )


def running_batch(
    kv_tokens: ArrayLike, isl: ArrayLike, osl: ArrayLike, wanted: ArrayLike, *, full_length: ArrayLike
) -> Floats:
    """Sequences that run at once when `wanted` ask for it: bounded by the cache, at least one. [sequences]"""
    share = np.where(np.asarray(full_length), 1.0, 0.5)
    held = np.asarray(isl, dtype=np.float64) + share * np.asarray(osl, dtype=np.float64)
    room: Floats = np.floor(np.asarray(kv_tokens, dtype=np.float64) / held)
    return np.minimum(np.asarray(wanted, dtype=np.float64), np.maximum(room, 1.0))


def _overhead_bytes(one: Deployment, max_batched_tokens: float, max_num_seqs: float) -> float:
    llm = one.llm
    widest = max(llm.intermediate, llm.shared_intermediate + llm.experts_per_token * llm.expert_intermediate)
    activations = 2.0 * max_batched_tokens * (3.0 * widest / one.tp + 6.0 * llm.hidden)
    logits = 6.0 * max_num_seqs * llm.vocabulary
    collectives = COLLECTIVE_BYTES if one.tp * one.dp * one.pp > 1 else 0.0
    return CONTEXT_BYTES + GRAPH_BYTES + collectives + activations + logits

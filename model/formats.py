"""Number formats of weights, activations and KV cache: bytes per element, scales included.

Block-scaled formats carry their scale factors: NVFP4 stores one fp8 scale per 16 values (0.5 + 1/16 B),
MXFP4 one 8-bit exponent per 32 (0.5 + 1/32 B), 4-bit integers one 16-bit scale per 32 (0.5 + 2/32 B),
blockwise fp8 one 32-bit scale per 128 x 128 tile (negligible).
"""

from __future__ import annotations

BYTES_PER_ELEMENT: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "nvfp4": 0.5625,
    "mxfp4": 0.53125,
    "int4": 0.5625,
}
"""Storage of one element by format. [B]"""

COMPUTE_CLASS: dict[str, str] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8",
    "int8": "fp8",
    "nvfp4": "fp4",
    "mxfp4": "bf16",
    "int4": "bf16",
}
"""Datasheet column whose rate bounds a GEMM in that weight format; weight-only formats compute in bf16."""

PRECISIONS: tuple[str, ...] = ("bf16", "fp16", "fp8", "fp8_block", "int8", "fp4", "nvfp4", "mxfp4", "int4")
"""Names a user may give; `fp4` stands for `nvfp4`."""


def canonical_format(precision: str) -> str:
    """Format name of a user's `precision`, with synonyms folded (``fp4`` is ``nvfp4``, ``int4_wo`` is ``int4``).

    >>> canonical_format("FP4")
    'nvfp4'
    """
    name = precision.strip().lower().replace("-", "_")
    synonyms = {
        "fp4": "nvfp4",
        "nvfp4_wo": "mxfp4",
        "int4_wo": "int4",
        "w4a16": "int4",
        "awq": "int4",
        "gptq": "int4",
        "bfloat16": "bf16",
        "float16": "fp16",
        "half": "fp16",
        "float8": "fp8",
        "fp8_e4m3": "fp8",
        "w8a8": "int8",
        "float32": "fp32",
    }
    name = synonyms.get(name, name)
    if name not in BYTES_PER_ELEMENT:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return name


ENGINES: tuple[str, ...] = ("vllm", "sglang", "trtllm")
"""Engines with fitted constants."""


def resolve_formats(
    native: str,
    native_experts: str | None,
    precision: str,
    engine: str,
    *,
    quantised_cache: bool = False,
    compute_capability: int | None = None,
) -> tuple[str, str, str]:
    """Formats of trunk weights, routed experts and KV cache that `engine` runs for a requested `precision`.

    ``auto`` keeps the checkpoint's own. A 4-bit request on a checkpoint whose experts alone are 4-bit keeps its trunk
    (gpt-oss, Kimi). TensorRT-LLM stores the cache of a quantised checkpoint in fp8 and has no separate blockwise-fp8
    kernel constant; `quantised_cache` says that the checkpoint itself asks for an fp8 cache (NVIDIA's exports do). On
    GPUs of `compute_capability` 100 and up the published recipes of quantised checkpoints state an fp8 cache for every
    engine, and the admission seen in public runs agrees (MiniMax-M2.5 on B200 holds twice the sequences of 16 bit).

    >>> resolve_formats("bf16", "mxfp4", "fp4", "vllm")
    ('bf16', 'mxfp4', 'bf16')
    """
    if precision == "auto":
        trunk, experts = native, native_experts or native
    else:
        trunk = experts = canonical_format(precision)
        if BYTES_PER_ELEMENT[trunk] < 1.0 and native_experts is not None:
            trunk, experts = native, native_experts
    quantised = BYTES_PER_ELEMENT[min(trunk, experts, key=BYTES_PER_ELEMENT.__getitem__)] < 2.0
    if engine == "trtllm":
        trunk, experts = ("fp8" if name == "fp8_block" else name for name in (trunk, experts))
    by_recipe = engine == "trtllm" or (compute_capability or 0) >= 100
    cache = "fp8" if quantised_cache or (by_recipe and quantised) else "bf16"
    return trunk, experts, cache

"""TensorRT-LLM: the YAML of ``trtllm-serve --extra_llm_api_options FILE`` and the command that loads it.

Facts, read in the public repository (``tensorrt_llm/commands/serve.py``, ``tensorrt_llm/llmapi/llm_args.py``,
``tensorrt_llm/_torch/pyexecutor/_util.py``): ``trtllm-serve MODEL`` takes ``--backend --max_batch_size --max_num_tokens
--max_seq_len --tp_size --pp_size --kv_cache_free_gpu_memory_fraction --extra_llm_api_options``, with underscores. Later
versions give some of them a second name (``--config``, ``--free_gpu_memory_fraction``, ``--tensor_parallel_size``) and
keep the first, which is the one written here. A section of the file replaces the command line's whole section:
``kv_cache_config`` would silently bring the memory fraction back to its default of 0.9, so the fraction is in both
places.

**Memory.** ``free_gpu_memory_fraction`` f is a share of the memory that is free once the weights are loaded and a dry
run has shown its peak: KV = f (total - peak) (``_util.py``, ``_cal_max_memory``). vLLM's ``gpu_memory_utilization`` u
covers all three. For the same KV cache, with G the memory of one GPU, W its weights and A its working memory,

    f = KV / (G - W - A) = (u G - W - A) / (G - W - A).
"""

from __future__ import annotations

from typing import Any, Final

from servecast.policies.rendering import floor_fraction, free_for_kv, loads_as_published, yaml_file
from servecast.policies.table import PolicyTable
from servecast.policies.versions import Engine, Option, Version

OPTIONS_FILE: Final = "trtllm.yaml"
"""Where the launch command expects the options."""

_ALWAYS: Version = (1, 0, 0, 0)

ENGINE: Final = Engine(
    name="trtllm",
    oldest=_ALWAYS,
    newest=(1, 2, 1, 0),
    options={
        name: Option(since=_ALWAYS)
        for name in (
            "backend",
            "max-batch-size",
            "max-num-tokens",
            "max-seq-len",
            "tp-size",
            "pp-size",
            "kv-cache-free-gpu-memory-fraction",
            "extra-llm-api-options",
        )
    },
)
"""Options of ``trtllm-serve`` by version."""

_KV_DTYPES: Final = {"bf16": "auto", "fp16": "auto", "fp8": "fp8"}
_UNQUANTISED: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def free_gpu_memory_fraction(table: PolicyTable) -> float:
    """TensorRT-LLM's share of the memory left after loading, for the KV cache of the table, rounded down."""
    memory, kv_bytes = free_for_kv(table)
    return floor_fraction(kv_bytes / (memory.gpu_bytes - memory.weight_bytes - memory.overhead_bytes))


def options(table: PolicyTable) -> dict[str, Any]:
    """Contents of the options file."""
    _check(table)
    return {
        "dtype": _dtype(table),
        "enable_chunked_prefill": table.enable_chunked_prefill,
        "kv_cache_config": {
            "enable_block_reuse": table.enable_prefix_caching,
            "free_gpu_memory_fraction": free_gpu_memory_fraction(table),
            "dtype": _kv_dtype(table),
        },
    }


def llm_api_options(table: PolicyTable) -> str:
    """YAML for ``--extra_llm_api_options``, with a heading that says what wrote it."""
    return yaml_file(table, options(table))


def serve_arguments(table: PolicyTable) -> list[str]:
    """The command without its options file."""
    _check(table)
    wanted = {
        "backend": "pytorch",
        "max_batch_size": str(table.max_num_seqs),
        "max_num_tokens": str(table.max_num_batched_tokens),
        "max_seq_len": str(table.max_model_len),
        "tp_size": str(table.tp),
        "pp_size": str(table.pp),
        "kv_cache_free_gpu_memory_fraction": f"{free_gpu_memory_fraction(table):.4f}",
    }
    words = ["trtllm-serve", table.model]
    for key, value in wanted.items():
        ENGINE.require(key, table.engine_version)
        words += [f"--{key}", value]
    return words


def launch_command(table: PolicyTable, options_file: str = OPTIONS_FILE) -> list[str]:
    """Command that serves the table with the options in `options_file`."""
    return [*serve_arguments(table), "--extra_llm_api_options", options_file]


def _check(table: PolicyTable) -> None:
    if table.engine != "trtllm":
        raise ValueError(f"engine must be trtllm, got {table.engine}")
    ENGINE.check(table.engine_version)


def _dtype(table: PolicyTable) -> str:
    """Type of the activations; weights are served as published, conversion is a step before serving."""
    precision, published = table.precision, table.checkpoint_format
    unknown = published is None
    if not (unknown or loads_as_published(table) or {published, precision} <= _UNQUANTISED.keys()):
        raise ValueError(f"trtllm cannot convert a checkpoint in {published} to {precision} on load")
    return _UNQUANTISED.get(precision, "auto")


def _kv_dtype(table: PolicyTable) -> str:
    if table.kv_format not in _KV_DTYPES:
        raise ValueError(f"trtllm kv_format must be one of {', '.join(_KV_DTYPES)}, got {table.kv_format}")
    return _KV_DTYPES[table.kv_format]

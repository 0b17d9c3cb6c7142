"""SGLang: the command line of ``python -m sglang.launch_server``.

Facts, read in released packages of SGLang from 0.4.0 to 0.5.23 (``sglang/srt/server_args.py``; in 0.5.23
``sglang/srt/arg_groups/fields``): ``--tp-size``, ``--max-running-requests``, ``--chunked-prefill-size`` (-1 turns
chunking off), ``--max-prefill-tokens``, ``--context-length``, ``--mem-fraction-static``, ``--quantization``,
``--kv-cache-dtype`` and ``--disable-radix-cache`` are there in 0.4.0 and in 0.5.23. ``--pp-size`` came after 0.4.6
(there in 0.4.6.post2), the fp8 cache in e4m3 after 0.4.0 (there in 0.4.2), the nvfp4 cache after 0.5.10 (there in
0.5.23).

**Memory.** vLLM's ``gpu_memory_utilization`` u covers weights, KV cache and the working memory of a step. SGLang's
``mem_fraction_static`` s covers weights and the KV pool only; activations and captured graphs come out of the rest
(``server_args.py``: s = (capacity - activations - graph buffers) / capacity). For the same KV cache, with G the memory
of one GPU and A its working memory,

    s = (weights + KV) / G = (u G - A) / G = u - A / G.

The table's ``memory`` gives G and A. SGLang measures G as the memory that is free before loading, so another process on
the GPU makes the pool smaller than planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from servecast.policies import rendering
from servecast.policies.table import PolicyTable
from servecast.policies.versions import Engine, Option, Version, show_version

_ALWAYS: Version = (0, 4, 0, 0)

ENGINE: Final = Engine(
    name="sglang",
    oldest=_ALWAYS,
    newest=(0, 5, 23, 0),
    options={
        "model-path": Option(since=_ALWAYS),
        "tp-size": Option(since=_ALWAYS),
        "pp-size": Option(since=(0, 4, 6, 2)),
        "max-running-requests": Option(since=_ALWAYS),
        "chunked-prefill-size": Option(since=_ALWAYS),
        "max-prefill-tokens": Option(since=_ALWAYS),
        "context-length": Option(since=_ALWAYS),
        "mem-fraction-static": Option(since=_ALWAYS),
        "dtype": Option(since=_ALWAYS),
        "quantization": Option(since=_ALWAYS),
        "kv-cache-dtype": Option(since=_ALWAYS),
        "disable-radix-cache": Option(since=_ALWAYS, switch=True),
    },
)
"""Options of ``sglang.launch_server`` by version."""

_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_KV_DTYPES: Final[Mapping[str, tuple[str, Version]]] = {
    "bf16": ("auto", _ALWAYS),
    "fp16": ("auto", _ALWAYS),
    "fp8": ("fp8_e4m3", (0, 4, 2, 0)),
    "nvfp4": ("nvfp4", (0, 5, 23, 0)),
}


def mem_fraction_static(table: PolicyTable) -> float:
    """SGLang's share for weights and KV pool with the KV cache of the table, u - A / G, rounded down."""
    memory, _ = rendering.free_for_kv(table)
    return rendering.floor_fraction(table.gpu_memory_utilization - memory.overhead_bytes / memory.gpu_bytes)


def launch_arguments(table: PolicyTable) -> list[str]:
    """The whole command as a list of words, ready for a process without a shell."""
    if table.engine != "sglang":
        raise ValueError(f"engine must be sglang, got {table.engine}")
    version = ENGINE.check(table.engine_version)
    chunk = table.max_num_batched_tokens if table.enable_chunked_prefill else -1
    wanted: dict[str, str] = {
        "model-path": table.model,
        **_weights(table),
        "kv-cache-dtype": _kv_dtype(table, version),
        "tp-size": str(table.tp),
        # A single stage is what versions without the option do anyway.
        **({"pp-size": str(table.pp)} if table.pp > 1 else {}),
        "max-running-requests": str(table.max_num_seqs),
        "chunked-prefill-size": str(chunk),
        # Prefill batches are not mixed with decoding by default, so the token budget bounds the prefill batch.
        "max-prefill-tokens": str(table.max_num_batched_tokens),
        "context-length": str(table.max_model_len),
        "mem-fraction-static": f"{mem_fraction_static(table):.4f}",
    }
    words = ["python", "-m", "sglang.launch_server"]
    for key, value in wanted.items():
        ENGINE.require(key, table.engine_version)
        words += [f"--{key}", value]
    return words if table.enable_prefix_caching else [*words, "--disable-radix-cache"]


def launch_script(table: PolicyTable) -> str:
    """POSIX sh that starts the server; arguments given to the script (``--host``, ``--port``) are passed on."""
    return rendering.launch_script(table, launch_arguments(table))


def _weights(table: PolicyTable) -> dict[str, str]:
    """`dtype` and, where 16-bit weights are converted to fp8 while loading, `quantization`."""
    precision, published = table.precision, table.checkpoint_format
    sixteen = published is None or published in _DTYPES
    if precision in _DTYPES and sixteen:
        return {"dtype": _DTYPES[precision]}
    if rendering.loads_as_published(table) or (published is None and precision != "fp8"):
        return {"dtype": "auto"}
    if precision == "fp8" and sixteen:
        return {"dtype": "auto", "quantization": "fp8"}
    raise ValueError(f"sglang cannot convert a checkpoint in {published} to {precision} on load")


def _kv_dtype(table: PolicyTable, version: Version) -> str:
    if table.kv_format not in _KV_DTYPES:
        raise ValueError(f"sglang kv_format must be one of {', '.join(_KV_DTYPES)}, got {table.kv_format}")
    name, since = _KV_DTYPES[table.kv_format]
    if version < since:
        raise ValueError(
            f"sglang {table.engine_version} does not know kv-cache-dtype {name} (since {show_version(since)})"
        )
    return name

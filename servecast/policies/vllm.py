"""vLLM: the YAML of ``vllm serve --config FILE`` and the command that loads it.

Facts, read in the released packages of vLLM 0.6.0 to 0.32.0 (``vllm/engine/arg_utils.py``, ``vllm/utils`` with its
``FlexibleArgumentParser``, ``vllm/entrypoints/cli/serve.py``):

- ``--config`` exists in 0.6.0. The file is a flat mapping; each pair becomes ``--key value`` ahead of the command line,
  so the command line wins. Its name has to end in .yaml or .yml.
- Up to 0.6.3 a YAML boolean becomes the word ``True`` after the option, which a plain switch does not take. From 0.6.4
  on true becomes the bare option and false is dropped without a word (0.32 looks for the ``--no-`` twin, but in the
  top-level parser, which holds no option of ``serve``). False is therefore written as ``no-OPTION: true``, which every
  version with such a twin reads.
- ``--enable-prefix-caching`` is a plain switch up to 0.6.4, and has a ``--no-`` twin from 0.6.5 on.
- ``--enable-chunked-prefill`` takes True or False as a word up to 0.8.4, and has a ``--no-`` twin from 0.8.5 on.
- 0.6.3 to 0.8.0 refuse a command without a model although the file names one; the launch command therefore always
  names it. The positional name wins over the file's ``model`` in every version.
- The defaults moved: V1 (0.8) turned chunked prefill and prefix caching on, 0.32 takes 0.92 of the memory instead of
  0.9. Every decision of the table is written out, so no default is relied upon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from servecast.policies.rendering import loads_as_published, yaml_file
from servecast.policies.table import PolicyTable
from servecast.policies.versions import Engine, Option, Version, show_version

CONFIG_FILE: Final = "vllm.yaml"
"""Where the launch command expects the configuration."""

Scalar = str | int | float | bool

_BOOLEANS_IN_FILE: Version = (0, 6, 4, 0)
"""From here on a YAML true reaches a plain switch as the bare option."""

_ALWAYS: Version = (0, 6, 0, 0)

ENGINE: Final = Engine(
    name="vllm",
    oldest=_ALWAYS,
    newest=(0, 32, 0, 0),
    options={
        "model": Option(since=_ALWAYS),
        "dtype": Option(since=_ALWAYS),
        "quantization": Option(since=_ALWAYS),
        "kv-cache-dtype": Option(since=_ALWAYS),
        "tensor-parallel-size": Option(since=_ALWAYS),
        "pipeline-parallel-size": Option(since=_ALWAYS),
        "max-num-seqs": Option(since=_ALWAYS),
        "max-num-batched-tokens": Option(since=_ALWAYS),
        "max-model-len": Option(since=_ALWAYS),
        "gpu-memory-utilization": Option(since=_ALWAYS),
        "block-size": Option(since=_ALWAYS),
        "enable-prefix-caching": Option(since=_ALWAYS, switch=True, negatable_since=(0, 6, 5, 0)),
        "enable-chunked-prefill": Option(since=_ALWAYS, switch=True, negatable_since=(0, 8, 5, 0)),
        "async-scheduling": Option(since=(0, 10, 0, 0), switch=True, negatable_since=(0, 10, 0, 0)),
        "max-num-partial-prefills": Option(since=(0, 7, 3, 0), until=(0, 27, 0, 0)),
        "num-scheduler-steps": Option(since=_ALWAYS, until=(0, 11, 0, 0)),
    },
)
"""Options of ``vllm serve`` by version; `since` and `until` are first versions checked, docs/policies.md lists them."""

_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_KV_DTYPES: Final[Mapping[str, tuple[str, Version]]] = {
    # A 16-bit cache follows the activations; "auto" says so in every version.
    "bf16": ("auto", _ALWAYS),
    "fp16": ("auto", _ALWAYS),
    "fp8": ("fp8", _ALWAYS),
    "nvfp4": ("nvfp4", (0, 20, 0, 0)),
}


def options(table: PolicyTable, extra: Mapping[str, Scalar] | None = None) -> dict[str, Scalar]:
    """Contents of the configuration file: keys are long options without the dashes.

    `extra` adds or replaces options of the version's table (``{"async-scheduling": True}``).
    """
    if table.engine != "vllm":
        raise ValueError(f"engine must be vllm, got {table.engine}")
    version = ENGINE.check(table.engine_version)
    _check_batch(table)
    wanted: dict[str, Scalar] = {
        "model": table.model,
        **_weights(table),
        "kv-cache-dtype": _kv_dtype(table, version),
        "tensor-parallel-size": table.tp,
        "pipeline-parallel-size": table.pp,
        "max-num-seqs": table.max_num_seqs,
        "max-num-batched-tokens": table.max_num_batched_tokens,
        "max-model-len": table.max_model_len,
        "gpu-memory-utilization": table.gpu_memory_utilization,
        "enable-chunked-prefill": table.enable_chunked_prefill,
        "enable-prefix-caching": table.enable_prefix_caching,
    }
    wanted |= {key.replace("_", "-"): value for key, value in (extra or {}).items()}
    written: dict[str, Scalar] = {}
    for key, value in wanted.items():
        row = ENGINE.require(key, table.engine_version)
        if row.switch != isinstance(value, bool):
            kind = "true or false" if row.switch else "a value, not a switch"
            raise ValueError(f"vllm option {key} must be {kind}, got {value!r}")
        written |= _boolean(key, bool(value), row, version) if row.switch else {key: value}
    return written


def serve_config(table: PolicyTable, extra: Mapping[str, Scalar] | None = None) -> str:
    """YAML for ``vllm serve --config``, with a heading that says what wrote it."""
    return yaml_file(table, options(table, extra))


def launch_command(table: PolicyTable, config_file: str = CONFIG_FILE) -> list[str]:
    """Command that serves the table with the configuration in `config_file`."""
    return [*model_command(table), "--config", config_file]


def model_command(table: PolicyTable) -> list[str]:
    """The launch command without its ``--config``."""
    version = ENGINE.check(table.engine_version)
    # Before 0.6.4 the file cannot set a plain switch, so it goes on the command line.
    switch = table.enable_prefix_caching and version < _BOOLEANS_IN_FILE
    return ["vllm", "serve", table.model, *(["--enable-prefix-caching"] if switch else [])]


def _boolean(key: str, value: bool, row: Option, version: Version) -> dict[str, Scalar]:
    """How the file of this version says `key` is `value`; nothing where that is the only possible state."""
    if row.negatable_since is not None and version >= row.negatable_since:
        return {key if value else f"no-{key}": True}
    if key == "enable-chunked-prefill":
        return {key: str(value)}
    return {key: True} if value and version >= _BOOLEANS_IN_FILE else {}


def _weights(table: PolicyTable) -> dict[str, Scalar]:
    """`dtype` and, for weights converted while loading, `quantization`.

    A checkpoint that is published quantised names its own method, and vLLM refuses another name for it; so the method
    is left out unless the weights are converted. fp8 is the one format all these versions convert 16-bit weights to.
    """
    precision, published = table.precision, table.checkpoint_format
    if precision in _DTYPES:
        if published is not None and published not in _DTYPES:
            raise ValueError(f"vllm cannot serve a checkpoint in {published} as {precision}")
        return {"dtype": _DTYPES[precision]}
    if precision == "fp8" and not loads_as_published(table):
        if published is not None and published not in _DTYPES:
            raise ValueError(f"vllm cannot convert a checkpoint in {published} to fp8 on load")
        return {"dtype": "auto", "quantization": "fp8"}
    if published is not None and not loads_as_published(table):
        raise ValueError(f"vllm cannot convert a checkpoint in {published} to {precision} on load")
    return {"dtype": "auto"}


def _kv_dtype(table: PolicyTable, version: Version) -> str:
    if table.kv_format not in _KV_DTYPES:
        raise ValueError(f"vllm kv_format must be one of {', '.join(_KV_DTYPES)}, got {table.kv_format}")
    name, since = _KV_DTYPES[table.kv_format]
    if version < since:
        raise ValueError(
            f"vllm {table.engine_version} does not know kv-cache-dtype {name} (since {show_version(since)})"
        )
    return name


def _check_batch(table: PolicyTable) -> None:
    """Rules of vLLM's SchedulerConfig, refused here rather than when the server starts."""
    if table.max_num_batched_tokens < table.max_num_seqs:
        raise ValueError(
            f"vllm max_num_batched_tokens must be >= max_num_seqs {table.max_num_seqs}, "
            f"got {table.max_num_batched_tokens}"
        )
    if not table.enable_chunked_prefill and table.max_num_batched_tokens < table.max_model_len:
        raise ValueError(
            f"vllm max_num_batched_tokens must be >= max_model_len {table.max_model_len} without chunked prefill, "
            f"got {table.max_num_batched_tokens}"
        )

"""SGLang's command: that its parser gives the table back, the memory conversion, versions and quoting."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

import pytest
from policy_documents import HOSTILE, table

from servecast.policies import PolicyTable, sglang


def sgl(**changes: Any) -> PolicyTable:
    return table(**{"engine": "sglang", "engine_version": "0.5.23"} | changes)


def parsed(words: list[str]) -> argparse.Namespace:
    """SGLang's options with the types of server_args.py."""
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name in ("model-path", "dtype", "quantization", "kv-cache-dtype"):
        parser.add_argument(f"--{name}")
    for name in ("tp-size", "pp-size", "max-running-requests", "chunked-prefill-size", "max-prefill-tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--disable-radix-cache", action="store_true")
    return parser.parse_args(words[3:])


@pytest.mark.parametrize("version", ["0.4.0", "0.4.6.post2", "0.5.1.post3", "0.5.23", "0.5.99"])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("caching", [True, False])
def test_engine_reads_the_table_back(version: str, chunked: bool, caching: bool) -> None:
    wanted = sgl(engine_version=version, enable_chunked_prefill=chunked, enable_prefix_caching=caching)
    read = parsed(sglang.launch_arguments(wanted))
    assert read.model_path == wanted.model
    assert read.tp_size == wanted.tp
    assert read.max_running_requests == wanted.max_num_seqs
    assert read.chunked_prefill_size == (wanted.max_num_batched_tokens if chunked else -1)
    assert read.max_prefill_tokens == wanted.max_num_batched_tokens
    assert read.context_length == wanted.max_model_len
    assert read.disable_radix_cache is not caching
    assert (read.dtype, read.quantization, read.kv_cache_dtype) == ("bfloat16", None, "auto")


def test_memory_fraction_keeps_the_kv_cache() -> None:
    """Hand: u 0.9 of 80 GB less 4 GB of working memory is 68 GB, 0.85; less 8 GB of weights, 60 GB."""
    wanted = sgl()
    assert sglang.mem_fraction_static(wanted) == pytest.approx(0.85, rel=1e-12)
    kv_vllm = 0.9 * 80e9 - 8e9 - 4e9
    kv_sglang = sglang.mem_fraction_static(wanted) * 80e9 - 8e9
    assert kv_sglang == pytest.approx(kv_vllm, rel=1e-9)


def test_memory_fraction_never_asks_for_more() -> None:
    for overhead in (1.23456e9, 3.3333e9, 5.55e9):
        wanted = sgl(memory={"gpu_bytes": 80e9, "weight_bytes": 8e9, "overhead_bytes": overhead})
        exact = 0.9 - overhead / 80e9
        assert exact - 1e-4 < sglang.mem_fraction_static(wanted) <= exact


def test_memory_has_to_be_known_and_enough() -> None:
    with pytest.raises(ValueError, match=r"^policy table: memory must be given for sglang, [^\n]+, got nothing$"):
        sglang.launch_arguments(sgl(memory=None))
    with pytest.raises(ValueError, match=r"must leave memory for the KV cache, got 0\.9, 1e\+09 B too little$"):
        sglang.launch_arguments(sgl(memory={"gpu_bytes": 80e9, "weight_bytes": 70e9, "overhead_bytes": 3e9}))


def test_pipeline_parallel_by_version() -> None:
    words = sglang.launch_arguments(sgl(pp=2, engine_version="0.4.6.post2"))
    assert parsed(words).pp_size == 2
    with pytest.raises(ValueError, match=r"^sglang 0\.4\.6 does not know pp-size \(since 0\.4\.6\.post2\)$"):
        sglang.launch_arguments(sgl(pp=2, engine_version="0.4.6"))


def test_kv_format_by_version() -> None:
    assert parsed(sglang.launch_arguments(sgl(kv_format="fp8"))).kv_cache_dtype == "fp8_e4m3"
    with pytest.raises(ValueError, match=r"^sglang 0\.4\.0 does not know kv-cache-dtype fp8_e4m3 \(since 0\.4\.2\)$"):
        sglang.launch_arguments(sgl(kv_format="fp8", engine_version="0.4.0"))
    with pytest.raises(ValueError, match=r"^sglang kv_format must be one of"):
        sglang.launch_arguments(sgl(kv_format="int8"))


@pytest.mark.parametrize(
    ("precision", "published", "expected"),
    [
        ("fp16", "bf16", ("float16", None)),
        ("fp8", "bf16", ("auto", "fp8")),
        ("fp8", "fp8", ("auto", None)),
        ("int4", None, ("auto", None)),
    ],
)
def test_weights(precision: str, published: str | None, expected: tuple[str, str | None]) -> None:
    read = parsed(sglang.launch_arguments(sgl(precision=precision, checkpoint_format=published)))
    assert (read.dtype, read.quantization) == expected


@pytest.mark.parametrize(("precision", "published"), [("int4", "bf16"), ("bf16", "fp8"), ("fp8", "int4")])
def test_conversions_that_no_loader_does(precision: str, published: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^sglang cannot convert a checkpoint in {published} to {precision} on load$"
    ):
        sglang.launch_arguments(sgl(precision=precision, checkpoint_format=published))


@pytest.mark.parametrize(
    ("version", "message"),
    [("0.3.6", "older than 0.4.0"), ("0.6.0", "newer than 0.5.23"), ("1.0", "newer than 0.5.23")],
)
def test_versions_outside_the_table(version: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^sglang {version} is {message}, the (oldest|newest) version known$"):
        sglang.launch_arguments(sgl(engine_version=version))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_data(name: str) -> None:
    words = sglang.launch_arguments(sgl(model=name, gpu=name))
    assert words[words.index("--model-path") + 1] == name
    script = sglang.launch_script(sgl(model=name, gpu=name))
    *top, last = script.split("exec ", 1)
    assert all(line.startswith("#") or line == "set -eu" for line in "".join(top).splitlines())
    assert shlex.split(last) == [*words, "$@"]


def test_other_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^engine must be sglang, got vllm$"):
        sglang.launch_arguments(table())

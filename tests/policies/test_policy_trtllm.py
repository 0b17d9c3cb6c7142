"""TensorRT-LLM's file and command: reading back, the memory conversion, versions and quoting."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import yaml
from policy_documents import HOSTILE, table

from servecast.policies import PolicyTable, trtllm


def trt(**changes: Any) -> PolicyTable:
    return table(**{"engine": "trtllm", "engine_version": "1.2.0"} | changes)


def parsed(words: list[str]) -> argparse.Namespace:
    """Options of commands/serve.py with their types; the model is an argument."""
    assert words[0] == "trtllm-serve"
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("model")
    parser.add_argument("--backend", choices=["pytorch", "tensorrt", "_autodeploy"])
    for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "tp_size", "pp_size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--kv_cache_free_gpu_memory_fraction", type=float)
    parser.add_argument("--extra_llm_api_options")
    return parser.parse_args(words[1:])


@pytest.mark.parametrize("version", ["1.0.0", "1.1", "1.2.1", "1.2.9"])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("caching", [True, False])
def test_engine_reads_the_table_back(version: str, chunked: bool, caching: bool) -> None:
    wanted = trt(engine_version=version, enable_chunked_prefill=chunked, enable_prefix_caching=caching, pp=2)
    read = parsed(trtllm.launch_command(wanted))
    assert (read.model, read.extra_llm_api_options) == (wanted.model, "trtllm.yaml")
    assert (read.tp_size, read.pp_size) == (wanted.tp, 2)
    assert read.max_batch_size == wanted.max_num_seqs
    assert read.max_num_tokens == wanted.max_num_batched_tokens
    assert read.max_seq_len == wanted.max_model_len
    file = yaml.safe_load(trtllm.llm_api_options(wanted))
    assert file == {
        "dtype": "bfloat16",
        "enable_chunked_prefill": chunked,
        "kv_cache_config": {"enable_block_reuse": caching, "free_gpu_memory_fraction": 0.8823, "dtype": "auto"},
    }
    # The file's section replaces the command line's, so the two have to agree.
    assert read.kv_cache_free_gpu_memory_fraction == file["kv_cache_config"]["free_gpu_memory_fraction"]


def test_memory_fraction_keeps_the_kv_cache() -> None:
    """Hand: 60 GB of KV cache out of the 68 GB that 8 GB of weights and 4 GB of working memory leave of 80 GB."""
    fraction = trtllm.free_gpu_memory_fraction(trt())
    assert fraction == 0.8823  # 60 / 68 = 0.88235, rounded down
    assert fraction * 68e9 == pytest.approx(60e9, rel=1e-3)
    assert fraction * 68e9 <= 60e9


def test_all_memory_is_fraction_one() -> None:
    assert trtllm.free_gpu_memory_fraction(trt(gpu_memory_utilization=1.0)) == 1.0


def test_memory_has_to_be_known() -> None:
    with pytest.raises(ValueError, match=r"^policy table: memory must be given for trtllm, [^\n]+, got nothing$"):
        trtllm.llm_api_options(trt(memory=None))


def test_formats() -> None:
    assert trtllm.options(trt(kv_format="fp8"))["kv_cache_config"]["dtype"] == "fp8"
    assert trtllm.options(trt(precision="nvfp4", checkpoint_format="nvfp4"))["dtype"] == "auto"
    assert trtllm.options(trt(precision="fp16", checkpoint_format="bf16"))["dtype"] == "float16"
    with pytest.raises(ValueError, match=r"^trtllm cannot convert a checkpoint in bf16 to fp8 on load$"):
        trtllm.options(trt(precision="fp8", checkpoint_format="bf16"))
    with pytest.raises(ValueError, match=r"^trtllm kv_format must be one of bf16, fp16, fp8, got nvfp4$"):
        trtllm.options(trt(kv_format="nvfp4"))


@pytest.mark.parametrize(("version", "message"), [("0.21.0", "older than 1.0.0"), ("1.3.0", "newer than 1.2.1")])
def test_versions_outside_the_table(version: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^trtllm {version} is {message}, the (oldest|newest) version known$"):
        trtllm.serve_arguments(trt(engine_version=version))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_data(name: str) -> None:
    wanted = trt(model=name, gpu=name)
    assert trtllm.serve_arguments(wanted)[1] == name
    assert yaml.safe_load(trtllm.llm_api_options(wanted)) == trtllm.options(wanted)


def test_other_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^engine must be trtllm, got vllm$"):
        trtllm.llm_api_options(table())

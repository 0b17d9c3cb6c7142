"""The shipped catalogues: every record loads, counts as published, and answers to the names that people write."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.formats import BYTES_PER_ELEMENT
from servecast.readers.catalogues import _key, _records, gpu, gpu_names, llm, llm_names, published_params


@pytest.mark.parametrize("name", llm_names())
def test_counts_agree_with_the_published_ones(name: str):
    # Origin: the count that the publisher states; `source` of the record says where.
    assert llm(name).params_total == pytest.approx(published_params(name), rel=0.01)


@pytest.mark.parametrize("name", llm_names())
def test_dimensions_fit_together(name: str):
    model = llm(name)
    assert model.heads % model.kv_heads == 0
    assert model.moe_layers <= model.layers
    assert model.linear_layers + model.windowed_layers <= model.layers
    assert (model.window > 0) == (model.windowed_layers > 0)
    assert (model.experts > 0) == (model.moe_layers > 0) == (model.expert_intermediate > 0)
    assert (model.intermediate > 0) == (model.moe_layers < model.layers)
    assert model.native_format in BYTES_PER_ELEMENT
    assert model.expert_format is None or model.expert_format in BYTES_PER_ELEMENT
    assert 0 < model.params_active <= model.params_total


def test_the_catalogue_is_as_wide_as_promised():
    assert len(llm_names()) >= 40
    assert len(gpu_names()) >= 25


def test_every_record_states_its_source():
    assert all(record["source"].strip() for record in _records("llms"))


def test_names_are_unique_and_no_alias_points_to_two_records():
    for table in ("gpus", "llms"):
        owner: dict[str, str] = {}
        for record in _records(table):
            for alias in (record["name"], *record["aliases"]):
                assert owner.setdefault(_key(alias), record["name"]) == record["name"], alias


def test_every_measured_model_and_system_is_there(data_path: Callable[..., Path]):
    with data_path("aic-silicon", "agg.csv").open(encoding="utf-8") as file:
        rows = [(row["model_path"], row["system"]) for row in csv.DictReader(file)]
    with gzip.open(data_path("aic-silicon", "disagg.csv.gz"), "rt", encoding="utf-8") as file:
        rows += [(row["model_path"], row["system"]) for row in csv.DictReader(file)]
    for model, system in set(rows):
        assert llm(model).name == model
        assert gpu(system).name == system


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "h100_sxm"),
        ("H100 SXM", "h100_sxm"),
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("h100-pcie", "h100_pcie"),
        ("NVIDIA H200", "h200_sxm"),
        ("h200", "h200_sxm"),
        ("H200_SXM", "h200_sxm"),
        ("h200-141gb", "h200_sxm"),
        ("A100", "a100_sxm"),
        ("a100-80gb", "a100_sxm"),
        ("a100-40gb", "a100_sxm_40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie"),
        ("v100", "v100_sxm"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("4090", "rtx_4090"),
        ("b200", "b200_sxm"),
        ("AMD Instinct MI300X", "mi300x"),
        ("cpu", "cpu"),
    ],
)
def test_gpu_names_as_people_write_them(written: str, name: str):
    assert gpu(written).name == name


def test_the_bare_a100_has_80_gb_and_the_bare_v100_32():
    assert gpu("a100").memory_bytes == 80 * 2**30
    assert gpu("v100").memory_bytes == 32 * 2**30


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("LLAMA_3.1_8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("llama-2-13b-chat", "meta-llama/Llama-2-13b-hf"),
        ("qwen3-32b", "Qwen/Qwen3-32B"),
        ("nvidia/Qwen3-32B-NVFP4", "nvidia/Qwen3-32B-NVFP4"),
        ("Qwen3-235B-A22B-FP8", "Qwen/Qwen3-235B-A22B-FP8"),
        ("gpt-oss 120b", "openai/gpt-oss-120b"),
        ("gemma-2-9b-it", "google/gemma-2-9b"),
        ("gemma-3-27b", "google/gemma-3-27b-it"),
        ("zai-org/GLM-5", "zhipuai/GLM-5"),
        ("Mixtral-8x7B-Instruct", "mistralai/Mixtral-8x7B-v0.1"),
        ("opt-13b", "facebook/opt-13b"),
        ("opt-1.3b", "facebook/opt-1.3b"),
    ],
)
def test_llm_names_as_people_write_them(written: str, name: str):
    assert llm(written).name == name


def test_quantised_variants_differ_in_format_only():
    base, narrow = llm("Qwen/Qwen3-32B"), llm("nvidia/Qwen3-32B-NVFP4")
    assert (base.native_format, narrow.native_format) == ("bf16", "nvfp4")
    assert base.params_total == narrow.params_total
    assert llm("nvidia/DeepSeek-R1-NVFP4").expert_format == "nvfp4"
    assert llm("nvidia/Llama-3.1-8B-Instruct-FP8").native_format == "fp8"


@pytest.mark.parametrize(
    ("written", "near"), [("h2000", "h200_sxm"), ("a1000", "a100_sxm"), ("mi300xx", "mi300x"), ("rtx 4900", "rtx_4090")]
)
def test_a_mistyped_gpu_names_the_nearest(written: str, near: str):
    with pytest.raises(ValueError, match=rf"^gpu must be a catalogue name, got '{written}' \(nearest: .*{near}"):
        gpu(written)


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("llamma-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen3-33b", "Qwen/Qwen3-32B"),
        ("depseek-r1", "deepseek-ai/DeepSeek-R1"),
        ("someone/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_a_mistyped_llm_names_the_nearest(written: str, near: str):
    with pytest.raises(ValueError, match=rf"^llm must be .*, got '{written}' \(nearest: .*{near}"):
        llm(written)


@pytest.mark.parametrize("written", ["", " ", "\x00", "zzzzzz", "/", "x" * 100_000, "a\nb"])
def test_unknown_names_are_refused_in_one_short_line(written: str):
    for resolve in (gpu, llm):
        with pytest.raises(ValueError, match=r"^(gpu|llm) must be ") as refused:
            resolve(written)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 2000


def test_a_gpu_that_is_no_string_is_refused():
    with pytest.raises(ValueError, match="gpu must be a catalogue name, got 100"):
        gpu(100)  # type: ignore[arg-type]  # the wrong type is the test


def _complaint(resolve: Callable[[str], object], text: str) -> str:
    try:
        resolve(text)
    except ValueError as error:
        return str(error)
    return ""


@given(st.text(max_size=40))
def test_any_text_resolves_or_is_refused(text: str):
    for resolve in (gpu, published_params):
        assert "\n" not in _complaint(resolve, text)


def test_a_folder_with_a_config_comes_first(tmp_path: Path):
    folder = tmp_path / "qwen3-32b"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128, "vocab_size": 100}))
    assert llm(folder).layers == 2
    assert llm(str(folder / "config.json")).hidden == 64


def test_a_folder_without_a_config_is_no_model(tmp_path: Path):
    with pytest.raises(ValueError, match=r"llm must be a catalogue name or a folder with a config\.json"):
        llm(tmp_path)


def test_lookups_return_the_same_record():
    assert gpu("h100") is gpu("H100_SXM")
    assert llm("qwen3-32b") is llm("Qwen/Qwen3-32B")


def test_the_catalogues_import_nothing_heavy():
    code = (
        "import sys; from servecast.readers.catalogues import gpu, llm; gpu('h100'); llm('qwen3-32b');"
        "print([m for m in ('numpy', 'scipy', 'pydantic', 'yaml', 'torch', 'difflib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"

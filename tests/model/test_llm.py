"""Counts of `Llm` against published totals, hand values and the reference tables."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.formats import BYTES_PER_ELEMENT, COMPUTE_CLASS, PRECISIONS, canonical_format
from servecast.model.llm import Llm
from servecast.readers.catalogues import llm

TINY = Llm(name="tiny", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, vocabulary=10, intermediate=16)


def test_parameters_of_a_tiny_model_counted_by_hand():
    # Origin: hand. q 8x8, k and v 8x4 each, o 8x8 = 192; gated MLP 3x8x16 = 384; two norms 16; per layer 592.
    # Two layers 1184, final norm 8, two tables of 10x8 = 160.
    assert TINY.attention_params == 192
    assert TINY.dense_mlp_params == 384
    assert TINY.params_total == 1184 + 8 + 160
    assert TINY.params_active == TINY.params_total


def test_tied_embeddings_are_counted_once():
    assert TINY.params_total - replace(TINY, tied_embeddings=True).params_total == 80  # hand: one 10x8 table


def test_biases_counted_by_hand():
    biased = replace(TINY, attention_bias=True, mlp_bias=True)
    # Origin: hand. Per layer q 8 + k 4 + v 4 and gate 16 + up 16 + down 8.
    assert biased.params_total - TINY.params_total == 2 * (16 + 40)


def test_mixture_of_experts_counted_by_hand():
    moe = replace(TINY, intermediate=0, experts=4, experts_per_token=1, expert_intermediate=5, moe_layers=2)
    # Origin: hand. One expert 3x8x5 = 120, router 8x4 = 32.
    assert moe.params_total == 2 * (192 + 16 + 32 + 4 * 120) + 8 + 160
    assert moe.params_total - moe.params_active == 2 * 3 * 120


@pytest.mark.parametrize(
    ("name", "published"),
    [  # Origin: parameter totals of the published safetensors indices, checkpoints and papers.
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Llama-3.1-405B", 405_853_388_800),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
        ("deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224),
        ("google/gemma-2-27b", 27_227_128_320),
        ("microsoft/phi-4", 14_659_507_200),
        ("facebook/opt-6.7b", 6_658_473_984),
        ("facebook/opt-13b", 12_853_473_280),
    ],
)
def test_totals_equal_the_published_ones(name: str, published: int):
    assert llm(name).params_total == pytest.approx(published, rel=2e-4)


@pytest.mark.parametrize(
    ("name", "active", "rtol"),
    [  # Origin: activated parameters that the papers state (nominal figures, hence the width).
        ("openai/gpt-oss-120b", 5.13e9 + 2880 * 201088, 0.01),  # arXiv 2508.10925 leaves one table out
        ("deepseek-ai/DeepSeek-V3", 37e9, 0.02),  # arXiv 2412.19437
        ("mistralai/Mixtral-8x7B-v0.1", 12.9e9, 0.01),  # arXiv 2401.04088
        ("moonshotai/Kimi-K2", 32.6e9, 0.02),  # arXiv 2507.20534
        ("Qwen/Qwen3-235B-A22B", 22e9, 0.02),  # arXiv 2505.09388
    ],
)
def test_active_parameters_agree_with_papers(name: str, active: float, rtol: float):
    assert llm(name).params_active == pytest.approx(active, rel=rtol)


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # Origin: hand.
        ("meta-llama/Llama-3.1-8B", 32 * 2 * 8 * 128 * 2),
        ("meta-llama/Llama-3.1-8B", 131_072),
        ("Qwen/Qwen3-32B", 262_144),
        ("deepseek-ai/DeepSeek-R1", 61 * (512 + 64) * 2),
        ("deepseek-ai/DeepSeek-R1", 70_272),
        ("Qwen/Qwen3.5-397B-A17B", 15 * 2 * 2 * 256 * 2),  # 45 of 60 layers keep a state instead
        ("facebook/opt-13b", 40 * 2 * 5120 * 2),
    ],
)
def test_kv_bytes_per_token(name: str, expected: int):
    assert llm(name).kv_bytes_per_token("bf16") == pytest.approx(expected, rel=1e-12)


def test_reference_table_agrees(data_path: Callable[..., Path]):
    # Origin: the table of architectures that the project keeps apart from this code.
    with data_path("reference-tables", "models.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 22
    for row in rows:
        model = llm(row["model_path"])
        without_indexer = replace(model, index_heads=0, index_dim=0, index_topk=0)  # the table leaves it out
        expected = float(row["kv_bytes_per_token_bf16"])
        assert without_indexer.kv_bytes_per_token("bf16") == pytest.approx(expected, rel=1e-12), row["model_path"]
        assert without_indexer.params_total == pytest.approx(float(row["params_total"]), rel=2e-3), row["model_path"]
        for column, value in (("layers", model.layers), ("hidden", model.hidden), ("heads", model.heads)):
            assert value == int(row[column]), (row["model_path"], column)


def test_weight_bytes_of_llama_2_13b():
    # Origin: fp16 payload that lambda-scale's artefact logs.
    assert llm("meta-llama/Llama-2-13b-hf").weight_bytes("fp16") == pytest.approx(26_031_728_640, rel=1e-12)


def test_weight_bytes_of_gpt_oss_120b():
    # Origin: checkpoint size of 60.8 GiB in arXiv 2508.10925, table 1.
    assert llm("gpt-oss-120b").weight_bytes("bf16", "mxfp4") == pytest.approx(60.8 * 2**30, rel=0.01)


def test_fp8_halves_all_but_the_tables():
    model = llm("meta-llama/Llama-3.1-8B")
    tables = 2 * 128_256 * 4096 * 2  # hand: embedding and head in 16 bit
    half = (model.weight_bytes("bf16") - tables) / 2
    assert model.weight_bytes("fp8") == pytest.approx(tables + half, rel=1e-12)


def test_prefill_flops_of_a_tiny_model():
    # Origin: hand. 2 FLOP per trunk parameter; 4 n_h d_h = 32 per cached token and layer, half the prompt on average.
    assert TINY.prefill_flops_per_token(100) == pytest.approx(2 * (1184 + 8) + 2 * 32 * 50, rel=1e-12)


def test_windowed_layers_stop_growing():
    windowed = replace(TINY, window=10, windowed_layers=1)
    assert windowed.attention_flops(10) == pytest.approx(TINY.attention_flops(10), rel=1e-12)
    assert windowed.attention_flops(1000) == pytest.approx(32 * (1000 + 10), rel=1e-12)  # hand


@given(context=st.floats(0, 1e7), more=st.floats(1, 1e7))
def test_attention_never_shrinks_with_context(context: float, more: float):
    for name in ("gpt-oss-20b", "deepseek-v3.2", "gemma-3-27b", "qwen3-32b"):
        assert llm(name).attention_flops(context + more) >= llm(name).attention_flops(context)


def test_narrower_formats_never_weigh_more():
    ordered = ["fp32", "bf16", "fp8", "nvfp4", "mxfp4"]
    for model in (llm("llama-3.1-70b"), llm("deepseek-r1"), llm("gpt-oss-20b")):
        weights = [model.weight_bytes(name) for name in ordered]
        assert weights == sorted(weights, reverse=True)


def test_every_precision_name_has_bytes_and_a_compute_class():
    for name in PRECISIONS:
        canonical = canonical_format(name)
        assert BYTES_PER_ELEMENT[canonical] > 0
        assert COMPUTE_CLASS[canonical]


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision must be one of .* got 'fp7'"):
        canonical_format("fp7")

"""Deployments: bytes by hand and against published floors, refusals, and the struct of arrays."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.deployment import Deployment, Deployments, divisibility_error, stack
from servecast.model.llm import Llm
from servecast.readers import catalogues
from servecast.readers.deployments import deployment

TINY = Llm(name="tiny", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, vocabulary=10, intermediate=16)
TINY_MOE = replace(TINY, intermediate=0, experts=4, experts_per_token=1, expert_intermediate=5, moe_layers=2)
MIXED = (
    deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=2),
    deployment("deepseek-ai/DeepSeek-V3", "h200_sxm", "sglang", tp=1, dp=8, ep=8),
    deployment("openai/gpt-oss-120b", "b200_sxm", "vllm", "fp4", tp=4),
    deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=4),
    deployment("Qwen/Qwen3-Next-80B-A3B-Instruct", "a100_sxm", "vllm", tp=4, pp=2),
)


def tiny(llm: Llm = TINY, **degrees: int) -> Deployment:
    return Deployment(
        llm=llm, gpu=catalogues.gpu("h100_sxm"), trunk_format="bf16", expert_format="fp8", kv_format="bf16", **degrees
    )


def test_gpus_of_one_instance() -> None:
    assert tiny(tp=2, pp=3, dp=4).gpus == 24  # hand


@pytest.mark.parametrize(("tp", "floor_ms"), [(2, 9.78), (4, 4.89), (8, 2.44)])
def test_weight_floor_of_qwen3_32b_on_h100(tp: int, floor_ms: float) -> None:
    # Origin: step notes 4.6 [D], floors of the linear form: weight bytes over bandwidth.
    one = deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=tp)
    assert one.weight_bytes_per_gpu / one.gpu.bandwidth_bytes_per_s * 1e3 == pytest.approx(floor_ms, rel=0.005)


def test_experts_are_spread_over_data_parallel_ranks_and_the_rest_is_not() -> None:
    # Origin: hand. Trunk of test_llm: 2 x (192 + 16 + 32) + 8 = 488 parameters and two tables of 80, 2 bytes each:
    # 1296; routed experts 2 x 4 x 120 = 960 of 1 byte.
    assert tiny(TINY_MOE).weight_bytes_per_gpu == pytest.approx(1296 + 960, rel=1e-12)
    assert tiny(TINY_MOE, tp=2).weight_bytes_per_gpu == pytest.approx(648 + 480, rel=1e-12)
    assert tiny(TINY_MOE, dp=2).weight_bytes_per_gpu == pytest.approx(1296 + 480, rel=1e-12)
    assert tiny(TINY_MOE, tp=2, dp=2, ep=4).weight_bytes_per_gpu == pytest.approx(648 + 240, rel=1e-12)
    assert tiny(TINY_MOE, pp=2).weight_bytes_per_gpu == pytest.approx((1296 + 960) / 2, rel=1e-12)


@pytest.mark.parametrize(("tp", "expected"), [(1, 262_144), (2, 131_072), (8, 32_768), (16, 32_768), (64, 32_768)])
def test_kv_heads_are_not_split_below_one(tp: int, expected: int) -> None:
    # Origin: step notes 2: 262 144 bytes a token for Qwen3-32B in 16 bit; 8 KV heads by hand.
    one = deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=tp)
    assert one.kv_bytes_per_token_per_gpu() == pytest.approx(expected, rel=1e-12)


def test_a_latent_cache_is_not_split() -> None:
    # Origin: step notes 2: L (kv_rank + rope) b_kv = 61 x 576 x 2 bytes on every rank.
    for tp in (1, 8):
        one = deployment("deepseek-ai/DeepSeek-V3", "h200_sxm", "vllm", tp=tp)
        assert one.kv_bytes_per_token_per_gpu() == pytest.approx(61 * 576 * 2, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "degrees", "words"),
    [
        ("Qwen/Qwen3-32B", {"tp": 3}, "tp must divide the 64 attention heads"),
        ("Qwen/Qwen2.5-7B-Instruct", {"tp": 7}, "tp must divide or be a multiple of the 4 KV heads"),
        ("Qwen/Qwen3-32B", {"tp": 1, "pp": 65}, "pp must be at most the 64 layers"),
        ("Qwen/Qwen3-32B", {"tp": 2, "ep": 2}, "ep must be 1 for Qwen/Qwen3-32B, which has no experts"),
        ("deepseek-ai/DeepSeek-V3", {"tp": 4, "dp": 2, "ep": 3}, "ep must divide tp x dp = 8"),
        ("Qwen/Qwen1.5-MoE-A2.7B", {"tp": 8, "ep": 8}, "ep must divide the 60 experts"),
    ],
)
def test_impossible_splits_are_named(model: str, degrees: dict[str, int], words: str) -> None:
    error = divisibility_error(catalogues.llm(model), **degrees)
    assert error is not None
    assert words in error
    assert str(degrees.get("ep", degrees.get("pp", degrees["tp"]))) in error


@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        ("Qwen/Qwen3-32B", {"tp": 8}),
        ("Qwen/Qwen3-235B-A22B-FP8", {"tp": 8}),  # 4 KV heads, replicated twice
        ("deepseek-ai/DeepSeek-V3", {"tp": 1, "dp": 8, "ep": 8}),
        ("deepseek-ai/DeepSeek-V3", {"tp": 16}),
    ],
)
def test_splits_that_engines_run_are_accepted(model: str, degrees: dict[str, int]) -> None:
    assert divisibility_error(catalogues.llm(model), **degrees) is None


def test_peer_link_inside_a_node_and_network_beyond() -> None:
    inside, beyond = (deployment("deepseek-ai/DeepSeek-V3", "h200_sxm", "vllm", tp=tp) for tp in (8, 16))
    d = stack((inside, beyond), (0, 0), np.array([0, 1]))
    gpu = inside.gpu  # 8 GPUs a node
    np.testing.assert_allclose(
        d.link_bandwidth, [gpu.peer.bandwidth_bytes_per_s, gpu.inter_node.bandwidth_bytes_per_s], rtol=1e-12
    )


@pytest.mark.parametrize(
    ("gpu", "fmt", "rate"),
    [
        # Origin: weight-only formats are expanded to 16 bit where the GPU has no units for them (docs of the engines).
        ("h100_sxm", "nvfp4", "bf16_flops"),
        ("b200_sxm", "nvfp4", "fp4_flops"),
        ("h100_sxm", "fp8", "fp8_flops"),
        ("a100_sxm", "fp8", "bf16_flops"),
        ("h100_sxm", "int4", "bf16_flops"),
    ],
)
def test_rate_that_bounds_a_format(gpu: str, fmt: str, rate: str) -> None:
    one = deployment("Qwen/Qwen3-32B", gpu, "vllm", fmt)
    d = stack((one,), (0,), np.array([0]))
    assert d.trunk_flops[0] == pytest.approx(getattr(one.gpu, rate), rel=1e-12)


def columns(d: Deployments) -> dict[str, np.ndarray]:
    return {f.name: getattr(d, f.name) for f in fields(d) if f.name != "groups"}


@given(st.lists(st.integers(0, len(MIXED) - 1), min_size=1, max_size=12))
def test_stacked_rows_are_those_of_each_deployment_alone(index: list[int]) -> None:
    # Origin: the same rows one by one.
    d = stack(MIXED, (0, 1, 2, 0, 2), np.array(index))
    for position, number in enumerate(index):
        alone = stack((MIXED[number],), (0,), np.array([0]))
        for name, column in columns(d).items():
            assert column[position] == columns(alone)[name][0]
    covered = np.concatenate([group.rows for group in d.groups])
    np.testing.assert_array_equal(np.sort(covered), np.arange(len(index)))


@given(st.permutations(range(8)))
def test_taking_rows_keeps_values_and_groups(order: list[int]) -> None:
    # Origin: stacking the taken rows directly.
    index = np.array([0, 1, 2, 3, 4, 0, 1, 3])
    sets = (0, 1, 2, 0, 2)
    rows = np.array(order[:5])
    taken, direct = stack(MIXED, sets, index).rows(rows), stack(MIXED, sets, index[rows])
    for name, column in columns(taken).items():
        np.testing.assert_array_equal(column, columns(direct)[name])
    found = {g.rows.tobytes(): replace(g, rows=np.array([])) for g in taken.groups}
    expected = {g.rows.tobytes(): replace(g, rows=np.array([])) for g in direct.groups}
    assert found.keys() == expected.keys()
    for key, group in found.items():
        for field in fields(group):
            if field.name != "rows":
                assert getattr(group, field.name) == getattr(expected[key], field.name)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^engine must be one of vllm, sglang, trtllm, got 'tgi'$"):
        deployment("Qwen/Qwen3-32B", "h100_sxm", "tgi")


@pytest.mark.parametrize(
    ("model", "gpu", "words"),
    [("Qwen/Qwen3-23B", "h100_sxm", "nearest: .*Qwen/Qwen3"), ("Qwen/Qwen3-32B", "h300", "nearest: .*h[12]00")],
)
def test_unknown_names_are_refused_with_the_nearest(model: str, gpu: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        deployment(model, gpu, "vllm")


def test_a_part_holds_the_points_of_its_group() -> None:
    d = stack(MIXED, (0, 1, 2, 0, 2), np.array([4, 0, 3, 1]))
    for group in d.groups:
        part = d.part(group)
        np.testing.assert_array_equal(part.hidden, d.hidden[group.rows])
        assert len(part.groups) == 1
    # the two dense deployments on one GPU type share a group
    assert sorted(len(group.rows) for group in d.groups) == [1, 1, 2]

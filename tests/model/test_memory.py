"""Memory of a deployment against BLIS's published formula, measured admission, hand values and limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.memory import MEMORY_RULES, MemoryRule, memory_budget, running_batch
from servecast.readers.deployments import deployment

VLLM = MEMORY_RULES["vllm"]
GIB = 2.0**30


def test_kv_tokens_of_qwen3_32b_on_two_h100() -> None:
    # Origin: step notes 4.5 [D]: about 307 k tokens, found from the admission of measured runs.
    budget = memory_budget(deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=2), VLLM)
    assert budget.kv_tokens == pytest.approx(307e3, rel=0.05)


def test_sglang_holds_few_tokens_of_qwen3_32b_on_one_h100() -> None:
    # Origin: step notes 4.5 [D]: runs with TTFT of 7-89 s obey the admission law with 5-8 k tokens.
    budget = memory_budget(deployment("Qwen/Qwen3-32B", "h100_sxm", "sglang"), MEMORY_RULES["sglang"])
    assert 4.5e3 < budget.kv_tokens < 9e3


@pytest.mark.parametrize(
    ("model", "tp"),
    [
        ("Qwen/Qwen3-32B", 2),
        ("Qwen/Qwen3-32B", 8),
        ("meta-llama/Llama-3.1-8B-Instruct", 1),
        ("meta-llama/Llama-3.1-70B", 4),
        ("Qwen/Qwen2.5-14B", 1),
    ],
)
@pytest.mark.parametrize("gpu", ["h100_sxm", "h200_sxm"])
def test_agrees_with_the_formula_of_blis(model: str, tp: int, gpu: str) -> None:
    # Origin: step notes 3.3 [P], independent of ours: 0.9 x GPU GiB x tp - weights - 5.5 GiB activations per replica
    # - non-torch (0.15 GiB at tp 1, else 0.6 GiB per GPU), divided by the bytes of a token.
    one = deployment(model, gpu, "vllm", tp=tp)
    weights = 2.0 * one.llm.params_total
    other = 5.5 * GIB + (0.15 if tp == 1 else 0.6 * tp) * GIB
    tokens = (0.9 * one.gpu.memory_bytes * tp - weights - other) / one.llm.kv_bytes_per_token()
    assert memory_budget(one, VLLM).kv_tokens == pytest.approx(tokens, rel=0.10)


def test_budget_of_vllm_by_hand() -> None:
    # Origin: hand. Llama-3.1-8B, tp 1, 80 GiB: 0.9 x 85.899 = 77.309 GB; weights 2 x 8.030261248 = 16.0605 GB; context
    # 0.9 and graphs 0.5 GB; 8192 tokens x 2 bytes x (3 x 14336 + 6 x 4096) = 1.107296 GB; logits 6 x 256 x 128256 =
    # 0.197001 GB.
    budget = memory_budget(deployment("meta-llama/Llama-3.1-8B-Instruct", "h100_sxm", "vllm"), VLLM)
    overhead = 0.9e9 + 0.5e9 + 1.107296256e9 + 0.197001216e9
    left = 0.9 * 80 * GIB - 2 * 8_030_261_248 - overhead
    assert budget.overhead_bytes == pytest.approx(overhead, rel=1e-9)
    assert budget.kv_bytes == pytest.approx(left, rel=1e-9)
    assert budget.kv_tokens == pytest.approx(left / 131_072, rel=1e-9)


def test_a_fraction_of_what_is_free_by_hand() -> None:
    # Origin: hand; TensorRT-LLM's `free_gpu_memory_fraction` applies after loading.
    one = deployment("meta-llama/Llama-3.1-8B-Instruct", "h100_sxm", "trtllm")
    device = memory_budget(one, MemoryRule(fraction=0.5, of_free=True))
    whole = memory_budget(one, MemoryRule(fraction=1.0, of_free=True))
    assert device.kv_bytes == pytest.approx(0.5 * whole.kv_bytes, rel=1e-12)


def test_reserve_per_chunk_token_by_hand() -> None:
    one = deployment("meta-llama/Llama-3.1-8B-Instruct", "h100_sxm", "sglang")
    plain, reserved = (
        memory_budget(one, MemoryRule(fraction=0.9, reserve_bytes_per_chunk_token=rate), max_batched_tokens=4096.0)
        for rate in (0.0, 1e6)
    )
    assert plain.kv_bytes - reserved.kv_bytes == pytest.approx(4.096e9, rel=1e-9)  # hand: 4096 x 1 MB


def test_weights_that_do_not_fit_leave_no_tokens() -> None:
    budget = memory_budget(deployment("meta-llama/Llama-3.1-405B", "h100_sxm", "vllm", tp=8), VLLM)
    assert budget.kv_bytes < 0.0
    assert budget.kv_tokens == 0.0


@given(
    st.sampled_from(["Qwen/Qwen3-32B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-120b"]),
    st.sampled_from(["vllm", "sglang", "trtllm"]),
    st.floats(20e9, 300e9),
    st.floats(1.0, 2.0),
)
def test_more_memory_never_holds_fewer_tokens(model: str, engine: str, memory: float, factor: float) -> None:
    # Origin: theory.
    one = deployment(model, "h200_sxm", engine, tp=4)
    small, large = (
        memory_budget(replace(one, gpu=replace(one.gpu, memory_bytes=size)), MEMORY_RULES[engine]).kv_tokens
        for size in (memory, memory * factor)
    )
    assert 0.0 <= small <= large


@given(st.floats(1024.0, 32768.0), st.floats(1.0, 1024.0), st.floats(1.0, 4.0))
def test_wider_steps_leave_less_for_the_cache(tokens: float, sequences: float, factor: float) -> None:
    # Origin: theory. Activations grow with the tokens of a step, logits with its sequences.
    one = deployment("Qwen/Qwen3-32B", "h200_sxm", "vllm")
    base = memory_budget(one, VLLM, max_batched_tokens=tokens, max_num_seqs=sequences).kv_tokens
    wide = memory_budget(one, VLLM, max_batched_tokens=tokens * factor, max_num_seqs=sequences).kv_tokens
    many = memory_budget(one, VLLM, max_batched_tokens=tokens, max_num_seqs=sequences * factor).kv_tokens
    assert max(wide, many) <= base


def test_running_batch_of_the_published_example() -> None:
    # Origin: step notes 4.5 [D]: 307 k tokens, isl 4096, c 128: B_run about 66. At osl 1024 by hand 307000 / 4608 =
    # 66.6.
    assert running_batch(307e3, 4096, 1024, 128, full_length=False) == 66.0


@pytest.mark.parametrize(
    ("kv_tokens", "wanted", "full_length", "expected"),
    [
        # Origin: hand, isl 100, osl 50: 125 tokens on average, 150 at full length.
        (1000.0, 5.0, False, 5.0),
        (1000.0, 50.0, False, 8.0),
        (1000.0, 50.0, True, 6.0),
        (10.0, 50.0, False, 1.0),
        (0.0, 50.0, True, 1.0),
    ],
)
def test_running_batch_by_hand(kv_tokens: float, wanted: float, full_length: bool, expected: float) -> None:
    assert running_batch(kv_tokens, 100, 50, wanted, full_length=full_length) == expected


def test_running_batch_of_arrays_is_a_map() -> None:
    # Origin: the same points one by one.
    rng = np.random.default_rng(0)
    tokens, isl, osl, wanted = (rng.uniform(1.0, high, 50) for high in (1e5, 4e3, 1e3, 200.0))
    full = rng.random(50) < 0.5
    together = running_batch(tokens, isl, osl, wanted, full_length=full)
    alone = [float(running_batch(tokens[i], isl[i], osl[i], wanted[i], full_length=bool(full[i]))) for i in range(50)]
    np.testing.assert_array_equal(together, alone)
    assert np.all(together <= wanted)

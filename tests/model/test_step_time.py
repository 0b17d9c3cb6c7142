"""One forward pass: against a slow scalar composition written from the published layer shapes, and its limits."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from servecast.calibration.profile import load_profile
from servecast.model.deployment import Deployment, stack
from servecast.model.hardware import Gpu, Link
from servecast.model.kernels import AllReduceCurve, KernelParameters, all_reduce_seconds
from servecast.model.step_time import KernelSet, PassTerms, decode_pass, prefill_pass
from servecast.readers.deployments import deployment

TERMS = [field.name for field in fields(PassTerms)]
KERNELS = load_profile().kernels
H100, H200, CLOSED = 0, 1, 2

ZOO: tuple[tuple[Deployment, int], ...] = (
    (deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=4), H100),
    (deployment("meta-llama/Llama-3.1-8B-Instruct", "h200_sxm", "trtllm", "fp8"), H200),
    (deployment("Qwen/Qwen3-235B-A22B-FP8", "h200_sxm", "sglang", tp=8, ep=8), H200),
    (deployment("deepseek-ai/DeepSeek-V3", "h200_sxm", "sglang", tp=1, dp=8, ep=8), H200),
    (deployment("openai/gpt-oss-120b", "b200_sxm", "vllm", "fp4", tp=2), CLOSED),
    (deployment("nvidia/Qwen3-32B-NVFP4", "h100_sxm", "vllm", tp=2, pp=2), H100),
    (deployment("zhipuai/GLM-5", "b200_sxm", "trtllm", "fp8", tp=8), CLOSED),
    (deployment("Qwen/Qwen3-32B", "a100_sxm", "vllm", tp=16), CLOSED),
)
LINEAR = (deployment("Qwen/Qwen3-Next-80B-A3B-Instruct", "h100_sxm", "vllm", tp=4), H100)


# ---- the slow obvious form: Python floats, one point, scipy for surfaces --------------------------------


def corrected(parameters: KernelParameters, seconds: float, *coordinates: float) -> float:
    if parameters.surface is None:
        return seconds
    knots = parameters.surface.knots
    held = [min(max(math.log2(max(x, 1.0)), axis[0]), axis[-1]) for x, axis in zip(coordinates, knots, strict=True)]
    return seconds * math.exp(RegularGridInterpolator(knots, parameters.surface.values)(held)[0])


def rounded_roofline(p: KernelParameters, flops: float, nbytes: float, peak: float, bandwidth: float) -> float:
    memory, compute = nbytes / (p.bandwidth_efficiency * bandwidth), flops / (p.compute_efficiency * peak)
    return p.floor_s + math.pow(memory**p.exponent + compute**p.exponent, 1.0 / p.exponent)


class Slow:
    """Layer by layer, as step notes 3.1 and 4.3 count it."""

    def __init__(self, one: Deployment, kset: KernelSet) -> None:
        self.one, self.llm, self.gpu, self.kset = one, one.llm, one.gpu, kset
        self.bandwidth = one.gpu.bandwidth_bytes_per_s
        self.bytes = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 4.5 / 8, "mxfp4": 4.25 / 8}
        self.rate = {
            "bf16": self.gpu.bf16_flops,
            "mxfp4": self.gpu.bf16_flops,
            "fp8": self.gpu.fp8_flops or self.gpu.bf16_flops,
            "fp8_block": self.gpu.fp8_flops or self.gpu.bf16_flops,
            "nvfp4": self.gpu.fp4_flops or self.gpu.bf16_flops,
        }

    def gemm(self, m: float, n: float, k: float, fmt: str) -> float:
        weight = self.bytes[fmt]
        weight_only = fmt == "mxfp4" or (fmt == "nvfp4" and self.gpu.fp4_flops is None)
        nbytes = weight * n * k + (2.0 if weight_only else weight) * m * k + 2.0 * m * n
        parameters = self.kset.gemm[fmt]
        seconds = rounded_roofline(parameters, 2.0 * m * n * k, nbytes, self.rate[fmt], self.bandwidth)
        return corrected(parameters, seconds, m, n, k)

    def layers(self, m: float) -> float:
        """All GEMMs of the trunk."""
        llm, tp, fmt = self.llm, self.one.tp, self.one.trunk_format
        h, query = llm.hidden, llm.heads * llm.head_dim / tp
        if llm.is_mla:
            heads = llm.heads / tp
            attention = (
                self.gemm(m, llm.q_rank + llm.kv_rank + llm.rope_dim, h, fmt)
                + self.gemm(m, heads * (llm.nope_dim + llm.rope_dim), llm.q_rank, fmt)
                + self.gemm(m, heads * (llm.nope_dim + llm.value_dim), llm.kv_rank, fmt)
                + self.gemm(m, h, heads * llm.value_dim, fmt)
            )
        else:
            kv = 2.0 * max(llm.kv_heads / tp, 1.0) * llm.head_dim
            attention = self.gemm(m, query + kv, h, fmt) + self.gemm(m, h, query, fmt)
        total = llm.layers * attention
        for count, width in ((llm.dense_layers, llm.intermediate), (llm.moe_layers, llm.shared_intermediate)):
            if count and width:
                total += count * (self.gemm(m, 2.0 * width / tp, h, fmt) + self.gemm(m, h, width / tp, fmt))
        return total

    def head(self, rows: float) -> float:
        return self.gemm(rows, self.llm.vocabulary / self.one.tp, self.llm.hidden, "bf16")

    def collectives(self, m: float) -> float:
        one, link = self.one, self.gpu.peer if self.one.tp * self.one.dp <= self.gpu.gpus_per_node else None
        bandwidth = (link or self.gpu.inter_node).bandwidth_bytes_per_s
        ratio = bandwidth / self.kset.link_bandwidth_bytes_per_s
        nbytes = 2.0 * m * self.llm.hidden

        def reduce(size: float, ranks: int) -> float:
            return float(all_reduce_seconds(self.kset.all_reduce, size, ranks, bandwidth_ratio=ratio))

        after_mlp = reduce(nbytes * one.dp, one.tp * one.dp) if one.dp > 1 else reduce(nbytes, one.tp)
        return self.llm.layers * (reduce(nbytes, one.tp) + after_mlp) + (one.pp - 1) * (nbytes / bandwidth + 10e-6)

    def experts(self, m: float) -> tuple[float, float]:
        llm, one = self.llm, self.one
        if not llm.is_moe:
            return 0.0, 0.0
        tokens, share = m * one.dp, llm.experts_per_token / llm.experts
        width = llm.expert_intermediate * one.ep / (one.tp * one.dp)
        matrices = 3.0 * llm.hidden * width
        read = llm.experts / one.ep * (1.0 - (1.0 - share) ** tokens) * matrices * self.bytes[one.expert_format]
        visits = tokens * llm.experts_per_token / one.ep
        activations = 2.0 * visits * (2.0 * llm.hidden + 3.0 * width)
        peak = self.rate[one.expert_format]
        return (
            llm.moe_layers * (read + activations) / self.bandwidth,
            llm.moe_layers * 2.0 * visits * matrices / peak,
        )

    def decode_attention(self, batch: float, context: float) -> float:
        llm, tp = self.llm, self.one.tp
        element = self.bytes[self.one.kv_format]
        if llm.is_mla:
            seen = min(context, llm.index_topk or context)
            nbytes = batch * (seen * (llm.kv_rank + llm.rope_dim) * element + context * llm.index_dim)
            flops = 2.0 * batch * seen * (2.0 * llm.kv_rank + llm.rope_dim) * llm.heads / tp
            latent = self.kset.latent_attention
            return llm.layers * rounded_roofline(latent, flops, nbytes, self.gpu.bf16_flops, self.bandwidth)
        parameters = self.kset.decode_attention[self.one.kv_format]
        kv_heads = max(llm.kv_heads / tp, 1.0)
        total = 0.0
        for count, seen in (
            (llm.layers - llm.windowed_layers, context),
            (llm.windowed_layers, min(context, llm.window)),
        ):
            if count:
                nbytes = 2.0 * batch * seen * kv_heads * llm.head_dim * element
                flops = 4.0 * batch * seen * llm.heads / tp * llm.head_dim
                seconds = rounded_roofline(parameters, flops, nbytes, self.gpu.bf16_flops, self.bandwidth)
                group = llm.heads / tp / kv_heads
                total += count * corrected(parameters, seconds, nbytes, group, batch * kv_heads)
        return total

    def prefill_attention(self, length: float) -> float:
        llm, tp, parameters = self.llm, self.one.tp, self.kset.prefill_attention
        heads, kv_heads, head_dim = llm.heads / tp, max(llm.kv_heads / tp, 1.0), float(llm.head_dim)
        if llm.is_mla:
            kv_heads, head_dim = heads, (llm.nope_dim + llm.rope_dim + llm.value_dim) / 2.0
        # a token that sees at most w others: n w pairs instead of n^2 / 2, the triangle of side sqrt(2 n w)
        sides = [(llm.layers - llm.windowed_layers, length)]
        if llm.windowed_layers:
            sides.append((llm.windowed_layers, min(length, math.sqrt(2.0 * length * llm.window))))
        total = 0.0
        for count, side in sides:
            flops = 2.0 * heads * head_dim * side**2
            nbytes = 4.0 * side * head_dim * (heads + kv_heads)
            seconds = rounded_roofline(parameters, flops, nbytes, self.gpu.bf16_flops, self.bandwidth)
            total += count * corrected(parameters, seconds, side, heads, head_dim)
        return total

    def decode(self, batch: float, context: float) -> list[float]:
        gemm = self.layers(batch) + self.head(batch)
        return [gemm, self.decode_attention(batch, context), self.collectives(batch), *self.experts(batch)]

    def prefill(self, length: float, chunk: float) -> list[float]:
        chunks = max(length / chunk, 1.0)
        m = length / chunks
        memory, compute = self.experts(m)
        gemm = chunks * self.layers(m) + self.head(1.0)
        collectives = chunks * self.collectives(m)
        return [gemm, self.prefill_attention(length), collectives, chunks * memory, chunks * compute]


def random_points(size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, len(ZOO), size),
        np.round(2.0 ** rng.uniform(0.0, 9.0, size)),
        np.round(2.0 ** rng.uniform(2.0, 15.0, size)),
    )


def test_decode_equals_the_slow_form_in_any_mix() -> None:
    # Origin: independent slow code above.
    index, batch, context = random_points(60, 1)
    d = stack([one for one, _ in ZOO], [kset for _, kset in ZOO], index)
    terms = decode_pass(d, KERNELS, batch, context)
    for i, number in enumerate(index):
        slow = Slow(ZOO[number][0], KERNELS[ZOO[number][1]]).decode(batch[i], context[i])
        np.testing.assert_allclose([getattr(terms, name)[i] for name in TERMS], slow, rtol=1e-9, atol=1e-15)


def test_prefill_equals_the_slow_form_in_any_mix() -> None:
    # Origin: independent slow code above. Sparse attention (GLM-5) up to the tokens that it sees: full attention.
    index, _, length = random_points(60, 2)
    topk = np.array([one.llm.index_topk or np.inf for one, _ in ZOO])[index]
    length = np.minimum(length, topk)
    d = stack([one for one, _ in ZOO], [kset for _, kset in ZOO], index)
    terms = prefill_pass(d, KERNELS, length, chunk_tokens=4096.0)
    for i, number in enumerate(index):
        slow = Slow(ZOO[number][0], KERNELS[ZOO[number][1]]).prefill(length[i], 4096.0)
        np.testing.assert_allclose([getattr(terms, name)[i] for name in TERMS], slow, rtol=1e-9, atol=1e-15)


@given(st.lists(st.integers(0, len(ZOO)), min_size=1, max_size=10), st.integers(0, 1000))
@settings(max_examples=25)
def test_many_points_are_the_map_of_one_point(index: list[int], seed: int) -> None:
    # Origin: the same call point by point, linear attention included.
    zoo = (*ZOO, LINEAR)
    rng = np.random.default_rng(seed)
    batch, context = 2.0 ** rng.uniform(0.0, 9.0, len(index)), 2.0 ** rng.uniform(0.0, 15.0, len(index))
    d = stack([one for one, _ in zoo], [kset for _, kset in zoo], np.array(index))
    decode, prefill = decode_pass(d, KERNELS, batch, context), prefill_pass(d, KERNELS, context)
    for i, number in enumerate(index):
        alone = stack((zoo[number][0],), (zoo[number][1],), np.array([0]))
        for together, one in (
            (decode, decode_pass(alone, KERNELS, batch[i], context[i])),
            (prefill, prefill_pass(alone, KERNELS, context[i])),
        ):
            for name in TERMS:
                np.testing.assert_allclose(getattr(together, name)[i], getattr(one, name)[0], rtol=1e-12)


def test_taking_points_takes_every_term() -> None:
    d = stack([one for one, _ in ZOO], [kset for _, kset in ZOO], np.arange(len(ZOO)))
    terms = decode_pass(d, KERNELS, 8.0, 512.0)
    taken = terms.take(np.array([5, 1]))
    for name in TERMS:
        np.testing.assert_array_equal(getattr(taken, name), getattr(terms, name)[[5, 1]])


# ---- published value ---------------------------------------------------------------------------------------


def test_collectives_of_a_decode_step_as_published() -> None:
    # Origin: step notes 6.2: Qwen3-32B, tp 8, c = 16 (160 KiB each): 128 all-reduces of about 8 us, 1.1 ms.
    d = stack((deployment("Qwen/Qwen3-32B", "h200_sxm", "vllm", tp=8),), (H200,), np.array([0]))
    assert decode_pass(d, KERNELS, 16.0, 1000.0).collectives_s[0] == pytest.approx(1.1e-3, rel=0.15)


# ---- limits --------------------------------------------------------------------------------------------------


def test_one_gpu_has_no_collectives() -> None:
    d = stack((deployment("Qwen/Qwen3-32B", "h200_sxm", "vllm"),), (H200,), np.array([0]))
    np.testing.assert_array_equal(decode_pass(d, KERNELS, [1.0, 64.0], 1000.0).collectives_s, [0.0, 0.0])
    np.testing.assert_array_equal(prefill_pass(d, KERNELS, [100.0, 1e5]).collectives_s, [0.0, 0.0])


def test_dense_models_have_no_expert_time() -> None:
    d = stack((ZOO[0][0],), (H100,), np.array([0]))
    terms = decode_pass(d, KERNELS, 64.0, 1000.0)
    assert terms.experts_memory_s[0] == terms.experts_compute_s[0] == 0.0


def test_one_attention_replica_is_plain_tensor_parallelism() -> None:
    # Origin: theory. dp 1 keeps the second all-reduce over tp ranks: both are equal.
    one = deployment("Qwen/Qwen3-32B", "h200_sxm", "vllm", tp=4)
    kset = KERNELS[H200]
    terms = decode_pass(stack((one,), (H200,), np.array([0])), KERNELS, 32.0, 1000.0)
    single = all_reduce_seconds(kset.all_reduce, 2.0 * 32 * 5120, 4)
    np.testing.assert_allclose(terms.collectives_s, 128 * single, rtol=1e-12)


def test_a_window_longer_than_the_context_changes_nothing() -> None:
    # Origin: limit. gpt-oss with an endless window against the same model without windowed layers.
    one = deployment("openai/gpt-oss-120b", "h100_sxm", "vllm", tp=2)
    endless = replace(one, llm=replace(one.llm, window=10**9))
    full = replace(one, llm=replace(one.llm, window=0, windowed_layers=0))
    d = stack((endless, full), (H100, H100), np.array([0, 1]))
    for terms in (decode_pass(d, KERNELS, 8.0, 4096.0), prefill_pass(d, KERNELS, [4096.0, 4096.0])):
        assert terms.attention_s[0] == pytest.approx(terms.attention_s[1], rel=1e-12)


def test_a_prompt_of_one_chunk_is_not_cut() -> None:
    # Origin: limit. Any chunk budget above the prompt gives the same pass.
    d = stack((ZOO[0][0],), (H100,), np.array([0]))
    whole, wide = (prefill_pass(d, KERNELS, 4096.0, chunk_tokens=size) for size in (4096.0, 1e6))
    for name in TERMS:
        np.testing.assert_array_equal(getattr(whole, name), getattr(wide, name))


def test_two_chunks_repeat_the_gemms_of_half_the_prompt() -> None:
    # Origin: hand. The trunk twice at half the tokens; the language-model head once, so compare without its time.
    d = stack((ZOO[0][0],), (H100,), np.array([0]))
    half, two = prefill_pass(d, KERNELS, 4096.0), prefill_pass(d, KERNELS, 8192.0, chunk_tokens=4096.0)
    head = Slow(ZOO[0][0], KERNELS[H100]).head(1.0)
    np.testing.assert_allclose(two.gemm_s - head, 2.0 * (half.gemm_s - head), rtol=1e-9)
    np.testing.assert_allclose(two.collectives_s, 2.0 * half.collectives_s, rtol=1e-12)


# ---- expert coverage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 32, 80])
def test_experts_read_by_a_step_agree_with_monte_carlo(tokens: int) -> None:
    # Origin: Monte Carlo, 500 steps of tokens that each visit 8 of 128 distinct experts; |mean - theory| < 4 sem.
    one, kset = deployment("Qwen/Qwen3-235B-A22B-FP8", "h200_sxm", "vllm", tp=8), H200
    llm = one.llm
    memory = decode_pass(stack((one,), (kset,), np.array([0])), KERNELS, float(tokens), 100.0).experts_memory_s[0]
    width = llm.expert_intermediate / 8
    # hand: bytes of the layer less the activations of `tokens` x 8 visits, over the bytes of one expert's slice
    activations = 2.0 * tokens * 8 * (2 * llm.hidden + 3 * width)
    read = (memory / llm.moe_layers * one.gpu.bandwidth_bytes_per_s - activations) / (3 * llm.hidden * width)
    rng = np.random.default_rng(tokens)
    chosen = rng.random((500, tokens, 128)).argpartition(8, axis=2)[:, :, :8].reshape(500, -1)
    visited = np.array([len(np.unique(step)) for step in chosen])
    assert abs(visited.mean() - read) <= 4.0 * visited.std() / math.sqrt(500) + 1e-9


# ---- monotone and homogeneous ---------------------------------------------------------------------------------


@given(st.sampled_from(range(len(ZOO))), st.floats(1.0, 512.0), st.floats(1.0, 8.0), st.floats(16.0, 3e4))
@settings(max_examples=60)
def test_decode_grows_with_batch_and_context(number: int, batch: float, factor: float, context: float) -> None:
    # Origin: theory, but for wiggles of the fitted surfaces up to 3 % (real kernels fall by more where tiles change).
    one, kset = ZOO[number]
    d = stack((one,), (kset,), np.zeros(3, dtype=np.intp))
    terms = decode_pass(d, KERNELS, np.array([1.0, factor, 1.0]) * batch, np.array([1.0, 1.0, factor]) * context)
    base, more, longer = sum(getattr(terms, name) for name in TERMS)
    wiggle = 0.08 if one.trunk_format == "fp8_block" and kset != CLOSED else 0.03
    assert more >= base * (1.0 - wiggle)
    assert longer >= base * 0.97


@given(st.sampled_from(range(len(ZOO))), st.floats(16.0, 1e5), st.floats(1.0, 8.0))
@settings(max_examples=60)
def test_prefill_grows_with_the_prompt(number: int, length: float, factor: float) -> None:
    # Origin: theory, with the same wiggles.
    one, kset = ZOO[number]
    d = stack((one,), (kset,), np.zeros(2, dtype=np.intp))
    terms = prefill_pass(d, KERNELS, np.array([length, length * factor]))
    base, longer = sum(getattr(terms, name) for name in TERMS)
    assert longer >= base * (0.92 if one.trunk_format == "fp8_block" and kset != CLOSED else 0.97)


def slower_gpu(gpu: Gpu, scale: float) -> Gpu:
    def slower(link: Link) -> Link:
        return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / scale)

    return replace(
        gpu,
        bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s / scale,
        bf16_flops=gpu.bf16_flops / scale,
        fp8_flops=gpu.fp8_flops and gpu.fp8_flops / scale,
        fp4_flops=gpu.fp4_flops and gpu.fp4_flops / scale,
        peer=slower(gpu.peer),
        inter_node=slower(gpu.inter_node),
    )


def slower_kernels(kset: KernelSet, scale: float) -> KernelSet:
    def slower(kernel: KernelParameters) -> KernelParameters:
        return replace(kernel, floor_s=kernel.floor_s * scale)

    def curve(one: AllReduceCurve) -> AllReduceCurve:
        return replace(one, log_seconds=one.log_seconds + math.log(scale))

    return replace(
        kset,
        gemm={fmt: slower(kernel) for fmt, kernel in kset.gemm.items()},
        decode_attention={fmt: slower(kernel) for fmt, kernel in kset.decode_attention.items()},
        prefill_attention=slower(kset.prefill_attention),
        latent_attention=slower(kset.latent_attention),
        all_reduce=tuple(curve(one) for one in kset.all_reduce),
        link_bandwidth_bytes_per_s=kset.link_bandwidth_bytes_per_s / scale,
    )


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_times_scale_with_the_unit_of_time(scale: float) -> None:
    # Origin: dimensional homogeneity. One pipeline stage: the 10 us of a hop are a constant of the network.
    zoo = [(one, kset) for one, kset in (*ZOO, LINEAR) if one.pp == 1]
    index, sets = np.arange(len(zoo)), [kset for _, kset in zoo]
    base = stack([one for one, _ in zoo], sets, index)
    slow = stack([replace(one, gpu=slower_gpu(one.gpu, scale)) for one, _ in zoo], sets, index)
    kernels = tuple(slower_kernels(kset, scale) for kset in KERNELS)
    for plain, scaled in (
        (decode_pass(base, KERNELS, 24.0, 3000.0), decode_pass(slow, kernels, 24.0, 3000.0)),
        (prefill_pass(base, KERNELS, 12000.0), prefill_pass(slow, kernels, 12000.0)),
    ):
        for name in TERMS:
            np.testing.assert_allclose(getattr(scaled, name), scale * getattr(plain, name), rtol=1e-9)

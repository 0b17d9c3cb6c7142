"""Forecasts of the shipped profile against measured servers and published forms, and invariances of the whole chain."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.calibration.profile import load_profile
from servecast.model.deployment import Deployment
from servecast.model.engine import EngineConstants
from servecast.model.forecast import (
    METRICS,
    NOVELTY,
    Band,
    Forecast,
    Metric,
    Novelty,
    Points,
    Profile,
    bounds,
    error_band,
    forecast,
    novelties,
)
from servecast.model.formats import ENGINES
from servecast.model.hardware import Gpu, Link
from servecast.model.kernels import KernelParameters
from servecast.model.step_time import KernelSet
from servecast.readers import catalogues
from servecast.readers.deployments import deployment

PROFILE = load_profile()
QWEN = "Qwen/Qwen3-32B"
ZOO: tuple[tuple[Deployment, str], ...] = tuple(
    (deployment(model, gpu, engine, precision, **degrees), engine)
    for model, gpu, engine, precision, degrees in (
        (QWEN, "h100_sxm", "vllm", "auto", {"tp": 2}),
        (QWEN, "b200_sxm", "sglang", "fp8", {"tp": 1}),
        ("meta-llama/Llama-3.1-8B-Instruct", "h200_sxm", "trtllm", "auto", {"tp": 1}),
        ("deepseek-ai/DeepSeek-V3", "h200_sxm", "sglang", "auto", {"tp": 8, "ep": 8}),
        ("deepseek-ai/DeepSeek-V3", "b200_sxm", "trtllm", "fp4", {"tp": 1, "dp": 8, "ep": 8}),
        ("openai/gpt-oss-120b", "h100_sxm", "vllm", "auto", {"tp": 4}),
        ("meta-llama/Llama-3.1-70B", "a100_sxm", "vllm", "auto", {"tp": 4, "pp": 2}),
    )
)


def points(zoo: tuple[tuple[Deployment, str], ...], index: list[int], *columns: list[float]) -> Points:
    clients, isl, osl = (np.array(column, dtype=np.float64) for column in columns)
    return Points(
        deployments=tuple(one for one, _ in zoo),
        engines=tuple(engine for _, engine in zoo),
        index=np.array(index, dtype=np.intp),
        clients=clients,
        isl=isl,
        osl=osl,
    )


def sweep(one: Deployment, engine: str, clients: list[float], isl: list[float], osl: list[float]) -> Forecast:
    return forecast(PROFILE, points(((one, engine),), [0] * len(clients), clients, isl, osl))


# ---- published and measured values --------------------------------------------------------------------------


def test_memory_admission_of_measured_runs() -> None:
    # Origin: aic-silicon rows quoted in step notes 4.5: Qwen3-32B, vLLM, two H100, isl 4096, 128 clients, of which
    # about 66 run: TTFT 19.0, 33.5, 58.8 s at osl 128, 512, 1024. AIConfigurator refuses these rows.
    found = sweep(deployment(QWEN, "h100_sxm", "vllm", tp=2), "vllm", [128.0] * 3, [4096.0] * 3, [128.0, 512.0, 1024.0])
    np.testing.assert_allclose(found.ttft_s, [19.0, 33.5, 58.8], rtol=0.35)
    np.testing.assert_allclose(found.batch, 66.0, rtol=0.15)


@pytest.mark.parametrize(
    ("tp", "constant_ms", "per_sequence_us", "kappa", "prefill_1024_ms", "prefill_4096_ms"),
    [(2, 14.21, 61, 1.26, 50, 213), (4, 9.42, 62, 1.19, 29, 123), (8, 7.13, 59, 1.22, 20, 75)],
)
def test_decode_and_prefill_of_qwen3_32b_as_fitted_elsewhere(
    tp: int, constant_ms: float, per_sequence_us: float, kappa: float, prefill_1024_ms: float, prefill_4096_ms: float
) -> None:
    # Origin: step notes 4.6 [D], linear form per tp: tpot = a + s c + k c ctx + (c - 1)/osl t_pre, which holds to 1.5
    # % of the measured rows; k is kappa times 262 144 bytes a token over tp x 3.35 TB/s.
    clients = np.array([4.0, 16, 64] * 2)
    isl = np.repeat([1024.0, 4096.0], 3)
    osl = np.full(6, 512.0)
    found = sweep(deployment(QWEN, "h100_sxm", "vllm", tp=tp), "vllm", clients.tolist(), isl.tolist(), osl.tolist())
    prefill = np.repeat([prefill_1024_ms, prefill_4096_ms], 3) * 1e-3
    context = isl + osl / 2.0
    cache = kappa * 262_144 / (tp * 3.35e12) * clients * context
    tpot = constant_ms * 1e-3 + per_sequence_us * 1e-6 * clients + cache + (clients - 1.0) / osl * prefill
    np.testing.assert_allclose(found.tpot_s, tpot, rtol=0.10)
    # the fit knows a prefill only by its share of TPOT
    np.testing.assert_allclose(found.prefill_s, prefill, rtol=0.25)


def test_no_forecast_beats_the_floor() -> None:
    # Origin: step notes 4.1: weights and cache over the bandwidth is below every measured row but two suspect ones.
    for one, engine in ZOO:
        if one.llm.is_moe:
            continue
        found = sweep(one, engine, [1.0, 8.0, 32.0], [2000.0] * 3, [500.0] * 3)
        held = one.kv_bytes_per_token_per_gpu() * found.batch / one.pp * 2250.0
        floor = (one.weight_bytes_per_gpu + held) / one.gpu.bandwidth_bytes_per_s
        assert np.all(found.tpot_s > floor)


# ---- shapes of the answer ------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, len(ZOO) - 1), st.integers(1, 600), st.integers(1, 30000), st.integers(1, 4000)),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=25)
def test_many_points_are_the_map_of_one_point(rows: list[tuple[int, int, int, int]]) -> None:
    # Origin: the same call point by point, in any mix of engines, models and GPUs.
    index, clients, isl, osl = (list(column) for column in zip(*rows, strict=True))
    together = forecast(PROFILE, points(ZOO, index, clients, isl, osl))
    for i, number in enumerate(index):
        one, engine = ZOO[number]
        alone = sweep(one, engine, [clients[i]], [isl[i]], [osl[i]])
        for field in fields(Forecast):
            np.testing.assert_allclose(getattr(together, field.name)[i], getattr(alone, field.name)[0], rtol=1e-12)


def test_weights_that_do_not_fit_have_no_times() -> None:
    one = deployment("meta-llama/Llama-3.1-405B", "h100_sxm", "vllm", tp=8)
    found = sweep(one, "vllm", [4.0], [1000.0], [100.0])
    assert np.isnan(found.ttft_s[0])
    assert np.isnan(found.tpot_s[0])
    assert found.kv_tokens[0] == 0.0


def test_prompts_that_do_not_fit_have_no_times() -> None:
    one = deployment(QWEN, "h100_sxm", "sglang")  # about 8 k tokens of cache
    found = sweep(one, "sglang", [1.0, 1.0], [1000.0, 100_000.0], [100.0, 100.0])
    np.testing.assert_array_equal(np.isnan(found.ttft_s), [False, True])
    np.testing.assert_array_equal(np.isnan(found.tpot_s), [False, True])


def test_one_client_waits_for_nobody() -> None:
    # Origin: limit. With one client TPOT is the decode step itself.
    for one, engine in ZOO:
        found = sweep(one, engine, [1.0], [1000.0], [100.0])
        if one.dp == 1:
            assert found.tpot_s[0] == pytest.approx(found.decode_s[0], rel=1e-12)
        assert found.batch[0] == 1.0


# ---- monotone -------------------------------------------------------------------------------------------------

CONFIGURATION = st.sampled_from(range(len(ZOO)))
LENGTH = st.floats(64.0, 8000.0)


def wiggle(one: Deployment) -> float:
    """Largest fall of the fitted surfaces; kernels of blockwise fp8 themselves fall by more from m = 4 to 8."""
    return 0.08 if one.trunk_format == "fp8_block" else 0.03


@given(CONFIGURATION, st.integers(1, 400), st.floats(1.0, 8.0), LENGTH, LENGTH)
@settings(max_examples=60)
def test_tpot_grows_with_concurrency(number: int, clients: int, factor: float, isl: float, osl: float) -> None:
    # Origin: theory.
    one, engine = ZOO[number]
    more = math.ceil(clients * factor)
    found = sweep(one, engine, [clients, more], [isl, isl], [osl, osl])
    assert found.tpot_s[1] >= found.tpot_s[0] * (1.0 - wiggle(one))


@given(CONFIGURATION, st.integers(1, 16), LENGTH, st.floats(1.0, 4.0), LENGTH)
@settings(max_examples=60)
def test_ttft_grows_with_the_prompt(number: int, clients: int, isl: float, factor: float, osl: float) -> None:
    # Origin: theory, where the cache admits every client.
    one, engine = ZOO[number]
    found = sweep(one, engine, [clients] * 2, [isl, isl * factor], [osl] * 2)
    if found.batch[1] == clients:
        assert found.ttft_s[1] >= found.ttft_s[0] * (1.0 - wiggle(one))


@given(CONFIGURATION, st.floats(1.0, 2.0))
@settings(max_examples=30)
def test_more_memory_admits_more(number: int, factor: float) -> None:
    # Origin: theory.
    one, engine = ZOO[number]
    larger = replace(one, gpu=replace(one.gpu, memory_bytes=one.gpu.memory_bytes * factor))
    small, large = (sweep(each, engine, [900.0], [4000.0], [1000.0]) for each in (one, larger))
    assert large.kv_tokens[0] >= small.kv_tokens[0]
    assert large.batch[0] >= small.batch[0]


# ---- homogeneous -------------------------------------------------------------------------------------------------


def slower(profile: Profile, scale: float) -> Profile:
    """Every second of the profile `scale` times as long."""

    def kernel(one: KernelParameters) -> KernelParameters:
        return replace(one, floor_s=one.floor_s * scale)

    def kernel_set(one: KernelSet) -> KernelSet:
        return replace(
            one,
            gemm={fmt: kernel(each) for fmt, each in one.gemm.items()},
            decode_attention={fmt: kernel(each) for fmt, each in one.decode_attention.items()},
            prefill_attention=kernel(one.prefill_attention),
            latent_attention=kernel(one.latent_attention),
            all_reduce=tuple(replace(c, log_seconds=c.log_seconds + math.log(scale)) for c in one.all_reduce),
            link_bandwidth_bytes_per_s=one.link_bandwidth_bytes_per_s / scale,
        )

    def constants(one: EngineConstants) -> EngineConstants:
        names = [f.name for f in fields(one) if f.name.endswith("_s")]
        return replace(one, **{name: float(getattr(one, name)) * scale for name in names})

    return replace(
        profile,
        kernels=tuple(kernel_set(one) for one in profile.kernels),
        constants={key: constants(one) for key, one in profile.constants.items()},
    )


def slower_gpu(gpu: Gpu, scale: float) -> Gpu:
    def link(one: Link) -> Link:
        return replace(one, bandwidth_bytes_per_s=one.bandwidth_bytes_per_s / scale)

    return replace(
        gpu,
        bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s / scale,
        bf16_flops=gpu.bf16_flops / scale,
        fp8_flops=gpu.fp8_flops and gpu.fp8_flops / scale,
        fp4_flops=gpu.fp4_flops and gpu.fp4_flops / scale,
        peer=link(gpu.peer),
        inter_node=link(gpu.inter_node),
    )


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_times_scale_with_the_unit_of_time(scale: float) -> None:
    # Origin: dimensional homogeneity; bytes and tokens do not change. One pipeline stage: a hop's 10 us are a constant.
    zoo = tuple((one, engine) for one, engine in ZOO if one.pp == 1)
    slow = tuple((replace(one, gpu=slower_gpu(one.gpu, scale)), engine) for one, engine in zoo)
    index = list(range(len(zoo)))
    columns = ([40.0] * len(zoo), [3000.0] * len(zoo), [400.0] * len(zoo))
    plain = forecast(PROFILE, points(zoo, index, *columns))
    scaled = forecast(slower(PROFILE, scale), points(slow, index, *columns))
    for name in ("ttft_s", "tpot_s", "decode_s", "prefill_s"):
        np.testing.assert_allclose(getattr(scaled, name), scale * getattr(plain, name), rtol=1e-9)
    np.testing.assert_array_equal(scaled.batch, plain.batch)


# ---- which kernels, constants and bands ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "kernels"),
    [
        ("h100_sxm", "h100_sxm"),
        ("h200_sxm", "h200_sxm"),
        # other Hopper parts: the table of the nearer bandwidth; 4.0 TB/s is nearer to 3.35 than to 4.8
        ("h100_pcie", "h100_sxm"),
        ("gh200", "h100_sxm"),
        ("h20_sxm", "h100_sxm"),
        ("a100_sxm", "closed form"),
        ("b200_sxm", "closed form"),
        ("mi300x", "closed form"),
    ],
)
def test_kernels_of_a_gpu(gpu: str, kernels: str) -> None:
    assert PROFILE.kernels[PROFILE.kernel_set(catalogues.gpu(gpu))].name == kernels


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("measured", [False, True])
def test_every_engine_has_constants(engine: str, moe: bool, measured: bool) -> None:
    k = PROFILE.constants[engine, moe, measured]
    for field in fields(EngineConstants):
        assert float(getattr(k, field.name)) > 0.0
    assert np.all(np.asarray(k.expert_bandwidth_efficiency) <= 1.0)
    assert np.all(np.asarray(k.expert_compute_efficiency) <= 1.0)


def test_every_kind_of_novelty_has_a_band_around_zero() -> None:
    for metric in METRICS:
        for moe in (False, True):
            for level in NOVELTY:
                band = PROFILE.bands[metric, moe, level]
                assert band.lo < 0.0 < band.hi
                assert band.n >= 100


@pytest.mark.parametrize(
    ("model", "gpu", "expected"),
    [
        (QWEN, "h100_sxm", ("group",)),
        ("meta-llama/Llama-3.1-70B", "h100_sxm", ("model",)),
        (QWEN, "a100_sxm", ("gpu",)),
        ("meta-llama/Llama-3.1-70B", "a100_sxm", ("gpu", "model")),
    ],
)
def test_novelty_of_a_deployment(model: str, gpu: str, expected: tuple[str, ...]) -> None:
    # Origin: the open rows: Qwen3-32B and H100 are in them, Llama-3.1-70B and A100 are not.
    assert novelties(PROFILE, deployment(model, gpu, "vllm")) == expected


def test_the_band_of_two_novelties_is_the_wider_one_by_hand() -> None:
    bands: dict[tuple[Metric, bool, Novelty], Band] = {
        ("ttft", False, "gpu"): Band(lo=-0.3, hi=0.1, n=1),
        ("ttft", False, "model"): Band(lo=-0.1, hi=0.4, n=1),
    }
    profile = replace(PROFILE, bands=bands)
    assert error_band(profile, deployment("meta-llama/Llama-3.1-70B", "a100_sxm", "vllm"), "ttft") == (-0.3, 0.4)


def test_an_interval_holds_its_own_prediction() -> None:
    # Origin: hand. A band on one side of 0 is extended to 0; otherwise the ends are factors exp(lo), exp(hi).
    one = deployment(QWEN, "h100_sxm", "vllm", tp=2)
    at = points(((one, "vllm"),), [0, 0], [1.0, 8.0], [100.0] * 2, [100.0] * 2)
    for band, ends in (
        (Band(lo=0.1, hi=0.2, n=1), (1.0, math.exp(0.2))),
        (Band(lo=-0.2, hi=-0.1, n=1), (math.exp(-0.2), 1.0)),
        (Band(lo=-0.2, hi=0.1, n=1), (math.exp(-0.2), math.exp(0.1))),
    ):
        profile = replace(PROFILE, bands={("tpot", False, "group"): band})
        low, high = bounds(profile, at, "tpot", [2.0, 4.0])
        np.testing.assert_allclose(low, np.array([2.0, 4.0]) * ends[0], rtol=1e-12)
        np.testing.assert_allclose(high, np.array([2.0, 4.0]) * ends[1], rtol=1e-12)

"""Engine steps and the closed loop by hand, against published forms, and by conservation of work."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.engine import EngineConstants, closed_loop, decode_seconds, expert_seconds, prefill_seconds
from servecast.model.step_time import PassTerms

NEUTRAL = EngineConstants(
    layer_gap_s=0.0,
    moe_layer_gap_s=0.0,
    sequence_s=0.0,
    step_s=0.0,
    kernel_factor=1.0,
    prefill_factor=1.0,
    prefill_layer_gap_s=0.0,
    expert_prefill_factor=1.0,
    expert_bandwidth_efficiency=1.0,
    expert_compute_efficiency=1.0,
    replica_coupling=0.0,
    prefill_passes=1.0,
    burst_share=0.0,
    first_token_s=0.0,
)


def terms(gemm: float, attention: float, collectives: float, memory: float, compute: float) -> PassTerms:
    return PassTerms(
        gemm_s=np.array([gemm]),
        attention_s=np.array([attention]),
        collectives_s=np.array([collectives]),
        experts_memory_s=np.array([memory]),
        experts_compute_s=np.array([compute]),
    )


PASS = terms(0.010, 0.002, 0.001, 0.0024, 0.0016)


def loop(
    k: EngineConstants,
    *,
    decode: float = 0.02,
    prefill: float = 0.1,
    batch: float = 8,
    clients: float = 8,
    dp: int = 1,
    osl: float = 100,
) -> tuple[float, float]:
    ttft, tpot = closed_loop(
        np.array([decode]), np.array([prefill]), k, batch=batch, clients=clients, replicas=dp, osl=osl
    )
    return float(ttft[0]), float(tpot[0])


# ---- steps by hand ----------------------------------------------------------------------------------------


def test_experts_at_their_efficiencies_by_hand() -> None:
    # Origin: hand. 2.4 ms / 0.8 = 3 ms and 1.6 ms / 0.4 = 4 ms: 5 ms.
    k = replace(NEUTRAL, expert_bandwidth_efficiency=0.8, expert_compute_efficiency=0.4)
    np.testing.assert_allclose(expert_seconds(PASS, k), 0.005, rtol=1e-12)


def test_a_decode_step_by_hand() -> None:
    # Origin: hand. 1.5 x 12 ms + 5 ms of experts + 1 ms of collectives + 10 layers x 20 us + 4 x 50 us + 16 x 5 us + 30
    # us.
    k = replace(
        NEUTRAL,
        kernel_factor=1.5,
        expert_bandwidth_efficiency=0.8,
        expert_compute_efficiency=0.4,
        layer_gap_s=20e-6,
        moe_layer_gap_s=50e-6,
        sequence_s=5e-6,
        step_s=30e-6,
    )
    expected = 0.018 + 0.005 + 0.001 + 200e-6 + 200e-6 + 80e-6 + 30e-6
    np.testing.assert_allclose(decode_seconds(PASS, k, 10.0, 4.0, 16.0), expected, rtol=1e-12)


def test_a_prompt_by_hand() -> None:
    # Origin: hand. 0.9 x (1.5 x 12 ms + 2 x 5 ms) + 1 ms + 10 layers x 60 us.
    k = replace(
        NEUTRAL,
        kernel_factor=1.5,
        prefill_factor=0.9,
        expert_prefill_factor=2.0,
        expert_bandwidth_efficiency=0.8,
        expert_compute_efficiency=0.4,
        prefill_layer_gap_s=60e-6,
        layer_gap_s=1.0,  # a constant of the decode step has no part in it
    )
    np.testing.assert_allclose(prefill_seconds(PASS, k, 10.0), 0.9 * 0.028 + 0.001 + 600e-6, rtol=1e-12)


def test_neutral_constants_leave_the_kernel_sum() -> None:
    dense = terms(0.010, 0.002, 0.001, 0.0, 0.0)
    np.testing.assert_allclose(decode_seconds(dense, NEUTRAL, 64.0, 0.0, 256.0), 0.013, rtol=1e-12)
    np.testing.assert_allclose(prefill_seconds(dense, NEUTRAL, 64.0), 0.013, rtol=1e-12)


# ---- closed loop ------------------------------------------------------------------------------------------


def test_one_client_sees_the_bare_steps() -> None:
    # Origin: limit. Nobody interferes, nobody waits.
    assert loop(NEUTRAL, batch=1, clients=1) == pytest.approx((0.1, 0.02), rel=1e-12)


def test_interference_of_prefill_as_published() -> None:
    # Origin: step notes 4.4: tpot = t_dec + phi (c - 1)/osl t_pre with phi 1: 20 ms + 7/100 x 100 ms.
    assert loop(NEUTRAL)[1] == pytest.approx(0.027, rel=1e-12)


@pytest.mark.parametrize(
    ("passes", "waves", "first", "expected"), [(2.65, 6.6, 0.025, 0.35818), (3.31, 8.1, 0.044, 0.43056)]
)
def test_time_to_first_token_as_published(passes: float, waves: float, first: float, expected: float) -> None:
    # Origin: step notes 4.5: ttft = a t_pre + (c + 1)/2 t_pre / w + t_0, constants of vLLM and TensorRT-LLM; by hand
    # at t_pre 0.1 s, c 8: 0.265 + 0.0682 + 0.025 = 0.358 and 0.331 + 0.0556 + 0.044 = 0.431.
    k = replace(NEUTRAL, prefill_passes=passes, burst_share=1.0 / waves, first_token_s=first)
    assert loop(k)[0] == pytest.approx(expected, rel=1e-4)


def test_bursts_by_hand() -> None:
    # Origin: hand, b = 0.5: ttft 0.1 + 0.5 x 4.5 x 0.1 = 0.325; interference 0.75 x 7/100 x 0.1 = 5.25 ms.
    assert loop(replace(NEUTRAL, burst_share=0.5)) == pytest.approx((0.325, 0.02525), rel=1e-12)


@given(st.floats(0.0, 1.5), st.integers(1, 256), st.floats(0.001, 0.5), st.floats(0.001, 10.0), st.integers(2, 4096))
def test_work_of_a_cycle_is_conserved(burst: float, clients: int, decode: float, prefill: float, osl: int) -> None:
    # Origin: conservation. While one request passes through, all c prompts and its own osl steps are worked off, in
    # whatever order: TTFT + osl TPOT = c t_pre + osl t_dec. A request's own pass is a = 1 - b, because the burst term
    # counts (B + 1) / 2 of which one is its own half on average.
    k = replace(NEUTRAL, burst_share=burst, prefill_passes=1.0 - burst)
    ttft, tpot = loop(k, decode=decode, prefill=prefill, batch=clients, clients=clients, osl=osl)
    assert ttft + osl * tpot == pytest.approx(clients * prefill + osl * decode, rel=1e-9)


def test_waiting_for_admission_obeys_littles_law() -> None:
    # Origin: step notes 4.5 [D]: ttft = G (c - B)/B + prefill with G = osl tpot. By hand: B 8, c 24, osl 100, tpot 27
    # ms: 2.7 x 2 = 5.4 s more than with 8 clients; 4 % because the published law leaves out a request's own prefill.
    few, many = loop(NEUTRAL), loop(NEUTRAL, clients=24)
    assert many[1] == pytest.approx(few[1], rel=1e-12)
    assert many[0] - few[0] == pytest.approx(5.4, rel=0.04)


@pytest.mark.parametrize(("dp", "coupling", "tpot"), [(1, 0.5, 0.027), (8, 0.0, 0.027), (8, 0.5, 0.0515)])
def test_prefills_of_other_replicas_by_hand(dp: int, coupling: float, tpot: float) -> None:
    # Origin: hand. 20 ms + 7 ms x (1 + 0.5 x 7).
    assert loop(replace(NEUTRAL, replica_coupling=coupling), dp=dp)[1] == pytest.approx(tpot, rel=1e-12)


@given(st.floats(0.1, 10.0))
def test_times_scale_with_the_unit_of_time(scale: float) -> None:
    # Origin: dimensional homogeneity. Constants in seconds and kernel times k-fold, pure numbers as they are.
    k = replace(NEUTRAL, layer_gap_s=2e-5, sequence_s=4e-6, step_s=1e-4, first_token_s=0.03, burst_share=0.2)
    slow = replace(
        k, **{f.name: float(getattr(k, f.name)) * scale for f in fields(EngineConstants) if f.name.endswith("_s")}
    )
    stretched = PassTerms(**{f.name: scale * getattr(PASS, f.name) for f in fields(PassTerms)})
    steps = [
        (decode_seconds(one, c, 60.0, 0.0, 8.0), prefill_seconds(one, c, 60.0))
        for one, c in ((PASS, k), (stretched, slow))
    ]
    times = [
        closed_loop(*pair, c, batch=8, clients=12, replicas=1, osl=50) for pair, c in zip(steps, (k, slow), strict=True)
    ]
    for plain, scaled in zip((*steps[0], *times[0]), (*steps[1], *times[1]), strict=True):
        np.testing.assert_allclose(scaled, scale * plain, rtol=1e-12)


def test_vectors_are_maps_of_points() -> None:
    # Origin: the same call point by point, constants as arrays, too.
    rng = np.random.default_rng(0)
    size = 30
    names = [f.name for f in fields(EngineConstants)]
    columns = {name: rng.uniform(0.1, 1.0, size) for name in names}
    decode, prefill = rng.uniform(0.01, 0.1, size), rng.uniform(0.01, 1.0, size)
    batch = rng.integers(1, 64, size).astype(float)
    clients, dp, osl = batch + rng.integers(0, 9, size), rng.integers(1, 9, size), rng.uniform(1.0, 999.0, size)
    together = closed_loop(
        decode, prefill, EngineConstants(**columns), batch=batch, clients=clients, replicas=dp, osl=osl
    )
    for i in range(size):
        k = EngineConstants(**{name: float(column[i]) for name, column in columns.items()})
        alone = closed_loop(decode[i], prefill[i], k, batch=batch[i], clients=clients[i], replicas=dp[i], osl=osl[i])
        np.testing.assert_allclose([row[i] for row in together], alone, rtol=1e-12)

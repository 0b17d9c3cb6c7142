"""Service curves: completion rates by hand, agreement with the forecast, length classes, limits."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.calibration.profile import load_profile
from servecast.model.forecast import Points, forecast
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.service import LENGTH_SHARES, ServiceCurves, length_nodes, service_curves, slowed
from servecast.model.workload import ArrivalStatistics, Workload
from servecast.readers.deployments import deployment

PROFILE = load_profile()
ARRIVALS = ArrivalStatistics(
    rate_rps=1.0,
    gap_cv=1.0,
    idc=(),
    peak_to_mean=(),
    lag1_gap_correlation=0.0,
    zero_gap_share=0.0,
    span_s=1.0,
    requests=1,
)
ZOO = (
    deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=2),
    deployment("meta-llama/Llama-3.1-8B-Instruct", "a100_sxm", "vllm"),
    deployment("openai/gpt-oss-120b", "h200_sxm", "vllm", tp=2),
)


def workload(n_in: list[float], n_out: list[float]) -> Workload:
    return Workload(name="test", arrivals=ARRIVALS, n_in=np.array(n_in, float), n_out=np.array(n_out, float))


# ---- length classes -----------------------------------------------------------------------------------------


def test_length_classes_by_hand() -> None:
    # Origin: hand. 1 000 lengths 1..1000: nine classes of 100, then 50, 30, 10, 5, 5; means of consecutive integers.
    nodes = length_nodes(np.random.default_rng(0).permutation(np.arange(1.0, 1001.0)))
    sizes = [100] * 9 + [50, 30, 10, 5, 5]
    ends = np.cumsum(sizes)
    np.testing.assert_allclose(nodes.share, np.array(sizes) / 1000.0, rtol=1e-12)
    np.testing.assert_allclose(nodes.tokens, ends - (np.array(sizes) - 1) / 2.0, rtol=1e-12)


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=400))
def test_length_classes_keep_the_mean(tokens: list[int]) -> None:
    # Origin: conservation.
    nodes = length_nodes(tokens)
    assert nodes.share.sum() == pytest.approx(1.0, rel=1e-12)
    assert nodes.tokens @ nodes.share == pytest.approx(np.mean(tokens), rel=1e-9)
    assert np.all(np.diff(nodes.tokens) >= 0.0)
    assert len(nodes.tokens) <= len(LENGTH_SHARES)


# ---- curves ---------------------------------------------------------------------------------------------------


def test_decode_and_prefill_are_those_of_the_forecast() -> None:
    # Origin: the forecast of one fixed shape, which test_forecast checks; batches of the grid are not interpolated.
    isl, osl = 2000.0, 300.0
    curves = service_curves(PROFILE, ZOO, "vllm", workload([isl], [osl]), max_batch=64)
    batches = np.array([1.0, 2.0, 8.0, 24.0, 64.0])
    for number, one in enumerate(ZOO):
        at = Points(
            deployments=(one,),
            engines=("vllm",),
            index=np.zeros(5, dtype=np.intp),
            clients=batches,
            isl=np.full(5, isl),
            osl=np.full(5, osl),
        )
        found = forecast(PROFILE, at)
        admitted = found.batch == batches
        chosen = batches[admitted].astype(int) - 1
        np.testing.assert_allclose(curves.decode_s[number, chosen], found.decode_s[admitted], rtol=1e-9)
        np.testing.assert_allclose(curves.prefill_s[number, 0], found.prefill_s[0], rtol=1e-9)


def test_between_grid_batches_linear_to_three_per_cent() -> None:
    # Origin: the forecast, evaluated at every batch; the module promises 2 % but for jumps between kernels' tile
    # shapes.
    isl, osl = 1000.0, 200.0
    curves = service_curves(PROFILE, ZOO[:1], "vllm", workload([isl], [osl]), max_batch=256)
    batches = np.arange(1.0, 257.0)
    at = Points(
        deployments=ZOO[:1],
        engines=("vllm",),
        index=np.zeros(256, dtype=np.intp),
        clients=batches,
        isl=np.full(256, isl),
        osl=np.full(256, osl),
    )
    found = forecast(PROFILE, at)
    assert np.all(found.batch == batches)
    np.testing.assert_allclose(curves.decode_s[0], found.decode_s, rtol=0.03)


def test_completion_rate_by_hand() -> None:
    # Origin: hand. B requests complete in m t_dec(B) + B E[t_pre], with two prompt lengths of equal share.
    load = workload([100.0, 5000.0], [50.0, 150.0])
    curves = service_curves(PROFILE, ZOO, "vllm", load, max_batch=16)
    mean = curves.prefill_s.mean(axis=1)
    np.testing.assert_allclose(curves.prefill_mean_s, mean, rtol=1e-12)
    np.testing.assert_allclose(curves.prefill_m2_s2, (curves.prefill_s**2).mean(axis=1), rtol=1e-12)
    for batch in (1, 5, 16):
        cycle = 100.0 * curves.decode_s[:, batch - 1] + batch * mean
        np.testing.assert_allclose(curves.completion_rps[:, batch - 1], batch / cycle, rtol=1e-12)


def test_more_requests_in_service_complete_faster() -> None:
    # Origin: theory. A step over a larger batch is cheaper per sequence.
    curves = service_curves(PROFILE, ZOO, "vllm", workload([500.0, 3000.0], [50.0, 400.0]), max_batch=256)
    assert curves.completion_rps.shape == (3, 256)
    assert np.all(np.diff(curves.completion_rps, axis=1) > -1e-3 * curves.completion_rps[:, :-1])


def test_admitted_batch_by_hand() -> None:
    # Origin: hand. Residence: long outputs stay longer. n_in 1000, 3000; n_out 100, 300: mean context
    # (100 x 1050 + 300 x 3150) / 400 = 2625 tokens.
    load = workload([1000.0, 3000.0], [100.0, 300.0])
    assert load.mean_context == pytest.approx(2625.0, rel=1e-12)
    curves = service_curves(PROFILE, ZOO, "vllm", load)
    for number, one in enumerate(ZOO):
        tokens = memory_budget(one, MEMORY_RULES["vllm"]).kv_tokens
        assert curves.kv_batch[number] == int(tokens // 2625.0)


def test_an_engine_that_reserves_the_whole_length_admits_fewer() -> None:
    # Origin: hand. TensorRT-LLM's guaranteed-no-evict holds isl + osl: 2000 + 1000, not 2000 + 500.
    one = deployment("meta-llama/Llama-3.1-8B-Instruct", "h100_sxm", "trtllm")
    tokens = memory_budget(one, MEMORY_RULES["trtllm"]).kv_tokens
    curves = service_curves(PROFILE, (one,), "trtllm", workload([2000.0], [1000.0]))
    assert curves.kv_batch[0] == int(tokens // 3000.0)


def test_weights_or_prompts_that_do_not_fit_admit_nothing() -> None:
    small = deployment("meta-llama/Llama-3.1-70B", "h100_sxm", "vllm")
    curves = service_curves(PROFILE, (small, ZOO[1]), "vllm", workload([100.0, 2e6], [10.0, 10.0]))
    np.testing.assert_array_equal(curves.kv_batch, [0, 0])


def test_curves_of_many_deployments_are_those_of_each_alone() -> None:
    # Origin: the same call one by one.
    load = workload([200.0, 900.0, 4000.0], [100.0, 20.0, 300.0])
    together = service_curves(PROFILE, ZOO, "vllm", load, max_batch=32)
    for number, one in enumerate(ZOO):
        alone = service_curves(PROFILE, (one,), "vllm", load, max_batch=32)
        for field in fields(ServiceCurves):
            if field.name not in {"inputs", "outputs"}:
                np.testing.assert_allclose(
                    getattr(together, field.name)[number], getattr(alone, field.name)[0], rtol=1e-12
                )


def test_slowed_curves_by_hand() -> None:
    # Origin: dimensional homogeneity. Twice the time: rates halve, second moments quadruple, the cache stays.
    load = workload([200.0, 900.0], [100.0, 20.0])
    curves = service_curves(PROFILE, ZOO, "vllm", load, max_batch=8)
    slow = slowed(curves, np.array([2, 0]), np.array([2.0, 0.5]))
    for row, (source, factor) in enumerate(((2, 2.0), (0, 0.5))):
        np.testing.assert_allclose(slow.decode_s[row], factor * curves.decode_s[source], rtol=1e-12)
        np.testing.assert_allclose(slow.prefill_s[row], factor * curves.prefill_s[source], rtol=1e-12)
        np.testing.assert_allclose(slow.prefill_mean_s[row], factor * curves.prefill_mean_s[source], rtol=1e-12)
        np.testing.assert_allclose(slow.prefill_m2_s2[row], factor**2 * curves.prefill_m2_s2[source], rtol=1e-12)
        np.testing.assert_allclose(slow.completion_rps[row], curves.completion_rps[source] / factor, rtol=1e-12)
        np.testing.assert_allclose(slow.first_token_s[row], factor * curves.first_token_s[source], rtol=1e-12)
        assert slow.kv_batch[row] == curves.kv_batch[source]

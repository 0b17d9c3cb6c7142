"""Fit of the engines' constants: round trip on synthetic runs, robustness, bookkeeping of the parameter vector."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from servecast.calibration.fits import engine as engine_fit
from servecast.calibration.fits.engine import (
    CENTRE,
    HIGH,
    LOW,
    NAMES,
    WIDTH,
    EngineFit,
    Runs,
    constants,
    fit_engine,
    predict,
    relative_error,
)
from servecast.calibration.profile import load_profile
from servecast.calibration.public import constant_table
from servecast.model.engine import EngineConstants
from servecast.model.forecast import Points, forecast, kernel_passes
from servecast.model.formats import ENGINES
from servecast.readers.deployments import deployment

SHAPES = (
    ("Qwen/Qwen3-32B", "h100_sxm", "auto", {"tp": 4}),
    ("meta-llama/Llama-3.1-8B-Instruct", "h200_sxm", "fp8", {"tp": 1}),
    ("nvidia/Qwen3-32B-NVFP4", "b200_sxm", "auto", {"tp": 2}),
    ("openai/gpt-oss-120b", "h200_sxm", "auto", {"tp": 4}),
    ("deepseek-ai/DeepSeek-R1", "b200_sxm", "fp4", {"tp": 8, "ep": 8}),
    ("deepseek-ai/DeepSeek-R1", "h200_sxm", "auto", {"dp": 8, "ep": 8}),
)


@cache
def points() -> Points:
    """Every shape on every engine, at 8 loads."""
    made = [
        (deployment(model, gpu, engine, precision, **degrees), engine)
        for model, gpu, precision, degrees in SHAPES
        for engine in ENGINES
    ]
    grid = np.array([(c, isl, osl) for c in (1, 48) for isl in (512, 4096) for osl in (128, 1024)], float)
    index = np.repeat(np.arange(len(made)), len(grid))
    clients, isl, osl = np.tile(grid, (len(made), 1)).T
    return Points(
        deployments=tuple(one for one, _ in made),
        engines=tuple(engine for _, engine in made),
        index=index,
        clients=clients,
        isl=isl,
        osl=osl,
    )


def true_theta() -> np.ndarray:
    """Half a prior width from the centre in a random direction, inside the box."""
    steps = np.random.default_rng(5).choice([-0.5, 0.5], len(CENTRE))
    return np.clip(CENTRE + steps * WIDTH, LOW + 1e-3, HIGH - 1e-3)


@cache
def synthetic() -> Runs:
    at, kernels = points(), load_profile().kernels
    sets = [load_profile().kernel_set(one.gpu) for one in at.deployments]
    size = len(at.index)
    runs = Runs(
        passes=kernel_passes(kernels, sets, at),
        engine=np.array([ENGINES.index(engine) for engine in at.engines])[at.index],
        moe=np.array([one.llm.is_moe for one in at.deployments])[at.index],
        measured=np.array([kernels[number].measured for number in sets])[at.index],
        clients=at.clients,
        osl=at.osl,
        ttft_s=np.ones(size),
        tpot_s=np.ones(size),
        weight=np.ones(size),
    )
    ttft, tpot = predict(true_theta(), runs)
    return replace(runs, ttft_s=ttft, tpot_s=tpot)


@cache
def fitted() -> EngineFit:
    return fit_engine(synthetic())


def test_predictions_are_recovered_from_synthetic_runs() -> None:
    # Origin: round trip. Runs made from known constants half a prior width off the centres.
    ttft, tpot = predict(fitted().theta, synthetic())
    np.testing.assert_allclose(tpot, synthetic().tpot_s, rtol=0.02)
    np.testing.assert_allclose(ttft, synthetic().ttft_s, rtol=0.05)
    assert np.mean(np.abs(ttft / synthetic().ttft_s - 1.0)) < 0.02
    # what it had to come from
    start = predict(np.clip(CENTRE, LOW, HIGH), synthetic())[1]
    assert np.mean(np.abs(start / synthetic().tpot_s - 1.0)) > 0.05


def test_residuals_are_those_of_the_runs() -> None:
    # Origin: independent: the prediction redone from the constants.
    ttft, tpot = predict(fitted().theta, synthetic())
    np.testing.assert_allclose(fitted().log_residual_ttft, np.log(synthetic().ttft_s / ttft), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fitted().log_residual_tpot, np.log(synthetic().tpot_s / tpot), rtol=1e-9, atol=1e-12)
    assert fitted().n == len(synthetic().osl)


def test_constants_stay_inside_physics() -> None:
    assert np.all(fitted().theta >= LOW)
    assert np.all(fitted().theta <= HIGH)


def test_a_few_wild_runs_do_not_matter() -> None:
    # Origin: comparison with the fit to clean runs; every twentieth run three times as slow.
    runs = synthetic().take(np.arange(0, len(synthetic().osl), 3))
    wild = np.where(np.arange(len(runs.osl)) % 20 == 0, 3.0, 1.0)
    theta = fit_engine(replace(runs, ttft_s=runs.ttft_s * wild, tpot_s=runs.tpot_s * wild)).theta
    assert np.median(np.abs(predict(theta, runs)[1] / runs.tpot_s - 1.0)) < 0.02


def test_without_runs_of_an_engine_it_leans_on_the_others() -> None:
    # Origin: theory of pooling. No run of TensorRT-LLM: its deviations stay at the prior's centre.
    runs = synthetic().take(np.arange(0, len(synthetic().osl), 3))
    theta = fit_engine(runs.take(np.flatnonzero(runs.engine != ENGINES.index("trtllm")))).theta
    at = [position for position, name in enumerate(NAMES) if "/trtllm" in name]
    np.testing.assert_allclose(theta[at], CENTRE[at], rtol=0.0, atol=1e-3)


def test_the_model_and_the_fit_are_the_same_function() -> None:
    # Origin: the forecast of a profile that holds the constants: one path from records, one from the parameter vector.
    profile = load_profile()
    table = constant_table(true_theta())
    measured = {one.gpu.name: profile.kernels[profile.kernel_set(one.gpu)].measured for one in points().deployments}
    assert set(measured.values()) == {False, True}
    found = forecast(replace(profile, constants=table), points())
    fits = np.isfinite(found.tpot_s)
    np.testing.assert_allclose(found.tpot_s[fits], synthetic().tpot_s[fits], rtol=1e-9)
    np.testing.assert_allclose(found.ttft_s[fits], synthetic().ttft_s[fits], rtol=1e-9)


def test_runs_in_any_order_predict_the_same() -> None:
    # Origin: invariance to relabelling.
    order = np.random.default_rng(0).permutation(len(synthetic().osl))
    for shuffled, straight in zip(
        predict(true_theta(), synthetic().take(order)), predict(true_theta(), synthetic()), strict=True
    ):
        np.testing.assert_allclose(shuffled, straight[order], rtol=1e-12)


def test_constants_by_hand() -> None:
    # Origin: hand. Global x engine x mixture-of-experts deviation, in logs; kernels that were measured stand as they
    # are.
    theta = np.zeros(len(NAMES))
    theta[NAMES.index("layer_gap_s")] = np.log(2.0)
    theta[NAMES.index("layer_gap_s/sglang")] = np.log(3.0)
    theta[NAMES.index("layer_gap_s/sglang/moe")] = np.log(5.0)
    theta[NAMES.index("kernel_factor")] = np.log(7.0)
    theta[NAMES.index("expert_bandwidth_efficiency")] = np.log(0.5)
    theta[NAMES.index("expert_bandwidth_efficiency_unmeasured")] = np.log(0.25)
    sglang = ENGINES.index("sglang")
    k = constants(
        theta,
        np.array([ENGINES.index("vllm"), sglang, sglang]),
        np.array([True, False, True]),
        np.array([True, False, True]),
    )
    for found, expected in (
        (k.layer_gap_s, [2.0, 6.0, 30.0]),
        (k.kernel_factor, [1.0, 7.0, 1.0]),
        (k.expert_bandwidth_efficiency, [0.5, 0.25, 0.5]),
        (k.step_s, [1.0, 1.0, 1.0]),
    ):
        np.testing.assert_allclose(np.asarray(found, dtype=np.float64), expected, rtol=1e-12)


def test_relative_errors_by_hand() -> None:
    # Origin: hand. Independent standard errors 1, 2, 2 of the three factors add to 3.
    variance = np.zeros(len(NAMES))
    for name, error in (("sequence_s", 1.0), ("sequence_s/vllm", 2.0), ("sequence_s/vllm/moe", 2.0), ("step_s", 0.5)):
        variance[NAMES.index(name)] = error**2
    fit = replace(fitted(), covariance=np.diag(variance))
    assert relative_error(fit, "sequence_s", "vllm", moe=True, measured=True) == pytest.approx(3.0, rel=1e-12)
    assert relative_error(fit, "sequence_s", "vllm", moe=False, measured=True) == pytest.approx(5.0**0.5, rel=1e-12)
    assert relative_error(fit, "sequence_s", "sglang", moe=True, measured=True) == pytest.approx(1.0, rel=1e-12)
    assert relative_error(fit, "step_s", "trtllm", moe=False, measured=False) == pytest.approx(0.5, rel=1e-12)
    assert relative_error(fit, "kernel_factor", "vllm", moe=False, measured=True) == 0.0


def test_every_constant_of_the_model_is_fitted() -> None:
    fitted_names = {name.split("/")[0].removesuffix("_unmeasured") for name in NAMES}
    assert fitted_names == set(EngineConstants.__slots__)
    assert len(NAMES) == len(set(NAMES)) == len(CENTRE) == len(WIDTH)
    assert engine_fit.TTFT_SCALE > engine_fit.TPOT_SCALE  # TTFT depends on the load generator and weighs less

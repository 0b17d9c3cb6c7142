"""Fits of a machine's samples: round trips of known parameters, intervals by Monte Carlo, selection of a form."""

from __future__ import annotations

from dataclasses import replace

import machine_samples as made
import numpy as np
import pytest

from servecast.calibration.fits.curves import form_of, forms_of
from servecast.calibration.fits.machine import (
    KernelFit,
    choose_next,
    columns_of,
    fit_machine,
    kernel_sum,
    log_deviation,
    predict,
    softened,
)


def values(fit: KernelFit) -> dict[str, float]:
    return dict(zip((one.name for one in fit.form.parameters), np.exp(fit.log_values).tolist(), strict=True))


def test_round_trip_of_exact_samples() -> None:
    """Round trip: without noise the fit returns the parameters, the simplest form, and no error."""
    copy, gemm = sorted(fit_machine(made.both()), key=lambda fit: fit.kernel != "memory_copy")
    assert copy.form.name == "alpha_beta"
    assert values(copy) == pytest.approx(
        {"latency_s": made.LATENCY_S, "bandwidth_bytes_per_s": made.BANDWIDTH}, rel=2e-3
    )
    assert gemm.form.name == "sum"
    assert values(gemm) == pytest.approx(
        {
            "floor_s": made.FLOOR_S,
            "bandwidth_bytes_per_s": made.GEMM_BANDWIDTH,
            "compute_flops_per_s": made.GEMM_RATE,
        },
        rel=0.02,
    )
    assert gemm.error < 0.01
    assert copy.drift == 0.0


@pytest.mark.parametrize(("session", "drift"), [(0.0, 0.0), (0.03, 0.03)])
def test_intervals_cover_the_truth(session: float, drift: float) -> None:
    """Monte Carlo: 90 % intervals hold the parameters in 90 % of sessions or more, drift of the machine included.

    The bound is 90 % less 4 standard errors of the share; intervals may be wider than they need be, but not all:
    their median half width stays below twice the scatter of the estimates.
    """
    repeats, inside, halves, errors = 50, 0, [], []
    truth = np.log([made.LATENCY_S, made.BANDWIDTH])
    for seed in range(repeats):
        (fit,) = fit_machine(made.samples(session=session, drift=drift, noise=0.03, seed=seed, rounds=8))
        half = fit.quantile * np.sqrt(np.diag(fit.covariance))[:2]
        error = np.abs(fit.log_values[:2] - truth)
        inside += int((error <= half).sum())
        halves.append(half)
        errors.append(fit.log_values[:2] - truth)
    share = inside / (2 * repeats)
    assert share >= 0.9 - 4.0 * np.sqrt(0.9 * 0.1 / (2 * repeats))
    assert np.median(halves, axis=0).max() < 2.0 * 1.645 * np.std(errors, axis=0).max() + 0.01


def test_repeated_sessions_agree() -> None:
    """Monte Carlo: two sessions of one machine agree within their intervals in four of five cases or more."""
    fits = [
        fit_machine(made.samples("gemm", "bf16", made.gemm_s, made.GEMMS, session=0.03, drift=0.03, noise=0.03, seed=i))
        for i in range(16)
    ]
    agree = []
    for (a,), (b,) in zip(fits[::2], fits[1::2], strict=True):
        shared = min(len(a.log_values), len(b.log_values), 3)  # the first three have the same meaning in all forms
        half = [fit.quantile * np.sqrt(np.diag(fit.covariance))[:shared] for fit in (a, b)]
        agree += (np.abs(a.log_values[:shared] - b.log_values[:shared]) <= np.hypot(*half)).tolist()
    assert np.mean(agree) >= 0.8


def test_drift_is_part_of_the_standard_error() -> None:
    """Drift of whole rounds widens intervals; their number does not narrow them below it."""
    calm, moved = (fit_machine(made.samples(drift=drift, noise=0.01, rounds=40))[0] for drift in (0.0, 0.1))
    assert moved.drift == pytest.approx(0.1, rel=4.0 / np.sqrt(2 * 39))  # four standard errors of a deviation
    assert calm.drift < 0.01
    assert np.sqrt(moved.covariance[1, 1]) >= moved.drift
    assert np.sqrt(calm.covariance[1, 1]) < 0.05


def test_scaling_of_time() -> None:
    """Homogeneity: twice the seconds, twice the times and half the rates; relative errors stay."""
    once = fit_machine(made.samples(noise=0.02))[0]
    twice = fit_machine(made.samples(seconds=lambda point: 2.0 * made.copy_s(point), noise=0.02))[0]
    power = np.array([one.time_power for one in once.form.parameters])
    assert twice.form == once.form
    assert twice.log_values - once.log_values == pytest.approx(power * np.log(2.0), abs=1e-4)
    assert twice.covariance == pytest.approx(once.covariance, rel=1e-2, abs=1e-8)


def test_a_knee_is_found() -> None:
    """Hand: a tenth of the bandwidth beyond 1 MiB is no alpha-beta line; the segmented form wins on held-out sizes."""

    def seconds(point: tuple[tuple[str, int], ...]) -> float:
        nbytes = dict(point)["bytes"]
        return 1e-5 + min(nbytes, 2**20) / 1e10 + max(nbytes - 2**20, 0) / 1e9

    sizes = [(("bytes", 1 << power),) for power in range(10, 28)]
    (fit,) = fit_machine(made.samples(seconds=seconds, points=sizes, noise=0.01))
    assert fit.form.name == "segmented"
    assert values(fit)["bandwidth_beyond_bytes_per_s"] == pytest.approx(1e9, rel=0.05)
    error = {one.form: one.mean_abs_log for one in fit.held_out}
    assert error["segmented"] < 0.5 * error["alpha_beta"]


def test_suspects_are_left_out_and_outliers_stay() -> None:
    clean = made.samples()
    spoiled = [*clean, replace(clean[0], seconds=(1.0,), suspect="the clock jumped"), replace(clean[1], outliers=(2,))]
    (fit,) = fit_machine(spoiled)
    assert fit.suspects == 1
    assert fit.visits == len(clean) + 1
    assert values(fit)["bandwidth_bytes_per_s"] == pytest.approx(made.BANDWIDTH, rel=2e-3)


def test_one_bad_visit_does_not_move_a_point() -> None:
    """The median over visits and the soft loss: one visit of ten times the time changes little."""
    clean = made.samples(noise=0.01)
    spoiled = [replace(clean[0], seconds=(10.0 * clean[0].median_s,)), *clean[1:]]
    moved = fit_machine(spoiled)[0].log_values - fit_machine(clean)[0].log_values
    assert np.abs(moved).max() < 0.02


def test_too_few_points_give_no_fit() -> None:
    assert fit_machine(made.samples(points=made.SIZES[:2])) == ()
    (fit,) = fit_machine(made.samples(points=made.SIZES[:3]))
    assert fit.degrees == 1
    assert fit.error >= 0.0


def test_vector_is_a_map_of_scalars() -> None:
    (fit,) = fit_machine(made.samples("gemm", "bf16", made.gemm_s, made.GEMMS, noise=0.02))
    sizes = {name: np.array([dict(point)[name] for point in made.GEMMS], float) for name in ("m", "n", "k")}
    columns = columns_of("gemm", "bf16", sizes)
    single = [
        predict(fit, columns_of("gemm", "bf16", {name: np.array([float(size)]) for name, size in point}))[0]
        for point in made.GEMMS
    ]
    assert predict(fit, columns) == pytest.approx(single, rel=1e-12)
    assert (log_deviation(fit.form, fit.log_values, fit.covariance, columns) > 0.0).all()


def test_the_next_point_is_where_least_is_known() -> None:
    """Hand: after small sizes only, bandwidth is unknown and the largest is chosen; and the reverse."""
    candidates = [(("bytes", 1 << power),) for power in (6, 13, 30)]
    small = made.samples(points=[(("bytes", 1 << power),) for power in (10, 11, 12, 13)], noise=0.05)
    large = made.samples(points=[(("bytes", 1 << power),) for power in (22, 23, 24, 25)], noise=0.05)
    assert choose_next(small, "memory_copy", "u8", candidates) == candidates[2]
    assert choose_next(large, "memory_copy", "u8", candidates) == candidates[0]
    assert choose_next([], "memory_copy", "u8", candidates) is None
    assert choose_next(small, "memory_copy", "u8", []) is None


def test_a_layer_is_the_sum_of_its_kernels() -> None:
    """Hand: a layer made of its kernels and 50 us is recognised as such, with factor 1."""
    gemms = made.samples("gemm", "bf16", made.gemm_s, made.GEMMS)
    contexts = [
        (("batch", b), ("context", c), ("heads", 8), ("kv_heads", 2)) for b in (1, 8, 64) for c in (128, 512, 2048)
    ]

    def attention_s(point: tuple[tuple[str, int], ...]) -> float:
        size = dict(point)
        return 3e-6 + size["batch"] * size["context"] * 128 * (4.0 * 2 / 1e10 + 4.0 * 8 / 1e12)

    decode = made.samples("decode_attention", "bf16", attention_s, contexts)
    fits = {fit.kernel: fit for fit in fit_machine([*gemms, *decode])}
    widths = (("hidden", 1024), ("heads", 8), ("kv_heads", 2), ("intermediate", 2816))
    layers = [(("rows", r), ("context", c), *widths) for r in (1, 4, 16, 64) for c in (128, 1024)]

    def layer_s(point: tuple[tuple[str, int], ...]) -> float:
        columns = columns_of("layer", "bf16", {name: np.array([float(size)]) for name, size in point})
        return 5e-5 + float(kernel_sum(fits["gemm"], fits["decode_attention"], columns)[0])

    all_samples = [*gemms, *decode, *made.samples("layer", "bf16", layer_s, layers, noise=0.005)]
    layer = next(fit for fit in fit_machine(all_samples) if fit.kernel == "layer")
    assert layer.form.name == "kernel_sum"
    assert values(layer)["kernel_factor"] == pytest.approx(1.0, rel=0.05)
    assert values(layer)["per_layer_s"] == pytest.approx(5e-5, rel=0.3)


def test_the_soft_residual() -> None:
    """Limits: itself near zero; the square root of 2 x 0.15 x size far from it (soft-L1)."""
    assert softened(np.array([1e-6, -1e-6])) == pytest.approx([1e-6, -1e-6], rel=1e-9)
    assert softened(np.array([1e4]))[0] == pytest.approx(np.sqrt(2.0 * 0.15 * 1e4), rel=1e-4)


@pytest.mark.parametrize("kernel", ["gemm", "decode_attention", "prefill_attention", "layer", "memory_copy", "launch"])
def test_forms_rise_with_work(kernel: str) -> None:
    """Monotonicity: more of any size never takes less time, in every form."""
    axes = {
        "gemm": {"m": 8, "n": 512, "k": 512},
        "decode_attention": {"batch": 4, "context": 512, "heads": 8, "kv_heads": 2},
        "prefill_attention": {"batch": 2, "length": 256, "heads": 8, "kv_heads": 2},
        "layer": {"rows": 4, "context": 256, "hidden": 1024, "heads": 8, "kv_heads": 2, "intermediate": 2816},
        "memory_copy": {"bytes": 65536},
        "launch": {"ops": 8},
    }[kernel]
    dtype = "u8" if len(axes) == 1 else "bf16"
    base = columns_of(kernel, dtype, {name: np.array([float(size)]) for name, size in axes.items()})
    for form in forms_of(kernel, base):
        theta = np.array(form.start(base, np.array([1e-4])))
        before = form.seconds(theta, base)[0]
        assert before > 0.0
        for name in axes:
            more = columns_of(
                kernel, dtype, {**{k: np.array([float(v)]) for k, v in axes.items()}, name: base[name] * 2}
            )
            assert form.seconds(theta, more)[0] >= before * (1.0 - 1e-12)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kernel must be one that is measured"):
        fit_machine(made.samples("conv", "u8"))
    with pytest.raises(ValueError, match="point of gemm must have m, n, k, got bytes"):
        fit_machine(made.samples("gemm", "bf16"))
    with pytest.raises(ValueError, match="gemm must have the size k"):
        columns_of("gemm", "bf16", {"m": np.ones(1), "n": np.ones(1)})
    with pytest.raises(ValueError, match="must have sizes > 0"):
        columns_of("memory_copy", "u8", {"bytes": np.zeros(1)})
    with pytest.raises(ValueError, match="form of gemm must be one of sum"):
        form_of("gemm", "cubic")

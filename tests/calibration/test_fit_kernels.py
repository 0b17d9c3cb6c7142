"""Kernel fits: round trips on synthetic tables, and held-out errors of the public ones within the bars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from servecast.calibration.fits.kernels import (
    KernelFit,
    closed_form,
    fit_all_reduce,
    fit_decode_attention,
    fit_gemm,
    fit_prefill_attention,
)
from servecast.calibration.public import KernelReport, fit_kernels
from servecast.model.kernels import (
    KernelParameters,
    all_reduce_seconds,
    decode_attention_seconds,
    gemm_seconds,
    prefill_attention_seconds,
)
from servecast.model.step_time import KernelSet

PEAK, BANDWIDTH = 1e15, 3e12
TRUTH = KernelParameters(floor_s=4e-6, bandwidth_efficiency=0.8, compute_efficiency=0.7, exponent=2.5)


def gemm_table(noise: float = 0.0) -> dict[str, np.ndarray]:
    m, n, k = (
        x.ravel()
        for x in np.meshgrid(
            2.0 ** np.arange(0, 15), 2.0 ** np.arange(6, 16, 1.5), 2.0 ** np.arange(6, 16, 1.5), indexing="ij"
        )
    )
    seconds = gemm_seconds(
        TRUTH,
        m,
        n,
        k,
        weight_bytes_per_element=2.0,
        activation_bytes_per_element=2.0,
        peak_flops=PEAK,
        bandwidth=BANDWIDTH,
    )
    seconds = seconds * np.exp(np.random.default_rng(0).normal(scale=noise, size=len(m)))
    return {"m": m, "n": n, "k": k, "seconds": seconds}


def close(fit: KernelFit, rel: float) -> None:
    assert fit.parameters.floor_s == pytest.approx(TRUTH.floor_s, rel=rel)
    assert fit.parameters.bandwidth_efficiency == pytest.approx(TRUTH.bandwidth_efficiency, rel=rel)
    assert fit.parameters.compute_efficiency == pytest.approx(TRUTH.compute_efficiency, rel=rel)
    assert fit.parameters.exponent == pytest.approx(TRUTH.exponent, rel=rel)


def test_gemm_round_trip() -> None:
    # Origin: fit(model(theta)) = theta, and nothing is left for the surface.
    table = gemm_table()
    fit = fit_gemm(table, weight_format="bf16", peak_flops=PEAK, bandwidth=BANDWIDTH)
    close(fit, 1e-3)
    assert fit.parameters.surface is not None
    assert np.abs(fit.parameters.surface.values).max() < 1e-3
    assert fit.rows == len(table["m"])
    for error in fit.held_out.values():
        assert error.mape < 1e-3


def test_gemm_round_trip_with_noise() -> None:
    # Origin: fit(model(theta)) ~ theta; 735 rows of 3 % noise, so constants are known to about a per cent.
    fit = fit_gemm(gemm_table(0.03), weight_format="bf16", peak_flops=PEAK, bandwidth=BANDWIDTH)
    close(fit, 0.05)
    # held-out error of a right form is the noise itself: mean of |N(0, 0.03)| = 0.03 sqrt(2 / pi) = 0.024
    for error in fit.held_out.values():
        assert error.mape == pytest.approx(0.024, rel=0.3)


def test_the_surface_holds_what_the_closed_form_lacks() -> None:
    # Origin: round trip of a table that departs from any closed form by a factor in the middle of the range.
    table = gemm_table()
    bump = np.exp(0.5 * np.exp(-(((np.log2(table["m"]) - 7.0) / 1.5) ** 2)))
    table["seconds"] = table["seconds"] * bump
    fit = fit_gemm(table, weight_format="bf16", peak_flops=PEAK, bandwidth=BANDWIDTH)

    def error(parameters: KernelParameters) -> float:
        seconds = gemm_seconds(
            parameters,
            table["m"],
            table["n"],
            table["k"],
            weight_bytes_per_element=2.0,
            activation_bytes_per_element=2.0,
            peak_flops=PEAK,
            bandwidth=BANDWIDTH,
        )
        return float(np.abs(seconds / table["seconds"] - 1.0).mean())

    assert error(fit.parameters) < 0.05
    assert error(fit.parameters) < 0.4 * error(closed_form(fit.parameters))
    for slice_error in fit.held_out.values():
        assert slice_error.median <= slice_error.closed_form_median


def test_decode_attention_round_trip() -> None:
    # Origin: fit(model(theta)) = theta.
    batch, context, kv_heads, group = (
        x.ravel()
        for x in np.meshgrid(2.0 ** np.arange(0, 10, 2), 2.0 ** np.arange(0, 18, 2), [1.0, 2, 4, 8], [1.0, 4, 8])
    )
    columns = {
        "batch": batch,
        "context": context,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": np.full(len(batch), 128.0),
    }
    seconds = decode_attention_seconds(
        TRUTH, *columns.values(), kv_bytes_per_element=1.0, peak_flops=PEAK, bandwidth=BANDWIDTH
    )
    fit = fit_decode_attention(columns | {"seconds": seconds}, kv_format="fp8", peak_flops=PEAK, bandwidth=BANDWIDTH)
    # decode is memory-bound everywhere: only floor and bandwidth are identified
    assert fit.parameters.floor_s == pytest.approx(TRUTH.floor_s, rel=0.01)
    assert fit.parameters.bandwidth_efficiency == pytest.approx(TRUTH.bandwidth_efficiency, rel=0.01)
    again = decode_attention_seconds(
        fit.parameters, *columns.values(), kv_bytes_per_element=1.0, peak_flops=PEAK, bandwidth=BANDWIDTH
    )
    np.testing.assert_allclose(again, seconds, rtol=0.01)


def test_prefill_attention_round_trip() -> None:
    # Origin: fit(model(theta)) = theta.
    batch, length, heads, head_dim = (
        x.ravel() for x in np.meshgrid([1.0, 4, 16], 2.0 ** np.arange(0, 15), [1.0, 2, 8, 32], [64.0, 128, 256])
    )
    columns = {"batch": batch, "length": length, "heads": heads, "kv_heads": heads, "head_dim": head_dim}
    seconds = prefill_attention_seconds(TRUTH, *columns.values(), peak_flops=PEAK, bandwidth=BANDWIDTH)
    fit = fit_prefill_attention(columns | {"seconds": seconds}, peak_flops=PEAK, bandwidth=BANDWIDTH)
    again = prefill_attention_seconds(fit.parameters, *columns.values(), peak_flops=PEAK, bandwidth=BANDWIDTH)
    np.testing.assert_allclose(again, seconds, rtol=0.01)
    assert fit.parameters.compute_efficiency == pytest.approx(TRUTH.compute_efficiency, rel=0.01)


def test_all_reduce_round_trip() -> None:
    # Origin: hand. An alpha-beta line per rank count is recovered where it lies between knots: 10 us + bytes / 200
    # GB/s.
    size = np.tile(2.0 ** np.arange(8, 30), 2)
    ranks = np.repeat([2.0, 8.0], 22)
    seconds = 10e-6 * np.sqrt(ranks) + size / (200e9 / ranks)
    curves, held_out = fit_all_reduce({"ranks": ranks, "bytes": size, "seconds": seconds})
    assert [curve.ranks for curve in curves] == [2, 8]
    at_knots = np.isin(np.log2(size), curves[0].log2_bytes)
    np.testing.assert_allclose(
        all_reduce_seconds(curves, size[at_knots], ranks[at_knots]), seconds[at_knots], rtol=0.02
    )
    # between knots the chord lies above the line: at most 10 % with knots two octaves apart
    np.testing.assert_allclose(all_reduce_seconds(curves, size, ranks), seconds, rtol=0.12)
    assert set(held_out) == {"bytes >= 1 MiB", "bytes < 1 MiB"}
    assert all(error.rows > 0 for error in held_out.values())
    # the baseline is the very form the table was made of
    assert all(error.closed_form_median < 1e-6 for error in held_out.values())


# ---- public tables -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(data_path: Callable[..., Path]) -> tuple[tuple[KernelSet, ...], list[KernelReport]]:
    return fit_kernels(data_path("aic-kernels").parent)


def held_out_medians(reports: list[KernelReport], kernel: str, slice_name: str) -> dict[str, float]:
    found = {f"{r.gpu} {r.format}": r.held_out[slice_name].median for r in reports if r.kernel == kernel}
    assert len(found) >= 2
    return found


@pytest.mark.parametrize(
    ("kernel", "slice_name", "bar"),
    [
        # Origin: the acceptance bars of the kernel surfaces.
        ("gemm", "m >= 256", 0.10),
        ("gemm", "m < 256", 0.20),
        ("all-reduce", "bytes >= 1 MiB", 0.10),
    ],
)
def test_held_out_errors_are_within_the_bars(
    public: tuple[tuple[KernelSet, ...], list[KernelReport]], kernel: str, slice_name: str, bar: float
) -> None:
    for name, median in held_out_medians(public[1], kernel, slice_name).items():
        assert median <= bar, name


def test_surfaces_beat_the_closed_form_on_shapes_they_did_not_see(
    public: tuple[tuple[KernelSet, ...], list[KernelReport]],
) -> None:
    for report in public[1]:
        for name, error in report.held_out.items():
            assert error.median <= error.closed_form_median, (report.gpu, report.kernel, report.format, name)
            assert error.rows > 0


def test_a_surface_is_a_hundred_times_smaller_than_its_table(
    public: tuple[tuple[KernelSet, ...], list[KernelReport]],
) -> None:
    # Origin: design. Fewer than 5 000 fitted numbers per GPU stand for more than 100 000 measurements.
    for gpu in ("h100_sxm", "h200_sxm"):
        of_gpu = [report for report in public[1] if report.gpu == gpu]
        assert sum(report.numbers for report in of_gpu) < 5000
        assert sum(report.rows for report in of_gpu) > 100_000


def test_efficiencies_are_physical(public: tuple[tuple[KernelSet, ...], list[KernelReport]]) -> None:
    for kset in public[0]:
        for kernel in (*kset.gemm.values(), *kset.decode_attention.values(), kset.prefill_attention):
            assert 0.0 < kernel.bandwidth_efficiency <= 1.0
            assert 0.0 < kernel.compute_efficiency <= 1.0
            assert kernel.floor_s > 0.0


def test_the_last_set_is_a_closed_form_for_every_gpu(public: tuple[tuple[KernelSet, ...], list[KernelReport]]) -> None:
    # Origin: hand. The means of both GPUs' efficiencies, no surfaces.
    h100, h200, closed = public[0]
    assert not closed.measured
    for fmt in ("bf16", "fp8"):
        kernel = closed.gemm[fmt]
        assert kernel.surface is None
        mean = (h100.gemm[fmt].bandwidth_efficiency + h200.gemm[fmt].bandwidth_efficiency) / 2.0
        assert kernel.bandwidth_efficiency == pytest.approx(mean, rel=1e-12)
    assert closed.gemm.keys() == h100.gemm.keys()

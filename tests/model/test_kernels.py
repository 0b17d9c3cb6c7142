"""Kernel times: closed forms by hand, the shipped kernels against published figures, limits and invariances.

Published figures: step notes, sections 6.2 and 6.3, tags [P] (read) and [D] (measured on tables).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from servecast.calibration.profile import load_profile
from servecast.model.formats import BYTES_PER_ELEMENT
from servecast.model.kernels import (
    AllReduceCurve,
    KernelParameters,
    all_reduce_seconds,
    decode_attention_seconds,
    gemm_seconds,
    prefill_attention_seconds,
    roofline_seconds,
)
from servecast.model.step_time import KernelSet
from servecast.model.surfaces import Surface
from servecast.readers import catalogues

Floats = NDArray[np.float64]

PLAIN = KernelParameters(floor_s=1e-6, bandwidth_efficiency=0.5, compute_efficiency=0.25, exponent=2.0)
TABLES = ("h100_sxm", "h200_sxm")


@cache
def shipped(gpu: str) -> KernelSet:
    return next(one for one in load_profile().kernels if one.name == gpu)


def gemm(gpu: str, m: ArrayLike, n: ArrayLike, k: ArrayLike, fmt: str = "bf16") -> Floats:
    part = catalogues.gpu(gpu)
    return gemm_seconds(
        shipped(gpu).gemm[fmt],
        m,
        n,
        k,
        weight_bytes_per_element=BYTES_PER_ELEMENT[fmt],
        activation_bytes_per_element=BYTES_PER_ELEMENT[fmt],
        peak_flops=part.peak_flops(fmt),
        bandwidth=part.bandwidth_bytes_per_s,
    )


def decode(gpu: str, batch: ArrayLike, context: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike) -> Floats:
    part = catalogues.gpu(gpu)
    return decode_attention_seconds(
        shipped(gpu).decode_attention["bf16"],
        batch,
        context,
        heads,
        kv_heads,
        128,
        kv_bytes_per_element=2.0,
        peak_flops=part.bf16_flops,
        bandwidth=part.bandwidth_bytes_per_s,
    )


def prefill(gpu: str, batch: ArrayLike, length: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike) -> Floats:
    part = catalogues.gpu(gpu)
    return prefill_attention_seconds(
        shipped(gpu).prefill_attention,
        batch,
        length,
        heads,
        kv_heads,
        128,
        peak_flops=part.bf16_flops,
        bandwidth=part.bandwidth_bytes_per_s,
    )


# ---- closed form -------------------------------------------------------------------------------------


def test_roofline_by_hand() -> None:
    # Origin: hand. 1.5 MB over 0.5 x 1 TB/s = 3 us, 1 MFLOP over 0.25 x 1 TFLOP/s = 4 us, q = 2: 1 + 5 us.
    np.testing.assert_allclose(roofline_seconds(PLAIN, 1e6, 1.5e6, 1e12, 1e12), 6e-6, rtol=1e-12)


@pytest.mark.parametrize(
    ("flops", "nbytes", "expected"),
    [(0.0, 0.0, 1e-6), (0.0, 1.5e6, 4e-6), (1e6, 0.0, 5e-6)],  # Origin: hand; one term alone stands as it is
)
def test_roofline_limits(flops: float, nbytes: float, expected: float) -> None:
    np.testing.assert_allclose(roofline_seconds(PLAIN, flops, nbytes, 1e12, 1e12), expected, rtol=1e-12)


def test_a_sharp_ridge_is_the_plain_roofline() -> None:
    # Origin: theory. (a^q + b^q)^(1/q) -> max(a, b) for q -> infinity, a + b for q = 1.
    sharp, soft = replace(PLAIN, exponent=200.0), replace(PLAIN, exponent=1.0)
    np.testing.assert_allclose(roofline_seconds(sharp, 1e6, 1.5e6, 1e12, 1e12), 5e-6, rtol=1e-6)
    np.testing.assert_allclose(roofline_seconds(soft, 1e6, 1.5e6, 1e12, 1e12), 8e-6, rtol=1e-12)


@pytest.mark.parametrize(
    ("weight", "activation", "nbytes"),
    [
        # Origin: hand, m, n, k = 3, 5, 7: weights 35 and inputs 21 elements, result 15 elements of 2 bytes.
        (2.0, 2.0, 70.0 + 42.0 + 30.0),
        (1.0, 1.0, 35.0 + 21.0 + 30.0),
        (0.5, 2.0, 17.5 + 42.0 + 30.0),
    ],
)
def test_gemm_counts_by_hand(weight: float, activation: float, nbytes: float) -> None:
    slow_memory = gemm_seconds(
        PLAIN,
        3,
        5,
        7,
        weight_bytes_per_element=weight,
        activation_bytes_per_element=activation,
        peak_flops=1e30,
        bandwidth=1.0,
    )
    np.testing.assert_allclose(slow_memory, 1e-6 + nbytes / 0.5, rtol=1e-9)
    slow_units = gemm_seconds(
        PLAIN,
        3,
        5,
        7,
        weight_bytes_per_element=weight,
        activation_bytes_per_element=activation,
        peak_flops=1.0,
        bandwidth=1e30,
    )
    np.testing.assert_allclose(slow_units, 1e-6 + 2 * 3 * 5 * 7 / 0.25, rtol=1e-9)


def test_decode_attention_counts_by_hand() -> None:
    # Origin: hand. 2 sequences x 10 tokens x 4 KV heads x 8 wide: keys and values 1280 elements of 1 byte;
    # 16 query heads: scores and values 2 x 2 x 2 x 10 x 16 x 8 = 10240 FLOP.
    arguments = (2, 10, 16, 4, 8)
    memory = decode_attention_seconds(PLAIN, *arguments, kv_bytes_per_element=1.0, peak_flops=1e30, bandwidth=1.0)
    compute = decode_attention_seconds(PLAIN, *arguments, kv_bytes_per_element=1.0, peak_flops=1.0, bandwidth=1e30)
    np.testing.assert_allclose(memory, 1e-6 + 1280 / 0.5, rtol=1e-9)
    np.testing.assert_allclose(compute, 1e-6 + 10240 / 0.25, rtol=1e-9)


def test_prefill_attention_counts_by_hand() -> None:
    # Origin: step notes 4.3, 2 n_h d_h n^2 FLOP: 3 prompts x 2 x 4 x 8 x 100 = 19200; bytes by hand: queries and
    # outputs of 4 heads, keys and values of 2: 3 x 10 x 8 x (2 x 4 + 2 x 2) elements of 2 bytes = 5760.
    compute = prefill_attention_seconds(PLAIN, 3, 10, 4, 2, 8, peak_flops=1.0, bandwidth=1e30)
    memory = prefill_attention_seconds(PLAIN, 3, 10, 4, 2, 8, peak_flops=1e30, bandwidth=1.0)
    np.testing.assert_allclose(compute, 1e-6 + 19200 / 0.25, rtol=1e-9)
    np.testing.assert_allclose(memory, 1e-6 + 5760 / 0.5, rtol=1e-9)


def test_a_surface_multiplies_the_closed_form() -> None:
    # Origin: hand. A constant surface of log 3 triples the time, floor included.
    knots = (np.array([0.0, 20.0]),) * 3
    tripled = replace(PLAIN, surface=Surface(knots=knots, values=np.full((2, 2, 2), np.log(3.0))))
    common = {
        "weight_bytes_per_element": 2.0,
        "activation_bytes_per_element": 2.0,
        "peak_flops": 1e15,
        "bandwidth": 1e12,
    }
    m = np.array([1.0, 64.0, 4096.0])
    np.testing.assert_allclose(
        gemm_seconds(tripled, m, 512.0, 1024.0, **common),
        3.0 * gemm_seconds(PLAIN, m, 512.0, 1024.0, **common),
        rtol=1e-12,
    )


@given(
    st.floats(1.0, 1e5), st.floats(1.0, 1e5), st.floats(1.0, 1e5), st.floats(1.0, 4.0), st.sampled_from(["m", "n", "k"])
)
def test_the_closed_form_grows_with_every_dimension(m: float, n: float, k: float, factor: float, axis: str) -> None:
    # Origin: theory. More bytes and more operations never take less time.
    shape = {"m": m, "n": n, "k": k}
    common = {
        "weight_bytes_per_element": 2.0,
        "activation_bytes_per_element": 2.0,
        "peak_flops": 1e15,
        "bandwidth": 3e12,
    }
    small = gemm_seconds(PLAIN, **shape, **common)
    large = gemm_seconds(PLAIN, **(shape | {axis: shape[axis] * factor}), **common)
    assert large >= small * (1.0 - 1e-12)


@given(st.floats(0.1, 10.0))
def test_kernel_times_scale_with_the_unit_of_time(scale: float) -> None:
    # Origin: dimensional homogeneity. Seconds k times as long: floors k-fold, rates 1/k, times k-fold.
    part = catalogues.gpu("h200_sxm")
    kernel = shipped("h200_sxm").gemm["bf16"]
    m, n, k = np.array([1.0, 300.0, 9000.0]), 4096.0, np.array([128.0, 1024.0, 14336.0])
    slow = gemm_seconds(
        replace(kernel, floor_s=kernel.floor_s * scale),
        m,
        n,
        k,
        weight_bytes_per_element=2.0,
        activation_bytes_per_element=2.0,
        peak_flops=part.bf16_flops / scale,
        bandwidth=part.bandwidth_bytes_per_s / scale,
    )
    np.testing.assert_allclose(slow, scale * gemm("h200_sxm", m, n, k), rtol=1e-10)


# ---- the shipped kernels against published figures ------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "published_ms"),
    [(4096, 0.168), (64, 0.0120), (256, 0.0175), (1024, 0.0441), (8192, 0.382), (1, 0.0126)],
)
def test_gemm_single_points_of_h200(m: int, published_ms: float) -> None:
    # Origin: step notes 6.3 "Single points [P]", bf16, n = k = 4096.
    assert gemm("h200_sxm", [m], 4096, 4096)[0] * 1e3 == pytest.approx(published_ms, rel=0.15)


def test_one_token_streams_a_large_matrix_as_published() -> None:
    # Origin: step notes 6.3 [P]: m = 1, n = k = 16384 at 4295 GB/s.
    assert 2.0 * 16384**2 / gemm("h200_sxm", [1], 16384, 16384)[0] == pytest.approx(4295e9, rel=0.15)


@pytest.mark.parametrize(
    ("gpu", "floor_us", "bandwidth", "compute", "q"),
    [("h200_sxm", 3.27, 0.799, 0.798, 2.39), ("h100_sxm", 3.12, 0.853, 0.809, 2.38)],
)
def test_closed_form_constants_of_bf16_gemm(
    gpu: str, floor_us: float, bandwidth: float, compute: float, q: float
) -> None:
    # Origin: step notes 6.3 [D], the four-constant form fitted there to 4 000 other shapes.
    kernel = shipped(gpu).gemm["bf16"]
    assert kernel.floor_s * 1e6 == pytest.approx(floor_us, rel=0.10)
    assert kernel.bandwidth_efficiency == pytest.approx(bandwidth, rel=0.05)
    assert kernel.compute_efficiency == pytest.approx(compute, rel=0.05)
    assert kernel.exponent == pytest.approx(q, rel=0.15)


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "fp8_block"])
@pytest.mark.parametrize("gpu", TABLES)
def test_no_gemm_is_faster_than_the_datasheet(gpu: str, fmt: str) -> None:
    # Origin: datasheet; 2 % for rounding of the rates. Over the tables' range of shapes. The bandwidth holds for
    # weights that do not fit into the 50 MB of L2.
    part = catalogues.gpu(gpu)
    m, n, k = np.meshgrid(
        2.0 ** np.arange(0, 15.1, 0.5), 2.0 ** np.arange(5, 16.1, 0.5), 2.0 ** np.arange(5, 16.1, 0.5)
    )
    seconds = gemm(gpu, m, n, k, fmt)
    assert (2.0 * m * n * k / seconds).max() <= 1.02 * part.peak_flops(fmt)
    weights = BYTES_PER_ELEMENT[fmt] * n * k
    assert (weights / seconds)[weights > 60e6].max() <= 1.02 * part.bandwidth_bytes_per_s


@pytest.mark.parametrize(
    ("gpu", "fmt", "best_tflops"),
    [("h200_sxm", "bf16", 940), ("h100_sxm", "bf16", 956), ("h200_sxm", "fp8", 1678), ("h100_sxm", "fp8", 1601)],
)
def test_no_gemm_beats_the_best_rate_measured(gpu: str, fmt: str, best_tflops: float) -> None:
    # Origin: step notes 6.3 [D], best rate in the table of each GPU.
    size = 2.0 ** np.arange(5, 16.1, 0.5)
    m, n, k = np.meshgrid(size[:-2], size, size)
    assert (2.0 * m * n * k / gemm(gpu, m, n, k, fmt)).max() <= best_tflops * 1e12


@pytest.mark.parametrize(
    ("ranks", "nbytes", "published_us"),
    [
        (2, 256, 4.4),
        (2, 64 * 1024, 4.8),
        (2, 256 * 1024, 5.2),
        (2, 2**20, 8.4),
        (2, 2**23, 43.0),
        (4, 256, 4.4),
        (4, 64 * 1024, 5.4),
        (4, 256 * 1024, 7.0),
        (4, 2**20, 12.1),
        (4, 2**23, 51.8),
        (8, 256, 4.7),
        (8, 64 * 1024, 6.6),
        (8, 256 * 1024, 10.1),
        (8, 2**20, 14.1),
        (8, 2**23, 48.4),
    ],
)
def test_all_reduce_of_h200_inside_a_graph(ranks: int, nbytes: int, published_us: float) -> None:
    # Origin: step notes 6.2, vLLM's custom all-reduce inside a CUDA graph; bar: 10 %, the largest error the curves
    # may have.
    assert all_reduce_seconds(shipped("h200_sxm").all_reduce, [nbytes], ranks)[0] * 1e6 == pytest.approx(
        published_us, rel=0.10
    )


@pytest.mark.parametrize(
    ("gpu", "ranks", "algorithm_gb_s"),
    [
        ("h100_sxm", 2, 318),
        ("h100_sxm", 4, 233),
        ("h100_sxm", 8, 254),
        ("h200_sxm", 2, 315),
        ("h200_sxm", 4, 232),
        ("h200_sxm", 8, 263),
    ],
)
def test_large_all_reduce_runs_at_the_published_rate(gpu: str, ranks: int, algorithm_gb_s: float) -> None:
    # Origin: step notes 6.2, NCCL at 512 MiB.
    seconds = all_reduce_seconds(shipped(gpu).all_reduce, [2**29], ranks)[0]
    assert 2**29 / seconds / 1e9 == pytest.approx(algorithm_gb_s, rel=0.10)


@pytest.mark.parametrize(("nbytes", "nccl_us"), [(2048, 15.7), (2**17, 19.0), (2**21, 38.2), (2**25, 199.8)])
def test_all_reduce_of_eight_h100_is_at_most_that_of_nccl(nbytes: int, nccl_us: float) -> None:
    # Origin: step notes 6.2, NCCL alone on 8 x H100; the curves take the fastest implementation at each size.
    assert all_reduce_seconds(shipped("h100_sxm").all_reduce, [nbytes], 8)[0] * 1e6 <= 1.02 * nccl_us


@pytest.mark.parametrize(
    ("gpu", "batch", "context", "share"),
    [
        # Origin: step notes 6.3 [D], fraction of bandwidth by KV bytes: 256-1024 MB and 1-4 GB.
        # 8 KV heads x 128 x 2 x 2 bytes = 4096 bytes a token: 32 x 4096 tokens = 0.54 GB, 64 x 8192 = 2.1 GB.
        ("h200_sxm", 32, 4096, 0.72),
        ("h100_sxm", 32, 4096, 0.78),
        ("h200_sxm", 64, 8192, 0.87),
        ("h100_sxm", 64, 8192, 0.90),
    ],
)
def test_decode_attention_reads_the_cache_at_the_published_share(
    gpu: str, batch: int, context: int, share: float
) -> None:
    nbytes = 4096.0 * batch * context
    rate = nbytes / decode(gpu, [batch], context, 32, 8)[0]
    assert rate / catalogues.gpu(gpu).bandwidth_bytes_per_s == pytest.approx(share, rel=0.15)


def test_smallest_decode_attention() -> None:
    # Origin: step notes 6.3 [D]: floor 11 us.
    assert decode("h200_sxm", [1], 16, 8, 8)[0] * 1e6 == pytest.approx(11.0, rel=0.15)


@pytest.mark.parametrize(
    ("length", "mfu"),
    [(1448, 0.38), (2896, 0.50), (5793, 0.57), (11585, 0.60)],  # geometric middle of each published range of lengths
)
def test_prefill_attention_reaches_the_published_rate(length: int, mfu: float) -> None:
    # Origin: step notes 6.3 [D], MFU of 989 TFLOP/s by length, head size 128; four prompts fill the GPU at each of
    # them.
    flops = 2.0 * 4 * 32 * 128 * length**2
    assert flops / prefill("h200_sxm", [4], length, 32, 8)[0] / 989e12 == pytest.approx(mfu, rel=0.20)


# ---- all-reduce ------------------------------------------------------------------------------------------

CURVES = tuple(
    AllReduceCurve(
        ranks=ranks, log2_bytes=np.array([10.0, 20.0, 30.0]), log_seconds=np.log(np.array([2e-6, 8e-6, 4e-3]) * factor)
    )
    for ranks, factor in ((2, 1.0), (8, 4.0))
)


def test_one_rank_needs_no_all_reduce() -> None:
    np.testing.assert_array_equal(all_reduce_seconds(CURVES, [1.0, 1e6, 1e9], 1), np.zeros(3))


def test_all_reduce_by_hand() -> None:
    # Origin: hand. 2 ranks: 2^15 bytes lie half way (in logs) between 2 and 8 us: 4 us. Below the first knot flat,
    # beyond the last proportional: 2^31 bytes take twice as long as 2^30.
    np.testing.assert_allclose(
        all_reduce_seconds(CURVES, [0.0, 1.0, 1024.0, 2.0**15, 2.0**31], 2), [2e-6, 2e-6, 2e-6, 4e-6, 8e-3], rtol=1e-12
    )


def test_ranks_between_the_measured_counts() -> None:
    # Origin: hand. Half way between 2 and 8 in log2 is 4: the geometric mean, factor 2; 16 ranks continue by factor 2.
    np.testing.assert_allclose(all_reduce_seconds(CURVES, 2.0**20, [2, 4, 8, 16]) / 8e-6, [1, 2, 4, 8], rtol=1e-12)


def test_a_faster_link_moves_the_bandwidth_part_only() -> None:
    # Origin: hand. Twice the bandwidth: the time of half the bytes; messages below the first knot do not change.
    fast = all_reduce_seconds(CURVES, [512.0, 2.0**25], 2, bandwidth_ratio=2.0)
    np.testing.assert_allclose(fast, all_reduce_seconds(CURVES, [512.0, 2.0**24], 2), rtol=1e-12)
    assert fast[0] == pytest.approx(2e-6, rel=1e-12)


def test_one_curve_serves_every_count() -> None:
    np.testing.assert_allclose(all_reduce_seconds(CURVES[:1], 2.0**20, [1, 2, 8]), [0.0, 8e-6, 8e-6], rtol=1e-12)


# ---- vector = map of scalars -------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [*TABLES, "closed form"])
def test_vectors_are_maps_of_points(gpu: str) -> None:
    # Origin: the same call point by point.
    rng = np.random.default_rng(4)
    kset, part = shipped(gpu), catalogues.gpu("h100_sxm")
    m, n, k = (np.asarray(2.0 ** rng.uniform(low, 14.0, 40), dtype=np.float64) for low in (0.0, 5.0, 5.0))
    heads = np.asarray(2.0 ** rng.integers(0, 4, 40), dtype=np.float64)
    ranks = rng.choice([1.0, 2.0, 4.0, 8.0, 16.0], 40)
    rates = {"peak_flops": part.bf16_flops, "bandwidth": part.bandwidth_bytes_per_s}
    calls: dict[str, tuple[Callable[..., Floats], tuple[Floats, ...]]] = {
        "gemm": (
            lambda *x: gemm_seconds(
                kset.gemm["bf16"], *x, weight_bytes_per_element=2.0, activation_bytes_per_element=2.0, **rates
            ),
            (m, n, k),
        ),
        "decode": (
            lambda x, y, z: decode_attention_seconds(
                kset.decode_attention["bf16"], x, y, z, 8.0, 128.0, kv_bytes_per_element=2.0, **rates
            ),
            (m, k, 8.0 * heads),
        ),
        "prefill": (
            lambda x, y, z: prefill_attention_seconds(kset.prefill_attention, x, y, z, 8.0, 128.0, **rates),
            (np.ones(40), k, 8.0 * heads),
        ),
        "all-reduce": (lambda *x: all_reduce_seconds(kset.all_reduce, *x), (2.0 * m * n, ranks)),
    }
    for function, columns in calls.values():
        together = function(*columns)
        alone = [function(*(column[i : i + 1] for column in columns))[0] for i in range(40)]
        np.testing.assert_allclose(together, alone, rtol=1e-12)

"""Arrival statistics against the published traces, theory and hand calculations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.model.arrivals import (
    arrival_statistics,
    grid_quantum,
    length_statistics,
    range_warnings,
    scaled,
    spread_quantised,
    workload_from_parameters,
    workload_from_trace,
)
from servecast.model.workload import (
    ArrivalStatistics,
    EmpiricalLength,
    FixedLength,
    LognormalLength,
    Trace,
    UniformLength,
)
from servecast.readers.traces import read_trace

# reference/workloads section 4, computed independently from the same public files
ARRIVALS = {
    # folder, file: requests, span, rate, cv, lag-1, IDC 1 s, 10 s, 60 s, peak/mean 10 s, 60 s
    ("azure-llm-2023", "code.csv.gz"): (8819, 3436, 2.57, 13.2, 0.00, 13.2, 71.6, 164, 12.8, 4.2),
    ("azure-llm-2023", "conv.csv.gz"): (19366, 3502, 5.53, 1.09, 0.06, 1.4, 3.9, 16.1, 1.8, 1.5),
    ("mooncake", "conversation.csv.gz"): (12031, 3537, 3.40, 3.03, -0.11, 7.9, 2.1, 2.9, 2.0, 1.2),
    ("mooncake", "synthetic.csv.gz"): (3993, 1022, 3.91, 1.01, 0.02, 1.1, 1.2, 1.2, 1.4, 1.2),
}
LENGTHS = {
    # n_in mean, p50, p90, p99, max, cv, n_out the same, Spearman
    ("azure-llm-2023", "code.csv.gz"): (2048, 1469, 5188, 7436, 7437, 0.96, 27.9, 13, 55, 251, 1899, 2.15, -0.02),
    ("azure-llm-2023", "conv.csv.gz"): (1155, 1020, 2734, 4142, 14050, 0.96, 211, 129, 424, 601, 1000, 0.77, 0.07),
    ("mooncake", "conversation.csv.gz"): (
        *(12035, 6909, 27367, 85400, 126195, 1.31),
        *(343, 350, 597, 1119, 2000, 0.73, 0.07),
    ),
    ("mooncake", "synthetic.csv.gz"): (
        *(15325, 11587, 38611, 66456, 191378, 1.20),
        *(149, 69, 389, 768, 893, 1.19, -0.52),
    ),
}


def printed(value: float, digits: int) -> object:
    """Equal to what a table prints with so many decimals, to 1 % where that is wider."""
    return pytest.approx(value, rel=0.01, abs=0.5001 * 10.0**-digits)


def statistics(**changes: object) -> ArrivalStatistics:
    fields: dict[str, object] = {
        "rate_rps": 1.0,
        "gap_cv": 1.0,
        "idc": ((1.0, 1.0), (60.0, 1.0)),
        "peak_to_mean": ((60.0, 1.3),),
        "lag1_gap_correlation": 0.0,
        "zero_gap_share": 0.0,
        "span_s": 600.0,
        "requests": 601,
    }
    return ArrivalStatistics(**(fields | changes))  # type: ignore[arg-type]  # a mix of types by name


def poisson(rate_rps: float, requests: int, seed: int = 1) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate_rps, requests))


def trace(t_s: np.ndarray, n_in: int = 100, n_out: int = 10) -> Trace:
    return Trace(name="t", t_s=t_s, n_in=np.full(t_s.size, n_in), n_out=np.full(t_s.size, n_out))


@pytest.mark.parametrize("file", ARRIVALS)
def test_arrivals_of_published_traces(file: tuple[str, str], data_path: Callable[..., Path]) -> None:
    found = arrival_statistics(read_trace(data_path(*file)).t_s)
    requests, span, rate, cv, lag1, idc1, idc10, idc60, peak10, peak60 = ARRIVALS[file]
    assert found.requests == requests
    assert (found.span_s, found.rate_rps) == (printed(span, 0), printed(rate, 2))
    assert (found.gap_cv, found.lag1_gap_correlation) == (printed(cv, 2), printed(lag1, 2))
    idc, peak = dict(found.idc), dict(found.peak_to_mean)
    assert (idc[1.0], idc[10.0], idc[60.0]) == (printed(idc1, 1), printed(idc10, 1), printed(idc60, 1))
    assert (peak[10.0], peak[60.0]) == (printed(peak10, 1), printed(peak60, 1))


@pytest.mark.parametrize("file", LENGTHS)
def test_lengths_of_published_traces(file: tuple[str, str], data_path: Callable[..., Path]) -> None:
    read = read_trace(data_path(*file))
    s = length_statistics(read.n_in, read.n_out)
    expected = LENGTHS[file]
    prompt = (s.mean_in, s.p50_in, s.p90_in, s.p99_in, s.max_in)
    output = (s.p50_out, s.p90_out, s.p99_out, s.max_out)
    # percentiles exact, to the whole token that the table prints
    assert prompt == pytest.approx(expected[:5], abs=0.5001)
    assert output == pytest.approx(expected[7:11], abs=0.5001)
    assert (s.cv_in, s.mean_out, s.cv_out) == pytest.approx((expected[5], expected[6], expected[11]), rel=0.01)
    assert s.spearman == pytest.approx(expected[12], abs=0.0051)


def test_short_benchmark_run_keeps_only_one_second_windows(data_path: Callable[..., Path]) -> None:
    path = data_path("llmservingsim-vllm", "requests_input.csv")
    found = arrival_statistics(read_trace(path, run="rtx4090-llama31-8b").t_s)  # section 4: 300, 29 s, 10.3/s, 0.94
    assert (found.requests, [window_s for window_s, _ in found.idc]) == (300, [1.0])
    assert (found.rate_rps, found.gap_cv) == (pytest.approx(10.3, rel=0.01), pytest.approx(0.94, rel=0.01))
    assert found.idc[0][1] == pytest.approx(1.0, abs=0.05)


def test_hand_calculation() -> None:
    # gaps 1, 1, 4 then 0: mean 1.5, population variance 9/4; counts per second 1 1 1 0 0 0 in six full windows
    found = arrival_statistics([0.0, 1.0, 2.0, 6.0, 6.0])
    assert found.rate_rps == pytest.approx(4.0 / 6.0, rel=1e-12)
    assert found.gap_cv == pytest.approx(1.0, rel=1e-12)
    assert found.idc == ((1.0, pytest.approx(0.5, rel=1e-12)),)
    assert found.peak_to_mean == ((1.0, pytest.approx(2.0, rel=1e-12)),)
    assert (found.zero_gap_share, found.span_s, found.requests) == (0.25, 6.0, 5)


def test_poisson_has_idc_one() -> None:
    found = arrival_statistics(poisson(20.0, 400_000))
    assert found.gap_cv == pytest.approx(1.0, rel=0.02)
    for window_s, idc in found.idc:
        windows = found.span_s // window_s
        # a sample variance of n counts has relative standard error sqrt(2 / n)
        assert abs(idc - 1.0) < 4.0 * math.sqrt(2.0 / windows)


def test_regular_arrivals_have_no_dispersion() -> None:
    found = arrival_statistics(np.arange(10_000) * 0.1)
    assert found.gap_cv == pytest.approx(0.0, abs=1e-9)
    assert found.lag1_gap_correlation == 0.0
    assert range_warnings(found) == ()


def test_stray_stamp_years_later_costs_no_memory() -> None:
    assert arrival_statistics([0.0, 1.0, 1e12]).idc[0][1] == pytest.approx(1.0, rel=0.5)


@pytest.mark.parametrize(
    ("t_s", "message"),
    [
        ([0.0], "at least 2 arrivals"),
        ([[0.0, 1.0]], "at least 2 arrivals"),
        ([0.0, math.nan], "must be finite"),
        ([0.0, math.inf], "must be finite"),
        ([0.0, 2.0, 1.0], "must not decrease, but does after arrival 1"),
        ([3.0, 3.0, 3.0], "all equal"),
    ],
)
def test_refused_times(t_s: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrival_statistics(t_s)


# whole microseconds, as loggers write them, so that scaling does not merge or split stamps
stamps = st.lists(st.integers(0, 10**9), min_size=3, max_size=60, unique=True).map(lambda us: np.sort(us) / 1e6)


@given(stamps, st.floats(0.01, 100.0))
def test_time_scaling_keeps_cv(t_s: np.ndarray, factor: float) -> None:
    one, other = arrival_statistics(t_s), arrival_statistics(t_s * factor)
    assert other.rate_rps == pytest.approx(one.rate_rps / factor, rel=1e-6)
    assert other.gap_cv == pytest.approx(one.gap_cv, rel=1e-6, abs=1e-6)
    assert other.span_s == pytest.approx(one.span_s * factor, rel=1e-6)


@given(stamps, st.floats(-1000.0, 1000.0))
def test_shift_changes_nothing(t_s: np.ndarray, shift: float) -> None:
    one, other = arrival_statistics(t_s), arrival_statistics(t_s + shift)
    assert (other.rate_rps, other.gap_cv) == pytest.approx((one.rate_rps, one.gap_cv), rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=2, max_size=40), st.randoms())
def test_order_of_requests_does_not_change_lengths(pairs: list[tuple[int, int]], order: object) -> None:
    shuffled = list(pairs)
    order.shuffle(shuffled)  # type: ignore[attr-defined]  # what hypothesis draws
    one, other = (length_statistics(*np.array(rows).T) for rows in (pairs, shuffled))
    assert one.p99_in == pytest.approx(other.p99_in, rel=1e-12)
    assert one.spearman == pytest.approx(other.spearman, rel=1e-9, abs=1e-9)


def test_thinning_moves_idc_towards_poisson() -> None:
    # workloads section 5.6: IDC - 1 scales with the probability of being kept
    rng = np.random.default_rng(3)
    batched = np.repeat(poisson(5.0, 40_000), 4)
    full = arrival_statistics(batched)
    kept = arrival_statistics(batched[rng.random(batched.size) < 0.25])
    # at 1 s: 8,000 windows leave about 3 % of sampling error, longer windows more
    assert kept.idc[0][1] - 1.0 == pytest.approx(0.25 * (full.idc[0][1] - 1.0), rel=0.1)


def test_spearman_against_hand_ranks() -> None:
    # ranks 1 2 3 4 and 1 3.5 2 3.5, centred: products 2.25 - 0.5 - 0.25 + 1.5 = 3, squares 5 and 4.5
    assert length_statistics([1, 2, 3, 4], [1, 9, 5, 9]).spearman == pytest.approx(3.0 / math.sqrt(22.5), rel=1e-12)
    assert length_statistics([1, 2, 3, 4], [7, 7, 7, 7]).spearman == 0.0


@pytest.mark.parametrize(("n_in", "n_out"), [([], []), ([1, 2], [1]), ([0, 1], [1, 1]), ([1.0, math.nan], [1, 1])])
def test_refused_lengths(n_in: list[int], n_out: list[int]) -> None:
    with pytest.raises(ValueError, match="n_in and n_out"):
        length_statistics(n_in, n_out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_gap_share": 0.21}, "quantised"),
        ({"idc": ((1.0, 1.0), (60.0, 3.1))}, "non-stationary"),
        ({"peak_to_mean": ((60.0, 3.1),)}, "size by peak"),
        ({"idc": ((1.0, 1.0),), "span_s": 29.0}, "spans 29 s"),
    ],
)
def test_each_flag_alone(changes: dict[str, object], words: str) -> None:
    (warning,) = range_warnings(statistics(**changes))
    assert words in warning


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_gap_share": 0.2},
        {"idc": ((1.0, 1.0), (60.0, 3.0))},
        {"idc": ((1.0, 0.01), (60.0, 0.1))},
        {"peak_to_mean": ((60.0, 3.0),)},
    ],
)
def test_no_flag_inside_the_range(changes: dict[str, object]) -> None:
    assert range_warnings(statistics(**changes)) == ()


def test_flags_of_the_azure_traces(data_path: Callable[..., Path]) -> None:
    code = workload_from_trace(read_trace(data_path("azure-llm-2023", "code.csv.gz"))).warnings
    conversation = workload_from_trace(read_trace(data_path("azure-llm-2023", "conv.csv.gz"))).warnings
    assert ["non-stationary" in warning for warning in code] == [True, False]
    assert "size by peak" in code[1]
    assert ["non-stationary" in warning for warning in conversation] == [True]


def test_mooncake_grid_is_spread(data_path: Callable[..., Path]) -> None:
    recorded = read_trace(data_path("mooncake", "conversation.csv.gz"))
    workload = workload_from_trace(recorded)
    # the notes of the data: 3 s grid, 90 % zero gaps; section 4: close to Poisson at 10 s and above
    assert grid_quantum(recorded.t_s) == pytest.approx(3.0, rel=1e-3)
    assert workload.arrivals.zero_gap_share == pytest.approx(0.90, abs=0.005)
    assert workload.arrivals.gap_cv == pytest.approx(1.0, abs=0.05)
    assert dict(workload.arrivals.idc)[60.0] == pytest.approx(2.9, rel=0.03)
    assert ["quantised to 3 s" in warning for warning in workload.warnings] == [True]


@pytest.mark.parametrize("quantum", [1.0, 3.0])
def test_rounding_and_spreading_restores_poisson(quantum: float) -> None:
    rounded = np.floor(poisson(4.0, 40_000) / quantum) * quantum
    assert grid_quantum(rounded) == pytest.approx(quantum, rel=1e-9)
    found = arrival_statistics(spread_quantised(rounded, quantum))
    assert found.gap_cv == pytest.approx(1.0, abs=0.03)
    assert found.idc[0][1] == pytest.approx(1.0, abs=4.0 * math.sqrt(2.0 / 10_000))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.sampled_from([0.5, 1.0, 2.5]))
def test_spread_keeps_order_and_stays_in_the_quantum(cells: list[int], quantum: float) -> None:
    t_s = np.sort(cells) * quantum
    t_s[-1] += quantum  # never all equal
    spread = spread_quantised(t_s, quantum)
    assert np.all(np.diff(spread) >= 0.0)
    assert np.all((spread > t_s) & (spread <= t_s + quantum))
    np.testing.assert_array_equal(spread, spread_quantised(t_s, quantum))


def test_spread_refuses_a_bad_quantum() -> None:
    with pytest.raises(ValueError, match="quantum must be positive"):
        spread_quantised([0.0, 1.0], 0.0)


def test_batches_are_not_mistaken_for_a_grid() -> None:
    batched = np.repeat(np.round(poisson(2.0, 4_000), 3), 3)
    assert grid_quantum(batched) == 0.0
    workload = workload_from_trace(trace(batched))
    assert "taken as batches" in workload.warnings[0]
    assert dict(workload.arrivals.idc)[60.0] == pytest.approx(3.0, rel=0.4)  # batch of m: IDC = m


def test_workload_from_parameters_is_a_renewal_process() -> None:
    workload = workload_from_parameters(5.0, gap_cv=2.0, n_in=FixedLength(512), n_out=FixedLength(64))
    assert workload.rate_rps == 5.0
    assert {idc for _, idc in workload.arrivals.idc} == {4.0}
    assert (workload.mean_in, workload.mean_out, workload.warnings) == (512.0, 64.0, ())
    # residence-weighted context of fixed lengths: n_in + n_out / 2
    assert workload.mean_context == pytest.approx(544.0, rel=1e-12)


def test_lognormal_sample_keeps_mean_cv_and_independence() -> None:
    workload = workload_from_parameters(
        1.0, n_in=LognormalLength(mean=1155.0, cv=0.96), n_out=LognormalLength.from_percentiles(129.0, 601.0)
    )
    found = length_statistics(workload.n_in, workload.n_out)
    assert found.mean_in == pytest.approx(1155.0, rel=0.005)
    assert found.cv_in == pytest.approx(0.96, rel=0.03)
    assert (found.p50_out, found.p99_out) == (pytest.approx(129.0, rel=0.01), pytest.approx(601.0, rel=0.03))
    assert found.spearman == pytest.approx(0.0, abs=0.01)


def test_lognormal_against_published_fit() -> None:
    # mu 5.02, sigma 0.86 (section 4): mean exp(mu + sigma^2 / 2), cv sqrt(exp(sigma^2) - 1)
    length = LognormalLength.from_percentiles(math.exp(5.02), math.exp(5.02 + 0.86 * 2.3263478740408408))
    assert length.mean == pytest.approx(math.exp(5.02 + 0.86**2 / 2.0), rel=1e-9)
    assert length.cv == pytest.approx(math.sqrt(math.expm1(0.86**2)), rel=1e-9)
    capped = LognormalLength(mean=length.mean, cv=length.cv, maximum=1000.0)
    assert capped.quantile(0.999) == 1000.0


def test_uniform_and_empirical_lengths() -> None:
    workload = workload_from_parameters(1.0, n_in=UniformLength(1, 61), n_out=EmpiricalLength([10, 20, 40]))
    values, counts = np.unique(workload.n_in, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(1, 62))
    assert counts.min() >= 9
    assert workload.n_out.min() == 10.0
    assert workload.n_out.max() == 40.0
    assert np.median(workload.n_out) == pytest.approx(20.0, abs=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedLength(0), "tokens must be at least 1"),
        (lambda: FixedLength(math.nan), "tokens must be at least 1"),
        (lambda: LognormalLength(mean=-1.0, cv=1.0), "mean must be at least 1"),
        (lambda: LognormalLength(mean=10.0, cv=-1.0), "cv must be >= 0"),
        (lambda: LognormalLength(mean=10.0, cv=1.0, maximum=0.0), "maximum must be"),
        (lambda: LognormalLength.from_percentiles(100.0, 50.0), "p99 must be at least p50"),
        (lambda: UniformLength(20, 10), "high must be at least low"),
        (lambda: EmpiricalLength([10]), "at least 2 values"),
        (lambda: EmpiricalLength([10, 5]), "must not decrease"),
        (lambda: workload_from_parameters(0.0, n_in=FixedLength(1), n_out=FixedLength(1)), "rate_rps must be positive"),
        (
            lambda: workload_from_parameters(1.0, gap_cv=math.nan, n_in=FixedLength(1), n_out=FixedLength(1)),
            "gap_cv must be >= 0",
        ),
    ],
)
def test_refused_parameters(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_scaled_keeps_burstiness() -> None:
    workload = workload_from_trace(trace(poisson(2.0, 2_000)))
    double = scaled(workload, 2.0)
    assert double.rate_rps == pytest.approx(2.0 * workload.rate_rps, rel=1e-12)
    assert double.arrivals.idc == workload.arrivals.idc
    assert double.arrivals.requests == 4_000
    with pytest.raises(ValueError, match="factor must be positive"):
        scaled(workload, 0.0)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 5))
def test_superposing_independent_copies_keeps_idc(copies: int) -> None:
    # the claim that `scaled` makes, by simulation: k independent batch processes, IDC 3 each
    streams = [np.repeat(poisson(2.0, 6_000, seed), 3) for seed in range(copies)]
    end = min(stream[-1] for stream in streams)
    merged = np.sort(np.concatenate([stream[stream <= end] for stream in streams]))
    assert arrival_statistics(merged).idc[1][1] == pytest.approx(3.0, rel=0.3)

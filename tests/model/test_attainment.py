"""Attainment of fleets. Expected values: M/M/c and M/G/1 theory, hand calculation, Monte Carlo, scipy's normal law."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincc, ndtr

from servecast.model.arrivals import workload_from_parameters
from servecast.model.attainment import (
    LEAST_LIMIT_S,
    LOAD_GRID,
    Fleet,
    Systems,
    Windows,
    attainment,
    fleets,
    joint_attainment,
    out_of_range,
    quantile,
    quantiles,
    rate_windows,
    slowed_systems,
    solve_systems,
)
from servecast.model.prompt_queue import ShiftedGamma, normal_tail
from servecast.model.queueing import mmc_wait_tail
from servecast.model.service import LengthNodes, ServiceCurves, length_nodes
from servecast.model.slo import Slo
from servecast.model.workload import ArrivalStatistics, FixedLength, Workload

Floats = NDArray[np.float64]

OUTPUT_TOKENS = 50.0
STEP_S = 0.02
NO_WAIT = 1e12


# ---- builders ----------------------------------------------------------------------------------------


def nodes(*pairs: tuple[float, float]) -> LengthNodes:
    tokens, share = np.array(pairs).T
    return LengthNodes(tokens=tokens, share=share)


def engine(
    decode_s: ArrayLike,
    *,
    prefill_s: ArrayLike = 0.0,
    first_token_s: float = 0.0,
    out: float = OUTPUT_TOKENS,
    outputs: LengthNodes | None = None,
) -> ServiceCurves:
    """One engine from its step times by batch and its prefill times by length node (nodes of equal share)."""
    step, prompt = np.atleast_1d(np.asarray(decode_s, float)), np.atleast_1d(np.asarray(prefill_s, float))
    batch = np.arange(1.0, len(step) + 1.0)
    mean, second = float(prompt.mean()), float((prompt**2).mean())
    return ServiceCurves(
        decode_s=step[np.newaxis],
        prefill_s=prompt[np.newaxis],
        prefill_mean_s=np.array([mean]),
        prefill_m2_s2=np.array([second]),
        prefill_m3_s3=np.array([float((prompt**3).mean())]),
        full_chunk_s=np.array([float(prompt.max())]),
        completion_rps=(batch / (out * step + batch * mean))[np.newaxis],
        kv_batch=np.array([len(step)]),
        first_token_s=np.array([first_token_s]),
        inputs=nodes(*((100.0 * (i + 1), 1.0 / len(prompt)) for i in range(len(prompt)))),
        outputs=outputs or nodes((out, 1.0)),
    )


def exponential_outputs(mean: float) -> LengthNodes:
    """Quantile classes fine enough for a coefficient of variation of 1."""
    tokens = -mean * np.log(1.0 - (np.arange(4000) + 0.5) / 4000)
    return LengthNodes(tokens=tokens, share=np.full(4000, 1 / 4000))


def solved(curves: ServiceCurves, caps: ArrayLike, workload: Workload) -> Systems:
    cap = np.atleast_1d(np.asarray(caps, np.int64))
    return solve_systems(curves, np.zeros(len(cap), np.intp), cap, workload, np.ones(len(cap)))


def single(systems: Systems, windows: Windows, replicas: float) -> Fleet:
    """A fleet of the first system."""
    return fleets(systems, windows, np.zeros(1, np.intp), [replicas])


def poisson(rate_rps: float, out: float = OUTPUT_TOKENS) -> Workload:
    return workload_from_parameters(rate_rps, n_in=FixedLength(100.0), n_out=FixedLength(out))


def windows_of(rates: ArrayLike, window_s: float) -> Windows:
    """Every window a class of its own (at most 8 of them)."""
    recorded = Workload(
        name="hand",
        arrivals=replace(poisson(1.0).arrivals, rate_rps=float(np.mean(np.asarray(rates)))),
        n_in=np.array([1.0]),
        n_out=np.array([1.0]),
        windows=((window_s, np.asarray(rates, float)),),
    )
    return rate_windows(recorded, window_s / 100.0)


def point(at: Floats) -> ShiftedGamma:
    """All mass at one place."""
    one = np.ones(at.shape)
    return ShiftedGamma(shift=at, shape=one, scale=1e-9 * one, atom=0.0 * one)


def fleet_of(**changed: Any) -> Fleet:
    """One fleet, one class: 10 ms to the first token after no wait at all, 20 ms a token, 50 tokens."""
    one = np.ones((1, 1))
    outputs = changed.get("outputs", nodes((OUTPUT_TOKENS, 1.0)))
    fields: dict[str, Any] = {
        "share": one,
        "backlog_s": 0.0 * one,
        "slot_p": 0.0 * one,
        "slot_decay": one,
        "idle": 0.0 * one,
        "own_s": np.full((1, 1), 0.004),
        "first": point(0.006 * one),
        "pace": point(np.full((1, 1, int((outputs.tokens > 1.5).sum())), STEP_S)),
        "longest_step_s": 10.0 * one,
        "tpot_s": STEP_S * one,
        "dispersion": one,
        "prompt_share": 0.1 * one,
        "prompts_per_request": 100.0 * np.ones(1),
        "inputs": nodes((100.0, 1.0)),
        "outputs": outputs,
        "utilisation": np.ones(1),
        "running": np.ones(1),
    }
    return Fleet(**{**fields, **changed})


def met(fleet: Fleet, metric: str, limits: ArrayLike) -> Floats:
    """Attainment of a single fleet at several limits."""
    return np.array([float(attainment(fleet, metric, limit)[0]) for limit in np.atleast_1d(np.asarray(limits))])


# ---- M/M/c ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(("servers", "load"), [(1, 0.8), (4, 0.5), (4, 0.9), (32, 0.97)])
def test_without_prefill_a_fleet_is_mmc(servers: int, load: float, replicas: int) -> None:
    """Theory: constant step t, no prefill and exponential outputs give M/M/c with service time m t.

    TTFT = wait + rest of the step met (uniform) + t: P(TTFT > x + t) = P(W > x) (e^{a t} - 1) / (a t), a the decay.
    """
    service_s = OUTPUT_TOKENS * STEP_S
    rate = load * servers / service_s
    workload = poisson(replicas * rate)
    curves = engine(np.full(64, STEP_S), outputs=exponential_outputs(OUTPUT_TOKENS))
    systems = solved(curves, servers, workload)
    fleet = single(systems, rate_windows(workload, 1.0), replicas)
    waits = np.array([0.3, 1.0, 3.0])
    at = (servers - load * servers) / service_s * STEP_S
    expected = mmc_wait_tail(waits, rate, service_s, servers) * np.expm1(at) / at
    np.testing.assert_allclose(1.0 - met(fleet, "ttft", waits + STEP_S), expected, rtol=0.03, atol=2e-5)
    np.testing.assert_allclose(fleet.utilisation, load, rtol=1e-12)


@pytest.mark.parametrize(("prompts", "p"), [([0.05], 0.05), ([0.02, 0.2], 0.01)])
def test_prompt_queue_against_a_replay_of_steps(prompts: list[float], p: float) -> None:
    """Monte Carlo, fixed seed: a batch that never fills, D = 20 ms, Poisson arrivals at 4 per second; steps one by one.

    Each step is D and the prompts that arrived in the one before; p50 and the (1 - p)-quantile of TTFT within 6 %.
    """
    rng, count = np.random.default_rng(5), 150_000
    arrivals = np.cumsum(rng.exponential(0.25, count))
    work = rng.choice(prompts, count)
    ttft = np.empty(count)
    now, served = 0.0, 0
    while served < count:
        here = int(np.searchsorted(arrivals, now, side="right"))
        now += 0.02 + float(work[served:here].sum())
        ttft[served:here] = now - arrivals[served:here]
        served = here
    workload = poisson(4.0, out=2000.0)
    curves = engine(np.full(512, 0.02), prefill_s=prompts, out=2000.0)
    fleet = single(solved(curves, 512, workload), rate_windows(workload, 1.0), 1)
    busy = replace(fleet, slot_p=0.0 * fleet.slot_p, idle=0.0 * fleet.idle)
    for q in (0.5, 1.0 - p):
        np.testing.assert_allclose(quantile(busy, "ttft", q)[0], np.quantile(ttft, q), rtol=0.06)


def test_range_is_left_where_the_docstring_says() -> None:
    """Rule: a likely slot wait, bursts, a backlog and (for TPOT) short outputs are outside; a calm fleet is inside."""
    one = np.ones((1, 1))
    calm = fleet_of()
    assert not any(out_of_range(calm, metric, p)[0] for metric in ("ttft", "tpot", "e2e") for p in (0.5, 0.99))
    assert not out_of_range(fleet_of(slot_p=0.001 * one), "ttft", 0.99)[0]
    assert out_of_range(fleet_of(slot_p=0.003 * one), "ttft", 0.99)[0]
    assert out_of_range(fleet_of(dispersion=3.0 * one), "ttft", 0.5)[0]
    assert out_of_range(fleet_of(dispersion=2.0 * one, prompt_share=0.6 * one), "ttft", 0.5)[0]
    assert out_of_range(fleet_of(backlog_s=one), "ttft", 0.5)[0]
    short = fleet_of(prompts_per_request=np.array([2.0]))
    assert out_of_range(short, "tpot", 0.5)[0]
    assert not out_of_range(short, "ttft", 0.5)[0]


# ---- fluid backlog -------------------------------------------------------------------------------------


def test_backlog_of_three_windows() -> None:
    """Hand: rates 1, 3, 1 per second in windows of 10 s, capacity 2 per second.

    Window 2 leaves (3 - 2) 10 = 10 requests, which window 3 works off to 10 + (1 - 2) 10 = 0. The mean backlog is 5 in
    both, the wait behind it 5 / 2 = 2.5 s; those are 3 + 1 of 5 requests.
    """
    curves = engine(np.full(64, STEP_S))  # 1 / (50 * 0.02) per sequence: two sequences complete 2 per second
    fleet = single(solved(curves, 2, poisson(1.0)), windows_of([1.0, 3.0, 1.0], 10.0), 1)
    behind = fleet.backlog_s > 0.0
    np.testing.assert_allclose(fleet.backlog_s[behind], 2.5, rtol=1e-12)
    np.testing.assert_allclose(fleet.share[behind].sum(), 0.8, rtol=1e-12)
    np.testing.assert_allclose(fleet.share.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(fleet.utilisation, 5.0 / 3.0 / 2.0, rtol=1e-12)
    assert met(fleet, "ttft", 2.5)[0] <= 0.2
    halved = single(solved(curves, 2, poisson(1.0)), windows_of([1.0, 3.0, 1.0], 10.0), 2)
    assert not halved.backlog_s.any()


def test_backlog_grows_as_long_as_a_stationary_load_exceeds_capacity() -> None:
    """Hand: 4 per second on a capacity of 2 for an hour: the backlog rises to 7200 requests, a mean wait of 1800 s."""
    workload = poisson(4.0)
    systems = solved(engine(np.full(64, STEP_S)), 2, workload)
    fleet = single(systems, rate_windows(workload, 1.0), 1)
    np.testing.assert_allclose((fleet.share * fleet.backlog_s).sum(), 1800.0, rtol=1e-9)
    np.testing.assert_allclose(fleet.utilisation, 2.0, rtol=1e-12)


# ---- TTFT of an idle fleet -----------------------------------------------------------------------------


def test_ttft_of_an_idle_fleet_is_its_prefill_time() -> None:
    """Hand: nobody waits and nothing runs, so TTFT is 0.03 + prefill, each prompt class a quarter of the requests."""
    prefill = np.array([0.1, 0.2, 0.4, 0.8])
    workload = poisson(1e-7)
    systems = solved(engine(np.full(64, STEP_S), prefill_s=prefill, first_token_s=0.03), 64, workload)
    fleet = single(systems, rate_windows(workload, 1.0), 1)
    at = prefill + 0.03
    np.testing.assert_allclose(met(fleet, "ttft", at * 1.0001), [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(met(fleet, "ttft", at * 0.9999), [0.0, 0.25, 0.5, 0.75], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose([quantile(fleet, "ttft", p)[0] for p in (0.2, 0.7, 0.99)], at[[0, 2, 3]], rtol=1.1e-3)


def test_prompts_slow_the_tokens_between_them() -> None:
    """Hand: prompts of 0.1 s at 2 per second take 0.2 of the engine, so a token takes 0.02 / 0.8 = 0.025 s."""
    workload = poisson(2.0)
    systems = solved(engine(np.full(64, STEP_S), prefill_s=0.1), 64, workload)
    fleet = single(systems, rate_windows(workload, 1.0), 1)
    np.testing.assert_allclose(fleet.tpot_s[fleet.share > 0.0], 0.025, rtol=1e-12)


# ---- TPOT and end to end -------------------------------------------------------------------------------


def test_tpot_is_a_mixture_over_lengths() -> None:
    """Independent: scipy's gamma law; two output classes that have a TPOT, 0.3 and 0.2 of the requests."""
    pace = ShiftedGamma(
        shift=np.full((1, 1, 2), 0.015),
        shape=np.array([[[1.5, 4.0]]]),
        scale=np.array([[[0.004, 0.001]]]),
        atom=np.array([[[0.25, 0.0]]]),
    )
    fleet = fleet_of(outputs=nodes((1.0, 0.5), (10.0, 0.3), (100.0, 0.2)), pace=pace)
    limits = np.array([0.0149, 0.0151, 0.02, 0.03])
    after = np.maximum(limits[:, np.newaxis] - 0.015, 0.0)
    tail = np.array([0.75, 1.0]) * gammaincc([1.5, 4.0], after / [0.004, 0.001])
    tail[0] = 1.0
    np.testing.assert_allclose(met(fleet, "tpot", limits), 1.0 - tail @ [0.6, 0.4], rtol=0.0, atol=4e-3)
    capped = replace(fleet, longest_step_s=np.full((1, 1), 0.02))
    assert met(capped, "tpot", 0.02)[0] == 1.0


def test_end_to_end_is_ttft_and_the_other_tokens() -> None:
    """Hand: 0.01 + 0.02 (m - 1): 0.19 s for 10 tokens, 1.99 s for 100; then with a wait e^{-t} of everybody."""
    outputs = nodes((10.0, 0.75), (100.0, 0.25))
    limits = np.array([0.1899, 0.1901, 1.9899, 1.9901])
    np.testing.assert_allclose(met(fleet_of(outputs=outputs), "e2e", limits), [0.0, 0.75, 0.75, 1.0], rtol=1e-12)
    waiting = fleet_of(outputs=outputs, slot_p=np.ones((1, 1)))
    expected = 0.75 * -np.expm1(-(2.5 - 0.19)) + 0.25 * -np.expm1(-(2.5 - 1.99))
    np.testing.assert_allclose(met(waiting, "e2e", 2.5), expected, rtol=1e-9)


def test_joint_attainment_is_the_product() -> None:
    """Hand: a fleet that keeps 1 - e^{-1} of TTFT and 1 - e^{-2} of TPOT (an exponential beyond 20 ms)."""
    one = np.ones((1, 1, 1))
    pace = ShiftedGamma(shift=STEP_S * one, shape=one, scale=0.001 * one, atom=0.0 * one)
    fleet = fleet_of(slot_p=np.ones((1, 1)), pace=pace)
    slos = [Slo(metric="ttft", percentile=99.0, limit_s=1.01), Slo(metric="tpot", percentile=99.0, limit_s=0.022)]
    np.testing.assert_allclose(joint_attainment(fleet, slos), np.expm1(-1.0) * np.expm1(-2.0), rtol=5e-3)


@pytest.mark.parametrize("x", [np.linspace(-9.0, 9.0, 20_001), np.array([-1e6, 1e6])])
def test_normal_tail(x: Floats) -> None:
    """Independent: scipy.special.ndtr; Abramowitz and Stegun state 7.5e-8."""
    np.testing.assert_allclose(normal_tail(x), ndtr(-x), rtol=0.0, atol=1e-7)


# ---- properties ----------------------------------------------------------------------------------------


class Sample:
    """A realistic engine, solved once: prompts of 20 to 500 ms, steps of 8 to 30 ms."""

    batch = np.arange(1.0, 129.0)
    curves = engine(0.008 + 1.7e-4 * batch, prefill_s=[0.02, 0.05, 0.1, 0.5], first_token_s=0.01, out=200.0)
    caps = np.array([4, 16, 64, 128])
    workload = poisson(4.0, out=200.0)
    systems = solved(curves, caps, workload)
    windows = rate_windows(workload, 1.0)

    @classmethod
    def fleets(cls, system: int, replicas: ArrayLike) -> Fleet:
        count = np.atleast_1d(np.asarray(replicas, float))
        return fleets(cls.systems, cls.windows, np.full(len(count), system), count)


limits = st.floats(1e-3, 50.0)
systems = st.integers(0, len(Sample.caps) - 1)
counts = st.floats(0.2, 60.0)
metrics = st.sampled_from(["ttft", "tpot", "e2e"])


@given(systems, counts, metrics, limits, limits)
def test_attainment_is_a_share_that_grows_with_the_limit(
    system: int, replicas: float, metric: str, one: float, other: float
) -> None:
    """Rule: a distribution function lies in [0, 1] and does not fall."""
    low, high = met(Sample.fleets(system, replicas), metric, sorted([one, other]))
    assert 0.0 <= low <= high + 2e-3
    assert high <= 1.0


@given(systems, counts, counts, st.sampled_from(["ttft", "e2e"]), limits)
def test_attainment_grows_with_replicas(system: int, one: float, other: float, metric: str, limit: float) -> None:
    """Rule: the same load over more replicas; equally, a lower load on the same ones.

    The step that serves a request is a gamma law with matched cumulants: two of them may cross by the error of the law.
    """
    few, many = attainment(Sample.fleets(system, sorted([one, other])), metric, limit)
    assert few <= many + 0.02


@given(systems, counts, metrics, st.floats(0.01, 0.999))
@settings(max_examples=50)
def test_quantile_is_the_inverse_of_attainment(system: int, replicas: float, metric: str, p: float) -> None:
    """Rule: the smallest limit with attainment >= p, to the 0.1 % of its bisection, or where the search begins."""
    fleet = Sample.fleets(system, replicas)
    at = float(quantile(fleet, metric, p)[0])
    assert met(fleet, metric, at)[0] >= p
    assert met(fleet, metric, at / 1.0011)[0] <= p or at < 1.002 * LEAST_LIMIT_S


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("metric", ["ttft", "tpot", "e2e"])
def test_many_percentiles_at_once_are_those_one_by_one(metric: str, count: int) -> None:
    """Rule: the fast reading of five percentiles against bisection, few fleets and many."""
    fleet = Sample.fleets(2, np.linspace(1.3, 4.0, count))
    ps = (0.5, 0.9, 0.95, 0.99, 0.999)
    expected = np.stack([quantile(fleet, metric, p) for p in ps], axis=1)
    np.testing.assert_allclose(quantiles(fleet, metric, ps), expected, rtol=0.05)


@pytest.mark.parametrize("k", [0.3, 1.0, 1.7])
def test_a_load_is_the_same_fleet_under_scaled_rates(k: float) -> None:
    """Rule: `load` k is the windows' rates times k, burstiness kept; hand: utilisation grows by k."""
    rates, count = np.array([2.0, 9.0, 4.0]), np.array([0.6, 1.0, 3.0, 8.0])
    loaded = fleets(Sample.systems, windows_of(rates, 60.0), np.arange(4), count, load=k)
    scaled = fleets(Sample.systems, windows_of(k * rates, 60.0), np.arange(4), count)
    np.testing.assert_allclose(loaded.utilisation, scaled.utilisation, rtol=1e-12)
    np.testing.assert_allclose(loaded.utilisation, k * 5.0 / (count * Sample.systems.capacity_rps), rtol=1e-12)
    for metric, limit in (("ttft", 0.7), ("tpot", 0.02), ("e2e", 5.0)):
        expected = attainment(scaled, metric, limit)
        np.testing.assert_allclose(attainment(loaded, metric, limit), expected, rtol=1e-9, atol=1e-12)


def test_a_heavier_load_is_not_fewer_replicas_where_arrivals_are_bursty() -> None:
    """Rule: k streams keep their dispersion, while R / k replicas would each see a larger part of one stream."""
    bursty = workload_from_parameters(4.0, n_in=FixedLength(100.0), n_out=FixedLength(200.0), gap_cv=2.0)
    systems = solve_systems(Sample.curves, np.zeros(1, np.intp), np.array([128]), bursty, [4.0])
    windows = rate_windows(bursty, 1.0)
    loaded = fleets(systems, windows, np.zeros(1, np.intp), [4.0], load=2.0)
    fewer = fleets(systems, windows, np.zeros(1, np.intp), [2.0])
    np.testing.assert_allclose(loaded.utilisation, fewer.utilisation, rtol=1e-12)
    assert loaded.dispersion[0, 0] < fewer.dispersion[0, 0]


def test_fleets_together_are_the_fleets_alone() -> None:
    """Rule: vectorised = map of scalars."""
    count = np.array([0.5, 1.0, 2.0, 7.0])
    together = fleets(Sample.systems, Sample.windows, np.arange(4), count)
    for metric, limit in (("ttft", 0.7), ("tpot", 0.02), ("e2e", 5.0)):
        alone = [float(attainment(Sample.fleets(i, count[i]), metric, limit)[0]) for i in range(4)]
        np.testing.assert_allclose(attainment(together, metric, limit), alone, rtol=1e-12)


@pytest.mark.parametrize("k", [1e-3, 7.0])
def test_time_scales_out(k: float) -> None:
    """Homogeneity: every second k times as long, loads the same, leaves shares as they are and scales quantiles."""
    rates, count = np.array([2.0, 9.0, 4.0]), np.array([0.4, 1.0, 3.0, 8.0])
    slow = slowed_systems(Sample.systems, np.arange(4), np.full(4, k))
    normal = fleets(Sample.systems, windows_of(rates, 60.0), np.arange(4), count)
    scaled = fleets(slow, windows_of(rates / k, 60.0 * k), np.arange(4), count)
    for metric, limit in (("ttft", 0.7), ("tpot", 0.02), ("e2e", 5.0)):
        expected = attainment(normal, metric, limit)  # 1 less a tail, hence the absolute tolerance
        np.testing.assert_allclose(attainment(scaled, metric, k * limit), expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(quantile(scaled, "ttft", 0.9), k * quantile(normal, "ttft", 0.9), rtol=2.1e-3)


@pytest.mark.parametrize("k", [0.01, 30.0])
def test_time_scales_out_of_the_queue(k: float) -> None:
    """Homogeneity: solving an engine whose steps are k times as long is slowing the solved one."""
    caps = np.array([4, 16, 64, 128])
    recorded = Sample.workload.arrivals
    slow_workload = replace(
        Sample.workload,
        arrivals=replace(
            recorded,
            rate_rps=recorded.rate_rps / k,
            idc=tuple((window * k, idc) for window, idc in recorded.idc),
            short_idc=tuple((window * k, idc) for window, idc in recorded.short_idc),
        ),
    )
    slow = engine(
        k * (0.008 + 1.7e-4 * Sample.batch),
        prefill_s=k * np.array([0.02, 0.05, 0.1, 0.5]),
        first_token_s=0.01 * k,
        out=200.0,
    )
    solved_slow = solved(slow, caps, slow_workload)
    made = slowed_systems(Sample.systems, np.arange(4), np.full(4, k))
    np.testing.assert_allclose(solved_slow.capacity_rps, made.capacity_rps, rtol=1e-12)
    np.testing.assert_allclose(solved_slow.p_wait, made.p_wait, rtol=1e-9)
    np.testing.assert_allclose(solved_slow.decay_rps, made.decay_rps, rtol=1e-9)
    np.testing.assert_allclose(solved_slow.tpot_s, made.tpot_s, rtol=1e-12)
    np.testing.assert_allclose(solved_slow.running, made.running, rtol=1e-9)


# ---- windows and nodes ---------------------------------------------------------------------------------


def test_rate_windows_last_five_stays() -> None:
    """Rule: the shortest window of at least five mean stays, else the longest; a stationary load has one rate."""
    rates = {1.0: np.arange(1.0, 41.0), 10.0: np.arange(1.0, 5.0), 60.0: np.array([2.5])}
    statistics = ArrivalStatistics(
        rate_rps=20.5,
        gap_cv=1.0,
        idc=((1.0, 1.0),),
        peak_to_mean=(),
        lag1_gap_correlation=0.0,
        zero_gap_share=0.0,
        span_s=40.0,
        requests=820,
    )
    one = np.array([1.0])
    workload = Workload(name="hand", arrivals=statistics, n_in=one, n_out=one, windows=tuple(rates.items()))
    assert [rate_windows(workload, stay).window_s for stay in (0.2, 0.21, 2.0, 12.0, 99.0)] == [1.0, 10.0, 10.0, 60, 60]
    grouped = rate_windows(workload, 0.1)
    assert len(grouped.rate_rps) == 8
    np.testing.assert_allclose(grouped.share.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(grouped.rate_rps @ np.diff(np.append(grouped.starts, 40)), 820.0, rtol=1e-12)
    np.testing.assert_allclose(rate_windows(poisson(3.0), 1.0).rate_rps, 3.0, rtol=1e-12)


def test_length_nodes_keep_the_mean() -> None:
    """Hand: 1000 lengths 1..1000; the first node is the mean of 1..100, the last of 996..1000; the mean stays 500.5."""
    found = length_nodes(np.arange(1000.0, 0.0, -1.0))
    np.testing.assert_allclose(found.tokens[[0, -1]], [50.5, 998.0], rtol=1e-12)
    np.testing.assert_allclose(found.tokens @ found.share, 500.5, rtol=1e-12)
    assert np.all(np.diff(found.tokens) > 0.0)
    single = length_nodes([7.0])
    assert (single.tokens.tolist(), single.share.tolist()) == ([7.0], [1.0])


def test_load_grid_is_stable() -> None:
    """Rule: every queue of the grid has a steady state."""
    assert np.all(np.diff(LOAD_GRID) > 0.0)
    assert LOAD_GRID[0] > 0.0
    assert LOAD_GRID[-1] < 1.0

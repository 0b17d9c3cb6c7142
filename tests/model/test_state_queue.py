"""The state-dependent queue against inferno's published numbers, M/M/c, brute force, and exact laws of bursty arrivals.

"Reference" is the project's queueing reference page; its sections 6.4 to 6.7 come from the authors' files and code.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferno_reference import Inferno, largest_rates, max_rate, solve
from numpy.typing import NDArray

from servecast.model.queueing import erlang_b, erlang_c, mmc_wait_mean, mmc_wait_quantile, mmc_wait_tail
from servecast.model.state_queue import (
    StateQueue,
    burst_factor,
    interpolate_idc,
    occupancy_mean,
    occupancy_quantile,
    relaxation_time,
    state_queue,
    wait_quantile,
    wait_tail,
)

Array = NDArray[np.float64]

# inferno

# reference 6.4, the authors' golden file, single precision: B, alpha, beta, gamma, n, m, nc, T_iter, prefill, itl, tau
PRIMITIVES = [
    (1, 8, 0.033, 0.000333, 256, 1024, 1, 8.296954, 16.533249, 8.288911, 8504.378),
    (40, 8, 0.033, 0.000333, 256, 1024, 1, 19.878149, 28.114445, 19.870108, 20375.104),
    (80, 8, 0.033, 0.000333, 256, 1024, 1, 31.756298, 39.99259, 31.748257, 32550.205),
    (128, 16, 0.067, 0.000667, 256, 1024, 1, 92.278305, 109.005135, 92.26197, 94585.266),
    (200, 4, 0.017, 0.000167, 64, 128, 1, 13.335666, 14.387675, 13.327447, 1720.3009),
    (50, 8, 0.033, 0.000333, 1024, 256, 1, 35.3987, 68.98372, 35.26751, 9097.466),
    (128, 8, 0.033, 0.000333, 4096, 64, 7, 423.95038, 3085.5293, 422.10855, 30100.477),
    (200, 8, 0.033, 0.000333, 4096, 64, 39, 498.38052, 19503.664, 497.3364, 51333.195),
]
# reference 6.5: alpha, beta, gamma, n, m, TTFT, ITL, cap of 98 % of the peak; f at caps 8, 17, 40, 64, 256; peak
SCENARIOS = [
    (8, 0.033, 0.000333, 256, 1024, 60, 20, 66, 0.30816, 0.75616, 1.47214, 1.86801, 1.92298, 1.92322),
    (8, 0.033, 0.000333, 256, 4096, 400, 15, 17, 0.06516, 0.12607, 0.12572, 0.12572, 0.12572, 0.12607),
    (8, 0.033, 0.000333, 1024, 256, 80, 60, 56, 1.23118, 2.50079, 4.02128, 4.50443, 4.52298, 4.52298),
    (4, 0.017, 0.000167, 64, 128, 2000, 200, 238, 12.47512, 24.78977, 49.04697, 66.90288, 121.4636, 121.4636),
    (4, 0.017, 0.000167, 256, 1024, 60, 20, 154, 0.72075, 1.65789, 3.10366, 3.89978, 5.17266, 5.17301),
    (16, 0.067, 0.000667, 256, 1024, 60, 20, 16, 0.11220, 0.27974, 0.27972, 0.27972, 0.27972, 0.27974),
]
QUEUE_OF = {128: 4}  # the scenario with 128 output tokens has 4 places, the others 128


@pytest.mark.parametrize("row", PRIMITIVES)
def test_inferno_primitives(row: tuple[float, ...]) -> None:
    batch, alpha, beta, gamma, n, m, chunks, *expected = row
    model = Inferno(alpha, beta, gamma, int(n), int(m))
    k = model.chunks(int(batch))
    assert k == chunks
    ours = [
        model.iteration_ms(int(batch)),
        model.prefill_ms(batch, k),
        model.itl_ms(batch, k),
        model.tau_ms(int(batch)),
    ]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("row", SCENARIOS)
def test_inferno_scenarios(row: tuple[float, ...]) -> None:
    alpha, beta, gamma, n, m, ttft, itl, near_peak, *expected = row
    model, caps = Inferno(alpha, beta, gamma, int(n), int(m)), np.arange(1, 257)
    room = QUEUE_OF.get(int(m), 128)
    rates = largest_rates(model, caps, room, ttft_ms=ttft, itl_ms=itl)
    # f is what gets through at that rate; with 4 places an eighth is refused
    through = solve(model, rates, caps, room).queue.throughput_rps * 1000.0
    printed = [*through[[7, 16, 39, 63, 255]], through.max()]
    np.testing.assert_allclose(printed, expected, rtol=2e-6, atol=5e-6)  # their bisection stops at 1e-6; 5 decimals
    assert caps[through >= 0.98 * through.max()][0] == near_peak


def test_inferno_solve_example() -> None:
    """Reference 6.6, first row: alpha 12, beta 0.05, gamma 0.0005, n 128, m 512, queue 128, rate 3/s, cap 48."""
    model, cap = Inferno(12, 0.05, 0.0005, 128, 512), np.array([48])
    found = solve(model, np.array([3.0]), cap, 128)
    queue = found.queue
    ours = [queue.throughput_rps * 1000.0, queue.mean_number / queue.throughput_rps, queue.wait_mean_s]
    ours += [queue.mean_in_service, found.prefill_ms, found.ttft_ms, found.itl_ms, np.array([max_rate(model, 48)])]
    expected = [3.0, 10348.367, 21.40539, 30.98089, 26.09048, 67.61476, 20.11889, 3.86093]
    np.testing.assert_allclose(np.concatenate(ours), expected, rtol=4e-7)
    by_ttft = largest_rates(model, cap, 128, ttft_ms=60, itl_ms=1e9)
    by_itl = largest_rates(model, cap, 128, ttft_ms=1e9, itl_ms=20)
    np.testing.assert_allclose([by_ttft[0], by_itl[0]], [2.949464, 2.971979], rtol=3e-7)
    best = largest_rates(model, np.array([49]), 128, ttft_ms=60, itl_ms=20)
    np.testing.assert_allclose(best, 2.9715836, rtol=2e-6)  # their bisection stops at 1e-6


def test_inferno_demo_without_a_queue() -> None:
    """Reference 6.6, demo constants: room 0, so blocking instead of waiting."""
    model, cap = Inferno(6.71134, 0.02417, 4.538e-5, 4096, 1024), np.array([256])
    found = solve(model, np.array([2.16]), cap, 0)
    np.testing.assert_allclose(max_rate(model, 256), 2.7373, rtol=2e-5)
    ours = [found.queue.mean_in_service[0], found.ttft_ms[0], found.itl_ms[0]]
    np.testing.assert_allclose(ours, [57.7961, 150.64, 26.0086], rtol=1e-6)
    assert found.queue.wait_mean_s == 0.0
    by_ttft = largest_rates(model, cap, 0, ttft_ms=140, itl_ms=1e9)
    by_itl = largest_rates(model, cap, 0, ttft_ms=1e9, itl_ms=16.5)
    np.testing.assert_allclose([by_ttft[0], by_itl[0]], [1.955800, 1.702910], rtol=4e-7)


def test_tail_of_the_finite_room() -> None:
    """Reference 6.7: baseline, cap 69, queue 128; tail checked there by simulation to 1 %."""
    found = solve(Inferno(8, 0.033, 0.000333, 256, 1024), np.array([1.9232237]), np.array([69]), 128)
    ours = [found.queue.mean_in_service[0], found.queue.wait_mean_s[0], found.ttft_ms[0], found.itl_ms[0]]
    np.testing.assert_allclose(ours, [39.441347, 11.2462, 59.1947, 20.0], rtol=2e-6)
    t_ms = np.array([0, 10, 50, 100, 500, 1000, 2000])
    expected = [0.004944092, 0.004922404, 0.0048366, 0.004731446, 0.003968473, 0.003185373, 0.002052268]
    np.testing.assert_allclose(wait_tail(found.queue, t_ms), expected, rtol=1e-6)
    assert float(wait_quantile(found.queue, 0.99)[0]) == 0.0
    np.testing.assert_allclose(wait_quantile(found.queue, 1.0 - 0.002052268), 2000.0, rtol=1e-6)


# M/M/c, limits, brute force


@pytest.mark.parametrize(("c", "a"), [(1, 0.8), (2, 1.2), (4, 3.2), (16, 14.4), (50, 45.0)])
def test_mmc_is_a_special_case(c: int, a: float) -> None:
    queue = state_queue(a / 2.0, np.arange(1, c + 1) / 2.0)  # S = 2
    np.testing.assert_allclose(queue.p_wait, erlang_c(c, a), rtol=1e-12)
    np.testing.assert_allclose(queue.wait_mean_s, mmc_wait_mean(a / 2.0, 2.0, c), rtol=1e-12)
    np.testing.assert_allclose(wait_tail(queue, [0.0, 1.0, 9.0]), mmc_wait_tail([0, 1, 9], a / 2.0, 2.0, c), rtol=1e-12)
    np.testing.assert_allclose(wait_quantile(queue, 0.99), mmc_wait_quantile(0.99, a / 2.0, 2.0, c), rtol=1e-12)
    np.testing.assert_allclose(queue.service_mean_s, 2.0, rtol=1e-12)
    lossy = state_queue(a / 2.0, np.arange(1, c + 1) / 2.0, room=0)
    np.testing.assert_allclose(lossy.blocking, erlang_b(c, a), rtol=1e-12)


def test_large_batches() -> None:
    queue = state_queue(np.array([1000.0, 4000.0, 4090.0]), np.arange(1, 4097.0))
    np.testing.assert_allclose(queue.p_wait, erlang_c(4096, queue.arrival_rate_rps), rtol=1e-10)
    np.testing.assert_allclose(queue.mean_in_service, queue.arrival_rate_rps, rtol=1e-11)


def test_a_very_large_room_is_the_infinite_one() -> None:
    mu = np.arange(1, 9) / (1.0 + 0.1 * np.arange(1, 9))
    endless, large = state_queue(4.0, mu), state_queue(4.0, mu, room=3000)
    for field in ("p_wait", "wait_mean_s", "mean_number", "mean_in_service", "throughput_rps"):
        np.testing.assert_allclose(getattr(large, field), getattr(endless, field), rtol=1e-11)
    np.testing.assert_allclose(wait_tail(large, [0.5, 5.0]), wait_tail(endless, [0.5, 5.0]), rtol=1e-9)
    np.testing.assert_allclose(wait_quantile(large, 0.999), wait_quantile(endless, 0.999), rtol=1e-9)


def brute_force(rate: float, mu: Array, room: int) -> dict[str, float]:
    """Means of the finite chain by solving its balance equations as a linear system."""
    size = len(mu) + room + 1
    generator = np.zeros((size, size))
    for j in range(size - 1):
        generator[j, j + 1] = rate
        generator[j + 1, j] = mu[min(j + 1, len(mu)) - 1]
    generator -= np.diag(generator.sum(axis=1))
    p = np.linalg.lstsq(np.vstack([generator.T, np.ones(size)]), np.r_[np.zeros(size), 1.0], rcond=None)[0]
    states, cap = np.arange(size), len(mu)
    throughput = rate * (1.0 - p[-1])
    number = float(p @ states)
    in_service = float(p @ np.minimum(states, cap))
    return {
        "mean_number": number,
        "mean_in_service": in_service,
        "blocking": float(p[-1]),
        "throughput_rps": throughput,
        "p_wait": float(p[cap:-1].sum() / (1.0 - p[-1])),
        "wait_mean_s": (number - in_service) / throughput,
    }


@pytest.mark.parametrize("rate", [0.3, 2.0, 4.0, 4.04, 30.0])
@pytest.mark.parametrize("room", [0, 1, 2, 25])
def test_brute_force(rate: float, room: int) -> None:
    mu = np.array([1.0, 1.8, 2.5, 3.1, 3.6, 4.0])  # at rate 4 the geometric ratio is exactly 1
    queue = state_queue(rate, mu, room=room)
    for field, value in brute_force(rate, mu, room).items():
        np.testing.assert_allclose(getattr(queue, field), value, rtol=1e-8, atol=1e-11, err_msg=field)


def test_unstable_and_idle() -> None:
    queue = state_queue(np.array([5.0, 4.0, 0.0]), [1.0, 2.0, 4.0])
    np.testing.assert_array_equal(queue.p_wait, [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(queue.wait_mean_s, [np.inf, np.inf, 0.0])
    np.testing.assert_array_equal(queue.mean_number, [np.inf, np.inf, 0.0])
    np.testing.assert_array_equal(queue.throughput_rps, [4.0, 4.0, 0.0])
    np.testing.assert_array_equal(queue.utilisation, [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(queue.service_mean_s, [0.75, 0.75, 1.0])
    np.testing.assert_array_equal(wait_tail(queue, 9.0), [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(wait_quantile(queue, 0.5), [np.inf, np.inf, 0.0])
    np.testing.assert_array_equal(occupancy_quantile(queue, 0.5), [3, 3, 0])
    np.testing.assert_array_equal(occupancy_quantile(queue, 0.5, seen_by="request"), [3, 3, 1])
    np.testing.assert_array_equal(occupancy_mean(queue, seen_by="request"), [3.0, 3.0, 1.0])


def test_overloaded_finite_room_is_full() -> None:
    """Hand: at rate -> infinity every accepted request finds q - 1 waiting and lets q departures pass."""
    queue = state_queue(1e9, [1.0, 4.0], room=8)
    np.testing.assert_allclose(queue.wait_mean_s, 2.0, rtol=1e-6)
    np.testing.assert_allclose(queue.throughput_rps, 4.0, rtol=1e-6)
    t = wait_quantile(queue, [0.01, 0.5, 0.999])
    np.testing.assert_allclose(wait_tail(queue, t), [0.99, 0.5, 0.001], rtol=1e-9)


def test_occupancy() -> None:
    """Hand: M/M/2 without waiting at a = 1 has P = 2/5, 2/5, 1/5; seen by a request 0, 1/2, 1/2."""
    queue = state_queue(1.0, [1.0, 2.0], room=0)
    np.testing.assert_allclose(queue.occupancy, [0.4, 0.4, 0.2], rtol=1e-14)
    np.testing.assert_array_equal(occupancy_quantile(queue, [0.3, 0.5, 0.81]), [0, 1, 2])
    np.testing.assert_array_equal(occupancy_quantile(queue, [0.3, 0.51, 0.81], seen_by="request"), [1, 2, 2])
    np.testing.assert_allclose(occupancy_mean(queue), 0.8, rtol=1e-14)
    np.testing.assert_allclose(occupancy_mean(queue, seen_by="request"), 1.5, rtol=1e-14)


# invariants


def concave(cap: int, share: float) -> Array:
    batch = np.arange(1.0, cap + 1)
    return np.asarray(batch / (1.0 + share * (batch - 1.0)))


SYSTEMS = {
    "load": st.floats(1e-3, 0.98),
    "cap": st.integers(1, 60),
    "share": st.floats(0.0, 1.0),
    "room": st.one_of(st.just(np.inf), st.integers(0, 40)),
    "burst": st.one_of(st.just(1.0), st.floats(0.6, 4.0)),
}


@given(**SYSTEMS)
def test_probabilities_and_little(load: float, cap: int, share: float, room: float, burst: float) -> None:
    mu = concave(cap, share)
    queue = state_queue(load * mu[-1], mu, room=room, burst=burst)
    np.testing.assert_allclose(queue.occupancy.sum(axis=-1), 1.0, rtol=1e-13)
    number = queue.throughput_rps * (queue.wait_mean_s + queue.service_mean_s)
    np.testing.assert_allclose(queue.mean_number, number, rtol=1e-12)
    if burst == 1.0:
        flow = queue.occupancy[1:] @ mu  # what enters is what leaves
        np.testing.assert_allclose(flow, queue.throughput_rps, rtol=1e-10)
    np.testing.assert_allclose(wait_tail(queue, 0.0), queue.p_wait, rtol=1e-11, atol=1e-300)


@given(p=st.floats(0.5, 0.9999), **SYSTEMS)
def test_wait_quantile_inverts_the_tail(
    p: float, load: float, cap: int, share: float, room: float, burst: float
) -> None:
    mu = concave(cap, share)
    queue = state_queue(load * mu[-1], mu, room=room, burst=burst)
    t = wait_quantile(queue, p)
    if queue.p_wait > (1.0 - p) * (1.0 + 1e-9):
        np.testing.assert_allclose(wait_tail(queue, t), 1.0 - p, rtol=1e-8)
    else:
        np.testing.assert_allclose(t, 0.0, atol=1e-6)


@given(**SYSTEMS)
def test_monotone_in_the_rate(load: float, cap: int, share: float, room: float, burst: float) -> None:
    mu = concave(cap, share)
    less, more = (state_queue(x * load * mu[-1], mu, room=room, burst=burst) for x in (1.0, 1.02))
    for field in ("p_wait", "wait_mean_s", "mean_number", "throughput_rps", "blocking", "mean_in_service"):
        assert getattr(more, field) >= getattr(less, field) * (1.0 - 1e-10) - 1e-13, field
    assert occupancy_quantile(more, 0.9) >= occupancy_quantile(less, 0.9)


@given(k=st.floats(1e-3, 1e3), **SYSTEMS)
def test_second_scales(k: float, load: float, cap: int, share: float, room: float, burst: float) -> None:
    mu = concave(cap, share)
    base = state_queue(load * mu[-1], mu, room=room, burst=burst)
    slow = state_queue(load * mu[-1] / k, mu / k, room=room, burst=burst)
    for field, power in (("p_wait", 0), ("mean_number", 0), ("wait_mean_s", 1), ("service_mean_s", 1)):
        np.testing.assert_allclose(getattr(slow, field), k**power * getattr(base, field), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(wait_tail(slow, 3.0 * k), wait_tail(base, 3.0), rtol=1e-8, atol=1e-300)


def test_vector_is_the_map_of_scalars() -> None:
    """Caps, rooms, loads and bursts mixed, one shared row of rates."""
    mu = concave(40, 0.1)
    caps, rooms = np.array([1, 7, 40, 40]), np.array([np.inf, 5, 0, np.inf])
    rates, bursts = np.array([[0.1], [0.9], [8.0]]), np.array([1.0, 2.0, 1.0, 0.7])
    many = state_queue(rates, mu, caps=caps, room=rooms, burst=bursts)
    times, quantiles, batches = wait_tail(many, 2.0), wait_quantile(many, 0.9), occupancy_quantile(many, 0.9)
    assert many.occupancy.shape == (3, 4, 41)
    for i, j in np.ndindex(3, 4):
        one = state_queue(rates[i, 0], mu[: caps[j]], room=rooms[j], burst=bursts[j])
        np.testing.assert_allclose(many.occupancy[i, j, : caps[j] + 1], one.occupancy, rtol=1e-11)
        assert not many.occupancy[i, j, caps[j] + 1 :].any()
        for field in ("p_wait", "wait_mean_s", "mean_number", "blocking", "utilisation", "service_mean_s"):
            np.testing.assert_allclose(getattr(many, field)[i, j], getattr(one, field), rtol=1e-11)
        np.testing.assert_allclose(times[i, j], wait_tail(one, 2.0), rtol=1e-11)
        np.testing.assert_allclose(quantiles[i, j], wait_quantile(one, 0.9), rtol=1e-9)
        assert batches[i, j] == occupancy_quantile(one, 0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: state_queue(1.0, 2.0), "service_rate_rps must have a last axis"),
        (lambda: state_queue(1.0, [1.0, 0.0]), "service_rate_rps must be > 0, got 0"),
        (lambda: state_queue(float("nan"), [1.0]), "arrival_rate_rps must be >= 0, got nan"),
        (lambda: state_queue(1.0, [1.0], caps=2), "caps must be <= 1"),
        (lambda: state_queue(1.0, [1.0], room=0.5), "room must be whole or inf, got 0.5"),
        (lambda: state_queue(1.0, [1.0], burst=0.0), "burst must be > 0, got 0"),
        (lambda: occupancy_mean(state_queue(0.1, [1.0]), seen_by="us"), "seen_by must be time or request, got 'us'"),
        (lambda: interpolate_idc([], 1.0), "idc must have at least one"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# arrivals that are not Poisson


def renewal(ca2: float) -> tuple[Array, Array]:
    """Phase generator (D0, D1) of unit-rate renewal arrivals: Erlang below 1, balanced hyperexponential above."""
    if ca2 < 1.0:
        k = round(1.0 / ca2)
        d1 = np.zeros((k, k))
        d1[-1, 0] = k
        return k * (np.eye(k, k=1) - np.eye(k)), d1
    p = (1.0 + np.sqrt((ca2 - 1.0) / (ca2 + 1.0))) / 2.0
    rates = np.array([2.0 * p, 2.0 * (1.0 - p)])
    return -np.diag(rates), np.outer(rates, [p, 1.0 - p])


def exact_idc(d0: Array, d1: Array, gaps: float) -> float:
    """IDC over a window of so many mean gaps: 1 + 2/w int (w - u)(m(u) - 1) du, m the density of arrivals after one."""
    start = d1.sum(axis=0) / d1.sum()  # phase after an arrival: exact where one phase or all rows restart alike
    values, vectors = np.linalg.eig(d0 + d1)
    weights = (start @ vectors) * np.linalg.solve(vectors, d1.sum(axis=1).astype(complex))
    moving = np.abs(values) > 1e-9
    e, c = values[moving], weights[moving]
    return float(np.real(1.0 + 2.0 / gaps * np.sum(c * (np.exp(e * gaps) - 1.0 - e * gaps) / e**2)))


def exact_law(rate: float, mu: Array, d0: Array, d1: Array, room: int) -> tuple[Array, Array]:
    """Number in system over time and as arrivals see it, by linear level reduction of the phase-and-level chain."""
    d0, d1, levels = d0 * rate, d1 * rate, len(mu) + room
    leave = np.concatenate((mu, np.full(room, mu[-1])))
    identity = np.eye(len(d0))
    up: list[Array] = [-d1 @ np.linalg.inv(d0 + d1 - leave[-1] * identity)]  # pi_{j+1} = pi_j R_{j+1}, from the top
    for j in range(levels - 2, -1, -1):
        up.append(-d1 @ np.linalg.inv(d0 - leave[j] * identity + up[-1] * leave[j + 1]))
    values, vectors = np.linalg.eig((d0 + up[-1] * leave[0]).T)
    bottom = np.real(vectors[:, np.argmin(np.abs(values))])
    law = [bottom / bottom.sum()]
    for step in reversed(up):
        law.append(law[-1] @ step)
    phases = np.array(law) / np.sum(law)
    seen = phases @ d1.sum(axis=1)
    return phases.sum(axis=1), seen / seen.sum()


def burst_queue(rate: float, mu: Array, d0: Array, d1: Array) -> StateQueue:
    markov = state_queue(rate, mu)
    window = relaxation_time(rate, markov.capacity_rps, markov.service_mean_s)
    return state_queue(rate, mu, burst=burst_factor(exact_idc(d0, d1, float(window) * rate), 1.0))


def test_exact_law_is_ours_for_poisson() -> None:
    mu = concave(32, 0.05)
    over_time, seen = exact_law(0.8 * mu[-1], mu, *renewal(1.0), room=400)
    queue = state_queue(0.8 * mu[-1], mu)
    np.testing.assert_allclose(over_time[:32], queue.occupancy[:32], rtol=1e-9)
    np.testing.assert_allclose(seen[32:].sum(), queue.p_wait, rtol=1e-9)


BATCHES = [np.arange(1.0, 2), np.arange(1.0, 5), np.arange(1.0, 33), concave(64, 0.05 / 1.05), concave(256, 0.2 / 8.2)]
BANDS = {  # module docstring of state_queue: mean wait, P(wait), mean occupancy where Bmax >= 32
    0.5: ((-0.4, 0.575), (-0.28, 0.415), (0.005, 0.045)),
    0.7: ((-0.125, 0.255), (-0.075, 0.22), (-0.01, 0.03)),
    0.9: ((-0.02, 0.065), (-0.04, 0.055), (-0.0045, 0.0125)),
}


@pytest.mark.parametrize("rho", sorted(BANDS))
def test_burst_bands(rho: float) -> None:
    in_wait, in_p, in_occupancy = BANDS[rho]
    for mu, ca2 in itertools.product(BATCHES, [0.25, 2.0, 4.0]):
        rate, cap, (d0, d1) = rho * mu[-1], len(mu), renewal(ca2)
        over_time, seen = exact_law(rate, mu, d0, d1, room=800 if rho > 0.8 else 200)
        p_wait = seen[cap:].sum()
        if p_wait < 1e-3:
            continue  # out of the stated range
        queue = burst_queue(rate, mu, d0, d1)
        wait = seen[cap:] @ np.arange(1, len(seen) - cap + 1) / mu[-1]
        assert in_wait[0] <= float(queue.wait_mean_s) / wait - 1.0 <= in_wait[1], (cap, ca2)
        assert in_p[0] <= float(queue.p_wait) / p_wait - 1.0 <= in_p[1], (cap, ca2)
        if cap >= 32:
            batch = np.minimum(np.arange(len(seen)), cap)
            error = float(queue.mean_in_service) / (over_time @ batch) - 1.0
            assert in_occupancy[0] <= error <= in_occupancy[1], (cap, ca2)
            exact = batch[np.searchsorted(np.cumsum(over_time), 0.99)]
            assert abs(int(occupancy_quantile(queue, 0.99)) - exact) <= 1, (cap, ca2)


@pytest.mark.parametrize("ca2", [0.25, 4.0])
@pytest.mark.parametrize("rho", [0.9, 1.1])
def test_burst_bands_of_the_finite_room(ca2: float, rho: float) -> None:
    d0, d1 = renewal(ca2)
    for mu, room in itertools.product(BATCHES[1:4], [4, 32, 128]):
        rate, cap = rho * mu[-1], len(mu)
        _, seen = exact_law(rate, mu, d0, d1, room)
        service = state_queue(rate, mu, room=room).service_mean_s
        window = relaxation_time(min(rho, 0.95) * mu[-1], mu[-1], service)  # finite under overload too
        factor = burst_factor(exact_idc(d0, d1, float(window) * rate), 1.0)
        queue = state_queue(rate, mu, room=room, burst=factor)
        wait = seen[cap:-1] @ np.arange(1, room + 1) / mu[-1] / (1.0 - seen[-1])
        assert queue.utilisation <= 1.0
        if seen[-1] >= 1e-4:
            assert -0.01 <= float(queue.blocking) / seen[-1] - 1.0 <= 0.165, (cap, room)
        if wait > 0.0 and seen[cap:-1].sum() >= 1e-3:
            assert (-0.085 if room >= 32 else -0.305) <= float(queue.wait_mean_s) / wait - 1.0 <= 0.085, (cap, room)


def test_bursts_need_more_than_a_longer_wait() -> None:
    """Why the whole law is raised to 1 / f: at Bmax 256 and rho 0.9, ca2 = 4 multiplies P(wait) by 112."""
    mu, (d0, d1) = BATCHES[-1], renewal(4.0)
    _, seen = exact_law(0.9 * mu[-1], mu, d0, d1, room=800)
    p_wait = seen[256:].sum()
    assert p_wait / float(state_queue(0.9 * mu[-1], mu).p_wait) > 100.0
    np.testing.assert_allclose(burst_queue(0.9 * mu[-1], mu, d0, d1).p_wait, p_wait, rtol=0.02)


def test_burst_heavy_traffic_stretches_the_wait_by_f() -> None:
    queue = state_queue(0.999 * 4.0, np.arange(1, 5.0), burst=2.5)
    np.testing.assert_allclose(queue.wait_decay_rps, 0.004 / 2.5, rtol=1e-3)
    np.testing.assert_allclose(queue.wait_mean_s, queue.p_wait / queue.wait_decay_rps, rtol=1e-10)


@pytest.mark.parametrize("ca2", [0.25, 4.0])
def test_exact_law_against_simulation(ca2: float) -> None:
    """Monte Carlo with renewal gaps, customer by customer: P(wait) within 4 standard errors of batch means."""
    rng, mu, rho, customers = np.random.default_rng(7), concave(32, 0.05), 0.8, 400_000
    rate = rho * mu[-1]
    _, seen = exact_law(rate, mu, *renewal(ca2), room=600)
    if ca2 < 1.0:
        gaps = rng.gamma(1.0 / ca2, ca2, customers)
    else:
        p = (1.0 + np.sqrt((ca2 - 1.0) / (ca2 + 1.0))) / 2.0
        gaps = rng.exponential(1.0, customers) / np.where(rng.random(customers) < p, 2.0 * p, 2.0 * (1.0 - p))
    found, number = np.empty(customers), 0
    for i, gap in enumerate(gaps / rate):
        found[i] = number
        number += 1
        left = gap
        while number > 0:
            left -= rng.exponential(1.0 / mu[min(number, 32) - 1])
            if left < 0.0:
                break
            number -= 1
    waits = (found[20_000:] >= 32).reshape(38, -1).mean(axis=1)
    assert abs(waits.mean() - seen[32:].sum()) < 4.0 * waits.std(ddof=1) / np.sqrt(38)


# windows


def test_relaxation_time() -> None:
    np.testing.assert_allclose(relaxation_time(0.9, 1.0, 1.0), 100.0, rtol=1e-12)  # S / (1 - rho)^2
    np.testing.assert_allclose(relaxation_time(5.0, 10.0, 30.0), 30.0, rtol=1e-15)
    assert relaxation_time(1.0, 1.0, 1.0) == np.inf


def test_interpolate_idc() -> None:
    pairs = [(10.0, 3.0), (1.0, 1.0), (100.0, 9.0)]  # any order
    ours = interpolate_idc(pairs, [0.0, 0.5, 1.0, np.sqrt(10.0), 10.0, 1000.0, np.inf])
    np.testing.assert_allclose(ours, [1.0, 1.0, 1.0, 2.0, 3.0, 9.0, 9.0], rtol=1e-12)
    np.testing.assert_array_equal(burst_factor([1.0, 4.0, 0.25], 1.0), [1.0, 2.5, 0.625])


@settings(max_examples=30)
@given(rate=st.floats(0.1, 0.9), k=st.floats(1e-3, 1e3))
def test_relaxation_time_scales_with_the_second(rate: float, k: float) -> None:
    np.testing.assert_allclose(relaxation_time(rate / k, 1.0 / k, k), k * relaxation_time(rate, 1.0, 1.0), rtol=1e-11)

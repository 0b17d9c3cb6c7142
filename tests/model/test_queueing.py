"""Closed-form queues. "Reference" is the project's queueing reference page: independent code and simulations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model import queueing as qu

ERLANG = [  # reference 6.1: independent code; servers, offered load, B, C
    (1, 0.8, 0.4444444444444445, 0.8),
    (2, 1.2, 0.2465753424657534, 0.45),
    (4, 3.2, 0.2281449299579469, 0.5964324717874046),
    (8, 6.4, 0.1443938898533949, 0.4576449254420160),
    (16, 14.4, 0.1264118939329959, 0.5913433938723898),
    (50, 45, 0.0541044721646262, 0.3638644672069880),
]
MD1_TIMES = np.array([0.5, 1.0, 2.0, 3.0, 5.0, 8.0])
MD1 = {  # reference 6.2: 120-digit arithmetic, D = 1; rho: theta, K, P(W > t) at MD1_TIMES
    0.3: (2.064568, 0.512983, [0.186716, 0.0550988, 0.00798719, 0.00104717, 1.68735e-05, 3.44392e-08]),
    0.5: (1.256431, 0.660999, [0.357987, 0.175639, 0.0530394, 0.0152513, 0.00123573, 2.85044e-05]),
    0.7: (0.675472, 0.798995, [0.57428, 0.395874, 0.206328, 0.105322, 0.027276, 0.00359514]),
    0.8: (0.430842, 0.866393, [0.701635, 0.554892, 0.36548, 0.2379, 0.100497, 0.0275941]),
    0.9: (0.207147, 0.933302, [0.843169, 0.75404, 0.6164, 0.501349, 0.331291, 0.17796]),
    0.95: (0.101724, 0.966663, [0.919599, 0.870715, 0.788526, 0.712431, 0.581278, 0.428399]),
}
MDC = [  # reference 6.3: Monte Carlo, 19 M customers, S = 1; servers, rho, E[W]
    (2, 0.6, 0.2928),
    (2, 0.8, 0.9047),
    (2, 0.9, 2.1425),
    (4, 0.6, 0.0984),
    (4, 0.8, 0.3862),
    (4, 0.9, 1.0001),
    (8, 0.8, 0.1518),
    (8, 0.9, 0.4494),
    (16, 0.8, 0.0524),
    (16, 0.9, 0.1926),
]


def test_erlang_table() -> None:
    servers, load, b, c = (np.array(column) for column in zip(*ERLANG, strict=True))
    np.testing.assert_allclose(qu.erlang_b(servers, load), b, rtol=1e-12)
    np.testing.assert_allclose(qu.erlang_c(servers, load), c, rtol=1e-12)


def test_erlang_b_equals_the_factorial_sum() -> None:
    for c, a in [(1, 0.01), (5, 3.0), (12, 30.0)]:
        slow = (a**c / math.factorial(c)) / sum(a**k / math.factorial(k) for k in range(c + 1))
        np.testing.assert_allclose(qu.erlang_b(c, a), slow, rtol=1e-13)


def test_mmc_limits() -> None:
    assert qu.erlang_b(3, 0.0) == 0.0
    assert qu.erlang_c(3, 0.0) == 0.0
    assert qu.erlang_c(3, 3.0) == 1.0  # no spare capacity: everybody waits
    assert qu.mmc_wait_mean(3.0, 1.0, 3) == np.inf
    assert qu.mmc_wait_tail(5.0, 4.0, 1.0, 3) == 1.0
    assert qu.mmc_wait_quantile(0.5, 4.0, 1.0, 3) == np.inf
    assert qu.mmc_wait_quantile(0.99, 0.0, 1.0, 3) == 0.0
    # hand: M/M/1 has C = rho and E[W] = rho S / (1 - rho)
    np.testing.assert_allclose(qu.mmc_wait_mean(0.8, 1.0, 1), 4.0, rtol=1e-14)
    np.testing.assert_allclose(qu.mmc_wait_tail(2.0, 0.8, 1.0, 1), 0.8 * math.exp(-0.4), rtol=1e-14)


def test_mmc_quantile_inverts_the_tail() -> None:
    t = qu.mmc_wait_quantile([0.5, 0.9, 0.999], 3.6, 1.0, 4)
    np.testing.assert_allclose(qu.mmc_wait_tail(t, 3.6, 1.0, 4), [0.5, 0.1, 0.001], rtol=1e-12)
    assert qu.mmc_wait_quantile(0.2, 1.2, 1.0, 2) == 0.0  # 0.45 wait, so the median and below do not


def test_mmc_little() -> None:
    """Mean number waiting from the state probabilities, slow and obvious, is lambda E[W]."""
    c, a = 4, 3.2
    weight = np.cumprod([1.0] + [a / min(j, c) for j in range(1, 600)])
    waiting = np.maximum(np.arange(600) - c, 0) @ weight / weight.sum()
    np.testing.assert_allclose(a * qu.mmc_wait_mean(a, 1.0, c), waiting, rtol=1e-12)


@pytest.mark.parametrize("rho", sorted(MD1))
def test_md1_table(rho: float) -> None:
    theta, constant, tail = MD1[rho]
    half_a_digit = 5.01e-7
    np.testing.assert_allclose(qu.md1_decay(rho), theta, rtol=0, atol=half_a_digit)
    single = qu.cramer_lundberg(rho, [1.0])
    np.testing.assert_allclose(single.decay, theta, rtol=0, atol=half_a_digit)
    np.testing.assert_allclose(single.constant, constant, rtol=0, atol=half_a_digit)
    ours = qu.md1_wait_tail(MD1_TIMES, rho, 1.0)
    np.testing.assert_allclose(ours[:3], tail[:3], rtol=1e-5)  # Crommelin
    np.testing.assert_allclose(ours[3:], tail[3:], rtol=6.5e-4)  # Cramer-Lundberg: 0.06 % at rho 0.3, less beyond
    if rho >= 0.8:
        np.testing.assert_allclose(ours[3:], tail[3:], rtol=4.5e-5)


def test_md1_tail_limits() -> None:
    np.testing.assert_allclose(qu.md1_wait_tail(0.0, [0.0, 0.3, 1.0, 2.0], 1.0), [0.0, 0.3, 1.0, 1.0], rtol=1e-15)
    decay = qu.md1_decay([0.0, 1e-9, 1.0 - 1e-6, 1.0, 3.0])
    assert decay[0] == np.inf
    np.testing.assert_allclose(1e-9 * np.expm1(decay[1]), decay[1], rtol=1e-12)  # satisfies its equation
    np.testing.assert_allclose(decay[2], 2e-6, rtol=1e-5)  # heavy traffic: 2 (1 - rho)
    assert decay[3] == decay[4] == 0.0
    assert np.all(qu.md1_wait_tail([0.5, 1.5, 2.5, 50.0], 1e-9, 1.0) >= 0.0)


def test_md1_tail_integrates_to_the_mean() -> None:
    t = np.linspace(0.0, 60.0, 600_001)
    for rho in (0.3, 0.6, 0.8):
        integral = np.trapezoid(qu.md1_wait_tail(t, rho, 1.0), t)
        np.testing.assert_allclose(integral, qu.mg1_wait_mean(rho, 1.0, 1.0), rtol=1e-3)


def test_mg1_special_cases() -> None:
    # hand: exponential service has moments 1, 2, 6 and is M/M/1 with E[W^2] = 2 rho / (1 - rho)^2
    np.testing.assert_allclose(qu.mg1_wait_mean(0.7, 1.0, 2.0), qu.mmc_wait_mean(0.7, 1.0, 1), rtol=1e-14)
    np.testing.assert_allclose(qu.mg1_wait_second_moment(0.7, 1.0, 2.0, 6.0), 1.4 / 0.09, rtol=1e-13)
    assert qu.mg1_wait_mean(1.0, 1.0, 2.0) == np.inf
    assert qu.mg1_wait_mean(1.5, 1.0, 2.0) == np.inf
    assert qu.mg1_wait_second_moment(1.5, 1.0, 2.0, 6.0) == np.inf
    assert qu.mg1_wait_mean(0.0, 1.0, 2.0) == 0.0


def test_cramer_lundberg_solves_its_equation_for_a_weighted_sample() -> None:
    s, w, rate = np.array([0.1, 1.0, 8.0]), np.array([5.0, 3.0, 1.0]), np.array([0.2, 0.5, 0.7])
    tail = qu.cramer_lundberg(rate, s, w)
    mgf = np.exp(tail.decay[:, None] * s) @ (w / w.sum())
    np.testing.assert_allclose(rate * (mgf - 1.0), tail.decay, rtol=1e-10)
    repeated = qu.cramer_lundberg(rate, np.repeat(s, [5, 3, 1]))
    np.testing.assert_allclose(repeated.constant, tail.constant, rtol=1e-12)
    unstable = qu.cramer_lundberg(2.0, s, w)
    assert unstable.decay == 0.0
    assert unstable.constant == 1.0


def test_cramer_lundberg_approaches_the_exact_exponential_law() -> None:
    """M/M/1 has P(W > t) = rho e^{-(mu - lambda) t}; a fine quantile grid of the exponential is nearly that service."""
    u = (np.arange(200_000) + 0.5) / 200_000
    tail = qu.cramer_lundberg(0.7, -np.log(u))
    np.testing.assert_allclose([tail.decay, tail.constant], [0.3, 0.7], rtol=3e-3)


@pytest.mark.parametrize(("servers", "rho", "mean"), MDC)
def test_mdc_means(servers: int, rho: float, mean: float) -> None:
    cosmetatos = qu.cosmetatos_mdc_wait_mean(rho * servers, 1.0, servers)
    np.testing.assert_allclose(cosmetatos, mean, rtol=0.01)
    allen_cunneen = qu.allen_cunneen_wait_mean(rho * servers, 1.0, servers, 1.0, 0.0)
    assert -0.11 < float(allen_cunneen) / mean - 1.0 < 0.0  # reference 4.3: optimistic by at most 9.1 % here


def test_mdc_error_of_allen_cunneen_is_the_published_one() -> None:
    """Reference 4.3: M/D/4 -8.9, -3.5, -1.5 % at rho 0.6, 0.8, 0.9."""
    ours = qu.allen_cunneen_wait_mean(np.array([2.4, 3.2, 3.6]), 1.0, 4, 1.0, 0.0)
    np.testing.assert_allclose(ours / [0.0984, 0.3862, 1.0001] - 1.0, [-0.089, -0.035, -0.015], atol=0.003)


def test_gg_special_cases_and_limits() -> None:
    rate = np.array([0.0, 0.5, 0.9, 1.0, 1.1])
    np.testing.assert_allclose(
        qu.allen_cunneen_wait_mean(rate, 1.0, 1, 1.0, 0.0), qu.mg1_wait_mean(rate, 1.0, 1.0), rtol=1e-14
    )
    np.testing.assert_allclose(qu.cosmetatos_mdc_wait_mean(rate, 1.0, 1), qu.mg1_wait_mean(rate, 1.0, 1.0), rtol=1e-14)
    light = np.array([0.01, 0.1, 0.5])
    assert np.all(qu.cosmetatos_mdc_wait_mean(light, 1.0, 16) <= qu.mmc_wait_mean(light, 1.0, 16))
    # reference 4.4: exact decay of M/D/c
    np.testing.assert_allclose(qu.mdc_decay([4, 4, 16], [0.8, 0.9, 0.8]), [1.7234, 0.8286, 6.8935], rtol=5e-5)


def test_inoue() -> None:
    """Reference 4.5: formulas, and simulated means 6.97, 16.65, 41.1 at tau0 = 5."""
    ours = qu.inoue_batch_mean_latency([0.05, 0.5, 0.8, 0.2], 1.0, 5.0)
    np.testing.assert_allclose(ours, [6.99, 16.67, 41.39, 10.52], rtol=1e-3)
    np.testing.assert_allclose(ours[:3], [6.97, 16.65, 41.1], rtol=0.01)
    np.testing.assert_allclose(qu.inoue_batch_mean_latency(0.05, 1.0, 20.0), 32.6, rtol=1e-2)
    np.testing.assert_allclose(qu.inoue_batch_mean_latency(0.0, 1.0, 5.0), 6.0, rtol=1e-15)  # alone: alpha + tau0
    assert np.all(np.isinf(qu.inoue_batch_mean_latency([1.0, 2.0], 1.0, 5.0)))


WAITS: list[tuple[Any, tuple[float, ...]]] = [
    (lambda r, s: qu.mmc_wait_mean(r, s, 3), (1, 2, 3, 9)),
    (lambda r, s: qu.mmc_wait_quantile(0.99, r, s, 3), (1, 2, 3, 9)),
    (lambda r, s: qu.mg1_wait_mean(r, s, 1.7 * s**2), (1, 2)),
    (lambda r, s: np.sqrt(qu.mg1_wait_second_moment(r, s, 1.7 * s**2, 6.0 * s**3)), (1, 2)),
    (lambda r, s: qu.allen_cunneen_wait_mean(r, s, 3, 2.0, 0.5), (1, 2)),
    (lambda r, s: qu.cosmetatos_mdc_wait_mean(r, s, 3), (1, 2)),
    (lambda r, s: qu.inoue_batch_mean_latency(r, s, 2.0 * s), (1, 2)),
    (lambda r, s: 1.0 / qu.cramer_lundberg(r, s * np.array([0.5, 1.5])).decay, (1, 2)),
]


@pytest.mark.parametrize("case", range(len(WAITS)))
@given(rate=st.floats(0.01, 0.9), k=st.floats(1e-3, 1e3))
def test_waits_grow_with_the_rate_and_scale_with_the_second(case: int, rate: float, k: float) -> None:
    wait = WAITS[case][0]
    base = float(wait(rate, 1.0))
    assert float(wait(1.05 * rate, 1.0)) >= base
    np.testing.assert_allclose(wait(rate / k, k), k * base, rtol=1e-9)


@given(rho=st.floats(0.01, 0.99), t=st.floats(0.0, 20.0), k=st.floats(1e-3, 1e3))
def test_tails_grow_with_the_rate_and_are_pure_numbers(rho: float, t: float, k: float) -> None:
    tails: list[Callable[[float, float, float], float]] = [
        lambda r, x, s: float(qu.md1_wait_tail(x, r, s)),
        lambda r, x, s: float(qu.mmc_wait_tail(x, 3 * r, s, 3)),
    ]
    for tail in tails:
        base = tail(rho, t, 1.0)
        assert 0.0 <= base <= 1.0
        # crossing from Crommelin to Cramer-Lundberg at 3 D may cost 0.06 %
        assert tail(min(1.02 * rho, 1.0), t, 1.0) >= base * (1.0 - 1e-9) - 1e-15
        if abs(t - 3.0) > 1e-6:
            np.testing.assert_allclose(tail(rho / k, k * t, k), base, rtol=1e-8, atol=1e-13)


def test_vector_is_the_map_of_scalars() -> None:
    rate, t, servers = np.array([0.2, 0.9, 2.5, 7.0]), np.array([[0.0], [2.5], [3.0], [9.0]]), np.array([1, 2, 3, 8])
    vectors: list[Callable[..., Any]] = [
        lambda r, x, c: qu.mmc_wait_tail(x, r, 1.0, c),
        lambda r, x, c: qu.md1_wait_tail(x, r, 0.7 + 0 * c),
        lambda r, x, c: qu.mmc_wait_mean(r, 1.0 + x, c),
        lambda r, x, c: qu.cosmetatos_mdc_wait_mean(r, 1.0 + x, c),
    ]
    for vector in vectors:
        whole = vector(rate, t, servers)
        assert whole.shape == (4, 4)
        for i, j in np.ndindex(4, 4):
            np.testing.assert_allclose(whole[i, j], vector(rate[j], t[i, 0], servers[j]), rtol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qu.erlang_b(0, 1.0), "servers must be a whole number >= 1, got 0"),
        (lambda: qu.erlang_b(1.5, 1.0), "servers must be a whole number >= 1, got 1.5"),
        (lambda: qu.erlang_c(2, -1.0), "offered_load must be >= 0, got -1"),
        (lambda: qu.erlang_c(2, float("nan")), "offered_load must be >= 0, got nan"),
        (lambda: qu.mmc_wait_mean([1.0, float("nan")], 1.0, 2), "arrival_rate_rps must be >= 0, got nan"),
        (lambda: qu.mmc_wait_mean(1.0, 0.0, 2), "service_s must be > 0, got 0"),
        (lambda: qu.mmc_wait_quantile(1.0, 1.0, 1.0, 2), "p must be between 0 and 1, got 1"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

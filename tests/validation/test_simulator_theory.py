"""The simulator against queueing theory: step times chosen so that it is a queue with a known law.

"Reference" is the project's queueing page. Every mean and tail is that of independent replications, the first part of
each left out, and lies within 4 standard errors of theory, plus one engine step where an arrival waits for one to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from analytic_steps import AnalyticSteps
from numpy.typing import NDArray

from servecast.model.batch_steps import Chunk, StepTimes
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.validation.simulator import EngineLimits, simulate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Lengths = Callable[[np.random.Generator, int], Ints]

REPLICATIONS = 16
WARM_UP = 0.1
"""Share of each replication left out at its start and, where requests overlap, at its end."""
MD1_TIMES = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
MD1 = {  # reference 6.2: 120-digit arithmetic, D = 1; P(W > t) at MD1_TIMES
    0.5: (0.357987, 0.175639, 0.0530394, 0.0152513, 0.00123573, 2.85044e-05),
    0.7: (0.57428, 0.395874, 0.206328, 0.105322, 0.027276, 0.00359514),
    0.9: (0.843169, 0.75404, 0.6164, 0.501349, 0.331291, 0.17796),
}


def _one(_: np.random.Generator, count: int) -> Ints:
    return np.ones(count, dtype=np.int64)


def _runs(
    steps: StepTimes,
    *,
    seqs: int,
    rate_rps: float,
    count: int,
    n_in: Lengths = _one,
    n_out: Lengths = _one,
    replications: int = REPLICATIONS,
    seed: int = 0,
) -> list[RequestRows]:
    limits = EngineLimits(
        max_num_seqs=seqs, max_num_batched_tokens=1 << 40, kv_tokens=1e12, enable_prefix_caching=False
    )
    runs = []
    for rng in np.random.default_rng(seed).spawn(replications):
        trace = Trace(
            name="poisson",
            t_s=np.cumsum(rng.exponential(1.0 / rate_rps, count)),
            n_in=n_in(rng, count),
            n_out=n_out(rng, count),
        )
        runs.append(simulate(trace, steps, limits))
    return runs


def _settled(values: Floats) -> Floats:
    return values[int(WARM_UP * values.size) :]


def _waits(runs: Sequence[RequestRows]) -> list[Floats]:
    return [_settled(rows.scheduled_s - rows.arrival_s) for rows in runs]


def _assert_mean(samples: Sequence[float], theory: float, *, slack: float = 0.0) -> None:
    values = np.array(samples)
    sem = values.std(ddof=1) / math.sqrt(values.size)
    assert abs(values.mean() - theory) < 4.0 * sem + slack, f"{values.mean():.6g} +- {sem:.2g}, theory {theory:.6g}"


# One request at a time


@pytest.mark.parametrize("rho", MD1)
def test_m_d_1_is_crommelins(rho: float) -> None:
    waits = _waits(_runs(AnalyticSteps(token_s=1.0), seqs=1, rate_rps=rho, count=6000))
    _assert_mean([float(w.mean()) for w in waits], rho / (2.0 * (1.0 - rho)))  # Pollaczek-Khinchine, S = 1
    for t, tail in zip(MD1_TIMES, MD1[rho], strict=True):
        if tail > 0.001:  # rarer ones leave too few events for a standard error
            _assert_mean([float((w > t).mean()) for w in waits], tail)


def test_m_g_1_is_pollaczek_khinchines() -> None:
    # hand: S is 1 s with probability 0.9 and 11 s with 0.1: E[S] = 2, E[S^2] = 13, E[S^3] = 134; rate 0.35, rho 0.7
    rate, second, third = 0.35, 13.0, 134.0
    mean = rate * second / (2.0 * 0.3)
    square = 2.0 * mean**2 + rate * third / (3.0 * 0.3)
    waits = _waits(
        _runs(
            AnalyticSteps(token_s=1.0),
            seqs=1,
            rate_rps=rate,
            count=8000,
            n_in=lambda rng, count: np.where(rng.random(count) < 0.9, 1, 11),
        )
    )
    _assert_mean([float(w.mean()) for w in waits], mean)
    _assert_mean([float((w**2).mean()) for w in waits], square)
    _assert_mean([float((w > 0.0).mean()) for w in waits], 0.7)


def test_a_chunked_prompt_is_the_same_queue() -> None:
    """M/D/1 of prompts in five chunks, each a step of its own: the service is their sum."""
    rng = np.random.default_rng(5)
    trace = Trace(
        name="poisson",
        t_s=np.cumsum(rng.exponential(1.0 / 0.7, 3000)),
        n_in=np.full(3000, 5),
        n_out=np.ones(3000, dtype=np.int64),
    )
    limits = [
        EngineLimits(max_num_seqs=1, max_num_batched_tokens=budget, kv_tokens=1e6, enable_prefix_caching=False)
        for budget in (1, 5)
    ]
    chunked, whole = (simulate(trace, AnalyticSteps(token_s=0.2), one) for one in limits)
    np.testing.assert_allclose(chunked.last_token_s, whole.last_token_s, rtol=1e-9)


# Several servers: places of the batch, with steps short against the service


@dataclass(frozen=True, slots=True)
class EvenSteps:
    """Every step takes alpha + delta B, the prompts in it counted as sequences."""

    alpha_s: float
    delta_s: float = 0.0
    first_token_s: float = 0.0

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:  # noqa: ARG002 (the protocol's)
        """See `servecast.model.batch_steps.StepTimes`."""
        return self.alpha_s + self.delta_s * batch, 0.0, 1 << 40

    def mixed(self, chunks: Sequence[Chunk], finishing: int, batch: int, cached: int) -> float:  # noqa: ARG002 (the protocol's)
        """See `servecast.model.batch_steps.StepTimes`."""
        return self.decode(batch + len(chunks), cached)[0]


STEP_S = 0.001


# reference 6.3: Monte Carlo of 19 M customers, S = 1; servers, rho, E[W], P(W > 0.5), P(W > 1)
MDC = [(2, 0.8, 0.9047, 0.5183, 0.3313), (4, 0.8, 0.3862, 0.2946, 0.1227), (8, 0.8, 0.1518, 0.1014, 0.0179)]
MDC_BUSY = [(8, 0.9, 0.4494, 0.3315, 0.1441), (16, 0.9, 0.1926, 0.1258, 0.0240)]


def _m_d_c(servers: int, rho: float, count: int, replications: int = REPLICATIONS) -> list[RequestRows]:
    """A first token and 999 more of one step each: S = 1 s, on a grid of 1 ms."""
    return _runs(
        EvenSteps(STEP_S),
        seqs=servers,
        rate_rps=rho * servers,
        count=count,
        n_out=lambda _, size: np.full(size, 1000),
        replications=replications,
        seed=1,
    )


@pytest.mark.parametrize(("servers", "rho"), [(2, 0.8), (16, 0.9)])
def test_m_d_c_path_by_path(servers: int, rho: float) -> None:
    """Served in order, each takes the place of the one `servers` before it: start_i = max(a_i, start_{i - c} + S)."""
    for rows in _m_d_c(servers, rho, 4000, replications=3):
        start: list[float] = []
        for number, at in enumerate(rows.arrival_s.tolist()):
            start.append(max(at, start[number - servers] + 1.0) if number >= servers else at)
        later = rows.scheduled_s - np.array(start)
        assert later.min() > -1e-9
        assert later.max() < STEP_S + 1e-9  # an arrival waits for the step in progress to end


def _assert_m_d_c(runs: Sequence[RequestRows], mean: float, half: float, one: float) -> None:
    waits = _waits(runs)
    _assert_mean([float(w.mean()) for w in waits], mean, slack=STEP_S)
    for t, tail in ((0.5, half), (1.0, one)):
        # waits up to 1 ms longer move a tail by its decay times that: 8 x 0.43 / s at most (theta, reference 4.4)
        _assert_mean([float((w > t).mean()) for w in waits], tail, slack=4.0 * STEP_S * tail)


@pytest.mark.parametrize(("servers", "rho", "mean", "half", "one"), MDC)
def test_m_d_c(servers: int, rho: float, mean: float, half: float, one: float) -> None:
    _assert_m_d_c(_m_d_c(servers, rho, 5000), mean, half, one)


@pytest.mark.slow
@pytest.mark.parametrize(("servers", "rho", "mean", "half", "one"), MDC_BUSY)
def test_m_d_c_near_saturation(servers: int, rho: float, mean: float, half: float, one: float) -> None:
    _assert_m_d_c(_m_d_c(servers, rho, 60_000), mean, half, one)


@pytest.mark.parametrize(
    ("servers", "load", "erlang_c"),
    [(4, 3.2, 0.5964324717874046), (16, 14.4, 0.5913433938723898)],  # reference 6.1
)
def test_m_m_c(servers: int, load: float, erlang_c: float) -> None:
    # geometric outputs of 1000 steps on average: exponential to a thousandth
    runs = _runs(
        EvenSteps(STEP_S),
        seqs=servers,
        rate_rps=load,
        count=5000,
        n_out=lambda rng, count: rng.geometric(STEP_S, count),
        seed=2,
    )
    spare = servers - load
    waits = _waits(runs)
    _assert_mean([float(w.mean()) for w in waits], erlang_c / spare, slack=2.0 * STEP_S)
    for t in (0.2, 1.0):
        tail = erlang_c * math.exp(-spare * t)
        _assert_mean([float((w > t).mean()) for w in waits], tail, slack=2.0 * STEP_S * spare)


def test_replicas_behind_a_random_router_are_queues_of_their_own() -> None:
    """A Poisson stream thinned at random is Poisson: three M/D/1 queues, rho = 0.7 each."""
    limits = EngineLimits(max_num_seqs=1, max_num_batched_tokens=1, kv_tokens=1e6, enable_prefix_caching=False)
    means = []
    for seed, rng in enumerate(np.random.default_rng(3).spawn(REPLICATIONS)):
        count = 6000
        ones = np.ones(count, dtype=np.int64)
        trace = Trace(name="poisson", t_s=np.cumsum(rng.exponential(1.0 / 2.1, count)), n_in=ones, n_out=ones)
        rows = simulate(trace, AnalyticSteps(token_s=1.0), limits, replicas=3, router="random", seed=seed)
        means.append(float(_settled(rows.scheduled_s - rows.arrival_s).mean()))
    _assert_mean(means, 0.7 / 0.6)


# Batches


@pytest.mark.parametrize(
    ("tau0", "rho", "simulated"),
    [  # reference 4.5: independent simulations, alpha = 1, good to 2 %
        (5.0, 0.05, 6.97),
        (5.0, 0.2, 9.89),
        (5.0, 0.5, 16.65),
        (5.0, 0.8, 41.1),
        (20.0, 0.05, 29.9),
    ],
)
def test_prompts_that_share_a_step_are_inoues_batch_service(tau0: float, rho: float, simulated: float) -> None:
    phi0 = (1.0 + tau0) / (2.0 * (1.0 - rho)) * (1.0 + 2.0 * rho * tau0 + (1.0 - rho * tau0) / (1.0 + rho))
    phi1 = 1.5 * tau0 / (1.0 - rho) + 0.5 * (rho + 2.0) / (1.0 - rho**2)
    runs = _runs(EvenSteps(tau0, 1.0), seqs=10_000, rate_rps=rho, count=4000, seed=4)
    stays = [float(_settled(rows.last_token_s - rows.arrival_s).mean()) for rows in runs]
    _assert_mean(stays, simulated, slack=0.02 * simulated)
    _assert_mean(stays, min(float(np.mean(stays)), phi0, phi1))  # the bounds are not exceeded beyond noise


@dataclass(frozen=True, slots=True)
class BirthDeath:
    """M/M(n)/1 with room without end, state by state: the slow obvious form of reference 4.6."""

    shares: Floats
    """P(n requests in the system), n = 0.. until nothing is left."""
    service_rps: Floats
    """Completions per second with B in service."""


def _birth_death(rate_rps: float, service_rps: Floats) -> BirthDeath:
    cap = len(service_rps) - 1
    weights = [1.0]
    while weights[-1] > 1e-16 * sum(weights) or len(weights) < cap + 2:
        weights.append(weights[-1] * rate_rps / service_rps[min(len(weights), cap)])
    shares = np.array(weights)
    return BirthDeath(shares=shares / shares.sum(), service_rps=service_rps)


def _wait_tail(queue: BirthDeath, t_s: float) -> float:
    cap = len(queue.service_rps) - 1
    mt = queue.service_rps[cap] * t_s
    poisson = [math.exp(-mt)]
    for i in range(1, len(queue.shares)):
        poisson.append(poisson[-1] * mt / i)
    return float(sum(p * sum(poisson[: j + 1]) for j, p in enumerate(queue.shares[cap:])))


# reference 6.4, first rows: alpha = 8 ms, and T_iter(B) = alpha + B delta with delta = 0.296954 ms, k + m = 1025 steps
BASELINE = EvenSteps(0.008, 0.000296954)
PASSES = 1025


def _baseline_service(cap: int) -> Floats:
    batch = np.arange(cap + 1.0)
    return batch / (PASSES * (BASELINE.alpha_s + BASELINE.delta_s * batch))


def _geometric_passes(rng: np.random.Generator, count: int) -> Ints:
    return rng.geometric(1.0 / PASSES, count)


def test_a_batch_whose_pace_depends_on_its_size() -> None:
    cap, rate = 40, 1.8
    queue = _birth_death(rate, _baseline_service(cap))
    states = np.arange(len(queue.shares))
    runs = _runs(BASELINE, seqs=cap, rate_rps=rate, count=5000, n_out=_geometric_passes, seed=5)
    # Little over each run's middle: mean batch = rate x mean stay in service
    busy = [rate * float(_settled(rows.last_token_s - rows.scheduled_s).mean()) for rows in runs]
    _assert_mean(busy, float(np.minimum(states, cap) @ queue.shares), slack=0.01 * cap)
    waits = _waits(runs)
    longest_step = BASELINE.decode(cap, 0)[0]
    for t in (0.1, 1.0, 5.0):
        slack = _wait_tail(queue, t - longest_step) - _wait_tail(queue, t)
        _assert_mean([float((w > t).mean()) for w in waits], _wait_tail(queue, t), slack=slack)


@pytest.mark.slow
def test_the_published_batch_of_69() -> None:
    # reference 6.7: rate 1.9232237/s, X = 39.441347, P(W > t)
    runs = _runs(BASELINE, seqs=69, rate_rps=1.9232237, count=40_000, n_out=_geometric_passes, replications=24, seed=6)
    busy = [1.9232237 * float(_settled(rows.last_token_s - rows.scheduled_s).mean()) for rows in runs]
    _assert_mean(busy, 39.441347, slack=0.3)  # an arrival joins at a step's end: half a step later of 1025
    waits = _waits(runs)
    for t, tail in ((0.1, 0.004731446), (0.5, 0.003968473), (1.0, 0.003185373), (2.0, 0.002052268)):
        _assert_mean([float((w > t).mean()) for w in waits], tail, slack=0.0001)

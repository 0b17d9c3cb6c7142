"""Closed-form queues against Ciw, an independent discrete-event simulator (https://ciw.readthedocs.io).

|mean - theory| < 4 standard errors over independent replications of fixed seeds, warm-up and cool-down left out; where
the closed form is an approximation, its published error is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import ciw  # type: ignore[import-untyped]
import numpy as np

from servecast.model import queueing as qu
from servecast.model.state_queue import state_queue, wait_tail

REPLICATIONS = 10
Records = Sequence[Any]


def _replications(
    arrivals: Any,
    service: Any,
    servers: float,
    *,
    until_s: float,
    capacity: float = math.inf,
    node_class: type[ciw.Node] = ciw.Node,
) -> list[Records]:
    """Records of finished services that arrived after the first and before the last tenth of each run."""
    runs: list[Records] = []
    for seed in range(REPLICATIONS):
        ciw.seed(seed)
        network = ciw.create_network(
            arrival_distributions=[arrivals],
            service_distributions=[service],
            number_of_servers=[servers],
            queue_capacities=[capacity],
        )
        simulation = ciw.Simulation(network, node_class=node_class)
        simulation.simulate_until_max_time(until_s)
        runs.append([one for one in simulation.get_all_records() if 0.1 * until_s < one.arrival_date < 0.9 * until_s])
    return runs


def _waits(runs: Iterable[Records]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    return [np.array([one.waiting_time for one in run if one.record_type == "service"]) for run in runs]


def _assert_mean(samples: Sequence[float], theory: Any, *, error: float = 0.0) -> None:
    """`error` : share of the theory's value that it may be off."""
    values, expected = np.array(samples), float(theory)
    sem = values.std(ddof=1) / math.sqrt(values.size)
    assert abs(values.mean() - expected) < 4.0 * sem + error * expected, (
        f"Ciw {values.mean():.6g} +- {sem:.2g}, closed form {expected:.6g}"
    )


def test_m_m_1() -> None:
    waits = _waits(_replications(ciw.dists.Exponential(0.7), ciw.dists.Exponential(1.0), 1, until_s=4000.0))
    _assert_mean([float(w.mean()) for w in waits], qu.mmc_wait_mean(0.7, 1.0, 1))
    for t in (0.0, 2.0, 5.0):
        _assert_mean([float((w > t).mean()) for w in waits], qu.mmc_wait_tail(t, 0.7, 1.0, 1))


def test_m_m_c() -> None:
    waits = _waits(_replications(ciw.dists.Exponential(3.2), ciw.dists.Exponential(1.0), 4, until_s=1000.0))
    _assert_mean([float((w > 0.0).mean()) for w in waits], qu.erlang_c(4, 3.2))
    _assert_mean([float(w.mean()) for w in waits], qu.mmc_wait_mean(3.2, 1.0, 4))
    _assert_mean([float((w > 1.0).mean()) for w in waits], qu.mmc_wait_tail(1.0, 3.2, 1.0, 4))
    _assert_mean(
        [float((w > qu.mmc_wait_quantile(0.9, 3.2, 1.0, 4)).mean()) for w in waits],
        0.1,
    )


def test_m_d_1() -> None:
    waits = _waits(_replications(ciw.dists.Exponential(0.7), ciw.dists.Deterministic(1.0), 1, until_s=4000.0))
    _assert_mean([float(w.mean()) for w in waits], qu.mg1_wait_mean(0.7, 1.0, 1.0))
    _assert_mean(
        [float((w**2).mean()) for w in waits],
        qu.mg1_wait_second_moment(0.7, 1.0, 1.0, 1.0),
    )
    for t in (0.5, 1.5, 4.0):  # Crommelin's law below 3 services, Cramer-Lundberg's beyond
        _assert_mean([float((w > t).mean()) for w in waits], qu.md1_wait_tail(t, 0.7, 1.0))


def test_m_g_1_with_hyperexponential_service() -> None:
    # hand: mean 0.5 s with probability 0.8, 3 s with 0.2: E[S] = 1, E[S^2] = 2 (0.8 x 0.25 + 0.2 x 9) = 4
    rates, shares = [2.0, 1.0 / 3.0], [0.8, 0.2]
    waits = _waits(
        _replications(ciw.dists.Exponential(0.6), ciw.dists.HyperExponential(rates, shares), 1, until_s=6000.0)
    )
    _assert_mean([float(w.mean()) for w in waits], qu.mg1_wait_mean(0.6, 1.0, 4.0))
    third = 6.0 * (0.8 * 0.125 + 0.2 * 27.0)
    _assert_mean([float((w**2).mean()) for w in waits], qu.mg1_wait_second_moment(0.6, 1.0, 4.0, third))


def test_m_d_4_is_cosmetatos() -> None:
    waits = _waits(_replications(ciw.dists.Exponential(3.2), ciw.dists.Deterministic(1.0), 4, until_s=1000.0))
    # reference 4.3: -0.2 % against 19 M customers
    _assert_mean([float(w.mean()) for w in waits], qu.cosmetatos_mdc_wait_mean(3.2, 1.0, 4), error=0.002)


def test_m_m_c_with_a_finite_room() -> None:
    """Offered 5.2 Erlang to 4 servers and 6 places: overloaded, so that refusals carry the balance."""
    servers, room, rate = 4, 6, 5.2
    queue = state_queue(rate, np.arange(1.0, servers + 1.0), room=room)
    runs = _replications(ciw.dists.Exponential(rate), ciw.dists.Exponential(1.0), servers, until_s=800.0, capacity=room)
    refused = [sum(one.record_type == "rejection" for one in run) / len(run) for run in runs]
    _assert_mean(refused, queue.blocking)
    waits = _waits(runs)
    _assert_mean([float(w.mean()) for w in waits], queue.wait_mean_s)
    _assert_mean([float((w > 0.0).mean()) for w in waits], queue.p_wait)
    for t in (0.5, 1.5):
        _assert_mean([float((w > t).mean()) for w in waits], wait_tail(queue, t))


def test_erlang_loss() -> None:
    runs = _replications(ciw.dists.Exponential(3.2), ciw.dists.Exponential(1.0), 4, until_s=1000.0, capacity=0)
    refused = [sum(one.record_type == "rejection" for one in run) / len(run) for run in runs]
    _assert_mean(refused, qu.erlang_b(4, 3.2))


def test_bursty_arrivals_near_saturation_are_allen_cunneens() -> None:
    """G/M/1 with gaps of ca2 = 4: the exact wait is S sigma / (1 - sigma), sigma = A*((1 - sigma) / S)."""
    # hand: balanced two-phase gaps of mean 1 and ca2 4: p = (1 + sqrt(3 / 5)) / 2, rates 2 p and 2 (1 - p)
    p = 0.5 * (1.0 + math.sqrt(0.6))
    rates, shares = [2.0 * p, 2.0 * (1.0 - p)], [p, 1.0 - p]
    service = 0.9
    sigma = 0.5
    for _ in range(500):
        at = (1.0 - sigma) / service
        sigma = sum(share * rate / (rate + at) for share, rate in zip(shares, rates, strict=True))
    exact = service * sigma / (1.0 - sigma)
    waits = _waits(
        _replications(
            ciw.dists.HyperExponential(rates, shares), ciw.dists.Exponential(1.0 / service), 1, until_s=8000.0
        )
    )
    _assert_mean([float(w.mean()) for w in waits], exact)
    # two moments: the error of heavy traffic, here against the exact law
    np.testing.assert_allclose(qu.allen_cunneen_wait_mean(1.0, service, 1, 4.0, 1.0), exact, rtol=0.05)


class SharedStep(ciw.PSNode):  # type: ignore[misc]
    """Ciw's limited processor sharing with another pace: with B in service each gets 1 / (0.5 + 0.1 B) per second."""

    last_occupancy: int

    def update_all_service_end_dates(self) -> None:
        """As Ciw's own, but for the pace."""
        now = self.simulation.current_time
        following = min(self.number_of_individuals, self.ps_capacity)
        for one in self.all_individuals:
            if one.with_server:
                if self.last_occupancy:
                    one.time_left -= (now - one.date_last_update) / (0.5 + 0.1 * self.last_occupancy)
                one.service_end_date = now + one.time_left * (0.5 + 0.1 * following)
                one.date_last_update = now
        self.last_occupancy = following
        self.date_last_update = now


def test_a_batch_whose_pace_depends_on_its_size() -> None:
    """mu_B = B / (0.5 + 0.1 B) with 8 places and room without end: a continuous batch, wait and stay."""
    batch = np.arange(1.0, 9.0)
    queue = state_queue(5.0, batch / (0.5 + 0.1 * batch))  # rho = 5 / 6.154
    waits, stays = [], []
    runs = _replications(
        ciw.dists.Exponential(5.0), ciw.dists.Exponential(1.0), 8, until_s=800.0, node_class=SharedStep
    )
    for run in runs:
        waits.append(np.array([one.waiting_time for one in run]))
        stays.append(float(np.mean([one.service_end_date - one.service_start_date for one in run])))
    _assert_mean(stays, queue.service_mean_s)
    _assert_mean([float(w.mean()) for w in waits], queue.wait_mean_s)
    for t in (0.0, 1.0, 2.0):
        _assert_mean([float((w > t).mean()) for w in waits], wait_tail(queue, t))

"""How often a batch size occurs. Expected values: queueing formulas, hand, and a simulated chain."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from servecast.solvers.batch_occupancy import birth_death_occupancy, crossing_weights, little_batch


def test_erlang_loss() -> None:
    """Erlang's formula: offered load 2 on 3 servers, (8 / 6) / (1 + 2 + 2 + 8 / 6) = 4 / 19 are lost."""
    shares = birth_death_occupancy(2.0, [1.0, 2.0, 3.0])
    np.testing.assert_allclose(shares, np.array([3.0, 6.0, 6.0, 4.0]) / 19.0, rtol=1e-12)


@pytest.mark.parametrize("load", [1e-3, 0.9, 1.0, 1e3])
def test_single_server_with_room_for_many(load: float) -> None:
    """Geometric shares, load^b over their sum; 2,000 places at load 1,000 are 10^6000."""
    shares = birth_death_occupancy(load, np.ones(2000))
    reached = min(load, 1.0 / load)
    ratio = 1.0 / 2001 if reached == 1.0 else (1.0 - reached) / (1.0 - reached**2001)
    np.testing.assert_allclose(shares[-1] if load > 1.0 else shares[0], ratio, rtol=1e-12)
    np.testing.assert_allclose(math.fsum(shares), 1.0, rtol=1e-12)


def test_crossings_balance() -> None:
    """As many upwards as downwards: arrival rate x share below = service rate x share above."""
    rates = np.array([3.0, 5.0, 6.0, 6.5, 6.7])
    shares = birth_death_occupancy(4.0, rates)
    np.testing.assert_allclose(crossing_weights(4.0, shares), rates[1:] * shares[2:], rtol=1e-12)


def test_crossings_of_a_simulated_chain() -> None:
    """Monte Carlo, 40 runs of 1,000 events from batch 1: crossings of the edge between 2 and 3 per second."""
    rng = np.random.default_rng(5)
    rates, arrivals = [3.0, 5.0, 6.0, 6.5, 6.7], 4.0
    seen = []
    for _ in range(40):
        batch, time, crossings = 1, 0.0, 0
        for wait, toss in zip(rng.exponential(size=1000), rng.uniform(size=1000), strict=True):
            up, down = (arrivals if batch < 5 else 0.0), (rates[batch - 1] if batch else 0.0)
            time += wait / (up + down)
            rises = toss < up / (up + down)
            crossings += rises and batch == 2
            batch += 1 if rises else -1
        seen.append(crossings / time)
    expected = crossing_weights(arrivals, birth_death_occupancy(arrivals, rates))[1]
    assert abs(np.mean(seen) - expected) < 4.0 * np.std(seen, ddof=1) / math.sqrt(40)


@pytest.mark.parametrize("prefill_s", [0.0, 0.3])
def test_little_batch_of_a_linear_step(prefill_s: float) -> None:
    """Hand: b = rate (n (c0 + c1 b) + t) is solved by rate (n c0 + t) / (1 - rate n c1), up to a rate 1 / (n c1)."""
    batches = np.array([1, 2, 5, 64, 256])
    c0, c1, tokens = 0.01, 1e-4, 200.0
    rate = np.array([[5.0, 20.0], [40.0, 60.0]])
    found = little_batch(rate, tokens, batches, batches / (c0 + c1 * batches), prefill_s=prefill_s)
    expected = rate * (tokens * c0 + prefill_s) / (1.0 - rate * tokens * c1)
    expected[1, 1] = np.inf
    np.testing.assert_allclose(found[expected <= 256.0], expected[expected <= 256.0], rtol=1e-9)
    assert np.isinf(found[expected > 256.0]).all()
    assert (expected > 256.0).sum() >= 1


def test_little_batch_below_the_first() -> None:
    """Hand: 0.1 requests per second of 100 tokens at 10 ms each."""
    np.testing.assert_allclose(little_batch(0.1, 100.0, [1, 2], [100.0, 190.0]), 0.1, rtol=1e-12)


def test_little_batch_takes_the_smallest_solution() -> None:
    """Hand: 10 tokens at 10 requests per second are 100 tok/s, passed at batch 2 (120), and missed again at 3."""
    found = little_batch(10.0, 10.0, [1, 2, 3], [80.0, 120.0, 90.0])
    # time per token .0125 and .016667: b = 100 (.0125 + (b - 1) .0041667), so b = .83333 / .58333
    np.testing.assert_allclose(found, 10.0 / 7.0, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: birth_death_occupancy(0.0, [1.0]), "arrival_rate_rps must be positive and finite, got 0.0"),
        (lambda: birth_death_occupancy(1.0, [1.0, np.nan]), "service_rate_rps must be positive and finite, got nan"),
        (
            lambda: birth_death_occupancy(1.0, []),
            "service_rate_rps must be one rate per batch from 1 on, got shape (0,)",
        ),
        (lambda: crossing_weights(np.nan, [0.5, 0.5]), "arrival_rate_rps must be positive and finite, got nan"),
        (lambda: crossing_weights(1.0, [0.5, 1.5]), "occupancy must be in [0, 1], got [0.5, 1.5]"),
        (lambda: crossing_weights(1.0, [0.5]), "occupancy must be one share per batch from 0 on, got shape (1,)"),
        (lambda: little_batch(1.0, 0.0, [1], [1.0]), "output_tokens must be positive and finite, got 0.0"),
        (lambda: little_batch(1.0, 1.0, [2, 1], [1.0, 1.0]), "batches must be increasing, got [2.0, 1.0]"),
        (lambda: little_batch(1.0, 1.0, [1, 2], [1.0]), "goodput must be one per batch, got shapes (1,) and (2,)"),
        (lambda: little_batch(1.0, 1.0, [1], [-1.0]), "goodput must be positive and finite, got -1.0"),
        (lambda: little_batch(1.0, 1.0, [1], [1.0], prefill_s=-1.0), "prefill_s must be >= 0 and finite, got -1.0"),
    ],
)
def test_malformed_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()

"""The primitives of llm-inferno/queue-analysis, transcribed for the tests: milliseconds, as published.

alpha [ms per iteration], beta [ms per token], gamma [ms per token^2], n input and m output tokens, k prefill chunks.
Everything that is queueing goes through `servecast.model.state_queue`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

from servecast.model.state_queue import StateQueue, state_queue

MAX_BATCH_TOKENS = 8192
BISECTION_STEPS = 60


@dataclass(frozen=True)
class Inferno:
    alpha: float
    beta: float
    gamma: float
    n: int
    m: int

    def chunks(self, batch: int) -> int:
        """nc(B)."""
        k = 1
        while batch > floor((k + self.m) * (MAX_BATCH_TOKENS - self.n / k) / (self.n + self.m)):
            k += 1
        return k

    def prefill_work(self, k: int) -> float:
        return (self.beta + self.gamma * (k + 1) / 2) * self.n

    def decode_work(self) -> float:
        return self.beta * self.m + self.gamma * self.m * (self.n + (self.m + 1) / 2)

    def delta(self, k: int) -> float:
        return (self.prefill_work(k) + self.decode_work()) / (k + self.m)

    def iteration_ms(self, batch: int) -> float:
        return self.alpha + batch * self.delta(self.chunks(batch))

    def tau_ms(self, batch: int) -> float:
        return (self.chunks(batch) + self.m) * self.iteration_ms(batch)

    def prefill_ms(self, batch: float, k: int) -> float:
        return k * max(0.0, self.alpha + (batch - 1) * self.delta(k)) + self.prefill_work(k)

    def itl_ms(self, batch: float, k: int) -> float:
        return max(0.0, self.alpha + (batch - 1) * self.delta(k)) + self.beta + self.gamma * (self.n + (self.m + 1) / 2)

    def service_rate_per_ms(self, cap: int) -> NDArray[np.float64]:
        return np.array([batch / self.tau_ms(batch) for batch in range(1, cap + 1)])


@dataclass(frozen=True)
class Solution:
    queue: StateQueue
    prefill_ms: NDArray[np.float64]
    ttft_ms: NDArray[np.float64]
    itl_ms: NDArray[np.float64]


def solve(model: Inferno, rates_per_s: NDArray[np.float64], caps: NDArray[np.int64], room: int) -> Solution:
    """Means at each rate, with k read at round(X)."""
    queue = state_queue(rates_per_s / 1000.0, model.service_rate_per_ms(int(caps.max())), caps=caps, room=room)
    batches = queue.mean_in_service
    prefill = np.array([model.prefill_ms(x, model.chunks(round(x))) for x in batches.flat]).reshape(batches.shape)
    itl = (queue.service_mean_s - prefill) / model.m
    return Solution(queue=queue, prefill_ms=prefill, ttft_ms=queue.wait_mean_s + prefill + itl, itl_ms=itl)


def max_rate(model: Inferno, cap: int) -> float:
    """Upper end of the range of rates [1/s]."""
    return 999.0 * float(model.service_rate_per_ms(cap)[-1])


def largest_rates(
    model: Inferno, caps: NDArray[np.int64], room: int, *, ttft_ms: float, itl_ms: float
) -> NDArray[np.float64]:
    """Largest rate [1/s] at which the mean TTFT and the mean ITL hold, by bisection over all caps at once."""
    rates = model.service_rate_per_ms(int(caps.max()))
    low, high = np.full(caps.shape, rates[0]), 999.0 * rates[caps - 1]
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2.0
        found = solve(model, middle, caps, room)
        good = (found.ttft_ms <= ttft_ms) & (found.itl_ms <= itl_ms)
        low, high = np.where(good, middle, low), np.where(good, high, middle)
    return low

"""Arrival times drawn from a process: for the parametric bootstrap of a fit, and for validators that simulate."""

from __future__ import annotations

import math
from functools import singledispatch

import numpy as np
from numpy.typing import NDArray

from servecast.model.arrival_processes import (
    ArrivalProcess,
    BatchArrivals,
    EmpiricalBatch,
    GammaRenewal,
    GeometricBatch,
    MarkovModulated,
    Poisson,
    WeibullRenewal,
)

Floats = NDArray[np.float64]


def arrival_times(process: ArrivalProcess, n: int, rng: np.random.Generator) -> Floats:
    """The first `n` arrivals after time 0, in order. [s]

    Renewal processes have had a renewal at time 0 (which is not returned), batches likewise; the modulated process
    starts in a state drawn from its long-run shares.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 arrival, got {n}")
    return _times(process, n, rng)


@singledispatch
def _times(process: ArrivalProcess, n: int, rng: np.random.Generator) -> Floats:  # noqa: ARG001 (one signature for all)
    raise ValueError(f"process must be one of servecast.model.arrival_processes, got {type(process).__name__}")


@_times.register
def _(process: Poisson, n: int, rng: np.random.Generator) -> Floats:
    return np.cumsum(rng.standard_exponential(n)) / process.rate_rps


@_times.register
def _(process: GammaRenewal, n: int, rng: np.random.Generator) -> Floats:
    return np.cumsum(rng.standard_gamma(process.shape, n)) / (process.shape * process.rate_rps)


@_times.register
def _(process: WeibullRenewal, n: int, rng: np.random.Generator) -> Floats:
    return np.cumsum(rng.weibull(process.shape, n)) * process.scale_s


@_times.register
def _(process: BatchArrivals, n: int, rng: np.random.Generator) -> Floats:
    sizes = _batch_sizes(process.batch, n, rng)
    # n batches hold at least n requests; only the first ones are needed
    batches = int(np.searchsorted(np.cumsum(sizes), n)) + 1
    epochs = np.cumsum(rng.standard_exponential(batches)) / process.epoch_rate_per_s
    return np.repeat(epochs, sizes[:batches])[:n]


@_times.register
def _(process: MarkovModulated, n: int, rng: np.random.Generator) -> Floats:
    # a Poisson process of rate 1 in the clock that runs with the modulated rate
    operational = np.cumsum(rng.standard_exponential(n))
    switches, clock = _switches(process, float(operational[-1]), rng)
    return np.interp(operational, clock, switches)


def _switches(process: MarkovModulated, until: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Times of the state's changes from 0, and the expected arrivals up to each, until those exceed `until`."""
    busy_first = bool(rng.random() < process.busy_share)
    rates = np.array([process.low_rps, process.high_rps])
    leaving = np.array([process.to_high_per_s, process.to_low_per_s])
    if busy_first:
        rates, leaving = rates[::-1], leaving[::-1]
    per_cycle = float(np.sum(rates / leaving))
    cycles = math.ceil(1.2 * until / per_cycle) + 8
    switches, clock = [np.zeros(1)], [np.zeros(1)]
    while clock[-1][-1] <= until:
        stays = rng.standard_exponential((cycles, 2)) / leaving
        switches.append(switches[-1][-1] + np.cumsum(stays))
        clock.append(clock[-1][-1] + np.cumsum(stays * rates))
    return np.concatenate(switches), np.concatenate(clock)


def _batch_sizes(batch: GeometricBatch | EmpiricalBatch, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    if isinstance(batch, GeometricBatch):
        return rng.geometric(1.0 / batch.mean, n).astype(np.int64)
    return rng.choice(np.asarray(batch.sizes, dtype=np.int64), size=n, p=np.asarray(batch.shares))

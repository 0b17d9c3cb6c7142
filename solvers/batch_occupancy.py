r"""How often a batch size occurs when the batch is what the load makes it.

Requests arrive at random at rate :math:`\lambda` and leave at rate :math:`\mu_b` while b of them decode. The number
decoding is then a birth-death chain; at a steady state

.. math:: \pi_b \propto \prod_{i=1}^{b} \lambda / \mu_i, \qquad \lambda \pi_{b-1} = \mu_b \pi_b

and both sides of the balance are the rate at which the edge between b - 1 and b is crossed, upwards and downwards.
For decoding at goodput :math:`G_b`, :math:`\mu_b = G_b / n_{out}`. Requests beyond the largest batch are turned away,
not queued: where :math:`\lambda` comes near :math:`\mu_n` the largest batch is more frequent than this says.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def birth_death_occupancy(arrival_rate_rps: float, service_rate_rps: ArrayLike) -> Floats:
    """Share of time with b = 0, 1, ..., n requests decoding.

    Parameters
    ----------
    arrival_rate_rps : positive. [1/s]
    service_rate_rps : [n], rate at which requests leave while 1, ..., n of them decode; positive. [1/s]

    Returns
    -------
    [n + 1], adds up to 1. Products are formed in logarithms, so no load is too high or too low.

    >>> birth_death_occupancy(1.0, [1.0, 2.0]).tolist()
    [0.4, 0.4, 0.2]
    """
    rates = np.asarray(service_rate_rps, dtype=np.float64)
    _check_positive("arrival_rate_rps", np.asarray(arrival_rate_rps, dtype=np.float64))
    if rates.ndim != 1 or not rates.size:
        raise ValueError(f"service_rate_rps must be one rate per batch from 1 on, got shape {rates.shape}")
    _check_positive("service_rate_rps", rates)
    logs = np.append(0.0, np.cumsum(math.log(arrival_rate_rps) - np.log(rates)))
    shares = np.exp(logs - logs.max())
    return np.asarray(shares / shares.sum())


def crossing_weights(arrival_rate_rps: float, occupancy: ArrayLike) -> Floats:
    """Upward crossings of the edges between batch 1 and 2, ..., n - 1 and n; downward ones are as many.

    Times the cost of a change of length up and down, these are the switch costs of a schedule over batches 1, ..., n.

    Parameters
    ----------
    arrival_rate_rps : positive. [1/s]
    occupancy : [n + 1], share of time with 0, ..., n requests decoding. [-]

    Returns
    -------
    [n - 1]. [1/s]

    >>> crossing_weights(2.0, [0.4, 0.3, 0.2, 0.1]).tolist()
    [0.6, 0.4]
    """
    shares = np.asarray(occupancy, dtype=np.float64)
    _check_positive("arrival_rate_rps", np.asarray(arrival_rate_rps, dtype=np.float64))
    if shares.ndim != 1 or len(shares) < 2:
        raise ValueError(f"occupancy must be one share per batch from 0 on, got shape {shares.shape}")
    if not ((shares >= 0.0) & (shares <= 1.0)).all():
        raise ValueError(f"occupancy must be in [0, 1], got {shares.tolist()}")
    return np.asarray(arrival_rate_rps * shares[1:-1])


def little_batch(
    arrival_rate_rps: ArrayLike, output_tokens: float, batches: ArrayLike, goodput: ArrayLike, *, prefill_s: float = 0.0
) -> Floats:
    r"""Mean batch at which requests leave as fast as they come, by Little's law.

    .. math:: b = \lambda (n_{out} \, b / G(b) + t_{prefill})

    The time per token b / G(b) is linear between the given batches and constant below the first. Of several solutions
    the smallest is returned: the one that a batch growing from nothing comes to.

    Parameters
    ----------
    arrival_rate_rps : any shape, positive. [1/s]
    output_tokens : mean per request, positive. [tokens]
    batches : [n], increasing, positive. [requests]
    goodput : [n], at the draft length in force at each batch. [tokens/s]
    prefill_s : time that a request holds its place before it decodes. [s]

    Returns
    -------
    Shape of the rate; infinite where no batch up to the last given keeps up. [requests]

    >>> little_batch([1.0, 4.0, 8.0], 100.0, [1, 5], [100.0, 500.0]).tolist()
    [1.0, 4.0, inf]
    """
    batch, tokens = np.asarray(batches, dtype=np.float64), np.asarray(goodput, dtype=np.float64)
    rate = np.asarray(arrival_rate_rps, dtype=np.float64)
    if batch.ndim != 1 or not batch.size or batch.shape != tokens.shape:
        raise ValueError(f"goodput must be one per batch, got shapes {tokens.shape} and {batch.shape}")
    named = {"arrival_rate_rps": rate, "output_tokens": output_tokens, "batches": batch, "goodput": tokens}
    for name, value in named.items():
        _check_positive(name, np.asarray(value, dtype=np.float64))
    if (np.diff(batch) <= 0.0).any():
        raise ValueError(f"batches must be increasing, got {batch.tolist()}")
    if not 0.0 <= prefill_s < math.inf:
        raise ValueError(f"prefill_s must be >= 0 and finite, got {prefill_s!r}")
    demand = rate[..., np.newaxis] * (output_tokens * batch / tokens + prefill_s)
    excess = demand - batch
    keeps_up = excess <= 0.0
    at = keeps_up.argmax(axis=-1)[..., np.newaxis]
    before = np.maximum(at - 1, 0)
    high, low = (np.take_along_axis(excess, one, axis=-1)[..., 0] for one in (before, at))
    within = np.divide(high, high - low, out=np.zeros_like(high), where=high > low)
    at, before = at[..., 0], before[..., 0]
    found = np.where(at == 0, demand[..., 0], batch[before] + within * (batch[at] - batch[before]))
    return np.asarray(np.where(keeps_up.any(axis=-1), found, np.inf))


def _check_positive(name: str, value: Floats) -> None:
    wrong = ~((value > 0.0) & np.isfinite(value))
    if wrong.any():
        raise ValueError(f"{name} must be positive and finite, got {float(value[wrong].flat[0])!r}")

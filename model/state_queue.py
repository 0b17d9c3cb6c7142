r"""Continuous batching as a queue: B requests in service share an engine and leave at the total rate mu_B, B = 1..Bmax.

Requests beyond Bmax wait, first come first served, in a room of q places (infinite, or finite with blocking). Arrivals
and departures are Markov: M/M(n)/1/K with K = Bmax + q (Ramani and Tantawi, llm-inferno/queue-analysis, gives the means
for a finite room; the law of the wait and the infinite room are ours, and equal M/M/c when mu_B = B mu).

.. math::
    \pi_{j+1} = \pi_j (\lambda / \mu_{\min(j+1, B_{max})})^{1/f}, \quad r = (\lambda / \mu_{B_{max}})^{1/f}, \quad
    P(W > t \mid W > 0) = e^{-\mu_{B_{max}} (1 - r) t} \text{ (infinite room)}

f = 1 is the Markov queue. f = (I + cs2) / 2 corrects for arrivals that are not Poisson, I their index of dispersion of
counts at `relaxation_time`: the stationary law of a diffusion with drift lambda - mu_B and variance I lambda + cs2 mu_B
is the Markov one to the power 1 / f. One parameter widens the occupancy, raises P(wait) and stretches the wait, by f in
heavy traffic since mu (1 - r) -> (mu - lambda) / f. Stretching the wait alone is not enough: bursts multiply P(wait) by
100 at Bmax 256, rho 0.9, ca2 4, and the mean wait with the Markov P(wait) is then 99 % too small.

Error against the exact law, wherever that has P(wait) >= 0.001, at Bmax 1, 4, 32 (mu_B = B), 64, 256 (concave); renewal
gaps with ca2 0.25 (Erlang), 2, 4 (balanced hyperexponential); ca2 = 1 is exact; cs2 = 1:

====  ============  ============  ========================================================
rho   mean wait     P(wait)       mean occupancy for Bmax >= 32 (its p99: at most 1 off)
====  ============  ============  ========================================================
0.5   -40 to +57 %  -28 to +41 %  +1 to +4 %
0.7   -12 to +25 %  -7 to +22 %   -1 to +3 %
0.9   -2 to +6 %    -4 to +5 %    -0.4 to +1 %
====  ============  ============  ========================================================

With a finite room, rho 0.9 and 1.1 and the same gaps at Bmax 4, 32, 64: blocking -1 to +16 % where it is >= 0.0001; the
mean wait -8 to +8 % with 32 places or more, down to -30 % with 4.

Out of range: P(wait) < 0.001 with ca2 != 1 (orders of magnitude); the mean occupancy with Bmax <= 4 (up to 30 % at rho
0.5); rates that drift more slowly than `relaxation_time`, which shows as an IDC still growing there. Switching between
0.7 and 1.3 lambda, with Bmax from 1 to 256 and rho 0.9, the mean wait is 3 % too large to 19 % too small when ten times
faster, 41 to 83 % too small when equal and 91 to 99 % when ten times slower: split such a trace into windows of steady
rate and mix the results.

Service is exponential. While B < Bmax the engine is shared and the law of the lengths matters little (processor sharing
is insensitive: cs2 = 1); when full, the variability of short, equal requests is overstated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.queueing import Array, exponential_quantile, non_negative, positive, probability, whole

_NEWTON_STEPS = 100
_SERIES_BELOW = 0.1
"""|x| under which 1 / (e^x - 1) - 1 / x is summed as a series; the first term left out is then below 1e-16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateQueue:
    """Steady state of many queues at once; every field but `occupancy` has the shape of the systems.

    Little's law ties the means: mean_number = throughput_rps (wait_mean_s + service_mean_s). An unstable queue
    (infinite room, lambda >= mu_Bmax) has its batch always full, p_wait 1, infinite wait, and completes mu_Bmax.
    """

    arrival_rate_rps: Array
    capacity_rps: Array
    """mu_Bmax, completions per second of a full batch. [1/s]"""
    caps: NDArray[np.int64]
    """Bmax, most requests in service."""
    room: Array
    """q, places to wait; ``inf`` allowed."""
    ratio: Array
    """r, geometric ratio of the number waiting. [-]"""
    occupancy: Array
    """P(B in service) along the last axis, B = 0..; computed in logarithms, 0 beyond the cap of a system. [-]"""
    p_wait: Array
    """Probability that an accepted arrival waits. [-]"""
    blocking: Array
    """Probability that an arrival is refused. [-]"""
    throughput_rps: Array
    utilisation: Array
    """Throughput over capacity, <= 1. [-]"""
    mean_in_service: Array
    """X, mean of B over time."""
    mean_number: Array
    """N, mean number in service and waiting."""
    service_mean_s: Array
    """Mean time in service, X / throughput; 1 / mu_1 for an idle queue. [s]"""
    wait_mean_s: Array

    @property
    def wait_decay_rps(self) -> Array:
        """Decay of P(W > t) with infinite room: mu_Bmax (1 - r), mu_Bmax - lambda if f = 1, 0 if unstable. [1/s]"""
        return self.capacity_rps * np.maximum(1.0 - self.ratio, 0.0)


def state_queue(
    arrival_rate_rps: ArrayLike,
    service_rate_rps: ArrayLike,
    *,
    caps: ArrayLike | None = None,
    room: ArrayLike = np.inf,
    burst: ArrayLike = 1.0,
) -> StateQueue:
    """Solve the queues of the module docstring.

    Parameters
    ----------
    arrival_rate_rps : lambda, shape of the systems. [1/s]
    service_rate_rps : mu_B for B = 1.. along the last axis; its other axes broadcast with the systems, so that
        candidates that differ only in cap or load share one row. [1/s]
    caps : Bmax of each system, at most the length of the last axis, which is the default.
    room : q, places to wait, whole or ``inf``; 0 loses every arrival that finds the batch full.
    burst : f, from `burst_factor`; 1 for Poisson arrivals. [-]

    Notes
    -----
    Accurate to about 1e-14 for Bmax around 50 and 1e-11 for 4096: sums of Bmax logarithms.
    """
    mu = positive("service_rate_rps", service_rate_rps)
    if mu.ndim == 0:
        raise ValueError("service_rate_rps must have a last axis B = 1..Bmax, got a single number")
    lam, f = non_negative("arrival_rate_rps", arrival_rate_rps), positive("burst", burst)
    cap = whole("caps", mu.shape[-1] if caps is None else caps)
    if np.any(cap > mu.shape[-1]):
        raise ValueError(f"caps must be <= {mu.shape[-1]}, the states of service_rate_rps, got {int(cap.max())}")
    q = non_negative("room", room)
    if np.any(q != np.floor(q)):
        raise ValueError(f"room must be whole or inf, got {q[q != np.floor(q)].flat[0]}")
    shape = np.broadcast_shapes(lam.shape, mu.shape[:-1], cap.shape, q.shape, f.shape)
    lam, q, f = (np.broadcast_to(a, shape) for a in (lam, q, f))
    cap = np.broadcast_to(cap, shape)
    capacity = np.take_along_axis(np.broadcast_to(mu, (*shape, mu.shape[-1])), cap[..., None] - 1, axis=-1)[..., 0]
    with np.errstate(divide="ignore"):
        log_ratio = (np.log(lam) - np.log(capacity)) / f
    return _solve(lam, mu, capacity, cap, q, f, log_ratio)


def _solve(
    lam: Array, mu: Array, capacity: Array, cap: NDArray[np.int64], q: Array, f: Array, log_ratio: Array
) -> StateQueue:
    unstable = np.isinf(q) & (log_ratio >= 0.0)
    x = -np.where(unstable, -1.0, log_ratio)  # ratio e^{-x}; an unstable queue is overwritten below
    occupancy, below, log_at_cap = _occupancy(lam, mu, cap, f, _log_geometric_sum(x, q))
    waiting = np.exp(log_at_cap + _log_geometric_sum(x, q - 1.0))  # batch full and a place free
    accepted = below + waiting
    p_wait = waiting / accepted
    refused = np.where(np.isinf(q), 0.0, np.exp(log_at_cap - _times(q, x))) * _refusal_odds(log_ratio, f)
    states = np.arange(occupancy.shape[-1])
    if np.any(unstable):
        occupancy = np.where(unstable[..., None], states == cap[..., None], occupancy)
    in_service = (occupancy * states).sum(axis=-1)  # a matrix product's digits depend on the rows beside
    throughput = np.where(unstable, capacity, lam * accepted / (accepted + refused))
    busy = throughput > 0.0
    wait = np.where(unstable, np.inf, p_wait * (1.0 + _geometric_mean(x, q - 1.0)) / capacity)
    return StateQueue(
        arrival_rate_rps=lam,
        capacity_rps=capacity,
        caps=cap,
        room=q,
        ratio=np.exp(log_ratio),
        occupancy=occupancy,
        p_wait=np.where(unstable, 1.0, p_wait),
        blocking=refused / (accepted + refused),
        throughput_rps=throughput,
        utilisation=throughput / capacity,
        mean_in_service=in_service,
        mean_number=in_service + np.where(busy, throughput * wait, 0.0),
        # a request alone is served at mu_1
        service_mean_s=np.where(busy, in_service / np.where(busy, throughput, 1.0), 1.0 / mu[..., 0]),
        wait_mean_s=wait,
    )


def _occupancy(lam: Array, mu: Array, cap: NDArray[np.int64], f: Array, log_room: Array) -> tuple[Array, Array, Array]:
    """P(B in service) with the room folded into B = Bmax, P(B < Bmax), and the logarithm of pi_Bmax alone."""
    log_mu = np.log(mu)
    reference = log_mu[..., -1:]  # dimensionless sums: the same digits in any unit of time
    log_rates = np.cumsum(np.concatenate((np.zeros_like(reference), log_mu - reference), axis=-1), axis=-1)
    states = np.arange(mu.shape[-1] + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weight = states * (np.log(lam)[..., None] - reference)
    log_weight[..., 0] = 0.0  # where lambda = 0 the product above is 0 * -inf
    log_weight -= log_rates
    log_weight /= f[..., None]
    at_cap = np.take_along_axis(log_weight, cap[..., None], axis=-1)
    np.copyto(log_weight, -np.inf, where=states > cap[..., None])
    np.put_along_axis(log_weight, cap[..., None], at_cap + log_room[..., None], axis=-1)
    peak = log_weight.max(axis=-1, keepdims=True)
    log_weight -= peak
    weight = np.exp(log_weight, out=log_weight)
    full = np.take_along_axis(weight, cap[..., None], axis=-1)
    np.put_along_axis(weight, cap[..., None], 0.0, axis=-1)
    below = weight.sum(axis=-1, keepdims=True)  # summed apart: under overload 1 - P(full) would lose its digits
    np.put_along_axis(weight, cap[..., None], full, axis=-1)
    total = below + full
    weight /= total
    return weight, (below / total)[..., 0], (at_cap - peak - np.log(total))[..., 0]


def _refusal_odds(log_ratio: Array, f: Array) -> Array:
    """(rho - 1) / (r - 1), rho = r^f: how much likelier bursts meet a full room than the law over time says.

    Raised to 1 / f the chain no longer conserves requests; with these odds it does under overload, so that throughput
    stays below mu_Bmax. They tend to f at rho = 1, the loss of a reflected diffusion.
    """
    level = log_ratio == 0.0
    with np.errstate(over="ignore"):
        return np.where(level, f, np.expm1(f * log_ratio) / np.where(level, 1.0, np.expm1(log_ratio)))


def _times(count: Array, x: Array) -> Array:
    """count * x with 0 * inf = 0."""
    return np.asarray(count * np.where(count == 0.0, 0.0, x))


def _log_geometric_sum(x: Array, last: Array) -> Array:
    r"""ln sum_{i=0}^{last} e^{-x i} for x of either sign; the largest term is taken out first. -inf where last = -1."""
    size = np.abs(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.where(size > 0.0, np.expm1(-_times(last + 1.0, size)) / np.expm1(-size), last + 1.0)
        return np.where(x < 0.0, -_times(last, x), 0.0) + np.log(total)


def _geometric_mean(x: Array, last: Array) -> Array:
    r"""Mean of a geometric law of ratio e^{-x} cut to 0..last: 1 / (e^x - 1) - n / (e^{n x} - 1), n = last + 1.

    Near x = 0 both terms blow up; 1 / x taken out of each leaves h(x) - n h(n x) with h(x) = 1 / (e^x - 1) - 1 / x.
    """
    n = np.where(last > 0.0, last + 1.0, 1.0)
    cut = np.isfinite(n)
    n = np.where(cut, n, 1.0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        direct = 1.0 / np.expm1(x) - np.where(cut, n / np.expm1(n * x), 0.0)
    return np.where(cut & (np.abs(x) < _SERIES_BELOW), _smooth(x) - n * _smooth(n * x), direct)


def _smooth(x: Array) -> Array:
    """h(x) = 1 / (e^x - 1) - 1 / x, finite at 0."""
    small = np.abs(x) < _SERIES_BELOW
    y, z = np.where(small, x, 0.0), np.where(small, 1.0, x)
    series = -0.5 + y / 12.0 - y**3 / 720.0 + y**5 / 30240.0 - y**7 / 1209600.0
    with np.errstate(over="ignore"):
        return np.where(small, series, 1.0 / np.expm1(z) - 1.0 / z)


def wait_tail(queue: StateQueue, t_s: ArrayLike) -> Array:
    r"""P(W > t) of an accepted arrival; `t_s` broadcasts with the systems. [-]

    .. math::
        \text{infinite room:} \quad & p_{wait} e^{-\mu (1 - r) t}, \qquad \mu = \mu_{Bmax} \\
        \text{room } q: \quad & p_{wait} \sum_{j=0}^{q-1} w_j \sum_{i=0}^{j} e^{-\mu t} \frac{(\mu t)^i}{i!},
        \qquad w_j = r^j / \sum_{k=0}^{q-1} r^k

    An accepted arrival that finds the batch full and j waiting lets j + 1 departures pass.
    """
    t = non_negative("t_s", t_s)
    endless = queue.p_wait * np.exp(-queue.wait_decay_rps * t)
    if np.all(np.isinf(queue.room)):
        return np.asarray(endless)
    return np.where(np.isinf(queue.room), endless, _erlang_mixture(queue, t)[0])


def _erlang_mixture(queue: StateQueue, t: Array) -> tuple[Array, Array]:
    """Tail and density [1/s] of the wait with a finite room, term by term: all are positive, no digits cancel."""
    q = np.where(np.isinf(queue.room), 0.0, queue.room)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(queue.ratio)
        log_mt = np.log(queue.capacity_rps * t)
    log_share = -_log_geometric_sum(-log_ratio, q - 1.0)
    log_poisson = -queue.capacity_rps * t
    cdf, tail, density = (np.zeros(log_mt.shape) for _ in range(3))
    for j in range(int(q.max(initial=0.0))):
        if j > 0:
            log_poisson = log_poisson + (log_mt - np.log(j))
            log_share = log_share + log_ratio
        poisson = np.exp(log_poisson)
        share = np.where(j < q, np.exp(log_share), 0.0)
        cdf += poisson
        tail += share * cdf
        density += share * poisson
    return queue.p_wait * tail, queue.p_wait * queue.capacity_rps * density


def wait_quantile(queue: StateQueue, p: ArrayLike) -> Array:
    """Smallest t with P(W <= t) >= p for an accepted arrival, 0 where 1 - p >= p_wait, ``inf`` where unstable. [s]

    With a finite room by Newton on the logarithm of the tail: a mixture of Erlangs with truncated geometric weights is
    log-concave, so every iterate after the first lies on the safe side of the root.
    """
    p = probability("p", p)
    endless = exponential_quantile(p, queue.p_wait, queue.wait_decay_rps)
    if np.all(np.isinf(queue.room)):
        return endless
    waits = (queue.p_wait > 1.0 - p) & np.isfinite(queue.room)
    t = np.where(waits, queue.wait_mean_s / np.where(waits, queue.p_wait, 1.0), 0.0)
    for _ in range(_NEWTON_STEPS):
        tail, density = _erlang_mixture(queue, t)
        hazard = np.where(waits, density, 1.0) / np.where(waits, tail, 1.0)
        step = np.where(waits, np.log(np.where(waits, tail / (1.0 - p), 1.0)) / hazard, 0.0)
        t, before = np.maximum(t + step, 0.0), t
        if np.all(np.abs(t - before) <= 1e-13 * t):
            break
    return np.where(np.isinf(queue.room), endless, t)


def occupancy_quantile(queue: StateQueue, p: ArrayLike, *, seen_by: str = "time") -> NDArray[np.int64]:
    """Smallest B with P(batch <= B) >= p; `p` broadcasts with the systems, `seen_by` as in `occupancy_mean`."""
    p = probability("p", p)
    cdf = np.cumsum(_seen(queue, seen_by), axis=-1)
    below = np.sum(cdf < p[..., None], axis=-1, dtype=np.int64)
    return np.asarray(np.minimum(below, queue.caps))  # a sum of probabilities may stop one rounding short of p


def occupancy_mean(queue: StateQueue, *, seen_by: str = "time") -> Array:
    """Mean batch over time or, seen by "request", over the time spent in service: B weighs B, the pace of tokens."""
    shares = _seen(queue, seen_by)
    return np.asarray(shares @ np.arange(shares.shape[-1]))


def _seen(queue: StateQueue, seen_by: str) -> Array:
    if seen_by == "time":
        return queue.occupancy
    if seen_by != "request":
        raise ValueError(f"seen_by must be time or request, got {seen_by!r}")
    states = np.arange(queue.occupancy.shape[-1])
    busy = (queue.mean_in_service > 0.0)[..., None]
    weighted = states * queue.occupancy / np.where(busy, queue.mean_in_service[..., None], 1.0)
    return np.where(busy, weighted, states == 1)  # a request that meets nobody runs in a batch of one


def relaxation_time(arrival_rate_rps: ArrayLike, capacity_rps: ArrayLike, service_s: ArrayLike) -> Array:
    r"""How long bursts must last to be felt: the longer of one residence in service and the memory of the queue. [s]

    .. math:: \tau = \max\{S, 1 / (\mu_{Bmax} (1 - \rho)^2)\}

    The second is the time scale at which the workload of a G/G/1 queue peaks (Whitt and You, Oper. Res. 66, 2018, with
    a factor of order one); the first counts while the batch is not full. ``inf`` where unstable.
    """
    capacity = positive("capacity_rps", capacity_rps)
    idle = np.maximum(1.0 - non_negative("arrival_rate_rps", arrival_rate_rps) / capacity, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(non_negative("service_s", service_s), 1.0 / (capacity * idle**2)))


def interpolate_idc(idc: Sequence[tuple[float, float]], window_s: ArrayLike) -> Array:
    """IDC at `window_s` from (window [s], index) pairs: linear in the logarithm of the window, constant at the ends."""
    if not idc:
        raise ValueError("idc must have at least one (window, index) pair, got none")
    windows, values = np.asarray(sorted(idc), dtype=np.float64).T
    with np.errstate(divide="ignore"):
        log_window = np.log(non_negative("window_s", window_s))
    return np.asarray(np.interp(log_window, np.log(positive("idc windows", windows)), non_negative("idc", values)))


def burst_factor(idc: ArrayLike, cs2: ArrayLike) -> Array:
    r"""f = (I + cs2) / 2: variance of what enters and leaves, relative to the Markov queue. [-]

    I is `interpolate_idc` at `relaxation_time` (ca2 for renewal arrivals in heavy traffic), cs2 = 1 for a shared
    engine. Errors of the queue built with it: module docstring.
    """
    return np.asarray((non_negative("idc", idc) + non_negative("cs2", cs2)) / 2.0)

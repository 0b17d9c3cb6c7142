r"""Closed-form queues: from arrival rate, service law and servers to the wait of a request.

Symbols: lambda = ``arrival_rate_rps`` [1/s]; S = mean service, ``service_s`` [s], D when it is deterministic; mu = 1 /
S; c = ``servers``; a = lambda S = ``offered_load`` [Erlang]; rho = a / c = ``utilisation``; W wait before service [s];
t argument of the tail P(W > t) [s]; ca2, cs2 squared coefficients of variation of gaps and of service.

Assumptions: first come first served, unlimited waiting room, steady state. An unstable queue (rho >= 1) is not an
error: its mean and quantiles are ``inf``, its tail and probability of waiting 1, its decay 0. Every argument may be an
array and the result has the broadcast shape. ``servecast.model.state_queue`` holds the queue whose rate depends on the
batch.

Sources: Erlang (1917); Crommelin (1932); Cosmetatos (1975); Allen and Cunneen; Asmussen, *Applied Probability and
Queues*, chapter XIII (Cramer-Lundberg); Inoue, arXiv 1912.06322. Errors stated here are against simulation or exact
laws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CROMMELIN_LIMIT = 3
"""Services beyond which Cramer-Lundberg is within 0.06 % of M/D/1; Crommelin's alternating sum loses digits later."""
_NEWTON_STEPS = 100


def non_negative(name: str, value: ArrayLike) -> Array:
    """`value` as float64, NaN and negative numbers refused."""
    return _checked(name, value, ">= 0", lambda x: x >= 0.0)


def positive(name: str, value: ArrayLike) -> Array:
    """`value` as float64, NaN, zero and negative numbers refused."""
    return _checked(name, value, "> 0", lambda x: x > 0.0)


def probability(name: str, value: ArrayLike) -> Array:
    """`value` as float64, refused unless strictly between 0 and 1."""
    return _checked(name, value, "between 0 and 1", lambda x: (x > 0.0) & (x < 1.0))


def whole(name: str, value: ArrayLike) -> NDArray[np.int64]:
    """`value` as int64, fractions and numbers below 1 refused."""
    return _checked(name, value, "a whole number >= 1", lambda x: (x >= 1) & (x % 1.0 == 0)).astype(np.int64)


def _checked(name: str, value: ArrayLike, rule: str, good: Callable[[Array], NDArray[np.bool_]]) -> Array:
    array = np.asarray(value, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        bad = ~good(array)
    if np.any(bad):
        raise ValueError(f"{name} must be {rule}, got {array[bad].flat[0]}")
    return array


# M/M/c


def erlang_b(servers: ArrayLike, offered_load: ArrayLike) -> Array:
    r"""Share of arrivals lost by M/G/c/c. [-]

    .. math:: B_0 = 1, \quad B_k = a B_{k-1} / (k + a B_{k-1})
    """
    c, a = np.broadcast_arrays(whole("servers", servers), non_negative("offered_load", offered_load))
    loss = np.ones(c.shape)
    for k in range(1, int(c.max(initial=0)) + 1):
        loss = np.where(k <= c, a * loss / (k + a * loss), loss)
    return loss


def erlang_c(servers: ArrayLike, offered_load: ArrayLike) -> Array:
    r"""Probability that an arrival of M/M/c waits, 1 when unstable. [-]

    .. math:: C = c B_c / (c - a (1 - B_c))
    """
    c, a = np.broadcast_arrays(whole("servers", servers), non_negative("offered_load", offered_load))
    stable = np.where(a < c, a, 0.0)
    loss = erlang_b(c, stable)
    return np.where(a < c, c * loss / (c - stable * (1.0 - loss)), 1.0)


def mmc_wait_mean(arrival_rate_rps: ArrayLike, service_s: ArrayLike, servers: ArrayLike) -> Array:
    """Mean wait of M/M/c, C / (c mu - lambda). [s]"""
    p_wait, spare = _mmc(arrival_rate_rps, service_s, servers)
    with np.errstate(divide="ignore"):
        return np.asarray(p_wait / spare)


def mmc_wait_tail(t_s: ArrayLike, arrival_rate_rps: ArrayLike, service_s: ArrayLike, servers: ArrayLike) -> Array:
    """P(W > t) of M/M/c, C e^{-(c mu - lambda) t}. [-]"""
    p_wait, spare = _mmc(arrival_rate_rps, service_s, servers)
    return np.asarray(p_wait * np.exp(-spare * non_negative("t_s", t_s)))


def mmc_wait_quantile(p: ArrayLike, arrival_rate_rps: ArrayLike, service_s: ArrayLike, servers: ArrayLike) -> Array:
    """Smallest t with P(W <= t) >= p in M/M/c: ln(C / (1 - p)) / (c mu - lambda), 0 where 1 - p >= C. [s]"""
    p_wait, spare = _mmc(arrival_rate_rps, service_s, servers)
    return exponential_quantile(p, p_wait, spare)


def exponential_quantile(p: ArrayLike, constant: ArrayLike, decay: ArrayLike) -> Array:
    """Smallest t >= 0 with constant e^{-decay t} <= 1 - p; ``inf`` where the decay is 0. [s]"""
    with np.errstate(divide="ignore"):
        # log 0 = -inf where nobody waits
        excess = np.log(constant) - np.log1p(-probability("p", p))
        waits = excess > 0.0
        return np.where(waits, np.where(waits, excess, 1.0) / decay, 0.0)


def _mmc(arrival_rate_rps: ArrayLike, service_s: ArrayLike, servers: ArrayLike) -> tuple[Array, Array]:
    """Erlang C and the spare capacity max(c mu - lambda, 0) [1/s]."""
    rate, service = non_negative("arrival_rate_rps", arrival_rate_rps), positive("service_s", service_s)
    spare = np.maximum(np.asarray(servers) / service - rate, 0.0)
    return erlang_c(servers, rate * service), spare


# M/G/1


def mg1_wait_mean(arrival_rate_rps: ArrayLike, m1_s: ArrayLike, m2_s2: ArrayLike) -> Array:
    r"""Mean wait of M/G/1 from the service moments m1 = E[S], m2 = E[S^2] (Pollaczek-Khinchine). [s]

    .. math:: E[W] = \lambda E[S^2] / (2 (1 - \rho))
    """
    rate, m2 = non_negative("arrival_rate_rps", arrival_rate_rps), positive("m2_s2", m2_s2)
    idle = 1.0 - rate * positive("m1_s", m1_s)
    with np.errstate(divide="ignore"):
        return np.asarray(rate * m2 / (2.0 * np.maximum(idle, 0.0)))


def mg1_wait_second_moment(arrival_rate_rps: ArrayLike, m1_s: ArrayLike, m2_s2: ArrayLike, m3_s3: ArrayLike) -> Array:
    """E[W^2] = 2 E[W]^2 + lambda E[S^3] / (3 (1 - rho)) of M/G/1 from three service moments (Takacs). [s^2]"""
    rate, m3 = non_negative("arrival_rate_rps", arrival_rate_rps), positive("m3_s3", m3_s3)
    idle = 1.0 - rate * positive("m1_s", m1_s)
    with np.errstate(divide="ignore"):
        return np.asarray(2.0 * mg1_wait_mean(rate, m1_s, m2_s2) ** 2 + rate * m3 / (3.0 * np.maximum(idle, 0.0)))


def md1_decay(utilisation: ArrayLike) -> Array:
    r"""x = theta D, decay of the M/D/1 tail per service time: the positive root of rho (e^x - 1) = x. [-]

    Newton on x - ln(1 + x / rho), convex, from an upper bound: e^x - 1 >= x + x^2 / 2 gives x <= 2 (1 - rho) / rho, and
    x -> ln(1 + x / rho) maps upper bounds to smaller ones, finite at light load. 0 where rho >= 1, ``inf`` where rho =
    0.
    """
    rho = non_negative("utilisation", utilisation)
    inside = (rho > 0.0) & (rho < 1.0)
    r = np.where(inside, rho, 0.5)
    x = np.log1p(2.0 * (1.0 - r) / r**2)
    for _ in range(_NEWTON_STEPS):
        step = (x - np.log1p(x / r)) / (1.0 - 1.0 / (r + x))
        x = x - step
        if np.all(np.abs(step) <= 4e-16 * x):
            break
    return np.where(inside, x, np.where(rho > 0.0, 0.0, np.inf))


def md1_wait_tail(t_s: ArrayLike, arrival_rate_rps: ArrayLike, service_s: ArrayLike) -> Array:
    r"""P(W > t) of M/D/1: Crommelin's exact law below 3 D, Cramer-Lundberg beyond (error <= 0.06 %). [-]

    .. math::
        P(W \le t) &= (1 - \rho)
            \sum_{j=0}^{\lfloor t/D \rfloor} \frac{[\lambda (j D - t)]^j}{j!} e^{-\lambda (j D - t)} \\
        P(W > t) &\simeq \frac{1 - \rho}{\rho e^{\theta D} - 1} e^{-\theta t}
    """
    services = non_negative("t_s", t_s) / positive("service_s", service_s)
    rho = non_negative("arrival_rate_rps", arrival_rate_rps) * np.asarray(service_s)
    services, rho = np.broadcast_arrays(services, rho)
    inside = (rho > 0.0) & (rho < 1.0)
    tail = np.where(
        services < CROMMELIN_LIMIT,
        _crommelin_tail(np.minimum(services, CROMMELIN_LIMIT), np.where(inside, rho, 0.5)),
        _md1_asymptote(services, np.where(inside, rho, 0.5)),
    )
    return np.where(inside, tail, np.where(rho > 0.0, 1.0, 0.0))


def _crommelin_tail(services: Array, rho: Array) -> Array:
    cdf = np.zeros(services.shape)
    factorial = 1.0
    for j in range(CROMMELIN_LIMIT):
        factorial *= max(j, 1)
        y = rho * np.maximum(services - j, 0.0)
        cdf += np.where(j <= services, (-y) ** j / factorial * np.exp(y), 0.0)
    # At light load the tail is below the rounding of 1 - P(W <= t), about 1e-16: it is then 0, not a negative number.
    return np.maximum(1.0 - (1.0 - rho) * cdf, 0.0)


def _md1_asymptote(services: Array, rho: Array) -> Array:
    x = md1_decay(rho)
    # rho e^x = rho + x at the root
    return np.asarray((1.0 - rho) / (rho + x - 1.0) * np.exp(-x * services))


class ExponentialTail(NamedTuple):
    """P(W > t) ~ constant e^{-decay t} for large t."""

    decay: Array
    """theta. [1/s]"""
    constant: Array
    """K. [-]"""


def cramer_lundberg(arrival_rate_rps: ArrayLike, service_s: ArrayLike, weights: ArrayLike = 1.0) -> ExponentialTail:
    r"""Tail of M/G/1 for a weighted sample of service times, along the last axis of `service_s` and `weights`.

    .. math:: \lambda (M(\theta) - 1) = \theta, \; K = (1 - \rho) / (\lambda M'(\theta) - 1), \; M = E[e^{\theta S}]

    Newton on ln(1 + theta / lambda) - ln M(theta), concave, from theta <= 2 (1 - rho) / (lambda E[S^2]); the
    logarithms keep the moment generating function from overflowing. Decay 0 and constant 1 where unstable.
    """
    rate, s = positive("arrival_rate_rps", arrival_rate_rps), positive("service_s", service_s)
    w = np.broadcast_to(non_negative("weights", weights), np.broadcast_shapes(np.shape(weights), s.shape))
    w = w / w.sum(axis=-1, keepdims=True)
    m1, m2 = (w * s).sum(axis=-1), (w * s**2).sum(axis=-1)
    stable = rate * m1 < 1.0
    theta = np.where(stable, 2.0 * (1.0 - rate * m1) / (rate * m2), 0.0)
    for _ in range(_NEWTON_STEPS):
        log_mgf, tilted_mean = _log_mgf(theta, s, w)
        slope = np.where(stable, 1.0 / (rate + theta) - tilted_mean, 1.0)
        step = np.where(stable, (np.log1p(theta / rate) - log_mgf) / slope, 0.0)
        theta = theta - step
        if np.all(np.abs(step) <= 4e-16 * theta):
            break
    growth = np.where(
        stable, (rate + theta) * _log_mgf(theta, s, w)[1] - 1.0, 1.0
    )  # lambda M' with M = 1 + theta / lambda
    return ExponentialTail(theta, np.where(stable, (1.0 - rate * m1) / growth, 1.0))


def _log_mgf(theta: Array, s: Array, w: Array) -> tuple[Array, Array]:
    """ln M(theta) and M' / M of a weighted sample."""
    longest = s.max(axis=-1)
    tilted = w * np.exp(theta[..., None] * (s - longest[..., None]))
    total = tilted.sum(axis=-1)
    return theta * longest + np.log(total), (tilted * s).sum(axis=-1) / total


# G/G/c


def allen_cunneen_wait_mean(
    arrival_rate_rps: ArrayLike, service_s: ArrayLike, servers: ArrayLike, ca2: ArrayLike, cs2: ArrayLike
) -> Array:
    r"""Mean wait of G/G/c from two moments. [s]

    .. math:: E[W] = E[W_{M/M/c}] (c_a^2 + c_s^2) / 2

    Exact for M/M/c and M/G/1. M/D/c at rho 0.6 to 0.9: -9 to -1.5 % (c = 4), -24 to -4 % (c = 16). Gamma gaps with c =
    4 and rho 0.7: +42 to +176 % at ca2 = 0.25, -31 to -40 % at ca2 = 4; simulate when ca2 is outside 0.5 to 2 and rho <
    0.9.
    """
    markov = mmc_wait_mean(arrival_rate_rps, service_s, servers)
    return np.asarray(markov * (non_negative("ca2", ca2) + non_negative("cs2", cs2)) / 2.0)


def cosmetatos_mdc_wait_mean(arrival_rate_rps: ArrayLike, service_s: ArrayLike, servers: ArrayLike) -> Array:
    r"""Mean wait of M/D/c, within 1 % for c <= 8 and 2.3 % for c = 16 at rho 0.6 to 0.9. [s]

    .. math:: E[W] = \tfrac12 E[W_{M/M/c}] (1 + \min\{1, (1 - \rho)(c - 1)(\sqrt{4 + 5 c} - 2) / (16 \rho c)\})

    The minimum is ours: at light load the correction grows without bound while M/D/c never waits longer than M/M/c.
    """
    c, load = whole("servers", servers), np.asarray(arrival_rate_rps) * np.asarray(service_s)
    with np.errstate(divide="ignore", invalid="ignore"):
        correction = (c - load) * (c - 1.0) * (np.sqrt(4.0 + 5.0 * c) - 2.0) / (16.0 * load * c)
    correction = np.where((load > 0.0) & (load < c), np.minimum(correction, 1.0), 0.0)
    return np.asarray(0.5 * mmc_wait_mean(arrival_rate_rps, service_s, servers) * (1.0 + correction))


def mdc_decay(servers: ArrayLike, utilisation: ArrayLike) -> Array:
    """theta D of the M/D/c tail: c times that of M/D/1 at rho, exact (cyclic service: an E_c/D/1 per server). [-]"""
    return np.asarray(whole("servers", servers) * md1_decay(utilisation))


def inoue_batch_mean_latency(arrival_rate_rps: ArrayLike, alpha_s: ArrayLike, tau0_s: ArrayLike) -> Array:
    r"""Mean of wait and service when any number is batched and b of them take alpha b + tau0; ``inf`` if unstable. [s]

    .. math::
        \phi_0 &= \frac{\alpha + \tau_0}{2 (1 - \lambda\alpha)}
            \left(1 + 2 \lambda\tau_0 + \frac{1 - \lambda\tau_0}{1 + \lambda\alpha}\right) \\
        \phi_1 &= \frac{3 \tau_0}{2 (1 - \lambda\alpha)} + \frac{\alpha (\lambda\alpha + 2)}{2 (1 - \lambda^2\alpha^2)}

    min(phi0, phi1) bounds the mean from above (Inoue, arXiv 1912.06322) and is used as its value: within 2 % of
    simulation nearly everywhere, at worst +9 % where the two cross.
    """
    rate = non_negative("arrival_rate_rps", arrival_rate_rps)
    alpha, tau0 = positive("alpha_s", alpha_s), non_negative("tau0_s", tau0_s)
    load = rate * alpha
    idle = np.where(load < 1.0, 1.0 - load, 1.0)
    phi0 = (alpha + tau0) / (2.0 * idle) * (1.0 + 2.0 * rate * tau0 + (1.0 - rate * tau0) / (1.0 + load))
    phi1 = 1.5 * tau0 / idle + alpha / 2.0 * (load + 2.0) / (idle * (1.0 + load))
    return np.where(load < 1.0, np.minimum(phi0, phi1), np.inf)

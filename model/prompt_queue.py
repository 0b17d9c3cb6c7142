r"""Prompts between decode steps: how long the step is that serves a request, in three cumulants.

An engine computes all prompts that arrived during one step in the next one, so step lengths form a branching process
with immigration:

.. math:: X' = D + \sum_{i=1}^{N(X)} P_i

D the decode part, P prompts, N(x) the arrivals in x seconds. With w1, w2, w3 the cumulants of prompt work per second,

.. math::
   E[X] = D / (1 - w_1), \quad Var X = w_2 E[X] / (1 - w_1^2), \quad
   \kappa_3 X = (w_3 E[X] + 3 w_1 w_2 Var X) / (1 - w_1^3)

(law of total cumulance). A request arrives at a uniform point of a length-biased step, waits for its end, and is served
in the next, with all that arrived beside it: the time to its first token less its own prompt has the cumulants of
:func:`first_step`. A request of j further tokens lives through j such steps; the first of them also carries what
arrived while its own prompt was computed: :func:`token_pace`. Both are read as shifted gamma laws with these cumulants.

Arrivals are known by their index of dispersion I(t) alone: theta = I - 1 companions are expected around an arrival
beyond the mean rate (Palm), I at the step's length for companions and at the memory of the chain, x / (1 - w1), for its
variance. The third cumulant of counts is taken between that of a renewal process with gamma gaps, I^2, and that of a
negative binomial, I (2 I - 1).

Errors against the simulator and the range: :mod:`servecast.model.attainment`. Ours, no publication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Dispersion = Callable[[Floats], Floats]
"""Index of dispersion at windows [s] of the shape asked for."""

CHAIN_STEPS = 3
"""Fixed-point rounds for the step length at which I is read; the third changes it by less than 1 %."""
FEWEST = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptWork:
    """Moments of one prompt's seconds; arrays broadcast with rates. [s], [s^2], [s^3]"""

    m1: Floats
    m2: Floats
    m3: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChain:
    """Steady state of the step lengths; arrays of one shape."""

    decode_s: Floats
    """D. [s]"""
    rate_rps: Floats
    work: PromptWork
    w1: Floats
    """Share of the time that prompts take, < 1. [-]"""
    w2: Floats
    mean_s: Floats
    variance_s2: Floats
    third_s3: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedGamma:
    """shift + Gamma(shape, scale), an atom at the shift with probability `atom`. [s]"""

    shift: Floats
    shape: Floats
    scale: Floats
    atom: Floats


def step_chain(rate_rps: Floats, work: PromptWork, decode_s: Floats, dispersion: Dispersion) -> StepChain:
    """Solve the recursion of the module docstring; w1 must be below 1. [s]"""
    w1 = rate_rps * work.m1
    mean = decode_s / (1.0 - w1)
    at = mean
    w2 = third = variance = np.zeros_like(mean)
    for _ in range(CHAIN_STEPS):
        theta = dispersion(at / (1.0 - w1)) - 1.0
        w2 = rate_rps * (work.m2 + theta * work.m1**2)
        w3 = rate_rps * (work.m3 + 3.0 * theta * work.m1 * work.m2 + _skew(theta) * work.m1**3)
        variance = np.maximum(w2 * mean / (1.0 - w1**2), FEWEST * mean**2)
        # without prompts the law is a point: its floor has a spread of a millionth, and the skew of shape 4
        third = np.maximum((w3 * mean + 3.0 * w1 * w2 * variance) / (1.0 - w1**3), FEWEST**1.5 * mean**3)
        at = variance / mean + mean
    return StepChain(
        decode_s=decode_s,
        rate_rps=rate_rps,
        work=work,
        w1=w1,
        w2=w2,
        mean_s=mean,
        variance_s2=variance,
        third_s3=third,
    )


def _skew(theta: Floats) -> Floats:
    """kappa_3 N - 1 - 3 theta per arrival, between gamma renewals (theta^2 - theta) and negative binomial counts."""
    return np.where(theta > 0.0, 1.5 * theta**2 - 0.5 * theta, 2.0 * theta**2)


def first_step(chain: StepChain, dispersion: Dispersion) -> tuple[Floats, Floats, Floats]:
    """Cumulants of the time from an arrival to its first token, less its own prompt. [s], [s^2], [s^3]

    A1 to A3 are those of X (U + w1), U the uniform rest of the step met and w1 X the work that arrives during it.
    """
    w1, work, d = chain.w1, chain.work, chain.decode_s
    b1, b2, b3 = _length_biased(chain)
    theta = dispersion(b1) - 1.0
    # companions that came one step earlier have made this step longer (or, with regular gaps, shorter)
    earlier = (dispersion(2.0 * b1) - 1.0 - theta) * work.m1
    excess = np.maximum(b1 - d, FEWEST * d)
    s = np.maximum(1.0 + earlier / excess, 0.0)
    b1, b2, b3 = d + (b1 - d) * s, b2 * s**2, b3 * s**3
    r2 = b2 + b1**2
    r3 = b3 + 3.0 * b1 * b2 + b1**3
    w2 = chain.rate_rps * (work.m2 + theta * work.m1**2)
    w3 = chain.rate_rps * (work.m3 + 3.0 * theta * work.m1 * work.m2 + _skew(theta) * work.m1**3)
    g1, g2, g3 = 0.5 + w1, 1.0 / 3.0 + w1 + w1**2, 0.25 + w1 + 1.5 * w1**2 + w1**3
    a1 = g1 * b1
    a2 = g2 * r2 - a1**2
    a3 = g3 * r3 - 3.0 * a1 * g2 * r2 + 2.0 * a1**3
    mates = _companions(theta, work)
    covariance = g1 * r2 - a1 * b1
    return (
        d + a1 + mates[0],
        a2 + w2 * b1 + mates[1],
        a3 + 3.0 * w2 * covariance + w3 * b1 + mates[2],
    )


def _length_biased(chain: StepChain) -> tuple[Floats, Floats, Floats]:
    """Cumulants of the step that an arrival meets: moments one order up, the fourth from the gamma law."""
    m, v, k3 = chain.mean_s, chain.variance_s2, chain.third_s3
    scale = k3 / (2.0 * v)
    k4 = 6.0 * v * scale**2
    e2 = v + m**2
    e3 = k3 + 3.0 * v * m + m**3
    e4 = k4 + 4.0 * k3 * m + 3.0 * v**2 + 6.0 * v * m**2 + m**4
    b1, r2, r3 = e2 / m, e3 / m, e4 / m
    b2 = r2 - b1**2
    return b1, b2, r3 - 3.0 * b1 * b2 - b1**3


def _companions(theta: Floats, work: PromptWork) -> tuple[Floats, Floats, Floats]:
    """Cumulants of the prompt work of the theta companions beyond the mean rate."""
    c2 = work.m2 - work.m1**2
    c3 = work.m3 - 3.0 * work.m1 * work.m2 + 2.0 * work.m1**3
    spread = theta * (1.0 + theta)
    half = np.where(theta > 0.0, 0.5, 1.0)
    return (
        theta * work.m1,
        theta * c2 + half * spread * work.m1**2,
        theta * c3 + 3.0 * half * spread * c2 * work.m1 + half * spread * (1.0 + 2.0 * theta) * work.m1**3,
    )


def token_pace(
    chain: StepChain, dispersion: Dispersion, tokens_after_first: Floats, batch_sd_s: Floats, correlation: float
) -> ShiftedGamma:
    """Law of a request's time per token over its `tokens_after_first` steps (last axis). [s]

    With no prompt in any of its steps, the atom, it is D. `batch_sd_s` is the standard deviation of D itself over a
    request's stay, `correlation` how far it goes with the prompts (both rise with the same arrivals).
    """
    j = tokens_after_first
    w1, w2, mean, d = (x[..., np.newaxis] for x in (chain.w1, chain.w2, chain.mean_s, chain.decode_s))
    rate = chain.rate_rps[..., np.newaxis]
    m1, m2 = (x[..., np.newaxis] for x in (chain.work.m1, chain.work.m2))
    meets = chain.variance_s2 / chain.mean_s + chain.mean_s
    theta = (dispersion(meets) - 1.0)[..., np.newaxis]
    own = d + m1 + w1 * meets[..., np.newaxis] + theta * m1
    own_variance = m2 - m1**2 + w2 * meets[..., np.newaxis]
    series = (1.0 - w1**j) / (1.0 - w1)
    long = dispersion(j * mean) - 1.0
    per_step = rate * (m2 + long * m1**2) * mean / (1.0 - w1**2)
    total_variance = per_step * (j * (1.0 + w1) - 2.0 * w1 * series) / (1.0 - w1)
    total_variance += np.maximum(w2 * (own - mean) + w1**2 * own_variance, 0.0) * series**2
    total_variance = np.maximum(total_variance, FEWEST * mean**2)
    total = j * mean + w1 * series * (own - mean)
    ratio = total_variance / chain.variance_s2[..., np.newaxis]
    third = chain.third_s3[..., np.newaxis] * ratio**2 / j
    span = own + (j - 1.0) * d
    clusters = dispersion(span) - 1.0
    atom = np.exp(-rate * span * np.where(clusters >= 0.0, 1.0 / (1.0 + np.maximum(clusters, 0.0)), 1.0 - clusters / 2))
    # given that a prompt came: moments of the excess over D, divided by the chance of it
    z1 = np.maximum(total - j * d, FEWEST * d)
    z2 = total_variance + z1**2
    z3 = third + 3.0 * total_variance * z1 + z1**3
    met = np.maximum(1.0 - atom, FEWEST)
    z1, z2, z3 = z1 / met, z2 / met, z3 / met
    variance = np.maximum(z2 - z1**2, FEWEST * z2)
    third = np.maximum(z3 - 3.0 * variance * z1 - z1**3, FEWEST * z3)
    sd = batch_sd_s[..., np.newaxis]
    pooled = variance / j**2 + sd**2 + 2.0 * correlation * sd * np.sqrt(variance) / j
    law = shifted_gamma(d + z1 / j, pooled, third / j**3, least=d - 2.0 * sd)
    return ShiftedGamma(shift=law.shift, shape=law.shape, scale=law.scale, atom=atom)


def shifted_gamma(mean: ArrayLike, variance: ArrayLike, third: ArrayLike, *, least: ArrayLike) -> ShiftedGamma:
    """The law with three cumulants; where it would begin below `least`, the one that begins there with two."""
    c1, c2, c3, low = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (mean, variance, third, least)))
    # regular arrivals can take more from a variance than there is: the law is then as good as a point
    c2 = np.maximum(c2, FEWEST * c1**2)
    skewed = c3 > FEWEST**1.5 * c1**3
    c3 = np.where(skewed, c3, 1.0)
    scale = c3 / (2.0 * c2)
    shape = 4.0 * c2**3 / c3**2
    shift = c1 - shape * scale
    early = ~skewed | (shift < low)
    above = np.maximum(c1 - low, FEWEST * c1)
    return ShiftedGamma(
        shift=np.where(early, c1 - above, shift),
        shape=np.where(early, above**2 / c2, shape),
        scale=np.where(early, c2 / above, scale),
        atom=np.zeros(c1.shape),
    )


def gamma_tail(law: ShiftedGamma, t: Floats) -> Floats:
    """P(T > t); the atom sits at the shift. [-]"""
    after = t > law.shift
    scaled = np.where(after, t - law.shift, 0.0) / law.scale
    return np.where(after, (1.0 - law.atom) * unit_gamma_tail(law.shape, scaled), 1.0)


def unit_gamma_tail(shape: Floats, x: Floats) -> Floats:
    r"""P(Gamma(shape, 1) > x), x >= 0, within 4e-3.

    The cube root is nearly normal (Wilson & Hilferty, PNAS 17, 1931) where the shape is not small; below 2 from there
    by recurrence, Q(k, x) = Q(k + 2, x) - x^k e^{-x} (1 + x / (k + 1)) / \Gamma(k + 1) (A & S 6.5.23). The exact
    function would cost the import of scipy on the planning path.
    """
    small = shape < 2.0
    k = np.where(small, shape, 0.0)
    raised = np.where(small, shape + 2.0, shape)
    ninth = 1.0 / (9.0 * raised)
    tail = normal_tail((np.cbrt(x / raised) - 1.0 + ninth) / np.sqrt(ninth))
    with np.errstate(under="ignore"):
        step = x**k * np.exp(-x) * (1.0 + x / (k + 1.0)) / _gamma_of_one_plus(k)
    return np.where(small, np.clip(tail - step, 0.0, 1.0), tail)


def _gamma_of_one_plus(k: Floats) -> Floats:
    """Gamma(1 + k) for k in [0, 2), to 5e-7 (A & S 6.1.36)."""
    y = np.where(k >= 1.0, k - 1.0, k)
    poly = np.full_like(y, 0.035868343)
    for one in (-0.193527818, 0.482199394, -0.756704078, 0.918206857, -0.897056937, 0.988205891, -0.577191652, 1.0):
        poly = poly * y + one
    return np.where(k >= 1.0, k * poly, poly)


def normal_tail(x: Floats) -> Floats:
    """P(Z > x) by Abramowitz and Stegun 26.2.17, absolute error below 8e-8."""
    t = 1.0 / (1.0 + 0.2316419 * np.abs(x))
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper: Floats = np.exp(-0.5 * np.minimum(x * x, 1400.0)) / np.sqrt(2.0 * np.pi) * poly
    return np.where(x >= 0.0, upper, 1.0 - upper)


def gamma_and_wait_tail(law: ShiftedGamma, t: Floats, p_wait: Floats, decay_rps: Floats) -> Floats:
    r"""P(T + W > t), W independent with an atom 1 - p_wait at 0 and an exponential tail. [-]

    .. math:: P(T + E > t) = P(T > t) + e^{-a y} (1 - a s)^{-k} P(\Gamma(k, s / (1 - a s)) \le y), \qquad y = t - shift

    for a s < 1; a wait that decays faster than the step's own tail adds nothing that is not there already.
    """
    base = gamma_tail(law, t)
    y = np.maximum(t - law.shift, 0.0)
    a_s = decay_rps * law.scale
    matters = (p_wait > 1e-9) & (a_s < 0.98) & (t > law.shift)
    if not matters.any():
        return base
    matters, y, a_s, k, s, a, p = np.broadcast_arrays(matters, y, a_s, law.shape, law.scale, decay_rps, p_wait)
    left = 1.0 - a_s[matters]
    log_factor = -a[matters] * y[matters] - k[matters] * np.log(left)
    extra = np.zeros(matters.shape)
    part = 1.0 - unit_gamma_tail(k[matters], y[matters] * left / s[matters])
    with np.errstate(over="ignore"):
        extra[matters] = p[matters] * np.where(part > 0.0, np.exp(np.minimum(log_factor, 700.0)) * part, 0.0)
    return np.minimum(base + extra, 1.0)

r"""Acceptance of drafted tokens: how many tokens one verification step yields, and what that makes of a request.

Symbols: alpha acceptance probability of one drafted token [-]; gamma, K draft length [tokens]; P_j = ``survival``,
probability that the first j drafts are all accepted, unconditional [-]; a_j = P_j / P_{j-1} conditional acceptance [-];
N tokens of one step, the target's own token included, 1 <= N <= K + 1; mu = ``mean`` = E[N], v = ``variance`` = Var[N];
c draft step over target step [-]; m tokens a request still has to emit; T = ``step_s`` seconds of one step.

.. math::
   E[N] = 1 + \sum_{j \le K} P_j, \qquad P(N = m) = P_{m-1} - P_m \; (P_0 = 1, P_{K+1} = 0)

Positions run along the last axis, j = 1..K. Engines log P_j, drafters' confidences are a_j; accepted over drafted is
neither, it is (E[N] - 1) / K.

Assumptions: steps are independent of each other. P_j belongs to the K it was measured at: where hard tokens follow each
other a longer draft starts at harder tokens, so P of a long draft underestimates a short one (``two_state_survival``
shows by how much; on replayed n-gram drafts, K = 7 for K <= 5, up to 18 % of E[N]).

Sources: Leviathan et al., arXiv 2211.17192 (the i.i.d. chain); the law over positions, the two-state chain and the
law of a request are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_HALVINGS = 60
"""Bisections of [0, 1]; 53 reach the spacing of doubles below 1."""
_ROUNDING = 1e-12
"""Relative gain below which a longer draft is a tie: the closed forms round at about 1e-15."""


def within(name: str, value: ArrayLike, low: float, high: float = np.inf) -> Floats:
    """`value` as float64, refused unless finite and from `low` to `high`."""
    array = np.asarray(value, dtype=np.float64)
    good = np.isfinite(array) & (array >= low) & (array <= high)
    if not np.all(good):
        rule = f"finite and >= {low:g}" if np.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {rule}, got {array[~good].flat[0]}")
    return array


def _whole(name: str, value: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(value, dtype=np.float64)
    good = np.isfinite(array) & (array >= 0.0) & (array == np.floor(array))
    if not np.all(good):
        raise ValueError(f"{name} must be a whole number >= 0, got {array[~good].flat[0]:g}")
    return array.astype(np.int64)


# The i.i.d. chain


def tokens_per_step(alpha: ArrayLike, gamma: ArrayLike) -> Floats:
    r"""Mean tokens of one verification step, the target's own token included, in [1, gamma + 1]. [tokens]

    .. math:: E[N] = (1 - \alpha^{\gamma + 1}) / (1 - \alpha)        (Leviathan et al., eq. 1)

    Parameters
    ----------
    alpha : in [0, 1]. [-]
    gamma : draft length, >= 0, not necessarily whole. [tokens]

    >>> tokens_per_step(0.8, [0, 4])
    array([1.    , 3.3616])
    """
    a, k = within("alpha", alpha, 0.0, 1.0), within("gamma", gamma, 0.0)
    rejected = 1.0 - a
    with np.errstate(divide="ignore", invalid="ignore"):
        # expm1 and log1p keep the digits that 1 - alpha^(gamma + 1) loses near 1
        tokens = -np.expm1((k + 1.0) * np.log1p(-rejected)) / rejected
    # at length 0 the quotient is 1 but for rounding, and a curve must start at 1 exactly
    return np.where((rejected > 0.0) & (k > 0.0), tokens, k + 1.0)


def walltime_speedup(alpha: ArrayLike, gamma: ArrayLike, c: ArrayLike) -> Floats:
    """Decode speed over that without drafts, E[N] / (gamma c + 1) (Leviathan et al., theorem 3.8). [-]

    Verifying gamma + 1 tokens is taken to cost one plain step: true while the target is memory bound, at small batch.
    """
    return np.asarray(tokens_per_step(alpha, gamma) / (within("gamma", gamma, 0.0) * within("c", c, 0.0) + 1.0))


def operations_factor(alpha: ArrayLike, gamma: ArrayLike, c_hat: ArrayLike) -> Floats:
    """Operations per emitted token over those without drafts (Leviathan et al., theorem 3.11). [-]

    c_hat : operations per token of the draft model over the target's. [-]
    """
    k = within("gamma", gamma, 0.0)
    return np.asarray((k * within("c_hat", c_hat, 0.0) + k + 1.0) / tokens_per_step(alpha, k))


def optimal_gamma(alpha: ArrayLike, c: ArrayLike, *, max_gamma: int = 40) -> NDArray[np.int64]:
    r"""Draft length in 0..max_gamma of the largest `walltime_speedup`, the shorter of equals; 0 where alpha <= c.

    One draft more pays iff :math:`\alpha^{\gamma+1} (1 + \gamma c) > c\, E[N]`. Left minus right falls with gamma (by
    :math:`\alpha^{\gamma+1} (1 - \alpha)(1 + (\gamma + 1) c)`), so the optimum is the number of lengths that it holds
    for.

    >>> optimal_gamma([0.5, 0.8], 0.1)
    array([2, 6])
    """
    longest = int(_whole("max_gamma", max_gamma))
    a, cost = np.broadcast_arrays(within("alpha", alpha, 0.0, 1.0), within("c", c, 0.0))
    best = np.zeros(a.shape, dtype=np.int64)
    for gamma in range(longest):
        best += a ** (gamma + 1) * (1.0 + gamma * cost) > cost * tokens_per_step(a, gamma) * (1.0 + _ROUNDING)
    return best


def alpha_from_tokens_per_step(tokens: ArrayLike, gamma: ArrayLike) -> Floats:
    """alpha whose `tokens_per_step` at `gamma` > 0 is `tokens`, by bisection: the map is increasing. [-]

    >>> alpha_from_tokens_per_step(3.3616, 4).round(6)
    np.float64(0.8)
    """
    n, k = np.broadcast_arrays(np.asarray(tokens, dtype=np.float64), within("gamma", gamma, 0.0))
    if np.any(k == 0.0):
        raise ValueError("gamma must be > 0, got 0")
    bad = ~((n >= 1.0) & (n <= k + 1.0))
    if np.any(bad):
        raise ValueError(f"tokens must be in [1, gamma + 1], got {n[bad][0]} at gamma {k[bad][0]:g}")
    low, high = np.zeros(n.shape), np.ones(n.shape)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = tokens_per_step(middle, k) < n
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(n == k + 1.0, 1.0, low)


# Acceptance by position


def check_survival(survival: ArrayLike) -> Floats:
    """P_1..P_K along the last axis as float64; refused unless in [0, 1] and non-increasing. Positions count from 1."""
    p = np.asarray(survival, dtype=np.float64)
    if p.ndim == 0:
        raise ValueError(f"survival must have an axis of positions, got {p}")
    outside = np.argwhere(~((p >= 0.0) & (p <= 1.0)))
    if outside.size:
        at = tuple(outside[0])
        raise ValueError(f"survival must be in [0, 1], got {p[at]} at position {at[-1] + 1}")
    rises = np.argwhere(np.diff(p, axis=-1) > 0.0)
    if rises.size:
        at = tuple(rises[0])
        after = p[(*at[:-1], at[-1] + 1)]
        raise ValueError(f"survival must not increase, got {after} after {p[at]} at position {at[-1] + 2}")
    return p


def survival_from_conditional(a: ArrayLike) -> Floats:
    """P_j = a_1 ... a_j from conditional rates along the last axis. [-]

    >>> survival_from_conditional([0.9, 0.5])
    array([0.9 , 0.45])
    """
    return np.asarray(np.cumprod(within("conditional acceptance", np.atleast_1d(a), 0.0, 1.0), axis=-1))


def conditional_from_survival(survival: ArrayLike) -> Floats:
    """a_j = P_j / P_{j-1}, P_0 = 1; 0 once nothing survives. [-]"""
    p = check_survival(survival)
    before = np.concatenate([np.ones((*p.shape[:-1], 1)), p], axis=-1)[..., :-1]
    return np.asarray(np.divide(p, before, out=np.zeros_like(p), where=before > 0.0))


def mean_acceptance_length(survival: ArrayLike) -> Floats:
    """E[N] = 1 + sum of P_j. [tokens]"""
    return np.asarray(1.0 + check_survival(survival).sum(axis=-1))


def accepted_distribution(survival: ArrayLike) -> Floats:
    """P(N = m) along the last axis, m = 1..K + 1. [-]

    >>> accepted_distribution([0.75, 0.5])
    array([0.25, 0.25, 0.5 ])
    """
    p = check_survival(survival)
    edge = (*p.shape[:-1], 1)
    return -np.diff(np.concatenate([np.ones(edge), p, np.zeros(edge)], axis=-1), axis=-1)


def acceptance_variance(survival: ArrayLike) -> Floats:
    r"""Var[N], equal to :math:`\sum_j (2 j - 1) P_j - (\sum_j P_j)^2` but never below 0. [tokens^2]"""
    law = accepted_distribution(survival)
    tokens = np.arange(1.0, law.shape[-1] + 1.0)
    mean = mean_acceptance_length(survival)
    return np.asarray((law * (tokens - mean[..., None]) ** 2).sum(axis=-1))


# Forms of the curve


def depth_decay_survival(a: ArrayLike, r: ArrayLike, gamma: int) -> Floats:
    """P_1..P_gamma of conditional rates a r^(j-1), both in [0, 1]: heads run beyond the depth they were trained for.

    The result has the broadcast shape of `a` and `r` and an axis of positions. [-]
    """
    positions = np.arange(int(_whole("gamma", gamma)))
    first, ratio = np.broadcast_arrays(within("a", a, 0.0, 1.0), within("r", r, 0.0, 1.0))
    return survival_from_conditional(first[..., None] * ratio[..., None] ** positions)


def mixture_tokens_per_step(w: ArrayLike, a1: ArrayLike, a0: ArrayLike, gamma: ArrayLike) -> Floats:
    """E[N] when a share `w` of the steps accepts with probability `a1`, the others with `a0`. [tokens]

    Rates a_j then rise with j, as where a draft copies a passage or does not.
    """
    share = within("w", w, 0.0, 1.0)
    return np.asarray(share * tokens_per_step(a1, gamma) + (1.0 - share) * tokens_per_step(a0, gamma))


def synthetic_survival(mean_length: ArrayLike, gamma: int) -> Floats:
    """P_1..P_gamma that engines make of a forced E[N]: whole positions, one fraction f, zeros. [-]

    Of all laws with that mean it has the least variance, f (1 - f): far below a real drafter's, so that it serves to
    time steps, not to forecast quantiles of requests.

    >>> synthetic_survival(2.5, 3)
    array([1. , 0.5, 0. ])
    """
    longest = int(_whole("gamma", gamma))
    accepted = within("mean_length", mean_length, 1.0, longest + 1.0)[..., None] - 1.0
    # what is left of the mean at each position, at most the whole of it
    return np.minimum(np.maximum(accepted - np.arange(longest), 0.0), 1.0)


# Two kinds of text


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoState:
    """Tokens alternate between two hidden kinds; a draft is accepted by the kind of its token. All in [0, 1]. [-]

    The names label the states; a fit may return the smaller acceptance as `a_easy`.
    """

    a_easy: float
    a_hard: float
    easy_to_hard: float
    """q_EH: probability that the token after an easy one is hard."""
    hard_to_easy: float
    """q_HE."""

    def __post_init__(self) -> None:
        for field in fields(self):
            within(field.name, getattr(self, field.name), 0.0, 1.0)
        moves = self.easy_to_hard + self.hard_to_easy
        # states that never mix, or alternate without end, have no start of their own
        if not 0.0 < moves < 2.0:
            raise ValueError(f"easy_to_hard + hard_to_easy must be between 0 and 2, got {moves:g}")


def two_state_start(parameters: TwoState, gamma: ArrayLike) -> Floats:
    r"""Share of steps whose first draft is at an easy token, for each draft length. [-]

    .. math:: M_K = \sum_{j<K} (D Q)^j (I - D) Q + (D Q)^K Q, \qquad \pi_K = \pi_K M_K

    D holds the acceptances, Q the moves. A rejection after j drafts emits the corrected token there, a full draft the
    bonus token; either moves on by Q to the first token of the next step.
    """
    lengths = _whole("gamma", gamma)
    accept = np.array([[parameters.a_easy], [parameters.a_hard]])
    move = np.array(
        [
            [1.0 - parameters.easy_to_hard, parameters.easy_to_hard],
            [parameters.hard_to_easy, 1.0 - parameters.hard_to_easy],
        ]
    )
    reached, ended = np.eye(2), np.zeros((2, 2))
    easy = np.empty(int(lengths.max(initial=0)) + 1)
    for k in range(easy.size):
        step = ended + reached @ move
        easy[k] = step[1, 0] / (step[0, 1] + step[1, 0])
        ended = ended + reached @ ((1.0 - accept) * move)
        reached = reached @ (accept * move)
    return np.asarray(easy[lengths])


def _two_state_survival(p: TwoState, easy: Floats, gamma: int) -> Floats:
    """P_1..P_gamma along a new last axis, from the share of easy first tokens."""
    rates = np.empty((*easy.shape, gamma))
    for j in range(gamma):
        rate = easy * p.a_easy + (1.0 - easy) * p.a_hard
        rates[..., j] = rate
        # where nothing is accepted the share no longer matters
        accepted = easy * p.a_easy / np.where(rate > 0.0, rate, 1.0)
        easy = accepted * (1.0 - p.easy_to_hard) + (1.0 - accepted) * p.hard_to_easy
    # a product of rates cannot rise by rounding, powers of a matrix can
    return survival_from_conditional(rates)


def two_state_survival(parameters: TwoState, gamma: int) -> Floats:
    r"""P_1..P_gamma at draft length `gamma`, :math:`P_j = \pi_K (D Q)^{j-1} D 1`. [-]"""
    longest = int(_whole("gamma", gamma))
    return _two_state_survival(parameters, two_state_start(parameters, longest), longest)


def two_state_tokens_per_step(parameters: TwoState, gammas: ArrayLike) -> Floats:
    """E[N] at every draft length of `gammas`, each from its own start. [tokens]"""
    lengths = _whole("gammas", gammas)
    longest = int(lengths.max(initial=0))
    survival = _two_state_survival(parameters, two_state_start(parameters, lengths), longest)
    drafted = np.arange(1, longest + 1) <= lengths[..., None]
    return np.asarray(1.0 + (survival * drafted).sum(axis=-1))


# Requests


def steps_to_emit(tokens: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> tuple[Floats, Floats]:
    r"""Mean and standard deviation of the steps that emit `tokens` >= 1 tokens. [steps], [steps]

    .. math:: E[S] = m / \mu + (v + \mu^2 - \mu) / (2 \mu^2), \qquad sd[S] = \sqrt{m v / \mu^3}

    Renewal theory; the second term of the mean is the overshoot of the last step. Both are limits of long requests. Up
    to alpha 0.9 and 7 drafts, against the exact sum: from 32 tokens the mean is within 0.3 % and the deviation within
    9 %, from 64 within 0.01 % and 3.5 %; at one token the mean is up to 32 % low.
    """
    m, mu, v = within("tokens", tokens, 1.0), within("mean", mean, 1.0), within("variance", variance, 0.0)
    return np.asarray(m / mu + (v + mu**2 - mu) / (2.0 * mu**2)), np.sqrt(m * v / mu**3)


def request_tpot_quantile(
    step_s: ArrayLike, tokens: ArrayLike, mean: ArrayLike, variance: ArrayLike, z: ArrayLike
) -> Floats:
    """Quantile over requests of the time per output token, (E[S] + z sd[S]) T / m. [s]

    tokens : m = output length - 1, the tokens after the first. [tokens]
    z : standard normal quantile of the probability asked for, 0 for the median. [-]

    The gaps inside one request are another matter: 0 within a step and T between steps.
    """
    steps, deviation = steps_to_emit(tokens, mean, variance)
    spread = np.asarray(z, dtype=np.float64)
    if not np.all(np.isfinite(spread)):
        raise ValueError(f"z must be finite, got {spread[~np.isfinite(spread)].flat[0]}")
    return np.asarray(within("step_s", step_s, 0.0) * (steps + spread * deviation) / np.asarray(tokens))

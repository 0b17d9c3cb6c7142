r"""Rival forms of acceptance against draft length, each fitted to samples and able to predict any other length.

Every form calls the model's own function (:mod:`servecast.model.speculation`). A residual is a difference in survival
where survival was measured, else in AL, over its scale: standard error and run-to-run scatter together.

Two-state chains are not identified by acceptance, whatever is measured. With 1 the vector of ones, D the acceptances,
Q the moves and A = D Q, every vector of the state is spanned by 1 and A 1, so P_{j+2} = tr(A) P_{j+1} - det(A) P_j.
The stationary equation of the start, applied to A 1, leaves

.. math:: AL(K) - 1 + P_{K+1}^{(K)} = \bar a\, AL(K)

with the stationary acceptance :math:`\bar a`: tokens that would be accepted, the one after a full draft among them,
have its share of all tokens. So P and AL at every K depend on tr(A), det(A) and :math:`\bar a` alone, three numbers for
four probabilities, and survival of a single draft of three positions gives them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
from numpy.typing import NDArray

from servecast.model.acceptance import ROUNDING, AcceptanceSample
from servecast.model.speculation import (
    TwoState,
    alpha_from_tokens_per_step,
    conditional_from_survival,
    depth_decay_survival,
    two_state_survival,
    two_state_tokens_per_step,
)

Floats = NDArray[np.float64]
SurvivalAt = Callable[[int], Floats]
TokensAt = Callable[[NDArray[np.int64]], Floats]

GEOMETRIC = "geometric"
REUSED = "reused survival"
FLAT = "flat conditional"
DECAY = "depth decay"
PRIOR_DECAY = "depth decay with prior"
TWO_STATE = "two-state"

RUN_SCATTER = 0.015
"""Relative scatter of AL about a smooth form: root mean square 0.7 to 2.9 %, median 1.1 %, over the eight open curves
of InferenceX (data/inferencex-acceptance), each fitted whole by depth decay."""
SURVIVAL_FLOOR = 0.002
"""Scatter of a survival near 0, where a relative one says nothing. [-]"""
LOGIT_BOUND = 7.0
"""Two-state probabilities stay in (0.0009, 0.9991)."""
TWO_STATE_RIDGE = 0.03
"""Pull of two-state logits to 0, in residuals per unit. It picks one of the chains that survival cannot tell apart; at
a logit of 3 it is worth a tenth of the scatter of one run."""
INVARIANTS = ("trace", "determinant", "stationary_acceptance")
MAX_EVALUATIONS = 60
"""Per start; more steps along a flat valley change no prediction."""
GOOD_ENOUGH = 0.05
"""Half the sum of squared residuals that no further start can usefully lower: all of them a third of the scatter."""
MINIMUM_LENGTHS_TWO_STATE = 4
"""AL alone determines the form from this many draft lengths on, one more than it has invariants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedParameter:
    """One parameter of a form."""

    name: str
    value: float
    standard_error: float
    """inf where the samples do not identify it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedForm:
    """A form with its parameters put in."""

    form: str
    parameters: tuple[FittedParameter, ...]
    survival_at: SurvivalAt
    """P_1 ... P_K at draft length K."""
    identified: bool = True
    """False where parameters ran to a bound or others fit as well: predictions hold, parameters mean nothing."""

    def tokens_at(self, gamma: int) -> float:
        """AL at one draft length. [tokens]"""
        return 1.0 + float(np.sum(self.survival_at(gamma)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayPrior:
    """Normal prior of log r, the decay of conditional acceptance per position."""

    mean: float
    deviation: float


DECAY_PRIOR = DecayPrior(mean=-0.0473, deviation=0.0236)
"""r = 0.954, 90 % of new curves in 0.918 to 0.991: mean and standard deviation, times sqrt(1 + 1/8), of log r over the
eight open curves of InferenceX (MTP, EAGLE-3 and DSpark heads, coding), each fitted on draft lengths 1 to 8."""


def fit_form(
    form: str, samples: Sequence[AcceptanceSample], *, prior: DecayPrior = DECAY_PRIOR, start: FittedForm | None = None
) -> FittedForm | None:
    """`form` fitted to samples of different draft lengths in rising order; None where they cannot determine it.

    `start` is an earlier fit of the same form to nearly the same samples; two-state searches from there only.
    """
    if form == GEOMETRIC:
        return _geometric(samples)
    if form in (REUSED, FLAT):
        return _carried(form, samples)
    if form == DECAY:
        return _decay(samples, None) if _data_size(samples) >= 2 else None
    if form == PRIOR_DECAY:
        return _decay(samples, prior)
    return _two_state(samples, start)


def fit_forms(samples: Sequence[AcceptanceSample], *, prior: DecayPrior = DECAY_PRIOR) -> dict[str, FittedForm]:
    """Every form that the samples determine."""
    forms = (PRIOR_DECAY, DECAY, GEOMETRIC, REUSED, FLAT, TWO_STATE)
    fitted = {form: fit_form(form, samples, prior=prior) for form in forms}
    return {form: one for form, one in fitted.items() if one is not None}


def standard_error_of(sample: AcceptanceSample) -> float:
    """Of AL: as measured, else that of a number rounded to two decimals (uniform, half width 0.005). [tokens]"""
    return ROUNDING / 3.0**0.5 if sample.standard_error is None else sample.standard_error


def _geometric(samples: Sequence[AcceptanceSample]) -> FittedForm:
    """alpha through AL of the longest draft, which extrapolates better than a compromise over all lengths."""
    last = samples[-1]
    ends = np.array([last.mean_acceptance_length + side * standard_error_of(last) for side in (0.0, -1.0, 1.0)])
    alpha, low, high = alpha_from_tokens_per_step(np.clip(ends, 1.0, last.draft_length + 1.0), last.draft_length)
    return FittedForm(
        form=GEOMETRIC,
        parameters=(FittedParameter(name="alpha", value=float(alpha), standard_error=float(high - low) / 2.0),),
        survival_at=partial(depth_decay_survival, float(alpha), 1.0),
    )


def _carried(form: str, samples: Sequence[AcceptanceSample]) -> FittedForm | None:
    """Survival of the longest draft that has it, cut for shorter ones; beyond it nothing, or the last conditional."""
    known = [sample.survival for sample in samples if sample.survival is not None]
    if not known:
        return None
    p = np.array(known[-1])
    last = float(conditional_from_survival(p)[-1]) if form == FLAT else 0.0

    def survival_at(gamma: int) -> Floats:
        beyond = p[-1] * last ** np.arange(1, gamma - p.size + 1)
        return np.concatenate([p[:gamma], beyond])

    return FittedForm(form=form, parameters=(), survival_at=survival_at)


def _decay(samples: Sequence[AcceptanceSample], prior: DecayPrior | None) -> FittedForm:
    """a_j = a r^(j - 1), r <= 1; the prior counts as one more observation, of log r."""
    residuals = _Residuals(samples)

    def curve(theta: Floats) -> SurvivalAt:
        return partial(depth_decay_survival, float(_expit(theta[0])), float(np.exp(theta[1])))

    def loss(theta: Floats) -> Floats:
        survival_at = curve(theta)
        own = residuals(survival_at, lambda lengths: 1.0 + np.cumsum(survival_at(lengths.max()))[lengths - 1])
        return own if prior is None else np.append(own, (theta[1] - prior.mean) / prior.deviation)

    theta, covariance, free = _least_squares(
        loss, np.array([[1.5, -0.05]]), np.array([-12.0, -3.0]), np.array([12.0, 0.0])
    )
    a, r = float(_expit(theta[0])), float(np.exp(theta[1]))
    error = _propagated(covariance, np.diag([a * (1.0 - a), r]))
    return FittedForm(
        form=DECAY if prior is None else PRIOR_DECAY,
        parameters=_parameters(("a", "r"), np.array([a, r]), error),
        survival_at=curve(theta),
        identified=free,
    )


_STARTS = np.array([[2.0, 0.0, -1.5, -0.5], [3.0, -2.0, -2.5, -1.5], [1.0, 1.0, -1.0, -1.0]])
"""Logits of a_easy, a_hard / a_easy, easy_to_hard, hard_to_easy."""


def _two_state(samples: Sequence[AcceptanceSample], start: FittedForm | None) -> FittedForm | None:
    if not _two_state_determined(samples):
        return None
    residuals = _Residuals(samples)

    def loss(theta: Floats) -> Floats:
        parameters = _two_state_of(theta)
        own = residuals(partial(two_state_survival, parameters), partial(two_state_tokens_per_step, parameters))
        return np.append(own, TWO_STATE_RIDGE * theta)

    starts = _STARTS if start is None else np.array([_logits_of(start)])
    bound = np.full(4, LOGIT_BOUND)
    theta, covariance, _ = _least_squares(loss, starts, -bound, bound)
    fitted = _two_state_of(theta)
    labels = tuple(
        FittedParameter(name=field.name, value=getattr(fitted, field.name), standard_error=np.inf)
        for field in fields(TwoState)
    )
    invariants = _parameters(INVARIANTS, _invariants(theta), _propagated(covariance, _invariant_slope(theta)))
    return FittedForm(
        form=TWO_STATE,
        parameters=labels + invariants,
        survival_at=partial(two_state_survival, fitted),
        identified=False,
    )


def _invariants(theta: Floats) -> Floats:
    """Trace and determinant of D Q, and the stationary acceptance, all that survival depends on (module docstring)."""
    p = _two_state_of(theta)
    trace = p.a_easy * (1.0 - p.easy_to_hard) + p.a_hard * (1.0 - p.hard_to_easy)
    moves = p.easy_to_hard + p.hard_to_easy
    acceptance = (p.hard_to_easy * p.a_easy + p.easy_to_hard * p.a_hard) / moves
    return np.array([trace, p.a_easy * p.a_hard * (1.0 - moves), acceptance])


def _invariant_slope(theta: Floats) -> Floats:
    step = 1e-5  # central differences of smooth functions of order 1
    return np.array(
        [(_invariants(theta + step * one) - _invariants(theta - step * one)) / (2.0 * step) for one in np.eye(4)]
    ).T


def _two_state_determined(samples: Sequence[AcceptanceSample]) -> bool:
    """Three invariants: survival of one draft of three positions or more, or one number more than there are of them."""
    if any(sample.survival is not None and sample.draft_length >= 3 for sample in samples):
        return True
    known = any(sample.survival is not None and sample.draft_length >= 2 for sample in samples)
    return _data_size(samples) >= 4 and (known or len(samples) >= MINIMUM_LENGTHS_TWO_STATE)


def _two_state_of(theta: Floats) -> TwoState:
    share = _expit(theta)
    return TwoState(
        a_easy=float(share[0]),
        a_hard=float(share[0] * share[1]),  # a share of a_easy, so the two states cannot change places
        easy_to_hard=float(share[2]),
        hard_to_easy=float(share[3]),
    )


def _logits_of(fitted: FittedForm) -> Floats:
    a_easy, a_hard, away, back = (parameter.value for parameter in fitted.parameters[:4])
    share = np.array([a_easy, a_hard / a_easy, away, back])
    inside = 1e-3  # a start on its bound cannot leave it
    share = np.clip(share, inside, 1.0 - inside)
    return np.asarray(-np.log(1.0 / share - 1.0), dtype=np.float64)


class _Residuals:
    """Scaled differences of a form from the samples."""

    def __init__(self, samples: Sequence[AcceptanceSample]) -> None:
        plain = [sample for sample in samples if sample.survival is None]
        self._lengths = np.array([sample.draft_length for sample in plain], dtype=np.int64)
        self._al = np.array([sample.mean_acceptance_length for sample in plain], dtype=np.float64)
        errors = np.array([standard_error_of(sample) for sample in plain], dtype=np.float64)
        self._scale = np.hypot(errors, RUN_SCATTER * self._al)
        self._survival = [np.array(sample.survival) for sample in samples if sample.survival is not None]

    def __call__(self, survival_at: SurvivalAt, tokens_at: TokensAt) -> Floats:
        parts = [(tokens_at(self._lengths) - self._al) / self._scale] if self._lengths.size else []
        for measured in self._survival:
            scale = np.hypot(RUN_SCATTER * measured, SURVIVAL_FLOOR)
            parts.append((survival_at(measured.size) - measured) / scale)
        return np.concatenate(parts)


def _data_size(samples: Sequence[AcceptanceSample]) -> int:
    return sum(1 if sample.survival is None else sample.draft_length for sample in samples)


def _least_squares(
    loss: Callable[[Floats], Floats], starts: Floats, low: Floats, high: Floats
) -> tuple[Floats, Floats, bool]:
    """Best of several starts: minimiser, covariance at unit residual scale, whether every parameter is determined."""
    from scipy.optimize import least_squares

    found = None
    for start in starts:
        tried = least_squares(loss, start, bounds=(low, high), max_nfev=MAX_EVALUATIONS)
        if found is None or tried.cost < found.cost:
            found = tried
        if found.cost < GOOD_ENOUGH:
            break
    if found is None:
        raise ValueError("starts must hold at least one, got none")
    theta = np.asarray(found.x, dtype=np.float64)
    at_bound = bool(np.any((theta - low < 1e-3) | (high - theta < 1e-3)))
    slope = np.asarray(found.jac, dtype=np.float64)
    normal = slope.T @ slope
    # below this ratio of eigenvalues the inverse is rounding noise
    if np.linalg.cond(normal) > 1e12:
        return theta, np.full(normal.shape, np.inf), False
    return theta, np.asarray(np.linalg.inv(normal), dtype=np.float64), not at_bound


def _propagated(covariance: Floats, slope: Floats) -> Floats:
    """Standard errors of functions of the fitted numbers; inf everywhere where the fit has no covariance."""
    if not np.all(np.isfinite(covariance)):
        return np.full(len(slope), np.inf)
    return np.asarray(np.sqrt(np.diag(slope @ covariance @ slope.T)), dtype=np.float64)


def _parameters(names: tuple[str, ...], values: Floats, errors: Floats) -> tuple[FittedParameter, ...]:
    return tuple(
        FittedParameter(name=name, value=float(value), standard_error=float(error))
        for name, value, error in zip(names, values, errors, strict=True)
    )


def _expit(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)), dtype=np.float64)

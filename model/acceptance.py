r"""Measured acceptance of drafted tokens, and the curve a forecast reads: tokens per step against draft length.

Symbols (docs/nomenclature): K draft length, P_j unconditional probability that the first j drafted tokens are all
accepted (survival), AL mean acceptance length, the bonus token included: AL(K) = 1 + sum_{j <= K} P_j^(K).

P_j belongs to the draft length it was measured at. After a rejection the next token is harder than the average one, so
survival measured at one K is not that of another, and a measured AL need not rise with K (a drafter run beyond the
depth it was trained for loses acceptance). Nothing here asks for a monotone AL or takes differences of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.prediction import Prediction
from servecast.model.speculation import acceptance_variance, check_survival

Floats = NDArray[np.float64]

ROUNDING = 0.005
"""Half a unit of the second decimal, to which engines and papers print acceptance. [tokens or 1]"""
RELATIVE_SLACK = 0.01
"""Share of AL by which survival and AL of one run may disagree: they are counted over slightly different steps."""
MAX_EXPONENT = 1e6
"""Largest power that `survival_with_mean` tries; beyond it a survival below 1 is 0 in double precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceSample:
    """Acceptance measured at one draft length; refused where its numbers contradict each other."""

    draft_length: int
    """K, drafted tokens per step, >= 1. [tokens]"""
    mean_acceptance_length: float
    """AL, in [1, K + 1], bonus token included. [tokens]"""
    standard_error: float | None = None
    """Of AL, where known. [tokens]"""
    survival: tuple[float, ...] | None = None
    """Unconditional P_1 ... P_K at this K, non-increasing."""
    rounds: int | None = None
    """Verification steps counted."""

    def __post_init__(self) -> None:
        if self.draft_length < 1:
            raise ValueError(f"draft_length must be at least 1, got {self.draft_length}")
        if not 1.0 <= self.mean_acceptance_length <= self.draft_length + 1:
            raise ValueError(
                f"mean_acceptance_length must be from 1 to {self.draft_length + 1} at draft length "
                f"{self.draft_length}, got {self.mean_acceptance_length}"
            )
        if self.standard_error is not None and not 0.0 <= self.standard_error < np.inf:
            raise ValueError(f"standard_error must be finite and not negative, got {self.standard_error}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.survival is not None:
            self._check_survival(self.survival)

    def _check_survival(self, survival: tuple[float, ...]) -> None:
        if len(survival) != self.draft_length:
            raise ValueError(f"survival must have {self.draft_length} values (the draft length), got {len(survival)}")
        check_survival(survival)
        implied = 1.0 + sum(survival)
        rounding = ROUNDING * (self.draft_length + 1)
        if abs(implied - self.mean_acceptance_length) > max(RELATIVE_SLACK * self.mean_acceptance_length, rounding):
            raise ValueError(
                f"survival must sum to mean_acceptance_length - 1 = {self.mean_acceptance_length - 1.0:.6g}, "
                f"got {implied - 1.0:.6g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceCurve:
    """Tokens per step at every draft length from 0 (no speculation, exactly 1) to the largest asked for."""

    form: str
    """Name of the form that supplies the lengths that were not measured."""
    mean_length: Floats
    """AL by draft length, shape [max_length + 1]: as measured where `measured`, else of the form. [tokens]"""
    lo: Floats
    hi: Floats
    """90 % interval of `mean_length`. [tokens]"""
    measured: NDArray[np.bool_]
    survival: tuple[Floats, ...] | None = None
    """P_1 ... P_K for every draft length K; the entry of 0 is empty."""

    def __post_init__(self) -> None:
        size = self.mean_length.size
        for name in ("mean_length", "lo", "hi", "measured"):
            if getattr(self, name).shape != (size,) or not size:
                raise ValueError(f"{name} must have shape (max_length + 1,), got {getattr(self, name).shape}")
        if self.mean_length[0] != 1.0:
            raise ValueError(f"mean_length must be 1 at draft length 0, got {self.mean_length[0]}")
        _require_ordered(self.lo, self.mean_length, self.hi)
        if self.survival is not None and [len(each) for each in self.survival] != list(range(size)):
            raise ValueError(f"survival must have K values at every draft length K, got {len(self.survival)} entries")

    @property
    def max_length(self) -> int:
        """Largest draft length the curve knows. [tokens]"""
        return self.mean_length.size - 1

    def at(self, gamma: int) -> Prediction:
        """AL at one draft length; `calibrated` is false where it was not measured. [tokens]"""
        index = self._checked(gamma)
        return Prediction(
            value=float(self.mean_length[index]),
            lo=float(self.lo[index]),
            hi=float(self.hi[index]),
            calibrated=bool(self.measured[index]),
        )

    def variance(self, gamma: int) -> float:
        """Variance of the tokens of one step at one draft length, which needs survival. [tokens^2]"""
        index = self._checked(gamma)
        if index == 0:
            return 0.0
        if self.survival is None:
            raise ValueError(f"survival must be known for a variance, got none from the form {self.form!r}")
        return float(acceptance_variance(self.survival[index]))

    def _checked(self, gamma: int) -> int:
        if not 0 <= gamma <= self.max_length or gamma != int(gamma):
            raise ValueError(f"gamma must be a whole number from 0 to {self.max_length}, got {gamma}")
        return int(gamma)


def survival_with_mean(survival: ArrayLike, mean_length: float) -> Floats:
    """Survival of the same shape, P_j ** t, with the power t > 0 at which 1 + sum P_j is `mean_length`.

    A power keeps P in [0, 1] and non-increasing, which adding or scaling does not: t raises every conditional
    acceptance alike. Zeros and ones stay where they are, so they bound the means within reach.

    Parameters
    ----------
    survival : P_1 ... P_K, shape [K]. [-]
    mean_length : AL to reach, in [1, K + 1]. [tokens]

    >>> survival_with_mean([0.5, 0.25], 1.75)
    array([0.5 , 0.25])
    """
    p = np.asarray(survival, dtype=np.float64)
    check_survival(p)
    least, most = 1.0 + np.count_nonzero(p == 1.0), 1.0 + np.count_nonzero(p)
    if not least <= mean_length <= most:
        raise ValueError(f"mean_length must be from {least:g} to {most:g} for this survival, got {mean_length}")
    if mean_length == most:
        return np.where(p > 0.0, 1.0, 0.0)
    if mean_length == least:
        return np.where(p == 1.0, 1.0, 0.0)
    if 1.0 + p.sum() == mean_length:
        return p
    low, high = -np.log(MAX_EXPONENT), np.log(MAX_EXPONENT)
    for _ in range(100):  # halves an interval of 28 to below a double's resolution
        middle = (low + high) / 2.0
        if 1.0 + np.sum(p ** np.exp(middle)) > mean_length:
            low = middle
        else:
            high = middle
    return np.asarray(p ** np.exp((low + high) / 2.0), dtype=np.float64)


def samples_by_length(samples: Sequence[AcceptanceSample]) -> tuple[AcceptanceSample, ...]:
    """One sample per draft length in rising order; runs of the same length are pooled.

    Runs count by their `rounds` where all have them, else alike. The standard error is that of the mean of the runs'
    own errors; three runs or more take their scatter instead where it is larger. Survival is kept where every run has
    it.
    """
    lengths = sorted({sample.draft_length for sample in samples})
    return tuple(_pooled([one for one in samples if one.draft_length == length]) for length in lengths)


def _pooled(runs: Sequence[AcceptanceSample]) -> AcceptanceSample:
    if len(runs) == 1:
        return runs[0]
    counts = [run.rounds for run in runs]
    known = [count for count in counts if count is not None]
    weight = np.array(known if len(known) == len(runs) else [1.0] * len(runs), dtype=np.float64)
    weight /= weight.sum()
    mean = np.array([run.mean_acceptance_length for run in runs])
    survivals = [run.survival for run in runs if run.survival is not None]
    pooled = np.array(survivals).T @ weight if len(survivals) == len(runs) else None
    return AcceptanceSample(
        draft_length=runs[0].draft_length,
        mean_acceptance_length=float(weight @ mean),
        standard_error=_pooled_error(runs, weight, mean),
        survival=None if pooled is None else tuple(pooled.tolist()),
        rounds=sum(known) if len(known) == len(runs) else None,
    )


def _pooled_error(runs: Sequence[AcceptanceSample], weight: Floats, mean: Floats) -> float | None:
    errors = [run.standard_error for run in runs if run.standard_error is not None]
    own = float(np.sqrt(np.sum((weight * errors) ** 2))) if len(errors) == len(runs) else None
    if len(runs) < 3:
        return own
    scatter = float(np.sqrt(np.sum(weight**2 * (mean - weight @ mean) ** 2) * len(runs) / (len(runs) - 1)))
    return scatter if own is None else max(own, scatter)


def _require_ordered(lo: Floats, mean: Floats, hi: Floats) -> None:
    bad = ~((lo >= 1.0) & (lo <= mean) & (mean <= hi) & (hi <= np.arange(mean.size) + 1.0))
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"mean_length must be inside its interval and that inside [1, {at + 1}] at draft length {at}, "
            f"got {lo[at]} <= {mean[at]} <= {hi[at]}"
        )

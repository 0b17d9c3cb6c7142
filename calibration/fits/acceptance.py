r"""Acceptance curve of a drafter from measured draft lengths: tokens per step at every length, with intervals.

Measured lengths keep what was measured. Other lengths come from one of the rival forms of
:mod:`servecast.calibration.fits.acceptance_forms`. The form of first choice is depth decay with a prior of r: three
points say little about r, and a free r extrapolates twice as badly on the open curves (`transfer_table`). A rival
takes its place only where it predicts left-out draft lengths better by more than the scatter of a run, or, with fewer
than three lengths, where survival shows a conditional acceptance that rises with the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.acceptance_forms import (
    DECAY_PRIOR,
    PRIOR_DECAY,
    RUN_SCATTER,
    TWO_STATE,
    DecayPrior,
    FittedForm,
    FittedParameter,
    fit_form,
    fit_forms,
)
from servecast.model.acceptance import (
    ROUNDING,
    AcceptanceCurve,
    AcceptanceSample,
    samples_by_length,
    survival_with_mean,
)
from servecast.model.prediction import Z90
from servecast.model.speculation import conditional_from_survival

Floats = NDArray[np.float64]

MINIMUM_LENGTHS_HELD_OUT = 3
"""With fewer draft lengths, leaving one out leaves too little to tell forms apart."""
BAND_BASE = 0.04
"""90 % half width of log AL just off the measured lengths."""
BAND_GROWTH = 0.03
"""Its growth per unit of log(K / longest measured K) above the measured range. Both constants: the eight open curves
of InferenceX, each predicted with the prior of the other seven from its lengths 1..m (m = 2 to 7) and from one length
alone; 90 % quantiles 0.05 at a log distance of 0.2, 0.07 at 0.9, below the range 0.05 or less at any distance."""
LONGEST_CALIBRATED = 8
"""Longest draft of those curves. [tokens]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One form: its fit to all samples and how well it predicts a draft length it has not seen."""

    form: str
    parameters: tuple[FittedParameter, ...]
    identified: bool
    residuals: Floats
    """Measured - fitted AL, by draft length in rising order. [tokens]"""
    held_out_errors: tuple[tuple[int, float], ...]
    """(draft length, predicted - measured AL) of every length left out in turn; empty below three lengths. [tokens]"""

    @property
    def held_out_error(self) -> float | None:
        """Mean absolute error on left-out draft lengths; None where there are none. [tokens]"""
        return float(np.mean([abs(error) for _, error in self.held_out_errors])) if self.held_out_errors else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceFit:
    """The chosen form, its rivals, the curve, and what may be carried over to other draft lengths and texts."""

    form: str
    lengths: tuple[int, ...]
    """Measured draft lengths in rising order; `residuals` follow them. [tokens]"""
    rivals: tuple[Rival, ...]
    """Every form that the samples determine, the chosen one among them."""
    curve: AcceptanceCurve
    notes: tuple[str, ...]

    def rival(self, form: str) -> Rival:
        """Fit of one form by name."""
        for one in self.rivals:
            if one.form == form:
                return one
        raise ValueError(f"form must be one of {', '.join(one.form for one in self.rivals)}, got {form}")

    @property
    def parameters(self) -> tuple[FittedParameter, ...]:
        """Of the chosen form."""
        return self.rival(self.form).parameters

    @property
    def residuals(self) -> Floats:
        """Measured - fitted AL of the chosen form, by draft length. [tokens]"""
        return self.rival(self.form).residuals


def fit_acceptance(
    samples: Sequence[AcceptanceSample], *, max_length: int, prior: DecayPrior = DECAY_PRIOR
) -> AcceptanceFit:
    """Acceptance curve for draft lengths 0 to `max_length`.

    Parameters
    ----------
    samples : runs at fixed draft lengths, at least one; several at one length are pooled. AL need not rise with it.
    max_length : longest draft to predict, at least the longest measured one. [tokens]
    prior : of log r, the decay of conditional acceptance per position.
    """
    pooled = samples_by_length(samples)
    if not pooled:
        raise ValueError("samples must hold at least one draft length, got none")
    if max_length < pooled[-1].draft_length:
        raise ValueError(
            f"max_length must be at least the longest measured draft length, {pooled[-1].draft_length}, "
            f"got {max_length}"
        )
    fitted = fit_forms(pooled, prior=prior)
    rivals = tuple(_rival(one, pooled, prior) for one in fitted.values())
    form = _choose(rivals, pooled)
    chosen = next(one for one in rivals if one.form == form)
    curve = _curve(fitted[form], fitted[PRIOR_DECAY], pooled, max_length, _band_scale(chosen, pooled))
    return AcceptanceFit(
        form=form,
        lengths=tuple(sample.draft_length for sample in pooled),
        rivals=rivals,
        curve=curve,
        notes=_notes(pooled, curve, chosen),
    )


def band_half_width(gamma: int, lengths: Sequence[int]) -> float:
    """90 % half width of log AL predicted at `gamma` from a fit to `lengths`; wider above the longest of them."""
    beyond = max(0.0, float(np.log(gamma / max(lengths))))
    return BAND_BASE + BAND_GROWTH * beyond


def _rival(fitted: FittedForm, samples: tuple[AcceptanceSample, ...], prior: DecayPrior) -> Rival:
    residuals = [sample.mean_acceptance_length - fitted.tokens_at(sample.draft_length) for sample in samples]
    return Rival(
        form=fitted.form,
        parameters=fitted.parameters,
        identified=fitted.identified,
        residuals=np.array(residuals),
        held_out_errors=_held_out_errors(fitted, samples, prior),
    )


def _held_out_errors(
    fitted: FittedForm, samples: tuple[AcceptanceSample, ...], prior: DecayPrior
) -> tuple[tuple[int, float], ...]:
    """Empty too where some length cannot be left out, since errors over other lengths do not compare."""
    if len(samples) < MINIMUM_LENGTHS_HELD_OUT:
        return ()
    errors: list[tuple[int, float]] = []
    for held in samples:
        others = [sample for sample in samples if sample is not held]
        without = fit_form(fitted.form, others, prior=prior, start=fitted)
        if without is None:
            return ()
        errors.append((held.draft_length, without.tokens_at(held.draft_length) - held.mean_acceptance_length))
    return tuple(errors)


def _choose(rivals: tuple[Rival, ...], samples: tuple[AcceptanceSample, ...]) -> str:
    scores = {one.form: one.held_out_error for one in rivals if one.held_out_error is not None}
    if PRIOR_DECAY not in scores:
        determined = any(one.form == TWO_STATE for one in rivals)
        return TWO_STATE if determined and _rising_conditional(samples) else PRIOR_DECAY
    scatter = RUN_SCATTER * float(np.mean([sample.mean_acceptance_length for sample in samples]))
    best = min(scores, key=lambda form: scores[form])
    return best if scores[best] + scatter / len(samples) ** 0.5 < scores[PRIOR_DECAY] else PRIOR_DECAY


def _rising_conditional(samples: tuple[AcceptanceSample, ...]) -> bool:
    """Whether accepted tokens make the next one likelier, as copied text does; no decay with depth can describe it."""
    known = [sample.survival for sample in samples if sample.survival is not None and sample.draft_length >= 2]
    if not known:
        return False
    conditional = conditional_from_survival(np.array(known[-1]))
    return bool(np.mean(conditional[1:]) > conditional[0])


def _band_scale(chosen: Rival, samples: tuple[AcceptanceSample, ...]) -> float:
    """How much wider than the open curves' the band must be for the curve's own left-out lengths; never below 1."""
    if not chosen.held_out_errors:
        return 1.0
    measured = {sample.draft_length: sample.mean_acceptance_length for sample in samples}
    ratios = [
        np.log1p(error / measured[length]) / band_half_width(length, [one for one in measured if one != length])
        for length, error in chosen.held_out_errors
    ]
    return max(1.0, Z90 * float(np.sqrt(np.mean(np.square(ratios)))))


def _curve(
    fitted: FittedForm,
    fallback: FittedForm,
    samples: tuple[AcceptanceSample, ...],
    max_length: int,
    scale: float,
) -> AcceptanceCurve:
    by_length = {sample.draft_length: sample for sample in samples}
    mean, lo, hi = np.ones(max_length + 1), np.ones(max_length + 1), np.ones(max_length + 1)
    survival: list[Floats] = [np.zeros(0)]
    for gamma in range(1, max_length + 1):
        sample = by_length.get(gamma)
        if sample is None:
            mean[gamma] = fitted.tokens_at(gamma)
            factor = np.exp(scale * band_half_width(gamma, tuple(by_length)))
            ends = mean[gamma] / factor, mean[gamma] * factor
        else:
            mean[gamma] = sample.mean_acceptance_length
            width = measured_half_width(sample)
            ends = mean[gamma] - width, mean[gamma] + width
        # a step yields at least the bonus token and at most every draft with it
        lo[gamma], hi[gamma] = max(ends[0], 1.0), min(ends[1], gamma + 1.0)
        survival.append(_survival(fitted, fallback, sample, gamma, mean[gamma]))
    measured = np.isin(np.arange(max_length + 1), [0, *by_length])
    return AcceptanceCurve(
        form=fitted.form, mean_length=mean, lo=lo, hi=hi, measured=measured, survival=tuple(survival)
    )


def measured_half_width(sample: AcceptanceSample) -> float:
    """90 % half width of a measured AL: 1.645 standard errors, or rounding and 1.5 % where none is known. [tokens]"""
    if sample.standard_error is not None:
        return Z90 * sample.standard_error
    return ROUNDING + RUN_SCATTER * sample.mean_acceptance_length


def _survival(
    fitted: FittedForm, fallback: FittedForm, sample: AcceptanceSample | None, gamma: int, mean: float
) -> Floats:
    """Survival that sums to the curve's AL: as measured at this length, else of the form."""
    if sample is not None and sample.survival is not None:
        return np.array(sample.survival)
    shape = fitted.survival_at(gamma)
    reachable = 1.0 + np.count_nonzero(shape == 1.0) <= mean <= 1.0 + np.count_nonzero(shape)
    return survival_with_mean(shape if reachable else fallback.survival_at(gamma), mean)


def _notes(samples: tuple[AcceptanceSample, ...], curve: AcceptanceCurve, chosen: Rival) -> tuple[str, ...]:
    lengths = [sample.draft_length for sample in samples]
    notes = [
        f"measured at draft length {', '.join(map(str, lengths))}; every other length is predicted by "
        f"{chosen.form}, with a wider interval",
        "acceptance is that of this drafter, text and sampling: another task class, temperature or thinking mode does "
        "not transfer; batch size and engine speed do not enter",
    ]
    if any(sample.survival is not None for sample in samples):
        notes.append("survival is that of the draft length it was measured at; a shorter draft has another one")
    falls = [k for k, before in zip(lengths[1:], samples, strict=False) if _falls(curve, k, before.draft_length)]
    if falls:
        notes.append(f"measured AL falls at draft length {', '.join(map(str, falls))}: kept as measured")
    if curve.max_length > max(lengths):
        notes.append(
            f"beyond draft length {max(lengths)} a drafter may leave the depth it was trained for: one of eight open "
            "curves loses 7 % from 7 to 8"
        )
    if curve.max_length > max(LONGEST_CALIBRATED, *lengths):
        notes.append(f"the interval was never checked beyond draft length {LONGEST_CALIBRATED}")
    if len(lengths) == 1:
        notes.append("one draft length says nothing about the decay with depth, which is that of other drafters")
    if not chosen.identified:
        notes.append(f"the parameters of {chosen.form} are not identified by these samples: use its AL only")
    return tuple(notes)


def _falls(curve: AcceptanceCurve, gamma: int, before: int) -> bool:
    return bool(curve.mean_length[gamma] < curve.mean_length[before])

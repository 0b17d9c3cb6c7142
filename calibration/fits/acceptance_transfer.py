"""How well short drafts foretell long ones: every curve predicted from its first lengths, with what the others taught.

Acceptance curves of one text differ little in how acceptance decays with depth, so the prior of r comes from the other
curves and never from the one predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.acceptance import fit_acceptance
from servecast.calibration.fits.acceptance_forms import DECAY, GEOMETRIC, DecayPrior, fit_form
from servecast.model.acceptance import AcceptanceSample

Floats = NDArray[np.float64]

CHOSEN = "chosen"
"""What `fit_acceptance` predicts, its choice of form included."""
CLAMPED = "clamped"
"""AL of the longest measured draft for every longer one: a survival of 0 beyond it. Its survival of shorter ones
is not in an AL curve."""
FITTED_LENGTHS = ((1, 2, 3), (1, 3))
PREDICTED_LENGTHS = (4, 5, 6, 7, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One curve predicted beyond some of its lengths by one form."""

    curve: str
    fitted: tuple[int, ...]
    """Draft lengths the fit saw. [tokens]"""
    form: str
    lengths: tuple[int, ...]
    """Draft lengths predicted. [tokens]"""
    errors: Floats
    """Predicted - measured AL. [tokens]"""
    inside: NDArray[np.bool_] | None = None
    """Whether the 90 % interval holds the measured AL; None for a form without intervals."""

    @property
    def mean_error(self) -> float:
        """Mean absolute error. [tokens]"""
        return float(np.mean(np.abs(self.errors)))

    @property
    def max_error(self) -> float:
        """Largest absolute error. [tokens]"""
        return float(np.max(np.abs(self.errors)))


def decay_prior(curves: Sequence[Sequence[AcceptanceSample]]) -> DecayPrior:
    """Prior of log r from curves fitted whole; a curve not seen yet deviates by sqrt(1 + 1 / n) more than these do."""
    if len(curves) < 2:
        raise ValueError(f"curves must be at least 2 for a spread, got {len(curves)}")
    fits = [fit_form(DECAY, sorted(samples, key=lambda one: one.draft_length)) for samples in curves]
    logs = [np.log(one.parameters[1].value) for one in fits if one is not None]
    return DecayPrior(mean=float(np.mean(logs)), deviation=float(np.std(logs, ddof=1) * np.sqrt(1.0 + 1.0 / len(logs))))


def transfer_table(
    curves: Mapping[str, Sequence[AcceptanceSample]],
    *,
    fitted: Sequence[Sequence[int]] = FITTED_LENGTHS,
    predicted: Sequence[int] = PREDICTED_LENGTHS,
) -> tuple[Transfer, ...]:
    """Every curve predicted at `predicted` from its samples at each of `fitted`, by four forms.

    `CHOSEN` with the prior of the other curves; `DECAY`, depth decay by least squares alone; `GEOMETRIC`, alpha through
    the longest fitted length; `CLAMPED`.
    """
    rows: list[Transfer] = []
    for name, samples in curves.items():
        prior = decay_prior([other for label, other in curves.items() if label != name])
        for lengths in fitted:
            rows += _transfers(name, samples, tuple(lengths), tuple(predicted), prior)
    return tuple(rows)


def _transfers(
    name: str,
    samples: Sequence[AcceptanceSample],
    fitted: tuple[int, ...],
    predicted: tuple[int, ...],
    prior: DecayPrior,
) -> list[Transfer]:
    seen = sorted((one for one in samples if one.draft_length in fitted), key=lambda one: one.draft_length)
    held = sorted((one for one in samples if one.draft_length in predicted), key=lambda one: one.draft_length)
    lengths = tuple(one.draft_length for one in held)
    measured = np.array([one.mean_acceptance_length for one in held])
    curve = fit_acceptance(seen, max_length=max(predicted), prior=prior).curve
    at = np.array(lengths)
    tokens = {CHOSEN: curve.mean_length[at], CLAMPED: np.full(at.size, seen[-1].mean_acceptance_length)}
    for form in (DECAY, GEOMETRIC):
        one = fit_form(form, seen)
        if one is not None:
            tokens[form] = np.array([one.tokens_at(length) for length in lengths])
    inside = (curve.lo[at] <= measured) & (measured <= curve.hi[at])
    return [
        Transfer(
            curve=name,
            fitted=fitted,
            form=form,
            lengths=lengths,
            errors=value - measured,
            inside=inside if form == CHOSEN else None,
        )
        for form, value in tokens.items()
    ]

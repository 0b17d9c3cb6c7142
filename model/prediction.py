"""A forecast number with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Value with a 90 % interval; `calibrated` is false where an input left the range the parameters were fitted on."""

    value: float
    lo: float
    hi: float
    calibrated: bool = True

"""A forecast number with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Z90: Final = 1.6448536269514722
"""Standard normal quantile of 0.95: half of a 90 % interval, in standard deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Value with a 90 % interval; `calibrated` is false where an input left the range the parameters were fitted on."""

    value: float
    lo: float
    hi: float
    calibrated: bool = True

"""Predicted beside measured: the error, what the machine's noise allows to say of it, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

NAN = float("nan")


class Verdict(StrEnum):
    """Of one comparison, or of all."""

    WITHIN = "within"
    BROKEN = "broken"
    NOT_JUDGED = "not judged"
    """The run was too noisy, or the figure is missing: neither a pass nor a failure."""
    REPORTED = "reported"
    """No budget was written for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure of one part of a run."""

    part: str
    """``decode steps``, a load's name, ``acceptance``, ``draft length``, ``kv blocks``, ..."""
    metric: str
    unit: str
    """``s``, ``tokens``, ``share``, ``blocks``."""
    executor: str
    """``simulator``, ``closed_form``, ``solver``, ``fit``, ``policy``."""
    error: float
    """Signed, as a share of the measured figure; for an error that is already one (a MAPE, a regret) itself; for
    differences in tokens or blocks the difference."""
    predicted: float = NAN
    lo: float = NAN
    hi: float = NAN
    measured: float = NAN
    measured_lo: float = NAN
    measured_hi: float = NAN
    """Least and most over seeds or repeats."""
    baseline: float | None = None
    """The naive model's error, alike."""
    budget: float | None = None
    noise: float = NAN
    """What the same run shows of its own scatter, as a share; NaN where it was not measured. [-]"""
    noise_limit: float | None = None
    """Above this noise the comparison is not judged."""
    group: str = ""
    """Loads of one part over seeds share it."""

    @property
    def verdict(self) -> Verdict:
        """Budgets are written before the run; noise only ever takes a verdict away."""
        if self.budget is None:
            return Verdict.REPORTED
        if not math.isfinite(self.error):
            return Verdict.NOT_JUDGED
        if self.noise_limit is not None and not self.noise <= self.noise_limit:
            return Verdict.NOT_JUDGED
        return Verdict.WITHIN if abs(self.error) <= self.budget else Verdict.BROKEN


def overall(comparisons: Sequence[Comparison]) -> Verdict:
    """Broken where one is; not judged where one could not be, or none was."""
    found = {one.verdict for one in comparisons} - {Verdict.REPORTED}
    if Verdict.BROKEN in found:
        return Verdict.BROKEN
    return Verdict.NOT_JUDGED if Verdict.NOT_JUDGED in found or not found else Verdict.WITHIN

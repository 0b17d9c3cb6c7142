"""The draft length that a solver chooses from calibrated costs and acceptance, against every length measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.acceptance import fit_acceptance
from servecast.model.acceptance import AcceptanceCurve, AcceptanceSample
from servecast.model.speculation_cost import SpeculationCost, step_seconds
from servecast.solvers.draft_length import EDGE_WORTH, DraftLengthProblem, DraftLengthSchedule, solve_draft_length

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceCount:
    """Rounds at one draft length, and how many kept their first 1, 2, ... drafts."""

    draft_length: int
    rounds: int
    survived: tuple[int, ...]

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per round, the bonus token included; NaN without rounds. [tokens]"""
        return 1.0 + sum(self.survived) / self.rounds if self.rounds else float("nan")

    @property
    def standard_error(self) -> float:
        """Of the mean, rounds taken as independent: from the survivals alone. [tokens]"""
        if not self.rounds:
            return float("nan")
        p = np.array(self.survived, dtype=np.float64) / self.rounds
        # N - 1 = sum of indicators of nested events: E[N^2] = sum (2 j - 1) P_j
        second = float(((2.0 * np.arange(1, p.size + 1) - 1.0) * p).sum())
        return float(np.sqrt(max(second - float(p.sum()) ** 2, 0.0) / self.rounds))

    def sample(self) -> AcceptanceSample:
        """For `fit_acceptance`."""
        return AcceptanceSample(
            draft_length=self.draft_length,
            mean_acceptance_length=self.mean_acceptance_length,
            standard_error=self.standard_error,
            survival=tuple(one / self.rounds for one in self.survived),
            rounds=self.rounds,
        )


def acceptance_curve(counts: Sequence[AcceptanceCount], max_length: int) -> AcceptanceCurve:
    """Tokens per step by draft length, from the lengths that were run."""
    samples = [one.sample() for one in counts if one.draft_length and one.rounds]
    return fit_acceptance(samples, max_length=max_length).curve


def chosen_lengths(
    cost: SpeculationCost, curve: AcceptanceCurve, batches: Sequence[int], context: float, *, max_length: int
) -> DraftLengthSchedule:
    """The solver's table for an engine that has drafting armed at every batch size of `batches`."""
    b = np.asarray(batches, dtype=np.float64)[:, np.newaxis]
    lengths = np.arange(max_length + 1)
    seconds = step_seconds(cost, b, lengths.astype(np.float64), context, armed=True)
    return solve_draft_length(
        DraftLengthProblem(
            batches=np.asarray(batches, dtype=np.int64),
            goodput=b * curve.mean_length[: max_length + 1] / seconds,
            weights=np.ones(len(batches)),
            switch_cost=EDGE_WORTH,
        )
    )


def measured_goodput(seconds: Floats, batches: Sequence[int], mean_lengths: Floats) -> Floats:
    """Tokens per second of every (batch, length) cell: measured step times, measured tokens per step. [batch, length]

    Tokens per step are pooled over batch sizes: what is accepted depends on the text, not on how many texts there are.
    """
    return np.asarray(np.asarray(batches, dtype=np.float64)[:, np.newaxis] * mean_lengths / seconds)


def regrets(goodput: Floats, lengths: Integers) -> Floats:
    """Share of the best measured goodput that the chosen length loses, at every batch size. [-]"""
    best = np.nanmax(goodput, axis=1)
    return np.asarray(1.0 - goodput[np.arange(len(lengths)), lengths] / best)

"""Acceptance and draft lengths: what the fit and the solver said, beside every length measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.engine_steps import PointMedians, point_medians
from servecast.model.acceptance import AcceptanceCurve
from servecast.model.prediction import Z90
from servecast.validation.compared_steps import median_cv
from servecast.validation.draft_choice import chosen_lengths, measured_goodput, regrets
from servecast.validation.live_facts import LiveFacts
from servecast.validation.scenario import Scenario, Speculation
from servecast.validation.verdicts import Comparison

Floats = NDArray[np.float64]


def compare_acceptance(scenario: Scenario, facts: LiveFacts, curve: AcceptanceCurve) -> list[Comparison]:
    """Mean acceptance length at every draft length; the naive one has a single acceptance probability."""
    alpha = facts.acceptance_calibrated[0].survived[0] / facts.acceptance_calibrated[0].rounds
    budget = scenario.budgets.mean_acceptance_length
    found = []
    for count in facts.acceptance_validated:
        predicted, measured = curve.at(count.draft_length), count.mean_acceptance_length
        error = Z90 * count.standard_error
        found.append(
            Comparison(
                part="acceptance",
                metric=f"mean acceptance length at {count.draft_length}",
                unit="tokens",
                executor="fit",
                predicted=predicted.value,
                lo=predicted.lo,
                hi=predicted.hi,
                measured=measured,
                measured_lo=measured - error,
                measured_hi=measured + error,
                error=predicted.value - measured,
                baseline=sum(alpha**j for j in range(count.draft_length + 1)) - measured,
                budget=budget,
                noise=count.standard_error / measured,
                noise_limit=None if budget is None else scenario.noise.of_budget * budget / measured,
            )
        )
    return found


def compare_draft_lengths(
    scenario: Scenario, speculation: Speculation, facts: LiveFacts, curve: AcceptanceCurve
) -> list[Comparison]:
    """Regret of the solver's table at every batch size, and its mean; the naive choice is the middle length always."""
    if facts.fit is None or facts.compared is None:
        return []
    longest = max(speculation.lengths)
    batches = list(speculation.batches)
    schedule = chosen_lengths(facts.fit.steps, curve, batches, facts.context, max_length=longest)
    # where a table was written for the engine, it is the table that is judged
    lengths = np.array([facts.table.get(batch, int(schedule.lengths[i])) for i, batch in enumerate(batches)])
    medians = point_medians(facts.compared)
    seconds = _grid(medians, batches, longest)
    tokens = np.full(longest + 1, np.nan)
    tokens[0] = 1.0
    for one in facts.acceptance_validated:
        tokens[one.draft_length] = one.mean_acceptance_length
    if np.isnan(tokens).any():
        return []  # a best length among some of them is no best length
    goodput = measured_goodput(seconds, batches, tokens)
    lost = regrets(goodput, lengths)
    middle = regrets(goodput, np.full(len(batches), min(3, longest)))
    noise = median_cv(medians)
    best = np.nanmax(goodput, axis=1)
    found = []
    for i, batch in enumerate(batches):
        found.append(
            Comparison(
                part="draft length",
                metric=f"batch {batch}: length {int(lengths[i])} chosen, {int(np.nanargmax(goodput[i]))} best",
                unit="tokens/s",
                executor="solver",
                predicted=float(goodput[i, lengths[i]]),
                measured=float(best[i]),
                error=float(lost[i]),
                baseline=float(middle[i]),
                budget=scenario.budgets.draft_length_regret,
                noise=noise,
                noise_limit=_regret_limit(scenario, scenario.budgets.draft_length_regret, medians),
            )
        )
    mean = Comparison(
        part="draft length",
        metric="mean regret",
        unit="tokens/s",
        executor="solver",
        error=float(np.mean(lost)),
        baseline=float(np.mean(middle)),
        budget=scenario.budgets.mean_draft_length_regret,
        noise=noise,
        noise_limit=_regret_limit(scenario, scenario.budgets.mean_draft_length_regret, medians, over=len(batches)),
    )
    return [*found, mean]


def _regret_limit(scenario: Scenario, budget: float | None, medians: PointMedians, *, over: int = 1) -> float | None:
    """Scatter of a step up to which two cells' medians tell enough of the budget apart, never above a step's limit.

    The median of n normal values has a standard error of sqrt(pi / 2n) times their deviation; a mean regret is that of
    so many batch sizes, timed apart.
    """
    if budget is None:
        return None
    n = float(np.median(medians.count))
    apart = math.sqrt(2.0 * math.pi / (2.0 * n)) / math.sqrt(over)
    return min(scenario.noise.step_cv, scenario.noise.of_budget * budget / apart)


def _grid(medians: PointMedians, batches: Sequence[int], longest: int) -> Floats:
    """Measured seconds of every (batch, length); NaN where a cell was not run."""
    rows, sequences = (np.asarray(one, dtype=np.float64) for one in (medians.work.rows, medians.work.sequences))
    seconds = np.full((len(batches), longest + 1), np.nan)
    for i, batch in enumerate(batches):
        for gamma in range(longest + 1):
            cell = (sequences == batch) & (rows == batch * (gamma + 1))
            if cell.any():
                seconds[i, gamma] = float(np.median(medians.seconds[cell]))
    return seconds

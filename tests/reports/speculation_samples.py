"""Draft-length plans for the tests of the reports: invented speeds whose answers can be found by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from servecast.model.speculation_cells import SpeculationCells
from servecast.speculating import plan_speculation
from servecast.speculation_answers import DecodeLimits, ScheduleRules, SpeculationAnswer
from servecast.speculation_tables import SpeedTable

LIMITS = DecodeLimits(tpot_mean_s=0.025, tpot_quantiles=((99.0, 0.028),), step_s=0.04, output_tokens=257.0)


def table(
    contexts: Sequence[float] = (math.nan,),
    *,
    max_batch: int = 64,
    row_s: float = 3e-4,
    stairs: int = 0,
    longest: int = 2,
) -> SpeedTable:
    """Steps of 10 ms + `row_s` * batch * (length + 1), 1 ms less without a drafter, 1 us more per 1,000 tokens cached.

    Tokens 1, 1.8, 2.4 and then 0.3 more per length; `stairs` rounds rows up to its multiples.
    """
    batches, lengths = np.arange(1, max_batch + 1), np.arange(longest + 1)
    tokens = np.concatenate([[1.0, 1.8], 2.4 + 0.3 * np.arange(longest - 1)])[: longest + 1]
    at = np.array(contexts)
    rows = batches[:, np.newaxis] * (lengths + 1.0)
    rows = np.ceil(rows / stairs) * stairs if stairs else rows
    cached = 1e-9 * np.nan_to_num(at)[:, np.newaxis, np.newaxis] * batches[:, np.newaxis]
    step = 0.010 + row_s * rows + cached
    shape = (at.size, batches.size, lengths.size)
    return SpeedTable(
        batches=batches,
        contexts=at,
        tok_s=tokens / step,
        sd=np.full(shape, 0.05),
        ratio_sd=np.zeros(shape),
        off_tok_s=1.0 / (step[..., 0] - 0.001),
        off_sd=np.full(shape[:2], 0.05),
        tokens=tokens,
        tokens_lo=np.maximum(tokens - 0.1 * (lengths > 0), 1.0),
        tokens_hi=tokens + 0.1 * (lengths > 0),
        variance=np.where(lengths > 0, 0.16, 0.0),
        calibrated=(batches[:, np.newaxis] <= 48) & (lengths < 2 + longest),
    )


@functools.cache
def answer(name: str) -> SpeculationAnswer:
    """By hand: length 2 is faster than 1 where 2.4 / (10 + 0.9 B) > 1.8 / (10 + 0.6 B), to batch size 33; the nearest
    captured sizes are 32 and 40."""
    if name == "one context":
        return plan_speculation(table())
    if name == "several contexts":
        return plan_speculation(table((1000.0, 4000.0, 16000.0, 64000.0)), limits=LIMITS)
    if name == "infeasible batches":
        return plan_speculation(table(), limits=LIMITS)
    if name == "one segment":
        return plan_speculation(table(row_s=1e-6))
    if name == "zero entries":
        return plan_speculation(table(row_s=5e-3), rules=ScheduleRules(operating=(1, 1)))
    if name == "batch of one":
        return plan_speculation(table(max_batch=1))
    assert name == "nothing to draft"
    return plan_speculation(table(longest=0))


NAMES = (
    "one context",
    "several contexts",
    "infeasible batches",
    "one segment",
    "zero entries",
    "batch of one",
    "nothing to draft",
)


def cells(*, context: float = math.nan) -> SpeculationCells:
    """Five measured cells, one of them without a drafter and one beyond the lengths of the plan."""
    return SpeculationCells(
        batch=np.array([1.0, 1.0, 16.0, 48.0, 8.0]),
        gamma=np.array([0, 2, 1, 2, 7]),
        tok_s_per_request=np.array([107.0, 221.0, 90.0, 45.0, 60.0]),
        mean_acceptance_length=np.array([math.nan, 2.41, 1.83, 2.38, 3.0]),
        context=np.full(5, context),
        armed=np.zeros(5, dtype=np.bool_),
    )

"""Single steps that the fit has not seen, beside what it foretells of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from servecast.calibration.fits.engine_steps import PointMedians, StepSamples, StepsFit, point_medians
from servecast.model.engine_steps import EngineSteps
from servecast.model.prediction import Z90
from servecast.validation.executors import baseline_steps
from servecast.validation.live_facts import LiveFacts
from servecast.validation.scenario import Scenario
from servecast.validation.verdicts import NAN, Comparison


def compare_steps(
    scenario: Scenario,
    facts: LiveFacts,
    fit: StepsFit,
    samples: StepSamples,
    part: str,
    *,
    beside: StepSamples | None = None,
) -> list[Comparison]:
    """One figure over all points, and one for every point.

    Scatter is that of `beside`, where judged samples are a part of a paired run: a round's pace is known the better the
    more of its samples are looked at.
    """
    medians = point_medians(samples)
    predicted = fit.steps.seconds(medians.work)
    error = predicted / medians.seconds - 1.0
    noise = median_cv(medians if beside is None else point_medians(beside))
    naive = None
    if facts.size is not None:
        line = naive_line(fit.steps, facts)
        naive = float(np.mean(np.abs(line.seconds(medians.work) / medians.seconds - 1.0)))
    budget = scenario.budgets.decode_step_mape if part == "decode steps" else scenario.budgets.speculative_step_mape
    mape = float(np.mean(np.abs(error)))
    overall = Comparison(
        part=part,
        metric="step time, mean absolute error",
        unit="share",
        executor="fit",
        error=mape,
        baseline=naive,
        budget=budget,
        noise=noise,
        noise_limit=scenario.noise.step_cv,
    )
    return [overall, *(_point(fit.steps, medians, i, part) for i in range(medians.seconds.size))]


def _point(steps: EngineSteps, medians: PointMedians, i: int, part: str) -> Comparison:
    work = replace(
        medians.work, **{name: float(np.asarray(getattr(medians.work, name))[i]) for name in _fields(medians)}
    )
    found = steps.predict(work)
    measured, cv = float(medians.seconds[i]), float(medians.cv[i])
    passes = float(np.asarray(work.draft_passes))
    batch = float(np.asarray(work.sequences))
    gamma = float(np.asarray(work.rows)) / batch - 1.0 if batch else 0.0
    context = float(np.asarray(work.cached)) / batch if batch else 0.0
    drafts = f", draft length {gamma:g}" if passes or gamma else ""
    return Comparison(
        part=part,
        metric=f"batch {batch:g}, context {context:g}{drafts}",
        unit="s",
        executor="fit",
        predicted=found.value,
        lo=found.lo,
        hi=found.hi,
        measured=measured,
        measured_lo=measured * (1.0 - Z90 * cv),
        measured_hi=measured * (1.0 + Z90 * cv),
        error=found.value / measured - 1.0,
        noise=cv,
        group=part,
    )


def _fields(medians: PointMedians) -> tuple[str, ...]:
    return tuple(medians.work.__dataclass_fields__)


def median_cv(medians: PointMedians) -> float:
    """Scatter of a middling point; NaN where none was timed often enough. [-]"""
    return float(np.nanmedian(medians.cv)) if np.isfinite(medians.cv).any() else NAN


def naive_line(steps: EngineSteps, facts: LiveFacts) -> EngineSteps:
    """The plain model of the same engine; `steps` themselves where its size is not known."""
    if facts.size is None:
        return steps
    size = facts.size
    return baseline_steps(
        steps, weight_bytes=size.weight_bytes, params=size.params, bandwidth=size.bandwidth, flops=size.flops
    )

"""From what a live run showed to comparisons: the model's figure, the measured one, the naive one, the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.engine_steps import PointMedians, StepSamples, StepsFit, point_medians
from servecast.model.acceptance import AcceptanceCurve
from servecast.model.engine_steps import EngineSteps
from servecast.model.prediction import Z90
from servecast.validation.draft_choice import acceptance_curve, chosen_lengths, measured_goodput, regrets
from servecast.validation.executors import EXECUTORS, FIGURES, Foretold, baseline_steps, figures, predicted_figures
from servecast.validation.live_facts import LiveFacts, LoadRun
from servecast.validation.pace import drawn_paces
from servecast.validation.scenario import Scenario, Speculation
from servecast.validation.verdicts import NAN, Comparison

Floats = NDArray[np.float64]

FAILED_SHARE = 0.01
"""Of the requests of one run: with more of them failed, what the others saw is another load's, and is not judged."""


def compare(scenario: Scenario, facts: LiveFacts) -> list[Comparison]:
    """Every figure of the scenario that the run gives an answer to."""
    found: list[Comparison] = []
    if facts.fit is not None:
        if facts.validated is not None:
            found += _steps(scenario, facts, facts.fit, facts.validated, "decode steps")
        if facts.drafted is not None:
            found += _steps(scenario, facts, facts.fit, facts.drafted, "speculative steps")
    found += _loads(scenario, facts)
    if scenario.speculation is not None and any(one.rounds for one in facts.acceptance_calibrated):
        curve = acceptance_curve(facts.acceptance_calibrated, max(scenario.speculation.lengths))
        found += _acceptance(scenario, facts, curve)
        if facts.fit is not None and facts.compared is not None and facts.acceptance_validated:
            found += _draft_lengths(scenario, scenario.speculation, facts, curve)
    return found + _kv_blocks(scenario, facts) + _table(scenario, facts)


def not_reached(scenario: Scenario, facts: LiveFacts) -> list[str]:
    """Parts of the scenario that the run did not come to, in words."""
    missing = []
    if (scenario.steps or scenario.speculation) and scenario.engine.kind in ("torch", "vllm") and facts.fit is None:
        missing.append("steps")
    if scenario.loads is not None:
        due = len(scenario.loads.cases) * len(scenario.loads.seeds)
        if len(facts.loads) < due:
            missing.append(f"{due - len(facts.loads)} of {due} loads")
    if scenario.speculation is not None:
        due_lengths = {length for length in scenario.speculation.lengths if length}
        absent = due_lengths - {one.draft_length for one in facts.acceptance_validated}
        if scenario.engine.kind in ("torch", "vllm") and absent:
            missing.append(f"acceptance at {len(absent)} of {len(due_lengths)} draft lengths")
    return missing


_ANSWERS: dict[str, tuple[str, str]] = {
    "decode_step_mape": ("decode steps", ""),
    "speculative_step_mape": ("speculative steps", ""),
    "ttft_p50": ("load", "ttft p50"),
    "ttft_p95": ("load", "ttft p95"),
    "ttft_mean": ("load", "ttft mean"),
    "tpot_mean": ("load", "tpot mean"),
    "mean_acceptance_length": ("acceptance", ""),
    "draft_length_regret": ("draft length", "batch"),
    "mean_draft_length_regret": ("draft length", "mean"),
    "kv_blocks": ("kv blocks", ""),
    "table_followed": ("draft-length table", ""),
}
"""Part and beginning of the metric that a budget is for."""


def unanswered(scenario: Scenario, comparisons: Sequence[Comparison]) -> list[str]:
    """Budgets that no comparison was made for: the engine cannot say, or the run did not come to it."""
    budgets = scenario.budgets.model_dump()
    return [
        f"budget {name}"
        for name, (part, metric) in _ANSWERS.items()
        if budgets[name] not in (None, False)
        and not any(one.part.startswith(part) and one.metric.startswith(metric) for one in comparisons)
    ]


# ---- single steps ----------------------------------------------------------------------------------------


def _steps(scenario: Scenario, facts: LiveFacts, fit: StepsFit, samples: StepSamples, part: str) -> list[Comparison]:
    """One figure over all points, and one for every point."""
    medians = point_medians(samples)
    predicted = fit.steps.seconds(medians.work)
    error = predicted / medians.seconds - 1.0
    noise = _median_cv(medians)
    naive = None
    if facts.size is not None:
        line = _naive(fit.steps, facts)
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


def _median_cv(medians: PointMedians) -> float:
    return float(np.nanmedian(medians.cv)) if np.isfinite(medians.cv).any() else NAN


def _naive(steps: EngineSteps, facts: LiveFacts) -> EngineSteps:
    if facts.size is None:
        return steps
    size = facts.size
    return baseline_steps(
        steps, weight_bytes=size.weight_bytes, params=size.params, bandwidth=size.bandwidth, flops=size.flops
    )


# ---- loads -----------------------------------------------------------------------------------------------


def _loads(scenario: Scenario, facts: LiveFacts) -> list[Comparison]:
    fit = facts.serving_fit or facts.fit
    if fit is None or facts.limits is None:
        return []
    found: list[Comparison] = []
    for case in dict.fromkeys(run.case for run in facts.loads):
        runs = [run for run in facts.loads if run.case == case]
        for executor in EXECUTORS:
            found += _case(scenario, facts, fit, runs, executor)
    return found


def _case(
    scenario: Scenario, facts: LiveFacts, fit: StepsFit, runs: Sequence[LoadRun], executor: str
) -> list[Comparison]:
    """Means over seeds of the same figure, predicted and measured; each seed by its own requests and pace."""
    if facts.limits is None:
        return []
    steps, limits = fit.steps, facts.limits
    predicted = [
        predicted_figures(
            executor, run.trace, steps, limits, log_sd=steps.log_sd, paces=drawn_paces(run.probes, seed=scenario.seed)
        )
        for run in runs
    ]
    naive = _unqueued(_naive(steps, facts), runs) if facts.size is not None else {}
    return over_seeds(scenario, runs, executor, predicted, naive=naive)


def over_seeds(
    scenario: Scenario,
    runs: Sequence[LoadRun],
    executor: str,
    predicted: Sequence[dict[str, Foretold]],
    *,
    naive: dict[str, float],
) -> list[Comparison]:
    """Means over the seeds of one case of every figure, predicted and measured.

    What the form is off by, it is off by with every seed; the noise of each is its own. A figure's noise is what the
    probes of the pace leave open or, where it is more, the standard error of the mean error by its scatter over seeds:
    that also knows what nobody probed.
    """
    measured = [figures(run.rows) for run in runs]
    probed = any(run.probes for run in runs)  # nobody probes the pace of a server that is not ours
    failed = max(float(run.rows.refused.mean()) for run in runs)
    found = []
    for name in FIGURES:
        seen = np.array([one[name] for one in measured])
        foretold = [one[name] for one in predicted]
        value, down, up = (float(np.mean([getattr(one, end) for one in foretold])) for end in ("value", "down", "up"))
        pace = float(np.linalg.norm([one.noise for one in foretold])) / len(runs)
        down, up = (float(np.hypot(one, Z90 * np.nan_to_num(pace))) for one in (down, up))
        scatter = _standard_error(np.array([one.value for one in foretold]) / seen)
        mean = float(np.mean(seen))
        base = naive.get(name)
        budget = _load_budget(scenario, name, executor)
        found.append(
            Comparison(
                part=f"load {runs[0].case}",
                metric=name.removesuffix("_s").replace("_", " "),
                unit="s",
                executor=executor,
                predicted=value,
                lo=max(value - down, 0.0),
                hi=value + up,
                measured=mean,
                measured_lo=float(np.min(seen)),
                measured_hi=float(np.max(seen)),
                error=value / mean - 1.0 if mean > 0.0 and failed <= FAILED_SHARE else NAN,
                baseline=None if base is None or not mean > 0.0 else base / mean - 1.0,
                budget=budget,
                # a pace that was probed and is not known is above every limit: a maximum keeps it NaN
                noise=float(np.maximum(pace / value, np.nan_to_num(scatter))) if probed else scatter,
                noise_limit=None if budget is None or not probed else scenario.noise.of_budget * budget,
                group=f"utilisation {runs[0].utilisation:g}" if np.isfinite(runs[0].utilisation) else "",
            )
        )
    return found


def _standard_error(values: Floats) -> float:
    """Of their mean; NaN of one alone."""
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else NAN


def _load_budget(scenario: Scenario, name: str, executor: str) -> float | None:
    budgets = scenario.budgets
    given: float | None = getattr(budgets, name.removesuffix("_s"), None)
    if given is not None and executor == "closed_form" and budgets.closed_form is not None:
        return budgets.closed_form
    return given


def _unqueued(line: EngineSteps, runs: Sequence[LoadRun]) -> dict[str, float]:
    """The roofline without a queue: every request alone on the machine. [s]"""
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for run in runs:
        n_in, n_out = run.trace.n_in.astype(np.float64), run.trace.n_out.astype(np.float64)
        ttft = np.array([line.prefill(int(one)) for one in n_in])
        tpot = np.full(n_in.shape, line.decode(1, 0)[0])
        values = {"ttft": ttft, "tpot": tpot, "e2e": ttft + (n_out - 1.0) * tpot}
        for name in FIGURES:
            metric, _, statistic = name.removesuffix("_s").partition("_")
            if metric == "makespan":
                found[name].append(float((run.trace.t_s + values["e2e"]).max() - run.trace.t_s[0]))
            else:
                one = values[metric]
                found[name].append(
                    float(one.mean()) if statistic == "mean" else float(np.percentile(one, float(statistic[1:])))
                )
    return {name: float(np.mean(one)) for name, one in found.items()}


# ---- speculation -----------------------------------------------------------------------------------------


def _acceptance(scenario: Scenario, facts: LiveFacts, curve: AcceptanceCurve) -> list[Comparison]:
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
                budget=scenario.budgets.mean_acceptance_length,
                noise=error / measured,
                noise_limit=None if budget is None else budget / measured,
            )
        )
    return found


def _draft_lengths(
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
    noise = _median_cv(medians)
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
        noise_limit=_regret_limit(scenario, scenario.budgets.mean_draft_length_regret, medians),
    )
    return [*found, mean]


def _regret_limit(scenario: Scenario, budget: float | None, medians: PointMedians) -> float:
    """Scatter of a step up to which two cells' medians tell enough of the budget apart, never above a step's limit.

    The median of n normal values has a standard error of sqrt(pi / 2n) times their deviation.
    """
    if budget is None:
        return scenario.noise.step_cv
    n = float(np.median(medians.count))
    return min(scenario.noise.step_cv, scenario.noise.of_budget * budget / math.sqrt(2.0 * math.pi / (2.0 * n)))


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


# ---- facts that are exact --------------------------------------------------------------------------------


def _exact(part: str, metric: str, unit: str, predicted: float, measured: float, budget: float | None) -> Comparison:
    return Comparison(
        part=part,
        metric=metric,
        unit=unit,
        executor="policy",
        predicted=predicted,
        lo=predicted,
        hi=predicted,
        measured=measured,
        measured_lo=measured,
        measured_hi=measured,
        error=predicted - measured if math.isfinite(measured) else NAN,
        budget=budget,
        noise=0.0,
    )


def _kv_blocks(scenario: Scenario, facts: LiveFacts) -> list[Comparison]:
    return [
        _exact("kv blocks", setting, "blocks", predicted, measured, scenario.budgets.kv_blocks)
        for setting, predicted, measured in facts.kv_blocks
    ]


def _table(scenario: Scenario, facts: LiveFacts) -> list[Comparison]:
    budget = 1e-9 if scenario.budgets.table_followed else None
    return [
        _exact(
            "draft-length table",
            f"draft tokens per draft at batch {batch}",
            "tokens",
            float(length),
            facts.table_seen.get(batch, NAN),
            budget,
        )
        for batch, length in sorted(facts.table.items())
    ]

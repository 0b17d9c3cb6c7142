"""Latencies of loads that a live engine served, beside what every executor foretold of the same requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.engine_steps import StepsFit
from servecast.model.engine_steps import EngineSteps
from servecast.model.prediction import Z90
from servecast.validation.compared_steps import naive_line
from servecast.validation.executors import EXECUTORS, FIGURES, Foretold, figures, predicted_figures
from servecast.validation.live_facts import LiveFacts, LoadRun
from servecast.validation.pace import drawn_paces
from servecast.validation.scenario import Scenario
from servecast.validation.verdicts import NAN, Comparison

Floats = NDArray[np.float64]

FAILED_SHARE = 0.01
"""Of the requests of one run: with more of them failed, what the others saw is another load's, and is not judged."""


def compare_loads(scenario: Scenario, facts: LiveFacts) -> list[Comparison]:
    fit = facts.serving_fit or facts.fit
    if fit is None or facts.limits is None:
        return []
    found: list[Comparison] = []
    for case in load_cases(scenario, facts):
        runs = [run for run in facts.loads if run.case == case]
        for executor in EXECUTORS:
            found += _case(scenario, facts, fit, runs, executor)
    return found


def load_cases(scenario: Scenario, facts: LiveFacts) -> list[str]:
    """Names of the loads that ran, in the scenario's order; they were served in another."""
    ran = dict.fromkeys(run.case for run in facts.loads)
    written = [] if scenario.loads is None else [one.name for one in scenario.loads.cases]
    return [*(one for one in written if one in ran), *(one for one in ran if one not in written)]


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
    naive = _unqueued(naive_line(steps, facts), runs) if facts.size is not None else {}
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

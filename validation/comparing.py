"""From what a live run showed to comparisons: the model's figure, the measured one, the naive one, the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from servecast.validation.compared_loads import FAILED_SHARE, compare_loads, load_cases
from servecast.validation.compared_speculation import compare_acceptance, compare_draft_lengths
from servecast.validation.compared_steps import compare_steps
from servecast.validation.draft_choice import acceptance_curve
from servecast.validation.live_facts import LiveFacts
from servecast.validation.scenario import Scenario
from servecast.validation.verdicts import NAN, Comparison, Verdict


def compare(scenario: Scenario, facts: LiveFacts) -> list[Comparison]:
    """Every figure of the scenario that the run gives an answer to."""
    found: list[Comparison] = []
    if facts.fit is not None:
        if facts.validated is not None:
            found += compare_steps(scenario, facts, facts.fit, facts.validated, "decode steps")
        if facts.drafted is not None:
            found += compare_steps(
                scenario, facts, facts.fit, facts.drafted, "speculative steps", beside=facts.compared
            )
    found += compare_loads(scenario, facts)
    if scenario.speculation is not None and any(one.rounds for one in facts.acceptance_calibrated):
        curve = acceptance_curve(facts.acceptance_calibrated, max(scenario.speculation.lengths))
        found += compare_acceptance(scenario, facts, curve)
        if facts.fit is not None and facts.compared is not None and facts.acceptance_validated:
            found += compare_draft_lengths(scenario, scenario.speculation, facts, curve)
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


def reasons(scenario: Scenario, facts: LiveFacts, comparisons: Sequence[Comparison]) -> list[str]:
    """Why figures are not judged, in words; parts that the run did not come to have words of their own."""
    if all(value in (None, False) for value in scenario.budgets.model_dump().values()):
        return ["no budget is written"]
    found, failed = [], set()
    unjudged = [one for one in comparisons if one.verdict is Verdict.NOT_JUDGED]
    for case in load_cases(scenario, facts):
        rows = max((run.rows for run in facts.loads if run.case == case), key=lambda one: float(one.refused.mean()))
        if float(rows.refused.mean()) > FAILED_SHARE and any(one.part == f"load {case}" for one in unjudged):
            failed.add(f"load {case}")
            found.append(
                f"load {case}: {int(rows.refused.sum())} of {rows.refused.size} requests failed, "
                f"above {FAILED_SHARE:.0%} of a run"
            )
    for part in dict.fromkeys(one.part for one in unjudged if one.part not in failed):
        missing = [math.isnan(one.error) for one in unjudged if one.part == part]
        for count, why in ((sum(missing), "not measured"), (missing.count(False), "too noisy, or of unknown noise")):
            if count:
                found.append(f"{part}: {count} {'figure' if count == 1 else 'figures'} {why}")
    return found


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

"""A draft-length plan as JSON, as text, and as the engine's table; a fit scored on other cells."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.acceptance import AcceptanceFit
from servecast.calibration.fits.speculation_cells import NAMES, CellsFit
from servecast.calibration.fits.sweep_design import NextCell, informative_cells
from servecast.model.prediction import Prediction
from servecast.model.speculation_cells import SpeculationCells
from servecast.policies import sglang_speculation, trtllm_speculation, vllm_speculation
from servecast.policies.speculation import NEEDS_DRAFT_MODEL, SpeculationTable, from_dict
from servecast.policies.speculation_files import advice as engine_advice
from servecast.policies.speculation_files import emit_speculation
from servecast.policies.speculation_files import findings as engine_findings
from servecast.speculation_answers import BatchForecast, SpeculationAnswer

Floats = NDArray[np.float64]
Methods = Sequence[tuple[str, float, Sequence[tuple[int, int]]]]
"""Draft methods compared: name, goodput relative to the best, runs of batch sizes won; best first."""
SCHEMA = "servecast.speculation-plan/1"
SCORE_SCHEMA = "servecast.speculation-score/1"
_ENGINES = {"vllm": vllm_speculation, "sglang": sglang_speculation, "trtllm": trtllm_speculation}
TO_NAME = "TO-BE-NAMED"
"""Stands for a model or drafter that the user has not named; never written to a file."""


def score_cells(fit: CellsFit, cells: SpeculationCells) -> dict[str, Any]:
    """Predictions of `cells` by `fit`, and their errors where a speed is given.

    The regret of a batch size is the measured speed lost by taking, of the draft lengths measured there, the one whose
    predicted speed is highest; it needs two of them.
    """
    found = fit.predict(cells.batch, cells.gamma, cells.context)
    if cells.armed.any():
        armed = fit.predict(cells.batch, cells.gamma, cells.context, armed=True)
        tok_s = np.where(cells.armed, armed.tok_s_per_request, found.tok_s_per_request)
        lo, hi = np.where(cells.armed, armed.lo, found.lo), np.where(cells.armed, armed.hi, found.hi)
    else:
        tok_s, lo, hi = found.tok_s_per_request, found.lo, found.hi
    measured = cells.tok_s_per_request
    error = tok_s / measured - 1.0
    known = np.isfinite(measured)
    regrets = _regrets(cells, tok_s)
    return {
        "schema": SCORE_SCHEMA,
        "mape": float(np.abs(error[known]).mean()) if known.any() else None,
        "max_error": float(np.abs(error[known]).max()) if known.any() else None,
        "regret_max": max(regrets.values()) if regrets else None,
        "covered": float(((measured >= lo) & (measured <= hi))[known].mean()) if known.any() else None,
        "regrets": [
            {"batch_size": batch, "context": context, "regret": regret} for (batch, context), regret in regrets.items()
        ],
        "cells": [
            {
                "batch_size": float(cells.batch[i]),
                "draft_length": int(cells.gamma[i]),
                "predicted_tok_s_per_request": float(tok_s[i]),
                "lo": float(lo[i]),
                "hi": float(hi[i]),
                "measured_tok_s_per_request": float(measured[i]),
                "error": float(error[i]),
                "calibrated": bool(found.inside[i]),
            }
            for i in range(cells.size)
        ],
        "fit": fit_document(fit),
    }


def _regrets(cells: SpeculationCells, predicted: Floats) -> dict[tuple[float, float], float]:
    """By batch size and context (NaN where none is stated)."""
    found = {}
    known = np.isfinite(cells.tok_s_per_request) & ~cells.armed
    context = np.nan_to_num(cells.context, nan=-1.0)
    for batch, at in np.unique(np.column_stack([cells.batch, context]), axis=0):
        rows = np.flatnonzero((cells.batch == batch) & (context == at) & known)
        if rows.size > 1:
            measured = cells.tok_s_per_request[rows]
            regret = float(1.0 - measured[predicted[rows].argmax()] / measured.max())
            found[float(batch), float(at) if at >= 0.0 else math.nan] = regret
    return found


def fit_document(fit: CellsFit) -> dict[str, Any]:
    """Forms, parameters with standard errors, residuals, held-out errors, ranges."""
    held = fit.heldout
    return {
        "cells": fit.cells.size,
        "dropped": list(fit.dropped),
        "range": {
            "batch_size": [float(fit.cells.batch.min()), float(fit.cells.batch.max())],
            "draft_length": [int(fit.cells.gamma.min()), int(fit.cells.gamma.max())],
        },
        "in_sample_mape": float(
            np.abs(np.expm1(sum(member.weight * member.residuals for member in fit.members))).mean()
        ),
        "held_out": None
        if held is None
        else {
            "left_out": "one batch size at a time",
            "mape": float(np.abs(held.error).mean()),
            "mape_inside": float(np.abs(held.error[~held.outside]).mean()) if (~held.outside).any() else None,
            "max_error": float(np.abs(held.error).max()),
            "covered": float(held.covered.mean()),
            "by_batch": [
                {"batch_size": float(batch), "mape": float(mape)}
                for batch, mape in zip(held.batch, held.mape, strict=True)
            ],
        },
        "forms": [
            {
                "form": str(member.form),
                "weight": member.weight,
                "parameters": [
                    {"name": name, "value": float(value), "standard_error": float(error)}
                    for name, value, error in zip(
                        NAMES, member.theta, np.sqrt(np.diag(member.covariance)), strict=False
                    )
                ],
                "residuals": member.residuals,
            }
            for member in fit.members
        ],
    }


def next_cells(answer: SpeculationAnswer, fit: CellsFit | None) -> tuple[NextCell, ...]:
    """Cells whose measurement would settle most of what the schedule is decided by; none without a fit."""
    if fit is None:
        return ()
    last = int(answer.table.batches[-1])
    batches = np.unique(np.append(2 ** np.arange(int(np.log2(last)) + 1), last))
    share = np.add.reduceat(answer.weights, np.append(0, batches[:-1]))  # weight of the batches up to each
    return informative_cells(fit, batches.astype(np.float64), share, max_length=int(answer.table.lengths[-1]))


def acceptance_document(answer: SpeculationAnswer, acceptance: AcceptanceFit | None) -> dict[str, Any]:
    """Tokens per step by draft length, and what the acceptance file's fit says of transfer."""
    table = answer.table
    document: dict[str, Any] = {
        "tokens_per_step": [
            {
                "draft_length": int(k),
                "mean_acceptance_length": float(table.tokens[k]),
                "lo": float(table.tokens_lo[k]),
                "hi": float(table.tokens_hi[k]),
            }
            for k in table.lengths
        ]
    }
    if acceptance is not None:
        document |= {
            "form": acceptance.form,
            "measured": list(acceptance.lengths),
            "notes": list(acceptance.notes),
            "rivals": [{"form": one.form, "held_out_error_tokens": one.held_out_error} for one in acceptance.rivals],
        }
    return document


def plan_document(
    answer: SpeculationAnswer,
    *,
    policy: Mapping[str, Any] | None,
    fit: CellsFit | None = None,
    acceptance: AcceptanceFit | None = None,
    methods: Methods = (),
) -> dict[str, Any]:
    """The documented JSON of a plan."""
    schedule = answer.schedule
    return {
        "schema": SCHEMA,
        "status": str(schedule.status),
        "schedule": [{"lo": lo, "hi": hi, "draft_length": k} for lo, hi, k in schedule.segments],
        "predicted": [_forecast(one) for one in answer.forecasts],
        "gain": {
            "over_best_static": answer.gain_over_static,
            "over_no_speculation": answer.gain_over_off,
            "over_no_speculation_lo": answer.gain_over_off_lo,
            "over_no_speculation_hi": answer.gain_over_off_hi,
            "no_speculation_measured": answer.table.off_known,
            "best_static_length": answer.best_static,
        },
        "regret": {
            "mean": schedule.mean_regret,
            "worst": schedule.worst_regret,
            "bound": schedule.regret_bound,
            "objective": schedule.objective,
            "gap": schedule.gap,
        },
        "binding": list(schedule.binding),
        "infeasible_batches": list(schedule.infeasible_batches),
        "static": [
            {
                "draft_length": one.length,
                "mean_regret": one.mean_regret,
                "worst_regret": one.worst_regret,
                "feasible": one.feasible,
            }
            for one in schedule.static
        ],
        "by_context": [
            {
                "context": float(context),
                "schedule": [{"lo": lo, "hi": hi, "draft_length": k} for lo, hi, k in one.segments],
                "mean_regret": one.mean_regret,
            }
            for context, one in zip(answer.table.contexts, answer.by_context, strict=True)
        ],
        "limits": asdict(answer.limits),
        "acceptance": acceptance_document(answer, acceptance),
        "fit": None if fit is None else fit_document(fit),
        "measure_next": [
            {"batch_size": one.batch, "draft_length": one.gamma, "variance_removed": one.gain}
            for one in next_cells(answer, fit)
        ],
        "methods": [
            {"method": name, "relative_goodput": share, "wins": [{"lo": lo, "hi": hi} for lo, hi in runs]}
            for name, share, runs in methods
        ],
        "policy": policy,
        "advice": list(answer.advice),
        "warnings": list(answer.warnings),
    }


def _forecast(one: BatchForecast) -> dict[str, Any]:
    return {
        "batch_size": one.batch,
        "context": one.context,
        "draft_length": one.draft_length,
        "goodput_tok_s": _interval(one.goodput_tok_s),
        "tpot_s": _interval(one.tpot_s),
        "step_s": one.step_s,
        "over_best_static": one.over_static,
        "over_no_speculation": one.over_off,
        "meets": one.meets,
        "calibrated": one.tpot_s.calibrated,
    }


def _interval(one: Prediction) -> dict[str, float]:
    return {"value": one.value, "lo": one.lo, "hi": one.hi}


def speculation_table(
    answer: SpeculationAnswer,
    *,
    engine: str,
    version: str,
    model: str | None,
    method: str,
    draft_model: str | None,
    data_parallel: int,
    model_runner: str | None,
    provenance: Mapping[str, str],
) -> SpeculationTable:
    """The engine's document of a plan; the longest context speaks, since it is the slowest."""
    longest = answer.table.contexts[-1]
    by_batch = {one.batch: one for one in answer.forecasts if one.context == longest or math.isnan(longest)}
    lengths = [k for _, _, k in answer.schedule.segments]
    return from_dict(
        {
            "engine": engine,
            "engine_version": version,
            "model": model or TO_NAME,
            "method": method,
            "draft_model": draft_model or (TO_NAME if method in NEEDS_DRAFT_MODEL else None),
            "max_batch": int(answer.schedule.segments[-1][1]),
            "segments": [{"lo": lo, "hi": hi, "draft_length": k} for lo, hi, k in answer.schedule.segments],
            "num_speculative_tokens": max(*lengths, 1),
            "best_static_length": answer.best_static,
            "data_parallel": data_parallel,
            "model_runner": model_runner,
            "predicted": [
                {
                    "goodput_tokens_per_s": _interval(by_batch[hi].goodput_tok_s),
                    "tpot_s": _interval(by_batch[hi].tpot_s),
                }
                for _, hi, _ in answer.schedule.segments
            ],
            "advice": [text[:500] for text in answer.advice],
            "provenance": dict(provenance),
        }
    )


def policy_document(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> dict[str, Any]:
    """What the engine is given, with the limits it meets; `missing` names what the user has still to fill in."""
    files = emit_speculation(table, allow_static=allow_static, force=force)
    missing = [name for name in ("model", "draft_model") if getattr(table, name) == TO_NAME]
    document: dict[str, Any] = {
        "engine": table.engine,
        "engine_version": table.engine_version,
        "missing": missing,
        "findings": [
            {"level": str(one.level), "rule": one.rule, "message": one.message} for one in engine_findings(table)
        ],
        "advice": engine_advice(table),
        "written_length": _ENGINES[table.engine].written_length(table, allow_static=allow_static, force=force),
    }
    if table.engine == "vllm":
        config = vllm_speculation.speculative_config(table, allow_static=allow_static, force=force)
        document["speculative_config"] = {key: value for key, value in config.items() if value != TO_NAME}
    document["files"] = {} if missing else files
    return document


def plan_text(
    answer: SpeculationAnswer,
    policy: Mapping[str, Any] | None,
    source: str,
    *,
    fit: CellsFit | None = None,
    acceptance: AcceptanceFit | None = None,
    methods: Methods = (),
) -> str:
    """The plan for eyes."""
    schedule = answer.schedule
    said = ", ".join(f"{k} up to batch {hi}" for _, hi, k in schedule.segments)
    known = "" if answer.table.off_known else ", not measured"
    lines = [
        f"draft length {said}",
        "",
        f"  source       {source}",
        f"  gain         {answer.gain_over_static:+.1%} over length {answer.best_static} throughout, "
        f"{answer.gain_over_off:+.1%} [{answer.gain_over_off_lo:+.0%}, {answer.gain_over_off_hi:+.0%}] over no "
        f"speculation{known}",
        f"               (means over batch sizes, {'as the load has them' if answer.load else 'even in log B'})",
        f"  regret       mean {schedule.mean_regret:.2%}, worst {schedule.worst_regret:.2%} of the predicted best; "
        f"at most {schedule.regret_bound:.1%} within the intervals",
    ]
    if answer.limits.names:
        lines.append(
            f"  limits       {', '.join(answer.limits.names)}; binds: {', '.join(schedule.binding) or 'nothing'}"
        )
    elif schedule.binding:
        lines.append(f"  binds        {', '.join(schedule.binding)}")
    contexts = answer.table.contexts
    for context in contexts.tolist():
        if contexts.size > 1:
            lines += ["", f"  at {context:,.0f} cached tokens"]
        lines += ["", "  batch  length      goodput [tok/s]                 TPOT [ms]              vs static    vs off"]
        for one in answer.forecasts:
            if one.context == context or math.isnan(context):
                lines.append(_forecast_line(one))
    lines += [f"note: {note}" for note in (acceptance.notes if acceptance is not None else ())]
    for name, share, runs in methods:
        won = ", ".join(f"{lo} to {hi}" for lo, hi in runs) or "nowhere"
        lines.append(f"  method {name}: {share:.1%} of the best method's goodput, best at batch {won}")
    lines += [f"warning: {text}" for text in answer.warnings]
    if wanted := next_cells(answer, fit):
        cells = ", ".join(f"(batch_size {one.batch}, draft_length {one.gamma})" for one in wanted)
        lines.append(f"measure next: {cells}, which would settle most of what is open")
    if policy is not None:
        lines += [f"{one['level']}: {one['message']}" for one in policy["findings"]]
        if policy["written_length"] is not None and len(schedule.segments) > 1:
            lines.append(f"written: draft length {policy['written_length']} for every batch size, not the schedule")
        lines += [f"advice: {text}" for text in policy["advice"]]
        if "speculative_config" in policy:
            words = json.dumps(policy["speculative_config"])
            lines += ["", f"--speculative-config {shlex.quote(words)}"]
        if policy["missing"]:
            lines.append(f"name --{', --'.join(one.replace('_', '-') for one in policy['missing'])} for the files")
    else:
        lines += [f"advice: {text}" for text in answer.advice]
    return "\n".join(lines)


def _forecast_line(one: BatchForecast) -> str:
    goodput, tpot = one.goodput_tok_s, one.tpot_s
    marks = ("" if one.meets else "  misses the limits") + ("" if tpot.calibrated else "  extrapolated")
    return (
        f"  {one.batch:>5} {one.draft_length:>7}   {goodput.value:>9,.0f} [{goodput.lo:,.0f}, {goodput.hi:,.0f}]".ljust(
            49
        )
        + f"{1e3 * tpot.value:>7.2f} [{1e3 * tpot.lo:.2f}, {1e3 * tpot.hi:.2f}]".ljust(27)
        + f"{one.over_static:>+7.1%}   {one.over_off:>+7.1%}{marks}"
    )

"""The validation query: a scenario run live, in closed form and in the simulator; errors beside their budgets."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from servecast.validation.comparing import compare, not_reached, reasons, unanswered
from servecast.validation.live_facts import LiveFacts, LoadRun
from servecast.validation.pace import pace_of
from servecast.validation.scenario import Scenario, parse_scenario, shipped_scenarios, shipped_text
from servecast.validation.validated import Validated
from servecast.validation.verdicts import Comparison

SCHEMA = "servecast.validation/1"
"""Name and major version of the JSON that a validation is printed as."""
VLLM_PYTHON = "SERVECAST_VLLM_PYTHON"
"""Environment variable: the interpreter of an environment that has vLLM."""
Report = Callable[[str, int, int], None]


def load_scenario(name_or_path: str) -> tuple[Scenario, Path]:
    """A shipped scenario by name, or a YAML file, and the folder that its paths start from.

    Raises
    ------
    ValueError, OSError : no such scenario, or not one; one line.
    """
    from servecast.readers.yaml_edge import MAX_BYTES, load_yaml

    if name_or_path in shipped_scenarios():
        return parse_scenario(load_yaml(shipped_text(name_or_path), name=name_or_path), name=name_or_path), Path()
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"scenario must be a file or one of {', '.join(shipped_scenarios())}, got {name_or_path!r}")
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: must be UTF-8 text") from None
    return parse_scenario(load_yaml(text, name=str(path)), name=str(path)), path.parent


def validate(
    scenario: Scenario,
    *,
    folder: Path = Path(),
    device: str = "cpu",
    vllm_python: str | None = None,
    progress: Report | None = None,
) -> Validated:
    """Run a scenario and compare.

    Parameters
    ----------
    folder : that relative paths of the scenario start from.
    device : of the PyTorch engine, ``cpu`` or ``cuda``.
    vllm_python : interpreter of the vLLM environment; None: what SERVECAST_VLLM_PYTHON names.
    progress : called with (what, done, total).

    Raises
    ------
    ValueError : something that the scenario needs is not there.
    """
    begun = time.perf_counter()
    facts, more = _live(scenario, folder, device, vllm_python or os.environ.get(VLLM_PYTHON), progress)
    comparisons = (*compare(scenario, facts), *more)
    return Validated(
        scenario=scenario,
        facts=facts,
        comparisons=comparisons,
        missing=(*not_reached(scenario, facts), *unanswered(scenario, comparisons)),
        reasons=tuple(reasons(scenario, facts, comparisons)),
        wall_s=time.perf_counter() - begun,
    )


def _live(
    scenario: Scenario, folder: Path, device: str, vllm_python: str | None, progress: Report | None
) -> tuple[LiveFacts, list[Comparison]]:
    kind = scenario.engine.kind
    if kind == "torch":
        _require_torch()
        import torch

        from servecast.validation.torch_live import run_torch

        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where torch sees no CUDA device, got 'cuda'")
        return run_torch(scenario, device=device, progress=progress), []
    if kind == "vllm":
        _require_torch()
        if not vllm_python:
            raise ValueError(
                f"an engine of kind vllm needs the interpreter of an environment that has vLLM: --vllm-python, or "
                f"{VLLM_PYTHON} (make live-vllm builds one)"
            )
        if shutil.which(vllm_python) is None:
            raise ValueError(
                f"--vllm-python or {VLLM_PYTHON} must be an interpreter that can be run, got {vllm_python!r}"
            )
        from servecast.validation.vllm_live import run_vllm

        return run_vllm(scenario, python=vllm_python, progress=progress), []
    from servecast.served_runs import run_results, run_server

    return run_results(scenario, folder) if kind == "results" else run_server(scenario, folder, progress=progress)


def _require_torch() -> None:
    from importlib.util import find_spec

    for name in ("torch", "safetensors", "tokenizers"):
        if find_spec(name) is None:
            raise ValueError(f"this scenario needs {name}: pip install 'servecast[live]'")


def result_document(found: Validated) -> dict[str, Any]:
    """The documented JSON object (docs/json.md); errors as shares unless the unit says otherwise."""
    facts = found.facts
    return {
        "schema": SCHEMA,
        "scenario": found.scenario.name,
        "verdict": found.verdict.value,
        "engine": facts.engine,
        "fit": None if facts.fit is None else _fit(facts),
        "comparisons": [_row(one) for one in found.comparisons],
        "loads": [_load(run) for run in facts.loads],
        "missing": list(found.missing),
        "reasons": list(found.reasons),
        "stopped": facts.stopped,
        "notes": list(facts.notes),
        "wall_s": found.wall_s,
    }


def _load(run: LoadRun) -> dict[str, Any]:
    pace = pace_of(run.probes)
    known = any(np.isfinite(one.ratio) for one in run.probes)
    over = pace.over(float(np.nanmax(run.rows.last_token_s, initial=0.0)))
    return {
        "case": run.case,
        "seed": run.seed,
        "utilisation": run.utilisation,
        "busy_share": run.busy_share,
        "requests": len(run.trace.t_s),
        "failed": int(run.rows.refused.sum()),
        "pace_probes": len(run.probes),
        "pace": float(over.mean()) if known else None,
        "pace_least": float(over.min()) if known else None,
        "pace_most": float(over.max()) if known else None,
        "pace_error": pace.error,
        "prompt_pace": pace.prompts / pace.decode * float(over.mean()) if known else None,
        "client_lag_s": run.client_lag_s,
        "notes": list(run.notes),
    }


def _fit(facts: LiveFacts) -> dict[str, Any] | None:
    fit = facts.fit
    if fit is None:
        return None
    from servecast.calibration.fits.engine_steps import constant_names

    return {
        "form": fit.form,
        "tile": fit.steps.tile,
        "held_out_error": fit.held_out,
        "constants_s": dict(zip(constant_names(fit.steps.knots), fit.steps.constants.tolist(), strict=True)),
        "standard_errors_s": fit.standard_errors,
        "points": int(fit.medians.seconds.size),
        "noise_cv": fit.noise_cv,
        "drift_cv": fit.drift_cv,
    }


def _row(one: Comparison) -> dict[str, Any]:
    names = (
        "part",
        "group",
        "metric",
        "unit",
        "executor",
        "predicted",
        "lo",
        "hi",
        "measured",
        "measured_lo",
        "measured_hi",
        "error",
        "baseline",
        "budget",
        "noise",
        "noise_limit",
    )
    return {**{name: getattr(one, name) for name in names}, "verdict": one.verdict.value}


def samples_table(found: Validated) -> dict[str, Any]:
    """One row per request of every load, as `servecast simulate --out` writes them."""
    import numpy as np

    from servecast.simulating import rows_table

    tables = [
        {
            "case": np.full(run.rows.arrival_s.size, run.case),
            "seed": np.full(run.rows.arrival_s.size, run.seed),
            **rows_table(run.rows),
        }
        for run in found.facts.loads
    ]
    return {name: np.concatenate([one[name] for one in tables]) for name in tables[0]} if tables else {}

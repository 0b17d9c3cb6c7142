"""Runs of engines that a profile knows: a server reachable over HTTP, or the result file of a load generator.

The prediction is the one that `servecast simulate` gives for the same trace on one replica, and the closed form beside
it; nothing of the run is used but its arrivals and lengths.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.forecast import error_band
from servecast.model.prediction import Z90
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.readers.catalogues import gpu, llm
from servecast.simulating import Fleet, prepare_fleet
from servecast.validation.compared_loads import load_cases, over_seeds
from servecast.validation.executors import EXECUTORS, Foretold, capacity_rps, predicted_figures
from servecast.validation.live_facts import LiveFacts, LoadRun
from servecast.validation.scenario import Loads, Scenario
from servecast.validation.verdicts import Comparison

if TYPE_CHECKING:
    from servecast.readers.load_results import LoadResults

Report = Callable[[str, int, int], None]
NAN = float("nan")
TO_SAVE = (
    "save with vllm bench serve --save-result --save-detailed of January 2026 or newer, GuideLLM's benchmarks.json or "
    "AIPerf's profile_export.jsonl"
)


def run_results(scenario: Scenario, folder: Path) -> tuple[LiveFacts, list[Comparison]]:
    """Rows of a load generator's file against what the profile says of them.

    Raises
    ------
    ValueError : the file is none, holds several runs of which none is chosen, or has no stamps per request.
    """
    from servecast.readers.load_results import read_load_results

    path = folder / str(scenario.engine.file)
    found = read_load_results(path, benchmark=scenario.engine.benchmark)
    if found.rows is None or not found.has_arrivals:
        got = "aggregates only" if found.rows is None else "latencies without the starts"
        raise ValueError(f"{path}: must hold the start and the latencies of every request, got {got} ({TO_SAVE})")
    rows = _shifted(found.rows)
    facts = LiveFacts(engine={"engine": found.generator, "version": found.version, "model": found.model})
    facts.notes += [*found.notes, *(f"failed with: {one}" for one in found.errors)]
    trace = Trace(name=path.name, t_s=rows.arrival_s, n_in=rows.n_in, n_out=np.maximum(rows.n_out, 1))
    kept = ~rows.refused
    if not kept.any():
        raise ValueError(f"{path}: must hold a request that succeeded, got {rows.refused.size} that failed")
    fleet = _fleet(scenario, trace, folder)
    facts.loads.append(_run_of(path.name, fleet.trace, rows, ()))
    facts.notes += [*fleet.warnings, *_differences(found, fleet.deployment.llm.name)]
    return facts, _compared(scenario, facts, fleet, _profile(scenario, folder))


def _differences(found: LoadResults, predicted: str) -> list[str]:
    """What the file states of the server and the prediction does not know."""
    notes = []
    # a file names the model as the server does: with its organisation or a folder, with a suffix for its weights
    stated, ours = (f"-{re.sub('[^a-z0-9]+', '-', Path(one).name.lower())}-" for one in (found.model, predicted))
    if found.model and not (stated in ours or ours in stated):
        notes.append(f"the file is of model {found.model}, the prediction of {predicted}")
    if found.speculation is not None:
        notes.append("the server speculated; the prediction is of one that does not")
    return notes


def run_server(
    scenario: Scenario, folder: Path = Path(), *, progress: Report | None = None
) -> tuple[LiveFacts, list[Comparison]]:
    """Loads of the scenario sent to a server that runs already.

    Raises
    ------
    ValueError : the server answers no request of the first load.
    """
    from servecast.validation.http_load import load_requests, run_open_loop
    from servecast.validation.live_loads import load_trace, served_load

    spec, loads = scenario.engine, scenario.loads
    if loads is None or spec.url is None or spec.served_model is None:
        raise ValueError("loads, engine.url and engine.served_model must be given for kind server")
    facts = LiveFacts(engine={"engine": spec.engine, "url": spec.url, "model": spec.served_model})
    fleet = _fleet(scenario, _lengths(loads, spec.max_num_seqs), folder)
    if fleet.warnings:
        most = loads.prompt_tokens[1] + loads.output_tokens[1]
        facts.notes.append(f"requests of up to {most} tokens are beyond what the predicted engine takes")
    n_in, n_out = (np.linspace(*span, 33) for span in (loads.prompt_tokens, loads.output_tokens))
    capacity = capacity_rps(fleet.steps, fleet.limits, n_in, n_out)
    runs = [(case, seed) for case in loads.cases for seed in loads.seeds]
    random.Random(scenario.seed).shuffle(runs)  # noqa: S311 (an order, not a secret)
    for number, (case, seed) in enumerate(runs):
        trace = load_trace(loads, case, seed, capacity=capacity)
        run = run_open_loop(spec.url, load_requests(trace, vocabulary=1000, seed=seed), model=spec.served_model)
        load = served_load(run, case=case, seed=seed)  # nobody probes the pace of a server that is not ours
        interrupted = (run.aborted or "").startswith("interrupted")
        if number == 0 and not interrupted and load.rows.refused.all():
            why = f": {load.notes[0]}" if load.notes else ""
            raise ValueError(
                f"engine.url must be of a server that answers for {spec.served_model}, got {spec.url}, where every "
                f"request failed{why}"
            )
        if not (interrupted and load.rows.refused.all()):
            facts.loads.append(load)
        facts.notes += [f"{case.name}, seed {seed}: {one}" for one in load.notes]
        if run.aborted or run.clock_warning:
            facts.stopped = f"load {case.name}: {run.aborted or run.clock_warning}"
            break
        if progress is not None:
            progress("loads", number + 1, len(runs))
    return facts, _compared(scenario, facts, fleet, _profile(scenario, folder))


def _run_of(case: str, trace: Trace, rows: RequestRows, notes: tuple[str, ...]) -> LoadRun:
    return LoadRun(
        case=case,
        seed=0,
        utilisation=NAN,
        busy_share=NAN,
        trace=trace,
        rows=rows,
        notes=notes,
    )


def _shifted(rows: RequestRows) -> RequestRows:
    """Stamps from the first arrival on."""
    start = rows.arrival_s[0]
    names = ("arrival_s", "scheduled_s", "first_token_s", "last_token_s")
    return replace(rows, **{name: getattr(rows, name) - start for name in names})


def _lengths(loads: Loads, count: int) -> Trace:
    """As many of the longest requests as an engine may hold, to size its tables by."""
    return Trace(
        name="lengths",
        t_s=np.arange(float(count)),
        n_in=np.full(count, loads.prompt_tokens[1]),
        n_out=np.full(count, loads.output_tokens[1]),
    )


def _fleet(scenario: Scenario, trace: Trace, folder: Path) -> Fleet:
    """One replica of the engine that the scenario names."""
    spec = scenario.engine
    if spec.model is None or spec.gpu is None:
        raise ValueError("engine.model and engine.gpu must be given")
    return prepare_fleet(
        trace,
        llm(_from(folder, spec.model)),
        gpu(spec.gpu),
        replicas=1,
        tp=spec.tp,
        pp=spec.pp,
        engine=spec.engine,
        precision=spec.precision,
        kv_precision=spec.kv_precision,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=max(spec.max_num_batched_tokens, spec.max_num_seqs),
        prefix_caching=False,
        profile=_profile(scenario, folder),
    )


def _profile(scenario: Scenario, folder: Path) -> str:
    given = scenario.engine.profile
    return SHIPPED if given is None else _from(folder, given)


def _from(folder: Path, name: str) -> str:
    """A file, or a folder with a config.json, from the scenario's folder where there is one, else the name as it is."""
    path = folder / name
    return str(path) if path.is_file() or (path / "config.json").is_file() else name


def _compared(scenario: Scenario, facts: LiveFacts, fleet: Fleet, profile: str) -> list[Comparison]:
    """Means over seeds, predicted and measured; intervals are the profile's bands, of a step and of a TTFT."""
    loaded = load_profile(profile)
    lo, hi = error_band(loaded, fleet.deployment, "tpot")
    log_sd = float(hi - lo) / (2.0 * Z90)
    first = error_band(loaded, fleet.deployment, "ttft")
    found: list[Comparison] = []
    for case in load_cases(scenario, facts):
        runs = [run for run in facts.loads if run.case == case]
        for executor in EXECUTORS:
            predicted = [
                {
                    name: _widened(one, first) if name.startswith("ttft") else one
                    for name, one in predicted_figures(
                        executor, run.trace, fleet.steps, fleet.limits, log_sd=log_sd
                    ).items()
                }
                for run in runs
            ]
            found += over_seeds(scenario, runs, executor, predicted, naive={})
    return found


def _widened(one: Foretold, band: tuple[float, float]) -> Foretold:
    """At least the profile's band of a TTFT: step times that scatter are not all that a first token waits for."""
    down, up = one.value * (1.0 - math.exp(band[0])), one.value * (math.exp(band[1]) - 1.0)
    return replace(one, down=max(one.down, down), up=max(one.up, up))

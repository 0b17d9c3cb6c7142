"""Runs of engines that a profile knows: a server reachable over HTTP, or the result file of a load generator.

The prediction is the one that `servecast simulate` gives for the same trace on one replica, and the closed form beside
it; nothing of the run is used but its arrivals and lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.forecast import error_band
from servecast.model.prediction import Z90
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.readers.catalogues import gpu, llm
from servecast.simulating import Fleet, prepare_fleet
from servecast.validation.compared_loads import over_seeds
from servecast.validation.executors import EXECUTORS, capacity_rps, predicted_figures
from servecast.validation.live_facts import LiveFacts, LoadRun
from servecast.validation.scenario import Loads, Scenario
from servecast.validation.verdicts import Comparison

Report = Callable[[str, int, int], None]
NAN = float("nan")


def run_results(scenario: Scenario, folder: Path) -> tuple[LiveFacts, list[Comparison]]:
    """Rows of a load generator's file against what the profile says of them.

    Raises
    ------
    ValueError : the file is none, or has no stamps per request.
    """
    from servecast.readers.load_results import read_load_results

    path = folder / str(scenario.engine.file)
    found = read_load_results(path)
    if found.rows is None or not found.has_arrivals:
        raise ValueError(f"{path}: must hold the start and the latencies of every request, got aggregates only")
    rows = _shifted(found.rows)
    facts = LiveFacts(engine={"engine": found.generator, "version": found.version, "model": found.model})
    facts.notes += [*found.notes, *found.errors]
    trace = Trace(name=path.name, t_s=rows.arrival_s, n_in=rows.n_in, n_out=np.maximum(rows.n_out, 1))
    kept = ~rows.refused
    if not kept.any():
        raise ValueError(f"{path}: must hold a request that succeeded, got {rows.refused.size} that failed")
    facts.loads.append(_run_of(path.name, trace, rows, ()))
    return facts, _compared(scenario, facts, _fleet(scenario, trace))


def run_server(scenario: Scenario, *, progress: Report | None = None) -> tuple[LiveFacts, list[Comparison]]:
    """Loads of the scenario sent to a server that runs already."""
    from servecast.validation.http_load import load_requests, run_open_loop
    from servecast.validation.live_loads import load_trace, served_load

    spec, loads = scenario.engine, scenario.loads
    if loads is None or spec.url is None or spec.served_model is None:
        raise ValueError("loads, engine.url and engine.served_model must be given for kind server")
    facts = LiveFacts(engine={"engine": spec.engine, "url": spec.url, "model": spec.served_model})
    fleet = _fleet(scenario, _lengths(loads, spec.max_num_seqs))
    n_in, n_out = (np.linspace(*span, 33) for span in (loads.prompt_tokens, loads.output_tokens))
    capacity = capacity_rps(fleet.steps, fleet.limits, n_in, n_out)
    runs = [(case, seed) for case in loads.cases for seed in loads.seeds]
    random.Random(scenario.seed).shuffle(runs)  # noqa: S311 (an order, not a secret)
    for number, (case, seed) in enumerate(runs):
        trace = load_trace(loads, case, seed, capacity=capacity)
        run = run_open_loop(spec.url, load_requests(trace, vocabulary=1000, seed=seed), model=spec.served_model)
        load = served_load(run, case=case, seed=seed)  # nobody probes the pace of a server that is not ours
        facts.loads.append(load)
        facts.notes += [f"{case.name}, seed {seed}: {one}" for one in load.notes]
        if run.aborted or run.clock_warning:
            facts.stopped = f"load {case.name}: {run.aborted or run.clock_warning}"
            break
        if progress is not None:
            progress("loads", number + 1, len(runs))
    return facts, _compared(scenario, facts, fleet)


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


def _fleet(scenario: Scenario, trace: Trace) -> Fleet:
    """One replica of the engine that the scenario names."""
    spec = scenario.engine
    if spec.model is None or spec.gpu is None:
        raise ValueError("engine.model and engine.gpu must be given")
    return prepare_fleet(
        trace,
        llm(spec.model),
        gpu(spec.gpu),
        replicas=1,
        tp=spec.tp,
        engine=spec.engine,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=max(spec.max_num_batched_tokens, spec.max_num_seqs),
        prefix_caching=False,
        profile=spec.profile or SHIPPED,
    )


def _compared(scenario: Scenario, facts: LiveFacts, fleet: Fleet) -> list[Comparison]:
    """Means over seeds, predicted and measured; the interval is the profile's band of a step."""
    lo, hi = error_band(load_profile(scenario.engine.profile or SHIPPED), fleet.deployment, "tpot")
    log_sd = float(hi - lo) / (2.0 * Z90)
    found: list[Comparison] = []
    for case in dict.fromkeys(run.case for run in facts.loads):
        runs = [run for run in facts.loads if run.case == case]
        for executor in EXECUTORS:
            predicted = [
                predicted_figures(executor, run.trace, fleet.steps, fleet.limits, log_sd=log_sd) for run in runs
            ]
            found += over_seeds(scenario, runs, executor, predicted, naive={})
    return found

"""Loads of a scenario: the requests that are sent, and what came of them as the server saw it."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from servecast.calibration.fits.arrival_draws import arrival_times
from servecast.model.arrival_processes import GammaRenewal
from servecast.model.workload import Trace
from servecast.validation.http_load import LiveRun
from servecast.validation.live_facts import LoadRun
from servecast.validation.scenario import LoadCase, Loads


def load_trace(loads: Loads, case: LoadCase, seed: int, *, capacity: float) -> Trace:
    """Requests of one case: gamma gaps at its share of the capacity, uniform lengths; one seed, one trace."""
    rng = np.random.default_rng([seed, sum(case.name.encode())])
    process = GammaRenewal.from_cv(case.utilisation * capacity, case.gap_cv)
    times = arrival_times(process, loads.requests, rng)
    low_in, high_in = loads.prompt_tokens
    low_out, high_out = loads.output_tokens
    return Trace(
        name=f"{case.name} seed {seed}",
        t_s=times - times[0],
        n_in=rng.integers(low_in, high_in + 1, loads.requests),
        n_out=rng.integers(low_out, high_out + 1, loads.requests),
    )


def served_load(run: LiveRun, *, case: LoadCase, seed: int) -> LoadRun:
    """A load as the server saw it: requests arrive when they were truly sent, with the lengths that they truly had.

    How late the client was with them is kept beside it; it is no property of the engine.
    """
    rows = replace(run.rows, arrival_s=run.sent_s)
    order = np.argsort(rows.arrival_s, kind="stable")
    rows = replace(rows, **{one.name: getattr(rows, one.name)[order] for one in fields(rows)})
    start = rows.arrival_s[0] if rows.arrival_s.size else 0.0
    stamps = ("arrival_s", "scheduled_s", "first_token_s", "last_token_s")
    rows = replace(rows, **{name: getattr(rows, name) - start for name in stamps})
    return LoadRun(
        case=case.name,
        seed=seed,
        utilisation=case.utilisation,
        busy_share=float("nan"),
        trace=Trace(
            name=f"{case.name} seed {seed}",
            t_s=rows.arrival_s,
            n_in=np.maximum(rows.n_in, 1),
            n_out=np.maximum(rows.n_out, 1),
        ),
        rows=rows,
        client_lag_s=run.client_lag_p99_s,
        notes=tuple(one for one in (*run.errors, run.aborted, run.clock_warning) if one),
    )

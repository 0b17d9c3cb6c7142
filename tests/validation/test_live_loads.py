"""Loads as the server saw them. Expected values by hand."""

from __future__ import annotations

import numpy as np
from live_samples import scenario

from servecast.model.request_rows import measured_rows
from servecast.validation.http_load import LiveRun
from servecast.validation.live_loads import load_trace, served_load


def test_requests_arrive_when_they_were_sent() -> None:
    """Planned at 0, 1, 2; the client slept until 1.5: TTFT counts from the sending, order is that of sending."""
    rows = measured_rows([0.0, 1.0, 2.0], [1.6, 1.8, 2.2], [1.9, 2.0, 2.5], [5, 6, 7], [3, 4, 5])
    run = LiveRun(
        rows=rows,
        errors=(),
        sent_s=np.array([1.6, 1.5, 2.0]),
        client_lag_p99_s=1.6,
        aborted=None,
        clock_warning=None,
    )
    loads = scenario().loads
    assert loads is not None
    load = served_load(run, case=loads.cases[0], seed=1)
    np.testing.assert_allclose(load.trace.t_s, [0.0, 0.1, 0.5], atol=1e-12)
    assert load.trace.n_in.tolist() == [6, 5, 7]
    np.testing.assert_allclose(load.rows.first_token_s - load.rows.arrival_s, [0.3, 0.0, 0.2], atol=1e-12)
    assert load.client_lag_s == 1.6


def test_one_seed_is_one_trace_and_rates_follow_the_share() -> None:
    """Mean gap 1 / (0.8 x 10) s within 4 standard errors of 40 draws a seed, over 50 seeds."""
    loads = scenario().loads
    assert loads is not None
    (case,) = (one for one in loads.cases if one.name == "heavy")
    one, again = (load_trace(loads, case, 3, capacity=10.0) for _ in range(2))
    assert np.array_equal(one.t_s, again.t_s)
    gaps = np.concatenate([np.diff(load_trace(loads, case, seed, capacity=10.0).t_s) for seed in range(50)])
    assert abs(gaps.mean() - 1.0 / 8.0) < 4.0 * gaps.std() / np.sqrt(gaps.size)
    assert one.n_in.min() >= 32
    assert one.n_in.max() <= 96

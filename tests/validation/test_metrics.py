"""Metrics of request rows: values by hand, and what is missing stays missing."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from servecast.model.request_rows import RequestRows
from servecast.model.slo import Slo
from servecast.validation.metrics import holds, latencies, meets, percentile, summary

NAN = math.nan
ROWS = RequestRows(  # hand: two ordinary requests, one of a single token, one refused
    arrival_s=np.array([1.0, 2.0, 3.0, 4.0]),
    scheduled_s=np.array([1.0, 2.5, 3.5, NAN]),
    first_token_s=np.array([1.5, 3.0, 5.0, NAN]),
    last_token_s=np.array([3.5, 7.0, 5.0, NAN]),
    n_in=np.array([100, 200, 300, 400]),
    n_out=np.array([5, 11, 1, 50]),
    replica=np.array([0, 0, 0, -1], dtype=np.int32),
    preemptions=np.array([0, 2, 0, 0], dtype=np.int32),
    cached_tokens=np.array([0, 50, 200, 0]),
    refused=np.array([False, False, False, True]),
)


def test_latencies_by_hand() -> None:
    np.testing.assert_allclose(latencies(ROWS, "ttft"), [0.5, 1.0, 2.0, NAN], rtol=1e-12)
    np.testing.assert_allclose(latencies(ROWS, "tpot"), [0.5, 0.4, NAN, NAN], rtol=1e-12)
    np.testing.assert_allclose(latencies(ROWS, "e2e"), [2.5, 5.0, 2.0, NAN], rtol=1e-12)


def test_summary_by_hand() -> None:
    slos = (
        Slo(metric="ttft", percentile=50.0, limit_s=1.0),
        Slo(metric="tpot", percentile=90.0, limit_s=0.45),
        Slo(metric="e2e", percentile=60.0, limit_s=5.0),
    )
    found = summary(ROWS, slos)
    assert (found.requests, found.refused, found.preemptions) == (4, 1, 2)
    np.testing.assert_allclose(found.cached_share, 250 / 1000, rtol=1e-12)
    np.testing.assert_allclose(found.makespan_s, 6.0, rtol=1e-12)  # 1 s to 7 s
    np.testing.assert_allclose(found.throughput_rps, 3 / 6, rtol=1e-12)
    np.testing.assert_allclose(found.output_tokens_per_s, 17 / 6, rtol=1e-12)
    np.testing.assert_allclose(
        [found.mean["ttft"], found.mean["tpot"], found.mean["e2e"]], [3.5 / 3, 0.45, 9.5 / 3], rtol=1e-12
    )
    np.testing.assert_allclose(found.percentiles["ttft"][50.0], 1.0, rtol=1e-12)
    np.testing.assert_allclose(found.percentiles["ttft"][90.0], 1.8, rtol=1e-12)  # 0.8 of the way from 1 to 2
    # of four requests two meet TTFT and three e2e; TPOT is asked of three (the refused one misses), one meets it
    np.testing.assert_allclose(found.attainment["ttft_p50"], 2 / 4, rtol=1e-12)
    np.testing.assert_allclose(found.attainment["tpot_p90"], 1 / 3, rtol=1e-12)
    np.testing.assert_allclose(found.attainment["e2e_p60"], 3 / 4, rtol=1e-12)
    np.testing.assert_allclose(found.slo_attainment, 1 / 4, rtol=1e-12)  # the second one only
    np.testing.assert_allclose(found.goodput_rps, 1 / 6, rtol=1e-12)
    assert holds(ROWS, slos[:1])
    assert holds(ROWS, slos[::2])
    assert not holds(ROWS, slos)


def test_a_limit_is_met_by_what_equals_it() -> None:
    np.testing.assert_array_equal(
        meets(ROWS, Slo(metric="ttft", percentile=50.0, limit_s=1.0)), [True, True, False, False]
    )


def test_one_token_has_no_tpot_to_miss() -> None:
    np.testing.assert_array_equal(
        meets(ROWS, Slo(metric="tpot", percentile=50.0, limit_s=0.45)), [False, True, True, False]
    )


def _only(keep: list[int]) -> RequestRows:
    return replace(ROWS, **{one.name: getattr(ROWS, one.name)[keep] for one in fields(RequestRows)})


def test_what_is_missing_is_never_zero() -> None:
    slo = Slo(metric="ttft", percentile=50.0, limit_s=1.0)
    refused = summary(_only([3]), (slo,))
    for value in (refused.makespan_s, refused.throughput_rps, refused.output_tokens_per_s, refused.goodput_rps):
        assert math.isnan(value)
    for metric in ("ttft", "tpot", "e2e"):
        assert math.isnan(refused.mean[metric])
        assert all(math.isnan(value) for value in refused.percentiles[metric].values())
    assert refused.slo_attainment == 0.0  # it was asked for and not met: that is a zero
    single = summary(_only([2]))
    assert math.isnan(single.mean["tpot"])
    np.testing.assert_allclose(single.mean["ttft"], 2.0, rtol=1e-12)
    assert math.isnan(single.slo_attainment)  # no limits
    assert math.isnan(single.goodput_rps)


def test_a_limit_that_nobody_has_holds() -> None:
    """Outputs of one token have no TPOT: its share is missing, and no reason to buy more."""
    slo = Slo(metric="tpot", percentile=99.0, limit_s=0.001)
    assert math.isnan(summary(_only([2]), (slo,)).attainment["tpot_p99"])
    assert holds(_only([2]), (slo,))


def test_percentile_interpolates() -> None:
    np.testing.assert_allclose(percentile(np.array([3.0, NAN, 1.0, 2.0]), 75.0), 2.5, rtol=1e-12)
    assert math.isnan(percentile(np.array([NAN]), 50.0))
    assert math.isnan(percentile(np.array([]), 50.0))


def test_time_scales() -> None:
    k = 3.0
    stamps = ("arrival_s", "scheduled_s", "first_token_s", "last_token_s")
    longer = summary(replace(ROWS, **{name: k * getattr(ROWS, name) for name in stamps}))
    for metric, value in summary(ROWS).mean.items():
        np.testing.assert_allclose(longer.mean[metric], k * value, rtol=1e-12)
    np.testing.assert_allclose(longer.throughput_rps, summary(ROWS).throughput_rps / k, rtol=1e-12)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="metric must be one of ttft, tpot, e2e, got 'itl'"):
        latencies(ROWS, "itl")

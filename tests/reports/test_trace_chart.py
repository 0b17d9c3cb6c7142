"""The trace chart: right aggregates, a small specification, and a picture that renders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from servecast.model.workload import Trace
from servecast.readers.traces import read_trace
from servecast.reports.trace_chart import arrival_windows, length_bins, trace_chart


def trace(requests: int, span_s: float, n_in: int = 512) -> Trace:
    rng = np.random.default_rng(2)
    t_s = np.sort(rng.uniform(0.0, span_s, requests))
    n_out = rng.integers(1, 300, requests)
    return Trace(name="demo", t_s=t_s - t_s[0], n_in=np.full(requests, n_in), n_out=n_out)


@pytest.mark.parametrize("span_s", [0.3, 29.0, 600.0, 3502.0, 86_400.0, 700_000.0])
def test_windows_count_every_complete_one(span_s: float) -> None:
    recorded = trace(500, span_s)
    window_s, windows = arrival_windows(recorded)
    assert 1 <= len(windows) <= 120
    counted = sum(window["rate_rps"] * window_s for window in windows)
    inside = np.count_nonzero(recorded.t_s <= windows[-1]["end_min"] * 60.0)
    assert counted == pytest.approx(inside, rel=1e-9)


def test_length_bins_hold_every_request() -> None:
    lengths = np.random.default_rng(1).integers(1, 20_000, 5_000)
    bins = length_bins(lengths)
    width = np.log([row["high"] / row["low"] for row in bins])
    # shares are per bin of the mean log width: weighted by width they add up to one
    mean_width = np.log(bins[-1]["high"] / bins[0]["low"]) / 36
    assert float(np.sum([row["share"] for row in bins] * width) / mean_width) == pytest.approx(1.0, rel=1e-9)
    assert (bins[0]["low"], bins[-1]["high"]) == (lengths.min(), lengths.max() + 1.0)


def test_titles_carry_the_statistics() -> None:
    spec = trace_chart(trace(2_000, 600.0)).to_dict()
    headline = " ".join(spec["title"]["subtitle"])
    assert "2,000 requests in 10 minutes" in headline
    assert "IDC(60 s)" in headline
    assert "p50 512" in json.dumps(spec)


@pytest.mark.parametrize("requests", [2, 300, 50_000])
def test_specification_stays_small(requests: int) -> None:
    spec = trace_chart(trace(requests, 3_600.0)).to_dict()
    assert 0 < sum(len(rows) for rows in spec["datasets"].values()) <= 300
    assert len(json.dumps(spec)) < 60_000


@pytest.mark.parametrize("n_in", [1, 512])
def test_renders(n_in: int) -> None:
    converter = pytest.importorskip("vl_convert")
    svg = converter.vegalite_to_svg(trace_chart(trace(300, 600.0, n_in)).to_json())
    assert svg.startswith("<svg")
    assert "NaN" not in svg


def test_renders_a_published_trace(data_path: Callable[..., Path]) -> None:
    converter = pytest.importorskip("vl_convert")
    chart = trace_chart(read_trace(data_path("azure-llm-2023", "code.csv.gz")))
    assert "busiest minute 4.18 x mean" in converter.vegalite_to_svg(chart.to_json())

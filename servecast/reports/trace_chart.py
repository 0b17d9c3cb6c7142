"""One glance at a trace: when its requests arrive, and how long their prompts and outputs are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from servecast.model.arrivals import arrival_statistics, length_statistics
from servecast.model.workload import ArrivalStatistics, Trace

if TYPE_CHECKING:
    import altair as alt

_WINDOWS_S = (1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0)
_MOST_WINDOWS = 120
_LENGTH_BINS = 36
_ARRIVALS_COLOUR, _IN_COLOUR, _OUT_COLOUR, _RULE_COLOUR = "#4c78a8", "#72a37e", "#c98b45", "#333333"
_WIDTH, _HEIGHT, _GAP = 720, 150, 50


def trace_chart(trace: Trace) -> alt.VConcatChart:
    """Arrival rate over time above the length distributions, with the statistics in the titles.

    The chart holds window counts and histogram bins only (at most about 200 rows), never the requests themselves.
    """
    import altair as alt

    lengths = alt.hconcat(_lengths(trace.n_in, "in"), _lengths(trace.n_out, "out"), spacing=_GAP)
    title = alt.Title(
        trace.name, subtitle=_headline(trace), anchor="start", fontSize=15, subtitleFontSize=12, offset=12
    )
    chart: alt.VConcatChart = (
        alt.vconcat(_arrivals(trace), lengths)
        .properties(title=title)
        .configure_view(stroke=None)
        .configure_axis(grid=False, domainColor="#999999", tickColor="#999999", titleFontWeight="normal")
    )
    return chart


def arrival_windows(trace: Trace) -> tuple[float, list[dict[str, float]]]:
    """Window length [s] and, per complete window, its start and end [min] and its rate [requests/s]."""
    t_s = trace.t_s - trace.t_s[0]
    span_s = float(t_s[-1])
    fitting = (window_s for window_s in _WINDOWS_S if span_s <= _MOST_WINDOWS * window_s)
    window_s = min(next(fitting, span_s / _MOST_WINDOWS), span_s)
    windows = min(max(int(span_s // window_s), 1), _MOST_WINDOWS)
    counts, edges = np.histogram(t_s, bins=windows, range=(0.0, windows * window_s))
    return window_s, [
        {"start_min": start / 60.0, "end_min": end / 60.0, "rate_rps": count / window_s}
        for start, end, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    ]


def length_bins(lengths: NDArray[np.int64]) -> list[dict[str, float]]:
    """Histogram over bins of equal ratio: from, to [tokens] and the share of requests."""
    low, high = float(lengths.min()), float(lengths.max()) + 1.0
    # whole tokens: bins narrower than one token would leave gaps between the bars of short lengths
    edges = np.unique(np.rint(np.geomspace(low, high, _LENGTH_BINS + 1)))
    counts, _ = np.histogram(lengths, bins=edges)
    # the share per unit of log length, so that bars of rounded width keep their area
    width = np.log(edges[1:] / edges[:-1])
    density = counts / lengths.size / width * np.log(high / low) / _LENGTH_BINS
    return [
        {"low": left, "high": right, "share": share}
        for left, right, share in zip(edges[:-1].tolist(), edges[1:].tolist(), density.tolist(), strict=True)
    ]


def _arrivals(trace: Trace) -> alt.LayerChart | alt.FacetChart:
    import altair as alt

    window_s, rows = arrival_windows(trace)
    mean = arrival_statistics(trace.t_s).rate_rps
    bars = (
        _chart(rows)
        .mark_rect(color=_ARRIVALS_COLOUR, opacity=0.85)
        .encode(
            x=alt.X("start_min:Q", title="minutes since the first request", scale=alt.Scale(nice=False)),
            x2="end_min:Q",
            y=alt.Y("rate_rps:Q", title="requests/s", scale=alt.Scale(zero=True)),
            y2=alt.datum(0),
            tooltip=[alt.Tooltip("start_min:Q", format=".1f"), alt.Tooltip("rate_rps:Q", format=".2f")],
        )
    )
    end_min = rows[-1]["end_min"]
    line = _rule({"rate_rps": mean}).encode(y="rate_rps:Q")
    label = _label({"rate_rps": mean, "x": end_min, "text": f"mean {mean:.3g}"}, align="left", dx=4, dy=0).encode(
        x="x:Q", y="rate_rps:Q"
    )
    return alt.layer(bars, line, label).properties(
        width=_WIDTH, height=_HEIGHT, title=_title(f"Arrivals in windows of {window_s:g} s")
    )


def _lengths(lengths: NDArray[np.int64], side: str) -> alt.LayerChart | alt.FacetChart:
    import altair as alt

    name, colour = ("Prompt tokens", _IN_COLOUR) if side == "in" else ("Output tokens", _OUT_COLOUR)
    rows = length_bins(lengths)
    top = 1.15 * max(row["share"] for row in rows)  # room for the labels of the percentiles
    p50, p99 = np.percentile(lengths, [50, 99]).tolist()
    scale = alt.Scale(type="log", domain=[rows[0]["low"], rows[-1]["high"]], nice=False)
    height = alt.Scale(domain=[0.0, top], nice=False)
    bars = (
        _chart(rows)
        .mark_rect(color=colour, opacity=0.85)
        .encode(
            x=alt.X("low:Q", title="tokens", scale=scale, axis=alt.Axis(format="~s", values=_decades(rows))),
            x2="high:Q",
            y=alt.Y("share:Q", title="share of requests", axis=alt.Axis(format="~%", tickCount=4), scale=height),
            y2=alt.datum(0),
            tooltip=["low:Q", "high:Q", alt.Tooltip("share:Q", format=".2%")],
        )
    )
    marks = [
        layer
        for text, value in (("p50", p50), ("p99", p99))
        for layer in (
            _rule({"low": value}).encode(x="low:Q"),
            _label({"low": value, "share": top, "text": text}, align="right", dx=-3, dy=6).encode(
                x="low:Q", y="share:Q"
            ),
        )
    ]
    title = f"{name}: mean {lengths.mean():,.0f}, p50 {p50:,.0f}, p99 {p99:,.0f}, max {lengths.max():,}"
    return alt.layer(bars, *marks).properties(width=(_WIDTH - _GAP) // 2 - 20, height=_HEIGHT, title=_title(title))


def _chart(rows: list[dict[str, Any]]) -> alt.Chart:
    import altair as alt

    return alt.Chart(alt.InlineData(values=rows))


def _rule(row: dict[str, Any]) -> alt.Chart:
    chart: alt.Chart = _chart([row]).mark_rule(color=_RULE_COLOUR, strokeDash=[4, 3])
    return chart


def _label(row: dict[str, Any], *, align: str, dx: int, dy: int) -> alt.Chart:
    mark: dict[str, Any] = {"align": align, "dx": dx, "dy": dy, "fontSize": 11, "color": _RULE_COLOUR}
    chart: alt.Chart = _chart([row]).mark_text(**mark).encode(text="text:N")
    return chart


def _title(text: str) -> alt.TitleParams:
    import altair as alt

    return alt.TitleParams(text, anchor="start", frame="group", fontSize=12, fontWeight="normal")


def _headline(trace: Trace) -> list[str]:
    """Two lines: how much there is, and how bursty it is."""
    arrivals = arrival_statistics(trace.t_s)
    correlation = length_statistics(trace.n_in, trace.n_out).spearman
    size = f"{arrivals.requests:,} requests in {_duration(arrivals.span_s)}, {arrivals.rate_rps:.3g} per second"
    return [size, f"{_burstiness(arrivals)}, rank correlation of prompt and output {correlation:.2f}"]


def _burstiness(arrivals: ArrivalStatistics) -> str:
    parts = [f"gap cv {arrivals.gap_cv:.3g}"]
    parts += [f"IDC({window_s:g} s) {idc:.3g}" for window_s, idc in arrivals.idc if window_s in (1.0, 60.0)]
    parts += [f"busiest minute {peak:.3g} x mean" for window_s, peak in arrivals.peak_to_mean if window_s == 60.0]
    return ", ".join(parts)


def _duration(span_s: float) -> str:
    if span_s < 120.0:
        return f"{span_s:.3g} s"
    return f"{span_s / 60.0:.0f} minutes" if span_s < 7200.0 else f"{span_s / 3600.0:.1f} hours"


def _decades(rows: list[dict[str, float]]) -> list[float]:
    """Ticks 1, 3, 10, 30, ... inside the axis: a log axis labels every digit otherwise."""
    low, high = rows[0]["low"], rows[-1]["high"]
    ticks = [step * 10.0**power for power in range(10) for step in (1.0, 3.0)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]

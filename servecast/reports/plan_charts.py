"""The charts of the plan page: workload, cost against latency, and latency against load. Records in, SVG text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.model.prediction import Prediction
from servecast.model.slo import Slo
from servecast.model.workload import Trace, Workload
from servecast.reports import formats
from servecast.reports.svg import Axis, Panel, padded
from servecast.reports.trace_chart import arrival_windows, length_bins
from servecast.solvers.results import Candidate, LoadPoint

MOST_POINTS = 200
"""Candidates in one scatter; a page of thousands would be large and no clearer."""
_MOST_LABELS = 12
_BACK_TO_FRONT = ("faint", "over", "front", "chosen")
_LOG_SPAN = 20.0
"""Latencies that span more than this are drawn on a log axis."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One latency percentile of a candidate, and the objective that bounds it, where there is one."""

    metric: str
    percentile: int
    limit: Slo | None

    @property
    def name(self) -> str:
        return f"{formats.metric(self.metric)} p{self.percentile}"

    def of(self, candidate: Candidate) -> Prediction:
        prediction: Prediction = getattr(candidate, f"{self.metric}_p{self.percentile}_s")
        return prediction

    def over(self, candidate: Candidate) -> bool:
        """True where the candidate's prediction is above the limit (or is no number at all)."""
        return self.limit is not None and not self.of(candidate).value <= self.limit.limit_s


def measures(slos: Sequence[Slo]) -> list[Measure]:
    """The percentiles that every candidate carries, each with its limit (the tightest of several)."""
    return [
        Measure(
            metric,
            percentile,
            min(
                (slo for slo in slos if (slo.metric, slo.percentile) == (metric, percentile)),
                key=lambda slo: slo.limit_s,
                default=None,
            ),
        )
        for metric in ("ttft", "tpot")
        for percentile in (50, 99)
    ]


def shown_measures(slos: Sequence[Slo]) -> list[Measure]:
    """One measure each of TTFT and TPOT for a chart: p99, or p50 where only that is bounded."""
    p50_ttft, p99_ttft, p50_tpot, p99_tpot = measures(slos)
    return [p50 if p50.limit and not p99.limit else p99 for p50, p99 in ((p50_ttft, p99_ttft), (p50_tpot, p99_tpot))]


# ---- workload ----------------------------------------------------------------------------------------


def arrivals_chart(trace: Trace) -> tuple[str, str]:
    """Caption and chart of the request rate in windows over time."""
    window_s, rows = arrival_windows(trace)
    end_min, mean = rows[-1]["end_min"], float(np.mean([row["rate_rps"] for row in rows]))
    peak = max(row["rate_rps"] for row in rows)
    scale, unit = (60.0, "hours") if end_min > 180.0 else (1.0, "minutes") if end_min > 3.0 else (1.0 / 60.0, "seconds")
    panel = Panel(
        Axis(title=f"{unit} since the first request", low=0.0, high=end_min / scale, written=_tick, most=7),
        Axis(title="req/s", low=0.0, high=max(1.12 * peak, 1e-9), written=_tick, most=5),
        summary=f"Request rate over {formats.seconds(60.0 * end_min)}: mean {formats.rate(mean)}, "
        f"highest window {formats.rate(peak)}.",
        height=360.0,
        head=34.0,
    )
    for row in rows:
        start, end = row["start_min"] / scale, row["end_min"] / scale
        tip = f"{_tick(start)} to {_tick(end)} {unit}: {formats.rate(row['rate_rps'])}"
        panel.bar(start, end, row["rate_rps"], "fill arrivals", tip)
    panel.horizontal(mean, f"mean {formats.significant(mean)}", "ink", at_end=True)
    return f"Arrivals, in windows of {formats.seconds(window_s)}", panel.render()


def lengths_chart(workload: Workload) -> tuple[str, str]:
    """Caption and chart of the prompt and output lengths, one above the other on a common axis."""
    sides = (("prompt", workload.n_in), ("output", workload.n_out))
    whole = [np.rint(lengths).astype(np.int64) for _, lengths in sides]
    low, high = float(min(x.min() for x in whole)), float(max(x.max() for x in whole)) + 1.0
    axis = Axis(title="tokens", low=low, high=high, written=_tokens, log=True, most=9)
    parts = [_length_panel(axis, name, lengths) for (name, _), lengths in zip(sides, whole, strict=True)]
    return "Tokens per request", "".join(parts)


def _length_panel(axis: Axis, name: str, lengths: NDArray[np.int64]) -> str:
    rows = length_bins(lengths)
    p50, p99 = np.percentile(lengths, [50, 99]).tolist()
    top = 1.1 * max(row["share"] for row in rows)
    summary = (
        f"Distribution of {name} lengths: median {_count(p50)} tokens, p99 {_count(p99)}, longest {lengths.max():,}."
    )
    share = Axis(title=f"{name}s, share of requests", low=0.0, high=top, written=_share, most=3)
    panel = Panel(axis, share, summary=summary, height=180.0)
    panel.left = 52.0  # both panels share their tokens axis, whatever the widths of their labels
    for row in rows:
        tip = f"{row['low']:,.0f} to {row['high'] - 1.0:,.0f} tokens: {formats.percent(row['share'])}"
        panel.bar(row["low"], row["high"], row["share"], f"fill {name}", tip)
    panel.vertical(p50, f"p50 {_count(p50)}", "ink")
    # the labels of two close percentiles would cover each other; the row of statistics has both
    if abs(panel.pixel(p99, 0.0)[0] - panel.pixel(p50, 0.0)[0]) > 90.0:
        panel.vertical(p99, f"p99 {_count(p99)}", "ink")
    return panel.render()


# ---- cost against latency ----------------------------------------------------------------------------


def cost_chart(
    candidates: Sequence[Candidate], chosen: Candidate | None, measure: Measure, over: Sequence[bool]
) -> tuple[str, str]:
    """Caption and scatter of cost against one latency percentile, relative to its limit where there is one.

    Points carry their row number in the table of alternatives. `over` marks those above any of the limits: a point may
    be below the line of this panel and still be out for another reason.
    """
    limit_s = measure.limit.limit_s if measure.limit else 1.0
    values = [_scaled(measure.of(candidate), limit_s) for candidate in candidates][:MOST_POINTS]
    written = formats.factor if measure.limit else formats.seconds
    ends = [value.value for value in values] + ([0.8, 1.25] if measure.limit else [])
    low, high = padded(ends, log=True, share=0.1)
    costs = [candidate.usd_per_hour for candidate in candidates[:MOST_POINTS]]
    panel = Panel(
        _cost_axis(costs),
        Axis(
            title=f"{measure.name}{' / limit' if measure.limit else ''}", low=low, high=high, written=written, log=True
        ),
        summary=_cost_summary(candidates, chosen, measure),
        head=34.0,
    )
    if measure.limit:
        panel.rectangle(panel.x.low, panel.x.high, 1.0, high, "zone")
        panel.horizontal(1.0, f"limit {formats.seconds(limit_s)}", "limit", at_end=True)
    first = " chosen" if chosen is not None else " nearest"
    front = _front(costs, [value.value for value in values])
    # where the value is no number, no place on the axis would be true
    known = [i for i, value in enumerate(values) if not math.isnan(value.value)]
    kinds = ["over" if over[i] else "front" if front[i] else "faint" for i in range(len(values))]
    kinds = ["chosen" if candidate is chosen else kind for candidate, kind in zip(candidates, kinds, strict=False)]
    for i in sorted(known, key=lambda i: _BACK_TO_FRONT.index(kinds[i])):
        _cost_point(panel, costs[i], values[i], kinds[i], _cost_tip(i, candidates[i], measure))
    # the first of the table is the answer or what comes nearest to one: it takes its place before the others
    named = sorted((i for i in known if kinds[i] != "faint"), key=lambda i: (i > 0, -_BACK_TO_FRONT.index(kinds[i])))
    for i in named[:_MOST_LABELS]:
        place = (costs[i], min(values[i].value, panel.y.high))
        panel.label_near(*place, 6.0, f"{i + 1}{'' if i else first}", f"label {kinds[i]}")
    return f"Cost against {measure.name}", panel.render()


def _cost_axis(costs: Sequence[float]) -> Axis:
    low, high = padded(costs, log=False, share=0.1)
    wide = min(costs) > 0.0 and max(costs) / min(costs) > _LOG_SPAN
    if wide:
        low, high = padded(costs, log=True, share=0.08)
    elif low < 0.5 * high:
        low = 0.0
    return Axis(title="USD per hour", low=low, high=high, written=_tick, log=wide)


def _cost_point(panel: Panel, cost: float, value: Prediction, kind: str, tip: str) -> None:
    radius = 6.5 if kind == "chosen" else 5.0
    if not math.isfinite(value.value):
        panel.triangle(cost, panel.y.high, radius, f"point {kind}", tip)
        return
    if kind in ("chosen", "front") and not (math.isnan(value.lo) or math.isnan(value.hi)):
        panel.whisker(cost, value.lo, value.hi, f"whisker {kind}")
    panel.dot(cost, value.value, radius, f"point {kind}", tip)


def _cost_tip(i: int, candidate: Candidate, measure: Measure) -> str:
    prediction = measure.of(candidate)
    return (
        f"{i + 1}: {configuration(candidate)}, {formats.usd_per_hour(candidate.usd_per_hour)}, "
        f"{measure.name} {formats.seconds(prediction.value)} ({formats.interval(prediction, 'seconds')})"
    )


def _cost_summary(candidates: Sequence[Candidate], chosen: Candidate | None, measure: Measure) -> str:
    start = f"Cost per hour against {measure.name} of {len(candidates)} configurations."
    if chosen is None:
        return start
    return (
        f"{start} Chosen: {configuration(chosen)}, {formats.usd_per_hour(chosen.usd_per_hour)}, "
        f"{measure.name} {formats.seconds(measure.of(chosen).value)}."
    )


def _front(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """True where nothing is at most as dear and at most as slow, and better in one of both."""
    return [
        math.isfinite(value)
        and not any(
            other_cost <= cost and other <= value and (other_cost < cost or other < value)
            for other_cost, other in zip(costs, values, strict=True)
        )
        for cost, value in zip(costs, values, strict=True)
    ]


# ---- latency against load ----------------------------------------------------------------------------


def load_chart(
    points: Sequence[LoadPoint], metric: str, *, slos: Sequence[Slo], rate_rps: float, saturation_rps: float | None
) -> tuple[str, str]:
    """Caption and chart of a p99 latency and its interval from light load to saturation."""
    measure = measures(slos)[1 if metric == "ttft" else 3]
    rows = [(point.rate_rps, getattr(point, f"{metric}_p99_s")) for point in points]
    limit = [measure.limit.limit_s] if measure.limit else []
    values = [prediction.value for _, prediction in rows if math.isfinite(prediction.value)] + limit
    y = _latency_axis(measure.name, values, [p.lo for _, p in rows] + [p.hi for _, p in rows])
    known = [rate for rate, _ in rows] + [rate_rps] + ([saturation_rps] if saturation_rps else [])
    # room for the zone beyond saturation and the text in it
    x = Axis(title="req/s", low=0.0, high=max(known) * (1.1 if saturation_rps else 1.04), written=_tick, most=7)
    panel = Panel(x, y, summary=_load_summary(measure, rows, saturation_rps))
    if saturation_rps:
        panel.rectangle(
            saturation_rps, x.high, y.low, y.high, "beyond", f"saturated above {formats.rate(saturation_rps)}"
        )
        panel.line([(saturation_rps, y.low), (saturation_rps, y.high)], "rule limit")
    panel.band([(rate, p.lo, p.hi) for rate, p in rows], "band")
    if measure.limit:
        panel.horizontal(measure.limit.limit_s, f"limit {formats.seconds(measure.limit.limit_s)}", "limit")
    if saturation_rps:  # after the limit's line, which would strike it through
        (left, _), (right, _) = panel.pixel(saturation_rps, y.low), panel.pixel(x.high, y.low)
        panel.upright((left + right) / 2.0, f"saturated above {formats.significant(saturation_rps)}", "label limit")
    panel.vertical(rate_rps, f"planned {formats.significant(rate_rps)}", "ink")
    panel.line([(rate, p.value) for rate, p in rows], "curve")
    for rate, prediction in rows:
        if math.isfinite(prediction.value):
            tip = f"{formats.rate(rate)}: {measure.name} {formats.seconds(prediction.value)}"
            panel.dot(rate, prediction.value, 3.0, "node", f"{tip} ({formats.interval(prediction, 'seconds')})")
    return f"{measure.name} against load", panel.render()


def _latency_axis(title: str, values: Sequence[float], ends: Sequence[float]) -> Axis:
    """Linear from 0, or log where the values span too much; bounds of intervals reach out of it where they must."""
    positive = [value for value in values if value > 0.0] or [1.0]
    bounds = [end for end in ends if math.isfinite(end) and end > 0.0]
    if max(positive) / min(positive) > _LOG_SPAN:
        low, high = padded([*positive, *bounds], log=True)
        return Axis(title=title, low=low, high=high, written=formats.seconds, log=True)
    high = min(max([*positive, *bounds]), 1.6 * max(positive))
    return Axis(title=title, low=0.0, high=1.12 * high, written=formats.seconds, most=5)


def _load_summary(measure: Measure, rows: Sequence[tuple[float, Prediction]], saturation_rps: float | None) -> str:
    (first_rate, first), (last_rate, last) = rows[0], rows[-1]
    text = (
        f"Predicted {measure.name} with its 90 % interval: "
        f"{formats.seconds(first.value)} at {formats.rate(first_rate)}, "
        f"{formats.seconds(last.value)} at {formats.rate(last_rate)}."
    )
    return f"{text} Saturation at {formats.rate(saturation_rps)}." if saturation_rps else text


# ---- shared ------------------------------------------------------------------------------------------


def configuration(candidate: Candidate) -> str:
    """A candidate in words, for instance ``4 × H200 SXM (tp 2)``."""
    degrees = f"tp {candidate.tp}" + (f", pp {candidate.pp}" if candidate.pp > 1 else "")
    return f"{candidate.replicas} × {formats.gpu(candidate.gpu)} ({degrees})"


def _scaled(prediction: Prediction, unit: float) -> Prediction:
    return Prediction(value=prediction.value / unit, lo=prediction.lo / unit, hi=prediction.hi / unit)


def _tick(value: float) -> str:
    return formats.significant(value)


def _tokens(value: float) -> str:
    return f"{formats.significant(value / 1000.0)}k" if value >= 1000.0 else formats.significant(value)


def _share(value: float) -> str:
    return formats.percent(value)


def _count(value: float) -> str:
    return f"{value:,.0f}"

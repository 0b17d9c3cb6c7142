"""The charts of a draft-length plan: gain map, tokens per step, goodput against its rivals, TPOT. Records in, SVG out.

What was not measured is hatched in grey, what misses a limit is hatched in the colour of limits, on every chart alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from servecast.model.prediction import Z90
from servecast.model.speculation import request_tpot_quantile
from servecast.model.speculation_cells import SpeculationCells
from servecast.reports import formats
from servecast.reports.document import listed
from servecast.reports.speculation_marks import (
    Curve,
    Span,
    batch_axis,
    batch_edges,
    batch_spans,
    context_words,
    draw_curves,
    drawn_batches,
    edge_after,
    hatch,
    length_axis,
    runs,
    segment_edges,
    swatch,
)
from servecast.reports.svg import FONT, Axis, Panel, padded
from servecast.speculation_answers import SpeculationAnswer

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

LOSSES = (0.01, 0.03, 0.1, 0.2, 0.4)
"""Ends of the classes of the gain map: goodput lost against the best length of the same batch size. [-]"""
_CLASSES = ("within 1 %", "1 to 3 %", "3 to 10 %", "10 to 20 %", "20 to 40 %", "more than 40 %")
RIVALS = 3
"""Static lengths beside the schedule."""


# ---- where each length pays --------------------------------------------------------------------------


def gain_map(answer: SpeculationAnswer, c: int, measured: SpeculationCells | None) -> tuple[str, str]:
    """Caption and map of the goodput of each draft length relative to the best one at the same batch size."""
    table, batches = answer.table, drawn_batches(answer)
    longest, context = int(table.lengths[-1]), float(table.contexts[c])
    panel = Panel(
        batch_axis(int(table.batches[-1])),
        length_axis(longest, "draft length [tokens]"),
        summary=_map_summary(answer, context),
        height=330.0,
        head=34.0,
    )
    rows = batches - 1
    loss = np.digitize(1.0 - relative_goodput(answer, c)[rows], LOSSES, right=True)
    edges = batch_edges(batches)
    for k in table.lengths.tolist():
        for first, last, value in runs(loss[:, k].tolist()):
            where = f"draft length {k}, {_batch_words(batches[first], batches[last])}"
            tip = f"{where}: {_CLASSES[int(str(value))]} below the best length"
            panel.rectangle(edges[first], edges[last + 1], k - 0.46, k + 0.46, f"heat heat{value}", tip)
    hatch(panel, _boxes(batches, ~table.calibrated[rows]), "hatch unknown")
    if answer.limits.names:
        hatch(panel, _boxes(batches, ~answer.feasible[c, rows]), "hatch missed", rising=False)
    _draw_schedule(panel, answer)
    _draw_cells(panel, measured, table.contexts, context, longest)
    return f"Goodput by length and batch size{context_words(context)}", panel.render()


def relative_goodput(answer: SpeculationAnswer, c: int) -> Floats:
    """Goodput over that of the fastest length at the same batch size, limits aside [batch, length]. [-]"""
    speed = answer.table.tok_s[c]
    return np.asarray(speed / speed.max(axis=1, keepdims=True))


def map_legend(answer: SpeculationAnswer, measured: SpeculationCells | None) -> str:
    """What the marks of the gain maps mean; marks that do not occur are left out."""
    square = '<rect class="{}" x="0" y="0" width="14" height="14" rx="2"/>'
    entries = [(square.format(f"heat heat{i}"), words) for i, words in enumerate(_CLASSES)]
    entries[-1] = (entries[-1][0], f"{_CLASSES[-1]} below the best length of the batch size")
    entries.append(('<path class="under" d="M0 7H14"/><path class="schedule" d="M0 7H14"/>', "the schedule"))
    if measured is not None and measured.size:
        entries.append(('<circle class="cell" cx="7" cy="7" r="3.4"/>', "measured"))
        if np.any((measured.gamma == 0) & ~measured.armed):
            entries.append(('<circle class="cell off" cx="7" cy="7" r="3.4"/>', "measured without a drafter"))
    if not answer.table.calibrated.all():
        lines = '<path class="hatch unknown" d="M0 6L6 0M0 14L14 0M8 14L14 8"/>'
        entries.append((lines, "beyond what was measured"))
    if not answer.feasible.all():
        entries.append(('<path class="hatch missed" d="M8 0L14 6M0 0L14 14M0 8L6 14"/>', "misses a limit"))
    return '<ul class="legend">' + "".join(f"<li>{swatch(mark)}{words}</li>" for mark, words in entries) + "</ul>"


def _map_summary(answer: SpeculationAnswer, context: float) -> str:
    parts = [f"{length} at {_batch_words(lo, hi)}" for lo, hi, length in answer.schedule.segments]
    return (
        "Map of goodput relative to the best draft length of each batch size, over batch size and draft length"
        f"{context_words(context)}. The schedule: length {'; '.join(parts)}."
    )


def _batch_words(lo: int, hi: int) -> str:
    return f"batch size {lo:,}" if lo == hi else f"batch sizes {lo:,} to {hi:,}"


def _boxes(batches: Indices, chosen: NDArray[np.bool_]) -> list[tuple[Span, Span]]:
    """Boxes of the map over [batch, length] cells that are chosen."""
    columns = enumerate(chosen.T.tolist())
    return [(span, (k - 0.5, k + 0.5)) for k, column in columns for span in batch_spans(batches, column)]


def _draw_schedule(panel: Panel, answer: SpeculationAnswer) -> None:
    points: list[tuple[float, float]] = []
    for lo, hi, length in answer.schedule.segments:
        points += [(edge_after(lo - 1), float(length)), (edge_after(hi), float(length))]
    # a wide line in the colour of the page under a narrow one: seen on light and on dark cells
    panel.line(points, "under")
    panel.line(points, "schedule")


def _draw_cells(
    panel: Panel, measured: SpeculationCells | None, contexts: Floats, context: float, longest: int
) -> None:
    """Dots where speed was measured, on the map of the nearest context."""
    if measured is None:
        return
    cells = zip(
        measured.batch.tolist(),
        measured.gamma.tolist(),
        measured.tok_s_per_request.tolist(),
        measured.context.tolist(),
        measured.armed.tolist(),
        strict=True,
    )
    for batch, length, speed, at, armed in cells:
        nearest = context if math.isnan(at) or math.isnan(context) else contexts[np.argmin(np.abs(contexts - at))]
        inside = batch <= panel.x.high and length <= longest
        if not inside or not math.isfinite(speed) or not (nearest == context or math.isnan(context)):
            continue
        off = length == 0 and not armed
        tip = f"measured: batch size {batch:g}, {'no drafter' if off else f'draft length {length}'}"
        tip += f", {formats.significant(speed)} tok/s per request"
        panel.dot(batch, length, 3.2, "cell off" if off else "cell", tip)


# ---- tokens per step ---------------------------------------------------------------------------------


def acceptance_chart(answer: SpeculationAnswer, measured: SpeculationCells | None) -> tuple[str, str]:
    """Caption and chart of the mean acceptance length by draft length, with its band where one is known."""
    table = answer.table
    lengths, tokens = table.lengths.tolist(), table.tokens.tolist()
    seen = _measured_lengths(measured, lengths[-1])
    top = (
        max(float(table.tokens_hi.max()), *(value for _, value in seen), 1.5) if seen else float(table.tokens_hi.max())
    )
    panel = Panel(
        length_axis(lengths[-1], "draft length [tokens]"),
        Axis(
            title="tokens per step, bonus token included", low=1.0, high=1.0 + 1.12 * max(top - 1.0, 0.5), written=_tick
        ),
        summary=f"Mean tokens per step: {formats.significant(tokens[0])} without a draft, "
        f"{formats.significant(tokens[-1])} at draft length {lengths[-1]}.",
        height=330.0,
        head=34.0,
    )
    panel.band(list(zip(lengths, table.tokens_lo.tolist(), table.tokens_hi.tolist(), strict=True)), "band")
    most = panel.y.high - 1.0
    ceiling = [(0.0, 1.0), (min(most, lengths[-1]), 1.0 + min(most, lengths[-1]))]
    expected = [(float(k), value) for k, value in enumerate(tokens)]
    draw_curves(panel, [Curve("expected", "main", expected), Curve("every draft accepted", "bound", ceiling)])
    for k in lengths:
        kind = "node" if table.calibrated[:, k].any() else "node hollow"
        ends = f"{formats.significant(float(table.tokens_lo[k]))} to {formats.significant(float(table.tokens_hi[k]))}"
        panel.dot(k, tokens[k], 3.4, kind, f"draft length {k}: {formats.significant(tokens[k])} tokens ({ends})")
    for length, value in seen:
        tip = f"measured at draft length {length}: {formats.significant(value)} tokens"
        panel.dot(length, value, 3.2, "cell", tip)
    return "Tokens per step against draft length", panel.render()


def has_band(answer: SpeculationAnswer) -> bool:
    """Whether the acceptance curve is known with an interval of its own."""
    return bool(np.any(answer.table.tokens_hi > answer.table.tokens_lo))


def _measured_lengths(measured: SpeculationCells | None, longest: int) -> list[tuple[int, float]]:
    """Distinct measured mean acceptance lengths, to the hundredth that a chart shows."""
    if measured is None:
        return []
    known = np.isfinite(measured.mean_acceptance_length) & (measured.gamma > 0) & (measured.gamma <= longest)
    pairs = zip(measured.gamma[known].tolist(), measured.mean_acceptance_length[known].tolist(), strict=True)
    return sorted({(length, round(value, 2)) for length, value in pairs})


# ---- against rivals, and against limits ----------------------------------------------------------------


def rivals_chart(answer: SpeculationAnswer, c: int) -> tuple[str, str]:
    """Caption and chart of goodput relative to the best length: schedule, static lengths, speculation switched off."""
    table, batches = answer.table, drawn_batches(answer)
    rows, context = batches - 1, float(table.contexts[c])
    relative = relative_goodput(answer, c)[rows]
    off = table.off_tok_s[c, rows] / table.tok_s[c, rows].max(axis=1)
    schedule = relative[np.arange(rows.size), answer.lengths[rows]]
    static = rival_lengths(answer)
    # the panel shows what tells the lengths apart; without speculation may lie far below
    lowest = min(float(schedule.min()), *(float(relative[:, k].min()) for k in static), 0.97)
    low, high = max(lowest - 0.03, 0.0), max(float(off.max()), 1.0) + 0.015
    curves = [Curve("schedule", "main", _points(batches, schedule))]
    curves += [Curve(f"always {k}", f"rival{i}", _points(batches, relative[:, k])) for i, k in enumerate(static)]
    inside = np.where(off >= low, off, np.nan)
    curves.append(Curve("off", "off", _points(batches, inside)))
    y = Axis(title="goodput / best length", low=low, high=high, written=formats.percent, most=6)
    panel = Panel(batch_axis(int(table.batches[-1])), y, summary=_rivals_summary(answer, context, off))
    _shade(panel, answer, c, batches)
    segment_edges(panel, answer)
    draw_curves(panel, curves, note=_below_words(off[np.isnan(inside)]), note_cls="off")
    return f"Goodput relative to the best length{context_words(context)}", panel.render()


def _below_words(off: Floats) -> str:
    """Where speculation switched off lies, as far as it is below the chart."""
    if not off.size:
        return ""
    low, high = formats.percent(float(off.min())), formats.percent(float(off.max()))
    return f"below: off, {low}" if low == high else f"below: off, {low} to {high}"


def rival_lengths(answer: SpeculationAnswer) -> list[int]:
    """The best static length and those that come next, ascending."""
    known = [one for one in answer.schedule.static if math.isfinite(one.mean_regret)]
    ranked = sorted(known, key=lambda one: (one.length != answer.best_static, one.mean_regret))
    return sorted(one.length for one in ranked[:RIVALS])


def _rivals_summary(answer: SpeculationAnswer, context: float, off: Floats) -> str:
    return (
        f"Goodput relative to the best draft length of each batch size{context_words(context)}: the schedule loses "
        f"{formats.percent(answer.schedule.worst_regret)} at most; without speculation it is "
        f"{formats.percent(float(off.min()))} to {formats.percent(float(off.max()))} of the best."
    )


def tpot_chart(answer: SpeculationAnswer, c: int) -> tuple[str, str]:
    """Caption and chart of the decode latency under the schedule, with everything that is limited."""
    table, limits, batches = answer.table, answer.limits, drawn_batches(answer)
    rows, context = batches - 1, float(table.contexts[c])
    k = answer.lengths[rows]
    mean, sd = 1.0 / table.tok_s[c, rows, k], table.sd[c, rows, k]
    lo, hi = mean * np.exp(-Z90 * sd), mean * np.exp(Z90 * sd)
    curves = [Curve("mean", "main", _points(batches, mean))]
    lines = [("mean", limits.tpot_mean_s)] if limits.tpot_mean_s is not None else []
    for i, (percentile, limit) in enumerate(limits.tpot_quantiles):
        seconds = quantile_seconds(answer, c, percentile)[rows]
        curves.append(Curve(f"p{percentile:g}", f"rival{i % RIVALS}", _points(batches, seconds)))
        lines.append((f"p{percentile:g}", limit))
    if limits.step_s is not None:
        curves.append(Curve("step", "off", _points(batches, np.where(k > 0, table.step_s[c, rows, k], np.nan))))
        lines.append(("step", limits.step_s))
    known = [y for curve in curves for _, y in curve.points] + [limit for _, limit in lines]
    low, high = padded([*known, *lo.tolist(), *hi.tolist()], log=True, share=0.08)
    title = "time per output token" + (", and per step" if limits.step_s is not None else "")
    y = Axis(title=title, low=low, high=1.15 * high, written=formats.seconds, log=True)
    panel = Panel(batch_axis(int(table.batches[-1])), y, summary=_tpot_summary(answer, context, mean))
    _shade(panel, answer, c, batches)
    segment_edges(panel, answer)
    panel.band(list(zip(batches.tolist(), lo.tolist(), hi.tolist(), strict=True)), "band")
    _limit_lines(panel, lines)
    draw_curves(panel, curves)
    return f"TPOT under the schedule{context_words(context)}", panel.render()


def _limit_lines(panel: Panel, limits: Sequence[tuple[str, float]]) -> None:
    """A line per distinct limit; labels of neighbours are at opposite ends."""
    above, at_end = -math.inf, False
    for limit in sorted({limit for _, limit in limits}):
        names = listed([name for name, value in limits if value == limit])
        _, top = panel.pixel(panel.x.low, limit)
        at_end = not at_end and abs(top - above) < 2.0 * FONT
        panel.horizontal(limit, f"limit of {names}: {formats.seconds(limit)}", "limit", at_end=at_end)
        above = top


def quantile_seconds(answer: SpeculationAnswer, c: int, percentile: float) -> Floats:
    """TPOT percentile over requests under the schedule, by batch size: the spread of accepted tokens alone. [s]"""
    table, k = answer.table, answer.lengths
    step = table.step_s[c, np.arange(k.size), k]
    later, z = max(answer.limits.output_tokens - 1.0, 1.0), NormalDist().inv_cdf(percentile / 100.0)
    return request_tpot_quantile(step, later, table.tokens[k], table.variance[k], z)


def _tpot_summary(answer: SpeculationAnswer, context: float, mean: Floats) -> str:
    last = int(answer.table.batches[-1])
    return (
        f"Predicted TPOT under the schedule with its 90 % interval{context_words(context)}: "
        f"{formats.seconds(float(mean[0]))} at batch size 1, {formats.seconds(float(mean[-1]))} at {last:,}."
    )


def _shade(panel: Panel, answer: SpeculationAnswer, c: int, batches: Indices) -> None:
    """Batch sizes at which the schedule is extrapolated, and those at which it misses a limit."""
    rows = batches - 1
    k = answer.lengths[rows]
    up = (panel.y.low, panel.y.high)
    hatch(panel, [(span, up) for span in batch_spans(batches, ~answer.table.calibrated[rows, k])], "hatch unknown")
    for left, right in batch_spans(batches, ~answer.feasible[c, rows, k]):
        panel.rectangle(left, right, *up, "beyond", "the schedule misses a limit here")


def _points(batches: Indices, values: Sequence[float] | Floats) -> list[tuple[float, float]]:
    return [(float(batch), float(value)) for batch, value in zip(batches, values, strict=True)]


def _tick(value: float) -> str:
    return formats.significant(value)

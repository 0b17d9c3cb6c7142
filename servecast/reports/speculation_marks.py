"""Marks that the charts of a draft-length plan share: their axes, hatching, segment edges, and labels at curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from servecast.reports import formats
from servecast.reports.svg import Axis, Panel, Point
from servecast.speculation_answers import SpeculationAnswer

_MOST_BATCHES = 120
_HATCH = 8.0
"""Distance of two hatching lines along the axis. [user units]"""

Span = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedAxis(Axis):
    """An axis whose ticks are given."""

    marks: tuple[float, ...]

    @property
    def ticks(self) -> list[float]:
        return list(self.marks)


def batch_axis(max_batch: int) -> Axis:
    """Batch sizes 1 to `max_batch`, logarithmic, ticks at powers of two."""
    powers = tuple(2.0**i for i in range(max_batch.bit_length()))
    high = edge_after(max_batch)
    return MarkedAxis(title="running requests", low=edge_after(0), high=high, written=_whole, log=True, marks=powers)


def length_axis(longest: int, title: str) -> Axis:
    """Draft lengths 0 to `longest`, a step around each."""
    stride = 1 + longest // 12
    marks = tuple(float(k) for k in range(0, longest + 1, stride))
    return MarkedAxis(title=title, low=-0.5, high=longest + 0.5, written=_whole, marks=marks)


def edge_after(batch: int) -> float:
    """Middle, on a log axis, between a batch size and the next one; 0 gives the left end of the axis."""
    return math.sqrt(batch * (batch + 1.0)) if batch else math.sqrt(0.5)


def drawn_batches(answer: SpeculationAnswer) -> NDArray[np.int64]:
    """Batch sizes that a curve is drawn through: evenly spread on the log axis, and both ends of every segment."""
    last = int(answer.table.batches[-1])
    few = last <= _MOST_BATCHES
    spread = answer.table.batches if few else np.round(np.geomspace(1.0, last, _MOST_BATCHES)).astype(np.int64)
    ends = [end for lo, hi, _ in answer.schedule.segments for end in (lo, hi)]
    return np.unique(np.concatenate([spread, np.array(ends, dtype=np.int64)]))


def runs(values: Sequence[object]) -> list[tuple[int, int, object]]:
    """First and last index of every run of equal values, with the value."""
    firsts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    lasts = [*(first - 1 for first in firsts[1:]), len(values) - 1]
    return [(first, last, values[first]) for first, last in zip(firsts, lasts, strict=True)]


def batch_spans(batches: NDArray[np.int64], chosen: Iterable[bool]) -> list[Span]:
    """Stretches of the batch axis over runs of `chosen` batches (`batches` ascending, gaps shared evenly)."""
    edges = batch_edges(batches)
    return [(edges[first], edges[last + 1]) for first, last, value in runs([bool(one) for one in chosen]) if value]


def batch_edges(batches: NDArray[np.int64]) -> list[float]:
    """Ends of the stretch that each batch size stands for: one more than there are batches."""
    inner = np.sqrt(batches[:-1] * batches[1:].astype(np.float64)).tolist()
    return [edge_after(int(batches[0]) - 1), *inner, edge_after(int(batches[-1]))]


def hatch(panel: Panel, boxes: Iterable[tuple[Span, Span]], cls: str, *, rising: bool = True) -> None:
    """Diagonal lines over boxes of the data, (x from, to), (y from, to); lines of touching boxes join."""
    gap: Point = (math.nan, math.nan)
    points: list[Point] = []
    for (x0, x1), (y0, y1) in boxes:
        (left, bottom), (right, top) = panel.pixel(x0, y0), panel.pixel(x1, y1)
        for start, end in _diagonals(left, right, top, bottom, rising=rising):
            points += [_data(panel, *start), _data(panel, *end), gap]
    panel.line(points, cls)


def _diagonals(left: float, right: float, top: float, bottom: float, *, rising: bool) -> list[tuple[Point, Point]]:
    """Lines x + y = c (rising to the right) or x - y = c within a box, c a multiple of the distance. [user units]"""
    found = []
    low, high = (left + top, right + bottom) if rising else (left - bottom, right - top)
    for i in range(math.ceil(low / _HATCH), math.floor(high / _HATCH) + 1):
        c = i * _HATCH
        from_x = max(left, c - bottom) if rising else max(left, c + top)
        to_x = min(right, c - top) if rising else min(right, c + bottom)
        if to_x > from_x:
            slope, offset = (-1.0, c) if rising else (1.0, -c)
            found.append(((from_x, offset + slope * from_x), (to_x, offset + slope * to_x)))
    return found


def _data(panel: Panel, left: float, top: float) -> Point:
    """Inverse of `Panel.pixel`."""

    def value(axis: Axis, share: float) -> float:
        if axis.log:
            return float(axis.low * (axis.high / axis.low) ** share)
        return axis.low + (axis.high - axis.low) * share

    across = (left - panel.left) / (panel.right - panel.left)
    up = (panel.bottom - top) / (panel.bottom - panel.top)
    return value(panel.x, across), value(panel.y, up)


def segment_edges(panel: Panel, answer: SpeculationAnswer) -> None:
    """A line where the draft length changes, and the length of each segment above the plot area."""
    for number, (lo, hi, length) in enumerate(answer.schedule.segments):
        (left, _), (right, _) = panel.pixel(edge_after(lo - 1), panel.y.low), panel.pixel(edge_after(hi), panel.y.low)
        if number:
            panel.line([(edge_after(lo - 1), panel.y.low), (edge_after(lo - 1), panel.y.high)], "edge")
        words = next((text for text in (f"draft {length}", f"{length}") if 9.0 * len(text) < right - left), "")
        if words:
            panel.text((left + right) / 2.0, panel.top - 7.0, words, "label over-plot", "middle")


def reserve(panel: Panel, points: Sequence[Point]) -> None:
    """Keep labels off a curve."""
    known = [panel.pixel(*point) for point in points if all(map(math.isfinite, point))]
    for (x0, y0), (x1, y1) in pairwise(known):
        steps = max(int(math.hypot(x1 - x0, y1 - y0) / 6.0), 1)
        for i in range(steps + 1):
            x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            panel.reserved.append((x - 1.5, y - 1.5, x + 1.5, y + 1.5))


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart and its name; NaN breaks it."""

    name: str
    cls: str
    points: list[Point]


def draw_curves(panel: Panel, curves: Sequence[Curve], *, note: str = "", note_cls: str = "") -> None:
    """The curves, the first on top, each named where it is farthest from the others; a note at the bottom."""
    for curve in reversed(curves):
        panel.line(curve.points, f"curve {curve.cls}")
        reserve(panel, curve.points)
    if note:
        _note(panel, note, f"label {note_cls}")
    for curve in curves:
        _name(panel, curve, [other for other in curves if other is not curve])


def _note(panel: Panel, text: str, cls: str) -> None:
    """Text on the bottom axis, where no curve is if there is such a place."""
    for share in np.linspace(0.0, 0.9, 19).tolist():
        place = _data(panel, panel.left + share * (panel.right - panel.left), panel.bottom - 10.0)
        if panel.label_near(*place, 2.0, text, cls):
            return
    panel.text(panel.left + 6.0, panel.bottom - 7.0, text, cls)


def _name(panel: Panel, curve: Curve, others: Sequence[Curve]) -> None:
    places = [point for point in curve.points if all(map(math.isfinite, point))]

    def lonely(point: Point) -> float:
        left, top = panel.pixel(*point)
        apart = [math.dist((left, top), panel.pixel(*p)) for o in others for p in o.points if math.isfinite(p[1])]
        return -min(apart, default=0.0)

    cls = f"label {curve.cls}"
    if not places or any(panel.label_near(*place, 2.0, curve.name, cls) for place in sorted(places, key=lonely)):
        return
    # no free place: at its end, where the halo of the letters keeps it readable
    left, top = panel.pixel(*places[-1])
    panel.text(min(left, panel.right) - 4.0, max(top - 6.0, panel.top + 12.0), curve.name, cls, "end")


def swatch(mark: str) -> str:
    """A sample of a mark for a legend; `mark` is SVG in a square of 14."""
    return f'<svg viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>'


def context_words(context: float) -> str:
    """How a caption names a context; nothing where there is one only and it is not known.

    >>> context_words(4096.0), context_words(float("nan"))
    (', context 4,096 tokens', '')
    """
    return "" if math.isnan(context) else f", context {formats.significant(context)} tokens"


def shown_contexts(contexts: NDArray[np.float64]) -> list[int]:
    """First, middle and last."""
    last = contexts.size - 1
    return sorted({0, last // 2, last})


def _whole(value: float) -> str:
    return f"{value:,.0f}"

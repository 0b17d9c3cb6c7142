"""Small inline SVG charts: scales, ticks, and a panel that draws marks inside two axes.

The page that embeds a panel owns its look: marks carry class names only, and the page's style sheet gives them colours
for light, dark and paper. Text is laid out for `FONT` user units, the size that the page uses on a phone; on a wide
screen it is smaller, so what does not overlap here overlaps nowhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from servecast.reports.formats import escape

FONT = 15.0
"""Largest font size that a page may give to text of class ``axis`` or ``label``. [user units]"""
_LETTER = 0.56
"""Mean width of a letter over the font size, for sans-serif faces."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom. [user units]"""
Point = tuple[float, float]


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high]: as many as fit into `most`.

    >>> nice_ticks(0.0, 10.0), nice_ticks(0.13, 0.42, 4)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.2, 0.3, 0.4])
    """
    _require_span(low, high)
    smallest = math.floor(math.log10((high - low) / most))
    for power, step in itertools.product((smallest, smallest + 1), (1, 2, 5)):
        size = _decimal(step, power)
        # a tick may miss the end of the domain by rounding only
        first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
        if last - first + 1 <= most:
            return [_decimal(step * i, power) for i in range(first, last + 1)]
    raise AssertionError("a step of ten times the span holds at most one tick")  # pragma: no cover (cannot be reached)


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks 1-2-5, 1-3 or whole decades inside [low, high] (every n-th decade where they are many).

    >>> log_ticks(0.1, 10.0), log_ticks(1.0, 1e4)
    ([0.1, 0.3, 1.0, 3.0, 10.0], [1.0, 10.0, 100.0, 1000.0, 10000.0])
    """
    _require_span(low, high)
    if low <= 0.0:
        raise ValueError(f"low must be positive on a log scale, got {low!r}")
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps, stride in [((1, 2, 5), 1), ((1, 3), 1), *(((1,), stride) for stride in range(1, 400))]:
        decades = [power for power in powers if power % stride == 0]
        ticks = [_decimal(step, power) for power in decades for step in steps]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) <= most:
            # less than a decade may hold no such tick: linear ones then say more than none
            return inside if len(inside) > 1 else nice_ticks(low, high, most)
    raise AssertionError("one decade in 399 fits any domain of floats")  # pragma: no cover (cannot be reached)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One direction of a panel: what it measures, from where to where, and where its ticks are."""

    title: str
    low: float
    high: float
    written: Callable[[float], str]
    """A tick's label."""
    log: bool = False
    most: int = 6
    """Most ticks."""

    def __post_init__(self) -> None:
        _require_span(self.low, self.high)
        if self.log and self.low <= 0.0:
            raise ValueError(f"low must be positive on a log axis, got {self.low!r}")

    @property
    def ticks(self) -> list[float]:
        return (log_ticks if self.log else nice_ticks)(self.low, self.high, self.most)

    def position(self, value: float) -> float:
        """Place of a value, 0 at `low` and 1 at `high`; values outside land on the nearer end."""
        if value <= self.low:
            return 0.0
        if value >= self.high:
            return 1.0
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def padded(values: Iterable[float], *, log: bool, share: float = 0.06) -> tuple[float, float]:
    """Ends of an axis that holds the finite values with some air; a single value gets room on both sides."""
    finite = [value for value in values if math.isfinite(value) and (value > 0.0 or not log)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    if log:
        ratio = max((high / low) ** share, 1.25)
        return low / ratio, high * ratio
    room = max((high - low) * share, abs(high) * share, 1e-9)
    return low - room, high + room


class Panel:
    """One chart: two axes, and marks in the order in which they are drawn.

    `head` is what lies above the plot area: the title of the y axis (34), and labels of vertical lines (50).
    Coordinates of all methods are data; `pixel` converts them. Labels keep clear of each other and of the boxes that
    are `reserved`.
    """

    def __init__(
        self, x: Axis, y: Axis, *, summary: str, width: float = 480.0, height: float = 300.0, head: float = 50.0
    ) -> None:
        self.x, self.y = x, y
        self.width, self.height = width, height
        self.reserved: list[Box] = []
        self._summary = summary
        self._marks: list[str] = []
        widest = max((len(y.written(tick)) for tick in y.ticks), default=1)
        self.left, self.right = max(widest * FONT * _LETTER + 12.0, 30.0), width - 14.0
        self.top, self.bottom = head, height - 46.0

    def pixel(self, x: float, y: float) -> Point:
        return (
            self.left + self.x.position(x) * (self.right - self.left),
            self.bottom - self.y.position(y) * (self.bottom - self.top),
        )

    def bar(self, x0: float, x1: float, height: float, cls: str, tip: str) -> None:
        """Rectangle from the bottom axis up to `height`."""
        self.rectangle(x0, x1, self.y.low, height, cls, tip)

    def rectangle(self, x0: float, x1: float, y0: float, y1: float, cls: str, tip: str = "") -> None:
        (left, bottom), (right, top) = self.pixel(x0, y0), self.pixel(x1, y1)
        attributes = f'x="{_n(left)}" y="{_n(top)}" width="{_n(right - left)}" height="{_n(bottom - top)}"'
        self._marks.append(_element("rect", cls, attributes, tip))

    def line(self, points: Sequence[Point], cls: str) -> None:
        """Polyline; a point that is not finite ends one piece, and the next finite one starts another."""
        pieces = itertools.groupby(points, key=lambda point: all(map(math.isfinite, point)))
        paths = [_path(self.pixel(*point) for point in piece) for finite, piece in pieces if finite]
        if paths:
            self._marks.append(_element("path", cls, f'd="{"".join(paths)}"'))

    def band(self, points: Sequence[tuple[float, float, float]], cls: str) -> None:
        """Area between (x, low, high); an infinite end reaches the edge, and a point with NaN is left out."""
        known = [(x, low, high) for x, low, high in points if not any(map(math.isnan, (x, low, high)))]
        if len(known) < 2:
            return
        there = [self.pixel(x, high) for x, _, high in known]
        back = [self.pixel(x, low) for x, low, _ in reversed(known)]
        self._marks.append(_element("path", cls, f'd="{_path([*there, *back])}Z"'))

    def whisker(self, x: float, low: float, high: float, cls: str) -> None:
        """Vertical interval at `x`."""
        (left, bottom), (_, top) = self.pixel(x, low), self.pixel(x, high)
        self._marks.append(_element("path", cls, f'd="M{_n(left)} {_n(bottom)}V{_n(top)}"'))
        self.reserved.append((left - 1.0, top, left + 1.0, bottom))

    def dot(self, x: float, y: float, radius: float, cls: str, tip: str) -> None:
        left, top = self.pixel(x, y)
        self._marks.append(_element("circle", cls, f'cx="{_n(left)}" cy="{_n(top)}" r="{_n(radius)}"', tip))
        self.reserved.append((left - radius, top - radius, left + radius, top + radius))

    def triangle(self, x: float, y: float, radius: float, cls: str, tip: str) -> None:
        """Upward triangle: the value lies beyond the upper edge."""
        left, top = self.pixel(x, y)
        corners = ((left - radius, top + radius), (left, top - radius), (left + radius, top + radius))
        self._marks.append(_element("path", cls, f'd="{_path(corners)}Z"', tip))
        self.reserved.append((left - radius, top - radius, left + radius, top + radius))

    def horizontal(self, y: float, text: str, cls: str, *, at_end: bool = False) -> None:
        """Line across the panel with its label above it, at the left or at the right end."""
        _, top = self.pixel(self.x.low, y)
        self._marks.append(_element("path", f"rule {cls}", f'd="M{_n(self.left)} {_n(top)}H{_n(self.right)}"'))
        left, anchor = (self.right - 4.0, "end") if at_end else (self.left + 6.0, "start")
        self.reserved.append((self.left, top - 1.0, self.right, top + 1.0))
        # below the line where there is no room above it
        baseline = top - 5.0 if top - FONT > self.top - 4.0 else top + FONT
        self.text(left, baseline, text, f"label {cls}", anchor)

    def vertical(self, x: float, text: str, cls: str) -> None:
        """Line up the panel with its label above the plot area."""
        left, _ = self.pixel(x, self.y.low)
        self._marks.append(_element("path", f"rule {cls}", f'd="M{_n(left)} {_n(self.bottom)}V{_n(self.top)}"'))
        half = len(text) * FONT * _LETTER / 2.0
        self.text(min(max(left, self.left + half), self.right - half), self.top - 7.0, text, f"label {cls}", "middle")

    def upright(self, left: float, text: str, cls: str) -> None:
        """Text that reads from bottom to top, centred at `left`. [user units]"""
        middle = (self.top + self.bottom) / 2.0
        attributes = f'transform="translate({_n(left + 0.35 * FONT)} {_n(middle)}) rotate(-90)" text-anchor="middle"'
        self._marks.append(_text(text, cls, attributes))

    def text(self, left: float, baseline: float, text: str, cls: str, anchor: str = "start") -> None:
        """Text at a place in user units; the place is taken from then on."""
        self._marks.append(_text(text, cls, f'x="{_n(left)}" y="{_n(baseline)}" text-anchor="{anchor}"'))
        self.reserved.append(_text_box(left, baseline, text, anchor))

    def label_near(self, x: float, y: float, radius: float, text: str, cls: str) -> bool:
        """Label beside a point, on the first side where it covers nothing; False where there is no such side."""
        left, top = self.pixel(x, y)
        gap = radius + 4.0
        for dx, dy, anchor in (
            (gap, 0.35, "start"),
            (0.0, -gap / FONT - 0.1, "middle"),
            (-gap, 0.35, "end"),
            (0.0, gap / FONT + 0.75, "middle"),
            (gap, -0.5, "start"),
            (-gap, -0.5, "end"),
            (gap, 1.2, "start"),
            (-gap, 1.2, "end"),
        ):
            place = (left + dx, top + dy * FONT)
            box = _text_box(*place, text, anchor)
            inside = box[0] > self.left and box[2] < self.width and box[1] > self.top - 6.0 and box[3] < self.bottom
            if inside and not any(_overlap(box, other) for other in self.reserved):
                self.text(*place, text, cls, anchor)
                return True
        return False

    def render(self) -> str:
        """The chart as one element; its text alternative is the summary."""
        return (
            f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img" aria-label="{escape(self._summary)}">'
            f"{self._axes()}{''.join(self._marks)}</svg>"
        )

    def _axes(self) -> str:
        parts = []
        for tick in self.y.ticks:
            _, top = self.pixel(self.x.low, tick)
            parts.append(_element("path", "grid", f'd="M{_n(self.left)} {_n(top)}H{_n(self.right)}"'))
            place = f'x="{_n(self.left - 7.0)}" y="{_n(top + 0.35 * FONT)}" text-anchor="end"'
            parts.append(_text(self.y.written(tick), "axis", place))
        parts.append(_element("path", "base", f'd="M{_n(self.left)} {_n(self.bottom)}H{_n(self.right)}"'))
        parts.extend(self._x_ticks())
        place = f'x="{_n(self.right)}" y="{_n(self.height - 4.0)}" text-anchor="end"'
        parts.append(_text(self.x.title, "axis title", place))
        parts.append(_text(self.y.title, "axis title", f'x="0" y="{_n(FONT)}" text-anchor="start"'))
        return "".join(parts)

    def _x_ticks(self) -> Iterable[str]:
        free_from = 0.0
        for tick in self.x.ticks:
            left, _ = self.pixel(tick, self.y.low)
            text = self.x.written(tick)
            half = len(text) * FONT * _LETTER / 2.0
            centre = min(left, self.width - half)
            yield _element("path", "base", f'd="M{_n(left)} {_n(self.bottom)}v5"')
            if centre - half < free_from:
                continue  # its tick stays, its label would touch the one before
            free_from = centre + half + 6.0
            place = f'x="{_n(centre)}" y="{_n(self.bottom + 7.0 + FONT * 0.8)}" text-anchor="middle"'
            yield _text(text, "axis", place)


def _require_span(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low and high must be finite and low < high, got {low!r} and {high!r}")


def _decimal(digits: int, power: int) -> float:
    """digits * 10^power; division by a whole power keeps 3 tenths 0.3, where a product with 0.1 does not."""
    return digits * 10.0**power if power >= 0 else digits / 10.0**-power


def _n(value: float) -> str:
    """A coordinate: a tenth of a unit is finer than a screen shows."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _path(points: Iterable[Point]) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _element(tag: str, cls: str, attributes: str, tip: str = "") -> str:
    opening = f'<{tag} class="{escape(cls)}" {attributes}'
    return f"{opening}><title>{escape(tip)}</title></{tag}>" if tip else f"{opening}/>"


def _text(text: str, cls: str, attributes: str) -> str:
    return f'<text class="{escape(cls)}" {attributes}>{escape(text)}</text>'


def _text_box(left: float, baseline: float, text: str, anchor: str) -> Box:
    width = len(text) * FONT * _LETTER
    start = left - {"start": 0.0, "middle": width / 2.0, "end": width}[anchor]
    return start, baseline - 0.8 * FONT, start + width, baseline + 0.2 * FONT


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

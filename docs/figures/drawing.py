"""Static SVG for the documentation's figures: text, boxes, arrows, and log-log panels of dots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

INK, FAINT, GRID = "#22272e", "#6b7280", "#e5e7eb"
BLUE, GREEN, ORANGE, GREY, RED, VIOLET = "#3b6fb6", "#3f8f5f", "#cf7a2c", "#858c97", "#b83b3b", "#7a5bab"
HERE = Path(__file__).resolve().parent


def text(
    x: float, y: float, words: str, *, size: float = 13, anchor: str = "start", fill: str = INK, **more: str
) -> str:
    """One line of text; `more` are attributes, underscores for dashes."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {place}{extra}>{escape(words)}</text>"


def box(x: float, y: float, width: float, height: float, fill: str, words: str = "", *, size: float = 12) -> str:
    """A rectangle with a word in its middle."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>'
    middle = text(x + width / 2, y + height / 2 + 0.35 * size, words, size=size, anchor="middle", fill="#ffffff")
    return shape + (middle if words else "")


def line(
    x1: float, y1: float, x2: float, y2: float, *, colour: str = FAINT, arrow: bool = False, dash: str = ""
) -> str:
    """A straight line, with an arrow head where asked."""
    end = ' marker-end="url(#arrow)"' if arrow else ""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="1.4"{end}{dashes}/>'


def brace(x1: float, x2: float, y: float, words: str, *, below: bool = True) -> str:
    """A bracket over a span, named."""
    tip = 6 if below else -6
    path = f'<path d="M{x1:g} {y:g} v{tip} H{x2:g} v{-tip}" fill="none" stroke="{FAINT}" stroke-width="1.2"/>'
    return path + text((x1 + x2) / 2, y + (20 if below else -11), words, size=12, anchor="middle", fill=FAINT)


def save(name: str, width: float, height: float, title: str, marks: Sequence[str]) -> Path:
    """Write `name` beside this file, on white so that it reads on a dark page, too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'font-family="system-ui, sans-serif"><title>{escape(title)}</title>'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{FAINT}"/></marker></defs>'
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>'
    )
    path = HERE / name
    path.write_text(head + "\n".join(marks) + "\n</svg>\n", encoding="utf-8")
    return path


class LogPanel:
    """A square of logarithmic axes, the same range on both."""

    def __init__(self, left: float, top: float, side: float, low: float, high: float) -> None:
        self.left, self.top, self.side = left, top, side
        self.low, self.high = math.log10(low), math.log10(high)

    def x(self, value: float) -> float:
        """Position of a value, held inside the panel."""
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.left + self.side * min(max(share, 0.0), 1.0)

    def y(self, value: float) -> float:
        """The same, upwards."""
        return self.top + self.side - (self.x(value) - self.left)

    def axes(self, title: str, ticks: Sequence[tuple[float, str]], across: str, up: str) -> list[str]:
        """Frame, grid, labels, the line of equality and those of a factor of 1.25."""
        bottom, right = self.top + self.side, self.left + self.side
        marks = [text(self.left, self.top - 12, title, size=14, font_weight="600")]
        for value, label in ticks:
            at, height = self.x(value), self.y(value)
            marks.append(line(at, self.top, at, bottom, colour=GRID))
            marks.append(line(self.left, height, right, height, colour=GRID))
            marks.append(text(at, bottom + 17, label, size=11, anchor="middle", fill=FAINT))
            marks.append(text(self.left - 7, height + 4, label, size=11, anchor="end", fill=FAINT))
        low, high = 10.0**self.low, 10.0**self.high
        marks.append(line(self.left, bottom, right, self.top, colour=FAINT))
        for factor in (1.25, 0.8):
            start, end = max(low, low / factor), min(high, high / factor)
            ends = (self.x(start), self.y(start * factor), self.x(end), self.y(end * factor))
            marks.append(line(*ends, colour=FAINT, dash="4 4"))
        marks.append(text((self.left + right) / 2, bottom + 38, across, size=12, anchor="middle"))
        middle = self.top + self.side / 2
        turn = f"rotate(-90 {self.left - 46:g} {middle:g})"
        marks.append(text(self.left - 46, middle, up, size=12, anchor="middle", transform=turn))
        return marks

    def dots(self, across: Sequence[float], up: Sequence[float], colour: str, *, size: float = 4.5) -> str:
        """All dots of a series as one path of zero-length strokes."""
        path = "".join(f"M{self.x(a):.1f} {self.y(b):.1f}h0" for a, b in zip(across, up, strict=True))
        return (
            f'<path d="{path}" stroke="{colour}" stroke-width="{size:g}" stroke-linecap="round" stroke-opacity="0.6"/>'
        )

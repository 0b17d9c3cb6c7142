"""Closed form against simulator on the two grids, from ``attainment_grid.csv`` beside this file.

Redo the rows with ``python -m servecast.validation.attainment_grid --out docs/figures/attainment_grid.csv``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

from drawing import BLUE, FAINT, GREEN, GREY, HERE, ORANGE, LogPanel, box, line, save, text

TTFT_TICKS = ((0.1, "100 ms"), (1.0, "1 s"), (10.0, "10 s"), (100.0, "100 s"))
TPOT_TICKS = ((0.01, "10 ms"), (0.03, "30 ms"), (0.1, "100 ms"), (0.3, "300 ms"))
PANELS = (
    ("ttft", "50", 84, 54),
    ("ttft", "95", 368, 54),
    ("ttft", "99", 652, 54),
    ("tpot", "50", 84, 362),
    ("tpot", "99", 368, 362),
)
SIDE = 210.0
RANGES = {"ttft": (0.02, 1000.0, TTFT_TICKS), "tpot": (0.004, 0.8, TPOT_TICKS)}
BAND = 1.15
Row = dict[str, str]


def rows() -> list[Row]:
    """Every point and percentile."""
    with (HERE / "attainment_grid.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def values(some: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Simulated across, closed form up. [s]"""
    return [float(one["simulated_s"]) for one in some], [float(one["closed_form_s"]) for one in some]


def rings(panel: LogPanel, some: Sequence[Row], *, radius: float = 1.7) -> str:
    """Hollow, pale circles as one path."""
    turn, back = (f"a{radius} {radius} 0 1 0 {way * 2 * radius:g} 0" for way in (1, -1))
    path = "".join(
        f"M{panel.x(across) - radius:.1f} {panel.y(up):.1f}{turn}{back}"
        for across, up in zip(*values(some), strict=True)
    )
    return f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="0.7" stroke-opacity="0.55"/>'


def frame(panel: LogPanel, title: str, low: float, high: float, ticks: Sequence[tuple[float, str]]) -> list[str]:
    """The panel's axes with lines of 15 % instead of a factor of 1.25, the only dashed ones."""
    marks = [one for one in panel.axes(title, ticks, "simulated", "closed form") if "stroke-dasharray" not in one]
    above = (panel.x(low), panel.y(low * BAND), panel.x(high / BAND), panel.y(high))
    below = (panel.x(low * BAND), panel.y(low), panel.x(high), panel.y(high / BAND))
    return [*marks, *(line(*ends, colour=FAINT, dash="3 3") for ends in (above, below))]


def legend(x: float, y: float) -> list[str]:
    """What the marks mean, one below the other."""
    entries = (
        ("in range, constants chosen on them", BLUE),
        ("in range, second grid", ORANGE),
        ("in range, fresh grid", GREEN),
    )
    marks: list[str] = []
    for number, (words, colour) in enumerate(entries):
        at = y + 24 * number
        marks += [box(x, at, 12, 12, colour), text(x + 20, at + 11, words, size=12, fill=FAINT)]
    at = y + 24 * len(entries)
    ring = f'<circle cx="{x + 6:g}" cy="{at + 6:g}" r="5" fill="none" stroke="{GREY}" stroke-width="1.2"/>'
    marks += [ring, text(x + 20, at + 11, "outside the declared range", size=12, fill=FAINT)]
    at += 24
    marks += [line(x, at + 6, x + 13, at + 6, dash="3 3"), text(x + 20, at + 11, "15 % off", size=12, fill=FAINT)]
    return marks


def main() -> None:
    """One panel for each figure; outside the range behind, the grids in front."""
    found = rows()
    marks: list[str] = []
    for metric, p, left, top in PANELS:
        low, high, ticks = RANGES[metric]
        panel = LogPanel(left, top, SIDE, low, high)
        mine = [one for one in found if (one["metric"], one["percentile"]) == (metric, p)]
        marks += frame(panel, f"{metric.upper()} p{p}", low, high, ticks)
        marks.append(rings(panel, [one for one in mine if one["in_range"] == "False"]))
        for grid, colour in (("chosen", BLUE), ("second", ORANGE), ("fresh", GREEN)):
            inside = [one for one in mine if one["grid"] == grid and one["in_range"] == "True"]
            marks.append(panel.dots(*values(inside), colour, size=3.4))
    marks += legend(652, 400)
    save("attainment_grid.svg", 880, 630, "Percentiles of TTFT and TPOT: closed form against simulator", marks)


if __name__ == "__main__":
    main()

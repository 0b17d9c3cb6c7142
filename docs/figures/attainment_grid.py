"""Closed form against simulator on the two grids, from ``attainment_grid.csv`` beside this file.

Redo the rows with ``python -m servecast.validation.attainment_grid --out docs/figures/attainment_grid.csv``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

from drawing import BLUE, FAINT, GREY, HERE, ORANGE, LogPanel, box, save, text

TTFT_TICKS = ((0.03, "30 ms"), (0.1, "100 ms"), (1.0, "1 s"), (10.0, "10 s"), (100.0, "100 s"))
TPOT_TICKS = ((0.01, "10 ms"), (0.03, "30 ms"), (0.1, "100 ms"), (0.3, "300 ms"))
Row = dict[str, str]


def rows() -> list[Row]:
    """Every point and percentile."""
    with (HERE / "attainment_grid.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def dots(panel: LogPanel, some: Sequence[Row], colour: str, size: float) -> str:
    """Simulated across, closed form up."""
    return panel.dots(
        [float(one["simulated_s"]) for one in some], [float(one["closed_form_s"]) for one in some], colour, size=size
    )


def main() -> None:
    """One panel for each metric; outside the range behind, the grids in front."""
    found = rows()
    marks: list[str] = []
    for metric, panel, ticks in (
        ("ttft", LogPanel(78, 60, 290, 0.03, 400.0), TTFT_TICKS),
        ("tpot", LogPanel(460, 60, 290, 0.006, 1.0), TPOT_TICKS),
    ):
        mine = [one for one in found if one["metric"] == metric]
        marks += panel.axes(metric.upper(), ticks, "simulated", "closed form")
        marks.append(dots(panel, [one for one in mine if one["in_range"] == "False"], GREY, 1.8))
        for grid, colour in (("chosen", BLUE), ("held-out", ORANGE)):
            inside = [one for one in mine if one["grid"] == grid and one["in_range"] == "True"]
            marks.append(dots(panel, inside, colour, 2.4))
    at = 78.0
    for words, colour in (
        ("in range, constants chosen on them", BLUE),
        ("in range, held out", ORANGE),
        ("outside the declared range", GREY),
    ):
        marks += [box(at, 412, 12, 12, colour), text(at + 18, 423, words, size=12, fill=FAINT)]
        at += 36 + 7 * len(words)
    save("attainment_grid.svg", 780, 440, "Percentiles of TTFT and TPOT: closed form against simulator", marks)


if __name__ == "__main__":
    main()

"""Share of requests within the limits by rate and policy, from speculation_comparison.csv beside this file."""

from __future__ import annotations

import csv
from pathlib import Path

from drawing import BLUE, FAINT, GREEN, GREY, GRID, INK, ORANGE, RED, VIOLET, line, save, text

HERE = Path(__file__).resolve().parent
STYLES = {
    "no speculation": (GREY, "2 3"),
    "static 3": (ORANGE, ""),
    "static 5": (ORANGE, "6 3"),
    "SmartSpec": (VIOLET, ""),
    "SpecServe as released": (RED, ""),
    "SpecServe, true times": (RED, "6 3"),
    "ours: table": (BLUE, ""),
    "ours: per step": (GREEN, "6 3"),
}
TITLES = {"azure-conv": "Azure conversation", "azure-code": "Azure code", "mooncake": "Mooncake conversation"}
WIDTH, HEIGHT = 220.0, 150.0


def panel(left: float, top: float, title: str, rows: list[dict[str, str]]) -> list[str]:
    """One system on one trace."""
    marks = [text(left, top - 10, title, size=13, font_weight="600")]
    shares = sorted({float(row["share"]) for row in rows})

    def x(share: float) -> float:
        return left + WIDTH * (share - shares[0]) / (shares[-1] - shares[0])

    def y(attainment: float) -> float:
        return top + HEIGHT * (1.0 - attainment)

    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        marks.append(line(left, y(level), left + WIDTH, y(level), colour=GRID))
        marks.append(text(left - 6, y(level) + 4, f"{level:.0%}", size=10, anchor="end", fill=FAINT))
    for share in shares:
        marks.append(text(x(share), top + HEIGHT + 15, f"{share:g}", size=10, anchor="middle", fill=FAINT))
    for name, (colour, dash) in STYLES.items():
        points = sorted((float(row["share"]), float(row["slo_attainment"])) for row in rows if row["policy"] == name)
        path = " ".join(f"{'L' if i else 'M'}{x(s):.1f} {y(a):.1f}" for i, (s, a) in enumerate(points))
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        marks.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
    return marks


def main() -> None:
    """Two rows of systems, a column per trace, one legend."""
    with (HERE / "speculation_comparison.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    marks = []
    for i, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
        for j, trace in enumerate(TITLES):
            here = [row for row in rows if row["system"] == system and row["trace"] == trace]
            marks += panel(70 + 270 * j, 44 + 222 * i, f"{system}, {TITLES[trace]}", here)
    bottom = 44 + 222 * 2 - 22
    marks.append(
        text(
            450,
            bottom + 4,
            "arrival rate, share of what the engine completes without speculation",
            size=12,
            anchor="middle",
            fill=INK,
        )
    )
    for i, (name, (colour, dash)) in enumerate(STYLES.items()):
        at, height = 70 + 210 * (i % 4), bottom + 32 + 22 * (i // 4)
        marks.append(line(at, height - 4, at + 26, height - 4, colour=colour, dash=dash))
        marks.append(text(at + 32, height, name, size=12, fill=INK))
    print(save("speculation_policies.svg", 880, bottom + 72, "SLO attainment by rate and policy", marks).name)


if __name__ == "__main__":
    main()

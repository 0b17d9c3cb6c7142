"""Picture of the SLO-attainment page: from arrivals to a replica's queue, and what TTFT is made of."""

from __future__ import annotations

from drawing import BLUE, FAINT, GREEN, GREY, ORANGE, RED, VIOLET, box, brace, line, save, text


def flow() -> list[str]:
    """Arrivals, router, replicas."""
    marks = [text(24, 30, "From a trace to replicas", size=15, font_weight="600")]
    heights = (16, 22, 14, 30, 44, 38, 24, 18, 26, 14, 20, 34)
    for number, height in enumerate(heights):
        marks.append(box(28 + 13 * number, 120 - height, 10, height, GREY))
    marks.append(text(28, 142, "windows of steady rate λ", size=12, fill=FAINT))
    marks.append(line(196, 100, 240, 100, arrow=True))
    marks.append(box(244, 82, 70, 36, VIOLET, "router"))
    for row, (name, waiting, running) in enumerate((("replica 1", 3, 8), ("replica R", 0, 5))):
        y = 48 + 70 * row
        marks.append(line(316, 100, 372, y + 22, arrow=True))
        for slot in range(4):
            marks.append(box(378 + 17 * slot, y + 10, 14, 24, ORANGE if slot >= 4 - waiting else "#f3dfcc"))
        marks.append(line(450, y + 22, 480, y + 22, arrow=True))
        for slot in range(8):
            marks.append(box(484 + 17 * slot, y + 10, 14, 24, BLUE if slot < running else "#cfd8e6"))
        marks.append(text(636, y + 27, f"{name}: leaves at μ_B", size=12, fill=FAINT))
    marks.append(text(378, 184, "wait for a slot", size=12, fill=FAINT))
    marks.append(text(484, 184, "B in service, at most max_num_seqs", size=12, fill=FAINT))
    return marks


def parts() -> list[str]:
    """Time to first token, piece by piece, then the tokens."""
    marks = [text(24, 226, "One request", size=15, font_weight="600")]
    pieces = (
        ("backlog V", RED, 96.0),
        ("slot wait", ORANGE, 96.0),
        ("prompts before", GREY, 118.0),
        ("t₁", VIOLET, 36.0),
        ("own prompt", GREEN, 100.0),
        ("step", BLUE, 48.0),
    )
    at = 28.0
    for words, colour, width in pieces:
        marks.append(box(at, 242, width - 2, 34, colour, words, size=11))
        at += width
    marks.append(brace(28, at - 2, 282, "TTFT"))
    begin = at
    for number in range(9):
        marks.append(box(at + 4, 248, 12, 22, BLUE))
        at += 26 if number % 4 == 2 else 19
    marks.append(brace(begin + 4, at - 6, 282, "TPOT × (m − 1)"))
    return marks


if __name__ == "__main__":
    marks = [*flow(), *parts()]
    print(save("slo_attainment.svg", 780, 320, "Arrivals, router, replicas, and the parts of one request", marks).name)

"""Picture of the speculation page: one round, what a pass computes, and the table that an engine is given."""

from __future__ import annotations

from math import log2

from drawing import BLUE, FAINT, GREEN, GREY, ORANGE, RED, box, brace, line, save, text

CELL = 30.0


def one_round() -> list[str]:
    """A draft of four tokens for one request: two accepted, one corrected, one thrown away."""
    marks = [text(24, 30, "One round: K = 4", size=15, font_weight="600")]
    y = 52.0
    for i in range(4):
        marks.append(box(24 + 44 * i, y, 40, 24, ORANGE, f"d{i + 1}", size=11))
    marks.append(text(210, y + 17, "drafted: d₀ + d K", size=12, fill=FAINT))
    y = 96.0
    outcomes = ((GREEN, "✓"), (GREEN, "✓"), (RED, "✗"), (GREY, "–"))
    for i, (colour, word) in enumerate(outcomes):
        marks.append(line(44 + 44 * i, 78, 44 + 44 * i, y - 3, arrow=True))
        marks.append(box(24 + 44 * i, y, 40, 24, colour, word, size=13))
    marks.append(text(210, y + 17, "verified in one pass of K + 1 rows", size=12, fill=FAINT))
    y = 140.0
    for i, (colour, word) in enumerate(((BLUE, "1"), (BLUE, "2"), (BLUE, "3"))):
        marks.append(box(24 + 44 * i, y, 40, 24, colour, word, size=11))
    marks.append(brace(24, 152, y + 28, "A = 3 tokens in one step"))
    marks.append(text(166, y + 17, "the third is the target's own", size=12, fill=FAINT))
    return marks


def rows() -> list[str]:
    """The rows of a pass over four requests."""
    left, top = 420.0, 52.0
    marks = [text(left, 30, "Rows of a pass: n = B (K + 1)", size=15, font_weight="600")]
    for b in range(4):
        marks.append(text(left, top + 30 * b + 17, f"request {b + 1}", size=12, fill=FAINT))
        for k in range(5):
            colour = BLUE if k == 0 else ORANGE
            marks.append(box(left + 74 + CELL * k, top + 30 * b, CELL - 4, 24, colour))
        marks.append(line(left + 74 + CELL * 5 + 4, top + 30 * b + 12, left + 74 + CELL * 5 + 34, top + 30 * b + 12))
        marks.append(box(left + 74 + CELL * 5 + 38, top + 30 * b, 96, 24, GREY, "cache, once", size=11))
    marks.append(brace(left + 74, left + 74 + CELL * 5 - 4, top + 118, "a + b φ(n / τ) + g n"))
    marks.append(text(left + 74 + CELL * 5 + 86, top + 139, "κ B l", size=12, anchor="middle", fill=FAINT))
    return marks


def table() -> list[str]:
    """Draft length by batch size, as the engine reads it."""
    left, top, width = 24.0, 262.0, 690.0  # a logarithmic axis from 1 to 128
    marks = [text(24, 236, "What the engine loads: draft length by batch size", size=15, font_weight="600")]
    for lo, hi, length, colour in ((1, 16, 6, BLUE), (17, 56, 4, GREEN), (57, 128, 2, ORANGE)):
        x0, x1 = left + width * log2(lo) / 7.0, left + width * log2(min(hi + 1, 128)) / 7.0
        marks.append(box(x0, top, x1 - x0 - 2, 34, colour, f"K = {length}", size=13))
        marks.append(text(x0, top + 50, str(lo), size=11, fill=FAINT))
    marks.append(text(left + width, top + 50, "128", size=11, anchor="end", fill=FAINT))
    marks.append(text(left + width / 2, top + 68, "requests in the step (log)", size=12, anchor="middle", fill=FAINT))
    marks.append(
        text(
            left,
            top + 96,
            "small batches: memory moves whatever the rows, long drafts are nearly free; large ones: every row is work",
            size=12,
            fill=FAINT,
        )
    )
    return marks


if __name__ == "__main__":
    marks = [*one_round(), *rows(), *table()]
    print(save("speculation.svg", 800, 376, "A round, the rows of a pass, and a draft-length table", marks).name)

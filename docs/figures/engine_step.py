"""Picture of the engine-step page: what one decode step consists of, and how prompts delay tokens in a closed loop."""

from __future__ import annotations

from drawing import BLUE, FAINT, GREEN, GREY, ORANGE, RED, VIOLET, box, brace, line, save, text

LAYER = (
    ("qkv", BLUE, 52.0),
    ("attention", GREEN, 84.0),
    ("out", BLUE, 42.0),
    ("all-reduce", ORANGE, 84.0),
    ("gate-up", BLUE, 76.0),
    ("down", BLUE, 52.0),
    ("all-reduce", ORANGE, 84.0),
    ("gap", GREY, 42.0),
)


def step() -> list[str]:
    """One layer, repeated, then the head and the host."""
    marks = [text(24, 30, "One decode step of B sequences", size=15, font_weight="600")]
    at = 24.0
    for words, colour, width in LAYER:
        marks.append(box(at, 46, width - 2, 34, colour, words, size=11))
        at += width
    marks.append(brace(24, at - 2, 86, "one layer, L times: G + A + C, and a gap u between kernels"))
    marks.append(text(at + 8, 68, "× L", size=15))
    at += 42
    for words, colour, width in (("head", BLUE, 60.0), ("sampler, host", VIOLET, 122.0)):
        marks.append(box(at, 46, width - 2, 34, colour, words, size=11))
        at += width
    marks.append(text(at - 122, 106, "s B + t₀", size=12, fill=FAINT))
    return marks


def loop() -> list[str]:
    """Four clients on one replica: while one prompt is prefilled, nobody gets a token."""
    top, start = 200.0, 120.0
    marks = [text(24, 158, "Closed loop of c = 4 clients, B = 4 running", size=15, font_weight="600")]
    prompts = {0: 1, 6: 2, 12: 3, 18: 4}  # slot: client
    slots, width = 24, 26.0
    for client in range(1, 5):
        y = top + 30 * (client - 1)
        marks.append(text(24, y + 16, f"client {client}", size=12, fill=FAINT))
        for slot in range(slots):
            x = start + width * slot
            if prompts.get(slot) == client:
                marks.append(box(x, y, width - 2, 22, RED))
            elif slot in prompts:
                marks.append(line(x, y + 11, x + width - 2, y + 11, colour=GREY, dash="2 3"))
            else:
                marks.append(box(x + 8, y + 5, 10, 12, BLUE))
    bottom = top + 124
    marks.append(brace(start, start + width - 2, top - 6, "t_pre", below=False))
    marks.append(brace(start + 2 * width, start + 3 * width - 2, top - 6, "t_dec", below=False))
    marks.append(brace(start, start + slots * width - 2, bottom, "one cycle: c t_pre + m t_dec"))
    legend = bottom + 44
    marks += [box(120, legend, 16, 14, RED), text(142, legend + 12, "prompt of this client", size=12, fill=FAINT)]
    marks += [box(290, legend, 16, 14, BLUE), text(312, legend + 12, "output token", size=12, fill=FAINT)]
    marks += [line(420, legend + 7, 442, legend + 7, colour=GREY, dash="2 3")]
    marks += [text(450, legend + 12, "waits: (B - 1) such pauses are spread over m tokens", size=12, fill=FAINT)]
    return marks


if __name__ == "__main__":
    marks = [*step(), *loop()]
    print(save("engine_step.svg", 780, 406, "Parts of a decode step, and prompts between tokens", marks).name)

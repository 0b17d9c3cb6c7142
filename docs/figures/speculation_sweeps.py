"""Predicted against measured decode speed, each batch size left out: ``python docs/figures/speculation_sweeps.py``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from drawing import BLUE, FAINT, GREEN, ORANGE, VIOLET, LogPanel, save, text

from servecast.calibration.fits.speculation_cells import fit_cells
from servecast.readers.speculation_cells import read_cells

SWEEPS = (
    ("dspark_v4pro_8xb300", "DeepSeek-V4-Pro, 8xB300, vLLM", BLUE),
    ("sglang_qwen3_235b", "Qwen3-235B, SGLang", GREEN),
    ("sglang_glm47_fp8", "GLM-4.7-FP8, SGLang", ORANGE),
    ("vllm_dsv4_dspark_rocm", "DeepSeek-V4, AMD, vLLM", VIOLET),
)
LEGEND = dict(zip((one[0] for one in SWEEPS), (92, 312, 470, 630), strict=True))
TICKS = [(30, "30"), (50, "50"), (100, "100"), (200, "200")]


def main() -> None:
    """Two panels: batch sizes between others, and the ends of a sweep."""
    folder = Path(os.environ["SERVECAST_DATA"], "speculation")
    panels = {False: LogPanel(86, 56, 280, 25, 300), True: LogPanel(466, 56, 280, 25, 300)}
    titles = {False: "between measured batch sizes", True: "beyond them (ends left out)"}
    marks = []
    for outside, panel in panels.items():
        marks += panel.axes(titles[outside], TICKS, "measured [tok/s per request]", "predicted [tok/s per request]")
    for name, title, colour in SWEEPS:
        cells = read_cells(folder / f"{name}.csv")
        held = fit_cells(cells)
        assert held.heldout is not None  # noqa: S101 (all four have three batch sizes)
        measured = held.cells.tok_s_per_request
        predicted = measured * (1.0 + held.heldout.error)
        for outside, panel in panels.items():
            rows = held.heldout.outside == outside
            marks.append(panel.dots(measured[rows], predicted[rows], colour, size=7))
        at = LEGEND[name]
        marks.append(f'<circle cx="{at}" cy="404" r="4" fill="{colour}"/>')
        marks.append(text(at + 10, 408, title, size=11, fill=FAINT))
        print(name, np.abs(held.heldout.error).mean().round(4))
    print(save("speculation_sweeps.svg", 790, 424, "Predicted against measured decode speed", marks).name)


if __name__ == "__main__":
    main()

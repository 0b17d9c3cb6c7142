"""Predicted against measured TTFT and TPOT, folds over groups held out; needs SERVECAST_DATA.

Writes ``silicon.svg`` (every open aggregated row) and ``comparison.svg`` (dense rows that both predict).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from drawing import BLUE, FAINT, GREEN, GREY, ORANGE, LogPanel, box, save, text
from numpy.typing import NDArray

from servecast.calibration.public import PublicRuns, fit_kernels, load_runs
from servecast.validation.public import data_folder
from servecast.validation.silicon import HeldOut, held_out

ENGINES = (("vllm", "vLLM", BLUE), ("sglang", "SGLang", ORANGE), ("trtllm", "TensorRT-LLM", GREEN))
TTFT_TICKS = ((0.01, "10 ms"), (0.1, "100 ms"), (1.0, "1 s"), (10.0, "10 s"), (100.0, "100 s"))
TPOT_TICKS = ((0.003, "3 ms"), (0.01, "10 ms"), (0.03, "30 ms"), (0.1, "100 ms"), (0.3, "300 ms"))
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def ttft_panel(left: float) -> LogPanel:
    """Axes for times to first token."""
    return LogPanel(left, 60, 290, 0.008, 120.0)


def tpot_panel(left: float) -> LogPanel:
    """Axes for times per output token."""
    return LogPanel(left, 60, 290, 0.0025, 0.4)


def legend(y: float, entries: Sequence[tuple[str, str]]) -> list[str]:
    """Coloured words in a row."""
    marks, at = [], 78.0
    for words, colour in entries:
        marks += [box(at, y, 12, 12, colour), text(at + 18, y + 11, words, size=12, fill=FAINT)]
        at += 36 + 7 * len(words)
    return marks


def by_engine(panel: LogPanel, public: PublicRuns, chosen: Mask, truth: Floats, value: Floats) -> list[str]:
    """Dots of the chosen rows, one colour per engine."""
    engine = np.array([row.engine for row in public.rows])
    return [
        panel.dots(truth[rows].tolist(), value[rows].tolist(), colour)
        for name, _, colour in ENGINES
        if (rows := chosen & (engine == name)).any()
    ]


def everything(public: PublicRuns, found: HeldOut) -> None:
    """All rows: mixture of experts behind, dense models by engine in front."""
    moe = public.runs.moe
    marks: list[str] = []
    for metric, panel, ticks in (("ttft", ttft_panel(78), TTFT_TICKS), ("tpot", tpot_panel(460), TPOT_TICKS)):
        truth, value = getattr(public.runs, f"{metric}_s"), getattr(found, f"{metric}_s")
        marks += panel.axes(metric.upper(), ticks, "measured", "predicted, held out")
        marks.append(panel.dots(truth[moe].tolist(), value[moe].tolist(), GREY, size=2.6))
        marks += by_engine(panel, public, ~moe, truth, value)
    names = [(f"dense, {title}", colour) for _, title, colour in ENGINES]
    marks += legend(412, [*names, ("mixture of experts", GREY)])
    save("silicon.svg", 780, 440, "Predicted against measured TTFT and TPOT, groups held out", marks)


def beside(public: PublicRuns, found: HeldOut) -> None:
    """The same dense rows by AIConfigurator and by us."""
    theirs = np.array([row.aic_tpot_s for row in public.rows])
    chosen = ~public.runs.moe & np.isfinite(theirs)
    truth = public.runs.tpot_s
    marks: list[str] = []
    for left, title, value in ((78.0, "servecast, held out", found.tpot_s), (460.0, "AIConfigurator 0.12", theirs)):
        panel = tpot_panel(left)
        marks += panel.axes(f"TPOT, {title}", TPOT_TICKS, "measured", "predicted")
        marks += by_engine(panel, public, chosen, truth, value)
    marks += legend(412, [(f"dense, {title}", colour) for _, title, colour in ENGINES])
    save("comparison.svg", 780, 440, "TPOT of dense models, servecast and AIConfigurator on the same rows", marks)


def main() -> None:
    """Both figures."""
    folder = data_folder()
    kernels, _ = fit_kernels(folder)
    public = load_runs(folder, kernels)
    found = held_out(public, "group")
    everything(public, found)
    beside(public, found)


if __name__ == "__main__":
    main()

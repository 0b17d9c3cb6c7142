"""Percentiles of the example's plan from light load to saturation: the executed example of the SLO-attainment page."""

from __future__ import annotations

from pathlib import Path

from drawing import BLUE, FAINT, ORANGE, RED, line, save, text

import servecast
from servecast.cli.request import resolve_trace
from servecast.model.prediction import Prediction

LEFT, WIDTH, HEIGHT = 78.0, 290.0, 230.0


def panel(
    left: float, title: str, rates: list[float], values: list[Prediction], limit_s: float, mean: float
) -> list[str]:
    """One percentile in milliseconds against the rate, its 90 % interval shaded, its limit in red."""
    top, bottom, most, highest = 56.0, 56.0 + HEIGHT, max(rates) * 1.02, 2.0 * limit_s

    def x(rate: float) -> float:
        return left + WIDTH * rate / most

    def y(seconds: float) -> float:
        return bottom - HEIGHT * min(seconds, highest) / highest

    marks = [text(left, top - 14, title, size=14, font_weight="600")]
    for share in (0.0, 0.5, 1.0, 1.5, 2.0):
        height = y(limit_s * share)
        marks.append(line(left, height, left + WIDTH, height, colour="#e5e7eb"))
        marks.append(text(left - 7, height + 4, f"{1e3 * limit_s * share:g}", size=11, anchor="end", fill=FAINT))
    for rate in range(0, int(most) + 1, 2):
        marks.append(text(x(rate), bottom + 17, f"{rate}", size=11, anchor="middle", fill=FAINT))
    low = [f"{x(rate):.1f} {y(one.lo):.1f}" for rate, one in zip(rates, values, strict=True)]
    high = [f"{x(rate):.1f} {y(one.hi):.1f}" for rate, one in zip(rates, values, strict=True)]
    middle = [f"{x(rate):.1f} {y(one.value):.1f}" for rate, one in zip(rates, values, strict=True)]
    marks.append(f'<path d="M{" L".join([*low, *reversed(high)])} Z" fill="{BLUE}" fill-opacity="0.18"/>')
    marks.append(f'<path d="M{" L".join(middle)}" fill="none" stroke="{BLUE}" stroke-width="2"/>')
    marks.append(line(left, y(limit_s), left + WIDTH, y(limit_s), colour=RED, dash="6 4"))
    marks.append(line(x(mean), top, x(mean), bottom, colour=ORANGE, dash="3 3"))
    marks.append(text(x(mean) - 5, top + 12, "mean rate", size=11, anchor="end", fill=ORANGE))
    marks.append(text(left + WIDTH / 2, bottom + 38, "requests/s, steady", size=12, anchor="middle"))
    marks.append(text(left + 4, y(limit_s) - 6, "limit", size=11, fill=RED))
    return marks


def main() -> None:
    """The plan of the README, as a chart."""
    workload = servecast.workload_from_trace(servecast.read_trace(resolve_trace("example", Path())))
    answer = servecast.plan(
        workload,
        servecast.llm("Llama-3.1-8B-Instruct"),
        [servecast.Offer(gpu=servecast.gpu("h100"), usd_per_hour=2.9)],
        [
            servecast.Slo(metric="ttft", percentile=99.0, limit_s=2.0),
            servecast.Slo(metric="tpot", percentile=99.0, limit_s=0.05),
        ],
    )
    curve = answer.plan.load_curve
    rates = [one.rate_rps for one in curve]
    marks = panel(LEFT, "TTFT p99 [ms]", rates, [one.ttft_p99_s for one in curve], 2.0, workload.rate_rps)
    marks += panel(LEFT + 382, "TPOT p99 [ms]", rates, [one.tpot_p99_s for one in curve], 0.05, workload.rate_rps)
    print(answer.plan.plan.name if answer.plan.plan else answer.plan.binds)
    save("load_curve.svg", 780, 344, "TTFT and TPOT p99 of the planned fleet against load", marks)


if __name__ == "__main__":
    main()

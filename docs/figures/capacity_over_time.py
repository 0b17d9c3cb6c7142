"""Picture of the page on capacity over time: a made-up day, what it requires, what serves, and one morning close up."""

from __future__ import annotations

import numpy as np
from drawing import BLUE, FAINT, GREY, GRID, INK, ORANGE, RED, box, line, save, text

import servecast
from servecast.model.workload import Trace
from servecast.scheduling import ScheduleAnswer, plan_schedule

LEFT, TOP, HEIGHT = 62.0, 66.0, 220.0
DAY_WIDTH, MORNING_WIDTH, GAP = 400.0, 290.0, 74.0
MORNING = (6.0, 9.0)
"""Hours shown close up."""


def made_up_day() -> Trace:
    """Poisson arrivals whose rate follows a cosine, lowest at midnight, with a lunch hour."""
    rng = np.random.default_rng(7)
    second = np.arange(86400)
    hour = second / 3600.0
    rate = 22.0 - 18.0 * np.cos(2.0 * np.pi * hour / 24.0) - 9.0 * np.exp(-(((hour - 13.0) / 0.8) ** 2))
    counts = rng.poisson(rate)
    t = np.sort(np.repeat(second, counts) + rng.random(counts.sum()))
    n_in, n_out = rng.integers(100, 2000, len(t)), rng.integers(20, 400, len(t))
    return Trace(name="a made-up day", t_s=t - t[0], n_in=n_in, n_out=n_out)


def solved() -> ScheduleAnswer:
    """Scheduled by the minute, for five times the rate."""
    return plan_schedule(
        made_up_day(),
        servecast.llm("Llama-3.1-8B-Instruct"),
        [servecast.Offer(gpu=servecast.gpu("h100"), usd_per_hour=2.9)],
        [
            servecast.Slo(metric="ttft", percentile=99.0, limit_s=2.0),
            servecast.Slo(metric="tpot", percentile=99.0, limit_s=0.05),
        ],
        window_s=60.0,
        lead_time_s=600.0,
        min_dwell_s=1800.0,
        rate_scale=5.0,
    )


class Panel:
    """Hours across, replicas up."""

    def __init__(self, left: float, width: float, hours: tuple[float, float], least: int, most: int) -> None:
        self.left, self.width, self.hours, self.least, self.most = left, width, hours, least, most

    def x(self, hour: float) -> float:
        return self.left + self.width * (hour - self.hours[0]) / (self.hours[1] - self.hours[0])

    def y(self, replicas: float) -> float:
        return TOP + HEIGHT * (self.most - replicas) / (self.most - self.least)

    def frame(self, title: str, every: float, up: int) -> list[str]:
        marks = [text(self.left, TOP - 34, title, size=14, font_weight="600")]
        for count in range(self.least, self.most + 1, up):
            height = self.y(count)
            marks.append(line(self.left, height, self.left + self.width, height, colour=GRID))
            marks.append(text(self.left - 7, height + 4, str(count), size=11, anchor="end", fill=FAINT))
        for hour in np.arange(self.hours[0], self.hours[1] + 0.01, every):
            marks.append(text(self.x(hour), TOP + HEIGHT + 17, f"{hour:g}", size=11, anchor="middle", fill=FAINT))
        marks.append(text(self.left + self.width / 2, TOP + HEIGHT + 36, "hour", size=12, anchor="middle"))
        return marks

    def steps(self, window_s: float, fleet: list[int], colour: str, width: float) -> str:
        """A fleet over time as stairs, within the panel's hours."""
        per_hour = 3600.0 / window_s
        first, last = (round(hour * per_hour) for hour in self.hours)
        shown = fleet[first : min(last, len(fleet))]
        path = f"M{self.x(self.hours[0]):.1f} {self.y(shown[0]):.1f}"
        ends = [w for w in range(1, len(shown) + 1) if w == len(shown) or shown[w] != shown[w - 1]]
        for end in ends:
            path += f" V{self.y(shown[end - 1]):.1f} H{self.x((first + end) / per_hour):.1f}"
        return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>'


def day(answer: ScheduleAnswer, most: int) -> list[str]:
    """The whole day: always peak, serving, required."""
    panel, window_s = Panel(LEFT, DAY_WIDTH, (0.0, 24.0), 0, most), answer.problem.window_s
    peak = int(answer.problem.required.max())
    marks = panel.frame("A day: replicas serving", 4.0, 5)
    marks.append(line(LEFT, panel.y(peak), LEFT + DAY_WIDTH, panel.y(peak), colour=RED, dash="6 4"))
    marks.append(text(LEFT + 6, panel.y(peak) - 6, "always peak", size=11, fill=RED))
    marks.append(panel.steps(window_s, answer.problem.required.tolist(), GREY, 1.0))
    marks.append(panel.steps(window_s, answer.schedule.replicas.tolist(), BLUE, 2.0))
    foot = TOP + HEIGHT - 14
    marks.append(text(LEFT + 130, foot - 18, "serving", size=12, fill=BLUE, font_weight="600"))
    marks.append(text(LEFT + 130, foot, "required by the limits, window by window", size=12, fill=GREY))
    return marks


def morning(answer: ScheduleAnswer) -> list[str]:
    """A few hours, with a bar for each order from when it is placed to when it serves."""
    left, problem = LEFT + DAY_WIDTH + GAP, answer.problem
    window_s, fleet = problem.window_s, answer.schedule.replicas.tolist()
    shown = fleet[round(MORNING[0] * 3600.0 / window_s) : round(MORNING[1] * 3600.0 / window_s)]
    panel = Panel(left, MORNING_WIDTH, MORNING, min(shown) - 2, max(shown) + 2)
    marks = panel.frame("The morning: ordered before it serves", 1.0, 1)
    marks.append(panel.steps(window_s, problem.required.tolist(), GREY, 1.0))
    marks.append(panel.steps(window_s, fleet, BLUE, 2.0))
    for w in np.flatnonzero(answer.schedule.started):
        serves = w * window_s / 3600.0
        ordered = serves - problem.lead_time_s / 3600.0
        if MORNING[0] <= ordered and serves <= MORNING[1]:
            place = (panel.x(ordered), panel.y(fleet[w]) - 3.0, panel.x(serves) - panel.x(ordered))
            marks.append(box(place[0], place[1], place[2], 6.0, ORANGE))
    marks.append(text(left + 8, TOP + 14, "ordered, and paid for", size=12, fill=ORANGE, font_weight="600"))
    marks.append(text(left + 8, TOP + 32, "serving", size=12, fill=BLUE, font_weight="600"))
    marks.append(text(left + 8, TOP + 50, "required", size=12, fill=GREY))
    return marks


def main() -> None:
    """Both panels, and a line of figures."""
    answer = solved()
    found = answer.schedule
    most = 5 * -(-int(found.replicas.max()) // 5)
    words = (
        f"lead time {answer.problem.lead_time_s / 60:g} min, dwell {answer.problem.min_dwell_s / 60:g} min: "
        f"{found.cost_usd:.0f} USD; always peak {found.always_peak_usd:.0f} USD; "
        f"required and no more {found.lower_bound_usd:.0f} USD"
    )
    print(words, found.binds, answer.slo_attainment)
    marks = [*day(answer, most), *morning(answer), text(LEFT, TOP + HEIGHT + 62, words, size=12, fill=INK)]
    width = LEFT + DAY_WIDTH + GAP + MORNING_WIDTH + 24
    save(
        "capacity_over_time.svg", width, TOP + HEIGHT + 78, "Replicas over a day: required, serving, always peak", marks
    )


if __name__ == "__main__":
    main()

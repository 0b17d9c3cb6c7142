"""One self-contained HTML page about a capacity plan: a planner forwards it, and it reads without a network.

The charts are inline SVG, the style sheet is embedded, there is no script, and a content security policy forbids every
load. All text that comes from data is escaped. The same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import numpy as np

from servecast.model.prediction import Prediction
from servecast.model.slo import Slo
from servecast.model.workload import Trace, Workload
from servecast.reports import formats
from servecast.reports.document import document, figure, header, listed, tile
from servecast.reports.formats import MISSING, escape
from servecast.reports.plan_charts import (
    MOST_POINTS,
    arrivals_chart,
    configuration,
    cost_chart,
    lengths_chart,
    load_chart,
    measures,
    shown_measures,
)
from servecast.reports.plan_tables import alternatives_table, headroom, load_table, replay_table, utilisation
from servecast.solvers.results import Candidate, CapacityPlan, Confirmation, LoadPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContext:
    """What was asked and by what it was answered: everything on the page that is not in the plan itself."""

    model: str
    """The model's title."""
    engine: str
    engine_version: str
    slos: tuple[Slo, ...]
    profile: str
    """Name of the profile that the parameters come from."""
    servecast_version: str
    date: str
    command: str
    seed: int
    offers: tuple[tuple[str, float, int | None], ...]
    """(GPU, price of one [USD/h], most GPUs or None)."""
    files: tuple[str, ...]
    """Files written beside the report."""


def plan_page(
    plan: CapacityPlan,
    *,
    request: ReportContext,
    trace: Trace | None,
    workload: Workload,
    simulated: Confirmation | None = None,
) -> str:
    """The page of a plan, or of the reason why there is none.

    Parameters
    ----------
    plan : result of the capacity search.
    request : what was asked, and the provenance of the answer.
    trace : the recorded requests, where the workload comes from a trace.
    workload : what the plan was sized for.
    simulated : the replay of the trace on the plan, where there was one.

    Returns
    -------
    A complete HTML document, below 300 kB.
    """
    shown = plan.plan or best_achievable(plan.alternatives, request.slos)
    others = [candidate for candidate in plan.alternatives if shown is None or astuple(candidate) != astuple(shown)]
    candidates = [shown, *others] if shown is not None else []
    sections = [
        _answer(plan, shown, request, workload),
        _binding(plan, workload),
        _replayed(plan, simulated),
        _workload(trace, workload),
        _cost(plan, candidates, request),
        _load(plan, request, workload),
        _alternatives(plan, candidates, request),
        _provenance(plan, request, workload),
    ]
    return document(f"Capacity plan: {request.model}, {workload.name}", sections)


def best_achievable(candidates: Sequence[Candidate], slos: Sequence[Slo]) -> Candidate | None:
    """The candidate whose worst ratio of prediction to limit is smallest; of equals the cheapest."""
    bounded = [measure for measure in measures(slos) if measure.limit]

    def badness(candidate: Candidate) -> tuple[float, float, float]:
        ratios = [m.of(candidate).value / m.limit.limit_s for m in bounded if m.limit]
        worst = max((math.inf if math.isnan(ratio) else ratio for ratio in ratios), default=0.0)
        return worst, -candidate.slo_attainment.value, candidate.usd_per_hour

    return min(candidates, key=badness, default=None)


def rate_within_limits(points: Sequence[LoadPoint], slos: Sequence[Slo]) -> Prediction | None:
    """Largest load at which the p99 predictions keep their limits, with the loads of both ends of their intervals.

    None where no p99 is bounded. An end is NaN where the limit is broken at the lightest load already.
    """
    bounded = [m for m in measures(slos) if m.limit and m.percentile == 99]
    if not points or not bounded:
        return None

    def lowest(end: str) -> float:
        crossings = []
        for measure in bounded:
            latencies = [getattr(getattr(point, f"{measure.metric}_p99_s"), end) for point in points]
            limit_s = measure.limit.limit_s if measure.limit else math.inf
            crossings.append(_crossing([point.rate_rps for point in points], latencies, limit_s))
        return math.nan if any(map(math.isnan, crossings)) else min(crossings)

    # a high latency means a low load: the interval turns round
    return Prediction(value=lowest("value"), lo=lowest("hi"), hi=lowest("lo"))


def _crossing(rates: Sequence[float], latencies: Sequence[float], limit_s: float) -> float:
    """Rate at which the latency first passes the limit, linear between points; the last rate where it never does."""
    if not latencies[0] <= limit_s:
        return math.nan
    for (left, low), (right, high) in pairwise(zip(rates, latencies, strict=True)):
        if not high <= limit_s:
            return left + (right - left) * (limit_s - low) / (high - low) if math.isfinite(high) else left
    return rates[-1]


# ---- the answer --------------------------------------------------------------------------------------


def _answer(plan: CapacityPlan, shown: Candidate | None, request: ReportContext, workload: Workload) -> str:
    limits = listed([formats.slo(slo) for slo in request.slos])
    load = f"{formats.rate(workload.rate_rps)} of {workload.name}"
    if plan.plan is not None:
        within = f" within {limits}" if limits else ""
        answer = f"{configuration(plan.plan)} at {formats.usd_per_hour(plan.plan.usd_per_hour)} serves {load}{within}"
        below = _fleet(plan.plan)
    elif shown is not None:
        answer = f"Nothing on offer serves {load}{f' within {limits}' if limits else ''}"
        reached = listed([f"{m.name} {formats.seconds(m.of(shown).value)}" for m in shown_measures(request.slos)])
        below = (
            f"Best achievable: {configuration(shown)} at {formats.usd_per_hour(shown.usd_per_hour)} reaches {reached}. "
            f"{_fleet(shown)}"
        )
    else:
        answer = f"Nothing on offer serves {load}"
        below = "No configuration of the offered GPUs can run this model and load at all."
    eyebrow = f"Capacity plan for {request.model} on {request.engine} {request.engine_version}"
    tiles = _tiles(plan, shown, request, workload) if shown is not None else ""
    return header(eyebrow, answer, below) + tiles


def _fleet(candidate: Candidate) -> str:
    each = candidate.tp * candidate.pp
    replicas = f"{candidate.replicas:,} replica{'s' if candidate.replicas != 1 else ''}"
    return (
        f"{replicas} of {each} GPU{'s' if each != 1 else ''} each, {candidate.gpus:,} in all; "
        f"up to {candidate.max_num_seqs:,} sequences and {candidate.max_num_batched_tokens:,} tokens per step on each "
        f"replica; {candidate.precision} weights, {candidate.kv_format} KV cache."
    )


def _tiles(plan: CapacityPlan, shown: Candidate, request: ReportContext, workload: Workload) -> str:
    tiles = []
    for measure in (m for m in measures(request.slos) if m.percentile == 99):
        prediction = measure.of(shown)
        note = f"limit {formats.seconds(measure.limit.limit_s)}" if measure.limit else "no limit set"
        note += "" if prediction.calibrated else ", extrapolated"
        value, ends = formats.seconds(prediction.value), formats.interval(prediction, "seconds")
        tiles.append(tile(measure.name, value, f"90 % interval {ends}", note, over=measure.over(shown)))
    attained = shown.slo_attainment
    tiles.append(
        tile(
            "SLO attainment",
            formats.percent(attained.value),
            f"90 % interval {formats.interval(attained, 'percent')}",
            "of requests meet every limit",
        )
    )
    return f'<dl class="tiles">{"".join(tiles)}{_headroom_tile(plan, shown, request, workload)}</dl>'


def _headroom_tile(plan: CapacityPlan, shown: Candidate, request: ReportContext, workload: Workload) -> str:
    saturation = saturation_rps(shown, workload)
    note = f"saturates at {formats.rate(saturation)}" if saturation else f"utilisation {utilisation(shown.utilisation)}"
    within = rate_within_limits(plan.load_curve, request.slos) if plan.plan else None
    if within is None or math.isnan(within.value):
        ends = "no interval: from the mean service rate"
    else:
        spread = formats.interval(within, "rate") if not math.isnan(within.lo) else f"at most {formats.rate(within.hi)}"
        ends = f"limits hold to {formats.rate(within.value)} (90 % interval {spread})"
    return tile("Headroom to saturation", headroom(shown.headroom), ends, note)


def _binding(plan: CapacityPlan, workload: Workload) -> str:
    boxes = []
    if plan.binds:
        infeasible = plan.plan is None
        kind, lead = ("box bad", "Cannot be met:") if infeasible else ("box", "What binds:")
        boxes.append(f'<p class="{kind}"><strong>{lead}</strong> {escape(plan.binds)}</p>')
    # the search passes on what the workload says; nothing is said twice
    for warning in dict.fromkeys((*plan.warnings, *workload.warnings)):
        boxes.append(f'<p class="box warn"><strong>Warning:</strong> {escape(warning)}</p>')
    return f'<div role="note" aria-label="What binds, and warnings">{"".join(boxes)}</div>' if boxes else ""


# ---- workload ----------------------------------------------------------------------------------------


def _replayed(plan: CapacityPlan, found: Confirmation | None) -> str:
    """What the simulator saw on the trace itself, beside the closed form."""
    if found is None or plan.plan is None:
        return ""
    said = f"The simulator replayed every request of the trace on {escape(found.plan.name)}, router {found.router}. "
    said += "It confirms the limits." if found.plan.holds else "It does not confirm the limits."
    if found.one_fewer is not None and not found.one_fewer.holds:
        said += " One replica fewer does not hold."
    table = replay_table(plan.plan, found)
    return f"<section>\n<h2>Replayed on the trace</h2>\n<p>{said}</p>\n{table}\n</section>"


def _workload(trace: Trace | None, workload: Workload) -> str:
    recorded = workload.arrivals
    figures = [figure(*arrivals_chart(trace))] if trace is not None else []
    figures.append(figure(*lengths_chart(workload)))
    if trace is None:
        said = f"{workload.name}: given by parameters, so there are no recorded arrivals to draw."
    else:
        said = f"{workload.name}: {recorded.requests:,} requests in {formats.seconds(recorded.span_s)}."
    notes = "".join(f'<p class="more">{escape(note)}</p>' for note in (trace.notes if trace is not None else ()))
    return (
        f'<section>\n<h2>Workload</h2>\n<p>{escape(said)}</p>\n<div class="pair">{"".join(figures)}</div>\n'
        f"{_statistics(workload)}{notes}\n</section>"
    )


def _statistics(workload: Workload) -> str:
    recorded = workload.arrivals
    idc, peaks = dict(recorded.idc), dict(recorded.peak_to_mean)
    rows = [("Rate", formats.rate(workload.rate_rps)), ("Gap cv", formats.significant(recorded.gap_cv))]
    rows += [(f"IDC {window:g} s", _known(idc.get(window))) for window in (1.0, 10.0, 60.0)]
    # a minute is the scale on which replicas are added; a shorter trace has only shorter windows
    window = 60.0 if 60.0 in peaks else max(peaks, default=60.0)
    rows.append((f"Peak/mean {window:g} s", formats.factor(peaks[window]) if window in peaks else MISSING))
    for name, lengths in (("Prompt", workload.n_in), ("Output", workload.n_out)):
        p50, p99 = np.percentile(lengths, [50, 99]).tolist()
        rows.append((f"{name} p50 / p99", f"{p50:,.0f} / {p99:,.0f}"))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="stats">{cells}</dl>'


def _known(value: float | None) -> str:
    return MISSING if value is None else formats.significant(value)


# ---- alternatives and load ---------------------------------------------------------------------------


def _cost(plan: CapacityPlan, candidates: Sequence[Candidate], request: ReportContext) -> str:
    if not candidates:
        return ""
    over = [any(measure.over(candidate) for measure in measures(request.slos)) for candidate in candidates]
    charts = "".join(
        figure(*cost_chart(candidates, plan.plan, measure, over)) for measure in shown_measures(request.slos)
    )
    said = "Each point is a configuration, numbered as in the table of alternatives. Lower and further left is better."
    if len(candidates) > MOST_POINTS:
        said += f" The first {MOST_POINTS} of {len(candidates):,} are drawn."
    return (
        f'<section>\n<h2>Cost against latency</h2>\n<p>{said}</p>\n<div class="pair">{charts}</div>\n'
        f"{_legend(plan.plan is not None)}\n</section>"
    )


def _alternatives(plan: CapacityPlan, candidates: Sequence[Candidate], request: ReportContext) -> str:
    if not candidates:
        return ""
    said = (
        "The chosen one first."
        if plan.plan is not None
        else "No configuration meets the objectives; the nearest to them is first."
    )
    table = alternatives_table(candidates, plan.plan, measures(request.slos))
    return f"<section>\n<h2>Alternatives</h2>\n<p>{said}</p>\n{table}\n</section>"


def _legend(with_chosen: bool) -> str:
    kinds = [("chosen", "chosen")] if with_chosen else []
    kinds += [
        ("front", "no configuration is cheaper and faster"),
        ("faint", "another one is cheaper and faster"),
        ("over", "above a limit"),
    ]
    entries = "".join(
        '<li><svg viewBox="0 0 14 14" aria-hidden="true">'
        f'<circle class="point {kind}" cx="7" cy="7" r="5.5"/></svg>{text}</li>'
        for kind, text in kinds
    )
    triangle = '<svg viewBox="0 0 14 14" aria-hidden="true"><path class="point over" d="M2 12L7 2L12 12Z"/></svg>'
    return f'<ul class="legend">{entries}<li>{triangle}saturated</li></ul>'


def _load(plan: CapacityPlan, request: ReportContext, workload: Workload) -> str:
    if plan.plan is None or len(plan.load_curve) < 2:
        return ""
    saturation = saturation_rps(plan.plan, workload)
    charts = "".join(
        figure(
            *load_chart(
                plan.load_curve, metric, slos=request.slos, rate_rps=workload.rate_rps, saturation_rps=saturation
            )
        )
        for metric in ("ttft", "tpot")
    )
    return (
        "<section>\n<h2>Latency against load</h2>\n<p>Predicted 99th percentiles of the chosen plan; the band is the "
        f'90 % interval.</p>\n<div class="pair">{charts}</div>\n<details><summary>The numbers behind the charts'
        f"</summary>{load_table(plan.load_curve)}</details>\n</section>"
    )


def saturation_rps(candidate: Candidate, workload: Workload) -> float | None:
    """Load at which the candidate saturates; None where nothing is known of it. [requests/s]"""
    rate_rps = workload.rate_rps * (1.0 + candidate.headroom)
    return rate_rps if math.isfinite(rate_rps) and rate_rps > 0.0 else None


# ---- provenance --------------------------------------------------------------------------------------


def _provenance(plan: CapacityPlan, request: ReportContext, workload: Workload) -> str:
    search = f"{plan.evaluated:,} configurations evaluated, {plan.status}"
    search += ", gap 0 (exhaustive)" if plan.gap == 0.0 else f", gap {formats.percent(plan.gap)}"
    rows = [
        ("Model", escape(request.model)),
        ("Engine", escape(f"{request.engine} {request.engine_version}")),
        ("Workload", escape(workload.name)),
        ("Objectives", escape(listed([formats.slo(slo) for slo in request.slos]) or MISSING)),
        ("Offers", "<br>".join(escape(_offer(*offer)) for offer in request.offers) or MISSING),
        ("Search", escape(search)),
        ("Profile", escape(request.profile)),
        ("Version", escape(f"servecast {request.servecast_version}")),
        ("Date", escape(request.date)),
        ("Seed", escape(request.seed)),
        ("Command", f"<code>{escape(request.command)}</code>"),
        ("Files", "<br>".join(f"<code>{escape(name)}</code>" for name in request.files) or MISSING),
        ("TTFT", "Time to first token: from a request's arrival to its first output token, waiting included."),
        ("TPOT", "Time per output token: (end-to-end time − TTFT) / (output tokens − 1), one value per request."),
        (
            "90 % interval",
            "Nine of ten measurements of comparable configurations are expected inside. It covers the error of the "
            "model and of its calibration, not a change of the traffic.",
        ),
    ]
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<section>\n<h2>Provenance</h2>\n<dl class="facts">{facts}</dl>\n</section>'


def _offer(gpu: str, usd_per_hour: float, limit: int | None) -> str:
    most = "" if limit is None else f", at most {limit:,}"
    return f"{formats.gpu(gpu)} at {formats.usd_per_hour(usd_per_hour)} each{most}"

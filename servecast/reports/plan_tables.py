"""Tables of the plan page: the alternatives, and the numbers behind the load charts."""

from __future__ import annotations

from collections.abc import Sequence

from servecast.model.prediction import Prediction
from servecast.reports import formats
from servecast.reports.document import table
from servecast.reports.formats import escape
from servecast.reports.plan_charts import Measure, configuration
from servecast.solvers.results import Candidate, Confirmation, LoadPoint, Replay

MOST_ROWS = 60
"""Alternatives listed; the rest is counted."""
_ABOVE = "▲ "


def alternatives_table(candidates: Sequence[Candidate], chosen: Candidate | None, measured: Sequence[Measure]) -> str:
    """Every candidate in a row, the chosen one marked, values above their limit marked by more than colour."""
    heads = (
        '<th scope="col">#</th><th scope="col" class="name">Configuration</th><th scope="col">GPUs</th>'
        '<th scope="col">USD/h</th>'
        + "".join(f'<th scope="col">{escape(measure.name)}</th>' for measure in measured)
        + '<th scope="col">Attainment</th><th scope="col">Utilisation</th>'
    )
    # what all have in common is said once
    kinds = {_formats(candidate) for candidate in candidates}
    rows = "".join(
        _candidate_row(i, candidate, candidate is chosen, measured, len(kinds) > 1)
        for i, candidate in enumerate(candidates[:MOST_ROWS], start=1)
    )
    more = len(candidates) - MOST_ROWS
    notes = f"{_ABOVE}above its limit. " if any(measure.limit for measure in measured) else ""
    notes += "Ranges are 90 % intervals. Sequences and tokens are the most in one step of a replica."
    notes += f" All with {escape(*kinds)}." if len(kinds) == 1 else ""
    notes += f" {more:,} more alternatives are not listed." if more > 0 else ""
    return table("Alternatives", heads, rows) + f'<p class="more">{notes}</p>'


def _formats(candidate: Candidate) -> str:
    return f"{candidate.precision} weights, {candidate.kv_format} KV"


def _candidate_row(
    number: int, candidate: Candidate, is_chosen: bool, measured: Sequence[Measure], with_formats: bool
) -> str:
    tags = '<span class="tag pick">chosen</span>' if is_chosen else ""
    tags += "" if candidate.calibrated else '<span class="tag">extrapolated</span>'
    inside = f"{candidate.max_num_seqs:,} sequences, {candidate.max_num_batched_tokens:,} tokens"
    inside += "" if not with_formats else f", {_formats(candidate)}"
    cells = [
        f"<td>{number}</td>",
        f'<th scope="row" class="name">{escape(configuration(candidate))}{tags}<small>{escape(inside)}</small></th>',
        f"<td>{candidate.gpus:,}</td>",
        f"<td>{formats.usd_per_hour(candidate.usd_per_hour).removesuffix(' USD/h')}</td>",
        *(_latency_cell(measure.of(candidate), measure.over(candidate)) for measure in measured),
        _cell(candidate.slo_attainment, "percent"),
        f"<td>{utilisation(candidate.utilisation)}<small>headroom {_room(candidate.headroom)}</small></td>",
    ]
    start = '<tr class="chosen">' if is_chosen else "<tr>"
    return f"{start}{''.join(cells)}</tr>"


def load_table(points: Sequence[LoadPoint]) -> str:
    """The load curve as numbers: the text alternative of its charts."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Load", "TTFT p99", "TPOT p99", "SLO attainment"))
    rows = "".join(
        f'<tr><th scope="row">{formats.rate(point.rate_rps)}</th>{_latency_cell(point.ttft_p99_s)}'
        f"{_latency_cell(point.tpot_p99_s)}{_cell(point.slo_attainment, 'percent')}</tr>"
        for point in points
    )
    return table("Latency against load", heads, rows)


def replay_table(predicted: Candidate, found: Confirmation) -> str:
    """The closed form, the replay of the trace, and the replay with one replica fewer, side by side."""
    replays = [found.plan, *([found.one_fewer] if found.one_fewer is not None else [])]
    names = ["Closed form", *(f"Replayed, {one.replicas:,} replica{'s' * (one.replicas > 1)}" for one in replays)]
    heads = '<th scope="col"></th>' + "".join(f'<th scope="col">{escape(name)}</th>' for name in names)

    def row(name: str, cell: str, values: Sequence[str]) -> str:
        return f'<tr><th scope="row">{name}</th>{cell}' + "".join(f"<td>{escape(v)}</td>" for v in values) + "</tr>"

    def latency(name: str, key: str) -> str:
        values = [formats.seconds(getattr(one, key)) for one in replays]
        return row(name, _latency_cell(getattr(predicted, key)), values)

    rows = [latency(f"{metric} p{p}", f"{metric.lower()}_p{p}_s") for metric in ("TTFT", "TPOT") for p in (50, 99)]
    attained = [formats.percent(one.slo_attainment) for one in replays]
    rows.append(row("Within all limits", _cell(predicted.slo_attainment, "percent"), attained))
    rows.append(row("Verdict", "<td></td>", [_verdict(one) for one in replays]))
    return table("Replayed on the trace", heads, "".join(rows))


def _verdict(one: Replay) -> str:
    return "holds" if one.holds else one.missed


def headroom(share: float) -> str:
    """Growth until saturation; nothing is left where it is not positive.

    >>> headroom(0.25), headroom(-0.1)
    ('25 %', 'saturated')
    """
    if share <= 0.0:
        return formats.SATURATED
    return formats.percent(share) if share < float("inf") else formats.MISSING


def _room(share: float) -> str:
    return "none" if share <= 0.0 else headroom(share)


def utilisation(share: float) -> str:
    """Load over the largest sustainable one; from 1 on there is no steady state."""
    return formats.SATURATED if share >= 1.0 else formats.percent(share)


def _latency_cell(prediction: Prediction, over: bool = False) -> str:
    return _cell(prediction, "seconds", over)


def _cell(prediction: Prediction, form: str, over: bool = False) -> str:
    value = (formats.seconds if form == "seconds" else formats.percent)(prediction.value)
    start = f'<td class="over">{_ABOVE}' if over else "<td>"
    return f"{start}{escape(value)}<small>{escape(formats.interval(prediction, form))}</small></td>"

"""Tables and phrases of the draft-length page: forecasts, static lengths, what each context would choose by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from servecast.model.prediction import Prediction
from servecast.reports import formats
from servecast.reports.document import listed, table
from servecast.reports.formats import escape
from servecast.speculation_answers import BatchForecast, DecodeLimits, SpeculationAnswer

MOST_ROWS = 150
"""Forecasts listed; the rest is counted."""
_ABOVE = "▲ "
_BINDING = {
    "max_lengths": "the number of distinct lengths",
    "max_segments": "the number of segments",
    "switch_cost": "what a change of length costs, or must gain at least",
    "length_cost": "the cost of a further length",
    "non_increasing": "the rule that the length never rises with the batch size",
    "edges": "the rule that the length changes at captured batch sizes only",
    "protected": "the rule that drafting is not switched on or off inside the operating range",
    "slo": "the limits",
}


def schedule_words(segments: Sequence[tuple[int, int, int]]) -> str:
    """A schedule as a sentence.

    >>> schedule_words([(1, 8, 4), (9, 64, 1), (65, 256, 0)])
    'Draft 4 tokens up to batch size 8, 1 up to 64 and none up to 256'
    """
    first, *others = [(hi, length) for _, hi, length in segments]
    start = f"Draft {_tokens(first[1])} up to batch size {first[0]:,}"
    return listed([start, *(f"{length or 'none'} up to {hi:,}" for hi, length in others)])


def _tokens(length: int) -> str:
    return "nothing" if not length else f"{length} token{'s' * (length > 1)}"


def gain_words(gain: float, rival: str) -> str:
    """A gain over a rival, in words.

    >>> gain_words(0.013, "no speculation"), gain_words(-0.02, "always drafting 4")
    ('1.3 % above no speculation', '2 % below always drafting 4')
    """
    return f"{_change(gain)} {'above' if gain >= 0.0 else 'below'} {rival}"


def signed(share: float) -> str:
    """A difference as a share.

    >>> signed(0.125), signed(-0.02), signed(0.0)
    ('+12.5 %', '−2 %', '0 %')
    """
    text = _change(share)
    return text if text in ("0 %", formats.MISSING) else ("+" if share > 0.0 else "\u2212") + text


def _change(share: float) -> str:
    """Size of a difference; nothing is special about one just below 100 %, as it is about an attainment."""
    if not math.isfinite(share):
        return formats.MISSING
    return f"{100.0 * abs(share):,.1f}".removesuffix(".0") + " %"


def limit_words(limits: DecodeLimits) -> list[str]:
    """The limits as people write them."""
    said = [f"TPOT mean ≤ {formats.seconds(limits.tpot_mean_s)}"] if limits.tpot_mean_s is not None else []
    over = f" over {formats.significant(limits.output_tokens)} output tokens"
    said += [f"TPOT p{p:g} ≤ {formats.seconds(limit)}{over}" for p, limit in limits.tpot_quantiles]
    return said + ([f"speculative step ≤ {formats.seconds(limits.step_s)}"] if limits.step_s is not None else [])


def binding_words(names: Sequence[str]) -> str:
    """What stands in the way of a better schedule, in a sentence."""
    phrases = listed([_BINDING.get(name, name) for name in names])
    return f"{phrases}: without {'it' if len(names) == 1 else 'any of them'} another schedule would be better"


def forecasts_table(answer: SpeculationAnswer) -> str:
    """Every forecast in a row, with the context where there are several."""
    several, limited = answer.table.contexts.size > 1, bool(answer.limits.names)
    names = ["Batch size", "Draft length", "Goodput [tok/s]", "TPOT", "Step", f"Over always {answer.best_static}"]
    names = ["Context"] * several + names + ["Over off"] + ["Limits"] * limited
    rows = "".join(_forecast_row(one, several, limited) for one in answer.forecasts[:MOST_ROWS])
    more = len(answer.forecasts) - MOST_ROWS
    notes = "Ranges are 90 % intervals." + (f" {more:,} more rows are not listed." if more > 0 else "")
    return table("Forecasts", _heads(names), rows) + f'<p class="more">{notes}</p>'


def _forecast_row(one: BatchForecast, several: bool, limited: bool) -> str:
    tag = "" if one.goodput_tok_s.calibrated else '<span class="tag">extrapolated</span>'
    cells = [f"<td>{formats.significant(one.context)}</td>"] if several else []
    cells += [
        f'<th scope="row">{tag} {one.batch:,}</th>',
        f"<td>{one.draft_length}</td>",
        _cell(formats.significant(one.goodput_tok_s.value), _speeds(one.goodput_tok_s)),
        _cell(formats.seconds(one.tpot_s.value), formats.interval(one.tpot_s, "seconds")),
        _cell(formats.seconds(one.step_s)),
        _cell(signed(one.over_static)),
        _cell(signed(one.over_off)),
    ]
    if limited:
        cells.append("<td>kept</td>" if one.meets else f'<td class="over">{_ABOVE}missed</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _speeds(prediction: Prediction) -> str:
    if math.isnan(prediction.lo) or math.isnan(prediction.hi):
        return formats.MISSING
    return f"{formats.significant(prediction.lo)} to {formats.significant(prediction.hi)}"


def static_table(answer: SpeculationAnswer) -> str:
    """The schedule, and every length by itself."""
    schedule, limited = answer.schedule, bool(answer.limits.names)
    names = ["Mean loss", "Largest loss"] + ["Limits at every batch size"] * limited
    heads = f'<th scope="col" class="name">Choice</th>{_heads(names)}'
    met = not schedule.infeasible_batches
    rows = [_static_row("the schedule", schedule.mean_regret, schedule.worst_regret, met, limited, ' class="chosen"')]
    for one in schedule.static:
        best = '<span class="tag">best static length</span>' if one.length == answer.best_static else ""
        name = f"always {one.length}{best}"
        rows.append(_static_row(name, one.mean_regret, one.worst_regret, one.feasible, limited, ""))
    return table("Static lengths", heads, "".join(rows))


def _static_row(name: str, mean: float, worst: float, met: bool, limited: bool, mark: str) -> str:
    """`name` is markup."""
    cells = f'<th scope="row" class="name">{name}</th>{_cell(loss(mean))}{_cell(loss(worst))}'
    if limited:
        cells += "<td>kept</td>" if met else f'<td class="over">{_ABOVE}missed</td>'
    return f"<tr{mark}>{cells}</tr>"


def loss(share: float) -> str:
    """A loss against the best length; negative where a length that misses a limit would be slower than the choice."""
    return signed(share).removeprefix("+")


def contexts_table(answer: SpeculationAnswer) -> str:
    """What each context would choose by itself; nothing where there is one context."""
    if answer.table.contexts.size < 2:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{formats.significant(context)}</th>'
        f'<td class="name">{escape(schedule_words(one.segments) if one.segments else formats.MISSING)}</td></tr>'
        for context, one in zip(answer.table.contexts.tolist(), answer.by_context, strict=True)
    )
    heads = '<th scope="col">Context [tokens]</th><th scope="col" class="name">By itself</th>'
    return table("Schedules by context", heads, rows)


def _heads(names: Sequence[str]) -> str:
    return "".join(f'<th scope="col">{escape(name)}</th>' for name in names)


def _cell(value: str, small: str = "") -> str:
    below = f"<small>{escape(small)}</small>" if small else ""
    return f"<td>{escape(value)}{below}</td>"

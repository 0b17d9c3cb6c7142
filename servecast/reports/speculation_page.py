"""One self-contained HTML page about a draft-length plan: the schedule, what it gains, and how sure that is.

Built as the page of a capacity plan is: inline SVG, an embedded style sheet, no script, everything from data escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servecast.model.speculation_cells import SpeculationCells
from servecast.reports import formats
from servecast.reports.document import document, facts, figure, header, listed, tile
from servecast.reports.formats import escape
from servecast.reports.speculation_charts import (
    acceptance_chart,
    gain_map,
    has_band,
    map_legend,
    rivals_chart,
    tpot_chart,
)
from servecast.reports.speculation_marks import shown_contexts
from servecast.reports.speculation_page_tables import (
    binding_words,
    contexts_table,
    forecasts_table,
    gain_words,
    limit_words,
    loss,
    schedule_words,
    signed,
    static_table,
)
from servecast.speculation_answers import SpeculationAnswer

_STYLES = ("plan_page.css", "speculation_page.css")
_TERMS = (
    ("Goodput", "Decoded tokens of all running requests together, per second."),
    ("TPOT", "Time per output token that one request sees: the time of a step over the tokens it yields."),
    ("Loss", "1 − goodput over that of the best draft length at the same batch size that keeps the limits."),
    ("Off", "The same engine with no drafter configured. Length 0 is different: the drafter is there but idle."),
    ("90 % interval", "Nine of ten measurements of comparable configurations are expected inside."),
)


def speculation_page(
    answer: SpeculationAnswer,
    *,
    title: str,
    source_lines: Sequence[tuple[str, str]],
    policy_text: str | None,
    engine: str,
    fit_lines: Sequence[tuple[str, str]] = (),
    measured: SpeculationCells | None = None,
) -> str:
    """The page of a draft-length plan.

    Parameters
    ----------
    answer : the plan.
    title : what is planned, for instance model, drafter and hardware.
    source_lines : names and texts of the provenance.
    policy_text : the engine's configuration; without one the page has no such section.
    engine : the engine that the configuration is for.
    fit_lines : names and texts about the fit behind the forecasts.
    measured : the cells that were fitted, to be marked on the charts.

    Returns
    -------
    A complete HTML document, below 400 kB.
    """
    sections = [
        _answer(answer, title, engine),
        _remarks(answer),
        _where_lengths_pay(answer, measured),
        _rivals_and_limits(answer),
        f"<section>\n<h2>Forecasts under the schedule</h2>\n{forecasts_table(answer)}\n</section>",
        _choices(answer),
        _configuration(policy_text, engine),
        _section("Fit", facts(fit_lines)) if fit_lines else "",
        _section("Provenance", facts([*source_lines, *_TERMS])),
    ]
    return document(f"Draft lengths: {title}", sections, styles=_STYLES)


def _answer(answer: SpeculationAnswer, title: str, engine: str) -> str:
    best = "never drafting" if answer.best_static == 0 else f"always drafting {answer.best_static}"
    gains = [gain_words(answer.gain_over_static, best)]
    if answer.table.off_known:
        gains.append(gain_words(answer.gain_over_off, "no speculation"))
    sentence = f"{schedule_words(answer.schedule.segments)}: goodput {listed(gains)}"
    return header(f"Draft lengths for {title} on {engine}", sentence, _below(answer)) + _tiles(answer)


def _below(answer: SpeculationAnswer) -> str:
    """Over what the gains are averaged, and within what limits."""
    share = np.cumsum(answer.weights) / answer.weights.sum()
    low, middle, high = (int(answer.table.batches[int((share < p).sum())]) for p in (0.05, 0.5, 0.95))
    contexts = answer.table.contexts
    over = f" and over {contexts.size} contexts" if contexts.size > 1 else ""
    limits = limit_words(answer.limits)
    return (
        f"Gains are averages over the batch size{over}: weighted by steps, its median is {middle:,}, and nine of ten "
        f"lie between {low:,} and {high:,}. {'Limits: ' + listed(limits) if limits else 'No latency limit is set'}."
    )


def _off_words(answer: SpeculationAnswer) -> str:
    ends = f"{signed(answer.gain_over_off_lo)} to {signed(answer.gain_over_off_hi)}"
    return ends if answer.table.off_known else f"not measured: {ends}"


def _tiles(answer: SpeculationAnswer) -> str:
    schedule, size = answer.schedule, answer.lengths.size
    missed = len(schedule.infeasible_batches)
    tiles = [
        tile("Over best static length", signed(answer.gain_over_static), f"always {answer.best_static}"),
        tile("Over no speculation", signed(answer.gain_over_off), _off_words(answer)),
        tile(
            "Loss against best",
            loss(schedule.mean_regret),
            f"mean; {loss(schedule.worst_regret)} at the worst batch size",
        ),
        tile("Bound on the loss", loss(schedule.regret_bound), "at any batch size, for speeds within 90 % intervals"),
    ]
    if answer.limits.names:
        said = f"at {size - missed:,} of {size:,} batch sizes"
        tiles.append(tile("Limits kept", formats.percent(1.0 - missed / size), said, over=missed > 0))
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _remarks(answer: SpeculationAnswer) -> str:
    boxes = []
    if answer.schedule.binding:
        boxes.append(_box("box", "What binds:", binding_words(answer.schedule.binding)))
    boxes += [_box("box", "Advice:", text) for text in answer.advice]
    boxes += [_box("box warn", "Warning:", text) for text in answer.warnings]
    return f'<div role="note" aria-label="What binds, advice and warnings">{"".join(boxes)}</div>' if boxes else ""


def _box(kind: str, lead: str, text: str) -> str:
    return f'<p class="{kind}"><strong>{lead}</strong> {escape(text)}</p>'


def _where_lengths_pay(answer: SpeculationAnswer, measured: SpeculationCells | None) -> str:
    charts = [figure(*gain_map(answer, c, measured)) for c in shown_contexts(answer.table.contexts)]
    charts.append(figure(*acceptance_chart(answer, measured)))
    band = "its band is the 90 % interval" if has_band(answer) else "the sweep gives it no interval of its own"
    said = (
        "Each field compares a draft length with the best one at the same batch size, whatever the limits; the line "
        f"through the map is the schedule. Tokens per step are what a draft yields: {band}."
    )
    if not answer.table.calibrated.any(axis=0).all():
        said += " Hollow points: lengths that were not measured."
    return _section("Where each draft length pays", f"<p>{said}</p>\n{_pair(charts)}\n{map_legend(answer, measured)}")


def _rivals_and_limits(answer: SpeculationAnswer) -> str:
    shown = shown_contexts(answer.table.contexts)
    charts = [figure(*chart(answer, c)) for c in shown for chart in (rivals_chart, tpot_chart)]
    said = "Above the charts: the draft length of each segment. The band of the TPOT is its 90 % interval."
    said += _shading(answer)
    if answer.limits.tpot_quantiles:
        said += " Percentiles are over requests, by the spread of accepted tokens alone."
    return _section("Against static lengths, and against the limits", f"<p>{said}</p>\n{_pair(charts)}")


def _shading(answer: SpeculationAnswer) -> str:
    """What hatching and shading mean, as far as they occur."""
    row = np.arange(answer.lengths.size)
    said = []
    if not answer.table.calibrated[row, answer.lengths].all():
        said.append("hatched: beyond what was measured")
    if not answer.feasible[:, row, answer.lengths].all():
        said.append("shaded: the schedule misses a limit")
    text = "; ".join(said)
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _choices(answer: SpeculationAnswer) -> str:
    said = "Loss against the best length of each batch size, weighted by steps, and at the worst batch size."
    more = contexts_table(answer)
    if more:
        more = f'<p class="more">Engines know the batch size only, so one schedule serves all contexts.</p>\n{more}'
    return _section("Static lengths", f"<p>{said}</p>\n{static_table(answer)}\n{more}")


def _configuration(policy_text: str | None, engine: str) -> str:
    if policy_text is None:
        return ""
    return _section(f"Configuration for {escape(engine)}", f"<pre><code>{escape(policy_text)}</code></pre>")


def _section(name: str, content: str) -> str:
    return f"<section>\n<h2>{name}</h2>\n{content}\n</section>"


def _pair(charts: Sequence[str]) -> str:
    return f'<div class="pair">{"".join(charts)}</div>'

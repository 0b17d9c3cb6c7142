"""One self-contained HTML page about a validation: verdicts, predicted against measured, errors beside their budgets.

In the manner of the other pages: inline SVG, no script, nothing is loaded, text that comes from data is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from servecast.reports import formats
from servecast.reports.document import document, facts, figure, header, table, tile
from servecast.reports.formats import MISSING, escape
from servecast.reports.svg import Axis, Panel, padded
from servecast.validation.verdicts import Comparison, Verdict

if TYPE_CHECKING:
    from servecast.validation.validated import Validated

_WORDS = {
    Verdict.WITHIN: "every budget holds",
    Verdict.BROKEN: "a budget is broken",
    Verdict.NOT_JUDGED: "not judged",
    Verdict.REPORTED: "reported",
}
_TERMS = (
    ("Error", "Predicted over measured, less one. Of acceptance: tokens; of a draft length: goodput lost, as a share."),
    ("Naive", "The same error of the plain model: roofline without a queue, one acceptance probability, length 3."),
    (
        "Noise",
        "Scatter that the same run shows: of a timed step, or what the machine's pace leaves open of a load.",
    ),
    ("Not judged", "The noise was above the scenario's limit, or the figure is missing. It is never a pass."),
    ("90 % interval", "Nine of ten measurements of this figure are expected inside."),
)


def validation_page(found: Validated) -> str:
    """A complete HTML document."""
    sections = [_answer(found), _steps(found), _loads(found), _speculation(found), _exact(found), _provenance(found)]
    return document(f"{found.scenario.name} - validation", [one for one in sections if one])


def _answer(found: Validated) -> str:
    judged = [one for one in found.comparisons if one.verdict is not Verdict.REPORTED]
    count = {verdict: sum(one.verdict is verdict for one in judged) for verdict in Verdict}
    about = ", ".join(
        str(found.facts.engine[one]) for one in ("engine", "version", "torch") if one in found.facts.engine
    )
    tiles = [
        tile("Within budget", str(count[Verdict.WITHIN]), f"of {len(judged)} figures with a budget"),
        tile("Broken", str(count[Verdict.BROKEN]), over=count[Verdict.BROKEN] > 0),
        tile("Not judged", str(count[Verdict.NOT_JUDGED]), "too noisy, or missing"),
    ]
    if found.facts.fit is not None:
        fit = found.facts.fit
        tiles.append(tile("Scatter of a step", formats.percent(fit.noise_cv), "within the run, drift taken out"))
    below = [f"Ended early: {found.facts.stopped}."] if found.facts.stopped else []
    below += [f"Not reached: {', '.join(found.missing)}."] if found.missing else []
    below += [f"Not judged: {'; '.join(found.reasons)}."] if found.reasons else []
    head = header(
        f"{found.scenario.name}, {about}", f"Prediction against live run: {_WORDS[found.verdict]}", " ".join(below)
    )
    return f'{head}<div class="tiles">{"".join(tiles)}</div>'


def _steps(found: Validated) -> str:
    points = [one for one in found.comparisons if one.part.endswith("steps") and one.unit == "s"]
    if not points:
        return ""
    ends = padded([*(one.predicted for one in points), *(one.measured for one in points)], log=True)
    axes = [
        Axis(title=title, low=ends[0], high=ends[1], written=formats.seconds, log=True, most=5)
        for title in ("predicted step", "measured step")
    ]
    panel = Panel(*axes, summary=f"Measured against predicted time of {len(points)} steps no fit has seen", head=34.0)
    panel.line([(ends[0], ends[0]), (ends[1], ends[1])], "curve")
    for one in points:
        panel.whisker(one.predicted, one.lo, one.hi, "whisker")
        panel.dot(one.predicted, one.measured, 3.2, "point front", f"{one.part}, {one.metric}: {one.error:+.1%}")
    overall = [one for one in found.comparisons if one.part.endswith("steps") and one.unit == "share"]
    chart = figure("Steps that no fit has seen; whiskers: 90 % interval of the prediction", panel.render())
    return f"<section><h2>Engine steps</h2>{chart}{_table('Engine steps', overall)}</section>"


def _loads(found: Validated) -> str:
    rows = [one for one in found.comparisons if one.part.startswith("load ")]
    return f"<section><h2>Loads</h2>{_table('Loads', rows)}</section>" if rows else ""


def _speculation(found: Validated) -> str:
    rows = [one for one in found.comparisons if one.part in ("acceptance", "draft length")]
    return f"<section><h2>Speculation</h2>{_table('Speculation', rows)}</section>" if rows else ""


def _exact(found: Validated) -> str:
    rows = [one for one in found.comparisons if one.executor == "policy"]
    return f"<section><h2>Engine facts</h2>{_table('Engine facts', rows)}</section>" if rows else ""


def _provenance(found: Validated) -> str:
    entries = [(name.replace("_", " "), _plain(value)) for name, value in found.facts.engine.items()]
    if found.facts.fit is not None:
        fit = found.facts.fit
        entries += [
            ("form of a step", f"{fit.form}, error on left-out row counts {formats.percent(fit.held_out[fit.form])}"),
            ("rival forms", ", ".join(f"{name} {formats.percent(one)}" for name, one in fit.held_out.items())),
        ]
    entries += [("note", one) for one in found.facts.notes]
    terms = f"<section><h2>Terms</h2>{facts(_TERMS)}</section>"
    return f"{terms}<section><h2>Where it comes from</h2>{facts(entries)}</section>"


def _table(label: str, rows: Sequence[Comparison]) -> str:
    heads = '<th class="name" scope="col">Figure</th>' + "".join(
        f'<th scope="col">{escape(one)}</th>'
        for one in ("By", "Predicted", "Measured", "Error", "Naive", "Noise", "Budget", "Verdict")
    )
    return table(label, heads, "".join(_row(one) for one in rows))


def _row(one: Comparison) -> str:
    part = one.part.removeprefix("load ")
    cells = (
        one.executor.replace("_", " "),
        _with_interval(one.predicted, one.lo, one.hi, one.unit),
        _with_interval(one.measured, one.measured_lo, one.measured_hi, one.unit),
        _error(one.error, one.unit),
        MISSING if one.baseline is None else _error(one.baseline, one.unit),
        MISSING if one.noise != one.noise else formats.percent(one.noise),
        MISSING if one.budget is None else _budget(one.budget, one.unit),
        one.verdict.value,
    )
    body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th class="name" scope="row">{escape(f"{part}: {one.metric}")}</th>{body}</tr>'


def _with_interval(value: float, low: float, high: float, unit: str) -> str:
    if value != value:
        return MISSING
    shown = _value(value, unit)
    return shown if low != low or high <= low else f"{shown} [{_value(low, unit)}, {_value(high, unit)}]"


def _value(value: float, unit: str) -> str:
    return formats.seconds(value) if unit == "s" else formats.significant(value, 4)


def _error(value: float, unit: str) -> str:
    if value != value:
        return MISSING
    return f"{value:+.3g}" if unit in ("tokens", "blocks") else f"{100.0 * value:+.1f} %"


def _budget(value: float, unit: str) -> str:
    return f"{value:.2g}" if unit in ("tokens", "blocks") else f"{100.0 * value:g} %"


def _plain(value: str | float) -> str:
    return formats.significant(value, 4) if isinstance(value, float) else str(value)

"""One self-contained HTML page about a machine profile: curves over samples, residuals, parameters with intervals.

In the manner of the other pages: inline SVG, no script, nothing is loaded, text that comes from data is escaped, and
the same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import numpy as np

from servecast.calibration.fits.curves import AXES, family_of
from servecast.calibration.machine_document import FitDoc, MachineDocument
from servecast.calibration.machine_profile import MachineModel
from servecast.calibration.microbenchmarks.journal import Point, Sample
from servecast.model.prediction import Z90
from servecast.reports import formats
from servecast.reports.document import document, facts, figure, header, table, tile
from servecast.reports.formats import MISSING, escape
from servecast.reports.svg import Axis, Panel, padded

CURVE_POINTS = 49
MOST_POINTS = 60
"""Drawn of one kernel."""
UNKNOWN = math.log(1e3)
"""Half width, in logs, of an interval that the page writes as unknown."""

Row = tuple[Point, float, float, float]
"""Point, median, least and largest of its visits. [s]"""


def calibration_page(profile: MachineDocument, samples: Sequence[Sample]) -> str:
    """The page of a calibration.

    Parameters
    ----------
    profile : the document of the machine.
    samples : what it was fitted to; marked ones are left out, as in the fits.

    Returns
    -------
    A complete HTML document.
    """
    model = MachineModel(profile)
    rows = _rows(samples)
    sections = [_answer(profile), _remarks(profile)]
    sections += [_kernel(fit, model, rows.get((fit.kernel, fit.dtype), [])) for fit in profile.fits]
    sections.append(_provenance(profile))
    return document(f"{profile.name} - machine profile", sections)


def _rows(samples: Sequence[Sample]) -> dict[tuple[str, str], list[Row]]:
    """Visits by kernel and point."""
    visits: dict[tuple[str, str], dict[Point, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in samples:
        if not one.suspect:
            visits[one.kernel, one.dtype][one.point].append(one.median_s)
    return {
        key: [(point, median(seen), min(seen), max(seen)) for point, seen in sorted(points.items())]
        for key, points in visits.items()
    }


def _answer(profile: MachineDocument) -> str:
    origin = profile.provenance
    best = max(profile.fits, key=lambda fit: fit.peak_flops_per_s)
    moved = max((fit for fit in profile.fits if fit.kernel.startswith("memory")), key=_peak_bytes, default=None)
    errors = sorted(fit.error for fit in profile.fits)
    tiles = [
        tile("Best arithmetic", _rate(best.peak_flops_per_s, "FLOP/s"), f"{_title(best)}, measured"),
        tile("Best memory", MISSING if moved is None else _rate(moved.peak_bytes_per_s, "B/s"), "one pass, measured"),
        tile("Median error of a shape", formats.percent(errors[len(errors) // 2]), "on shapes left out of the fit"),
        tile("Samples", f"{profile.samples.count:,}", f"{max(fit.rounds for fit in profile.fits)} rounds"),
    ]
    threads = origin.settings.get("threads", MISSING)
    below = f"{threads} threads, {origin.date}; {len(profile.fits)} kernels and formats, intervals cover 90 %."
    return header(f"Machine profile {profile.name}", origin.device, below) + f'<dl class="tiles">{"".join(tiles)}</dl>'


def _peak_bytes(fit: FitDoc) -> float:
    return fit.peak_bytes_per_s


def _remarks(profile: MachineDocument) -> str:
    return "".join(f'<p class="box warn">{escape(remark)}</p>' for remark in profile.provenance.remarks)


def _title(fit: FitDoc) -> str:
    name = fit.kernel.replace("_", " ")
    return name if fit.dtype == "u8" else f"{name} {fit.dtype}"


# ---- one kernel --------------------------------------------------------------------------------------


def _kernel(fit: FitDoc, model: MachineModel, rows: Sequence[Row]) -> str:
    figures = ""
    if rows:
        drawn = rows[:: max(-(-len(rows) // MOST_POINTS), 1)]
        curve = _curve if len(AXES[family_of(fit.kernel)]) == 1 else _measured_over_fitted
        figures = f'<div class="pair">{curve(fit, model, drawn)}{_residuals(fit, model, drawn)}</div>'
    said = (
        f"Form {fit.form}; {fit.points} points in {fit.rounds} rounds; a shape it has not seen is off by "
        f"{formats.percent(fit.error)} (root mean square); the machine drifted by {formats.percent(fit.drift)} "
        "between rounds."
    )
    if fit.suspects:
        said += f" {fit.suspects} marked samples are left out."
    return (
        f"<section>\n<h2>{escape(_title(fit))}</h2>\n<p>{escape(said)}</p>\n{figures}\n{_parameters(fit)}\n"
        f"{_rivals(fit)}</section>"
    )


def _predicted(fit: FitDoc, model: MachineModel, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Fitted seconds and half of the 90 % interval in logs, for each row."""
    sizes = {axis: np.array([dict(row[0])[axis] for row in rows], float) for axis in AXES[family_of(fit.kernel)]}
    value, deviation, _ = model.many(fit.kernel, fit.dtype, **sizes)
    return value.tolist(), np.minimum(Z90 * deviation, UNKNOWN).tolist()


def _curve(fit: FitDoc, model: MachineModel, rows: Sequence[Row]) -> str:
    """Seconds against the one size, with the band of one measurement."""
    axis = AXES[family_of(fit.kernel)][0]
    low, high = padded((dict(row[0])[axis] for row in rows), log=True, share=0.03)
    at = np.geomspace(low, high, CURVE_POINTS)
    value, deviation, _ = model.many(fit.kernel, fit.dtype, **{axis: at})
    half = np.minimum(Z90 * deviation, UNKNOWN)
    band = list(zip(at.tolist(), (value * np.exp(-half)).tolist(), (value * np.exp(half)).tolist(), strict=True))
    ends = padded([*value.tolist(), *(row[1] for row in rows)], log=True)
    written = _size if axis == "bytes" else formats.significant
    panel = Panel(
        Axis(title=axis, low=low, high=high, written=written, log=True),
        Axis(title="time", low=ends[0], high=ends[1], written=formats.seconds, log=True, most=5),
        summary=f"{_title(fit)}: time against {axis}, {len(rows)} points and the fitted curve with its 90 % band",
        head=34.0,
    )
    panel.band(band, "band")
    panel.line(list(zip(at.tolist(), value.tolist(), strict=True)), "curve")
    for point, middle, least, most in rows:
        x = float(dict(point)[axis])
        panel.whisker(x, least, most, "whisker")
        panel.dot(x, middle, 3.2, "point front", f"{_sizes(point)}: {formats.seconds(middle)}")
    return figure("Time by size: samples, fitted curve, 90 % band", panel.render())


def _measured_over_fitted(fit: FitDoc, model: MachineModel, rows: Sequence[Row]) -> str:
    """Several sizes: the curve is the diagonal, the band is that of each point."""
    fitted, half = _predicted(fit, model, rows)
    ends = padded([*fitted, *(row[1] for row in rows)], log=True)
    axes = [
        Axis(title=title, low=ends[0], high=ends[1], written=formats.seconds, log=True, most=5)
        for title in ("fitted time", "measured time")
    ]
    panel = Panel(
        *axes,
        summary=f"{_title(fit)}: measured against fitted time of {len(rows)} points, with 90 % intervals",
        head=34.0,
    )
    order = np.argsort(fitted).tolist()
    typical = median(half)
    panel.band([(x, x * math.exp(-typical), x * math.exp(typical)) for x in ends], "band")
    panel.line([(ends[0], ends[0]), (ends[1], ends[1])], "curve")
    for i in order:
        point, middle, least, most = rows[i]
        panel.whisker(fitted[i], least, most, "whisker")
        tip = f"{_sizes(point)}: {formats.seconds(middle)}, fitted {formats.seconds(fitted[i])}"
        panel.dot(fitted[i], middle, 3.2, "point front", tip)
    return figure("Measured against fitted: samples, the fit, median 90 % band", panel.render())


def _residuals(fit: FitDoc, model: MachineModel, rows: Sequence[Row]) -> str:
    """Measured over fitted, against the fitted time."""
    fitted, _ = _predicted(fit, model, rows)
    ratios = [row[1] / value for row, value in zip(rows, fitted, strict=True)]
    x_ends = padded(fitted, log=True)
    reach = max(max(ratios), 1.0 / min(ratios), 1.1) ** 1.15
    panel = Panel(
        Axis(title="fitted time", low=x_ends[0], high=x_ends[1], written=formats.seconds, log=True, most=5),
        Axis(title="measured / fitted", low=1.0 / reach, high=reach, written=formats.factor, log=True, most=5),
        summary=f"{_title(fit)}: ratio of measured to fitted time, {formats.factor(min(ratios))} to "
        f"{formats.factor(max(ratios))}",
        head=34.0,
    )
    panel.line([(x_ends[0], 1.0), (x_ends[1], 1.0)], "rule ink")
    for row, value, ratio in zip(rows, fitted, ratios, strict=True):
        panel.whisker(value, row[2] / value, row[3] / value, "whisker")
        panel.dot(value, ratio, 3.2, "point front", f"{_sizes(row[0])}: {formats.factor(ratio)}")
    return figure("Residuals: medians, least and largest of the visits", panel.render())


def _parameters(fit: FitDoc) -> str:
    rows = "".join(
        f'<tr><th class="name">{escape(name.replace("_", " "))}</th><td>{escape(_quantity(one.value, one.unit))}</td>'
        f"<td>{escape(_interval(one.lo, one.hi, one.unit))}</td></tr>"
        for name, one in fit.parameters.items()
    )
    heads = '<th class="name">Parameter</th><th>Value</th><th>90 % interval</th>'
    return table(f"Parameters of {_title(fit)}", heads, rows)


def _rivals(fit: FitDoc) -> str:
    if not fit.held_out:
        return ""
    parts = ", ".join(f"{name} {formats.percent(one.mean_abs_log)}" for name, one in fit.held_out.items())
    return f'<p class="more">Mean absolute log error on shapes left out: {escape(parts)}.</p>\n'


# ---- provenance and units ----------------------------------------------------------------------------


def _provenance(profile: MachineDocument) -> str:
    origin = profile.provenance
    rows = [("Device", origin.device), ("Date", origin.date), ("Budget", formats.seconds(origin.budget_s))]
    rows += [(name.replace("_", " "), _plain(value)) for name, value in origin.settings.items() if name != "device"]
    rows += [
        (name.replace("_", " "), _plain(value))
        for name, value in origin.environment.items()
        if name not in ("device", "date", "budget_s", "torch")
    ]
    rows += [("Command", origin.command), ("Samples", f"{profile.samples.file}, sha256 {profile.samples.sha256[:16]}")]
    return f"<section>\n<h2>Provenance</h2>\n{facts(rows)}\n</section>"


def _plain(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _sizes(point: Point) -> str:
    return ", ".join(f"{name} {_size(value) if name == 'bytes' else f'{value:,}'}" for name, value in point)


def _size(nbytes: float) -> str:
    """Bytes with a binary unit.

    >>> _size(65536.0)
    '64 KiB'
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{formats.significant(nbytes / scale)} {unit}"
    return f"{formats.significant(nbytes)} B"


def _rate(value: float, unit: str) -> str:
    """A rate with a decimal prefix.

    >>> _rate(1.2e10, "B/s")
    '12 GB/s'
    """
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{formats.significant(value / scale)} {prefix}{unit}"
    return f"{formats.significant(value)} {unit}"


def _quantity(value: float, unit: str) -> str:
    if unit == "s":
        # below a tenth of a nanosecond digits say nothing
        return formats.seconds(value) if value > 1e-10 else "0 s"
    if unit in ("B/s", "FLOP/s"):
        return _rate(value, unit)
    return _size(value) if unit == "B" else formats.significant(value)


def _interval(low: float, high: float, unit: str) -> str:
    if math.log(high / low) > 2.0 * UNKNOWN:
        return "unknown"
    return f"{_quantity(low, unit)} to {_quantity(high, unit)}"

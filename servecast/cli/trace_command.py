"""``servecast trace``: statistics and a chart of a request trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from servecast.cli.errors import guard

SHOWN_WINDOWS = 6
"""Windows of constant rate that the text lists; JSON has all."""


@click.command("trace")
@click.argument("path")
@click.option("--run", help="Which run of a trace that holds several.")
@click.option("--chart", type=click.Path(path_type=Path), help="Write a chart: .html (self-contained), .json or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON.")
@guard()
def command(path: str, run: str | None, chart: Path | None, as_json: bool) -> None:
    """Requests, rate, burstiness and lengths of the trace at PATH ('example' is the shipped one)."""
    from servecast.cli.output import progress, require_writable, to_json
    from servecast.cli.request import resolve_trace
    from servecast.readers.traces import read_trace

    if chart is not None:
        require_writable(chart)
        if chart.suffix not in {".html", ".json", ".png"}:
            raise ValueError(f"--chart must end in .html, .json or .png, got {chart.name!r}")
    with progress("reading trace") as report:
        trace = read_trace(resolve_trace(path, Path()), run=run, progress=report)
    document = _document(trace)
    if chart is not None:
        _save(trace, chart)
        click.echo(f"wrote {chart}", err=True)
    click.echo(to_json(document) if as_json else _text(document), nl=not as_json)


def _document(trace: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from servecast.calibration.fits.arrivals import arrival_summary, fit_arrivals
    from servecast.model.arrivals import length_statistics, workload_from_trace

    workload = workload_from_trace(trace)
    return {
        "schema": "servecast.trace/1",
        "name": trace.name,
        "arrivals": asdict(workload.arrivals),
        "arrival_model": arrival_summary(fit_arrivals(trace.t_s)),
        "lengths": asdict(length_statistics(trace.n_in, trace.n_out)),
        "notes": list(trace.notes),
        "warnings": list(workload.warnings),
    }


def _text(document: dict[str, Any]) -> str:
    arrivals, lengths = document["arrivals"], document["lengths"]
    idc = ", ".join(f"{value:.3g} at {window:g} s" for window, value in arrivals["idc"])
    peaks = ", ".join(f"{value:.2f} at {window:g} s" for window, value in arrivals["peak_to_mean"])
    lines = [
        f"{document['name']}: {arrivals['requests']} requests in {arrivals['span_s']:.0f} s, "
        f"{arrivals['rate_rps']:.3g} requests/s",
        f"  gaps       cv {arrivals['gap_cv']:.3g}, {arrivals['zero_gap_share']:.1%} zero",
        f"  dispersion {idc}",
        f"  peak/mean  {peaks}",
        *_model_lines(document["arrival_model"]),
    ]
    lines += [f"  {name:<10} {value:.4g}" for name, value in lengths.items()]
    lines += [f"note: {note}" for note in document["notes"]]
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    return "\n".join(lines)


def _model_lines(model: dict[str, Any]) -> list[str]:
    """Which arrival model, how well it fits, and whether the rate is steady."""
    process = model["process"]
    lines = [
        f"  model      {model['name']}, {process['rate_rps']:.3g}/s, gap cv {process['gap_cv']:.3g}",
        f"  verdict    {model['verdict']}",
        f"  reason     {model['reason']}",
    ]
    if model["stationary"]:
        return [*lines, "  rate       steady" if model["tests"] else "  rate       not tested for steadiness"]
    failed = "; ".join(_test_words(test) for test in model["tests"] if test["rejects"])
    lines.append(f"  rate       not steady: {failed}")
    windows = model["windows"]
    shown = [f"{one['start_s']:.0f}-{one['end_s']:.0f} s {one['rate_rps']:.3g}/s" for one in windows[:SHOWN_WINDOWS]]
    more = len(windows) - SHOWN_WINDOWS
    return [*lines, f"  windows    {', '.join(shown)}" + (f", and {more} more (--json)" if more > 0 else "")]


def _test_words(test: dict[str, Any]) -> str:
    if test["window_s"] is None:
        return f"second half at {test['observed']:.3g} times the rate of the first"
    return f"dispersion {test['observed']:.3g} at {test['window_s']:.3g} s, {test['expected']:.3g} if it were"


def _save(trace: Any, chart: Path) -> None:
    from servecast.cli.output import write_atomic
    from servecast.reports.trace_chart import trace_chart

    made = trace_chart(trace)
    if chart.suffix == ".json":
        write_atomic(chart, made.to_json())
        return
    try:
        import vl_convert  # noqa: F401 (an optional extra; altair needs it to render without a network)
    except ImportError:
        raise ValueError(f"{chart.name}: rendering needs vl-convert-python; a .json chart does not") from None
    if chart.suffix == ".html":
        write_atomic(chart, made.to_html(inline=True))
    else:
        made.save(str(chart))

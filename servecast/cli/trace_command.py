"""``servecast trace``: statistics and a chart of a request trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from servecast.cli.errors import guard


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

    from servecast.model.arrivals import length_statistics, workload_from_trace

    workload = workload_from_trace(trace)
    return {
        "schema": "servecast.trace/1",
        "name": trace.name,
        "arrivals": asdict(workload.arrivals),
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
    ]
    lines += [f"  {name:<10} {value:.4g}" for name, value in lengths.items()]
    lines += [f"note: {note}" for note in document["notes"]]
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    return "\n".join(lines)


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

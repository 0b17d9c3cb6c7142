"""``servecast schedule``: replicas over the time of a trace, with a start-up lead time and a minimum dwell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servecast.cli.errors import guard

if TYPE_CHECKING:
    from servecast.scheduling import ScheduleAnswer

SHOWN = 24
"""Changes of the fleet that the text shows."""


@click.command("schedule")
@click.option("--trace", help="Request trace (CSV, JSONL, .gz); 'example' is the shipped one.")
@click.option("--run", help="Which run of a trace that holds several.")
@click.option("--model", help="Model by name, or a config.json.")
@click.option("--gpu", multiple=True, help="GPU on offer as NAME=USD_PER_HOUR[:LIMIT]; of several, one is chosen.")
@click.option("--slo", multiple=True, help="Limit such as ttft_p99=2s, met in every window; repeat.")
@click.option("--tp", type=click.IntRange(1), help="Tensor-parallel degree; the cheapest without it.")
@click.option("--max-num-seqs", type=click.IntRange(1), help="Batch limit of a replica; the cheapest without it.")
@click.option("--window", default="60s", show_default=True, help="The fleet is constant for so long.")
@click.option("--lead-time", default="120s", show_default=True, help="From a replica's order to its first request.")
@click.option("--min-dwell", default="10min", show_default=True, help="From a rise of the fleet to its next fall.")
@click.option("--start-usd", type=float, default=0.0, show_default=True, help="Price of a start, beside its lead time.")
@click.option("--min-replicas", type=click.IntRange(0), default=1, show_default=True, help="Serving at any time.")
@click.option("--max-replicas", type=click.IntRange(1), default=1000, show_default=True, help="Most replicas at once.")
@click.option("--forecast-quantile", type=float, help="Size for this quantile of the rates around, not for each rate.")
@click.option("--rate-scale", type=float, default=1.0, show_default=True, help="For this multiple of the rate.")
@click.option("--engine", default="vllm", show_default=True, help="vllm, sglang or trtllm, optionally @VERSION.")
@click.option("--precision", default="auto", show_default=True, help="Weights: auto, bf16, fp8, fp4, int4, ...")
@click.option("--kv-precision", default="auto", show_default=True, help="KV cache: auto, bf16, fp8.")
@click.option("--profile", default=None, help="Calibration profile by name or path.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV of the windows to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@guard()
def command(out: Path | None, as_json: bool, **flags: Any) -> None:
    """Replicas over time: when to start and stop them at least cost, within the limits in every window."""
    from time import perf_counter

    from servecast.cli.output import require_writable, to_json, write_atomic
    from servecast.scheduling import schedule_csv, schedule_document
    from servecast.solvers.results import Status

    started = perf_counter()
    if out is not None:
        require_writable(out)
    answer = _answer(flags)
    if answer.schedule.status is Status.INFEASIBLE:
        raise ValueError(f"no schedule meets the request: {answer.schedule.binds}")
    if out is not None:
        write_atomic(out, schedule_csv(answer))
    if as_json:
        document = {**schedule_document(answer), "wall_s": round(perf_counter() - started, 3)}
        click.echo(to_json(document), nl=False)
    else:
        click.echo(schedule_text(answer))
    if out is not None:
        click.echo(f"wrote {out}", err=True)


def _answer(flags: dict[str, Any]) -> ScheduleAnswer:
    from servecast.calibration.profile import SHIPPED
    from servecast.cli.output import progress
    from servecast.cli.request import request_from_flags, resolve_trace
    from servecast.cli.units import parse_quantity
    from servecast.readers.catalogues import llm
    from servecast.readers.traces import read_trace
    from servecast.scheduling import plan_schedule

    shared = ("trace", "run", "model", "gpu", "slo", "engine", "precision", "kv_precision", "rate_scale")
    request = request_from_flags(**{name: flags[name] for name in shared})
    engine, version = request.engine_and_version()
    window_s, lead_time_s, min_dwell_s = (
        parse_quantity(flags[name], "duration", name=f"--{name.replace('_', '-')}")
        for name in ("window", "lead_time", "min_dwell")
    )
    model, offers = llm(request.model), request.offers()
    with progress("reading trace") as report:
        trace = read_trace(resolve_trace(flags["trace"], Path()), run=flags["run"], progress=report)
    quantile = flags["forecast_quantile"]
    return plan_schedule(
        trace,
        model,
        offers,
        request.slos(),
        window_s=window_s,
        lead_time_s=lead_time_s,
        min_dwell_s=min_dwell_s,
        start_usd=flags["start_usd"],
        min_replicas=flags["min_replicas"],
        max_replicas=flags["max_replicas"],
        forecast="known" if quantile is None else quantile,
        rate_scale=request.workload.rate_scale,
        tp=flags["tp"],
        max_num_seqs=flags["max_num_seqs"],
        engine=engine,
        engine_version=version,
        precision=request.precision,
        kv_precision=request.kv_precision,
        profile=flags["profile"] or SHIPPED,
    )


def schedule_text(answer: ScheduleAnswer) -> str:
    """The cost beside that of a constant fleet, what binds, and when the fleet changes."""
    from servecast.cli.plan_text import seconds

    found, problem, one = answer.schedule, answer.problem, answer.instance
    limits = ", ".join(f"{slo.name} <= {seconds(slo.limit_s)}" for slo in answer.slos)
    replica = f"{one.gpu} tp{one.tp}" + (f" pp{one.pp}" if one.pp > 1 else "")
    windows, starts = len(found.replicas), int(found.started.sum())
    lines = [
        f"{int(found.replicas.min())} to {int(found.replicas.max())} x {replica} for {found.cost_usd:.2f} USD serve "
        f"{answer.trace} within {limits} in each of {windows} windows of {problem.window_s:g} s",
        "",
        f"  model        {answer.llm.name}, {answer.engine}, max_num_seqs {one.max_num_seqs}",
        f"  always peak  {found.always_peak_usd:.2f} USD; the schedule saves {found.saving:.1%}",
        f"  lower bound  {found.lower_bound_usd:.2f} USD, each window's requirement and no more",
        f"  attained     {answer.slo_attainment:.2%} of requests meet every limit",
        f"  starts       {starts}, ordered {problem.lead_time_s:g} s before; dwell {problem.min_dwell_s:g} s",
        f"  binds        {found.binds}",
        f"  profile      {answer.profile}",
        "",
        "     from [s]   requests/s   required   replicas",
    ]
    changes = [w for w in range(windows) if w == 0 or found.replicas[w] != found.replicas[w - 1]]
    lines += [
        f"  {w * problem.window_s:>11g} {answer.rates_rps[w]:>12.3g} {problem.required[w]:>10} {found.replicas[w]:>10}"
        for w in changes[:SHOWN]
    ]
    if len(changes) > SHOWN:
        lines.append(f"  ... {len(changes) - SHOWN} more changes; --out and --json have every window")
    lines += [f"warning: {warning}" for warning in answer.warnings]
    return "\n".join(lines)

"""``servecast fleet``: which GPU types, how many of each, and which class of requests goes where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servecast.cli.errors import guard

if TYPE_CHECKING:
    from servecast.fleeting import FleetAnswer

MOST_EDGES = 64
"""Edges of one length; more classes than that are a slip."""


@click.command("fleet")
@click.option("--trace", help="Request trace (CSV, JSONL, .gz); 'example' is the shipped one.")
@click.option("--run", help="Which run of a trace that holds several.")
@click.option("--model", help="Model by name, or a config.json.")
@click.option("--gpu", multiple=True, help="GPU on offer as NAME=USD_PER_HOUR[:LIMIT]; repeat.")
@click.option("--slo", multiple=True, help="Limit such as ttft_p99=2s or tpot_p99=50ms; repeat.")
@click.option("--input-edges", help="Upper ends of the prompt classes, such as 512,2048,8192. [tokens]")
@click.option("--output-edges", help="Upper ends of the output classes, such as 128,512. [tokens]")
@click.option("--rate-quantile", type=float, help="Serve this quantile of each class's rate, such as 0.95.")
@click.option("--rate-scale", type=float, default=1.0, show_default=True, help="Plan for this multiple of the rate.")
@click.option("--engine", default="vllm", show_default=True, help="vllm, sglang or trtllm, optionally @VERSION.")
@click.option("--precision", default="auto", show_default=True, help="Weights: auto, bf16, fp8, fp4, int4, ...")
@click.option("--kv-precision", default="auto", show_default=True, help="KV cache: auto, bf16, fp8.")
@click.option("--slices", type=int, help="Split each class into so many equal parts, as Melange does; default: freely.")
@click.option("--time-limit", default="60s", show_default=True, help="Of each program that is solved.")
@click.option("--profile", default=None, help="Calibration profile by name or path.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the answer as JSON to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@guard()
def command(out: Path | None, as_json: bool, **flags: Any) -> None:
    """Cheapest mix of GPU types for the request classes of a trace, within their latency limits."""
    from servecast.cli.output import require_writable, to_json, write_atomic

    if out is not None:
        require_writable(out)
    answer = _answer(flags)
    if not answer.types:
        raise ValueError(f"no fleet meets the request: {answer.plan.binds}")
    from servecast.fleeting import result_document

    document = to_json(result_document(answer))
    if out is not None:
        write_atomic(out, document)
    if as_json:
        click.echo(document, nl=False)
    else:
        click.echo(fleet_text(answer))
    if out is not None:
        click.echo(f"wrote {out}", err=True)


def _answer(flags: dict[str, Any]) -> FleetAnswer:
    from servecast.cli.request import request_from_flags, resolve_trace
    from servecast.cli.units import parse_quantity

    own = {name: flags.pop(name) for name in ("input_edges", "output_edges", "rate_quantile", "slices")}
    time_limit_s = parse_quantity(flags.pop("time_limit"), "duration", name="time-limit")
    profile = flags.pop("profile")
    request = request_from_flags(**flags)
    inputs, outputs = (_edges(f"--{name}-edges", own[f"{name}_edges"]) for name in ("input", "output"))

    from servecast.calibration.profile import SHIPPED
    from servecast.cli.output import progress
    from servecast.fleeting import INPUT_EDGES, OUTPUT_EDGES, plan_fleet
    from servecast.readers.catalogues import llm
    from servecast.readers.traces import read_trace

    with progress("reading trace") as report:
        trace = read_trace(
            resolve_trace(str(request.workload.trace), Path()), run=request.workload.run, progress=report
        )
    engine, version = request.engine_and_version()
    return plan_fleet(
        trace,
        llm(request.model),
        request.offers(),
        request.slos(),
        input_edges=INPUT_EDGES if inputs is None else inputs,
        output_edges=OUTPUT_EDGES if outputs is None else outputs,
        rate_quantile=own["rate_quantile"],
        rate_scale=request.workload.rate_scale,
        engine=engine,
        engine_version=version,
        precision=request.precision,
        kv_precision=request.kv_precision,
        profile=profile or SHIPPED,
        slices=own["slices"],
        time_limit_s=time_limit_s,
    )


def _edges(name: str, text: str | None) -> list[int] | None:
    """Numbers of tokens between commas; a leading 0 is allowed."""
    from servecast.cli.units import parse_tokens

    if text is None:
        return None
    parts = text.split(",")
    if len(parts) > MOST_EDGES:
        raise ValueError(f"{name} must be at most {MOST_EDGES} numbers, got {len(parts)}")
    first = [0] if parts[0].strip() == "0" else []
    return first + [parse_tokens(part, name=name) for part in parts[len(first) :]]


def fleet_text(answer: FleetAnswer) -> str:
    """The answer for eyes."""
    plan = answer.plan
    proved = "nothing cheaper serves" if plan.gap == 0.0 else f"at most {plan.gap:.2%} above the cheapest"
    lines = [f"{plan.usd_per_hour:.2f} USD/h for {answer.model} on {answer.engine} ({plan.status}: {proved})"]
    for one in answer.types:
        what = f"{one.replicas} x {one.gpu} tp{one.tp}"
        lines.append(
            f"  {what:<18} {one.usd_per_hour:8.2f} USD/h  {one.rate_rps:8.3g} requests/s  "
            f"{one.utilisation:6.1%} loaded  {one.slo_attainment:7.2%} within limits  batch <= {one.max_num_seqs}"
        )
    lines.append(f"classes (prompt x output tokens), {answer.rate_basis}:")
    lines += [
        f"  {one.name:<24} {one.rate_rps:8.3g} requests/s  {_where(answer, i)}" for i, one in enumerate(answer.classes)
    ]
    lines.append(f"binds: {plan.binds}")
    lines += _compared(answer)
    lines += [f"warning: {warning}" for warning in answer.warnings]
    return "\n".join(lines)


def _where(answer: FleetAnswer, i: int) -> str:
    from servecast.fleeting import shares_of

    return ", ".join(
        f"{share:.0%} {one.gpu} tp{one.tp} batch {one.max_num_seqs}" for one, share in shares_of(answer, i)
    )


def _compared(answer: FleetAnswer) -> list[str]:
    lines = []
    nominal, single, melange = answer.nominal_usd_per_hour, answer.single_type, answer.melange
    if nominal is not None:
        price = answer.plan.usd_per_hour - nominal
        lines.append(f"price of robustness: {price:.2f} USD/h over {nominal:.2f} at the mean rates")
    if single is not None:
        has = f"{single.usd_per_hour:.2f} USD/h ({single.what})" if single.what != "none" else "none serves all classes"
        lines.append(f"one GPU type alone: {has}")
    if melange is not None:
        has = "no fleet" if melange.usd_per_hour != melange.usd_per_hour else f"{melange.usd_per_hour:.2f} USD/h"
        lines.append(f"in Melange's form ({melange.what} per class): {has} ({melange.status})")
    return lines

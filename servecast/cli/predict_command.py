"""``servecast predict``: one operating point from flags, or a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from servecast.cli.errors import guard
from servecast.cli.flags import given_flags


@click.command("predict")
@click.option("--rows", type=click.Path(path_type=Path), help="CSV of operating points (see docs/json.md).")
@click.option("--out", type=click.Path(path_type=Path), help="CSV to write; standard output without it.")
@click.option("--model", help="Model by name, or a config.json.")
@click.option("--gpu", help="GPU type by name.")
@click.option("--engine", default="vllm", show_default=True, help="vllm, sglang or trtllm.")
@click.option("--precision", default="auto", show_default=True, help="Weights: auto, bf16, fp8, fp4, int4, ...")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Tensor-parallel degree.")
@click.option("--pp", type=click.IntRange(1), default=1, show_default=True, help="Pipeline-parallel degree.")
@click.option("--dp", type=click.IntRange(1), default=1, show_default=True, help="Attention replicas.")
@click.option("--ep", type=click.IntRange(1), default=1, show_default=True, help="Expert-parallel degree.")
@click.option("--concurrency", type=float, default=1.0, show_default=True, help="Requests in flight.")
@click.option("--isl", type=float, default=1024.0, show_default=True, help="Prompt tokens.")
@click.option("--osl", type=float, default=256.0, show_default=True, help="Output tokens.")
@click.option("--profile", default=None, help="Calibration profile by name or path.")
@click.option("--json", "as_json", is_flag=True, help="Print the prediction as JSON.")
@guard()
def command(rows: Path | None, out: Path | None, profile: str | None, as_json: bool, **flags: Any) -> None:
    """TTFT, TPOT, end-to-end latency and throughput of a closed loop, with 90 % intervals."""
    from servecast.calibration.profile import SHIPPED

    given = given_flags(flags)
    if rows is not None and given:
        raise ValueError(f"--rows and {given[0]} were both given; a table states its own points")
    if rows is None and out is not None:
        raise ValueError("--out goes with --rows; one point is printed")
    if rows is not None:
        _table(rows, out, profile or SHIPPED, as_json=as_json)
    else:
        _single(flags, profile or SHIPPED, as_json=as_json)


def _table(rows: Path, out: Path | None, profile: str, *, as_json: bool) -> None:
    from servecast.cli.output import require_writable, to_json, write_atomic
    from servecast.predicting import Point, outcome_document, predict, read_points, table_text

    if out is not None:
        require_writable(out)
    names, records, points = read_points(rows)
    outcomes = predict(points, profile=profile)
    if as_json:
        documents = [
            outcome_document(point, outcome)
            if isinstance(point, Point)
            else {"schema": "servecast.prediction/1", "status": outcome.status, "reason": outcome.reason}
            for point, outcome in zip(points, outcomes, strict=True)
        ]
        text = to_json(documents)
    else:
        text = table_text(names, records, outcomes)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_atomic(out, text)
        counts = {status: sum(one.status == status for one in outcomes) for status in {o.status for o in outcomes}}
        summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        click.echo(f"wrote {out}: {summary}", err=True)


def _single(flags: dict[str, Any], profile: str, *, as_json: bool) -> None:
    from servecast.cli.output import to_json
    from servecast.predicting import Point, outcome_document, predict

    for name in ("model", "gpu"):
        if not flags[name]:
            raise ValueError(f"--{name} must be given (or --rows with a table)")
    for name in ("concurrency", "isl", "osl"):
        value = flags[name]
        if not (isinstance(value, float) and 0.0 < value < 1e12):
            raise ValueError(f"--{name} must be a positive number, got {value}")
    point = Point(**flags)
    outcome = predict([point], profile=profile)[0]
    if outcome.status in {"unsupported", "does_not_fit"}:
        raise ValueError(outcome.reason)
    if as_json:
        click.echo(to_json(outcome_document(point, outcome)), nl=False)
        return
    from servecast.cli.plan_text import seconds

    click.echo(
        f"{point.model} on {point.gpu} tp{point.tp}, {point.engine}: {point.concurrency:g} in flight, "
        f"{point.isl:g} prompt and {point.osl:g} output tokens"
    )
    for name, title in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "end to end")):
        value, low, high = outcome.values[name]
        click.echo(f"  {title:<11} {seconds(value)} [{seconds(low)}, {seconds(high)}]")
    value, low, high = outcome.values["output_tokens_per_s"]
    click.echo(f"  {'throughput':<11} {value:,.0f} [{low:,.0f}, {high:,.0f}] output tokens/s")
    if outcome.status != "ok":
        click.echo(f"  {outcome.status}: {outcome.reason}")

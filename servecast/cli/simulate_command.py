"""``servecast simulate``: a trace replayed on a named fleet, its figures, and one row per request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servecast.cli.errors import guard

if TYPE_CHECKING:
    from servecast.model.slo import Slo
    from servecast.simulating import Simulated
    from servecast.validation.ensemble import Spread


@click.command("simulate")
@click.option("--trace", help="Request trace (CSV, JSONL, .gz); 'example' is the shipped one.")
@click.option("--run", help="Which run of a trace that holds several.")
@click.option("--model", help="Model by name, or a config.json.")
@click.option("--gpu", help="GPU type by name.")
@click.option("--replicas", type=int, default=1, show_default=True, help="Engine instances behind one router.")
@click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel degree of each.")
@click.option("--pp", type=int, default=1, show_default=True, help="Pipeline-parallel degree of each.")
@click.option("--max-num-seqs", type=int, default=256, show_default=True, help="Most sequences in one step.")
@click.option("--max-num-batched-tokens", type=int, default=8192, show_default=True, help="Most tokens in one step.")
@click.option("--engine", default="vllm", show_default=True, help="vllm, sglang or trtllm, optionally @VERSION.")
@click.option("--precision", default="auto", show_default=True, help="Weights: auto, bf16, fp8, fp4, int4, ...")
@click.option("--kv-precision", default="auto", show_default=True, help="KV cache: auto, bf16, fp8.")
@click.option("--router", default="round_robin", show_default=True, help="round_robin, least_loaded or random.")
@click.option(
    "--prefix-caching/--no-prefix-caching", default=False, show_default=True, help="Use the trace's hash_ids."
)
@click.option("--slo", multiple=True, help="Limit to count against, such as ttft_p99=2s; repeat.")
@click.option("--rate-scale", type=float, default=1.0, show_default=True, help="Play the trace so many times as fast.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of --router random and --ensemble alone.")
@click.option("--ensemble", type=int, help="Repeat on so many resampled traces; prints median and 5 to 95 %.")
@click.option("--backend", default="processes", show_default=True, help="Of --ensemble: processes, dask or serial.")
@click.option("--jobs", type=int, default=-1, show_default=True, help="Of --ensemble: processes; -1: one per core.")
@click.option("--profile", default=None, help="Calibration profile by name or path.")
@click.option("--out", type=click.Path(path_type=Path), help="One row per request: .csv, .csv.gz or .parquet.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@guard()
def command(out: Path | None, as_json: bool, **flags: Any) -> None:
    """Serve every request of a trace on a fleet, event by event: latencies, preemptions, cache hits.

    Without --ensemble and --router random nothing is drawn. The same command gives the same output, but for the time
    it took.
    """
    from time import perf_counter

    from servecast.cli.output import require_writable, to_json, write_atomic
    from servecast.cli.tables import require_table_name, table_bytes

    start = perf_counter()
    suffix = ""
    if out is not None:
        suffix = require_table_name(out)
        require_writable(out)
    simulated, ensemble = _simulated(flags)

    from servecast.simulating import result_document, rows_table

    if out is not None:
        write_atomic(out, table_bytes(rows_table(simulated.rows), suffix))
    members = flags["ensemble"] or 0
    wall_s = perf_counter() - start
    if as_json:
        document = result_document(simulated, ensemble=ensemble, members=members, wall_s=wall_s)
        click.echo(to_json(document), nl=False)
    else:
        click.echo(simulation_text(simulated, ensemble, members))
    if out is not None:
        click.echo(f"wrote {out}", err=True)
    if not as_json:
        click.echo(f"took {wall_s:.2f} s", err=True)


def _simulated(flags: dict[str, Any]) -> tuple[Simulated, dict[str, Spread] | None]:
    from servecast.validation.ensemble import BACKENDS

    for name in ("trace", "model", "gpu"):
        if not flags[name]:
            raise ValueError(f"--{name} must be given")
    members, backend, jobs = flags["ensemble"], flags["backend"], flags["jobs"]
    if members is not None and members < 1:
        raise ValueError(f"--ensemble must be >= 1, got {members}")
    if backend not in BACKENDS:
        raise ValueError(f"--backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if jobs != -1 and jobs < 1:
        raise ValueError(f"--jobs must be >= 1, or -1 for one per core, got {jobs}")
    slos = _limits(flags["slo"])

    from servecast.calibration.profile import SHIPPED
    from servecast.cli.output import progress
    from servecast.cli.request import resolve_trace
    from servecast.readers.catalogues import gpu, llm
    from servecast.readers.traces import read_trace
    from servecast.simulating import simulate_ensemble, simulate_fleet

    model, device = llm(flags["model"]), gpu(flags["gpu"])
    caching = flags["prefix_caching"]
    with progress("reading trace") as report:
        trace = read_trace(resolve_trace(flags["trace"], Path()), run=flags["run"], prefixes=caching, progress=report)
    same = (
        "replicas",
        "tp",
        "pp",
        "engine",
        "precision",
        "kv_precision",
        "max_num_seqs",
        "max_num_batched_tokens",
        "router",
        "prefix_caching",
        "rate_scale",
        "seed",
    )
    with progress("simulating") as report:
        simulated = simulate_fleet(
            trace,
            model,
            device,
            slos=slos,
            profile=flags["profile"] or SHIPPED,
            progress=report,
            **{name: flags[name] for name in same},
        )
    if members is None:
        return simulated, None
    with progress("members") as report:
        return simulated, simulate_ensemble(simulated.fleet, members, backend=backend, jobs=jobs, progress=report)


def _limits(flags: tuple[str, ...]) -> tuple[Slo, ...]:
    from servecast.cli.units import parse_slo

    slos = [parse_slo(text) for text in flags]
    names = [slo.name for slo in slos]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--slo {name} must be given once, got it twice")
    return tuple(slos)


def simulation_text(simulated: Simulated, ensemble: dict[str, Spread] | None = None, members: int = 0) -> str:
    """The run for eyes; nothing in it depends on the clock."""
    from servecast.cli.plan_text import seconds

    fleet, found = simulated.fleet, simulated.summary
    one, limits = fleet.deployment, fleet.limits
    lines = [
        f"{fleet.trace.name}: {found.requests} requests on {fleet.replicas} x {one.gpu.name} tp{one.tp} pp{one.pp}, "
        f"{one.llm.name} ({one.trunk_format}, cache {one.kv_format}), {fleet.engine}, {fleet.router}",
        f"  each holds  {limits.blocks * limits.block_size:,} cached tokens, {limits.max_num_seqs} sequences, "
        f"{limits.max_num_batched_tokens} tokens a step",
        "              mean       p50        p90        p95        p99        p99.9",
    ]
    for metric, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "end to end")):
        values = [found.mean[metric], *found.percentiles[metric].values()]
        lines.append(f"  {title:<11} " + " ".join(f"{_or_none(value, seconds):<10}" for value in values).rstrip())
    lines.append(
        f"  throughput  {found.throughput_rps:.3g} requests/s, {found.output_tokens_per_s:,.0f} output tokens/s, "
        f"makespan {found.makespan_s:,.0f} s"
    )
    lines.append(
        f"  preemptions {found.preemptions}, refused {found.refused}, prompt tokens from the cache "
        f"{found.cached_share:.1%}"
    )
    for slo in fleet.slos:
        lines.append(f"  {slo.name:<11} {found.attainment[slo.name]:.2%} within {seconds(slo.limit_s)}")
    if fleet.slos:
        lines.append(f"  all limits  {found.slo_attainment:.2%}, {found.goodput_rps:.3g} requests/s")
    if ensemble is not None:
        lines.append(f"median [5 %, 95 %] of {members} resampled traces:")
        lines += [f"  {name:<20} {_spread(name, one, seconds)}" for name, one in ensemble.items() if name != "requests"]
    lines += [f"note: {note}" for note in fleet.trace.notes]
    lines += [f"warning: {warning}" for warning in simulated.warnings]
    return "\n".join(lines)


def _or_none(value: float, shown: Any) -> str:
    return "-" if value != value else shown(value)


def _spread(name: str, one: Spread, seconds: Any) -> str:
    shown = seconds if name.endswith("_s") and not name.endswith("per_s") else "{:.4g}".format
    low, median, high = (_or_none(value, shown) for value in (one.lo, one.median, one.hi))
    return f"{median} [{low}, {high}]"

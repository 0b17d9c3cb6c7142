"""``servecast plan``: from a request file or from flags to a plan, its policy files and its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servecast.cli.errors import guard
from servecast.cli.flags import given_flags

if TYPE_CHECKING:
    from servecast.cli.request import PlanRequest
    from servecast.model.workload import Trace, Workload
    from servecast.planning import Answer


@click.command("plan")
@click.argument("request_file", required=False, type=click.Path(path_type=Path))
@click.option("--trace", help="Request trace (CSV, JSONL, .gz); 'example' is the shipped one.")
@click.option("--run", help="Which run of a trace that holds several.")
@click.option("--model", help="Model by name, or a config.json.")
@click.option("--gpu", multiple=True, help="GPU on offer as NAME=USD_PER_HOUR[:LIMIT]; repeat.")
@click.option("--slo", multiple=True, help="Limit such as ttft_p99=2s or tpot_p99=50ms; repeat.")
@click.option("--engine", default="vllm", show_default=True, help="vllm, sglang or trtllm, optionally @VERSION.")
@click.option("--precision", default="auto", show_default=True, help="Weights: auto, bf16, fp8, fp4, int4, ...")
@click.option("--kv-precision", default="auto", show_default=True, help="KV cache: auto, bf16, fp8.")
@click.option("--rate-scale", type=float, default=1.0, show_default=True, help="Plan for this multiple of the rate.")
@click.option("--profile", default=None, help="Calibration profile by name or path.")
@click.option(
    "--simulate/--no-simulate", default=True, show_default=True, help="Replay the trace on the best candidates."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for plan.json and the engine's files.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a self-contained HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@guard()
def command(request_file: Path | None, **flags: Any) -> None:
    """Cheapest way to serve a workload within its latency limits.

    Give a REQUEST_FILE (see `servecast init`), or --trace, --model, --gpu and --slo.
    """
    from servecast.cli.output import require_writable, to_json, write_all_atomic
    from servecast.planning import result_document, with_arrivals

    out, report, as_json = flags.pop("out"), flags.pop("report"), flags.pop("as_json")
    profile, simulate = flags.pop("profile"), flags.pop("simulate")
    request, base = _request(request_file, flags)
    files: dict[Path, str] = {}
    if isinstance(out, Path):
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out}: is a file, not a folder")
        require_writable(out / "plan.json" if out.exists() else out)
    if isinstance(report, Path) and not (isinstance(out, Path) and report.parent == out):
        require_writable(report)
    trace, workload = _workload(request, base)
    answer = _plan(request, workload, str(profile) if profile else None)
    if trace is not None:
        answer = with_arrivals(answer, trace)
    if simulate and trace is not None:
        answer = _confirmed(answer, trace, request, str(profile) if profile else None)
    if answer.plan.plan is None:
        raise ValueError(f"no plan meets the request: {answer.plan.binds}")
    document = to_json(result_document(answer))
    if isinstance(out, Path):
        files |= {out / name: text for name, text in {"plan.json": document, **_policy(answer, request)}.items()}
    if isinstance(report, Path):
        files[report] = _page(answer, request, trace, workload, [str(name) for name in files])
    if isinstance(out, Path):
        out.mkdir(exist_ok=True)  # last, so that a refusal leaves nothing behind
    write_all_atomic(files)
    if as_json:
        click.echo(document, nl=False)
    else:
        from servecast.cli.plan_text import plan_text

        click.echo(plan_text(answer))
    for name in files:
        click.echo(f"wrote {name}", err=True)


def _request(request_file: Path | None, flags: dict[str, Any]) -> tuple[PlanRequest, Path]:
    from servecast.cli.request import read_request, request_from_flags

    if request_file is None:
        return request_from_flags(**flags), Path()
    given = given_flags(flags)
    if given:
        raise ValueError(f"a request file and {given[0]} were both given; edit the file or leave it out")
    return read_request(request_file), request_file.parent


def _workload(request: PlanRequest, base: Path) -> tuple[Trace | None, Workload]:
    from servecast.cli.output import progress
    from servecast.cli.request import resolve_trace
    from servecast.model.arrivals import workload_from_parameters, workload_from_trace
    from servecast.readers.traces import read_trace

    load = request.workload
    if load.trace is not None:
        with progress("reading trace") as report:
            trace = read_trace(resolve_trace(load.trace, base), run=load.run, progress=report)
        return trace, workload_from_trace(trace)
    assert load.input_tokens and load.output_tokens and load.rate_rps  # noqa: S101, PT018 (the document's rules)
    return None, workload_from_parameters(
        float(load.rate_rps),
        n_in=load.input_tokens.distribution(),
        n_out=load.output_tokens.distribution(),
        gap_cv=1.0 if load.gap_cv is None else load.gap_cv,
    )


def _plan(request: PlanRequest, workload: Workload, profile: str | None) -> Answer:
    from servecast.calibration.profile import SHIPPED
    from servecast.planning import plan
    from servecast.readers.catalogues import llm

    engine, version = request.engine_and_version()
    search = request.search
    return plan(
        workload,
        llm(request.model),
        request.offers(),
        request.slos(),
        engine=engine,
        engine_version=version,
        precision=request.precision,
        kv_precision=request.kv_precision,
        rate_scale=request.workload.rate_scale,
        tp=search.tp,
        pp=search.pp,
        max_num_seqs=search.max_num_seqs,
        max_replicas=search.max_replicas,
        profile=profile or SHIPPED,
    )


def _confirmed(answer: Answer, trace: Trace, request: PlanRequest, profile: str | None) -> Answer:
    from servecast.calibration.profile import SHIPPED
    from servecast.cli.output import progress
    from servecast.confirming import confirm

    with progress("replaying the trace") as report:
        return confirm(answer, trace, seed=request.seed, profile=profile or SHIPPED, progress=report)


def _provenance() -> tuple[str, str]:
    from datetime import UTC, datetime
    from importlib.metadata import version

    return version("servecast"), datetime.now(UTC).date().isoformat()


def _policy(answer: Answer, request: PlanRequest) -> dict[str, str]:
    from servecast.planning import policy_table
    from servecast.policies import emit

    version, date = _provenance()
    trace = request.workload.trace or "parameters"
    return emit(policy_table(answer, trace=Path(trace).name, date=date, version=version, seed=request.seed))


def _page(answer: Answer, request: PlanRequest, trace: Trace | None, workload: Workload, files: list[str]) -> str:
    import sys

    from servecast.reports.plan_page import ReportContext, plan_page

    version, date = _provenance()
    context = ReportContext(
        model=answer.request.llm.name,
        engine=answer.request.engine,
        engine_version=answer.engine_version,
        slos=answer.request.slos,
        profile=answer.profile,
        servecast_version=version,
        date=date,
        command=" ".join(["servecast", *sys.argv[1:]]),
        seed=request.seed,
        offers=tuple((offer.gpu.title, offer.usd_per_hour, offer.limit) for offer in answer.request.offers),
        files=tuple(files),
    )
    return plan_page(answer.plan, request=context, trace=trace, workload=workload, simulated=answer.simulated)

"""``servecast speculate``: draft length by batch size, from measured cells or a profile, as the engine's own file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servecast.cli.errors import guard

if TYPE_CHECKING:
    from servecast.speculation_answers import DecodeLimits, Load, ScheduleRules, SpeculationAnswer
    from servecast.speculation_document import Methods

MAX_BATCH, MAX_LENGTH = 4096, 64
"""Those of `servecast.speculation_sources`, which the help does not load."""
SOURCE_FLAGS = (
    "cells",
    "sweep_acceptance",
    "step_cost",
    "model",
    "gpu",
    "tp",
    "precision",
    "profile",
    "method",
    "draft_model",
    "acceptance",
    "acceptance_before",
    "curve",
    "max_batch",
    "max_length",
    "measured_context",
)
"""Options that say where the table comes from, as the fields of a `SpeedRequest`."""


@click.command("speculate")
@click.option("--cells", type=click.Path(path_type=Path), help="CSV of measured cells (see docs/json.md).")
@click.option(
    "--predict", type=click.Path(path_type=Path), help="CSV of cells to predict, and to score where measured."
)
@click.option(
    "--acceptance", type=click.Path(path_type=Path), help="Acceptance of the load: CSV, JSON, YAML, counters."
)
@click.option("--curve", help="Which curve (or model, of counters) of an acceptance file that holds several.")
@click.option("--acceptance-before", type=click.Path(path_type=Path), help="Earlier snapshot of the same counters.")
@click.option("--sweep-acceptance", type=click.Path(path_type=Path), help="Acceptance that the cells themselves had.")
@click.option("--step-cost", type=click.Path(path_type=Path), help="CSV of measured passes, in place of --cells.")
@click.option("--model", help="Target model by name; with --gpu and without --cells, costs come from a profile.")
@click.option("--gpu", help="GPU type by name.")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Tensor-parallel degree.")
@click.option("--dp", type=click.IntRange(1), default=1, show_default=True, help="Data-parallel degree of the engine.")
@click.option("--precision", default="auto", show_default=True, help="Weights: auto, bf16, fp8, fp4, int4, ...")
@click.option("--profile", default=None, help="Calibration profile by name or path.")
@click.option("--engine", default="vllm@0.32", show_default=True, help="vllm, sglang or trtllm, optionally @VERSION.")
@click.option("--method", help="Draft method as the engine spells it; from the cells' drafter without it.")
@click.option("--draft-model", help="Draft model by name, for methods that have one.")
@click.option("--model-runner", type=click.Choice(["v1", "v2"]), help="vLLM's model runner.")
@click.option("--slo", multiple=True, help="tpot_mean=20ms, tpot_p99=50ms or step=60ms; repeat.")
@click.option(
    "--max-batch", type=click.IntRange(1, MAX_BATCH), help="Largest batch size; the largest measured, or 256."
)
@click.option("--max-length", type=click.IntRange(1, MAX_LENGTH), help="Longest draft; the longest measured without.")
@click.option("--max-lengths", type=click.IntRange(1, 8), default=3, show_default=True, help="Distinct lengths.")
@click.option("--max-segments", type=click.IntRange(1, 32), default=4, show_default=True, help="Runs of one length.")
@click.option("--no-zero", is_flag=True, help="Never choose length 0.")
@click.option("--operating", help="LOW:HIGH batch sizes without an edge from or to length 0.")
@click.option("--context", multiple=True, type=float, help="Cached tokens per request; repeat.")
@click.option(
    "--measured-context", type=click.FloatRange(0), help="Cached tokens that cells or passes were measured at."
)
@click.option("--rate", help="Arrival rate such as 5/s: weights the batch sizes.")
@click.option("--output-tokens", type=click.FloatRange(1), default=256.0, show_default=True, help="Per request.")
@click.option("--switch-cost", default="0ms", show_default=True, help="Time lost by one change of length, with --rate.")
@click.option("--compare", multiple=True, help="NAME=CELLS.csv of another draft method; repeat.")
@click.option("--allow-static", is_flag=True, help="Where the engine has no schedule, write the best single length.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the engine's files.")
@click.option("--report", type=click.Path(path_type=Path), help="HTML page to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@guard()
def command(as_json: bool, out: Path | None, report: Path | None, predict: Path | None, **flags: Any) -> None:
    """The draft length of best goodput for every batch size, within the limits, and what it gains."""
    from servecast.cli.output import require_writable, to_json

    for name in ("curve", "acceptance_before"):
        if flags[name] is not None and flags["acceptance"] is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --acceptance, the file that it goes with")
    if predict is not None and flags["acceptance"] is not None:
        raise ValueError("--predict scores the sweep itself: --sweep-acceptance is its acceptance, not --acceptance")
    if predict is not None and (out is not None or report is not None):
        raise ValueError("--predict writes no files: leave --out and --report away")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {out}")
    if report is not None and report == out:
        raise ValueError(f"--report must be a file beside --out or in it, got {report} for both")
    if report is not None and report.parent != out:
        require_writable(report)
    if predict is not None:
        document = _scored(flags, predict)
        click.echo(to_json(document) if as_json else _score_text(document), nl=not as_json)
        return
    found = _Planned(flags)
    _write(out, report, found)
    if as_json:
        click.echo(to_json(found.document()), nl=False)
    else:
        click.echo(found.text())


def _scored(flags: dict[str, Any], predict: Path) -> dict[str, Any]:
    from servecast.calibration.fits.speculation_cells import fit_cells
    from servecast.readers.speculation_cells import read_cells
    from servecast.speculation_document import score_cells
    from servecast.speculation_sources import longest_draft, sweep_cells

    if flags["cells"] is None:
        raise ValueError("--predict needs --cells to fit")
    wanted = read_cells(predict, speed_required=False)
    cells = sweep_cells(flags["cells"], flags["sweep_acceptance"])
    fit = fit_cells(cells, max_length=longest_draft(wanted, predict))
    return {**score_cells(fit, wanted), "warnings": list(fit.dropped)}


def _score_text(document: dict[str, Any]) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    lines = [
        f"{len(document['cells'])} cells: mean absolute error {share(document['mape'])}, largest "
        f"{share(document['max_error'])}, regret at most {share(document['regret_max'])}, "
        f"{share(document['covered'])} inside their 90 % intervals",
        "",
        "  batch  length   predicted [tok/s]              measured     error",
    ]
    for one in document["cells"]:
        interval = f"{one['predicted_tok_s_per_request']:>8.2f} [{one['lo']:.2f}, {one['hi']:.2f}]"
        seen, known = (
            one["measured_tok_s_per_request"],
            one["measured_tok_s_per_request"] == one["measured_tok_s_per_request"],
        )
        tail = f"{seen:>8.2f}  {one['error']:>+7.2%}" if known else "       -"
        mark = "" if one["calibrated"] else "  extrapolated"
        lines.append(f"  {one['batch_size']:>5g} {one['draft_length']:>7}   {interval:<30}{tail}{mark}")
    return "\n".join([*lines, *(f"warning: {text}" for text in document["warnings"])])


class _Planned:
    """Everything that one command line asks for, in the order it is needed."""

    def __init__(self, flags: dict[str, Any]) -> None:
        from servecast.speculating import plan_speculation
        from servecast.speculation_document import policy_document
        from servecast.speculation_sources import SpeedRequest, speed_source

        self._flags = flags
        self.engine, self.version = _engine(flags["engine"])
        limits, load, rules = _limits(flags), _load(flags), _rules(flags, self.engine)
        shared = {name: flags[name] for name in SOURCE_FLAGS}
        self.source = speed_source(SpeedRequest(engine=self.engine, contexts=flags["context"], **shared))
        answer = plan_speculation(self.source.table, limits=limits, load=load, rules=rules)
        self.methods: Methods = ()
        remarks: tuple[str, ...] = () if self.source.fit is None else self.source.fit.dropped
        if flags["compare"]:
            _refuse_unlike(flags)
            self.methods, said = _compared(flags["compare"], answer, rules)
            remarks += said
        self.answer = replace(answer, warnings=(*answer.warnings, *remarks))
        self.policy = policy_document(self._policy_table(), allow_static=flags["allow_static"])

    @property
    def model(self) -> str | None:
        """In full where it was looked up, else as the user or the sweep names it."""
        name: str | None = self.source.model or self._flags["model"] or self.source.labels.get("model")
        return name

    def document(self) -> dict[str, Any]:
        """The documented JSON."""
        from servecast.speculation_document import plan_document

        return plan_document(
            self.answer,
            policy=self.policy,
            fit=self.source.fit,
            acceptance=self.source.acceptance,
            methods=self.methods,
        )

    def text(self) -> str:
        """The plan for eyes."""
        from servecast.speculation_document import plan_text

        return plan_text(
            self.answer,
            self.policy,
            self.source.name,
            fit=self.source.fit,
            acceptance=self.source.acceptance,
            methods=self.methods,
        )

    def _policy_table(self) -> Any:
        from datetime import UTC, datetime
        from importlib.metadata import version

        from servecast.speculation_document import speculation_table
        from servecast.speculation_sources import method_of

        flags = self._flags
        return speculation_table(
            self.answer,
            engine=self.engine,
            version=self.version,
            model=self.model,
            method=flags["method"] or method_of(self.source.labels.get("drafter", "")),
            draft_model=flags["draft_model"],
            data_parallel=flags["dp"],
            model_runner=flags["model_runner"],
            provenance={
                "servecast": version("servecast"),
                "profile": self.source.name,
                "acceptance": str(flags["acceptance"] or "the cells' own"),
                "date": datetime.now(UTC).date().isoformat(),
            },
        )


def _compared(texts: Sequence[str], answer: SpeculationAnswer, rules: ScheduleRules) -> tuple[Methods, tuple[str, ...]]:
    """Draft methods beside the planned one, and where their sweeps end."""
    from servecast.speculating import compare_methods, plan_speculation
    from servecast.speculation_sources import rival_source

    rivals, remarks, last = {"this": answer}, [], int(answer.table.batches[-1])
    for text in texts:
        name, path = _named(text)
        if name in rivals:
            raise ValueError(f"--compare must name every method once, got {name!r} twice")
        source = rival_source(path, last)
        measured = last if source.fit is None else int(source.fit.cells.batch.max())
        if measured < last:
            remarks.append(f"method {name} was measured up to batch size {measured} only: extrapolated beyond")
        rivals[name] = plan_speculation(
            source.table, limits=answer.limits, load=answer.load, rules=rules, explain=False
        )
    return tuple(compare_methods(rivals)), tuple(remarks)


def _refuse_unlike(flags: dict[str, Any]) -> None:
    """Methods are compared each by its own sweep: what changes one of them only would compare unlike things."""
    for name in ("context", "acceptance", "max_length"):
        if flags[name]:
            raise ValueError(f"--compare and --{name.replace('_', '-')} were both given; the rivals have sweeps alone")
    if flags["cells"] is None:
        raise ValueError("--compare needs --cells: a sweep is compared with sweeps")


def _engine(text: str) -> tuple[str, str]:
    from servecast.policies import parse_engine

    name, at, version = text.partition("@")
    engine, newest = parse_engine(name)
    return engine, version.strip() if at else newest


def _limits(flags: dict[str, Any]) -> DecodeLimits:
    from servecast.cli.units import parse_decode_limit
    from servecast.speculation_answers import DecodeLimits

    mean = step = None
    quantiles: list[tuple[float, float]] = []
    seen: set[str] = set()
    for text in flags["slo"]:
        name, percentile, limit_s = parse_decode_limit(text)
        if name in seen:
            raise ValueError(f"--slo {name} must be given once, got it twice")
        seen.add(name)
        if name == "tpot_mean":
            mean = limit_s
        elif name == "step":
            step = limit_s
        else:
            quantiles.append((percentile, limit_s))
    return DecodeLimits(
        tpot_mean_s=mean, tpot_quantiles=tuple(quantiles), step_s=step, output_tokens=flags["output_tokens"]
    )


def _load(flags: dict[str, Any]) -> Load | None:
    from servecast.cli.units import parse_quantity
    from servecast.speculation_answers import Load

    switch_s = parse_quantity(flags["switch_cost"], "duration", name="--switch-cost")
    if flags["rate"] is None:
        if switch_s:
            raise ValueError("--switch-cost needs --rate: how often the batch crosses an edge depends on the load")
        return None
    rate = parse_quantity(flags["rate"], "rate", name="--rate")
    return Load(rate_rps=rate, output_tokens=flags["output_tokens"], switch_s=switch_s)


def _rules(flags: dict[str, Any], engine: str) -> ScheduleRules:
    from servecast.speculation_answers import ScheduleRules

    operating = None
    if flags["operating"]:
        low, colon, high = flags["operating"].partition(":")
        if not (colon and low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= 100_000):
            raise ValueError(f"--operating must be LOW:HIGH batch sizes, got {flags['operating'][:40]!r}")
        operating = int(low), int(high)
    return ScheduleRules(
        max_lengths=flags["max_lengths"],
        max_segments=flags["max_segments"],
        non_increasing=engine == "trtllm",
        captured_only=engine == "sglang",
        allow_zero=not flags["no_zero"],
        operating=operating,
    )


def _named(text: str) -> tuple[str, Path]:
    """Name and file of a draft method to compare with."""
    name, equals, path = text.partition("=")
    if not (name.strip() and equals and path):
        raise ValueError(f"--compare must be NAME=CELLS.csv, got {text[:60]!r}")
    return name.strip(), Path(path)


def _write(out: Path | None, report: Path | None, found: _Planned) -> None:
    """All files or none of them."""
    from servecast.cli.output import write_all_atomic

    files = {} if out is None else {out / name: text for name, text in _engine_files(found).items()}
    if report is not None:
        if any(report.resolve() == path.resolve() for path in files):
            raise ValueError(f"--report must not be one of the engine's files, got {report}")
        files[report] = _page(found)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # last, so that a refusal leaves nothing behind
    write_all_atomic(files)
    for name in files:
        click.echo(f"wrote {name}", err=True)


def _engine_files(found: _Planned) -> dict[str, str]:
    if found.policy["missing"]:
        names = " and ".join(f"--{one.replace('_', '-')}" for one in found.policy["missing"])
        raise ValueError(f"{names} must be given for --out: an engine cannot load a file without it")
    return dict(found.policy["files"])


def _page(found: _Planned) -> str:
    import json

    from servecast.reports.speculation_page import speculation_page

    config = found.policy.get("speculative_config")
    files = found.policy["files"]
    text = json.dumps(config) if config is not None else next(iter(files.values()), None)
    return speculation_page(
        found.answer,
        title=found.model or found.source.name,
        source_lines=[("step times", found.source.name), *found.source.labels.items()],
        policy_text=text,
        engine=f"{found.engine} {found.version}",
        measured=None if found.source.fit is None else found.source.fit.cells,
    )

"""``servecast speculate``: draft length by batch size, from measured cells or a profile, as the engine's own file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servecast.cli.errors import guard

if TYPE_CHECKING:
    from servecast.calibration.fits.acceptance import AcceptanceFit
    from servecast.calibration.fits.speculation_cells import CellsFit
    from servecast.speculation_answers import DecodeLimits, Load, ScheduleRules, SpeculationAnswer
    from servecast.speculation_tables import SpeedTable

MAX_BATCH = 4096
"""Largest batch size that is planned for."""
MAX_LENGTH = 64
"""Longest draft that is planned or predicted. [tokens]"""


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
        from servecast.speculation_document import plan_text

        click.echo(
            plan_text(
                found.answer,
                found.policy,
                found.source,
                fit=found.fit,
                acceptance=found.acceptance,
                methods=found.methods,
            )
        )


def _scored(flags: dict[str, Any], predict: Path) -> dict[str, Any]:
    from servecast.calibration.fits.speculation_cells import fit_cells
    from servecast.readers.speculation_cells import read_cells
    from servecast.speculation_document import score_cells

    if flags["cells"] is None:
        raise ValueError("--predict needs --cells to fit")
    wanted = read_cells(predict, speed_required=False)
    longest = _longest_draft(wanted, predict)
    fit = fit_cells(_measured(flags), max_length=longest)
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


def _measured(flags: dict[str, Any]) -> Any:
    """The cells of --cells, with the acceptance of --sweep-acceptance where they carry none of their own."""
    from dataclasses import replace

    import numpy as np

    from servecast.model.acceptance import samples_by_length
    from servecast.readers.acceptance import read_acceptance
    from servecast.readers.speculation_cells import read_cells

    cells = read_cells(flags["cells"])
    _longest_draft(cells, flags["cells"])
    drafted = cells.gamma > 0
    if flags["sweep_acceptance"] is None:
        return cells
    if np.isfinite(cells.mean_acceptance_length[drafted]).any():
        raise ValueError("--sweep-acceptance and a column mean_acceptance_length were both given; take one away")
    pooled = samples_by_length(read_acceptance(flags["sweep_acceptance"]))
    known = {one.draft_length: one.mean_acceptance_length for one in pooled}
    length = [known.get(int(k), np.nan) if k else 1.0 for k in cells.gamma]
    return replace(cells, mean_acceptance_length=np.array(length))


def _longest_draft(cells: Any, path: Path) -> int:
    longest = int(cells.gamma.max())
    if longest > MAX_LENGTH:  # a fit has a parameter per length: time grows with their square
        raise ValueError(f"{path}: draft_length must be at most {MAX_LENGTH}, got {longest}")
    return longest


def _samples(flags: dict[str, Any]) -> Any:
    from servecast.readers.acceptance import read_acceptance
    from servecast.readers.acceptance_counters import counters_between, read_counters

    if flags["acceptance_before"] is not None:
        first, second = (
            read_counters(flags[name], model=flags["curve"]) for name in ("acceptance_before", "acceptance")
        )
        return [counters_between(first, second)]
    return read_acceptance(flags["acceptance"], curve=flags["curve"])


class _Planned:
    """Everything that one command line asks for, in the order it is needed."""

    def __init__(self, flags: dict[str, Any]) -> None:
        from dataclasses import replace

        from servecast.speculating import compare_methods, plan_speculation

        self._flags = flags
        self.model: str | None = flags["model"]
        self.fit: CellsFit | None = None
        self.acceptance: AcceptanceFit | None = None
        self.labels: dict[str, str] = {}
        self.remarks: tuple[str, ...] = ()
        self.engine, self.version = _engine(flags["engine"])
        limits, load, rules = _limits(flags), _load(flags), _rules(flags, self.engine)
        table = self._table()
        self.answer: SpeculationAnswer = plan_speculation(table, limits=limits, load=load, rules=rules)
        self.methods: tuple[tuple[str, float, Sequence[tuple[int, int]]], ...] = ()
        if flags["compare"]:
            _refuse_unlike(flags)
            rivals = {"this": self.answer}
            for text in flags["compare"]:
                name, rival, last = _rival(text, table.batches.size)
                if name in rivals:
                    raise ValueError(f"--compare must name every method once, got {name!r} twice")
                if last < table.batches.size:
                    self.remarks += (f"method {name} was measured up to batch size {last} only: extrapolated beyond",)
                rivals[name] = plan_speculation(rival, limits=limits, load=load, rules=rules, explain=False)
            self.methods = tuple(compare_methods(rivals))
        left_out = self._left_out()
        self.answer = replace(self.answer, warnings=(*self.answer.warnings, *left_out, *self.remarks))
        self.table = self._policy_table()
        from servecast.speculation_document import policy_document

        self.policy = policy_document(self.table, allow_static=flags["allow_static"])

    def _left_out(self) -> tuple[str, ...]:
        """Cells that the fit did not take."""
        return () if self.fit is None else self.fit.dropped

    def document(self) -> dict[str, Any]:
        from servecast.speculation_document import plan_document

        return plan_document(
            self.answer, policy=self.policy, fit=self.fit, acceptance=self.acceptance, methods=self.methods
        )

    def _table(self) -> SpeedTable:
        flags = self._flags
        sources = [flags["cells"] is not None, flags["step_cost"] is not None]
        if sum(sources) > 1:
            raise ValueError("--cells and --step-cost were both given; costs come from one of them")
        if flags["cells"] is not None:
            return self._from_cells()
        if flags["acceptance"] is None:
            raise ValueError(
                "--acceptance must be given where there are no --cells: nothing else says what is accepted"
            )
        if flags["step_cost"] is not None:
            return self._from_table()
        if flags["model"] and flags["gpu"]:
            return self._from_profile()
        raise ValueError("--cells, --step-cost, or --model with --gpu must be given: where step times come from")

    def _from_cells(self) -> SpeedTable:
        import numpy as np

        from servecast.calibration.fits.speculation_cells import fit_cells
        from servecast.readers.speculation_cells import read_labels
        from servecast.speculation_tables import table_from_cells, with_contexts

        flags = self._flags
        self.source = str(flags["cells"])
        self.labels = read_labels(flags["cells"])
        cells = _measured(flags)
        max_length = flags["max_length"] or int(cells.gamma.max())
        max_batch = flags["max_batch"] or _largest(float(cells.batch.max()))
        self.fit = fit_cells(cells, max_length=max_length)
        curve = None
        if flags["acceptance"] is not None:
            self.acceptance = _fitted_acceptance(_samples(flags), max_length)
            curve = self.acceptance.curve
        contexts = np.unique(flags["context"]) if flags["context"] else None
        own = contexts if self.fit.has_context else None
        table = table_from_cells(self.fit, max_batch=max_batch, max_length=max_length, contexts=own, curve=curve)
        if contexts is None or own is not None:
            return table
        if not (flags["model"] and flags["gpu"]):
            raise ValueError("--context needs a context_tokens column in the cells, or --model and --gpu")
        known = self.fit.reference_context if np.isfinite(cells.context).any() else None
        return with_contexts(table, contexts, **_cache(flags, self.engine, known))

    def _from_table(self) -> SpeedTable:
        import numpy as np

        from servecast.readers.step_costs import read_step_cost
        from servecast.speculation_tables import table_from_cost, with_contexts

        flags = self._flags
        self.source = str(flags["step_cost"])
        cost = read_step_cost(flags["step_cost"], parallel=(flags["method"] or "") in PARALLEL_METHODS)
        table = table_from_cost(
            cost,
            self._curve(),
            max_batch=flags["max_batch"] or _largest(float(cost.draft_requests[-1])),
            max_length=self._longest(),
            cost_sd=0.03,
            largest_rows=float(cost.rows[-1]),
        )
        if not flags["context"]:
            return table
        return with_contexts(table, np.unique(flags["context"]), **_cache(flags, self.engine, None))

    def _from_profile(self) -> SpeedTable:
        import numpy as np

        from servecast.calibration.profile import SHIPPED, load_profile
        from servecast.model.profiled_speculation import ProfiledCost
        from servecast.readers.catalogues import llm
        from servecast.speculation_tables import table_from_cost

        flags = self._flags
        name = flags["profile"] or SHIPPED
        drafter = llm(flags["draft_model"]) if flags["method"] == "draft_model" and flags["draft_model"] else None
        target = _deployment(flags, self.engine)
        cost = ProfiledCost(load_profile(name), target, self.engine, drafter)
        self.source = f"profile {name}, {target.llm.name} on {target.gpu.name} tp{target.tp}"
        return table_from_cost(
            cost,
            self._curve(),
            max_batch=flags["max_batch"] or 256,
            max_length=self._longest(),
            contexts=np.unique(flags["context"] or (1024.0,)),
            cost_sd=cost.log_sd,
        )

    def _longest(self) -> int:
        return int(self._flags["max_length"] or max(one.draft_length for one in _samples(self._flags)))

    def _curve(self) -> Any:
        self.acceptance = _fitted_acceptance(_samples(self._flags), self._longest())
        return self.acceptance.curve

    def _policy_table(self) -> Any:
        from datetime import UTC, datetime
        from importlib.metadata import version

        from servecast.speculation_document import speculation_table

        flags = self._flags
        return speculation_table(
            self.answer,
            engine=self.engine,
            version=self.version,
            model=flags["model"] or self.labels.get("model"),
            method=flags["method"] or method_of(self.labels.get("drafter", "")),
            draft_model=flags["draft_model"],
            data_parallel=flags["dp"],
            model_runner=flags["model_runner"],
            provenance={
                "servecast": version("servecast"),
                "profile": self.source,
                "acceptance": str(flags["acceptance"] or "the cells' own"),
                "date": datetime.now(UTC).date().isoformat(),
            },
        )


PARALLEL_METHODS = frozenset({"dspark", "dflash"})
"""Draft methods that yield all positions in one pass."""


def method_of(drafter: str) -> str:
    """Draft method of a label such as "EAGLE3" or "DSpark"; eagle3 where the label says nothing."""
    folded = drafter.lower().replace("-", "").replace(" ", "")
    known = ("eagle3", "eagle", "dspark", "dflash", "mtp", "ngram", "suffix")
    return next((name for name in known if name in folded), "eagle3")


def _refuse_unlike(flags: dict[str, Any]) -> None:
    """Methods are compared each by its own sweep: what changes one of them only would compare unlike things."""
    for name in ("context", "acceptance", "max_length"):
        if flags[name]:
            raise ValueError(f"--compare and --{name.replace('_', '-')} were both given; the rivals have sweeps alone")
    if flags["cells"] is None:
        raise ValueError("--compare needs --cells: a sweep is compared with sweeps")


def _largest(measured: float) -> int:
    """Largest batch size of a plan without --max-batch: the largest measured, as far as a plan goes."""
    return int(min(max(measured, 1.0), MAX_BATCH))


def _cache(flags: dict[str, Any], engine: str, known: float | None) -> dict[str, float]:
    """Seconds of a cached token, and the context that the costs were measured at."""
    target = _deployment(flags, engine)
    reference = flags["measured_context"] if flags["measured_context"] is not None else known
    if reference is None:
        raise ValueError("--context needs --measured-context: the cached tokens that the costs were measured at")
    per_token = target.kv_bytes_per_token_per_gpu() / target.gpu.bandwidth_bytes_per_s
    return {"cached_token_s": per_token, "reference": reference}


def _fitted_acceptance(samples: Any, max_length: int) -> AcceptanceFit:
    from servecast.calibration.fits.acceptance import fit_acceptance

    return fit_acceptance(samples, max_length=max(max_length, max(one.draft_length for one in samples)))


def _engine(text: str) -> tuple[str, str]:
    from servecast.policies import parse_engine

    name, at, version = text.partition("@")
    engine, newest = parse_engine(name)
    return engine, version.strip() if at else newest


def _deployment(flags: dict[str, Any], engine: str) -> Any:
    from servecast.readers.deployments import deployment

    if not (flags["model"] and flags["gpu"]):
        raise ValueError("--model and --gpu must be given for the cost of the cache")
    return deployment(flags["model"], flags["gpu"], engine, flags["precision"], tp=flags["tp"])


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


def _rival(text: str, max_batch: int) -> tuple[str, SpeedTable, int]:
    """Name of a method, its table, and the largest batch size it was measured at."""
    from servecast.calibration.fits.speculation_cells import fit_cells
    from servecast.readers.speculation_cells import read_cells
    from servecast.speculation_tables import table_from_cells

    name, equals, path = text.partition("=")
    if not (name.strip() and equals and path):
        raise ValueError(f"--compare must be NAME=CELLS.csv, got {text[:60]!r}")
    fit = fit_cells(read_cells(Path(path)))
    table = table_from_cells(fit, max_batch=max_batch, max_length=fit.max_length)
    return name.strip(), table, int(fit.cells.batch.max())


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
        title=found.labels.get("model") or found.model or found.source,
        source_lines=[("step times", found.source), *((key, value) for key, value in found.labels.items())],
        policy_text=text,
        engine=f"{found.engine} {found.version}",
        measured=None if found.fit is None else found.fit.cells,
    )

"""``servecast validate``: predictions against a live run, with budgets written beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from servecast.cli.errors import guard

if TYPE_CHECKING:
    from servecast.validation.validated import Validated
    from servecast.validation.verdicts import Comparison

EXIT_BROKEN, EXIT_NOT_JUDGED = 1, 3


@click.command("validate")
@click.argument("scenario", required=False)
@click.option("--quick", is_flag=True, help="The shipped scenario torch-quick: three minutes on two cores.")
@click.option("--device", default="cpu", show_default=True, help="Of the PyTorch engine: cpu or cuda.")
@click.option("--vllm-python", help="Interpreter of an environment that has vLLM; default: $SERVECAST_VLLM_PYTHON.")
@click.option("--seed", type=int, help="Instead of the scenario's: order of points and loads.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML page.")
@click.option("--out", type=click.Path(path_type=Path), help="One row per request: .csv, .csv.gz or .parquet.")
@click.option("--list", "list_", is_flag=True, help="The shipped scenarios.")
@click.option("--show", help="Print a shipped scenario's YAML, to start one of your own from.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@guard()
def command(
    scenario: str | None,
    quick: bool,
    device: str,
    vllm_python: str | None,
    seed: int | None,
    report: Path | None,
    out: Path | None,
    list_: bool,
    show: str | None,
    as_json: bool,
) -> None:
    """Run SCENARIO (a file, or a shipped name) live, in closed form and in the simulator, and compare.

    Exit status: 0 every budget holds; 1 one is broken; 2 bad input; 3 not judged: too noisy, too short, too many
    requests that failed, or no budget written.
    """
    from servecast.cli.output import require_writable, to_json, write_all_atomic
    from servecast.cli.tables import require_table_name, table_bytes
    from servecast.validating import load_scenario, result_document, samples_table, validate
    from servecast.validation.scenario import shipped_scenarios, shipped_text
    from servecast.validation.verdicts import Verdict

    if list_:
        _list(as_json)
        return
    if show is not None:
        if show not in shipped_scenarios():
            raise ValueError(f"--show must be one of {', '.join(shipped_scenarios())}, got {show!r}")
        click.echo(shipped_text(show), nl=False)
        return
    if quick == (scenario is not None):
        raise ValueError("give one SCENARIO, or --quick; --list names the shipped ones")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    suffix = "" if out is None else require_table_name(out)
    if report is not None and report.suffix != ".html":
        raise ValueError(f"--report must end in .html, got {report.name!r}")
    for path in (one for one in (report, out) if one is not None):
        require_writable(path)
    loaded, folder = load_scenario("torch-quick" if scenario is None else scenario)
    if seed is not None:
        if seed < 0:
            raise ValueError(f"--seed must be >= 0, got {seed}")
        loaded = loaded.model_copy(update={"seed": seed})
    with _phases() as say:
        found = validate(loaded, folder=folder, device=device, vllm_python=vllm_python, progress=say)
    files: dict[Path, str | bytes] = {}
    if report is not None:
        from servecast.reports.validation_page import validation_page

        files[report] = validation_page(found)
    if out is not None:
        files[out] = table_bytes(samples_table(found), suffix)
    write_all_atomic(files)
    click.echo(to_json(result_document(found)) if as_json else validation_text(found), nl=not as_json)
    for path in files:
        click.echo(f"wrote {path}", err=True)
    status = {Verdict.BROKEN: EXIT_BROKEN, Verdict.NOT_JUDGED: EXIT_NOT_JUDGED}.get(found.verdict, 0)
    if status:
        raise SystemExit(status)


def _list(as_json: bool) -> None:
    """Names and what they are for."""
    from servecast.cli.output import to_json
    from servecast.validating import load_scenario
    from servecast.validation.scenario import shipped_scenarios

    records = [{"name": name, "about": load_scenario(name)[0].about} for name in shipped_scenarios()]
    if as_json:
        click.echo(to_json({"schema": "servecast.list/1", "scenarios": records}), nl=False)
        return
    for one in records:
        click.echo(f"{one['name']:<14} {one['about'].strip().split('. ')[0].rstrip('.')}")


@contextmanager
def _phases() -> Iterator[Callable[[str, int, int], None] | None]:
    """One bar after another: a phase's bar starts with its first report and goes with the next phase's."""
    from contextlib import ExitStack

    from servecast.cli.output import Report, progress

    with ExitStack() as stack:
        state: dict[str, Report | None] = {}

        def say(phase: str, done: int, total: int) -> None:
            if phase not in state:
                stack.close()
                state.clear()
                state[phase] = stack.enter_context(progress(phase))
            report = state[phase]
            if report is not None:
                report(done, total)

        yield say


def validation_text(found: Validated) -> str:
    """The comparison for eyes: what has a budget, and the loads' other figures."""
    engine = found.facts.engine
    about = ", ".join(
        str(engine[one]) for one in ("engine", "version", "torch", "device") if engine.get(one) not in (None, "")
    )
    lines = [f"{found.scenario.name}: {found.verdict.value}", f"  {about}"]
    if found.facts.fit is not None:
        fit = found.facts.fit
        lines.append(
            f"  steps: {fit.medians.seconds.size} points, form {fit.form}, error on left-out row counts "
            f"{fit.held_out[fit.form]:.1%}, scatter {fit.noise_cv:.1%}, drift between rounds {fit.drift_cv:.1%}"
        )
    shown = [one for one in found.comparisons if one.budget is not None or not one.part.endswith(("steps", "length"))]
    # a server that is not ours has no plain model beside it, and nobody probes its noise
    beside = (any(one.baseline is not None for one in shown), any(one.noise == one.noise for one in shown))
    part = ""
    for one in shown:
        if one.part != part:
            part = one.part
            lines.append(f"{part}" + (f" ({one.group})" if one.group else ""))
            lines.append(_columns("", "predicted", "measured", "error", ("naive", "noise"), "budget", beside=beside))
        lines.append(_line(one, beside))
    lines += [f"not reached: {one}" for one in found.missing]
    lines += [f"not judged: {one}" for one in found.reasons]
    lines += [f"stopped: {found.facts.stopped}"] if found.facts.stopped else []
    lines += [f"note: {one}" for one in found.facts.notes]
    lines.append(f"took {found.wall_s:.0f} s")
    return "\n".join(lines)


def _line(one: Comparison, beside: tuple[bool, bool]) -> str:
    name = one.metric if one.executor in ("fit", "solver", "policy") else f"{one.metric}, {one.executor}"
    share = one.unit not in ("tokens", "blocks")
    predicted = "" if one.predicted != one.predicted else _value(one.predicted, one.unit)
    if one.lo == one.lo and one.hi > one.lo:
        predicted += f" [{_value(one.lo, one.unit)}, {_value(one.hi, one.unit)}]"
    measured = "" if one.measured != one.measured else _value(one.measured, one.unit)
    budget = "" if one.budget is None else (f"{one.budget:.0%}" if share else f"{one.budget:.3g}")
    naive = "" if one.baseline is None else _error(one.baseline, share)
    noise = "" if one.noise != one.noise else f"{one.noise:.1%}"
    line = _columns(name, predicted, measured, _error(one.error, share), (naive, noise), budget, beside=beside)
    return line if one.budget is None else f"{line} {one.verdict.value}"


def _columns(
    name: str,
    predicted: str,
    measured: str,
    error: str,
    others: tuple[str, str],
    budget: str,
    *,
    beside: Sequence[bool],
) -> str:
    """One line of the table; of the `others` only those that are there."""
    kept = "".join(f" {text:>8}" for text, there in zip(others, beside, strict=True) if there)
    return f"  {name:<44} {predicted:>30} {measured:>10} {error:>8}{kept} {budget:>7}".rstrip()


def _error(value: float, share: bool) -> str:
    if value != value:
        return "-"
    return f"{value:+.1%}" if share else f"{value:+.3g}"


def _value(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.4g}"
    return f"{value:.4g} s" if value >= 1.0 else f"{1e3 * value:.4g} ms"

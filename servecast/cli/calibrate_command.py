"""``servecast calibrate``: microbenchmarks of the machine it runs on, fits, and a machine profile."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servecast.cli.errors import EXIT_INTERRUPTED, guard

if TYPE_CHECKING:
    from servecast.calibration.machine_document import MachineDocument
    from servecast.calibration.microbenchmarks.journal import Header, Sample
    from servecast.calibration.microbenchmarks.session import Outcome

FITS_SHARE, MOST_FITS_S = 0.05, 3.0
"""Share of the budget that is kept for fits and files, and the most of it. [s]"""


@click.command("calibrate")
@click.option("--budget", default="60s", show_default=True, help="Time in all, such as 60s or 3min.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--memory", default="2GiB", show_default=True, help="Most memory for buffers.")
@click.option("--only", help="Groups: gemm, attention, layer, overhead, memory, copies, disk, collectives.")
@click.option("--threads", type=int, help="Threads of the kernels; physical cores unless given.")
@click.option("--out", type=click.Path(path_type=Path), help="Machine profile to write, FILE.json.")
@click.option("--samples", type=click.Path(path_type=Path), help="Journal of samples; one that exists is gone on with.")
@click.option("--from-samples", type=click.Path(path_type=Path), help="Fit samples that are there; needs no torch.")
@click.option("--report", type=click.Path(path_type=Path), help="HTML page with curves and residuals.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of data, of the order and of places on disk.")
@click.option("--name", help="Name of the profile; that of --out unless given.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
@guard()
def command(as_json: bool, **flags: Any) -> None:
    """Measure this machine and fit what the model needs: GEMM, attention, memory, copies, disk, collectives.

    Nothing is written without --out, --samples or --report. With --samples, Ctrl-C loses nothing: the same command goes
    on from there.
    """
    from time import perf_counter

    begun_s = perf_counter()
    _refuse_odd(flags)
    header, samples, outcome, budget_s = _samples(flags, begun_s)
    if outcome is not None:
        _remark(outcome, header, flags["samples"])
    if outcome is not None and outcome.interrupted and flags["samples"] is not None:
        raise SystemExit(EXIT_INTERRUPTED)
    document = _finish(flags, header, samples, budget_s)
    from servecast.calibration.machine_document import dumps

    click.echo(dumps(document) if as_json else calibration_text(document), nl=not as_json)
    for key in ("out", "report"):
        if flags[key] is not None:
            click.echo(f"wrote {flags[key]}", err=True)
    if not as_json:
        click.echo(f"took {perf_counter() - begun_s:.2f} s", err=True)
    if outcome is not None and outcome.interrupted:
        raise SystemExit(EXIT_INTERRUPTED)


def _refuse_odd(flags: dict[str, Any]) -> None:
    """Before anything is measured: names and places that cannot be."""
    from servecast.cli.flags import given_flags
    from servecast.cli.output import require_writable

    out = flags["out"]
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {out.name!r}")
    if flags["report"] is not None and flags["report"].suffix != ".html":
        raise ValueError(f"--report must end in .html, got {flags['report'].name!r}")
    for key in ("out", "report", "samples"):
        if flags[key] is not None:
            require_writable(flags[key])
    if out is not None:
        require_writable(_beside(out))
    if flags["from_samples"] is not None:
        odd = given_flags(["budget", "device", "memory", "only", "threads", "samples", "seed"])
        if odd:
            raise ValueError(f"--from-samples must stand without {odd[0]}: nothing is measured")
    name = _name(flags)
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or not name.isascii() or len(name) > 64:
        raise ValueError(f"--name must be letters, digits, '.', '-' and '_', at most 64, got {name[:80]!r}")


def _name(flags: dict[str, Any]) -> str:
    if flags["name"] is not None:
        return str(flags["name"])
    return str(flags["out"].stem) if flags["out"] is not None else "machine"


def _beside(out: Path) -> Path:
    """The file of samples of a profile."""
    return out.with_name(f"{out.stem}.samples.jsonl.gz")


def _samples(flags: dict[str, Any], begun_s: float) -> tuple[Header, list[Sample], Outcome | None, float]:
    """Samples that are there, or measured now, and the budget that they were measured in. [s]"""
    from servecast.calibration.microbenchmarks.journal import read_journal

    if flags["from_samples"] is not None:
        path = flags["from_samples"]
        if not path.is_file():
            raise ValueError(f"--from-samples must be a file, got {path.name!r}")
        header, samples = read_journal(path)
        return header, samples, None, float(header.environment.get("budget_s", 0.0)) or 60.0

    from servecast.calibration.microbenchmarks.suite import (
        GROUPS,
        Settings,
        parse_budget,
        parse_groups,
        parse_memory,
    )

    budget_s = parse_budget(flags["budget"])
    settings = Settings(
        budget_s=budget_s - min(FITS_SHARE * budget_s, MOST_FITS_S),
        device=flags["device"],
        memory_bytes=parse_memory(flags["memory"]),
        groups=GROUPS if flags["only"] is None else parse_groups(flags["only"]),
        threads=flags["threads"],
        seed=flags["seed"],
    )
    return (*_measured(settings, flags["samples"], begun_s, budget_s), budget_s)


def _measured(
    settings: Any, path: Path | None, begun_s: float, budget_s: float
) -> tuple[Header, list[Sample], Outcome]:
    from tempfile import TemporaryDirectory

    from servecast.calibration.fits.machine import choose_next
    from servecast.calibration.microbenchmarks.suite import measure
    from servecast.cli.output import progress

    with TemporaryDirectory(prefix="servecast-calibrate-") as folder, progress("measuring") as report:
        journal, outcome = measure(
            settings,
            path if path is not None else Path(folder) / "samples.jsonl",
            environment={"date": _today(), "budget_s": budget_s},
            begun_s=begun_s,
            choose=choose_next,
            progress=report,
        )
    return journal.header, journal.samples, outcome


def _remark(outcome: Outcome, header: Header, samples: Path | None) -> None:
    """What the user has to know of the session, on stderr."""
    load, cores = header.environment.get("load", 0.0), header.environment.get("cores", 1)
    if isinstance(load, float) and load > 0.5 * float(cores):
        click.echo(
            f"note: other work ran on this machine (load {load:g} on {cores} cores); times scatter more", err=True
        )
    for suspect in outcome.suspects:
        click.echo(f"warning: samples are marked and left out: {suspect}", err=True)
    if outcome.left_out:
        click.echo(f"note: {outcome.left_out} points do not fit the budget or the memory and were left out", err=True)
    if not outcome.interrupted:
        return
    if samples is None:
        click.echo("servecast: interrupted: the profile holds what was measured until then", err=True)
    else:
        click.echo(
            f"servecast: interrupted: {outcome.samples} new samples are in {samples}; the same command goes on there",
            err=True,
        )


def _finish(flags: dict[str, Any], header: Header, samples: Sequence[Sample], budget_s: float) -> MachineDocument:
    """Fits, document, and all files at once."""
    from importlib.metadata import version

    from servecast.calibration.fits.machine import fit_machine
    from servecast.calibration.machine_document import dumps, machine_document, samples_bytes
    from servecast.cli.output import write_all_atomic

    fits = fit_machine(samples)
    name, out = _name(flags), flags["out"]
    document = machine_document(
        name,
        fits,
        header,
        samples,
        samples_file=_beside(out).name if out is not None else f"{name}.samples.jsonl.gz",
        date=str(header.environment.get("date", "unknown")),
        command=_command(flags),
        servecast=version("servecast"),
        budget_s=budget_s,
        remarks=sorted({one.suspect for one in samples if one.suspect}),
    )
    files: dict[Path, str | bytes] = {}
    if out is not None:
        files[out] = dumps(document)
        files[_beside(out)] = samples_bytes(header, samples)
    if flags["report"] is not None:
        from servecast.reports.calibration_page import calibration_page

        files[flags["report"]] = calibration_page(document, samples)
    write_all_atomic(files)
    return document


def _command(flags: dict[str, Any]) -> str:
    """The command line with files by their names: a path tells where on the machine, and nothing of the numbers."""
    from servecast.cli.flags import given_flags

    parts = ["servecast", "calibrate"]
    for flag in given_flags([name for name in flags if flags[name] is not None]):
        value = flags[flag.removeprefix("--").replace("-", "_")]
        parts += [flag, shlex.quote(value.name if isinstance(value, Path) else str(value))]
    return " ".join(parts)


def _today() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).date().isoformat()


def calibration_text(document: MachineDocument) -> str:
    """The profile for eyes."""
    from servecast.cli.profile_command import machine_text

    return machine_text(document)

"""``servecast profile show | diff | check``: profiles of engines and of machines, for people and for scripts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servecast.cli.errors import EXIT_USER_ERROR, describe, guard, one_line

if TYPE_CHECKING:
    from servecast.calibration.machine_document import MachineDocument
    from servecast.calibration.profile import ProfileDocument

MOST_BYTES = 16 * 2**20


@click.group("profile")
def command() -> None:
    """Show, compare and check profiles: shipped names, or files of either schema."""


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the document as JSON.")
@guard()
def show(name: str, as_json: bool) -> None:
    """What a profile holds: parameters with intervals, where they come from."""
    document = load(name)
    if as_json:
        click.echo(document.model_dump_json(by_alias=True, indent=2))
    else:
        click.echo(machine_text(document) if _is_machine(document) else _profile_text(document))


@command.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@guard()
def diff(a: str, b: str, as_json: bool) -> None:
    """Parameters of two profiles whose 90 % intervals disagree, and the share that agrees.

    Two values agree where their difference is within its own 90 % interval: a stricter rule than that the two intervals
    overlap.
    """
    first, second = load(a), load(b)
    if first.schema_ != second.schema_:
        raise ValueError(f"profiles must be of one schema, got {first.schema_} and {second.schema_}")
    found = compare(_values(first), _values(second))
    if as_json:
        from servecast.cli.output import to_json

        click.echo(
            to_json({"schema": "servecast.profile_diff/1", "a": first.name, "b": second.name, **found}), nl=False
        )
    else:
        click.echo(_diff_text(first.name, second.name, found))


@command.command("check")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@guard()
def check(file: str, as_json: bool) -> None:
    """Whether a file is a complete profile: schema, ranges, and the samples beside it. Exit status 0 or 2."""
    try:
        document = load(file)
        notes = _findings(document, _place(file))
    except (ValueError, OSError) as error:
        if as_json:
            from servecast.cli.output import to_json

            what = one_line(describe(error))
            click.echo(to_json({"schema": "servecast.profile_check/1", "valid": False, "error": what}), nl=False)
            raise SystemExit(EXIT_USER_ERROR) from None
        raise
    if as_json:
        from servecast.cli.output import to_json

        result = {"valid": True, "profile": document.name, "document": document.schema_, "notes": notes}
        click.echo(to_json({"schema": "servecast.profile_check/1", **result}), nl=False)
        return
    click.echo(f"{document.name}: a valid {document.schema_}")
    for note in notes:
        click.echo(f"  {note}")


def _place(name: str) -> Path:
    """The file itself; where a shipped profile lies."""
    from servecast.calibration.machine_profile import shipped_machines

    return shipped_machines().get(name, Path(name))


def load(name: str) -> MachineDocument | ProfileDocument:
    """A document of either schema, by shipped name or from a file; one line as ValueError where it is neither."""
    from servecast.calibration.machine_profile import read_machine, shipped_machines
    from servecast.calibration.profile import read_document, shipped_profiles

    path = Path(name)
    if name in shipped_profiles():
        return read_document(name)
    if name in shipped_machines():
        return read_machine(name)
    if not path.is_file():
        known = ", ".join((*shipped_profiles(), *shipped_machines()))
        raise ValueError(f"profile must be a file or one of {known}, got {name[:80]!r}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{name}: a profile must be at most {MOST_BYTES >> 20} MiB, got {path.stat().st_size} bytes")
    schema = _schema(path)
    if schema == "servecast.machine/1":
        return read_machine(path)
    if schema == "servecast.profile/1":
        return read_document(name)
    raise ValueError(f"{name}: schema must be servecast.profile/1 or servecast.machine/1, got {str(schema)[:40]!r}")


def _schema(path: Path) -> object:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: must be JSON in UTF-8") from None
    return raw.get("schema") if isinstance(raw, dict) else None


def _is_machine(document: Any) -> Any:
    return document.schema_ == "servecast.machine/1"


def _findings(document: Any, path: Path) -> list[str]:
    """What is worth saying of a valid document; ValueError where it is not complete."""
    if not _is_machine(document):
        from servecast.calibration.profile import from_document

        from_document(document)
        return [f"{len(document.kernels)} kernel sets, {len(document.engines)} sets of engine constants, complete"]
    from servecast.calibration.machine_profile import check_samples

    found = {"absent": "is not beside it", "matches": "beside it has the recorded sha256"}
    notes = [f"{document.samples.file} {found[check_samples(document, path.parent)]}"]
    kernels = {one.kernel for one in document.fits}
    lacking = [one for one in ("gemm", "decode_attention", "prefill_attention", "memory_copy") if one not in kernels]
    notes.append(f"{len(document.fits)} fits" + (f"; none of {', '.join(lacking)}" if lacking else ", complete"))
    unknown = [key for key, one in _values(document).items() if one.log_half > math.log(3.0)]
    if unknown:
        notes.append(f"known within a factor of 3 only or less: {', '.join(unknown)}")
    return notes


# ---- comparison --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One parameter for a comparison."""

    value: float
    log_half: float
    """Half of the 90 % interval, in logs; of the value itself where it is not positive."""
    unit: str


def _values(document: Any) -> dict[str, Value]:
    if _is_machine(document):
        from servecast.calibration.machine_profile import intervals

        return {
            key: Value(value=one.value, log_half=0.5 * math.log(one.hi / one.lo), unit=one.unit)
            for key, one in intervals(document).items()
        }
    from servecast.model.prediction import Z90

    return {
        f"{engine.engine}.{'moe' if engine.mixture_of_experts else 'dense'}."
        f"{'measured' if engine.kernels_measured else 'closed'}.{name}": Value(
            value=one.value, log_half=Z90 * abs(one.relative_standard_error), unit=one.unit
        )
        for engine in document.engines
        for name, one in engine.constants.items()
    }


def compare(a: dict[str, Value], b: dict[str, Value]) -> dict[str, Any]:
    """Shared parameters: how many agree, which do not; parameters that only one has (another form was chosen)."""
    shared = [key for key in a if key in b]
    rows = [_compared(key, a[key], b[key]) for key in shared]
    agree = sum(row["agree"] for row in rows)
    return {
        "shared": len(shared),
        "agree": agree,
        "share_agree": agree / len(shared) if shared else math.nan,
        "disagree": [row for row in rows if not row["agree"]],
        "only_a": [key for key in a if key not in b],
        "only_b": [key for key in b if key not in a],
    }


def _compared(key: str, a: Value, b: Value) -> dict[str, Any]:
    half = math.hypot(a.log_half, b.log_half)
    apart = abs(a.value - b.value)
    if a.value > 0.0 and b.value > 0.0:
        apart = abs(math.log(a.value / b.value))
        ratio = b.value / a.value
    else:
        ratio, half = math.nan, half * max(abs(a.value), abs(b.value))
    agree = apart <= half or a.value == b.value
    return {"parameter": key, "a": a.value, "b": b.value, "unit": a.unit, "ratio": ratio, "agree": agree}


def _diff_text(a: str, b: str, found: dict[str, Any]) -> str:
    share = found["share_agree"]
    said = f"{share:.1%}" if math.isfinite(share) else "none shared"
    lines = [f"{a} and {b}: {found['agree']} of {found['shared']} parameters agree ({said})"]
    width = max((len(row["parameter"]) for row in found["disagree"]), default=0)
    for row in found["disagree"]:
        lines.append(f"  {row['parameter']:<{width}}  {row['a']:.4g} -> {row['b']:.4g} {row['unit']}")
    for key, name in (("only_a", a), ("only_b", b)):
        if found[key]:
            lines.append(f"only in {name}: {', '.join(found[key])}")
    return "\n".join(lines)


# ---- text --------------------------------------------------------------------------------------------


def machine_text(document: Any) -> str:
    """Every parameter with its 90 % interval, and how good each fit is."""
    origin = document.provenance
    lines = [
        f"{document.name}: {origin.device}, {origin.settings.get('threads', '?')} threads, {origin.date}, "
        f"{document.samples.count} samples",
        "                                       value  90 % interval",
    ]
    for fit in document.fits:
        lines.append(
            f"{fit.kernel} {fit.dtype}: {fit.form}, {fit.points} points, {fit.rounds} rounds, "
            f"error {fit.error:.1%}, drift {fit.drift:.1%}{_rivals(fit)}"
        )
        for name, one in fit.parameters.items():
            lines.append(f"  {name:<30}{one.value:>12.4g}  {one.lo:.4g} to {one.hi:.4g} {one.unit}".rstrip())
    lines += [f"warning: {remark}" for remark in origin.remarks]
    return "\n".join(lines)


def _rivals(fit: Any) -> str:
    """Held-out errors of the forms that were not chosen."""
    others = [f"{name} {one.mean_abs_log:.1%}" for name, one in fit.held_out.items() if name != fit.form]
    own = fit.held_out.get(fit.form)
    return "" if own is None else f"; held out {own.mean_abs_log:.1%}" + (f" ({', '.join(others)})" if others else "")


def _profile_text(document: Any) -> str:
    origin = document.provenance
    lines = [
        f"{document.name}: {', '.join(origin.devices)}, {origin.date}, {origin.runs_fitted} runs fitted",
        f"  kernels  {', '.join(one.name for one in document.kernels)}",
    ]
    for key, one in _values(document).items():
        error = f"+- {one.log_half:.0%}" if one.log_half else ""
        lines.append(f"  {key:<52}{one.value:>12.4g} {one.unit:<12}{error}".rstrip())
    return "\n".join(lines)

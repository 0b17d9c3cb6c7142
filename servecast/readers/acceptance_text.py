"""What the readers of acceptance files share: bounded text, numbers, and refusals that name file and place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from servecast.model.acceptance import AcceptanceSample
from servecast.readers.bounded_text import read_bounded
from servecast.readers.trace_formats import shown

MAX_BYTES = 64 << 20
"""A log of a million requests fits; a larger one wants cutting, not memory."""
MAX_DRAFT_LENGTH = 1024
"""No engine drafts as far; a larger number is a slip, and would size every array."""


def read_text(path: Path) -> str:
    """Whole file as text; refused where it is no file, too large, empty or not UTF-8."""
    return read_bounded(path, most_bytes=MAX_BYTES, kind="an acceptance file")


def number(place: str, name: str, value: object) -> float:
    """Finite number from text or from a parsed document."""
    # Python reads 1_0 as ten and true as one
    plain = not isinstance(value, bool) and "_" not in str(value)[:100]
    found = _float(value) if plain and isinstance(value, int | float | str) else math.nan
    if not math.isfinite(found):
        raise ValueError(f"{place}, field {name} must be a finite number, got {shown(value)}")
    return found


def count(place: str, name: str, value: object, *, least: int = 0) -> int:
    """Whole number of at least `least`."""
    found = number(place, name, value)
    if found != int(found) or found < least:
        raise ValueError(f"{place}, field {name} must be a whole number of at least {least}, got {shown(value)}")
    return int(found)


def draft_length(place: str, name: str, value: object, *, least: int = 1) -> int:
    """Whole number within what engines can draft."""
    found = count(place, name, value, least=least)
    if found > MAX_DRAFT_LENGTH:
        raise ValueError(f"{place}, field {name} must be at most {MAX_DRAFT_LENGTH}, got {shown(value)}")
    return found


def sample(
    place: str,
    *,
    draft_length: int,
    mean_acceptance_length: float,
    standard_error: float | None = None,
    survival: Sequence[float] | None = None,
    rounds: int | None = None,
) -> AcceptanceSample:
    """The record, its refusals prefixed with the place in the file."""
    try:
        return AcceptanceSample(
            draft_length=draft_length,
            mean_acceptance_length=mean_acceptance_length,
            standard_error=standard_error,
            survival=None if survival is None else tuple(survival),
            rounds=rounds,
        )
    except ValueError as error:
        raise ValueError(f"{place}, field {error}") from None


def choose(path: Path, names: Sequence[str], wanted: str | None) -> str:
    """The curve asked for, or the only one; otherwise a refusal that lists them."""
    listed = ", ".join(shown(name)[1:-1] for name in names[:20]) + (", ..." if len(names) > 20 else "")
    if wanted is None and len(names) > 1:
        raise ValueError(f"{path}: holds {len(names)} curves; choose one (--curve): {listed}")
    if wanted is not None and wanted not in names:
        raise ValueError(f"{path}: has no curve {shown(wanted)}, only {listed or 'one without a name'}")
    return names[0] if wanted is None else wanted


def _float(value: str | float) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan

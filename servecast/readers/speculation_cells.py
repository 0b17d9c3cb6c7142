"""Measured cells of a draft-length sweep, from a CSV table.

Columns: ``batch_size``, ``draft_length``, and one of ``tok_s_per_request``, ``tpot_s``, ``tpot_ms``, ``output_tok_s``
(all requests together); where measured, ``mean_acceptance_length`` (tokens per step with the bonus token),
``context_tokens``, ``armed`` (1: length 0 with a drafter configured). Other columns are labels: `model`, `drafter`,
`engine` and `hardware` must not differ within a file, since a sweep is one of each.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from servecast.model.speculation_cells import SpeculationCells
from servecast.readers.bounded_text import csv_records, read_bounded

MAX_BYTES = 16 << 20
MAX_CELLS = 100_000
LARGEST_BATCH, SPEED_RANGE = 1e6, (1e-3, 1e7)
"""Numbers beyond these are slips of a unit: requests; tokens per second and request."""
SPEEDS = ("tok_s_per_request", "tpot_s", "tpot_ms", "output_tok_s")
"""In order of preference where a file has several."""
LABELS = ("model", "drafter", "engine", "hardware")
KNOWN = ("batch_size", "draft_length", *SPEEDS, "mean_acceptance_length", "context_tokens", "armed")


def read_cells(path: str | Path, *, speed_required: bool = True) -> SpeculationCells:
    """Cells of one sweep; without `speed_required` a cell may lack its speed (it is to be predicted).

    Raises ValueError in one line that names file, line, column, rule and value; OSError where it cannot be read.
    """
    path = Path(path)
    names, rows = csv_records(path, read_bounded(path, most_bytes=MAX_BYTES, kind="a CSV table"))
    speed = _columns(path, names, speed_required=speed_required)
    if not rows:
        raise ValueError(f"{path}: must hold cells, got a header alone")
    if len(rows) > MAX_CELLS:
        raise ValueError(f"{path}: must hold at most {MAX_CELLS} cells, got {len(rows)}")
    _one_sweep(path, names, [row for _, row in rows])
    columns = np.array([_cell(path, line, row, speed, speed_required=speed_required) for line, row in rows])
    try:
        return SpeculationCells(
            batch=columns[:, 0],
            gamma=columns[:, 1].astype(np.int64),
            tok_s_per_request=columns[:, 2],
            mean_acceptance_length=columns[:, 3],
            context=columns[:, 4],
            armed=columns[:, 5].astype(np.bool_),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_labels(path: str | Path) -> dict[str, str]:
    """Model, drafter, engine and hardware of a sweep, where its first cell names them."""
    path = Path(path)
    _, rows = csv_records(path, read_bounded(path, most_bytes=MAX_BYTES, kind="a CSV table"))
    first = rows[0][1] if rows else {}
    return {label: first[label] for label in LABELS if first.get(label)}


def _columns(path: Path, names: list[str], *, speed_required: bool) -> str | None:
    """The speed column; refuses a table without the columns it needs or with one twice."""
    for name in ("batch_size", "draft_length"):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (is it {near[0]!r}?)" if near else ""
            raise ValueError(f"{path}: column {name} must be given{hint}, got {', '.join(names)[:200] or 'nothing'}")
    twice = [name for name in KNOWN if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: column {twice[0]} must be given once, got it {names.count(twice[0])} times")
    found = [name for name in SPEEDS if name in names]
    if not found and speed_required:
        raise ValueError(f"{path}: one of {', '.join(SPEEDS)} must be a column, got {', '.join(names)[:200]}")
    return found[0] if found else None


def _one_sweep(path: Path, names: list[str], rows: list[dict[str, str]]) -> None:
    for label in LABELS:
        if label in names:
            values = list(dict.fromkeys(row[label] for row in rows))
            if len(values) > 1:
                raise ValueError(
                    f"{path}: {label} must be the same in all cells of a sweep, got {values[0]!r} and {values[1]!r}"
                )


def _cell(
    path: Path, line: int, row: Mapping[str, str], speed: str | None, *, speed_required: bool
) -> tuple[float, float, float, float, float, float]:
    def number(name: str, *, needed: bool = False, whole: bool = False) -> float:
        text = row.get(name, "")
        if not text and not needed:
            return math.nan
        try:
            value = math.nan if "_" in text else float(text)  # Python reads 1_0 as ten
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (whole and value != int(value)):
            kind = "a whole number" if whole else "a finite number"
            raise ValueError(f"{path}: line {line}: {name} must be {kind}, got {text[:40]!r}")
        return value

    batch = number("batch_size", needed=True)
    gamma = number("draft_length", needed=True, whole=True)
    if batch < 1.0:
        raise ValueError(f"{path}: line {line}: batch_size must be >= 1, got {batch:g}")
    if batch > LARGEST_BATCH:
        raise ValueError(f"{path}: line {line}: batch_size must be <= {LARGEST_BATCH:g}, got {batch:g}")
    if not 0.0 <= gamma <= 1024.0:
        raise ValueError(f"{path}: line {line}: draft_length must be in 0 to 1024, got {gamma:g}")
    raw = number(speed, needed=speed_required) if speed else math.nan
    if raw <= 0.0:
        raise ValueError(f"{path}: line {line}: {speed} must be > 0, got {raw:g}")
    per_request = {"tok_s_per_request": raw, "tpot_s": 1.0 / raw, "tpot_ms": 1e3 / raw}
    if speed == "output_tok_s":
        per_request["output_tok_s"] = raw / batch
    least, most = SPEED_RANGE
    seen = per_request[speed] if speed else math.nan
    if not (math.isnan(seen) or least <= seen <= most):
        raise ValueError(f"{path}: line {line}: {speed} must be {least:g} to {most:g} tokens/s a request, got {seen:g}")
    armed = number("armed")
    if armed not in (0.0, 1.0) and not math.isnan(armed):
        raise ValueError(f"{path}: line {line}: armed must be 0 or 1, got {armed:g}")
    return (
        batch,
        gamma,
        seen,
        number("mean_acceptance_length"),
        number("context_tokens"),
        0.0 if math.isnan(armed) else armed,
    )

"""Measured passes of an engine, from a CSV table: what its own start-up profiling writes.

Columns ``phase`` (verify, draft), ``mode`` (cuda_graph, eager), ``indexed_by`` (tokens for verify, requests for draft),
``n``, ``step_s``.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from servecast.model.speculation_cost import TableCost
from servecast.readers.bounded_text import csv_records, read_bounded

MAX_BYTES = 4 << 20
COLUMNS = ("phase", "mode", "indexed_by", "n", "step_s")
_INDEX = {"verify": "tokens", "draft": "requests"}
_MODES = ("cuda_graph", "eager")


def read_step_cost(path: str | Path, *, parallel: bool) -> TableCost:
    """Cost of verification by rows and of a draft pass by requests; `parallel` as in `TableCost`."""
    path = Path(path)
    points: dict[tuple[str, str], dict[float, float]] = {}
    names, rows = csv_records(path, read_bounded(path, most_bytes=MAX_BYTES, kind="a CSV table"))
    _check_names(path, names)
    for line, row in rows:
        phase, mode, n, seconds = _point(path, line, row)
        mine = points.setdefault((phase, mode), {})
        if n in mine:
            raise ValueError(f"{path}: line {line}: n must be given once for {phase} {mode}, got {n:g} twice")
        mine[n] = seconds
    graph, draft = points.get(("verify", "cuda_graph"), {}), points.get(("draft", "cuda_graph"), {})
    if len(graph) < 2 or not draft:
        raise ValueError(
            f"{path}: must hold at least 2 verify passes and 1 draft pass in cuda_graph mode, got "
            f"{len(graph)} and {len(draft)}"
        )
    eager = points.get(("verify", "eager"), {})
    return TableCost(
        rows=np.array(sorted(graph)),
        verify_s=np.array([graph[n] for n in sorted(graph)]),
        draft_requests=np.array(sorted(draft)),
        draft_pass_s=np.array([draft[n] for n in sorted(draft)]),
        parallel=parallel,
        eager_rows=np.array(sorted(eager)),
        eager_verify_s=np.array([eager[n] for n in sorted(eager)]),
    )


def _check_names(path: Path, names: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(f"{path}: column {missing[0]} must be given, got {', '.join(names)[:200]}")
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: column {twice[0]} must be given once, got it {names.count(twice[0])} times")


def _point(path: Path, line: int, row: dict[str, str]) -> tuple[str, str, float, float]:
    phase, mode, index = row["phase"], row["mode"], row["indexed_by"]
    if phase not in _INDEX:
        raise ValueError(f"{path}: line {line}: phase must be verify or draft, got {phase[:40]!r}")
    if mode not in _MODES:
        raise ValueError(f"{path}: line {line}: mode must be cuda_graph or eager, got {mode[:40]!r}")
    if index != _INDEX[phase]:
        raise ValueError(f"{path}: line {line}: indexed_by must be {_INDEX[phase]} for {phase}, got {index[:40]!r}")
    values = []
    for name in ("n", "step_s"):
        raw = row[name]
        try:
            value = math.nan if "_" in raw else float(raw)  # Python reads 1_0 as ten
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{path}: line {line}: {name} must be a positive number, got {raw[:40]!r}")
        values.append(value)
    return phase, mode, values[0], values[1]

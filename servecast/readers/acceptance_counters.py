"""Speculation counters of vLLM in Prometheus text: acceptance between two scrapes, or since the engine started.

Counters only rise, so a window is a difference. Draft tokens over drafts is the draft length that was in force; where
that is no whole number the engine changed it on the way, and positions that were not verified count as rejected.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from servecast.model.acceptance import AcceptanceSample
from servecast.readers.acceptance_text import MAX_DRAFT_LENGTH, number, read_text, sample
from servecast.readers.trace_formats import shown

_PREFIX = "vllm:spec_decode_num_"
_NAMES = {
    f"{_PREFIX}drafts_total": "drafts",
    f"{_PREFIX}draft_tokens_total": "draft_tokens",
    f"{_PREFIX}accepted_tokens_total": "accepted_tokens",
}
_PER_POSITION = f"{_PREFIX}accepted_tokens_per_pos_total"
_LINE = re.compile(r"(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)\s*(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?[0-9]+)?\s*")
_LABEL = re.compile(r'\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?')

LENGTH_TOLERANCE = 0.02
"""How far draft tokens over drafts may lie from a whole number: drafts cut at the end of a context are that rare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCounters:
    """Running totals of one scrape, over all engines behind it; `source` names the file in messages."""

    source: str
    drafts: float
    draft_tokens: float
    accepted_tokens: float
    accepted_per_position: tuple[float, ...]
    """Drafts whose first j tokens were all accepted, j = 1, 2, ...; empty where the engine does not count them."""


def read_counters(path: str | Path, *, model: str | None = None) -> SpeculationCounters:
    """Totals of one scrape; engines are summed, and `model` (the label model_name) chooses where several are served."""
    source = Path(path)
    return counters_from_text(source, read_text(source), model=model)


def counters_between(first: SpeculationCounters, second: SpeculationCounters) -> AcceptanceSample:
    """Acceptance at the one draft length in force between two scrapes of the same engine."""
    width = max(len(first.accepted_per_position), len(second.accepted_per_position))
    positions = [
        _difference(first, second, f"accepted_tokens_per_pos[{j}]", _at(first, j), _at(second, j)) for j in range(width)
    ]
    totals = {
        name: _difference(first, second, name, getattr(first, name), getattr(second, name)) for name in _NAMES.values()
    }
    place = f"{second.source}: counters"
    return _sample(place, totals["drafts"], totals["draft_tokens"], totals["accepted_tokens"], positions)


def sample_since_start(path: Path, counters: SpeculationCounters) -> AcceptanceSample:
    """Acceptance over the engine's whole life, warm-up included."""
    return _sample(
        f"{path}: counters",
        counters.drafts,
        counters.draft_tokens,
        counters.accepted_tokens,
        list(counters.accepted_per_position),
    )


def looks_like_counters(text: str) -> bool:
    """Whether the text is Prometheus exposition; both a comment and a sample of it are unmistakable."""
    return _PREFIX in text or text.lstrip().startswith(("# HELP ", "# TYPE "))


def counters_from_text(path: Path, text: str, *, model: str | None = None) -> SpeculationCounters:
    """Totals from exposition text."""
    totals = dict.fromkeys(_NAMES.values(), 0.0)
    seen: set[str] = set()
    positions: dict[int, float] = {}
    models: dict[str, None] = {}
    for line_number, line in enumerate(text.splitlines(), 1):
        if not line.startswith(_PREFIX):
            continue
        place = f"{path}: line {line_number}"
        name, labels, value = _parsed(place, line)
        if name not in _NAMES and name != _PER_POSITION:
            continue  # ..._created and whatever later versions add
        served = labels.get("model_name", "")
        models[served] = None
        if model is not None and served != model:
            continue
        seen.add(name)
        if name == _PER_POSITION:
            at = _position(place, labels)
            positions[at] = positions.get(at, 0.0) + value
        else:
            totals[_NAMES[name]] += value
    _require_one_model(path, list(models), model)
    missing = [name for name in _NAMES if name not in seen]
    if missing:
        raise ValueError(f"{path}: counter {missing[0]} is missing; speculation is off or the engine is not vLLM")
    if set(positions) != set(range(len(positions))):
        raise ValueError(f"{path}: counter {_PER_POSITION} must have positions from 0 without a gap")
    per_position = tuple(positions[j] for j in range(len(positions)))
    return SpeculationCounters(source=str(path), accepted_per_position=per_position, **totals)


def _sample(
    place: str, drafts: float, draft_tokens: float, accepted: float, positions: list[float]
) -> AcceptanceSample:
    if drafts < 1.0:
        raise ValueError(f"{place}, field drafts must be at least 1 in the window, got {drafts:g}")
    in_force = draft_tokens / drafts
    length = round(in_force)
    if length < 1 or length > MAX_DRAFT_LENGTH or abs(in_force - length) > LENGTH_TOLERANCE:
        raise ValueError(
            f"{place}, field draft_tokens / drafts must be a whole number (one draft length throughout), got "
            f"{in_force:.4g}: the run was adaptive or mixed; measure at fixed draft lengths"
        )
    if any(positions[length:]):
        raise ValueError(
            f"{place}, field accepted_tokens_per_pos must be 0 beyond position {length - 1} at draft length {length}, "
            f"got {next(filter(None, positions[length:])):g}"
        )
    survival = [value / drafts for value in positions[:length]] if len(positions) >= length else None
    mean = 1.0 + accepted / drafts
    return sample(
        place,
        draft_length=length,
        mean_acceptance_length=mean,
        standard_error=None if survival is None else _standard_error(survival, mean, drafts),
        survival=survival,
        rounds=round(drafts),
    )


def _standard_error(survival: list[float], mean: float, drafts: float) -> float:
    """Of AL over independent steps: Var[A] = sum (2 j - 1) P_j - (AL - 1)^2. [tokens]"""
    second = sum((2 * j - 1) * p for j, p in enumerate(survival, 1))
    return math.sqrt(max(second - (mean - 1.0) ** 2, 0.0) / drafts)  # two scrapes apart may miss by rounding


def _difference(
    first: SpeculationCounters, second: SpeculationCounters, name: str, before: float, after: float
) -> float:
    if after < before:
        raise ValueError(
            f"{second.source}: counters, field {name} must not fall after {first.source}, got {after:g} after "
            f"{before:g}: the engine restarted or the files are in the wrong order"
        )
    return after - before


def _at(counters: SpeculationCounters, position: int) -> float:
    counted = counters.accepted_per_position
    return counted[position] if position < len(counted) else 0.0


def _parsed(place: str, line: str) -> tuple[str, dict[str, str], float]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"{place} is not Prometheus text, got {shown(line)}")
    labels = dict(_LABEL.findall(match["labels"] or ""))
    value = number(place, match["name"], match["value"])
    if value < 0.0:
        raise ValueError(f"{place}, field {match['name']} must not be negative, got {match['value']}")
    return match["name"], labels, value


def _position(place: str, labels: dict[str, str]) -> int:
    text = labels.get("position", "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 4 and int(text) < MAX_DRAFT_LENGTH):
        raise ValueError(f"{place}, field position must be a whole number below {MAX_DRAFT_LENGTH}, got {shown(text)}")
    return int(text)


def _require_one_model(path: Path, models: list[str], wanted: str | None) -> None:
    listed = ", ".join(shown(name)[1:-1] for name in models[:20])
    if wanted is None and len(models) > 1:
        raise ValueError(f"{path}: counts {len(models)} models; choose one (--curve): {listed}")
    if wanted is not None and wanted not in models:
        raise ValueError(f"{path}: has no model {shown(wanted)}, only {listed or 'none'}")

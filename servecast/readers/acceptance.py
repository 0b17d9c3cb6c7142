"""Acceptance of drafted tokens as others recorded it, into `AcceptanceSample` records.

The format is told by content, never by file name: a table (CSV), a document or a request log (JSON, JSON lines), a
nested table by model and thinking mode (YAML), or vLLM's counters (Prometheus text).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import yaml

from servecast.model.acceptance import AcceptanceSample
from servecast.readers.acceptance_counters import (
    SpeculationCounters,
    counters_between,
    counters_from_text,
    looks_like_counters,
    read_counters,
    sample_since_start,
)
from servecast.readers.acceptance_documents import samples_from_json
from servecast.readers.acceptance_text import choose, count, draft_length, number, read_text, sample
from servecast.readers.trace_formats import shown

__all__ = ["SpeculationCounters", "counters_between", "read_acceptance", "read_counters"]

MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 8


def read_acceptance(path: str | Path, *, curve: str | None = None) -> list[AcceptanceSample]:
    """Samples of one acceptance curve, in file order.

    Parameters
    ----------
    path : a file in any of the formats below, at most 64 MiB.
    curve : which curve to take where the file holds several: a value of the column `curve`, model|mode in YAML,
        or the model of counters.

    Raises
    ------
    FileNotFoundError, ValueError
        One line: file, line or entry, field, rule, value.

    Notes
    -----
    CSV           draft_length, mean_acceptance_length, optionally rounds, standard_error, curve; rows without an AL and
                  rows at draft length 0 (speculation off) are left out
    JSON          {"per_position": [...], "kind": "unconditional" or "conditional"}, a list of such objects, or of
                  objects with draft_length, mean_acceptance_length and optionally survival, rounds, standard_error
    request log   one JSON object per line or a list of them, with acceptance_histogram,
                  acceptance_histogram_by_draft_length or per_step_accepted and per_step_drafted, also inside
                  metrics.speculative_decoding as vLLM answers
    YAML          {model: {thinking_on or thinking_off: {K: AL}}}
    Prometheus    vLLM's spec_decode counters, taken since the start of the engine
    """
    source = Path(path)
    text = read_text(source)
    first = text.lstrip()[:1]
    if first in ("{", "["):
        _refuse_curve(source, curve)
        return samples_from_json(source, text)
    if looks_like_counters(text):
        return [sample_since_start(source, counters_from_text(source, text, model=curve))]
    if _looks_like_table(text):
        return _samples_from_csv(source, text, curve)
    return _samples_from_yaml(source, text, curve)


def _refuse_curve(source: Path, curve: str | None) -> None:
    if curve is not None:
        raise ValueError(f"{source}: curve {shown(curve)} was asked for, but curves of this format have no names")


def _looks_like_table(text: str) -> bool:
    """A header has commas, and neither the colon of a mapping nor the mark of a comment."""
    header = text.lstrip().split("\n", 1)[0]
    return "," in header and ":" not in header and not header.startswith("#")


def _samples_from_csv(source: Path, text: str, curve: str | None) -> list[AcceptanceSample]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: dict[str, list[AcceptanceSample]] = {}
    header: list[str] = []
    try:
        for row in reader:
            place = f"{source}: line {reader.line_num}"
            if not row or not any(cell.strip() for cell in row):
                continue
            if not header:
                header = _checked_header(place, [cell.strip() for cell in row])
                continue
            if len(row) != len(header):
                raise ValueError(f"{place} must have {len(header)} columns as the header has, got {len(row)}")
            record = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
            name = record.get("curve", "")
            if curve is not None and name != curve:
                found.setdefault(name, [])
                continue
            found.setdefault(name, []).extend(_csv_sample(place, record))
    except csv.Error as error:
        raise ValueError(f"{source}: line {reader.line_num} is not valid CSV ({error})") from None
    if "curve" not in header:
        _refuse_curve(source, curve)
    samples = found[choose(source, list(found), curve)] if found else []
    if not samples:
        raise ValueError(f"{source}: has no row with a mean_acceptance_length at a draft length of at least 1")
    return samples


def _checked_header(place: str, header: list[str]) -> list[str]:
    for name in ("draft_length", "mean_acceptance_length"):
        if name not in header:
            raise ValueError(f"{place}, field {name} is missing from the header, got {shown(','.join(header))}")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{place}, field {shown(twice)} must be named once in the header, got it twice")
    return header


def _csv_sample(place: str, record: dict[str, str]) -> list[AcceptanceSample]:
    """One sample, or none where the row measures no acceptance."""
    length = draft_length(place, "draft_length", record["draft_length"], least=0)
    if not record["mean_acceptance_length"]:
        return []
    mean = number(place, "mean_acceptance_length", record["mean_acceptance_length"])
    if length == 0:
        if mean != 1.0:
            raise ValueError(f"{place}, field mean_acceptance_length must be 1 at draft length 0, got {mean}")
        return []
    error, rounds = record.get("standard_error"), record.get("rounds")
    return [
        sample(
            place,
            draft_length=length,
            mean_acceptance_length=mean,
            standard_error=number(place, "standard_error", error) if error else None,
            rounds=count(place, "rounds", rounds, least=1) if rounds else None,
        )
    ]


def _samples_from_yaml(source: Path, text: str, curve: str | None) -> list[AcceptanceSample]:
    root = _composed(source, text)
    curves: dict[str, yaml.MappingNode] = {}
    for model, _, modes in _entries(source, root, "the document"):
        for mode, place, lengths in _entries(source, modes, f"model {shown(model)}"):
            if mode not in ("thinking_on", "thinking_off"):
                raise ValueError(
                    f"{place}, field {shown(mode)} of model {shown(model)} must be thinking_on or thinking_off"
                )
            if not isinstance(lengths, yaml.MappingNode):
                raise ValueError(f"{place}, field {mode} must map draft lengths to numbers")
            curves[f"{model}|{mode}"] = lengths
    if not curves:
        raise ValueError(f"{source}: holds no curve")
    chosen = choose(source, list(curves), curve)
    samples = [_yaml_sample(place, key, node) for key, place, node in _entries(source, curves[chosen], chosen)]
    if not samples:
        raise ValueError(f"{source}: curve {shown(chosen)} holds no draft length")
    return samples


def _yaml_sample(place: str, key: str, node: yaml.Node) -> AcceptanceSample:
    length = draft_length(place, "draft length", key)
    value = node.value if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
    return sample(place, draft_length=length, mean_acceptance_length=number(place, "mean_acceptance_length", value))


def _composed(source: Path, text: str) -> yaml.Node:
    """Nodes of the one document. Scalars stay text: nothing is constructed from a stranger's file."""
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{source}: is longer than {MAX_YAML_BYTES >> 20} MiB of YAML")
    try:
        _refuse_unsafe(source, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1} "
        raise ValueError(f"{source}: {line}is not valid YAML ({error.problem or error.context})") from None
    except yaml.YAMLError:
        raise ValueError(f"{source}: is not valid YAML (a character that is not text)") from None
    if root is None:
        raise ValueError(f"{source}: is empty")
    return root


def _refuse_unsafe(source: Path, text: str) -> None:
    """Aliases repeat a part many times over, tags name types, depth exhausts the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.anchor is not None):
            raise ValueError(f"{source}: line {line} must not use anchors or aliases")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise ValueError(f"{source}: line {line} must not use tags, got {shown(event.tag)}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"{source}: line {line} is nested deeper than {MAX_YAML_DEPTH} levels")


def _entries(source: Path, node: yaml.Node, name: str) -> list[tuple[str, str, yaml.Node]]:
    """(key text, its place, value node) of a mapping, no key given twice."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{_place(source, node)}, {name} must be a mapping, got {shown(str(node.value))}")
    entries: list[tuple[str, str, yaml.Node]] = []
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{_place(source, key)}, a key of {name} must be text")
        if any(key.value == before for before, _, _ in entries):
            raise ValueError(f"{_place(source, key)}, {name} must have every key once, got {shown(key.value)} twice")
        entries.append((key.value, _place(source, key), value))
    return entries


def _place(source: Path, node: yaml.Node) -> str:
    return f"{source}: line {node.start_mark.line + 1}"

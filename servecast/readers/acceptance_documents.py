"""JSON of acceptance: documents of rates by position, lists of samples, and logs of requests with histograms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servecast.model.acceptance import AcceptanceSample
from servecast.readers.acceptance_text import MAX_DRAFT_LENGTH, count, draft_length, number, sample
from servecast.readers.trace_formats import shown

KINDS = ("unconditional", "conditional")
REQUESTS_FOR_CLUSTERS = 8
"""From this many requests on, the standard error allows for steps of one request being alike."""
LENGTH_TOLERANCE = 0.02
"""As for counters: how far drafted tokens per step may lie from the draft length of a plain histogram."""

_HISTOGRAM, _BY_LENGTH = "acceptance_histogram", "acceptance_histogram_by_draft_length"
_ACCEPTED, _DRAFTED = "per_step_accepted", "per_step_drafted"

Steps = dict[int, list[int]]
"""Histogram of one request by draft length: entry j counts the steps that accepted j drafted tokens."""
_Record = Mapping[str, Any]


def samples_from_json(path: Path, text: str) -> list[AcceptanceSample]:
    """Samples of a JSON document, or of JSON lines."""
    items = _items(path, text)
    if not items:
        raise ValueError(f"{path}: holds no entry")
    requests = [(place, found) for place, item in items if (found := _request(item)) is not None]
    if requests:
        if len(requests) != len(items):
            missing = next(place for place, item in items if _request(item) is None)
            raise ValueError(f"{missing}, field {_HISTOGRAM} is missing, while other entries are requests that have it")
        return _samples_of_requests(path, requests)
    return [_sample_of_record(place, item) for place, item in items]


def _items(path: Path, text: str) -> list[tuple[str, _Record]]:
    """(place, object) of every entry."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return _lines(path, text)
    entries = document if isinstance(document, list) else [document]
    if entries is document:
        return [_object(f"{path}: entry {at}", entry) for at, entry in enumerate(entries)]
    return [_object(f"{path}: document", document)]


def _lines(path: Path, text: str) -> list[tuple[str, _Record]]:
    found: list[tuple[str, _Record]] = []
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        place = f"{path}: line {line_number}"
        try:
            found.append(_object(place, json.loads(line)))
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"{place} is not valid JSON, got {shown(line)}") from None
    return found


def _object(place: str, entry: object) -> tuple[str, _Record]:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must be a JSON object, got {shown(entry)}")
    return place, entry


def _sample_of_record(place: str, record: _Record) -> AcceptanceSample:
    rounds = count(place, "rounds", record["rounds"], least=1) if record.get("rounds") is not None else None
    stated = record.get("standard_error")
    error = None if stated is None else number(place, "standard_error", stated)
    if "per_position" in record:
        survival = _survival_of_positions(place, record)
        return sample(
            place,
            draft_length=len(survival),
            mean_acceptance_length=1.0 + sum(survival),
            standard_error=error,
            survival=survival,
            rounds=rounds,
        )
    for name in ("draft_length", "mean_acceptance_length"):
        if record.get(name) is None:
            raise ValueError(f"{place}, field {name} is missing (and so are per_position and {_HISTOGRAM})")
    survival_given = record.get("survival")
    return sample(
        place,
        draft_length=draft_length(place, "draft_length", record["draft_length"]),
        mean_acceptance_length=number(place, "mean_acceptance_length", record["mean_acceptance_length"]),
        standard_error=error,
        survival=None if survival_given is None else _numbers(place, "survival", survival_given),
        rounds=rounds,
    )


def _survival_of_positions(place: str, record: _Record) -> list[float]:
    """Unconditional rates; engines print either kind under the same words, so the kind is never guessed."""
    rates = _numbers(place, "per_position", record["per_position"])
    kind = record.get("kind")
    if kind not in KINDS:
        got = "nothing" if kind is None else shown(kind)
        raise ValueError(f"{place}, field kind must say {KINDS[0]} or {KINDS[1]} of per_position, got {got}")
    bad = next((at for at, rate in enumerate(rates, 1) if not 0.0 <= rate <= 1.0), None)
    if bad is not None:
        raise ValueError(f"{place}, field per_position must be from 0 to 1, got {rates[bad - 1]} at position {bad}")
    if kind == "conditional":
        return [math.prod(rates[: at + 1]) for at in range(len(rates))]
    return rates


def _numbers(place: str, name: str, value: object) -> list[float]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_DRAFT_LENGTH:
        raise ValueError(f"{place}, field {name} must be a list of 1 to {MAX_DRAFT_LENGTH} numbers, got {shown(value)}")
    return [number(place, f"{name}[{at}]", item) for at, item in enumerate(value)]


def _request(item: _Record) -> _Record | None:
    """The part of a request's record that counts accepted tokens, None where there is none."""
    metrics = item.get("metrics")
    inner = metrics.get("speculative_decoding") if isinstance(metrics, dict) else item.get("speculative_decoding")
    for record in (item, inner):
        if isinstance(record, dict) and any(
            record.get(name) is not None for name in (_HISTOGRAM, _BY_LENGTH, _ACCEPTED)
        ):
            return record
    return None


def _samples_of_requests(path: Path, requests: Sequence[tuple[str, _Record]]) -> list[AcceptanceSample]:
    plain: dict[int, str] = {}
    by_length: dict[int, list[list[int]]] = {}
    for place, record in requests:
        steps, stated = _steps(place, record)
        if not stated:
            plain.update(dict.fromkeys(steps, place))
        for length, histogram in steps.items():
            if any(histogram):
                by_length.setdefault(length, []).append(histogram)
    if len(plain) > 1:
        longest = max(plain)
        raise ValueError(
            f"{plain[longest]}, field {_HISTOGRAM} must be as long in every request where nothing states the draft "
            f"length, got {longest + 1} entries here and {min(plain) + 1} elsewhere"
        )
    if not by_length:
        raise ValueError(f"{path}: counts no verification step")
    return [_sample_of_histograms(path, length, by_length[length]) for length in sorted(by_length)]


def _steps(place: str, record: _Record) -> tuple[Steps, bool]:
    """Histograms by draft length, and whether the record states that length."""
    if record.get(_BY_LENGTH) is not None:
        return _steps_by_length(place, record[_BY_LENGTH]), True
    if record.get(_ACCEPTED) is not None and record.get(_DRAFTED) is not None:
        return _steps_of_trace(place, record[_ACCEPTED], record[_DRAFTED]), True
    if record.get(_HISTOGRAM) is None:
        raise ValueError(f"{place}, field {_DRAFTED} is missing beside {_ACCEPTED}")
    histogram = _counts(place, _HISTOGRAM, record[_HISTOGRAM])
    stated = record.get("num_spec_tokens")
    length = len(histogram) - 1 if stated is None else draft_length(place, "num_spec_tokens", stated)
    if length < 1 or len(histogram) > length + 1:
        raise ValueError(
            f"{place}, field {_HISTOGRAM} must have 2 entries or more and one more than the draft length at most, "
            f"got {len(histogram)}"
        )
    _require_one_length(place, record, length, sum(histogram))
    return {length: histogram + [0] * (length + 1 - len(histogram))}, stated is not None


def _require_one_length(place: str, record: _Record, length: int, steps: int) -> None:
    """Where the record counts drafted tokens, they must be those of one length; the last one may be cut."""
    if record.get("num_draft_tokens") is None or not steps:
        return
    drafted = count(place, "num_draft_tokens", record["num_draft_tokens"])
    if abs(drafted - length * steps) > max(LENGTH_TOLERANCE * steps, length):
        raise ValueError(
            f"{place}, field num_draft_tokens must be {length} per step, got {drafted} in {steps} steps: the run was "
            f"adaptive; {_BY_LENGTH} or {_DRAFTED} would tell the lengths apart"
        )


def _steps_by_length(place: str, value: object) -> Steps:
    if not isinstance(value, dict):
        raise ValueError(f"{place}, field {_BY_LENGTH} must map draft lengths to lists, got {shown(value)}")
    steps: Steps = {}
    for key, histogram in value.items():
        length = draft_length(place, f"{_BY_LENGTH} key", key, least=0)
        counts = _counts(place, f"{_BY_LENGTH}[{key}]", histogram)
        if len(counts) != length + 1:
            raise ValueError(f"{place}, field {_BY_LENGTH}[{key}] must have {length + 1} entries, got {len(counts)}")
        if length:  # a step without drafts accepts nothing and says nothing
            steps[length] = counts
    return steps


def _steps_of_trace(place: str, accepted: object, drafted: object) -> Steps:
    taken, offered = _counts(place, _ACCEPTED, accepted), _counts(place, _DRAFTED, drafted)
    if len(taken) != len(offered):
        raise ValueError(
            f"{place}, field {_ACCEPTED} must be as long as {_DRAFTED}, got {len(taken)} and {len(offered)}"
        )
    steps: Steps = {}
    for at, (hits, length) in enumerate(zip(taken, offered, strict=True)):
        if hits > length or length > MAX_DRAFT_LENGTH:
            raise ValueError(
                f"{place}, field {_ACCEPTED}[{at}] must be at most {min(length, MAX_DRAFT_LENGTH)}, got {hits}"
            )
        if length:
            steps.setdefault(length, [0] * (length + 1))[hits] += 1
    return steps


def _counts(place: str, name: str, value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError(f"{place}, field {name} must be a list of counts, got {shown(value)}")
    if name == _HISTOGRAM and len(value) > MAX_DRAFT_LENGTH + 1:
        raise ValueError(f"{place}, field {name} must have at most {MAX_DRAFT_LENGTH + 1} entries, got {len(value)}")
    return [count(place, f"{name}[{at}]", item) for at, item in enumerate(value)]


def _sample_of_histograms(path: Path, length: int, histograms: Sequence[Sequence[int]]) -> AcceptanceSample:
    total = [sum(column) for column in zip(*histograms, strict=True)]
    rounds = sum(total)
    survival = [sum(total[j:]) / rounds for j in range(1, length + 1)]
    return sample(
        f"{path}: draft length {length}",
        draft_length=length,
        mean_acceptance_length=1.0 + sum(survival),
        standard_error=_standard_error(histograms, total),
        survival=survival,
        rounds=rounds,
    )


def _standard_error(histograms: Sequence[Sequence[int]], total: Sequence[int]) -> float | None:
    """Of the ratio accepted / steps: over requests where there are enough, else over steps; None for one step.

    Over requests (linearised ratio estimator): sqrt(R / (R - 1) sum_r (A_r - mean n_r)^2) / N.
    """
    rounds = sum(total)
    mean = sum(j * n for j, n in enumerate(total)) / rounds
    if len(histograms) < REQUESTS_FOR_CLUSTERS:
        if rounds < 2:
            return None
        return math.sqrt(sum(n * (j - mean) ** 2 for j, n in enumerate(total)) / (rounds - 1) / rounds)
    off = [sum(n * (j - mean) for j, n in enumerate(histogram)) for histogram in histograms]
    return math.sqrt(len(off) / (len(off) - 1) * sum(value**2 for value in off)) / rounds

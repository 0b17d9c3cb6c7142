"""Result files of AIPerf: profile_export.jsonl (one record per request) and profile_export_aiperf.json (statistics).

Read for this, in ai-dynamo/aiperf: src/aiperf/common/models/record_export_models.py at 745695dd, metric_records_wire.py
at 017c63d2, export_models.py at 26240f9e, metrics/types/inter_token_latency_metric.py at 58dd5dea,
request_latency_metric.py at 4f7ccffd, spec_decode_metrics.py at 1849cd1b, and its documentation of both files
(docs/tutorials/working-with-profile-exports.md at 13992dbd, docs/reference/json-export-schema.md at 1554b478: schemas
1.0 to 1.5, releases up to 0.13).

Every value carries its unit. `request_latency` ends at the last message with content. `inter_token_latency` is
(request_latency - time_to_first_token) / (output_sequence_length - 1), our TPOT; a run with --per-chunk-usage subtracts
the tokens of the first message instead of 1. `inter_chunk_latency` is our ITL, pooled over requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from servecast.readers.load_results import (
    LoadResults,
    LoadSpeculation,
    Requests,
    amount,
    described,
    distinct,
    entries,
    line_of,
    mapping,
    whole,
)

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0}
_DURATIONS = {
    "time_to_first_token": "ttft",
    "inter_token_latency": "tpot",
    "inter_chunk_latency": "itl",
    "request_latency": "e2e",
}
_STATISTICS = {"avg": "mean", "std": "std", "min": "min", "max": "max"} | {
    name: name for name in ("p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99")
}
_TOTALS = {
    "request_throughput": "throughput_rps",
    "goodput": "goodput_rps",
    "output_token_throughput": "output_tokens_per_s",
    "total_token_throughput": "total_tokens_per_s",
    "request_count": "completed_requests",
    "error_request_count": "failed_requests",
    "total_isl": "input_tokens",
    "total_osl": "output_tokens",
}
_MOST_NS = (1 << 63) - 1
_PER_CHUNK = "inter_token_latency is our TPOT unless the run used --per-chunk-usage"


def is_record(item: object) -> bool:
    """Whether a JSON value is the record of one request."""
    return isinstance(item, dict) and isinstance(item.get("metadata"), dict) and "metrics" in item


def is_summary(document: object) -> bool:
    """Whether a JSON value is the statistics of one run."""
    names = ("request_latency", "request_throughput", "request_count")
    found = (document.get(name) for name in names) if isinstance(document, dict) else ()
    return any(isinstance(one, dict) and {"unit", "avg"} <= one.keys() for one in found)


def from_aiperf_records(source: Path, records: Iterator[tuple[int, Any]]) -> LoadResults:
    """Requests of profile_export.jsonl, those of the warm-up left out."""
    requests, messages, counts = Requests(), list[object](), _Counts()
    origin_ns, warm_up = -1, 0
    for line, item in records:
        place = f"{source}: line {line}"
        metadata = mapping(place, "metadata", mapping(place, "record", item).get("metadata"))
        if metadata.get("benchmark_phase") == "warmup":
            warm_up += 1
            continue
        start_ns = whole(place, "metadata.request_start_ns", metadata.get("request_start_ns"), most=_MOST_NS)
        origin_ns = start_ns if origin_ns < 0 else origin_ns
        error = mapping(place, "error", item.get("error"))
        failed = item.get("error") is not None or metadata.get("was_cancelled") is True
        if failed:
            messages.append(error.get("message") or error.get("type"))
        metrics = mapping(place, "metrics", item.get("metrics"))
        # whole nanoseconds are subtracted first: a double holds those since 1970 to a quarter of a microsecond
        _add(requests, place, (start_ns - origin_ns) * 1e-9, metadata, metrics, failed=failed)
        counts.add(place, metrics)
    rows = requests.rows(str(source))
    return LoadResults(
        generator="AIPerf",
        version="",
        model="",
        rows=rows,
        has_arrivals=rows is not None,
        aggregates={},
        speculation=counts.speculation(),
        errors=distinct(messages),
        notes=(f"{warm_up} warm-up requests left out",) if warm_up else (),
    )


def _add(
    requests: Requests,
    place: str,
    start_s: float,
    metadata: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    failed: bool,
) -> None:
    n_in = _tokens(place, metrics, "input_sequence_length", optional=failed)
    requests.add(
        place,
        start_s=start_s,
        ttft_s=_time(place, "metrics.time_to_first_token", metrics.get("time_to_first_token"), "value"),
        e2e_s=math.nan if failed else _latency(place, metadata, metrics),
        n_in=n_in or _tokens(place, metrics, "error_isl", optional=True),
        n_out=_tokens(place, metrics, "output_sequence_length", optional=failed),
        failed=failed,
    )


def _latency(place: str, metadata: Mapping[str, Any], metrics: Mapping[str, Any]) -> float:
    """Start to last content, else to the end of the request. [s]"""
    found = _time(place, "metrics.request_latency", metrics.get("request_latency"), "value")
    if not math.isnan(found) or metadata.get("request_end_ns") is None:
        return found
    start = whole(place, "metadata.request_start_ns", metadata.get("request_start_ns"), most=_MOST_NS)
    end = whole(place, "metadata.request_end_ns", metadata["request_end_ns"], most=_MOST_NS)
    if end < start:
        raise ValueError(
            f"{place}: field metadata.request_end_ns must not be below request_start_ns {start}, got {end}"
        )
    return (end - start) * 1e-9


def _tokens(place: str, metrics: Mapping[str, Any], name: str, *, optional: bool) -> int:
    value = mapping(place, f"metrics.{name}", metrics.get(name)).get("value")
    return 0 if optional and value is None else whole(place, f"metrics.{name}.value", value)


def _time(place: str, name: str, block: object, key: str) -> float:
    """Time of a block {value or statistic, unit}; NaN where the file has none. [s]"""
    fields = mapping(place, name, block)
    if fields.get(key) is None:
        return math.nan
    unit = fields.get("unit")
    if not isinstance(unit, str) or unit not in _SECONDS:
        raise ValueError(f"{place}: field {name}.unit must be one of {', '.join(_SECONDS)}, got {described(unit)}")
    return amount(place, f"{name}.{key}", fields[key], scale=_SECONDS[unit])


class _Counts:
    """Speculation summed over requests; the records state it where the engine reports it."""

    _NAMES = ("spec_decode_steps", "spec_decode_draft_tokens", "spec_decode_accepted_draft_tokens")

    def __init__(self) -> None:
        self._sums = dict.fromkeys(self._NAMES, 0)

    def add(self, place: str, metrics: Mapping[str, Any]) -> None:
        if all(name in metrics for name in self._NAMES):
            for name in self._NAMES:
                self._sums[name] += _tokens(place, metrics, name, optional=False)

    def speculation(self) -> LoadSpeculation | None:
        steps, drafted, accepted = self._sums.values()
        if not steps:
            return None
        return LoadSpeculation(
            mean_acceptance_length=1.0 + accepted / steps,
            draft_acceptance_rate=accepted / drafted if drafted else None,
            drafts=steps,
            draft_tokens=drafted,
            accepted_tokens=accepted,
        )


def from_aiperf_summary(source: Path, document: Mapping[str, Any]) -> LoadResults:
    """Statistics of profile_export_aiperf.json."""
    place = str(source)
    found: dict[str, float] = {}
    for name, ours in _DURATIONS.items():
        block = mapping(place, name, document.get(name))
        found |= {f"{ours}_{to}_s": _time(place, name, block, key) for key, to in _STATISTICS.items()}
    for name, ours in _TOTALS.items():
        found[ours] = _average(place, document, name)
    found["duration_s"] = _time(place, "benchmark_duration", document.get("benchmark_duration"), "avg")
    summary = entries(place, "error_summary", document.get("error_summary"))
    details = (mapping(place, "error_summary", one).get("error_details") for one in summary)
    return LoadResults(
        generator="AIPerf",
        version=line_of(document.get("aiperf_version")),
        model=_model(place, document),
        rows=None,
        has_arrivals=False,
        aggregates={name: value for name, value in found.items() if not math.isnan(value)},
        speculation=_stated_speculation(place, document),
        errors=distinct(mapping(place, "error_details", one).get("message") for one in details),
        notes=(_PER_CHUNK,) if "inter_token_latency" in document else (),
    )


def _average(place: str, document: Mapping[str, Any], name: str) -> float:
    """Single value of a metric without a distribution; NaN where the file has none."""
    return amount(place, f"{name}.avg", mapping(place, name, document.get(name)).get("avg"))


def _model(place: str, document: Mapping[str, Any]) -> str:
    config = mapping(place, "input_config", document.get("input_config"))
    endpoint = mapping(place, "input_config.endpoint", config.get("endpoint"))
    names = entries(place, "input_config.endpoint.model_names", endpoint.get("model_names"))
    return ", ".join(filter(None, map(line_of, names[:10])))


def _stated_speculation(place: str, document: Mapping[str, Any]) -> LoadSpeculation | None:
    """Run-level acceptance, weighted by steps; the rate is a percentage in the file."""
    length = _average(place, document, "spec_decode_token_weighted_acceptance_length")
    rate = _average(place, document, "spec_decode_overall_draft_acceptance_rate") * 1e-2
    if math.isnan(length) and math.isnan(rate):
        return None
    names = ("total_spec_decode_steps", "total_draft_tokens", "total_accepted_draft_tokens")
    totals = [_average(place, document, name) for name in names]
    drafts, drafted, accepted = (None if math.isnan(one) else whole(place, "total", one) for one in totals)
    return LoadSpeculation(
        mean_acceptance_length=None if math.isnan(length) else length,
        draft_acceptance_rate=None if math.isnan(rate) else rate,
        drafts=drafts,
        draft_tokens=drafted,
        accepted_tokens=accepted,
    )

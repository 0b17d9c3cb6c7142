"""Reports of GuideLLM (benchmarks.json), in the three layouts its requests have had.

Read for this, all in src/guidellm: benchmark/benchmark.py at 47ce2924 (0.2 and 0.3: start_time, first_token_time,
last_token_time, end_time; -1 for a stamp that is missing), benchmark/objects.py and aggregator.py at 414febe6 and
034e63fa (between 0.3 and 0.4: scheduler_info.request_timings), schemas/request_stats.py, schemas/info.py and
benchmark/schemas/generative/{report,benchmark,metrics}.py at 06cef291 and neighbours (0.4 to 0.7: info.timings),
schemas/base/request_stats.py at 31c74ea2 (0.8). `metadata.guidellm_version` came with pull request 497 (0.5).

Stamps are seconds since 1970. `inter_token_latency_ms` of a request is our TPOT. `time_per_output_token_ms` is no TPOT:
it divides the whole latency by n (until 0.3: the latency after the first token), and is not read. The statistics of
`inter_token_latency_ms` weigh requests by n - 1, so their mean is our mean ITL, and their percentiles are neither ITL
nor TPOT. A missing TTFT counts as 0 in the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servecast.readers.load_results import (
    LoadResults,
    Requests,
    amount,
    choose_benchmark,
    distinct,
    entries,
    line_of,
    mapping,
    number,
    whole,
)

_PERCENTILES = {"p001": "p0.1", "p01": "p1", "p05": "p5", "p999": "p99.9"} | {
    name: name for name in ("p10", "p25", "p50", "p75", "p90", "p95", "p99")
}
_MOMENTS = {"mean": "mean", "std_dev": "std", "min": "min", "max": "max"}
_RATES = {
    "requests_per_second": "throughput_rps",
    "output_tokens_per_second": "output_tokens_per_s",
    "tokens_per_second": "total_tokens_per_s",
}
_START = ("request_start", "request_start_time", "start_time")
_FIRST = ("first_token_iteration", "first_iteration", "first_token_time")
_LAST = ("last_token_iteration", "last_iteration", "last_token_time")
_END = ("request_end", "request_end_time", "end_time")


def is_report(document: object) -> bool:
    """Whether a JSON value is a report."""
    return isinstance(document, dict) and isinstance(document.get("benchmarks"), list)


def from_guidellm(source: Path, document: Mapping[str, Any], benchmark: int | None) -> LoadResults:
    """One benchmark of a report; requests cut off by the end of the run are left out, errored ones kept as failed."""
    at = choose_benchmark(source, len(document["benchmarks"]), benchmark)
    place = f"{source}: benchmarks[{at}]"
    run = mapping(place, "benchmark", document["benchmarks"][at])
    groups = mapping(place, "requests", run.get("requests"))
    lists = {name: entries(place, f"requests.{name}", groups.get(name)) for name in ("successful", "errored")}
    requests, unsent = Requests(), 0
    for name, members in lists.items():
        for i, member in enumerate(members):
            unsent += not _add(requests, f"{place}.requests.{name}[{i}]", member, failed=name == "errored")
    rows = requests.rows(str(source))
    cut = len(entries(place, "requests.incomplete", groups.get("incomplete")))
    return LoadResults(
        generator="GuideLLM",
        version=line_of(mapping(str(source), "metadata", document.get("metadata")).get("guidellm_version")),
        model=_model(place, document, run),
        rows=rows,
        has_arrivals=rows is not None,
        aggregates=_aggregates(place, run),
        speculation=None,
        errors=distinct(_message(place, member) for member in lists["errored"]),
        notes=tuple(_notes(place, run, lists, cut, unsent)),
    )


def _add(requests: Requests, place: str, member: object, *, failed: bool) -> bool:
    """One request; False where it was never sent."""
    request = mapping(place, "request", member)
    stamps = {**request, **_timings(place, request)}
    start, first, last, end = (_stamp(place, stamps, names) for names in (_START, _FIRST, _LAST, _END))
    if math.isnan(start):
        if failed:
            return False
        raise ValueError(f"{place}: field request_start_time is missing")
    silent = math.isnan(first) and math.isnan(last)  # then it states no count of tokens either
    n_out = _tokens(place, request, "output_tokens", optional=failed or silent)
    requests.add(
        place,
        start_s=start,
        ttft_s=math.nan if failed or not n_out else _ttft(place, request, start, first),
        e2e_s=math.nan if failed else _elapsed(place, "end", start, end if math.isnan(last) else last),
        n_in=_tokens(place, request, "prompt_tokens", optional=failed),
        n_out=n_out,
        failed=failed,
    )
    return True


def _ttft(place: str, request: Mapping[str, Any], start: float, first: float) -> float:
    """From the stamps, else as stated. [s]"""
    name = "time_to_first_token_ms"
    stated = amount(place, name, request.get(name), scale=1e-3)
    return stated if math.isnan(first) else _elapsed(place, "first token", start, first)


def _timings(place: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    info = mapping(place, "info", request.get("info", request.get("scheduler_info")))
    return mapping(place, "info.timings", info.get("timings", info.get("request_timings")))


def _stamp(place: str, stamps: Mapping[str, Any], names: tuple[str, ...]) -> float:
    """First stamp that is there; NaN where none is. [s since 1970]"""
    for name in names:
        found = number(place, name, stamps.get(name))
        if found > 0.0:
            return found
    return math.nan


def _elapsed(place: str, name: str, start: float, stamp: float) -> float:
    if stamp < start:
        raise ValueError(f"{place}: the {name} must not lie before the start {start!r}, got {stamp!r}")
    return stamp - start


def _tokens(place: str, request: Mapping[str, Any], name: str, *, optional: bool) -> int:
    return 0 if optional and request.get(name) is None else whole(place, name, request.get(name))


def _message(place: str, member: object) -> object:
    request = mapping(place, "request", member)
    info = mapping(place, "info", request.get("info", request.get("scheduler_info")))
    return request.get("error") or info.get("error")


def _model(place: str, document: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    found = (
        mapping(place, "config.backend", mapping(place, "config", run.get("config")).get("backend")).get("model"),
        mapping(place, "worker", run.get("worker")).get("backend_model"),
        mapping(place, "args", document.get("args")).get("model"),
    )
    return next((line_of(one) for one in found if line_of(one)), "")


def _totals(place: str, run: Mapping[str, Any]) -> Mapping[str, Any]:
    inside = mapping(place, "metrics", run.get("metrics")).get("request_totals")
    return mapping(place, "request_totals", inside if inside is not None else run.get("request_totals"))


def _notes(place: str, run: Mapping[str, Any], lists: Mapping[str, list[Any]], cut: int, unsent: int) -> list[str]:
    notes = ["percentiles of inter_token_latency_ms weigh requests by tokens, time_per_output_token_ms is no TPOT"]
    if cut:
        notes.append(f"{cut} requests cut off by the end of the run left out")
    if unsent:
        notes.append(f"{unsent} failed requests that were never sent left out")
    for name, members in lists.items():
        stated = amount(place, f"request_totals.{name}", _totals(place, run).get(name))
        if stated > len(members):
            notes.append(f"holds a sample of {len(members)} of {stated:.0f} {name} requests: arrivals have gaps")
    return notes


def _aggregates(place: str, run: Mapping[str, Any]) -> dict[str, float]:
    metrics = mapping(place, "metrics", run.get("metrics"))
    found = _statistics(place, "e2e", metrics, "request_latency", 1.0)
    found |= _statistics(place, "ttft", metrics, "time_to_first_token_ms", 1e-3)
    gaps = _statistics(place, "itl", metrics, "inter_token_latency_ms", 1e-3)
    found |= {name: value for name, value in gaps.items() if name == "itl_mean_s"}
    values = {
        ours: _successful(place, metrics, name).get("mean") for name, ours in _RATES.items() if name in metrics
    } | {"duration_s": run.get("duration")}
    totals = _totals(place, run)
    values |= {"completed_requests": totals.get("successful"), "failed_requests": totals.get("errored")}
    stated = {name: amount(place, name, value) for name, value in values.items()}
    return found | {name: value for name, value in stated.items() if not math.isnan(value)}


def _successful(place: str, metrics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Distribution over successful requests; empty where there was none to describe."""
    groups = mapping(place, f"metrics.{name}", metrics.get(name))
    summary = mapping(place, f"metrics.{name}.successful", groups.get("successful"))
    return {} if summary.get("count") == 0 else summary


def _statistics(place: str, ours: str, metrics: Mapping[str, Any], name: str, scale: float) -> dict[str, float]:
    summary = _successful(place, metrics, name)
    if summary.get("min") == 0.0:
        return {}  # a missing time counted as 0
    field = f"metrics.{name}.successful"
    percentiles = mapping(place, f"{field}.percentiles", summary.get("percentiles"))
    raw = {to: summary.get(key) for key, to in _MOMENTS.items()}
    raw |= {to: percentiles.get(key) for key, to in _PERCENTILES.items()}
    found = {to: amount(place, f"{field}.{to}", value, scale=scale) for to, value in raw.items()}
    return {f"{ours}_{to}_s": value for to, value in found.items() if not math.isnan(value)}

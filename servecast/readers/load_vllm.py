"""Result files of `vllm bench serve --save-result`, detailed or not, and of its forerunner benchmark_serving.py.

Read for this: vLLM's vllm/benchmarks/serve.py at 009e6d4a (2026, with spec_decode_*, latencies, queue_times),
vllm/benchmarks/lib/endpoint_request_func.py at 02cfb534, and benchmarks/benchmark_serving.py at 0049e29c (2025, without
start_times, with the key "request_goodput:"). `start_times` came with pull request 32667 (January 2026).

All per-request times are seconds, all statistics milliseconds. Its TPOT is ours by definition; its ITL is the gap
between streamed messages, pooled over requests. A time of 0 stands for one that was not measured. Its last token comes
at ttft + sum(itls); the whole latency of older versions also waits for the usage message that ends a chat stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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
    whole,
)

_STATISTIC = re.compile(r"(mean|median|std|p[0-9]{1,2}(?:\.[0-9]{1,6})?|p100)_(ttft|tpot|itl|e2el)_ms")
_TOTALS = {
    "duration": "duration_s",
    "completed": "completed_requests",
    "failed": "failed_requests",
    "total_input_tokens": "input_tokens",
    "total_output_tokens": "output_tokens",
    "request_throughput": "throughput_rps",
    "request_goodput": "goodput_rps",
    "request_goodput:": "goodput_rps",  # as written until 2025
    "output_throughput": "output_tokens_per_s",
    "total_token_throughput": "total_tokens_per_s",
}
_PARALLEL = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "errors")


def is_run(document: object) -> bool:
    """Whether a JSON value is the result of one run."""
    return isinstance(document, dict) and {"model_id", "completed", "request_throughput"} <= document.keys()


def from_vllm(source: Path, document: Mapping[str, Any]) -> LoadResults:
    """One run, its requests included where they were saved."""
    place = str(source)
    columns = _columns(place, document)
    requests, messages = _requests(place, columns)
    aggregates, notes = _aggregates(place, document, requests.without_ttft())
    starts = columns.get("start_times", [])
    has_arrivals = any(requests.start_s)
    if requests.start_s and not has_arrivals:
        notes.append(f"{'start_times are all 0' if starts else 'no start_times'}: only latencies, no arrivals")
    return LoadResults(
        generator="vllm bench serve",
        version="",
        model=line_of(document["model_id"]),
        rows=requests.rows(place),
        has_arrivals=has_arrivals,
        aggregates=aggregates,
        speculation=_speculation(place, document),
        errors=distinct(messages),
        notes=tuple(notes),
    )


def _columns(place: str, document: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Parallel lists of a detailed file; none where it has statistics only (it keeps `latencies` all the same)."""
    if "ttfts" not in document and "output_lens" not in document:
        return {}
    columns = {name: entries(place, name, document[name]) for name in _PARALLEL if document.get(name) is not None}
    for name in _PARALLEL[:3]:
        if name not in columns:
            raise ValueError(f"{place}: field {name} is missing beside the other lists of requests")
    expected = len(columns["input_lens"])
    for name, values in columns.items():
        if len(values) != expected:
            raise ValueError(
                f"{place}: field {name} must have as many entries as input_lens ({expected}), got {len(values)}"
            )
    return columns


def _requests(place: str, columns: Mapping[str, list[Any]]) -> tuple[Requests, list[object]]:
    requests, messages = Requests(), list[object]()
    for i in range(len(columns.get("input_lens", ()))):
        n_out = whole(place, f"output_lens[{i}]", columns["output_lens"][i])
        ttft_s = amount(place, f"ttfts[{i}]", columns["ttfts"][i])
        error = columns["errors"][i] if "errors" in columns else ""
        # an HTTP error without a reason leaves no message
        failed = bool(error) or (n_out == 0 and not ttft_s > 0.0)
        if failed:
            messages.append(error)
        requests.add(
            f"{place}: request {i}",
            start_s=_start(place, columns, i),
            ttft_s=ttft_s,
            e2e_s=math.nan if failed else _latency(place, columns, i, ttft_s),
            n_in=whole(place, f"input_lens[{i}]", columns["input_lens"][i]),
            n_out=n_out,
            failed=failed,
        )
    return requests, messages


def _start(place: str, columns: Mapping[str, list[Any]], i: int) -> float:
    """Stamp of a clock with an arbitrary origin; 0 where the file has none. [s]"""
    if "start_times" not in columns:
        return 0.0
    found = amount(place, f"start_times[{i}]", columns["start_times"][i])
    if math.isnan(found):
        raise ValueError(
            f"{place}: field start_times[{i}] must be a number, got {described(columns['start_times'][i])}"
        )
    return found


def _latency(place: str, columns: Mapping[str, list[Any]], i: int, ttft_s: float) -> float:
    """Start to last token, or to the end of a request that was not streamed; NaN where unknown. [s]"""
    if ttft_s > 0.0 and "itls" in columns:
        found = ttft_s + _sum(place, f"itls[{i}]", entries(place, f"itls[{i}]", columns["itls"][i]))
        if not math.isnan(found):
            return found
    found = amount(place, f"latencies[{i}]", columns["latencies"][i]) if "latencies" in columns else math.nan
    return found if found > 0.0 else math.nan


def _sum(place: str, name: str, gaps: list[Any]) -> float:
    if set(map(type, gaps)) <= {float} and min(gaps, default=0.0) >= 0.0 and math.isfinite(total := sum(gaps)):
        return float(total)  # a run has millions of gaps
    return sum(amount(place, f"{name}[{j}]", gap) for j, gap in enumerate(gaps))


def _aggregates(place: str, document: Mapping[str, Any], without_ttft: int) -> tuple[dict[str, float], list[str]]:
    found, notes = dict[str, float](), list[str]()
    for key, name in _TOTALS.items():
        value = amount(place, key, document.get(key))
        if not math.isnan(value):
            found[name] = value
    unmeasured = {metric for metric in ("ttft", "tpot", "itl", "e2el") if document.get(f"mean_{metric}_ms") == 0.0}
    if without_ttft:
        notes.append(
            f"{without_ttft} requests without TTFT: statistics of TTFT and TPOT count it as 0 and are left out"
        )
    if without_ttft or "ttft" in unmeasured:
        unmeasured |= {"ttft", "tpot"}  # TPOT then holds the whole latency
    for key, raw in document.items():
        match = _STATISTIC.fullmatch(key)
        if match is None or match[2] in unmeasured:
            continue
        value = amount(place, key, raw, scale=1e-3)
        if not math.isnan(value):
            found[f"{match[2].replace('e2el', 'e2e')}_{match[1].replace('median', 'p50')}_s"] = value
    return found, notes


def _speculation(place: str, document: Mapping[str, Any]) -> LoadSpeculation | None:
    """Differences of the engine's counters over the run; the rate is a percentage in the file."""
    if "spec_decode_acceptance_length" not in document:
        return None
    drafts, drafted, accepted = (
        whole(place, key, document[key]) if document.get(key) is not None else None
        for key in ("spec_decode_num_drafts", "spec_decode_draft_tokens", "spec_decode_accepted_tokens")
    )
    length = amount(place, "spec_decode_acceptance_length", document["spec_decode_acceptance_length"])
    rate = amount(place, "spec_decode_acceptance_rate", document.get("spec_decode_acceptance_rate"), scale=1e-2)
    name = "spec_decode_per_position_acceptance_rates"
    survival = [
        amount(place, f"{name}[{j}]", value) for j, value in enumerate(entries(place, name, document.get(name)))
    ]
    return LoadSpeculation(
        mean_acceptance_length=length if length >= 1.0 else None,  # 0 without a draft
        draft_acceptance_rate=None if math.isnan(rate) else rate,
        survival=() if any(map(math.isnan, survival)) else tuple(survival),
        drafts=drafts,
        draft_tokens=drafted,
        accepted_tokens=accepted,
    )

"""Properties of the readers of load generators' files: what is written in any layout comes back, and no content of a
file gives anything but rows or a one-line refusal."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servecast.readers.load_results import LoadResults, read_load_results
from servecast.validation.metrics import latencies

# a file for each example, one folder for all of them
folder_of_examples = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request as a generator saw it. [s]"""

    start_s: float
    ttft_s: float
    decode_s: float
    n_in: int
    n_out: int
    failed: bool


def milli(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(low, high).map(lambda ticks: ticks / 1000)


def tokens_decoded(one: Sent) -> Sent:
    """Without a second token nothing is decoded."""
    return one if one.n_out > 1 else Sent(**{name: getattr(one, name) for name in _NAMES} | {"decode_s": 0.0})


_NAMES = ("start_s", "ttft_s", "decode_s", "n_in", "n_out", "failed")
sent = st.builds(
    Sent,
    start_s=milli(0, 100_000),
    ttft_s=milli(1, 10_000),
    decode_s=milli(0, 10_000),
    n_in=st.integers(1, 10_000),
    n_out=st.integers(1, 500),
    failed=st.booleans(),
).map(tokens_decoded)
runs = st.lists(sent, min_size=1, max_size=12)


def as_vllm(run: list[Sent]) -> str:
    columns = {
        "input_lens": [one.n_in for one in run],
        "output_lens": [0 if one.failed else one.n_out for one in run],
        "ttfts": [0.0 if one.failed else one.ttft_s for one in run],
        # three messages after the first, whatever they hold
        "itls": [[one.decode_s / 3] * 3 if one.n_out > 1 and not one.failed else [] for one in run],
        "start_times": [353400.25 + one.start_s for one in run],
        "errors": ["refused" if one.failed else "" for one in run],
    }
    return json.dumps({"model_id": "m", "completed": 1, "request_throughput": 1.0, **columns})


def as_guidellm(run: list[Sent], request: Callable[[Sent], dict[str, Any]]) -> str:
    groups = {
        "successful": [request(one) for one in run if not one.failed],
        "errored": [request(one) for one in run if one.failed],
        "incomplete": [],
    }
    return json.dumps({"benchmarks": [{"requests": groups, "metrics": {}}]})


def stamps(one: Sent) -> tuple[float, float | None, float | None]:
    start = 1.75e9 + one.start_s
    seen = not one.failed
    return start, start + one.ttft_s if seen else None, start + one.ttft_s + one.decode_s if seen else None


def old_guidellm(one: Sent) -> dict[str, Any]:
    start, first, last = stamps(one)
    tokens = {"prompt_tokens": one.n_in, "output_tokens": 0 if one.failed else one.n_out}
    times = {"start_time": start, "end_time": start + 60.0, "first_token_time": first, "last_token_time": last}
    return tokens | times | {"error": "refused" if one.failed else None}


def new_guidellm(one: Sent) -> dict[str, Any]:
    start, first, last = stamps(one)
    timings = {"request_start": start, "first_token_iteration": first, "last_token_iteration": last}
    return {
        "info": {"timings": timings | {"request_end": start + 60.0}, "error": "refused" if one.failed else None},
        "prompt_tokens": one.n_in,
        "output_tokens": None if one.failed else one.n_out,
    }


def aiperf_record(one: Sent) -> dict[str, Any]:
    start_ns = 1_759_813_207_532_900_363 + round(one.start_s * 1e9)
    metadata = {"request_start_ns": start_ns, "request_end_ns": start_ns + 1, "benchmark_phase": "profiling"}
    if one.failed:
        metrics = {"error_isl": {"value": one.n_in, "unit": "tokens"}}
        return {"metadata": metadata, "metrics": metrics, "error": {"code": 503, "message": "refused"}}
    times = {"time_to_first_token": one.ttft_s * 1e3, "request_latency": (one.ttft_s + one.decode_s) * 1e3}
    counts = {"input_sequence_length": one.n_in, "output_sequence_length": one.n_out}
    metrics = {name: {"value": value, "unit": "ms"} for name, value in times.items()}
    return {"metadata": metadata, "metrics": metrics | {n: {"value": v, "unit": "tokens"} for n, v in counts.items()}}


def as_aiperf(run: list[Sent]) -> str:
    return "\n".join(json.dumps(aiperf_record(one)) for one in run)


FORMATS: dict[str, Callable[[list[Sent]], str]] = {
    "vllm": as_vllm,
    "guidellm-0.2": lambda run: as_guidellm(run, old_guidellm),
    "guidellm-0.4": lambda run: as_guidellm(run, new_guidellm),
    "aiperf": as_aiperf,
}


def read(tmp_path: Path, text: str | bytes) -> LoadResults:
    path = tmp_path / "results"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_load_results(path)


def table(rows: list[tuple[float, ...]]) -> np.ndarray[Any, Any]:
    """Rows in one order, whichever the layout kept between requests of the same arrival."""
    return np.asarray(sorted(rows, key=lambda row: tuple(-1.0 if math.isnan(one) else round(one, 4) for one in row)))


def expected(run: list[Sent]) -> np.ndarray[Any, Any]:
    """Arrival, TTFT, end to end, TPOT by its definition, tokens, failed."""
    origin, nan = min(one.start_s for one in run), math.nan
    rows = []
    for one in run:
        tpot = one.decode_s / (one.n_out - 1) if one.n_out > 1 else nan
        times = (nan, nan, nan) if one.failed else (one.ttft_s, one.ttft_s + one.decode_s, tpot)
        n_out = 0 if one.failed else one.n_out
        rows.append((one.start_s - origin, *times, float(one.n_in), float(n_out), float(one.failed)))
    return table(rows)


@folder_of_examples
@given(run=runs)
@pytest.mark.parametrize("name", FORMATS)
def test_requests_come_back(tmp_path: Path, name: str, run: list[Sent]) -> None:
    found = read(tmp_path, FORMATS[name](run))
    assert found.rows is not None
    assert found.has_arrivals
    assert found.errors == (("refused",) if any(one.failed for one in run) else ())
    rows = found.rows
    columns = [rows.arrival_s, *(latencies(rows, metric) for metric in ("ttft", "e2e", "tpot"))]
    columns += [rows.n_in, rows.n_out, rows.refused]
    got = table([tuple(map(float, row)) for row in zip(*columns, strict=True)])
    # stamps since 1970 are doubles: a quarter of a microsecond
    np.testing.assert_allclose(got, expected(run), rtol=1e-9, atol=1e-6)
    assert np.all(np.diff(rows.arrival_s) >= 0.0)


@folder_of_examples
@given(run=runs)
def test_tpot_is_one_definition_in_all_layouts(tmp_path: Path, run: list[Sent]) -> None:
    means = []
    for write in FORMATS.values():
        rows = read(tmp_path, write(run)).rows
        assert rows is not None
        values = latencies(rows, "tpot")
        means.append(math.fsum(values[np.isfinite(values)]))
    np.testing.assert_allclose(means, means[0], rtol=1e-6, atol=1e-5)


@folder_of_examples
@given(run=runs, factor=st.sampled_from([2.0, 8.0]))
def test_latencies_scale_with_the_second(tmp_path: Path, run: list[Sent], factor: float) -> None:
    """A clock that runs `factor` times as fast scales every latency of a vLLM file, and no count."""
    document = json.loads(as_vllm(run))
    slower = document | {
        "ttfts": [factor * one for one in document["ttfts"]],
        "itls": [[factor * gap for gap in gaps] for gaps in document["itls"]],
        "start_times": [factor * one for one in document["start_times"]],
    }
    one, other = (read(tmp_path, json.dumps(each)).rows for each in (document, slower))
    assert one is not None
    assert other is not None
    for metric in ("ttft", "e2e", "tpot"):
        np.testing.assert_allclose(latencies(other, metric), factor * latencies(one, metric), rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(one.n_out, other.n_out)


def rows_or_refusal(tmp_path: Path, data: str | bytes) -> None:
    refusal, found = "", None
    try:
        found = read(tmp_path, data)
    except ValueError as error:
        refusal = str(error)
    if found is None:
        assert refusal.startswith(f"{tmp_path / 'results'}: ")
        assert refusal.isprintable()
        return
    assert all(math.isfinite(value) and value >= 0.0 for value in found.aggregates.values())
    assert all(one.isprintable() for one in (*found.errors, found.model, found.version))
    if found.rows is not None:
        assert np.all(np.isfinite(found.rows.arrival_s))
        assert not np.any(latencies(found.rows, "ttft") <= -1e-6)
        assert not np.any(latencies(found.rows, "tpot") <= -1e-6)


@folder_of_examples
@given(data=st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    rows_or_refusal(tmp_path, data)


odd: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.just("\ud800\n\x1b"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)

SUMMARY = {
    "aiperf_version": "0.5.0",
    "request_throughput": {"unit": "requests/sec", "avg": 1.45},
    "request_latency": {"unit": "ms", "avg": 2620.0, "p99": 3371.0},
    "total_draft_tokens": {"unit": "tokens", "avg": 5.0},
    "spec_decode_token_weighted_acceptance_length": {"unit": "ratio", "avg": 2.5},
    "input_config": {"endpoint": {"model_names": ["m"]}},
    "error_summary": [{"error_details": {"message": "unavailable"}, "count": 2}],
}
DISTRIBUTION = {"successful": {"mean": 2.0, "min": 1.0, "count": 3, "percentiles": {"p50": 2.0, "p999": 3.0}}}
EXTRAS: dict[str, dict[str, Any]] = {
    "vllm": {
        "mean_ttft_ms": 1.0,
        "p99_e2el_ms": 2.0,
        "duration": 3.0,
        "spec_decode_acceptance_length": 2.0,
        "spec_decode_per_position_acceptance_rates": [0.5],
        "spec_decode_num_drafts": 3,
        "latencies": [1.0],
    },
    "guidellm-0.2": {"metadata": {"guidellm_version": "0.5.0"}, "args": {"model": "m"}},
}


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every position in a document."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def documents(name: str, run: list[Sent]) -> list[Any]:
    """Lines of a file, as values; with every optional part that a reader looks at."""
    if name == "summary":
        return [SUMMARY]
    lines = [json.loads(line) | EXTRAS.get(name, {}) for line in FORMATS[name](run).splitlines()]
    if name.startswith("guidellm"):
        metrics = dict.fromkeys(("request_latency", "inter_token_latency_ms", "requests_per_second"), DISTRIBUTION)
        run_fields = {"metrics": metrics, "request_totals": {"successful": 9}, "config": {"backend": {"model": "m"}}}
        lines[0]["benchmarks"][0] |= run_fields | {"worker": {"backend_model": "m"}, "duration": 3.0}
    return lines


@settings(folder_of_examples, max_examples=200)
@given(data=st.data(), value=odd)
@pytest.mark.parametrize("name", [*FORMATS, "summary"])
def test_any_value_in_any_place(tmp_path: Path, name: str, data: st.DataObject, value: Any) -> None:
    run = data.draw(st.lists(sent, min_size=1, max_size=1))
    lines = documents(name, run)
    at = data.draw(st.sampled_from(range(len(lines))))
    lines[at] = replaced(lines[at], data.draw(st.sampled_from(places(lines[at]))), value)
    rows_or_refusal(tmp_path, "\n".join(json.dumps(line) for line in lines))


@folder_of_examples
@given(data=st.data())
@pytest.mark.parametrize("name", [*FORMATS, "summary"])
def test_any_cut(tmp_path: Path, name: str, data: st.DataObject) -> None:
    text = "\n".join(json.dumps(line) for line in documents(name, data.draw(runs)))
    rows_or_refusal(tmp_path, text[: data.draw(st.integers(0, len(text)))])

"""Result files of load generators: small files in each layout with values worked out by hand, and one-line refusals.

Layouts follow the generators' own sources, named in the readers. Origin of every expected value: hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servecast.readers import load_results
from servecast.readers.load_results import LoadResults, LoadSpeculation, read_load_results
from servecast.validation.metrics import latencies

DETAILED: dict[str, Any] = {
    "date": "20260301-101500",
    "endpoint_type": "openai",
    "backend": "openai",
    "label": "openai",
    "model_id": "Qwen/Qwen3-8B",
    "tokenizer_id": "Qwen/Qwen3-8B",
    "num_prompts": 4,
    "request_rate": 2.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 4.0,
    "completed": 3,
    "failed": 1,
    "total_input_tokens": 60,
    "total_output_tokens": 8,
    "request_throughput": 0.75,
    "request_goodput": None,
    "output_throughput": 2.0,
    "total_token_throughput": 17.0,
    # the second was sent before the first; the third streams two tokens in its last message
    "input_lens": [10, 20, 30, 40],
    "output_lens": [3, 1, 4, 0],
    "ttfts": [0.5, 0.25, 0.75, 0.0],
    "itls": [[0.25, 0.75], [], [0.5, 0.25], []],
    "start_times": [353400.5, 353400.0, 353401.0, 353402.0],
    "generated_texts": ["a b c", "a", "a b c d", ""],
    "errors": ["", "", "", "Traceback (most recent call last):\n  File x\nTimeoutError: too late\n"],
    "mean_ttft_ms": 500.0,
    "median_ttft_ms": 500.0,
    "std_ttft_ms": 204.0,
    "p99_ttft_ms": 745.0,
    "mean_tpot_ms": 375.0,
    "p99.9_tpot_ms": 499.0,
    "mean_itl_ms": 437.5,
    "mean_e2el_ms": 1083.0,
    "mean_client_queue_time_ms": 3.0,
}


def saved(tmp_path: Path, *documents: object, indent: int | None = None, name: str = "results") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(one, indent=indent) for one in documents), encoding="utf-8")
    return path


def read(tmp_path: Path, *documents: object, **options: Any) -> LoadResults:
    return read_load_results(saved(tmp_path, *documents), **options)


def refused(path: Path, message: str, **options: Any) -> None:
    """Refusal of one line: the file, then `message`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        read_load_results(path, **options)
    assert str(caught.value) == f"{path}: {message}"


def assert_rows(found: LoadResults, **columns: list[float]) -> None:
    assert found.rows is not None
    for name, expected in columns.items():
        values = latencies(found.rows, name) if name in ("ttft", "tpot", "e2e") else getattr(found.rows, name)
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-12, err_msg=name)


NAN = float("nan")


@pytest.mark.parametrize("indent", [None, 2])
def test_vllm_detailed(tmp_path: Path, indent: int | None) -> None:
    found = read_load_results(saved(tmp_path, DETAILED, indent=indent))
    assert (found.generator, found.version, found.model) == ("vllm bench serve", "", "Qwen/Qwen3-8B")
    assert found.has_arrivals
    assert found.speculation is None
    assert_rows(
        found,
        arrival_s=[0.0, 0.5, 1.0, 2.0],
        ttft=[0.25, 0.5, 0.75, NAN],
        e2e=[0.25, 1.5, 1.5, NAN],
        tpot=[NAN, 0.5, 0.25, NAN],  # (1.5 - 0.5) / 2 and (1.5 - 0.75) / 3
        n_in=[20, 10, 30, 40],
        n_out=[1, 3, 4, 0],
        refused=[0, 0, 0, 1],
    )
    assert found.errors == ("TimeoutError: too late",)
    assert found.aggregates == pytest.approx(
        {
            "duration_s": 4.0,
            "completed_requests": 3.0,
            "failed_requests": 1.0,
            "input_tokens": 60.0,
            "output_tokens": 8.0,
            "throughput_rps": 0.75,
            "output_tokens_per_s": 2.0,
            "total_tokens_per_s": 17.0,
            "ttft_mean_s": 0.5,
            "ttft_p50_s": 0.5,
            "ttft_std_s": 0.204,
            "ttft_p99_s": 0.745,
            "tpot_mean_s": 0.375,
            "tpot_p99.9_s": 0.499,
            "itl_mean_s": 0.4375,
            "e2e_mean_s": 1.083,
        },
        rel=1e-12,
    )


def test_vllm_without_details_keeps_statistics(tmp_path: Path) -> None:
    gone = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")
    document = {key: value for key, value in DETAILED.items() if key not in gone} | {"latencies": [1.0] * 4}
    found = read(tmp_path, document | {"request_goodput:": 0.5})
    assert found.rows is None
    assert not found.has_arrivals
    assert found.aggregates["ttft_mean_s"] == pytest.approx(0.5, rel=1e-12)
    assert found.aggregates["goodput_rps"] == 0.5


def test_vllm_before_2026_has_no_arrivals(tmp_path: Path) -> None:
    document = {key: value for key, value in DETAILED.items() if key != "start_times"}
    found = read(tmp_path, document)
    assert not found.has_arrivals
    assert_rows(found, arrival_s=[0.0] * 4, ttft=[0.5, 0.25, 0.75, NAN], e2e=[1.5, 0.25, 1.5, NAN])
    assert found.notes == ("no start_times: only latencies, no arrivals",)


def test_vllm_ttft_of_zero_is_missing(tmp_path: Path) -> None:
    # not streamed: the first token was not seen, the end was
    late = {"ttfts": [0.5, 0.25, 0.0, 0.0], "itls": [[0.25, 0.75], [], [], []], "latencies": [1.5, 0.25, 2.0, 0.0]}
    found = read(tmp_path, DETAILED | late)
    assert_rows(found, ttft=[0.25, 0.5, NAN, NAN], e2e=[0.25, 1.5, 2.0, NAN], refused=[0, 0, 0, 1])
    assert not [name for name in found.aggregates if name.startswith(("ttft", "tpot"))]
    assert "itl_mean_s" in found.aggregates
    assert len(found.notes) == 1


def test_vllm_statistics_of_nothing_are_left_out(tmp_path: Path) -> None:
    # with all requests failed the file states 0 ms everywhere
    zeros = {f"{one}_{metric}_ms": 0.0 for one in ("mean", "p99") for metric in ("ttft", "tpot", "itl", "e2el")}
    found = read(tmp_path, {"model_id": "m", "completed": 0, "request_throughput": 0.0, **zeros})
    assert found.aggregates == {"completed_requests": 0.0, "throughput_rps": 0.0}


def test_vllm_not_a_number_is_missing(tmp_path: Path) -> None:
    changed = DETAILED | {"mean_ttft_ms": NAN, "p99_ttft_ms": float("inf"), "ttfts": [NAN, 0.25, 0.75, 0.0]}
    found = read(tmp_path, changed)
    assert_rows(found, ttft=[0.25, NAN, 0.75, NAN])
    assert "ttft_mean_s" not in found.aggregates


def test_vllm_speculation(tmp_path: Path) -> None:
    stated = {
        "spec_decode_acceptance_rate": 62.5,
        "spec_decode_acceptance_length": 2.25,
        "spec_decode_num_drafts": 8,
        "spec_decode_draft_tokens": 16,
        "spec_decode_accepted_tokens": 10,
        "spec_decode_per_position_acceptance_rates": [0.75, 0.5],
    }
    assert read(tmp_path, DETAILED | stated).speculation == LoadSpeculation(
        mean_acceptance_length=2.25,
        draft_acceptance_rate=0.625,
        survival=(0.75, 0.5),
        drafts=8,
        draft_tokens=16,
        accepted_tokens=10,
    )


def test_vllm_appended_runs(tmp_path: Path) -> None:
    runs = (DETAILED, DETAILED | {"model_id": "second"})
    assert read(tmp_path, *runs, benchmark=1).model == "second"
    refused(tmp_path / "results", "holds 2 benchmarks; benchmark must choose one from 0 to 1")
    refused(tmp_path / "results", "benchmark must be from 0 to 1, got 2", benchmark=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"itls": [[]]}, "field itls must have as many entries as input_lens (4), got 1"),
        ({"errors": [""] * 5}, "field errors must have as many entries as input_lens (4), got 5"),
        ({"output_lens": None}, "field output_lens is missing beside the other lists of requests"),
        ({"ttfts": [0.5, -0.25, 0.75, 0.0]}, "field ttfts[1] must not be negative, got -0.25"),
        ({"ttfts": [0.5, "0.25", 0.75, 0.0]}, "field ttfts[1] must be a number, got '0.25'"),
        ({"ttfts": {"a": 1}}, "field ttfts must be a list, got an object of 1"),
        ({"itls": [[0.25, -0.5], [], [], []]}, "field itls[0][1] must not be negative, got -0.5"),
        ({"itls": [[True], [], [], []]}, "field itls[0][0] must be a number, got True"),
        ({"output_lens": [3, 1, 2.5, 0]}, f"field output_lens[2] must be a whole number from 0 to {1 << 40}, got 2.5"),
        ({"start_times": [1.0, None, 1.0, 1.0]}, "field start_times[1] must be a number, got None"),
        ({"mean_ttft_ms": "fast"}, "field mean_ttft_ms must be a number, got 'fast'"),
        (
            {"itls": None, "latencies": [0.25, 1.0, 1.0, 1.0]},
            "request 0: the whole latency must not be below TTFT 0.5 s, got 0.25 s",
        ),
    ],
)
def test_vllm_refusals(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refused(saved(tmp_path, DETAILED | change), message)


def summary(mean: float, least: float = 1.0) -> dict[str, Any]:
    return {
        "successful": {
            "mean": mean,
            "median": mean,
            "mode": mean,
            "variance": 4.0,
            "std_dev": 2.0,
            "min": least,
            "max": 90.0,
            "count": 2,
            "total_sum": 2 * mean,
            "percentiles": {"p001": 1.0, "p01": 2.0, "p05": 3.0, "p50": mean, "p99": 80.0, "p999": 85.0},
        }
    }


METRICS: dict[str, Any] = {
    "requests_per_second": summary(3.0),
    "request_latency": summary(2.0),
    "time_to_first_token_ms": summary(40.0),
    "time_per_output_token_ms": summary(30.0),
    "inter_token_latency_ms": summary(20.0),
    "output_tokens_per_second": summary(50.0),
    "tokens_per_second": summary(70.0),
}


def old_request(start: float, first: float, last: float, end: float, n_in: int, n_out: int) -> dict[str, Any]:
    """As GuideLLM 0.2 and 0.3 write it; computed fields hold whatever a reader should not use."""
    return {
        "type_": "generative_text_response",
        "prompt": "p",
        "output": "o",
        "prompt_tokens": n_in,
        "output_tokens": n_out,
        "start_time": start,
        "end_time": end,
        "first_token_time": first,
        "last_token_time": last,
        "request_latency": end - start,
        "time_to_first_token_ms": 1000 * (first - start),
        "time_per_output_token_ms": 99.0,
        "inter_token_latency_ms": 99.0,
    }


def new_request(start: float, first: float | None, last: float | None, n_in: int, n_out: int | None) -> dict[str, Any]:
    """As GuideLLM 0.4 and later write it."""
    timings = {
        "resolve_start": start - 0.01,
        "request_start": start,
        "first_token_iteration": first,
        "last_token_iteration": last,
        "request_end": (last or start) + 0.25,
    }
    return {
        "type_": "generative_request_stats",
        "request_id": "r",
        "info": {"status": "completed", "timings": timings, "error": None},
        "request_start_time": start,
        "request_end_time": timings["request_end"],
        "prompt_tokens": n_in,
        "output_tokens": n_out,
        "time_to_first_token_ms": None if first is None else 1000 * (first - start),
    }


def report(successful: list[Any], errored: list[Any], incomplete: list[Any], **more: Any) -> dict[str, Any]:
    groups = {"successful": successful, "errored": errored, "incomplete": incomplete, "total": None}
    return {"benchmarks": [{"metrics": METRICS, "duration": 8.0, "requests": groups, **more}]}


def test_guidellm_0_2(tmp_path: Path) -> None:
    error = old_request(1002.0, NAN, NAN, 1003.0, 7, 0) | {"error": "503", "first_token_time": None}
    document = report(
        [
            old_request(1000.0, 1000.5, 1002.5, 1003.0, 5, 5),
            old_request(1001.0, -1.0, -1.0, 1004.0, 6, 0),
        ],
        [error],
        [error, error],
        worker={"backend_model": "llama"},
        request_totals={"successful": 2, "errored": 1, "incomplete": 2, "total": 5},
    )
    found = read(tmp_path, document)
    assert (found.generator, found.version, found.model, found.errors) == ("GuideLLM", "", "llama", ("503",))
    assert found.has_arrivals
    assert_rows(
        found,
        arrival_s=[0.0, 1.0, 2.0],
        ttft=[0.5, NAN, NAN],
        tpot=[0.5, NAN, NAN],  # (2.5 - 0.5) / 4, where the file's own fields say 99 ms
        e2e=[2.5, 3.0, NAN],
        n_in=[5, 6, 7],
        refused=[0, 0, 1],
    )
    assert found.notes[1:] == ("2 requests cut off by the end of the run left out",)
    assert found.aggregates["e2e_mean_s"] == 2.0
    assert found.aggregates["ttft_p99_s"] == pytest.approx(0.08, rel=1e-12)
    assert found.aggregates["ttft_p0.1_s"] == pytest.approx(0.001, rel=1e-12)
    assert found.aggregates["itl_mean_s"] == pytest.approx(0.02, rel=1e-12)
    assert (found.aggregates["throughput_rps"], found.aggregates["output_tokens_per_s"]) == (3.0, 50.0)
    assert (found.aggregates["completed_requests"], found.aggregates["failed_requests"]) == (2.0, 1.0)
    assert not [name for name in found.aggregates if name.startswith("tpot") or name == "itl_p99_s"]


def test_guidellm_0_5(tmp_path: Path) -> None:
    error = new_request(2003.0, None, None, 9, None)
    error["info"]["error"] = "connection refused"
    unsent = {"info": {"timings": {"request_start": None}}, "prompt_tokens": 3}
    document = report(
        [new_request(2001.0, 2001.25, 2002.25, 4, 5), new_request(2000.0, None, None, 4, None)],
        [error, unsent],
        [],
        config={"backend": {"target": "http://localhost:8000", "model": "qwen"}},
    ) | {"metadata": {"version": 1, "guidellm_version": "0.5.0", "python_version": "3.13.7"}}
    document["benchmarks"][0]["metrics"] = METRICS | {"request_totals": {"successful": 30, "errored": 2}}
    found = read(tmp_path, document)
    assert (found.version, found.model, found.errors) == ("0.5.0", "qwen", ("connection refused", "no message"))
    assert_rows(
        found,
        arrival_s=[0.0, 1.0, 3.0],
        ttft=[NAN, 0.25, NAN],
        tpot=[NAN, 0.25, NAN],
        e2e=[0.25, 1.25, NAN],
        n_out=[0, 5, 0],
    )
    assert found.notes[1:] == (
        "1 failed requests that were never sent left out",
        "holds a sample of 2 of 30 successful requests: arrivals have gaps",
    )


def test_guidellm_between_0_3_and_0_4(tmp_path: Path) -> None:
    timings = {"request_start": 10.0, "first_iteration": 10.5, "last_iteration": 12.5, "request_end": 13.0}
    one = {"scheduler_info": {"request_timings": timings}, "prompt_tokens": 8, "output_tokens": 3}
    assert_rows(read(tmp_path, report([one], [], [])), ttft=[0.5], tpot=[1.0], e2e=[2.5])


def test_guidellm_ttft_without_stamps(tmp_path: Path) -> None:
    base = {"request_start_time": 5.0, "request_end_time": 7.0, "prompt_tokens": 8, "output_tokens": 3}
    stated = [base | {"time_to_first_token_ms": 500.0}, base | {"time_to_first_token_ms": 0.0}, base]
    assert_rows(read(tmp_path, report(stated, [], [])), ttft=[0.5, NAN, NAN], e2e=[2.0, 2.0, 2.0])


def test_guidellm_statistics_that_count_missing_as_zero_are_left_out(tmp_path: Path) -> None:
    document = report([], [], [])
    empty = {"successful": {"mean": 0.0, "count": 0, "min": 0.0}}
    document["benchmarks"][0]["metrics"] = METRICS | {
        "time_to_first_token_ms": summary(40.0, least=0.0),
        "tokens_per_second": empty,
    }
    found = read(tmp_path, document)
    assert found.rows is None
    assert not found.has_arrivals
    assert not [name for name in found.aggregates if name.startswith("ttft") or name == "total_tokens_per_s"]


def test_guidellm_null_among_errored_requests(tmp_path: Path) -> None:
    found = read(tmp_path, report([], [None], []))
    assert found.rows is None
    assert found.errors == ("no message",)


def test_guidellm_several_benchmarks(tmp_path: Path) -> None:
    two = report([old_request(0.5, 1.0, 2.0, 2.0, 1, 2)], [], [])["benchmarks"] * 2
    assert read(tmp_path, {"benchmarks": two}, benchmark=1).rows is not None
    refused(tmp_path / "results", "holds 2 benchmarks; benchmark must choose one from 0 to 1")
    refused(saved(tmp_path, {"benchmarks": []}), "holds no benchmark")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_token_time": 9.0}, "the first token must not lie before the start 10.0, got 9.0"),
        ({"last_token_time": 9.0}, "the end must not lie before the start 10.0, got 9.0"),
        ({"last_token_time": 10.25}, "the whole latency must not be below TTFT 0.5 s, got 0.25 s"),
        ({"start_time": None}, "field request_start_time is missing"),
        ({"prompt_tokens": None}, f"field prompt_tokens must be a whole number from 0 to {1 << 40}, got None"),
        ({"output_tokens": -1}, f"field output_tokens must be a whole number from 0 to {1 << 40}, got -1"),
        ({"info": [1, 2]}, "field info must be an object, got a list of 2"),
    ],
)
def test_guidellm_refusals(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = saved(tmp_path, report([old_request(10.0, 10.5, 12.0, 12.0, 4, 4) | change], [], []))
    refused(path, f"benchmarks[0].requests.successful[0]: {message}")


BASE_NS = 1_759_813_207_532_900_363


def record(start_s: float, n_in: int, n_out: int, phase: str = "profiling", **metrics: float) -> dict[str, Any]:
    """As AIPerf writes it; times of `metrics` in milliseconds."""
    return {
        "metadata": {
            "session_num": 0,
            "request_start_ns": BASE_NS + round(start_s * 1e9),
            "request_end_ns": BASE_NS + round(start_s * 1e9) + 3_000_000_000,
            "worker_id": "worker_1",
            "benchmark_phase": phase,
            "was_cancelled": False,
        },
        "metrics": {
            "input_sequence_length": {"value": n_in, "unit": "tokens"},
            "output_sequence_length": {"value": n_out, "unit": "tokens"},
            "inter_chunk_latency": {"value": [4.9, 5.3], "unit": "ms"},
        }
        | {name: {"value": value, "unit": "ms"} for name, value in metrics.items()},
        "error": None,
    }


CANCELLED: dict[str, Any] = record(2.0, 0, 0) | {
    "metrics": {"error_isl": {"value": 550, "unit": "tokens"}},
    "error": {"code": 499, "type": "RequestCancellationError", "message": "Request was cancelled after 0.000 seconds"},
}


def test_aiperf_records(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        record(-5.0, 1, 1, phase="warmup"),
        record(1.0, 40, 5, time_to_first_token=500.0, request_latency=2500.0),
        record(0.0, 30, 1),  # not streamed: the end of the request is all there is
        CANCELLED,
    )
    assert (found.generator, found.aggregates, found.has_arrivals) == ("AIPerf", {}, True)
    assert_rows(
        found,
        arrival_s=[0.0, 1.0, 2.0],
        ttft=[NAN, 0.5, NAN],
        tpot=[NAN, 0.5, NAN],
        e2e=[3.0, 2.5, NAN],
        n_in=[30, 40, 550],
        n_out=[1, 5, 0],
        refused=[0, 0, 1],
    )
    assert found.errors == ("Request was cancelled after 0.000 seconds",)
    assert found.notes == ("1 warm-up requests left out",)


def test_aiperf_records_with_speculation(tmp_path: Path) -> None:
    counted = record(0.0, 4, 5)
    for name, value in (("steps", 4), ("draft_tokens", 8), ("accepted_draft_tokens", 5)):
        counted["metrics"][f"spec_decode_{name}"] = {"value": value, "unit": "tokens"}
    found = read(tmp_path, counted, record(1.0, 4, 1), counted).speculation
    assert found == LoadSpeculation(
        mean_acceptance_length=2.25, draft_acceptance_rate=0.625, drafts=8, draft_tokens=16, accepted_tokens=10
    )


def test_aiperf_summary(tmp_path: Path) -> None:
    document = {
        "schema_version": "1.1",
        "aiperf_version": "0.5.0",
        "request_throughput": {"unit": "requests/sec", "avg": 1.45},
        "request_latency": {"unit": "ms", "avg": 2620.0, "p50": 2568.0, "p99": 3371.0, "std": 297.0, "count": 20},
        "request_count": {"unit": "requests", "avg": 20.0},
        "time_to_first_token": {"unit": "us", "avg": 250000.0},
        "inter_token_latency": {"unit": "ms", "avg": 5.0, "p99": 8.0},
        "inter_chunk_latency": {"unit": "ms", "p99": 9.0},
        "benchmark_duration": {"unit": "sec", "avg": 13.8},
        "spec_decode_token_weighted_acceptance_length": {"unit": "ratio", "avg": 2.5},
        "spec_decode_overall_draft_acceptance_rate": {"unit": "%", "avg": 75.0},
        "input_config": {"endpoint": {"model_names": ["Qwen/Qwen3-0.6B"]}},
        "error_summary": [{"error_details": {"code": 503, "message": "unavailable"}, "count": 2}],
    }
    found = read(tmp_path, document)
    assert (found.generator, found.version, found.model) == ("AIPerf", "0.5.0", "Qwen/Qwen3-0.6B")
    assert (found.rows, found.has_arrivals, found.errors) == (None, False, ("unavailable",))
    assert found.aggregates == pytest.approx(
        {
            "throughput_rps": 1.45,
            "completed_requests": 20.0,
            "e2e_mean_s": 2.62,
            "e2e_p50_s": 2.568,
            "e2e_p99_s": 3.371,
            "e2e_std_s": 0.297,
            "ttft_mean_s": 0.25,
            "tpot_mean_s": 0.005,
            "tpot_p99_s": 0.008,
            "itl_p99_s": 0.009,
            "duration_s": 13.8,
        },
        rel=1e-12,
    )
    assert found.speculation == LoadSpeculation(mean_acceptance_length=2.5, draft_acceptance_rate=0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {}}, f"field metadata.request_start_ns must be a whole number from 0 to {2**63 - 1}, got None"),
        ({"metrics": None}, f"field metrics.input_sequence_length.value must be a whole number from 0 to {1 << 40}"),
        ({"metrics": [1]}, "field metrics must be an object, got a list of 1"),
    ],
)
def test_aiperf_refusals(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = saved(tmp_path, record(0.0, 1, 1), record(1.0, 1, 1) | change)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        read_load_results(path)
    assert str(caught.value).startswith(f"{path}: line 2: {message}")


def test_aiperf_unit_must_be_known(tmp_path: Path) -> None:
    one = record(0.0, 1, 1)
    one["metrics"]["request_latency"] = {"value": 1.0, "unit": "min"}
    units = "ns, us, ms, s, sec, seconds"
    refused(saved(tmp_path, one), f"line 1: field metrics.request_latency.unit must be one of {units}, got 'min'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"{", "is not valid JSON, got '{'"),
        (b"[" * 100_000, f"is not valid JSON, got '{'[' * 56}..."),
        (b"\xff\xfe{}", "is not valid JSON, got '\ufffd\ufffd{}'"),
        (b"{}", "is no result file of vllm bench serve, GuideLLM or AIPerf"),
        (b"[1, 2]\n{}", "is no result file of vllm bench serve, GuideLLM or AIPerf"),
        (b"{}\n{", "line 2 is not valid JSON, got '{'"),
        (b'{"metadata": {}, "metrics": {}}\n{', "line 1: field metadata.request_start_ns must be a whole number"),
    ],
)
def test_what_is_no_result_file(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "results"
    path.write_bytes(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        read_load_results(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_paths(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory, not a result file")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        read_load_results(tmp_path / "nowhere")


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, DETAILED)
    lines = saved(tmp_path, *[record(float(i), 1, 1) for i in range(4)], name="lines")
    monkeypatch.setattr(load_results, "MAX_BYTES", 600)
    refused(path, "is larger than 0 MiB")
    refused(saved(tmp_path, {}, DETAILED, name="second"), "is larger than 0 MiB")
    assert read_load_results(lines).rows is not None  # longer, but read line by line
    monkeypatch.setattr(load_results, "MAX_REQUESTS", 3)
    refused(lines, "has more than 3 requests; cut it into parts")
    monkeypatch.setattr(load_results, "MAX_LINE_BYTES", 100)
    refused(lines, "line 2 is longer than 0 MiB")


def test_errors_are_bounded(tmp_path: Path) -> None:
    failed = [CANCELLED | {"error": {"message": f"{i} {'x' * 500}\x1b[0m"}} for i in range(100)]
    errors = read(tmp_path, *failed).errors
    assert len(errors) == 20
    assert {len(one) for one in errors} == {200}

"""Differences of hand-made scrapes."""

from __future__ import annotations

import pytest
from fake_server import FakeServer

from servecast.readers.acceptance_counters import counters_between
from servecast.validation.engine_metrics import scrape, snapshot, window


def _text(
    *, requests: int, queue_s: float, preempted: int, drafts: int | None = None, model: str = "m", engine: int = 0
) -> str:
    """As vLLM writes it, a few metrics only; with drafts of 2 tokens, all first and half of the second accepted."""
    labels = f'{{engine="{engine}",model_name="{model}"}}'
    lines = [
        "# HELP vllm:request_queue_time_seconds Histogram of time spent in WAITING phase.",
        "# TYPE vllm:request_queue_time_seconds histogram",
        f'vllm:request_queue_time_seconds_bucket{{engine="{engine}",le="0.3",model_name="{model}"}} {requests}.0',
        f"vllm:request_queue_time_seconds_count{labels} {requests}.0",
        f"vllm:request_queue_time_seconds_sum{labels} {queue_s}",
        f"vllm:request_decode_time_seconds_count{labels} {requests}.0",
        f"vllm:request_decode_time_seconds_sum{labels} {2.0 * requests}",
        f"vllm:num_preemptions_total{labels} {preempted}.0",
        f"vllm:num_preemptions_created{labels} 1.7957204905367029e+09",
        'vllm:cache_config_info{block_size="128",cache_dtype="auto",num_gpu_blocks="1365",swap="None"} 1.0',
        "python_gc_objects_collected_total 12.0",
    ]
    if drafts is not None:
        prefix = "vllm:spec_decode_num_"
        lines += [
            f"{prefix}drafts_total{labels} {drafts}.0",
            f"{prefix}draft_tokens_total{labels} {2 * drafts}.0",
            f"{prefix}accepted_tokens_total{labels} {1.5 * drafts}",
        ]
        lines += [
            f'{prefix}accepted_tokens_per_pos_total{{engine="{engine}",model_name="{model}",position="{j}"}} {share}'
            for j, share in enumerate((drafts, drafts / 2))
        ]
    return "\n".join(lines) + "\n"


def test_a_window_is_the_difference_of_its_scrapes() -> None:
    first = snapshot(_text(requests=10, queue_s=1.0, preempted=1))
    second = snapshot(_text(requests=14, queue_s=3.0, preempted=4))
    found = window(first, second)
    assert found.requests == 4
    assert found.phase_s == {"queue": 2.0, "decode": 8.0}
    assert found.phase_mean_s == {"queue": 0.5, "decode": 2.0}
    assert found.totals == {"preemptions": 3.0}
    assert (found.kv_blocks, found.block_tokens) == (1365, 128)
    assert found.speculation is None


def test_a_window_without_requests_has_no_mean() -> None:
    one = snapshot(_text(requests=10, queue_s=1.0, preempted=1))
    found = window(one, one)
    assert found.requests == 0
    assert found.phase_mean_s == {}


def test_speculation_counters() -> None:
    first = snapshot(_text(requests=1, queue_s=0.0, preempted=0, drafts=10))
    second = snapshot(_text(requests=2, queue_s=0.0, preempted=0, drafts=30))
    found = window(first, second).speculation
    assert found is not None
    assert (found.drafts, found.draft_tokens, found.accepted_tokens) == (20.0, 40.0, 30.0)
    assert found.accepted_per_position == (20.0, 10.0)
    assert first.speculation is not None
    assert second.speculation is not None
    sample = counters_between(first.speculation, second.speculation)
    assert (sample.draft_length, sample.mean_acceptance_length) == (2, 2.5)


def test_engines_behind_one_address_are_summed_and_a_model_is_chosen() -> None:
    text = _text(requests=1, queue_s=1.0, preempted=0)
    both = text + _text(requests=2, queue_s=4.0, preempted=1, engine=1)
    assert snapshot(both).phase_s["queue"] == (5.0, 3.0)
    other = text + _text(requests=7, queue_s=9.0, preempted=2, model="n")
    assert snapshot(other, model="n").phase_s["queue"] == (9.0, 7.0)
    with pytest.raises(ValueError, match="has no metric of vLLM for model 'x'"):
        snapshot(text, model="x")


def test_a_restart_is_refused() -> None:
    first = snapshot(_text(requests=10, queue_s=1.0, preempted=1), source="before")
    second = snapshot(_text(requests=2, queue_s=0.1, preempted=0), source="after")
    with pytest.raises(ValueError, match=r"after: queue sum must not fall after before, got 0\.1 after 1: the engine"):
        window(first, second)


def test_speculation_that_starts_within_the_window() -> None:
    first = snapshot(_text(requests=1, queue_s=0.0, preempted=0))
    found = window(first, snapshot(_text(requests=2, queue_s=0.0, preempted=0, drafts=30))).speculation
    assert found is not None
    assert found.accepted_per_position == (30.0, 15.0)


@pytest.mark.parametrize("text", ["", "<html>", "process_cpu_seconds_total 3.0\n"])
def test_text_without_the_engines_metrics(text: str) -> None:
    with pytest.raises(ValueError, match="metrics: has no metric of vLLM"):
        snapshot(text)


@pytest.mark.parametrize("line", ["vllm:x", "vllm:x{ 1", "vllm:x one"])
def test_a_broken_line_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="metrics: line 2 is not Prometheus text, got 'vllm:x"):
        snapshot(f"# HELP\n{line}\n")


def test_scraping() -> None:
    text = _text(requests=3, queue_s=1.0, preempted=0)
    with FakeServer(metrics=text) as server:
        assert scrape(f"{server.url}/v1") == text
        url = server.url
    with pytest.raises(ValueError, match=r"/metrics could not be read: .*refused"):
        scrape(url)
    with pytest.raises(ValueError, match="url must be http"):
        scrape("file:///etc/hosts")


def test_an_address_without_metrics() -> None:
    with FakeServer() as server, pytest.raises(ValueError, match="/other/metrics answered 404"):
        scrape(f"{server.url}/other")

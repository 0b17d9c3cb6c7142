"""A trace on a named fleet: what the records say, and what is refused. Expected values: by hand from a deployment's own
step times and memory, the reader's and the planner's own rules, and conservation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servecast.calibration.profile import load_profile
from servecast.model.arrivals import spread_quantised, workload_from_trace
from servecast.model.batch_steps import tabulated_steps
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.slo import Slo
from servecast.model.workload import Trace
from servecast.readers.catalogues import gpu, llm
from servecast.readers.deployments import deployment, serving_formats
from servecast.readers.traces import read_trace
from servecast.simulating import (
    figures,
    prepare_fleet,
    result_document,
    rows_table,
    simulate_ensemble,
    simulate_fleet,
)
from servecast.validation.metrics import summary

LLAMA, H100 = llm("llama-3.1-8b"), gpu("h100")


def trace_of(t_s: list[float], n_in: list[int], n_out: list[int], **more: Any) -> Trace:
    return Trace(name="made", t_s=np.array(t_s, dtype=np.float64), n_in=np.array(n_in), n_out=np.array(n_out), **more)


def busy(count: int = 400, seed: int = 3) -> Trace:
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.exponential(0.02, count))
    return trace_of((t - t[0]).tolist(), rng.integers(1, 3000, count).tolist(), rng.integers(1, 200, count).tolist())


def test_lone_requests_by_hand() -> None:
    """Hand: a prompt alone takes P(n) + the first token's cost; then n_out - 1 decode steps of one sequence."""
    trace = trace_of([0.0, 100.0], [1024, 512], [5, 1])
    found = simulate_fleet(trace, LLAMA, H100, replicas=1)
    one = deployment("llama-3.1-8b", "h100", "vllm")
    steps = tabulated_steps(load_profile(), one, "vllm", max_batch=2, longest=1029.0, chunk_tokens=8192.0)
    ttft = [steps.prefill(n) + steps.first_token_s for n in (1024, 512)]
    np.testing.assert_allclose(found.rows.first_token_s - found.rows.arrival_s, ttft, rtol=1e-12)
    decode = sum(steps.decode(1, 1024 + k)[0] for k in range(4))
    assert found.rows.last_token_s[0] - found.rows.first_token_s[0] == pytest.approx(decode, rel=1e-9)
    assert found.rows.last_token_s[1] == found.rows.first_token_s[1]
    assert found.warnings == ()


def test_memory_and_formats_are_the_planners() -> None:
    """Rule: the KV cache is what the memory model leaves, in whole blocks; fp8 cache holds twice the tokens of bf16."""
    found = simulate_fleet(busy(20), LLAMA, H100, replicas=1, max_num_seqs=64, max_num_batched_tokens=2048)
    one = deployment("llama-3.1-8b", "h100", "vllm")
    budget = memory_budget(one, MEMORY_RULES["vllm"], max_batched_tokens=2048, max_num_seqs=64)
    assert found.limits.kv_tokens == pytest.approx(budget.kv_tokens, rel=1e-12)
    assert found.deployment == one
    half = prepare_fleet(
        busy(20), LLAMA, H100, replicas=1, kv_precision="fp8", max_num_seqs=64, max_num_batched_tokens=2048
    )
    assert half.limits.kv_tokens == pytest.approx(2.0 * budget.kv_tokens, rel=1e-12)
    assert half.deployment.kv_format == "fp8"


def test_formats_as_a_plan_resolves_them() -> None:
    """Documented: fp16 means bf16 for a cache; blackwell stores a quantised checkpoint's cache in fp8."""
    assert serving_formats(LLAMA, "vllm", "auto", "fp16") == ("bf16", "bf16", "bf16")
    assert serving_formats(LLAMA, "vllm", "fp8", compute_capability=100)[2] == "fp8"
    assert serving_formats(LLAMA, "vllm", "fp8", "bf16", compute_capability=100)[2] == "bf16"


def test_every_request_has_its_row() -> None:
    """Conservation: order, lengths and stamps of the input; round robin; figures are those of the rows."""
    trace = busy()
    slos = (Slo(metric="ttft", percentile=99.0, limit_s=0.2),)
    found = simulate_fleet(trace, LLAMA, H100, replicas=3, slos=slos)
    rows = found.rows
    np.testing.assert_array_equal(rows.arrival_s, trace.t_s)
    np.testing.assert_array_equal(rows.n_in, trace.n_in)
    np.testing.assert_array_equal(rows.replica, np.arange(400) % 3)
    assert np.all(rows.arrival_s <= rows.scheduled_s)
    assert np.all(rows.scheduled_s < rows.first_token_s)
    assert np.all(rows.first_token_s <= rows.last_token_s)
    assert found.summary == summary(rows, slos)


def test_rate_scale_divides_the_stamps() -> None:
    found = simulate_fleet(busy(50), LLAMA, H100, replicas=1, rate_scale=2.0)
    np.testing.assert_allclose(found.rows.arrival_s, busy(50).t_s / 2.0, rtol=1e-12)


def test_more_replicas_wait_less() -> None:
    """Monotone: the same stream on more engines has no longer mean end to end."""
    means = [simulate_fleet(busy(), LLAMA, H100, replicas=n).summary.mean["e2e"] for n in (1, 2, 4)]
    assert means == sorted(means, reverse=True)


def test_the_seed_is_of_the_random_router_alone() -> None:
    def e2e(router: Any, seed: int) -> float:
        return simulate_fleet(busy(), LLAMA, H100, replicas=2, router=router, seed=seed).summary.mean["e2e"]

    assert e2e("round_robin", 1) == e2e("round_robin", 2)
    assert e2e("random", 1) == e2e("random", 1)
    assert e2e("random", 1) != e2e("random", 2)


def test_rounded_stamps_are_spread_as_in_a_plan() -> None:
    """Rule of `workload_from_trace`: 6 requests of each stamp 3 s apart, 5 gaps of 6 are zero."""
    t = np.repeat(np.arange(0.0, 300.0, 3.0), 6)
    trace = trace_of(t.tolist(), [100] * t.size, [10] * t.size)
    found = simulate_fleet(trace, LLAMA, H100, replicas=1)
    np.testing.assert_array_equal(found.rows.arrival_s, spread_quantised(t, 3.0))
    assert found.warnings[0] == workload_from_trace(trace).warnings[0]
    assert "quantised to 3 s" in found.warnings[0]


def test_batches_stay_batches() -> None:
    """Rule: equal stamps on no coarse grid are taken as they are; so are requests that all come at once."""
    rng = np.random.default_rng(1)
    t = np.repeat(np.sort(rng.uniform(0.0, 1e4, 50)), 4)
    found = simulate_fleet(trace_of((t - t[0]).tolist(), [10] * 200, [3] * 200), LLAMA, H100, replicas=1)
    np.testing.assert_array_equal(found.rows.arrival_s, t - t[0])
    assert "taken as batches" in found.warnings[0]
    at_once = simulate_fleet(trace_of([0.0] * 8, [10] * 8, [3] * 8), LLAMA, H100, replicas=1)
    assert "taken as batches" in at_once.warnings[0]
    assert np.all(np.isfinite(at_once.rows.last_token_s))


def test_requests_beyond_the_cache_are_named_not_dropped() -> None:
    """Rule: tokens in the cache at the end are n_in + n_out - 1. Llama 3.1's context is 131072 tokens (its card)."""
    capacity = prepare_fleet(busy(2), LLAMA, H100, replicas=1).limits.blocks * 16
    assert capacity > 131072
    trace = trace_of([0.0, 1.0, 2.0, 3.0], [100, capacity, capacity - 1, 131000], [2, 1, 3, 100])
    found = simulate_fleet(trace, LLAMA, H100, replicas=1)
    assert found.rows.refused.tolist() == [False, False, True, False]
    assert found.warnings == (
        f"1 of 4 requests are longer than the KV cache of {capacity} tokens and refused; the first is request 2 with "
        f"{capacity - 1} prompt and 3 output tokens",
        f"2 of 4 requests are longer than the context of 131072 tokens of {LLAMA.name} and served all the same; the "
        f"first is request 1 with {capacity} prompt and 1 output tokens",
    )
    table = rows_table(found.rows)
    assert table["status"].tolist() == ["ok", "ok", "refused", "ok"]
    assert np.isnan(table["e2e_s"]).tolist() == [False, False, True, False]
    assert np.isnan(table["tpot_s"]).tolist() == [False, True, True, False]


def test_prefix_caching_follows_the_trace() -> None:
    """Hand: the second prompt shares two of its three blocks of 512 with the first: 1024 tokens are there."""
    trace = trace_of([0.0, 10.0], [1536, 1536], [2, 2], prefix_blocks=((1, 2, 3), (1, 2, 4)), block_tokens=512)
    assert simulate_fleet(trace, LLAMA, H100, replicas=1).rows.cached_tokens.tolist() == [0, 1024]
    off = simulate_fleet(trace, LLAMA, H100, replicas=1, prefix_caching=False)
    assert off.rows.cached_tokens.tolist() == [0, 0]
    with pytest.raises(ValueError, match="prefix_caching must be off for a trace without prefix blocks"):
        simulate_fleet(busy(2), LLAMA, H100, replicas=1, prefix_caching=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"replicas": 0}, "replicas must be >= 1, got 0"),
        ({"tp": 0}, "tp must be >= 1, got 0"),
        ({"tp": 3}, "tp must divide the 32 attention heads"),
        ({"pp": 33}, "pp must be at most the 32 layers"),
        ({"router": "nearest"}, "router must be one of round_robin, least_loaded, random, got 'nearest'"),
        ({"rate_scale": 0.0}, "rate_scale must be positive and finite, got 0.0"),
        ({"rate_scale": float("nan")}, "rate_scale must be positive and finite, got nan"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be >= 1, got 0"),
        ({"max_num_batched_tokens": 100}, "max_num_batched_tokens must be >= max_num_seqs 256, got 100"),
        ({"kv_precision": "int8"}, "kv_precision must be auto, bf16 or fp8, got 'int8'"),
        ({"precision": "fp9"}, "precision must be one of"),
        ({"engine": "vlm"}, "engine"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_fleet(busy(2), LLAMA, H100, **{"replicas": 1, **changed})


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="trace must hold at least 1 request, got 0"):
        simulate_fleet(trace_of([], [], []), LLAMA, H100, replicas=1)


def test_weights_that_do_not_fit_are_refused() -> None:
    """Hand: 70 billion parameters in 16 bit are 141 GB, an H100 has 80 (86 with GiB)."""
    with pytest.raises(ValueError, match=r"does not fit on h100_sxm at tp 1, pp 1: 141\.\d GB of weights"):
        simulate_fleet(busy(2), llm("llama-3.1-70b"), H100, replicas=1)


def test_progress_ends_at_the_last_request() -> None:
    seen: list[tuple[int, int]] = []
    simulate_fleet(busy(), LLAMA, H100, replicas=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (400, 400)


def test_the_document_states_what_was_asked() -> None:
    found = simulate_fleet(busy(), LLAMA, H100, replicas=2, slos=[Slo(metric="ttft", percentile=99.0, limit_s=0.2)])
    document = result_document(found, wall_s=1.5)
    assert (document["replicas"], document["gpus"], document["tp"], document["router"]) == (2, 2, 1, "round_robin")
    assert document["kv_tokens"] == found.limits.blocks * 16
    assert document["metrics"]["ttft"]["p99_s"] == found.summary.percentiles["ttft"][99.0]
    assert document["metrics"]["attainment"] == found.summary.attainment
    assert document["wall_s"] == 1.5
    flat = figures(found.summary)
    assert flat["tpot_p99.9_s"] == found.summary.percentiles["tpot"][99.9]
    assert flat["slo_attainment"] == found.summary.slo_attainment


def test_an_ensemble_surrounds_the_run() -> None:
    """Rule: the same seed gives the same members; the median is near the run itself."""
    fleet = prepare_fleet(busy(2000), LLAMA, H100, replicas=2, router="random")
    one = simulate_ensemble(fleet, 3, backend="serial")
    assert one == simulate_ensemble(fleet, 3, backend="serial", jobs=2)
    run = figures(simulate_fleet(busy(2000), LLAMA, H100, replicas=2, router="random").summary)
    for name in ("tpot_p50_s", "throughput_rps"):
        assert one[name].lo <= one[name].median <= one[name].hi
        # 2000 gaps and lengths: standard errors of a few per cent
        assert one[name].median == pytest.approx(run[name], rel=0.15)
    assert one["requests"].lo == 2000.0
    assert one != simulate_ensemble(replace(fleet, seed=2), 3, backend="serial")


def test_quantised_public_trace(data_path: Callable[..., Path]) -> None:
    """Mooncake's conversation trace: its README states 12,031 requests; the stamps lie on a 3 s grid."""
    trace = read_trace(data_path("mooncake", "conversation.csv.gz"), prefixes=True)
    found = simulate_fleet(trace, LLAMA, H100, replicas=8)
    assert found.summary.requests == 12031
    assert "quantised to 3 s" in found.warnings[0]
    assert found.summary.cached_share > 0.0

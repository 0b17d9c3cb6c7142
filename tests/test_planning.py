"""The planning query and its JSON on recorded traffic. Expected values: the documented keys, the limits that were
asked, published statistics of the Azure traces, and rules between the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servecast.cli.output import to_json
from servecast.model.arrivals import scaled, workload_from_parameters, workload_from_trace
from servecast.model.hardware import Offer
from servecast.model.slo import Slo
from servecast.model.workload import FixedLength, Workload
from servecast.planning import Answer, plan, policy_table, result_document
from servecast.policies import emit, loads
from servecast.readers.catalogues import gpu, llm
from servecast.readers.traces import read_trace

DataPath = Callable[..., Path]

PRICES = {"h100": 2.9, "h200": 3.5, "b200": 5.0, "l40s": 1.1}
LIMITS = {"ttft_p99": 2.0, "tpot_p99": 0.05}
SLOS = (Slo(metric="ttft", percentile=99.0, limit_s=2.0), Slo(metric="tpot", percentile=99.0, limit_s=0.05))
CASES = [(trace, model) for trace in ("conv", "code") for model in ("Llama-3.1-70B", "Llama-3.1-8B")]


def offers(**prices: float) -> list[Offer]:
    return [Offer(gpu=gpu(name), usd_per_hour=price) for name, price in prices.items()]


def steady(rate_rps: float = 5.0) -> Workload:
    return workload_from_parameters(rate_rps, n_in=FixedLength(500.0), n_out=FixedLength(100.0))


def ask(workload: Workload, model: str = "llama-3.1-8b", **changed: Any) -> Answer:
    return plan(workload, llm(model), offers(h100=2.9, l40s=1.1), SLOS, **{"load_curve": False, **changed})


@pytest.fixture(scope="module")
def azure(data_path: DataPath) -> dict[tuple[str, str], dict[str, Any]]:
    """Parsed JSON of each trace and model."""
    found = {}
    for trace in ("conv", "code"):
        workload = workload_from_trace(read_trace(data_path("azure-llm-2023", f"{trace}.csv.gz")))
        for model in ("Llama-3.1-70B", "Llama-3.1-8B"):
            answer = plan(workload, llm(model), offers(**PRICES), SLOS)
            found[trace, model] = json.loads(to_json(result_document(answer)))
    return found


# ---- Azure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_azure_has_every_key(case: tuple[str, str], azure: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Keys: the documented list."""
    document = azure[case]
    assert document["status"] == "optimal"
    assert {"gpu", "tp", "pp", "replicas", "max_num_seqs", "cost_usd_per_hour"} <= set(document["plan"])
    assert {"ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "slo_attainment"} == set(document["predicted"])
    assert document["binds"]
    assert document["profile"]
    assert isinstance(document["warnings"], list)
    assert len(document["alternatives"]) >= 5


@pytest.mark.parametrize("case", CASES)
def test_azure_intervals(case: tuple[str, str], azure: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Rules: finite, lo <= value <= hi, p50 <= p99, of the plan and of every alternative."""
    document = azure[case]
    for predicted in (document["predicted"], *(one["predicted"] for one in document["alternatives"])):
        for interval in predicted.values():
            assert set(interval) == {"value", "lo", "hi"}
            assert all(math.isfinite(number) for number in interval.values())
            assert 0.0 <= interval["lo"] <= interval["value"] <= interval["hi"]
        for end in ("value", "lo", "hi"):
            assert predicted["ttft_p50_s"][end] <= predicted["ttft_p99_s"][end]
            assert predicted["tpot_p50_s"][end] <= predicted["tpot_p99_s"][end]
        assert predicted["slo_attainment"]["hi"] <= 1.0


@pytest.mark.parametrize("case", CASES)
def test_azure_plans_meet_the_limits(case: tuple[str, str], azure: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Limits as asked, quantiles to 0.1 %; two limits at 99 % hold together for at least 98 %; cost by hand."""
    document = azure[case]
    for predicted in (document["predicted"], *(one["predicted"] for one in document["alternatives"])):
        for name, limit in LIMITS.items():
            assert predicted[f"{name}_s"]["value"] <= limit * 1.001
        assert predicted["slo_attainment"]["value"] >= 0.98
    prices = {gpu(name).name: price for name, price in PRICES.items()}
    for one in (document["plan"], *document["alternatives"]):
        gpus = one["replicas"] * one["tp"] * one["pp"]
        assert one["gpus"] == gpus
        assert one["cost_usd_per_hour"] == pytest.approx(gpus * prices[one["gpu"]], rel=1e-12)
        assert one["cost_usd_per_hour"] >= document["plan"]["cost_usd_per_hour"]


def test_azure_traces_are_the_published_ones(azure: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Published: 19,366 and 8,819 requests within an hour (Azure public dataset), trace notes: the rates."""
    requests = {trace: azure[trace, "Llama-3.1-8B"]["workload"]["requests"] for trace in ("conv", "code")}
    assert requests == {"conv": 19366, "code": 8819}
    rates = [azure[trace, "Llama-3.1-8B"]["workload"]["rate_rps"] for trace in ("conv", "code")]
    np.testing.assert_allclose(rates, [5.5, 2.5], rtol=0.05)


def test_azure_bursts_are_warned_of(azure: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Rule: IDC grows from 1 s to 60 s on both traces; the busiest minute of `code` is above three times the mean."""
    for case in CASES:
        assert any("non-stationary" in warning for warning in azure[case]["warnings"])
    assert any("busiest minute" in warning for warning in azure["code", "Llama-3.1-70B"]["warnings"])


def test_azure_larger_model_costs_more(azure: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Rule: nine times the weights on the same traffic."""
    for trace in ("conv", "code"):
        large, small = (azure[trace, model]["plan"]["cost_usd_per_hour"] for model in ("Llama-3.1-70B", "Llama-3.1-8B"))
        assert large > small


# ---- the query -----------------------------------------------------------------------------------------


def test_rate_scale_is_the_scaled_workload() -> None:
    """Rule: `rate_scale` 4 of 5 requests a second is 20 requests a second."""
    found = ask(steady(), rate_scale=4.0)
    assert found.request.workload.rate_rps == 20.0
    assert found.plan == ask(scaled(steady(), 4.0)).plan == ask(steady(20.0)).plan


def test_more_load_never_costs_less() -> None:
    """Rule: monotone in load."""
    costs = []
    for rate in (0.5, 2.0, 8.0, 32.0, 128.0):
        chosen = ask(steady(rate)).plan.plan
        assert chosen is not None
        costs.append(chosen.usd_per_hour)
    assert costs == sorted(costs)
    assert costs[-1] > 10.0 * costs[0]


def test_search_degrees_are_kept() -> None:
    """Rule: nothing outside the degrees and batch limits that were asked."""
    found = ask(steady(), tp=(2,), pp=(1,), max_num_seqs=(16,)).plan
    assert found.plan is not None
    for one in (found.plan, *found.alternatives):
        assert (one.tp, one.pp, one.max_num_seqs) == (2, 1, 16)


def test_formats_follow_the_request() -> None:
    """Rule: auto keeps the checkpoint's bf16; fp8 halves the weights and needs no more money; the cache is its own."""
    auto, narrow = ask(steady(20.0)), ask(steady(20.0), precision="fp8", kv_precision="fp8")
    assert auto.plan.plan is not None
    assert narrow.plan.plan is not None
    assert (auto.plan.plan.precision, auto.plan.plan.kv_format) == ("bf16", "bf16")
    assert (narrow.plan.plan.precision, narrow.plan.plan.kv_format) == ("fp8", "fp8")
    assert narrow.plan.plan.usd_per_hour <= auto.plan.plan.usd_per_hour
    with pytest.raises(ValueError, match="kv_precision must be auto, bf16 or fp8, got 'int8'"):
        ask(steady(), kv_precision="int8")


def test_engine_versions() -> None:
    """Rule: the version asked for is stated, without one the newest; an unknown engine is refused."""
    assert ask(steady(), engine="sglang", engine_version="0.5.0").engine_version == "0.5.0"
    assert result_document(ask(steady()))["engine"].startswith("vllm@")
    with pytest.raises(ValueError, match="engine must be one of vllm, sglang, trtllm"):
        ask(steady(), engine="llama.cpp")


def test_infeasible_is_a_document_and_has_no_policy() -> None:
    """Rule: an answer with status infeasible, no plan, no numbers; engine files refuse it."""
    answer = plan(steady(), llm("llama-3.1-8b"), offers(l40s=1.0), [Slo(metric="ttft", percentile=99.0, limit_s=1e-3)])
    document = json.loads(to_json(result_document(answer)))
    assert (document["status"], document["plan"], document["predicted"]) == ("infeasible", None, None)
    assert document["alternatives"] == []
    assert "best achievable" in document["binds"]
    with pytest.raises(ValueError, match="an infeasible plan has no policy"):
        policy_table(answer, trace="x", date="2026-01-01", version="0", seed=1)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_policy_is_the_plan(engine: str) -> None:
    """Hand: the longest sequence of 600 tokens, rounded up to 768; degrees and limits as in the plan; round trip."""
    answer = ask(steady(), engine=engine)
    chosen = answer.plan.plan
    assert chosen is not None
    table = policy_table(answer, trace="x.csv", date="2026-01-01", version="0.1.0", seed=3)
    assert (table.tp, table.pp, table.replicas) == (chosen.tp, chosen.pp, chosen.replicas)
    assert (table.max_num_seqs, table.max_model_len) == (chosen.max_num_seqs, 768)
    files = emit(table)
    assert loads(files["policy.json"]) == table
    assert len(files) >= 2

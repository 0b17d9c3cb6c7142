"""A plan replayed on its trace. Expected values: the simulator called by itself, and the rules of the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import servecast
from servecast.calibration.profile import SHIPPED, load_profile
from servecast.confirming import confirm
from servecast.model.workload import Trace
from servecast.planning import Answer, result_document
from servecast.simulating import simulate_fleet
from servecast.solvers.capacity import resized
from servecast.solvers.results import LoadPoint
from servecast.validation.metrics import holds

LIMITS = [
    servecast.Slo(metric="ttft", percentile=99.0, limit_s=2.0),
    servecast.Slo(metric="tpot", percentile=99.0, limit_s=0.05),
]
PRICES = {"h100": 2.9, "l40s": 1.1}


def trace_of(rate_rps: float, count: int, *, n_in: int = 1500, n_out: int = 200) -> Trace:
    rng = np.random.default_rng(3)
    t = np.cumsum(rng.exponential(1.0 / rate_rps, count))
    lengths = rng.poisson([n_in, n_out], (count, 2)) + 1
    return Trace(name="made", t_s=t - t[0], n_in=lengths[:, 0], n_out=lengths[:, 1])


def answer_of(trace: Trace, *, model: str = "Llama-3.1-8B", slos: list[servecast.Slo] = LIMITS) -> Answer:
    offers = [servecast.Offer(gpu=servecast.gpu(name), usd_per_hour=price) for name, price in PRICES.items()]
    return servecast.plan(servecast.workload_from_trace(trace), servecast.llm(model), offers, slos, load_curve=False)


def replayed(answer: Answer, trace: Trace, replicas: int) -> bool:
    """Whether a fleet of the plan's kind holds, asked of the simulator directly."""
    one = answer.plan.plan
    assert one is not None
    run = simulate_fleet(
        trace,
        answer.request.llm,
        servecast.gpu(one.gpu),
        replicas=replicas,
        tp=one.tp,
        pp=one.pp,
        max_num_seqs=one.max_num_seqs,
        max_num_batched_tokens=max(one.max_num_batched_tokens, one.max_num_seqs),
        prefix_caching=False,
        slos=answer.request.slos,
    )
    return holds(run.rows, answer.request.slos)


@pytest.mark.parametrize("rate", [6.0, 40.0])
def test_the_confirmed_plan_holds_and_one_fewer_does_not(rate: float) -> None:
    """Independent: the simulator called directly on the plan and on one replica fewer."""
    trace = trace_of(rate, 3000)
    found = confirm(answer_of(trace), trace)
    assert found.simulated is not None
    assert found.plan.plan is not None
    replicas = found.plan.plan.replicas
    assert found.simulated.plan.holds
    assert replayed(found, trace, replicas)
    if replicas > 1:
        assert found.simulated.one_fewer is not None
        assert not found.simulated.one_fewer.holds
        assert not replayed(found, trace, replicas - 1)
    np.testing.assert_allclose(found.plan.plan.usd_per_hour, found.simulated.plan.usd_per_hour, rtol=1e-12)


def test_curve_and_warnings_are_those_of_the_fleet_that_is_named() -> None:
    """Rule: an answer resized by the replay says what the closed form says of that fleet, asked for on its own."""
    trace = trace_of(12.0, 1500)
    answer = answer_of(trace)
    offered = replace(answer, plan=replace(answer.plan, load_curve=resized_curve(answer)))
    tight = (servecast.Slo(metric="ttft", percentile=99.0, limit_s=0.16),)
    found = confirm(replace(offered, request=replace(answer.request, slos=tight)), trace)
    one, first = found.plan.plan, answer.plan.plan
    assert one is not None
    assert first is not None
    assert (one.name, one.max_num_seqs) != (first.name, first.max_num_seqs)
    alone = resized(load_profile(SHIPPED), found.request, one, one.replicas, load_curve=True)
    assert found.plan.plan == alone.plan
    assert found.plan.load_curve == alone.load_curve
    assert set(alone.warnings) <= set(found.plan.warnings)


def resized_curve(answer: Answer) -> tuple[LoadPoint, ...]:
    assert answer.plan.plan is not None
    one = answer.plan.plan
    return resized(load_profile(SHIPPED), answer.request, one, one.replicas, load_curve=True).load_curve


def test_the_document_carries_both_and_their_disagreement() -> None:
    """Rule: disagreement = closed form over simulation, less one, for each of the four percentiles."""
    trace = trace_of(10.0, 2000)
    document = result_document(confirm(answer_of(trace), trace))
    both = document["simulated"]
    assert both["confirms"] is True
    for name, share in both["disagreement"].items():
        np.testing.assert_allclose(share, document["predicted"][name]["value"] / both[name] - 1.0, rtol=1e-12)
    assert result_document(answer_of(trace))["simulated"] is None


def test_a_plan_that_no_replay_confirms_says_so() -> None:
    """Hand: a limit below one prompt's own time holds in no fleet; the plan was made with another one."""
    trace = trace_of(5.0, 500)
    answer = answer_of(trace)
    tight = (servecast.Slo(metric="ttft", percentile=99.0, limit_s=1e-4),)
    found = confirm(replace(answer, request=replace(answer.request, slos=tight, max_replicas=3)), trace)
    assert found.simulated is not None
    assert not found.simulated.plan.holds
    assert any("does not confirm" in warning for warning in found.plan.warnings)


@pytest.mark.parametrize(
    ("path", "limits"),
    [
        (("azure-llm-2023", "conv.csv.gz"), (2.0, 0.05)),
        (("azure-llm-2023", "code.csv.gz"), (2.0, 0.2)),
        (("mooncake", "conversation.csv.gz"), (10.0, 0.05)),
    ],
)
def test_public_traces(path: tuple[str, str], limits: tuple[float, float], data_path: Callable[..., Path]) -> None:
    """The bar: the simulator confirms the plan, and one replica fewer fails."""
    trace = servecast.read_trace(data_path(*path))
    offers = [
        servecast.Offer(gpu=servecast.gpu(name), usd_per_hour=price)
        for name, price in {"h100": 2.9, "h200": 3.5, "b200": 5.5}.items()
    ]
    slos = [
        servecast.Slo(metric=metric, percentile=99.0, limit_s=limit)
        for metric, limit in zip(("ttft", "tpot"), limits, strict=True)
    ]
    workload = servecast.workload_from_trace(trace)
    answer = servecast.plan(workload, servecast.llm("Llama-3.1-70B"), offers, slos, load_curve=False)
    found = confirm(answer, trace).simulated
    assert found is not None
    assert found.plan.holds
    assert found.plan.replicas > 1
    assert found.one_fewer is not None
    assert not found.one_fewer.holds

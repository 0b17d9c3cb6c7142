"""The mixed-fleet query. Expected values: hand counts of classes and rates, the closed form on each type's mix, rules
between fleets, and the documented keys."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from servecast.cli.output import to_json
from servecast.fleeting import (
    FleetAnswer,
    length_classes,
    plan_fleet,
    planned_rates,
    result_document,
    shares_of,
)
from servecast.model.arrivals import workload_from_parameters, workload_from_trace
from servecast.model.hardware import Offer
from servecast.model.slo import Slo
from servecast.model.workload import FixedLength, LognormalLength, Trace, UniformLength, Workload
from servecast.readers.catalogues import gpu, llm
from servecast.solvers.fleet import Status, broken_constraints

SLOS = (Slo(metric="ttft", percentile=99.0, limit_s=2.0), Slo(metric="tpot", percentile=99.0, limit_s=0.05))


def offers(**given: float | tuple[float, int]) -> list[Offer]:
    pairs = {name: value if isinstance(value, tuple) else (value, None) for name, value in given.items()}
    return [Offer(gpu=gpu(name), usd_per_hour=price, limit=limit) for name, (price, limit) in pairs.items()]


def chat(rate_rps: float = 40.0) -> Workload:
    return workload_from_parameters(
        rate_rps,
        n_in=LognormalLength(mean=1155.0, cv=0.96, maximum=8000),
        n_out=LognormalLength(mean=211.0, cv=0.8, maximum=1000),
    )


def ask(load: Workload | Trace | None = None, **changed: Any) -> FleetAnswer:
    given: dict[str, Any] = {
        "offers": offers(h100=2.9, l40s=1.1, b200=5.5),
        "slos": SLOS,
        "input_edges": (1024,),
        "output_edges": (256,),
        "tp": (1, 2),
        "max_num_seqs": (32, 128),
        **changed,
    }
    return plan_fleet(
        chat() if load is None else load, llm("llama-3.1-8b"), given.pop("offers"), given.pop("slos"), **given
    )


@pytest.fixture(scope="module")
def answer() -> FleetAnswer:
    return ask()


# ---- classes and rates ---------------------------------------------------------------------------------


def lengths(n_in: list[int], n_out: list[int]) -> Workload:
    t = np.arange(len(n_in), dtype=np.float64)
    return workload_from_trace(Trace(name="hand", t_s=t, n_in=np.array(n_in), n_out=np.array(n_out)))


def test_classes_by_hand() -> None:
    """Hand: edges are upper ends and belong to the lower class; a leading 0 changes nothing; empty classes are left
    out."""
    load = lengths([1, 512, 513, 2048, 9000], [1, 128, 129, 1, 500])
    expected = {"1-512 x 1-128": [0, 1], "513-2048 x 1-128": [3], "513-2048 x 129+": [2], "2049+ x 129+": [4]}
    for edges in ([512, 2048], [0, 512, 2048]):
        found = length_classes(load, edges, [128])
        assert {name: at.tolist() for name, at in found.items()} == expected
    assert list(length_classes(load, [], [])) == ["1+ x 1+"]


@pytest.mark.parametrize("edges", [[512, 512], [2048, 512], [-1, 5]])
def test_edges_must_rise(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="input_edges must be rising"):
        length_classes(lengths([1, 2], [1, 2]), edges, [128])


def test_mean_rates_add_up() -> None:
    """Hand: 3 of 5 requests, at 1 request/s in all."""
    load = lengths([1, 1, 1, 9, 9], [1, 1, 1, 1, 1])
    members = list(length_classes(load, [5], []).values())
    rate, basis = planned_rates(load, load, members, None)
    np.testing.assert_allclose(rate, [0.6, 0.4], rtol=1e-12)
    assert basis == "mean rate"


def test_quantile_of_windows_by_hand() -> None:
    """Hand: class A brings 60 requests in each of 21 minutes, class B 0 or 60 in turn (10 full ones of 20, and the last
    minute is cut): its 0.95 quantile is 60 a minute where the mean is 30; A's is its mean."""
    steady = np.arange(0.0, 21 * 60.0, 1.0)
    pulse = np.concatenate([np.arange(60.0) + 60.0 * k for k in range(1, 20, 2)])
    t = np.concatenate([steady, pulse])
    n_in = np.concatenate([np.full(len(steady), 10), np.full(len(pulse), 1000)])
    order = np.argsort(t, kind="stable")
    trace = Trace(name="hand", t_s=t[order], n_in=n_in[order], n_out=np.full(len(t), 5))
    load = workload_from_trace(trace)
    members = list(length_classes(load, [100], []).values())
    mean, _ = planned_rates(trace, load, members, None)
    upper, basis = planned_rates(trace, load, members, 0.95)
    np.testing.assert_allclose(upper / mean, [1.0, 2.0], rtol=1e-12)
    assert basis == "0.95 quantile of 20 windows of 60 s, class by class"


def test_quantile_of_a_stationary_process() -> None:
    """Paper formula with scipy's normal quantile: Poisson, 4 requests/s, a quarter in the class, windows of 300 s."""
    load = workload_from_parameters(4.0, n_in=UniformLength(low=1, high=400), n_out=FixedLength(10.0))
    members = list(length_classes(load, [100], []).values())
    share = len(members[0]) / len(load.n_in)
    found, basis = planned_rates(load, load, members, 0.9)
    np.testing.assert_allclose(found[0], 4.0 * share + norm.ppf(0.9) * np.sqrt(4.0 * share / 300.0), rtol=1e-9)
    assert basis == "0.9 quantile of the rate over 300 s, normal with IDC 1"


def test_quantile_of_a_bursty_process_is_thinned() -> None:
    """Hand: IDC 4 of the whole is 1 + p 3 of the share p."""
    load = workload_from_parameters(4.0, n_in=UniformLength(low=1, high=400), n_out=FixedLength(10.0), gap_cv=2.0)
    members = list(length_classes(load, [100], []).values())
    share = len(members[0]) / len(load.n_in)
    sigma = np.sqrt(4.0 * share * (1.0 + 3.0 * share) / 300.0)
    np.testing.assert_allclose(
        planned_rates(load, load, members, 0.99)[0][0], 4.0 * share + norm.ppf(0.99) * sigma, rtol=1e-9
    )


# ---- the fleet -----------------------------------------------------------------------------------------


def test_a_fleet_serves_every_class(answer: FleetAnswer) -> None:
    """Independent check of the constraints; counts, prices and routed rates add up."""
    plan = answer.plan
    assert plan.status is Status.OPTIMAL
    assert plan.gap == 0.0
    assert not broken_constraints(answer.problem, plan.replicas, plan.share)
    np.testing.assert_allclose(sum(one.usd_per_hour for one in answer.types), plan.usd_per_hour, rtol=1e-12)
    np.testing.assert_allclose(sum(one.rate_rps for one in answer.types), 40.0, rtol=1e-6)
    for i in range(len(answer.classes)):
        np.testing.assert_allclose(sum(share for _, share in shares_of(answer, i)), 1.0, rtol=1e-6)
    assert {one.name for one in answer.classes} == {"1-1024 x 1-256", "1-1024 x 257+", "1025+ x 1-256", "1025+ x 257+"}


def test_mixes_meet_the_limits(answer: FleetAnswer) -> None:
    """Rule: the mix of every type is predicted and meets every percentile; deratings only lower."""
    for one in answer.types:
        assert all(met >= slo.percentile / 100.0 for met, slo in zip(one.met, SLOS, strict=True))
        assert one.slo_attainment <= min(one.met)
        assert 0.5 < one.derating <= 1.0
        assert 0.0 < one.utilisation <= 1.0 + 1e-6
    assert not answer.warnings


def test_never_dearer_than_one_type_or_melange(answer: FleetAnswer) -> None:
    """Rule: both are members of what was searched."""
    cost = answer.plan.usd_per_hour * (1.0 - 1e-9)
    assert answer.single_type is not None
    assert answer.melange is not None
    assert cost <= answer.single_type.usd_per_hour
    assert cost <= answer.melange.usd_per_hour
    assert answer.single_type.what in {"h100_sxm", "l40s", "b200_sxm"}


def test_availability_is_kept() -> None:
    """Rule: at most the GPUs on offer, over all degrees and batch limits; and no cheaper than with all one wants."""
    found = ask(offers=offers(b200=(5.5, 1), l40s=1.1), compare=False)
    assert sum(one.gpus for one in found.types if one.gpu == "b200_sxm") <= 1
    free = ask(offers=offers(b200=5.5, l40s=1.1), compare=False)
    assert free.plan.usd_per_hour <= found.plan.usd_per_hour * (1.0 + 1e-9)


def test_serving_the_upper_quantile_costs_no_less(answer: FleetAnswer) -> None:
    """Rule: every rate is at least its mean, so the price of robustness is not negative."""
    robust = ask(rate_quantile=0.95)
    assert robust.nominal_usd_per_hour is not None
    assert robust.plan.usd_per_hour >= robust.nominal_usd_per_hour * (1.0 - 1e-9)
    assert all(one.rate_rps > one.mean_rate_rps for one in robust.classes)
    assert answer.nominal_usd_per_hour is None


@pytest.mark.parametrize("quantile", [0.5, 1.0, 0.0, math.nan])
def test_a_quantile_lies_above_the_median(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"rate_quantile must be between 0\.5 and 1"):
        ask(rate_quantile=quantile)


def test_order_of_offers_does_not_matter(answer: FleetAnswer) -> None:
    turned = ask(offers=offers(b200=5.5, l40s=1.1, h100=2.9), tp=(2, 1), compare=False)
    np.testing.assert_allclose(turned.plan.usd_per_hour, answer.plan.usd_per_hour, rtol=1e-9)


def test_the_same_query_has_the_same_answer(answer: FleetAnswer) -> None:
    again = json.loads(to_json(result_document(ask())))
    first = json.loads(to_json(result_document(answer)))
    assert {**again, "wall_s": 0} == {**first, "wall_s": 0}


def test_a_shortage_names_the_gpus() -> None:
    found = ask(chat(400.0), offers=offers(h100=(2.9, 1), l40s=(1.1, 2)))
    assert found.plan.status is Status.INFEASIBLE
    assert " on offer, at least " in found.plan.binds
    assert "class " in found.plan.binds
    assert (found.types, found.single_type, found.melange) == ((), None, None)


def test_an_impossible_limit_names_the_class() -> None:
    found = ask(slos=(Slo(metric="ttft", percentile=99.0, limit_s=1e-4),))
    assert found.plan.status is Status.INFEASIBLE
    assert found.plan.binds.startswith("class 1-1024 x 1-256: no GPU type meets ttft_p99 <= 0.0001 s")


def test_malformed_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one offer"):
        ask(offers=[])
    with pytest.raises(ValueError, match="at least one limit"):
        ask(slos=())
    with pytest.raises(ValueError, match="kv_precision"):
        ask(kv_precision="fp2")


def test_the_document_has_its_keys(answer: FleetAnswer) -> None:
    """Keys: docs/json.md; strict JSON."""
    found = json.loads(to_json(result_document(answer)))
    assert found["schema"] == "servecast.fleet-result/1"
    keys = "schema status model engine cost_usd_per_hour bound gap binds bindings types classes rate_basis robustness"
    assert set(found) == {*keys.split(), "comparison", "slo", "warnings", "profile", "wall_s"}
    keys = "gpu tp max_num_seqs replicas gpus usd_per_hour rate_rps utilisation derating predicted"
    assert set(found["types"][0]) == set(keys.split())
    assert set(found["types"][0]["predicted"]) == {"slo_attainment", "met"}
    assert set(found["classes"][0]) == {"name", "requests", "mean_rate_rps", "rate_rps", "shares"}
    assert set(found["comparison"]) == {"single_type", "melange"}
    assert found["comparison"]["melange"]["what"] == "4 slices"
    assert result_document(ask(rate_quantile=0.95, compare=False))["robustness"]["price_usd_per_hour"] >= -1e-9

"""The capacity search. Expected values: brute force with the model's own functions, the search itself under changes
that must not matter, and hand calculation of memory and counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.calibration.profile import load_profile
from servecast.model.arrivals import workload_from_parameters
from servecast.model.attainment import attainment, fleets, rate_windows, solve_systems
from servecast.model.deployment import Deployment
from servecast.model.forecast import Profile
from servecast.model.hardware import Offer
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.service import service_curves
from servecast.model.slo import Slo
from servecast.model.workload import FixedLength, LognormalLength, Workload
from servecast.readers.catalogues import gpu, llm
from servecast.solvers.capacity import CapacityRequest, plan_capacity
from servecast.solvers.results import Candidate, CapacityPlan, Status


@dataclass(frozen=True, slots=True)
class Member:
    """One element of the search space."""

    gpu: str
    tp: int
    pp: int
    cap: int
    replicas: int
    usd_per_hour: float
    good: bool


def slos(**limits: float) -> tuple[Slo, ...]:
    """``slos(ttft_p99=2.0)``, in seconds."""
    split = {name: name.rsplit("_p", 1) for name in limits}
    return tuple(Slo(metric=split[n][0], percentile=float(split[n][1]), limit_s=limits[n]) for n in limits)


def offers(**prices: float) -> tuple[Offer, ...]:
    return tuple(Offer(gpu=gpu(name), usd_per_hour=price) for name, price in prices.items())


def steady(rate_rps: float, *, n_in: float = 800.0, n_out: float = 150.0, gap_cv: float = 1.0) -> Workload:
    return workload_from_parameters(
        rate_rps, n_in=LognormalLength(mean=n_in, cv=0.8, maximum=8000), n_out=FixedLength(n_out), gap_cv=gap_cv
    )


def ask(workload: Workload, **changed: Any) -> CapacityRequest:
    given_: dict[str, Any] = {
        "llm": llm("llama-3.1-8b"),
        "trunk_format": "bf16",
        "expert_format": "bf16",
        "kv_format": "bf16",
        "engine": "vllm",
        "slos": slos(ttft_p99=2.0, tpot_p99=0.05),
        "offers": offers(h100=2.9, l40s=1.1),
        "tp": (1, 2),
        "pp": (1,),
        "caps": (8, 32),
        "max_replicas": 40,
    }
    return CapacityRequest(workload=workload, **{**given_, **changed})


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile()


def solve(profile: Profile, request: CapacityRequest) -> CapacityPlan:
    return plan_capacity(profile, request, load_curve=False)


def cost(profile: Profile, request: CapacityRequest) -> float:
    plan = solve(profile, request).plan
    return math.inf if plan is None else plan.usd_per_hour


# ---- brute force ---------------------------------------------------------------------------------------


def every_member(profile: Profile, request: CapacityRequest) -> Iterator[Member]:
    """The whole space by plain loops: every fleet that sustains the mean rate, judged alone."""
    load = request.workload
    for offer, tp, pp in product(request.offers, request.tp, request.pp):
        one = Deployment(
            llm=request.llm,
            gpu=offer.gpu,
            trunk_format=request.trunk_format,
            expert_format=request.expert_format,
            kv_format=request.kv_format,
            tp=tp,
            pp=pp,
        )
        curves = service_curves(profile, [one], request.engine, load, max_batch=max(request.caps))
        room = int(curves.kv_batch[0])
        for cap in sorted({min(cap, room) for cap in request.caps} - {0}):
            least = max(math.ceil(load.rate_rps / curves.completion_rps[0, cap - 1]), 1)
            most = request.max_replicas
            if offer.limit is not None:
                most = min(most, offer.limit // (tp * pp))
            system = solve_systems(curves, np.array([0]), np.array([cap]), load, [float(least)])
            for replicas in range(least, most + 1):
                fleet = fleets(system, rate_windows(load, 1e-3), np.array([0]), [float(replicas)])
                good = all(attainment(fleet, s.metric, s.limit_s)[0] >= s.percentile / 100.0 for s in request.slos)
                yield Member(offer.gpu.name, tp, pp, cap, replicas, replicas * tp * pp * offer.usd_per_hour, good)


def random_request(seed: int) -> CapacityRequest:
    """Two GPU types at random prices, random load and limits; every other load varies over three windows."""
    rng = np.random.default_rng(seed)
    rate = float(np.exp(rng.uniform(np.log(0.5), np.log(60.0))))
    load = steady(
        rate,
        n_in=float(rng.uniform(100, 2500)),
        n_out=float(rng.integers(10, 400)),
        gap_cv=float(rng.uniform(0.5, 2.0)),
    )
    if seed % 2:
        load = replace(load, windows=((60.0, rate * np.array([0.6, 1.9, 0.5])),))
    names = rng.choice(["h100", "l40s", "a100", "b200"], 2, replace=False)
    percentile = float(rng.choice([90.0, 99.0]))
    limits = (
        Slo(metric="ttft", percentile=percentile, limit_s=float(np.exp(rng.uniform(np.log(0.03), np.log(4.0))))),
        Slo(metric="tpot", percentile=percentile, limit_s=float(np.exp(rng.uniform(np.log(0.009), np.log(0.1))))),
    )
    return ask(
        load,
        offers=tuple(
            Offer(
                gpu=gpu(str(name)),
                usd_per_hour=float(rng.uniform(0.5, 6.0)),
                limit=int(rng.integers(2, 25)) if rng.random() < 0.5 else None,
            )
            for name in names
        ),
        slos=limits[: int(rng.integers(1, 3))],
        pp=(1, 2),
        caps=tuple(sorted(int(cap) for cap in rng.choice([2, 8, 32, 100], 2, replace=False))),
        max_replicas=12,
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_is_the_cheapest_of_all_members(seed: int, profile: Profile) -> None:
    """Brute force over every (gpu, tp, pp, cap, replicas)."""
    request = random_request(seed)
    members = list(every_member(profile, request))
    good = [one for one in members if one.good]
    found = solve(profile, request)
    assert (found.status is Status.INFEASIBLE) == (not good)
    if not good:
        assert found.plan is None
        return
    plan = found.plan
    assert plan is not None
    np.testing.assert_allclose(plan.usd_per_hour, min(one.usd_per_hour for one in good), rtol=1e-12)
    assert found.evaluated == len(members)
    assert found.gap == 0.0
    place = (plan.gpu, plan.tp, plan.pp, plan.max_num_seqs, plan.replicas)
    assert place in {(one.gpu, one.tp, one.pp, one.cap, one.replicas) for one in good}


def test_random_requests_are_of_both_kinds(profile: Profile) -> None:
    """The seeds above hold feasible and infeasible requests, fleets of one and of several."""
    plans = [solve(profile, random_request(seed)).plan for seed in range(20)]
    assert 2 <= sum(plan is None for plan in plans) <= 12
    assert any(plan is not None and plan.replicas == 1 for plan in plans)
    assert any(plan is not None and plan.replicas > 2 for plan in plans)


@pytest.mark.parametrize("seed", range(0, 20, 4))
def test_alternatives_meet_the_limits_and_are_not_cheaper(seed: int, profile: Profile) -> None:
    """Brute force: every alternative is a good member of the space; replicas - 1 of the plan are not."""
    request = random_request(seed)
    found = solve(profile, request)
    good = {(m.gpu, m.tp, m.pp, m.cap, m.replicas): m.good for m in every_member(profile, request)}
    plan = found.plan
    if plan is None:
        assert not any(good.values())
        return
    for one in found.alternatives:
        assert good[one.gpu, one.tp, one.pp, one.max_num_seqs, one.replicas]
        assert one.usd_per_hour >= plan.usd_per_hour
    assert not good.get((plan.gpu, plan.tp, plan.pp, plan.max_num_seqs, plan.replicas - 1), False)


def test_one_replica_fewer_fails_a_limit(profile: Profile) -> None:
    """Brute force: what `binds` says of the smaller fleet is what the model says."""
    request = ask(steady(40.0), slos=slos(ttft_p99=0.4, tpot_p99=0.05), offers=offers(l40s=1.0), tp=(1,), caps=(32,))
    found = solve(profile, request)
    assert found.plan is not None
    assert found.plan.replicas > 1
    members = {one.replicas: one.good for one in every_member(profile, request)}
    assert members[found.plan.replicas]
    assert not members.get(found.plan.replicas - 1, False)
    assert f"a fleet of {found.plan.replicas - 1} " in found.binds


def test_alternatives_begin_with_the_pareto_front(profile: Profile) -> None:
    """Rule: nothing on the front is beaten in cost and both tails; everything after it is; each part by cost."""
    found = solve(profile, ask(steady(10.0), offers=offers(h100=2.9, l40s=1.1, b200=5.0), pp=(1, 2), caps=(8, 32, 128)))

    def point(one: Candidate) -> tuple[float, float, float]:
        return one.usd_per_hour, one.ttft_p99_s.value, one.tpot_p99_s.value

    points = [point(one) for one in found.alternatives]
    beaten = [any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points) for p in points]
    assert len(points) >= 5
    assert beaten == sorted(beaten)
    front = points[: beaten.count(False)]
    assert front == sorted(front)
    assert len({(one.gpu, one.tp, one.pp, one.replicas, one.max_num_seqs) for one in found.alternatives}) == len(points)


def test_intervals_hold_their_value(profile: Profile) -> None:
    """Rule: lo <= value <= hi; p50 <= p99; the plan's value meets every limit."""
    found = plan_capacity(profile, ask(steady(10.0), offers=offers(h100=2.9, l40s=1.1, a100=1.7)))
    assert found.plan is not None
    for one in (found.plan, *found.alternatives):
        for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "slo_attainment"):
            interval = getattr(one, name)
            assert 0.0 <= interval.lo <= interval.value <= interval.hi < math.inf
        assert one.ttft_p50_s.value <= one.ttft_p99_s.value <= 2.0 * 1.001
        assert one.tpot_p50_s.value <= one.tpot_p99_s.value <= 0.05 * 1.001
    for point in found.load_curve:
        for interval in (point.ttft_p99_s, point.tpot_p99_s, point.slo_attainment):
            assert interval.lo <= interval.value <= interval.hi


def test_load_curve_rises_to_saturation(profile: Profile) -> None:
    """Rule: TTFT and TPOT do not fall, attainment does not rise with load; headroom is 1 / utilisation - 1."""
    found = plan_capacity(profile, ask(steady(10.0)))
    assert found.plan is not None
    curve = found.load_curve
    assert np.all(np.diff([point.rate_rps for point in curve]) > 0.0)
    for name in ("ttft_p99_s", "tpot_p99_s"):
        values = np.array([getattr(point, name).value for point in curve])
        assert np.all(np.diff(values) >= -2e-3 * values[1:])  # bisection to 0.1 %
    assert np.all(np.diff([point.slo_attainment.value for point in curve]) <= 1e-9)
    saturated = 10.0 / found.plan.utilisation
    np.testing.assert_allclose(found.plan.headroom, saturated / 10.0 - 1.0, rtol=1e-9)
    assert curve[0].rate_rps < saturated < curve[-1].rate_rps


# ---- what must not matter, what must not hurt ----------------------------------------------------------


def test_order_of_offers_does_not_matter(profile: Profile) -> None:
    """Relabelling: the same plan and the same alternatives from any order of offers, degrees and caps."""
    request = ask(steady(20.0), offers=offers(h100=2.9, l40s=1.1, a100=1.7), caps=(8, 32, 64))
    first = solve(profile, request)
    turned = replace(request, offers=request.offers[::-1], tp=(2, 1), caps=(64, 8, 32))
    second = solve(profile, turned)
    assert first.plan == second.plan
    assert first.alternatives == second.alternatives
    assert first.binds == second.binds


@given(
    rate=st.floats(0.5, 40.0),
    ttft=st.floats(0.1, 3.0),
    tpot=st.floats(0.01, 0.1),
    looser=st.floats(1.0, 4.0),
    metric=st.sampled_from(["ttft", "tpot"]),
)
@settings(max_examples=15)
def test_a_relaxed_limit_never_costs_more(rate: float, ttft: float, tpot: float, looser: float, metric: str) -> None:
    """Rule: relaxing a constraint never worsens the optimum."""
    tight = {"ttft_p99": ttft, "tpot_p99": tpot}
    loose = {name: limit * (looser if name.startswith(metric) else 1.0) for name, limit in tight.items()}
    request = ask(steady(rate))
    before, after = (cost(load_profile(), replace(request, slos=slos(**limits))) for limits in (tight, loose))
    assert after <= before
    dropped = tuple(slo for slo in request.slos if slo.metric != metric)
    assert cost(load_profile(), replace(request, slos=dropped)) <= cost(load_profile(), request)


@given(
    rate=st.floats(0.5, 40.0),
    ttft=st.floats(0.2, 3.0),
    price=st.floats(0.2, 8.0),
    added=st.sampled_from(["b200", "a100", "l4", "h200"]),
)
@settings(max_examples=15)
def test_another_gpu_on_offer_never_costs_more(rate: float, ttft: float, price: float, added: str) -> None:
    """Rule: a larger space has no worse optimum (steady load, whose rate windows do not depend on the space)."""
    request = ask(steady(rate), slos=slos(ttft_p99=ttft, tpot_p99=0.06))
    more = replace(request, offers=(*request.offers, *offers(**{added: price})))
    assert cost(load_profile(), more) <= cost(load_profile(), request)


def test_prices_only_scale_the_cost(profile: Profile) -> None:
    """Homogeneity: prices times 3, the same plan at three times the cost."""
    request = ask(steady(20.0))
    plan = solve(profile, request).plan
    dear = solve(
        profile, replace(request, offers=tuple(replace(o, usd_per_hour=3.0 * o.usd_per_hour) for o in request.offers))
    ).plan
    assert plan is not None
    assert dear is not None
    np.testing.assert_allclose(dear.usd_per_hour, 3.0 * plan.usd_per_hour, rtol=1e-12)
    assert dear == replace(plan, usd_per_hour=dear.usd_per_hour)


# ---- counts and memory ---------------------------------------------------------------------------------


def test_cost_is_price_times_gpus(profile: Profile) -> None:
    """Hand: replicas x tp x pp x price of one GPU."""
    prices = {"h100_sxm": 2.9, "l40s": 1.1}
    found = solve(profile, ask(steady(20.0), pp=(1, 2)))
    assert found.plan is not None
    for one in (found.plan, *found.alternatives):
        np.testing.assert_allclose(one.usd_per_hour, one.replicas * one.tp * one.pp * prices[one.gpu], rtol=1e-12)


def test_count_limit_is_kept(profile: Profile) -> None:
    """Rule: no plan or alternative has more GPUs of a type than there are; fewer cannot cost less."""
    free = ask(steady(60.0), offers=offers(l40s=1.0, h100=9.0))
    unlimited = solve(profile, free).plan
    assert unlimited is not None
    assert unlimited.gpu == "l40s"
    few = unlimited.gpus - 1
    limited = solve(
        profile, replace(free, offers=(replace(free.offers[0], limit=few), replace(free.offers[1], limit=8)))
    )
    assert limited.plan is not None
    assert limited.plan.usd_per_hour >= unlimited.usd_per_hour
    for one in (limited.plan, *limited.alternatives):
        assert one.gpus <= {"l40s": few, "h100_sxm": 8}[one.gpu]


def test_batch_limit_never_exceeds_the_cache(profile: Profile) -> None:
    """Hand: cache bytes over bytes per token, over the mean context of a running sequence of 6000 + 500 / 2 tokens.

    Llama 3.1 8B: 32 layers x 2 x 8 heads x 128 x 2 bytes = 131072 bytes a token.
    """
    load = workload_from_parameters(0.4, n_in=FixedLength(6000.0), n_out=FixedLength(500.0))
    request = ask(load, offers=offers(l40s=1.0), tp=(1,), caps=(256,), slos=slos(ttft_p99=60.0, tpot_p99=1.0))
    plan = solve(profile, request).plan
    assert plan is not None
    one = Deployment(llm=request.llm, gpu=gpu("l40s"), trunk_format="bf16", expert_format="bf16", kv_format="bf16")
    left = memory_budget(one, MEMORY_RULES["vllm"]).kv_bytes
    assert plan.max_num_seqs == int(left / 131072.0 / 6250.0)
    assert "batch limited by KV memory" in solve(profile, request).binds


# ---- infeasible ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "limit"), [("ttft_p99", 0.001), ("tpot_p50", 0.001), ("e2e_p90", 0.05)])
def test_an_impossible_limit_is_named_with_the_best_achievable(name: str, limit: float, profile: Profile) -> None:
    """The search itself: 2 % above what it calls the best achievable is feasible, 2 % below is not."""
    request = ask(steady(5.0), slos=slos(**{name: limit}))
    found = solve(profile, request)
    assert found.status is Status.INFEASIBLE
    assert found.plan is None
    assert found.alternatives == ()
    said = re.fullmatch(
        rf"{name} <= {limit:g} s: the best achievable is ([0-9.e-]+) s \((h100_sxm|l40s) tp[12] pp1\)", found.binds
    )
    assert said
    best = float(said[1])
    assert solve(profile, replace(request, slos=slos(**{name: 1.02 * best}))).status is Status.OPTIMAL
    assert solve(profile, replace(request, slos=slos(**{name: 0.98 * best}))).status is Status.INFEASIBLE


def test_too_few_gpus_are_named(profile: Profile) -> None:
    """The search itself: the number that it says is needed is enough, one fewer is not."""
    one = replace(offers(l40s=1.0)[0], limit=1)
    found = solve(profile, ask(steady(30.0), offers=(one,), tp=(1,), caps=(8,)))
    assert found.status is Status.INFEASIBLE
    said = re.match(r"count: .* needs (\d+) l40s .*\b1 are on offer", found.binds)
    assert said
    for count, status in ((int(said[1]), Status.OPTIMAL), (int(said[1]) - 1, Status.INFEASIBLE)):
        some = (replace(one, limit=count),)
        relaxed = ask(steady(30.0), offers=some, tp=(1,), caps=(8,), slos=slos(tpot_p90=10.0))
        assert solve(profile, relaxed).status is status


def test_weights_that_do_not_fit_are_named(profile: Profile) -> None:
    """Hand: 70.55e9 parameters of 2 bytes are 141 GB on one GPU, 71 GB on each of two."""
    found = solve(profile, ask(steady(1.0), llm=llm("llama-3.1-70b"), offers=offers(l40s=1.0)))
    assert found.status is Status.INFEASIBLE
    assert re.match(r"memory: meta-llama/Llama-3\.1-70B in bf16 needs 71 GB .* l40s tp2 pp1, .* 48 GB", found.binds)


def test_a_cache_too_small_for_the_prompts_is_named(profile: Profile) -> None:
    """Hand: 16 GB of weights leave some 20 GB of an L40S, 150,000 tokens of 131072 bytes, half a prompt."""
    load = workload_from_parameters(0.1, n_in=FixedLength(300_000.0), n_out=FixedLength(10.0))
    found = solve(profile, ask(load, offers=offers(l40s=1.0), tp=(1,)))
    assert found.status is Status.INFEASIBLE
    assert re.match(r"memory: prompts of 300000 tokens .* KV cache on l40s tp1 pp1", found.binds)


def test_malformed_requests_are_refused(profile: Profile) -> None:
    """Rule: no offer, no limit, no degree that the model allows: an exception that names the field."""
    request = ask(steady(1.0))
    with pytest.raises(ValueError, match="gpus must name at least one offer"):
        plan_capacity(profile, replace(request, offers=()))
    with pytest.raises(ValueError, match="slo must state at least one limit"):
        plan_capacity(profile, replace(request, slos=()))
    with pytest.raises(ValueError, match=r"tp must divide the 32 attention heads .*, got 3"):
        plan_capacity(profile, replace(request, tp=(3,)))

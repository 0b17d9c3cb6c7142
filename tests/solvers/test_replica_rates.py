"""Largest rate of one replica within the limits. Expected values: the closed form itself, asked at the rate and just
above it; rules; and the capacity search, which asks the other way round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servecast.calibration.profile import load_profile
from servecast.model.arrivals import workload_from_parameters
from servecast.model.attainment import attainment, fleets, rate_windows, solve_systems
from servecast.model.deployment import Deployment
from servecast.model.forecast import Profile
from servecast.model.hardware import Offer
from servecast.model.service import service_curves
from servecast.model.slo import Slo
from servecast.model.workload import FixedLength, LognormalLength, Workload
from servecast.readers.catalogues import gpu, llm
from servecast.solvers.capacity import CapacityRequest, plan_capacity
from servecast.solvers.replica_rates import mix_forecast, replica_rates

SLOS = (Slo(metric="ttft", percentile=99.0, limit_s=1.0), Slo(metric="tpot", percentile=99.0, limit_s=0.04))
CAPS = (8, 64)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile()


def deployment(name: str = "h100", tp: int = 1, model: str = "llama-3.1-8b") -> Deployment:
    return Deployment(llm=llm(model), gpu=gpu(name), trunk_format="bf16", expert_format="bf16", kv_format="bf16", tp=tp)


def steady(rate_rps: float = 40.0, n_in: float = 800.0, n_out: float = 150.0) -> Workload:
    return workload_from_parameters(
        rate_rps, n_in=LognormalLength(mean=n_in, cv=0.8, maximum=8000), n_out=FixedLength(n_out)
    )


def rates(profile: Profile, load: Workload, slos: tuple[Slo, ...] = SLOS, **changed: Any) -> np.ndarray:
    ones = [deployment(), deployment("l40s"), deployment("l40s", tp=2)]
    return replica_rates(profile, changed.get("deployments", ones), "vllm", load, slos, CAPS).rates_rps


def test_the_rate_meets_the_limits_and_a_little_more_does_not(profile: Profile) -> None:
    """The closed form by itself, one replica at a time: every limit met at the rate, one missed 0.2 % above it (or the
    replica is full)."""
    load = steady()
    ones = [deployment(), deployment("l40s")]
    found = rates(profile, load, deployments=ones)
    assert np.all(found > 0.0)
    for row, one in enumerate(ones):
        curves = service_curves(profile, [one], "vllm", load, max_batch=max(CAPS))
        for column, cap in enumerate(CAPS):
            capacity = curves.completion_rps[0, cap - 1]
            system = solve_systems(curves, np.array([0]), np.array([cap]), load, [max(load.rate_rps / capacity, 1.0)])

            def good(rate: float, system: Any = system) -> bool:
                fleet = fleets(system, rate_windows(load, 1e-3), np.array([0]), [load.rate_rps / rate])
                return all(attainment(fleet, s.metric, s.limit_s)[0] >= s.percentile / 100.0 for s in SLOS)

            assert good(found[row, column])
            assert not good(found[row, column] * 1.002) or found[row, column] * 1.002 > capacity


def test_the_capacity_search_agrees(profile: Profile) -> None:
    """The search for the fewest replicas asks the other way round: rate / largest rate, rounded up (the fleet's
    replicas see a thinner, for Poisson arrivals equal, dispersion)."""
    load = steady(100.0)
    request = CapacityRequest(
        llm=llm("llama-3.1-8b"),
        trunk_format="bf16",
        expert_format="bf16",
        kv_format="bf16",
        engine="vllm",
        workload=load,
        slos=SLOS,
        offers=(Offer(gpu=gpu("l40s"), usd_per_hour=1.0),),
        tp=(1,),
        pp=(1,),
        caps=(64,),
    )
    plan = plan_capacity(profile, request, load_curve=False).plan
    assert plan is not None
    found = replica_rates(profile, [deployment("l40s")], "vllm", load, SLOS, (64,)).rates_rps[0, 0]
    assert plan.replicas == int(np.ceil(load.rate_rps / found))


def test_a_looser_limit_never_lowers_the_rate(profile: Profile) -> None:
    """Rule: monotone in every limit, and in the length of the prompt."""
    loose = tuple(replace(slo, limit_s=2.0 * slo.limit_s) for slo in SLOS)
    assert np.all(rates(profile, steady(), loose) >= rates(profile, steady()))
    assert np.all(rates(profile, steady(n_in=1600.0)) <= rates(profile, steady()))


def test_the_whole_rate_matters_only_through_burstiness(profile: Profile) -> None:
    """Rule: Poisson arrivals are Poisson when thinned, so the rate of the whole service does not matter."""
    np.testing.assert_allclose(rates(profile, steady(4000.0)), rates(profile, steady(40.0)), rtol=1e-9)


def test_what_no_replica_reaches_is_named(profile: Profile) -> None:
    """Hand: TTFT of a prompt below its own prefill; weights of 70B on one L40S with 48 GB."""
    early = (Slo(metric="ttft", percentile=99.0, limit_s=1e-4),)
    found = replica_rates(profile, [deployment(), deployment("l40s")], "vllm", steady(), early, CAPS)
    assert not found.rates_rps.any()
    assert found.reason.startswith("no GPU type meets ttft_p99 <= 0.0001 s: the best achievable is ")
    assert found.reason.endswith("s (h100_sxm tp1)")
    large = replica_rates(profile, [deployment("l40s", model="llama-3.1-70b")], "vllm", steady(), SLOS, CAPS)
    assert not large.rates_rps.any()
    assert large.reason == "no GPU type holds the weights and the cache of its longest prompt"


def test_a_mix_of_one_class_is_that_class(profile: Profile) -> None:
    """Rule: a mix forecast of the class itself has the class's largest rate; at it every limit is met, beyond not."""
    load, one = steady(), deployment("l40s")
    largest = rates(profile, load, deployments=[one])[0, 1]
    at = mix_forecast(profile, one, "vllm", load, SLOS, CAPS[1], float(largest))
    np.testing.assert_allclose(at.largest_rps, largest, rtol=1e-9)
    assert all(met >= 0.99 for met in at.met)
    assert at.slo_attainment <= min(at.met)
    beyond = mix_forecast(profile, one, "vllm", load, SLOS, CAPS[1], float(1.2 * largest))
    assert min(beyond.met) < 0.99
    nowhere = mix_forecast(profile, deployment("l40s", model="llama-3.1-70b"), "vllm", load, SLOS, 8, 1.0)
    assert (nowhere.met, nowhere.slo_attainment, nowhere.largest_rps) == ((0.0, 0.0), 0.0, 0.0)

"""Share of simulated truths inside a plan's 90 % intervals.

Truth is the simulator with every step longer or shorter by one factor, drawn from a law whose 5 and 95 % quantiles are
the profile's band, on arrivals and lengths that the plan has not seen; the plan knows a sample of the same process.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import servecast
from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.batch_steps import tabulated_steps
from servecast.model.deployment import Deployment
from servecast.model.forecast import error_band
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.workload import LognormalLength, Trace
from servecast.solvers.capacity import resized
from servecast.solvers.results import Candidate
from servecast.validation.metrics import summary
from servecast.validation.simulator import EngineLimits, simulate

MIXES = {
    "chat": (LognormalLength(mean=1000.0, cv=0.9, maximum=8000.0), LognormalLength(mean=220.0, cv=0.8, maximum=1000.0)),
    "long": (LognormalLength(mean=600.0, cv=0.8, maximum=4000.0), LognormalLength(mean=900.0, cv=0.6, maximum=4000.0)),
}
FIGURES = (("ttft", 50.0), ("ttft", 99.0), ("tpot", 50.0), ("tpot", 99.0))
CAP, REQUESTS = 128, 6000


def draw(rng: np.random.Generator, mix: str, rate: float, gap_cv: float) -> Trace:
    shape = 1.0 / gap_cv**2
    t = np.cumsum(rng.gamma(shape, 1.0 / (shape * rate), REQUESTS))
    n_in, n_out = (np.maximum(np.round(law.quantile(rng.random(REQUESTS))), 1.0).astype(np.int64) for law in MIXES[mix])
    return Trace(name=mix, t_s=t - t[0], n_in=n_in, n_out=n_out)


def inside(rng: np.random.Generator, mix: str, load: float, gap_cv: float) -> NDArray[np.bool_]:
    profile = load_profile(SHIPPED)
    llm, gpu = servecast.llm("Llama-3.1-8B"), servecast.gpu("h100")
    offers = [servecast.Offer(gpu=gpu, usd_per_hour=2.9)]
    slos = [servecast.Slo(metric="ttft", percentile=50.0, limit_s=100.0)]

    def predicted(rate: float) -> Candidate:
        known = servecast.workload_from_trace(draw(rng, mix, rate, gap_cv))
        answer = servecast.plan(known, llm, offers, slos, tp=[1], pp=[1], max_num_seqs=[CAP], load_curve=False)
        assert answer.plan.plan is not None
        found = resized(profile, answer.request, answer.plan.plan, 1).plan
        assert found is not None
        return found

    # one request per second tells the capacity, hence the rate of the load that is asked for
    rate = load / predicted(1.0).utilisation
    found = predicted(rate)
    deployment = Deployment(llm=llm, gpu=gpu, trunk_format="bf16", expert_format="bf16", kv_format="bf16")
    low, high = error_band(profile, deployment, "tpot")
    z = rng.standard_normal() / 1.6448536
    truth = draw(rng, mix, rate, gap_cv)
    steps = tabulated_steps(
        profile,
        deployment,
        "vllm",
        max_batch=CAP,
        longest=12_000.0,
        chunk_tokens=8192.0,
        factor=float(np.exp(-low * z if z < 0.0 else high * z)),
    )
    kv_tokens = memory_budget(deployment, MEMORY_RULES["vllm"]).kv_tokens
    rows = simulate(truth, steps, EngineLimits(max_num_seqs=CAP, max_num_batched_tokens=8192, kv_tokens=kv_tokens))
    seen = summary(rows).percentiles
    bounds = (found.ttft_p50_s, found.ttft_p99_s, found.tpot_p50_s, found.tpot_p99_s)
    return np.array([one.lo <= seen[metric][p] <= one.hi for (metric, p), one in zip(FIGURES, bounds, strict=True)])


@pytest.mark.slow
def test_ninety_per_cent_intervals_hold_85_to_95() -> None:
    """Monte Carlo, fixed seed: 240 truths x 4 percentiles, loads 0.25 to 0.75, cv 0.7 to 1.3; the project's bar."""
    rng = np.random.default_rng(20261126)
    points = [
        inside(rng, mix, load, cv)
        for mix in MIXES
        for load in (0.25, 0.4, 0.55, 0.65, 0.75)
        for cv in (0.7, 1.0, 1.3)
        for _ in range(8)
    ]
    coverage = np.mean(points, axis=0)
    assert 0.85 <= coverage.mean() <= 0.95, coverage

"""Capacity over time from a trace. Expected values: the model's own public functions called the slow way, window by
window; Poisson streams built here; hand calculation; and the schedule under changes that must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import servecast
from servecast.calibration.profile import load_profile
from servecast.model.arrivals import arrival_statistics, window_rates, workload_from_trace
from servecast.model.attainment import attainment, fleets, rate_windows, solve_systems
from servecast.model.deployment import Deployment
from servecast.model.service import service_curves
from servecast.model.slo import Slo
from servecast.model.workload import Trace
from servecast.scheduling import (
    CSV_COLUMNS,
    ScheduleAnswer,
    plan_schedule,
    schedule_csv,
    schedule_document,
    within_window_idc,
)
from servecast.solvers.results import Status
from servecast.solvers.schedule import schedule_faults, solve_schedule

DataPath = Callable[..., Path]

SLOS = (Slo(metric="ttft", percentile=99.0, limit_s=2.0), Slo(metric="tpot", percentile=99.0, limit_s=0.05))


def wave(mean_rps: float, amplitude: float, span_s: float, *, seed: int = 1) -> Trace:
    """Poisson arrivals at a sinusoidal rate, lowest at both ends."""
    rng = np.random.default_rng(seed)
    second = np.arange(int(span_s))
    counts = rng.poisson(mean_rps - amplitude * np.cos(2.0 * np.pi * second / span_s))
    t = np.sort(np.repeat(second, counts) + rng.random(counts.sum()))
    return Trace(
        name="wave",
        t_s=t - t[0],
        n_in=rng.integers(100, 2000, len(t)),
        n_out=rng.integers(20, 400, len(t)),
    )


def ask(trace: Trace, *, price: float = 3.5, limit: int | None = None, **changed: Any) -> ScheduleAnswer:
    given: dict[str, Any] = {
        "window_s": 60.0,
        "lead_time_s": 120.0,
        "min_dwell_s": 600.0,
        "tp": 1,
        "pp": 1,
        "rate_scale": 5.0,
    }
    offer = servecast.Offer(gpu=servecast.gpu("h200"), usd_per_hour=price, limit=limit)
    slos = changed.pop("slos", SLOS)
    return plan_schedule(
        trace, servecast.llm("llama-3.1-8b"), [offer], slos, **{**given, "max_num_seqs": 64, **changed}
    )


@pytest.fixture(scope="module")
def evening() -> Trace:
    """Two hours, 4 to 36 requests/s, scheduled for five times as much."""
    return wave(20.0, 16.0, 7200.0)


@pytest.fixture(scope="module")
def found(evening: Trace) -> ScheduleAnswer:
    return ask(evening)


# ---- what a window needs -------------------------------------------------------------------------------


Slow = Callable[[float, int, Slo], float]


@pytest.fixture(scope="module")
def slow_attainment(evening: Trace) -> Slow:
    """Attainment of one fleet at one steady rate, nothing grouped or scaled."""
    workload = workload_from_trace(evening)
    idc = within_window_idc(evening.t_s, 60.0)
    short, long = (tuple(pair for pair in idc if (pair[0] < 1.0) is below) for below in (True, False))
    deployment = Deployment(
        llm=servecast.llm("llama-3.1-8b"),
        gpu=servecast.gpu("h200"),
        trunk_format="bf16",
        expert_format="bf16",
        kv_format="bf16",
        tp=1,
        pp=1,
    )
    curves = service_curves(load_profile(), [deployment], "vllm", workload, max_batch=64)

    def met(rate_rps: float, replicas: int, slo: Slo) -> float:
        arrivals = replace(workload.arrivals, rate_rps=rate_rps, idc=long, short_idc=short)
        steady = replace(workload, arrivals=arrivals, windows=((60.0, np.array([rate_rps])),))
        systems = solve_systems(curves, np.zeros(1, dtype=np.intp), np.array([64]), steady, [replicas])
        if replicas * systems.capacity_rps[0] <= rate_rps:
            return 0.0  # a backlog is left to the next window
        fleet = fleets(systems, rate_windows(steady, 0.0), np.zeros(1, dtype=np.intp), [replicas])
        return float(attainment(fleet, slo.metric, slo.limit_s)[0])

    return met


def test_required_is_the_smallest_fleet_that_meets_every_limit(slow_attainment: Slow, found: ScheduleAnswer) -> None:
    """Origin: the definition, one window and one fleet at a time."""
    required, rates = found.problem.required, found.planned_rps
    assert required.min() < required.max()
    for w in range(0, len(rates), 9):
        met = {
            n: [slow_attainment(rates[w], n, slo) >= slo.percentile / 100.0 for slo in SLOS]
            for n in (int(required[w]), int(required[w]) - 1)
            if n > 0
        }
        assert all(met.pop(int(required[w])))
        assert not any(all(each) for each in met.values())


def test_rates_are_the_counted_ones(evening: Trace, found: ScheduleAnswer) -> None:
    """Origin: counts by hand for a few windows."""
    assert len(found.rates_rps) == 120
    for w in (0, 17, 60):
        inside = (evening.t_s >= 60.0 * w) & (evening.t_s < 60.0 * (w + 1))
        assert found.rates_rps[w] == pytest.approx(5.0 * inside.sum() / 60.0, rel=1e-12)
    assert found.planned_rps.tolist() == found.rates_rps.tolist()


def test_dispersion_within_windows_leaves_the_wave_out() -> None:
    """Origin: Poisson counts have an index of 1 at any rate; the whole trace's contains the wave's variance,
    amplitude^2 / 2 * w / mean = 320 at 10 s."""
    trace = wave(100.0, 80.0, 7200.0, seed=2)
    inside = dict(within_window_idc(trace.t_s, 60.0))
    assert set(inside) == {0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0}
    # standard error of a variance from n parts is sqrt(2 / n), with n = 120 windows x (60 / w - 1)
    for short_s, idc in inside.items():
        assert abs(idc - 1.0) < 4.0 * math.sqrt(2.0 / (120 * (60.0 / short_s - 1.0))) + 0.01
    assert dict(arrival_statistics(trace.t_s).idc)[10.0] > 200.0


def test_dispersion_of_pairs() -> None:
    """Origin: two requests at each Poisson arrival double variance over mean, at windows and rates alike."""
    rng = np.random.default_rng(3)
    t = np.sort(np.repeat(np.cumsum(rng.exponential(0.1, 40_000)), 2))
    assert dict(within_window_idc(t - t[0], 300.0))[1.0] == pytest.approx(2.0, rel=0.05)


def test_dispersion_equals_the_plain_form() -> None:
    """Origin: independent code, numpy's sample variance window by window."""
    rng = np.random.default_rng(4)
    t = np.sort(rng.uniform(0.0, 1000.0, 3000))
    t -= t[0]
    whole = int(t[-1] // 60.0)
    counts = np.array([np.histogram(t, np.arange(60.0 * w, 60.0 * w + 60.5, 3.0))[0] for w in range(whole)])
    plain = sum(np.var(row, ddof=1) for row in counts) / sum(np.mean(row) for row in counts)
    assert dict(within_window_idc(t, 60.0))[3.0] == pytest.approx(plain, rel=1e-12)


def test_nobody_comes() -> None:
    """Hand: empty windows need what is to serve at any time, and nothing where that is allowed."""
    t = np.concatenate([np.arange(0.0, 300.0, 0.5), np.arange(900.0, 1205.0, 0.5)])
    trace = Trace(name="gap", t_s=t, n_in=np.full(len(t), 500), n_out=np.full(len(t), 50))
    rule = {"lead_time_s": 0.0, "min_dwell_s": 0.0}
    awake = ask(trace, **rule)
    assert set(awake.problem.required.tolist()) == {1}
    asleep = ask(trace, **rule, min_replicas=0).schedule
    assert asleep.replicas[5:15].tolist() == [0] * 10
    assert (asleep.replicas[:5] == 1).all()
    assert asleep.cost_usd == pytest.approx(10 * 3.5 / 60.0, rel=1e-12)
    # ten minutes off save less than a start costs
    held = ask(trace, **{**rule, "lead_time_s": 660.0}, min_replicas=0).schedule
    assert set(held.replicas.tolist()) == {1}


# ---- the schedule --------------------------------------------------------------------------------------


def test_the_schedule_obeys_and_saves(found: ScheduleAnswer) -> None:
    """Origin: the rules, and that a constant fleet of peak size is one of the schedules."""
    schedule, problem = found.schedule, found.problem
    assert schedule.status is Status.OPTIMAL
    assert schedule_faults(problem, schedule.replicas) == []
    assert schedule.lower_bound_usd <= schedule.cost_usd < schedule.always_peak_usd
    assert schedule.saving == pytest.approx(1.0 - schedule.cost_usd / schedule.always_peak_usd, rel=1e-12)
    assert problem.usd_per_replica_hour == 3.5
    assert found.slo_attainment >= 0.98
    assert solve_schedule(problem).cost_usd == schedule.cost_usd


def test_without_lead_and_dwell_it_follows_the_demand(evening: Trace) -> None:
    """Origin: each window is then a problem of its own."""
    free = ask(evening, lead_time_s=0.0, min_dwell_s=0.0)
    assert free.schedule.replicas.tolist() == free.problem.required.tolist()
    assert free.schedule.cost_usd == pytest.approx(free.schedule.lower_bound_usd, rel=1e-12)


def test_relaxing_never_costs_more(evening: Trace, found: ScheduleAnswer) -> None:
    """Origin: a minimum over a larger set; a looser limit needs no more replicas."""
    looser = (Slo(metric="ttft", percentile=99.0, limit_s=4.0), Slo(metric="tpot", percentile=95.0, limit_s=0.08))
    cases: tuple[dict[str, Any], ...] = (
        {"lead_time_s": 30.0},
        {"min_dwell_s": 120.0},
        {"slos": looser},
        {"slos": SLOS[:1]},
        {"rate_scale": 4.0},
        {"window_s": 60.0, "max_num_seqs": None},
    )
    for changed in cases:
        assert ask(evening, **changed).schedule.cost_usd <= found.schedule.cost_usd * (1.0 + 1e-9)


def test_the_price_scales(evening: Trace, found: ScheduleAnswer) -> None:
    """Origin: dimensions."""
    dearer = ask(evening, price=7.0).schedule
    assert dearer.replicas.tolist() == found.schedule.replicas.tolist()
    assert dearer.cost_usd == pytest.approx(2.0 * found.schedule.cost_usd, rel=1e-12)


def test_a_quantile_takes_rates_of_the_neighbourhood(evening: Trace, found: ScheduleAnswer) -> None:
    """Origin: order statistics of 31 windows: the 0.95 quantile, of those that occurred, is the second largest."""
    safer = ask(evening, forecast=0.95)
    around = np.sort(safer.rates_rps[60 - 15 : 60 + 16])
    assert safer.planned_rps[60] == around[-2]
    assert safer.rates_rps.tolist() == found.rates_rps.tolist()
    assert safer.schedule.cost_usd > found.schedule.cost_usd
    assert safer.slo_attainment > found.slo_attainment


def test_a_day() -> None:
    """Origin: the wave's own shape over 1,440 windows. The fleet is largest in the middle, smallest at the ends, and
    cheaper than the peak by about the amplitude's share (a cosine's mean is half its height)."""
    day = wave(20.0, 16.0, 86400.0)
    answer = ask(day, rate_scale=10.0)
    schedule = answer.schedule
    assert len(schedule.replicas) == 1440
    assert schedule.replicas[:60].max() < schedule.replicas[690:750].min()
    # by hand: the mean count over the largest, were fleets proportional; less what noise, lead time and dwell cost
    assert 0.3 < schedule.saving < 1.0 - answer.rates_rps.mean() / answer.rates_rps.max()
    assert schedule.lower_bound_usd <= schedule.cost_usd <= 1.15 * schedule.lower_bound_usd


def test_the_cheapest_instance_is_taken(evening: Trace) -> None:
    """Origin: a minimum over a larger set, for several degrees, limits and GPU types."""
    llm = servecast.llm("llama-3.1-8b")
    rule = {"window_s": 60.0, "lead_time_s": 120.0, "min_dwell_s": 600.0, "rate_scale": 5.0}
    offers = [
        servecast.Offer(gpu=servecast.gpu(name), usd_per_hour=usd) for name, usd in (("h200", 3.5), ("l40s", 1.1))
    ]
    both = plan_schedule(evening, llm, offers, SLOS, **rule)
    for offer in offers:
        one = plan_schedule(evening, llm, [offer], SLOS, **rule)
        assert both.schedule.cost_usd <= one.schedule.cost_usd * (1.0 + 1e-9)


def test_azure_conversation(data_path: DataPath) -> None:
    """Origin: the published trace's 58 whole minutes, and the rules."""
    trace = servecast.read_trace(data_path("azure-llm-2023", "conv.csv.gz"))
    answer = ask(trace, rate_scale=10.0)
    assert len(answer.rates_rps) == 58
    assert answer.rates_rps.mean() == pytest.approx(10.0 * window_rates(trace.t_s, 60.0).mean(), rel=1e-12)
    assert schedule_faults(answer.problem, answer.schedule.replicas) == []
    assert answer.schedule.replicas.max() > answer.schedule.replicas.min() >= 1
    assert answer.slo_attainment >= 0.98


# ---- what cannot be met, what is malformed -------------------------------------------------------------


def test_a_window_beyond_the_limit_is_named(evening: Trace, found: ScheduleAnswer) -> None:
    """Origin: the first window whose requirement, known from the schedule without a limit, exceeds it."""
    for most in (int(found.problem.required.max()) - 1, 1):
        first = int(np.argmax(found.problem.required > most))
        for limited in (ask(evening, max_replicas=most), ask(evening, limit=most)):
            assert limited.schedule.status is Status.INFEASIBLE
            assert limited.schedule.binds.startswith(f"count: window {first} (from {60 * first} s, ")
            assert f"{most} replicas" in limited.schedule.binds
            assert math.isnan(limited.slo_attainment)
            assert schedule_document(limited)["windows"] == []
    assert "there may be 2" in ask(evening, max_replicas=2, min_replicas=5).schedule.binds


def test_limits_that_no_replica_meets(evening: Trace) -> None:
    with pytest.raises(ValueError, match="tpot_p99 <= 1e-05 s: the best achievable"):
        ask(evening, slos=(Slo(metric="tpot", percentile=99.0, limit_s=1e-5),))
    with pytest.raises(ValueError, match=r"one replica is 2 GPUs \(tp2 pp1\), 1 of h200_sxm are on offer"):
        ask(evening, limit=1, tp=2)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "window too short": ({"window_s": 4.0}, "window_s must be at least 5 s and finite, got 4.0"),
    "window of NaN": ({"window_s": math.nan}, "window_s must be at least 5 s"),
    "too few windows": ({"window_s": 3600.0}, "trace must span at least 3 windows of 3600 s, got 7"),
    "negative lead": ({"lead_time_s": -1.0}, "lead_time_s must be >= 0"),
    "negative dwell": ({"min_dwell_s": -1.0}, "min_dwell_s must be >= 0"),
    "NaN start": ({"start_usd": math.nan}, "start_usd must be >= 0"),
    "no replicas": ({"max_replicas": 0}, "max_replicas must be at least 1"),
    "less than none": ({"min_replicas": -1}, "min_replicas must be >= 0"),
    "another forecast": ({"forecast": "weather"}, "forecast must be known or a quantile"),
    "quantile of 1": ({"forecast": 1.0}, "forecast must be known or a quantile between 0 and 1, got 1.0"),
    "rate scale of 0": ({"rate_scale": 0.0}, "rate_scale must be > 0"),
    "degree that does not divide": ({"tp": 3}, "tp must divide the 32 attention heads"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str, evening: Trace) -> None:
    changed, message = MALFORMED[name]
    with pytest.raises(ValueError, match=message):
        ask(evening, **changed)


# ---- what is written -----------------------------------------------------------------------------------


def test_document_and_table_tell_the_same(found: ScheduleAnswer) -> None:
    """Origin: the documented keys; sums over windows by hand."""
    document = schedule_document(found)
    assert document["schema"] == "servecast.schedule-result/1"
    rows = document["windows"]
    assert [tuple(row) for row in rows] == [CSV_COLUMNS] * 120
    assert [row["start_s"] for row in rows] == [60.0 * w for w in range(120)]
    served = sum(row["replicas"] for row in rows) * 60.0
    leads = sum(row["ordered"] for row in rows) * 120.0
    assert document["cost_usd"] == pytest.approx((served + leads) / 3600.0 * 3.5, rel=1e-12)
    lines = schedule_csv(found).splitlines()
    assert lines[0] == ",".join(CSV_COLUMNS)
    assert [line.split(",")[3] for line in lines[1:]] == [str(row["replicas"]) for row in rows]


def test_warnings_of_range(evening: Trace) -> None:
    """Origin: the documented rules: five stays in a window, and an order that would serve."""
    assert ask(evening).warnings == ()
    (late,) = ask(evening, lead_time_s=1e5).warnings
    assert late.startswith("nothing ordered within")
    long = replace(evening, n_out=np.full(len(evening.t_s), 3000))
    assert any("longer than a fifth" in text for text in ask(long).warnings)

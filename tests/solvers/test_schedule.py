"""Replicas over time. Expected values: all paths of small instances, an integer program of medium ones, hand, and
the solver itself under changes that must not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from servecast.solvers.results import Status
from servecast.solvers.schedule import ReplicaSchedule, ScheduleProblem, schedule_faults, solve_schedule

Counts = NDArray[np.int64]


def problem(required: Any, **changed: Any) -> ScheduleProblem:
    """Minutes, and one US dollar per replica and minute: costs are replica-windows."""
    given_: dict[str, Any] = {
        "window_s": 60.0,
        "usd_per_replica_hour": 60.0,
        "max_replicas": 1000,
        "lead_time_s": 0.0,
        "min_dwell_s": 0.0,
    }
    return ScheduleProblem(required=np.asarray(required, dtype=np.int64), **{**given_, **changed})


@st.composite
def problems(draw: st.DrawFn, *, windows: int = 40, most: int = 9) -> ScheduleProblem:
    required = draw(st.lists(st.integers(0, most), min_size=1, max_size=windows))
    return problem(
        required,
        lead_time_s=draw(st.sampled_from([0.0, 30.0, 60.0, 100.0, 120.0, 300.0, 3600.0])),
        min_dwell_s=draw(st.sampled_from([0.0, 60.0, 90.0, 120.0, 300.0, 900.0, 36000.0])),
        start_usd=draw(st.sampled_from([0.0, 0.5, 1.0, 3.3])),
        max_replicas=draw(st.sampled_from([most, most + 1, 50])),
    )


# ---- exactness -----------------------------------------------------------------------------------------


def cheapest_of_all_paths(p: ScheduleProblem) -> float:
    """Least cost over every fleet in time, by trying them; its own reading of the rules, window by window. [USD]"""
    best = math.inf
    top = min(int(p.required.max()) + 1, p.max_replicas)
    for path in product(*(range(int(need), top + 1) for need in p.required)):
        cost, rose_at = 0.0, -math.inf
        for w, serving in enumerate(path):
            cost += serving * p.usd_per_replica_hour * p.window_s / 3600.0
            before = path[w - 1] if w else serving
            if serving > before:
                if w * p.window_s < p.lead_time_s:
                    break
                cost += (serving - before) * (p.usd_per_replica_hour * p.lead_time_s / 3600.0 + p.start_usd)
                rose_at = w * p.window_s
            if serving < before and w * p.window_s < rose_at + p.min_dwell_s:
                break
        else:
            best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_no_path_is_cheaper(seed: int) -> None:
    """Origin: all paths, up to one replica more than is ever needed."""
    rng = np.random.default_rng(seed)
    p = problem(
        rng.integers(0, 4, size=rng.integers(1, 8)),
        lead_time_s=float(rng.choice([0.0, 60.0, 90.0, 180.0])),
        min_dwell_s=float(rng.choice([0.0, 60.0, 100.0, 120.0, 180.0, 240.0, 900.0])),
        start_usd=float(rng.choice([0.0, 0.0, 0.7, 2.0])),
        max_replicas=int(rng.integers(3, 6)),
    )
    found = solve_schedule(p)
    assert found.status is Status.OPTIMAL
    assert found.cost_usd == pytest.approx(cheapest_of_all_paths(p), rel=1e-12)


def integer_program(p: ScheduleProblem) -> float:
    """Least cost by branch and bound: x serving, a risen, f fallen, z a rise happened; [x | a | f | z] by window."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    windows, most = len(p.required), int(p.required.max())
    x, a, f, z = (np.arange(windows) + k * windows for k in range(4))
    rows: list[tuple[dict[int, float], float, float]] = []
    for w in range(1, windows):
        rows.append(({x[w]: 1, x[w - 1]: -1, a[w]: -1, f[w]: 1}, 0.0, 0.0))
        rows.append(({a[w]: 1, z[w]: -most}, -np.inf, 0.0))
        # a rise at u rules out a fall at w until its dwell is over, and in its own window
        for u in range(1, w + 1):
            if (w - u) * p.window_s < p.min_dwell_s or u == w:
                rows.append(({f[w]: 1, z[u]: most}, -np.inf, float(most)))
    matrix = lil_matrix((len(rows), 4 * windows))
    for number, (terms, _, _) in enumerate(rows):
        for column, factor in terms.items():
            matrix[number, column] = factor
    early = np.arange(windows) * p.window_s < p.lead_time_s
    early[0] = True
    lower = np.concatenate([p.required, np.zeros(3 * windows)])
    upper = np.concatenate([np.full(windows, most), np.where(early, 0, most), np.full(windows, most), np.ones(windows)])
    start = p.usd_per_replica_hour * p.lead_time_s / 3600.0 + p.start_usd
    usd = np.concatenate([np.full(windows, p.usd_per_window), np.full(windows, start), np.zeros(2 * windows)])
    limits = LinearConstraint(matrix.tocsr(), [low for _, low, _ in rows], [high for _, _, high in rows])
    solved = milp(
        usd,
        constraints=limits if rows else (),
        bounds=Bounds(lower, upper),
        integrality=np.ones(4 * windows),
        options={"mip_rel_gap": 0.0},
    )
    assert solved.status == 0, solved.message
    return float(solved.fun)


@pytest.mark.parametrize("seed", range(12))
def test_an_integer_program_finds_the_same_cost(seed: int) -> None:
    """Origin: independent code (HiGHS through scipy) on a noisy wave of 24 to 48 windows."""
    rng = np.random.default_rng(100 + seed)
    windows = int(rng.integers(24, 49))
    wave = 5.0 - 4.0 * np.cos(2.0 * np.pi * np.arange(windows) / windows)
    p = problem(
        rng.poisson(wave),
        lead_time_s=float(rng.choice([0.0, 60.0, 150.0, 300.0])),
        min_dwell_s=float(rng.choice([120.0, 240.0, 420.0])),
        start_usd=float(rng.choice([0.0, 1.3])),
        max_replicas=40,
    )
    assert solve_schedule(p).cost_usd == pytest.approx(integer_program(p), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_dwell_per_replica_never_costs_more(seed: int) -> None:
    """Origin: the rule per replica is weaker. Its optimum by linear programming; cumulative starts A and stops S obey
    differences of two variables only, so that the optimum is in whole numbers."""
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    need = rng.poisson(4.0 - 3.0 * np.cos(2.0 * np.pi * np.arange(40) / 40))
    dwell = int(rng.integers(2, 7))
    p = problem(need, min_dwell_s=60.0 * dwell, start_usd=1.0)
    rows, limits = [], []
    for w in range(40):
        serving = np.zeros(80)
        serving[w], serving[40 + w] = -1.0, 1.0
        rows.append(serving)  # S(w) - A(w) <= -r
        limits.append(-float(need[w]))
        aged = np.zeros(80)
        aged[40 + w], aged[max(w - dwell, 0)] = 1.0, -1.0
        rows.append(aged)  # S(w) <= A(w - D)
        limits.append(0.0)
        for first in (0, 40) if w else ():
            grows = np.zeros(80)
            grows[first + w - 1], grows[first + w] = 1.0, -1.0
            rows.append(grows)
            limits.append(0.0)
    usd = np.concatenate([np.ones(40), -np.ones(40)])
    usd[39] += 1.0
    usd[0] -= 1.0
    solved = linprog(usd, A_ub=np.array(rows), b_ub=limits, bounds=(0, None))
    assert solved.status == 0
    found = solve_schedule(p)
    assert solved.fun <= found.cost_usd * (1.0 + 1e-9)
    assert found.lower_bound_usd <= solved.fun * (1.0 + 1e-9)


# ---- by hand -------------------------------------------------------------------------------------------


def test_a_gap_shorter_than_the_lead_time_is_held() -> None:
    """Hand: 3 replicas over a gap of 2 minutes cost 6, to start them again 3 lead times of 3 minutes, 9. (To have them
    warm at time 0 would cost 4 x 3 = 12 instead of the 9 of their start.)"""
    found = solve_schedule(problem([1, 1, 1, 1, 4, 1, 1, 4, 1], lead_time_s=180.0))
    assert found.replicas.tolist() == [1, 1, 1, 1, 4, 4, 4, 4, 1]
    assert found.ordered.tolist() == [0, 3, 0, 0, 0, 0, 0, 0, 0]
    assert found.stopped.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 3]
    assert found.cost_usd == pytest.approx(4 + 16 + 1 + 9, rel=1e-12)
    assert found.lower_bound_usd == pytest.approx(15.0, rel=1e-12)
    assert found.always_peak_usd == pytest.approx(36.0, rel=1e-12)
    assert found.saving == pytest.approx(6.0 / 36.0, rel=1e-12)
    assert found.gap == 0.0
    assert found.binds == "lead time and start cost: without it the cost would be 15.00 USD, not 30.00"


def test_a_gap_longer_than_the_lead_time_is_not() -> None:
    """Hand: two minutes to hold 2 replicas cost 4, to start them again 2."""
    found = solve_schedule(problem([3, 1, 1, 3], lead_time_s=60.0))
    assert found.replicas.tolist() == [3, 1, 1, 3]
    assert found.ordered.tolist() == [0, 0, 2, 0]
    assert found.cost_usd == pytest.approx(8.0 + 2.0, rel=1e-12)


def test_a_dwell_keeps_what_rose() -> None:
    """Hand: what rises in window 3 stays for 3 windows, 6; what was there at time 0 need not. Two replicas from time 0
    to window 1 cost 4, less than the dwell of a rise there."""
    found = solve_schedule(problem([0, 0, 0, 2, 0, 0, 0], min_dwell_s=180.0))
    assert found.replicas.tolist() == [0, 0, 0, 2, 2, 2, 0]
    assert found.binds == "minimum dwell: without it the cost would be 2.00 USD, not 6.00"
    assert solve_schedule(problem([0, 2, 0, 0, 0, 0, 0], min_dwell_s=180.0)).replicas.tolist() == [2, 2, 0, 0, 0, 0, 0]


def test_it_rises_early_so_that_the_dwell_ends_early() -> None:
    """Hand: rises at windows 5 and 6 would dwell to the end of window 8 (1 x 2 + 3 x 5 = 17); both at once dwell to
    window 7 (3 x 5 = 15)."""
    found = solve_schedule(problem([0, 0, 0, 0, 0, 2, 5, 0, 0, 0], min_dwell_s=180.0))
    assert found.replicas.tolist() == [0, 0, 0, 0, 0, 5, 5, 5, 0, 0]
    assert found.cost_usd == pytest.approx(15.0, rel=1e-12)


def test_replicas_for_the_first_lead_time_are_warm_at_time_0() -> None:
    """Hand: nothing ordered within the day serves before minute 2."""
    found = solve_schedule(problem([1, 5, 1, 1, 1], lead_time_s=120.0))
    assert found.replicas.tolist() == [5, 5, 1, 1, 1]
    assert not found.ordered.any()
    longer_than_the_day = solve_schedule(problem([1, 1, 5, 1, 3, 1], lead_time_s=1e5))
    assert longer_than_the_day.replicas.tolist() == [5, 5, 5, 3, 3, 1]


def test_an_order_within_a_window() -> None:
    """Hand: a lead time of 90 s before minute 3 is minute 1.5."""
    found = solve_schedule(problem([1, 1, 1, 2], lead_time_s=90.0))
    assert found.ordered.tolist() == [0, 1, 0, 0]
    assert found.cost_usd == pytest.approx(5.0 + 1.5, rel=1e-12)


def test_windows_are_counted_in_decimals() -> None:
    """Hand: 1.1 s are 11 windows of 0.1 s, though 1.1 / 0.1 > 11 in binary."""
    p = problem([1, 2], window_s=0.1, lead_time_s=1.1, min_dwell_s=1.1)
    assert p.first_rise == 11
    assert p.dwell_windows == 11


def test_nothing_is_needed() -> None:
    """Hand: no replica, no cost, and no saving over nothing."""
    found = solve_schedule(problem([0, 0]))
    assert found.replicas.tolist() == [0, 0]
    assert (found.cost_usd, found.saving) == (0.0, 0.0)


def test_infeasible_names_window_and_limit() -> None:
    """Origin: the rule that an infeasible request is a result that names what binds."""
    found = solve_schedule(problem([1, 2, 7, 9], max_replicas=5))
    assert found.status is Status.INFEASIBLE
    assert found.binds == "count: window 2 (from 120 s) needs 7 replicas, at most 5 may serve"
    assert found.replicas.size == 0
    assert found.cost_usd == math.inf


# ---- what must hold ------------------------------------------------------------------------------------


def paid(p: ScheduleProblem, found: ReplicaSchedule) -> Counts:
    """Most replicas paid at once in each window: serving, and those in their lead time at its end."""
    total = found.replicas.copy()
    for w in np.flatnonzero(found.started):
        first = max(math.ceil((w * p.window_s - p.lead_time_s) / p.window_s), 0)
        total[first:w] += found.started[w]
    return total


@given(p=problems())
def test_rules_hold_and_bounds_enclose(p: ScheduleProblem) -> None:
    """Origin: the statement of the problem."""
    found = solve_schedule(p)
    assert schedule_faults(p, found.replicas) == []
    assert found.lower_bound_usd <= found.cost_usd * (1.0 + 1e-12)
    assert found.cost_usd <= found.always_peak_usd * (1.0 + 1e-12)
    assert found.ordered.sum() == found.started.sum()
    moved = found.replicas[0] + np.cumsum(found.started - found.stopped)
    assert moved.tolist() == found.replicas.tolist()


@given(p=problems())
def test_replicas_in_their_lead_time_stay_within_the_limit(p: ScheduleProblem) -> None:
    """Origin: the claim of the module; the largest fleet ever needed is as tight a limit as there is."""
    assert paid(p, solve_schedule(p)).max() <= p.required.max()


@given(p=problems())
def test_without_lead_cost_and_dwell_the_fleet_is_what_is_required(p: ScheduleProblem) -> None:
    """Origin: each window is then a problem of its own."""
    free = replace(p, lead_time_s=0.0, min_dwell_s=0.0, start_usd=0.0)
    found = solve_schedule(free)
    assert found.replicas.tolist() == p.required.tolist()
    assert found.cost_usd == pytest.approx(found.lower_bound_usd, rel=1e-12)
    assert "follows it" in found.binds


@given(p=problems(), share=st.floats(0.0, 1.0))
def test_relaxing_a_rule_never_costs_more(p: ScheduleProblem, share: float) -> None:
    """Origin: a minimum over a larger set."""
    bound = solve_schedule(p).cost_usd * (1.0 + 1e-9)
    for relaxed in (
        replace(p, lead_time_s=p.lead_time_s * share),
        replace(p, min_dwell_s=p.min_dwell_s * share),
        replace(p, start_usd=p.start_usd * share),
        replace(p, max_replicas=p.max_replicas + 5),
        replace(p, required=np.maximum(p.required - 1, 0)),
    ):
        assert solve_schedule(relaxed).cost_usd <= bound


@given(p=problems(), factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_prices_and_seconds_scale(p: ScheduleProblem, factor: float) -> None:
    """Origin: dimensions. k times every price costs k times as much; k times every second, at 1/k of the price, the
    same; and the fleet is the same."""
    found = solve_schedule(p)
    dearer = replace(p, usd_per_replica_hour=factor * p.usd_per_replica_hour, start_usd=factor * p.start_usd)
    slower = replace(
        p,
        window_s=factor * p.window_s,
        lead_time_s=factor * p.lead_time_s,
        min_dwell_s=factor * p.min_dwell_s,
        usd_per_replica_hour=p.usd_per_replica_hour / factor,
    )
    for other, ratio in ((dearer, factor), (slower, 1.0)):
        scaled = solve_schedule(other)
        assert scaled.replicas.tolist() == found.replicas.tolist()
        assert scaled.cost_usd == pytest.approx(found.cost_usd * ratio, rel=1e-12)


@given(p=problems(), more=st.integers(1, 5))
def test_replicas_that_every_window_needs_are_a_constant(p: ScheduleProblem, more: int) -> None:
    """Origin: a base that always serves neither starts nor stops."""
    found = solve_schedule(p)
    based = solve_schedule(replace(p, required=p.required + more, max_replicas=p.max_replicas + more))
    assert based.cost_usd == pytest.approx(found.cost_usd + more * len(p.required) * p.usd_per_window, rel=1e-9)


@settings(max_examples=10)
@given(p=problems(windows=30, most=200))
def test_larger_fleets(p: ScheduleProblem) -> None:
    """Origin: splitting each replica in two of half the price changes nothing."""
    halves = replace(
        p,
        required=2 * p.required,
        max_replicas=2 * p.max_replicas,
        usd_per_replica_hour=p.usd_per_replica_hour / 2.0,
        start_usd=p.start_usd / 2.0,
    )
    assert solve_schedule(halves).cost_usd == pytest.approx(solve_schedule(p).cost_usd, rel=1e-9)


# ---- malformed -----------------------------------------------------------------------------------------

MALFORMED = {
    "window of zero": ({"window_s": 0.0}, "window_s must be positive and finite, got 0.0"),
    "window of NaN": ({"window_s": math.nan}, "window_s must be positive and finite, got nan"),
    "free replicas": ({"usd_per_replica_hour": 0.0}, "usd_per_replica_hour must be positive"),
    "negative lead": ({"lead_time_s": -1.0}, "lead_time_s must be >= 0 and finite, got -1.0"),
    "endless dwell": ({"min_dwell_s": math.inf}, "min_dwell_s must be >= 0 and finite, got inf"),
    "paid to start": ({"start_usd": -0.1}, "start_usd must be >= 0"),
    "no replicas": ({"max_replicas": 0}, "max_replicas must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    changed, message = MALFORMED[name]
    with pytest.raises(ValueError, match=message):
        problem([1, 2], **changed)


@pytest.mark.parametrize("required", [[], [[1, 2]], [-1, 2]])
def test_malformed_requirement(required: list[int]) -> None:
    with pytest.raises(ValueError, match="required must be"):
        problem(required)
    with pytest.raises(ValueError, match="whole numbers"):
        replace(problem([1]), required=np.array([1.5]))


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at most 10000000, got 20000 x 1001"):
        solve_schedule(problem(np.tile([0, 1000], 10_000), max_replicas=1000))

"""The fleet program. Expected values: hand calculation, the sample that Melange ships, and brute force over every fleet
with scipy's linear programming for the shares."""

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
from scipy.optimize import linprog

from servecast.solvers.fleet import (
    FleetPlan,
    FleetProblem,
    ReplicaType,
    Status,
    broken_constraints,
    explained,
    solve_fleet,
)

Floats = NDArray[np.float64]


def one(name: str, price: float, *, family: str | None = None, gpus: int = 1) -> ReplicaType:
    return ReplicaType(name=name, family=family or name, gpus=gpus, usd_per_hour=price)


def melange(**changed: Any) -> FleetProblem:
    """melange/config/example.json of Melange's release: 30 requests/s over two input and two output sizes."""
    data: dict[str, Any] = {
        "classes": ("short short", "short long", "long short", "long long"),
        "rates_rps": 30.0 * np.array([0.2, 0.1, 0.5, 0.2]),
        "types": (one("A10G", 1.01), one("A100-80GB", 3.67)),
        "throughput_rps": np.array([[2.0, 20.0], [1.0, 20.0], [5.0, 40.0], [2.0, 20.0]]),
    }
    return FleetProblem(**{**data, **changed})


def random_problem(seed: int) -> FleetProblem:
    """Up to three classes, three types in two families, some pairs not served, some availability scarce."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 4))
    types = (
        one("a tp1", float(rng.uniform(0.5, 2.0)), family="a"),
        one("a tp2", float(rng.uniform(1.5, 4.0)), family="a", gpus=2),
        one("b", float(rng.uniform(1.0, 5.0))),
    )
    throughput = rng.uniform(0.5, 4.0, (count, 3)) * np.array([1.0, 2.0, 2.5])
    throughput[rng.random((count, 3)) < 0.2] = rng.choice([0.0, np.nan])
    available = {"a": int(rng.integers(1, 6))} if rng.random() < 0.7 else {}
    if rng.random() < 0.5:
        available["b"] = int(rng.integers(0, 3))
    return FleetProblem(
        classes=tuple(f"class {i}" for i in range(count)),
        rates_rps=rng.uniform(0.3, 5.0, count),
        types=types,
        throughput_rps=throughput,
        available=available,
    )


def shares_exist(problem: FleetProblem, replicas: tuple[int, ...]) -> bool:
    """Whether any split of the classes fits a fleet; an own statement of C1 and C2, solved by scipy."""
    pairs = [
        (i, j)
        for i in range(len(problem.classes))
        for j in range(len(problem.types))
        if problem.throughput_rps[i, j] > 0.0
    ]
    if not pairs:
        return False
    whole = np.array([[float(i == k) for i, _ in pairs] for k in range(len(problem.classes))])
    load = np.array(
        [
            [problem.rates_rps[i] / problem.throughput_rps[i, j] * float(j == k) for i, j in pairs]
            for k in range(len(problem.types))
        ]
    )
    found = linprog(np.zeros(len(pairs)), A_ub=load, b_ub=replicas, A_eq=whole, b_eq=np.ones(len(whole)))
    return bool(found.status == 0)


def brute_force(problem: FleetProblem, most: int = 14) -> float:
    """Cheapest price over every fleet of up to `most` replicas of each type; inf where none serves."""
    prices = np.array([kind.usd_per_hour for kind in problem.types])
    counts = sorted(product(range(most + 1), repeat=len(problem.types)), key=lambda n: float(prices @ np.array(n)))
    for replicas in counts:
        gpus = {
            family: sum(n * kind.gpus for n, kind in zip(replicas, problem.types, strict=True) if kind.family == family)
            for family in problem.available
        }
        if all(gpus[family] <= limit for family, limit in problem.available.items()) and shares_exist(
            problem, replicas
        ):
            return float(prices @ np.array(replicas))
    return math.inf


def cost(plan: FleetPlan) -> float:
    return math.inf if plan.status is Status.INFEASIBLE else plan.usd_per_hour


# ---- the optimum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(16))
def test_the_fleet_is_the_cheapest_of_all(seed: int) -> None:
    """Brute force, shares by scipy's linprog; the fleet itself is feasible by the independent check."""
    problem = random_problem(seed)
    found = solve_fleet(problem)
    expected = brute_force(problem)
    assert (found.status is Status.INFEASIBLE) == math.isinf(expected)
    if math.isinf(expected):
        return
    np.testing.assert_allclose(found.usd_per_hour, expected, rtol=1e-9)
    assert found.status is Status.OPTIMAL
    assert found.gap == 0.0
    assert found.bound == found.usd_per_hour
    assert not broken_constraints(problem, found.replicas, found.share)
    assert shares_exist(problem, tuple(found.replicas.tolist()))


def test_random_problems_are_of_both_kinds() -> None:
    """The seeds above hold feasible and infeasible problems, and fleets of more than one type."""
    plans = [solve_fleet(random_problem(seed), explain=False) for seed in range(16)]
    assert 2 <= sum(plan.status is Status.INFEASIBLE for plan in plans) <= 10
    assert sum(np.count_nonzero(plan.replicas) > 1 for plan in plans) >= 2


def test_melange_sample_in_its_own_form() -> None:
    """Published (example.json with its solver): slice factor 1 gives three A10G and one A100, 6.70 USD/h."""
    found = solve_fleet(melange(), slices=1)
    assert found.status is Status.OPTIMAL
    assert found.replicas.tolist() == [3, 1]
    np.testing.assert_allclose(found.usd_per_hour, 3 * 1.01 + 3.67, rtol=1e-12)
    assert set(np.unique(found.share)) == {0.0, 1.0}


def test_melange_sample_in_four_slices() -> None:
    """Hand: the A100 alone is 1.125 full; each slice moved frees 0.0375 to 0.09375 of it and takes 0.75 A10G, and it
    takes two to free 0.125: two A10G."""
    found = solve_fleet(melange(), slices=4)
    assert found.replicas.tolist() == [2, 1]
    np.testing.assert_allclose(found.usd_per_hour, 2 * 1.01 + 3.67, rtol=1e-12)


def test_melange_sample_split_freely() -> None:
    """Hand: 5 of the 15 long-short requests/s fill one A10G and free the 0.125 that is too much; the A100 alone is
    1.125, and A10G alone 12."""
    found = solve_fleet(melange())
    assert found.replicas.tolist() == [1, 1]
    np.testing.assert_allclose(found.usd_per_hour, 1.01 + 3.67, rtol=1e-12)
    np.testing.assert_allclose(found.share[:, 0], [0.0, 0.0, 1.0 / 3.0, 0.0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.utilisation, 1.0, rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_never_dearer_than_melange(seed: int) -> None:
    """Rule: every assignment of slices is a split, so the free split is never dearer."""
    rng = np.random.default_rng(seed)
    problem = FleetProblem(
        classes=tuple(f"c{i}" for i in range(6)),
        rates_rps=rng.uniform(0.2, 8.0, 6),
        types=tuple(one(f"t{j}", float(rng.uniform(0.5, 5.0))) for j in range(3)),
        throughput_rps=rng.uniform(0.5, 6.0, (6, 3)),
    )
    free = solve_fleet(problem, explain=False)
    for slices in (1, 2, 4):
        assert free.usd_per_hour <= solve_fleet(problem, slices=slices, explain=False).usd_per_hour * (1.0 + 1e-9)


def test_the_busiest_type_is_least_busy() -> None:
    """Hand: loads of 0.6 and 0.6 on two types alike that each take either class: both 0.6, not 1 and 0.2."""
    problem = FleetProblem(
        classes=("x", "y"),
        rates_rps=np.array([0.6, 0.6]),
        types=(one("a", 1.0), one("b", 1.0)),
        throughput_rps=np.ones((2, 2)),
        available={"a": 1, "b": 1},
    )
    found = solve_fleet(problem)
    assert found.replicas.tolist() == [1, 1]
    np.testing.assert_allclose(found.utilisation, 0.6, rtol=1e-6)


@pytest.mark.parametrize("rate", [1e-6, 1e-8, 1e-10])
def test_the_smallest_class_has_a_replica(rate: float) -> None:
    """Hand: one request in many years still takes one replica of the cheaper type."""
    found = solve_fleet(replace(scarce(9), rates_rps=np.array([rate])))
    assert found.replicas.tolist() == [1, 0]
    np.testing.assert_allclose(found.utilisation[0], rate, rtol=1e-6)


# ---- what must not matter, what must not hurt ----------------------------------------------------------


@pytest.mark.parametrize("seed", range(0, 16, 2))
def test_relabelling_does_not_matter(seed: int) -> None:
    """Rule: other orders and names of classes and types, the same cost and status."""
    problem = random_problem(seed)
    turned = FleetProblem(
        classes=tuple(f"renamed {name}" for name in problem.classes[::-1]),
        rates_rps=problem.rates_rps[::-1],
        types=problem.types[::-1],
        throughput_rps=problem.throughput_rps[::-1, ::-1],
        available=problem.available,
    )
    np.testing.assert_allclose(cost(solve_fleet(turned)), cost(solve_fleet(problem)), rtol=1e-9)


problems = st.builds(random_problem, st.integers(0, 10**6))


@given(problem=problems, family=st.sampled_from(["a", "b"]), more=st.integers(1, 5))
@settings(max_examples=30)
def test_more_gpus_on_offer_never_cost_more(problem: FleetProblem, family: str, more: int) -> None:
    """Rule: relaxing an availability never worsens the optimum, nor does removing it."""
    before = cost(solve_fleet(problem, explain=False))
    if family in problem.available:
        raised = {**problem.available, family: problem.available[family] + more}
        assert cost(solve_fleet(replace(problem, available=raised), explain=False)) <= before * (1.0 + 1e-9)
    assert cost(solve_fleet(replace(problem, available={}), explain=False)) <= before * (1.0 + 1e-9)


@given(problem=problems, factor=st.floats(1.0, 3.0))
@settings(max_examples=30)
def test_more_load_never_costs_less(problem: FleetProblem, factor: float) -> None:
    """Rule: serving an upper quantile of the rates costs at least what the mean does; faster replicas cost no more."""
    before = cost(solve_fleet(problem, explain=False))
    loaded = solve_fleet(replace(problem, rates_rps=problem.rates_rps * factor), explain=False)
    assert cost(loaded) >= before * (1.0 - 1e-9)
    faster = solve_fleet(replace(problem, throughput_rps=problem.throughput_rps * factor), explain=False)
    assert cost(faster) <= before * (1.0 + 1e-9)


@given(problem=problems)
@settings(max_examples=30)
def test_a_fleet_keeps_every_constraint(problem: FleetProblem) -> None:
    """Feasibility by independent code, bound and gap in order, and a price that is the sum of its parts."""
    found = solve_fleet(problem)
    assert found.binds
    if found.status is Status.INFEASIBLE:
        assert math.isnan(found.usd_per_hour)
        assert not found.replicas.any()
        return
    assert not broken_constraints(problem, found.replicas, found.share)
    assert found.bound <= found.usd_per_hour
    prices = [kind.usd_per_hour for kind in problem.types]
    np.testing.assert_allclose(found.usd_per_hour, float(found.replicas @ np.array(prices)), rtol=1e-12)
    assert np.all(found.utilisation <= 1.0 + 1e-6)
    assert np.all(found.utilisation[found.replicas == 0] == 0.0)


def test_seconds_and_dollars_only_scale() -> None:
    """Homogeneity: rates and throughputs per hour instead of per second, prices times 3: the same fleet."""
    problem = random_problem(1)
    plain = solve_fleet(problem)
    scaled = solve_fleet(
        replace(
            problem,
            rates_rps=problem.rates_rps * 3600.0,
            throughput_rps=problem.throughput_rps * 3600.0,
            types=tuple(replace(kind, usd_per_hour=3.0 * kind.usd_per_hour) for kind in problem.types),
        )
    )
    assert scaled.replicas.tolist() == plain.replicas.tolist()
    np.testing.assert_allclose(scaled.usd_per_hour, 3.0 * plain.usd_per_hour, rtol=1e-12)


# ---- what binds ----------------------------------------------------------------------------------------


def scarce(limit: int) -> FleetProblem:
    """Class x of 4 replicas on `cheap` at 1 USD/h or 4 on `dear` at 3."""
    return FleetProblem(
        classes=("x",),
        rates_rps=np.array([4.0]),
        types=(one("cheap", 1.0), one("dear", 3.0)),
        throughput_rps=np.ones((1, 2)),
        available={"cheap": limit},
    )


def test_scarce_gpus_bind() -> None:
    """Hand: one cheap GPU of four leaves three dear ones, 10 USD/h; without the limit 4."""
    found = solve_fleet(scarce(1))
    np.testing.assert_allclose(found.usd_per_hour, 10.0, rtol=1e-12)
    assert found.binds == "cheap: 1 on offer; with more the fleet would cost 4.00 USD/h"
    assert [(item.constraint, round(item.saves_usd_per_hour, 6)) for item in found.bindings] == [("cheap", 6.0)]


def test_whole_replicas_bind() -> None:
    """Hand: 2.5 replicas at 1 USD/h are 3."""
    problem = replace(scarce(9), rates_rps=np.array([2.5]))
    found = solve_fleet(problem)
    assert found.binds == "integrality: replicas are whole; in fractions the fleet would cost 2.50 USD/h"
    assert [item.constraint for item in found.bindings] == ["integrality"]


def test_the_load_binds() -> None:
    """Hand: four full replicas; neither more GPUs nor fractions save anything."""
    assert solve_fleet(scarce(9)).binds == "the load: every replica is full"


def test_deployments_of_a_family_share_its_gpus() -> None:
    """Hand: of 3 GPUs, a tp2 replica (3 requests/s) and a tp1 (1): 4 requests/s; two tp2 would need 4 GPUs."""
    types = (one("g tp1", 1.0, family="g"), one("g tp2", 2.0, family="g", gpus=2))
    problem = FleetProblem(
        classes=("x",),
        rates_rps=np.array([4.0]),
        types=types,
        throughput_rps=np.array([[1.0, 3.0]]),
        available={"g": 3},
    )
    assert solve_fleet(problem).replicas.tolist() == [1, 1]
    short = solve_fleet(replace(problem, available={"g": 2}))
    assert short.status is Status.INFEASIBLE
    assert short.binds == "g: 2 on offer, at least 3 are needed; class x alone takes 2.7 GPUs"


# ---- infeasible ----------------------------------------------------------------------------------------


def test_infeasible_names_the_class_and_why() -> None:
    problem = melange(
        throughput_rps=np.array([[2.0, 20.0], [0.0, np.nan], [5.0, 40.0], [2.0, 20.0]]),
        reasons={"short long": "no GPU type meets ttft_p99"},
    )
    found = solve_fleet(problem)
    assert found.status is Status.INFEASIBLE
    assert found.binds == "class short long: no GPU type meets ttft_p99"


def test_infeasible_names_the_gpus_that_are_short() -> None:
    """Hand: loads 8, 3 and 1.5 on `h100`: 12.5, so 13, of which 8 are on offer; `other` serves none of them."""
    problem = FleetProblem(
        classes=("a", "b", "c"),
        rates_rps=np.array([8.0, 3.0, 1.5]),
        types=(one("h100", 2.9), one("other", 1.0)),
        throughput_rps=np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]),
        available={"h100": 8},
    )
    found = solve_fleet(problem)
    assert found.status is Status.INFEASIBLE
    assert found.binds == "h100: 8 on offer, at least 13 are needed; class a alone takes 8.0 GPUs"


def test_infeasible_names_two_families_that_are_short() -> None:
    """Hand: each class has one family of its own; 3 of 1 and 2 of 1, three more together."""
    problem = FleetProblem(
        classes=("a", "b"),
        rates_rps=np.array([3.0, 2.0]),
        types=(one("g", 1.0), one("h", 1.0)),
        throughput_rps=np.array([[1.0, 0.0], [0.0, 1.0]]),
        available={"g": 1, "h": 1},
    )
    assert solve_fleet(problem).binds.startswith("g and h: g 1, h 1 on offer, at least 3 more are needed together")


# ---- limits and malformed input ------------------------------------------------------------------------


def test_a_limit_too_short_for_any_fleet() -> None:
    """Rule: no fleet is claimed, none is ruled out."""
    found = solve_fleet(melange(), time_limit_s=1e-9)
    assert found.status is Status.UNKNOWN
    assert not found.replicas.any()
    assert "1e-09 s" in found.binds


def test_explained_adds_only_what_binds() -> None:
    plain = solve_fleet(scarce(1), explain=False)
    assert (plain.binds, plain.bindings) == ("", ())
    assert explained(scarce(1), plain).binds == solve_fleet(scarce(1)).binds


@pytest.mark.parametrize(
    ("replicas", "share", "constraint"),
    [
        ([1, 1], [[1.0, 0.0]], "C2"),
        ([4, 0], [[0.9, 0.0]], "C1"),
        ([5, 0], [[1.0, 0.0]], "C3"),
        ([0, 4], [[-1.0, 2.0]], "C1"),
    ],
)
def test_the_check_finds_what_is_broken(replicas: list[int], share: list[list[float]], constraint: str) -> None:
    """Hand, on 4 replicas' load with 4 cheap GPUs on offer."""
    broken = broken_constraints(scarce(4), np.array(replicas), np.array(share))
    assert any(item.startswith(constraint) for item in broken)


def test_the_check_finds_a_class_that_is_not_served() -> None:
    problem = replace(scarce(4), throughput_rps=np.array([[np.nan, 1.0]]))
    assert broken_constraints(problem, np.array([4, 0]), np.array([[1.0, 0.0]])) == [
        "C2: cheap is given a class that it cannot serve"
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rates_rps": np.array([1.0, 2.0, 3.0])}, "rates_rps must be one per class"),
        ({"rates_rps": np.array([1.0, 2.0, 3.0, 0.0])}, "rates_rps must be positive"),
        ({"rates_rps": np.array([1.0, 2.0, 3.0, np.nan])}, "rates_rps must be positive"),
        ({"throughput_rps": np.ones((4, 3))}, "throughput_rps must be 4 classes x 2 types"),
        ({"throughput_rps": -np.ones((4, 2))}, "throughput_rps must be >= 0"),
        ({"throughput_rps": np.full((4, 2), np.inf)}, "throughput_rps must be >= 0"),
        ({"classes": ("a", "a", "b", "c")}, "classes must be one or more distinct"),
        ({"types": (one("a", 1.0), one("a", 2.0))}, "types must be one or more with distinct"),
        ({"available": {"A10G": -1}}, "available of A10G must be >= 0"),
    ],
)
def test_malformed_problems_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        melange(**changed)


def test_malformed_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="slices must be at least 1"):
        solve_fleet(melange(), slices=0)
    with pytest.raises(ValueError, match="gpus of x must be at least 1"):
        one("x", 1.0, gpus=0)
    with pytest.raises(ValueError, match="usd_per_hour of x must be positive"):
        one("x", math.nan)

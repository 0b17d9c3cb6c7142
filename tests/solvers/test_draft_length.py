"""Draft length by batch size: what is optimal. Expected values: regret of published sweeps by hand, all choices of
small instances, the integer program, and a plain recursion."""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from servecast.solvers import draft_length_paths
from servecast.solvers.draft_length import (
    DraftLengthProblem,
    Status,
    solve_draft_length,
)
from servecast.solvers.draft_length_milp import solve_draft_length_milp

Floats = NDArray[np.float64]

# ---- published sweeps ----------------------------------------------------------------------------------

# DeepSeek-V4-Pro-0813 DSpark, TP8 on 8 B300, vLLM blog of 2026-08-14, figure 3; concurrency 1, 16, 32, 64
B300_PER_USER = {
    0: [101.3, 71.8, 53.6, 45.7],
    1: [154.2, 90.7, 77.9, 64.2],
    3: [232.9, 125.8, 103.6, 82.0],
    5: [257.1, 128.9, 103.9, 84.1],
    6: [260.3, 129.3, 102.1, 81.9],
    7: [253.0, 126.1, 98.9, 79.2],
}
B300_AGGREGATE = {
    0: [101, 1124, 1664, 2774],
    1: [153, 1408, 2384, 3864],
    3: [231, 1906, 3112, 4856],
    5: [251, 1939, 3071, 4931],
    6: [258, 1931, 3029, 4804],
    7: [251, 1878, 2939, 4611],
}
# SGLang pull request 22246, output tok/s
QWEN3_235B = {  # batch 1, 8, 64
    1: [162, 823, 3353],
    2: [188, 903, 3693],
    3: [195, 896, 3555],
    4: [199, 911, 3400],
    5: [199, 905, 3222],
    6: [188, 883, 3054],
}
GLM_47_FP8 = {  # batch 1, 2, 4, ..., 64
    1: [130, 236, 469, 795, 1265, 2090, 3391],
    2: [167, 286, 581, 972, 1540, 2497, 3836],
    3: [195, 350, 648, 1075, 1766, 2761, 4106],
    4: [204, 371, 709, 1113, 1704, 2707, 3954],
}
# vLLM pull request 52362, ROCm, DeepSeek-V4 DSpark, ShareGPT, tok/s at concurrency 4, 8, ..., 256
ROCM = {
    0: [381.53, 729.20, 1342.83, 2392.99, 4094.75, 6340.78, 8878.57],
    7: [970.33, 1762.59, 2909.52, 4756.32, 6712.35, 8778.87, 7852.42],
}


def sweep(batches: list[int], table: dict[int, Any], **changed: Any) -> DraftLengthProblem:
    """Every batch as frequent as any other; lengths that were not measured are not available."""
    goodput = np.full((len(batches), max(table) + 1), np.nan)
    for length, column in table.items():
        goodput[:, length] = column
    return DraftLengthProblem(
        batches=np.array(batches), goodput=goodput, weights=np.full(len(batches), 1.0 / len(batches)), **changed
    )


C4, BS7, C7 = [1, 16, 32, 64], [2**i for i in range(7)], [2**i for i in range(2, 9)]


@pytest.mark.parametrize(
    ("batches", "table", "most", "lengths", "mean_regret"),
    [
        # hand: (1 - 257.1 / 260.3 + 1 - 128.9 / 129.3) / 4
        (C4, B300_PER_USER, 1, [5, 5, 5, 5], 0.0038469),
        (C4, B300_PER_USER, 2, [6, 6, 5, 5], 0.0),
        # hand: (1 - 251 / 258 + 1 - 3071 / 3112) / 4, then its second term alone
        (C4, B300_AGGREGATE, 1, [5, 5, 5, 5], 0.0100767),
        (C4, B300_AGGREGATE, 2, [6, 5, 5, 5], 0.0032937),
        (C4, B300_AGGREGATE, 3, [6, 5, 3, 5], 0.0),
        # hand: (1 - 1704 / 1766 + 1 - 2707 / 2761 + 1 - 3954 / 4106) / 7
        (BS7, GLM_47_FP8, 1, [4] * 7, 0.0130979),
        (BS7, GLM_47_FP8, 2, [4, 4, 4, 4, 3, 3, 3], 0.0),
        # hand: (1 - 188 / 199 + 1 - 903 / 911) / 3; 4 and 5 are equal at batch 1, and the shorter is taken
        ([1, 8, 64], QWEN3_235B, 1, [2, 2, 2], 0.0213529),
        ([1, 8, 64], QWEN3_235B, 2, [4, 4, 2], 0.0),
        # hand: (1 - 7852.42 / 8878.57) / 7
        (C7, ROCM, 1, [7] * 7, 0.0165108),
        (C7, ROCM, 2, [7, 7, 7, 7, 7, 7, 0], 0.0),
    ],
)
def test_published_sweeps(
    batches: list[int], table: dict[int, Any], most: int, lengths: list[int], mean_regret: float
) -> None:
    """Origin: the best lengths by eye and their regret by hand, from the tables above."""
    found = solve_draft_length(sweep(batches, table, max_lengths=most))
    assert found.status is Status.OPTIMAL
    assert found.lengths.tolist() == lengths
    np.testing.assert_allclose(found.mean_regret, mean_regret, rtol=1e-4)
    np.testing.assert_allclose(found.objective, mean_regret, rtol=1e-4)
    assert (found.bound, found.gap) == (found.objective, 0.0)


# ---- exactness -----------------------------------------------------------------------------------------


def levels_of(p: DraftLengthProblem, choice: tuple[int, ...]) -> tuple[float, ...] | None:
    """What is minimised, in order; None for a choice that breaks a rule. Plain Python, its own reading of the rules."""
    n, width = len(p.batches), p.goodput.shape[1]
    goodput, batches, weights = p.goodput.tolist(), p.batches.tolist(), p.weights.tolist()
    switch = [float(p.switch_cost)] * n if np.ndim(p.switch_cost) == 0 else np.asarray(p.switch_cost).tolist()
    changes = [i for i in range(n - 1) if choice[i] != choice[i + 1]]
    if p.max_lengths is not None and len(set(choice)) > p.max_lengths:
        return None
    if p.max_segments is not None and len(changes) >= p.max_segments:
        return None
    for i in changes:
        if p.edges is not None and not p.edges[i]:
            return None
        if p.non_increasing and choice[i + 1] > choice[i]:
            return None
        if p.protected is not None and 0 in (choice[i], choice[i + 1]):
            lo, hi = p.protected
            if any(lo <= m and m + 1 <= hi for m in range(batches[i], batches[i + 1])):
                return None
    missed, violation, terms, unseen = 0, 0.0, [], 0.0
    for b, k in enumerate(choice):
        usable = [j for j in range(width) if not math.isnan(goodput[b][j]) and (j > 0 or p.allow_zero)]
        good = [j for j in usable if p.feasible is None or p.feasible[b, j]]
        if k not in usable:
            return None
        if k not in good:
            missed += 1
            violation += 0.0 if p.violation is None else float(p.violation[b, k])
        best = max(good or usable, key=lambda j: (goodput[b][j], -j))
        regret = 1.0 - goodput[b][k] / goodput[b][best]
        sigma = 0.0 if p.sigma is None else math.sqrt(float(p.sigma[b, k] ** 2 + p.sigma[b, best] ** 2))
        regret = 0.0 if regret <= p.tie_z * sigma else regret
        terms.append(weights[b] * regret)
        unseen += regret if weights[b] == 0.0 else 0.0
    terms += [switch[i] for i in changes]
    terms.append(p.length_cost * len(set(choice)))
    length = math.fsum(w * k for w, k in zip(weights, choice, strict=True))
    return missed, violation, math.fsum(terms), length, unseen, sum(k for b, k in enumerate(choice) if not weights[b])


def random_problem(rng: np.random.Generator, rows: int, width: int) -> DraftLengthProblem:
    """Half of them in powers of two, where sums are exact and ties abound."""
    coarse = bool(rng.random() < 0.5)

    def cells(size: Any) -> Any:
        return rng.integers(0, 5, size) / 16.0 if coarse else rng.uniform(0.0, 0.3, size)

    def perhaps(chance: float, value: Any) -> Any:
        return value if rng.random() < chance else None

    shape = (rows, width)
    goodput: Floats = (
        np.exp2(rng.integers(0, 4, shape).astype(np.float64)) if coarse else rng.uniform(70.0, 100.0, shape)
    )
    goodput[rng.random(shape) < 0.1] = np.nan
    empty = ~np.isfinite(goodput[:, 1:]).any(axis=1)
    goodput[empty, 1] = 1.0
    weights = rng.integers(0, 4, rows) / 4.0 if coarse else rng.uniform(0.0, 1.0, rows)
    weights[0] += float(weights.sum() == 0.0)
    batches = np.cumsum(rng.integers(1, 4, rows))
    ends = sorted(rng.integers(0, batches[-1] + 2, 2).tolist())
    return DraftLengthProblem(
        batches=batches,
        goodput=goodput,
        weights=weights,
        sigma=perhaps(0.3, rng.uniform(0.0, 0.1, shape)),
        tie_z=float(rng.choice([1.0, 2.0])),
        feasible=perhaps(0.5, rng.random(shape) < rng.choice([0.3, 0.8])),
        violation=perhaps(0.5, cells(shape)),
        max_lengths=perhaps(0.6, int(rng.integers(1, 4))),
        max_segments=perhaps(0.4, int(rng.integers(1, 5))),
        switch_cost=float(cells(None)) / 4 if rng.random() < 0.5 else cells(rows - 1) / 4,
        length_cost=float(rng.choice([0.0, 0.0, 0.0625, 0.25])),
        non_increasing=bool(rng.random() < 0.3),
        edges=perhaps(0.3, rng.random(rows - 1) < 0.7),
        protected=perhaps(0.3, (ends[0], ends[1])),
        allow_zero=bool(rng.random() < 0.9),
    )


SHAPES = [(1, 4), (2, 5), (3, 5), (4, 5), (5, 3), (5, 4), (6, 3), (6, 2)]


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better(seed: int) -> None:
    """Origin: all choices of 25 instances each, one thousand in all."""
    rng = np.random.default_rng(seed)
    for turn in range(25):
        rows, width = (6, 5) if seed % 10 == turn == 0 else SHAPES[int(rng.integers(len(SHAPES)))]
        p = random_problem(rng, rows, width)
        allowed = [levels for one in product(range(width), repeat=rows) if (levels := levels_of(p, one)) is not None]
        found = solve_draft_length(p)
        if not allowed:
            assert found.status is Status.INFEASIBLE
            assert not len(found.lengths)
            continue
        chosen, best = levels_of(p, tuple(found.lengths.tolist())), min(allowed)
        assert chosen is not None
        np.testing.assert_allclose(chosen, best, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose([found.violation, found.objective], best[1:3], rtol=1e-12, atol=1e-14)
        statuses = {0: Status.OPTIMAL, rows: Status.INFEASIBLE}
        assert found.status is statuses.get(int(best[0]), Status.INFEASIBLE_SOMEWHERE)
        assert len(found.infeasible_batches) == best[0]


@pytest.mark.parametrize("seed", range(30))
def test_integer_program_agrees(seed: int) -> None:
    """Origin: the program on paper, solved by branch and bound."""
    rng = np.random.default_rng(1000 + seed)
    p = random_problem(rng, int(rng.integers(2, 11)), 5)
    found, twin = solve_draft_length(p), solve_draft_length_milp(p)
    if twin is None:
        assert not len(found.lengths)
        return
    assert len(found.infeasible_batches) == len(twin.infeasible_batches)
    np.testing.assert_allclose(found.violation, twin.violation, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.objective, twin.objective, rtol=1e-6, atol=1e-9)


def recursion(p: DraftLengthProblem) -> float:
    """Least objective over sets of lengths, one at a time, by a memo over (row, length, segments); no limits."""
    rho = p.counted_regret().tolist()
    best = math.inf
    for chosen in combinations(range(p.goodput.shape[1]), p.max_lengths or 1):
        state = {(k, 1): p.weights[0] * rho[0][k] for k in chosen}
        for b in range(1, len(p.batches)):
            following: dict[tuple[int, int], float] = {}
            for (k, used), cost in state.items():
                for to in chosen:
                    now = used + (to != k)
                    if now > (p.max_segments or 1):
                        continue
                    price = cost + p.weights[b] * rho[b][to] + (float(p.switch_cost) if to != k else 0.0)
                    if price < following.get((to, now), math.inf):
                        following[to, now] = price
            state = following
        best = min(best, *state.values())
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("first", [1, 16])
def test_larger_instances(seed: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Origin: a recursion over 35 sets of 3 of 7 lengths. Memory for a few sets at a time must not matter."""
    monkeypatch.setattr(draft_length_paths, "FIRST_SETS", first)
    monkeypatch.setattr(draft_length_paths, "MAX_CELLS", 300)
    rng = np.random.default_rng(seed)
    p = DraftLengthProblem(
        batches=np.arange(1, 31),
        goodput=rng.uniform(70.0, 100.0, (30, 7)),
        weights=rng.uniform(0.0, 1.0, 30),
        max_lengths=3,
        max_segments=5,
        switch_cost=0.02,
    )
    np.testing.assert_allclose(solve_draft_length(p).objective, recursion(p), rtol=1e-12)

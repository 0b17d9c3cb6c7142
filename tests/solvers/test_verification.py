"""Ragged verification: the reference page's vectors, and enumeration of every allocation of small batches."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from servecast.solvers.verification import (
    expected_tokens,
    padded,
    released_rows,
    released_surplus,
    trim_optimal,
    trim_released,
    verification_plan,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# reference page speculation.md, 3.3: confidences of the first vector, three positions drafted
FIRST = np.cumprod([[0.95, 0.92, 0.90], [0.90, 0.80, 0.60], [0.85, 0.88, 0.70], [0.70, 0.50, 0.40]], axis=1)
SECOND = np.array([[0.9, 0.8], [0.8, 0.5], [0.6, 0.2]])
# same place: target times by captured size plus o_t 1.0, drafting .62 per token plus .3 [ms]
TARGET_MS = {1: 10.0, 2: 10.1, 4: 10.3, 8: 10.8, 16: 12.0, 32: 15.0}


def staircase(rows: int) -> Floats:
    """Seconds of the pass by rows, padded up to the captured size."""
    at = [min(size for size in TARGET_MS if size >= max(n, 1)) for n in range(rows + 1)]
    return np.array([(TARGET_MS[size] + 1.0) * 1e-3 for size in at])


def random_batch(rng: np.random.Generator, requests: int, positions: int) -> tuple[Floats, Ints]:
    survival: Floats = np.cumprod(rng.uniform(0.05, 1.0, (requests, positions)), axis=1, dtype=np.float64)
    return survival, rng.integers(0, positions + 1, requests)


def allocations(lengths: Ints) -> list[tuple[int, ...]]:
    return list(product(*(range(int(one) + 1) for one in lengths)))


def tokens_of(survival: Floats, kept: tuple[int, ...]) -> float:
    return float(sum(row[:count].sum() for row, count in zip(survival, kept, strict=True)))


class TestTrim:
    def test_first_vector(self) -> None:
        # reference page 3.3, [D]: 16 rows to 8
        assert trim_released(FIRST).tolist() == [3, 0, 1, 0]
        assert trim_optimal(FIRST, 8).tolist() == [2, 1, 1, 0]

    def test_first_vector_goodput(self) -> None:
        # reference page 3.3, [D]: three draft steps spent, 8 rows verified
        spent = (3 * 0.62 + 0.3) * 1e-3
        step = spent + staircase(8)[8]
        assert (4 + expected_tokens(FIRST, [3, 0, 1, 0])) / step == pytest.approx(534.427, rel=1e-6)
        assert (4 + expected_tokens(FIRST, [2, 1, 1, 0])) / step == pytest.approx(542.550, rel=1e-6)

    def test_second_vector(self) -> None:
        # reference page 3.3, [D]: nine rows pay for sixteen, one is dropped
        spent = (2 * 0.62 + 0.3) * 1e-3
        kept = trim_optimal(SECOND, 1)
        assert kept.tolist() == [2, 2, 1]
        assert trim_released(SECOND).tolist() == [2, 2, 1]
        assert (3 + expected_tokens(SECOND, [2, 2, 2])) / (spent + staircase(16)[9]) == pytest.approx(467.675, rel=1e-6)
        assert (3 + expected_tokens(SECOND, kept)) / (spent + staircase(16)[8]) == pytest.approx(494.753, rel=1e-6)

    def test_equals_enumeration(self) -> None:
        # independent code: every allocation of 200 random batches
        rng = np.random.default_rng(5)
        for _ in range(200):
            survival, lengths = random_batch(rng, int(rng.integers(1, 5)), int(rng.integers(1, 5)))
            removed = int(rng.integers(0, lengths.sum() + 1))
            kept = trim_optimal(survival, removed, lengths=lengths)
            assert kept.sum() == lengths.sum() - removed
            best = max(tokens_of(survival, one) for one in allocations(lengths) if sum(one) == kept.sum())
            assert expected_tokens(survival, kept) == pytest.approx(best, rel=1e-12)

    def test_released_equals_its_loop(self) -> None:
        # independent code: one token at a time, as section 3.4 of the reference page words it
        rng = np.random.default_rng(6)
        for _ in range(200):
            survival, lengths = random_batch(rng, int(rng.integers(1, 7)), int(rng.integers(1, 6)))
            removed = int(rng.integers(0, lengths.sum() + 1))
            left = lengths.tolist()
            for _ in range(removed):
                alive = [i for i in range(len(left)) if left[i]]
                left[min(alive, key=lambda i: survival[i, lengths[i] - 1])] -= 1
            assert trim_released(survival, removed, lengths=lengths).tolist() == left

    def test_what_the_released_choice_loses(self) -> None:
        # [D]: 2,000 random batches, 2 to 16 requests, 2 to 8 drafted tokens, conditional acceptance uniform in
        # [.3, 1]; trimmed to the next lower captured size. The reference page has 5.0 % on average and 29 % at worst
        # for a draw that it does not describe: same order, not the same figures
        rng = np.random.default_rng(2025)
        losses = []
        for _ in range(2000):
            requests, positions = int(rng.integers(2, 17)), int(rng.integers(2, 9))
            survival = np.cumprod(rng.uniform(0.3, 1.0, (requests, positions)), axis=1)
            code = trim_released(survival)
            ours = trim_optimal(survival, requests * positions - int(code.sum()))
            best = requests + expected_tokens(survival, ours)
            losses.append(1.0 - (requests + expected_tokens(survival, code)) / best)
        assert min(losses) >= -1e-12
        assert 0.02 < np.mean(losses) < 0.10
        assert 0.15 < max(losses) < 0.50

    def test_ties_leave_the_deepest_token_first(self) -> None:
        # hand: all survivals are one half; the second token of the second request is the deepest
        assert trim_optimal(np.full((2, 2), 0.5), 1, lengths=[1, 2]).tolist() == [1, 1]

    @given(st.data())
    @settings(max_examples=50)
    def test_relabelling_changes_no_value(self, data: st.DataObject) -> None:
        rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
        survival, lengths = random_batch(rng, 5, 4)
        order = rng.permutation(5)
        removed = int(rng.integers(0, lengths.sum() + 1))
        here = expected_tokens(survival, trim_optimal(survival, removed, lengths=lengths))
        there = expected_tokens(survival[order], trim_optimal(survival[order], removed, lengths=lengths[order]))
        assert here == pytest.approx(there, rel=1e-12)

    def test_padded(self) -> None:
        survival, lengths = padded([[0.9, 0.5], [], [0.4]])
        assert survival.tolist() == [[0.9, 0.5], [0.0, 0.0], [0.4, 0.0]]
        assert lengths.tolist() == [2, 0, 1]
        assert padded([[], []])[0].shape == (2, 0)
        assert trim_released(np.zeros((2, 0)), 0).tolist() == [0, 0]


class TestReleasedRows:
    def test_off_by_one(self) -> None:
        # reference page 3.4, [D]: three requests, 14 rows, counted as 13
        assert released_rows([4, 4, 3]) == 13
        assert released_rows([2, 2, 2]) == 9

    def test_never_more_than_one_row_short(self) -> None:
        rng = np.random.default_rng(3)
        for _ in range(500):
            lengths = rng.integers(0, 9, int(rng.integers(1, 40)))
            assert 0 <= lengths.size + lengths.sum() - released_rows(lengths) <= 1

    # reference page 3.3 rule 4, by hand: n minus the power of two strictly below, n minus the multiple of 32 below
    @pytest.mark.parametrize(
        ("rows", "surplus"),
        [(2, 1), (3, 1), (4, 2), (9, 1), (16, 8), (17, 1), (32, 16), (33, 1), (40, 8), (64, 32), (65, 1), (96, 32)],
    )
    def test_surplus(self, rows: int, surplus: int) -> None:
        assert released_surplus(rows) == surplus

    def test_one_row_is_refused(self) -> None:
        with pytest.raises(ValueError, match="rows must be >= 2, got 1"):
            released_surplus(1)


class TestPlan:
    def test_second_vector(self) -> None:
        # hand: with 1.54 ms spent, 3 rows 3/12.84 = 233.6, 4 rows 3.9/12.84 = 303.7, 8 rows 6.6/13.34 = 494.753,
        # 9 rows 6.8/14.54 = 467.675 [tok/s]; ends of treads: 4, 8 and all 9
        plan = verification_plan(SECOND, staircase(9), 3, 1.54e-3)
        assert plan.lengths.tolist() == [2, 2, 1]
        assert plan.rows == 8
        assert plan.tokens == pytest.approx(6.6, rel=1e-12)
        assert plan.goodput == pytest.approx(494.753, rel=1e-6)
        assert plan.candidates == 3
        assert plan.within_limits

    def test_equals_enumeration(self) -> None:
        # independent code: every allocation of 200 random batches, costs neither smooth nor monotone
        rng = np.random.default_rng(8)
        for _ in range(200):
            survival, lengths = random_batch(rng, int(rng.integers(1, 5)), int(rng.integers(1, 5)))
            base = lengths.size + int(rng.integers(0, 3))
            cost = rng.choice([0.01, 0.012, 0.02, 0.03], base + int(lengths.sum()) + 1)
            spent = float(rng.choice([0.0, 0.004]))
            plan = verification_plan(survival, cost, base, spent, lengths=lengths)
            best = max(
                (lengths.size + tokens_of(survival, one)) / (spent + cost[base + sum(one)])
                for one in allocations(lengths)
            )
            assert plan.goodput == pytest.approx(best, rel=1e-12)
            # feasibility, from the decision alone
            assert ((plan.lengths >= 0) & (plan.lengths <= lengths)).all()
            assert plan.rows == base + plan.lengths.sum()
            assert plan.goodput == pytest.approx(
                (lengths.size + expected_tokens(survival, plan.lengths)) / (spent + cost[plan.rows]), rel=1e-12
            )

    def test_limits_equal_enumeration(self) -> None:
        # independent code: the same with limits; where none is met, the least time per token of what keeps the limit on
        # steps, and nothing verified where that is nothing
        rng = np.random.default_rng(9)
        met = []
        for _ in range(200):
            survival, lengths = random_batch(rng, int(rng.integers(1, 4)), int(rng.integers(1, 5)))
            requests = lengths.size
            cost = rng.choice([0.01, 0.012, 0.02, 0.03], requests + int(lengths.sum()) + 1)
            step, token = float(rng.choice([0.011, 0.025, np.inf])), float(rng.choice([0.006, 0.01, np.inf]))
            plan = verification_plan(
                survival, cost, requests, 0.0, lengths=lengths, step_limit_s=step, token_limit_s=token
            )
            found, quick = [0.0], [0.0]
            for one in allocations(lengths):
                seconds, tokens = cost[requests + sum(one)], requests + tokens_of(survival, one)
                if seconds <= step:
                    quick.append(tokens / seconds)
                if seconds <= step and seconds * requests / tokens <= token:
                    found.append(tokens / seconds)
            met.append(len(found) > 1)
            assert plan.within_limits == met[-1]
            assert plan.goodput == pytest.approx(
                max(found) if met[-1] else max(quick) or requests / cost[requests], rel=1e-12
            )
        assert 20 < sum(met) < 180

    @given(st.integers(0, 2**31))
    @settings(max_examples=50)
    def test_no_static_length_is_better(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        survival, _ = random_batch(rng, 6, 5)
        cost = np.sort(rng.uniform(0.01, 0.03, 6 * 6 + 1))
        plan = verification_plan(survival, cost, 6, 0.002)
        for k in range(6):
            static = (6 + expected_tokens(survival, np.full(6, k))) / (0.002 + cost[6 * (k + 1)])
            assert plan.goodput >= static * (1 - 1e-12)

    def test_seconds_scale(self) -> None:
        # dimensional homogeneity: all times threefold, the same choice, a third of the goodput
        rng = np.random.default_rng(4)
        survival, lengths = random_batch(rng, 6, 5)
        cost = np.sort(rng.uniform(0.01, 0.03, 40))
        one = verification_plan(survival, cost, 6, 0.002, lengths=lengths)
        three = verification_plan(survival, 3 * cost, 6, 0.006, lengths=lengths)
        assert three.lengths.tolist() == one.lengths.tolist()
        assert three.goodput == pytest.approx(one.goodput / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("survival", "lengths", "message"),
    [
        ([[0.5, 0.6]], None, r"survival must not rise along a request, got 0.6 after 0.5 in request 0"),
        ([[1.2]], None, r"survival must be in \[0, 1\], got 1.2"),
        ([[np.nan]], None, r"survival must be in \[0, 1\], got nan"),
        ([0.5], None, r"survival must have one row per request"),
        ([[0.5]], [2], r"lengths must be in \[0, 1\], got \[2\]"),
        ([[0.5]], [0.5], r"lengths must be one integer per request"),
    ],
)
def test_bad_batches_are_refused(
    survival: list[list[float]] | list[float], lengths: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trim_optimal(survival, 0, lengths=lengths)


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows_removed must be in \[0, 6\], got 7"):
        trim_optimal(SECOND, 7)
    with pytest.raises(ValueError, match=r"cost_by_rows must have a value for each of 0..9 rows"):
        verification_plan(SECOND, np.ones(9), 3, 0.0)
    with pytest.raises(ValueError, match=r"cost_by_rows must be > 0 and finite, got nan"):
        verification_plan(SECOND, np.full(10, np.nan), 3, 0.0)
    with pytest.raises(ValueError, match=r"draft_s must be >= 0 and finite, got nan"):
        verification_plan(SECOND, np.ones(10), 3, np.nan)
    with pytest.raises(ValueError, match=r"base_rows must be >= 0, got -1"):
        verification_plan(SECOND, np.ones(10), -1, 0.0)

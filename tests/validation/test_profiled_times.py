"""The released time model: padding, buckets and context sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from servecast.validation.draft_controllers import RoundState
from servecast.validation.profiled_times import PassTimes, ProfiledTimes, profiled_times, sampled_times

Floats = NDArray[np.float64]

SIZES = (1, 2, 4, 8, 16, 32)


def tables(scale: float) -> PassTimes:
    """Seconds that name their cell: context index before the point, size behind it."""
    seconds = tuple(tuple(scale * (row + size / 100) for size in SIZES) for row in (1, 2))
    return PassTimes(contexts=(1, 256), sizes=SIZES, seconds=seconds, overhead_s=tuple(scale / size for size in SIZES))


TIMES = ProfiledTimes(draft=tables(1e-3), target=tables(1e-1))


class LinearCost:
    """Per-request context, a fixed part of drafting once per round."""

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> Floats:
        return np.asarray(0.01 + 1e-5 * np.asarray(rows) + 1e-8 * np.asarray(requests) * np.asarray(context))

    def draft(self, requests: ArrayLike, gamma: ArrayLike, context: ArrayLike) -> Floats:
        k = np.asarray(gamma)
        return np.where(k > 0, 1e-3, 0.0) + k * (5e-4 + 1e-6 * np.asarray(requests)) + 0.0 * np.asarray(context)


# reference page 3.1 [P]: next power of two up to 32, then the next multiple of 32
@pytest.mark.parametrize(
    ("rows", "padded"), [(1, 1), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (64, 64), (1152, 1152), (1153, 1184)]
)
def test_padding(rows: int, padded: int) -> None:
    assert sampled_times(LinearCost()).target.padded(rows) == padded


def test_verification() -> None:
    # hand, page 3.2: three rows each of 3 requests pay for 16; (3 x 300 + 3 x 3) // 16 = 56 and (9000 + 9) // 16 = 563
    short, long = RoundState(batch=3, cached=300), RoundState(batch=3, cached=3000)
    assert TIMES.verify_s(short, 2) == pytest.approx(0.1 * (1.16 + 1 / 16), rel=1e-12)
    assert TIMES.verify_s(long, 2) == pytest.approx(0.1 * (2.16 + 1 / 16), rel=1e-12)


def test_draft_tokens_lengthen_the_context() -> None:
    # hand, page 3.2: (3 x 1363 + 3 x (4 + 2) / 2) // 16 = 4098 // 16 = 256, one token per request less gives 255
    assert TIMES.verify_s(RoundState(batch=3, cached=1363), 2) == pytest.approx(0.1 * (2.16 + 1 / 16), rel=1e-12)
    assert TIMES.verify_s(RoundState(batch=3, cached=1360), 2) == pytest.approx(0.1 * (1.16 + 1 / 16), rel=1e-12)


def test_the_bucket_is_the_largest_not_above() -> None:
    # hand: one request, no drafts: 255 and 256 tokens of context; far above the last table it still holds
    assert TIMES.verify_s(RoundState(batch=1, cached=255), 0) == pytest.approx(0.1 * 2.01, rel=1e-12)
    assert TIMES.verify_s(RoundState(batch=1, cached=256), 0) == pytest.approx(0.1 * 3.01, rel=1e-12)
    assert TIMES.verify_s(RoundState(batch=1, cached=10**6), 0) == pytest.approx(0.1 * 3.01, rel=1e-12)


def test_drafting() -> None:
    # hand, page 3.2: (1020 + 2 x 3) // 4 = 256 is the second table, two passes and one overhead; at one draft
    # (1020 + 3) // 4 = 255 is still the first
    state = RoundState(batch=3, cached=1020)
    assert TIMES.draft_s(state, 2) == pytest.approx(1e-3 * (2 * 2.04 + 1 / 4), rel=1e-12)
    assert TIMES.draft_s(state, 1) == pytest.approx(1e-3 * (1.04 + 1 / 4), rel=1e-12)
    assert TIMES.draft_s(state, 2, overhead=False) == pytest.approx(1e-3 * 2 * 2.04, rel=1e-12)
    assert TIMES.draft_s(state, 0) == 0.0


def test_ragged() -> None:
    # hand: 6 rows pay for 8; (3 + 3 x 500) + 400 + (1 + 2 x 75) = 2054, // 8 = 256; the means (325 each, 1954) give 244
    known = RoundState(batch=3, cached=975, contexts=(500, 400, 75))
    lengths = np.array([2, 0, 1])
    assert TIMES.ragged_s(known, lengths) == pytest.approx(0.1 * (2.08 + 1 / 8), rel=1e-12)
    assert TIMES.ragged_s(RoundState(batch=3, cached=975), lengths) == pytest.approx(0.1 * (1.08 + 1 / 8), rel=1e-12)


def test_ragged_equals_uniform() -> None:
    for cached in (40, 900, 4000):
        state = RoundState(batch=4, cached=cached)
        for k in (0, 1, 3):
            assert TIMES.ragged_s(state, np.full(4, k)) == pytest.approx(TIMES.verify_s(state, k), rel=1e-12)
            rows = np.array([4 * (k + 1)])
            assert TIMES.rows_s(state, rows)[0] == pytest.approx(TIMES.verify_s(state, k), rel=1e-12)


def test_the_released_row_count_is_used() -> None:
    # reference page 3.4 [D]: lengths 4, 4, 3 are 14 rows counted as 13; a captured size of 13 tells the two apart
    one = PassTimes(contexts=(1,), sizes=(13, 14), seconds=((1.0, 2.0),), overhead_s=(0.0, 0.0))
    times = ProfiledTimes(draft=one, target=one)
    assert times.ragged_s(RoundState(batch=3, cached=30), np.array([4, 4, 3])) == 1.0


def test_above_the_largest_size() -> None:
    # hand: seconds n, overhead 10 - n on sizes 1, 2, 4 are lines; 5 rows pad to 32
    one = PassTimes(contexts=(1,), sizes=(1, 2, 4), seconds=((1.0, 2.0, 4.0),), overhead_s=(9.0, 8.0, 6.0))
    assert one.padded(5) == 32
    assert one.inside(32, 1) == pytest.approx(32.0, rel=1e-12)
    assert one.overhead(32) == pytest.approx(-22.0, rel=1e-12)
    # certified by numpy: an ordinary least squares line
    bent = PassTimes(contexts=(1,), sizes=(1, 2, 4), seconds=((1.0, 3.0, 4.0),), overhead_s=(0.0,) * 3)
    assert bent.inside(64, 1) == pytest.approx(np.polyval(np.polyfit([1, 2, 4], [1, 3, 4], 1), 64), rel=1e-9)


def test_sampled_from_a_cost() -> None:
    # hand: 8 rows with a context of 256 each; a further draft token of 8 requests; what the first costs above it
    times = sampled_times(LinearCost())
    assert times.target.inside(8, 300) == pytest.approx(0.01 + 8e-5 + 8 * 256e-8, rel=1e-12)
    assert times.draft.inside(8, 300) == pytest.approx(5e-4 + 8e-6, rel=1e-9)
    assert times.draft.overhead(8) == pytest.approx(1e-3, rel=1e-9)


def test_exact_where_the_cost_is_on_the_grid() -> None:
    # a context of 1 token each: no draft moves it to another table
    times, state = sampled_times(LinearCost()), RoundState(batch=8, cached=8)
    assert times.draft_s(state, 3) == pytest.approx(float(LinearCost().draft(8, 3, 1)), rel=1e-9)
    assert times.verify_s(state, 0) == pytest.approx(float(LinearCost().verify(8, 8, 1)), rel=1e-12)


def test_tables_without_context() -> None:
    times = profiled_times({4: 0.62}, {1: 10.0, 8: 10.8}, 0.3, 1.0)
    assert times.draft_s(RoundState(batch=3, cached=10**6), 2) == pytest.approx(1.54e-3, rel=1e-12)
    assert times.verify_s(RoundState(batch=3, cached=10**6), 1) == pytest.approx(11.8e-3, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": (1, 1)}, "contexts must rise from 1 or more"),
        ({"sizes": (0, 2)}, "sizes must rise from 1 or more"),
        ({"seconds": ((1.0, 2.0),)}, r"seconds must be >= 0 for each context and size, got shape \(1, 2\)"),
        ({"seconds": ((1.0, 2.0), (1.0, float("nan")))}, "seconds must be >= 0 for each context and size"),
        ({"overhead_s": (0.0,)}, "overhead_s must be finite for each size"),
    ],
)
def test_bad_tables_are_refused(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"contexts": (1, 256), "sizes": (1, 2), "overhead_s": (0.0, 0.0)}
    good["seconds"] = ((1.0, 2.0), (1.0, 2.0))
    with pytest.raises(ValueError, match=message):
        PassTimes(**(good | change))

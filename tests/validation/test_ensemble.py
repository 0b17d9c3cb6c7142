"""Ensembles. Expected values: by hand, conservation of what a bootstrap draws from, and equality between backends."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from servecast.model.workload import Trace
from servecast.validation.ensemble import interval, member_seeds, resampled, run_ensemble, spread


def draw(seed: np.random.SeedSequence) -> tuple[float, int]:
    rng = np.random.default_rng(seed)
    return float(rng.random()), int(rng.integers(0, 1000))


@dataclass(frozen=True)
class Holder:
    """A callable that cannot be hashed, as every record with an array in it."""

    values: NDArray[np.float64]

    def __call__(self, seed: np.random.SeedSequence) -> float:
        return float(np.random.default_rng(seed).choice(self.values))


def process(seed: np.random.SeedSequence) -> int:
    return os.getpid()


def fail(seed: np.random.SeedSequence) -> None:
    raise ValueError("seed must be liked")


def made(count: int = 600, *, prefixes: bool = False) -> Trace:
    """Gaps that name their place: the i-th is about 1 + i / 1000 s; the i-th request has i + 1 prompt tokens."""
    t = np.concatenate([[0.0], np.cumsum(1.0 + np.arange(count - 1) / 1000.0)])
    number = np.arange(1, count + 1)
    return Trace(
        name="made",
        t_s=t,
        n_in=number,
        n_out=2 * number,
        prefix_blocks=tuple((int(i),) for i in number) if prefixes else None,
        block_tokens=16 if prefixes else 0,
    )


def places(trace: Trace) -> NDArray[np.int_]:
    """Which recorded gap each gap is."""
    return np.rint((np.diff(trace.t_s) - 1.0) * 1000.0).astype(int)


def test_members_are_the_same_however_many_there_are() -> None:
    few, many = (run_ensemble(draw, member_seeds(7, n), backend="serial") for n in (3, 9))
    assert many[:3] == few
    assert len(set(many)) == 9


def test_processes_change_no_number() -> None:
    """Rule: seeds are spawned, so that neither the number of processes nor the backend matters."""
    seeds = member_seeds(7, 5)
    serial = run_ensemble(draw, seeds, backend="serial")
    seen: list[tuple[int, int]] = []
    assert run_ensemble(draw, seeds, jobs=2, progress=lambda done, total: seen.append((done, total))) == serial
    assert run_ensemble(draw, seeds, jobs=1) == serial
    assert seen == [(i, 5) for i in range(1, 6)]
    assert os.getpid() not in run_ensemble(process, seeds, jobs=2)


def test_a_members_mistake_comes_back() -> None:
    with pytest.raises(ValueError, match="seed must be liked"):
        run_ensemble(fail, member_seeds(1, 2), jobs=2)


@pytest.mark.slow
def test_a_dask_cluster_changes_no_number() -> None:
    """The same on a real cluster of two worker processes, of the call's own and of a client that is there."""
    distributed = pytest.importorskip("distributed")
    seeds = member_seeds(7, 5)
    serial = run_ensemble(draw, seeds, backend="serial")
    assert run_ensemble(draw, seeds, backend="dask", jobs=2) == serial
    holder = Holder(values=np.arange(100.0))
    with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=":0") as client:
        assert run_ensemble(draw, seeds, backend="dask") == serial
        assert run_ensemble(holder, seeds, backend="dask") == [holder(seed) for seed in seeds]
        with pytest.raises(ValueError, match="seed must be liked"):
            run_ensemble(fail, seeds, backend="dask")
        workers = set(client.run(os.getpid).values())
        assert set(run_ensemble(process, seeds, backend="dask")) <= workers


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"backend": "threads"}, "backend must be one of processes, dask, serial, got 'threads'"),
        ({"jobs": 0}, "jobs must be >= 1, or -1 for one per core, got 0"),
        ({"jobs": -2}, "jobs must be >= 1"),
    ],
)
def test_a_bad_setting_is_refused(more: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_ensemble(draw, member_seeds(1, 2), **more)  # type: ignore[arg-type]  # the wrong setting is the test
    with pytest.raises(ValueError, match="members must be >= 1, got 0"):
        member_seeds(1, 0)


def test_a_resampled_trace_keeps_pairs_and_count() -> None:
    trace = made()
    found = resampled(trace, np.random.default_rng(1))
    assert found.t_s.size == 600
    assert np.all(np.diff(found.t_s) > 0.0)
    np.testing.assert_array_equal(found.n_out, 2 * found.n_in)
    assert set(found.n_in) <= set(trace.n_in)
    # bootstrap of n rows holds 1 - 1/e = 63 % of them on average; standard deviation below 2 %
    assert len(set(found.n_in)) / 600 == pytest.approx(0.632, abs=0.08)


def test_blocks_are_neighbours_from_near_their_place() -> None:
    """Hand: 599 gaps of 1.3 s are 46 to a minute; a block comes from at most a tenth of the trace (59 gaps) away."""
    trace = made()
    length = round(60.0 * 599 / trace.t_s[-1])
    assert length == 46
    found = places(resampled(trace, np.random.default_rng(2)))
    jumps = np.flatnonzero(np.diff(found) % 599 != 1) + 1
    assert set(jumps.tolist()) <= set(range(0, 599, length))
    away = (found - np.arange(599) + 299) % 599 - 299
    assert np.abs(away).max() <= 59
    assert np.abs(away).max() > 5


def test_mean_gap_is_unbiased() -> None:
    """|mean - theory| < 4 standard errors over 200 members; ends joined, every gap is as likely as another but for the
    place."""
    trace = made()
    spans = np.array([resampled(trace, np.random.default_rng(s)).t_s[-1] for s in member_seeds(3, 200)])
    assert abs(spans.mean() - trace.t_s[-1]) < 4.0 * spans.std() / math.sqrt(200)


def test_requests_with_prefixes_keep_the_row_of_their_gap() -> None:
    trace = made(prefixes=True)
    found = resampled(trace, np.random.default_rng(1))
    assert found.prefix_blocks == tuple((int(i),) for i in found.n_in)
    np.testing.assert_array_equal(found.n_in[1:], places(found) + 2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_traces(count: int) -> None:
    found = resampled(made(count), np.random.default_rng(1))
    assert found.t_s.size == found.n_in.size == count


def test_interval_by_hand() -> None:
    """Linear interpolation between order statistics: of 0..20 the 5th percentile is 1, the 95th 19, the median 10."""
    values = [float(i) for i in range(21)]
    assert interval(values) == (1.0, 19.0)
    one = spread([*values, math.nan])
    assert (one.lo, one.median, one.hi) == (1.0, 10.0, 19.0)
    assert all(math.isnan(end) for end in interval([math.nan]))

"""Draws of arrivals and lengths against the processes they come from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servecast.model.arrival_processes import (
    ArrivalProcess,
    BatchArrivals,
    EmpiricalBatch,
    GammaRenewal,
    GeometricBatch,
    MarkovModulated,
    Poisson,
    WeibullRenewal,
)
from servecast.model.workload import Trace
from servecast.validation.sampling import arrival_times, length_pairs

PROCESSES: tuple[ArrivalProcess, ...] = (
    Poisson(rate_rps=3.0),
    GammaRenewal(rate_rps=3.0, shape=0.4),
    WeibullRenewal(rate_rps=3.0, shape=0.6),
    MarkovModulated(low_rps=0.0, high_rps=8.0, to_high_per_s=0.5, to_low_per_s=2.0),
    MarkovModulated(low_rps=2.0, high_rps=9.0, to_high_per_s=1.0, to_low_per_s=2.0),
    BatchArrivals(epoch_rate_per_s=2.0, batch=GeometricBatch(mean=2.5)),
    BatchArrivals(epoch_rate_per_s=2.0, batch=EmpiricalBatch(sizes=(1, 8), shares=(0.75, 0.25))),
)
every = pytest.mark.parametrize("process", PROCESSES, ids=[f"{i}" for i in range(len(PROCESSES))])


@every
def test_times_are_in_order_and_repeatable(process: ArrivalProcess) -> None:
    """Rule: n times after 0 that never fall; the same seed gives the same ones."""
    first = arrival_times(process, 1000, np.random.default_rng(3))
    assert first.shape == (1000,)
    assert first[0] > 0.0
    assert np.all(np.diff(first) >= 0.0)
    np.testing.assert_array_equal(first, arrival_times(process, 1000, np.random.default_rng(3)))


@every
def test_rate_and_gaps(process: ArrivalProcess) -> None:
    """Theory: the mean rate, and the distribution of gaps at five points; 4 standard errors from 50 blocks."""
    t = arrival_times(process, 200_000, np.random.default_rng(11))
    gaps = np.diff(t, prepend=0.0).reshape(50, -1)
    assert_close(gaps.mean(axis=1), 1.0 / process.rate_rps)
    for x in (0.0, 0.05, 0.2, 0.5, 2.0):
        # gaps inside a batch are zero up to the rounding of a difference: none, they repeat the same number
        assert_close((gaps <= x).mean(axis=1), float(process.gap_cdf(x)))


def assert_close(blocks: np.ndarray, expected: float) -> None:
    error = float(blocks.std(ddof=1)) / math.sqrt(blocks.size)
    assert abs(float(blocks.mean()) - expected) <= 4.0 * error


def test_one_arrival() -> None:
    """Edge: a single arrival of every process."""
    for process in PROCESSES:
        assert arrival_times(process, 1, np.random.default_rng(0)).shape == (1,)


def test_modulated_states_start_in_their_shares() -> None:
    """Theory: P(first arrival within dt) is the mean rate times dt, whichever state comes first."""
    process = MarkovModulated(low_rps=0.1, high_rps=9.0, to_high_per_s=0.01, to_low_per_s=0.02)
    rng = np.random.default_rng(5)
    first = np.array([arrival_times(process, 1, rng)[0] for _ in range(4000)])
    share = float(np.mean(first < 0.01))
    expected = process.rate_rps * 0.01
    # second-order term: E[rate^2] dt^2 / 2 < 0.0015
    assert abs(share - expected) < 4.0 * math.sqrt(expected / 4000) + 0.0015


def test_rows_stay_together() -> None:
    """Rule: only recorded pairs; each about as often as recorded (binomial, 4 standard errors)."""
    n_in, n_out = np.array([10, 20, 20, 30]), np.array([1, 2, 2, 3])
    drawn_in, drawn_out = length_pairs((n_in, n_out), 8000, np.random.default_rng(2))
    assert drawn_in.dtype == np.int64
    np.testing.assert_array_equal(drawn_in, 10 * drawn_out)
    assert abs(np.mean(drawn_in == 20) - 0.5) < 4.0 * 0.5 / math.sqrt(8000)


def test_lengths_of_a_trace() -> None:
    """Rule: a record with n_in and n_out is taken as it is."""
    trace = Trace(name="t", t_s=np.array([0.0, 1.0]), n_in=np.array([5, 5]), n_out=np.array([7, 7]))
    drawn_in, drawn_out = length_pairs(trace, 3, np.random.default_rng(0))
    assert drawn_in.tolist() == [5, 5, 5]
    assert drawn_out.tolist() == [7, 7, 7]


def test_refusals() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="n must be at least 1 arrival"):
        arrival_times(PROCESSES[0], 0, rng)
    with pytest.raises(ValueError, match="process must be one of"):
        arrival_times("Poisson", 1, rng)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be at least 1 request"):
        length_pairs(([1], [1]), 0, rng)
    with pytest.raises(ValueError, match="equally long lists"):
        length_pairs(([1, 2], [1]), 1, rng)
    with pytest.raises(ValueError, match="n_out must be whole numbers"):
        length_pairs(([1.0], [0.5]), 1, rng)

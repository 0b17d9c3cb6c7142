"""Ensembles: the same scenario on resampled traces, in parallel, with results that no number of processes changes.

A member's trace has as many requests as the recorded one. Its gaps are a local block bootstrap: blocks of neighbouring
gaps, one minute long at the mean rate, each drawn from near its own place (a tenth of the trace to either side). A
block keeps the burstiness within a minute, the neighbourhood the slow course of the rate. Lengths are whole rows drawn
from all of the trace, so that prompt and output stay together; of a trace with prefix blocks each request keeps the row
of its gap, since conversations reuse their prefixes within minutes.

References: Politis and Romano (1992), circular block bootstrap; Paparoditis and Politis (2002), local block bootstrap.
Assumptions: what is longer than a block is independent but for the course of the rate; a trace shorter than a few
blocks says little about its own spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from servecast.model.workload import Trace

Backend = Literal["processes", "dask", "serial"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
T = TypeVar("T")

BLOCK_S = 60.0
"""Length of a block of gaps at the mean rate. [s]"""
NEIGHBOURHOOD = 0.1
"""How far from its place a block may come from, as a share of the trace, to either side. [-]"""
COVERAGE = (5.0, 95.0)
"""Percentiles of members that an interval spans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure over the members that have it; NaN where none has."""

    median: float
    lo: float
    hi: float


def member_seeds(seed: int, members: int) -> list[np.random.SeedSequence]:
    """Independent seeds, the i-th the same however many members follow it."""
    if members < 1:
        raise ValueError(f"members must be >= 1, got {members}")
    return np.random.SeedSequence(seed).spawn(members)


def run_ensemble(
    build: Callable[[np.random.SeedSequence], T],
    seeds: Sequence[np.random.SeedSequence],
    *,
    backend: Backend = "processes",
    jobs: int = -1,
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """``build(seed)`` for every seed, in the order of `seeds`.

    Parameters
    ----------
    build : draws from its seed alone; must travel to another process unless `backend` is ``serial``.
    backend : ``processes`` on this machine; ``dask``: the cluster of the current Dask client, or one started on this
        machine for the call; ``serial``: here.
    jobs : processes; -1: one per core. A Dask cluster that is there keeps its size.
    progress : called with (members done, members).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if jobs != -1 and jobs < 1:
        raise ValueError(f"jobs must be >= 1, or -1 for one per core, got {jobs}")
    results: list[T] = []
    for one in _results(build, seeds, backend, jobs):
        results.append(one)
        if progress is not None:
            progress(len(results), len(seeds))
    return results


def _results(
    build: Callable[[np.random.SeedSequence], T], seeds: Sequence[np.random.SeedSequence], backend: Backend, jobs: int
) -> Iterator[T]:
    if backend == "serial" or (backend == "processes" and (jobs == 1 or len(seeds) == 1)):
        yield from map(build, seeds)
        return
    if backend == "dask":
        yield from _on_dask(build, seeds, jobs)
        return
    from joblib import Parallel, delayed

    # a batch of one: members take seconds, and progress is told of each
    yield from Parallel(n_jobs=jobs, backend="loky", return_as="generator", batch_size=1)(
        delayed(build)(seed) for seed in seeds
    )


def _on_dask(
    build: Callable[[np.random.SeedSequence], T], seeds: Sequence[np.random.SeedSequence], jobs: int
) -> Iterator[T]:
    with _client(jobs) as client:
        # sent once to each worker; by name and not by content, since what it holds need not be hashable
        shared = client.scatter(build, hash=False, broadcast=True)
        for future in [client.submit(_called, shared, seed, pure=False) for seed in seeds]:
            yield future.result()


def _called(build: Callable[[np.random.SeedSequence], T], seed: np.random.SeedSequence) -> T:
    return build(seed)


@contextmanager
def _client(jobs: int) -> Iterator[Any]:
    """The current Dask client, else one with a cluster on this machine that ends with the call."""
    try:
        from distributed import Client, get_client
    except ImportError:
        raise ValueError("backend dask needs the extra servecast[dask]") from None
    try:
        current = get_client()
    except ValueError:
        current = None
    if current is not None:
        yield current
        return
    with Client(n_workers=None if jobs == -1 else jobs, threads_per_worker=1, dashboard_address=":0") as client:
        yield client


def resampled(trace: Trace, rng: np.random.Generator) -> Trace:
    """A trace like `trace` (module docstring); the same state of `rng` gives the same one."""
    gaps = np.diff(trace.t_s)
    order = _local_blocks(gaps.size, _block_length(trace.t_s), rng)
    times = trace.t_s[0] + np.concatenate([[0.0], np.cumsum(gaps[order])])
    if trace.prefix_blocks is None:
        rows = rng.integers(0, trace.t_s.size, trace.t_s.size)
        blocks = None
    else:
        # a gap belongs to the request that ends it
        rows = np.concatenate([[0], order + 1])
        blocks = tuple(trace.prefix_blocks[row] for row in rows.tolist())
    return replace(trace, t_s=times, n_in=trace.n_in[rows], n_out=trace.n_out[rows], prefix_blocks=blocks)


def _block_length(t_s: NDArray[np.float64]) -> int:
    """Gaps in a block."""
    span = float(t_s[-1] - t_s[0])
    return t_s.size if span <= BLOCK_S else max(round(BLOCK_S * (t_s.size - 1) / span), 1)


def _local_blocks(count: int, length: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """`count` indices in blocks of `length` neighbours, each block from near its place; the end joins the start."""
    starts = np.arange(0, count, length)
    # never less than a block, or a short trace would only ever repeat itself
    reach = max(int(NEIGHBOURHOOD * count), length)
    moved = starts + rng.integers(-reach, reach + 1, starts.size)
    indices: NDArray[np.intp] = ((moved[:, np.newaxis] + np.arange(length)) % max(count, 1)).ravel()[:count]
    return indices


def interval(values: Sequence[float]) -> tuple[float, float]:
    """5th and 95th percentile (linear) of the values that are there; NaN where none is."""
    one = spread(values)
    return one.lo, one.hi


def spread(values: Sequence[float]) -> Spread:
    """Median and 90 % interval of the values that are there."""
    there = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not there.size:
        return Spread(median=math.nan, lo=math.nan, hi=math.nan)
    lo, median, hi = np.percentile(there, [COVERAGE[0], 50.0, COVERAGE[1]]).tolist()
    return Spread(median=median, lo=lo, hi=hi)

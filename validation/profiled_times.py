"""Step times as SpecServe's released code knows them: tables of captured passes, padded, with overheads beside them.

Section and file names are of cerebellumking/AdaSpec (arXiv 2503.05096): worker.py measures a draft and a target pass
of n rows, each row with a context of its own, for a few context lengths and every captured size; draft_model_runner.py
looks the tables up. A draft token is verified as a row of its own there (batch expansion), so that the cache of a
request counts k + 1 times. Above the largest captured size a line is fitted through each table, the overheads' too,
where the released code stops with an error.

A context below the shortest one profiled takes the shortest's table. The drafter's batch is taken as the requests; the
code adds a row for each that has just received a bonus token.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from servecast.model.speculation_cost import SpeculationCost
from servecast.solvers.verification import released_rows
from servecast.validation.draft_controllers import RoundState

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PROFILED_CONTEXTS = (1, 256, 512, 1024, 2048)
CAPTURED_SIZES = (1, 2, 4, 8, 16, *range(32, 1153, 32))
"""Of the fork; vLLM 0.6.3 itself captures 1, 2, 4 and multiples of 8."""
ALIGNMENT = 32
"""Sizes above this, beyond the captured ones too, are multiples of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Seconds of one model's pass by context and padded rows."""

    contexts: tuple[int, ...] = PROFILED_CONTEXTS
    """Rising. [tokens]"""
    sizes: tuple[int, ...] = CAPTURED_SIZES
    """Captured rows, rising."""
    seconds: tuple[tuple[float, ...], ...]
    """[context][size]: inside the graph. [s]"""
    overhead_s: tuple[float, ...]
    """[size]: outside the graph. [s]"""
    _lines: tuple[tuple[float, float], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, values in (("contexts", self.contexts), ("sizes", self.sizes)):
            if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
                raise ValueError(f"{name} must rise from 1 or more, got {list(values)}")
        table = np.asarray(self.seconds, dtype=np.float64)
        if table.shape != (len(self.contexts), len(self.sizes)) or not (np.isfinite(table) & (table >= 0.0)).all():
            raise ValueError(f"seconds must be >= 0 for each context and size, got shape {table.shape}")
        overhead = np.asarray(self.overhead_s, dtype=np.float64)
        if overhead.shape != (len(self.sizes),) or not np.isfinite(overhead).all():
            raise ValueError(f"overhead_s must be finite for each size, got {list(self.overhead_s)}")
        lines = tuple(_line(self.sizes, row) for row in (*self.seconds, self.overhead_s))
        object.__setattr__(self, "_lines", lines)

    def padded(self, rows: int) -> int:
        """Rows that the engine runs for `rows`."""
        at = bisect_left(self.sizes, rows)
        return self.sizes[at] if at < len(self.sizes) else -(-rows // ALIGNMENT) * ALIGNMENT

    def inside(self, padded: int, context: float) -> float:
        """Of a pass of captured size at the largest profiled context that is not above `context`. [s]"""
        at = max(bisect_right(self.contexts, context) - 1, 0)
        return self._at(self.seconds[at], self._lines[at], padded)

    def overhead(self, padded: int) -> float:
        """Outside the graph. [s]"""
        return self._at(self.overhead_s, self._lines[-1], padded)

    def _at(self, row: Sequence[float], line: tuple[float, float], padded: int) -> float:
        if padded > self.sizes[-1]:
            return line[0] + line[1] * padded
        return row[bisect_left(self.sizes, padded)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledTimes:
    """Both models' tables, and the times of a round that the released code predicts from them."""

    draft: PassTimes
    target: PassTimes

    def draft_s(self, state: RoundState, gamma: int, *, overhead: bool = True) -> float:
        """Drafting of a round; the overhead comes once, whatever the length. [s]"""
        if gamma == 0:
            return 0.0
        padded = self.draft.padded(state.batch)
        context = (state.cached + gamma * state.batch) // padded
        return gamma * self.draft.inside(padded, context) + overhead * self.draft.overhead(padded)

    def verify_s(self, state: RoundState, gamma: int) -> float:
        """Verification of `gamma` drafts of every request. [s]"""
        return self._pass_s((gamma + 1) * state.batch, _context(state.cached, state.batch, gamma))

    def ragged_s(self, state: RoundState, lengths: Ints) -> float:
        """Verification of `lengths` drafts, the rows counted as the released code does. [s]"""
        lengths = np.asarray(lengths, dtype=np.int64)
        cached = state.cached / state.batch if state.contexts is None else np.asarray(state.contexts)
        context = float(np.sum((lengths**2 + lengths) / 2 + (lengths + 1) * cached))
        return self._pass_s(released_rows(lengths), context)

    def rows_s(self, state: RoundState, rows: Ints) -> Floats:
        """[rows]: verification of so many rows, spread evenly over the requests. [s]"""
        return np.array(
            [self._pass_s(int(one), _context(state.cached, state.batch, int(one) / state.batch - 1.0)) for one in rows]
        )

    def _pass_s(self, rows: int, context: float) -> float:
        padded = self.target.padded(rows)
        return self.target.inside(padded, context // padded) + self.target.overhead(padded)


def profiled_times(
    draft_ms: Mapping[int, float], target_ms: Mapping[int, float], draft_overhead_ms: float, target_overhead_ms: float
) -> ProfiledTimes:
    """Tables without a context, from milliseconds by captured size."""

    def one(by_size: Mapping[int, float], overhead_ms: float) -> PassTimes:
        return PassTimes(
            contexts=(1,),
            sizes=tuple(sorted(by_size)),
            seconds=(tuple(by_size[size] * 1e-3 for size in sorted(by_size)),),
            overhead_s=(overhead_ms * 1e-3,) * len(by_size),
        )

    return ProfiledTimes(draft=one(draft_ms, draft_overhead_ms), target=one(target_ms, target_overhead_ms))


def sampled_times(
    cost: SpeculationCost,
    *,
    contexts: Sequence[int] = PROFILED_CONTEXTS,
    sizes: Sequence[int] = CAPTURED_SIZES,
) -> ProfiledTimes:
    """What the released profiling would measure of a system whose true step cost is `cost`.

    A row of a captured pass has its own context, so that n rows are n requests. One draft pass is what a second draft
    token adds; what the first costs above it is the overhead.
    """
    rows, context = np.asarray(sizes, dtype=np.float64), np.asarray(contexts, dtype=np.float64)[:, np.newaxis]
    verify = np.asarray(cost.verify(rows, rows, context), dtype=np.float64)
    first = np.asarray(cost.draft(rows, 1, context), dtype=np.float64)
    further = np.asarray(cost.draft(rows, 2, context), dtype=np.float64) - first
    shape = (len(contexts), len(sizes))
    further = np.broadcast_to(further, shape)
    common = {"contexts": tuple(contexts), "sizes": tuple(sizes)}
    return ProfiledTimes(
        draft=PassTimes(**common, seconds=_rows(further), overhead_s=_rows(first - further)[0]),
        target=PassTimes(**common, seconds=_rows(np.broadcast_to(verify, shape)), overhead_s=(0.0,) * len(sizes)),
    )


def _context(cached: int, batch: int, gamma: float) -> float:
    """Cached tokens read by all rows together when draft token j sees j more than its request had. [tokens]"""
    return (gamma + 1) * cached + batch * (gamma**2 + gamma) / 2


def _line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Least squares: intercept and slope by rows; a single size gives a constant."""
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * y).sum()) / spread if spread else 0.0
    return float(y.mean()) - slope * float(x.mean()), slope


def _rows(table: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(one) for one in row) for row in np.atleast_2d(table))

r"""The data of a draft-length schedule, what any choice of lengths costs, and the rules it must keep.

Rows are batch sizes b, columns draft lengths K = 0, 1, ... The loss of a choice is its regret against the best length
that meets the limits at the same batch:

.. math:: \rho_{bK} = 1 - G_{bK} / \max_{K' \in F_b} G_{bK'}

Where no length of a batch meets the limits, the reference is the best length that is available there. A regret within
:math:`z \sqrt{\sigma_{bK}^2 + \sigma_{b*}^2}`, the standard error of the ratio times z, counts as none; that
includes a negative one, of a length that breaks a limit and is faster than any that does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLengthProblem:
    """Goodput of every (batch, length), how often each batch runs, and the rules of the table asked for."""

    batches: Integers
    """[n], increasing; the first need not be 1. [requests]"""
    goodput: Floats
    """[n, K_max + 1], positive; NaN where a length is not available. [tokens/s]"""
    weights: Floats
    """[n], share of steps at each batch; need not add up to 1."""
    sigma: Floats | None = None
    """[n, K_max + 1], relative standard error of the goodput; None is none. [-]"""
    tie_z: float = 1.0
    """Standard errors within which two goodputs count as equal. [-]"""
    feasible: Bools | None = None
    """[n, K_max + 1], whether the service objectives are met; None is everywhere."""
    violation: Floats | None = None
    """[n, K_max + 1], by how much an infeasible cell misses them, in a unit of the caller's; None is no matter."""
    max_lengths: int | None = None
    """Most distinct lengths, 0 included: each has its own captured graphs."""
    max_segments: int | None = None
    """Most runs of batches with one length."""
    switch_cost: Floats | float = 0.0
    """[n - 1] or one for all: price of a change of length between two neighbouring rows. [weighted regret]"""
    length_cost: float = 0.0
    """Of each distinct length. [weighted regret]"""
    non_increasing: bool = False
    """Whether the length may not rise with the batch."""
    edges: Bools | None = None
    """[n - 1], whether the length may change between two neighbouring rows; None is everywhere."""
    protected: tuple[int, int] | None = None
    """Operating range of batches, ends included, inside which the length may not change from or to 0."""
    allow_zero: bool = True
    """Whether length 0, no drafts, may be chosen at all."""
    goodput_lo: Floats | None = None
    """[n, K_max + 1], lower ends of intervals of the goodput; they bound the regret and choose nothing. [tokens/s]"""
    goodput_hi: Floats | None = None
    """[n, K_max + 1], upper ends. [tokens/s]"""

    def __post_init__(self) -> None:
        _as_arrays(self)
        _check_tables(self)
        _check_rules(self)

    @property
    def available(self) -> Bools:
        """[n, K_max + 1], whether a length may be chosen, limits aside."""
        found: Bools = np.isfinite(self.goodput)
        found[:, 0] &= self.allow_zero
        return found

    @property
    def meets(self) -> Bools:
        """[n, K_max + 1], whether a length is available and keeps the limits."""
        return self.available if self.feasible is None else self.available & self.feasible

    @property
    def compared(self) -> Bools:
        """[n, K_max + 1], the lengths among which the best is looked for."""
        meets = self.meets
        return np.where(meets.any(axis=1, keepdims=True), meets, self.available)

    @property
    def switch_costs(self) -> Floats:
        """[n - 1]"""
        return np.broadcast_to(self.switch_cost, (len(self.batches) - 1,))

    @property
    def edge_allowed(self) -> Bools:
        """[n - 1]"""
        return np.ones(len(self.batches) - 1, dtype=bool) if self.edges is None else self.edges

    @property
    def edge_guarded(self) -> Bools:
        """[n - 1], whether the edge may not lead from or to length 0.

        Rows may skip batches: the change then comes at any batch between its two rows, none of which may be inside.
        """
        lo, hi = (0, 0) if self.protected is None else self.protected
        return np.asarray(np.maximum(self.batches[:-1], lo) < np.minimum(self.batches[1:], hi))

    def regret(self) -> Floats:
        """[n, K_max + 1] of goodput; NaN where not available, negative beyond the reference. [-]"""
        best = np.where(self.compared, self.goodput, -np.inf).max(axis=1, keepdims=True)
        return np.where(self.available, 1.0 - self.goodput / best, np.nan)

    def counted_regret(self) -> Floats:
        """[n, K_max + 1] with ties at 0; NaN where not available. [-]"""
        regret = self.regret()
        if self.sigma is None:
            return np.where(regret <= 0.0, 0.0, regret)
        best = np.where(self.compared, self.goodput, -np.inf).argmax(axis=1, keepdims=True)
        tolerance = self.tie_z * np.hypot(self.sigma, np.take_along_axis(self.sigma, best, axis=1))
        return np.where(regret <= tolerance, 0.0, regret)


def cost_of(problem: DraftLengthProblem, lengths: Integers) -> tuple[int, float, float]:
    """Rows whose limits are broken, by how much in all, and the objective: regret, switches and distinct lengths."""
    row = np.arange(len(lengths))
    broken = ~problem.meets[row, lengths]
    missed = 0.0 if problem.violation is None else math.fsum(problem.violation[row, lengths][broken])
    changed = lengths[1:] != lengths[:-1]
    terms = [
        *(problem.weights * problem.counted_regret()[row, lengths]),
        *problem.switch_costs[changed],
        problem.length_cost * len(np.unique(lengths)),
    ]
    return int(broken.sum()), missed, math.fsum(terms)


def broken_rules(problem: DraftLengthProblem, lengths: Sequence[int]) -> list[str]:
    """Rules that a choice of lengths breaks, in words; empty where it breaks none. Limits are no rule: they are
    counted by `cost_of`."""
    have, batches = [int(one) for one in lengths], problem.batches.tolist()
    if len(have) != len(batches):
        return [f"{len(batches)} rows need a length, got {len(have)}"]
    faults = [
        f"length {length} is not available at batch {batch}"
        for batch, length, cells in zip(batches, have, problem.available, strict=True)
        if not (0 <= length < len(cells) and cells[length])
    ]
    changes = [i for i in range(len(have) - 1) if have[i] != have[i + 1]]
    guarded = problem.edge_guarded
    for i in changes:
        where = f"between batch {batches[i]} and {batches[i + 1]}"
        if problem.edges is not None and not problem.edges[i]:
            faults.append(f"no edge may be {where}")
        if problem.non_increasing and have[i + 1] > have[i]:
            faults.append(f"the length rises {where}")
        if guarded[i] and 0 in (have[i], have[i + 1]):
            faults.append(f"no edge from or to 0 may be {where}")
    if problem.max_segments is not None and len(changes) + 1 > problem.max_segments:
        faults.append(f"at most {problem.max_segments} segments, got {len(changes) + 1}")
    if problem.max_lengths is not None and len(set(have)) > problem.max_lengths:
        faults.append(f"at most {problem.max_lengths} lengths, got {len(set(have))}")
    return faults


# ---- what a problem must be ----------------------------------------------------------------------------

_KINDS: dict[str, tuple[str, str, type[np.generic]]] = {
    "Integers": ("iu", "whole numbers", np.int64),
    "Floats": ("iuf", "numbers", np.float64),
    "Bools": ("b", "truth values", np.bool_),
}


def _as_arrays(problem: DraftLengthProblem) -> None:
    """Lists become arrays; a number that is not whole, or not a truth value, is refused and never cast."""
    for one in fields(problem):
        value, declared = getattr(problem, one.name), str(one.type).split()[0]
        if value is None or declared not in _KINDS:
            continue
        array = np.asarray(value)
        kinds, words, dtype = _KINDS[declared]
        if array.dtype.kind not in kinds:
            raise ValueError(f"{one.name} must be {words}, got {array.dtype}")
        object.__setattr__(problem, one.name, array.astype(dtype, copy=False))


def _check_tables(problem: DraftLengthProblem) -> None:
    batches, goodput = problem.batches, problem.goodput
    if batches.ndim != 1 or not batches.size or batches[0] < 1 or (np.diff(batches) < 1).any():
        raise ValueError(f"batches must be increasing and at least 1, got {batches.tolist()}")
    if goodput.ndim != 2 or len(goodput) != len(batches) or not goodput.shape[1]:
        raise ValueError(f"goodput must be {len(batches)} batches x lengths, got shape {goodput.shape}")
    if np.isinf(goodput).any() or (goodput <= 0.0).any():
        raise ValueError(f"goodput must be positive and finite, or NaN, got {float(np.nanmin(goodput))!r}")
    lost = np.flatnonzero(~problem.available.any(axis=1))
    if lost.size:
        raise ValueError(f"goodput must have a length to choose at every batch, got none at batch {batches[lost[0]]}")
    _check_shape("weights", problem.weights, batches.shape)
    _check_least("weights", problem.weights)
    if not problem.weights.sum() > 0.0:
        raise ValueError("weights must have a positive sum, got 0")
    for name in ("sigma", "feasible", "violation", "goodput_lo", "goodput_hi"):
        if (table := getattr(problem, name)) is not None:
            _check_shape(name, table, goodput.shape)
            if table.dtype != np.bool_:
                _check_least(name, table[problem.available])
    _check_intervals(problem)


def _check_intervals(problem: DraftLengthProblem) -> None:
    lo, hi, chosen = problem.goodput_lo, problem.goodput_hi, problem.available
    if (lo is None) != (hi is None):
        raise ValueError("goodput_lo and goodput_hi must be given together, got one of them")
    if lo is not None and hi is not None:
        outside = chosen & ~((lo <= problem.goodput) & (problem.goodput <= hi))
        if outside.any():
            b, k = np.argwhere(outside)[0]
            raise ValueError(
                f"goodput must lie between goodput_lo and goodput_hi, got {problem.goodput[b, k]} in "
                f"[{lo[b, k]}, {hi[b, k]}] at batch {problem.batches[b]}, length {k}"
            )


def _check_rules(problem: DraftLengthProblem) -> None:
    rows = len(problem.batches)
    for name in ("max_lengths", "max_segments"):
        if (limit := getattr(problem, name)) is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}")
    for name in ("length_cost", "tie_z"):
        _check_least(name, np.asarray(getattr(problem, name), dtype=np.float64))
    if np.ndim(problem.switch_cost):
        _check_shape("switch_cost", np.asarray(problem.switch_cost), (rows - 1,))
    _check_least("switch_cost", np.asarray(problem.switch_cost))
    if problem.edges is not None:
        _check_shape("edges", problem.edges, (rows - 1,))
    if problem.protected is not None and not problem.protected[0] <= problem.protected[1]:
        raise ValueError(f"protected must be (lowest, highest) batch, got {problem.protected}")


def _check_shape(name: str, array: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def _check_least(name: str, array: Floats) -> None:
    wrong = ~((array >= 0.0) & np.isfinite(array))
    if wrong.any():
        raise ValueError(f"{name} must be >= 0 and finite, got {float(array[wrong].flat[0])!r}")

r"""Shortest paths over batches, with a draft length as the state: exact under a limit on distinct lengths.

Batches that no edge may separate are one block. A path picks a length per block; entering another length costs a
switch and uses a segment. With values V(b, K, r), the least cost up to block b that ends in K with at most r segments:

.. math:: V(b, K, r) = c_{bK} + \min(V(b-1, K, r),\; s_b + \min_{K'} V(b-1, K', r-1))

Without a limit on distinct lengths that is the answer. Under one it is a bound, and the answer when it keeps the limit
anyway; otherwise every set of lengths of the size allowed is a problem of the same kind, all are solved together, and
a set whose cheapest cells already cost more than a known path is left out.

**Costs are vectors** (limits missed, objective, lengths, ...), compared entry by entry, the first that differs
deciding. Each entry is rounded to multiples of a power of two, so small that the rounding is of the size of
floating-point error, and so large that every sum is exact. Equal sums are then equal whatever the order of adding:
ties are ties, and adding the same to two vectors never changes their order, as shortest paths require. (Sums of
different cells that are equal on paper may still differ in the last digit, and then are no tie.) Two entries make one
complex number, since numpy compares those by real part and then imaginary part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from servecast.solvers.draft_length_problem import Bools, DraftLengthProblem, Floats, Integers

Indices = NDArray[np.intp]
Costs = NDArray[np.complex128]
Trace = list[tuple[Bools, Indices]]

MAX_SETS = 200_000
"""Sets of lengths of one size beyond which the search is refused."""
FIRST_SETS = 16
"""Most promising sets, whose best path is the bound for the others."""
MAX_CELLS = 4_000_000
"""Path cells held at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Blocks x lengths with their costs."""

    costs: Costs
    """[pair, block, length]; infinite in the first entry where a length may not be chosen."""
    objective: int
    """The level that is the objective, which switches and distinct lengths are charged to."""
    switch: Floats
    """[block - 1]"""
    length_cost: float
    lengths: Integers
    """[length], increasing."""
    guarded: Bools
    """[block - 1], whether the edge may not lead from or to length 0."""
    non_increasing: bool
    max_segments: int
    """0 is no limit."""

    @property
    def separable(self) -> bool:
        """Whether the blocks have nothing to do with each other."""
        return not (self.switch.any() or self.guarded.any() or self.non_increasing or self.max_segments)


def best_lengths(problem: DraftLengthProblem) -> Integers | None:
    """Length of every row: fewest limits missed, then the least objective, then the shortest; None where no
    choice keeps the rules."""
    start = np.flatnonzero(np.append(True, problem.edge_allowed))
    for strict in (True, False):
        network = build_network(problem, start, strict=strict)
        path = shortest_path(network, problem.max_lengths)
        if path is not None:
            return np.repeat(network.lengths[path], np.diff(np.append(start, len(problem.batches))))
    return None


def build_network(problem: DraftLengthProblem, start: Indices, *, strict: bool) -> Network:
    """Of blocks that begin at the rows `start`.

    `strict` forbids what misses a limit where the row has a length that does not; where that leaves a path, it is the
    one with the fewest limits missed. Otherwise misses are counted, as the first level.
    """
    meets, weights = problem.meets, problem.weights[:, np.newaxis]
    chosen = problem.compared if strict else problem.available
    columns = np.flatnonzero(chosen.any(axis=0))
    missed = chosen & ~meets
    length = np.arange(meets.shape[1], dtype=np.float64)
    regret = np.where(chosen, problem.counted_regret(), 0.0)
    prices = np.append(problem.switch_costs, [problem.length_cost] * len(columns))
    scale = _grid(np.append((weights * regret).max(axis=1), prices))
    levels = [] if strict else [missed.astype(np.float64)]
    if problem.violation is not None and missed.any():
        levels.append(_rounded(np.where(missed, problem.violation, 0.0)))
    objective = len(levels)
    levels += [np.rint(weights * regret / scale), _rounded(weights * length)]
    if not problem.weights.all():
        # batches that never ran in the record: there the choice costs nothing, and is made as if all were alike
        unseen = weights == 0.0
        levels += [_rounded(unseen * regret), unseen * length]
    cells = np.stack([level[:, columns] for level in levels])
    cells[0] = np.where(chosen[:, columns], cells[0], np.inf)
    segments = problem.max_segments or 0
    return Network(
        costs=_pairs(np.add.reduceat(cells, start, axis=1)),
        objective=objective,
        switch=np.rint(problem.switch_costs[start[1:] - 1] / scale),
        length_cost=float(np.rint(problem.length_cost / scale)),
        lengths=columns.astype(np.int64),
        guarded=problem.edge_guarded[start[1:] - 1],
        non_increasing=problem.non_increasing,
        max_segments=segments if segments < len(start) else 0,
    )


def shortest_path(network: Network, max_lengths: int | None) -> Indices | None:
    """Index of the length of every block, or None where there is no path.

    Raises
    ------
    ValueError : there are too many sets of lengths to go through.
    """
    count = len(network.lengths)
    most = count if max_lengths is None else min(max_lengths, count)
    cost, path = _best_path(network, np.arange(count)[np.newaxis])
    if not np.isfinite(cost[0]):
        return None
    used = len(np.unique(path))
    if used <= most and not network.length_cost:
        return path
    relaxed, last = cost, network.objective
    best, found = (_dearer(cost, network, used), path) if used <= most else (np.full_like(cost, np.inf), None)
    # more lengths than the unrestricted path uses make nothing cheaper; a price per length asks for fewer, too
    for size in range(1, min(most, used - 1) + 1) if network.length_cost else (most,):
        if _less(best, _dearer(relaxed, network, size)):
            break
        bounds, sets = _bounded_sets(network, size)
        bounds[last] += size * network.length_cost
        for some in _promising(bounds, sets, len(network.costs[0])):
            ahead = ~_less(_levels(best)[: last + 1, np.newaxis], bounds[:, some])
            ahead &= np.isfinite(bounds[0, some])
            if not ahead.any():
                break
            cost, path = _best_path(network, sets[some[ahead]])
            cost = _dearer(cost, network, size)
            if np.isfinite(cost[0]) and _less(cost, best):
                best, found = cost, path
    return found


# ---- sets of lengths -----------------------------------------------------------------------------------


def _bounded_sets(network: Network, size: int) -> tuple[Floats, Indices]:
    """[level, set] what no path over a set undercuts, down to the objective, and the sets, [set, size]."""
    total = math.comb(len(network.lengths), size)
    if total > MAX_SETS:
        raise ValueError(f"max_lengths must leave at most {MAX_SETS} sets of lengths to try, got {total}")
    sets = np.array(list(combinations(range(len(network.lengths)), size)), dtype=np.intp)
    bounds = np.empty((network.objective + 1, total))
    step = max(MAX_CELLS // network.costs.shape[1], 1)
    for level, cells in enumerate(np.ascontiguousarray(_levels(network.costs)[: len(bounds)].swapaxes(1, 2))):
        for first in range(0, total, step):
            some = slice(first, first + step)
            least = cells[sets[some, 0]]
            for column in range(1, size):
                np.minimum(least, cells[sets[some, column]], out=least)
            bounds[level, some] = least.sum(axis=1)
    return bounds, sets


def _promising(bounds: Floats, sets: Indices, blocks: int) -> Iterator[Indices]:
    """Sets by their bound, the few best first, then in parts that fit into memory."""
    order = np.lexsort(bounds[::-1])
    step = max(MAX_CELLS // (blocks * sets.shape[1]), FIRST_SETS)
    yield order[:FIRST_SETS]
    for first in range(FIRST_SETS, len(order), step):
        yield order[first : first + step]


# ---- the recursion -------------------------------------------------------------------------------------


def _best_path(network: Network, sets: Indices) -> tuple[Costs, Indices]:
    """Cost, [pair], and path, [block] indices of lengths, of the best over all sets; infinite where there is none."""
    if network.separable:
        least, choice = _least(network.costs[:, :, sets])
        cost, winner = _least(least.sum(axis=1))
        return cost, sets[winner][choice[:, winner]]
    values, trace = _sweep(network, sets)
    ends, last = _least(values[:, :, -1, :])
    cost, winner = _least(ends)
    path = _follow(trace, int(winner), values.shape[2] - 1, int(last[winner]))
    return cost, sets[winner][path]


def _sweep(network: Network, sets: Indices) -> tuple[Costs, Trace]:
    """Values after the last block, [pair, set, segments, length]; and of every block but the first whether a length
    was entered there, and from which."""
    costs = network.costs.swapaxes(0, 1)[:, :, sets][:, :, :, np.newaxis, :]
    blocked = {guard: _blocked(network, sets, guard=guard) for guard in (False, True)}
    values = np.repeat(costs[0], max(network.max_segments, 1), axis=2)
    source = np.full_like(values, np.inf)  # fewer than one segment there is none
    pair, unit = network.objective // 2, (1.0, 1j)[network.objective % 2]
    switches = (network.switch * unit).tolist()
    trace: Trace = []
    for cells, switch, guard in zip(costs[1:], switches, network.guarded.tolist(), strict=True):
        if network.max_segments:
            source[:, :, 1:] = values[:, :, :-1]
        else:
            source = values
        entered, origin = _entered(source, blocked[guard])
        entered[pair] += switch
        better = _less(entered, values)
        values = np.where(better, entered, values)
        values += cells
        trace.append((better, origin))
    return values, trace


def _entered(source: Costs, blocked: Floats | None) -> tuple[Costs, Indices]:
    """Cheapest predecessor of each length, which may be itself: staying is never dearer."""
    if blocked is None:
        least, origin = _least(source)
        return least[..., np.newaxis], origin[..., np.newaxis]
    pairs = np.repeat(source[..., np.newaxis, :], source.shape[-1], axis=-2)
    pairs[0] += blocked
    return _least(pairs)


def _blocked(network: Network, sets: Indices, *, guard: bool) -> Floats | None:
    """[set, 1, to, from] infinite where the length may not change so; None where it may change at will."""
    if not (guard or network.non_increasing):
        return None
    length = network.lengths[sets][:, np.newaxis, :]
    to, origin = length[..., :, np.newaxis], length[..., np.newaxis, :]
    barred = np.zeros(np.broadcast_shapes(to.shape, origin.shape), dtype=bool)
    if network.non_increasing:
        barred |= to > origin
    if guard:
        barred |= (to == 0) != (origin == 0)
    return np.where(barred, np.inf, 0.0)


def _follow(trace: Trace, winner: int, segments: int, last: int) -> Indices:
    """Path within a set, backwards; a change of length leaves a segment."""
    path = [last]
    for better, origin in reversed(trace):
        before = path[-1]
        if better[winner, segments, before]:
            came = origin[winner, segments]
            before = int(came[before % len(came)])  # of length 1 where every length is entered from the same one
            segments = max(segments - 1, 0)
        path.append(before)
    return np.array(path[::-1], dtype=np.intp)


# ---- cost vectors --------------------------------------------------------------------------------------


def _least(values: Costs) -> tuple[Costs, Indices]:
    """First of the least cost vectors along the last axis, [pair, ...], and its place."""
    if len(values) == 1:
        return values.min(axis=-1), np.asarray(values[0].argmin(axis=-1))
    least = np.empty(values.shape[:-1], dtype=values.dtype)
    tied = np.True_
    for pair, entries in enumerate(values):
        open_ones = np.where(tied, entries, np.inf)
        open_ones.min(axis=-1, out=least[pair, ...])
        tied = open_ones == least[pair][..., np.newaxis]
    return least, np.asarray(tied.argmax(axis=-1))


def _less(left: Costs | Floats, right: Costs | Floats) -> Bools:
    """Whether cost vectors, in pairs or levels, come before others."""
    less = left[0] < right[0]
    equal = left[0] == right[0] if len(left) > 1 else less
    for one, other in zip(left[1:], right[1:], strict=True):
        less = less | (equal & (one < other))
        equal = equal & (one == other)
    return np.asarray(less)


def _pairs(levels: Floats) -> Costs:
    """Two levels to a complex number, in order of importance; the last may be alone."""
    pairs = np.zeros(((len(levels) + 1) // 2, *levels.shape[1:]), dtype=np.complex128)
    pairs.real, pairs.imag[: len(levels) // 2] = levels[::2], levels[1::2]
    return pairs


def _levels(pairs: Costs) -> Floats:
    """The levels of `_pairs`, with one of zeros where the last was alone."""
    return np.stack([pairs.real, pairs.imag], axis=1).reshape(-1, *pairs.shape[1:])


def _dearer(cost: Costs, network: Network, used: int) -> Costs:
    """Cost vector of a path, [pair], with the price of the lengths it uses."""
    levels = _levels(cost)
    levels[network.objective] += used * network.length_cost
    return _pairs(levels)


def _grid(rows: Floats) -> float:
    """Smallest power of two of which the sum of `rows` is below 2^51 multiples: sums of such multiples are exact."""
    total = math.fsum(rows)
    return math.ldexp(1.0, math.frexp(total)[1] - 51) if total > 0.0 else 1.0


def _rounded(cells: Floats) -> Floats:
    """[row, length] in multiples of their own grid."""
    return np.rint(cells / _grid(cells.max(axis=1)))

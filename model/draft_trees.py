r"""Draft trees: which tree of drafted tokens yields the most tokens per verification, and which tree pays.

Symbols: p_b = ``child_acceptance``[b - 1], probability that the b-th child of an accepted node is the one accepted;
siblings exclude each other, so sum p_b <= 1 and the rest is the chance that no child is [-]; m nodes, the root (the
target's own token) included; l levels, the root included; F(m, l) most tokens of a step, the root's included [tokens].

T(m, l, b) is F with exactly b children of the root. A tree of b children is one of b - 1 with a subtree beside them:

.. math::
   T(1, l, 0) = 1, \qquad
   T(m, l, b) = \max_{1 \le y < m} T(y, l, b - 1) + p_b F(m - y, l - 1), \qquad
   F(m, l) = \max_b T(m, l, b)

Assumptions: a child's acceptance depends on its rank alone, neither on depth nor on the text (Chen et al., Sequoia,
arXiv 2402.12374). Measured vectors need not fall with the rank. The authors' files hold a leading 0 and, last, the
chance that no child is accepted: drop both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.queueing import whole
from servecast.model.speculation import within

Floats = NDArray[np.float64]

_ROUNDING = 1e-12
"""Excess over 1 that a sum of shares may show by rounding alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTree:
    """Nodes in level order, children of a node in the order of their rank."""

    parents: tuple[int, ...]
    """Parent of each node, before it in the tuple; -1 for the root, node 0."""
    expected_tokens: float
    """Mean tokens of one step, the root's included. [tokens]"""

    @property
    def levels(self) -> int:
        """Levels, the root's included."""
        level = [1]
        for parent in self.parents[1:]:
            level.append(level[parent] + 1)
        return max(level)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeChoice:
    """The tree of least time per token."""

    nodes: int
    levels: int
    """Levels paid for."""
    tree: DraftTree
    seconds_per_token: float


def expected_tokens(child_acceptance: ArrayLike, nodes: int, levels: int) -> Floats:
    """F(m, l) at [m - 1, l - 1] for m = 1..nodes, l = 1..levels; -inf where no tree of m nodes has at most l levels.

    Time grows with nodes^2 levels ranks. [tokens]

    >>> expected_tokens([0.5, 0.3], 3, 3)
    array([[ 1. ,  1. ,  1. ],
           [-inf,  1.5,  1.5],
           [-inf,  1.8,  1.8]])
    """
    p = _ranks(child_acceptance)
    table = _table(p, int(whole("nodes", nodes)), int(whole("levels", levels)))
    return np.asarray(table.max(axis=2)[1:, 1:])


def best_tree(child_acceptance: ArrayLike, nodes: int, levels: int) -> DraftTree:
    """The tree of F(nodes, levels): exactly `nodes` nodes, at most `levels` levels.

    >>> best_tree([0.5, 0.3], 4, 4)
    DraftTree(parents=(-1, 0, 0, 1), expected_tokens=2.05)
    """
    p = _ranks(child_acceptance)
    table = _table(p, int(whole("nodes", nodes)), int(whole("levels", levels)))
    if np.isneginf(table[nodes, levels].max()):
        raise ValueError(f"nodes must fit in {levels} levels of at most {p.size} children, got {nodes}")
    return _tree(p, table, nodes, levels)


def best_tree_for(
    child_acceptance: ArrayLike,
    draft_s: float,
    verify_s: Mapping[int, float],
    max_levels: int,
    *,
    charge_root: bool,
) -> TreeChoice:
    """The tree with the least (draft steps x draft_s + verify_s[m]) / F(m, l) over m in `verify_s`, l <= max_levels.

    Parameters
    ----------
    child_acceptance : p_b. [-]
    draft_s : one draft step, a level. [s]
    verify_s : verification of m nodes, by m. [s]
    max_levels : most levels, the root's included.
    charge_root : True charges l draft steps, as the authors' released search does; False charges the l - 1 levels below
        the root, those that are drafted.

    Equal times give the fewest nodes, then the fewest levels.
    """
    p, deepest, step = _ranks(child_acceptance), int(whole("max_levels", max_levels)), within("draft_s", draft_s, 0.0)
    budgets, verify = _budgets(verify_s)
    table = _table(p, int(budgets[-1]), deepest)
    tokens = table.max(axis=2)[budgets, 1:]
    drafted = np.arange(1, deepest + 1) - (not charge_root)
    # a tree that does not exist has F = -inf: its time per token would come out as 0, the least of all
    seconds = np.where(tokens > 0.0, (drafted * step + verify[:, None]) / np.maximum(tokens, 1.0), np.inf)
    row, column = np.unravel_index(int(seconds.argmin()), seconds.shape)
    if np.isinf(seconds[row, column]):
        raise ValueError(
            f"verify_s must have a budget that fits in {deepest} levels of at most {p.size} children, "
            f"got {budgets.tolist()}"
        )
    nodes, levels = int(budgets[row]), int(column) + 1
    return TreeChoice(
        nodes=nodes,
        levels=levels,
        tree=_tree(p, table, nodes, levels),
        seconds_per_token=float(seconds[row, column]),
    )


def _ranks(child_acceptance: ArrayLike) -> Floats:
    p = within("child_acceptance", child_acceptance, 0.0, 1.0)
    if p.ndim != 1 or not p.size:
        raise ValueError(f"child_acceptance must be a row of probabilities, got shape {p.shape}")
    if p.sum() > 1.0 + _ROUNDING:
        raise ValueError(f"child_acceptance must sum to at most 1, got {p.sum():g}")
    return p


def _budgets(verify_s: Mapping[int, float]) -> tuple[NDArray[np.int64], Floats]:
    """Nodes in increasing order and the seconds of each."""
    if not verify_s:
        raise ValueError("verify_s must have at least one budget, got none")
    budgets = np.array(sorted(verify_s), dtype=np.int64)
    if budgets[0] < 1:
        raise ValueError(f"verify_s must have budgets >= 1, got {budgets[0]}")
    return budgets, within("verify_s", [verify_s[int(m)] for m in budgets], 0.0)


def _table(p: Floats, nodes: int, levels: int) -> Floats:
    """T(m, l, b) at [m, l, b]; all l and b of one m at once, since every term has fewer nodes."""
    table = np.full((nodes + 1, levels + 1, p.size + 1), -np.inf)
    best = np.full((nodes + 1, levels + 1), -np.inf)
    table[1, 1:, 0] = best[1, 1:] = 1.0
    for m in range(2, nodes + 1):
        table[m, 1:, 1:] = _joined(p, table[1:m, 1:, :-1], best[m - 1 : 0 : -1, :-1]).max(axis=0)
        best[m] = table[m].max(axis=1)
    return table


def _joined(p: Floats, beside: Floats, subtree: Floats) -> Floats:
    """T(y, l, b - 1) + p_b F(m - y, l - 1), [y, l, b]; -inf where the subtree does not exist, also for p_b = 0."""
    possible = np.isfinite(subtree)[..., None]
    return np.where(possible, beside + p * np.where(possible, subtree[..., None], 0.0), -np.inf)


def _tree(p: Floats, table: Floats, nodes: int, levels: int) -> DraftTree:
    """Nodes taken in level order; the sizes below each are found again by the maximum that made its value."""
    parents, waiting = [-1], [(nodes, levels)]
    for node in range(nodes):
        size, level = waiting[node]
        below = _subtree_sizes(p, table, size, level)
        parents += [node] * len(below)
        waiting += [(one, level - 1) for one in below]
    return DraftTree(parents=tuple(parents), expected_tokens=float(table[nodes, levels].max()))


def _subtree_sizes(p: Floats, table: Floats, size: int, level: int) -> list[int]:
    """Nodes under each child of the best root of `size` nodes and `level` levels, by rank."""
    sizes: list[int] = []
    for rank in range(int(table[size, level].argmax()), 0, -1):
        subtree = table[size - 1 : 0 : -1, level - 1].max(axis=1)
        this = slice(rank - 1, rank)
        left = 1 + int(_joined(p[this], table[1:size, level, this], subtree).argmax())
        sizes.append(size - left)
        size = left
    return sizes[::-1]

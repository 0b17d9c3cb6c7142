"""Draft trees: the released vector's values, every ordered tree up to seven nodes, simulation.

`reference` in a comment is the page reference/speculation, with the section; its figures were worked out apart from
this code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.model.draft_trees import DraftTree, best_tree, best_tree_for, expected_tokens
from servecast.model.speculation import tokens_per_step

# reference 4.7: the acceptance vector of the authors' repository, its leading 0 left out
RELEASED = [0.6342, 0.1079, 0.0570, 0.0225, 0.0195, 0.0150, 0.0045, 0.0030, 0.0120, 0.0045, 0.0075, 0.0045, 0.0060]
RELEASED += [0.0030, 0.0015, 0.0030, 0.0015, 0.0030, 0, 0.0030, 0.0030, 0.0030, 0, 0.0015, 0, 0.0015, 0, 0, 0]
RELEASED += [0.0015, 0.0015, 0.0015]
# reference 4.7: F(m, l <= 10)
TOKENS = {1: 1.0, 2: 1.6342, 3: 2.0364, 4: 2.2915, 5: 2.4533, 6: 2.5612, 7: 2.6638, 8: 2.7322}
TOKENS |= {16: 3.1303, 32: 3.5008, 64: 3.8524}
DEMO = dict(zip([1, 2, 4, 8, 16, 32], [10.0, 10.0, 10.0, 12.0, 14.0, 18.0], strict=True))
"""Verification of the repository's demo. [ms]"""


def test_released_vector() -> None:
    table = expected_tokens(RELEASED, 64, 10)
    np.testing.assert_allclose([table[m - 1, 9] for m in TOKENS], list(TOKENS.values()), rtol=0, atol=5.1e-5)
    assert len(RELEASED) == 32
    # what is left of 1, no child accepted: .0735 before the entries were rounded to four digits
    np.testing.assert_allclose(1.0 - sum(RELEASED), 0.0735, rtol=0, atol=2e-4)


def test_one_level_more() -> None:
    # reference 4.7: 64 nodes with eleven levels
    np.testing.assert_allclose(expected_tokens(RELEASED, 64, 11)[63, 10], 3.8556, rtol=0, atol=5.1e-5)


def test_demo_of_the_released_code() -> None:
    # reference 4.7: budget 4, 4 levels, 4.8876 ms per token, 2.046 times the plain step of 10 ms
    choice = best_tree_for(RELEASED, 0.3, DEMO, 10, charge_root=True)
    assert (choice.nodes, choice.levels) == (4, 4)
    np.testing.assert_allclose(choice.seconds_per_token, 4.8876, rtol=0, atol=5.1e-5)
    np.testing.assert_allclose(10.0 / choice.seconds_per_token, 2.046, rtol=0, atol=5.1e-4)
    assert choice.tree.parents == (-1, 0, 1, 2)


def test_demo_without_a_draft_of_the_root() -> None:
    # reference 4.7: 4.7567 ms per token
    choice = best_tree_for(RELEASED, 0.3, DEMO, 10, charge_root=False)
    assert (choice.nodes, choice.levels) == (4, 4)
    np.testing.assert_allclose(choice.seconds_per_token, 4.7567, rtol=0, atol=5.1e-5)


# Every ordered tree, as nested tuples of children

Nested = tuple["Nested", ...]


@cache
def _forests(nodes: int) -> tuple[tuple[Nested, ...], ...]:
    """All ordered forests of so many nodes."""
    if nodes == 0:
        return ((),)
    return tuple(
        (first, *rest)
        for size in range(1, nodes + 1)
        for first in _forests(size - 1)
        for rest in _forests(nodes - size)
    )


def _value(tree: Nested, p: Sequence[float]) -> float:
    return 1.0 + sum(p[b] * _value(child, p) for b, child in enumerate(tree))


def _depth(tree: Nested) -> int:
    return 1 + max((_depth(child) for child in tree), default=0)


def _widest(tree: Nested) -> int:
    return max([len(tree), *(_widest(child) for child in tree)])


def _enumerated(p: Sequence[float], nodes: int, levels: int) -> float:
    values = (_value(t, p) for t in _forests(nodes - 1) if _depth(t) <= levels and _widest(t) <= len(p))
    return max(values, default=-np.inf)


def test_the_enumeration_counts_trees() -> None:
    # Catalan numbers: 1, 1, 2, 5, 14, 42, 132 ordered trees of 1..7 nodes
    assert [len(_forests(m - 1)) for m in range(1, 8)] == [1, 1, 2, 5, 14, 42, 132]


@pytest.mark.parametrize(
    "p",
    [
        RELEASED[:6],
        [0.4, 0.3, 0.2],
        [0.1, 0.5, 0.0, 0.3],  # a later sibling is accepted more often, one never
        [0.5, 0.3],
        [0.7],
        [0.0, 0.0],
        [1.0, 0.0, 0.0],
    ],
)
def test_every_tree_to_seven_nodes(p: list[float]) -> None:
    table = expected_tokens(p, 7, 7)
    slow = [[_enumerated(p, m, levels) for levels in range(1, 8)] for m in range(1, 8)]
    np.testing.assert_allclose(table, slow, rtol=1e-13)


@settings(max_examples=25)
@given(weights=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), nodes=st.integers(1, 6), levels=st.integers(1, 6))
def test_random_vectors_against_every_tree(weights: list[float], nodes: int, levels: int) -> None:
    p = [w / len(weights) for w in weights]
    np.testing.assert_allclose(expected_tokens(p, nodes, levels)[-1, -1], _enumerated(p, nodes, levels), rtol=1e-13)


def _chances(parents: Sequence[int], p: Sequence[float]) -> list[float]:
    """Probability that each node is accepted, by walking up."""
    ranks = [sum(q == parent for q in parents[:i]) for i, parent in enumerate(parents)]
    chances = [1.0]
    for i in range(1, len(parents)):
        chances.append(chances[parents[i]] * p[ranks[i]])
    return chances


def _levels(tree: DraftTree) -> int:
    depth = [1]
    for parent in tree.parents[1:]:
        depth.append(depth[parent] + 1)
    return max(depth)


@pytest.mark.parametrize("nodes", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("levels", [7, 11])
def test_tree_attains_its_value(nodes: int, levels: int) -> None:
    tree = best_tree(RELEASED, nodes, levels)
    assert len(tree.parents) == nodes
    assert tree.parents[0] == -1
    assert all(0 <= parent < i for i, parent in enumerate(tree.parents) if i)
    # level order: parents never go back
    assert list(tree.parents) == sorted(tree.parents)
    assert _levels(tree) == tree.levels <= levels
    np.testing.assert_allclose(sum(_chances(tree.parents, RELEASED)), tree.expected_tokens, rtol=1e-13)
    np.testing.assert_allclose(tree.expected_tokens, expected_tokens(RELEASED, nodes, levels)[-1, -1], rtol=1e-13)


def test_tree_by_hand() -> None:
    # hand: .5 and .3 with four nodes: a chain gives 1.875; root with two children, the first with one, 2.05; the second
    # with one, 1.95; the root's first child with two, 1.9
    tree = best_tree([0.5, 0.3], 4, 4)
    assert tree.parents == (-1, 0, 0, 1)
    np.testing.assert_allclose(tree.expected_tokens, 2.05, rtol=1e-14)


def test_tree_against_simulation() -> None:
    """Monte Carlo: at every accepted node the b-th child is accepted with probability p_b, no child otherwise."""
    p, rng = RELEASED[:6], np.random.default_rng(3)
    tree = best_tree(p, 16, 6)
    children: list[list[int]] = [[] for _ in tree.parents]
    for i, parent in enumerate(tree.parents[1:], start=1):
        children[parent].append(i)
    tokens = np.zeros(40_000)
    for walk in range(tokens.size):
        node: int | None = 0
        while node is not None:
            tokens[walk] += 1.0
            rank = int(np.searchsorted(np.cumsum(p), rng.random(), side="right"))
            node = children[node][rank] if rank < len(children[node]) else None
    assert abs(tokens.mean() - tree.expected_tokens) < 4.0 * tokens.std() / np.sqrt(tokens.size)


# Properties


@given(alpha=st.floats(0.0, 1.0), nodes=st.integers(1, 12))
def test_one_child_is_a_chain(alpha: float, nodes: int) -> None:
    table = expected_tokens([alpha], nodes, nodes)
    np.testing.assert_allclose(np.diag(table), tokens_per_step(alpha, np.arange(nodes)), rtol=1e-12)
    # fewer levels than nodes: no chain
    assert np.all(np.isneginf(table[np.tril_indices(nodes, -1)]))


@settings(max_examples=30)
@given(weights=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6), bump=st.integers(0, 5))
def test_more_of_anything_never_hurts(weights: list[float], bump: int) -> None:
    p = np.array(weights) / (2.0 * len(weights))
    table = expected_tokens(p, 12, 6)
    possible = np.isfinite(table)
    better = p.copy()
    better[bump % p.size] += 0.5 / p.size
    grown = expected_tokens(better, 12, 6)
    almost = 1.0 - 1e-12  # sums of another order round otherwise
    assert np.all(grown[possible] >= almost * table[possible])
    # a level, then a node more
    assert np.all(table[:, 1:][possible[:, :-1]] >= almost * table[:, :-1][possible[:, :-1]])
    assert np.all(table[1:][possible[1:]] >= almost * table[:-1][possible[1:]])


@settings(max_examples=25)
@given(
    draft=st.floats(0.0, 5.0),
    verify=st.lists(st.floats(1.0, 30.0), min_size=3, max_size=3),
    charge_root=st.booleans(),
)
def test_choice_is_the_least(draft: float, verify: list[float], charge_root: bool) -> None:
    budgets, p = [1, 3, 6], [0.6, 0.2, 0.1]
    choice = best_tree_for(p, draft, dict(zip(budgets, verify, strict=True)), 5, charge_root=charge_root)
    slow = min(
        ((levels if charge_root else levels - 1) * draft + seconds) / _enumerated(p, m, levels)
        for m, seconds in zip(budgets, verify, strict=True)
        for levels in range(1, 6)
        if np.isfinite(_enumerated(p, m, levels))
    )
    np.testing.assert_allclose(choice.seconds_per_token, slow, rtol=1e-12)
    steps = choice.levels if charge_root else choice.levels - 1
    seconds = steps * draft + dict(zip(budgets, verify, strict=True))[choice.nodes]
    np.testing.assert_allclose(seconds / choice.tree.expected_tokens, choice.seconds_per_token, rtol=1e-12)
    assert choice.tree.levels <= choice.levels


def test_choice_scales_with_the_second() -> None:
    slow = best_tree_for(RELEASED, 300.0, {m: 1e3 * s for m, s in DEMO.items()}, 10, charge_root=False)
    fast = best_tree_for(RELEASED, 0.3, DEMO, 10, charge_root=False)
    assert slow.tree == fast.tree
    np.testing.assert_allclose(slow.seconds_per_token, 1e3 * fast.seconds_per_token, rtol=1e-13)


def test_costly_drafts_leave_the_root_alone() -> None:
    # hand: a draft as long as ten steps never pays; the root alone costs one plain step
    choice = best_tree_for(RELEASED, 100.0, DEMO, 10, charge_root=False)
    assert (choice.nodes, choice.levels, choice.tree.parents) == (1, 1, (-1,))
    np.testing.assert_allclose(choice.seconds_per_token, 10.0, rtol=1e-14)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: expected_tokens([], 4, 4), "child_acceptance must be a row of probabilities, got shape"),
    (lambda: expected_tokens([[0.5]], 4, 4), "child_acceptance must be a row of probabilities, got shape"),
    (lambda: expected_tokens([0.5, -0.1], 4, 4), r"child_acceptance must be in \[0, 1\], got -0.1"),
    (lambda: expected_tokens([0.5, float("nan")], 4, 4), r"child_acceptance must be in \[0, 1\], got nan"),
    (lambda: expected_tokens([0.8, 0.4], 4, 4), "child_acceptance must sum to at most 1, got 1.2"),
    (lambda: expected_tokens([0.5], 0, 4), "nodes must be a whole number >= 1, got 0"),
    (lambda: expected_tokens([0.5], 4, 0), "levels must be a whole number >= 1, got 0"),
    (lambda: best_tree([0.5], 5, 4), "nodes must fit in 4 levels of at most 1 children, got 5"),
    (lambda: best_tree_for([0.5], -1.0, {1: 1.0}, 4, charge_root=True), "draft_s must be finite and >= 0, got -1"),
    (lambda: best_tree_for([0.5], 1.0, {2: -1.0}, 4, charge_root=True), "verify_s must be finite and >= 0, got -1"),
    (lambda: best_tree_for([0.5], 1.0, {0: 1.0}, 4, charge_root=True), "verify_s must have budgets >= 1, got 0"),
    (lambda: best_tree_for([0.5], 1.0, {}, 4, charge_root=True), "verify_s must have at least one budget, got none"),
    (
        lambda: best_tree_for([0.5], 1.0, {8: 1.0}, 4, charge_root=True),
        r"verify_s must have a budget that fits in 4 levels of at most 1 children, got \[8\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

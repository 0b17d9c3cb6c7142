r"""Which drafted tokens to verify: draft lengths of one step, request by request.

A row of the verification pass is worth its survival :math:`S_{ij}`, the probability that draft tokens 1..j of request
i are all accepted. S falls with j, so that the R best slots of a batch are a prefix of every request, and

.. math:: R^* = \arg\max_R \frac{B + \sum_{best R} S}{T_d + T_v(n_0 + R)}

is found from one sort and one cumulative sum (vLLM's adaptive verification, PR 47808, has this form; a static draft
length is one of its allocations, so none is better). `trim_released` is the trimming of SpecServe's released code
(arXiv 2503.05096), for comparison: it compares the last drafted token of each request instead of the last one kept.

Batches are padded arrays: `survival` [request, position] with `lengths` [request] drafted tokens in each row; what
stands behind a row's length is not read. :func:`padded` makes them from lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

POWERS_UP_TO = 32
"""Captured sizes of SpecServe's engine are powers of two up to here, and multiples of it above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationPlan:
    """Best allocation of verification rows to the drafted tokens of a batch."""

    lengths: Ints
    """[request]: tokens to verify, a prefix of what was drafted."""
    rows: int
    """Of the pass: those that have to run anyway, and one for each token to verify."""
    tokens: float
    """Expected tokens emitted, one per request without its drafts included. [tokens]"""
    step_s: float
    """Drafting and verification. [s]"""
    goodput: float
    """Expected tokens per second. [tok/s]"""
    candidates: int
    """Budgets that were compared; the others lie on a tread whose right end has more tokens for the same time."""
    within_limits: bool
    """False where no budget meets the limits; the plan then verifies nothing."""


def padded(survivals: Sequence[Sequence[float]]) -> tuple[Floats, Ints]:
    """Ragged survivals as an array [request, position], 0 behind the end, and their lengths."""
    lengths = np.array([len(one) for one in survivals], dtype=np.int64)
    survival = np.zeros((lengths.size, int(lengths.max(initial=0))))
    for row, one in zip(survival, survivals, strict=True):
        row[: len(one)] = one
    return survival, lengths


def expected_tokens(survival: ArrayLike, lengths: ArrayLike) -> float:
    """Expected accepted tokens of a batch when `lengths` of each request are verified. [tokens]"""
    checked, kept = _batch(survival, lengths)
    return float(checked[_drafted(checked, kept)].sum())


def trim_optimal(survival: ArrayLike, rows_removed: int, *, lengths: ArrayLike | None = None) -> Ints:
    """Lengths after the `rows_removed` least likely tokens are dropped, always the last one kept of a request.

    No other choice of as many rows keeps more expected tokens: each drop is the smallest of all tails, and a tail is
    never above what stands before it. Among equal ones the deepest goes first.

    >>> trim_optimal([[0.9, 0.8], [0.8, 0.5], [0.6, 0.2]], 2)
    array([2, 1, 1])
    """
    checked, drafted = _batch(survival, lengths)
    removed = _removable(rows_removed, drafted)
    request, position = np.nonzero(_drafted(checked, drafted))
    order = np.lexsort((request, -position, checked[request, position]))
    return np.bincount(request[order[removed:]], minlength=drafted.size).astype(np.int64)


def trim_released(survival: ArrayLike, rows_removed: int | None = None, *, lengths: ArrayLike | None = None) -> Ints:
    """Lengths after trimming as the released code does it (draft_model_runner.py of cerebellumking/AdaSpec).

    Requests are compared by the last token *drafted*, which stays the same while the request shrinks: they are emptied
    one after the other. Without `rows_removed` the surplus over the next lower captured size goes.

    >>> trim_released([[0.9, 0.8], [0.8, 0.5], [0.6, 0.2]], 2)
    array([2, 2, 0])
    """
    checked, drafted = _batch(survival, lengths)
    removed = _removable(released_surplus(released_rows(drafted)) if rows_removed is None else rows_removed, drafted)
    last = [row[count - 1] if count else np.inf for row, count in zip(checked, drafted, strict=True)]
    order = np.argsort(last, kind="stable")
    before = np.cumsum(drafted[order]) - drafted[order]
    kept = drafted.copy()
    kept[order] -= np.clip(removed - before, 0, drafted[order])  # what the requests before it left to remove
    return kept


def released_rows(lengths: ArrayLike) -> int:
    """Rows of a ragged pass as the released code counts them: (mean + 1) B in floating point, cut to an integer.

    One row short of B + sum of the lengths wherever rounding falls below it.
    """
    drafted = np.asarray(lengths, dtype=np.int64)
    return int((np.mean(drafted) + 1) * drafted.size)


def released_surplus(rows: int) -> int:
    """Rows above the next lower captured size; a pass that fills its size exactly is cut to the size below."""
    if rows < 2:
        raise ValueError(f"rows must be >= 2, got {rows}")
    if rows <= POWERS_UP_TO:
        return int(rows - (1 << ((rows - 1).bit_length() - 1)))
    return rows - (rows - 1) // POWERS_UP_TO * POWERS_UP_TO


def verification_plan(
    survival: ArrayLike,
    cost_by_rows: ArrayLike,
    base_rows: int,
    draft_s: float,
    *,
    lengths: ArrayLike | None = None,
    step_limit_s: float = np.inf,
    token_limit_s: float = np.inf,
) -> VerificationPlan:
    """Best number of rows to verify, and where they go.

    Parameters
    ----------
    survival : [request, position], non-increasing along a row. [-]
    cost_by_rows : seconds of the target pass by its number of rows, the first value for none; any shape. [s]
    base_rows : rows that run anyway, one per request and the prompt tokens of the same step. [tokens]
    draft_s : time already spent on drafting. [s]
    lengths : drafted tokens of each request; all positions where left out. [tokens]
    step_limit_s : limit of the whole step. [s]
    token_limit_s : limit of the step divided by the mean of emitted tokens per request. [s]

    Notes
    -----
    Where nothing keeps the limits: the least time per token of what keeps the limit on steps; where that is nothing,
    too, no draft token, since there is no smaller step to fall back to.
    """
    checked, drafted = _batch(survival, lengths)
    total = int(drafted.sum())
    seconds = _step_seconds(cost_by_rows, base_rows, total, draft_s)
    requests = drafted.size
    slots = np.sort(checked[_drafted(checked, drafted)])[::-1]
    tokens = requests + np.concatenate([[0.0], np.cumsum(slots)])
    allowed = (seconds <= step_limit_s) & (seconds * requests <= token_limit_s * tokens)
    # more rows at no more time dominate, unless they are ruled out; tokens never fall with rows
    ends = np.append(seconds[1:] > seconds[:-1], True)
    candidates = np.flatnonzero(ends & allowed)
    within = bool(allowed.any())
    if candidates.size:
        best = int(candidates[np.argmax(tokens[candidates] / seconds[candidates])])
    else:
        late = np.flatnonzero(seconds <= step_limit_s)
        best = int(late[np.argmin(seconds[late] / tokens[late])]) if late.size else 0
    return VerificationPlan(
        lengths=trim_optimal(checked, total - best, lengths=drafted),
        rows=base_rows + best,
        tokens=float(tokens[best]),
        step_s=float(seconds[best]),
        goodput=float(tokens[best] / seconds[best]),
        candidates=max(int(candidates.size), 1),
        within_limits=within,
    )


def _step_seconds(cost_by_rows: ArrayLike, base_rows: int, total: int, draft_s: float) -> Floats:
    """[budget]: seconds of the step with 0..total rows to verify."""
    cost = np.asarray(cost_by_rows, dtype=np.float64)
    if cost.ndim != 1 or cost.size <= base_rows + total:
        raise ValueError(
            f"cost_by_rows must have a value for each of 0..{base_rows + total} rows, got shape {cost.shape}"
        )
    if base_rows < 0:
        raise ValueError(f"base_rows must be >= 0, got {base_rows}")
    if not 0.0 <= draft_s < np.inf:
        raise ValueError(f"draft_s must be >= 0 and finite, got {draft_s}")
    used = cost[base_rows : base_rows + total + 1]
    if not (np.isfinite(used) & (used > 0.0)).all():
        raise ValueError(f"cost_by_rows must be > 0 and finite, got {used[~(np.isfinite(used) & (used > 0.0))][0]}")
    return used + draft_s


def _batch(survival: ArrayLike, lengths: ArrayLike | None) -> tuple[Floats, Ints]:
    """Survivals and lengths, refused where they are not probabilities that fall along a request."""
    array = np.asarray(survival, dtype=np.float64)
    if array.ndim != 2 or not array.shape[0]:
        raise ValueError(f"survival must have one row per request, got shape {array.shape}")
    requests, positions = array.shape
    drafted = np.full(requests, positions) if lengths is None else np.asarray(lengths)
    if not np.issubdtype(drafted.dtype, np.integer) or drafted.shape != (requests,):
        raise ValueError(f"lengths must be one integer per request, got {lengths!r}")
    drafted = drafted.astype(np.int64)
    if ((drafted < 0) | (drafted > positions)).any():
        raise ValueError(f"lengths must be in [0, {positions}], got {drafted.tolist()}")
    known = _drafted(array, drafted)
    values = array[known]
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError(f"survival must be in [0, 1], got {values[~((values >= 0.0) & (values <= 1.0))][0]}")
    rising = known[:, 1:] & (array[:, 1:] > array[:, :-1])
    if rising.any():
        request, position = (int(one[0]) for one in np.nonzero(rising))
        raise ValueError(
            f"survival must not rise along a request, got {array[request, position + 1]:g} "
            f"after {array[request, position]:g} in request {request}"
        )
    return array, drafted


def _drafted(survival: Floats, lengths: Ints) -> NDArray[np.bool_]:
    """[request, position]: where there is a drafted token."""
    return np.arange(survival.shape[1]) < lengths[:, np.newaxis]


def _removable(rows: int, drafted: Ints) -> int:
    if not 0 <= rows <= drafted.sum():
        raise ValueError(f"rows_removed must be in [0, {drafted.sum()}], got {rows}")
    return int(rows)

"""Measured cells of a draft-length sweep: decode speed by batch size and draft length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DISAGREEMENT = 0.05
"""Two measurements of one cell may differ by this share; their geometric mean is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCells:
    """One row per (batch, draft length, context, armed) cell; NaN where a column was not measured."""

    batch: Floats
    """Running requests. [requests]"""
    gamma: NDArray[np.int64]
    """Draft length of the step; 0 without speculation. [tokens]"""
    tok_s_per_request: Floats
    """Decode speed one request sees, 1 / TPOT; NaN in a cell that is to be predicted. [tokens/s]"""
    mean_acceptance_length: Floats
    """Tokens per step with the bonus token. [tokens]"""
    context: Floats
    """Cached tokens per request. [tokens]"""
    armed: NDArray[np.bool_]
    """Length 0 with a drafter configured, as against speculation switched off."""

    def __post_init__(self) -> None:
        size = self.batch.size
        for name in ("gamma", "tok_s_per_request", "mean_acceptance_length", "context", "armed"):
            if getattr(self, name).shape != (size,):
                raise ValueError(f"{name} must have one value per cell, got {getattr(self, name).size} for {size}")
        speed, length = self.tok_s_per_request, self.mean_acceptance_length
        _each(self, "batch", (self.batch >= 1.0) & np.isfinite(self.batch), "must be >= 1")
        _each(self, "gamma", self.gamma >= 0, "must be >= 0")
        _each(self, "tok_s_per_request", np.isnan(speed) | (np.isfinite(speed) & (speed > 0.0)), "must be > 0")
        in_range = (length >= 1.0) & (length <= self.gamma + 1.0)
        _each(self, "mean_acceptance_length", np.isnan(length) | in_range, "must lie in [1, draft_length + 1]")
        _each(self, "context", np.isnan(self.context) | (self.context >= 0.0), "must be >= 0")
        _each(self, "armed", ~self.armed | (self.gamma == 0), "goes with draft_length 0 only")

    @property
    def size(self) -> int:
        return int(self.batch.size)

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> SpeculationCells:
        """The cells at `rows`."""
        return SpeculationCells(
            batch=self.batch[rows],
            gamma=self.gamma[rows],
            tok_s_per_request=self.tok_s_per_request[rows],
            mean_acceptance_length=self.mean_acceptance_length[rows],
            context=self.context[rows],
            armed=self.armed[rows],
        )


def _each(cells: SpeculationCells, name: str, good: NDArray[np.bool_], rule: str) -> None:
    bad = np.flatnonzero(~good)
    if bad.size:
        i = int(bad[0])
        cell = f"batch_size {cells.batch[i]:g}, draft_length {cells.gamma[i]}"
        raise ValueError(f"{name} {rule}, got {getattr(cells, name)[i]} at {cell}")


def merged(cells: SpeculationCells) -> SpeculationCells:
    """Cells measured more than once become their geometric mean; refuses those that disagree."""
    keys = np.column_stack([cells.batch, cells.gamma, np.nan_to_num(cells.context, nan=-1.0), cells.armed])
    unique, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    if len(unique) == cells.size:
        return cells
    inverse = inverse.reshape(-1)
    speed, length = np.empty(len(unique)), np.empty(len(unique))
    for i in range(len(unique)):
        rows = inverse == i
        mine = cells.tok_s_per_request[rows]
        if mine.max() > mine.min() * (1.0 + DISAGREEMENT):
            raise ValueError(
                f"cells of batch_size {unique[i, 0]:g}, draft_length {unique[i, 1]:g} must agree within "
                f"{DISAGREEMENT:.0%}, got tok_s_per_request {mine.min():g} and {mine.max():g}"
            )
        speed[i] = np.exp(np.log(mine).mean())
        known = cells.mean_acceptance_length[rows]
        known = known[np.isfinite(known)]
        length[i] = known.mean() if known.size else np.nan
    order = np.argsort(first)
    return SpeculationCells(
        batch=cells.batch[first][order],
        gamma=cells.gamma[first][order],
        tok_s_per_request=speed[order],
        mean_acceptance_length=length[order],
        context=cells.context[first][order],
        armed=cells.armed[first][order],
    )

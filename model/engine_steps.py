r"""Seconds of the steps of one engine that was measured: a line in what the step computes, with knees in its rows.

A step computes n rows (tokens) for B decoding sequences with K cached tokens in all, c prompt chunks, and p pairs of a
row and a key it looks at; it may make g passes of a drafter over m rows:

.. math::

    t = a + \sum_i b_i \min(\max(n - n_i, 0), n_{i+1} - n_i) + q [w \nmid n] + s B + \kappa K + \pi p + o c + d g + e m

a moves the weights; b_i is what a further row costs between the knots n_i (at first nothing, once arithmetic binds its
share of it); kernels compute tiles of w rows and another one those that fill no tile, so that q is paid where n is no
multiple of w (a step of 11 rows may cost more than one of 12); s host work and sampling; kappa reading of the cache; pi
arithmetic of attention; o a chunk's own passes. Every constant is 0 or more. Kernel sums from a datasheet
(:mod:`servecast.model.step_time`) foretell engines nobody has run; this form is for one that was, on its machine.

The record answers the simulator (`servecast.model.batch_steps.StepTimes`), the speculative one, and what chooses draft
lengths (`servecast.model.speculation_cost.SpeculationCost`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.batch_steps import Chunk
from servecast.model.prediction import Z90, Prediction

Floats = NDArray[np.float64]

FURTHER = ("edge_s", "sequence_s", "cached_token_s", "pair_s", "chunk_s", "draft_pass_s", "draft_row_s")
"""Constants after the base and the slopes, in the order of the features."""
ALWAYS = 1 << 40
"""Steps for which a line without knees in the cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What steps compute; arrays that broadcast together."""

    rows: ArrayLike
    sequences: ArrayLike = 0.0
    cached: ArrayLike = 0.0
    pairs: ArrayLike = 0.0
    chunks: ArrayLike = 0.0
    draft_passes: ArrayLike = 0.0
    draft_rows: ArrayLike = 0.0


def decode_work(batch: ArrayLike, context: ArrayLike, gamma: ArrayLike = 0.0, *, armed: bool = False) -> StepWork:
    """A step of `batch` sequences with `context` cached tokens each that verifies `gamma` drafts; draft passes in it.

    The drafter's first pass takes two tokens of every sequence, the others one; without a draft an armed engine makes
    the first pass all the same.
    """
    b, c, k = (np.asarray(one, dtype=np.float64) for one in (batch, context, gamma))
    rows = b * (k + 1.0)
    passes = np.where(k > 0.0, k, float(armed))
    return StepWork(
        rows=rows,
        sequences=b,
        cached=b * c,
        pairs=rows * (c + (k + 2.0) / 2.0),
        draft_passes=passes,
        draft_rows=b * (passes + 1.0) * (passes > 0.0),
    )


def with_chunk(work: StepWork, start: ArrayLike, end: ArrayLike) -> StepWork:
    """The same step with tokens `start` to `end` of a prompt in it; nothing where both are equal."""
    s, e = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
    return replace(
        work,
        rows=np.asarray(work.rows) + (e - s),
        pairs=np.asarray(work.pairs) + (e - s) * (e + s + 1.0) / 2.0,
        chunks=np.asarray(work.chunks) + (e > s),
    )


def features(knots: Sequence[float], work: StepWork, *, tile: int = 1) -> Floats:
    """What each constant is multiplied by: [..., 1 + len(knots) + 7]; the last slope goes on beyond the last knot."""
    parts = [work.rows, work.sequences, work.cached, work.pairs, work.chunks, work.draft_passes, work.draft_rows]
    rows, *further = np.broadcast_arrays(*(np.asarray(one, dtype=np.float64) for one in parts))
    ends = [*knots[1:], np.inf]
    slopes = [np.clip(rows - low, 0.0, high - low) for low, high in zip(knots, ends, strict=True)]
    computes = (rows > 0.0).astype(np.float64)
    edges = (np.mod(rows, tile) > 0.0).astype(np.float64)
    return np.stack([computes, *slopes, edges, *further], axis=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSteps:
    """Constants of the form above with their uncertainty; the methods answer simulators and solvers."""

    knots: tuple[float, ...]
    """n_i, the first is where rows begin to cost. [tokens]"""
    base_s: float
    row_s: tuple[float, ...]
    """b_i. [s]"""
    tile: int = 1
    """w. [tokens]"""
    edge_s: float = 0.0
    sequence_s: float = 0.0
    cached_token_s: float = 0.0
    pair_s: float = 0.0
    chunk_s: float = 0.0
    draft_pass_s: float = 0.0
    draft_row_s: float = 0.0
    first_token_s: float = 0.0
    """Per request outside the engine's steps. [s]"""
    covariance: Floats | None = None
    """Of all constants but the last, in the order of `features`; None: unknown. [s^2]"""
    log_sd: float = 0.0
    """Standard deviation of log(measured / predicted) on points that the fit had not seen. [-]"""
    log_scale_sd: float = 0.0
    """Of the machine's pace between one run and the next. [-]"""
    ranges: tuple[tuple[str, float, float], ...] = ()
    """Name, least and most of what was measured: rows, sequences, cached tokens of a sequence."""

    def __post_init__(self) -> None:
        if not self.knots or len(self.knots) != len(self.row_s) or any(np.diff(self.knots) <= 0.0):
            raise ValueError(f"knots must increase, one for each row_s, got {self.knots} and {len(self.row_s)} slopes")
        if self.tile < 1:
            raise ValueError(f"tile must be >= 1, got {self.tile}")
        for name, value in (("base_s", self.base_s), *((name, getattr(self, name)) for name in FURTHER)):
            if not (np.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if not all(np.isfinite(one) and one >= 0.0 for one in self.row_s):
            raise ValueError(f"row_s must be finite and >= 0, got {self.row_s}")

    @property
    def constants(self) -> Floats:
        """In the order of `features`. [s]"""
        return np.array([self.base_s, *self.row_s, *(getattr(self, name) for name in FURTHER)])

    def seconds(self, work: StepWork) -> Floats:
        """t. [s]"""
        return np.asarray(features(self.knots, work, tile=self.tile) @ self.constants)

    def predict(self, work: StepWork) -> Prediction:
        """One step with the 90 % interval of a measurement on another day; `calibrated` inside what was measured."""
        x = features(self.knots, work, tile=self.tile)
        value = float(x @ self.constants)
        own = 0.0 if self.covariance is None else float(x @ self.covariance @ x) / value**2
        sd = float(np.sqrt(own + self.log_sd**2 + self.log_scale_sd**2))
        return Prediction(
            value=value, lo=value * np.exp(-Z90 * sd), hi=value * np.exp(Z90 * sd), calibrated=self.inside(work)
        )

    def inside(self, work: StepWork) -> bool:
        """Whether rows and sequences lie within what was measured."""
        rows, sequences, cached = (float(np.max(one)) for one in (work.rows, work.sequences, work.cached))
        given = {"rows": rows, "sequences": sequences}
        if sequences:
            given["context"] = cached / sequences
        return all(low <= given.get(name, low) <= high for name, low, high in self.ranges)

    # ---- what the simulators ask ---------------------------------------------------------------------

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:
        """See `servecast.model.batch_steps.StepTimes`."""
        slope = self.cached_token_s + self.pair_s
        now = self._of_rows(batch) + self.sequence_s * batch + self.pair_s * batch + slope * cached
        return now, slope, ALWAYS

    def mixed(self, chunks: Sequence[Chunk], finishing: int, batch: int, cached: int) -> float:  # noqa: ARG002 (a sampled row costs nothing here)
        """See `servecast.model.batch_steps.StepTimes`."""
        rows, pairs = batch, float(batch + cached)
        for start, end in chunks:
            rows += end - start
            pairs += (end - start) * (end + start + 1) / 2.0
        seconds = self._of_rows(rows) + self.sequence_s * batch + self.cached_token_s * cached
        return seconds + self.pair_s * pairs + self.chunk_s * len(chunks)

    def _of_rows(self, rows: int) -> float:
        """a, the b terms and q; plain floats, a simulator asks hundreds of thousands of times."""
        seconds = self.base_s + self.edge_s * (rows % self.tile > 0)
        for i, slope in enumerate(self.row_s):
            low = self.knots[i]
            if rows <= low:
                break
            high = self.knots[i + 1] if i + 1 < len(self.knots) else rows
            seconds += slope * (min(rows, high) - low)
        return seconds

    def prefill(self, tokens: int) -> float:
        """A prompt of `tokens` alone. [s]"""
        return self.mixed([(0, tokens)], 1, 0, 0)

    # ---- what the choice of a draft length asks ------------------------------------------------------

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> Floats:
        """See `servecast.model.speculation_cost.SpeculationCost`."""
        n, b, c = (np.asarray(one, dtype=np.float64) for one in (rows, requests, context))
        return self.seconds(StepWork(rows=n, sequences=b, cached=b * c, pairs=n * (c + (n / b + 1.0) / 2.0)))

    def draft(self, requests: ArrayLike, gamma: ArrayLike, context: ArrayLike) -> Floats:
        """See `servecast.model.speculation_cost.SpeculationCost`."""
        b, k = np.asarray(requests, dtype=np.float64), np.asarray(gamma, dtype=np.float64)
        seconds = self.draft_pass_s * k + self.draft_row_s * b * (k + 1.0) * (k > 0.0)
        return np.asarray(seconds + 0.0 * np.asarray(context, dtype=np.float64))

    def idle(self, requests: ArrayLike, context: ArrayLike) -> Floats:
        """See `servecast.model.speculation_cost.SpeculationCost`."""
        b = np.asarray(requests, dtype=np.float64)
        return np.asarray(self.draft_pass_s + 2.0 * self.draft_row_s * b + 0.0 * np.asarray(context))

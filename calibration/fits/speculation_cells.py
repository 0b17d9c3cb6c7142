r"""A cost model and tokens per step from measured cells of a draft-length sweep.

A cell shows speed only, tokens per step over seconds per step:

.. math::
   \ln y &= \ln A(\gamma) - \ln T(B, \gamma) + u(B) + e \\
   A(\gamma) &= e^{w_\gamma} \Big(1 + \sum_{j \le \gamma} \prod_{i \le j} \min(a r^{i - 1}, 1)\Big)

with T of :mod:`servecast.model.speculation_cost` and A a drafter whose conditional acceptance falls by a factor r per
position. w is a random walk over draft lengths (what an engine's drafter does that this form does not), u a smooth
deviation over log2 B (kernel and graph choices change with the batch, for all draft lengths alike), e the noise of one
run. Lengths that were measured apart enter as observations of A. Speed alone tells A and T apart only through cells
without speculation; their product is what is predicted, and the single parameters are reported with standard errors
that say so.

Three forms of T are fitted and averaged, weighted by how well each explains the cells: no form wins on every sweep,
and extrapolations differ by more than any form's own error. Priors are weak and stated in
:mod:`servecast.calibration.fits.sweep_problem`; they were chosen once, by held-out error over four public sweeps (docs,
speculation), not per sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.calibration.fits.sweep_problem import (
    FORMS,
    INFLATION,
    NAMES,
    NOISE,
    FormFit,
    HeldOut,
    Query,
    SweepProblem,
    mixture,
    quadratic,
)
from servecast.model.prediction import Z90
from servecast.model.speculation_cells import SpeculationCells, merged
from servecast.model.speculation_cost import FormulaCost

__all__ = [
    "NAMES",
    "CellsFit",
    "CellsPrediction",
    "Cliff",
    "FormFit",
    "HeldOut",
    "Query",
    "fit_cells",
    "suggested_cells",
]

Floats = NDArray[np.float64]

LEAST_CELLS, MOST_CELLS = 4, 1000
"""What a fit takes: time grows with the square of the cells, and with the batch sizes to leave out."""
CLIFF_ROWS, CLIFF_SCORE, CLIFF_SHARE = 512.0, 3.0, 0.1
"""A cliff is looked for at the cell of most rows, from so many on: it is one where the cell is slower than the others
foretell by so many standard deviations and by more than this share. Engines run eagerly above their captured sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellsPrediction:
    """Decode speed of one request: the middle of its distribution, its log standard deviation, a 90 % interval."""

    tok_s_per_request: Floats
    sd: Floats
    """Of the log. [-]"""
    lo: Floats
    hi: Floats
    inside: NDArray[np.bool_]
    """Batch, draft length and rows lie within the measured cells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cliff:
    """A step that takes `factor` times as long as its rows foretell, from somewhere above `below` rows on."""

    below: float
    """Most rows of a cell that is not over the edge. [tokens]"""
    rows: float
    """Of the cell that is. [tokens]"""
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CellsFit:
    """Three forms, their weights and what they leave."""

    cells: SpeculationCells
    members: tuple[FormFit, ...]
    max_length: int
    reference_context: float
    """Mean of the measured contexts, which an unknown one stands for; 0 where none is known. [tokens]"""
    has_context: bool
    """Cells of differing contexts were measured: T has a cache term, 0 at no context."""
    has_idle: bool
    heldout: HeldOut | None
    """None with fewer than three batch sizes."""
    inflation: float
    """Factor on the standard deviations of predictions. [-]"""
    dropped: tuple[str, ...]
    """Cells that were left out, one line each."""
    cliff: Cliff | None = None

    def predict(
        self, batch: ArrayLike, gamma: ArrayLike, context: ArrayLike | None = None, *, armed: bool = False
    ) -> CellsPrediction:
        """Speed at (batch, gamma, context), arrays that broadcast together; `armed` as in `step_seconds`.

        The interval is that of a measurement, its own noise included.
        """
        at = np.nan if context is None else context
        b, k, c = np.broadcast_arrays(*(np.asarray(one, dtype=np.float64) for one in (batch, gamma, at)))
        _require_rule("batch", b, (b >= 1.0) & np.isfinite(b), "finite and >= 1")
        _require_rule("gamma", k, (k >= 0.0) & (k <= self.max_length) & (k % 1.0 == 0.0), f"0 to {self.max_length}")
        _require_rule("context", c, np.isnan(c) | ((c >= 0.0) & np.isfinite(c)), "finite and >= 0")
        lengths = k.astype(np.int64)
        query = Query(batch=b.ravel(), gamma=lengths.ravel(), context=c.ravel(), armed=(lengths.ravel() == 0) & armed)
        mean, sd = self._blend([(m, v) for m, _, v in self._each(query)])
        return CellsPrediction(
            tok_s_per_request=np.exp(mean).reshape(b.shape),
            sd=sd.reshape(b.shape),
            lo=np.exp(mean - Z90 * sd).reshape(b.shape),
            hi=np.exp(mean + Z90 * sd).reshape(b.shape),
            inside=self.inside(b, k),
        )

    def predict_grid(self, query: Query, width: int) -> tuple[Floats, Floats, Floats]:
        """Log speeds of `query`, their standard deviation without run noise, and that of each over the fastest.

        Consecutive groups of `width` cells are compared with the fastest of their group: what they share cancels, so
        of two lengths at one batch the ratio is known much better than either speed. Cells after the last whole group
        are compared with themselves.
        """
        each = self._each(query)
        mean, sd = self._blend([(m, v - NOISE**2) for m, _, v in each])
        whole = mean.size // width * width
        first = mean[:whole].reshape(-1, width).argmax(axis=1) + np.arange(0, whole, width)
        best = np.append(np.repeat(first, width), np.arange(whole, mean.size))
        pairs = []
        for member, (value, slopes, _) in zip(self.members, each, strict=True):
            apart = slopes - slopes[best]
            pairs.append((value - value[best], quadratic(apart, member.covariance)))
        return mean, sd, self._blend(pairs)[1]

    def leading_form(self, query: Query) -> tuple[Floats, Floats, Floats]:
        """Log speeds of the form of most weight, their slopes by its parameters, and the parameters' covariance."""
        i = int(np.argmax([member.weight for member in self.members]))
        mean, slopes, _ = self._each(query)[i]
        return mean, slopes, self.members[i].covariance

    def _each(self, query: Query) -> list[tuple[Floats, Floats, Floats]]:
        problem = SweepProblem(self.cells, self.max_length)
        found = [problem.predict(member, query) for member in self.members]
        if self.cliff is None:
            return found
        over = np.log(self.cliff.factor) * (query.batch * (query.gamma + 1.0) >= self.cliff.rows)
        return [(mean - over, slopes, variance) for mean, slopes, variance in found]

    def _blend(self, pairs: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        """Weighted mean over the forms, and the standard deviation with what they differ by."""
        weights = np.array([member.weight for member in self.members])
        mean, variance = mixture(weights, pairs)
        return mean, self.inflation * np.sqrt(variance)

    def inside(self, batch: ArrayLike, gamma: ArrayLike) -> NDArray[np.bool_]:
        """Whether (batch, gamma) lies among the measured cells."""
        cells, b, k = self.cells, np.asarray(batch, dtype=np.float64), np.asarray(gamma, dtype=np.float64)
        rows = cells.batch * (cells.gamma + 1.0)
        return np.asarray(
            (b >= cells.batch.min())
            & (b <= cells.batch.max())
            & (k <= cells.gamma.max())
            & (k >= cells.gamma.min())
            & (b * (k + 1.0) <= rows.max())
        )

    def mean_acceptance_length(self) -> Floats:
        """A by draft length, 0 to `max_length`, weighted over the forms. [tokens]"""
        problem = SweepProblem(self.cells, self.max_length)
        logs = [member.weight * problem.log_lengths(member.theta) for member in self.members]
        return np.asarray(np.exp(np.sum(logs, axis=0)))

    def length_sd(self) -> Floats:
        """Standard deviation of ln A by draft length: how far speed alone, or measured lengths, tell A from T. [-]"""
        problem = SweepProblem(self.cells, self.max_length)
        pairs = []
        for member in self.members:
            steps = 1e-6 * np.maximum(np.abs(member.theta), 1.0)
            around = problem.log_lengths(np.vstack([member.theta, member.theta + np.diag(steps)]))
            slopes = ((around[1:] - around[0]) / steps[:, np.newaxis]).T
            pairs.append((around[0], quadratic(slopes, member.covariance)))
        return self._blend(pairs)[1]

    @property
    def tells_tokens_from_seconds(self) -> bool:
        """Some cell without speculation, or some measured mean acceptance length: else only their quotient is known."""
        drafted = self.cells.gamma > 0
        plain = bool((~drafted & ~self.cells.armed).any())
        return plain or bool(np.isfinite(self.cells.mean_acceptance_length[drafted]).any())

    @property
    def knows_no_speculation(self) -> bool:
        """Some cell was measured with speculation switched off."""
        return bool(((self.cells.gamma == 0) & ~self.cells.armed).any())

    def cost(self) -> FormulaCost:
        """T of the form that explains the cells best."""
        best = max(self.members, key=lambda member: member.weight)
        return best.seconds(has_context=self.has_context, has_idle=self.has_idle)


def fit_cells(
    cells: SpeculationCells, *, max_length: int | None = None, hold_out: bool = True, few: bool = False
) -> CellsFit:
    """Fit of a sweep, for draft lengths up to `max_length` or the longest measured.

    `few` takes cells that cannot carry a fit by themselves (one draft length with its acceptance and a baseline, say):
    the priors then decide the rest. Without it such cells are refused, with those to measure next.
    """
    missing = np.flatnonzero(np.isnan(cells.tok_s_per_request))
    if missing.size:
        i = int(missing[0])
        cell = f"batch_size {cells.batch[i]:g}, draft_length {cells.gamma[i]}"
        raise ValueError(f"tok_s_per_request must be measured in every cell to fit, got none at {cell}")
    cells = merged(cells)
    if cells.size > MOST_CELLS:
        raise ValueError(f"cells must be at most {MOST_CELLS} different ones to fit, got {cells.size}")
    cells, dropped = _comparable(cells)
    if not few or not cells.size:
        _require_enough(cells)
    longest = max(int(cells.gamma.max()), max_length or 0)
    cliff = _cliff(cells, longest)
    if cliff is not None:
        cells = cells.take(cells.batch * (cells.gamma + 1.0) < cliff.rows)
        dropped += (
            f"a step of {cliff.rows:g} rows takes {cliff.factor:.2f} times what the others foretell: taken as a cliff, "
            f"somewhere above {cliff.below:g} rows, such as the engine's largest captured graph",
        )
    problem = SweepProblem(cells, longest)
    members = problem.members([problem.solve(form) for form in FORMS])
    heldout = problem.held_out(members) if hold_out and np.unique(cells.batch).size >= 3 else None
    return CellsFit(
        cells=cells,
        members=members,
        max_length=longest,
        reference_context=problem.reference_context,
        has_context=problem.has_context,
        has_idle=problem.has_idle,
        heldout=heldout,
        inflation=INFLATION if heldout is None else heldout.inflation,
        dropped=dropped,
        cliff=cliff,
    )


def _cliff(cells: SpeculationCells, longest: int) -> Cliff | None:
    """The cell of most rows, where the others foretell a much faster one."""
    rows = cells.batch * (cells.gamma + 1.0)
    top = rows == rows.max()
    if rows.max() < CLIFF_ROWS or top.sum() > 1 or cells.size <= 2 * LEAST_CELLS:
        return None
    rest = cells.take(~top)
    problem = SweepProblem(rest, longest)
    members = problem.members([problem.solve(form) for form in FORMS])
    query = Query(batch=cells.batch[top], gamma=cells.gamma[top], context=cells.context[top], armed=cells.armed[top])
    pairs = [(mean, variance) for mean, _, variance in (problem.predict(member, query) for member in members)]
    mean, variance = mixture(np.array([member.weight for member in members]), pairs)
    ahead = float(mean[0] - np.log(cells.tok_s_per_request[top][0]))
    if ahead <= max(CLIFF_SCORE * INFLATION * float(variance[0]) ** 0.5, np.log1p(CLIFF_SHARE)):
        return None
    return Cliff(below=float(rows[~top].max()), rows=float(rows.max()), factor=float(np.exp(ahead)))


def _require_rule(name: str, values: Floats, good: NDArray[np.bool_], rule: str) -> None:
    if not good.all():
        raise ValueError(f"{name} must be {rule}, got {values[~good][0]:g}")


def _comparable(cells: SpeculationCells) -> tuple[SpeculationCells, tuple[str, ...]]:
    """Without baselines whose plain step takes longer than a whole speculative one of the same batch.

    A speculative step contains a plain one, so such a baseline was run under other conditions.
    """
    step = cells.mean_acceptance_length / cells.tok_s_per_request
    plain = (cells.gamma == 0) & ~cells.armed
    dropped: list[str] = []
    kept = np.ones(cells.size, dtype=np.bool_)
    context = np.nan_to_num(cells.context, nan=-1.0)
    for i in np.flatnonzero(plain):
        alike = (cells.batch == cells.batch[i]) & (context == context[i])
        rivals = step[alike & (cells.gamma > 0) & np.isfinite(step)]
        if rivals.size and 1.0 / cells.tok_s_per_request[i] > rivals.min():
            kept[i] = False
            dropped.append(
                f"batch_size {cells.batch[i]:g} without speculation takes {1e3 / cells.tok_s_per_request[i]:.4g} ms a "
                f"step, longer than a speculative step's {1e3 * rivals.min():.4g} ms: not the same conditions, left out"
            )
    return (cells.take(kept), tuple(dropped)) if dropped else (cells, ())


def _require_enough(cells: SpeculationCells) -> None:
    batches, lengths = np.unique(cells.batch).size, np.unique(cells.gamma).size
    if cells.size < LEAST_CELLS or lengths < 2:
        raise ValueError(
            f"cells must be at least {LEAST_CELLS} with 2 draft lengths, got {cells.size} with {lengths}; "
            f"measure {suggested_cells(cells)}"
        )
    if batches > 1 and cells.size < batches + lengths - 1:
        raise ValueError(
            f"cells must tell batch size from draft length, got {cells.size} cells for {batches} batch sizes and "
            f"{lengths} draft lengths; measure {suggested_cells(cells)}"
        )
    if (parts := _parts(cells)) > 1:
        raise ValueError(
            f"cells must be linked by shared batch sizes and draft lengths, got {parts} groups that share neither; "
            f"measure {suggested_cells(cells)}"
        )


def _parts(cells: SpeculationCells) -> int:
    """Groups of cells without a batch size or a draft length in common: nothing says how their speeds compare."""
    keys = [np.unique(values, return_inverse=True)[1].reshape(-1) for values in (cells.batch, cells.gamma)]
    group = np.arange(cells.size)
    for _ in range(cells.size):
        before = group
        for key in keys:
            least = np.full(int(key.max()) + 1, cells.size)
            np.minimum.at(least, key, group)
            group = least[key]
        if (group == before).all():
            break
    return int(np.unique(group).size)


def suggested_cells(cells: SpeculationCells, count: int = 3) -> str:
    """The corners of the plane of batch and draft length that are missing, in words."""
    have = {(float(b), int(k)) for b, k in zip(cells.batch, cells.gamma, strict=True)}
    low, high = (float(cells.batch.min()), float(cells.batch.max())) if cells.size else (1.0, 64.0)
    high = high if high > low else 16.0 * low
    wanted = [(low, 0), (high, 0), (low, 3), (high, 3), (float(np.round(np.sqrt(low * high))), 3), (low, 5), (high, 5)]
    missing = [(b, k) for b, k in dict.fromkeys(wanted) if (b, k) not in have][:count]
    return ", ".join(f"(batch_size {b:g}, draft_length {k})" for b, k in missing)

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
and extrapolations differ by more than any form's own error. Priors are weak and stated in `PRIOR`; they were chosen
once, by held-out error over four public sweeps (docs, speculation), not per sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.least_squares import Solved, minimise
from servecast.model.speculation_cells import SpeculationCells, merged
from servecast.model.speculation_cost import FormulaCost, RowForm, rise

Floats = NDArray[np.float64]

NAMES = (
    "base_s",
    "rise_share",
    "rise_rows",
    "row_share",
    "request_share",
    "round_share",
    "draft_share",
    "acceptance",
    "decay",
)
"""Parameters of T relative to a, then a and r; logarithms but for the last two (logit of a, r itself)."""
PRIOR = np.array(
    [[-0.5, 1.5], [3.7, 1.2], [-5.2, 0.8], [-6.0, 0.7], [-2.0, 1.5], [-4.5, 0.8], [1.5, 0.5], [0.95, 0.03]]
)
"""Mean and standard deviation of every parameter but a: a step's rise is of the order of its base, spread over 40 rows
(E / t of a mixture of experts); a further row costs 0.6 % of the base, a further request 0.25 %, a round that drafts
14 %, a draft position 1 %; a first token is accepted at 0.82; r lies between 0.92 and 0.98 on open acceptance curves.
"""
WALK = 0.03
"""Standard deviation of one step of w. [-]"""
BATCH_SD, BATCH_REACH = 0.02, 1.0
"""Standard deviation of u, and the distance in log2 B over which it is alike. [-]"""
NOISE = 0.0125
"""Standard deviation of e. [-]"""
LENGTH_NOISE = 0.01
"""Relative standard deviation of a measured mean acceptance length. [-]"""
TEMPER = 10.0
"""Weights of the forms are exp(-cost / TEMPER): a likelihood, tempered since cells of one sweep are not independent."""
INFLATION, INFLATION_BATCHES = 1.25, 4.0
"""Predictions are wider than the fit's own standard deviations by a factor: this one, counted as so many batch sizes,
averaged with what the sweep's own left-out batch sizes show."""
Z90 = 1.6449
CONTEXT_PRIOR = (-6.5, 1.5)
"""Log of the share of a that 1,000 cached tokens of one request cost, mean and standard deviation."""
IDLE_PRIOR = (-3.0, 1.2)
"""Log of the share of a that an armed step of length 0 costs."""
LEAST_CELLS, MOST_CELLS = 4, 1000
"""What a fit takes: time grows with the square of the cells, and with the batch sizes to leave out."""
CLIFF_ROWS, CLIFF_SCORE, CLIFF_SHARE = 512.0, 3.0, 0.1
"""A cliff is looked for at the cell of most rows, from so many on: it is one where the cell is slower than the others
foretell by so many standard deviations and by more than this share. Engines run eagerly above their captured sizes."""
FORMS = tuple(RowForm)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormFit:
    """One form of T with its A."""

    form: RowForm
    theta: Floats
    """In the order of NAMES, then context and idle shares where fitted, then the steps of w."""
    covariance: Floats
    cost: float
    weight: float
    residuals: Floats
    """Log of measured over fitted, without u. [-]"""

    def seconds(self, *, has_context: bool, has_idle: bool) -> FormulaCost:
        """T with the fitted numbers."""
        base = float(np.exp(self.theta[0]))
        share = base * np.exp(self.theta)
        extra = len(NAMES)
        return FormulaCost(
            form=self.form,
            base_s=base,
            rise_s=float(share[1]),
            rise_rows=float(np.exp(self.theta[2])),
            row_s=float(share[3]),
            request_s=float(share[4]),
            round_s=float(share[5]),
            draft_s=float(share[6]),
            cached_token_s=float(share[extra]) / 1000.0 if has_context else 0.0,
            idle_s=float(share[extra + has_context]) if has_idle else None,
        )


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
class HeldOut:
    """Every batch size left out in turn and predicted from the others."""

    batch: Floats
    mape: Floats
    """Mean absolute error of a batch's cells. [-]"""
    error: Floats
    """Per cell, predicted over measured - 1. [-]"""
    covered: NDArray[np.bool_]
    """Measured value inside the 90 % interval, per cell."""
    outside: NDArray[np.bool_]
    """The batch was the smallest or largest: predicting it is an extrapolation, per cell."""
    inflation: float
    """By how much standard deviations have to grow to be those of the errors, shrunk towards INFLATION. [-]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cliff:
    """A step that takes `factor` times as long as its rows foretell, from somewhere above `below` rows on."""

    below: float
    """Most rows of a cell that is not over the edge. [tokens]"""
    rows: float
    """Of the cell that is. [tokens]"""
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Cells to predict, flat arrays of one size; context NaN is that of the measured cells."""

    batch: Floats
    gamma: NDArray[np.int64]
    context: Floats
    armed: NDArray[np.bool_]


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
        self, batch: Floats, gamma: Floats, context: Floats | float | None = None, *, armed: bool = False
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
            pairs.append((value - value[best], _quadratic(apart, member.covariance)))
        return mean, sd, self._blend(pairs)[1]

    def _each(self, query: Query) -> list[tuple[Floats, Floats, Floats]]:
        problem = _Problem(self.cells, self.max_length)
        found = [problem.predict(member, query) for member in self.members]
        if self.cliff is None:
            return found
        over = np.log(self.cliff.factor) * (query.batch * (query.gamma + 1.0) >= self.cliff.rows)
        return [(mean - over, slopes, variance) for mean, slopes, variance in found]

    def _blend(self, pairs: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        """Weighted mean over the forms, and the standard deviation with what they differ by."""
        weights = np.array([member.weight for member in self.members])
        mean, variance = _mixture(weights, pairs)
        return mean, self.inflation * np.sqrt(variance)

    def inside(self, batch: Floats, gamma: Floats) -> NDArray[np.bool_]:
        """Whether (batch, gamma) lies among the measured cells."""
        cells = self.cells
        rows = cells.batch * (cells.gamma + 1.0)
        return np.asarray(
            (batch >= cells.batch.min())
            & (batch <= cells.batch.max())
            & (gamma <= cells.gamma.max())
            & (gamma >= cells.gamma.min())
            & (batch * (gamma + 1.0) <= rows.max())
        )

    def mean_acceptance_length(self) -> Floats:
        """A by draft length, 0 to `max_length`, weighted over the forms. [tokens]"""
        problem = _Problem(self.cells, self.max_length)
        logs = [member.weight * problem.log_lengths(member.theta) for member in self.members]
        return np.asarray(np.exp(np.sum(logs, axis=0)))

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
    problem = _Problem(cells, longest)
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
    problem = _Problem(rest, longest)
    members = problem.members([problem.solve(form) for form in FORMS])
    query = Query(batch=cells.batch[top], gamma=cells.gamma[top], context=cells.context[top], armed=cells.armed[top])
    pairs = [(mean, variance) for mean, _, variance in (problem.predict(member, query) for member in members)]
    mean, variance = _mixture(np.array([member.weight for member in members]), pairs)
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


def suggested_cells(cells: SpeculationCells, count: int = 3) -> str:
    """The corners of the plane of batch and draft length that are missing, in words."""
    have = {(float(b), int(k)) for b, k in zip(cells.batch, cells.gamma, strict=True)}
    low, high = (float(cells.batch.min()), float(cells.batch.max())) if cells.size else (1.0, 64.0)
    high = high if high > low else 16.0 * low
    wanted = [(low, 0), (high, 0), (low, 3), (high, 3), (float(np.round(np.sqrt(low * high))), 3), (low, 5), (high, 5)]
    missing = [(b, k) for b, k in dict.fromkeys(wanted) if (b, k) not in have][:count]
    return ", ".join(f"(batch_size {b:g}, draft_length {k})" for b, k in missing)


class _Problem:
    """Residuals of one sweep for stacks of parameters."""

    def __init__(self, cells: SpeculationCells, longest: int) -> None:
        self.cells, self.longest = cells, longest
        known = cells.context[np.isfinite(cells.context)]
        self.reference_context = float(known.mean()) if known.size else 0.0
        self.has_context = bool(known.size and np.ptp(known) > 0.05 * known.mean())
        self.has_idle = bool(cells.armed.any())
        self._measured = np.flatnonzero(np.isfinite(cells.mean_acceptance_length) & (cells.gamma > 0))
        self._log_speed = np.log(cells.tok_s_per_request)
        self._log_length = np.log(cells.mean_acceptance_length[self._measured])
        self._covariance = _batch_covariance(cells.batch, cells.batch) + NOISE**2 * np.eye(cells.size)
        self._query = Query(batch=cells.batch, gamma=cells.gamma, context=cells.context, armed=cells.armed)
        extra = [CONTEXT_PRIOR] * self.has_context + [IDLE_PRIOR] * self.has_idle
        walk = [(0.0, WALK)] * longest
        self._prior = np.array([*PRIOR.tolist(), *extra, *walk])

    def log_lengths(self, theta: Floats) -> Floats:
        """ln A by draft length [..., longest + 1]."""
        first = 1.0 / (1.0 + np.exp(-theta[..., 7:8]))
        decay = theta[..., 8:9]
        positions = np.arange(self.longest)
        survival = np.cumprod(np.clip(first * decay**positions, 0.0, 1.0), axis=-1)
        walk = np.cumsum(theta[..., theta.shape[-1] - self.longest :], axis=-1)
        logs = np.log1p(np.cumsum(survival, axis=-1)) + walk
        return np.concatenate([np.zeros((*theta.shape[:-1], 1)), logs], axis=-1)

    def log_speeds(self, form: RowForm, theta: Floats, query: Query, lengths: Floats | None = None) -> Floats:
        """ln y without u, [..., cell]; `lengths` are `log_lengths`, where known."""
        lengths = self.log_lengths(theta) if lengths is None else lengths
        base, share, tau, row, request, once, draft = (theta[..., i : i + 1] for i in range(7))
        rows = query.batch * (query.gamma + 1.0)
        relative = 1.0 + np.exp(share) * rise(form, rows, np.exp(tau)) + np.exp(row) * rows
        relative = relative + np.exp(request) * query.batch
        relative = relative + np.exp(once) * (query.gamma > 0) + np.exp(draft) * query.gamma
        extra = len(NAMES)
        if self.has_context:
            # from no context on, not from the reference: T stays positive wherever it is asked for
            cached = np.where(np.isfinite(query.context), query.context, self.reference_context) / 1000.0
            relative = relative + np.exp(theta[..., extra : extra + 1]) * query.batch * cached
            extra += 1
        if query.armed.any():
            # one round's share where no armed cell was measured
            idle = np.exp(theta[..., extra : extra + 1]) if self.has_idle else np.exp(once)
            relative = relative + idle * query.armed
        return np.asarray(lengths[..., query.gamma] - base - np.log(relative))

    def solve(self, form: RowForm) -> Solved:
        """Optimum from several starts, the best one kept."""
        starts = np.array([self._start(tau) for tau in (2.5, 4.0, 5.5)])
        whitening = np.broadcast_to(
            self._whitening(np.ones(self.cells.size, dtype=np.bool_)), (3, *self._covariance.shape)
        )
        solved = minimise(lambda theta: self._residuals(form, theta, whitening), starts)
        i = int(np.argmin(solved.cost))
        return _only(solved, i)

    def members(self, solved: Sequence[Solved]) -> tuple[FormFit, ...]:
        """Fits with weights, of one solution per form."""
        costs = np.array([float(one.cost[0]) for one in solved])
        weights = np.exp(-(costs - costs.min()) / TEMPER)
        weights /= weights.sum()
        return tuple(
            FormFit(
                form=form,
                theta=one.parameters[0],
                covariance=np.linalg.inv(one.jacobian[0].T @ one.jacobian[0]),
                cost=float(costs[i]),
                weight=float(weights[i]),
                residuals=self._log_speed - self.log_speeds(form, one.parameters[0], self._query),
            )
            for i, (form, one) in enumerate(zip(FORMS, solved, strict=True))
        )

    def predict(
        self, member: FormFit, query: Query, kept: NDArray[np.bool_] | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """Mean of ln y at `query` from the cells `kept` (universal kriging of u), its slopes, its variance."""
        rows = np.flatnonzero(np.ones(self.cells.size, dtype=np.bool_) if kept is None else kept)
        own = Query(
            batch=self.cells.batch[rows],
            gamma=self.cells.gamma[rows],
            context=self.cells.context[rows],
            armed=self.cells.armed[rows],
        )
        towards = _batch_covariance(query.batch, own.batch) @ np.linalg.inv(self._covariance[np.ix_(rows, rows)])
        at, slopes = self._with_slopes(member.form, member.theta, query)
        here, own_slopes = self._with_slopes(member.form, member.theta, own)
        mean = at + towards @ (self._log_speed[rows] - here)
        net = slopes - towards @ own_slopes
        variance = _quadratic(net, member.covariance) + NOISE**2 + BATCH_SD**2
        variance -= np.einsum("nm,nm->n", towards, _batch_covariance(query.batch, own.batch))
        return mean, net, variance

    def held_out(self, members: tuple[FormFit, ...]) -> HeldOut:
        """Leave one batch size out; every form, all folds at once."""
        batches = np.unique(self.cells.batch)
        keeps = [self.cells.batch != one for one in batches]
        whitening = np.array([self._whitening(keep) for keep in keeps])
        refits = []
        for member in members:
            starts = np.repeat(member.theta[np.newaxis], batches.size, axis=0)
            form = member.form
            refits.append(minimise(lambda theta, form=form: self._residuals(form, theta, whitening), starts))
        size = self.cells.size
        error, score = np.empty(size), np.empty(size)
        for fold, keep in enumerate(keeps):
            out = ~keep
            fitted = self.members([_only(one, fold) for one in refits])
            query = Query(
                batch=self.cells.batch[out],
                gamma=self.cells.gamma[out],
                context=self.cells.context[out],
                armed=self.cells.armed[out],
            )
            pairs = [(m, v) for m, _, v in (self.predict(member, query, keep) for member in fitted)]
            mean, variance = _mixture(np.array([member.weight for member in fitted]), pairs)
            sd = np.sqrt(variance)
            error[out] = np.expm1(mean - self._log_speed[out])
            score[out] = (mean - self._log_speed[out]) / sd
        outside = (self.cells.batch == batches[0]) | (self.cells.batch == batches[-1])
        # cells of one batch err together, so a batch counts once
        squares = [float((score[self.cells.batch == one] ** 2).mean()) for one in batches]
        total = INFLATION_BATCHES * INFLATION**2 + sum(squares)
        inflation = float(np.sqrt(total / (INFLATION_BATCHES + batches.size)))
        return HeldOut(
            batch=batches,
            mape=np.array([np.abs(error[self.cells.batch == one]).mean() for one in batches]),
            error=error,
            covered=np.abs(score) <= Z90 * inflation,
            outside=outside,
            inflation=inflation,
        )

    def _with_slopes(self, form: RowForm, theta: Floats, query: Query) -> tuple[Floats, Floats]:
        steps = 1e-6 * np.maximum(np.abs(theta), 1.0)
        around = np.vstack([theta, theta + np.diag(steps)])
        values = self.log_speeds(form, around, query)
        return values[0], ((values[1:] - values[0]) / steps[:, np.newaxis]).T

    def _start(self, log_tau: float) -> Floats:
        theta = np.concatenate([[0.0], self._prior[:, 0]])
        theta[2] = log_tau
        theta[0] = np.log(1.0 / self.cells.tok_s_per_request.max())
        return theta

    def _whitening(self, kept: NDArray[np.bool_]) -> Floats:
        """Inverse Cholesky factor of the kept cells' covariance, zero for the others."""
        rows = np.flatnonzero(kept)
        out = np.zeros_like(self._covariance)
        out[np.ix_(rows, rows)] = np.linalg.inv(np.linalg.cholesky(self._covariance[np.ix_(rows, rows)]))
        return out

    def _residuals(self, form: RowForm, theta: Floats, whitening: Floats) -> Floats:
        log_lengths = self.log_lengths(theta)
        raw = self.log_speeds(form, theta, self._query, log_lengths) - self._log_speed
        stacked = raw[:, np.newaxis] if raw.ndim == 2 else raw
        white = (stacked @ np.swapaxes(whitening, 1, 2)).reshape(raw.shape)
        prior = (theta[..., 1:] - self._prior[:, 0]) / self._prior[:, 1]
        lengths = log_lengths[..., self.cells.gamma[self._measured]] - self._log_length
        return np.concatenate([white, prior, lengths / LENGTH_NOISE], axis=-1)


def _batch_covariance(first: Floats, second: Floats) -> Floats:
    # a table asks for thousands of cells of a few dozen batch sizes
    sizes, back = np.unique(first, return_inverse=True)
    apart = np.log2(sizes)[:, np.newaxis] - np.log2(second)
    return np.asarray((BATCH_SD**2 * np.exp(-0.5 * (apart / BATCH_REACH) ** 2))[back.reshape(-1)])


def _quadratic(slopes: Floats, covariance: Floats) -> Floats:
    """Variance of each row of `slopes` [n, p]."""
    return np.asarray(((slopes @ covariance) * slopes).sum(axis=1))


def _mixture(weights: Floats, pairs: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Mean and variance of a mixture of normals, cell by cell."""
    means, variances = np.array([m for m, _ in pairs]), np.array([v for _, v in pairs])
    mean = weights @ means
    return mean, weights @ (variances + (means - mean) ** 2)


def _only(solved: Solved, i: int) -> Solved:
    at = slice(i, i + 1)
    return Solved(
        parameters=solved.parameters[at],
        cost=solved.cost[at],
        jacobian=solved.jacobian[at],
        converged=solved.converged[at],
    )

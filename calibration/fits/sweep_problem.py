"""Residuals of a draft-length sweep for stacks of parameters, their priors, and predictions from a solution.

Equations and meaning in :mod:`servecast.calibration.fits.speculation_cells`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.least_squares import Solved, minimise
from servecast.model.prediction import Z90
from servecast.model.speculation_cells import SpeculationCells
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
MOST_FOLDS, FOLD_CELLS = 24, 2400
"""Batch sizes left out one by one; of more, or of so many cells times folds, neighbours go together."""
CONTEXT_PRIOR = (-6.5, 1.5)
"""Log of the share of a that 1,000 cached tokens of one request cost, mean and standard deviation."""
IDLE_PRIOR = (-3.0, 1.2)
"""Log of the share of a that an armed step of length 0 costs."""
FORMS = tuple(RowForm)
FORM_PRIOR = np.array([0.25, 1.0, 1.0])
"""Prior weights in the order of FORMS. Of 68 series of mixture-of-experts servers without speculation (AIConfigurator's
silicon table), fitted up to 64 clients, the saturating form errs fast by 3 % at 128 and 10 % at 256 (medians), the
hyperbolic one by 0 and 3, the logarithmic one by -1 and -2."""


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
class Query:
    """Cells to predict, flat arrays of one size; context NaN is that of the measured cells."""

    batch: Floats
    gamma: NDArray[np.int64]
    context: Floats
    armed: NDArray[np.bool_]


class SweepProblem:
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
        solved = minimise(partial(self._residuals, form, whitening), starts)
        i = int(np.argmin(solved.cost))
        return _only(solved, i)

    def members(self, solved: Sequence[Solved]) -> tuple[FormFit, ...]:
        """Fits with weights, of one solution per form."""
        costs = np.array([float(one.cost[0]) for one in solved])
        weights = FORM_PRIOR * np.exp(-(costs - costs.min()) / TEMPER)
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
        variance = quadratic(net, member.covariance) + NOISE**2 + BATCH_SD**2
        variance -= np.einsum("nm,nm->n", towards, _batch_covariance(query.batch, own.batch))
        return mean, net, variance

    def held_out(self, members: tuple[FormFit, ...]) -> HeldOut:
        """Leave one batch size out (neighbours together beyond MOST_FOLDS); every form, all folds at once."""
        batches = np.unique(self.cells.batch)
        most = min(MOST_FOLDS, max(FOLD_CELLS // self.cells.size, 4))
        folds = np.array_split(batches, min(batches.size, most))
        keeps = [~np.isin(self.cells.batch, fold) for fold in folds]
        whitening = np.array([self._whitening(keep) for keep in keeps])
        refits = []
        for member in members:
            starts = np.repeat(member.theta[np.newaxis], len(keeps), axis=0)
            refits.append(minimise(partial(self._residuals, member.form, whitening), starts))
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
            mean, variance = mixture(np.array([member.weight for member in fitted]), pairs)
            sd = np.sqrt(variance)
            error[out] = np.expm1(mean - self._log_speed[out])
            score[out] = (mean - self._log_speed[out]) / sd
        outside = (self.cells.batch == batches[0]) | (self.cells.batch == batches[-1])
        # cells of one batch err together, so a fold counts once
        squares = np.array([float((score[~keep] ** 2).mean()) for keep in keeps])
        total = INFLATION_BATCHES * INFLATION**2 + squares.sum()
        covered = np.empty(size, dtype=np.bool_)
        for square, keep in zip(squares, keeps, strict=True):
            # intervals as wide as the other folds say: a fold must not vouch for itself
            others = np.sqrt((total - square) / (INFLATION_BATCHES + len(keeps) - 1))
            covered[~keep] = np.abs(score[~keep]) <= Z90 * others
        inflation = float(np.sqrt(total / (INFLATION_BATCHES + len(keeps))))
        return HeldOut(
            batch=batches,
            mape=np.array([np.abs(error[self.cells.batch == one]).mean() for one in batches]),
            error=error,
            covered=covered,
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

    def _residuals(self, form: RowForm, whitening: Floats, theta: Floats) -> Floats:
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


def quadratic(slopes: Floats, covariance: Floats) -> Floats:
    """Variance of each row of `slopes` [n, p]."""
    return np.asarray(((slopes @ covariance) * slopes).sum(axis=1))


def mixture(weights: Floats, pairs: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
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

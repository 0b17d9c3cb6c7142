"""Decode speed by context, batch size and draft length: the table that a draft-length schedule is chosen from.

From a fit to measured cells, or from a cost model with an acceptance curve. Length 0 is armed but idle, since that is
what a schedule can choose; speculation switched off is kept beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.speculation_cells import CellsFit, Query
from servecast.model.acceptance import AcceptanceCurve
from servecast.model.prediction import Z90
from servecast.model.speculation import acceptance_variance, depth_decay_survival
from servecast.model.speculation_cost import SpeculationCost, step_seconds

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTable:
    """Axes [context, batch, length]; length is the index, 0 to the longest."""

    batches: NDArray[np.int64]
    contexts: Floats
    """Cached tokens per request; NaN alone where the source knows one context only. [tokens]"""
    tok_s: Floats
    """Decode speed of one request, length 0 armed. [tokens/s]"""
    sd: Floats
    """Log standard deviation of `tok_s`. [-]"""
    ratio_sd: Floats
    """Log standard deviation of `tok_s` over that of the fastest length at the same batch and context. [-]"""
    off_tok_s: Floats
    """Speculation switched off [context, batch]. [tokens/s]"""
    off_sd: Floats
    tokens: Floats
    """Mean acceptance length by draft length, the bonus token included. [tokens]"""
    tokens_lo: Floats
    tokens_hi: Floats
    variance: Floats
    """Variance of the tokens of one step, by draft length. [tokens^2]"""
    calibrated: NDArray[np.bool_]
    """[batch, length]: within the measured range."""
    off_known: bool = True
    """Speculation switched off was measured, or is a cost model's own; else `off_tok_s` is carried there."""
    steps_known: bool = True
    """Tokens and seconds of a step are known apart; else `step_s` rests on what drafters usually accept."""

    @property
    def goodput(self) -> Floats:
        """Decoded tokens of all requests together. [tokens/s]"""
        return np.asarray(self.tok_s * self.batches[:, np.newaxis])

    @property
    def step_s(self) -> Floats:
        """Seconds of a whole step. [s]"""
        return np.asarray(self.tokens / self.tok_s)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.arange(self.tokens.size)


def batch_knots(max_batch: int) -> NDArray[np.int64]:
    """Batches at which speeds are evaluated: every one to 8, then four an octave, and the last.

    Between them the log of the speed is linear in log B to 0.1 %, since nothing in the cost turns faster than that.
    """
    octaves = np.round(2.0 ** np.arange(3.0, np.log2(max(max_batch, 8)) + 0.25, 0.25)).astype(np.int64)
    knots = np.concatenate([np.arange(1, 9), octaves, [max_batch]])
    return np.unique(knots[knots <= max_batch])


def _with_cliff(knots: NDArray[np.int64], fit: CellsFit, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The knots, and for every length the batches on both sides of the fit's cliff: no line may lead across it."""
    if fit.cliff is None:
        return knots
    over = np.ceil(fit.cliff.rows / (lengths + 1.0)).astype(np.int64)
    around = np.concatenate([over - 1, over])
    return np.union1d(knots, around[(around >= 1) & (around <= knots[-1])])


def _checked(contexts: Floats) -> Floats:
    at = np.asarray(contexts, dtype=np.float64)
    if not (np.isfinite(at).all() and (at >= 0.0).all() and (np.diff(at) > 0.0).all()):
        raise ValueError(f"contexts must be finite, >= 0 and increasing, got {at.tolist()}")
    return at


def table_from_cells(
    fit: CellsFit,
    *,
    max_batch: int,
    max_length: int,
    contexts: Floats | None = None,
    curve: AcceptanceCurve | None = None,
) -> SpeedTable:
    """Table of a fitted sweep; `curve` replaces the sweep's own acceptance by that of another text or drafter."""
    if max_length > fit.max_length:
        raise ValueError(f"max_length must be <= {fit.max_length}, the longest fitted, got {max_length}")
    at = np.array([np.nan]) if contexts is None else _checked(contexts)
    lengths = np.arange(max_length + 1)
    knots = _with_cliff(batch_knots(max_batch), fit, lengths)
    c, b, k = np.meshgrid(at, knots.astype(np.float64), lengths, indexing="ij")
    query = Query(
        batch=b.ravel(),
        gamma=k.ravel(),
        context=c.ravel(),
        armed=(k == 0).ravel(),
    )
    plain = Query(
        batch=b[..., 0].ravel(),
        gamma=k[..., 0].ravel(),
        context=c[..., 0].ravel(),
        armed=np.zeros(b[..., 0].size, dtype=np.bool_),
    )
    tokens = fit.mean_acceptance_length()[: max_length + 1]
    own_sd = fit.length_sd()[: max_length + 1]
    lo, hi = (np.clip(tokens * np.exp(sign * Z90 * own_sd), 1.0, lengths + 1.0) for sign in (-1.0, 1.0))
    shift, extra, doubt = np.zeros((3, max_length + 1))
    if curve is not None:
        own, tokens = tokens, curve.mean_length[: max_length + 1]
        lo, hi = curve.lo[: max_length + 1], curve.hi[: max_length + 1]
        # what the sweep's own drafts yielded is taken out, and is known as far as the cells tell it
        shift, extra, doubt = np.log(tokens / own), np.log(hi / lo) / (2.0 * Z90), own_sd
    speed, error, apart = fit.predict_grid(query, lengths.size)
    log_speed, sd = speed.reshape(b.shape) + shift, error.reshape(b.shape)
    best = np.argmax(log_speed, axis=-1)
    # a ratio has the acceptance of both its lengths in it, a speed its own
    ratio_sd = np.hypot(apart.reshape(b.shape), np.abs(extra - extra[best][..., np.newaxis]))
    ratio_sd = np.hypot(ratio_sd, np.abs(doubt - doubt[best][..., np.newaxis]))
    off, off_sd = (x.reshape(*b.shape[:2], 1) for x in fit.predict_grid(plain, 1)[:2])
    spread = _OverBatches(knots, max_batch)
    batches = np.arange(1, max_batch + 1)
    rows = batches[:, np.newaxis]
    return SpeedTable(
        batches=batches,
        contexts=at,
        tok_s=np.exp(spread(log_speed)),
        sd=spread(np.hypot(sd, np.hypot(extra, doubt))),
        ratio_sd=spread(ratio_sd),
        off_tok_s=np.exp(spread(off))[..., 0],
        off_sd=spread(off_sd)[..., 0],
        tokens=tokens,
        tokens_lo=lo,
        tokens_hi=hi,
        variance=_variances(fit, tokens) if curve is None else _curve_variances(curve, tokens),
        calibrated=fit.inside(rows.astype(np.float64), lengths),
        off_known=fit.knows_no_speculation,
        steps_known=fit.tells_tokens_from_seconds,
    )


def table_from_cost(
    cost: SpeculationCost,
    curve: AcceptanceCurve,
    *,
    max_batch: int,
    max_length: int,
    contexts: Floats | None = None,
    cost_sd: float,
    largest_rows: float = np.inf,
) -> SpeedTable:
    """Table of a cost model, whose log error is `cost_sd`, with an acceptance curve.

    `largest_rows` is the most rows of a pass that the cost was measured at; staircases are evaluated at every batch.
    """
    at = np.array([0.0]) if contexts is None else _checked(contexts)
    batches, lengths = np.arange(1, max_batch + 1), np.arange(max_length + 1)
    c, b, k = np.meshgrid(at, batches.astype(np.float64), lengths, indexing="ij")
    tokens = curve.mean_length[: max_length + 1]
    lo, hi = curve.lo[: max_length + 1], curve.hi[: max_length + 1]
    extra = np.log(hi / lo) / (2.0 * Z90)
    tok_s = tokens / step_seconds(cost, b, k, c, armed=True)
    best = np.argmax(tok_s, axis=-1)
    # the same kernels serve both lengths: half of the cost's error is taken as their own
    ratio_sd = np.hypot(
        0.5 * cost_sd * (lengths != best[..., np.newaxis]), np.abs(extra - extra[best][..., np.newaxis])
    )
    return SpeedTable(
        batches=batches,
        contexts=at if contexts is not None else np.array([np.nan]),
        tok_s=tok_s,
        sd=np.broadcast_to(np.hypot(cost_sd, extra), tok_s.shape),
        ratio_sd=ratio_sd,
        off_tok_s=1.0 / step_seconds(cost, b[..., 0], 0.0, c[..., 0]),
        off_sd=np.full(tok_s.shape[:2], cost_sd),
        tokens=tokens,
        tokens_lo=lo,
        tokens_hi=hi,
        variance=_curve_variances(curve, tokens),
        calibrated=(batches[:, np.newaxis] * (lengths + 1.0) <= largest_rows) & _measured(curve, lengths),
    )


class _OverBatches:
    """Linear in log B from the knots to every batch, along the middle axis."""

    def __init__(self, knots: NDArray[np.int64], max_batch: int) -> None:
        batches = np.arange(1, max_batch + 1)
        self._left = np.clip(np.searchsorted(knots, batches, side="right") - 1, 0, max(knots.size - 2, 0))
        self._right = np.minimum(self._left + 1, knots.size - 1)
        span = np.log(knots[self._right] / knots[self._left])
        ahead = np.log(batches / knots[self._left])
        self._share = np.divide(ahead, span, out=np.zeros_like(ahead), where=span > 0.0)[:, np.newaxis]

    def __call__(self, values: Floats) -> Floats:
        left, right = values[:, self._left], values[:, self._right]
        return np.asarray(left + (right - left) * self._share)


def _measured(curve: AcceptanceCurve, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Up to the longest measured draft: between measured lengths a curve is interpolated."""
    known = np.flatnonzero(curve.measured)
    return np.asarray(lengths <= (known.max() if known.size else 0))


def _variances(fit: CellsFit, tokens: Floats) -> Floats:
    """Of the sweep's own decaying acceptance, bent to the fitted mean of each length."""
    best = max(fit.members, key=lambda member: member.weight)
    first, decay = 1.0 / (1.0 + np.exp(-best.theta[7])), best.theta[8]
    survival = np.minimum(depth_decay_survival(first, min(decay, 1.0), max(tokens.size - 1, 1)), 1.0)
    return _bent_variances(np.asarray(survival, dtype=np.float64), tokens)


def _curve_variances(curve: AcceptanceCurve, tokens: Floats) -> Floats:
    if curve.survival is not None:
        return np.array([float(acceptance_variance(curve.survival[k])) if k else 0.0 for k in range(tokens.size)])
    # a geometric step with this mean where no survival is known
    return _bent_variances(np.asarray(0.5 ** np.arange(1, tokens.size), dtype=np.float64), tokens)


def _bent_variances(survival: Floats, tokens: Floats) -> Floats:
    """Variance of a step of each length K whose survival is P_1 .. P_K to the power at which its mean is `tokens`.

    All lengths in one bisection: `servecast.model.acceptance.survival_with_mean` does one exactly.
    """
    lengths = np.arange(1, tokens.size)
    inside = np.arange(1, tokens.size) <= lengths[:, np.newaxis]
    logs = np.where(inside, np.log(np.maximum(survival[: tokens.size - 1], 1e-300)), -np.inf)
    low, high = np.full(lengths.size, -14.0), np.full(lengths.size, 14.0)
    for _ in range(50):
        middle = 0.5 * (low + high)
        more = 1.0 + np.exp(logs * np.exp(middle)[:, np.newaxis]).sum(axis=1) > tokens[1:]
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    bent = np.exp(logs * np.exp(low)[:, np.newaxis])
    return np.append(0.0, acceptance_variance(bent)) if lengths.size else np.zeros(1)


def with_contexts(table: SpeedTable, contexts: Floats, *, cached_token_s: float, reference: float) -> SpeedTable:
    """A table of one context carried to others by the cache that a step reads, `cached_token_s` per request and token.

    Valid as long as a step reads each request's cache once, whatever its rows; a third of what is added is doubted.
    """
    if table.contexts.size != 1:
        raise ValueError(f"table must have one context to be carried to others, got {table.contexts.size}")
    at = _checked(contexts)
    if not 0.0 <= cached_token_s < np.inf:
        raise ValueError(f"cached_token_s must be finite and >= 0, got {cached_token_s}")
    more = cached_token_s * table.batches[:, np.newaxis] * (at[:, np.newaxis, np.newaxis] - reference)
    step, off = table.step_s, 1.0 / table.off_tok_s
    if np.any(step + more <= 0.0):
        raise ValueError(
            f"contexts must leave a positive step, got {at.min():g} tokens below the measured {reference:g}"
        )
    doubt = np.abs(more) / 3.0
    return replace(
        table,
        contexts=at,
        tok_s=table.tokens / (step + more),
        sd=np.hypot(table.sd, doubt / (step + more)),
        ratio_sd=np.broadcast_to(table.ratio_sd, (at.size, *table.ratio_sd.shape[1:])),
        off_tok_s=1.0 / (off + more[..., 0]),
        off_sd=np.hypot(table.off_sd, doubt[..., 0] / (off + more[..., 0])),
    )

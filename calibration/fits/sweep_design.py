r"""Which cells of a sweep to measure next: those that narrow what a draft-length schedule is decided by.

A cell with slopes g and noise v, once measured, takes from the variance of a contrast t between two lengths

.. math:: \frac{(t^T \Sigma g)^2}{v + g^T \Sigma g}

(Bayesian linear design on the fitted covariance). Contrasts are those between the best length and its rivals, weighted
by how often a batch size occurs and by how close the rival comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.speculation_cells import CellsFit
from servecast.calibration.fits.sweep_problem import BATCH_SD, NOISE, Query

Floats = NDArray[np.float64]

CLOSE = 0.05
"""A rival whose speed lies this far below the best is not worth telling apart. [-]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextCell:
    """A cell to measure."""

    batch: int
    gamma: int
    gain: float
    """Share of the contrasts' variance that its measurement removes. [-]"""


def informative_cells(
    fit: CellsFit, batches: Floats, weights: Floats, *, max_length: int, count: int = 3
) -> tuple[NextCell, ...]:
    """The `count` cells that together remove most, chosen one after the other among `batches` x lengths.

    `weights` [batch]: how much the decision at each batch matters.
    """
    lengths = np.arange(max_length + 1)
    b, k = (x.ravel() for x in np.meshgrid(np.asarray(batches, dtype=np.float64), lengths, indexing="ij"))
    query = Query(
        batch=b.astype(np.float64),
        gamma=k.astype(np.int64),
        context=np.full(b.size, np.nan),
        armed=np.zeros(b.size, dtype=np.bool_),
    )
    mean, slopes, covariance = fit.leading_form(query)
    speed = mean.reshape(-1, lengths.size)
    best = speed.argmax(axis=1)
    behind = speed.max(axis=1, keepdims=True) - speed
    near = np.exp(-behind / CLOSE) * np.asarray(weights, dtype=np.float64)[:, np.newaxis]
    near[np.arange(best.size), best] = 0.0
    contrast = slopes - np.repeat(
        slopes.reshape(best.size, lengths.size, -1)[np.arange(best.size), best], lengths.size, axis=0
    )
    importance = near.ravel()
    total = float((importance * ((contrast @ covariance) * contrast).sum(axis=1)).sum())
    noise = NOISE**2 + BATCH_SD**2
    found: list[NextCell] = []
    taken = np.zeros(b.size, dtype=np.bool_)
    for _ in range(count):
        seen = slopes @ covariance
        variance = noise + (seen * slopes).sum(axis=1)
        removed = importance @ (contrast @ seen.T) ** 2 / variance
        # a second run of the same cell narrows its noise alone, which the smooth deviation does not share
        i = int(np.where(taken, -np.inf, removed).argmax())
        taken[i] = True
        if not total > 0.0 or removed[i] < 1e-3 * total:
            break
        found.append(NextCell(batch=int(b[i]), gamma=int(k[i]), gain=float(removed[i] / total)))
        covariance = covariance - np.outer(seen[i], seen[i]) / variance[i]
    return tuple(found)

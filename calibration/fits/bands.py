"""Error bands from runs that were held out: what a 90 % interval of a prediction has to cover.

Rows of one group (same model, GPU, engine, width) are near copies, so a fit is repeated without whole units (folds of
groups, GPU types, models) and its errors on the missing unit are collected. A band is the pair of 5 % and 95 %
quantiles of log(measured / predicted) over those errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.engine import Runs, fit_engine, predict
from servecast.model.forecast import METRICS, Band, Metric

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MIN_ROWS = 100
"""Fewer held-out runs come from one or two units and say little about a new one; the pooled band of both model classes
stands in."""


def held_out_predictions(
    runs: Runs, unit: Sequence[object], usable: Mask, *, bins: int | None = None
) -> tuple[Floats, Floats]:
    """TTFT and TPOT of every run from a fit that saw no run of its unit; `usable` masks what a fit may see. [s], [s]

    With `bins`, units are dealt into that many bins by size and a whole bin is held out at a time.
    """
    labels = _deal(unit, bins)
    ttft, tpot = np.full(len(labels), np.nan), np.full(len(labels), np.nan)
    for label in np.unique(labels):
        held = labels == label
        theta = fit_engine(runs.take(np.flatnonzero(usable & ~held))).theta
        rows = np.flatnonzero(held)
        ttft[rows], tpot[rows] = predict(theta, runs.take(rows))
    return ttft, tpot


def bands_from(
    runs: Runs, ttft_s: Floats, tpot_s: Floats, rows: Mask, *, units: int, level: float = 0.90
) -> dict[tuple[Metric, bool], Band]:
    """Band by (metric, mixture of experts) over the held-out predictions of `rows`, which came from `units` hold-outs.

    Widened by sqrt(1 + 1 / units): a new unit's own bias comes on top of the error of a centre estimated from few.
    """
    wider = np.sqrt(1.0 + 1.0 / units)
    found: dict[tuple[Metric, bool], Band] = {}
    pairs = ((runs.ttft_s, ttft_s), (runs.tpot_s, tpot_s))
    for metric, (measured, predicted) in zip(METRICS, pairs, strict=True):
        log_ratio = np.log(measured / predicted)
        for moe in (False, True):
            chosen = rows & (runs.moe == moe)
            if chosen.sum() < MIN_ROWS:
                chosen = rows
            # the quantile of a unit not drawn yet lies further out than that of the few that were
            tail = (1.0 - level) / 2.0 * (1.0 - 1.0 / units)
            low, high = np.quantile(log_ratio[chosen], [tail, 1.0 - tail])
            centre = (low + high) / 2.0
            found[metric, moe] = Band(
                lo=float(centre + wider * (low - centre)),
                hi=float(centre + wider * (high - centre)),
                n=int(chosen.sum()),
            )
    return found


def _deal(unit: Sequence[object], bins: int | None) -> NDArray[np.intp]:
    """Integer label per run: its unit, or the bin that its unit was dealt into, largest units first."""
    names, label, count = np.unique(np.array([str(one) for one in unit]), return_inverse=True, return_counts=True)
    if bins is None or bins >= len(names):
        return np.asarray(label)
    load = np.zeros(bins)
    of_unit = np.zeros(len(names), dtype=np.intp)
    for position in np.argsort(-count, kind="stable"):
        of_unit[position] = int(np.argmin(load))
        load[of_unit[position]] += count[position]
    return of_unit[label]

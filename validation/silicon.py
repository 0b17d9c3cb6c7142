"""Scores on measured servers: predictions for runs whose group, GPU type or model no fit has seen, with their
intervals.

Three splits of the open aggregated rows: the shipped folds over groups (model, GPU, engine, tensor-parallel degree),
one GPU type left out, one model left out. In each, the engine's constants *and* the interval bands come from the
remaining rows alone: bands are quantiles of errors in an inner split of the same kind. Beside ours stand the plain
roofline and the prediction of AIConfigurator 0.12 that the table carries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.bands import bands_from, held_out_predictions
from servecast.calibration.fits.engine import fit_engine, predict
from servecast.calibration.public import PublicRuns, novelty_units
from servecast.model.forecast import METRICS, NOVELTY

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

INNER_BINS = 5
"""Units of an inner split are dealt into this many bins, so that a score ends in minutes."""

SPLITS = {"group": "5 folds over groups", "gpu": "one GPU type out", "model": "one model out"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Predictions of every row from fits that did not see its unit. [s]"""

    split: str
    ttft_s: Floats
    tpot_s: Floats
    ttft_lo_s: Floats
    ttft_hi_s: Floats
    tpot_lo_s: Floats
    tpot_hi_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Errors of one metric on one slice of one split; shares and errors as fractions."""

    split: str
    slice: str
    metric: str
    rows: int
    predicted: float
    """Share of rows with a prediction."""
    mape: float
    median: float
    bias: float
    """Median signed error."""
    interval_coverage: float
    """Share of predicted rows inside their 90 % interval."""
    roofline_mape: float
    aic_rows: int
    aic_mape: float
    """AIConfigurator on the rows it predicts."""
    aic_median: float
    mape_on_aic_rows: float
    """Ours on the same rows."""


def held_out(public: PublicRuns, split: str, *, tick: Callable[[str], None] | None = None) -> HeldOut:
    """Nested cross-validation of one split; `tick` is told each unit as it is held out."""
    unit = np.array([str(one) for one in novelty_units(public.rows)[split]])
    runs, size = public.runs, len(public.rows)
    arrays = {name: np.full(size, np.nan) for name in ("ttft", "tpot", "ttft_lo", "ttft_hi", "tpot_lo", "tpot_hi")}
    for name in np.unique(unit):
        if tick:
            tick(f"{split}: {name}")
        held = unit == name
        training = np.flatnonzero(~held)
        theta = fit_engine(runs.take(np.flatnonzero(public.usable & ~held))).theta
        ttft, tpot = predict(theta, runs.take(np.flatnonzero(held)))
        # a run whose log does not state the load is declined, and counts against the share predicted
        ttft, tpot = (np.where(public.answered[held], value, np.nan) for value in (ttft, tpot))
        arrays["ttft"][held], arrays["tpot"][held] = ttft, tpot
        inner = runs.take(training)
        inner_ttft, inner_tpot = held_out_predictions(
            inner, list(unit[training]), public.usable[training], bins=INNER_BINS
        )
        scored = (public.answered & ~public.suspect & ~public.inconsistent)[training]
        units = min(INNER_BINS, len(set(unit[training])))
        bands = bands_from(inner, inner_ttft, inner_tpot, scored, units=units)
        moe = runs.moe[held]
        for metric, value in zip(METRICS, (ttft, tpot), strict=True):
            low = np.where(moe, bands[metric, True].lo, bands[metric, False].lo)
            high = np.where(moe, bands[metric, True].hi, bands[metric, False].hi)
            arrays[f"{metric}_lo"][held] = value * np.exp(np.minimum(low, 0.0))
            arrays[f"{metric}_hi"][held] = value * np.exp(np.maximum(high, 0.0))
    return HeldOut(split=split, **{f"{name}_s": column for name, column in arrays.items()})


def scores(public: PublicRuns, predictions: HeldOut) -> list[Score]:
    """Both metrics on every slice."""
    rows, runs = public.rows, public.runs
    dense = ~runs.moe
    consistent = ~public.suspect & ~public.inconsistent
    everything = np.ones(len(rows), dtype=bool)
    slices = {
        "all": everything,
        "dense": dense,
        "dense, without suspect rows": dense & ~public.suspect,
        "dense, without suspect and inconsistent rows": dense & consistent,
        "mixture of experts": runs.moe,
    }
    roofline = roofline_times(public)
    found = []
    for metric in METRICS:
        truth = getattr(runs, f"{metric}_s")
        value, low, high = (getattr(predictions, f"{metric}{end}_s") for end in ("", "_lo", "_hi"))
        aic = np.array([getattr(row, f"aic_{metric}_s") for row in rows])
        for name, chosen in slices.items():
            found.append(
                _score(predictions.split, name, metric, chosen, truth, value, low, high, roofline[metric], aic)
            )
    return found


def roofline_times(public: PublicRuns) -> dict[str, Floats]:
    """The naive baseline: prompt arithmetic at the datasheet rate, bytes of weights and cache over the
    bandwidth. [s]"""
    points = public.points
    ones = [points.deployments[number] for number in points.index]
    batch, isl, osl = public.runs.passes.batch, points.isl, points.osl
    weights = np.array([one.weight_bytes_per_gpu for one in points.deployments])[points.index]
    cache = np.array([one.kv_bytes_per_token_per_gpu() for one in points.deployments])[points.index]
    bandwidth = np.array([one.gpu.bandwidth_bytes_per_s for one in ones])
    tpot = (weights + cache * batch * (isl + osl / 2.0)) / bandwidth
    flops = np.array([one.llm.prefill_flops_per_token(length) for one, length in zip(ones, isl, strict=True)]) * isl
    peak = np.array([one.gpu.peak_flops(one.trunk_format) * one.tp for one in ones])
    return {"ttft": flops / peak, "tpot": tpot}


def _score(
    split: str,
    name: str,
    metric: str,
    chosen: Mask,
    truth: Floats,
    value: Floats,
    low: Floats,
    high: Floats,
    roofline: Floats,
    aic: Floats,
) -> Score:
    predicted = chosen & np.isfinite(value)
    error = value[predicted] / truth[predicted] - 1.0
    both = predicted & np.isfinite(aic)
    aic_error = np.abs(aic[both] / truth[both] - 1.0)
    inside = (truth[predicted] >= low[predicted]) & (truth[predicted] <= high[predicted])
    return Score(
        split=split,
        slice=name,
        metric=metric,
        rows=int(chosen.sum()),
        predicted=float(predicted.sum() / chosen.sum()),
        mape=float(np.abs(error).mean()),
        median=float(np.median(np.abs(error))),
        bias=float(np.median(error)),
        interval_coverage=float(inside.mean()),
        roofline_mape=float(np.abs(roofline[chosen] / truth[chosen] - 1.0).mean()),
        aic_rows=int(both.sum()),
        aic_mape=float(aic_error.mean()),
        aic_median=float(np.median(aic_error)),
        mape_on_aic_rows=float(np.abs(value[both] / truth[both] - 1.0).mean()),
    )


def all_scores(public: PublicRuns, *, tick: Callable[[str], None] | None = None) -> list[Score]:
    """Every split."""
    return [score for split in NOVELTY for score in scores(public, held_out(public, split, tick=tick))]


def markdown(rows: Sequence[Score]) -> str:
    """Table for people and for docs; errors in per cent."""
    head = (
        "| split | rows | metric | n | predicted | MAPE | median | bias | 90 % interval holds | roofline | AIC n "
        "| AIC MAPE | ours, same rows |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        shares = [row.mape, row.median, row.bias, row.interval_coverage, row.roofline_mape]
        numbers = " | ".join(f"{100.0 * share:.1f}" for share in shares)
        aic = f"{row.aic_rows} | {100.0 * row.aic_mape:.1f} | {100.0 * row.mape_on_aic_rows:.1f}"
        lines.append(
            f"| {SPLITS[row.split]} | {row.slice} | {row.metric.upper()} | {row.rows} | {100.0 * row.predicted:.1f} "
            f"| {numbers} | {aic} |"
        )
    return "\n".join(lines)

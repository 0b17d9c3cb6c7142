r"""Fit of an engine's step times to timed steps, with the machine's drift taken out.

Samples come in rounds (blocks) that visit every point. A machine that runs slower for a while is slower for all points
of a round, so each round has one factor, the median of its samples over the points' own medians; one that changes
within a round is seen by the samples just before and after (`near_pace`). What is left is noise.
Constants solve a non-negative least squares in relative error, with a weak pull of neighbouring slopes towards each
other. Rival forms (sets of knots, tiles) are compared by error on left-out row counts, whole groups at a time: a richer
form must foretell what it has not seen better by more than the standard error of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from servecast.model.engine_steps import FURTHER, EngineSteps, StepWork, features

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RIVALS: dict[str, tuple[float, ...]] = {
    "octaves": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0),
    "half octaves": (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0),
}
"""Sets of knots, by name; those beyond the largest measured rows are dropped. Plainer sets are no rivals: a line that
holds for most row counts was chosen by their mean error, and foretold the largest steps 14 % too short."""
PULL_ROWS = 1.0
"""Neighbouring slopes that differ by d s count as a residual of so many rows' worth of d, of a median step."""
NEAR = 6
"""Samples before and after one, in order of time, that say what the machine's pace was."""
TILES = (1, 2, 4, 8, 16)
"""Rows that a kernel may compute together; 1: no remainder costs anything."""
FEW_DEVIATIONS = {3: 1.495, 4: 1.363, 5: 1.206, 6: 1.200, 7: 1.140, 8: 1.129, 9: 1.107}
"""By how much the scaled median absolute deviation of so few normal values is too small on average (Croux and
Rousseeuw, Time-efficient algorithms for two highly robust estimators of scale, 1992); of n > 9 it is n / (n - 0.8)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSamples:
    """Timed steps; arrays over samples."""

    rows: Floats
    sequences: Floats
    cached: Floats
    pairs: Floats
    chunks: Floats
    draft_passes: Floats
    draft_rows: Floats
    block: Integers
    seconds: Floats
    pace: Floats = field(default_factory=lambda: np.ones(1))
    """Of the machine when each was taken, where it is known: above 1 is slower. [-]"""

    @property
    def work(self) -> StepWork:
        return StepWork(**{name: getattr(self, name) for name in StepWork.__dataclass_fields__})

    def points(self) -> Integers:
        """Number of the operating point of each sample."""
        columns = np.column_stack([getattr(self, name) for name in StepWork.__dataclass_fields__])
        return np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointMedians:
    """One row per operating point: the median over rounds with the rounds' own pace taken out."""

    work: StepWork
    seconds: Floats
    cv: Floats
    """Scatter of a point's samples after the rounds' pace; NaN with fewer than three, or with one a round. [-]"""
    block_factor: Floats
    """Pace of every round over the median one. [-]"""
    count: Integers


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsFit:
    """The chosen form, its rivals, and what they leave."""

    steps: EngineSteps
    form: str
    held_out: dict[str, float]
    """Mean absolute percentage error of each rival on left-out row counts, as a share. [-]"""
    standard_errors: dict[str, float]
    """By constant. [s]"""
    log_residuals: Floats
    """log(measured / fitted) of every point. [-]"""
    medians: PointMedians
    noise_cv: float
    """Median scatter of a point within the run. [-]"""
    drift_cv: float
    """Scatter of the rounds' pace. [-]"""


def point_medians(samples: StepSamples) -> PointMedians:
    """Medians by point, after each round's samples are divided by its pace."""
    if not samples.seconds.size:
        raise ValueError("samples must hold at least 1 timed step, got 0")
    if not (np.isfinite(samples.seconds).all() and (samples.seconds > 0.0).all()):
        raise ValueError("seconds of every sample must be finite and > 0")
    point = samples.points()
    count = int(point.max()) + 1
    level = samples.seconds / samples.pace
    middle = _medians(level, point)
    _, block = np.unique(samples.block, return_inverse=True)
    factor = _medians(samples.seconds / middle[point], block)
    level /= _medians(level / middle[point], block)[block]
    first = np.array([int(np.argmax(point == one)) for one in range(count)])
    groups = [level[point == one] for one in range(count)]
    # a pace that was told by m samples has taken of each the m-th part of its variance
    m = float(np.median(np.bincount(block)))
    known = np.sqrt(m / (m - 1.0)) if m > 1.0 else np.nan
    return PointMedians(
        work=StepWork(**{name: getattr(samples, name)[first] for name in StepWork.__dataclass_fields__}),
        seconds=_medians(level, point),
        cv=known * np.array([point_scatter(one) for one in groups]),
        block_factor=factor,
        count=np.array([one.size for one in groups], dtype=np.int64),
    )


def near_pace(seconds: Floats, point: Integers) -> Floats:
    """The machine's pace at every sample, in order of time: by the `NEAR` before it and after it, not by itself. [-]

    Neighbours are nearly all of other points, in fresh order every round, and each is compared with its own point's
    median. The sample itself is left out: what it scatters by stays in it.
    """
    n = seconds.size
    pace = np.ones(n)
    if n <= 2 * NEAR:
        return pace
    offsets = np.r_[-NEAR:0, 1 : NEAR + 1]
    at = np.clip(np.arange(n)[:, np.newaxis] + offsets, 0, n - 1)
    at[at == np.arange(n)[:, np.newaxis]] = -1  # at either end there are fewer
    for _ in range(3):  # a point's median and the pace know each other
        ratio = np.append(seconds / _medians(seconds / pace, point)[point], np.nan)
        ratio = np.where(at < 0, np.nan, ratio[at])
        pace = np.asarray(np.nanmedian(ratio, axis=1))
    return pace


def _medians(values: Floats, group: Integers) -> Floats:
    return np.array([np.median(values[group == one]) for one in range(int(group.max()) + 1)])


def point_scatter(values: Floats) -> float:
    """Median absolute deviation over the median, scaled to a normal's standard deviation; one interrupted step in ten
    does not count."""
    n = values.size
    if n < 3:
        return float("nan")
    middle = float(np.median(values))
    scale = 1.4826 * FEW_DEVIATIONS.get(n, n / (n - 0.8))
    return scale * float(np.median(np.abs(values - middle))) / middle


def fit_steps(samples: StepSamples, *, first_token_s: float = 0.0) -> StepsFit:
    """Constants of `servecast.model.engine_steps` from timed steps.

    Raises
    ------
    ValueError : fewer than 6 operating points or than 3 row counts.
    """
    medians = point_medians(samples)
    rows = np.asarray(medians.work.rows, dtype=np.float64)
    if rows.size < 6 or np.unique(rows).size < 3:
        raise ValueError(
            f"samples must have 6 operating points and 3 row counts at least, got {rows.size} and "
            f"{np.unique(rows).size}"
        )
    forms = _forms(float(rows.max()))
    errors = {name: _held_out(one, medians) for name, one in forms.items()}
    scores = {name: float(np.nanmean(np.abs(np.expm1(error)))) for name, error in errors.items()}
    form = _chosen(errors, rows)
    knots, tile = forms[form].knots, forms[form].tile
    theta, covariance = _solve(forms[form], medians)
    fitted = forms[form].features(medians.work) @ theta
    steps = EngineSteps(
        knots=knots,
        base_s=theta[0],
        row_s=tuple(float(one) for one in theta[1 : 1 + len(knots)]),
        tile=tile,
        **{name: float(theta[1 + len(knots) + i]) for i, name in enumerate(FURTHER)},
        first_token_s=first_token_s,
        covariance=covariance,
        log_sd=float(np.sqrt(np.nanmean(errors[form] ** 2))),
        log_scale_sd=_scale_sd(medians.block_factor),
        ranges=(
            ("rows", float(rows.min()), float(rows.max())),
            ("sequences", float(np.min(medians.work.sequences)), float(np.max(medians.work.sequences))),
            ("context", *_contexts(medians.work)),
        ),
    )
    return StepsFit(
        steps=steps,
        form=form,
        held_out=scores,
        standard_errors=dict(zip(constant_names(knots), np.sqrt(np.diag(covariance)).tolist(), strict=True)),
        log_residuals=np.log(medians.seconds / fitted),
        medians=medians,
        noise_cv=float(np.nanmedian(medians.cv)) if np.isfinite(medians.cv).any() else float("nan"),
        drift_cv=float(np.std(np.log(medians.block_factor))),
    )


def _contexts(work: StepWork) -> tuple[float, float]:
    """Least and most cached tokens of a decoding sequence."""
    sequences, cached = np.asarray(work.sequences, dtype=np.float64), np.asarray(work.cached, dtype=np.float64)
    each = cached[sequences > 0.0] / sequences[sequences > 0.0]
    return (float(each.min()), float(each.max())) if each.size else (0.0, 0.0)


def constant_names(knots: Sequence[float]) -> list[str]:
    """Names of the constants in the order of `features`."""
    return ["base_s", *(f"row_s[{knot:g}]" for knot in knots), *FURTHER]


@dataclass(frozen=True, slots=True)
class _Form:
    """What distinguishes one rival from another."""

    knots: tuple[float, ...]
    tile: int

    def features(self, work: StepWork) -> Floats:
        return features(self.knots, work, tile=self.tile)


def _forms(most: float) -> dict[str, _Form]:
    """Every set of knots with every tile, by name, plainer ones first."""
    found = {}
    for name, knots in RIVALS.items():
        within = tuple(knot for knot in knots if knot < most) or knots[:1]
        for tile in TILES:
            found[name if tile == 1 else f"{name}, tiles of {tile}"] = _Form(within, tile)
    return found


def _chosen(errors: dict[str, Floats], rows: Floats) -> str:
    """The plainest form that the best one does not beat by more than a standard error of their difference, over groups
    of left-out points; rivals are listed by rising number of constants."""
    groups = [rows == one for one in np.unique(rows)[1:-1]]
    by_group = {
        name: np.array([np.mean(np.abs(np.expm1(error[one]))) for one in groups]) for name, error in errors.items()
    }
    best = min(by_group.values(), key=lambda one: float(one.mean()))
    for name, found in by_group.items():
        worse = found - best
        # one group says nothing of its error
        doubt = float(worse.std(ddof=1)) / np.sqrt(worse.size) if worse.size > 1 else 0.0
        if worse.mean() <= doubt:
            return name
    return next(iter(errors))  # no error is a number


def _held_out(form: _Form, medians: PointMedians) -> Floats:
    """log(measured / predicted) by a fit without the points of the same row count; NaN at the fewest and the most rows,
    where nothing on one side is left to go by."""
    rows = np.asarray(medians.work.rows, dtype=np.float64)
    x = form.features(medians.work)
    inner = np.unique(rows)[1:-1]
    error = np.full(rows.size, np.nan)
    for one in inner:
        out = rows == one
        theta, _ = _solve_rows(form.knots, x[~out], medians.seconds[~out])
        error[out] = np.log(medians.seconds[out] / (x[out] @ theta))
    return error


def _solve(form: _Form, medians: PointMedians) -> tuple[Floats, Floats]:
    return _solve_rows(form.knots, form.features(medians.work), medians.seconds)


def _solve_rows(knots: tuple[float, ...], x: Floats, seconds: Floats) -> tuple[Floats, Floats]:
    """Constants and covariance: relative errors, robust weights, neighbouring slopes pulled together."""
    from scipy.optimize import nnls

    weight = np.ones(seconds.size)
    scale = np.maximum(np.abs(x).max(axis=0), 1e-12)
    pull = _pull(knots, x.shape[1]) / float(np.median(seconds))
    theta = np.zeros(x.shape[1])
    for _ in range(6):
        a = np.vstack([x * (weight / seconds)[:, np.newaxis], pull])
        theta = nnls(a / scale, np.concatenate([weight, np.zeros(len(pull))]))[0] / scale
        residual = 1.0 - (x @ theta) / seconds
        spread = max(1.4826 * float(np.median(np.abs(residual))), 1e-4)
        # Huber's weights at two robust standard deviations: a point that was disturbed keeps its place, not its pull
        weight = np.sqrt(np.minimum(1.0, 2.0 * spread / np.maximum(np.abs(residual), 1e-12)))
    residual = weight * (1.0 - (x @ theta) / seconds)
    free = theta > 0.0
    degrees = max(seconds.size - int(free.sum()), 1)
    a = np.vstack([x * (weight / seconds)[:, np.newaxis], pull])
    normal = a[:, free].T @ a[:, free]
    covariance = np.zeros((theta.size, theta.size))
    covariance[np.ix_(free, free)] = np.linalg.pinv(normal) * float(residual @ residual) / degrees
    return theta, covariance


def _pull(knots: tuple[float, ...], width: int) -> Floats:
    """Rows that draw the slopes of neighbouring segments together; but the first is free, since a single row is a
    product of a matrix and a vector, which has kernels of its own. [rows of tokens]"""
    count = len(knots)
    rows = np.zeros((max(count - 2, 0), width))
    for i in range(1, count - 1):
        rows[i - 1, 1 + i], rows[i - 1, 2 + i] = -PULL_ROWS, PULL_ROWS
    return rows


def _scale_sd(factor: Floats) -> float:
    """How far another run's pace may lie from this one's: the rounds' own scatter, at most, goes with a whole run."""
    return float(np.std(np.log(factor), ddof=1)) if factor.size > 1 else 0.0

r"""Samples of a machine to parameters with standard errors: one fit per kernel and number format.

Points count equally, each with its median over visits, in logarithms of time. The covariance of the log parameters is a
sum of three parts: how the points scatter about the curve (a sandwich over points: other shapes would give other
parameters), how visits of one round deviate together (a sandwich over rounds), and the drift of the machine as a whole,
the variance of the rounds' common factor, *not* divided by their number: a session sees one state of the machine,
and the next session another. A common factor moves times by itself and rates by its inverse.

The form is selected among rivals by the mean absolute log error on groups of shapes left out of the fit; a form with
more parameters has to beat a simpler one by a standard error of the difference.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from servecast.calibration.fits.curves import (
    AXES,
    GROUPS,
    Columns,
    Form,
    family_of,
    forms_of,
    layer_gemms,
    work,
)
from servecast.calibration.fits.least_squares import minimise
from servecast.calibration.microbenchmarks.journal import Point, Sample
from servecast.model.formats import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]

SOFT = 0.15
"""Log residual from which a point weighs less."""
LEAST_NOISE, MOST_NOISE = 1e-3, 0.1
"""Log residuals that the weak priors are weighed against: the scatter of the points, within these."""
CLEAR = 2.0
"""Standard errors by which a richer form must be better on held-out shapes."""
FOLDS = 5
LEAST_POINTS = 3
LEAST_CLEAN = 1
"""Undisturbed visits from which a point does without the others: one says more than many that measured other work."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Error of one rival on shapes that its fit did not see."""

    form: str
    mean_abs_log: float
    """Mean over points of abs(log(measured / predicted))."""
    rms_log: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFit:
    """One kernel in one format: the chosen form, its parameters and how good it is."""

    kernel: str
    dtype: str
    form: Form
    log_values: Floats
    """Log of the parameters [p]."""
    covariance: Floats
    """Of the log parameters [p, p]."""
    degrees: int
    """Points less parameters, at least 1."""
    held_out: tuple[HeldOut, ...]
    """Of all rivals; empty where too few shapes were measured to hold any out."""
    drift: float
    """Standard deviation of the rounds' common log factor."""
    residual_quantiles: tuple[float, ...]
    """5, 25, 50, 75, 95 % of log(measured / fitted), over visits."""
    ranges: Mapping[str, tuple[float, float]]
    """Least and largest size measured."""
    points: int
    visits: int
    rounds: int
    suspects: int
    """Visits left out because they were marked."""
    peaks: tuple[float, float]
    """Best measured rates. [FLOP/s, B/s]"""

    @property
    def error(self) -> float:
        """Root mean square log error of the chosen form on held-out shapes; in sample where there is none."""
        mine = [one.rms_log for one in self.held_out if one.form == self.form.name]
        return mine[0] if mine else max(abs(self.residual_quantiles[0]), abs(self.residual_quantiles[-1])) / 1.645

    @property
    def quantile(self) -> float:
        """Of Student's distribution, for 90 % intervals."""
        return quantile_of(self.degrees)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """The visits of one kernel and format, and its points."""

    kernel: str
    dtype: str
    columns: Columns
    """One value a point [n]."""
    log_seconds: Floats
    """Median over visits [n]."""
    visit_point: NDArray[np.int64]
    visit_round: NDArray[np.int64]
    visit_log: Floats
    suspects: int = field(default=0)


def quantile_of(degrees: int) -> float:
    """0.95 quantile of Student's distribution.

    >>> round(quantile_of(10), 3)
    1.812
    """
    return float(stdtrit(max(degrees, 1), 0.95))


def fit_machine(samples: Sequence[Sample]) -> tuple[KernelFit, ...]:
    """Fits of all kernels with `LEAST_POINTS` points or more, by name; the layer may lean on its kernels' fits."""
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for one in samples:
        groups[one.kernel, one.dtype].append(one)
    fits: dict[tuple[str, str], KernelFit] = {}
    # the layer last: its sum of kernels needs theirs
    for kernel, dtype in sorted(groups, key=lambda key: (key[0] == "layer", *key)):
        problem = _problem(kernel, dtype, groups[kernel, dtype])
        if problem is None:
            continue
        if kernel == "layer" and ("gemm", dtype) in fits and ("decode_attention", dtype) in fits:
            total = kernel_sum(fits["gemm", dtype], fits["decode_attention", dtype], problem.columns)
            problem.columns["kernel_sum_s"] = total  # type: ignore[index]  # a fresh dict, typed as a Mapping
        fits[kernel, dtype] = _fit(problem)
    return tuple(fits[key] for key in sorted(fits))


def columns_of(kernel: str, dtype: str, sizes: Mapping[str, Floats]) -> dict[str, Floats]:
    """Sizes [n] with what forms need beside them: `flops`, `nbytes`, `element` (bytes of one)."""
    axes = AXES[family_of(kernel)]
    missing = [axis for axis in axes if axis not in sizes]
    if missing:
        raise ValueError(f"{kernel} must have the size {missing[0]}, got {', '.join(sizes) or 'none'}")
    columns = {axis: np.asarray(sizes[axis], dtype=np.float64) for axis in axes}
    if any((one <= 0.0).any() for one in columns.values()):
        raise ValueError(f"{kernel} must have sizes > 0")
    columns["flops"], columns["nbytes"] = work(kernel, dtype, columns)
    columns["element"] = np.full_like(columns[axes[0]], BYTES_PER_ELEMENT.get(dtype, 1.0))
    return columns


def kernel_sum(gemm: KernelFit, decode: KernelFit, columns: Columns) -> Floats:
    """Seconds of a layer's four products and its attention by their own fits [n]."""
    total = np.zeros_like(columns["rows"])
    for n, k in layer_gemms(columns):
        total = total + predict(gemm, columns_of("gemm", gemm.dtype, {"m": columns["rows"], "n": n, "k": k}))
    sizes = {"batch": columns["rows"], **{name: columns[name] for name in ("context", "heads", "kv_heads")}}
    return total + predict(decode, columns_of("decode_attention", decode.dtype, sizes))


def predict(fit: KernelFit, columns: Columns) -> Floats:
    """Seconds of the fitted curve [n]."""
    return fit.form.seconds(np.exp(fit.log_values), columns)


def log_deviation(form: Form, log_values: Floats, covariance: Floats, columns: Columns) -> Floats:
    """Standard deviation of the log of predicted seconds, from the parameters' covariance alone [n]."""
    step = 1e-4
    around = np.concatenate([log_values + step * np.eye(len(log_values)), log_values - step * np.eye(len(log_values))])
    log_seconds = np.log(form.seconds(np.exp(around), columns))
    half = len(log_values)
    slopes = (log_seconds[:half] - log_seconds[half:]) / (2.0 * step)
    variance = np.einsum("pn,pq,qn->n", slopes, covariance, slopes)
    return np.asarray(np.sqrt(np.maximum(variance, 0.0)), dtype=np.float64)


def choose_next(samples: Sequence[Sample], kernel: str, dtype: str, candidates: Sequence[Point]) -> Point | None:
    """The candidate with the largest predicted uncertainty, given the samples so far; None where nothing can be fitted.

    The uncertainty is that of the curve's parameters in the form with the fewest of them.
    """
    mine = [one for one in samples if one.kernel == kernel and one.dtype == dtype]
    problem = _problem(kernel, dtype, mine)
    if problem is None or not candidates:
        return None
    form = forms_of(kernel, problem.columns)[0]
    values, covariance, _ = _solve(problem, form)
    sizes = {axis: np.array([dict(one)[axis] for one in candidates], dtype=np.float64) for axis, _ in candidates[0]}
    unsure = log_deviation(form, values, covariance, columns_of(kernel, dtype, sizes))
    return candidates[int(np.argmax(unsure))]


def _problem(kernel: str, dtype: str, samples: Sequence[Sample]) -> _Problem | None:
    """None where fewer than `LEAST_POINTS` points can be trusted."""
    trusted = _undisturbed([one for one in samples if not one.suspect])
    points = sorted({one.point for one in trusted})
    if len(points) < LEAST_POINTS:
        return None
    index = {point: i for i, point in enumerate(points)}
    visit_point = np.array([index[one.point] for one in trusted], dtype=np.int64)
    visit_log = np.log([one.median_s for one in trusted])
    axes = AXES[family_of(kernel)]
    for point in points:
        if not set(axes) <= {name for name, _ in point}:
            raise ValueError(
                f"point of {kernel} must have {', '.join(axes)}, got {', '.join(name for name, _ in point)}"
            )
    sizes = {axis: np.array([dict(point)[axis] for point in points], dtype=np.float64) for axis in axes}
    return _Problem(
        kernel=kernel,
        dtype=dtype,
        columns=columns_of(kernel, dtype, sizes),
        log_seconds=np.array([np.median(visit_log[visit_point == i]) for i in range(len(points))]),
        visit_point=visit_point,
        visit_round=np.unique([one.round for one in trusted], return_inverse=True)[1].astype(np.int64),
        visit_log=visit_log,
        suspects=len(samples) - len(trusted),
    )


def _undisturbed(samples: Sequence[Sample]) -> list[Sample]:
    """Without visits that were disturbed throughout, for points that have other visits enough."""
    clean = Counter(one.point for one in samples if one.clean)
    return [one for one in samples if one.clean or clean[one.point] < LEAST_CLEAN]


def _fit(problem: _Problem) -> KernelFit:
    rivals = forms_of(problem.kernel, problem.columns)
    # a form needs a point more than it has parameters, else nothing is left to judge it by
    able = [form for form in rivals if len(form.parameters) < len(problem.log_seconds)] or [rivals[0]]
    errors = _held_out(problem, able)
    form = _selected(able, errors)
    values, covariance, drift = _solve(problem, form)
    fitted = np.log(form.seconds(np.exp(values), problem.columns))
    residuals = problem.visit_log - fitted[problem.visit_point]
    seconds = np.exp(problem.log_seconds)
    return KernelFit(
        kernel=problem.kernel,
        dtype=problem.dtype,
        form=form,
        log_values=values,
        covariance=covariance,
        degrees=max(len(seconds) - len(values), 1),
        held_out=tuple(
            HeldOut(form=one.name, mean_abs_log=float(error.mean()), rms_log=float(np.sqrt((error**2).mean())))
            for one, error in zip(able, errors, strict=True)
            if error.size
        ),
        drift=drift,
        residual_quantiles=tuple(float(one) for one in np.quantile(residuals, QUANTILES)),
        ranges={
            axis: (float(problem.columns[axis].min()), float(problem.columns[axis].max()))
            for axis in AXES[family_of(problem.kernel)]
        },
        points=len(seconds),
        visits=len(residuals),
        rounds=int(problem.visit_round.max()) + 1,
        suspects=problem.suspects,
        peaks=(float((problem.columns["flops"] / seconds).max()), float((problem.columns["nbytes"] / seconds).max())),
    )


def _selected(forms: Sequence[Form], errors: Sequence[Floats]) -> Form:
    """The simplest form that no other beats by two standard errors of their difference: which form is chosen should
    not change with the session."""
    if not errors[0].size:
        return forms[0]
    best = int(np.argmin([error.mean() for error in errors]))
    for form, error in zip(forms, errors, strict=True):
        difference = error - errors[best]
        if difference.mean() <= CLEAR * difference.std(ddof=1) / np.sqrt(len(difference)):
            return form
    return forms[best]


def _held_out(problem: _Problem, forms: Sequence[Form]) -> list[Floats]:
    """Absolute log errors of every point by fits without its group of shapes, a row for each form."""
    names = GROUPS[family_of(problem.kernel)]
    _, group = np.unique(np.stack([problem.columns[name] for name in names], axis=1), axis=0, return_inverse=True)
    group = np.asarray(group).ravel()
    count = int(group.max()) + 1
    if count < LEAST_POINTS:
        return [np.empty(0) for _ in forms]
    fold = np.random.default_rng(0).permutation(count)[group] % FOLDS
    held = np.stack([fold == one for one in np.unique(fold)])
    errors = []
    for form in forms:
        solved = _minimised(problem, form, (~held).astype(np.float64), _noise(problem, form))
        logs = np.log(form.seconds(np.exp(solved), problem.columns))
        errors.append(np.abs(logs - problem.log_seconds)[held.argmax(axis=0), np.arange(held.shape[1])])
    return errors


def _noise(problem: _Problem, form: Form) -> float:
    """Scatter of the points about a first fit."""
    count = len(problem.log_seconds)
    values = _minimised(problem, form, np.ones((1, count)), MOST_NOISE)[0]
    misfit = problem.log_seconds - np.log(form.seconds(np.exp(values), problem.columns))
    scatter = float(np.sqrt(np.square(misfit).sum() / max(count - len(values), 1)))
    return min(max(scatter, LEAST_NOISE), MOST_NOISE)


def _minimised(problem: _Problem, form: Form, weights: Floats, noise: float) -> Floats:
    """Log parameters of each row of `weights` [m, n]; soft-L1 in log time, weak priors."""
    start = np.log(np.maximum(form.start(problem.columns, np.exp(problem.log_seconds)), 1e-300))
    spread = np.array([one.spread for one in form.parameters])

    def residuals(theta: Floats) -> Floats:
        plain = np.log(form.seconds(np.exp(theta), problem.columns)) - problem.log_seconds
        shape = (len(weights),) + (1,) * (theta.ndim - 2) + (-1,)
        prior = noise * (theta - start) / spread
        return np.concatenate([weights.reshape(shape) * softened(plain), prior], axis=-1)

    return minimise(residuals, np.tile(start, (len(weights), 1))).parameters


def softened(residual: Floats) -> Floats:
    """A residual whose square is the soft-L1 cost: itself while small, the root of its size when large."""
    ratio = residual / SOFT
    # sqrt(2 (sqrt(1 + x^2) - 1)) without the loss of digits at small x
    return SOFT * ratio * np.sqrt(2.0 / (np.sqrt(1.0 + ratio * ratio) + 1.0))


def _solve(problem: _Problem, form: Form) -> tuple[Floats, Floats, float]:
    """Log parameters [p], their covariance [p, p], the drift."""
    count = len(problem.log_seconds)
    scatter = _noise(problem, form)
    values = _minimised(problem, form, np.ones((1, count)), scatter)[0]
    misfit = problem.log_seconds - np.log(form.seconds(np.exp(values), problem.columns))
    slopes = _slopes(form, values, problem.columns)
    influence = 1.0 / np.sqrt(1.0 + (misfit / SOFT) ** 2)
    prior = np.diag((scatter / np.array([one.spread for one in form.parameters])) ** 2)
    bread = np.linalg.inv((slopes.T * influence) @ slopes + prior)
    score = slopes * (influence * misfit)[:, np.newaxis]
    meat = score.T @ score * count / max(count - len(values), 1)
    noise = problem.visit_log - problem.log_seconds[problem.visit_point]
    meat = meat + _between_rounds(problem, slopes * influence[:, np.newaxis], noise) + scatter**2 * prior
    drift = _drift(problem, noise)
    direction = np.array([float(one.time_power) for one in form.parameters])
    return values, bread @ meat @ bread + drift**2 * np.outer(direction, direction), drift


def _slopes(form: Form, values: Floats, columns: Columns) -> Floats:
    """Derivatives of log seconds by log parameters [n, p]."""
    step = 1e-5
    around = np.concatenate([values + step * np.eye(len(values)), values - step * np.eye(len(values))])
    log_seconds = np.log(form.seconds(np.exp(around), columns))
    return np.asarray((log_seconds[: len(values)] - log_seconds[len(values) :]).T / (2.0 * step), dtype=np.float64)


def _between_rounds(problem: _Problem, slopes: Floats, noise: Floats) -> Floats:
    """Covariance of the score from visits that deviate together within a round [p, p]."""
    rounds = int(problem.visit_round.max()) + 1
    if rounds < 2:
        return np.zeros((slopes.shape[1], slopes.shape[1]))
    visits = np.bincount(problem.visit_point, minlength=len(problem.log_seconds))
    share = slopes[problem.visit_point] * (noise / visits[problem.visit_point])[:, np.newaxis]
    score = np.zeros((rounds, slopes.shape[1]))
    np.add.at(score, problem.visit_round, share)
    # the median has pi/2 times the variance of the mean
    return np.asarray(score.T @ score * 0.5 * np.pi * rounds / (rounds - 1), dtype=np.float64)


def _drift(problem: _Problem, noise: Floats) -> float:
    """Standard deviation of the rounds' common log factor; of single visits where there is but one round."""
    rounds = int(problem.visit_round.max()) + 1
    if rounds < 2:
        return 0.0
    common = [float(np.median(noise[problem.visit_round == one])) for one in range(rounds)]
    return float(np.std(common, ddof=1))

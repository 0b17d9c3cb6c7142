r"""The machine's pace while a load ran: seconds of probed steps over those of the calibration, in order of time.

A machine that others use slows down and speeds up within seconds, and a queue amplifies it: at a utilisation of 0.8 a
pace that is off by 5 % is off by some 15 % in the latencies. With c(t) the pace at t over its mean,

.. math:: W(t) = \int_0^t \frac{du}{c(u)}

is the work, in seconds at the mean pace, that a busy engine has done by t. Requests that arrive at W(t) at an engine of
the mean pace are served as those that arrive at t at one whose pace is c; its stamps w are W^-1(w). Whatever predicts
an engine of constant pace so predicts one whose pace moves.

c is a kernel mean of the probes over time. How wide the kernel is, the probes decide: the widest whose error on probes
left out is not worse than the best's by more than its standard error; without end, a constant pace, is among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.batch_steps import ScaledSteps, StepTimes
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace

Floats = NDArray[np.float64]

WIDTHS = (np.inf, 0.25, 0.125, 0.0625, 0.03125)
"""Standard deviations of the kernel, as shares of the time from the first probe to the last."""
FEWEST = 8
"""Probes from which on the pace may move: fewer say little about when it did."""
DRAWS = 16
"""Paces that the probes do not tell apart, for the mean and the standard error of what rests on them."""
LEAST_SHAPE = 0.05
"""Of those draws: of two probes nearly always one or the other."""
GRID = 257
"""Points in time at which c is tabulated."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One timed step, or the median of several."""

    at_s: float
    """In the load's time, which stands still meanwhile; less than 0 before it. [s]"""
    ratio: float
    """Its seconds over those of the calibration: above 1 is slower. NaN where it could not be made. [-]"""
    prompts: bool = False
    """The step held prompts: arithmetic binds those and memory the others, and what a neighbour takes of one is not
    what it takes of the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What the probes of one load say."""

    decode: float
    """Mean over steps without prompts. [-]"""
    prompts: float
    """Over steps with prompts; as `decode` where none was probed. [-]"""
    error: float
    """Standard error of the less certain of both; NaN with fewer than two probes. [-]"""
    width: float
    """Of the kernel, as a share of the probes' time; infinite: the pace is taken as constant. [-]"""
    at_s: Floats
    """[s]"""
    relative: Floats
    """c there. [-]"""

    def over(self, end_s: float) -> Floats:
        """Pace of decode steps at equal distances from the start of a load to its end. [-]"""
        return self.decode * np.interp(np.linspace(0.0, end_s, GRID), self.at_s, self.relative)

    def work(self, t_s: ArrayLike) -> Floats:
        """W(t). [s]"""
        return _line(np.asarray(t_s, dtype=np.float64), self.at_s, self._done())

    def clock(self, work_s: ArrayLike) -> Floats:
        """Time by which so much work is done, W^-1. [s]"""
        return _line(np.asarray(work_s, dtype=np.float64), self._done(), self.at_s)

    def _done(self) -> Floats:
        speed = 1.0 / self.relative
        return np.concatenate([[0.0], np.cumsum(np.diff(self.at_s) * (speed[1:] + speed[:-1]) / 2.0)])


STEADY = Pace(
    decode=1.0, prompts=1.0, error=float("nan"), width=float("inf"), at_s=np.array([0.0, 1.0]), relative=np.ones(2)
)
"""The calibrated pace throughout: nobody probed."""


def pace_of(probes: Sequence[Probe], *, width: float | None = None, weights: Floats | None = None) -> Pace:
    """The pace by these probes; `width` as in `Pace`, chosen by the probes where it is not given."""
    made = np.array([np.isfinite(one.ratio) for one in probes], dtype=bool)
    if not made.any():
        return STEADY
    at = np.array([one.at_s for one in probes])[made]
    ratio = np.array([one.ratio for one in probes])[made]
    kind = np.array([one.prompts for one in probes])[made]
    weight = np.ones(at.size) if weights is None else weights[made]
    # of a kind that nobody probed, the other's
    decodes, prompts = (one if one.any() else ~one for one in (~kind, kind))
    mean, beside = (float(np.average(ratio[one], weights=weight[one])) for one in (decodes, prompts))
    relative = ratio / np.where(kind, beside, mean)
    chosen = width if width is not None else _width(at, relative)
    grid = np.linspace(0.0, max(float(at.max()), 1e-9), GRID)
    return Pace(
        decode=mean,
        prompts=beside,
        error=max(_error(ratio[decodes]), _error(ratio[prompts])),
        width=chosen,
        at_s=grid,
        relative=_smooth(_kernel(grid, at, chosen) * weight, relative),
    )


def drawn_paces(probes: Sequence[Probe], *, seed: int) -> list[Pace]:
    """Paces that differ as much as these probes leave it open: each by weights drawn for them (Rubin 1981).

    A queue magnifies small changes, and a percentile of few requests jumps with them: what is foretold is the mean over
    these paces. One alone where they leave it unknown how much: with fewer than two probes, or where one failed.
    """
    if len(probes) < 2 or not all(np.isfinite(one.ratio) for one in probes):
        return [pace_of(probes)]
    whole = pace_of(probes)
    rng = np.random.default_rng(seed)
    # Dirichlet weights a each give s^2 / (n a + 1) with s^2 over n, a mean has the variance s^2 / (n - 1)
    shape = max((len(probes) - 2.0) / len(probes), LEAST_SHAPE)
    drawn = rng.gamma(shape, size=(DRAWS, len(probes)))
    return [pace_of(probes, width=whole.width, weights=one) for one in drawn]


def steps_at(steps: StepTimes, pace: Pace) -> ScaledSteps:
    """Steps at the mean pace."""
    return ScaledSteps(steps, pace.decode, prompt_factor=pace.prompts)


def in_work(trace: Trace, pace: Pace) -> Trace:
    """The same requests, arriving at an engine of the mean pace."""
    return replace(trace, t_s=pace.work(trace.t_s))


def in_time(rows: RequestRows, trace: Trace, pace: Pace) -> RequestRows:
    """Stamps of that engine as those of one whose pace moves."""
    return replace(
        rows,
        arrival_s=trace.t_s,
        scheduled_s=pace.clock(rows.scheduled_s),
        first_token_s=pace.clock(rows.first_token_s),
        last_token_s=pace.clock(rows.last_token_s),
    )


def _line(x: Floats, known: Floats, value: Floats) -> Floats:
    """Between the known points, and on with the last slope."""
    beyond = value[-1] + (value[-1] - value[-2]) / (known[-1] - known[-2]) * (x - known[-1])
    return np.where(x > known[-1], beyond, np.interp(x, known, value))


def _kernel(where: Floats, at: Floats, width: float) -> Floats:
    span = max(float(at.max() - at.min()), 1e-9)
    distance = np.abs(where[:, np.newaxis] - at) / span
    if not np.isfinite(width):
        return np.ones_like(distance)
    # the nearest counts in full: far from every probe it is what is known
    nearest = distance.min(axis=1, keepdims=True)
    return np.asarray(np.exp(-0.5 * (distance**2 - nearest**2) / width**2))


def _smooth(kernel: Floats, ratio: Floats) -> Floats:
    return np.asarray(kernel @ ratio / kernel.sum(axis=1))


def _width(at: Floats, ratio: Floats) -> float:
    if at.size < FEWEST:
        return float("inf")
    errors = []
    for width in WIDTHS:
        kernel = _kernel(at, at, width)
        np.fill_diagonal(kernel, 0.0)
        total = kernel.sum(axis=1)
        # a probe that no other is near to is foretold by the mean
        alone = total < 1e-12
        kernel[alone], total[alone] = 1.0, at.size
        errors.append((kernel @ ratio / total - ratio) ** 2)
    best = errors[int(np.argmin([float(one.mean()) for one in errors]))]
    for width, error in zip(WIDTHS, errors, strict=True):
        more = error - best
        if more.mean() <= more.std(ddof=1) / np.sqrt(at.size):
            return float(width)
    return float("inf")


def _error(ratios: Floats) -> float:
    return float(ratios.std(ddof=1) / np.sqrt(ratios.size)) if ratios.size > 1 else float("nan")

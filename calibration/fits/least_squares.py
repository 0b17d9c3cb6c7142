"""Many small nonlinear least-squares problems at once: Levenberg and Marquardt's method on a stack of starts and folds.

scipy's solver does one problem per call and costs more to import than all problems of a sweep cost to solve here;
`tests/calibration/test_least_squares.py` holds this one to scipy's optimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Residuals = Callable[[Floats], Floats]
"""Parameters [..., p] to residuals [..., n]; the leading axes are problems and their perturbed copies."""

STEP = 1e-6
"""Relative step of the difference quotients: half the digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Optima of m problems."""

    parameters: Floats
    """[m, p]"""
    cost: Floats
    """Half the sum of squares [m]."""
    jacobian: Floats
    """Of the residuals at the optimum [m, n, p]."""
    converged: NDArray[np.bool_]


def minimise(residuals: Residuals, start: Floats, *, iterations: int = 100, tolerance: float = 1e-9) -> Solved:
    """Least sum of squares of every problem from its `start` [m, p].

    `residuals` is called with [m, p] and [m, p + 1, p]. A step is taken where it lowers the cost, else the damping
    rises; a problem has converged when a step taken lowers its cost by less than `tolerance` of it.
    """
    theta = np.array(start, dtype=np.float64)
    m, p = theta.shape
    damping = np.full(m, 1e-2)
    done = np.zeros(m, dtype=np.bool_)
    value, jacobian = _linearised(residuals, theta)
    cost = 0.5 * (value * value).sum(axis=-1)
    for _ in range(iterations):
        gradient = np.einsum("mnp,mn->mp", jacobian, value)
        normal = np.einsum("mnp,mnq->mpq", jacobian, jacobian)
        scale = np.maximum(np.einsum("mpp->mp", normal), 1e-12)
        damped = normal + (damping[:, np.newaxis] * scale)[:, :, np.newaxis] * np.eye(p)
        step = -np.linalg.solve(damped, gradient[:, :, np.newaxis])[:, :, 0]
        tried = theta + step
        with np.errstate(over="ignore", invalid="ignore"):
            at = residuals(tried)
            new = 0.5 * (at * at).sum(axis=-1)
        better = np.isfinite(new) & (new <= cost) & ~done
        done |= better & (cost - new <= tolerance * (1e-12 + cost))
        done |= ~better & (damping > 1e10)
        theta = np.where(better[:, np.newaxis], tried, theta)
        cost = np.where(better, new, cost)
        damping = np.where(better, np.maximum(damping / 5.0, 1e-12), damping * 4.0)
        if done.all():
            break
        if better.any():
            value, jacobian = _linearised(residuals, theta)
    value, jacobian = _linearised(residuals, theta)
    return Solved(parameters=theta, cost=cost, jacobian=jacobian, converged=done & np.isfinite(cost))


def _linearised(residuals: Residuals, theta: Floats) -> tuple[Floats, Floats]:
    """Residuals [m, n] and their forward differences [m, n, p]."""
    p = theta.shape[1]
    steps = STEP * np.maximum(np.abs(theta), 1.0)
    around = np.repeat(theta[:, np.newaxis, :], p + 1, axis=1)
    index = np.arange(p)
    around[:, index + 1, index] += steps
    with np.errstate(over="ignore", invalid="ignore"):
        all_values = residuals(around)
    base = all_values[:, 0]
    slopes = (all_values[:, 1:] - base[:, np.newaxis, :]) / steps[:, :, np.newaxis]
    return base, np.swapaxes(slopes, 1, 2)

r"""Gamma-family functions in numpy alone, for a cold command's fits: importing scipy would cost more than the fit.

Symbols: Gamma(a) gamma function, psi = d ln Gamma / da digamma, P(a, x) lower regularised incomplete gamma function.
Methods: recurrence up to a >= 10, then the asymptotic series (Abramowitz & Stegun 6.1.40, 6.3.18, 6.4.12); power series
of P for x < a + 1 and Lentz's continued fraction above it (A & S 6.5.29, 6.5.31; Press et al., Numerical Recipes,
section 6.2). Relative accuracy is about 1e-12.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_SHIFT = 10
"""Steps of the recurrence before the asymptotic series; its first neglected term is then below 1e-14."""
_TINY = 1e-300
_CONVERGED = 1e-15
_NO_TAIL = 750.0
"""e^-x is 0 in double precision beyond it."""


def log_gamma(a: ArrayLike) -> Floats:
    """ln Gamma(a) for a > 0.

    >>> log_gamma([1.0, 5.0]).round(6)
    array([0.      , 3.178054])
    """
    x = _positive("a", a)
    y = x + _SHIFT
    # Gamma(y) = Gamma(x) x (x + 1) ... (x + 9), each factor over y so that the product cannot overflow
    product = np.prod([(x + step) / y for step in range(_SHIFT)], axis=0)
    z = 1.0 / (y * y)
    series = (1.0 / 12.0 - z * (1.0 / 360.0 - z * (1.0 / 1260.0 - z * (1.0 / 1680.0 - z / 1188.0)))) / y
    stirling = (y - 0.5) * np.log(y) - y + 0.5 * np.log(2.0 * np.pi) + series
    return np.asarray(stirling - np.log(product) - _SHIFT * np.log(y), dtype=np.float64)


def digamma(a: ArrayLike) -> Floats:
    """psi(a) for a > 0.

    >>> digamma(1.0).round(6)  # minus Euler's constant
    np.float64(-0.577216)
    """
    x = _positive("a", a)
    recurrence = sum((1.0 / (x + step) for step in range(_SHIFT)), np.zeros_like(x))
    y = x + _SHIFT
    z = 1.0 / (y * y)
    series = z * (1.0 / 12.0 - z * (1.0 / 120.0 - z * (1.0 / 252.0 - z * (1.0 / 240.0 - z / 132.0))))
    return np.asarray(np.log(y) - 0.5 / y - series - recurrence, dtype=np.float64)


def trigamma(a: ArrayLike) -> Floats:
    """psi'(a) for a > 0.

    >>> trigamma(1.0).round(6)  # pi^2 / 6
    np.float64(1.644934)
    """
    x = _positive("a", a)
    recurrence = sum((1.0 / (x + step) ** 2 for step in range(_SHIFT)), np.zeros_like(x))
    y = x + _SHIFT
    z = 1.0 / (y * y)
    series = (
        1.0 + 0.5 / y + z * (1.0 / 6.0 - z * (1.0 / 30.0 - z * (1.0 / 42.0 - z * (1.0 / 30.0 - z * 5.0 / 66.0))))
    ) / y
    return np.asarray(series + recurrence, dtype=np.float64)


def lower_gamma(a: ArrayLike, x: ArrayLike) -> Floats:
    """P(a, x), the share of Gamma(a)'s integral below x; a > 0, x >= 0.

    >>> lower_gamma(1.0, [0.0, 1.0]).round(6)  # 1 - e^-x
    array([0.      , 0.632121])
    """
    shape, at = np.broadcast_arrays(_positive("a", a), np.asarray(x, dtype=np.float64))
    if not np.all(at >= 0.0):
        raise ValueError("x must be >= 0")
    result = np.zeros(at.shape)
    series = (at > 0.0) & (at < shape + 1.0)
    tail = at >= shape + 1.0
    # far out the tail is below the smallest difference from 1
    finite = np.where(np.isfinite(at), np.maximum(at, 1.0), 1.0)
    gone = tail & ((finite - shape * np.log(finite) > _NO_TAIL) | np.isinf(at))
    fraction = tail & ~gone
    result[gone] = 1.0
    result[series] = _power_series(shape[series], at[series])
    result[fraction] = 1.0 - _continued_fraction(shape[fraction], at[fraction])
    return result if result.ndim else np.asarray(result[()])


def _front(a: Floats, x: Floats) -> Floats:
    """x^a e^-x / Gamma(a)."""
    return np.asarray(np.exp(a * np.log(x) - x - log_gamma(a)), dtype=np.float64)


def _power_series(a: Floats, x: Floats) -> Floats:
    if not x.size:
        return x
    term = 1.0 / a
    total = term.copy()
    step = 0
    while np.any(term > _CONVERGED * total):
        step += 1
        term *= x / (a + step)
        total += term
    return total * _front(a, x)


def _continued_fraction(a: Floats, x: Floats) -> Floats:
    """Q(a, x) = 1 - P(a, x)."""
    if not x.size:
        return x
    b = x + 1.0 - a
    c = np.full_like(x, 1.0 / _TINY)
    d = 1.0 / b
    h = d.copy()
    step, change = 0, np.full_like(x, np.inf)
    while np.any(np.abs(change - 1.0) > 4.0 * _CONVERGED):
        step += 1
        factor = -step * (step - a)
        b = b + 2.0
        d = 1.0 / (factor * d + b)
        c = b + factor / c
        change = c * d
        h = h * change
    return h * _front(a, x)


def _positive(name: str, value: ArrayLike) -> Floats:
    x = np.asarray(value, dtype=np.float64)
    if not np.all(x > 0.0):
        raise ValueError(f"{name} must be positive")
    return x

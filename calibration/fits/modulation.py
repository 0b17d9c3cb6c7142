r"""Two-state modulated Poisson process from the moments of counts.

Symbols: lambda mean rate, sigma^2 variance of the rate, r sum of the switching rates, p share of busy time,
g = (1 - 2 p) / sqrt(p (1 - p)) skewness of the rate, N(w) arrivals in a window of w. The integral of the rate over a
window has the factorial cumulants of N(w) as its cumulants, so that

.. math:: var N - E N = \lambda w (IDC - 1), \qquad
          \kappa_{[3]}(w) = 6 g \sigma^3 \left[\frac{w (1 - (1 + x) e^{-x})}{r^2} -
                            \frac{2 - (x^2 + 2 x + 2) e^{-x}}{r^3}\right], \quad x = r w .

The second follows from X^2 = sigma^2 + g sigma X for a two-valued X with mean 0. (Heffes & Lucantoni, IEEE J-SAC 4(6),
1986, match lambda, IDC at one window and at infinity, and one third moment; here all windows take part.)

Method: lambda from the count; r and sigma^2 by weighted least squares on IDC(w) at doubling windows, g likewise on the
third factorial cumulants. Standard errors by parametric bootstrap of the counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.arrival_draws import arrival_times
from servecast.calibration.fits.gap_fits import SEED
from servecast.model.arrival_processes import MarkovModulated

Floats = NDArray[np.float64]

MOST_BINS = 1 << 15
"""Finest bins of a trace; a longer one is seen more coarsely."""
BINS_PER_GAP = 2.0
LEAST_WINDOWS = 20
"""Windows longer than a twentieth of the trace are left out: their variance is known to 30 % at best."""
BOOTSTRAP = 24
"""Samples behind a standard error: it is known to 15 %."""
MOST_BOOTSTRAP_ARRIVALS = 20_000
"""Longer traces are bootstrapped at this length, and their standard errors shrunk by the square root of the ratio."""
LEAST_EXCESS = 0.05
"""IDC below 1 plus this leaves nothing to modulate."""
LEAST_POINTS = 4
"""Windows that the two parameters of the IDC curve need, with some to spare."""
NOTICED = 3.0
"""Standard errors by which IDC has to exceed 1 at some window."""
_RATES = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulationFit:
    """A modulated process fitted to counts."""

    process: MarkovModulated
    standard_errors: dict[str, float]
    slowest: bool
    """The relaxation lies at the slow end of what the trace can show: the fit stands for a drift, not for switching."""
    interrupted: bool
    """The third moments ask for a negative quiet rate; it was set to 0, and the busy share follows from two moments."""


def fit_modulated(t_s: Floats) -> ModulationFit | None:
    """Fit to arrivals that start at 0; None where counts are no more dispersed than Poisson's, or too few."""
    n, span = t_s.size, float(t_s[-1])
    bins = int(min(MOST_BINS, max(1.0, BINS_PER_GAP * n)))
    found = _estimate(t_s, span, bins)
    if found is None:
        return None
    process, slowest, interrupted = found
    return ModulationFit(
        process=process,
        standard_errors=_standard_errors(process, n),
        slowest=slowest,
        interrupted=interrupted,
    )


def factorial_cumulants(counts: Floats) -> tuple[float, float, float]:
    """Mean, IDC and third factorial cumulant of counts, (3rd central moment) - 3 var + 2 mean."""
    mean = float(counts.mean())
    deviation = counts - mean
    square = deviation * deviation
    variance = float(square.mean())
    return mean, variance / mean, float((square * deviation).mean()) - 3.0 * variance + 2.0 * mean


def third_cumulant(window_s: Floats, relaxation_per_s: float) -> Floats:
    """Third cumulant of the integral of a two-state rate over g sigma^3. [s^3]"""
    r, x = relaxation_per_s, relaxation_per_s * window_s
    small = x < 1e-2
    y = np.where(small, 1.0, x)
    decay = np.exp(-y)
    exact = y * (1.0 - (1.0 + y) * decay) - (2.0 - (y * y + 2.0 * y + 2.0) * decay)
    # the bracket is the integral of (y - s) s e^-s over 0 <= s <= y
    series = x**3 * (1.0 / 6.0 - x / 12.0 + x * x / 40.0)
    return np.asarray(6.0 * np.where(small, series, exact) / r**3, dtype=np.float64)


def _estimate(t: Floats, span: float, bins: int) -> tuple[MarkovModulated, bool, bool] | None:
    """The process by moments, whether r is at the slow end, and whether the quiet rate was set to 0."""
    finest = np.bincount(np.minimum((t * (bins / span)).astype(np.int64), bins - 1), minlength=bins).astype(np.float64)
    width = span / bins
    windows, idc, third, number = _moments(finest, width)
    # of m windows a Poisson IDC has the standard error sqrt(2 / m)
    noticed = idc - 1.0 > np.maximum(LEAST_EXCESS, NOTICED * np.sqrt(2.0 / number))
    if windows.size < LEAST_POINTS or not noticed.any() or not np.all(idc > 0.0):
        return None
    weight = number / idc**2
    rate = t.size / span
    relaxation, excess, slowest, fastest = _relaxation(windows, idc - 1.0, weight)
    # switching within a hundredth of a gap cannot be told from a renewal process
    if fastest or not excess > LEAST_EXCESS:
        return None
    variance = 0.5 * excess * rate * relaxation
    basis = third_cumulant(windows, relaxation) * variance**1.5
    # the spread of a third moment grows as (var N)^1.5
    heft = weight * (1.0 + excess * _saturated(relaxation * windows)) ** 2 / (rate * windows * idc) ** 3
    skewness = float(np.sum(heft * basis * third) / np.sum(heft * basis * basis))
    # p = (1 - g / sqrt(g^2 + 4)) / 2, without the difference of near-equal numbers
    root = math.hypot(skewness, 2.0)
    rare = 2.0 / (root * (root + abs(skewness)))
    busy = rare if skewness >= 0.0 else 1.0 - rare
    # the quiet rate is lambda - sigma sqrt(p / (1 - p)); beyond this share it would be negative
    most = 1.0 / (1.0 + variance / rate**2)
    interrupted = busy >= most
    if interrupted:
        process = MarkovModulated(
            low_rps=0.0,
            high_rps=rate / most,
            to_high_per_s=relaxation * most,
            to_low_per_s=relaxation * (1.0 - most),
        )
    else:
        process = MarkovModulated.from_moments(rate, variance, relaxation, busy)
    return process, slowest, interrupted


def _moments(finest: Floats, width: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Windows of doubling length [s], their IDC and third factorial cumulant, and how many there are of each."""
    rows = []
    counts, window = finest, width
    while counts.size >= LEAST_WINDOWS:
        _, idc, third = factorial_cumulants(counts)
        rows.append((window, idc, third, counts.size))
        even = counts.size // 2 * 2
        counts, window = counts[:even].reshape(-1, 2).sum(axis=1), 2.0 * window
    windows, idcs, thirds, numbers = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return windows, idcs, thirds, numbers


def _saturated(x: Floats) -> Floats:
    return np.asarray(1.0 + np.expm1(-x) / x, dtype=np.float64)


def _relaxation(windows: Floats, excess: Floats, weight: Floats) -> tuple[float, float, bool, bool]:
    """r and the limit A of IDC - 1 = A (1 - (1 - e^-rw) / rw): r on a grid of logarithms that is
    refined twice (to 0.1 %), A linear.

    The grid ends where the longest window has seen one relaxation (`slowest`), and where the shortest one has seen a
    hundred (`fastest`).
    """
    grid = np.linspace(math.log(1.0 / windows[-1]), math.log(100.0 / windows[0]), _RATES)

    def solved(log_rates: Floats) -> tuple[Floats, Floats]:
        shape = _saturated(np.exp(log_rates)[:, None] * windows)
        limit = (weight * shape * excess).sum(axis=1) / (weight * shape * shape).sum(axis=1)
        return limit, (weight * (excess - limit[:, None] * shape) ** 2).sum(axis=1)

    limit, loss = solved(grid)
    best = int(np.argmin(loss))
    slowest, fastest = best == 0, best == grid.size - 1
    for _ in range(2):
        if not (slowest or fastest):
            grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)], 17)
            limit, loss = solved(grid)
            best = int(np.argmin(loss))
    return float(np.exp(grid[best])), float(limit[best]), slowest, fastest


def _standard_errors(process: MarkovModulated, n: int) -> dict[str, float]:
    """Spread of the estimates over samples of the fitted process; empty where most samples admit no fit."""
    length = min(n, MOST_BOOTSTRAP_ARRIVALS)
    bins = int(min(MOST_BINS, BINS_PER_GAP * length))
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(BOOTSTRAP):
        t = arrival_times(process, length, rng)
        estimate = _estimate(t, float(t[-1]), bins)
        if estimate is not None:
            found.append(list(estimate[0].parameters.values()))
    if len(found) < BOOTSTRAP // 2:
        return {}
    spread = np.std(np.array(found), axis=0, ddof=1) * math.sqrt(length / n)
    return dict(zip(process.parameters, spread.tolist(), strict=True))

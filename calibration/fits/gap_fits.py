"""Maximum likelihood of Poisson, Gamma and Weibull gaps, and Kolmogorov-Smirnov tests that know what was fitted.

Rows of a two-dimensional array are samples, so that one call refits a whole bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from servecast.model.arrival_processes import ArrivalProcess, GammaRenewal, Poisson, WeibullRenewal
from servecast.model.gamma_functions import digamma, log_gamma, lower_gamma, trigamma

Floats = NDArray[np.float64]

SEED = 20261101
"""Of every bootstrap: the same gaps get the same p-value."""
REPLICATES = 199
"""Bootstrap samples: p-values are multiples of 1/200."""
BOOTSTRAP_GAPS = 300
"""Gaps of one bootstrap sample at most; distances are compared as sqrt(n) D, whose law hardly changes beyond it."""
_NEWTON_STEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class GapFit:
    """One family fitted to gaps."""

    process: ArrivalProcess
    standard_errors: dict[str, float]
    """Of the process' parameters, for independent gaps."""
    log_likelihood: float
    free_parameters: int
    ks_distance: float
    ks_p: float
    """Share of samples of the fitted process, refitted, that lie as far from their fit; at least 1/200."""

    @property
    def aic(self) -> float:
        """Akaike's criterion, 2 k - 2 ln L."""
        return 2.0 * self.free_parameters - 2.0 * self.log_likelihood


def fit_poisson(gaps: Floats) -> GapFit:
    """Exponential gaps: rate 1 / mean, standard error rate / sqrt(n)."""
    n, rate = gaps.size, 1.0 / float(gaps.mean())
    process = Poisson(rate_rps=rate)
    distance = ks_distance(gaps, process)
    return GapFit(
        process=process,
        standard_errors={"rate_rps": rate / math.sqrt(n)},
        log_likelihood=n * (math.log(rate) - 1.0),
        free_parameters=1,
        ks_distance=distance,
        ks_p=_p_value(distance, n, _exponential_null(min(n, BOOTSTRAP_GAPS))),
    )


def fit_gamma(gaps: Floats) -> GapFit:
    """Gamma gaps; shape k and mean are orthogonal: var k = 1 / (n (psi'(k) - 1/k)), var mean = mean^2 / (n k)."""
    n, mean = gaps.size, float(gaps.mean())
    shape = float(gamma_shape(gaps[None])[0])
    process = GammaRenewal(rate_rps=1.0 / mean, shape=shape)
    distance = ks_distance(gaps, process)
    log_likelihood = n * (shape * math.log(shape / mean) - float(log_gamma(shape)) - shape) + (shape - 1.0) * float(
        np.log(gaps).sum()
    )
    return GapFit(
        process=process,
        standard_errors={
            "rate_rps": process.rate_rps / math.sqrt(n * shape),
            "shape": 1.0 / math.sqrt(n * (float(trigamma(shape)) - 1.0 / shape)),
        },
        log_likelihood=log_likelihood,
        free_parameters=2,
        ks_distance=distance,
        ks_p=_p_value(distance, n, _gamma_null(min(n, BOOTSTRAP_GAPS), shape)),
    )


def fit_weibull(gaps: Floats) -> GapFit:
    """Weibull gaps; the covariance of shape and scale is in Johnson, Kotz & Balakrishnan, volume 1, chapter 21."""
    n = gaps.size
    shape = float(weibull_shape(np.log(gaps)[None])[0])
    scale = float(np.mean(gaps**shape)) ** (1.0 / shape)
    process = WeibullRenewal(rate_rps=1.0 / (scale * math.gamma(1.0 + 1.0 / shape)), shape=shape)
    distance = ks_distance(gaps, process)
    log_likelihood = n * (math.log(shape) - shape * math.log(scale) - 1.0) + (shape - 1.0) * float(np.log(gaps).sum())
    # d ln rate = -d ln scale + slope d shape, by 1 / rate = scale Gamma(1 + 1/c)
    slope = float(digamma(1.0 + 1.0 / shape)) / shape**2
    variance = 1.1087 / shape**2 + 0.6079 * (slope * shape) ** 2 - 2.0 * 0.2570 * slope
    return GapFit(
        process=process,
        standard_errors={
            "rate_rps": process.rate_rps * math.sqrt(variance / n),
            "shape": shape * math.sqrt(0.6079 / n),
        },
        log_likelihood=log_likelihood,
        free_parameters=2,
        ks_distance=distance,
        ks_p=_p_value(distance, n, _weibull_null(min(n, BOOTSTRAP_GAPS))),
    )


def gamma_shape(gaps: Floats) -> Floats:
    """Maximum-likelihood shape of each row of positive gaps, not all equal: ln k - psi(k) = ln mean - mean ln.

    Newton on 1/k (Minka, Estimating a Gamma distribution, 2002); six steps reach rounding.
    """
    excess = np.log(gaps.mean(axis=-1)) - np.log(gaps).mean(axis=-1)
    shape = (3.0 - excess + np.sqrt((excess - 3.0) ** 2 + 24.0 * excess)) / (12.0 * excess)
    for _ in range(6):
        step = (np.log(shape) - digamma(shape) - excess) / (shape**2 * (1.0 / shape - trigamma(shape)))
        shape = 1.0 / (1.0 / shape + step)
    return np.asarray(shape, dtype=np.float64)


def weibull_shape(log_gaps: Floats) -> Floats:
    """Maximum-likelihood shape of each row of ln gaps, not all equal: sum T^c ln T / sum T^c - 1/c = mean ln T.

    The left side grows with c, and as a function of ln c Newton's steps stay on one side after the first.
    """
    y = log_gaps - log_gaps.max(axis=-1, keepdims=True)
    mean = y.mean(axis=-1)
    shape = np.pi / np.sqrt(6.0) / y.std(axis=-1)  # exact for the variance of ln T
    for _ in range(_NEWTON_STEPS):
        power = np.exp(shape[:, None] * y)
        total = power.sum(axis=-1)
        first = (power * y).sum(axis=-1) / total
        second = (power * y * y).sum(axis=-1) / total
        gap = first - 1.0 / shape - mean
        shape = shape * np.exp(-gap / (shape * (second - first**2) + 1.0 / shape))
        if np.all(np.abs(gap * shape) < 1e-12):
            break
    return np.asarray(shape, dtype=np.float64)


def ks_distance(gaps: Floats, process: ArrivalProcess) -> float:
    """Largest distance between the empirical distribution of gaps and that of the process."""
    return float(_distances(process.gap_cdf(np.sort(gaps))[None])[0])


def _distances(cdf: Floats) -> Floats:
    """Kolmogorov-Smirnov distance of each row of sorted probabilities."""
    n = cdf.shape[-1]
    above = (np.arange(1, n + 1) / n - cdf).max(axis=-1)
    below = (cdf - np.arange(n) / n).max(axis=-1)
    return np.asarray(np.maximum(above, below), dtype=np.float64)


def _scaled(distance: Floats | float, n: int) -> Floats:
    """D in units whose law hardly depends on n (Stephens, JASA 69, 1974)."""
    return np.asarray((np.sqrt(n) + 0.12 + 0.11 / np.sqrt(n)) * distance, dtype=np.float64)


def _p_value(distance: float, n: int, null: Floats) -> float:
    return (1 + int(np.count_nonzero(null >= _scaled(distance, n)))) / (1 + REPLICATES)


@lru_cache(maxsize=32)
def _exponential_null(n: int) -> Floats:
    """Scaled distances of exponential samples from their own fits; the true rate does not matter."""
    gaps = np.sort(np.random.default_rng(SEED).standard_exponential((REPLICATES, n)))
    return _scaled(_distances(-np.expm1(-gaps / gaps.mean(axis=-1, keepdims=True))), n)


@lru_cache(maxsize=32)
def _weibull_null(n: int) -> Floats:
    """The same of Weibull samples; neither the true scale nor the true shape matters."""
    gaps = np.sort(np.random.default_rng(SEED).standard_exponential((REPLICATES, n)))
    power = gaps ** weibull_shape(np.log(gaps))[:, None]
    return _scaled(_distances(-np.expm1(-power / power.mean(axis=-1, keepdims=True))), n)


def _gamma_null(n: int, shape: float) -> Floats:
    """The same of Gamma samples of this shape."""
    gaps = np.sort(np.random.default_rng(SEED).standard_gamma(shape, (REPLICATES, n)))
    # the smallest shapes draw gaps that are zero in double precision and have no logarithm; such samples, unlike
    # anything that a clock records, count as nearer to their fit than the gaps at hand
    gaps = gaps[np.all(gaps > 0.0, axis=-1)]
    fitted = gamma_shape(gaps)[:, None]
    return _scaled(_distances(lower_gamma(fitted, fitted * gaps / gaps.mean(axis=-1, keepdims=True))), n)


FITS: tuple[Callable[[Floats], GapFit], ...] = (fit_poisson, fit_gamma, fit_weibull)
"""In order of simplicity."""

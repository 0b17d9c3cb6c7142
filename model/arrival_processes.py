r"""Arrival processes: Poisson, renewal with Gamma or Weibull gaps, Markov-modulated Poisson, batches at Poisson epochs.

Symbols (docs/nomenclature): T gap, lambda = 1 / E[T] rate, cv = std(T) / E[T]; N(w) arrivals in a window of w seconds
that starts at an arbitrary time (not at an arrival), IDC(w) = var N(w) / E[N(w)].

Equations. Renewal (Cox, Renewal Theory, 1962, chapter 4), H(u) the mean number of renewals within u of one:

.. math:: IDC(w) = 1 + \frac{2}{w} \int_0^w H(u)\,du - \lambda w \;\to\;
          cv^2 + \frac{1/6 + cv^4/2 - \gamma_3/3}{\lambda w}, \qquad \gamma_3 = E[(T - ET)^3] / (ET)^3 .

Two-state modulation (Heffes & Lucantoni, IEEE J-SAC 4(6), 1986), r the sum of both switching rates, sigma^2 the
variance of the modulated rate:

.. math:: IDC(w) = 1 + \frac{2 \sigma^2}{\lambda r} \left(1 - \frac{1 - e^{-r w}}{r w}\right) .

Batches of B at Poisson epochs: IDC = E[B^2] / E[B] at every w, cv^2 = 2 E[B] - 1 (gaps inside a batch are zero).

Assumptions: stationary in time; neighbouring gaps are independent but for the modulated process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.gamma_functions import lower_gamma

Floats = NDArray[np.float64]

STEPS_PER_GAP = 16
"""Grid of the renewal function, steps per mean gap; the variance of a gap grows by less than 1 / 1500 of its mean^2."""
STEPS_PER_WINDOW = 512
"""Likewise for windows shorter than a few gaps."""
LONGEST_WINDOW = 2048.0
"""Windows of more mean gaps than this take the limit of the renewal IDC."""


class ArrivalProcess(Protocol):
    """What a forecast, a sampler and a report need of an arrival process."""

    @property
    def name(self) -> str:
        """What a report calls it."""
        ...

    @property
    def rate_rps(self) -> float:
        """Arrivals per second, requests of a batch counted one by one. [1/s]"""
        ...

    @property
    def gap_cv(self) -> float:
        """Standard deviation over mean of the gaps as an arrival sees them. [-]"""
        ...

    @property
    def parameters(self) -> dict[str, float]:
        """The numbers that define the process, by name."""
        ...

    def idc(self, window_s: ArrayLike) -> Floats:
        """Variance over mean of the counts in windows of `window_s` > 0. [-]"""
        ...

    def gap_cdf(self, gap_s: ArrayLike) -> Floats:
        """P(T <= gap_s) for gaps >= 0. [-]"""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent arrivals at a constant rate.

    >>> Poisson(rate_rps=2.0).idc([1.0, 60.0])
    array([1., 1.])
    """

    rate_rps: float

    def __post_init__(self) -> None:
        _require_positive("rate_rps", self.rate_rps)

    @property
    def name(self) -> str:
        return "Poisson"

    @property
    def gap_cv(self) -> float:
        return 1.0

    @property
    def parameters(self) -> dict[str, float]:
        return {"rate_rps": self.rate_rps}

    def idc(self, window_s: ArrayLike) -> Floats:
        return np.ones_like(_windows(window_s))

    def gap_cdf(self, gap_s: ArrayLike) -> Floats:
        return np.asarray(-np.expm1(-self.rate_rps * _gaps(gap_s)), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class GammaRenewal:
    """Independent Gamma gaps: shape 1 is Poisson, below 1 burstier, above 1 more regular."""

    rate_rps: float
    shape: float

    def __post_init__(self) -> None:
        _require_positive("rate_rps", self.rate_rps)
        _require_positive("shape", self.shape)

    @classmethod
    def from_cv(cls, rate_rps: float, gap_cv: float) -> GammaRenewal:
        """The process with this coefficient of variation of the gaps, > 0.

        >>> GammaRenewal.from_cv(2.0, 0.5).shape
        4.0
        """
        _require_positive("gap_cv", gap_cv)
        return cls(rate_rps=rate_rps, shape=1.0 / gap_cv**2)

    @property
    def name(self) -> str:
        return "Gamma renewal"

    @property
    def gap_cv(self) -> float:
        return 1.0 / math.sqrt(self.shape)

    @property
    def parameters(self) -> dict[str, float]:
        return {"rate_rps": self.rate_rps, "shape": self.shape}

    def idc(self, window_s: ArrayLike) -> Floats:
        # third central moment of Gamma(k) over its mean^3 is 2 / k^2
        return _renewal_idc(self, _windows(window_s), 2.0 / self.shape**2)

    def gap_cdf(self, gap_s: ArrayLike) -> Floats:
        return lower_gamma(self.shape, self.shape * self.rate_rps * _gaps(gap_s))

    def survival_integral(self, gap_s: ArrayLike) -> Floats:
        """Integral of P(T > x) over x from 0 to `gap_s`; the mean gap at infinity. [s]"""
        k, x = self.shape, _gaps(gap_s)
        # E[min(T, x)]; x times the density of Gamma(k) is the mean times that of Gamma(k + 1)
        below = lower_gamma(k + 1.0, k * self.rate_rps * x) / self.rate_rps
        return np.asarray(below + x * (1.0 - self.gap_cdf(x)), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeibullRenewal:
    """Independent Weibull gaps: shape 1 is Poisson, below 1 heavier-tailed than Gamma of the same cv."""

    rate_rps: float
    shape: float

    def __post_init__(self) -> None:
        _require_positive("rate_rps", self.rate_rps)
        _require_positive("shape", self.shape)

    @classmethod
    def from_cv(cls, rate_rps: float, gap_cv: float) -> WeibullRenewal:
        """The process with this coefficient of variation of the gaps, in [1e-3, 1e6].

        >>> round(WeibullRenewal.from_cv(2.0, 1.0).shape, 9)
        1.0
        """
        if not 1e-3 <= gap_cv <= 1e6:
            raise ValueError(f"gap_cv must be in [1e-3, 1e6], got {gap_cv!r}")
        low, high = 0.03, 2000.0  # cv falls with the shape, from 1.5e8 to 6e-4
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if _weibull_cv(middle) > gap_cv else (low, middle)
        return cls(rate_rps=rate_rps, shape=middle)

    @property
    def name(self) -> str:
        return "Weibull renewal"

    @property
    def scale_s(self) -> float:
        """Gap at which the survival is 1 / e. [s]"""
        return 1.0 / (self.rate_rps * math.gamma(1.0 + 1.0 / self.shape))

    @property
    def gap_cv(self) -> float:
        return _weibull_cv(self.shape)

    @property
    def parameters(self) -> dict[str, float]:
        return {"rate_rps": self.rate_rps, "shape": self.shape}

    def idc(self, window_s: ArrayLike) -> Floats:
        one, two, three = (
            math.exp(math.lgamma(1.0 + j / self.shape) - j * math.lgamma(1.0 + 1.0 / self.shape)) for j in (1, 2, 3)
        )
        return _renewal_idc(self, _windows(window_s), three - 3.0 * two + 2.0 * one)

    def gap_cdf(self, gap_s: ArrayLike) -> Floats:
        return np.asarray(-np.expm1(-((_gaps(gap_s) / self.scale_s) ** self.shape)), dtype=np.float64)

    def survival_integral(self, gap_s: ArrayLike) -> Floats:
        """Integral of P(T > x) over x from 0 to `gap_s`; the mean gap at infinity. [s]"""
        share = lower_gamma(1.0 / self.shape, (_gaps(gap_s) / self.scale_s) ** self.shape)
        return np.asarray(share / self.rate_rps, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkovModulated:
    """Poisson arrivals whose rate switches between two values after exponential times (MMPP-2)."""

    low_rps: float
    """Rate in the quiet state, >= 0; 0 is the interrupted Poisson process. [1/s]"""
    high_rps: float
    """Rate in the busy state, > low_rps. [1/s]"""
    to_high_per_s: float
    """Switching rate from quiet to busy: 1 / mean quiet time. [1/s]"""
    to_low_per_s: float
    """Switching rate from busy to quiet: 1 / mean busy time. [1/s]"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.low_rps < self.high_rps < math.inf:
            raise ValueError(f"low_rps must be in [0, high_rps = {self.high_rps!r}), got {self.low_rps!r}")
        _require_positive("to_high_per_s", self.to_high_per_s)
        _require_positive("to_low_per_s", self.to_low_per_s)

    @classmethod
    def from_moments(
        cls, rate_rps: float, rate_variance: float, relaxation_per_s: float, busy_share: float
    ) -> MarkovModulated:
        """From mean and variance of the modulated rate [1/s, 1/s^2], the sum of the switching rates [1/s] and the share
        of time in the busy state, in (0, 1)."""
        if not 0.0 < busy_share < 1.0:
            raise ValueError(f"busy_share must be in (0, 1), got {busy_share!r}")
        odds = busy_share / (1.0 - busy_share)
        deviation = math.sqrt(rate_variance)
        return cls(
            low_rps=rate_rps - deviation * math.sqrt(odds),
            high_rps=rate_rps + deviation / math.sqrt(odds),
            to_high_per_s=relaxation_per_s * busy_share,
            to_low_per_s=relaxation_per_s * (1.0 - busy_share),
        )

    @property
    def name(self) -> str:
        return "Markov-modulated Poisson"

    @property
    def relaxation_per_s(self) -> float:
        """Sum of the switching rates: the rate's autocorrelation is e^(-r t). [1/s]"""
        return self.to_high_per_s + self.to_low_per_s

    @property
    def busy_share(self) -> float:
        """Share of time in the busy state. [-]"""
        return self.to_high_per_s / self.relaxation_per_s

    @property
    def rate_rps(self) -> float:
        return (1.0 - self.busy_share) * self.low_rps + self.busy_share * self.high_rps

    @property
    def rate_variance(self) -> float:
        """Variance of the modulated rate. [1/s^2]"""
        return self.busy_share * (1.0 - self.busy_share) * (self.high_rps - self.low_rps) ** 2

    @property
    def gap_cv(self) -> float:
        first, second, share = self._gap_mixture()
        mean = share / first + (1.0 - share) / second
        return math.sqrt(2.0 * (share / first**2 + (1.0 - share) / second**2) / mean**2 - 1.0)

    @property
    def parameters(self) -> dict[str, float]:
        return {
            "low_rps": self.low_rps,
            "high_rps": self.high_rps,
            "to_high_per_s": self.to_high_per_s,
            "to_low_per_s": self.to_low_per_s,
        }

    def idc(self, window_s: ArrayLike) -> Floats:
        excess = 2.0 * self.rate_variance / (self.rate_rps * self.relaxation_per_s)
        return np.asarray(1.0 + excess * _saturation(self.relaxation_per_s * _windows(window_s)), dtype=np.float64)

    def gap_cdf(self, gap_s: ArrayLike) -> Floats:
        first, second, share = self._gap_mixture()
        x = _gaps(gap_s)
        return np.asarray(-share * np.expm1(-first * x) - (1.0 - share) * np.expm1(-second * x), dtype=np.float64)

    def _gap_mixture(self) -> tuple[float, float, float]:
        """The gap after an arrival is exponential with one of two rates: both rates, and the share of the first.

        The rates are minus the eigenvalues of D0 = Q - Lambda; the mean hazard at an arrival, sum pi l^2 / sum pi l,
        fixes the share.
        """
        low, high, up, down = self.low_rps, self.high_rps, self.to_high_per_s, self.to_low_per_s
        trace = low + high + up + down
        determinant = low * high + low * down + high * up
        first = 0.5 * (trace + math.sqrt((low + up - high - down) ** 2 + 4.0 * up * down))
        second = determinant / first  # not as a difference, which loses digits where states last long
        hazard = (self.rate_variance + self.rate_rps**2) / self.rate_rps
        return first, second, (hazard - second) / (first - second)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricBatch:
    """Batch sizes 1, 2, ... with P(B = b) = (1 - 1/mean)^(b - 1) / mean."""

    mean: float

    def __post_init__(self) -> None:
        if not 1.0 <= self.mean < math.inf:
            raise ValueError(f"mean must be at least 1 request and finite, got {self.mean!r}")

    @property
    def second_moment(self) -> float:
        """E[B^2]."""
        return self.mean * (2.0 * self.mean - 1.0)

    @property
    def parameters(self) -> dict[str, float]:
        return {"mean_batch": self.mean}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmpiricalBatch:
    """Batch sizes as they were counted."""

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    """Share of the batches that have each size, summing to 1."""

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.shares):
            raise ValueError(f"shares must be one per size, got {len(self.shares)} for {len(self.sizes)} sizes")
        if min(self.sizes) < 1:
            raise ValueError(f"sizes must be at least 1 request, got {min(self.sizes)}")
        if not (min(self.shares) >= 0.0 and abs(sum(self.shares) - 1.0) <= 1e-9):
            raise ValueError(f"shares must be >= 0 and sum to 1, got a sum of {sum(self.shares)!r}")

    @property
    def mean(self) -> float:
        """E[B]."""
        return math.fsum(size * share for size, share in zip(self.sizes, self.shares, strict=True))

    @property
    def second_moment(self) -> float:
        """E[B^2]."""
        return math.fsum(size**2 * share for size, share in zip(self.sizes, self.shares, strict=True))

    @property
    def parameters(self) -> dict[str, float]:
        return {"mean_batch": self.mean, "mean_square_batch": self.second_moment, "largest_batch": max(self.sizes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchArrivals:
    """Batches of independent sizes at the epochs of a Poisson process."""

    epoch_rate_per_s: float
    """Batches per second. [1/s]"""
    batch: GeometricBatch | EmpiricalBatch

    def __post_init__(self) -> None:
        _require_positive("epoch_rate_per_s", self.epoch_rate_per_s)

    @property
    def name(self) -> str:
        return "batches at Poisson epochs"

    @property
    def rate_rps(self) -> float:
        return self.epoch_rate_per_s * self.batch.mean

    @property
    def gap_cv(self) -> float:
        return math.sqrt(2.0 * self.batch.mean - 1.0)

    @property
    def parameters(self) -> dict[str, float]:
        return {"epoch_rate_per_s": self.epoch_rate_per_s, **self.batch.parameters}

    def idc(self, window_s: ArrayLike) -> Floats:
        return np.full(_windows(window_s).shape, self.batch.second_moment / self.batch.mean)

    def gap_cdf(self, gap_s: ArrayLike) -> Floats:
        # a request is the last of its batch with probability 1 / E[B]; only then is its gap not zero
        return np.asarray(1.0 - np.exp(-self.epoch_rate_per_s * _gaps(gap_s)) / self.batch.mean, dtype=np.float64)


def _renewal_idc(process: GammaRenewal | WeibullRenewal, window_s: Floats, third: float) -> Floats:
    """IDC of a renewal process: its renewal function on a grid, and the limit for windows of many gaps.

    `third` is the third central moment of the gap over its mean^3.
    """
    gaps = process.rate_rps * window_s.ravel()
    cv2 = process.gap_cv**2
    # of a window of very many gaps the limit's first correction is below what a count can show
    result = cv2 + (1.0 / 6.0 + cv2**2 / 2.0 - third / 3.0) / gaps
    for at in np.flatnonzero(gaps <= LONGEST_WINDOW):
        result[at] = _short_renewal_idc(process, float(gaps[at]))
    return np.asarray(result.reshape(window_s.shape), dtype=np.float64)


def _short_renewal_idc(process: GammaRenewal | WeibullRenewal, gaps: float) -> float:
    """IDC of a window of `gaps` mean gaps, from renewals on a grid of that window.

    The mass of a gap between two grid points goes to both, so that the mean stays exact. The probabilities of a renewal
    at each point are the coefficients of 1 / (1 - f(z)), read off a circle of radius < 1 (Abate & Whitt, Operations
    Research Letters 12, 1992: the lattice-Poisson algorithm; aliasing is below 1e-9).
    """
    steps = math.ceil(max(STEPS_PER_WINDOW, STEPS_PER_GAP * gaps))
    size = 1 << (2 * steps).bit_length()
    points = np.arange(steps + 2)
    step = gaps / steps
    # E[min(T, x)] in mean gaps; minus its second difference is the split mass
    integral = process.survival_integral(points * (step / process.rate_rps)) * process.rate_rps
    mass = np.empty(steps + 1)
    mass[0] = 1.0 - integral[1] / step
    mass[1:] = (2.0 * integral[1:-1] - integral[:-2] - integral[2:]) / step
    decay = 10.0 ** (-9.0 / size)
    damping = decay ** points[:-1]
    circle = np.fft.rfft(mass * damping, size)
    renewals = np.fft.irfft(1.0 / (1.0 - circle), size)[: steps + 1] / damping
    # the mass at a grid point stands for both sides of it: half of it lies within the window that ends there
    mean_renewals = np.cumsum(renewals) - 0.5 * renewals - 1.0
    mean_renewals[0] = 0.0
    area = step * (mean_renewals.sum() - 0.5 * mean_renewals[-1])
    return float(1.0 + 2.0 * area / gaps - gaps)


def _saturation(x: Floats) -> Floats:
    """1 - (1 - e^-x) / x, without cancellation at small x."""
    small = x < 1e-4
    safe = np.where(small, 1.0, x)
    return np.where(small, x / 2.0 - x * x / 6.0, 1.0 + np.expm1(-safe) / safe)


def _weibull_cv(shape: float) -> float:
    """sqrt(Gamma(1 + 2/c) / Gamma(1 + 1/c)^2 - 1)."""
    return math.sqrt(math.expm1(math.lgamma(1.0 + 2.0 / shape) - 2.0 * math.lgamma(1.0 + 1.0 / shape)))


def _windows(window_s: ArrayLike) -> Floats:
    w = np.asarray(window_s, dtype=np.float64)
    if not np.all((w > 0.0) & np.isfinite(w)):
        raise ValueError("window_s must be positive and finite")
    return w


def _gaps(gap_s: ArrayLike) -> Floats:
    x = np.asarray(gap_s, dtype=np.float64)
    if not np.all(x >= 0.0):
        raise ValueError("gap_s must be >= 0")
    return x


def _require_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")

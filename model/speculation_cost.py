r"""Seconds of one speculative step: a draft of :math:`\gamma` tokens for B requests, then one verification pass.

.. math:: T(B, \gamma) = V(n, B, l) + D(B, \gamma, l), \qquad n = B (\gamma + 1)

n rows are verified together and every current engine reads a request's cache once for all of its rows, so the cache
term grows with B l, not n l. V in one of three forms of the rows, none of which holds everywhere:

.. math::
   V &= a + b\,\phi(n / \tau) + g n + s B + \kappa B l \\
   \phi(x) &= 1 - e^{-x} \;\text{(saturating)}, \quad x / (1 + x) \;\text{(hyperbolic)}, \quad
              \ln(1 + x) / \ln(1 + 256 / \tau) \;\text{(logarithmic)}

a is the step that moves the weights whatever the rows; :math:`b \phi` what further rows add while they still wake
experts (:func:`experts_read`) or fill kernels; g n compute; s B host, sampler and others' prompts. Drafting costs
:math:`D = d_0 + d \gamma` for any :math:`\gamma > 0`: d_0 once per round (the pass that brings the drafter up to date,
host work, the engine's other code path), d per position; d is near 0 for a drafter that yields all positions in one
pass.

Armed but idle: an engine that has a schedule configured pays in a step of length 0 what keeps its drafter in step; d_0
where nothing was measured.

Sources: the shapes are ours, compared on public sweeps (docs, speculation); SmartSpec (arXiv 2406.14066) is the linear
case b = 0; graph sizes and the limit above which an engine runs eagerly are the engine's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RISE_ROWS = 256.0
"""Rows at which the logarithmic form has risen by b. [tokens]"""


class RowForm(StrEnum):
    """How a verification pass grows with its rows before it is limited by compute."""

    SATURATING = "saturating"
    HYPERBOLIC = "hyperbolic"
    LOGARITHMIC = "logarithmic"


class SpeculationCost(Protocol):
    """What solvers, controllers and the simulator ask of a cost model; arguments broadcast, results in seconds."""

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> Floats:
        """One target pass over `rows` tokens of `requests` sequences with `context` cached tokens each. [s]"""
        ...

    def draft(self, requests: ArrayLike, gamma: ArrayLike, context: ArrayLike) -> Floats:
        """Drafting of `gamma` tokens for each of `requests`; 0 at length 0. [s]"""
        ...

    def idle(self, requests: ArrayLike, context: ArrayLike) -> Floats:
        """What a step of length 0 pays for a configured drafter. [s]"""
        ...


def step_seconds(
    cost: SpeculationCost, batch: ArrayLike, gamma: ArrayLike, context: ArrayLike = 0.0, *, armed: bool = False
) -> Floats:
    """T: verification and draft of a uniform step; `armed` adds the idle cost where gamma is 0. [s]"""
    batch, gamma = np.asarray(batch, dtype=np.float64), np.asarray(gamma, dtype=np.float64)
    total = cost.verify(batch * (gamma + 1.0), batch, context) + cost.draft(batch, gamma, context)
    if armed:
        total = total + np.where(gamma == 0.0, cost.idle(batch, context), 0.0)
    return np.asarray(total, dtype=np.float64)


def rise(form: RowForm, rows: ArrayLike, tau: ArrayLike) -> Floats:
    """phi(n / tau) of the module docstring, in [0, 1) for the first two forms. [-]"""
    x = np.asarray(rows, dtype=np.float64) / np.asarray(tau, dtype=np.float64)
    if form is RowForm.SATURATING:
        return np.asarray(-np.expm1(-x))
    if form is RowForm.HYPERBOLIC:
        return np.asarray(x / (1.0 + x))
    return np.asarray(np.log1p(x) / np.log1p(RISE_ROWS / np.asarray(tau, dtype=np.float64)))


def experts_read(experts: ArrayLike, per_token: ArrayLike, rows: ArrayLike) -> Floats:
    r"""Distinct experts of one layer that `rows` tokens wake: :math:`E (1 - (1 - t / E)^n)`, independent routing.

    Real routing is correlated, so this is an upper bound. The scale of its saturation, E / t rows, is what tau becomes
    where experts dominate.

    >>> experts_read(128, 8, [1, 8, 64]).round(2).tolist()
    [8.0, 51.62, 125.94]
    """
    experts, active = np.asarray(experts, dtype=np.float64), np.asarray(per_token, dtype=np.float64)
    rows = np.asarray(rows, dtype=np.float64)
    if np.any(~((active > 0.0) & (active <= experts))):
        raise ValueError(f"per_token must be > 0 and <= experts, got {active.tolist()} of {experts.tolist()}")
    if np.any(~(rows >= 0.0)):
        raise ValueError(f"rows must be >= 0, got {rows.tolist()}")
    with np.errstate(divide="ignore", invalid="ignore"):  # every expert active: log1p(-1) is -inf, and 0 rows read none
        left = np.where(rows > 0.0, rows * np.log1p(-active / experts), 0.0)
    return np.asarray(experts * -np.expm1(left))


def padded(rows: ArrayLike, captured: ArrayLike) -> Floats:
    """Rows that are computed: the next captured graph size, `rows` themselves above the largest. [tokens]"""
    rows, sizes = np.asarray(rows, dtype=np.float64), np.sort(np.asarray(captured, dtype=np.float64))
    if not sizes.size:
        return rows
    at = np.searchsorted(sizes, rows)
    return np.where(at < sizes.size, sizes[np.minimum(at, sizes.size - 1)], rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormulaCost:
    """V and D of the module docstring with numbers in them."""

    form: RowForm
    base_s: float
    """a: a pass of no rows. [s]"""
    rise_s: float
    """b. [s]"""
    rise_rows: float
    """tau. [tokens]"""
    row_s: float
    """g: per row, for all rows. [s]"""
    request_s: float
    """s: per request. [s]"""
    round_s: float
    """d_0: once per round that drafts. [s]"""
    draft_s: float
    """d: per drafted position. [s]"""
    cached_token_s: float = 0.0
    """kappa: per cached token beyond `reference_context`. [s]"""
    reference_context: float = 0.0
    """Cached tokens per request at which the other constants hold. [tokens]"""
    idle_s: float | None = None
    """Armed but idle, per step; None: d_0. [s]"""
    idle_request_s: float = 0.0
    """The same, per request. [s]"""
    captured: tuple[int, ...] = ()
    """Graph sizes that rows are padded to; none: no staircase. [tokens]"""
    eager_s: float = 0.0
    """Added to a pass above the largest captured size: the cliff. [s]"""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name not in ("form", "captured") and value is not None and not (np.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if self.rise_rows == 0.0:
            raise ValueError(f"rise_rows must be > 0, got {self.rise_rows}")
        if any(not size > 0 for size in self.captured):
            raise ValueError(f"captured must be sizes > 0, got {self.captured}")

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> Floats:
        """See `SpeculationCost`."""
        rows, requests = np.asarray(rows, dtype=np.float64), np.asarray(requests, dtype=np.float64)
        n = padded(rows, self.captured)
        seconds = self.base_s + self.rise_s * rise(self.form, n, self.rise_rows) + self.row_s * n
        beyond = np.asarray(context, dtype=np.float64) - self.reference_context
        seconds = seconds + self.request_s * requests + self.cached_token_s * requests * beyond
        if self.captured:
            seconds = seconds + self.eager_s * (rows > max(self.captured))
        return np.asarray(seconds)

    def draft(self, requests: ArrayLike, gamma: ArrayLike, context: ArrayLike) -> Floats:
        """See `SpeculationCost`."""
        gamma = np.asarray(gamma, dtype=np.float64)
        seconds = self.round_s * (gamma > 0.0) + self.draft_s * gamma
        return np.asarray(seconds + 0.0 * np.asarray(requests) + 0.0 * np.asarray(context))

    def idle(self, requests: ArrayLike, context: ArrayLike) -> Floats:
        """See `SpeculationCost`."""
        once = self.round_s if self.idle_s is None else self.idle_s
        return np.asarray(
            once + self.idle_request_s * np.asarray(requests, dtype=np.float64) + 0.0 * np.asarray(context)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCost:
    """Measured passes: verification by rows, one draft pass by requests, as an engine's own start-up run writes them.

    Inside the captured sizes a pass costs what its size costs (a staircase); above them the eager points count, which
    is the cliff. Between eager points, and beyond the last of either table, seconds are linear in the rows.
    """

    rows: Floats
    """Captured sizes, increasing. [tokens]"""
    verify_s: Floats
    draft_requests: Floats
    draft_pass_s: Floats
    parallel: bool
    eager_rows: Floats
    """Empty where the engine was not measured beyond its graphs; the graphs' last slope is then used, which is kind."""
    eager_verify_s: Floats
    cached_token_s: float = 0.0
    reference_context: float = 0.0

    def __post_init__(self) -> None:
        pairs = (
            ("verify_s", self.rows, self.verify_s, 2),
            ("draft_pass_s", self.draft_requests, self.draft_pass_s, 1),
            ("eager_verify_s", self.eager_rows, self.eager_verify_s, 0),
        )
        for name, x, y, least in pairs:
            if x.shape != y.shape or x.ndim != 1 or x.size < least:
                raise ValueError(f"{name} must have one value per size and at least {least}, got {y.size} for {x.size}")
            if not (np.isfinite(x).all() and (x > 0.0).all() and (np.diff(x) > 0.0).all()):
                raise ValueError(f"sizes of {name} must be finite, > 0 and increase, got {x.tolist()}")
            if not (np.isfinite(y).all() and (y > 0.0).all()):
                raise ValueError(f"{name} must be finite and > 0, got {y.tolist()}")
        for name in ("cached_token_s", "reference_context"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> Floats:
        """See `SpeculationCost`."""
        rows, requests = np.asarray(rows, dtype=np.float64), np.asarray(requests, dtype=np.float64)
        graph = _line(padded(rows, self.rows), self.rows, self.verify_s)
        if self.eager_rows.size:
            eager = _line(rows, self.eager_rows, self.eager_verify_s)
            graph = np.where(rows > self.rows[-1], np.maximum(eager, self.verify_s[-1]), graph)
        beyond = np.asarray(context, dtype=np.float64) - self.reference_context
        return np.asarray(graph + self.cached_token_s * requests * beyond)

    def draft(self, requests: ArrayLike, gamma: ArrayLike, context: ArrayLike) -> Floats:
        """See `SpeculationCost`."""
        gamma = np.asarray(gamma, dtype=np.float64)
        passes = (gamma > 0.0).astype(np.float64) if self.parallel else gamma
        return np.asarray(passes * self.idle(requests, context))

    def idle(self, requests: ArrayLike, context: ArrayLike) -> Floats:
        """One draft pass: see `SpeculationCost`."""
        one = _line(np.asarray(requests, dtype=np.float64), self.draft_requests, self.draft_pass_s)
        return np.asarray(one + 0.0 * np.asarray(context))


def _line(at: Floats, x: Floats, y: Floats) -> Floats:
    """Piecewise linear, the first value below the first sample, the last slope beyond the last one."""
    inside = np.interp(at, x, y)
    if x.size < 2:
        return np.asarray(inside)
    slope = max((y[-1] - y[-2]) / (x[-1] - x[-2]), 0.0)
    return np.asarray(inside + slope * np.maximum(at - x[-1], 0.0))

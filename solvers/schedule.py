r"""Replicas over time at least cost: when to start and when to stop, with a start-up lead time and a minimum dwell.

A day is cut into windows of :math:`\Delta` seconds, each with the fewest replicas :math:`r_w` that meet the objectives
there. The fleet :math:`x_w` serves at least that many. A replica that is to serve from window w on is ordered a lead
time :math:`\ell` before and paid from the order; starting it may cost :math:`c` more. With :math:`p` the price of a
replica:

.. math::
   \min_x \; p \Delta \sum_w x_w + (p \ell + c) \sum_{w \ge 1} (x_w - x_{w-1})^+, \qquad r_w \le x_w \le R

**Dwell**: the fleet may fall only when its last rise is at least the minimum dwell ago (a cool-down, as autoscalers
have it). Every replica then stays at least that long. A rule per replica (older replicas may leave while a younger one
dwells) is weaker and may cost less; it is not what is solved here.

**Edges**: replicas at time 0 are warm, free of charge until then, and may leave at any time; their number is the
solver's choice. A rise before the first lead time would have been ordered before time 0 and is not possible, so that
number covers it. A dwell that outlasts the day costs nothing after its end.

**Exact by dynamic programming.** Costs are in replica-windows, s = (l + c / p) / Delta is the price of a start, D the
dwell in windows. free(w, n): least cost from window w on after n replicas that may leave; risen(w, n): from window w on
where the fleet has just risen to n; rise(w, n): likewise when it rises from n:

.. math::
   free(w, n) &= \min(\min_{m \le n} m + free(w + 1, m),\; rise(w, n)), \quad
   rise(w, n) = \min_{m > n} s (m - n) + risen(w, m) \\
   risen(w, n) &= \min(D n + free(w + D, n),\; \min_{0 < k < D} k n + rise(w + k, n))

Terms whose windows need more than they hold are left out. The state is (window, replicas) alone: between a rise and
the end of its dwell the fleet only holds or rises, so the windows since the last rise need no place in it. All
replicas are solved at once, which takes about windows^2 x replicas additions at the longest dwell.

**The limit R** counts serving replicas. Those in their lead time stay within it, too: of equal costs the path takes
the larger fleet when it could fall, so none falls and rises again within one lead time, and whatever is paid for now
serves together one lead time later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from servecast.solvers.results import Status

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

MAX_CELLS = 10_000_000
"""Windows times fleet sizes beyond which the tables would not fit into memory."""
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleProblem:
    """What a day needs, and what it costs to follow it."""

    window_s: float
    required: Counts
    """Fewest replicas that meet the objectives, per window."""
    usd_per_replica_hour: float
    max_replicas: int
    """Most replicas at once."""
    lead_time_s: float
    """From the order of a replica to its first request; paid. [s]"""
    min_dwell_s: float
    """From a rise of the fleet to its next fall. [s]"""
    start_usd: float = 0.0
    """Per start, beside the lead time's price. [USD]"""

    def __post_init__(self) -> None:
        for name in ("window_s", "usd_per_replica_hour"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        for name in ("lead_time_s", "min_dwell_s", "start_usd"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)!r}")
        if self.max_replicas < 1:
            raise ValueError(f"max_replicas must be at least 1, got {self.max_replicas}")
        need = self.required
        if need.ndim != 1 or not need.size or not np.issubdtype(need.dtype, np.integer):
            raise ValueError(f"required must be a list of whole numbers, got shape {need.shape} of {need.dtype}")
        if need.min() < 0:
            raise ValueError(f"required must be >= 0, got {need.min()} in window {int(need.argmin())}")

    @property
    def first_rise(self) -> int:
        """First window for which a replica can be ordered within the day."""
        return math.ceil(_ratio(self.lead_time_s, self.window_s))

    @property
    def dwell_windows(self) -> int:
        """Windows from a rise to the earliest fall, at least 1."""
        return max(math.ceil(_ratio(self.min_dwell_s, self.window_s)), 1)

    @property
    def start_windows(self) -> float:
        """Price of one start. [replica-windows]"""
        return float(_ratio(self.lead_time_s, self.window_s)) + self.start_usd / self.usd_per_window

    @property
    def usd_per_window(self) -> float:
        return self.usd_per_replica_hour * self.window_s / SECONDS_PER_HOUR

    def cost_usd(self, replicas: Counts) -> float:
        """Of any fleet over time; replicas of the first window are warm. [USD]"""
        rises = int(np.maximum(np.diff(replicas), 0).sum())
        return (int(replicas.sum()) + rises * self.start_windows) * self.usd_per_window


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSchedule:
    """Answer: the fleet of each window, and how far it is from what no schedule can beat."""

    status: Status
    replicas: Counts
    """Serving, per window; empty where infeasible, as are the next three."""
    started: Counts
    """Of them, serving since the start of the window; those of the first window are warm and not counted."""
    ordered: Counts
    """Ordered within the window, one lead time before they serve."""
    stopped: Counts
    """Given back at the start of the window."""
    cost_usd: float
    always_peak_usd: float
    """Of a fleet that has the busiest window's size all day."""
    saving: float
    """1 - cost / always peak. [-]"""
    lower_bound_usd: float
    """What each window needs and no more: without lead time, start cost and dwell."""
    binds: str
    """Which rule costs most beside the requirement itself, in words."""
    gap: float = field(default=0.0)
    """Relative distance to the optimum: 0, the recursion is exact. [-]"""


def solve_schedule(problem: ScheduleProblem) -> ReplicaSchedule:
    """Cheapest fleet over time.

    Returns a schedule with status ``infeasible``, naming the window, where one needs more than `max_replicas`.

    >>> problem = ScheduleProblem(
    ...     window_s=60.0, required=np.array([1, 1, 4, 1, 4, 1, 1, 1]), usd_per_replica_hour=60.0, max_replicas=8,
    ...     lead_time_s=60.0, min_dwell_s=0.0)
    >>> found = solve_schedule(problem)
    >>> found.replicas.tolist(), found.ordered.tolist(), found.cost_usd, found.lower_bound_usd
    ([1, 1, 4, 4, 4, 1, 1, 1], [0, 3, 0, 0, 0, 0, 0, 0], 20.0, 14.0)
    """
    peak = int(problem.required.max())
    if peak > problem.max_replicas:
        return _infeasible(problem)
    replicas = _least_cost_path(problem)
    faults = schedule_faults(problem, replicas)
    if faults:
        raise RuntimeError(f"the schedule breaks its own rules: {faults[0]}")
    cost = problem.cost_usd(replicas)
    always = peak * len(replicas) * problem.usd_per_window
    change = np.diff(replicas, prepend=replicas[0])
    started = np.maximum(change, 0)
    return ReplicaSchedule(
        status=Status.OPTIMAL,
        replicas=replicas,
        started=started,
        ordered=_orders(problem, started),
        stopped=np.maximum(-change, 0),
        cost_usd=cost,
        always_peak_usd=always,
        saving=1.0 - cost / always if always > 0.0 else 0.0,
        lower_bound_usd=_lower_bound(problem),
        binds=_what_binds(problem, cost),
    )


def schedule_faults(problem: ScheduleProblem, replicas: Counts) -> list[str]:
    """Rules that a fleet over time breaks, in words; empty where it breaks none. Says nothing about its cost."""
    need, have = problem.required.tolist(), replicas.tolist()
    if len(need) != len(have):
        return [f"{len(need)} windows need a fleet, got {len(have)}"]
    faults: list[str] = []
    risen_at: int | None = None
    for w, serving in enumerate(have):
        before = have[w - 1] if w else serving
        if serving < need[w]:
            faults.append(f"window {w} needs {need[w]} replicas, has {serving}")
        if serving > problem.max_replicas:
            faults.append(f"window {w} has {serving} replicas, at most {problem.max_replicas} may serve")
        if serving < before and risen_at is not None and w - risen_at < problem.dwell_windows:
            faults.append(f"the fleet falls at window {w}, {w - risen_at} windows after it rose")
        if serving > before:
            risen_at = w
            if w < _ratio(problem.lead_time_s, problem.window_s):
                faults.append(f"the rise at window {w} would be ordered before time 0")
    return faults


def _ratio(seconds: float, window_s: float) -> Fraction:
    """Exact quotient of two decimals: 1.1 s is 11 windows of 0.1 s, not 11 and a rounding error."""
    return Fraction(repr(float(seconds))) / Fraction(repr(float(window_s)))


def _lower_bound(problem: ScheduleProblem) -> float:
    return int(problem.required.sum()) * problem.usd_per_window


def _orders(problem: ScheduleProblem, started: Counts) -> Counts:
    lead = _ratio(problem.lead_time_s, problem.window_s)
    ordered = np.zeros_like(started)
    for w in np.flatnonzero(started):
        ordered[math.floor(int(w) - lead)] += started[w]
    return ordered


def _what_binds(problem: ScheduleProblem, cost: float) -> str:
    if math.isclose(cost, _lower_bound(problem), rel_tol=1e-9):
        return "the requirement of each window: the fleet follows it"
    without = {
        "lead time and start cost": replace(problem, lead_time_s=0.0, start_usd=0.0),
        "minimum dwell": replace(problem, min_dwell_s=0.0),
    }
    costs = {rule: relaxed.cost_usd(_least_cost_path(relaxed)) for rule, relaxed in without.items()}
    rule = min(costs, key=lambda name: costs[name])
    if math.isclose(costs[rule], cost, rel_tol=1e-9):
        return f"{' and '.join(costs)} alike: with either of them alone the cost would be the same"
    return f"{rule}: without it the cost would be {costs[rule]:.2f} USD, not {cost:.2f}"


def _infeasible(problem: ScheduleProblem) -> ReplicaSchedule:
    w = int(np.argmax(problem.required > problem.max_replicas))
    none = np.zeros(0, dtype=np.int64)
    return ReplicaSchedule(
        status=Status.INFEASIBLE,
        replicas=none,
        started=none,
        ordered=none,
        stopped=none,
        cost_usd=math.inf,
        always_peak_usd=math.inf,
        saving=0.0,
        lower_bound_usd=_lower_bound(problem),
        binds=f"count: window {w} (from {w * problem.window_s:g} s) needs {problem.required[w]} replicas, "
        f"at most {problem.max_replicas} may serve",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """Least costs by window and fleet, [window, level]; in replica-windows, inf where nothing is possible."""

    levels: Counts
    """Fleet sizes: no cheapest schedule leaves the range of what is required."""
    free: Floats
    """[window + 1, level]: after n replicas that may leave."""
    stay: Floats
    """With n replicas in the window and no rise."""
    risen: Floats
    rise: Floats
    need_ahead: Counts
    """Most that is required from a window to the end of the dwell that starts there."""


def _least_cost_path(problem: ScheduleProblem) -> Counts:
    tables = _solve_tables(problem)
    levels, need, windows = tables.levels, problem.required, len(problem.required)
    path = np.zeros(windows, dtype=np.int64)
    w, n = 0, len(levels) - 1  # before time 0 any fleet may be had: the largest, all of which may leave
    while w < windows:
        stay = tables.stay[w, : n + 1]
        if stay.min() <= tables.rise[w, n]:
            n = int(np.flatnonzero(stay == stay.min())[-1])  # the larger of equals: see the limit
            path[w] = levels[n]
            w += 1
            continue
        n, end, again = _risen_to(problem, tables, w, n), w, True
        while again:
            start, (end, again) = end, _held_until(problem, tables, end, n)
            path[start:end] = levels[n]
            if again:
                n = _risen_to(problem, tables, end, n)
        w = end
    if (path < need).any():
        raise RuntimeError("the path of the recursion falls short of what it was solved for")
    return path


def _risen_to(problem: ScheduleProblem, tables: _Tables, w: int, n: int) -> int:
    """Level to rise to from level n at window w."""
    higher = tables.risen[w, n + 1 :] + problem.start_windows * tables.levels[n + 1 :]
    return n + 1 + int(higher.argmin())


def _held_until(problem: ScheduleProblem, tables: _Tables, w: int, n: int) -> tuple[int, bool]:
    """First window after a rise to level n at w that may have another fleet, and whether it rises there again."""
    level = int(tables.levels[n])
    end = min(w + problem.dwell_windows, len(problem.required))
    held = (end - w) * level + tables.free[end, n] if level >= tables.need_ahead[w] else math.inf
    short = np.flatnonzero(problem.required[w:end] > level)
    last = w + int(short[0]) if short.size else end - 1
    options = tables.rise[w + 1 : last + 1, n] + level * np.arange(1, last - w + 1)
    if options.size and options.min() < held:
        return w + 1 + int(options.argmin()), True
    return end, False


def _solve_tables(problem: ScheduleProblem) -> _Tables:
    need, windows = problem.required, len(problem.required)
    start, first_rise = problem.start_windows, problem.first_rise
    levels = np.arange(need.min(), need.max() + 1, dtype=np.int64)
    if windows * len(levels) > MAX_CELLS:
        raise ValueError(f"windows times fleet sizes must be at most {MAX_CELLS}, got {windows} x {len(levels)}")
    dwell = min(problem.dwell_windows, windows)
    padded = np.append(need, np.zeros(dwell - 1, dtype=np.int64))
    ahead = np.lib.stride_tricks.sliding_window_view(padded, dwell).max(axis=1)
    shape = (windows, len(levels))
    free = np.zeros((windows + 1, len(levels)))
    stay, risen, rise, reach = np.empty(shape), np.empty(shape), np.full(shape, np.inf), np.empty(shape)
    for w in range(windows - 1, -1, -1):
        short = int(np.searchsorted(levels, need[w]))  # levels before it do not serve window w
        end = min(w + dwell, windows)
        stay[w] = levels + free[w + 1]
        risen[w] = np.where(levels >= ahead[w], (end - w) * levels + free[end], np.inf)
        if end - w > 1:
            # reach holds rise(v, n) + n v, so that holding from w to v is a difference
            np.minimum(risen[w], reach[w + 1 : end].min(axis=0) - w * levels, out=risen[w])
        stay[w, :short] = risen[w, :short] = np.inf
        if w >= first_rise:
            dearer = (risen[w] + start * levels)[:0:-1]
            rise[w, :-1] = np.minimum.accumulate(dearer)[::-1] - start * levels[:-1]
        free[w] = np.minimum(np.minimum.accumulate(stay[w]), rise[w])
        reach[w] = rise[w] + w * levels
        reach[w + 1 : end, :short] = np.inf  # no earlier rise to these levels holds through window w
    return _Tables(levels=levels, free=free, stay=stay, risen=risen, rise=rise, need_ahead=ahead)

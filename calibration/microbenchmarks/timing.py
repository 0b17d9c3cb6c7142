"""How one call is timed: warm-up, repeats of enough calls, marked outliers, and a watch on the clock itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import Any, Protocol

resource: ModuleType | None
try:
    import resource
except ImportError:  # pragma: no cover (a system without it)
    resource = None

REPEATS = 11
"""Most undisturbed repeats in one visit; visits are many, so that few repeats each see more of the machine's drift."""
MOST_REPEATS = 40
REPEAT_S = 2e-4
"""Least length of a repeat on the host clock: a hundred times what a clock read and a loop cost, and short beside the
time slices of a scheduler, so that other work on the machine spoils few repeats and not the median. [s]"""
MOST_INNER = 1000

Call = Callable[[int], object]
"""Runs the kernel on the set of buffers with this number."""


class Clock(Protocol):
    """Two clocks that must agree: one for durations, one of the day."""

    def perf(self) -> float: ...
    def wall(self) -> float: ...


class SystemClock:
    """`time.perf_counter` and `time.time`: on Linux the first is the monotonic clock, the second has another source of
    steps."""

    def perf(self) -> float:
        return time.perf_counter()

    def wall(self) -> float:
        return time.time()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one visit of a point gave."""

    seconds: tuple[float, ...]
    """Of one call, one value a repeat. [s]"""
    inner: int
    """Calls in a repeat."""
    disturbed: tuple[int, ...] = ()
    """Repeats during which the system took a core away for other work."""
    suspect: str = ""


class Timer(Protocol):
    """Seconds of one call, averaged over `inner` calls from set number `first`."""

    def time(self, call: Call, first: int, inner: int) -> float: ...


class HostTimer:
    """The host clock, for work that is done when the call returns."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def time(self, call: Call, first: int, inner: int) -> float:
        start = self._clock.perf()
        for turn in range(first, first + inner):
            call(turn)
        return (self._clock.perf() - start) / inner


class CudaTimer:
    """Events on the stream: device time, without what the host spends on the launch of a long queue."""

    def __init__(self, torch: Any) -> None:
        self._cuda = torch.cuda

    def time(self, call: Call, first: int, inner: int) -> float:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda.synchronize()
        start.record()
        for turn in range(first, first + inner):
            call(turn)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / inner


def involuntary_switches() -> int:
    """How often the system has taken a core from a thread of this process; 0 where it does not count."""
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def repeat(
    call: Call,
    timer: Timer,
    clock: Clock,
    limit_s: float,
    *,
    switches: Callable[[], int] = involuntary_switches,
) -> Measurement:
    """One visit: two calls to warm up, then repeats until `REPEATS` were undisturbed or `limit_s` is used, two or more.

    A repeat in which a thread lost its core measures other work; where threads wait for each other, by a whole slice of
    the scheduler. Such repeats are kept and marked.
    """
    begin = clock.perf()
    timer.time(call, 0, 1)
    once_s = timer.time(call, 1, 1)
    inner = calls_per_repeat(once_s)
    turn = 2
    seconds: list[float] = []
    disturbed: list[int] = []
    before = switches()
    while len(seconds) < 2 or (
        len(seconds) - len(disturbed) < REPEATS
        and len(seconds) < MOST_REPEATS
        and clock.perf() - begin + inner * once_s <= limit_s
    ):
        # a clock that stands still for a whole repeat gives 0: the smallest positive time keeps the line readable
        seconds.append(max(timer.time(call, turn, inner), 1e-12))
        turn += inner
        after = switches()
        if after != before:
            disturbed.append(len(seconds) - 1)
        before = after
    return Measurement(seconds=tuple(seconds), inner=inner, disturbed=tuple(disturbed))


def marked(found: Measurement) -> tuple[int, ...]:
    """Repeats that were disturbed, and those of the others that are far from their median."""
    clean = [i for i in range(len(found.seconds)) if i not in found.disturbed]
    far = [clean[i] for i in outliers([found.seconds[i] for i in clean])] if clean else []
    return tuple(sorted({*found.disturbed, *far}))


def calls_per_repeat(once_s: float) -> int:
    """So many calls that a repeat is at least `REPEAT_S` long."""
    return min(max(math.ceil(REPEAT_S / max(once_s, 1e-9)), 1), MOST_INNER)


def outliers(seconds: Sequence[float]) -> tuple[int, ...]:
    """Repeats beyond five scaled median absolute deviations and a tenth of the median.

    >>> outliers([1.0, 1.01, 0.99, 1.0, 3.0])
    (4,)
    """
    middle = median(seconds)
    spread = 1.4826 * median(abs(one - middle) for one in seconds)
    far = max(5.0 * spread, 0.1 * middle)
    return tuple(i for i, one in enumerate(seconds) if abs(one - middle) > far)


class ClockWatch:
    """Says when the two clocks disagree: one of them was set, or the machine was paused."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._perf, self._wall = clock.perf(), clock.wall()

    def jump(self) -> str:
        """Empty, or what is wrong with the time since the last look."""
        perf, wall = self._clock.perf(), self._clock.wall()
        lasted_s, seen_s = perf - self._perf, wall - self._wall
        self._perf, self._wall = perf, wall
        # clocks are slewed by at most 5e-4 of the time; reading both takes microseconds
        if lasted_s >= 0.0 and abs(lasted_s - seen_s) <= 5e-3 + 2e-3 * lasted_s:
            return ""
        return f"the clock jumped: {lasted_s:.4g} s by the counter, {seen_s:.4g} s by the time of day"

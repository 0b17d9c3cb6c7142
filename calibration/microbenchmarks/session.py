"""One measuring session: which point next, until when, and what goes into the journal.

All points of all kernels are visited in rounds, each round in a new order, so that every point is measured at several
times of the session: machines drift by a few per cent within minutes, and a point visited once would take the drift of
that moment for its own. From the third round on, each kernel gains the candidate about which its fit is least certain.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from servecast.calibration.microbenchmarks.journal import Journal, Point, Sample
from servecast.calibration.microbenchmarks.kernel import Kernel
from servecast.calibration.microbenchmarks.timing import Clock, ClockWatch, marked

ROUNDS = 6
"""Least rounds that the budget is planned for."""
ADAPTIVE_FROM = 2
MOST_ADDED = 6
"""Points that a kernel and format may gain."""
SLACK = 1.1
"""A visit is begun only where this multiple of its expected time is left."""

Choose = Callable[[Sequence[Sample], str, str, Sequence[Point]], Point | None]
"""Samples so far, kernel, dtype, candidates to the one with the largest predicted uncertainty."""
Task = tuple[Kernel, str, Point]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a session ended."""

    samples: int
    """Added by this session."""
    rounds: int
    """Begun, earlier sessions included."""
    elapsed_s: float
    """Of the budget, earlier sessions included. [s]"""
    left_out: int
    """Points that the budget or the memory does not allow."""
    suspects: tuple[str, ...]
    """What was wrong with marked samples, each once."""
    interrupted: bool


class Session:
    """Measures until the budget is used; every sample is in the journal before the next is begun."""

    def __init__(
        self,
        kernels: Sequence[Kernel],
        journal: Journal,
        clock: Clock,
        *,
        budget_s: float,
        seed: int,
        begun_s: float | None = None,
        choose: Choose | None = None,
        refresh: Callable[[int], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`begun_s` is when the time began to count, by the same clock: the set-up is part of the budget. [s]"""
        self._kernels, self._journal, self._clock = kernels, journal, clock
        self._budget_s, self._seed = budget_s, seed
        self._choose, self._refresh, self._progress = choose, refresh, progress
        past = journal.samples[-1].elapsed_s if journal.samples else 0.0
        self._zero_s = (clock.perf() if begun_s is None else begun_s) - past
        self._session = 1 + max((one.session for one in journal.samples), default=-1)
        self._cost_s: dict[tuple[str, str, Point], float] = {}
        self._suspects: dict[str, None] = {}
        self._left_out = 0
        self._added = 0
        self._watch = ClockWatch(clock)
        count = sum(len(kernel.grid()) * len(kernel.dtypes) for kernel in kernels)
        # share of one visit; twice an even one, since most visits need far less
        self._limit_s = 2.0 * budget_s / (ROUNDS * max(count, 1))

    def run(self) -> Outcome:
        """Until the budget is used or Ctrl-C."""
        done = {(one.round, one.kernel, one.dtype, one.point) for one in self._journal.samples}
        number = max((one.round for one in self._journal.samples), default=0)
        interrupted = False
        try:
            tasks = self._plan()
            while tasks and self._round(number, tasks, done):
                number += 1
                if self._choose is not None and number >= ADAPTIVE_FROM:
                    tasks += self._more(tasks)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            for kernel in self._kernels:
                kernel.close()
        return Outcome(
            samples=self._added,
            rounds=1 + max((one.round for one in self._journal.samples), default=-1),
            elapsed_s=self._elapsed_s(),
            left_out=self._left_out,
            suspects=tuple(self._suspects),
            interrupted=interrupted,
        )

    def _elapsed_s(self) -> float:
        return self._clock.perf() - self._zero_s

    def _left_s(self) -> float:
        return self._budget_s - self._elapsed_s()

    def _plan(self) -> list[Task]:
        """The first grids, what does not fit left out, and points that earlier sessions added."""
        tasks: list[Task] = []
        earlier: dict[tuple[str, str], list[Point]] = defaultdict(list)
        for one in self._journal.samples:
            if one.point not in earlier[one.kernel, one.dtype]:
                earlier[one.kernel, one.dtype].append(one.point)
        for kernel in self._kernels:
            for dtype in kernel.dtypes:
                before = earlier[kernel.name, dtype]
                new = [point for point in kernel.grid() if point not in before]
                fitting = [point for point in new if self._fits(kernel, point, dtype)]
                self._left_out += len(new) - len(fitting)
                tasks += [(kernel, dtype, point) for point in (*before, *fitting)]
        return tasks

    def _fits(self, kernel: Kernel, point: Point, dtype: str) -> bool:
        """Two calls to warm up and two repeats must fit into the visit."""
        return 4.0 * kernel.guess_s(point, dtype) <= self._limit_s

    def _round(self, number: int, tasks: list[Task], done: set[tuple[int, str, str, Point]]) -> bool:
        """One pass in a new order; false where no time was left for any point."""
        order = list(tasks)
        random.Random(f"{self._seed} {number}").shuffle(order)  # noqa: S311 (an order, not a secret)
        if self._refresh is not None:
            self._refresh(hash((self._seed, number)) % 2**31)
        visited = False
        for kernel, dtype, point in order:
            key = (number, kernel.name, dtype, point)
            if key in done:
                visited = True
                continue
            if self._left_s() <= SLACK * self._expected_s(kernel, dtype, point):
                continue
            self._visit(number, kernel, dtype, point)
            done.add(key)
            visited = True
            if self._progress is not None:
                self._progress(int(min(self._elapsed_s(), self._budget_s)), int(self._budget_s))
        return visited and self._left_s() > 0.0

    def _expected_s(self, kernel: Kernel, dtype: str, point: Point) -> float:
        known = self._cost_s.get((kernel.name, dtype, point))
        return self._limit_s if known is None else known

    def _visit(self, number: int, kernel: Kernel, dtype: str, point: Point) -> None:
        start = self._clock.perf()
        found = kernel.measure(point, dtype, self._limit_s)
        suspect = "; ".join(filter(None, (found.suspect, self._watch.jump())))
        self._journal.append(
            Sample(
                kernel=kernel.name,
                dtype=dtype,
                point=point,
                round=number,
                session=self._session,
                elapsed_s=max(self._elapsed_s(), 0.0),
                seconds=found.seconds,
                inner=found.inner,
                outliers=marked(found),
                suspect=suspect,
            )
        )
        self._added += 1
        if suspect:
            self._suspects.setdefault(suspect)
        self._cost_s[kernel.name, dtype, point] = self._clock.perf() - start

    def _more(self, tasks: list[Task]) -> list[Task]:
        """For each kernel and format, the candidate that its fit knows least about."""
        added: list[Task] = []
        for kernel in self._kernels:
            for dtype in kernel.dtypes:
                have = [point for one, kind, point in tasks if one is kernel and kind == dtype]
                if len(have) >= len(kernel.grid()) + MOST_ADDED or self._left_s() < 0.1 * self._budget_s:
                    continue
                fresh = [one for one in kernel.candidates() if one not in have and self._fits(kernel, one, dtype)]
                chosen = (
                    self._choose(self._journal.samples, kernel.name, dtype, fresh) if self._choose and fresh else None
                )
                if chosen is not None:
                    added.append((kernel, dtype, chosen))
        return added

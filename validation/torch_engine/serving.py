"""Requests at their own times into the engine, stamps out: an open loop in one thread.

The engine computes in this thread, so that a request which arrives during a step is seen at its end, as in an engine
whose scheduler runs between steps. Its stamp is the time it was due, not the time it was seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from servecast.model.request_rows import RequestRows, measured_rows
from servecast.validation.torch_engine.engine import Request, StepRecord, TorchEngine

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """A step and its seconds, from the end of the one before where the engine did not idle."""

    seconds: float
    record: StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRun:
    """One run on the engine."""

    rows: RequestRows
    requests: tuple[Request, ...]
    steps: tuple[TimedStep, ...]
    busy_share: float
    """Time in steps over the time from the first arrival to the last token: the utilisation that was reached. [-]"""
    complete: bool
    """False where the run was stopped; requests that had not ended are marked failed."""


def serve(
    engine: TorchEngine,
    requests: Sequence[Request],
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    stop_after_s: float = float("inf"),
    between: Callable[[float], None] | None = None,
    every: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ServedRun:
    """Serve `requests`, whose arrivals count from the call.

    After every `every`-th step `between` is called with the run's time, which stands still: no request comes, and no
    stamp counts what it took.

    Raises
    ------
    ValueError : a request does not fit into the engine.
    RuntimeError : the clock went backwards.
    """
    ordered = sorted(requests, key=lambda one: one.arrival_s)
    steps: list[TimedStep] = []
    start = clock()
    at = done = 0
    paused = 0.0

    def now() -> float:
        return clock() - start - paused

    complete = True
    while at < len(ordered) or engine.busy:
        begun = now()
        if begun > stop_after_s:
            complete = False
            break
        while at < len(ordered) and ordered[at].arrival_s <= begun:
            engine.submit(ordered[at])
            at += 1
        if not engine.busy:
            sleep(max(ordered[at].arrival_s - now(), 0.0))
            continue
        record = engine.step(now)
        seconds = now() - begun
        if seconds < 0.0:
            raise RuntimeError(f"the clock went back by {-seconds:.3g} s during a step: the run cannot be judged")
        steps.append(TimedStep(seconds=seconds, record=record))
        if between is not None and len(steps) % every == 0:
            stopped = clock()
            between(stopped - start - paused)
            paused += clock() - stopped
        if progress is not None and len(steps) % 16 == 0:
            done = sum(one.done for one in ordered)
            progress(done, len(ordered))
    if progress is not None:
        progress(len(ordered), len(ordered))
    return ServedRun(
        rows=_rows(ordered),
        requests=tuple(ordered),
        steps=tuple(steps),
        busy_share=_busy_share(ordered, steps),
        complete=complete,
    )


def _rows(requests: Sequence[Request]) -> RequestRows:
    nan = float("nan")
    return measured_rows(
        [one.arrival_s for one in requests],
        [one.token_s[0] if one.token_s else nan for one in requests],
        [one.token_s[-1] if one.token_s else nan for one in requests],
        [len(one.prompt) for one in requests],
        [one.n_out for one in requests],
        scheduled_s=[nan if one.scheduled_s is None else one.scheduled_s for one in requests],
        failed=[not one.done for one in requests],
    )


def _busy_share(requests: Sequence[Request], steps: Sequence[TimedStep]) -> float:
    stamps = [one.token_s[-1] for one in requests if one.token_s]
    if not stamps:
        return float("nan")
    span = max(stamps) - requests[0].arrival_s
    return float(np.sum([one.seconds for one in steps]) / span) if span > 0.0 else float("nan")


def closed_batch(
    engine: TorchEngine, requests: Sequence[Request], *, clock: Clock = time.perf_counter
) -> tuple[TimedStep, ...]:
    """All requests at once, until the last has ended."""
    for one in requests:
        one.arrival_s = 0.0
    return serve(engine, requests, clock=clock).steps

"""Open-loop load over an OpenAI-compatible HTTP API: each request is sent at its own time, whatever the server does.

One event loop in one thread. Every answer has a connection of its own without delay of small packets (asyncio sets
TCP_NODELAY), and bytes are stamped where the loop hands them over, before they are parsed. With a thread for each
request the tokens of one engine step, which arrive together, wake all of them at once to fight for the interpreter
lock: measured beside an engine on the same two cores (60 requests, 5 a second, two runs each), nine of ten requests
left within 2 to 3 ms of their time, with threads within 6 to 8 ms, and the latest 8 and 95 ms late, with threads 220.
What is left is the loop's timers, which end on the next whole millisecond, and the machine's scheduler; the lag of
every run is reported.

A latency runs from the planned arrival, so that a late client cannot flatter the server. Failed requests stay in the
rows as refused; each kind of fault is one message with its count.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from servecast.model.request_rows import RequestRows, measured_rows
from servecast.validation.completion_stream import StreamError, TokenStream, excerpt, exchange

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from servecast.model.workload import Trace

MAX_KINDS = 10
"""Kinds of fault that are told apart."""
CLOCK_SHARE = 0.01
CLOCK_FLOOR_S = 0.05
CLOCK_LIMIT_S = 1.0
"""Clocks that differ by a hundredth of the run (above what reading them one after the other costs), or by a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """One request to send."""

    arrival_s: float
    """Since the start of the run."""
    prompt: Sequence[int] | str
    """Token ids, or text."""
    n_out: int
    """Tokens asked for; the end-of-sequence token is ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """What was measured, also of a run that ended early."""

    rows: RequestRows
    """Of every request that was sent; stamps count from the start of the run."""
    errors: tuple[str, ...]
    """One message for each kind of fault."""
    sent_s: NDArray[np.float64]
    """When each request of `rows` was truly sent, in their order; counts from the start of the run."""
    client_lag_p99_s: float
    """99th percentile of true less planned time of sending; NaN where nothing was sent."""
    aborted: str | None
    """Why the run ended early."""
    clock_warning: str | None
    """Clocks that disagree: the machine slept, or one of them was set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Clocks in seconds: `perf` stamps, the others check it."""

    perf: Callable[[], float] = time.perf_counter
    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time

    def read(self) -> tuple[float, float, float]:
        """All of them, now."""
        return self.perf(), self.monotonic(), self.wall()


def load_requests(trace: Trace, *, vocabulary: int, seed: int = 0) -> list[LoadRequest]:
    """Requests of a trace with random token ids as prompts, which no prefix cache can share."""
    import numpy as np

    draw = np.random.default_rng(seed)
    return [
        LoadRequest(arrival_s=at, prompt=draw.integers(1, vocabulary, n_in).tolist(), n_out=n_out)
        for at, n_in, n_out in zip(trace.t_s.tolist(), trace.n_in.tolist(), trace.n_out.tolist(), strict=True)
    ]


def run_open_loop(
    url: str,
    requests: Sequence[LoadRequest],
    *,
    model: str,
    timeout_s: float = 600.0,
    stop_after_s: float | None = None,
    connection_failures: int = 5,
    headers: Mapping[str, str] | None = None,
    clock: Clock | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LiveRun:
    """Send every request at its time and wait for the answers.

    Parameters
    ----------
    url : of the server, with or without ``/v1``.
    model : name under which the server serves it.
    timeout_s : longest time from sending to the last token of one request.
    stop_after_s : end of the run; what is then unfinished counts as failed, what is not sent is left out.
    connection_failures : the run ends after as many in a row.
    progress : called with (requests ended, requests) after each.

    An interrupt ends the run and returns what it has; that needs the main thread.
    """
    place = _place(url)
    if not requests:
        raise ValueError("requests must not be empty")
    for name, value in (("timeout_s", timeout_s), ("stop_after_s", stop_after_s)):
        if value is not None and not value > 0.0:
            raise ValueError(f"{name} must be > 0, got {value}")
    if connection_failures < 1:
        raise ValueError(f"connection_failures must be >= 1, got {connection_failures}")
    for one in requests:
        if not (0.0 <= one.arrival_s < float("inf") and one.n_out >= 1 and len(one.prompt) >= 1):
            raise ValueError(
                f"request must have arrival >= 0, a prompt and n_out >= 1, got {excerpt(repr(one).encode())}"
            )
    load = _Load(
        place=place,
        requests=requests,
        model=model,
        timeout_s=timeout_s,
        failures_allowed=connection_failures,
        headers=dict(headers or {}),
        clock=clock or Clock(),
        progress=progress,
    )
    return asyncio.run(load.run(stop_after_s))


def clock_warning(start: tuple[float, float, float], end: tuple[float, float, float]) -> str | None:
    """A message where one of the clocks went on by another time than the one that stamps."""
    spent, *others = (after - before for before, after in zip(start, end, strict=True))
    for name, other in zip(("monotonic", "wall"), others, strict=True):
        apart = other - spent
        if abs(apart) > min(CLOCK_LIMIT_S, max(CLOCK_FLOOR_S, CLOCK_SHARE * abs(spent))):
            return (
                f"the {name} clock went on by {other:.3f} s while the stamping clock went on by {spent:.3f} s: the "
                "machine slept or a clock was set, and times of this run are not to be trusted"
            )
    return None


def _place(url: str) -> SplitResult:
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise ValueError(f"url must be http://HOST:PORT, got {excerpt(url.encode())!r}")
    return place


@dataclass(slots=True, kw_only=True)
class _Faults:
    """Faults by kind: how many, and the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, arrival_s: float, detail: str) -> None:
        if kind not in self.counts and len(self.counts) >= MAX_KINDS:
            kind = "other faults"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, f"the first at {arrival_s:.3f} s: {detail}")

    def messages(self) -> tuple[str, ...]:
        return tuple(
            f"{kind}: {count} request{'s' if count > 1 else ''}, {self.first[kind]}"
            for kind, count in self.counts.items()
        )


@dataclass(slots=True, kw_only=True)
class _Sent:
    """One request under way. [s]"""

    lag_s: float
    stream: TokenStream
    failed: bool = True
    """Until its end proves otherwise."""


@dataclass(slots=True, kw_only=True)
class _Load:
    """One run, inside its event loop."""

    place: SplitResult
    requests: Sequence[LoadRequest]
    model: str
    timeout_s: float
    failures_allowed: int
    headers: dict[str, str]
    clock: Clock
    progress: Callable[[int, int], None] | None
    faults: _Faults = field(default_factory=_Faults)
    sent: dict[int, _Sent] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    failures_in_row: int = 0
    ended: int = 0
    began_s: float = 0.0

    async def run(self, stop_after_s: float | None) -> LiveRun:
        loop = asyncio.get_running_loop()
        over: asyncio.Future[str | None] = loop.create_future()
        clocks = self.clock.read()
        self.began_s, begin = clocks[0], loop.time()
        timers = [
            loop.call_at(begin + one.arrival_s, self._send, number, over) for number, one in enumerate(self.requests)
        ]
        aborted = await self._until(over, stop_after_s)
        for timer in timers:
            timer.cancel()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if aborted is not None and (unsent := len(self.requests) - len(self.sent)):
            aborted += f"; {unsent} of {len(self.requests)} requests were not sent"
        return self._result(aborted, clock_warning(clocks, self.clock.read()))

    async def _until(self, over: asyncio.Future[str | None], stop_after_s: float | None) -> str | None:
        try:
            async with asyncio.timeout(stop_after_s):
                return await over
        except TimeoutError:
            return f"stopped after {stop_after_s:g} s"
        except asyncio.CancelledError:  # what asyncio.run makes of an interrupt
            return "interrupted"

    def _send(self, number: int, over: asyncio.Future[str | None]) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(number, over))
        self.tasks.add(task)
        task.add_done_callback(lambda ended: self._leave(ended, over))

    def _leave(self, task: asyncio.Task[None], over: asyncio.Future[str | None]) -> None:
        self.tasks.discard(task)
        # a fault of our own must end the run, not leave it waiting
        if not task.cancelled() and (error := task.exception()) is not None and not over.done():
            over.set_exception(error)

    async def _serve(self, number: int, over: asyncio.Future[str | None]) -> None:
        asked = self.requests[number]
        lag = self.clock.perf() - self.began_s - asked.arrival_s
        one = self.sent[number] = _Sent(lag_s=lag, stream=TokenStream())
        try:
            async with asyncio.timeout(self.timeout_s):
                await exchange(self.place, self._body(asked), one.stream, headers=self.headers, now=self.clock.perf)
            self._close(asked, one)
        except asyncio.CancelledError:
            self.faults.add("unfinished when the run ended", asked.arrival_s, _progress_of(asked, one.stream))
            return
        except TimeoutError:
            detail = f"no end within {self.timeout_s:g} s, {_progress_of(asked, one.stream)}"
            self.faults.add("timeout", asked.arrival_s, detail)
        except StreamError as fault:
            self.failures_in_row = 0  # it answered
            self.faults.add(fault.kind, asked.arrival_s, fault.detail)
        except OSError as error:
            self.failures_in_row += 1
            self.faults.add("connection failed", asked.arrival_s, excerpt(str(error).encode()))
        self._count(over)

    def _body(self, asked: LoadRequest) -> bytes:
        return json.dumps(
            {
                "model": self.model,
                "prompt": asked.prompt if isinstance(asked.prompt, str) else list(asked.prompt),
                "max_tokens": asked.n_out,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()

    def _close(self, asked: LoadRequest, one: _Sent) -> None:
        self.failures_in_row = 0
        if one.stream.first_token_s is None:
            raise StreamError("no tokens", f"the stream ended without one, asked for {asked.n_out}")
        one.failed = False
        if one.stream.tokens != asked.n_out:
            # its stamps are true, but it is not the load that was asked for
            self.faults.add("other length than asked", asked.arrival_s, _progress_of(asked, one.stream))

    def _count(self, over: asyncio.Future[str | None]) -> None:
        self.ended += 1
        if self.progress is not None:
            self.progress(self.ended, len(self.requests))
        if over.done():
            return
        if self.failures_in_row >= self.failures_allowed:
            over.set_result(f"stopped after {self.failures_in_row} connection failures in a row")
        elif self.ended == len(self.requests):
            over.set_result(None)

    def _result(self, aborted: str | None, warning: str | None) -> LiveRun:
        import numpy as np

        numbers = sorted(self.sent)
        asked, sent = [self.requests[n] for n in numbers], [self.sent[n] for n in numbers]
        rows = measured_rows(
            [one.arrival_s for one in asked],
            [self._since_start(one.stream.first_token_s) for one in sent],
            [self._since_start(one.stream.last_token_s) for one in sent],
            [_prompt_tokens(one, done.stream) for one, done in zip(asked, sent, strict=True)],
            [one.n_out if done.failed else done.stream.tokens for one, done in zip(asked, sent, strict=True)],
            failed=[one.failed for one in sent],
        )
        lag = float(np.percentile([one.lag_s for one in sent], 99.0)) if sent else float("nan")
        return LiveRun(
            rows=rows,
            sent_s=np.array([one.arrival_s + done.lag_s for one, done in zip(asked, sent, strict=True)])[
                np.argsort([one.arrival_s for one in asked], kind="stable")
            ],
            errors=self.faults.messages(),
            client_lag_p99_s=lag,
            aborted=aborted,
            clock_warning=warning,
        )

    def _since_start(self, stamp: float | None) -> float:
        return float("nan") if stamp is None else stamp - self.began_s


def _progress_of(asked: LoadRequest, stream: TokenStream) -> str:
    return f"{stream.tokens} of {asked.n_out} tokens"


def _prompt_tokens(asked: LoadRequest, stream: TokenStream) -> int:
    if stream.prompt_tokens is not None:
        return stream.prompt_tokens
    return 0 if isinstance(asked.prompt, str) else len(asked.prompt)

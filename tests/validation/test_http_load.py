"""Open-loop load on a fake server: every request at its time, true stamps, and one message for each kind of fault."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from fake_server import FakeServer

from servecast.model.workload import Trace
from servecast.validation.completion_stream import HttpBody, StreamError, TokenStream, excerpt
from servecast.validation.http_load import Clock, LiveRun, LoadRequest, clock_warning, load_requests, run_open_loop
from servecast.validation.metrics import latencies

SLACK_S = 0.25
"""What a machine with two busy cores may add to a time; the effects that are tested are larger."""


def _requests(count: int, *, gap_s: float = 0.01, n_out: int = 4) -> list[LoadRequest]:
    return [LoadRequest(arrival_s=gap_s * n, prompt=[1, 2, 3], n_out=n_out) for n in range(count)]


def _run(server: FakeServer, requests: list[LoadRequest], **options: float) -> LiveRun:
    return run_open_loop(server.url, requests, model="fake", **{"timeout_s": 5.0, **options})  # type: ignore[arg-type]


def test_requests_are_sent_at_their_times_although_the_server_is_slow() -> None:
    # every answer takes 0.4 s, so that a closed loop would need 4 s for what is sent within 0.18 s
    requests = _requests(10, gap_s=0.02)
    with FakeServer(first_token_s=0.4) as server:
        run = _run(server, requests)
        received = np.array([at for at, _ in server.received])
    assert run.errors == ()
    assert run.aborted is None
    assert received.max() - received.min() < 0.18 + SLACK_S
    assert run.client_lag_p99_s < SLACK_S
    assert latencies(run.rows, "ttft").min() >= 0.4


def test_stamps_are_those_of_the_first_and_the_last_token() -> None:
    # by the fake server's sleeps: 0.1 s to the first token, then three gaps of 0.05 s
    with FakeServer(first_token_s=0.1, gap_s=0.05) as server:
        rows = _run(server, _requests(3, gap_s=0.05)).rows
    ttft, tpot = latencies(rows, "ttft"), latencies(rows, "tpot")
    assert np.all((ttft >= 0.1) & (ttft < 0.1 + SLACK_S))
    assert np.all((tpot >= 0.045) & (tpot < 0.05 + SLACK_S / 3))
    assert rows.n_in.tolist() == [3, 3, 3]
    assert rows.n_out.tolist() == [4, 4, 4]
    np.testing.assert_allclose(rows.arrival_s, [0.0, 0.05, 0.10], rtol=1e-12)


def test_the_request_is_what_the_engine_expects() -> None:
    with FakeServer() as server:
        _run(server, _requests(1, n_out=2))
        (_, body), *_ = server.received
    assert body == {
        "model": "fake",
        "prompt": [1, 2, 3],
        "max_tokens": 2,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize("form", ["shred", "uncounted", "plain"])
def test_other_forms_of_a_good_stream(form: str) -> None:
    """Bytes cut anywhere with comments between; no usage, so that events are counted; no chunks."""
    with FakeServer(fault=lambda _: form) as server:
        run = _run(server, _requests(2))
    assert run.errors == ()
    assert run.rows.n_out.tolist() == [4, 4]
    assert not run.rows.refused.any()


@pytest.mark.parametrize(
    ("fault", "kind", "detail"),
    [
        ("500", "HTTP 500", '{"error": "engine is dead"}'),
        ("long500", "HTTP 500", "xxx..."),
        ("reset", "connection failed", ""),
        ("hang", "timeout", "no end within 0.5 s, 1 of 4 tokens"),
        ("cut", "stream cut", "no [DONE] after 2 tokens"),
        ("vanish", "stream cut", "no [DONE] after 2 tokens"),
        ("garbage", "malformed stream", "event is not JSON, got {not json"),
        ("error", "error event", "out of memory"),
        ("empty", "no tokens", "asked for 4"),
    ],
)
def test_a_fault_is_one_message_and_the_rest_is_kept(fault: str, kind: str, detail: str) -> None:
    with FakeServer(fault=lambda number: fault if number in (1, 2) else None) as server:
        run = _run(server, _requests(4, gap_s=0.05), timeout_s=0.5)
    assert run.rows.refused.tolist() == [False, True, True, False]
    assert np.isfinite(run.rows.last_token_s[[0, 3]]).all()
    assert np.isnan(run.rows.last_token_s[[1, 2]]).all()
    (message,) = run.errors
    assert message.startswith(f"{kind}: 2 requests, the first at 0.050 s: ")
    assert detail in message
    assert len(message) < 300
    assert run.aborted is None


def test_fewer_tokens_than_asked_keep_their_stamps_and_are_told() -> None:
    with FakeServer(fault=lambda _: "short") as server:
        run = _run(server, _requests(2))
    assert not run.rows.refused.any()
    assert run.rows.n_out.tolist() == [3, 3]
    assert run.errors == ("other length than asked: 2 requests, the first at 0.000 s: 3 of 4 tokens",)


def test_a_server_that_dies_ends_the_run() -> None:
    requests = [*_requests(20, gap_s=0.03), LoadRequest(arrival_s=60.0, prompt=[1], n_out=1)]
    with FakeServer(fault=lambda number: "die" if number == 3 else None) as server:
        run = _run(server, requests, connection_failures=4)
    assert run.aborted is not None
    assert run.aborted.startswith("stopped after 4 connection failures in a row; ")
    assert run.aborted.endswith(" of 21 requests were not sent")
    assert run.rows.refused.tolist()[:3] == [False, False, False]
    assert run.rows.refused[3:].all()
    assert len(run.rows.refused) < 21
    assert any(message.startswith("connection failed: ") for message in run.errors)


def test_no_server_at_all() -> None:
    with FakeServer() as server:
        url = server.url
    run = run_open_loop(url, _requests(8), model="fake", connection_failures=2)
    assert run.rows.refused.all()
    assert "connection failures in a row" in str(run.aborted)


def test_the_whole_run_has_a_limit() -> None:
    with FakeServer(fault=lambda number: "hang" if number == 1 else None) as server:
        run = _run(server, [*_requests(2), LoadRequest(arrival_s=60.0, prompt=[1], n_out=1)], stop_after_s=0.4)
    assert run.aborted == "stopped after 0.4 s; 1 of 3 requests were not sent"
    assert run.rows.refused.tolist() == [False, True]
    assert run.errors == ("unfinished when the run ended: 1 request, the first at 0.010 s: 1 of 4 tokens",)


def test_an_interrupt_keeps_what_there_is() -> None:
    seen = itertools.count(1)

    def interrupt(done: int, _: int) -> None:
        if next(seen) == done == 2:
            signal.raise_signal(signal.SIGINT)

    with FakeServer() as server:
        requests = [*_requests(2), LoadRequest(arrival_s=60.0, prompt=[1], n_out=1)]
        run = run_open_loop(server.url, requests, model="fake", progress=interrupt)
    assert run.aborted == "interrupted; 1 of 3 requests were not sent"
    assert run.rows.refused.tolist() == [False, False]


def test_a_fault_of_the_caller_ends_the_run() -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with FakeServer() as server, pytest.raises(ZeroDivisionError):
        run_open_loop(server.url, _requests(3), model="fake", progress=fail)
    assert threading.active_count() < 50


def test_clocks_that_disagree_are_told() -> None:
    wall = iter([100.0, 105.0])
    with FakeServer() as server:
        run = run_open_loop(server.url, _requests(1), model="fake", clock=Clock(wall=lambda: next(wall)))
        quiet = run_open_loop(server.url, _requests(1), model="fake")
    assert run.clock_warning is not None
    assert "the wall clock went on by 5.000 s" in run.clock_warning
    assert quiet.clock_warning is None


@pytest.mark.parametrize(
    ("spent", "monotonic", "wall", "named"),
    [
        (100.0, 100.0, 100.9, None),  # less than a hundredth of it, and than a second
        (100.0, 100.0, 101.1, "wall"),
        (1000.0, 1000.0, 1001.5, "wall"),  # a second, although a hundredth is ten
        (10.0, 10.0, 9.8, "wall"),  # set back
        (10.0, 13.0, 10.0, "monotonic"),
        (0.1, 0.1, 0.14, None),  # a hundredth is less than reading the clocks may take
    ],
)
def test_limits_of_the_clocks(spent: float, monotonic: float, wall: float, named: str | None) -> None:
    message = clock_warning((5.0, 6.0, 7.0), (5.0 + spent, 6.0 + monotonic, 7.0 + wall))
    assert (message is None) == (named is None)
    assert named is None or f"the {named} clock" in str(message)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/", "http://"])
def test_a_bad_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url must be http://HOST:PORT, got"):
        run_open_loop(url, _requests(1), model="fake")


@pytest.mark.parametrize(
    "request_",
    [
        LoadRequest(arrival_s=-1.0, prompt=[1], n_out=1),
        LoadRequest(arrival_s=float("nan"), prompt=[1], n_out=1),
        LoadRequest(arrival_s=float("inf"), prompt=[1], n_out=1),
        LoadRequest(arrival_s=0.0, prompt=[], n_out=1),
        LoadRequest(arrival_s=0.0, prompt="x", n_out=0),
    ],
)
def test_a_bad_request_is_refused_before_any_is_sent(request_: LoadRequest) -> None:
    with pytest.raises(ValueError, match="request must have"):
        run_open_loop("http://127.0.0.1:9", [request_], model="fake")


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0.0}, {"stop_after_s": -1.0}, {"connection_failures": 0}, {"timeout_s": float("nan")}]
)
def test_bad_limits_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        run_open_loop("http://127.0.0.1:9", _requests(1), model="fake", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="requests must not be empty"):
        run_open_loop("http://127.0.0.1:9", [], model="fake")


def test_requests_of_a_trace() -> None:
    trace = Trace(name="t", t_s=np.array([0.0, 0.5]), n_in=np.array([3, 7]), n_out=np.array([2, 5]))
    first, second = load_requests(trace, vocabulary=10, seed=1)
    assert (first.arrival_s, len(first.prompt), first.n_out) == (0.0, 3, 2)
    assert (second.arrival_s, len(second.prompt), second.n_out) == (0.5, 7, 5)
    assert all(1 <= int(token) < 10 for token in (*first.prompt, *second.prompt))


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_framing_by_hand(size: int) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    data += b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n"
    body = HttpBody()
    assert b"".join(map(body.feed, _pieces(data, size))) == b"hello world"
    assert (body.status, body.finished) == (200, True)


def test_a_body_of_known_length_ends_there() -> None:
    body = HttpBody()
    assert body.feed(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nwaitmore") == b"wait"
    assert (body.status, body.finished) == (503, True)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n",
    ],
)
def test_what_is_not_http(data: bytes) -> None:
    with pytest.raises(StreamError, match="malformed HTTP"):
        HttpBody().feed(data)


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_events_by_hand(size: int) -> None:
    """An empty last text with a reason is no token of its own; several data lines are one event."""
    data = (
        b': note\n\ndata: {"choices": [{"text": "a",\ndata: "finish_reason": null}]}\n\nid: 3\n'
        b'data:{"choices": [{"text": "", "finish_reason": null}]}\r\n\r\n'
        b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    )
    stream = TokenStream()
    for at, piece in enumerate(_pieces(data, size)):
        stream.feed(piece, float(at))
    assert (stream.tokens, stream.done) == (2, True)
    assert stream.first_token_s is not None
    assert stream.last_token_s is not None
    assert stream.first_token_s <= stream.last_token_s


@pytest.mark.parametrize("data", [b"data: []\n\n", b"data: 3\n\n", b"data: \xff\n\n", b"x" * (5 << 20)])
def test_what_is_no_event(data: bytes) -> None:
    with pytest.raises(StreamError):
        TokenStream().feed(data, 0.0)


def test_an_excerpt_is_one_short_printable_line() -> None:
    assert excerpt(b"a\x00b\n\x1b[31m c") == "a b [31m c"
    assert len(excerpt(b"y" * 10_000)) == 200

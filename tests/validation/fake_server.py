"""A server that streams completions with chosen delays and faults; also a script that stands in for vLLM's server.

Only the standard library. As a script it takes vLLM's ``--host``, ``--port``, ``--model`` and
``--served-model-name``, and ``--behave`` die, sick or child.
"""

from __future__ import annotations

import argparse
import http.server
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

Fault = Callable[[int], str | None]
"""Fault of the n-th request, from 0: see `_Handler.answer`."""


class FakeServer(http.server.ThreadingHTTPServer):
    """One server on a free loopback port, in threads of this process."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        *,
        first_token_s: float = 0.0,
        gap_s: float = 0.0,
        fault: Fault = lambda _: None,
        port: int = 0,
        healthy: bool = True,
        metrics: str = "",
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.first_token_s, self.gap_s, self.fault = first_token_s, gap_s, fault
        self.healthy, self.metrics = healthy, metrics
        self.received: list[tuple[float, dict[str, Any]]] = []
        """Time and body of every completion request."""
        self.lock = threading.Lock()
        self.open: set[socket.socket] = set()
        self.released = threading.Event()
        """Set at the end: wakes the requests that hang."""
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.die()

    def die(self) -> None:
        """Refuse new connections and cut those that stand, as a killed process does."""
        if self.stopped.is_set():
            return
        self.stopped.set()
        self.released.set()
        self.shutdown()
        self.server_close()
        with self.lock:
            standing = list(self.open)
        for one in standing:
            reset(one)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""


def reset(connection: socket.socket) -> None:
    """End a connection with RST instead of FIN."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    except OSError:
        pass  # already gone


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.open.add(self.connection)

    def finish(self) -> None:
        with self.server.lock:
            self.server.open.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        text = {
            "/health": "",
            "/version": json.dumps({"version": "0.32.0+fake"}),
            "/metrics": self.server.metrics,
        }.get(self.path)
        status = 404 if text is None else 200 if self.server.healthy or self.path != "/health" else 503
        self.plain(status, (text or "").encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.received)
            self.server.received.append((time.perf_counter(), asked))
        self.close_connection = True
        self.answer(asked, self.server.fault(number))

    def answer(self, asked: dict[str, Any], fault: str | None) -> None:
        """Faults: 500, long500, reset, die; those of the stream are hang, cut, vanish, garbage, error, short, empty;
        uncounted, shred and plain are other forms of a good one.
        """
        if fault == "die":
            threading.Thread(target=self.server.die, daemon=True).start()
            self.server.stopped.wait()
            return
        if fault == "reset":
            reset(self.connection)
            return
        if fault in ("500", "long500"):
            self.plain(500, b'{"error": "engine\nis dead"}' if fault == "500" else b"x" * 100_000)
            return
        self.stream(asked, fault)

    def plain(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, asked: dict[str, Any], fault: str | None) -> None:
        count = asked["max_tokens"]
        stop = {"cut": count // 2, "vanish": count // 2, "short": count - 1, "empty": 0}.get(fault or "", count)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if fault != "plain":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        time.sleep(self.server.first_token_s)
        for number in range(stop):
            if number:
                time.sleep(self.server.gap_s)
            if number == 1 and fault in ("hang", "garbage", "error"):
                if fault == "hang":
                    self.server.released.wait()
                    return
                self.event({"garbage": "{not json", "error": '{"error": {"message": "out of memory"}}'}[fault], fault)
            reason = "length" if number == stop - 1 else None
            self.event(json.dumps({"choices": [{"index": 0, "text": f" {number}é", "finish_reason": reason}]}), fault)
        if fault == "vanish":
            return  # not even the end of the chunks
        if fault != "cut":
            usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": stop}
            if fault != "uncounted":
                self.event(json.dumps({"choices": [], "usage": usage}), fault)
            self.event("[DONE]", fault)
        if fault != "plain":
            self.wfile.write(b"0\r\n\r\n")

    def event(self, data: str, fault: str | None) -> None:
        body = f": a comment\r\ndata: {data}\r\n\r\n".encode() if fault == "shred" else f"data: {data}\n\n".encode()
        if fault == "plain":
            self.wfile.write(body)
            return
        if fault != "shred":
            self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
            return
        # cut inside lines, characters, chunk sizes and line ends
        half = len(body) // 2
        message = b"%x;note=1\r\n%b\r\n%X\r\n%b\r\n" % (half, body[:half], len(body) - half, body[half:])
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(message), 7):
            self.wfile.write(message[at : at + 7])


def main() -> int:
    """Stand in for vLLM's server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--behave", default="well", choices=("well", "die", "sick", "child", "deaf"))
    for name in ("--model", "--served-model-name", "--host"):
        parser.add_argument(name, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    sys.stdout.write("CPU KV cache size: 174,720 tokens\nMaximum concurrency for 512 tokens per request: 341.25x\n")
    sys.stdout.flush()
    if options.behave == "die":
        sys.stderr.write("ValueError: the folder has no weights\n")
        return 3
    if options.behave == "deaf":
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.behave in ("child", "deaf"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        sys.stdout.write(f"child {child.pid}\n")
        sys.stdout.flush()
    server = FakeServer(port=options.port, healthy=options.behave != "sick")
    server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A streamed completion as bytes arrive: HTTP/1.1 body, server-sent events, stamps of the first and the last token.

Bytes may be cut anywhere. HTTP framing is RFC 9112 section 7 (chunked coding), events are those of the HTML standard
section 9.2 (``data:`` lines up to an empty line), the end is the line ``data: [DONE]`` of the OpenAI API.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult

MAX_HEAD_BYTES = 64 << 10
MAX_LINE_BYTES = 4 << 20
"""One event of one token is some hundred bytes; a line without end would fill the memory."""
MAX_ERROR_BYTES = 4096
"""What is kept of the body of an answer that is no stream."""
EXCERPT = 200
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")


class StreamError(Exception):
    """The answer cannot be read on; `kind` groups requests with the same fault."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


def excerpt(data: bytes) -> str:
    """A few bytes on one printable line."""
    text = data[: 4 * EXCERPT].decode("utf-8", "replace")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT - 3]}..."


class HttpBody:
    """Head and body of one response; `feed` gives the body bytes that are complete."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.finished = False
        self._buffer = bytearray()
        self._chunked = False
        self._left: int | None = None
        """Bytes to come of the body, or of the chunk with its line end; None is until the connection closes."""

    @property
    def framed(self) -> bool:
        """Whether the body says where it ends."""
        return self._chunked or self._left is not None

    def feed(self, data: bytes) -> bytes:
        """Take what arrived."""
        self._buffer += data
        if self.status is None and not self._read_head():
            return b""
        return self._chunks() if self._chunked else self._plain()

    def _read_head(self) -> bool:
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            if len(head) > MAX_HEAD_BYTES:
                raise StreamError("malformed HTTP", f"head of more than {MAX_HEAD_BYTES} bytes")
            return False
        first, *fields = bytes(head).split(b"\r\n")
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise StreamError("malformed HTTP", excerpt(first))
        self._buffer = bytearray(rest)
        if words[1].startswith(b"1"):  # 100 Continue and its likes come before the answer
            return self._read_head()
        self.status = int(words[1])
        headers = {name.strip().lower(): value.strip() for name, _, value in (one.partition(b":") for one in fields)}
        self._chunked = headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        length = headers.get(b"content-length")
        self._left = 0 if self._chunked else int(length) if length is not None and length.isdigit() else None
        return True

    def _plain(self) -> bytes:
        take = len(self._buffer) if self._left is None else min(self._left, len(self._buffer))
        body = bytes(self._buffer[:take])
        del self._buffer[:take]
        if self._left is not None:
            self._left -= take
            self.finished = self._left == 0
        return body

    def _chunks(self) -> bytes:
        out = bytearray()
        while not self.finished and self._buffer:
            if not self._left and not self._read_size():
                break
            left = self._left or 0
            take = min(left, len(self._buffer))
            out += self._buffer[: max(0, min(take, left - 2))]  # the chunk's own line end is no body
            del self._buffer[:take]
            self._left = left - take
        return bytes(out)

    def _read_size(self) -> bool:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end and len(line) < MAX_HEAD_BYTES:
            return False
        digits = bytes(line).split(b";")[0].strip()
        if not _CHUNK_SIZE.fullmatch(digits):
            raise StreamError("malformed HTTP", f"chunk size {excerpt(bytes(line))}")
        size = int(digits, 16)
        self._buffer = bytearray(rest)
        self.finished = size == 0
        self._left = size + 2
        return size > 0


@dataclass(slots=True, kw_only=True)
class TokenStream:
    """Server-sent events of one completion. Stamps are those of the bytes that completed an event. [s]"""

    first_token_s: float | None = None
    last_token_s: float | None = None
    events: int = 0
    """Events with a token; a speculative step may put several tokens into one."""
    completion_tokens: int | None = None
    """As the server counted them (`usage`)."""
    prompt_tokens: int | None = None
    done: bool = False
    _pending: bytes = b""
    _data: bytes = b""

    @property
    def tokens(self) -> int:
        """Output tokens: the server's count, else the number of events."""
        return self.events if self.completion_tokens is None else self.completion_tokens

    def feed(self, body: bytes, at_s: float) -> None:
        """Take body bytes that arrived at `at_s`."""
        *lines, self._pending = (self._pending + body).split(b"\n")
        if len(self._pending) > MAX_LINE_BYTES:
            raise StreamError("malformed stream", f"line of more than {MAX_LINE_BYTES} bytes")
        for line in lines:
            text = line.rstrip(b"\r")
            if text.startswith(b"data:"):
                self._data += (b"\n" if self._data else b"") + text[5:].removeprefix(b" ")
            elif not text and self._data:
                data, self._data = self._data, b""
                self._event(data, at_s)

    def _event(self, data: bytes, at_s: float) -> None:
        if data.strip() == b"[DONE]":
            self.done = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise StreamError("malformed stream", f"event is not JSON, got {excerpt(data)}") from None
        if not isinstance(event, dict) or "error" in event:
            raise StreamError("error event", excerpt(data))
        self._usage(event.get("usage"))
        choices = event.get("choices")
        if isinstance(choices, list) and choices:
            self.first_token_s = at_s if self.first_token_s is None else self.first_token_s
            self.last_token_s = at_s
            # a last event may carry only the reason of the end
            first = choices[0] if isinstance(choices[0], dict) else {}
            self.events += bool(first.get("text")) or first.get("finish_reason") is None

    def _usage(self, usage: object) -> None:
        if not isinstance(usage, dict):
            return
        completion, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
        if isinstance(completion, int):
            self.completion_tokens = completion
        if isinstance(prompt, int):
            self.prompt_tokens = prompt


async def exchange(
    place: SplitResult, body: bytes, stream: TokenStream, *, headers: Mapping[str, str], now: Callable[[], float]
) -> None:
    """One request on a connection of its own, until `stream` is done; OSError where there is no connection.

    Parameters
    ----------
    place : of the server, with or without ``/v1``.
    body : the request as JSON.
    stream : takes the answer, also what arrived before a fault.
    now : clock of the stamps. [s]
    """
    fields = {
        "Host": place.netloc.rpartition("@")[2],
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Accept": "text/event-stream",
        "Connection": "close",
        **headers,
    }
    path = place.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    head = "\r\n".join([f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())])
    secure = place.scheme == "https"
    transport, protocol = await asyncio.get_running_loop().create_connection(
        lambda: _Exchange(head.encode() + b"\r\n\r\n" + body, stream, now),
        place.hostname or "",
        place.port or (443 if secure else 80),
        ssl=True if secure else None,
    )
    try:
        await protocol.ended
    finally:
        transport.abort()


class _Exchange(asyncio.Protocol):
    """Sends one request and stamps its answer; `ended` is set when the stream is complete or cannot be read on."""

    def __init__(self, message: bytes, stream: TokenStream, now: Callable[[], float]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._message, self._stream, self._now = message, stream, now
        self._body = HttpBody()
        self._refusal = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)  # noqa: S101  # of a stream protocol, always
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        at = self._now()  # before any parsing
        if self.ended.done():
            return
        try:
            self._take(self._body.feed(data), at)
        except StreamError as fault:
            self.ended.set_exception(fault)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        if self._body.status is None:
            self.ended.set_exception(exc if isinstance(exc, OSError) else ConnectionError("closed without an answer"))
        elif self._body.status != 200:
            self.ended.set_exception(self._refused())
        else:
            reason = f" ({exc})" if exc is not None else ""
            detail = f"no [DONE] after {self._stream.tokens} tokens{reason}"
            self.ended.set_exception(StreamError("stream cut", detail))

    def _take(self, body: bytes, at: float) -> None:
        if self._body.status is None:
            return
        if self._body.status != 200:
            self._refusal += body[: MAX_ERROR_BYTES - len(self._refusal)]
            if self._body.finished:
                raise self._refused()
            return
        self._stream.feed(body, at)
        if self._stream.done:
            self.ended.set_result(None)
        elif self._body.finished:
            raise StreamError("stream cut", f"no [DONE] after {self._stream.tokens} tokens")

    def _refused(self) -> StreamError:
        return StreamError(f"HTTP {self._body.status}", excerpt(bytes(self._refusal)) or "no body")

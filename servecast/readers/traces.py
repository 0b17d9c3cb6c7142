"""Request traces that others recorded, into `Trace` records.

CSV and JSON lines, plain or gzipped, told apart by content and never by file name. The file is read in blocks, so
memory grows with the number of requests and not with the size of the file; every refusal is one line that names the
file, the line, the column, the rule and the value.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.model.workload import Trace
from servecast.readers.trace_formats import (
    FORMAT_NAMES,
    MAX_SPAN_S,
    BadValueError,
    Columns,
    match_columns,
    prefix_blocks,
    shown,
    ticks,
    tokens,
)

__all__ = ["FORMAT_NAMES", "read_trace"]

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
MAX_LINES = 20_000_000
"""Four times the longest public trace (BurstGPT part 3, 5.3 million rows); a small gzip file may unpack to far more."""

_Block = tuple[int, list[str]]
"""Number of the first line, and whole lines without their ends."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Values of some requests, still as the file has them."""

    lines: NDArray[np.int64]
    time: list[Any]
    n_in: list[Any]
    n_out: list[Any]
    prefix: list[Any]
    run: list[Any]

    def only(self, run: str) -> _Chunk:
        keep = [i for i, value in enumerate(self.run) if str(value) == run]

        def kept(values: list[Any]) -> list[Any]:
            return [values[i] for i in keep] if values else []

        return _Chunk(
            self.lines[keep], kept(self.time), kept(self.n_in), kept(self.n_out), kept(self.prefix), [run] * len(keep)
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Checked requests of one chunk; times in the file's own unit."""

    ticks: NDArray[Any]
    n_in: NDArray[np.int64]
    n_out: NDArray[np.int64]
    prefix: list[tuple[int, ...]]


def read_trace(
    path: str | Path,
    *,
    run: str | None = None,
    prefixes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Read a request trace in any of the formats `FORMAT_NAMES`.

    Parameters
    ----------
    path : CSV or JSON lines, optionally gzipped.
    run : which run to take, where a column `run` separates several in one file.
    prefixes : keep the prefix block ids (Mooncake's `hash_ids`); they take more memory than all the rest.
    progress : called with (bytes read, bytes of the file) after every block.

    Returns
    -------
    The trace with times since its first request. Failed requests of a BurstGPT trace (0 response tokens) are left out
    and counted in `notes`.

    Raises
    ------
    FileNotFoundError, ValueError
        One line: file, line, column, rule, value.

    Notes
    -----
    azure         TIMESTAMP (UTC date, up to nine decimals), ContextTokens, GeneratedTokens
    mooncake      timestamp (ms; timestamp_ms in CSV), input_length, output_length, hash_ids
    burstgpt      Timestamp (s), Request tokens, Response tokens
    llmservingsim arrival_time_ns (or arrival_time, s), input_toks, output_toks
    plain         t_s (or arrival_s, timestamp_s), n_in (input_tokens, prompt_tokens), n_out (output_tokens,
                  completion_tokens), optionally run
    """
    source = Path(path)
    blocks = _without_leading_blanks(_blocks(source, progress))
    first_number, first_lines = next(blocks, (0, []))
    if not first_lines:
        raise ValueError(f"{source}: is empty")
    open_chunks = _json_chunks if first_lines[0].lstrip()[:1] in ("{", "[") else _csv_chunks
    columns, chunks = open_chunks(source, first_number, first_lines, blocks, prefixes)
    if run is not None and not columns.run:
        raise ValueError(f"{source}: run {shown(run)} was asked for, but there is no column run")
    return _assembled(source, columns, run, _checked(source, columns, run, chunks), keep_prefixes=prefixes)


def _checked(source: Path, columns: Columns, run: str | None, chunks: Iterator[_Chunk]) -> Iterator[_Rows]:
    """Requests of the chosen run, converted; refuses values that break a rule and times out of order."""
    runs: dict[str, None] = {}
    latest: float | int | None = None
    for chunk in chunks:
        if columns.run:
            runs.update(dict.fromkeys(map(str, chunk.run)))
            if run is not None:
                chunk = chunk.only(run)
            elif len(runs) > 1:
                continue  # refused below, once all runs are known
        if not chunk.time:
            continue
        rows = _converted(source, columns, chunk)
        _require_sorted(source, columns, chunk, rows.ticks, latest)
        latest = rows.ticks[-1]
        yield rows
    names = ", ".join(shown(name)[1:-1] for name in list(runs)[:10]) + (", ..." if len(runs) > 10 else "")
    if run is None and len(runs) > 1:
        raise ValueError(f"{source}: holds {len(runs)} runs; choose one with run=...: {names}")
    if run is not None and run not in runs:
        raise ValueError(f"{source}: has no run {shown(run)}, only {names or 'none'}")


def _converted(source: Path, columns: Columns, chunk: _Chunk) -> _Rows:
    name, values = columns.time, chunk.time
    try:
        times = ticks(values, columns)
        name, values = columns.n_in, chunk.n_in
        n_in = tokens(values, least=1)
        name, values = columns.n_out, chunk.n_out
        n_out = tokens(values, least=0 if columns.form.zero_output_failed else 1)
        name, values = columns.prefix, chunk.prefix
        return _Rows(times, n_in, n_out, prefix_blocks(values))
    except BadValueError as bad:
        raise _refusal(
            source, int(chunk.lines[bad.index]), f"column {name} must {bad.rule}, got {shown(bad.value)}"
        ) from None


def _require_sorted(
    source: Path, columns: Columns, chunk: _Chunk, times: NDArray[Any], latest: float | int | None
) -> None:
    if latest is not None and times[0] < latest:
        bad = 0
    else:
        earlier = np.diff(times) < 0
        if not earlier.any():
            return
        bad = int(np.argmax(earlier)) + 1
    raise _refusal(
        source,
        int(chunk.lines[bad]),
        f"column {columns.time} must not decrease, got {shown(chunk.time[bad])} after a later time; sort the file",
    )


def _assembled(
    source: Path, columns: Columns, run: str | None, checked: Iterator[_Rows], *, keep_prefixes: bool
) -> Trace:
    rows = list(checked)
    if not rows:
        raise ValueError(f"{source}: has a header but no requests")
    times = np.concatenate([part.ticks for part in rows])
    n_in = np.concatenate([part.n_in for part in rows])
    n_out = np.concatenate([part.n_out for part in rows])
    blocks = [block for part in rows for block in part.prefix]
    served = n_out > 0
    failed = int(np.count_nonzero(~served))
    if failed:
        times, n_in, n_out = times[served], n_in[served], n_out[served]
    if times.size < 2:
        raise ValueError(f"{source}: must hold at least 2 requests, got {times.size}")
    if times[-1] == times[0]:
        raise ValueError(f"{source}: all {times.size} requests have the same arrival time, so a rate is undefined")
    t_s = (times - times[0]) / columns.units_per_second
    if not t_s[-1] <= MAX_SPAN_S:
        raise ValueError(f"{source}: column {columns.time} must span {MAX_SPAN_S:g} s at most, got {t_s[-1]:g} s")
    stem = source.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".jsonl")
    return Trace(
        name=f"{stem}:{run}" if run is not None else stem,
        t_s=t_s,
        n_in=n_in,
        n_out=n_out,
        prefix_blocks=tuple(blocks) if keep_prefixes else None,
        block_tokens=columns.form.block_tokens if keep_prefixes else 0,
        notes=(f"{failed} failed requests (0 output tokens) left out",) if failed else (),
    )


def _csv_chunks(
    source: Path, number: int, lines: list[str], blocks: Iterator[_Block], prefixes: bool
) -> tuple[Columns, Iterator[_Chunk]]:
    header = _csv_rows(source, number, lines[:1])[0]
    columns = _columns(source, number, header, prefixes)
    names = [columns.time, columns.n_in, columns.n_out, columns.prefix if prefixes else "", columns.run]
    positions = [header.index(name) if name else -1 for name in names]

    def chunks() -> Iterator[_Chunk]:
        for first, some in _chained((number + 1, lines[1:]), blocks):
            rows = _csv_rows(source, first, some)
            numbers = np.arange(first, first + len(rows))
            if not all(rows):
                filled = [i for i, row in enumerate(rows) if row]
                rows, numbers = [rows[i] for i in filled], numbers[filled]
            for line, row in zip(numbers, rows, strict=True):
                if len(row) != len(header):
                    raise _refusal(
                        source, int(line), f"must have {len(header)} columns as the header has, got {len(row)}"
                    )
            yield _Chunk(numbers, *([row[at] for row in rows] if at >= 0 else [] for at in positions))

    return columns, chunks()


def _csv_rows(source: Path, number: int, lines: list[str]) -> list[list[str]]:
    """One row per line; a quoted field that runs over a line end is a mistake in a table of numbers."""
    try:
        rows = list(csv.reader(lines, strict=True))
    except csv.Error:
        rows = []
    if len(rows) == len(lines):
        return rows
    for offset, line in enumerate(lines):
        try:
            next(csv.reader([line], strict=True), [])
        except csv.Error as error:
            raise _refusal(source, number + offset, f"is not valid CSV ({error}), got {shown(line)}") from None
    raise _refusal(source, number, "is not valid CSV")


def _json_chunks(
    source: Path, number: int, lines: list[str], blocks: Iterator[_Block], prefixes: bool
) -> tuple[Columns, Iterator[_Chunk]]:
    columns = _columns(source, number, list(_json_object(source, number, lines[0])), prefixes)

    def chunks() -> Iterator[_Chunk]:
        for first, some in _chained((number, lines), blocks):
            filled = [(line, text) for line, text in enumerate(some, first) if text and not text.isspace()]
            objects = [_json_object(source, line, text) for line, text in filled]
            numbers = np.array([line for line, _ in filled], dtype=np.int64)

            def values(
                name: str, objects: list[dict[str, Any]] = objects, numbers: NDArray[np.int64] = numbers
            ) -> list[Any]:
                try:
                    return [item[name] for item in objects] if name else []
                except KeyError:
                    bad = next(i for i, item in enumerate(objects) if name not in item)
                    raise _refusal(source, int(numbers[bad]), f"column {name} is missing") from None

            names = (columns.time, columns.n_in, columns.n_out, columns.prefix if prefixes else "", columns.run)
            yield _Chunk(numbers, *map(values, names))

    return columns, chunks()


def _json_object(source: Path, number: int, line: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        raise _refusal(source, number, f"is not valid JSON, got {shown(line)}") from None
    if not isinstance(item, dict):
        raise _refusal(source, number, f"must be one JSON object per line, got {shown(line)}")
    return item


def _columns(source: Path, number: int, names: list[str], prefixes: bool) -> Columns:
    try:
        columns = match_columns(names)
    except ValueError as error:
        raise _refusal(source, number, str(error)) from None
    if prefixes and not columns.prefix:
        raise _refusal(
            source, number, f"prefixes were asked for, but there is no column {columns.form.prefix or 'hash_ids'}"
        )
    return columns


def _chained(first: _Block, others: Iterator[_Block]) -> Iterator[_Block]:
    if first[1]:
        yield first
    yield from others


def _without_leading_blanks(blocks: Iterator[_Block]) -> Iterator[_Block]:
    for number, lines in blocks:
        skipped = next((i for i, line in enumerate(lines) if line and not line.isspace()), None)
        if skipped is not None:
            yield number + skipped, lines[skipped:]
            break
    yield from blocks


def _blocks(source: Path, progress: Callable[[int, int], None] | None) -> Iterator[_Block]:
    """Whole lines of the unpacked file, about one block at a time."""
    if source.is_dir():
        raise ValueError(f"{source}: is a directory, not a trace file")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file")
    size = source.stat().st_size
    with source.open("rb") as raw:
        # the magic number, not the name: browsers unpack a .gz and keep its name
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        stream = gzip.GzipFile(fileobj=raw) if zipped else raw
        number, carry = 1, b""
        while data := _unpacked(source, stream):
            data = carry + data
            end = data.rfind(b"\n") + 1
            carry = data[end:]
            if end:
                lines = _decoded_lines(source, number, data[:end])
                yield number, lines
                number += len(lines)
            if len(carry) > MAX_LINE_BYTES:
                raise _too_long(source, number)
            if number > MAX_LINES:
                raise ValueError(f"{source}: has more than {MAX_LINES} lines; cut it into parts")
            if progress is not None:
                progress(raw.tell(), size)
        if carry:
            yield number, _decoded_lines(source, number, carry + b"\n")


def _unpacked(source: Path, stream: io.BufferedReader | gzip.GzipFile) -> bytes:
    try:
        return stream.read1(BLOCK_BYTES)  # one system call at a time, so that Ctrl-C is heard while a pipe drains
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{source}: is a damaged gzip file ({error})") from None


def _decoded_lines(source: Path, number: int, data: bytes) -> list[str]:
    if len(data) > MAX_LINE_BYTES:
        for offset, line in enumerate(data.split(b"\n")):
            if len(line) > MAX_LINE_BYTES:
                raise _too_long(source, number + offset)
    try:
        text = data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        broken = number + data.count(b"\n", 0, error.start)
        raise _refusal(source, broken, f"is not UTF-8 text (byte 0x{data[error.start]:02x})") from None
    if "\0" in text:
        raise _refusal(source, number + text.count("\n", 0, text.index("\0")), "is not text (zero byte)")
    return text.replace("\r\n", "\n").split("\n")[:-1]


def _too_long(source: Path, number: int) -> ValueError:
    return _refusal(source, number, "is longer than 1 MiB")


def _refusal(source: Path, number: int, message: str) -> ValueError:
    """Messages start with a column or with what the line is; both read well after the line number."""
    return ValueError(f"{source}: line {number}{', ' if message.startswith('column') else ' '}{message}")

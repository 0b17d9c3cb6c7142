"""Result files of load generators into request rows: `vllm bench serve`, GuideLLM and AIPerf, told apart by content.

Every time becomes seconds and every statistic gets our name, where the definitions agree. TTFT runs from the request's
start to its first token, TPOT is (e2e - TTFT) / (n_out - 1), both by the client's clock. ITL is the gap between two
streamed messages, pooled over requests: with speculation one message holds several tokens. What a file does not state
is missing (NaN, None, no entry) and never 0. The module of each format says which versions of its source were read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from servecast.model.request_rows import RequestRows, measured_rows
from servecast.readers.trace_formats import MAX_SPAN_S, shown

MAX_BYTES = 512 << 20
"""Of a file that is parsed whole; records in lines are read one by one instead."""
MAX_LINE_BYTES = 16 << 20
MAX_REQUESTS = 5_000_000
MAX_TOKENS = 1 << 40
"""More is a slip, and would overflow the sums over requests."""
MAX_REQUEST_TOKENS = 1_000_000_000
"""Of one request; as of a trace's."""
MAX_ERRORS = 20
MAX_ERROR_LENGTH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpeculation:
    """Acceptance over the run, from the engine's counters; None or empty where the file does not state it."""

    mean_acceptance_length: float | None = None
    """Tokens per verification step, bonus token included. [tokens]"""
    draft_acceptance_rate: float | None = None
    """Accepted over drafted tokens. [-]"""
    survival: tuple[float, ...] = ()
    """Share of drafts whose first j tokens were all accepted, j = 1, 2, ... [-]"""
    drafts: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResults:
    """One run of a load generator."""

    generator: str
    version: str
    """Of the generator; empty where the file does not state it."""
    model: str
    rows: RequestRows | None
    """None where the file holds statistics only. Arrivals count from the first request's start. [s]"""
    has_arrivals: bool
    """False: the file has durations but no stamps, so every arrival is 0 and only latencies mean anything."""
    aggregates: dict[str, float]
    """Statistics as the file states them: ttft_mean_s, tpot_p99_s, throughput_rps, output_tokens_per_s, ..."""
    speculation: LoadSpeculation | None
    errors: tuple[str, ...]
    """Distinct messages of failed requests, each on one line."""
    notes: tuple[str, ...]
    """What was left out, and why."""


def read_load_results(path: str | Path, *, benchmark: int | None = None) -> LoadResults:
    """Read one run from a load generator's result file.

    Parameters
    ----------
    path : JSON of `vllm bench serve --save-result` (with or without --save-detailed, appended runs included),
        GuideLLM's benchmarks.json, AIPerf's profile_export.jsonl or profile_export_aiperf.json.
    benchmark : which run, from 0, where the file holds several.

    Raises
    ------
    FileNotFoundError, ValueError
        One line: file, field, rule, value.
    """
    # the formats build this module's records, so that they are imported only here
    from servecast.readers.load_aiperf import from_aiperf_records, from_aiperf_summary, is_record, is_summary
    from servecast.readers.load_guidellm import from_guidellm, is_report
    from servecast.readers.load_vllm import from_vllm, is_run

    source = Path(path)
    if source.is_dir():
        raise ValueError(f"{source}: is a directory, not a result file")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file")
    with source.open("rb") as stream:
        number, first = _first_line(source, stream)
        item = _parsed(first)
        if is_record(item):
            choose_benchmark(source, 1, benchmark)
            return from_aiperf_records(source, _records(source, stream, number, item))
        documents = _documents(source, number, first, item, _rest(source, stream, len(first)))
    if all(is_run(one) for one in documents):
        return from_vllm(source, documents[choose_benchmark(source, len(documents), benchmark)])
    if len(documents) == 1 and is_report(documents[0]):
        return from_guidellm(source, documents[0], benchmark)
    if len(documents) == 1 and is_summary(documents[0]):
        choose_benchmark(source, 1, benchmark)
        return from_aiperf_summary(source, documents[0])
    raise ValueError(f"{source}: is no result file of vllm bench serve, GuideLLM or AIPerf")


def choose_benchmark(source: Path, count: int, benchmark: int | None) -> int:
    """Position of the run asked for, or of the only one."""
    if count == 0:
        raise ValueError(f"{source}: holds no benchmark")
    if benchmark is None and count > 1:
        raise ValueError(f"{source}: holds {count} benchmarks; benchmark must choose one from 0 to {count - 1}")
    if benchmark is not None and not 0 <= benchmark < count:
        raise ValueError(f"{source}: benchmark must be from 0 to {count - 1}, got {benchmark}")
    return benchmark or 0


@dataclass(slots=True)
class Requests:
    """Requests as a reader meets them, in seconds; one list for each column."""

    start_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    n_in: list[int] = field(default_factory=list)
    n_out: list[int] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)

    def add(
        self, place: str, *, start_s: float, ttft_s: float, e2e_s: float, n_in: int, n_out: int, failed: bool
    ) -> None:
        """One request; no generator can measure a TTFT of 0, it is how some of them write a missing one."""
        ttft_s = ttft_s if ttft_s > 0.0 and n_out > 0 else math.nan
        if max(n_in, n_out) > MAX_REQUEST_TOKENS:
            raise ValueError(
                f"{place}: a request must have {MAX_REQUEST_TOKENS} tokens at most, got {max(n_in, n_out)}"
            )
        longest = max((one for one in (ttft_s, e2e_s) if not math.isnan(one)), default=0.0)
        if longest > MAX_SPAN_S:
            raise ValueError(f"{place}: a request must last {MAX_SPAN_S:g} s at most, got {longest:g} s")
        if not failed and e2e_s < ttft_s:
            raise ValueError(f"{place}: the whole latency must not be below TTFT {ttft_s:g} s, got {e2e_s:g} s")
        self.start_s.append(start_s)
        self.ttft_s.append(ttft_s)
        self.e2e_s.append(e2e_s)
        self.n_in.append(n_in)
        self.n_out.append(n_out)
        self.failed.append(failed)

    def rows(self, place: str) -> RequestRows | None:
        """Rows with arrivals since the first request; None without any request.

        Raises
        ------
        ValueError : they start too far apart.
        """
        if not self.start_s:
            return None
        arrival = np.asarray(self.start_s) - min(self.start_s)
        if float(arrival.max()) > MAX_SPAN_S:
            raise ValueError(f"{place}: requests must start within {MAX_SPAN_S:g} s, got {float(arrival.max()):g} s")
        first, last = arrival + np.asarray(self.ttft_s), arrival + np.asarray(self.e2e_s)
        return measured_rows(arrival, first, last, self.n_in, self.n_out, failed=self.failed)

    def without_ttft(self) -> int:
        """Successful requests whose first token was not seen."""
        return sum(math.isnan(ttft) and not bad for ttft, bad in zip(self.ttft_s, self.failed, strict=True))


def number(place: str, name: str, value: object) -> float:
    """Finite number; NaN where the file has null, NaN or Infinity."""
    if value is None:
        return math.nan
    try:
        found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        found = None
    if found is None:
        raise ValueError(f"{place}: field {name} must be a number, got {described(value)}")
    return found if math.isfinite(found) else math.nan


def amount(place: str, name: str, value: object, *, scale: float = 1.0) -> float:
    """Number that cannot be negative, times `scale`; NaN where it is missing."""
    found = number(place, name, value)
    if found < 0.0:
        raise ValueError(f"{place}: field {name} must not be negative, got {described(value)}")
    return found * scale


def whole(place: str, name: str, value: object, *, most: int = MAX_TOKENS) -> int:
    """Whole number that must be there."""
    found = number(place, name, value)
    if math.isnan(found) or found != int(found) or not 0 <= found <= most:
        raise ValueError(f"{place}: field {name} must be a whole number from 0 to {most}, got {described(value)}")
    return int(value) if isinstance(value, int) else int(found)  # nanoseconds since 1970 exceed a double


def mapping(place: str, name: str, value: object) -> Mapping[str, Any]:
    """JSON object; an empty one where the file has none."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{place}: field {name} must be an object, got {described(value)}")
    return value


def entries(place: str, name: str, value: object) -> list[Any]:
    """JSON list; an empty one where the file has none."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{place}: field {name} must be a list, got {described(value)}")
    return value


def line_of(value: object) -> str:
    """Text on one short line: of a traceback the last line, which has the message; empty for anything but text."""
    lines = value.encode("utf-8", "replace").decode("utf-8").split("\n") if isinstance(value, str) else []
    kept = next((" ".join(one.split()) for one in reversed(lines) if one.strip()), "")
    printable = "".join(letter if letter.isprintable() else "?" for letter in kept[:MAX_ERROR_LENGTH])
    return printable if len(kept) <= MAX_ERROR_LENGTH else f"{printable[:-3]}..."


def distinct(messages: Iterable[object]) -> tuple[str, ...]:
    """Different messages in the order of their first appearance, as many as are of use."""
    found: dict[str, None] = {}
    for message in messages:
        if len(found) == MAX_ERRORS:
            break
        found[line_of(message) or "no message"] = None
    return tuple(found)


def described(value: object) -> str:
    """Value of a file in a message; of a list or an object only its size, since either may be the whole file."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return shown(value)


def _first_line(source: Path, stream: BufferedReader) -> tuple[int, bytes]:
    """Number and text of the first line that is not blank."""
    number, skipped = 1, 0
    while line := stream.readline(MAX_BYTES + 1):
        skipped += len(line)
        if skipped > MAX_BYTES:
            raise _too_large(source)
        if not line.isspace():
            return number, line
        number += 1
    raise ValueError(f"{source}: is empty")


def _rest(source: Path, stream: BufferedReader, read: int) -> bytes:
    rest = stream.read(MAX_BYTES + 1 - read)  # not the stated size: a pipe has none
    if read + len(rest) > MAX_BYTES:
        raise _too_large(source)
    return rest


def _documents(source: Path, number: int, first: bytes, item: object, rest: bytes) -> list[Any]:
    """Every JSON value of the file: one, over any number of lines, or one in each line."""
    if item is None:
        return [_required(f"{source}:", first + rest)]
    lines = enumerate(rest.split(b"\n"), number + 1)
    return [item] + [_required(f"{source}: line {at}", line) for at, line in lines if line.strip()]


def _records(source: Path, stream: BufferedReader, number: int, first: Any) -> Iterator[tuple[int, Any]]:
    yield number, first
    records = 1
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"{source}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB")
        if line.isspace():
            continue
        records += 1
        if records > MAX_REQUESTS:
            raise ValueError(f"{source}: has more than {MAX_REQUESTS} requests; cut it into parts")
        yield number, _required(f"{source}: line {number}", line)


def _parsed(data: bytes) -> Any:
    """JSON value, or None where it is no JSON; NaN and Infinity, which JSON does not know, are null."""
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _required(place: str, data: bytes) -> Any:
    found = _parsed(data)
    if found is None:
        raise ValueError(f"{place} is not valid JSON, got {shown(data[:80].decode('utf-8', 'replace'))}")
    return found


def _too_large(source: Path) -> ValueError:
    return ValueError(f"{source}: is larger than {MAX_BYTES >> 20} MiB")

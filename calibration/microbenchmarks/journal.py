"""Samples as lines of JSON that survive what ends a session: each line is on the disk before the next is measured.

The first line says what was measured and how (device, settings and their fingerprint); every other line is one visit of
one point. A last line without its end is the mark of a session that was cut off, and is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

SCHEMA = "servecast.samples/1"
MAX_BYTES = 64 * 2**20
"""Of a journal, unpacked."""
MAX_LINE = 16_384
MAX_TEXT = 400

Scalar = str | int | float
Point = tuple[tuple[str, int], ...]
"""Names and sizes of one problem, in the kernel's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One visit of one point: several repeats, close in time."""

    kernel: str
    dtype: str
    point: Point
    round: int
    """Pass over all points, from 0; passes are minutes apart and carry the drift of the machine."""
    session: int
    """Process that measured it, from 0."""
    elapsed_s: float
    """Measuring time spent on this journal so far, earlier sessions included. [s]"""
    seconds: tuple[float, ...]
    """Of one call, one value a repeat. [s]"""
    inner: int
    """Calls in a repeat."""
    outliers: tuple[int, ...] = ()
    """Repeats far from the median, or disturbed by other work: kept, and marked."""
    suspect: str = ""
    """Why the sample is not to be trusted; fits leave it out."""

    @property
    def clean(self) -> bool:
        """Whether a repeat is left that is not marked."""
        return len(self.outliers) < len(self.seconds)

    @property
    def median_s(self) -> float:
        """Of the repeats that are not marked; of all where all are."""
        unmarked = [one for i, one in enumerate(self.seconds) if i not in self.outliers]
        return median(unmarked or self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """First line of a journal."""

    settings: Mapping[str, Scalar]
    """What has to be equal for samples to belong together: device, threads, seed, kernels."""
    environment: Mapping[str, Scalar] = field(default_factory=dict)
    """What is worth knowing beside it: versions, driver, date."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings, first 16 hexadecimal digits."""
        text = json.dumps(dict(self.settings), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """A journal that is being written; use it as a context."""

    def __init__(self, path: str | Path, header: Header) -> None:
        """Open `path`, new or to go on with.

        Raises
        ------
        ValueError : the file is no journal, or holds samples of another device or of other settings.
        """
        self.path = Path(path)
        self.samples: list[Sample] = []
        self.header = header
        if self.path.name.endswith(".gz"):
            raise ValueError(f"samples must be a plain file to append to, got {self.path.name!r}")
        if self.path.exists() and self.path.stat().st_size > 0:
            stored, self.samples, whole = _parse(self.path.name, read_bytes(self.path))
            _require_same(self.path.name, stored, header)
            self._file = self.path.open("r+b")
            self._file.truncate(whole)
            self._file.seek(whole)
        else:
            self._file = self.path.open("w+b")
            self._write(header_line(header))

    def append(self, sample: Sample) -> None:
        """On the disk when this returns."""
        self._write(sample_line(sample))
        self.samples.append(sample)

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def read_journal(path: str | Path) -> tuple[Header, list[Sample]]:
    """A journal, plain or ``.gz``; one line of explanation as ValueError where it is none."""
    name = Path(path).name
    header, samples, _ = _parse(name, read_bytes(Path(path)))
    return header, samples


def read_bytes(path: Path) -> bytes:
    """Content of a journal, unpacked, with a bound on its size."""
    name = path.name
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{name}: samples must be at most {MAX_BYTES >> 20} MiB, got {path.stat().st_size} bytes")
    data = path.read_bytes()
    if not name.endswith(".gz"):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            plain = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise ValueError(f"{name}: must be a whole gzip file") from None
    if len(plain) > MAX_BYTES:
        raise ValueError(f"{name}: samples must be at most {MAX_BYTES >> 20} MiB unpacked")
    return plain


def journal_text(header: Header, samples: list[Sample]) -> str:
    """The whole journal."""
    return "\n".join([header_line(header), *map(sample_line, samples)]) + "\n"


def header_line(header: Header) -> str:
    return json.dumps(
        {
            "schema": SCHEMA,
            "fingerprint": header.fingerprint,
            "settings": dict(header.settings),
            "environment": dict(header.environment),
        }
    )


def sample_line(sample: Sample) -> str:
    return json.dumps(
        {
            "kernel": sample.kernel,
            "dtype": sample.dtype,
            "point": dict(sample.point),
            "round": sample.round,
            "session": sample.session,
            "elapsed_s": round(sample.elapsed_s, 6),
            "seconds": [float(f"{one:.6g}") for one in sample.seconds],
            "inner": sample.inner,
            "outliers": list(sample.outliers),
            "suspect": sample.suspect,
        }
    )


def parse_header(text: str) -> Header:
    """The first line; ValueError names what is wrong with it."""
    raw = _object(text)
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {str(raw.get('schema'))[:40]!r}")
    _require_keys(raw, {"schema", "fingerprint", "settings", "environment"})
    header = Header(settings=_scalars(raw, "settings"), environment=_scalars(raw, "environment"))
    if raw["fingerprint"] != header.fingerprint:
        raise ValueError(f"fingerprint must be that of the settings, got {str(raw['fingerprint'])[:40]!r}")
    return header


def parse_sample(text: str) -> Sample:
    """One line; ValueError names the field, the rule and the value."""
    raw = _object(text)
    _require_keys(
        raw,
        {"kernel", "dtype", "point", "round", "session", "elapsed_s", "seconds", "inner", "outliers", "suspect"},
    )
    seconds = tuple(_number("seconds", one, positive=True) for one in _list(raw, "seconds", 1, 64))
    outliers = tuple(_integer("outliers", one, 0, len(seconds) - 1) for one in _list(raw, "outliers", 0, 64))
    point = raw["point"]
    if not isinstance(point, dict) or not 0 < len(point) <= 8:
        raise ValueError(f"point must be an object of 1 to 8 sizes, got {repr(point)[:40]}")
    return Sample(
        kernel=_name("kernel", raw["kernel"]),
        dtype=_name("dtype", raw["dtype"]),
        point=tuple(
            (_name("point", name), _integer(f"point {name[:20]}", one, 0, 2**48)) for name, one in point.items()
        ),
        round=_integer("round", raw["round"], 0, 10**6),
        session=_integer("session", raw["session"], 0, 10**6),
        elapsed_s=_number("elapsed_s", raw["elapsed_s"], positive=False),
        seconds=seconds,
        inner=_integer("inner", raw["inner"], 1, 10**9),
        outliers=outliers,
        suspect=_text("suspect", raw["suspect"]),
    )


def _parse(name: str, data: bytes) -> tuple[Header, list[Sample], int]:
    """Header, samples and the number of bytes that whole lines take."""
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].split(b"\n")[:-1]
    if not lines:
        raise ValueError(f"{name}: must begin with a whole line of {SCHEMA}, got none")
    header: Header | None = None
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8")
            if header is None:
                header = parse_header(text)
            else:
                samples.append(parse_sample(text))
        except UnicodeDecodeError:
            raise ValueError(f"{name}: line {number}: must be UTF-8") from None
        except ValueError as error:
            raise ValueError(f"{name}: line {number}: {error}") from None
    if header is None:  # pragma: no cover (the first line gave one or raised)
        raise ValueError(f"{name}: must begin with a header")
    return header, samples, whole


def _require_same(name: str, stored: Header, asked: Header) -> None:
    if stored.fingerprint == asked.fingerprint:
        return
    for key in sorted(set(stored.settings) | set(asked.settings)):
        was, now = stored.settings.get(key), asked.settings.get(key)
        if was != now:
            raise ValueError(f"{name}: {key} must be that of its samples ({was}), got {now}; use another file")
    raise ValueError(f"{name}: settings must be those of its samples")  # pragma: no cover (then they are equal)


def _object(text: str) -> dict[str, Any]:
    if len(text) > MAX_LINE:
        raise ValueError(f"must be at most {MAX_LINE} characters, got {len(text)}")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON object") from None
    if not isinstance(raw, dict):
        raise ValueError(f"must be a JSON object, got {type(raw).__name__}")
    return raw


def _require_keys(raw: dict[str, Any], keys: set[str]) -> None:
    odd = set(raw) ^ keys
    if odd:
        first = min(odd)
        raise ValueError(f"{first[:40]!r} is {'missing' if first in keys else 'not a known field'}")


def _list(raw: dict[str, Any], name: str, least: int, most: int) -> list[Any]:
    value = raw[name]
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ValueError(f"{name} must be a list of {least} to {most}, got {repr(value)[:40]}")
    return value


def _number(name: str, value: Any, *, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e12 or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {repr(value)[:40]}")
    if value < 0.0 or (positive and value == 0.0):
        raise ValueError(f"{name} must be {'> 0' if positive else '>= 0'}, got {value:g}")
    return float(value)


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {repr(value)[:40]}")
    return value


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 40 or not value.replace("_", "").isalnum():
        raise ValueError(f"{name} must be a short name of letters, digits and _, got {str(value)[:40]!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{name} must be text of at most {MAX_TEXT} characters, got {str(value)[:40]!r}")
    return value


def _scalars(raw: dict[str, Any], name: str) -> dict[str, Scalar]:
    value = raw[name]
    if not isinstance(value, dict) or len(value) > 64:
        raise ValueError(f"{name} must be an object of at most 64 values, got {repr(value)[:40]}")
    for key, one in value.items():
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ValueError(f"{name} {key[:40]!r} must be text or a number, got {repr(one)[:40]}")
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"{name} {key[:40]!r} must be finite, got {one}")
        if isinstance(one, str) and len(one) > MAX_TEXT:
            raise ValueError(f"{name} {key[:40]!r} must be at most {MAX_TEXT} characters, got {len(one)}")
    return value

"""Whole files as text, bounded: what readers of small tables and documents share."""

from __future__ import annotations

import csv
import io
from pathlib import Path


def read_bounded(path: Path, *, most_bytes: int, kind: str) -> str:
    """Whole file as text; refused where it is no file, too large, empty or not UTF-8. `kind` is what it should be.

    >>> read_bounded(Path("/"), most_bytes=1, kind="a CSV table")
    Traceback (most recent call last):
    ValueError: /: is a directory, not a CSV table
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, not {kind}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as stream:
        data = stream.read(most_bytes + 1)  # not the stated size: a pipe has none
    if len(data) > most_bytes:
        raise ValueError(f"{path}: is larger than {most_bytes >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 text (byte 0x{data[error.start]:02x})") from None
    if "\0" in text:
        raise ValueError(f"{path}: line {text.count(chr(10), 0, text.index(chr(0))) + 1} is not text (zero byte)")
    if not text.strip():
        raise ValueError(f"{path}: is empty")
    return text


def csv_records(path: Path, text: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Names of the columns of a CSV table, and every record under them with the line it ends on."""
    # strict: an unpaired quote would swallow the lines after it
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        for record in reader:
            fields = [field.strip() for field in record]
            if not any(fields):
                continue
            if not names:
                names = [" ".join(field.split()) for field in fields]  # refusals are one line
                continue
            if len(fields) != len(names):
                raise ValueError(
                    f"{path}: line {reader.line_num}: must have {len(names)} fields as the header has, "
                    f"got {len(fields)}"
                )
            rows.append((reader.line_num, dict(zip(names, fields, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: must be valid CSV, got {error}") from None
    return names, rows

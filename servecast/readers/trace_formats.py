"""Which columns a request trace may have, and how their values become seconds and tokens.

A format is recognised by its column names alone, written in any case and with blanks, dashes or underscores. Columns
that no format asks for are ignored. The layouts are those of Azure/AzurePublicDataset, kvcache-ai/Mooncake,
HPMLL/BurstGPT and casys-kaist/LLMServingSim (workloads: `arrival_time_ns`; benchmark records: `arrival_time`, epoch
seconds).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SPAN_S = 1e8
"""Three years, of a trace, a run or a request: more is a slip, and beside such stamps a step is lost in rounding."""
MAX_TOKENS = 1_000_000_000
"""No prompt or output is longer; a larger number is another quantity in the wrong column."""

_STAMP = re.compile(r"(?:19|20)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|\+00:00)?", re.ASCII)


class BadValueError(Exception):
    """The value at `index` of a column breaks `rule`; the reader adds the file, the line and the column."""

    def __init__(self, index: int, rule: str, value: object) -> None:
        super().__init__(rule)
        self.index, self.rule, self.value = index, rule, value


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """Columns of one published layout, by normalised name."""

    name: str
    time: Mapping[str, float]
    """Accepted time columns and their units per second."""
    n_in: tuple[str, ...]
    n_out: tuple[str, ...]
    dates: bool = False
    """Times are UTC dates, not numbers."""
    prefix: str = ""
    """Column of prefix block ids, where the layout has one."""
    block_tokens: int = 0
    run: str = ""
    """Column that separates several runs in one file, where the layout has one."""
    zero_output_failed: bool = False
    """A request with 0 output tokens failed; elsewhere it is a mistake."""


FORMATS: tuple[TraceFormat, ...] = (
    TraceFormat(
        name="azure",
        time={"timestamp": 1e9},  # dates are read as whole nanoseconds
        n_in=("contexttokens",),
        n_out=("generatedtokens",),
        dates=True,
    ),
    TraceFormat(
        name="mooncake",
        time={"timestamp": 1e3, "timestamp_ms": 1e3},
        n_in=("input_length",),
        n_out=("output_length",),
        prefix="hash_ids",
        block_tokens=512,
    ),
    TraceFormat(
        name="burstgpt",
        time={"timestamp": 1.0},
        n_in=("request_tokens",),
        n_out=("response_tokens",),
        zero_output_failed=True,
    ),
    TraceFormat(
        name="llmservingsim",
        time={"arrival_time_ns": 1e9, "arrival_time": 1.0},
        n_in=("input_toks",),
        n_out=("output_toks",),
    ),
    TraceFormat(
        name="plain",
        time={"t_s": 1.0, "arrival_s": 1.0, "timestamp_s": 1.0},
        n_in=("n_in", "input_tokens", "prompt_tokens"),
        n_out=("n_out", "output_tokens", "completion_tokens"),
        run="run",
    ),
)
FORMAT_NAMES: tuple[str, ...] = tuple(form.name for form in FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where one file keeps what the reader needs; names are spelled as in the file."""

    form: TraceFormat
    time: str
    n_in: str
    n_out: str
    prefix: str = ""
    run: str = ""
    units_per_second: float


def match_columns(names: Sequence[str]) -> Columns:
    """The format whose columns `names` are; a ValueError says which column is missing, or what would be accepted."""
    known: dict[str, str] = {}
    for name in names:
        if name.strip() and _normalised(name) in known:
            raise ValueError(f"column {shown(name)} appears twice")
        known[_normalised(name)] = name
    matches = [(form, _roles(form, known)) for form in FORMATS]
    # formats share the word `timestamp`, so the token columns decide between equally good ones
    form, roles = max(matches, key=lambda match: (len(match[1]), "n_in" in match[1], "n_out" in match[1]))
    if len(roles) < 2:
        raise ValueError(_unknown_header(names))
    for role, accepted in (("time", tuple(form.time)), ("n_in", form.n_in), ("n_out", form.n_out)):
        if role not in roles:
            raise ValueError(
                f"column {' or '.join(accepted)} is missing for a trace of format {form.name}, found {_listed(names)}"
            )
        if len(roles[role]) > 1:
            raise ValueError(f"columns {' and '.join(roles[role])} name the same quantity; keep one")
    time = roles["time"][0]
    return Columns(
        form=form,
        time=time,
        n_in=roles["n_in"][0],
        n_out=roles["n_out"][0],
        prefix=known.get(form.prefix, ""),
        run=known.get(form.run, ""),
        units_per_second=form.time[_normalised(time)],
    )


def describe_formats() -> str:
    """The accepted layouts in one line, for an error message or a help text."""
    return "; ".join(
        f"{form.name} ({'|'.join(form.time)}, {'|'.join(form.n_in)}, {'|'.join(form.n_out)})" for form in FORMATS
    )


def ticks(values: Sequence[Any], columns: Columns) -> NDArray[np.float64] | NDArray[np.int64]:
    """Arrival times of one column in the file's own unit: nanoseconds for dates, else numbers >= 0 as written."""
    if columns.form.dates:
        return _dates(values)
    times = _numbers(values)
    _refuse_where(~np.isfinite(times), "be a finite number", values)
    _refuse_where(times < 0.0, "be >= 0", values)
    return times


def tokens(values: Sequence[Any], *, least: int) -> NDArray[np.int64]:
    """Token counts of one column, whole numbers from `least` to `MAX_TOKENS`."""
    counts = _numbers(values)
    _refuse_where(~np.isfinite(counts) | (counts != np.floor(counts)), "be a whole number", values)
    _refuse_where(counts < least, f"be at least {least}", values)
    _refuse_where(counts > MAX_TOKENS, f"be at most {MAX_TOKENS}", values)
    return counts.astype(np.int64)


def prefix_blocks(values: Sequence[Any]) -> list[tuple[int, ...]]:
    """Prefix block ids: a JSON list of whole numbers, or whole numbers joined by blanks."""
    blocks: list[tuple[int, ...]] = []
    for index, value in enumerate(values):
        parts = value.split() if isinstance(value, str) else value
        try:
            blocks.append(tuple(map(int, parts)))
        except (TypeError, ValueError, OverflowError):
            raise BadValueError(index, "be a list of whole numbers", value) from None
    return blocks


def shown(value: object) -> str:
    """A value of a file on one short line, whatever is in it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _normalised(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _roles(form: TraceFormat, known: Mapping[str, str]) -> dict[str, list[str]]:
    accepted = {"time": tuple(form.time), "n_in": form.n_in, "n_out": form.n_out}
    found = {role: [known[name] for name in names if name in known] for role, names in accepted.items()}
    return {role: names for role, names in found.items() if names}


def _listed(names: Sequence[str], limit: int = 12) -> str:
    some = ", ".join(shown(name)[1:-1] for name in names[:limit])
    return some + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _unknown_header(names: Sequence[str]) -> str:
    hint = " (columns must be separated by commas)" if len(names) == 1 and re.search(r"[;\t|]", names[0]) else ""
    return f"no known trace format has the columns {_listed(names)}{hint}; accepted are {describe_formats()}"


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    try:
        numbers = np.fromiter(map(float, values), np.float64, count=len(values))
    except (TypeError, ValueError, OverflowError):
        raise _located(values, float, "be a number") from None
    # JSON's true would pass as 1
    _refuse_where(np.fromiter((value is True or value is False for value in values), bool), "be a number", values)
    return numbers


def _dates(values: Sequence[Any]) -> NDArray[np.int64]:
    rule = "be a UTC time such as 2023-11-16 18:17:03.9799600"
    for index, value in enumerate(values):
        # numpy alone would also take "now" and a bare year
        if not isinstance(value, str) or _STAMP.fullmatch(value) is None:
            raise BadValueError(index, rule, value)
    plain = [value.removesuffix("Z").removesuffix("+00:00") for value in values]
    try:
        return np.array(plain, dtype="datetime64[ns]").view(np.int64)
    except ValueError:
        raise _located(plain, lambda value: np.datetime64(value, "ns"), rule) from None


def _located(values: Sequence[Any], convert: Callable[[Any], object], rule: str) -> BadValueError:
    for index, value in enumerate(values):
        try:
            convert(value)
        except (TypeError, ValueError, OverflowError):
            return BadValueError(index, rule, value)
    return BadValueError(0, rule, values[0])


def _refuse_where(bad: NDArray[np.bool_], rule: str, values: Sequence[Any]) -> None:
    if bad.any():
        index = int(np.argmax(bad))
        raise BadValueError(index, rule, values[index])

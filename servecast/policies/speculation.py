"""The speculation table: draft length by batch size as a document that people, scripts and the engine writers read.

Versioned JSON (``"schema": "servecast.speculation/1"``), unknown keys refused. Segments of batch sizes, contiguous from
1 to ``max_batch``, each carry one draft length K and what it is predicted to do. K = 0 drafts nothing, which is not the
same as a server without speculation: the drafter is still loaded and kept in step.

Where an engine cannot do what a table says, the writers of this room say so as :class:`Finding` values: an error when
the file would be refused or the engine would run another schedule than the one written, a warning when the schedule
runs but costs more, or is less tested, than the prediction assumes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from servecast.policies import documents
from servecast.policies.documents import Document, Interval, Text
from servecast.policies.versions import Engine, Version, parse_version, show_version

SCHEMA: Final = "servecast.speculation/1"
"""Name and major version of the document; a change that breaks a reader raises the number."""

SCHEMA_FILE: Final = PurePosixPath("speculation_table.schema.json")
"""The JSON Schema shipped beside this module."""

_NAME: Final = "speculation table"

Batch = Annotated[int, Field(ge=1, le=100_000, strict=True)]
DraftLength = Annotated[int, Field(ge=0, le=256, strict=True)]

NEEDS_DRAFT_MODEL: Final = frozenset({"eagle", "eagle3", "dflash", "draft_model"})
"""Methods whose drafter is a checkpoint of its own in all three engines."""


class Segment(Document):
    """Batch sizes `lo` to `hi`, both included, and the draft length for them."""

    lo: Batch
    hi: Batch
    draft_length: DraftLength
    """Drafted tokens per request and step. [tokens]"""


class SegmentForecast(Document):
    """What one segment is predicted to do, at its upper end."""

    goodput_tokens_per_s: Interval
    """Decoded tokens of all requests together. [tokens/s]"""
    tpot_s: Interval
    """Mean time per output token of one request. [s]"""


class SpeculationProvenance(Document):
    """Where the table comes from."""

    servecast: Text
    """Version of the package."""
    profile: Text
    """Source of the step costs: a profile or measured cells."""
    acceptance: Text
    """Source of the acceptance curve."""
    date: Text
    """As the caller gave it; this package reads no clock."""


class SpeculationTable(Document):
    """One decided schedule of draft lengths."""

    schema_: Literal["servecast.speculation/1"] = Field(default=SCHEMA, alias="schema")
    engine: Literal["vllm", "sglang", "trtllm"]
    engine_version: Annotated[str, Field(max_length=40, strict=True)]
    """A release; for TensorRT-LLM also a release candidate such as 1.3.0rc8, since 1.3 has no release."""
    model: Text
    """Hugging Face name or path, as the engine is given it."""
    method: Literal["eagle", "eagle3", "mtp", "dflash", "dspark", "ngram", "draft_model", "suffix"]
    draft_model: Text | None = None
    max_batch: Batch
    """Most requests in one step (vLLM's max_num_seqs)."""
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=1000)]
    num_speculative_tokens: Annotated[int, Field(ge=1, le=256, strict=True)]
    """Largest draft length the engine makes room for. [tokens]"""
    best_static_length: DraftLength | None = None
    """Best single length, for engines without a schedule; None where it was not computed. [tokens]"""
    data_parallel: Annotated[int, Field(ge=1, le=4096, strict=True)] = 1
    model_runner: Literal["v1", "v2"] | None = None
    """vLLM's model runner; None leaves the choice to vLLM."""
    predicted: tuple[SegmentForecast, ...]
    """One per segment, in the same order."""
    advice: tuple[Text, ...] = ()
    """Remarks of the planner to the reader."""
    provenance: SpeculationProvenance

    @field_validator("model", "draft_model")
    @classmethod
    def _name_is_data(cls, value: str | None) -> str | None:
        return None if value is None else documents.refuse_unsafe_argument(value)

    @model_validator(mode="after")
    def _version_is_a_release(self) -> Self:
        if self.engine == "trtllm":
            parse_candidate(self.engine_version)
        else:
            parse_version(self.engine_version)
        return self

    @model_validator(mode="after")
    def _drafter_is_named(self) -> Self:
        if self.method in NEEDS_DRAFT_MODEL and self.draft_model is None:
            raise ValueError(f"draft_model must be given for method {self.method}, got nothing")
        return self

    @model_validator(mode="after")
    def _segments_tile_the_batch_sizes(self) -> Self:
        expected = 1
        for number, segment in enumerate(self.segments):
            if segment.lo != expected:
                raise ValueError(f"segments.{number}.lo must be {expected}, got {segment.lo}")
            if segment.hi < segment.lo:
                raise ValueError(f"segments.{number}.hi must be >= lo {segment.lo}, got {segment.hi}")
            expected = segment.hi + 1
        if expected != self.max_batch + 1:
            raise ValueError(f"segments must end at max_batch {self.max_batch}, got {expected - 1}")
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        longest = max(segment.draft_length for segment in self.segments)
        for field, length in (("draft_length", longest), ("best_static_length", self.best_static_length or 0)):
            if length > self.num_speculative_tokens:
                most = self.num_speculative_tokens
                raise ValueError(f"{field} must be <= num_speculative_tokens {most}, got {length}")
        if len(self.predicted) != len(self.segments):
            raise ValueError(f"predicted must have one entry per segment, got {len(self.predicted)}")
        return self


class Level(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One limit of an engine that a schedule meets."""

    level: Level
    rule: str
    """Short name of the limit."""
    message: str
    """One line."""
    can_force: bool = False
    """Whether the file is well formed all the same, so that a caller who knows better may ask for it."""


def error(rule: str, message: str, *, can_force: bool = False) -> Finding:
    """A finding of level error."""
    return Finding(level=Level.ERROR, rule=rule, message=message, can_force=can_force)


def warning(rule: str, message: str) -> Finding:
    """A finding of level warning."""
    return Finding(level=Level.WARNING, rule=rule, message=message)


def refuse_errors(found: Iterable[Finding]) -> None:
    """Raises the first error as a ``ValueError``."""
    for finding in found:
        if finding.level is Level.ERROR:
            raise ValueError(finding.message)


def dense_lengths(table: SpeculationTable) -> list[int]:
    """Draft length at batch size 1, 2, ..., ``max_batch``."""
    return [part.draft_length for part in table.segments for _ in range(part.lo, part.hi + 1)]


def only_length(table: SpeculationTable) -> int | None:
    """The draft length of a table that has just one, else None."""
    lengths = {segment.draft_length for segment in table.segments}
    return lengths.pop() if len(lengths) == 1 else None


def length_to_write(
    table: SpeculationTable, found: Iterable[Finding], *, allow_static: bool, force: bool
) -> int | None:
    """The one length that an engine's file gets, or None for a schedule.

    `found` are the engine's findings for the table. An error is raised, unless `allow_static` asks for the table's best
    single length instead, or `force` for a schedule that the engine reads and then drops.
    """
    only = only_length(table)
    blocking = [finding for finding in found if finding.level is Level.ERROR and not (force and finding.can_force)]
    if only is not None or not blocking:
        return only
    if not allow_static:
        raise ValueError(blocking[0].message)
    if table.best_static_length is None:
        raise ValueError(f"best_static_length must be given, got nothing: {blocking[0].message}")
    return table.best_static_length


def missing_feature(engine: Engine, option: str, text: str) -> str | None:
    """One line if release `text` is older than `option`, written as the engine spells it; None where it is there."""
    since: Version = engine.options[option.replace("_", "-")].since
    if parse_version(text) >= since:
        return None
    return f"{engine.name} {text} has no {option} (since {show_version(since)})"


_CANDIDATE = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?:rc(\d{1,4}))?(?:\.post(\d{1,4}))?", re.ASCII)
_FINAL: Final = 10_000


def parse_candidate(text: str) -> tuple[int, int, int, int, int]:
    """Major, minor, patch, candidate and post release of `text`, in the order of release.

    >>> parse_candidate("1.3.0rc8") < parse_candidate("1.3.0rc22.post1") < parse_candidate("1.3.0")
    True
    """
    match = _CANDIDATE.fullmatch(text)
    if match is None:
        raise ValueError(f"engine_version must be a release such as 1.2.1 or 1.3.0rc8, got {text[:40]!r}")
    major, minor, patch, candidate, post = match.groups()
    number = _FINAL if candidate is None else int(candidate)
    return int(major), int(minor), int(patch or 0), number, int(post or 0)


def dumps(table: SpeculationTable) -> str:
    """JSON text with the keys in the order of the classes above, ending in a newline."""
    return documents.dumps(table)


def loads(text: str) -> SpeculationTable:
    """The table in `text`; anything wrong is a ``ValueError`` of one line that names field, rule and value."""
    return documents.loads(text, SpeculationTable, name=_NAME, schema=SCHEMA)


def from_dict(data: Mapping[str, Any]) -> SpeculationTable:
    """The table with these fields, lists or tuples; one-line errors as in :func:`loads`."""
    return documents.from_dict(data, SpeculationTable, name=_NAME)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the document."""
    return documents.json_schema(SpeculationTable, SCHEMA)


def json_schema_text() -> str:
    """Content of the shipped ``speculation_table.schema.json``."""
    return documents.json_schema_text(SpeculationTable, SCHEMA)

"""The policy table: one decided deployment as a document that people, scripts and the engine writers read.

Versioned JSON (``"schema": "servecast.policy/1"``), unknown keys refused, every number finite and bounded. The document
carries what was decided (engine, parallel degrees, batch limits, memory share), what it is predicted to do (latency
percentiles with 90 % intervals), what it was asked to do (latency limits) and where the figures come from. Nothing in
this room reads a clock or a file: the caller passes the date and writes the text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from servecast.model.formats import canonical_format
from servecast.policies.versions import parse_version

SCHEMA: Final = "servecast.policy/1"
"""Name and major version of the document; a change that breaks a reader raises the number."""

SCHEMA_FILE: Final = PurePosixPath("policy_table.schema.json")
"""The JSON Schema shipped beside this module."""

Degree = Annotated[int, Field(ge=1, le=4096, strict=True)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000_000, strict=True)]
Seconds = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False, strict=True)]
Bytes = Annotated[float, Field(ge=0.0, le=1e15, allow_inf_nan=False, strict=True)]
Text = Annotated[str, Field(min_length=1, max_length=500, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Document(BaseModel):
    """Rules that every part of the table shares: immutable, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(Document):
    """A predicted value with its 90 % interval."""

    value: Seconds
    lo: Seconds
    hi: Seconds

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.lo <= self.value <= self.hi:
            raise ValueError(f"lo <= value <= hi must hold, got {self.lo:g}, {self.value:g}, {self.hi:g}")
        return self


class Predicted(Document):
    """Latency forecast at the planned load, per request, seen by the client."""

    ttft_p50_s: Interval
    ttft_p99_s: Interval
    tpot_p50_s: Interval
    tpot_p99_s: Interval


class Limit(Document):
    """One latency target, named as users write it (``ttft_p99``)."""

    name: Annotated[str, Field(pattern=r"^(ttft|tpot|e2e)_p[0-9]{1,2}(\.[0-9]{1,4})?$", strict=True)]
    limit_s: Annotated[float, Field(gt=0.0, le=1e9, allow_inf_nan=False, strict=True)]


class Memory(Document):
    """How the planner divided one GPU's memory; engines that count memory otherwise are converted from these."""

    gpu_bytes: Annotated[float, Field(gt=0.0, le=1e15, allow_inf_nan=False, strict=True)]
    """Device memory of one GPU. [B]"""
    weight_bytes: Bytes
    """Weights that one GPU holds. [B]"""
    overhead_bytes: Bytes
    """Peak activations, captured graphs and communication buffers of one GPU, neither weights nor KV cache. [B]"""


class Provenance(Document):
    """Where the table comes from."""

    servecast: Text
    """Version of the package."""
    profile: Text
    trace: Text
    date: Text
    """As the caller gave it; this package reads no clock."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class PolicyTable(Document):
    """One decided deployment."""

    schema_: Literal["servecast.policy/1"] = Field(default=SCHEMA, alias="schema")
    model: Text
    """Hugging Face name or path, as the engine is given it."""
    engine: Literal["vllm", "sglang", "trtllm"]
    engine_version: Annotated[str, Field(max_length=40, strict=True)]
    gpu: Text
    precision: str
    """Format the weights are served in."""
    checkpoint_format: str | None = None
    """Format the checkpoint is published in; None where it is not known."""
    kv_format: str
    """Format of the KV cache."""
    tp: Degree
    pp: Degree
    replicas: Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
    """Independent servers behind one load balancer."""
    max_num_seqs: Tokens
    max_num_batched_tokens: Tokens
    max_model_len: Tokens
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False, strict=True)]
    """Share of one GPU's memory for weights, activations and KV cache together (vLLM's meaning)."""
    memory: Memory | None = None
    """Needed by engines whose memory option means something else (SGLang, TensorRT-LLM)."""
    enable_chunked_prefill: Flag
    enable_prefix_caching: Flag
    cost_usd_per_hour: Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False, strict=True)]
    """All replicas together. [USD/h]"""
    predicted: Predicted
    slo: tuple[Limit, ...]
    provenance: Provenance

    @field_validator("model")
    @classmethod
    def _model_is_data(cls, value: str) -> str:
        # The name becomes a command argument: a leading dash would be read as an option, and NUL ends an argument.
        if value.startswith("-"):
            raise ValueError("must not start with a dash")
        if "\0" in value:
            raise ValueError("must not contain a NUL character")
        return value

    @field_validator("engine_version")
    @classmethod
    def _version_is_a_release(cls, value: str) -> str:
        parse_version(value)
        return value

    @field_validator("precision", "kv_format", "checkpoint_format")
    @classmethod
    def _format_is_known(cls, value: str | None) -> str | None:
        return None if value is None else canonical_format(value)


def dumps(table: PolicyTable) -> str:
    """JSON text with the keys in the order of the classes above, ending in a newline."""
    data = table.model_dump(mode="json", by_alias=True)
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def loads(text: str) -> PolicyTable:
    """The table in `text`; anything wrong is a ``ValueError`` of one line that names field, rule and value."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"policy table must be JSON, got {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError("policy table must be JSON of a few levels, got deeper nesting") from None
    if not isinstance(data, dict):
        raise ValueError(f"policy table must be a JSON object, got {_show(data)}")
    if "schema" not in data:
        raise ValueError(f"policy table: schema must be {SCHEMA!r}, got nothing")
    return from_dict(data)


def from_dict(data: Mapping[str, Any]) -> PolicyTable:
    """The table with these fields, ``slo`` a list or a tuple; one-line errors as in :func:`loads`."""
    try:
        return PolicyTable.model_validate(dict(data))
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the document."""
    body = PolicyTable.model_json_schema(by_alias=True)
    # A default of the class is a courtesy to Python callers; in a file the version has to be stated.
    required = ["schema", *body.pop("required")]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA}
    return {**head, **body, "required": required}


def json_schema_text() -> str:
    """Content of the shipped ``policy_table.schema.json``."""
    return json.dumps(json_schema(), indent=2, allow_nan=False) + "\n"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"policy table: numbers must be finite, got {name}")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"policy table: {_show(key)} must be given once, got it twice")
        found[key] = value
    return found


_RULES: Final = {
    "missing": "must be given",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "finite_number": "must be finite",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "tuple_type": "must be a list",
    "model_type": "must be an object",
}


def _one_line(error: ValidationError) -> str:
    """First fault of `error` as field, rule and value."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    context, kind = fault.get("ctx", {}), fault["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _names(fault["loc"][:-1]), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"policy table: {_plain(place)} is not a field{hint}, got {_show(fault['input'])}"
    if kind == "missing":
        return f"policy table: {_plain(place)} must be given, got nothing"
    rule = _RULES[kind].format(**context) if kind in _RULES else _plain(fault["msg"].removeprefix("Value error, "))
    if ", got " in rule:  # a rule of ours that already shows the value
        return f"policy table: {place}: {rule}"
    return f"policy table: {place} {rule}, got {_show(fault['input'])}"


def _names(place: tuple[int | str, ...]) -> list[str]:
    """Field names of the object at `place`."""
    known: dict[str, type[Document]] = {
        "predicted": Predicted,
        "slo": Limit,
        "memory": Memory,
        "provenance": Provenance,
    }
    owner: type[Document] = PolicyTable if not place else known.get(str(place[0]), PolicyTable)
    if len(place) > 1 and place[0] == "predicted":
        owner = Interval
    return [info.alias or name for name, info in owner.model_fields.items()]


def _plain(text: str) -> str:
    """One line: control characters of a hostile key are shown, not printed."""
    return re.sub(r"[^\x20-\x7e]", lambda match: repr(match.group())[1:-1], text)[:200]


def _show(value: object) -> str:
    """`value` on one line of at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."

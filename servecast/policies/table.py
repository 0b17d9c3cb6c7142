"""The policy table: one decided deployment as a document that people, scripts and the engine writers read.

Versioned JSON (``"schema": "servecast.policy/1"``), unknown keys refused, every number finite and bounded. The document
carries what was decided (engine, parallel degrees, batch limits, memory share), what it is predicted to do (latency
percentiles with 90 % intervals), what it was asked to do (latency limits) and where the figures come from. Nothing in
this room reads a clock or a file: the caller passes the date and writes the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator

from servecast.model.formats import canonical_format
from servecast.policies import documents
from servecast.policies.documents import Document, Interval, Text, Tokens
from servecast.policies.versions import parse_version

SCHEMA: Final = "servecast.policy/1"
"""Name and major version of the document; a change that breaks a reader raises the number."""

SCHEMA_FILE: Final = PurePosixPath("policy_table.schema.json")
"""The JSON Schema shipped beside this module."""

Degree = Annotated[int, Field(ge=1, le=4096, strict=True)]
Bytes = Annotated[float, Field(ge=0.0, le=1e15, allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


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
        return documents.refuse_unsafe_argument(value)

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
    return documents.dumps(table)


def loads(text: str) -> PolicyTable:
    """The table in `text`; anything wrong is a ``ValueError`` of one line that names field, rule and value."""
    return documents.loads(text, PolicyTable, name="policy table", schema=SCHEMA)


def from_dict(data: Mapping[str, Any]) -> PolicyTable:
    """The table with these fields, ``slo`` a list or a tuple; one-line errors as in :func:`loads`."""
    return documents.from_dict(data, PolicyTable, name="policy table")


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the document."""
    return documents.json_schema(PolicyTable, SCHEMA)


def json_schema_text() -> str:
    """Content of the shipped ``policy_table.schema.json``."""
    return documents.json_schema_text(PolicyTable, SCHEMA)

"""The policy table: round trip, schema, and one-line refusals."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
from policy_documents import HOSTILE, document

from servecast.policies import table as policy
from servecast.policies.versions import Engine, Option, parse_version, show_version


def edited(path: str, value: object) -> str:
    """JSON text of the valid document with one value replaced; `path` is dotted."""
    data = document()
    *parents, last = path.split(".")
    target: Any = data
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[last] = value
    return json.dumps(data)


def test_round_trip_is_the_identity() -> None:
    text = policy.dumps(policy.from_dict(document()))
    assert policy.dumps(policy.loads(text)) == text
    assert policy.loads(text) == policy.from_dict(document())
    assert text.endswith("}\n")
    assert not text.endswith("\n\n")


def test_key_order_is_declaration_order_whatever_the_input_order() -> None:
    shuffled = dict(reversed(list(document().items())))
    text = policy.dumps(policy.from_dict(shuffled))
    assert list(json.loads(text)) == list(document())


def test_numbers_survive_to_the_last_bit() -> None:
    value = 0.1 + 0.2  # 0.30000000000000004
    table = policy.loads(policy.dumps(policy.from_dict(document(gpu_memory_utilization=value))))
    assert table.gpu_memory_utilization == value


def test_format_synonyms_are_folded() -> None:
    table = policy.from_dict(document(precision="FP4", kv_format="fp8_e4m3", checkpoint_format=None))
    assert (table.precision, table.kv_format, table.checkpoint_format) == ("nvfp4", "fp8", None)


def test_table_is_immutable() -> None:
    table = policy.from_dict(document())
    with pytest.raises(ValueError, match="frozen"):
        table.tp = 4


def test_shipped_schema_is_current() -> None:
    shipped = resources.files("servecast.policies").joinpath(str(policy.SCHEMA_FILE)).read_text(encoding="utf-8")
    assert json.loads(shipped) == policy.json_schema(), "write json_schema_text() to policy_table.schema.json"
    assert shipped == policy.json_schema_text()


def test_schema_refuses_unknown_keys_and_demands_the_version() -> None:
    schema = policy.json_schema()
    assert schema["additionalProperties"] is False
    assert "schema" in schema["required"]
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("gpu_memory_utilization", 1.5, ["gpu_memory_utilization", "must be <= 1", "got 1.5"]),
        ("gpu_memory_utilization", 0, ["gpu_memory_utilization", "must be > 0", "got 0"]),
        ("tp", 0, ["tp", "must be >= 1", "got 0"]),
        ("tp", -2, ["tp", "must be >= 1", "got -2"]),
        ("tp", 2.0, ["tp", "must be a whole number", "got 2.0"]),
        ("tp", True, ["tp", "must be a whole number", "got True"]),
        ("tp", "2", ["tp", "must be a whole number", "got '2'"]),
        ("enable_prefix_caching", 1, ["enable_prefix_caching", "must be true or false", "got 1"]),
        ("cost_usd_per_hour", -1.0, ["cost_usd_per_hour", "must be >= 0", "got -1.0"]),
        ("replicas", 10**30, ["replicas", "must be <=", "got 1000000"]),
        ("engine", "vlm", ["engine", "'vllm', 'sglang' or 'trtllm'", "got 'vlm'"]),
        ("engine_version", "0.32.0rc1", ["engine_version", "release", "got '0.32.0rc1'"]),
        ("engine_version", "0.32.0\n", ["engine_version", "release", r"got '0.32.0\n'"]),
        ("precision", "fp3", ["precision", "must be one of", "got 'fp3'"]),
        ("model", "", ["model", "must not be empty", "got ''"]),
        ("model", "--help", ["model", "must not start with a dash", "got '--help'"]),
        ("model", "a\0b", ["model", "must not contain a NUL character", r"got 'a\x00b'"]),
        ("schema", "servecast.policy/2", ["schema", "'servecast.policy/1'", "got 'servecast.policy/2'"]),
        ("slo.0.limit_s", 0.0, ["slo.0.limit_s", "must be > 0", "got 0.0"]),
        ("slo.0.name", "ttft", ["slo.0.name", "must match", "got 'ttft'"]),
        ("predicted.ttft_p50_s.lo", 0.3, ["predicted.ttft_p50_s", "lo <= value <= hi", "got 0.3, 0.2, 0.4"]),
        ("provenance.seed", -1, ["provenance.seed", "must be >= 0", "got -1"]),
        ("max_num_seq", 3, ["max_num_seq is not a field", "did you mean max_num_seqs?", "got 3"]),
        ("predicted.ttft_p95_s", 3, ["predicted.ttft_p95_s is not a field", "got 3"]),
        ("memory.gpu_byte", 3, ["memory.gpu_byte is not a field", "did you mean gpu_bytes?"]),
        ("evil\nkey", 3, [r"evil\nkey is not a field"]),
    ],
)
def test_refusal_is_one_line_with_field_rule_and_value(path: str, value: object, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^policy table") as caught:
        policy.loads(edited(path, value))
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("path", ["gpu_memory_utilization", "cost_usd_per_hour", "predicted.tpot_p99_s.hi"])
def test_not_finite_numbers_are_refused_in_text_and_in_python(constant: str, path: str) -> None:
    text = edited(path, float(constant))
    assert constant in text
    with pytest.raises(ValueError, match=rf"^policy table: numbers must be finite, got {constant}$"):
        policy.loads(text)
    data = document()
    target: Any = data
    *parents, last = path.split(".")
    for part in parents:
        target = target[part]
    target[last] = float(constant)
    with pytest.raises(ValueError, match=r"^policy table: [a-z0-9_.]+ must be [^\n]+, got [^\n]+$"):
        policy.from_dict(data)


def test_overflowing_literal_is_refused() -> None:
    text = json.dumps(document()).replace('"cost_usd_per_hour": 18.0', '"cost_usd_per_hour": 1e999')
    with pytest.raises(ValueError, match=r"^policy table: cost_usd_per_hour must be .*, got inf$"):
        policy.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("[1]", "must be a JSON object"),
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ('{"schema": "servecast.policy/1", "schema": "servecast.policy/1"}', "'schema' must be given once"),
        ('{"model": "a"}', "schema must be 'servecast.policy/1', got nothing"),
        ('{"schema": "servecast.policy/1"}', "model must be given, got nothing"),
    ],
)
def test_text_that_is_no_table(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^policy table") as caught:
        policy.loads(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_strings_stay_data(name: str) -> None:
    table = policy.from_dict(document(model=name, gpu=name))
    again = policy.loads(policy.dumps(table))
    assert (again.model, again.gpu) == (name, name)


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [("0.9.0", "0.9.0.1"), ("0.9.0.1", "0.10.0"), ("0.4.6", "0.4.6.post2"), ("0.32", "0.32.1"), ("0.32.1", "1.0")],
)
def test_versions_are_ordered_as_released(smaller: str, larger: str) -> None:
    assert parse_version(smaller) < parse_version(larger)
    assert parse_version(show_version(parse_version(larger))) == parse_version(larger)


def test_option_range_is_half_open() -> None:
    row = Option(since=parse_version("0.2"), until=parse_version("0.4"))
    engine = Engine(name="toy", oldest=(0, 1, 0, 0), newest=(0, 9, 0, 0), options={"an-option": row})
    assert engine.require("an_option", "0.2.0") is row
    assert engine.require("an-option", "0.3.9") is row
    for version in ("0.1.9", "0.4.0"):
        with pytest.raises(
            ValueError, match=rf"^toy {version} does not know an_option \(since 0\.2\.0, until 0\.4\.0\)$"
        ):
            engine.require("an_option", version)
    with pytest.raises(ValueError, match=r"^toy has no option 'other' in the table of known options$"):
        engine.require("other", "0.2.0")

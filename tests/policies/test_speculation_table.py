"""The speculation table: round trip, schema, order of releases, one-line refusals."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
from policy_documents import HOSTILE
from speculation_documents import document, table

from servecast.policies import speculation


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
    text = speculation.dumps(table())
    assert speculation.loads(text) == table()
    assert speculation.dumps(speculation.loads(text)) == text
    assert list(json.loads(text)) == list(document())


def test_shipped_schema_is_current() -> None:
    file = resources.files("servecast.policies").joinpath(str(speculation.SCHEMA_FILE))
    assert json.loads(file.read_text(encoding="utf-8")) == speculation.json_schema(), "write json_schema_text() to it"


def test_schema_refuses_unknown_keys_and_asks_for_the_version() -> None:
    schema = speculation.json_schema()
    assert schema["$id"] == "servecast.speculation/1"
    assert "schema" in schema["required"]
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


def test_dense_lengths_and_one_length() -> None:
    """Hand: 5 at 1 and 2, 3 at 3 to 5."""
    assert speculation.dense_lengths(table([(1, 2, 5), (3, 5, 3)])) == [5, 5, 3, 3, 3]
    assert speculation.only_length(table([(1, 2, 5), (3, 5, 3)])) is None
    assert speculation.only_length(table([(1, 2, 4), (3, 5, 4)])) == 4


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("segments.0.lo", 2, ["segments.0.lo must be 1, got 2"]),
        ("segments.1.lo", 18, ["segments.1.lo must be 17, got 18"]),
        ("segments.1.lo", 16, ["segments.1.lo must be 17, got 16"]),
        ("segments.1.hi", 16, ["segments.1.hi must be >= lo 17, got 16"]),
        ("segments.2.hi", 255, ["segments must end at max_batch 256, got 255"]),
        ("segments.0.draft_length", 6, ["draft_length must be <= num_speculative_tokens 5, got 6"]),
        ("segments.0.draft_length", -1, ["segments.0.draft_length must be >= 0, got -1"]),
        ("segments.0.draft_length", 3.0, ["segments.0.draft_length must be a whole number, got 3.0"]),
        ("segments.0.draft_lenght", 3, ["is not a field (did you mean draft_length?)"]),
        ("segments", [], ["segments must have at least 1 items, got []"]),
        ("predicted", [], ["predicted must have one entry per segment, got 0"]),
        ("predicted.1.tpot_s.lo", 0.3, ["predicted.1.tpot_s", "lo <= value <= hi", "got 0.3, 0.2, 0.4"]),
        ("predicted.1.tpot_s.low", 0.3, ["predicted.1.tpot_s.low is not a field (did you mean lo?)"]),
        ("num_speculative_tokens", 0, ["num_speculative_tokens must be >= 1, got 0"]),
        ("best_static_length", 6, ["best_static_length must be <= num_speculative_tokens 5, got 6"]),
        ("draft_model", None, ["draft_model must be given for method eagle3, got nothing"]),
        ("draft_model", "--help", ["draft_model must not start with a dash, got '--help'"]),
        ("model", "a\0b", ["model must not contain a NUL character", r"got 'a\x00b'"]),
        ("method", "medusa", ["method must be 'eagle'", "got 'medusa'"]),
        ("engine_version", "latest", ["engine_version must be a release such as 0.32.0, got 'latest'"]),
        ("engine_version", "0.33.0rc1", ["engine_version must be a release", "got '0.33.0rc1'"]),
        ("model_runner", "v3", ["model_runner must be 'v1' or 'v2', got 'v3'"]),
        ("schema", "servecast.policy/1", ["schema must be 'servecast.speculation/1', got 'servecast.policy/1'"]),
        ("provenance.seed", 1, ["provenance.seed is not a field"]),
        ("max_num_seqs", 1, ["max_num_seqs is not a field"]),
    ],
)
def test_refusal_is_one_line_with_field_rule_and_value(path: str, value: object, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^speculation table") as caught:
        speculation.loads(edited(path, value))
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    for word in words:
        assert word in message


def test_not_finite_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^speculation table: numbers must be finite, got NaN$"):
        speculation.loads(edited("predicted.0.tpot_s.hi", float("nan")))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_strings_stay_data(name: str) -> None:
    again = speculation.loads(speculation.dumps(table(model=name, draft_model=name, advice=[name])))
    assert (again.model, again.draft_model, again.advice) == (name, name, (name,))


def test_candidates_come_before_their_release() -> None:
    """Order of the package index: candidates by number, then the release, then its post releases."""
    order = ["1.2.0rc8", "1.2.0", "1.2.1", "1.3.0rc2", "1.3.0rc10", "1.3.0rc22", "1.3.0rc22.post1", "1.3.0", "1.4.0rc1"]
    numbers = [speculation.parse_candidate(text) for text in order]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == len(order)
    assert table(engine="trtllm", engine_version="1.3.0rc29").engine_version == "1.3.0rc29"
    with pytest.raises(ValueError, match=r"^speculation table: engine_version must be a release such as 1.2.1 or"):
        table(engine="trtllm", engine_version="1.3.0b1")

"""The scenario document: the shipped ones, what is refused, and in which words."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servecast.readers.yaml_edge import load_yaml
from servecast.validation.scenario import parse_scenario, shipped_scenarios, shipped_text


@cache
def _loaded(name: str) -> Any:
    return load_yaml(shipped_text(name), name=name)


def _plain(name: str = "torch-quick") -> Any:
    return copy.deepcopy(_loaded(name))


@pytest.mark.parametrize("name", shipped_scenarios())
def test_shipped_scenarios_are_scenarios(name: str) -> None:
    scenario = parse_scenario(_plain(name), name=name)
    assert scenario.name == name
    assert any(value is not None for value in scenario.budgets.model_dump().values())


def test_the_quick_scenario_asks_no_more_of_what_the_full_one_judges() -> None:
    quick, full = (parse_scenario(_plain(name), name=name).budgets.model_dump() for name in ("torch-quick", "torch"))
    looser = {key for key in full if full[key] is not None and quick[key] != full[key]}
    assert looser == {"ttft_p50", "ttft_p95", "mean_acceptance_length", "draft_length_regret"}


def _set(path: str, value: object) -> Any:
    document = _plain()
    *folders, last = path.split(".")
    at = document
    for folder in folders:
        at = at[int(folder)] if isinstance(at, list) else at[folder]
    at[int(last) if isinstance(at, list) else last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema", "servecast.scenario/9", ["schema must be 'servecast.scenario/1'", "servecast.scenario/9"]),
        ("engine.kind", "sglang", ["engine.kind", "sglang"]),
        ("engine.thraeds", 2, ["engine.thraeds: unknown key (nearest: threads)"]),
        ("budgets.ttft_p59", 0.2, ["budgets.ttft_p59: unknown key (nearest: ttft_p"]),
        ("loads.cases.0.utilisation", 0, ["loads.cases.0.utilisation must be > 0, got 0"]),
        ("loads.requests", 2, ["loads.requests", "2"]),
        ("loads.prompt_tokens", [96, 32], ["prompt_tokens must rise", "96, 32"]),
        ("loads.output_tokens", [16, 600], ["must leave 16 of max_model_len free", "696"]),
        ("steps.validated.contexts", [64], ["steps.validated must share no", "(1, 64)"]),
        ("steps.calibrated.batches", [64], ["at most max_num_seqs 32", "64"]),
        ("speculation.lengths", [0, 2, 3], ["0, 1, 2, ... without a gap"]),
        ("steps", None, ["steps must be given"]),
        ("speculation.context", 64, ["none of steps.calibrated.contexts", "64"]),
        ("speculation.context", 1000, ["must leave 16 of max_model_len free", "1000"]),
        ("speculation.batches", [64], ["speculation.batches must be at most max_num_seqs 32", "64"]),
        ("engine.max_model_len", 4096, ["at most 2048", "4096"]),
        ("engine", {"kind": "server"}, ["s.yaml: engine.url must be given"]),
        ("engine", "results", ["engine must be a mapping, got 'results'"]),
        ("engine.kind", "results", ["engine.file must be given for kind results"]),
        ("engine.benchmark", -1, ["engine.benchmark must be >= 0, got -1"]),
        ("budgets.tpot_mean", "25%", ["budgets.tpot_mean must be a number, got '25%'"]),
        ("loads.cases.0", {"name": "a", "utilization": 0.5}, ["utilization: unknown key (nearest: utilisation)"]),
        ("loads.seeds", [], ["loads.seeds must not be empty"]),
        ("loads.prompt_tokens", [32], ["loads.prompt_tokens must have a value more, got [32]"]),
        ("loads.requests", 4.5, ["loads.requests must be a whole number, got 4.5"]),
        ("budgets.table_followed", "perhaps", ["budgets.table_followed must be true or false, got 'perhaps'"]),
        ("steps.validated", {"batches": [5], "contexts": [100]}, ["steps.validated must hold 2 points at least"]),
        ("seed", -1, ["seed", "-1"]),
        ("name", "", ["name"]),
    ],
)
def test_refusals_name_field_rule_and_value_in_one_line(path: str, value: object, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"s\.yaml: ") as error:
        parse_scenario(_set(path, value), name="s.yaml")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def _fault(value: object) -> str | None:
    """What is wrong with a document, None where nothing is; any other exception is a failure."""
    try:
        parse_scenario(value, name="s.yaml")
    except ValueError as error:
        return str(error)
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_any_value_is_a_scenario_or_a_value_error(value: object) -> None:
    with pytest.raises(ValueError, match=r"s\.yaml"):
        parse_scenario(value, name="s.yaml")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(st.data())
def test_any_change_of_a_scenario_is_a_scenario_or_one_line(data: st.DataObject) -> None:
    document = _plain()
    at = document
    for _ in range(data.draw(st.integers(0, 3))):
        if not isinstance(at, dict) or not at:
            break
        key = data.draw(st.sampled_from(sorted(at)))
        if not isinstance(at[key], dict):
            break
        at = at[key]
    at[data.draw(st.sampled_from(sorted(at)) | st.text(max_size=10))] = data.draw(JSON)
    message = _fault(document)
    assert message is None or message.startswith("s.yaml: ")
    assert "\n" not in (message or "")


@given(st.text(max_size=400))
def test_any_text_is_yaml_or_a_value_error(text: str) -> None:
    try:
        value = load_yaml(text, name="s.yaml")
    except ValueError:
        return  # the YAML reader's own tests
    assert "\n" not in (_fault(value) or "")

"""TensorRT-LLM's schedule: both meanings of its keys, what is refused, by version.

Origins: "source" is llm_args.py of both meanings in the public repository, "notes" its release notes.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_documents import NEWEST, Ranges, expanded, schedules, table

from servecast.policies import trtllm_speculation as trtllm
from servecast.policies.rendering import yaml_body
from servecast.policies.speculation import Finding, SpeculationTable
from servecast.policies.trtllm_speculation import KeyMeaning, key_meaning, read_trtllm_schedule

LOWER, UPPER = "1.2.1", "1.3.0rc8"


def trt(ranges: Ranges = ((1, 16, 5), (17, 64, 3), (65, 256, 1)), **changes: Any) -> SpeculationTable:
    return table(ranges, **{"engine": "trtllm", "engine_version": NEWEST["trtllm"], "model_runner": None} | changes)


def falling(ranges: Ranges) -> list[tuple[int, int, int]]:
    """The same ranges with their lengths from the largest to the smallest, the first above 0."""
    lengths = sorted((length for _, _, length in ranges), reverse=True)
    return [(lo, hi, length) for (lo, hi, _), length in zip(ranges, lengths, strict=True)]


def rules(found: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.level.value, finding.rule) for finding in found}


def test_one_mapping_two_meanings() -> None:
    """Source: the example of each version's own description."""
    older = {"max_draft_len": 4, "draft_len_schedule": {1: 4, 4: 2, 8: 0}}
    assert read_trtllm_schedule(older, LOWER, 10) == [4, 4, 4, 2, 2, 2, 2, 0, 0, 0]
    newer = {"max_draft_len": 4, "draft_len_schedule": {4: 4, 8: 2, 32: 1}}
    assert read_trtllm_schedule(newer, UPPER, 34) == [4] * 4 + [2] * 4 + [1] * 24 + [0] * 2
    with pytest.raises(ValueError, match=r"^draft_len_schedule must have key 1, got 4 as its smallest$"):
        read_trtllm_schedule(newer, LOWER, 10)
    # the first entry is now for batch size 1 alone, and 9 and above are off
    assert read_trtllm_schedule(older, UPPER, 10) == [4, 2, 2, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("version", "meaning"),
    [
        ("1.2.0", "lower"),
        ("1.2.1", "lower"),
        # notes: pull request 10860 is in those of 1.3.0rc8 and not in those of 1.3.0rc7
        ("1.3.0rc7", "lower"),
        ("1.3.0rc8", "upper"),
        ("1.3.0rc22.post1", "upper"),
        ("1.3.0", "upper"),
        ("1.4.0rc1", "upper"),
    ],
)
def test_meaning_by_version(version: str, meaning: str) -> None:
    assert key_meaning(version).value == meaning


def test_versions_without_a_schedule_or_unknown() -> None:
    line = r"trtllm 1\.1\.0 has no draft_len_schedule \(since 1\.2\.0\)$"
    with pytest.raises(ValueError, match=f"^{line}"):
        key_meaning("1.1.0")
    with pytest.raises(ValueError, match=f"^{line}"):
        trtllm.decoding_config(trt(engine_version="1.1.0"), force=True)
    with pytest.raises(ValueError, match=f"^best_static_length must be given, got nothing: {line}"):
        trtllm.decoding_config(trt(engine_version="1.1.0"), allow_static=True)
    static = trtllm.decoding_config(trt(engine_version="1.1.0", best_static_length=3), allow_static=True)
    assert static["max_draft_len"] == 3
    assert "draft_len_schedule" not in static
    with pytest.raises(ValueError, match=r"^trtllm 1\.5\.0rc0 is newer than 1\.4\.0rc1, the newest version known$"):
        trtllm.decoding_config(trt(engine_version="1.5.0rc0"))
    with pytest.raises(ValueError, match=r"^trtllm 0\.21\.0 is older than 1\.0\.0, the oldest version known$"):
        trtllm.decoding_config(trt([(1, 8, 2)], engine_version="0.21.0"))


def test_sections() -> None:
    """Hand: upper ends as keys from 1.3.0rc8 on, lower ends before."""
    assert trtllm.decoding_config(trt()) == {
        "decoding_type": "Eagle3",
        "max_draft_len": 5,
        "speculative_model": "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        "draft_len_schedule": {16: 5, 64: 3, 256: 1},
    }
    assert trtllm.decoding_config(trt(engine_version=LOWER, method="ngram", draft_model=None)) == {
        "decoding_type": "NGram",
        "max_draft_len": 5,
        "draft_len_schedule": {1: 5, 17: 3, 65: 1},
    }
    # source: older versions take MTP's length by its older name, later ones drop that name beside the newer one
    assert trtllm.decoding_config(trt([(1, 8, 2)], method="mtp", draft_model=None)) == {
        "decoding_type": "MTP",
        "max_draft_len": 2,
        "num_nextn_predict_layers": 2,
    }


def test_never_drafting_needs_no_section() -> None:
    assert trtllm.options(trt([(1, 8, 0)])) == {}


@settings(max_examples=60)
@given(ranges=schedules())
def test_upper_bounds_read_back_through_yaml(ranges: Ranges) -> None:
    wanted = falling(ranges)
    file = yaml.safe_load(yaml_body(trtllm.options(trt(wanted))))
    assert read_trtllm_schedule(file["speculative_config"], UPPER, wanted[-1][1]) == expanded(wanted)


@settings(max_examples=60)
@given(ranges=schedules(st.integers(0, 7)))
def test_lower_bounds_read_back_through_yaml(ranges: Ranges) -> None:
    """Any order of lengths after a first that is the largest."""
    wanted = [(1, ranges[0][1], 8), *ranges[1:]]
    file = yaml.safe_load(yaml_body(trtllm.options(trt(wanted, engine_version=LOWER, method="draft_model"))))
    assert read_trtllm_schedule(file["speculative_config"], LOWER, wanted[-1][1]) == expanded(wanted)


@settings(max_examples=60)
@given(
    keys=st.sets(st.integers(1, 40), min_size=1, max_size=6),
    data=st.data(),
    meaning=st.sampled_from([LOWER, UPPER]),
)
def test_reading_equals_a_walk_over_the_keys(keys: set[int], data: st.DataObject, meaning: str) -> None:
    """Independent slow code: last key not above the batch, or first key not below it."""
    ordered = sorted(keys | {1}) if meaning == LOWER else sorted(keys)
    schedule = {key: data.draw(st.integers(0, 6)) for key in ordered} | {ordered[0]: 6}
    dense = []
    for batch in range(1, 46):
        length = 0
        for key in ordered if meaning == LOWER else reversed(ordered):
            if (key <= batch) if meaning == LOWER else (key >= batch):
                length = schedule[key]
        dense.append(length)
    assert read_trtllm_schedule({"max_draft_len": 6, "draft_len_schedule": schedule}, meaning, 45) == dense


@pytest.mark.parametrize("version", [LOWER, UPPER])
def test_reading_without_a_schedule(version: str) -> None:
    """Source: max_concurrency alone becomes {max_concurrency: max_draft_len} in the newer meaning."""
    assert read_trtllm_schedule({}, version, 3) == [0, 0, 0]
    assert read_trtllm_schedule({"max_draft_len": 4}, version, 3) == [4, 4, 4]
    assert read_trtllm_schedule({"max_draft_len": 4, "max_concurrency": 2}, version, 4) == [4, 4, 0, 0]


def test_concurrency_beside_a_schedule() -> None:
    config = {"max_draft_len": 4, "draft_len_schedule": {1: 4, 2: 3}, "max_concurrency": 3}
    assert read_trtllm_schedule(config, LOWER, 5) == [4, 3, 3, 0, 0]
    with pytest.raises(ValueError, match=r"^max_concurrency must be left out beside draft_len_schedule, got 3$"):
        read_trtllm_schedule(config, UPPER, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"draft_len_schedule": {1: 4}}, "max_draft_len must be a whole number >= 1, got None"),
        ({"max_draft_len": True}, "max_draft_len must be a whole number >= 1, got True"),
        ({"max_draft_len": 4, "draft_len_schedule": {}}, "must be a mapping of batch size to draft length, got {}"),
        (
            {"max_draft_len": 4, "draft_len_schedule": [4]},
            r"must be a mapping of batch size to draft length, got \[4\]",
        ),
        ({"max_draft_len": 4, "draft_len_schedule": {0: 4}}, "key must be a whole number >= 1, got 0"),
        ({"max_draft_len": 4, "draft_len_schedule": {"1": 4}}, "key must be a whole number >= 1, got '1'"),
        ({"max_draft_len": 4, "draft_len_schedule": {1: -1}}, "of key 1 must be a whole number >= 0, got -1"),
        ({"max_draft_len": 4, "draft_len_schedule": {1: 3}}, "of key 1 must be max_draft_len 4, got 3"),
        ({"max_draft_len": 4, "draft_len_schedule": {1: 4, 2: 5}}, "must be <= max_draft_len 4, got 5 at key 2"),
        ({"max_draft_len": 4, "max_concurrency": 1.5}, "max_concurrency must be a whole number >= 0, got 1.5"),
    ],
)
@pytest.mark.parametrize("version", [LOWER, UPPER])
def test_reading_refuses(config: dict[str, Any], message: str, version: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}$"):
        read_trtllm_schedule(config, version, 4)


@pytest.mark.parametrize(
    ("ranges", "changes", "expected"),
    [
        ([(1, 4, 4), (5, 8, 2)], {}, set()),
        # max_draft_len is the first length, so a longer one is also above it
        ([(1, 4, 2), (5, 8, 4)], {}, {("error", "length"), ("error", "order")}),
        ([(1, 4, 4), (5, 8, 1), (9, 16, 3)], {}, {("error", "order")}),
        ([(1, 4, 4), (5, 8, 0)], {}, {("warning", "idle")}),
        ([(1, 4, 0), (5, 8, 4)], {}, {("error", "first")}),
        ([(1, 4, 4), (5, 8, 2)], {"method": "mtp"}, {("warning", "method")}),
        ([(1, 4, 4), (5, 8, 2)], {"method": "ngram"}, {("error", "method")}),
        ([(1, 4, 4), (5, 8, 2)], {"engine_version": LOWER}, {("error", "method")}),
        ([(1, 4, 4), (5, 8, 2)], {"engine_version": LOWER, "method": "ngram"}, set()),
        ([(1, 4, 4), (5, 8, 1), (9, 16, 3)], {"engine_version": LOWER, "method": "ngram"}, set()),
        ([(1, 4, 4), (5, 8, 2)], {"engine_version": "1.1.0"}, {("error", "version")}),
    ],
)
def test_findings(ranges: Ranges, changes: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    assert rules(trtllm.findings(trt(ranges, **changes))) == expected


def test_rising_lengths_cannot_be_forced() -> None:
    """Source: graphs are padded up to a batch of the same length, so lengths must not rise."""
    wanted = trt([(1, 4, 4), (5, 8, 1), (9, 16, 3)], best_static_length=2)
    line = r"^draft_len_schedule must not rise with the batch size, got 3 at key 16 after 1$"
    with pytest.raises(ValueError, match=line):
        trtllm.decoding_config(wanted, force=True)
    assert trtllm.decoding_config(wanted, allow_static=True)["max_draft_len"] == 2


def test_unread_schedule_is_refused_unless_forced() -> None:
    wanted = trt(engine_version=LOWER)
    with pytest.raises(ValueError, match=r"^method eagle3 must be ngram or draft_model where draft_len_schedule has"):
        trtllm.decoding_config(wanted)
    assert trtllm.decoding_config(wanted, force=True)["draft_len_schedule"] == {1: 5, 17: 3, 65: 1}


def test_replicas_are_the_readers_to_start() -> None:
    """trtllm-serve has no option for replicas."""
    assert "start 3 of these servers" in trtllm.advice(trt(data_parallel=3))[0]
    assert trtllm.advice(trt(data_parallel=3, engine_version="1.1.0")) == trtllm.advice(trt(data_parallel=3))[:1]
    assert "threshold" in trtllm.advice(trt())[0]


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match=r"^trtllm method must be one of eagle3, mtp, [^\n]*, got dspark$"):
        trtllm.decoding_config(trt([(1, 8, 2)], method="dspark"))


def test_order_matters_for_upper_bounds_only() -> None:
    config = {"max_draft_len": 4, "draft_len_schedule": {1: 4, 2: 1, 3: 2}}
    assert trtllm.check_order(config, KeyMeaning.LOWER) == []
    assert rules(trtllm.check_order(config, KeyMeaning.UPPER)) == {("error", "order")}

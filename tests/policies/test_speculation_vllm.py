"""vLLM's schedule: what is written, how vLLM reads it, what is refused or warned about, by version.

Origins: "packages" are the released vLLM packages that servecast.policies.vllm_speculation names, read for these tests.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_documents import Ranges, expanded, schedules, table

from servecast.policies import vllm_speculation as vllm
from servecast.policies.speculation import Finding, Level
from servecast.policies.vllm_speculation import SCHEDULE, read_vllm_schedule


def config(schedule: object, most: int = 9) -> dict[str, Any]:
    return {"num_speculative_tokens": most, SCHEDULE: schedule}


def slow_reading(schedule: list[list[int]], most: int, max_num_seqs: int) -> list[int]:
    """The rules in words, one batch size at a time: its range, else the nearest range below, then the cut."""
    dense = []
    for batch in range(1, max_num_seqs + 1):
        below = max((entry for entry in schedule if entry[0] <= batch), key=lambda entry: entry[0])
        dense.append(below[2] if below[2] < most else most)
    return dense


def rules(found: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.level.value, finding.rule) for finding in found}


def test_the_configuration_as_documented() -> None:
    """The example of the engine's documentation, [[1,16,5],[17,64,3],[65,256,1]]."""
    assert vllm.speculative_config(table()) == {
        "method": "eagle3",
        "model": "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": [[1, 16, 5], [17, 64, 3], [65, 256, 1]],
    }
    assert "model" not in vllm.speculative_config(table(method="mtp", draft_model=None))


@pytest.mark.parametrize(
    ("schedule", "most", "batch", "expected"),
    [
        # packages: K is cut to num_speculative_tokens, a gap and the tail take the K before them
        ([[1, 2, 4], [5, 8, 1]], 3, 10, [3, 3, 3, 3, 1, 1, 1, 1, 1, 1]),
        # packages: the comment in the source, 17 to 31 take 3
        ([[1, 16, 3], [32, 128, 2]], 3, 33, [3] * 31 + [2, 2]),
        # packages: order does not matter, and int() drops the fraction
        ([[3, 4, 1.9], [1, 2, 3.9]], 9, 5, [3, 3, 1, 1, 1]),
        # packages: text goes through int() too
        ([["1", "2", "4"]], 9, 2, [4, 4]),
        # packages: ranges beyond max_num_seqs are cut
        ([[1, 2, 4], [3, 900, 0]], 9, 4, [4, 4, 0, 0]),
    ],
)
def test_reading(schedule: list[Any], most: int, batch: int, expected: list[int]) -> None:
    assert read_vllm_schedule(config(schedule, most), batch) == expected


def test_reading_without_a_schedule() -> None:
    assert read_vllm_schedule({"num_speculative_tokens": 4}, 3) == [4, 4, 4]
    assert read_vllm_schedule({"num_speculative_tokens": 4, SCHEDULE: None}, 2) == [4, 4]
    assert read_vllm_schedule({}, 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"1-16": 3}, r"must be a list of \[lo, hi, K\], got \{'1-16': 3\}"),
        ([], r"must be a list of \[lo, hi, K\], got \[\]"),
        ([[1, 2]], r"entry must be \[lo, hi, K\], got \[1, 2\]"),
        ([[1, 2, 1, 9, 3]], r"entry must be \[lo, hi, K\], got \[1, 2, 1, 9, 3\]"),
        (["123"], r"entry must be \[lo, hi, K\], got '123'"),
        ([[1, 2, None]], "must hold numbers, got None"),
        ([[1, 2, float("nan")]], "must hold numbers, got nan"),
        ([[1, 2, float("inf")]], "must hold numbers, got inf"),
        ([[0, 2, 1]], r"1 <= lo <= hi and K >= 0, got \[0, 2, 1\]"),
        ([[3, 2, 1]], r"1 <= lo <= hi and K >= 0, got \[3, 2, 1\]"),
        ([[1, 2, -1]], r"1 <= lo <= hi and K >= 0, got \[1, 2, -1\]"),
        ([[1, 4, 1], [4, 8, 2]], "must not overlap, got a range from 4 after 4"),
        ([[2, 4, 1]], "must start at batch size 1, got 2"),
    ],
)
def test_reading_refuses_what_vllm_refuses(schedule: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{SCHEDULE} [^\n]*{message}$"):
        read_vllm_schedule(config(schedule), 4)


def test_reading_needs_a_largest_length() -> None:
    with pytest.raises(ValueError, match=r"^num_speculative_tokens must be > 0, got 0$"):
        read_vllm_schedule(config([[1, 2, 0]], 0), 4)
    with pytest.raises(ValueError, match=r"^max_num_seqs must be >= 1, got 0$"):
        read_vllm_schedule(config([[1, 2, 0]]), 0)


@settings(max_examples=60)
@given(
    starts=st.sets(st.integers(2, 60), max_size=6),
    data=st.data(),
    most=st.integers(1, 6),
    max_num_seqs=st.integers(1, 80),
)
def test_reading_equals_the_rules_in_words(starts: set[int], data: st.DataObject, most: int, max_num_seqs: int) -> None:
    """Independent slow code, with gaps, any order and lengths above the largest."""
    lows = sorted({1, *starts})
    schedule = []
    for low, following in zip(lows, [*lows[1:], 100], strict=True):
        schedule.append([low, data.draw(st.integers(low, following - 1)), data.draw(st.integers(0, 9))])
    shuffled = data.draw(st.permutations(schedule))
    assert read_vllm_schedule(config(shuffled, most), max_num_seqs) == slow_reading(schedule, most, max_num_seqs)


@settings(max_examples=60)
@given(ranges=schedules())
def test_vllm_reads_the_table_back(ranges: Ranges) -> None:
    written = json.loads(json.dumps(vllm.speculative_config(table(ranges))))
    assert read_vllm_schedule(written, ranges[-1][1]) == expanded(ranges)


def test_one_length_needs_no_schedule() -> None:
    """A schedule costs full graphs on model runner v1; a static length does not, and every known version has it."""
    wanted = table([(1, 8, 2), (9, 32, 2)], engine_version="0.10.0", model_runner="v1", data_parallel=4)
    assert vllm.speculative_config(wanted) == {
        "method": "eagle3",
        "model": "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        "num_speculative_tokens": 2,
    }
    assert vllm.findings(wanted) == []


def test_never_drafting_needs_no_drafter() -> None:
    wanted = table([(1, 8, 0)])
    assert vllm.speculative_config(wanted) == {}
    assert "--speculative-config" not in vllm.serve_arguments(wanted)


def test_command() -> None:
    words = vllm.serve_arguments(table(data_parallel=2, model_runner="v1"), force=True)
    assert words[:3] == ["env", "VLLM_USE_V2_MODEL_RUNNER=0", "vllm"]
    assert words[words.index("--max-num-seqs") + 1] == "256"
    assert words[words.index("--data-parallel-size") + 1] == "2"
    assert json.loads(words[words.index("--speculative-config") + 1])["num_speculative_tokens"] == 5
    assert vllm.serve_arguments(table(model_runner="v2"))[1] == "VLLM_USE_V2_MODEL_RUNNER=1"
    assert vllm.serve_arguments(table(model_runner=None))[0] == "vllm"


@pytest.mark.parametrize("version", ["0.10.0", "0.20.0", "0.23.0"])
def test_versions_without_a_schedule(version: str) -> None:
    """Packages: the key is in 0.24.0 and not in 0.23.0."""
    line = rf"^vllm {version} has no num_speculative_tokens_per_batch_size \(since 0\.24\.0\)$"
    with pytest.raises(ValueError, match=line):
        vllm.speculative_config(table(engine_version=version))
    with pytest.raises(ValueError, match=line):
        vllm.speculative_config(table(engine_version=version), force=True)
    with pytest.raises(ValueError, match=r"^best_static_length must be given, got nothing: vllm"):
        vllm.speculative_config(table(engine_version=version), allow_static=True)
    static = vllm.speculative_config(table(engine_version=version, best_static_length=3), allow_static=True)
    assert read_vllm_schedule(static, 256) == [3] * 256


def test_versions_with_a_schedule_keep_it_whatever_is_allowed() -> None:
    for version in ("0.24.0", "0.27.1", "0.33.0"):
        wanted = table(engine_version=version, best_static_length=3)
        assert vllm.speculative_config(wanted, allow_static=True) == vllm.speculative_config(wanted)


@pytest.mark.parametrize(("version", "message"), [("0.9.2", "older than 0.10.0"), ("0.34.0", "newer than 0.33.0")])
def test_versions_outside_the_table(version: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^vllm {version} is {message}, the (oldest|newest) version known$"):
        vllm.speculative_config(table([(1, 8, 2)], engine_version=version))


def test_methods_by_version() -> None:
    """Packages: the name dspark is in 0.25.1 and not in 0.24.0."""
    with pytest.raises(ValueError, match=r"^vllm 0\.24\.0 is not known to have method dspark \(since 0\.25\.1\)$"):
        vllm.speculative_config(table(engine_version="0.24.0", method="dspark"))
    assert vllm.speculative_config(table(engine_version="0.25.1", method="dspark"))["method"] == "dspark"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"model_runner": None}, {("warning", "graphs")}),
        ({"model_runner": "v1"}, {("warning", "graphs")}),
        # packages: 0.24.0 downgrades whatever the runner, 0.25.1 spares v2
        ({"engine_version": "0.24.0"}, {("warning", "graphs")}),
        ({"engine_version": "0.25.1"}, set()),
        ({"data_parallel": 2}, {("error", "data_parallel")}),
        ({"method": "mtp"}, {("warning", "method")}),
        # packages: 0.33.0 drops it on v1 for methods outside a list that holds mtp and not dspark
        ({"method": "mtp", "model_runner": "v1"}, {("warning", "method"), ("warning", "graphs")}),
        ({"method": "dspark", "model_runner": "v1"}, {("error", "method"), ("warning", "graphs")}),
        (
            {"method": "dspark", "model_runner": "v1", "engine_version": "0.32.0"},
            {("warning", "method"), ("warning", "graphs")},
        ),
        ({"engine_version": "0.23.0"}, {("error", "version")}),
    ],
)
def test_findings(changes: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    assert rules(vllm.findings(table(**changes))) == expected


def test_idle_ranges_are_warned_about() -> None:
    found = vllm.findings(table([(1, 4, 2), (5, 512, 0)]))
    assert [finding.message for finding in found] == [
        "draft length 0 from 5 to 512 still pays for an armed drafter, unlike no speculation"
    ]
    assert found[0].level is Level.WARNING


@pytest.mark.parametrize(("version", "effect"), [("0.25.1", "may deadlock with"), ("0.26.0", "drops the")])
def test_data_parallel_is_refused_unless_forced(version: str, effect: str) -> None:
    """Packages: the check that drops the schedule is in 0.26.0 and not in 0.25.1."""
    wanted = table(engine_version=version, data_parallel=2, best_static_length=4)
    line = rf"^data_parallel must be 1 with a schedule, got 2: vllm {version} {effect}"
    with pytest.raises(ValueError, match=line):
        vllm.speculative_config(wanted)
    assert SCHEDULE in vllm.speculative_config(wanted, force=True)
    assert read_vllm_schedule(vllm.speculative_config(wanted, allow_static=True), 256) == [4] * 256


def test_checks_of_a_foreign_configuration() -> None:
    assert rules(vllm.check_ranges(config([[2, 4, 1]]), 4)) == {("error", "start")}
    assert rules(vllm.check_ranges(config([[1, 4, 1], [4, 8, 2]]), 8)) == {("error", "overlap")}
    assert rules(vllm.check_ranges(config([[1, 2, 4], [5, 8, 1]]), 10)) == {("warning", "gap"), ("warning", "tail")}
    assert vllm.check_ranges(config([[5, 8, 1], [1, 4, 2]]), 8) == []
    assert rules(vllm.check_ranges(config([[5, 8, 1], [1, 4, 2]]), 9)) == {("warning", "tail")}
    assert [finding.message for finding in vllm.check_lengths(config([[1, 2, 4], [3, 8, 3]], 3))] == [
        "draft length must be <= num_speculative_tokens 3, got 4 from 1 to 2"
    ]


def test_advice_where_vllm_adapts_itself() -> None:
    """Packages: enable_adaptive_verification is in 0.28.0 and not in 0.27.1, for dspark only."""
    assert vllm.advice(table(method="eagle3")) == []
    assert vllm.advice(table(method="dspark", engine_version="0.27.1")) == []
    assert "enable_adaptive_verification" in vllm.advice(table(method="dspark", engine_version="0.28.0"))[0]


@pytest.mark.live
@settings(max_examples=100, deadline=None)
@given(ranges=schedules(), most=st.integers(1, 8), max_num_seqs=st.integers(1, 250))
def test_vllm_itself_reads_the_same(ranges: Ranges, most: int, max_num_seqs: int) -> None:
    pytest.importorskip("vllm")
    theirs = importlib.import_module("vllm.v1.spec_decode.dynamic.utils")
    schedule = [list(entry) for entry in ranges]
    dense = theirs.build_dynamic_sd_schedule_lookup(schedule, max_num_seqs, most)
    assert read_vllm_schedule(config(schedule, most), max_num_seqs) == dense[1:]

"""SGLang's schedule: the file, how SGLang routes a batch with it, the options, what is refused by version.

Origins: "packages" are the released SGLang packages that servecast.policies.sglang_speculation names, read for these
tests.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_documents import NEWEST, Ranges, expanded, schedules, table

from servecast.policies import sglang_speculation as sglang
from servecast.policies.sglang_speculation import read_sglang_schedule
from servecast.policies.speculation import Finding, SpeculationTable

PINNED = {"1": {"candidate_steps": [5]}, "17": {"candidate_steps": [3]}, "65": {"candidate_steps": [1]}}
"""The deterministic table of the reference: 5 up to 16, 3 up to 64, 1 above."""


def sgl(ranges: Ranges = ((1, 16, 5), (17, 64, 3), (65, 256, 1)), **changes: Any) -> SpeculationTable:
    return table(ranges, **{"engine": "sglang", "engine_version": NEWEST["sglang"], "model_runner": None} | changes)


def parsed(words: list[str]) -> argparse.Namespace:
    """The options of server_args with their types."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name in ("algorithm", "draft-model-path", "adaptive-config"):
        parser.add_argument(f"--speculative-{name}")
    for name in ("num-steps", "eagle-topk", "num-draft-tokens", "ngram-max-bfs-breadth"):
        parser.add_argument(f"--speculative-{name}", type=int)
    parser.add_argument("--speculative-adaptive", action="store_true")
    return parser.parse_args(words)


def rules(found: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.level.value, finding.rule) for finding in found}


def test_file_and_options() -> None:
    assert sglang.adaptive_config(sgl()) == PINNED
    read = parsed(sglang.speculative_arguments(sgl()))
    assert (read.speculative_algorithm, read.speculative_adaptive) == ("EAGLE3", True)
    assert read.speculative_draft_model_path == "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"
    assert read.speculative_eagle_topk == 1
    # packages: steps has to be a candidate of some entry, draft tokens are steps + 1
    assert read.speculative_num_steps in {5, 3, 1}
    assert read.speculative_num_draft_tokens == read.speculative_num_steps + 1


def test_steps_are_a_candidate_when_room_is_made_for_more() -> None:
    wanted = sgl([(1, 4, 2), (5, 8, 1)], num_speculative_tokens=7)
    assert parsed(sglang.speculative_arguments(wanted)).speculative_num_steps == 2


@pytest.mark.parametrize(
    ("captured", "expected"),
    [
        # no graphs: the largest key not above the batch
        ((), [5] * 4 + [3] * 4),
        # packages: 3 and 4 are padded to 4, 5 to 8 to 8; key 5 acts from 5 on
        ((1, 2, 4, 8), [5] * 4 + [3] * 4),
        # packages: 4 is padded to 6, which is behind key 5, so the edge moves down to 4
        ((1, 3, 6), [5] * 3 + [3] * 5),
        # packages: above the largest captured size there is no padding
        ((1, 2), [5] * 4 + [3] * 4),
    ],
)
def test_routing_pads_first(captured: tuple[int, ...], expected: list[int]) -> None:
    config = {"1": {"candidate_steps": [5]}, "5": {"candidate_steps": [3]}}
    assert read_sglang_schedule(config, 8, captured) == expected
    found = sglang.check_graph_edges(config, captured)
    assert bool(found) == (captured == (1, 3, 6))


def test_below_the_smallest_key_the_smallest_applies_and_other_keys_are_passed_over() -> None:
    """Packages: max(0, ...) in the look-up; keys that are not digits are defaults."""
    config = {"ema_alpha": 0.2, "4": {"candidate_steps": [2]}, "strategy": "x", "6": {"candidate_steps": [0, 0]}}
    assert read_sglang_schedule(config, 7) == [2, 2, 2, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"candidate_steps": [1, 3, 7], "ema_alpha": 0.2}, r"must have a key of digits, got \['candidate_steps', "),
        ({"1": {"candidate_steps": []}}, r"candidate_steps of 1 must be a list of whole numbers >= 0, got \[\]"),
        ({"1": {"candidate_steps": 3}}, "must be a list of whole numbers >= 0, got 3"),
        ({"1": {"candidate_steps": [-1]}}, r"must be a list of whole numbers >= 0, got \[-1\]"),
        ({"1": {"candidate_steps": [1.0]}}, r"must be a list of whole numbers >= 0, got \[1.0\]"),
        ({"1": 5}, "must be a list of whole numbers >= 0, got None"),
        ({"1": {"candidate_steps": [1, 3]}}, r"must be one length in a schedule, got \[1, 3\]"),
    ],
)
def test_reading_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sglang_schedule(config, 4)


@settings(max_examples=60)
@given(ranges=schedules())
def test_sglang_reads_the_table_back(ranges: Ranges) -> None:
    written = json.loads(json.dumps(sglang.adaptive_config(sgl(ranges))))
    assert read_sglang_schedule(written, ranges[-1][1]) == expanded(ranges)


@settings(max_examples=40)
@given(ranges=schedules(), extra=st.sets(st.integers(1, 220), max_size=10))
def test_edges_behind_captured_sizes_survive_padding(ranges: Ranges, extra: set[int]) -> None:
    """With every range's end captured, no batch is padded over an edge, whatever else is captured."""
    captured = sorted({hi for _, hi, _ in ranges} | extra)
    config = sglang.adaptive_config(sgl(ranges))
    assert read_sglang_schedule(config, ranges[-1][1], captured) == expanded(ranges)
    assert sglang.check_graph_edges(config, captured) == []


@pytest.mark.parametrize(
    ("method", "algorithm", "steps"),
    [
        ("eagle", "EAGLE", 3),
        ("eagle3", "EAGLE3", 3),
        ("mtp", "NEXTN", 3),
        ("draft_model", "STANDALONE", 3),
        # packages: DFLASH and DSPARK force steps to 1 with a warning, and NGRAM derives them
        ("dflash", "DFLASH", None),
        ("dspark", "DSPARK", None),
        ("ngram", "NGRAM", None),
    ],
)
def test_static_options(method: str, algorithm: str, steps: int | None) -> None:
    wanted = sgl([(1, 64, 3)], method=method)
    assert sglang.written_length(wanted) == 3
    read = parsed(sglang.speculative_arguments(wanted))
    assert (read.speculative_algorithm, read.speculative_adaptive) == (algorithm, False)
    assert (read.speculative_num_steps, read.speculative_num_draft_tokens) == (steps, 4)


def test_never_drafting_needs_no_option() -> None:
    assert sglang.speculative_arguments(sgl([(1, 64, 0)])) == []
    words = sglang.launch_arguments(sgl([(1, 64, 0)], data_parallel=2))
    assert words[-4:] == ["--max-running-requests", "64", "--dp-size", "2"]
    with pytest.raises(ValueError, match=r"^segments must have more than one draft length for a schedule, got one$"):
        sglang.adaptive_config(sgl([(1, 64, 0)]))


@pytest.mark.parametrize("version", ["0.5.10.post1", "0.5.12", "0.5.12.post1"])
def test_versions_without_batch_sizes(version: str) -> None:
    """Packages: keys of digits are in 0.5.13 and not in 0.5.12.post1."""
    line = rf"sglang {version} has no speculative_adaptive_config by batch size \(since 0\.5\.13\)$"
    with pytest.raises(ValueError, match=f"^{line}"):
        sglang.speculative_arguments(sgl(engine_version=version), force=True)
    with pytest.raises(ValueError, match=f"^best_static_length must be given, got nothing: {line}"):
        sglang.speculative_arguments(sgl(engine_version=version), allow_static=True)
    wanted = sgl(engine_version=version, best_static_length=3)
    read = parsed(sglang.speculative_arguments(wanted, allow_static=True))
    assert (read.speculative_num_steps, read.speculative_adaptive) == (3, False)


@pytest.mark.parametrize(("version", "message"), [("0.5.9", "older than 0.5.10.post1"), ("0.6.0", "newer than 0.5.23")])
def test_versions_outside_the_table(version: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^sglang {version} is {message}, the (oldest|newest) version known$"):
        sglang.speculative_arguments(sgl([(1, 8, 2)], engine_version=version))


@pytest.mark.parametrize(
    ("ranges", "changes", "expected"),
    [
        ([(1, 4, 3), (5, 8, 1)], {}, set()),
        ([(1, 4, 3), (5, 8, 1)], {"data_parallel": 2}, {("warning", "data_parallel")}),
        ([(1, 4, 3), (5, 8, 1)], {"method": "dflash"}, {("error", "combination")}),
        ([(1, 4, 3), (5, 8, 0)], {}, {("warning", "idle")}),
        # packages: 0 is a candidate in 0.5.14 and not in 0.5.13.post1
        ([(1, 4, 3), (5, 8, 0)], {"engine_version": "0.5.14"}, {("warning", "idle")}),
        ([(1, 4, 3), (5, 8, 0)], {"engine_version": "0.5.13.post1"}, {("error", "idle")}),
    ],
)
def test_findings(ranges: Ranges, changes: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    assert rules(sglang.findings(sgl(ranges, **changes))) == expected


def test_zero_before_its_version_cannot_be_forced() -> None:
    wanted = sgl([(1, 4, 3), (5, 8, 0)], engine_version="0.5.13")
    with pytest.raises(ValueError, match=r"^sglang 0\.5\.13 has no draft length 0 \(since 0\.5\.14\)$"):
        sglang.adaptive_config(wanted, force=True)


def test_unsupported_combinations() -> None:
    """Packages: the reasons of adaptive_unsupported_reason."""
    assert sglang.check_combination(method="eagle3") == []
    found = sglang.check_combination(
        method="ngram", topk=4, dp_attention=True, multi_layer_eagle=True, two_batch_overlap=True, pdmux=True
    )
    assert rules(found) == {("error", "combination")}
    for reason in ("method ngram", "topk 4", "attention DP", "multi-layer EAGLE", "two-batch overlap", "pdmux"):
        assert sum(f"with {reason} and" in finding.message for finding in found) == 1
    assert len(found) == 6


def test_dropped_combination_is_refused_unless_forced() -> None:
    wanted = sgl(method="dflash", best_static_length=3)
    with pytest.raises(ValueError, match=r"^sglang drops the schedule with method dflash and keeps one length$"):
        sglang.speculative_arguments(wanted)
    assert "--speculative-adaptive" in sglang.speculative_arguments(wanted, force=True)
    assert "--speculative-adaptive" not in sglang.speculative_arguments(wanted, allow_static=True)


def test_methods_that_sglang_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"^sglang method must be one of eagle, [^\n]*, got suffix$"):
        sglang.speculative_arguments(sgl([(1, 8, 2)], method="suffix"))
    with pytest.raises(ValueError, match=r"^sglang 0\.5\.14 is not known to have method dspark \(since 0\.5\.17\)$"):
        sglang.speculative_arguments(sgl([(1, 8, 2)], method="dspark", engine_version="0.5.14"))


def test_advice_names_the_engines_own_controller() -> None:
    assert "candidate_steps" in sglang.advice(sgl())[0]
    assert sglang.advice(sgl(method="dflash")) == []
    assert sglang.advice(sgl(engine_version="0.5.12")) == []

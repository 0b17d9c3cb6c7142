"""The script's own arithmetic on a pretended engine that verifies in each step what was decided in the one before."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from servecast.validation import vllm_paired
from servecast.validation.vllm_paired import StepWatch, check, follow_table, longest, paired_block, parse, read_prompts


def draw(seed: int) -> random.Random:
    """Orders and token ids of a test."""
    return random.Random(seed)  # noqa: S311


ENGINE = ["--model", "m", "--draft", "d"]


class PretendedEngine:
    """Scheduler and engine in one: every second drafted token is accepted, from the front."""

    def __init__(self, batch: int, *, lookup: list[int]) -> None:
        self.names = [str(one) for one in range(batch)]
        self.running = [SimpleNamespace(num_computed_tokens=10) for _ in self.names]
        self.dynamic_sd_lookup = lookup
        self.decided = 0
        self.totals = {"drafts": 0, "draft_tokens": 0}
        self.llm_engine = SimpleNamespace(step=self.step, engine_core=SimpleNamespace(engine_core=self))
        self.scheduler = self

    def step(self) -> None:
        batch, length = len(self.names), self.decided
        self.decided = self.dynamic_sd_lookup[batch]
        drafts = {name: [7] * length for name in self.names} if length else {}
        scheduled = SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(self.names, 1 + length),
            total_num_scheduled_tokens=batch * (1 + length),
            scheduled_spec_decode_tokens=drafts,
        )
        output = SimpleNamespace(
            req_id_to_index={name: at for at, name in enumerate(self.names)},
            sampled_token_ids=[[7] * (1 + length // 2)] * batch,
        )
        self.totals["drafts"] += len(drafts)
        self.totals["draft_tokens"] += batch * length
        self.update_from_output(scheduled, output)

    def update_from_output(self, _scheduled: Any, output: Any) -> None:
        for one in self.running:
            one.num_computed_tokens += len(output.sampled_token_ids[0])

    def get_metrics(self) -> list[SimpleNamespace]:
        values = {f"vllm:spec_decode_num_{name}": value for name, value in self.totals.items()}
        return [SimpleNamespace(name=name, value=value) for name, value in {**values, "vllm:other": 3.0}.items()]


@pytest.fixture(autouse=True)
def _started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are already running."""
    monkeypatch.setattr(vllm_paired, "prefill", lambda *_: [])
    monkeypatch.setattr(vllm_paired, "finish", lambda *_: None)


def test_a_block_keeps_the_steps_that_verify_the_length_in_force() -> None:
    options = parse(["paired", *ENGINE, "--out", "x", "--lengths", "0,2,5", "--cycles", "4"])
    engine = PretendedEngine(3, lookup=[5] * 33)
    records = paired_block(engine, options, [], draw(1))
    assert len(records) == 4 * 3 * 2  # cycles, lengths, steps kept of four
    assert {one["cycle"] for one in records} == {0, 1, 2, 3}
    for one in records:
        k = one["draft_length"]
        assert one["drafted"] == 3 * k
        assert one["accepted"] == 3 * (k // 2)
        assert one["emitted"] == 3 * (1 + k // 2)
        assert one["scheduled_tokens"] == 3 * (1 + k)
        assert one["accepted_per_position"] == [3] * (k // 2) + [0] * (k - k // 2)
        assert one["seconds"] >= 0.0
    orders = [[one["draft_length"] for one in records[at : at + 6 : 2]] for at in range(0, len(records), 6)]
    assert all(sorted(one) == [0, 2, 5] for one in orders)
    assert len({tuple(one) for one in orders}) > 1  # shuffled


def test_context_counts_the_cache_before_the_step() -> None:
    engine = PretendedEngine(2, lookup=[0] * 33)
    watch = StepWatch(engine)
    assert [watch.timed_step(engine)["context_tokens"] for _ in range(3)] == [20, 22, 24]
    watch.remove()
    assert engine.update_from_output == engine.__class__.update_from_output.__get__(engine)


def test_the_table_is_read_off_the_engines_counters() -> None:
    options = parse(["table", *ENGINE, "--out", "x", "--batches", "4", "--table", "[[1, 4, 3]]", "--steps", "5"])
    (record,) = follow_table(PretendedEngine(4, lookup=[0, 3, 3, 3, 3]), options)
    assert (record["drafts"], record["draft_tokens"], record["draft_length"], record["lookup"]) == (20, 60, 3.0, 3)


def test_a_length_of_zero_drafts_nothing() -> None:
    options = parse(["table", *ENGINE, "--out", "x", "--batches", "4", "--table", "[[1, 4, 0]]"])
    (record,) = follow_table(PretendedEngine(4, lookup=[0] * 5), options)
    assert (record["drafts"], record["draft_length"]) == (0, 0.0)
    assert longest(options) == 1  # an engine cannot be built for 0


@pytest.mark.parametrize(("limit", "fits"), [(2048, True), (64, False)])
def test_sequences_must_outlast_their_block(limit: int, fits: bool) -> None:
    options = parse(["paired", *ENGINE, "--out", "x", "--max-model-len", str(limit)])
    if fits:
        check(options)
    else:
        with pytest.raises(ValueError, match="--max-model-len must be >="):
            check(options)


def test_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([[1, 2, 3, 4], [5]]))
    given = parse(["paired", *ENGINE, "--out", "x", "--prompts", str(file), "--prompt-tokens", "3"])
    assert read_prompts(given, draw(0)) == [[1, 2, 3], [5]]
    drawn = read_prompts(parse(["paired", *ENGINE, "--out", "x", "--vocabulary", "5"]), draw(0))
    assert len(drawn) == 16
    assert all(len(one) == 32 and min(one) >= 1 and max(one) < 5 for one in drawn)

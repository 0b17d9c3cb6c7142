"""What is made of vLLM's records. Truth: records made by hand; our own reader of the schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from live_samples import live_run

pytest.importorskip("torch", reason="the trained pair needs torch (extra live)")

from servecast.model.engine_steps import EngineSteps, StepWork, decode_work, with_chunk
from servecast.policies.vllm_speculation import SCHEDULE, read_vllm_schedule, speculative_config
from servecast.validation import vllm_live


def _step(batch: int, length: int, repeat: int, seconds: float, accepted: list[int] | None = None) -> dict[str, Any]:
    return {
        "kind": "step",
        "batch": batch,
        "draft_length": length,
        "repeat": repeat,
        "seconds": seconds,
        "context_tokens": 100 * batch,
        "drafts": batch if length else 0,
        "accepted_per_position": accepted or [0] * length,
    }


def test_a_cell_counts_once_a_repeat_by_its_median() -> None:
    records = [_step(2, 1, 0, s) for s in (0.01, 0.02, 0.5)] + [_step(2, 1, 1, 0.03)]
    found = vllm_live._samples(records)
    assert found.seconds.tolist() == [0.02, 0.03]
    assert found.rows.tolist() == [4.0, 4.0]
    assert found.cached.tolist() == [200.0, 200.0]
    assert len(set(found.block.tolist())) == 2


def test_texts_that_calibrate_and_texts_that_judge_are_apart() -> None:
    records = [_step(4, 2, 0, 0.01, [3, 1]), _step(4, 2, 1, 0.01, [2, 2]), _step(4, 2, 2, 0.01, [1, 0])]
    even, odd = (vllm_live._count(records, 2, even=one) for one in (True, False))
    assert (even.rounds, even.survived) == (8, (4, 1))
    assert (odd.rounds, odd.survived) == (4, (2, 2))


def test_the_emitted_table_says_what_was_chosen() -> None:
    lengths = [4, 3, 3, 2, 2, 2, 1, 0]
    table = vllm_live.emitted_table(lengths)
    config = speculative_config(table, force=True)
    assert config[SCHEDULE] == [[1, 1, 4], [2, 3, 3], [4, 6, 2], [7, 7, 1], [8, 8, 0]]
    assert read_vllm_schedule(config, 8) == lengths


def test_what_a_chunk_costs_alone_is_what_a_request_pays_outside() -> None:
    """Steps of 10 ms + 0.5 ms a row, and 4 ms on the way of every first token."""
    truth = EngineSteps(knots=(1.0,), base_s=0.010, row_s=(0.0005,))
    samples = []
    for number in range(3):
        samples += [
            (decode_work(b, 20.0), number, float(truth.seconds(decode_work(b, 20.0)))) for b in (1, 2, 4, 8, 16)
        ]
        for n in (16, 48, 96, 192):
            work = with_chunk(StepWork(rows=0.0), 0.0, float(n))
            samples.append((work, number, 0.004 + float(truth.seconds(work))))
    found = vllm_live.server_fit(samples).steps
    assert found.first_token_s == pytest.approx(0.004, rel=0.05)
    assert found.chunk_s == 0.0
    assert found.base_s == pytest.approx(0.010, rel=0.03)


def test_a_probe_without_time_is_tried_again_and_then_given_up() -> None:
    answers = iter([np.nan, 0.0, 0.02])
    assert vllm_live._timed(lambda: (StepWork(rows=1.0), 0, float(next(answers))))[2] == 0.02
    with pytest.raises(RuntimeError, match="must have a time > 0"):
        vllm_live._timed(lambda: (StepWork(rows=1.0), 0, float("nan")))


def test_every_load_has_the_pace_of_all_rounds_by_hand() -> None:
    """Rounds that end at 5, 10 and 20 s, loads from 6 and from 11 s; the second round half as fast again."""
    facts = live_run()
    assert facts.fit is not None
    medians = replace(facts.fit.medians, block_factor=np.array([0.9, 1.0, 1.5, 1.1]))
    fit = replace(facts.fit, medians=medians)
    first, second = vllm_live.with_rounds(facts.loads[:2], [6.0, 11.0], [5.0, 10.0, 20.0], fit)
    assert [one.ratio for one in first.probes] == [one.ratio for one in second.probes] == [1.0, 1.5, 1.1]
    assert [one.at_s for one in first.probes] == [-1.0, 4.0, 14.0]
    assert [one.at_s for one in second.probes] == [-6.0, -1.0, 9.0]


def test_a_load_that_no_round_came_after_has_a_pace_that_nobody_knows() -> None:
    facts = live_run()
    assert facts.fit is not None
    first, died = vllm_live.with_rounds(facts.loads[:2], [6.0, 11.0], [5.0, 10.0], facts.fit)
    assert all(math.isfinite(one.ratio) for one in first.probes)
    assert math.isnan(died.probes[-1].ratio)

"""Tabulated step times: hand tables, and the closed forms they were made from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servecast.calibration.profile import load_profile
from servecast.model.batch_steps import CONTEXT_KNOTS, LENGTH_KNOTS, ScaledSteps, TabulatedSteps, tabulated_steps
from servecast.model.service import BATCH_GRID, step_seconds
from servecast.readers.deployments import deployment

PROFILE = load_profile()
ZOO = (
    deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=2),
    deployment("meta-llama/Llama-3.1-8B-Instruct", "a100_sxm", "vllm"),
    deployment("openai/gpt-oss-120b", "h200_sxm", "vllm", tp=2),
)
CHUNK_TOKENS = 2048.0
HAND = TabulatedSteps(
    decode_s=np.array([[1.0, 2.0, 6.0], [2.0, 4.0, 12.0]]),
    contexts=np.array([1.0, 11.0, 21.0]),
    prefill_s=np.array([1.0, 3.0]),
    lengths=np.array([10.0, 20.0]),
    first_token_s=0.25,
)


def test_decode_by_hand() -> None:
    # hand: one sequence with 6 tokens, half way from 1 s to 2 s; a further token 0.1 s; 5 more reach the knot at 11
    np.testing.assert_allclose(HAND.decode(1, 6), [1.5, 0.1, 6], rtol=1e-12)
    # two with 32 tokens, 16 each: half way from 4 s to 12 s; 0.8 s per token of context are 0.4 s per cached token.
    # The last line has no end
    value, slope, steps = HAND.decode(2, 32)
    np.testing.assert_allclose([value, slope], [8.0, 0.4], rtol=1e-12)
    assert steps > 1e9
    # beyond the last knot the line goes on
    np.testing.assert_allclose(HAND.decode(1, 31)[0], 10.0, rtol=1e-12)


def test_the_line_holds_for_as_many_steps_as_it_says() -> None:
    value, slope, steps = HAND.decode(2, 6)
    for ahead in range(steps):
        np.testing.assert_allclose(HAND.decode(2, 6 + 2 * ahead)[0], value + 2 * ahead * slope, rtol=1e-12)
    beyond = HAND.decode(2, 6 + 2 * steps)[0]
    assert abs(beyond - (value + 2 * steps * slope)) > 0.1  # a step more is on the next line


def test_prompts_by_hand() -> None:
    # hand: 5 tokens half of 1 s, 15 tokens 2 s, 25 tokens 4 s by the last line
    np.testing.assert_allclose([HAND.prefill(n) for n in (5, 10, 15, 20, 25)], [0.5, 1.0, 2.0, 3.0, 4.0], rtol=1e-12)
    # tokens 10 to 20 of a prompt are 3 - 1 s, beside a decode step of 1.5 s and a whole prompt of 5
    np.testing.assert_allclose(HAND.mixed([(10, 20)], 1, 0, 0), 2.0, rtol=1e-12)
    np.testing.assert_allclose(HAND.mixed([(10, 20), (0, 5)], 2, 1, 6), 4.0, rtol=1e-12)


def test_chunks_add_up_to_the_prompt() -> None:
    parts = sum(HAND.mixed([chunk], 0, 0, 0) for chunk in ((0, 7), (7, 13), (13, 18)))
    np.testing.assert_allclose(parts, HAND.prefill(18), rtol=1e-12)


@pytest.mark.parametrize("index", range(len(ZOO)))
def test_equals_the_closed_forms_at_the_knots(index: int) -> None:
    steps = tabulated_steps(
        PROFILE, ZOO[index], "vllm", max_batch=300, longest=40_000, chunk_tokens=CHUNK_TOKENS, factor=2.0
    )
    batches = BATCH_GRID[BATCH_GRID <= 256]
    contexts, lengths = CONTEXT_KNOTS[CONTEXT_KNOTS <= 40_000], LENGTH_KNOTS[LENGTH_KNOTS <= 40_000]
    decode, prefill, first = step_seconds(PROFILE, ZOO[index], "vllm", batches, contexts, lengths, CHUNK_TOKENS)
    ours = [[steps.decode(int(batch), int(batch * context))[0] for context in contexts] for batch in batches]
    np.testing.assert_allclose(ours, 2.0 * decode, rtol=1e-12)
    np.testing.assert_allclose([steps.prefill(int(n)) for n in lengths], 2.0 * prefill, rtol=1e-12)
    np.testing.assert_allclose(steps.first_token_s, 2.0 * first, rtol=1e-12)
    assert steps.max_batch == 300


@pytest.mark.parametrize("index", range(len(ZOO)))
def test_between_the_knots_as_near_as_stated(index: int) -> None:
    """Module docstring: 1.5 % from 128 tokens of context on, 3.5 % below, 0.6 % for prompts."""
    steps = tabulated_steps(PROFILE, ZOO[index], "vllm", max_batch=512, longest=131_072, chunk_tokens=CHUNK_TOKENS)
    batches = np.array([1.0, 2, 3, 5, 6, 10, 14, 20, 28, 40, 56, 80, 112, 128, 160, 224, 300, 450, 512])
    tokens = np.unique(np.round(np.geomspace(1.0, 131_072.0, 120)))
    decode, prefill, _ = step_seconds(PROFILE, ZOO[index], "vllm", batches, tokens, tokens, CHUNK_TOKENS)
    ours = np.array([[steps.decode(int(batch), int(batch * one))[0] for one in tokens] for batch in batches])
    long = tokens >= 128.0
    np.testing.assert_allclose(ours[:, long], decode[:, long], rtol=0.015)
    np.testing.assert_allclose(ours[:, ~long], decode[:, ~long], rtol=0.035)
    np.testing.assert_allclose([steps.prefill(int(n)) for n in tokens], prefill, rtol=0.006)


def test_steps_at_another_pace_by_hand() -> None:
    """Decode steps twice as long, those with prompts three times; one factor serves for both."""
    both = ScaledSteps(HAND, 2.0, prompt_factor=3.0)
    now, more, holds = HAND.decode(2, 10)
    assert both.decode(2, 10) == (2.0 * now, 2.0 * more, holds)
    assert both.mixed([(10, 20)], 1, 0, 0) == 3.0 * HAND.mixed([(10, 20)], 1, 0, 0)
    assert ScaledSteps(HAND, 2.0).mixed([(10, 20)], 1, 0, 0) == 2.0 * HAND.mixed([(10, 20)], 1, 0, 0)
    for given, word in (
        ({"factor": 0.0}, "factor must"),
        ({"factor": 1.0, "prompt_factor": math.nan}, "prompt_factor"),
    ):
        with pytest.raises(ValueError, match=word):
            ScaledSteps(HAND, **given)


def test_bad_tables() -> None:
    with pytest.raises(ValueError, match="decode_s must have one column per context, got shape"):
        TabulatedSteps(np.ones((2, 3)), np.arange(1.0, 3.0), np.ones(1), np.ones(1), 0.0)
    with pytest.raises(ValueError, match="prefill_s must have one value per length, got shape"):
        TabulatedSteps(np.ones((2, 3)), np.arange(1.0, 4.0), np.ones(2), np.ones(1), 0.0)

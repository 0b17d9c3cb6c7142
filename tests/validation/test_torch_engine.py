"""The PyTorch engine. Truth: the same model without cache, batch or schedule (`plain_greedy`), and counts by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from tiny_llama import plain_greedy, tiny, torch

from servecast.validation.torch_engine.drafters import Drafter, DraftModel, NgramDrafter
from servecast.validation.torch_engine.engine import Request, TorchEngine
from servecast.validation.torch_engine.llama import Chunk, SlotCache
from servecast.validation.torch_engine.serving import closed_batch, serve

SLOTS, LENGTH = 5, 160


def _requests(count: int, seed: int) -> list[Request]:
    draw = np.random.default_rng(seed)
    return [
        Request(i, draw.integers(0, 31, draw.integers(2, 41)).tolist(), int(draw.integers(1, 31))) for i in range(count)
    ]


def _engine(
    *, drafter: Drafter | None = None, gamma: Callable[[int], int] | None = None, budget: int = 24, seed: int = 0
) -> TorchEngine:
    return TorchEngine(
        tiny(seed),
        max_num_seqs=SLOTS,
        max_num_batched_tokens=budget,
        max_model_len=LENGTH,
        drafter=drafter,
        draft_length=gamma,
    )


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "other model": lambda: DraftModel(tiny(7, num_hidden_layers=1), SLOTS, LENGTH),
    "the target itself": lambda: DraftModel(tiny(0), SLOTS, LENGTH),
    "n-gram": lambda: NgramDrafter(longest=2, shortest=1),
}


@pytest.mark.parametrize("budget", [6, 24, 200])
def test_output_is_that_of_the_model_alone(budget: int) -> None:
    """Chunked prefill, batching, slots that move: greedy text must not notice."""
    requests = _requests(14, seed=3)
    closed_batch(_engine(budget=budget), requests)
    model = tiny()
    for one in requests:
        assert one.output == plain_greedy(model, one.prompt, one.n_out)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("lengths", [(1,), (4,), (3, 0, 2)])
def test_speculative_output_equals_plain_output(name: str, lengths: tuple[int, ...]) -> None:
    """Token for token, also where the draft length changes from step to step."""
    turn = itertools.cycle(lengths)
    requests = _requests(12, seed=5)
    closed_batch(_engine(drafter=DRAFTERS[name](), gamma=lambda _: next(turn), budget=30), requests)
    model = tiny()
    for one in requests:
        assert one.output == plain_greedy(model, one.prompt, one.n_out)


def test_a_drafter_that_is_the_target_is_always_right() -> None:
    requests = [Request(i, [1 + i, 2, 3], 21) for i in range(3)]
    steps = closed_batch(_engine(drafter=DRAFTERS["the target itself"](), gamma=lambda _: 4), requests)
    for step in (one.record for one in steps if one.record.gamma):
        assert step.survived == (step.sequences,) * step.gamma
    # one token comes with the prompt, 20 in rounds of 5
    assert [one.rounds for one in requests] == [4, 4, 4]
    assert [one.accepted for one in requests] == [16, 16, 16]


def test_ngram_finds_what_followed_the_latest_match() -> None:
    """By hand: 5 6 stood at 0 and at 3; what followed the later place counts."""
    drafter = NgramDrafter(longest=3, shortest=2)
    assert drafter.lookup([5, 6, 1, 5, 6, 2, 9, 5, 6], 3) == [2, 9, 5]
    assert drafter.lookup([1, 2, 3, 4], 3) == []


def test_a_step_holds_no_more_than_its_budget_and_prompts_keep_their_order() -> None:
    engine = _engine(budget=8)
    requests = [Request(i, list(range(1, 21)), 3) for i in range(4)]
    for one in requests:
        engine.submit(one)
    while engine.busy:
        record = engine.step(lambda: 0.0)
        assert record.sequences + sum(end - start for start, end in record.chunks) <= 8
    starts = [one.scheduled_s for one in requests]
    assert starts == sorted(starts, key=lambda one: one or 0.0)


def test_stamps_of_an_open_loop_by_a_clock_of_our_own() -> None:
    """A clock that moves 1 s with every reading: arrivals are never late, first tokens never before them."""
    ticks = itertools.count()
    requests = _requests(6, seed=9)
    for one in requests:
        one.arrival_s = 20.0 * one.number
    run = serve(_engine(), requests, clock=lambda: float(next(ticks)), sleep=lambda _: None)
    rows = run.rows
    assert run.complete
    assert rows.arrival_s.tolist() == [20.0 * i for i in range(6)]
    assert np.all(rows.first_token_s > rows.arrival_s)
    assert np.all(rows.last_token_s >= rows.first_token_s)
    assert not rows.refused.any()


def test_what_is_done_between_steps_takes_no_time_of_the_run() -> None:
    """A clock that ticks at every reading: with 1000 ticks lost after every third step, the stamps are the same."""
    stamps = []
    for lost in (0, 1000):
        now = [0]

        def clock(now: list[int] = now) -> float:
            now[0] += 1
            return float(now[0])

        calls: list[float] = []

        def between(at_s: float, now: list[int] = now, lost: int = lost, calls: list[float] = calls) -> None:
            now[0] += lost
            calls.append(at_s)

        requests = _requests(6, seed=9)
        for one in requests:
            one.arrival_s = 20.0 * one.number
        run = serve(_engine(), requests, clock=clock, sleep=lambda _: None, between=between, every=3)
        assert len(calls) == len(run.steps) // 3 > 3
        stamps.append((calls, [one.token_s for one in run.requests]))
    assert stamps[0] == stamps[1]


def test_a_run_that_is_stopped_keeps_what_it_has() -> None:
    ticks = itertools.count()
    requests = [Request(i, [1, 2, 3], 8, arrival_s=100.0 * i) for i in range(4)]
    run = serve(_engine(), requests, clock=lambda: float(next(ticks)), sleep=lambda _: None, stop_after_s=150.0)
    assert not run.complete
    assert run.rows.refused.tolist()[:1] == [False]
    assert run.rows.refused.tolist()[-1]


def test_a_clock_that_goes_back_ends_the_run_with_a_word() -> None:
    readings = itertools.chain([0.0, 0.0, 5.0, 5.0], itertools.repeat(-100.0))
    with pytest.raises(RuntimeError, match="clock went back"):
        serve(_engine(), [Request(0, [1, 2], 4)], clock=lambda: next(readings), sleep=lambda _: None)


def test_what_does_not_fit_is_refused_before_it_is_queued() -> None:
    engine = _engine()
    with pytest.raises(ValueError, match="leave 16 of 160 places free"):
        engine.submit(Request(0, [1] * 150, 4))
    with pytest.raises(ValueError, match="2 prompt tokens"):
        engine.submit(Request(0, [1], 4))
    assert not engine.busy


def test_a_chunked_prompt_has_the_scores_of_the_whole() -> None:
    """Against the form without a cache; rtol 1e-9 in double precision."""
    model, tokens = tiny(), [int(one) for one in np.random.default_rng(1).integers(0, 31, 37)]
    cache = SlotCache(model.shape, 2, 64, torch.float64, torch.device("cpu"))
    none = torch.empty(0, 0, dtype=torch.long)
    found = []
    for start, end in ((0, 10), (10, 11), (11, 37)):
        rows = model.step(
            cache, none, torch.empty(0, dtype=torch.long), [Chunk(1, start, end)], torch.tensor(tokens[start:end])
        )
        found.append(model.scores(rows))
    with torch.no_grad():
        whole = model(torch.tensor([tokens]))[0]
    np.testing.assert_allclose(torch.cat(found).numpy(), whole.numpy(), rtol=1e-9, atol=1e-12)

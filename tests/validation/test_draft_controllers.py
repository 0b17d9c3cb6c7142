"""Controllers without a time model: hand-simulated sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from servecast.validation.draft_controllers import (
    SGLANG_DEFAULT,
    ConfidenceStop,
    DraftController,
    EmaRules,
    RoundState,
    ScheduleTable,
    SglangEma,
    StaticLength,
    drafted_confidence,
)

Floats = NDArray[np.float64]


def never() -> Floats:
    raise AssertionError("a controller that does not look at confidences asked for one")


def columns(*means: float, batch: int = 2) -> Callable[[], Floats]:
    """Confidences of one token after the other, alike for all requests."""
    left: Iterator[float] = iter(means)
    return lambda: np.full(batch, next(left))


def state(batch: int, **more: int) -> RoundState:
    return RoundState(batch=batch, cached=100 * batch, **more)


def observe(controller: DraftController, mean: float, batch: int = 2) -> None:
    """Accepted drafts with a given mean over two requests, or the same whole number over more."""
    accepted = np.full(batch, round(mean)) if batch != 2 else np.array([0, round(2 * mean)])
    controller.observe(accepted, np.full(batch, 9), 0.01)


def test_static_length() -> None:
    decision = StaticLength(3).round(state(4), never)
    assert decision.lengths.tolist() == [3, 3, 3, 3]
    assert decision.drafted == 3
    assert StaticLength(0).round(state(2), never).lengths.tolist() == [0, 0]


class TestScheduleTable:
    # vLLM's reading of [[1, 2, 4], [5, 8, 1]] with at most 3 drafts, reference page 7.1 [P]
    LENGTHS = (3, 3, 3, 3, 1, 1, 1, 1, 1, 1)

    def test_key_counts_prefills_and_acts_one_step_later(self) -> None:
        # hand: steps of 4, 4 + 1 prefill, 3, 20 requests find 3, 1, 3, 1; each is used in the step after
        table = ScheduleTable(self.LENGTHS)
        steps = [state(4), state(4, prefills=1), state(3), state(20), state(2)]
        assert [table.round(one, never).drafted for one in steps] == [3, 3, 1, 3, 1]

    def test_without_lag(self) -> None:
        table = ScheduleTable(self.LENGTHS, lagged=False)
        steps = [state(4), state(4, prefills=1), state(3), state(20)]
        assert [table.round(one, never).drafted for one in steps] == [3, 1, 3, 1]

    def test_lengths_have_the_batch_of_the_step(self) -> None:
        table = ScheduleTable([2, 1])
        table.round(state(1), never)
        assert table.round(state(3), never).lengths.tolist() == [2, 2, 2]


class TestConfidenceStop:
    # rule of SpecServe's scripts, reference page 3.5 [P]: batch mean below .6, at most 8
    def test_stops_after_the_low_token(self) -> None:
        decision = ConfidenceStop().round(state(2), columns(0.9, 0.6, 0.59, 0.9))
        assert decision.drafted == 3
        assert decision.lengths.tolist() == [3, 3]

    def test_cap(self) -> None:
        assert ConfidenceStop().round(state(2), columns(*[1.0] * 20)).drafted == 8
        assert ConfidenceStop(max_length=0).round(state(2), never).drafted == 0

    def test_the_mean_decides(self) -> None:
        tokens = iter([np.array([1.0, 0.1]), np.array([0.9, 0.9])])
        assert ConfidenceStop().round(state(2), lambda: next(tokens)).drafted == 1


class TestSglangEma:
    """Rules of reference page 7.2 [P adaptive_spec_params.py], followed with pencil and paper."""

    RULES = EmaRules(candidate_steps=(5, 1, 3), ema_alpha=0.5, update_interval=2, warmup_batches=1)

    def test_sequence(self) -> None:
        # start at 3, average 2. Accepted 3 3 3: 2.5, 2.75, 2.875 > 2.5: up to 5 at batch 3.
        # 5 0: 3.9375, 1.96875 <= 3 - .5 - .25: down to 3 at batch 5, not further (> .25).
        # 0 0: .984, .492: between .25 and 2.5, stays at batch 7. 0 0: .246, .123 <= .25: down to 1 at batch 9
        controller = SglangEma({1: self.RULES}, initial_steps=3)
        seen = []
        for accepted in (3, 3, 3, 5, 0, 0, 0, 0, 0):
            observe(controller, accepted)
            seen.append(controller.round(state(2), never).drafted)
        assert seen == [3, 3, 5, 5, 3, 3, 3, 3, 1]
        assert controller.slot(2).ema == pytest.approx(0.123046875, rel=1e-12)

    def test_zero_is_probed_again(self) -> None:
        # from 1, average 0 <= .5: to 0. Then a probe each second batch; accepted 1 each time: .2, .36, .488 <= .5, then
        # .5904 > .5 stays and is above 1 - .5: up to 3. While at 0 the average rests
        rules = EmaRules(candidate_steps=(0, 1, 3), update_interval=1, warmup_batches=0, down_hysteresis=0.0)
        controller = SglangEma({1: rules}, initial_steps=1)
        seen = []
        for accepted in (0, 0, 1, 0, 1, 0, 1, 0, 1):
            observe(controller, accepted)
            seen.append(controller.slot(2).steps)
        assert seen == [0, 1, 0, 1, 0, 1, 0, 1, 3]
        assert controller.slot(2).ema == pytest.approx(0.5904, rel=1e-12)

    def test_a_start_at_zero_gets_a_neutral_average(self) -> None:
        # source: a slot that has seen no drafts (average -1) is set to target - 1 on its first probe
        rules = EmaRules(candidate_steps=(0, 2), update_interval=1, warmup_batches=0)
        controller = SglangEma({1: rules}, initial_steps=0)
        assert controller.slot(1).ema == -1.0
        observe(controller, 0)
        assert controller.slot(1).steps == 2
        assert controller.slot(1).ema == 1.0

    def test_ceiling_only_lowers(self) -> None:
        # hand: at 5 with average 2.5 > 2.25 nothing falls, but the ceiling ceil(2.5) = 3 does; at 1 with average 1 the
        # average asks for 3, which a ceiling of 1 does not stop
        rules = EmaRules(
            candidate_steps=(1, 3, 5), ema_alpha=1.0, update_interval=1, warmup_batches=0, ceiling_coeff=1.0
        )
        low, high = SglangEma({1: rules}, initial_steps=5), SglangEma({1: rules}, initial_steps=1)
        observe(low, 2.5)
        observe(high, 1)
        assert (low.slot(2).steps, high.slot(2).steps) == (3, 3)

    def test_one_candidate_is_a_table(self) -> None:
        # reference page 7.2 [P]: keys are lower bounds
        rules = {1: 5, 17: 3, 65: 1}
        controller = SglangEma({key: EmaRules(candidate_steps=(one,)) for key, one in rules.items()})
        for _ in range(40):
            observe(controller, 0, batch=17)
        assert [controller.round(state(b), never).drafted for b in (1, 16, 17, 64, 65, 500)] == [5, 5, 3, 3, 1, 1]

    def test_batches_are_padded_before_routing(self) -> None:
        # hand: 9 pads to 32, whose key is 17; 40 is above every captured size and stays
        rules = {4: EmaRules(candidate_steps=(5,)), 17: EmaRules(candidate_steps=(3,))}
        controller = SglangEma(rules, captured=(32, 8))
        assert [controller.slot(b).steps for b in (1, 8, 9, 40)] == [5, 5, 3, 3]

    def test_slots_learn_apart(self) -> None:
        rules = EmaRules(candidate_steps=(1, 3), ema_alpha=1.0, update_interval=1, warmup_batches=0)
        controller = SglangEma({1: rules, 8: rules}, initial_steps=1)
        observe(controller, 1, batch=8)
        assert (controller.slot(1).steps, controller.slot(8).steps) == (1, 3)

    def test_default(self) -> None:
        # reference page 7.2 [P]: candidates of the built-in file; the union's middle one, 3, is used where it is one,
        # else the middle of the range's own
        controller = SglangEma()
        assert [controller.slot(b).steps for b in (1, 8, 32, 64)] == [3, 3, 1, 0]
        assert [SGLANG_DEFAULT[key].down_hysteresis for key in (1, 8, 32, 64)] == [-0.25, 0.0, 0.0, 0.0]

    @given(st.lists(st.integers(0, 7), max_size=80), st.sampled_from([1, 8, 32, 64]))
    @settings(max_examples=50)
    def test_stays_among_its_candidates(self, accepted: list[int], batch: int) -> None:
        controller = SglangEma()
        for one in accepted:
            observe(controller, min(one, controller.slot(batch).steps), batch=batch)
            assert controller.slot(batch).steps in SGLANG_DEFAULT[batch].candidate_steps

    @given(st.sampled_from(sorted({1, 3, 5, 7})), st.floats(0.1, 1.0))
    @settings(max_examples=30)
    def test_full_acceptance_climbs_to_the_top(self, start: int, weight: float) -> None:
        # accepted = length: the average tends to the length, which is above length - .5, until nothing is above
        rules = EmaRules(candidate_steps=(1, 3, 5, 7), ema_alpha=weight, update_interval=1, warmup_batches=0)
        controller = SglangEma({1: rules}, initial_steps=start)
        for _ in range(200):
            observe(controller, controller.slot(1).steps, batch=1)
        assert controller.slot(1).steps == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticLength(-1), "length must be an integer >= 0, got -1"),
        (lambda: StaticLength(1.5), "length must be an integer >= 0, got 1.5"),
        (lambda: ScheduleTable([]), "lengths must have a value for one request, got none"),
        (lambda: ScheduleTable([1, -2]), "lengths must be an integer >= 0, got -2"),
        (lambda: ConfidenceStop(threshold=float("nan")), r"threshold must be in \[0, 1\], got nan"),
        (lambda: EmaRules(candidate_steps=()), r"candidate_steps must be integers >= 0, got \(\)"),
        (lambda: EmaRules(candidate_steps=(1,), ema_alpha=0.0), r"ema_alpha must be in \(0, 1\], got 0.0"),
        (lambda: EmaRules(candidate_steps=(1,), update_interval=0), "update_interval must be >= 1"),
        (lambda: EmaRules(candidate_steps=(1,), up_hysteresis=float("nan")), "must be finite"),
        (lambda: SglangEma({}), r"rules must have keys >= 0, got \[\]"),
        (lambda: SglangEma(initial_steps=2), r"initial_steps must be one of \[0, 1, 3, 5, 7\], got 2"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("values", [[0.5], [0.5, 1.2], [0.5, float("nan")], [-0.1, 0.5]])
def test_bad_confidences_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="confidence must be"):
        drafted_confidence(lambda: np.array(values), 2)

"""Draft-length plans on tables by hand: several contexts, forecasts, advice, methods, laws of every drafter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from speculation_plans import STEP_MS, TOKENS, best_at, certain_curve, plan, small, speed_table

from servecast import speculating
from servecast.model.speculation import tokens_per_step
from servecast.model.speculation_cost import FormulaCost, RowForm
from servecast.speculating import compare_methods, shown_batches
from servecast.speculation_answers import DecodeLimits, ScheduleRules
from servecast.speculation_tables import SpeedTable, table_from_cost

Floats = NDArray[np.float64]
Z90 = NormalDist().inv_cdf(0.95)

# ---- several contexts ----------------------------------------------------------------------------------


def two_contexts() -> SpeedTable:
    """At the longer context every step takes 6 ms more."""
    both = np.array([STEP_MS, STEP_MS + 6.0])
    return speed_table(1e3 * TOKENS / both, TOKENS.tolist(), contexts=(1000.0, 9000.0))


def test_limits_are_kept_at_every_context() -> None:
    # Origin: hand. Steps of 20 ms: short context length 2 up to batch 3 (19), 1 at batch 4; long: 2 (19), 1 (20),
    # 0 at batches 3 and 4 (1 would take 22 and 24). One table for both is the long one's.
    answer = plan(two_contexts(), limits=DecodeLimits(step_s=0.020 + 1e-9))
    assert answer.schedule.segments == ((1, 1, 2), (2, 2, 1), (3, 4, 0))
    row = np.arange(4)
    assert answer.feasible[:, row, answer.lengths].all()
    short, long = answer.by_context
    assert short.lengths.tolist() == [2, 2, 2, 1]
    assert long.lengths.tolist() == [2, 1, 0, 0]
    assert {one.context for one in answer.forecasts} == {1000.0, 9000.0}


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.integers(1, 3))
def test_a_context_by_itself_never_chooses_worse(seed: int, contexts: int, lengths: int) -> None:
    # Origin: the combined schedule is one of those that each context may choose. Regret by hand: of speeds against
    # the best of the context, plus 0.2 % of an edge.
    speed = np.random.default_rng(seed).uniform(50.0, 100.0, (contexts, 16, 4))
    answer = plan(
        speed_table(speed, contexts=np.arange(1.0, contexts + 1.0).tolist()), rules=ScheduleRules(max_lengths=lengths)
    )

    def objective(i: int, chosen: Sequence[int]) -> float:
        regret = 1.0 - speed[i, np.arange(16), list(chosen)] / speed[i].max(axis=1)
        return float(regret @ answer.weights + 0.002 * np.count_nonzero(np.diff(chosen)))

    for i, own in enumerate(answer.by_context):
        mine = objective(i, own.lengths.tolist())
        assert mine <= objective(i, answer.lengths.tolist()) + 1e-9
        assert mine == pytest.approx(own.objective, rel=1e-9, abs=1e-12)


def test_one_context_is_its_own() -> None:
    answer = plan(small())
    assert answer.by_context == (answer.schedule,)


# ---- forecasts and remarks -----------------------------------------------------------------------------


def test_forecasts_by_hand() -> None:
    # Origin: hand. Batch 4, length 2: 2.4 tokens in 22 ms; 90 % are 1.645 deviations of 2 %.
    answer = plan(small(off=[95.0, 90.0, 85.0, 80.0]))
    one = answer.forecasts[-1]
    speed, wide = 2.4 / 22e-3, math.exp(Z90 * 0.02)
    assert (one.batch, one.draft_length, one.meets) == (4, 2, True)
    assert math.isnan(one.context)
    assert one.goodput_tok_s.value == pytest.approx(4 * speed, rel=1e-12)
    assert one.goodput_tok_s.lo == pytest.approx(4 * speed / wide, rel=1e-12)
    assert one.goodput_tok_s.hi == pytest.approx(4 * speed * wide, rel=1e-12)
    assert one.tpot_s.value == pytest.approx(1 / speed, rel=1e-12)
    assert one.tpot_s.lo == pytest.approx(1 / speed / wide, rel=1e-12)
    assert one.tpot_s.hi == pytest.approx(wide / speed, rel=1e-12)
    assert one.step_s == pytest.approx(22e-3, rel=1e-12)
    assert one.over_static == pytest.approx(0.0, abs=1e-12)
    assert one.over_off == pytest.approx(speed / 80.0 - 1.0, rel=1e-12)


def test_shown_batches_are_powers_of_two_and_ends() -> None:
    # Origin: hand.
    answer = plan(best_at(3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1))
    assert answer.schedule.segments == ((1, 2, 3), (3, 4, 2), (5, 11, 1))
    assert shown_batches(answer.schedule) == [1, 2, 3, 4, 5, 8, 11]
    assert [one.batch for one in answer.forecasts] == [1, 2, 3, 4, 5, 8, 11]


def test_gain_over_the_best_static_length_by_hand() -> None:
    # Origin: hand. 10 % are lost by length 3 at batches 3 and 4, by length 2 at 1 and 2: weights 18/25 and 7/25.
    answer = plan(best_at(3, 3, 2, 2))
    assert answer.best_static == 3
    assert answer.gain_over_static == pytest.approx(7 / 25 * (1 / 0.9 - 1), rel=1e-12)


def test_gain_over_no_speculation_has_an_interval() -> None:
    # Origin: hand. 100 against 80 tokens/s, each known to 2 %: 2.83 % together, 1.645 of them to either side.
    answer = plan(speed_table([[70.0, 100.0]] * 2, off=[80.0, 80.0]))
    wide = math.exp(Z90 * 0.02 * math.sqrt(2.0))
    assert answer.gain_over_off == pytest.approx(0.25, rel=1e-12)
    assert answer.gain_over_off_lo == pytest.approx(1.25 / wide - 1.0, rel=1e-9)
    assert answer.gain_over_off_hi == pytest.approx(1.25 * wide - 1.0, rel=1e-9)


def test_what_no_cell_shows_is_said_and_gives_no_advice() -> None:
    # Origin: rule; off is 25 % faster as far as it was carried there.
    guessed = replace(speed_table([[80.0, 70.0]] * 2, off=[100.0, 100.0]), off_known=False, steps_known=False)
    answer = plan(guessed)
    assert answer.advice == ()
    assert len(answer.warnings) == 1
    assert answer.warnings[0].startswith("no cell was measured with speculation off: gains over it are extrapolated")
    limited = plan(guessed, limits=DecodeLimits(step_s=1.0))
    assert any("rest on what drafters usually accept" in text for text in limited.warnings)
    assert not any("usually accept" in text for text in plan(guessed, limits=DecodeLimits(tpot_mean_s=1.0)).warnings)


def test_advice_where_off_is_better() -> None:
    # Origin: hand. A server without a drafter is 1.25 times as fast: with one, goodput is 20 % lower.
    answer = plan(speed_table([[80.0, 70.0]] * 2, off=[100.0, 100.0]))
    assert answer.gain_over_off == pytest.approx(-0.2, rel=1e-12)
    assert answer.advice[0] == (
        "switch speculation off: with a drafter goodput is 20.0% lower on average over these batch sizes"
    )


def test_advice_where_off_is_better_for_large_batches() -> None:
    # Origin: hand, 5 % at batches 3 and 4, half as fast at 1 and 2.
    answer = plan(speed_table([[70.0, 100.0]] * 4, off=[50.0, 50.0, 105.0, 105.0]))
    assert answer.advice == (
        "from batch size 3 on a server without a drafter is faster, by 5.0% at most: serve peaks that last from "
        "replicas without one",
    )
    middle = plan(speed_table([[70.0, 100.0]] * 4, off=[50.0, 105.0, 50.0, 50.0]))
    assert middle.advice[0].startswith("at batch sizes around 2 a server without a drafter is faster, by 5.0%")


def test_no_advice_within_doubt() -> None:
    # Origin: hand. 1 % ahead is less than its own 2 %.
    assert plan(speed_table([[70.0, 100.0]] * 2, off=[50.0, 101.0])).advice == ()


def test_advice_where_one_length_is_enough() -> None:
    # Origin: hand. Length 1 for all loses 1 % of 7/25 of the weight.
    answer = plan(speed_table([[50.0, 100.0, 99.0]] * 2 + [[50.0, 99.0, 100.0]] * 2))
    assert answer.schedule.segments == ((1, 2, 1), (3, 4, 2))
    assert answer.advice == ("draft length 1 for every batch size loses 0.3% only and needs no schedule",)


def test_a_static_length_that_misses_the_limits_is_not_advised() -> None:
    # Origin: hand. Steps of 18 ms need two lengths (above), and the one length that keeps the limit is 6 % slower at
    # most batches; length 2 alone would be faster and misses it.
    answer = plan(small(), limits=DecodeLimits(step_s=0.018 + 1e-9))
    assert answer.best_static == 1
    limits = DecodeLimits(tpot_mean_s=0.0096, step_s=0.018 + 1e-9)  # batch 4 has none: 10 ms, or 22 ms a step
    hard = plan(small(), limits=limits)
    assert hard.schedule.infeasible_batches == (4,)
    assert len(hard.schedule.segments) > 1
    assert not any("needs no schedule" in text for text in hard.advice)


def test_what_was_not_measured_is_said() -> None:
    # Origin: hand.
    known = [[True, True, True]] * 3 + [[True, True, False]]
    answer = plan(small(calibrated=known))
    assert answer.warnings == ("batch sizes 4 to 4 are, at least in part, beyond what was measured: extrapolated",)
    assert [one.tpot_s.calibrated for one in answer.forecasts if one.batch in (2, 4)] == [True, False]


# ---- methods -------------------------------------------------------------------------------------------


def test_methods_compared_by_hand() -> None:
    # Origin: hand. Weights 12, 6, 4, 3 of 25. The first is as fast as the best at batches 1 and 4 and half as fast
    # at 2 and 3: (12 + 3 + 3 + 2) / 25; the other way round (6 + 6 + 4 + 1.5) / 25.
    first = plan(speed_table([[10.0]] * 4))
    second = plan(speed_table([[5.0], [20.0], [20.0], [5.0]]))
    found = compare_methods({"second": second, "first": first})
    assert [name for name, _, _ in found] == ["first", "second"]
    assert found[0][1] == pytest.approx(20 / 25, rel=1e-12)
    assert found[1][1] == pytest.approx(17.5 / 25, rel=1e-12)
    assert list(found[0][2]) == [(1, 1), (4, 4)]
    assert list(found[1][2]) == [(2, 3)]


def test_methods_need_the_same_batches() -> None:
    answers = {"a": plan(speed_table([[1.0]] * 2)), "b": plan(speed_table([[1.0]] * 3))}
    with pytest.raises(ValueError, match=r"the same largest batch, got \[2, 3\]"):
        compare_methods(answers)


# ---- what holds for every drafter ----------------------------------------------------------------------


def drafted_cost(row_s: float, round_s: float, draft_s: float, rise_s: float) -> FormulaCost:
    return FormulaCost(
        form=RowForm.HYPERBOLIC,
        base_s=10e-3,
        rise_s=rise_s,
        rise_rows=40.0,
        row_s=row_s,
        request_s=2e-5,
        round_s=round_s,
        draft_s=draft_s,
    )


def cost_table(cost: FormulaCost, mean_length: ArrayLike, max_batch: int) -> SpeedTable:
    longest = np.size(mean_length) - 1
    return table_from_cost(cost, certain_curve(mean_length), max_batch=max_batch, max_length=longest, cost_sd=0.0)


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.05, 0.98), min_size=5, max_size=5),
    st.floats(0.2, 1.0),
    st.floats(0.0, 3e-4),
    st.floats(0.0, 4e-3),
    st.floats(0.0, 2e-3),
    st.floats(0.0, 1e-2),
)
def test_goodput_never_falls_when_acceptance_rises(
    conditional: list[float], power: float, row_s: float, round_s: float, draft_s: float, rise_s: float
) -> None:
    # Origin: T does not depend on acceptance, so every cell gains. Where rules and the price of an edge do not bind
    # the chosen goodput rises at every batch; with them, what is chosen at each single batch size.
    base = np.array(conditional)
    cost = drafted_cost(row_s, round_s, draft_s, rise_s)
    low, high = (1.0 + np.append(0.0, np.cumsum(np.cumprod(one))) for one in (base, base**power))
    free = ScheduleRules(max_lengths=6, max_segments=32, captured=tuple(range(1, 33)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculating, "EDGE_WORTH", 0.0)
        before, after = (plan(cost_table(cost, mean, 32), rules=free) for mean in (low, high))
    row = np.arange(32)
    lower = before.table.goodput[0, row, before.lengths]
    higher = after.table.goodput[0, row, after.lengths]
    assert (higher >= lower * (1.0 - 1e-9)).all()
    ruled = [plan(cost_table(cost, mean, 1)).forecasts[0].goodput_tok_s.value for mean in (low, high)]
    assert ruled[1] >= ruled[0] * (1.0 - 1e-9)


@settings(max_examples=40)
@given(st.floats(0.0, 0.95), st.floats(0.01, 0.9), st.integers(1, 64))
def test_a_dense_target_drafts_where_acceptance_beats_the_cost_ratio(alpha: float, ratio: float, count: int) -> None:
    # Origin: Leviathan et al., corollary 3.9: with verification flat in the rows some draft pays iff alpha > c; here
    # an armed drafter that idles costs nothing.
    if abs(alpha - ratio) < 1e-6:
        alpha = ratio + 1e-3
    target_s = 20e-3
    cost = replace(drafted_cost(0.0, 0.0, ratio * target_s, 0.0), base_s=target_s, request_s=0.0, idle_s=0.0)
    mean = np.append(1.0, tokens_per_step(alpha, np.arange(1, 7)))
    found = plan(cost_table(cost, mean, count)).schedule
    assert len(found.segments) == 1
    assert (found.segments[0][2] >= 1) is (alpha > ratio)

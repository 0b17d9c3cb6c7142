"""Tables of decode speeds: hand calculations for a cost model, the fit's own predictions for a sweep."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_plans import COST, LENGTHS, certain_curve, speed_table, sweep, true_speed

from servecast.calibration.fits.speculation_cells import CellsFit, fit_cells
from servecast.calibration.fits.sweep_problem import NOISE
from servecast.model.acceptance import AcceptanceCurve
from servecast.model.speculation_cost import FormulaCost, RowForm, TableCost, step_seconds
from servecast.speculation_tables import SpeedTable, batch_knots, table_from_cells, table_from_cost, with_contexts

Z90 = NormalDist().inv_cdf(0.95)

# ---- a cost model with a curve -------------------------------------------------------------------------

LINEAR = FormulaCost(
    form=RowForm.SATURATING,
    base_s=10e-3,
    rise_s=0.0,
    rise_rows=1.0,
    row_s=0.1e-3,
    request_s=0.2e-3,
    round_s=1e-3,
    draft_s=0.5e-3,
    idle_s=0.7e-3,
)
CURVE = AcceptanceCurve(
    form="hand",
    mean_length=np.array([1.0, 1.8, 2.5, 3.0]),
    lo=np.array([1.0, 1.8, 2.4, 3.0]),
    hi=np.array([1.0, 1.8, 2.6, 3.0]),
    measured=np.array([True, False, True, False]),
    survival=(np.zeros(0), np.array([0.8]), np.array([0.85, 0.65]), np.array([0.8, 0.7, 0.5])),
)


def linear_table(**changed: float) -> SpeedTable:
    given = {"max_batch": 8, "max_length": 3, "cost_sd": 0.03, "largest_rows": 20.0, **changed}
    return table_from_cost(LINEAR, CURVE, **given)


def test_cost_table_by_hand() -> None:
    # Origin: hand. Batch 4, length 2: 10 + 0.1 x 12 + 0.2 x 4 + 1 + 2 x 0.5 = 14 ms for 2.5 tokens; length 0 armed
    # 10 + 0.4 + 0.8 + 0.7 = 11.9 ms, off 11.2 ms.
    table = linear_table()
    assert table.tok_s.shape == (1, 8, 4)
    assert table.tok_s[0, 3, 2] == pytest.approx(2.5 / 14e-3, rel=1e-12)
    assert table.tok_s[0, 3, 0] == pytest.approx(1 / 11.9e-3, rel=1e-12)
    assert table.off_tok_s[0, 3] == pytest.approx(1 / 11.2e-3, rel=1e-12)
    assert table.step_s[0, 3, 2] == pytest.approx(14e-3, rel=1e-12)
    assert table.goodput[0, 3, 2] == pytest.approx(4 * 2.5 / 14e-3, rel=1e-12)
    assert np.isnan(table.contexts).tolist() == [True]
    assert table.lengths.tolist() == [0, 1, 2, 3]


def test_cost_table_equals_its_cost_everywhere() -> None:
    # Origin: definition, tokens over seconds of the armed step, cell by cell.
    table = linear_table()
    for batch in (1, 5, 8):
        for k in range(4):
            step = float(step_seconds(LINEAR, batch, k, armed=True))
            assert table.step_s[0, batch - 1, k] == pytest.approx(step, rel=1e-12)


def test_stairs_of_a_measured_cost_are_kept_at_every_batch() -> None:
    # Origin: hand, graphs of 4, 8 and 16 rows: batches 2, 3, 5 at length 1 are padded to 4, 8 and 16 rows.
    cost = TableCost(
        rows=np.array([4.0, 8.0, 16.0]),
        verify_s=np.array([1e-3, 2e-3, 5e-3]),
        draft_requests=np.array([1.0]),
        draft_pass_s=np.array([0.5e-3]),
        parallel=False,
        eager_rows=np.zeros(0),
        eager_verify_s=np.zeros(0),
    )
    table = table_from_cost(cost, certain_curve([1.0, 1.5]), max_batch=5, max_length=1, cost_sd=0.0)
    np.testing.assert_allclose(table.step_s[0, [1, 2, 4], 1], [1.5e-3, 2.5e-3, 5.5e-3], rtol=1e-12)


def test_doubt_of_a_cost_table() -> None:
    # Origin: hand. Half of ln(2.6 / 2.4) over 1.645 joins the cost's 3 %; of a ratio, half of the 3 % is each
    # length's own, and the fastest length over itself is certain.
    table = linear_table()
    extra = math.log(2.6 / 2.4) / (2 * Z90)
    np.testing.assert_allclose(table.sd[0, 0], [0.03, 0.03, math.hypot(0.03, extra), 0.03], rtol=1e-12)
    assert table.tok_s[0, 0].argmax() == 3  # 3 / 13.1 against 2.5 / 12.5, 1.8 / 11.9 and 1 / 11 per ms
    np.testing.assert_allclose(table.ratio_sd[0, 0], [0.015, 0.015, math.hypot(0.015, extra), 0.0], rtol=1e-12)
    np.testing.assert_allclose(table.off_sd, np.full((1, 8), 0.03), rtol=1e-12)


def test_variance_of_a_step_by_hand() -> None:
    # Origin: hand. Length 2: one, two, three tokens with 0.15, 0.2, 0.65; length 3: 0.2, 0.1, 0.2, 0.5.
    np.testing.assert_allclose(linear_table().variance, [0.0, 0.16, 0.55, 1.4], rtol=1e-12)


def test_variance_without_survival_is_that_of_a_geometric_step() -> None:
    # Origin: hand. 1.5 and 1.75 tokens are survivals 0.5 and 0.5, 0.25; 1.36 tokens are the survivals 0.3 and 0.06,
    # which is 0.36 short of no power of 0.5: the power t with 2^-t + 4^-t = 0.36 is 2^-t = (sqrt(2.44) - 1) / 2.
    def variance(last: float) -> float:
        curve = certain_curve([1.0, 1.5 if last > 1.5 else 1.3, last])
        return float(table_from_cost(LINEAR, curve, max_batch=1, max_length=2, cost_sd=0.0).variance[2])

    assert variance(1.75) == pytest.approx(0.6875, rel=1e-9)
    p = (math.sqrt(2.44) - 1) / 2
    assert variance(1.36) == pytest.approx(p + 3 * p**2 - 0.36**2, rel=1e-9)


def test_calibrated_is_up_to_the_longest_measured_draft_and_the_most_rows() -> None:
    # Origin: hand. Measured length 2 (1 lies between 0 and 2), passes of up to 20 rows: 10 x 2, 6 x 3, not 7 x 3.
    table = linear_table()
    assert table.calibrated[0].tolist() == [True, True, True, False]
    assert table.calibrated[5].tolist() == [True, True, True, False]
    assert table.calibrated[6].tolist() == [True, True, False, False]


# ---- other contexts ------------------------------------------------------------------------------------


def test_contexts_add_the_cache_that_a_step_reads() -> None:
    # Origin: hand. 100 ns per token, 8,000 tokens more than measured, 4 requests: 3.2 ms on 14 ms and on 11.2 ms off;
    # a third of it is doubted.
    table = with_contexts(linear_table(), np.array([1000.0, 9000.0]), cached_token_s=1e-7, reference=1000.0)
    assert table.contexts.tolist() == [1000.0, 9000.0]
    assert table.step_s[0, 3, 2] == pytest.approx(14e-3, rel=1e-12)
    assert table.step_s[1, 3, 2] == pytest.approx(17.2e-3, rel=1e-12)
    assert table.tok_s[1, 3, 2] == pytest.approx(2.5 / 17.2e-3, rel=1e-12)
    assert table.off_tok_s[1, 3] == pytest.approx(1 / 14.4e-3, rel=1e-12)
    own = float(linear_table().sd[0, 3, 2])
    assert table.sd[1, 3, 2] == pytest.approx(math.hypot(own, 3.2 / 3 / 17.2), rel=1e-12)
    assert table.off_sd[1, 3] == pytest.approx(math.hypot(0.03, 3.2 / 3 / 14.4), rel=1e-12)
    np.testing.assert_array_equal(table.ratio_sd[1], linear_table().ratio_sd[0])


@pytest.mark.parametrize(
    ("contexts", "per_token", "message"),
    [
        ([0.0], 1e-5, "contexts must leave a positive step, got 0 tokens below the measured 1000"),
        ([-1.0], 1e-7, "contexts must be finite, >= 0 and increasing, got [-1.0]"),
        ([math.nan], 1e-7, "contexts must be finite, >= 0 and increasing, got [nan]"),
        ([2000.0, 1000.0], 1e-7, "contexts must be finite, >= 0 and increasing, got [2000.0, 1000.0]"),
        ([2000.0], -1e-7, "cached_token_s must be finite and >= 0, got -1e-07"),
        ([2000.0], math.nan, "cached_token_s must be finite and >= 0, got nan"),
    ],
)
def test_impossible_contexts_are_refused(contexts: list[float], per_token: float, message: str) -> None:
    # 10 us a token and 1,000 tokens less take 40 ms from a step of 14 ms
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        with_contexts(linear_table(), np.array(contexts), cached_token_s=per_token, reference=1000.0)
    assert str(caught.value) == message


def test_a_table_of_several_contexts_is_not_carried_further() -> None:
    table = speed_table(np.ones((2, 3, 2)), contexts=(0.0, 10.0))
    with pytest.raises(ValueError, match="must have one context to be carried to others, got 2"):
        with_contexts(table, np.array([5.0]), cached_token_s=0.0, reference=0.0)


# ---- a sweep -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fit() -> CellsFit:
    return fit_cells(sweep())


def test_knots_by_hand() -> None:
    # Origin: hand, 8 x 2^(i / 4) rounded: 10, 11, 13, 16, 19, 23.
    eight = [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch_knots(1).tolist() == [1]
    assert batch_knots(5).tolist() == [1, 2, 3, 4, 5]
    assert batch_knots(16).tolist() == [*eight, 10, 11, 13, 16]
    assert batch_knots(20).tolist() == [*eight, 10, 11, 13, 16, 19, 20]


@given(st.integers(1, 4096))
def test_knots_span_the_batches_in_small_steps(max_batch: int) -> None:
    knots = batch_knots(max_batch)
    assert (knots[0], knots[-1]) == (1, max_batch)
    steps = np.diff(knots)
    assert (steps >= 1).all()
    assert (steps <= np.maximum(0.25 * knots[:-1], 1)).all()


def test_sweep_table_between_knots_is_what_the_fit_predicts(fit: CellsFit) -> None:
    # Origin: predictions at the batches themselves, without a knot between.
    table = table_from_cells(fit, max_batch=64, max_length=5)
    batches = np.array([9, 12, 15, 21, 30, 47, 59])
    assert not np.isin(batches, batch_knots(64)).any()
    b, k = np.meshgrid(batches.astype(np.float64), np.arange(6), indexing="ij")
    direct = np.where(k == 0, fit.predict(b, k, armed=True).tok_s_per_request, fit.predict(b, k).tok_s_per_request)
    np.testing.assert_allclose(table.tok_s[0, batches - 1], direct, rtol=5e-3)
    off = fit.predict(b[:, 0], k[:, 0]).tok_s_per_request
    np.testing.assert_allclose(table.off_tok_s[0, batches - 1], off, rtol=5e-3)
    # and what is true: tokens over seconds, at batches that were never measured
    np.testing.assert_allclose(table.tok_s[0, batches - 1][:, 1:], true_speed(b, k)[:, 1:], rtol=0.02)


def test_doubt_of_a_sweep_table_leaves_the_noise_of_a_run_out(fit: CellsFit) -> None:
    # Origin: the fit's interval of a measurement, less the noise of that measurement, at knots.
    table = table_from_cells(fit, max_batch=64, max_length=5)
    b, k = np.meshgrid([1.0, 8.0, 64.0], np.arange(1, 6), indexing="ij")
    whole = fit.predict(b, k).sd
    expected = np.sqrt(whole**2 - (fit.inflation * NOISE) ** 2)
    np.testing.assert_allclose(table.sd[0, [0, 7, 63]][:, 1:], expected, rtol=1e-6)


def test_the_fastest_length_over_itself_is_certain(fit: CellsFit) -> None:
    # Origin: definition, a ratio of a number to itself.
    table = table_from_cells(fit, max_batch=64, max_length=5)
    at = batch_knots(64) - 1
    best = table.tok_s[0, at].argmax(axis=1)
    np.testing.assert_allclose(table.ratio_sd[0, at, best], 0.0, atol=1e-12)
    others = np.arange(6) != best[:, np.newaxis]
    assert (table.ratio_sd[0, at][others] > 0.0).all()
    # what both lengths share cancels
    assert (table.ratio_sd[0, at] < np.sqrt(2.0) * table.sd[0, at].max()).all()


def test_another_curve_scales_the_speeds_exactly(fit: CellsFit) -> None:
    # Origin: definition, the same seconds with other tokens; off has no drafter.
    own = table_from_cells(fit, max_batch=64, max_length=5)
    mean = np.array([1.0, 1.5, 1.8, 1.9, 1.95, 1.97])
    other = table_from_cells(fit, max_batch=64, max_length=5, curve=certain_curve(mean))
    np.testing.assert_allclose(other.tok_s, own.tok_s * mean / fit.mean_acceptance_length(), rtol=1e-9)
    np.testing.assert_allclose(other.step_s, own.step_s, rtol=1e-9)
    np.testing.assert_allclose(other.off_tok_s, own.off_tok_s, rtol=1e-12)
    np.testing.assert_array_equal(other.tokens, mean)
    assert own.tokens == pytest.approx(LENGTHS[:6], rel=0.01)


def test_an_uncertain_curve_makes_speeds_uncertain(fit: CellsFit) -> None:
    # Origin: hand, errors of independent origin add in squares.
    mean = np.array([1.0, 1.7, 2.2, 2.5, 2.7, 2.8])
    wide = AcceptanceCurve(
        form="hand",
        mean_length=mean,
        lo=np.array([1.0, 1.6, 2.0, 2.2, 2.3, 2.4]),
        hi=np.array([1.0, 1.8, 2.4, 2.8, 3.1, 3.2]),
        measured=np.ones(6, dtype=np.bool_),
    )
    narrow = table_from_cells(fit, max_batch=8, max_length=5, curve=certain_curve(mean))
    table = table_from_cells(fit, max_batch=8, max_length=5, curve=wide)
    extra = np.log(wide.hi / wide.lo) / (2 * Z90)
    np.testing.assert_allclose(table.sd, np.hypot(narrow.sd, extra), rtol=1e-9)
    # a ratio has what its two lengths do not share: the fastest one's own part is in the others', not in itself
    at = batch_knots(8) - 1
    best = table.tok_s[0, at].argmax(axis=1)
    apart = np.abs(extra - extra[best][:, np.newaxis])
    np.testing.assert_allclose(table.ratio_sd[0, at], np.hypot(narrow.ratio_sd[0, at], apart), rtol=1e-9)
    assert (apart[np.arange(at.size), 0] > 0.0).all()
    np.testing.assert_array_equal(table.tokens_lo, wide.lo)
    np.testing.assert_array_equal(table.tokens_hi, wide.hi)


def test_contexts_of_a_sweep_that_has_them() -> None:
    # Origin: the fit's own predictions, and the truth: 20 ns per cached token.
    cost = replace(COST, cached_token_s=2e-8)
    found = fit_cells(sweep(contexts=(2000.0, 16000.0), cost=cost))
    contexts = np.array([1000.0, 8000.0])
    table = table_from_cells(found, max_batch=16, max_length=5, contexts=contexts)
    for i, context in enumerate(contexts):
        direct = found.predict(np.array([1.0, 8.0, 16.0]), np.array([3, 3, 3]), context).tok_s_per_request
        np.testing.assert_allclose(table.tok_s[i, [0, 7, 15], 3], direct, rtol=1e-9)
        np.testing.assert_allclose(direct, true_speed([1, 8, 16], 3, context, cost), rtol=0.02)


def test_calibrated_is_among_the_measured_cells(fit: CellsFit) -> None:
    # Origin: hand, batches 1 to 64, lengths to 5, at most 64 x 6 rows.
    table = table_from_cells(fit_cells(sweep(), max_length=6), max_batch=80, max_length=6)
    assert table.calibrated[:64, :6].all()
    assert not table.calibrated[64:].any()
    assert not table.calibrated[:, 6].any()


def test_a_cliff_stays_where_the_fit_has_it() -> None:
    # Origin: the fit's own predictions on both sides of the edge, batch 128 of 6 rows each; the step there is given
    # half as long again.
    cells = sweep(batches=(1, 8, 32, 128), lengths=(0, 1, 3, 5))
    slow = np.where(cells.batch * (cells.gamma + 1) == 768, 1.5, 1.0)
    found = fit_cells(replace(cells, tok_s_per_request=cells.tok_s_per_request / slow))
    assert found.cliff is not None
    assert found.cliff.rows == 768.0
    table = table_from_cells(found, max_batch=160, max_length=5)
    for k in (4, 5):
        batches = np.arange(120, 161)
        direct = found.predict(batches.astype(np.float64), np.full(41, k)).tok_s_per_request
        np.testing.assert_allclose(table.tok_s[0, 119:, k], direct, rtol=5e-3)
    assert table.tok_s[0, 126, 5] > 1.3 * table.tok_s[0, 127, 5]


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(0, 5))
def test_a_sweep_table_has_every_batch_and_length(max_batch: int, max_length: int) -> None:
    # Origin: shapes; nothing is lost or made up at the ends.
    table = table_from_cells(FIT, max_batch=max_batch, max_length=max_length)
    assert table.tok_s.shape == (1, max_batch, max_length + 1)
    assert table.batches.tolist() == list(range(1, max_batch + 1))
    assert table.variance.shape == table.tokens.shape == (max_length + 1,)
    assert (np.diff(table.tok_s[0], axis=0) < 0.0).all()
    assert (np.diff(table.goodput[0], axis=0) > 0.0).all()


FIT = fit_cells(sweep(), hold_out=False)


@pytest.mark.parametrize("contexts", [[math.nan], [-5.0], [math.inf], [2.0, 1.0], [1.0, 1.0]])
def test_contexts_are_checked_wherever_they_come_in(fit: CellsFit, contexts: list[float]) -> None:
    at = np.array(contexts)
    with pytest.raises(ValueError, match="contexts must be finite, >= 0 and increasing, got"):
        table_from_cells(fit, max_batch=4, max_length=2, contexts=at)
    with pytest.raises(ValueError, match="contexts must be finite, >= 0 and increasing, got"):
        table_from_cost(LINEAR, CURVE, max_batch=4, max_length=2, contexts=at, cost_sd=0.0)


def test_longer_drafts_than_fitted_are_refused(fit: CellsFit) -> None:
    with pytest.raises(ValueError, match="max_length must be <= 5, the longest fitted, got 6"):
        table_from_cells(fit, max_batch=4, max_length=6)

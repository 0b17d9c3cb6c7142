"""Acceptance records: which measurements contradict themselves, pooling of runs, and the curve a forecast reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.model.acceptance import AcceptanceCurve, AcceptanceSample, samples_by_length, survival_with_mean


def sample(draft_length: int = 3, mean: float = 2.5, **given_fields: Any) -> AcceptanceSample:
    return AcceptanceSample(draft_length=draft_length, mean_acceptance_length=mean, **given_fields)


def curve(**changed: Any) -> AcceptanceCurve:
    fields: dict[str, Any] = {
        "form": "geometric",
        "mean_length": np.array([1.0, 1.5, 1.75]),
        "lo": np.array([1.0, 1.45, 1.6]),
        "hi": np.array([1.0, 1.55, 1.9]),
        "measured": np.array([True, True, False]),
        "survival": (np.zeros(0), np.array([0.5]), np.array([0.5, 0.25])),
    }
    return AcceptanceCurve(**{**fields, **changed})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft_length": 0, "mean": 1.0}, "draft_length must be at least 1, got 0"),
        ({"mean": 0.99}, "mean_acceptance_length must be from 1 to 4 at draft length 3, got 0.99"),
        ({"mean": 4.01}, "mean_acceptance_length must be from 1 to 4 at draft length 3, got 4.01"),
        ({"mean": math.nan}, "mean_acceptance_length must be from 1 to 4 at draft length 3, got nan"),
        ({"standard_error": -0.1}, "standard_error must be finite and not negative, got -0.1"),
        ({"standard_error": math.nan}, "standard_error must be finite and not negative, got nan"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"survival": (0.9, 0.6)}, r"survival must have 3 values \(the draft length\), got 2"),
        ({"survival": (0.9, 0.6, 0.7)}, "survival must not increase, got 0.7 after 0.6 at position 3"),
        ({"survival": (1.1, 0.3, 0.1)}, r"survival must be in \[0, 1\], got 1.1 at position 1"),
        ({"survival": (0.9, math.nan, 0.1)}, r"survival must be in \[0, 1\], got nan at position 2"),
        ({"survival": (0.9, 0.5, 0.2)}, "survival must sum to mean_acceptance_length - 1 = 1.5, got 1.6"),
    ],
)
def test_a_contradictory_sample_is_refused(fields: dict[str, Any], message: str) -> None:
    # Origin: definitions. AL = 1 + sum P_j with P_j probabilities of nested events.
    with pytest.raises(ValueError, match=f"^{message}$"):
        sample(**fields)


def test_survival_may_miss_the_mean_by_rounding_or_one_percent() -> None:
    # Origin: hand. Two decimals: three rates and AL are off by at most 0.005 each, 0.02 together; 1 % of 2.5 is 0.025.
    assert sample(mean=2.5, survival=(0.8, 0.5, 0.224)).survival == (0.8, 0.5, 0.224)
    with pytest.raises(ValueError, match=r"^survival must sum to"):
        sample(mean=2.5, survival=(0.8, 0.5, 0.226))
    # MiniMax-M3 EAGLE-3 as published, P .76 .56 .43 and AL 2.75 (reference page, 6.6).
    assert sample(mean=2.75, survival=(0.76, 0.56, 0.43)).mean_acceptance_length == 2.75


def test_limits_of_acceptance_are_legal() -> None:
    # Origin: definition; no draft accepted, and all of them.
    assert sample(mean=1.0, survival=(0.0, 0.0, 0.0)).mean_acceptance_length == 1.0
    assert sample(mean=4.0, survival=(1.0, 1.0, 1.0)).mean_acceptance_length == 4.0


def test_runs_of_one_length_are_pooled_by_steps() -> None:
    # Origin: hand. Weights 3/4 and 1/4: AL 2.1, P (0.65, 0.45); error sqrt((0.75 x 0.04)^2 + (0.25 x 0.16)^2) = 0.05.
    runs = [
        sample(2, 2.0, rounds=300, standard_error=0.04, survival=(0.6, 0.4)),
        sample(1, 1.5),
        sample(2, 2.4, rounds=100, standard_error=0.16, survival=(0.8, 0.6)),
    ]
    first, second = samples_by_length(runs)
    assert first is runs[1]
    assert (second.draft_length, second.rounds) == (2, 400)
    assert second.mean_acceptance_length == pytest.approx(2.1, rel=1e-12)
    assert second.standard_error == pytest.approx(0.05, rel=1e-12)
    assert second.survival == pytest.approx((0.65, 0.45), rel=1e-12)


def test_three_runs_give_their_own_scatter() -> None:
    # Origin: theory; equal weights make the standard error of the mean, sd / sqrt(3), sd of (1.9, 2.0, 2.1) = 0.1.
    (pooled,) = samples_by_length([sample(2, al) for al in (1.9, 2.0, 2.1)])
    assert pooled.standard_error == pytest.approx(0.1 / 3**0.5, rel=1e-9)
    assert pooled.survival is None
    (pooled,) = samples_by_length([sample(2, al, standard_error=0.9) for al in (1.9, 2.0, 2.1)])
    assert pooled.standard_error == pytest.approx(0.9 / 3**0.5, rel=1e-9)


def test_two_runs_without_errors_leave_none() -> None:
    (pooled,) = samples_by_length([sample(2, 1.9), sample(2, 2.1, rounds=7)])
    assert pooled.standard_error is None
    assert pooled.rounds is None
    assert pooled.mean_acceptance_length == pytest.approx(2.0, rel=1e-12)


def test_survival_moved_to_a_mean() -> None:
    # Origin: hand. (0.64, 0.25) to the power 1/2 is (0.8, 0.5), AL 2.3; zeros and ones cannot move.
    np.testing.assert_allclose(survival_with_mean([0.64, 0.25], 2.3), [0.8, 0.5], rtol=1e-12)
    np.testing.assert_allclose(survival_with_mean([1.0, 0.25, 0.0], 2.5), [1.0, 0.5, 0.0], rtol=1e-12)
    np.testing.assert_array_equal(survival_with_mean([0.5, 0.25], 1.0), [0.0, 0.0])
    np.testing.assert_array_equal(survival_with_mean([0.5, 0.25], 3.0), [1.0, 1.0])
    np.testing.assert_array_equal(survival_with_mean([1.0, 0.0], 2.0), [1.0, 0.0])
    with pytest.raises(ValueError, match=r"^mean_length must be from 2 to 3 for this survival, got 1.9$"):
        survival_with_mean([1.0, 0.5, 0.0], 1.9)


@settings(max_examples=50)
@given(
    rates=st.lists(st.floats(0.05, 0.98), min_size=1, max_size=8),
    share=st.floats(0.01, 0.99),
)
def test_a_moved_survival_has_the_mean_and_keeps_its_order(rates: list[float], share: float) -> None:
    # Origin: definition. Any mean strictly between 1 and K + 1 is reached by a survival of distinct interior values.
    p = np.cumprod(rates)
    mean = 1.0 + share * len(rates)
    moved = survival_with_mean(p, mean)
    assert 1.0 + moved.sum() == pytest.approx(mean, rel=1e-9)
    assert np.all(np.diff(moved) <= 0.0)
    assert np.all((moved >= 0.0) & (moved <= 1.0))


def test_curve_gives_predictions_and_variance() -> None:
    # Origin: hand. N is 1, 2, 3 with probability 1/2, 1/4, 1/4: mean 1.75, variance 0.6875.
    found = curve()
    assert found.max_length == 2
    assert (found.at(1).value, found.at(1).lo, found.at(1).hi, found.at(1).calibrated) == (1.5, 1.45, 1.55, True)
    assert not found.at(2).calibrated
    assert (found.at(0).value, found.at(0).lo, found.at(0).hi) == (1.0, 1.0, 1.0)
    assert found.variance(2) == pytest.approx(0.6875, rel=1e-12)
    assert found.variance(0) == 0.0


@pytest.mark.parametrize("gamma", [-1, 3, 1.5, math.nan])
def test_a_length_off_the_curve_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"^gamma must be a whole number from 0 to 2, got "):
        curve().at(gamma)


def test_a_curve_without_survival_has_no_variance() -> None:
    with pytest.raises(
        ValueError, match=r"^survival must be known for a variance, got none from the form 'geometric'$"
    ):
        curve(survival=None).variance(1)


def test_a_curve_may_fall() -> None:
    # Origin: dsv4-pro DSpark at draft lengths 7 and 8, 3.73 and 3.47 (InferenceX).
    falling = curve(mean_length=np.array([1.0, 1.9, 1.7]), lo=np.ones(3), hi=np.array([1.0, 2.0, 2.0]), survival=None)
    assert falling.at(2).value == 1.7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mean_length": np.array([1.1, 1.5, 1.75])}, "mean_length must be 1 at draft length 0, got 1.1"),
        ({"lo": np.array([1.0, 1.45])}, r"lo must have shape \(max_length \+ 1,\), got \(2,\)"),
        (
            {"lo": np.array([1.0, 1.6, 1.6])},
            "mean_length must be inside its interval .* at draft length 1, got 1.6 <= ",
        ),
        ({"hi": np.array([1.0, 1.55, 3.1])}, r"mean_length must be .* inside \[1, 3\] at draft length 2, got "),
        ({"hi": np.array([1.0, math.nan, 1.9])}, "mean_length must be inside its interval .* at draft length 1, got "),
        ({"survival": (np.zeros(0), np.array([0.5]))}, "survival must have K values at every draft length K, got 2 "),
    ],
)
def test_a_contradictory_curve_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        curve(**changed)

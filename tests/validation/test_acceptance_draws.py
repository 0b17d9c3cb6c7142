"""Texts of right and wrong drafts: slow forms, the closed forms they must average to, and common random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from servecast.model.speculation import TwoState, tokens_per_step
from servecast.validation.acceptance_draws import (
    AcceptanceDraws,
    AlikeTokens,
    BetaTokens,
    DrawnAcceptance,
    RecordedAcceptance,
    Text,
    TokenProcess,
    TwoStateTokens,
    accepted_in_a_row,
    two_state_path,
)

BURSTY = TwoState(a_easy=0.9, a_hard=0.3, easy_to_hard=0.15, hard_to_easy=0.35)


def _walk(text: Text, tokens: int, k: int) -> list[int]:
    """Accepted drafts of every round that starts inside the text: the prompt gives token 0, a round 1 + accepted."""
    place, rounds = 1, []
    while place < tokens:
        rounds.append(min(text.accepted[place], k))
        place += 1 + rounds[-1]
    return rounds


def _survival(draws: AcceptanceDraws, k: int, requests: int, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """P_1..P_k over all rounds, and its standard error from the texts, which are independent of each other."""
    positions = np.arange(1, k + 1)
    hits, rounds = np.empty((requests, k)), np.empty((requests, 1))
    for number in range(requests):
        accepted = np.array(_walk(draws.text(number, tokens, k), tokens, k))
        hits[number] = (accepted[:, np.newaxis] >= positions).sum(axis=0)
        rounds[number] = accepted.size
    mean = hits.sum(axis=0) / rounds.sum()
    # ratio estimator: the residual of each text around the common ratio
    sem = np.sqrt(((hits - mean * rounds) ** 2).sum(axis=0)) / rounds.sum()
    return mean, sem


# Rows of right tokens


def test_rows_of_right_tokens_by_hand() -> None:
    # hand, a = .5: right right wrong right wrong right; from places 0 to 3 on, at most 2: 2 1 0 1
    u = np.array([0.1, 0.2, 0.9, 0.3, 0.8, 0.4])
    np.testing.assert_array_equal(accepted_in_a_row(u, np.full(6, 0.5), 1.0, 2), [2, 1, 0, 1])
    # hand, r = .5: a first draft needs u < .5, a second u < .25. Place 0: .1 right, .2 right; 1: .2 right, .9 wrong;
    # 2: wrong; 3: .3 right, .8 wrong
    np.testing.assert_array_equal(accepted_in_a_row(u, np.full(6, 0.5), 0.5, 2), [2, 1, 0, 1])
    # hand: .3 right as a first, wrong as a second draft
    np.testing.assert_array_equal(accepted_in_a_row(np.array([0.3, 0.3, 0.3]), np.full(3, 0.5), 0.5, 2), [1])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    places=st.integers(1, 30),
    longest=st.integers(0, 12),
    decay=st.sampled_from([1.0, 0.9, 0.5]),
)
def test_rows_of_right_tokens_equal_a_slow_loop(seed: int, places: int, longest: int, decay: float) -> None:
    rng = np.random.default_rng(seed)
    u, a = rng.random(places + longest), rng.beta(4.0, 1.0, places + longest)
    slow = []
    for place in range(places):
        count = 0
        while count < longest and u[place + count] < a[place + count] * decay**count:
            count += 1
        slow.append(count)
    np.testing.assert_array_equal(accepted_in_a_row(u, a, decay, longest), slow)


@pytest.mark.parametrize("k", [0, 1, 7])
def test_limits_of_acceptance(k: int) -> None:
    # definition: alpha 1 accepts everything, 0 nothing
    for alpha, count in ((1.0, k), (0.0, 0)):
        text = DrawnAcceptance(process=AlikeTokens(alpha=alpha), seed=3).text(5, 40, k)
        assert list(text.accepted) == [count] * 40


# Common random numbers

PROCESSES: list[TokenProcess] = [
    AlikeTokens(alpha=0.7),
    TwoStateTokens(parameters=BURSTY),
    BetaTokens(mean=0.7, concentration=2.0),
]


@pytest.mark.parametrize("process", PROCESSES, ids=["alike", "two_state", "beta"])
@settings(max_examples=20)
@given(
    number=st.integers(0, 2**40), shorter=st.integers(1, 50), more=st.integers(0, 50), decay=st.sampled_from([1.0, 0.8])
)
def test_a_text_is_the_same_however_much_of_it_is_read(
    process: TokenProcess, number: int, shorter: int, more: int, decay: float
) -> None:
    draws = DrawnAcceptance(process=process, seed=11, depth_decay=decay, confidence_noise=0.5)
    short, long = draws.text(number, shorter, 3), draws.text(number, shorter + more, 9)
    assert list(short.accepted) == [min(one, 3) for one in long.accepted[:shorter]]
    assert [short.confidence(p, d) for p in range(shorter) for d in range(3)] == [
        long.confidence(p, d) for p in range(shorter) for d in range(3)
    ]


@pytest.mark.parametrize("process", PROCESSES, ids=["alike", "two_state", "beta"])
def test_texts_differ_by_request_and_by_seed(process: TokenProcess) -> None:
    draws, other = (DrawnAcceptance(process=process, seed=seed) for seed in (1, 2))
    texts = [draws.text(0, 200, 5), draws.text(1, 200, 5), other.text(0, 200, 5)]
    assert len({text.accepted for text in texts}) == 3
    # requests are independent: right tokens at the same place are not correlated
    ones = np.array([list(draws.text(number, 400, 1).accepted) for number in range(60)], dtype=float)
    correlation = np.corrcoef(ones)[np.triu_indices(60, 1)]
    assert abs(correlation.mean()) < 4.0 * correlation.std() / math.sqrt(60)


# Averages against closed forms


@pytest.mark.parametrize(("alpha", "k"), [(0.7, 5), (0.8, 4), (0.5, 1)])
def test_tokens_alike_give_the_geometric_survival(alpha: float, k: int) -> None:
    # theory: P_j = alpha^j (Leviathan et al., eq. 1 sums it)
    survival, sem = _survival(DrawnAcceptance(process=AlikeTokens(alpha=alpha), seed=1), k, 100, 1000)
    np.testing.assert_array_less(abs(survival - alpha ** np.arange(1, k + 1)), 4.0 * sem)
    assert abs(1.0 + survival.sum() - tokens_per_step(alpha, k)) < 4.0 * sem.sum()


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        # reference page, 4.4 [D]
        (1, [0.689516]),
        (3, [0.645554, 0.484732, 0.378193]),
        (7, [0.606552, 0.447290, 0.347514, 0.273229, 0.215386, 0.169884, 0.134012]),
    ],
)
def test_two_state_survival_depends_on_the_draft_length(k: int, expected: list[float]) -> None:
    draws = DrawnAcceptance(process=TwoStateTokens(parameters=BURSTY), seed=2)
    survival, sem = _survival(draws, k, 150, 1500)
    np.testing.assert_array_less(abs(survival - expected), 4.0 * sem)
    assert sem.max() < 0.004  # the three tables differ by 0.04 at the first position


@pytest.mark.parametrize(("to_hard", "to_easy"), [(0.15, 0.35), (0.9, 0.8), (0.0, 0.4), (1.0, 0.5), (0.5, 0.5)])
def test_two_state_path_equals_a_chain_token_by_token(to_hard: float, to_easy: float) -> None:
    parameters = TwoState(a_easy=1.0, a_hard=0.0, easy_to_hard=to_hard, hard_to_easy=to_easy)
    v = np.random.default_rng(4).random(2000)
    easy = v[0] < to_easy / (to_hard + to_easy)  # theory: stationary share of a two-state chain
    slow = [easy]
    for one in v[1:]:
        easy = bool(one >= to_hard) if easy else bool(one >= 1.0 - to_easy)
        slow.append(easy)
    np.testing.assert_array_equal(two_state_path(parameters, v), slow)


def test_beta_tokens_are_independent_and_decay_with_depth() -> None:
    # theory: independent tokens of mean m, P_j = prod_{i <= j} m r^(i - 1)
    draws = DrawnAcceptance(process=BetaTokens(mean=0.75, concentration=1.5), seed=6, depth_decay=0.9)
    survival, sem = _survival(draws, 4, 150, 1000)
    expected = np.cumprod(0.75 * 0.9 ** np.arange(4))
    np.testing.assert_array_less(abs(survival - expected), 4.0 * sem)


# Confidences


def test_confidences_are_calibrated() -> None:
    # definition: of the first drafts with a confidence in a bin, that share is accepted
    draws = DrawnAcceptance(process=BetaTokens(mean=0.6, concentration=2.0), seed=8)
    texts = [draws.text(number, 500, 1) for number in range(60)]
    confidence = np.array([[text.confidence(place, 0) for place in range(500)] for text in texts]).ravel()
    accepted = np.array([list(text.accepted) for text in texts], dtype=float).ravel()
    for low in np.arange(0.0, 1.0, 0.2):
        there = (confidence >= low) & (confidence < low + 0.2)
        sem = math.sqrt(0.25 / there.sum())
        assert abs(accepted[there].mean() - confidence[there].mean()) < 4.0 * sem
        assert sem < 0.01


def test_a_noisy_confidence_errs_on_the_logit() -> None:
    process = BetaTokens(mean=0.6, concentration=5.0)
    exact, noisy = (
        DrawnAcceptance(process=process, seed=8, depth_decay=0.9, confidence_noise=noise).text(3, 4000, 2)
        for noise in (0.0, 0.7)
    )
    assert exact.accepted == noisy.accepted  # the noise is the controller's, not the text's
    first = np.array([[one.confidence(place, 0) for place in range(4000)] for one in (exact, noisy)])
    error = np.diff(np.log(first / (1.0 - first)), axis=0)
    assert abs(error.mean()) < 4.0 * 0.7 / math.sqrt(4000)
    assert abs(error.std() - 0.7) < 4.0 * 0.7 / math.sqrt(2 * 4000)
    # definition: a second draft's confidence is r times its first one's
    assert noisy.confidence(7, 1) == pytest.approx(0.9 * noisy.confidence(7, 0), rel=1e-12)


def test_certain_tokens_stay_certain_under_noise() -> None:
    for alpha in (0.0, 1.0):
        text = DrawnAcceptance(process=AlikeTokens(alpha=alpha), seed=0, confidence_noise=1.0).text(0, 10, 2)
        assert text.confidence(4, 1) == alpha


# Logs


def test_a_log_by_hand() -> None:
    # hand, K = 2, rounds 2 0 1: right right (bonus, counts like the next token: wrong), wrong, right wrong. Places from
    # 1: R R W W R W R R W ...: rows of at most 3 from places 0 (the prompt's, right) to 5: 3 2 1 0 0 1
    text = RecordedAcceptance(logs=[[2, 0, 1]], draft_length=2).text(0, 6, 3)
    assert list(text.accepted) == [3, 2, 1, 0, 0, 1]
    # hand: 6 tokens of the log, 3 of them right; 8 places drafted from, in the order above R R W W R W R R
    assert text.confidence(2, 1) == pytest.approx(5.0 / 8.0, rel=1e-12)


@settings(max_examples=40)
@given(logs=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=3))
def test_a_log_replayed_at_its_own_length_gives_its_rounds_back(logs: list[list[int]]) -> None:
    draws = RecordedAcceptance(logs=logs, draft_length=4)
    for number in range(2 * len(logs)):
        log = logs[number % len(logs)]
        tokens = 1 + sum(log) + len(log)
        assert _walk(draws.text(number, 2 * tokens - 1, 4), 2 * tokens - 1, 4) == log + log


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlikeTokens(alpha=1.01), r"alpha must be in \[0, 1\], got 1.01"),
        (lambda: AlikeTokens(alpha=math.nan), r"alpha must be in \[0, 1\], got nan"),
        (lambda: BetaTokens(mean=1.0, concentration=1.0), "mean must be between 0 and 1, got 1.0"),
        (lambda: BetaTokens(mean=0.5, concentration=0.0), "concentration must be > 0 and finite, got 0.0"),
        (lambda: _drawn(seed=-1), r"seed must be >= 0 and below 2\^64, got -1"),
        (lambda: _drawn(depth_decay=0.0), r"depth_decay must be in \(0, 1\], got 0.0"),
        (lambda: _drawn(depth_decay=math.nan), r"depth_decay must be in \(0, 1\], got nan"),
        (lambda: _drawn(confidence_noise=math.inf), "confidence_noise must be >= 0 and finite, got inf"),
        (lambda: _drawn().text(0, 5, 256), "longest must be between 0 and 255, got 256"),
        (lambda: _recorded([[1]], 0), "draft_length must be between 1 and 255, got 0"),
        (lambda: _recorded([], 2), "logs must have at least one round for every request, got none"),
        (lambda: _recorded([[1], []], 2), "logs must have at least one round for every request, got none"),
        (lambda: _recorded([[1, 3]], 2), "logs must be integers between 0 and 2, got 3"),
        (lambda: _recorded([[1, math.nan]], 2), "logs must be integers between 0 and 2, got nan"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def _drawn(**change: Any) -> DrawnAcceptance:
    arguments: dict[str, Any] = {"process": AlikeTokens(alpha=0.5), "seed": 0}
    return DrawnAcceptance(**arguments | change)


def _recorded(logs: Sequence[Sequence[Any]], draft_length: int) -> RecordedAcceptance:
    return RecordedAcceptance(logs=logs, draft_length=draft_length)

"""Acceptance closed forms: published values, hand examples, exact recursions, Monte Carlo.

`reference` in a comment is the page reference/speculation, with the section; its figures were worked out apart from
this code.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from servecast.model.speculation import (
    TwoState,
    acceptance_variance,
    accepted_distribution,
    alpha_from_tokens_per_step,
    check_survival,
    conditional_from_survival,
    depth_decay_survival,
    mean_acceptance_length,
    mixture_tokens_per_step,
    operations_factor,
    optimal_gamma,
    request_tpot_quantile,
    steps_to_emit,
    survival_from_conditional,
    synthetic_survival,
    tokens_per_step,
    two_state_start,
    two_state_survival,
    two_state_tokens_per_step,
    walltime_speedup,
)

PROBABILITY = st.floats(0.0, 1.0)
CONDITIONALS = st.lists(PROBABILITY, min_size=1, max_size=8)
BURSTY = TwoState(a_easy=0.9, a_hard=0.3, easy_to_hard=0.15, hard_to_easy=0.35)
FIVE_DRAFTS = 0.7 ** np.arange(1, 6)
"""P of alpha 0.7 at five drafts."""

# reference 6.1: alpha, gamma, operations factor, speedup at c = c_hat = 0; Leviathan et al., table 1
LEVIATHAN = [
    (0.6, 2, 1.53, 1.96),
    (0.7, 3, 1.58, 2.53),
    (0.8, 2, 1.23, 2.44),
    (0.8, 5, 1.63, 3.69),
    (0.9, 2, 1.11, 2.71),
    (0.9, 10, 1.60, 6.86),
]
# reference 6.1: rows alpha, columns c
OPTIMAL_C = [0.01, 0.02, 0.05, 0.1, 0.2]
OPTIMAL = {
    0.5: [(5, 1.8750), (4, 1.7940), (3, 1.6304), (2, 1.4583), (1, 1.2500)],
    0.6: [(7, 2.2972), (6, 2.1697), (4, 1.9213), (3, 1.6738), (2, 1.4000)],
    0.7: [(9, 2.9717), (8, 2.7576), (6, 2.3529), (4, 1.9808), (3, 1.5831)],
    0.8: [(14, 4.2316), (11, 3.8167), (8, 3.0921), (6, 2.4696), (4, 1.8676)],
    0.9: [(24, 7.4856), (19, 6.3654), (13, 4.6741), (10, 3.4309), (7, 2.3731)],
}
# reference 6.1, formula column of the T5 rows: alpha, c, gamma, speedup
T5 = [
    (0.75, 0.02, 7, 3.157),
    (0.80, 0.04, 7, 3.251),
    (0.82, 0.11, 7, 2.497),
    (0.62, 0.02, 7, 2.258),
    (0.68, 0.04, 5, 2.347),
    (0.71, 0.11, 3, 1.934),
    (0.65, 0.02, 5, 2.402),
    (0.73, 0.04, 5, 2.619),
    (0.74, 0.11, 3, 2.025),
    (0.53, 0.02, 5, 1.891),
    (0.55, 0.04, 3, 1.803),
    (0.56, 0.11, 3, 1.541),
]
# reference 4.4: K, share easy, AL, P_1..P_K of BURSTY
TWO_STATE = [
    (1, 0.649194, 1.689516, [0.689516]),
    (2, 0.607533, 2.167459, [0.664520, 0.502939]),
    (3, 0.575923, 2.508478, [0.645554, 0.484732, 0.378193]),
    (4, 0.552317, 2.758344, [0.631390, 0.471135, 0.367052, 0.288766]),
    (5, 0.534600, 2.944904, [0.620760, 0.460929, 0.358690, 0.282117, 0.222409]),
    (7, 0.510920, 3.193868, [0.606552, 0.447290, 0.347514, 0.273229, 0.215386, 0.169884, 0.134012]),
]


# i.i.d. chain


@pytest.mark.parametrize(("alpha", "gamma", "operations", "speedup"), LEVIATHAN)
def test_published_operations_and_speedup(alpha: float, gamma: int, operations: float, speedup: float) -> None:
    np.testing.assert_allclose(operations_factor(alpha, gamma, 0.0), operations, rtol=0, atol=0.005)
    np.testing.assert_allclose(walltime_speedup(alpha, gamma, 0.0), speedup, rtol=0, atol=0.005)


@pytest.mark.parametrize(("alpha", "c", "gamma", "speedup"), T5)
def test_t5_speedups(alpha: float, c: float, gamma: int, speedup: float) -> None:
    np.testing.assert_allclose(walltime_speedup(alpha, gamma, c), speedup, rtol=0, atol=5e-4)


def test_optimal_lengths_table() -> None:
    alpha = np.array(list(OPTIMAL))[:, None]
    cells = np.array(list(OPTIMAL.values()))
    gamma = optimal_gamma(alpha, OPTIMAL_C)
    np.testing.assert_array_equal(gamma, cells[..., 0])
    np.testing.assert_allclose(walltime_speedup(alpha, gamma, OPTIMAL_C), cells[..., 1], rtol=0, atol=5e-5)


def test_operations_with_a_costly_draft_by_hand() -> None:
    # hand: gamma 2, c_hat 0.5: (0.5 x 2 + 3) (1 - 0.5) / (1 - 0.125) = 2 / 0.875
    np.testing.assert_allclose(operations_factor(0.5, 2, 0.5), 2.0 / 0.875, rtol=1e-14)


def test_tokens_per_step_at_the_ends() -> None:
    """Limits: no draft gives one token, alpha 0 one token, alpha 1 all of them."""
    np.testing.assert_allclose(tokens_per_step([0.0, 0.3, 1.0], 0), 1.0, rtol=1e-15)
    np.testing.assert_allclose(tokens_per_step(0.0, [1, 7]), 1.0, rtol=0)
    np.testing.assert_allclose(tokens_per_step(1.0, [1, 7]), [2.0, 8.0], rtol=0)


def test_tokens_per_step_near_one() -> None:
    # hand: with e = 1 - alpha, (1 - (1 - e)^8) / e = 8 - 28 e + O(e^2); e is what double precision leaves of 1e-9
    alpha = 1.0 - 1e-9
    np.testing.assert_allclose(tokens_per_step(alpha, 7), 8.0 - 28.0 * (1.0 - alpha), rtol=1e-15)


def test_real_draft_length_by_hand() -> None:
    # hand: (1 - 0.25^1.5) / 0.75 = 0.875 / 0.75
    np.testing.assert_allclose(tokens_per_step(0.25, 0.5), 0.875 / 0.75, rtol=1e-14)


@given(alpha=PROBABILITY, gamma=st.integers(0, 60))
def test_tokens_per_step_equals_the_sum(alpha: float, gamma: int) -> None:
    slow = sum(alpha**j for j in range(gamma + 1))
    np.testing.assert_allclose(tokens_per_step(alpha, gamma), slow, rtol=1e-12)


@given(alpha=st.floats(0.01, 0.98), step=st.floats(0.001, 0.02), gamma=st.floats(0.1, 40.0))
def test_tokens_per_step_grows(alpha: float, step: float, gamma: float) -> None:
    here = tokens_per_step(alpha, gamma)
    assert tokens_per_step(alpha + step, gamma) > here
    # alpha^gamma vanishes in double precision for small alpha
    assert tokens_per_step(alpha, gamma + 1.0) >= here


@given(alpha=PROBABILITY, gamma=st.floats(0.05, 60.0))
def test_alpha_comes_back(alpha: float, gamma: float) -> None:
    tokens = tokens_per_step(alpha, gamma)
    found = alpha_from_tokens_per_step(tokens, gamma)
    np.testing.assert_allclose(tokens_per_step(found, gamma), tokens, rtol=1e-13)
    if gamma >= 1.0:
        # slope of tokens in alpha is then at least 1 / 2, so alpha itself is determined
        np.testing.assert_allclose(found, alpha, rtol=0, atol=1e-12)


def test_alpha_at_the_ends_and_as_an_array() -> None:
    np.testing.assert_array_equal(alpha_from_tokens_per_step([1.0, 6.0], 5), [0.0, 1.0])
    # hand: 1 + a = 1.25; 1 + a + a^2 = 1.75 at a = 1/2
    np.testing.assert_allclose(alpha_from_tokens_per_step([1.25, 1.75], [1, 2]), [0.25, 0.5], rtol=1e-14)


def test_draft_acceptance_rate_is_not_alpha() -> None:
    # reference 4.1: alpha 0.8 at gamma 4 has accepted / drafted 0.590
    np.testing.assert_allclose((tokens_per_step(0.8, 4) - 1.0) / 4.0, 0.590, rtol=0, atol=5e-4)


@given(alpha=PROBABILITY, c=st.floats(0.005, 1.2))
def test_optimal_length_equals_enumeration(alpha: float, c: float) -> None:
    gamma = int(optimal_gamma(alpha, c))
    speedups = [sum(alpha**j for j in range(k + 1)) / (k * c + 1.0) for k in range(41)]
    np.testing.assert_allclose(speedups[gamma], max(speedups), rtol=1e-12)
    if alpha <= c:
        assert gamma == 0


def test_optimal_length_ties_and_limits() -> None:
    # hand: alpha 1/2, c 1/5: 1.5 / 1.2 = 1.75 / 1.4 = 1.25, the shorter wins; alpha = c never gains
    assert optimal_gamma(0.5, 0.2) == 1
    np.testing.assert_array_equal(optimal_gamma([0.3, 0.3, 0.0], [0.3, 0.31, 0.0]), 0)
    # a free draft of a sure token is never long enough
    np.testing.assert_array_equal(optimal_gamma(1.0, [0.0, 0.5], max_gamma=12), 12)


# Per position


def test_conditional_and_unconditional_rates() -> None:
    # reference 4.2
    survival, conditional = [0.9, 0.6, 0.3], [0.9, 2.0 / 3.0, 0.5]
    np.testing.assert_allclose(conditional_from_survival(survival), conditional, rtol=1e-14)
    np.testing.assert_allclose(survival_from_conditional(conditional), survival, rtol=1e-14)


def test_conditional_after_a_zero() -> None:
    # hand: nothing reaches positions 3 and 4
    np.testing.assert_array_equal(conditional_from_survival([0.5, 0.0, 0.0, 0.0]), [0.5, 0.0, 0.0, 0.0])


@given(CONDITIONALS)
def test_rates_come_back(conditional: list[float]) -> None:
    survival = survival_from_conditional(conditional)
    check_survival(survival)
    back = survival_from_conditional(conditional_from_survival(survival))
    np.testing.assert_allclose(back, survival, rtol=1e-12, atol=1e-300)


def test_moments_of_alpha_seven_tenths() -> None:
    # reference 4.2: alpha 0.7, five drafts
    np.testing.assert_allclose(mean_acceptance_length(FIVE_DRAFTS), 2.94117, rtol=0, atol=5e-6)
    np.testing.assert_allclose(acceptance_variance(FIVE_DRAFTS), 3.31019, rtol=0, atol=5e-6)


def test_law_of_accepted_tokens_by_hand() -> None:
    # hand: P = .9, .6, .3: P(N = 1..4) = .1, .3, .3, .3, mean 2.8, E[N^2] = .1 + 1.2 + 2.7 + 4.8 = 8.8, variance .96
    survival = [0.9, 0.6, 0.3]
    np.testing.assert_allclose(accepted_distribution(survival), [0.1, 0.3, 0.3, 0.3], rtol=1e-14)
    np.testing.assert_allclose(mean_acceptance_length(survival), 2.8, rtol=1e-14)
    np.testing.assert_allclose(acceptance_variance(survival), 0.96, rtol=1e-14)


def test_no_drafts_give_one_token() -> None:
    np.testing.assert_array_equal(accepted_distribution([]), [1.0])
    assert mean_acceptance_length([]) == 1.0
    assert acceptance_variance([]) == 0.0


@given(CONDITIONALS)
def test_law_agrees_with_its_moments(conditional: list[float]) -> None:
    survival = np.cumprod(conditional)
    law, tokens = accepted_distribution(survival), np.arange(1, len(conditional) + 2)
    np.testing.assert_allclose(law.sum(), 1.0, rtol=1e-14)
    np.testing.assert_allclose(law @ tokens, mean_acceptance_length(survival), rtol=1e-13)
    # Var[N] = sum (2 j - 1) P_j - (sum P_j)^2, the moment form of reference 4.2
    moments = ((2.0 * tokens[:-1] - 1.0) * survival).sum() - survival.sum() ** 2
    np.testing.assert_allclose(acceptance_variance(survival), moments, rtol=1e-9, atol=1e-12)


def test_rows_of_survivals_are_independent() -> None:
    rows = np.array([[0.9, 0.6, 0.3], [0.5, 0.5, 0.0]])
    for function in (conditional_from_survival, accepted_distribution, mean_acceptance_length, acceptance_variance):
        np.testing.assert_allclose(function(rows), [function(row) for row in rows], rtol=1e-14)


# Forms of the curve


def test_depth_decay_by_hand() -> None:
    # hand: rates .8, .76, .722; a curve that decays at once; no decay is the geometric chain
    expected = [[0.8, 0.608, 0.438976], [0.5, 0.0, 0.0]]
    np.testing.assert_allclose(depth_decay_survival([0.8, 0.5], [0.95, 0.0], 3), expected, rtol=1e-14)
    np.testing.assert_allclose(depth_decay_survival(0.7, 1.0, 5), FIVE_DRAFTS, rtol=1e-14)
    assert depth_decay_survival([0.7, 0.8], 0.9, 0).shape == (2, 0)


@given(a=st.floats(0.05, 1.0), r=st.floats(0.5, 0.99), gamma=st.integers(2, 10))
def test_depth_decay_lowers_the_mean(a: float, r: float, gamma: int) -> None:
    assert mean_acceptance_length(depth_decay_survival(a, r, gamma)) < tokens_per_step(a, gamma)


def test_mixture() -> None:
    # reference 4.4: w .3, .9, .2, K 5
    np.testing.assert_allclose(mixture_tokens_per_step(0.3, 0.9, 0.2, 5), 2.280621, rtol=0, atol=5e-7)
    np.testing.assert_allclose(mixture_tokens_per_step([1.0, 0.0], 0.9, 0.2, 5), tokens_per_step([0.9, 0.2], 5), rtol=0)


# Two states


@pytest.mark.parametrize(("gamma", "easy", "tokens", "survival"), TWO_STATE)
def test_two_state_vector(gamma: int, easy: float, tokens: float, survival: list[float]) -> None:
    np.testing.assert_allclose(two_state_start(BURSTY, gamma), easy, rtol=0, atol=5.1e-7)
    np.testing.assert_allclose(two_state_survival(BURSTY, gamma), survival, rtol=0, atol=5.1e-7)
    np.testing.assert_allclose(two_state_tokens_per_step(BURSTY, gamma), tokens, rtol=0, atol=5.1e-7)


def test_two_state_without_drafts_by_hand() -> None:
    # hand: one token per step and no choice of position: the chain's own long-run share, .35 / (.15 + .35)
    np.testing.assert_allclose(two_state_start(BURSTY, 0), 0.7, rtol=1e-14)
    assert two_state_tokens_per_step(BURSTY, 0) == 1.0
    assert two_state_survival(BURSTY, 0).shape == (0,)


def test_two_state_over_lengths_is_a_map() -> None:
    lengths = np.array([[7, 0, 3], [1, 2, 7]])
    each = [[1.0 + two_state_survival(BURSTY, int(one)).sum() for one in row] for row in lengths]
    np.testing.assert_allclose(two_state_tokens_per_step(BURSTY, lengths), each, rtol=1e-14)


@given(alpha=PROBABILITY, leave=st.floats(0.01, 0.99), back=st.floats(0.01, 0.99), gamma=st.integers(0, 12))
def test_equal_states_are_the_chain(alpha: float, leave: float, back: float, gamma: int) -> None:
    parameters = TwoState(a_easy=alpha, a_hard=alpha, easy_to_hard=leave, hard_to_easy=back)
    np.testing.assert_allclose(
        two_state_survival(parameters, gamma), alpha ** np.arange(1, gamma + 1), rtol=1e-9, atol=1e-300
    )


@given(
    easy=PROBABILITY,
    hard=PROBABILITY,
    leave=st.floats(0.0, 1.0),
    back=st.floats(0.01, 0.99),
    gamma=st.integers(1, 12),
)
def test_two_state_survival_is_one(easy: float, hard: float, leave: float, back: float, gamma: int) -> None:
    survival = two_state_survival(TwoState(a_easy=easy, a_hard=hard, easy_to_hard=leave, hard_to_easy=back), gamma)
    check_survival(survival)
    assert survival[0] <= max(easy, hard) * (1.0 + 1e-12)


@given(
    hard=st.floats(0.0, 0.5),
    gain=st.floats(0.05, 0.4),
    leave=st.floats(0.05, 0.45),
    back=st.floats(0.05, 0.45),
    gamma=st.integers(1, 10),
)
def test_longer_drafts_start_harder(hard: float, gain: float, leave: float, back: float, gamma: int) -> None:
    """Reference 4.3: where states persist, P_j falls as the draft grows, so P of a long run underestimates a short."""
    parameters = TwoState(a_easy=hard + gain, a_hard=hard, easy_to_hard=leave, hard_to_easy=back)
    short, long = two_state_survival(parameters, gamma), two_state_survival(parameters, gamma + 1)
    assert np.all(long[:-1] <= short * (1.0 + 1e-12))


@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_two_state_against_simulation(gamma: int) -> None:
    """Monte Carlo: hidden states walked token by token; means of independent texts within 4 standard errors."""
    accepted = _walk(BURSTY, gamma, texts=4000, rounds=80, rng=np.random.default_rng(1))
    reached = np.stack([(accepted >= j).mean(axis=0) for j in range(1, gamma + 1)])
    error = reached.std(axis=1) / np.sqrt(reached.shape[1])
    assert np.all(np.abs(reached.mean(axis=1) - two_state_survival(BURSTY, gamma)) < 4.0 * error)


def _walk(p: TwoState, gamma: int, *, texts: int, rounds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Accepted drafts, [rounds, texts], of a decoder whose every token is easy or hard."""
    easy = rng.random(texts) < 0.5
    accepted = np.zeros((rounds, texts), dtype=np.int64)
    warm_up = 30
    for number in range(-warm_up, rounds):
        live, count = np.ones(texts, dtype=bool), np.zeros(texts, dtype=np.int64)
        # gamma drafts and the bonus token's position; a text stops at its first rejection
        for position in range(gamma + 1):
            before = live.copy()
            if position < gamma:
                live &= rng.random(texts) < np.where(easy, p.a_easy, p.a_hard)
                count += live
            draw = rng.random(texts)
            after = np.where(easy, draw >= p.easy_to_hard, draw < p.hard_to_easy)
            # one more token was emitted by all that were alive: an accepted draft, the corrected token or the bonus
            easy = np.where(before, after, easy)
        if number >= 0:
            accepted[number] = count
    return accepted


# Forced acceptance


def test_forced_lengths() -> None:
    # reference 7.6
    np.testing.assert_allclose(synthetic_survival(3.4, 5), [1.0, 1.0, 0.4, 0.0, 0.0], rtol=1e-14)
    np.testing.assert_array_equal(synthetic_survival(5, 4), 1.0)
    np.testing.assert_array_equal(synthetic_survival(1.0, 3), 0.0)


@given(gamma=st.integers(1, 12), share=PROBABILITY)
def test_forced_length_keeps_its_mean(gamma: int, share: float) -> None:
    mean = 1.0 + gamma * share
    survival = synthetic_survival(mean, gamma)
    fraction = mean % 1.0
    np.testing.assert_allclose(mean_acceptance_length(survival), mean, rtol=1e-13)
    # reference 7.6: variance f (1 - f), the least a law on whole numbers with this mean can have
    np.testing.assert_allclose(acceptance_variance(survival), fraction * (1.0 - fraction), rtol=1e-9, atol=1e-12)


# Requests


def _renewal(law: NDArray[np.float64], tokens: int) -> tuple[list[float], list[float]]:
    """E[S] and sd[S] of the steps to emit 0..tokens tokens, by conditioning on the first step (exact)."""
    first, second = [0.0], [0.0]
    for m in range(1, tokens + 1):
        rest = [max(m - n, 0) for n in range(1, len(law) + 1)]
        mean = sum(p * first[k] for p, k in zip(law, rest, strict=True))
        first.append(1.0 + mean)
        second.append(1.0 + 2.0 * mean + sum(p * second[k] for p, k in zip(law, rest, strict=True)))
    return first, [float(np.sqrt(max(b - a * a, 0.0))) for a, b in zip(first, second, strict=True)]


def test_steps_of_the_reference() -> None:
    # reference 4.6: alpha .7, K 5, 256 tokens
    steps, deviation = steps_to_emit(256, 2.94117, 3.31019)
    np.testing.assert_allclose(steps, 87.5615, rtol=0, atol=3e-4)
    np.testing.assert_allclose(deviation, 5.77, rtol=0, atol=0.005)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("gamma", [3, 5, 7])
def test_steps_against_the_exact_renewal_sum(alpha: float, gamma: int) -> None:
    """Both are limits: the bounds are those the docstring states at 32 and 64 tokens."""
    survival = alpha ** np.arange(1, gamma + 1)
    first, deviation = (np.array(x) for x in _renewal(accepted_distribution(survival), 256))
    lengths = np.array([32, 64, 256])
    steps, spread = steps_to_emit(lengths, mean_acceptance_length(survival), acceptance_variance(survival))
    assert np.all(np.abs(steps / first[lengths] - 1.0) < [0.003, 1e-4, 1e-9])
    assert np.all(np.abs(spread / deviation[lengths] - 1.0) < [0.09, 0.035, 0.01])


def test_steps_of_one_token_each_by_hand() -> None:
    # hand: without drafts every step emits one token
    steps, deviation = steps_to_emit([1, 40], 1.0, 0.0)
    np.testing.assert_allclose(steps, [1.0, 40.0], rtol=1e-14)
    np.testing.assert_array_equal(deviation, 0.0)


def test_request_tpot_by_hand() -> None:
    # hand: 100 tokens, mean 2, variance 1: 50 + (1 + 4 - 2) / 8 = 50.375 steps, sd sqrt(100 / 8) = 3.535534
    expected = 0.02 * (50.375 + 2.0 * 3.5355339059) / 100.0
    np.testing.assert_allclose(request_tpot_quantile(0.02, 100, 2.0, 1.0, 2.0), expected, rtol=1e-9)


def test_request_tpot_against_simulation() -> None:
    """Monte Carlo of 20,000 requests of 256 tokens: a median and a p95 of whole steps, hence 1 %."""
    rng = np.random.default_rng(2)
    law = accepted_distribution(FIVE_DRAFTS)
    emitted = np.cumsum(rng.choice(np.arange(1, 7), size=(20_000, 160), p=law), axis=1)
    steps = 1 + (emitted < 256).sum(axis=1)
    assert emitted[:, -1].min() >= 256
    mean, variance = mean_acceptance_length(FIVE_DRAFTS), acceptance_variance(FIVE_DRAFTS)
    # reference 4.6: 87.56 simulated, 5.79 deviation
    assert abs(steps.mean() - 87.5615) < 4.0 * steps.std() / np.sqrt(steps.size)
    np.testing.assert_allclose(steps.std(), 5.79, rtol=0.02)
    predicted = request_tpot_quantile(0.02, 256, mean, variance, [0.0, 1.6448536])
    np.testing.assert_allclose(predicted, 0.02 / 256.0 * np.quantile(steps, [0.5, 0.95]), rtol=0.01)


@settings(max_examples=30)
@given(factor=st.floats(1e-3, 1e3), z=st.floats(-1.0, 3.0))
def test_tpot_scales_with_the_step(factor: float, z: float) -> None:
    one = request_tpot_quantile(0.01, 200, 2.5, 1.5, z)
    np.testing.assert_allclose(request_tpot_quantile(0.01 * factor, 200, 2.5, 1.5, z), factor * one, rtol=1e-13)


# Refusals

NAN = float("nan")
REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: tokens_per_step([0.5, 1.1], 3), r"alpha must be in \[0, 1\], got 1.1"),
    (lambda: tokens_per_step(NAN, 3), r"alpha must be in \[0, 1\], got nan"),
    (lambda: tokens_per_step(0.5, -1), r"gamma must be finite and >= 0, got -1"),
    (lambda: tokens_per_step(0.5, np.inf), r"gamma must be finite and >= 0, got inf"),
    (lambda: walltime_speedup(0.5, 2, -0.1), r"c must be finite and >= 0, got -0.1"),
    (lambda: operations_factor(0.5, 2, NAN), r"c_hat must be finite and >= 0, got nan"),
    (lambda: optimal_gamma(0.5, 0.1, max_gamma=-1), r"max_gamma must be a whole number >= 0, got -1"),
    (lambda: alpha_from_tokens_per_step(1.0, 0), r"gamma must be > 0, got 0"),
    (lambda: alpha_from_tokens_per_step([2.0, 7.0], 5), r"tokens must be in \[1, gamma \+ 1\], got 7.0 at gamma 5"),
    (lambda: alpha_from_tokens_per_step(0.9, 5), r"tokens must be in \[1, gamma \+ 1\], got 0.9 at gamma 5"),
    (lambda: alpha_from_tokens_per_step(NAN, 5), r"tokens must be in \[1, gamma \+ 1\], got nan"),
    (lambda: check_survival([0.5, 0.6]), r"survival must not increase, got 0.6 after 0.5 at position 2"),
    (lambda: check_survival([[0.5, 0.4], [1.2, 0.1]]), r"survival must be in \[0, 1\], got 1.2 at position 1"),
    (lambda: check_survival([0.5, NAN]), r"survival must be in \[0, 1\], got nan at position 2"),
    (lambda: check_survival(0.5), r"survival must have an axis of positions, got 0.5"),
    (lambda: mean_acceptance_length([0.5, 0.6]), "survival must not increase"),
    (lambda: survival_from_conditional([0.5, -0.1]), r"conditional acceptance must be in \[0, 1\], got -0.1"),
    (lambda: depth_decay_survival(0.5, 1.1, 3), r"r must be in \[0, 1\], got 1.1"),
    (lambda: depth_decay_survival(0.5, 0.9, -3), r"gamma must be a whole number >= 0, got -3"),
    (lambda: mixture_tokens_per_step(2.0, 0.5, 0.5, 3), r"w must be in \[0, 1\], got 2.0"),
    (lambda: two_state_tokens_per_step(BURSTY, [1, 2.5]), r"gammas must be a whole number >= 0, got 2.5"),
    (lambda: synthetic_survival(6.5, 5), r"mean_length must be in \[1, 6\], got 6.5"),
    (lambda: steps_to_emit(0, 2.0, 1.0), r"tokens must be finite and >= 1, got 0"),
    (lambda: steps_to_emit(9, 0.5, 1.0), r"mean must be finite and >= 1, got 0.5"),
    (lambda: steps_to_emit(9, 2.0, -1.0), r"variance must be finite and >= 0, got -1"),
    (lambda: request_tpot_quantile(-0.1, 9, 2.0, 1.0, 0.0), r"step_s must be finite and >= 0, got -0.1"),
    (lambda: request_tpot_quantile(0.1, 9, 2.0, 1.0, NAN), r"z must be finite, got nan"),
    (
        lambda: TwoState(a_easy=1.2, a_hard=0.3, easy_to_hard=0.1, hard_to_easy=0.1),
        r"a_easy must be in \[0, 1\], got 1.2",
    ),
    (
        lambda: TwoState(a_easy=0.9, a_hard=0.3, easy_to_hard=0.1, hard_to_easy=NAN),
        r"hard_to_easy must be in \[0, 1\], got nan",
    ),
    (
        lambda: TwoState(a_easy=0.9, a_hard=0.3, easy_to_hard=0.0, hard_to_easy=0.0),
        r"easy_to_hard \+ hard_to_easy must be between 0 and 2, got 0",
    ),
    (
        lambda: TwoState(a_easy=0.9, a_hard=0.3, easy_to_hard=1.0, hard_to_easy=1.0),
        r"easy_to_hard \+ hard_to_easy must be between 0 and 2, got 2",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

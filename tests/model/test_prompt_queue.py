"""Steps that serve prompts. Expected values: Monte Carlo of the recursion, scipy's gamma law, hand calculation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import gammaincc, ndtr

from servecast.model.prompt_queue import (
    PromptWork,
    ShiftedGamma,
    StepChain,
    first_step,
    gamma_and_wait_tail,
    gamma_tail,
    normal_tail,
    shifted_gamma,
    step_chain,
    token_pace,
    unit_gamma_tail,
)

Floats = NDArray[np.float64]
DECODE_S, RATE = 0.02, 5.0
PROMPTS, SHARES = np.array([0.03, 0.08, 0.2]), np.array([0.5, 0.3, 0.2])


def poisson(window_s: Floats) -> Floats:
    """Index of dispersion of Poisson arrivals."""
    return np.ones_like(window_s)


def work() -> PromptWork:
    m1, m2, m3 = (np.array([[float(SHARES @ PROMPTS**power)]]) for power in (1, 2, 3))
    return PromptWork(m1=m1, m2=m2, m3=m3)


def chain() -> StepChain:
    one = np.ones((1, 1))
    return step_chain(RATE * one, work(), DECODE_S * one, poisson)


@cache
def replay(count: int) -> tuple[Floats, Floats, Floats]:
    """Step lengths, each request's time to its first token less its own prompt, and requests served in each step."""
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(1.0 / RATE, count))
    prompts = rng.choice(PROMPTS, count, p=SHARES)
    waits, steps, counts = np.empty(count), [], []
    now, served = 0.0, 0
    while served < count:
        here = int(np.searchsorted(arrivals, now, side="right"))
        length = DECODE_S + float(prompts[served:here].sum())
        now += length
        steps.append(length)
        counts.append(here - served)
        waits[served:here] = now - arrivals[served:here] - prompts[served:here]
        served = here
    return np.array(steps), waits, np.array(counts)


def test_step_lengths_have_the_cumulants_of_the_recursion() -> None:
    """Monte Carlo, fixed seed, 200 000 requests: mean to 1 %, variance to 3 %, third cumulant to 10 %."""
    steps, _, _ = replay(200_000)
    found = chain()
    np.testing.assert_allclose(found.mean_s, steps.mean(), rtol=0.01)
    np.testing.assert_allclose(found.variance_s2, steps.var(), rtol=0.03)
    np.testing.assert_allclose(found.third_s3, ((steps - steps.mean()) ** 3).mean(), rtol=0.1)
    # hand: w1 = 5 (0.015 + 0.024 + 0.04) = 0.395, so a mean of 0.02 / 0.605
    np.testing.assert_allclose(found.mean_s, 0.02 / 0.605, rtol=1e-12)


def test_first_step_has_the_cumulants_of_what_a_request_waits() -> None:
    """Monte Carlo, the same replay: mean to 1 %, variance to 4 %, third cumulant to 15 %."""
    _, waits, _ = replay(200_000)
    mean, variance, third = first_step(chain(), poisson)
    np.testing.assert_allclose(mean, waits.mean(), rtol=0.01)
    np.testing.assert_allclose(variance, waits.var(), rtol=0.04)
    np.testing.assert_allclose(third, ((waits - waits.mean()) ** 3).mean(), rtol=0.15)


def in_blocks(values: Floats, count: int = 50) -> tuple[Floats, Floats]:
    """Mean, variance and third cumulant with their standard errors from blocks, since neighbours are correlated."""
    away = values - values.mean()
    powers = np.stack([values, away**2, away**3])
    length = values.size // count
    blocks = powers[:, : count * length].reshape(3, count, length).mean(axis=2)
    return powers.mean(axis=1), blocks.std(axis=1, ddof=1) / np.sqrt(count)


def test_cumulants_within_four_standard_errors() -> None:
    """Monte Carlo: all three of a step, and the first two of a request's wait, are exact with Poisson arrivals; the
    third of a wait takes a fourth cumulant from the gamma law and is tested to 15 % above."""
    steps, waits, _ = replay(200_000)
    found = chain()
    seen, sem = in_blocks(steps)
    theory = np.array([found.mean_s.item(), found.variance_s2.item(), found.third_s3.item()])
    assert np.all(np.abs(theory - seen) < 4.0 * sem)
    seen, sem = in_blocks(waits)
    theory = np.array([one.item() for one in first_step(found, poisson)[:2]])
    assert np.all(np.abs(theory - seen[:2]) < 4.0 * sem[:2])


@pytest.mark.parametrize("tokens", [20, 200])
def test_pace_of_a_request_over_its_steps(tokens: int) -> None:
    """Monte Carlo: of every request, the mean of the `tokens` steps after its own; p50 to 5 %, p95 to 8 %."""
    steps, _, counts = replay(200_000)
    means = np.convolve(steps, np.ones(tokens), mode="valid")[1:] / tokens
    paces = np.repeat(means, counts[: len(means)])
    law = token_pace(chain(), poisson, np.array([float(tokens)]), np.zeros((1, 1)), 0.0)
    grid = np.linspace(DECODE_S, 6.0 * DECODE_S, 20_001)
    tails = np.array([gamma_tail(law, np.full((1, 1, 1), at))[0, 0, 0] for at in grid[::20]])
    for p, tolerance in ((0.5, 0.05), (0.95, 0.08)):
        at = grid[::20][int(np.argmax(tails <= 1.0 - p))]
        np.testing.assert_allclose(at, np.quantile(paces, p), rtol=tolerance)


def test_gamma_tail_against_scipy() -> None:
    """Independent: scipy.special.gammaincc; the docstring states 4e-3."""
    shape, x = np.meshgrid(np.geomspace(0.02, 60.0, 120), np.linspace(0.0, 90.0, 400), indexing="ij")
    np.testing.assert_allclose(unit_gamma_tail(shape, x), gammaincc(shape, x), rtol=0.0, atol=4e-3)


def test_normal_tail_against_scipy() -> None:
    """Independent: scipy.special.ndtr; Abramowitz and Stegun state 7.5e-8."""
    x = np.linspace(-9.0, 9.0, 2001)
    np.testing.assert_allclose(normal_tail(x), ndtr(-x), rtol=0.0, atol=8e-8)


def test_shifted_gamma_keeps_its_cumulants() -> None:
    """Hand: mean shift + k s, variance k s^2, third cumulant 2 k s^3; below `least` two moments are kept."""
    law = shifted_gamma(0.5, 0.04, 0.01, least=0.0)
    np.testing.assert_allclose(law.shift + law.shape * law.scale, 0.5, rtol=1e-12)
    np.testing.assert_allclose(law.shape * law.scale**2, 0.04, rtol=1e-12)
    np.testing.assert_allclose(2.0 * law.shape * law.scale**3, 0.01, rtol=1e-12)
    held = shifted_gamma(0.5, 0.04, 0.001, least=0.2)
    np.testing.assert_allclose([held.shift, held.shape * held.scale], [0.2, 0.3], rtol=1e-12)
    np.testing.assert_allclose(held.shape * held.scale**2, 0.04, rtol=1e-12)


@pytest.mark.parametrize(("p", "decay"), [(0.3, 2.0), (0.02, 0.3), (1.0, 1.0)])
def test_a_step_and_a_wait_together(p: float, decay: float) -> None:
    """Monte Carlo, fixed seed: gamma plus a wait that is 0 or exponential; within 6e-3."""
    rng, n = np.random.default_rng(11), 400_000
    total = 0.1 + rng.gamma(2.0, 0.05, n) + np.where(rng.random(n) < p, rng.exponential(1.0 / decay, n), 0.0)
    law = ShiftedGamma(shift=np.array([0.1]), shape=np.array([2.0]), scale=np.array([0.05]), atom=np.array([0.0]))
    for t in (0.15, 0.3, 1.0, 3.0):
        found = gamma_and_wait_tail(law, np.array([t]), np.array([p]), np.array([decay]))
        np.testing.assert_allclose(found, (total > t).mean(), rtol=0.0, atol=6e-3)


@pytest.mark.parametrize("k", [1e-3, 40.0])
def test_seconds_scale_out(k: float) -> None:
    """Homogeneity: steps, prompts and gaps k times as long scale cumulants by k, k^2 and k^3."""
    one = np.ones((1, 1))
    slow = PromptWork(m1=work().m1 * k, m2=work().m2 * k**2, m3=work().m3 * k**3)
    found = step_chain(RATE / k * one, slow, DECODE_S * k * one, poisson)
    for power, (mine, theirs) in enumerate(
        zip(first_step(found, poisson), first_step(chain(), poisson), strict=True), start=1
    ):
        np.testing.assert_allclose(mine, theirs * k**power, rtol=1e-9)


def test_without_prompts_every_step_is_a_decode() -> None:
    """Limit: as arrivals vanish a step is D, its spread is nothing beside it, and a first token waits for the rest of
    one step and the whole of the next, 3 D / 2 on average with the variance of a uniform law, D^2 / 12."""
    one = np.ones((1, 1))
    alone = step_chain(1e-9 * one, work(), DECODE_S * one, poisson)
    np.testing.assert_allclose(alone.mean_s, DECODE_S, rtol=1e-8)
    assert float(alone.variance_s2.item()) < 1e-6 * DECODE_S**2
    mean, variance, _ = first_step(alone, poisson)
    np.testing.assert_allclose(mean, 1.5 * DECODE_S, rtol=1e-6)
    np.testing.assert_allclose(variance, DECODE_S**2 / 12.0, rtol=1e-4)
    law = token_pace(alone, poisson, np.array([50.0]), np.zeros((1, 1)), 0.0)
    np.testing.assert_allclose(law.atom, 1.0, rtol=1e-6)


def test_a_vector_is_a_map_of_scalars() -> None:
    """Rates 1, 3 and 8 per second together and one by one."""
    rates, tokens = np.array([[1.0], [3.0], [8.0]]), np.array([5.0, 100.0])

    def cumulants(rate: Floats) -> list[Floats]:
        one = np.ones_like(rate)
        moments = PromptWork(m1=work().m1 * one, m2=work().m2 * one, m3=work().m3 * one)
        found = step_chain(rate, moments, DECODE_S * one, poisson)
        pace = token_pace(found, poisson, tokens, 0.001 * one, 0.7)
        tail = gamma_tail(pace, np.full(pace.shift.shape, 0.03))
        return [found.mean_s, found.variance_s2, found.third_s3, *first_step(found, poisson), pace.shift, tail]

    together = cumulants(rates)
    for number in range(3):
        for mine, alone in zip(together, cumulants(rates[number : number + 1]), strict=True):
            np.testing.assert_allclose(mine[number : number + 1], alone, rtol=1e-12)

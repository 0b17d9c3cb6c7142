"""The fluid of a short run: hand examples, and the reference simulator where the two must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from servecast.model.batch_steps import Chunk
from servecast.model.transient import apart, transient
from servecast.model.workload import Trace
from servecast.validation.simulator import EngineLimits, simulate

ONE_SECOND = [1.0, 1.0, 1.0, 1.0]


def test_one_request_by_hand() -> None:
    # hand: the prompt takes 2 s and gives the first token; four more at 1 s each
    first, last = transient([3.0], [5], apart([2.0], ONE_SECOND), ONE_SECOND, 4)
    np.testing.assert_allclose([first[0], last[0]], [5.0, 9.0], rtol=1e-12)


def test_one_token_by_hand() -> None:
    first, last = transient([0.0], [1], apart([2.0], ONE_SECOND), ONE_SECOND, 4)
    np.testing.assert_allclose([first[0], last[0]], [2.0, 2.0], rtol=1e-12)


def test_two_requests_at_once_by_hand() -> None:
    # hand: both prompts in one step until 4 s; both lack four tokens at 1.5 s a step, 10 s
    first, last = transient([0.0, 0.0], [5, 5], apart([2.0, 2.0], [1.0, 1.5]), [1.0, 1.5], 2)
    np.testing.assert_allclose(first, [4.0, 4.0], rtol=1e-12)
    np.testing.assert_allclose(last, [10.0, 10.0], rtol=1e-12)


def test_a_prompt_is_cut_where_the_step_is_full_by_hand() -> None:
    # hand: A's 10 tokens and 9 of B's 10 in one step of 2 + 1.8 s until 3.8 s; B's last beside A's second token, 0.2 +
    # 1 s, until 5 s. A lacks three, B four tokens: both decode at 1.5 s a step, A until 9.5 s, B's last alone, 10.5 s
    admission = apart([2.0, 2.0], [1.0, 1.5], n_in=[10, 10])
    first, last = transient([0.0, 0.0], [5, 5], admission, [1.0, 1.5], 2, n_in=[10, 10], step_tokens=19)
    np.testing.assert_allclose(first, [3.8, 5.0], rtol=1e-12)
    np.testing.assert_allclose(last, [9.5, 10.5], rtol=1e-12)


def test_who_comes_during_a_step_shares_the_next_one_by_hand() -> None:
    # hand: A alone until 2 s; B and C come at 1 s and 1.5 s, share a step of 2 + 2 s and A's second token at 1 s: 7 s
    first, _ = transient([0.0, 1.0, 1.5], [9, 2, 2], apart([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]), [1.0, 1.0, 1.0], 3)
    np.testing.assert_allclose(first, [2.0, 7.0, 7.0], rtol=1e-12)


def test_prompts_that_share_a_kernel_by_hand() -> None:
    # hand: a step of both prompts takes 5 s, one alone 2 s; they come together, then one more token each at 1.5 s
    together = {(0, 1): 5.0, (0,): 2.0, (1,): 2.0}
    first, last = transient(
        [0.0, 0.0], [2, 2], lambda pieces, _: together[tuple(one for one, _, _ in pieces)], [1.0, 1.5], 2
    )
    np.testing.assert_allclose(first, [5.0, 5.0], rtol=1e-12)
    np.testing.assert_allclose(last, [6.5, 6.5], rtol=1e-12)


def test_three_requests_for_one_place_by_hand() -> None:
    # hand: each takes 2 + 2 s alone; they follow each other
    first, last = transient([0.0, 0.0, 1.0], [3, 3, 3], apart([2.0, 2.0, 2.0], ONE_SECOND), ONE_SECOND, 1)
    np.testing.assert_allclose(first, [2.0, 6.0, 10.0], rtol=1e-12)
    np.testing.assert_allclose(last, [4.0, 8.0, 12.0], rtol=1e-12)


@dataclass(frozen=True, slots=True)
class _Steps:
    """Half a second plus a quarter per sequence; a prompt a tenth per token."""

    first_token_s: float = 0.0

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:  # noqa: ARG002 (the protocol's)
        return 0.5 + 0.25 * batch, 0.0, 1 << 40

    def mixed(self, chunks: Sequence[Chunk], finishing: int, batch: int, cached: int) -> float:  # noqa: ARG002 (the protocol's)
        return (self.decode(batch, cached)[0] if batch else 0.0) + sum(0.1 * (end - start) for start, end in chunks)


LIMITS = EngineLimits(max_num_seqs=8, max_num_batched_tokens=1000, kv_tokens=1e6, enable_prefix_caching=False)


def _pace(cap: int) -> list[float]:
    return [0.5 + 0.25 * batch for batch in range(1, cap + 1)]


def test_equals_the_simulator_one_at_a_time() -> None:
    t_s, n_in, n_out = np.array([0.0, 100.0, 200.0]), np.array([10, 20, 30]), np.array([5, 1, 9])
    rows = simulate(Trace(name="apart", t_s=t_s, n_in=n_in, n_out=n_out), _Steps(), LIMITS)
    first, last = transient(t_s, n_out, apart(0.1 * n_in, _pace(8)), _pace(8), 8)
    np.testing.assert_allclose(first, rows.first_token_s, rtol=1e-12)
    np.testing.assert_allclose(last, rows.last_token_s, rtol=1e-12)


def test_follows_the_simulator_through_a_burst() -> None:
    """300 requests within a minute for 8 places: hours of backlog. A fluid has no steps: 3 % of the means."""
    rng = np.random.default_rng(0)
    t_s = np.sort(rng.uniform(0.0, 60.0, 300))
    n_in, n_out = rng.integers(1, 40, 300), rng.integers(20, 200, 300)
    rows = simulate(Trace(name="burst", t_s=t_s, n_in=n_in, n_out=n_out), _Steps(), LIMITS)
    first, last = transient(t_s, n_out, apart(0.1 * n_in, _pace(8)), _pace(8), 8)
    np.testing.assert_allclose((first - t_s).mean(), (rows.first_token_s - t_s).mean(), rtol=0.03)
    np.testing.assert_allclose(last.max(), rows.last_token_s.max(), rtol=0.03)
    tpot, theirs = (last - first) / (n_out - 1), (rows.last_token_s - rows.first_token_s) / (n_out - 1)
    np.testing.assert_allclose(tpot.mean(), theirs.mean(), rtol=0.03)


def test_time_scales() -> None:
    rng = np.random.default_rng(1)
    t_s, n_out, prompts = np.sort(rng.uniform(0.0, 60.0, 50)), rng.integers(1, 50, 50), rng.uniform(0.1, 2.0, 50)
    pace = np.array(_pace(4))
    first, last = transient(t_s, n_out, apart(prompts, pace), pace, 4)
    later, latest = transient(4.0 * t_s, n_out, apart(4.0 * prompts, 4.0 * pace), 4.0 * pace, 4)
    np.testing.assert_allclose(later, 4.0 * first, rtol=1e-12)
    np.testing.assert_allclose(latest, 4.0 * last, rtol=1e-12)
    assert (first > t_s).all()
    assert (last >= first).all()


@pytest.mark.parametrize("cap", [0, 5])
def test_places_need_a_pace(cap: int) -> None:
    with pytest.raises(ValueError, match=f"cap must be from 1 to 4, got {cap}"):
        transient([0.0], [1], apart([1.0], ONE_SECOND), ONE_SECOND, cap)

"""The event-driven simulator: against a plain step-by-step one, hand examples, and what must hold of any run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from analytic_steps import AnalyticSteps
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from plain_simulator import plain_simulate

from servecast.model.batch_steps import StepTimes, TabulatedSteps
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.validation.simulator import EngineLimits, Router, simulate

STEPS = AnalyticSteps(
    step_s=0.01, sequence_s=2e-4, cached_s=1e-7, prompt_s=0.004, token_s=5e-5, square_s=1e-9, first_token_s=0.003
)
_CONTEXTS = np.array([1.0, 100.0, 200.0, 400.0, 4000.0])
_LENGTHS = np.array([1.0, 50.0, 500.0, 5000.0])
KNOTTED = TabulatedSteps(
    # bends at every knot: a jump over several steps that passed one would show
    decode_s=0.01 + 1e-4 * np.arange(1.0, 65.0)[:, np.newaxis] * (1.0 + _CONTEXTS / 100.0 + (_CONTEXTS / 300.0) ** 2),
    contexts=_CONTEXTS,
    prefill_s=0.003 + 4e-5 * _LENGTHS,
    lengths=_LENGTHS,
    first_token_s=0.001,
)
AMPLE = EngineLimits(max_num_seqs=64, max_num_batched_tokens=8192, kv_tokens=1e6, enable_prefix_caching=False)
TIGHT = EngineLimits(max_num_seqs=64, max_num_batched_tokens=8192, kv_tokens=1600, enable_prefix_caching=False)
CHUNKED = EngineLimits(max_num_seqs=16, max_num_batched_tokens=64, kv_tokens=1e6, enable_prefix_caching=False)
CHUNKED_TIGHT = EngineLimits(
    max_num_seqs=12, max_num_batched_tokens=48, kv_tokens=900, block_size=4, enable_prefix_caching=False
)
NARROW = EngineLimits(max_num_seqs=3, max_num_batched_tokens=8192, kv_tokens=1e6, enable_prefix_caching=False)


def _random_trace(seed: int, count: int, rate_rps: float, n_in: int, n_out: int) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(
        name="random",
        t_s=np.cumsum(rng.exponential(1.0 / rate_rps, count)),
        n_in=rng.integers(1, 2 * n_in, count),
        n_out=1 + rng.geometric(1.0 / n_out, count) % (4 * n_out),
    )


def _trace(t_s: list[float], n_in: list[int], n_out: list[int]) -> Trace:
    return Trace(name="hand", t_s=np.array(t_s), n_in=np.array(n_in), n_out=np.array(n_out))


def _assert_equal_to_plain(
    trace: Trace,
    steps: StepTimes,
    limits: EngineLimits,
    *,
    replicas: int = 1,
    router: Router = "round_robin",
    seed: int = 0,
) -> RequestRows:
    rows = simulate(trace, steps, limits, replicas=replicas, router=router, seed=seed)
    if router == "least_loaded":
        targets: list[int] | str = "least_loaded"
    elif router == "round_robin":
        targets = [number % replicas for number in range(len(trace.t_s))]
    else:
        targets = rows.replica.tolist()
    requests, engines = plain_simulate(trace, steps, limits, targets, replicas)
    for ours, theirs in (
        (rows.scheduled_s, [one.scheduled_s for one in requests]),
        (rows.first_token_s, [one.first_s for one in requests]),
        (rows.last_token_s, [one.last_s for one in requests]),
    ):
        np.testing.assert_allclose(ours - trace.t_s, np.array(theirs) - trace.t_s, rtol=0.005, atol=1e-9)
    np.testing.assert_array_equal(rows.preemptions, [one.preemptions for one in requests])
    assert max(engine.most_blocks for engine in engines) <= limits.blocks
    return rows


@pytest.mark.parametrize("steps", [STEPS, KNOTTED], ids=["line", "knots"])
@pytest.mark.parametrize(
    ("limits", "rate_rps", "n_in", "n_out", "preempts"),
    [
        (AMPLE, 20.0, 200, 30, False),
        (TIGHT, 20.0, 60, 60, True),
        (CHUNKED, 20.0, 150, 15, False),
        (CHUNKED_TIGHT, 10.0, 60, 60, True),
        (NARROW, 5.0, 100, 20, False),
    ],
    ids=["ample", "tight", "chunked", "chunked_tight", "narrow"],
)
def test_equals_a_step_by_step_walk(
    steps: StepTimes, limits: EngineLimits, rate_rps: float, n_in: int, n_out: int, preempts: bool
) -> None:
    for seed in range(3):
        rows = _assert_equal_to_plain(_random_trace(seed, 150, rate_rps, n_in, n_out), steps, limits)
        assert (rows.preemptions.sum() > 0) == preempts  # the case is the one it says it is


@pytest.mark.parametrize("router", ["round_robin", "least_loaded", "random"])
def test_equals_a_step_by_step_walk_on_several_replicas(router: Router) -> None:
    trace = _random_trace(7, 200, 60.0, 60, 60)
    rows = _assert_equal_to_plain(trace, STEPS, TIGHT, replicas=3, router=router, seed=5)
    assert set(rows.replica.tolist()) == {0, 1, 2}
    assert rows.preemptions.sum() > 0


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    seqs=st.integers(1, 12),
    budget=st.integers(0, 200),
    block_size=st.sampled_from([1, 3, 16]),
    spare_tokens=st.integers(0, 400),
    rate_rps=st.floats(0.5, 200.0),
)
def test_equals_a_step_by_step_walk_on_any_engine(
    seed: int, seqs: int, budget: int, block_size: int, spare_tokens: int, rate_rps: float
) -> None:
    trace = _random_trace(seed, 40, rate_rps, 30, 12)
    longest = int((trace.n_in + trace.n_out).max()) + block_size
    limits = EngineLimits(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        kv_tokens=longest + spare_tokens,
        block_size=block_size,
        enable_prefix_caching=False,
    )
    _assert_equal_to_plain(trace, STEPS, limits)


# What must hold of any run


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1), caching=st.booleans(), replicas=st.integers(1, 3), rate_rps=st.floats(1.0, 100.0)
)
def test_every_request_is_served_once_and_in_order(seed: int, caching: bool, replicas: int, rate_rps: float) -> None:
    trace = _random_trace(seed, 60, rate_rps, 60, 40)
    limits = EngineLimits(
        max_num_seqs=32, max_num_batched_tokens=256, kv_tokens=900, block_size=8, enable_prefix_caching=caching
    )
    rows = simulate(trace, STEPS, limits, replicas=replicas, router="least_loaded")
    served = ~rows.refused
    np.testing.assert_array_equal(rows.refused, trace.n_in + trace.n_out - 1 > 896)  # hand: 112 blocks of 8
    assert np.isfinite(rows.last_token_s[served]).all()
    assert (rows.scheduled_s[served] >= trace.t_s[served]).all()
    assert (rows.first_token_s[served] > rows.scheduled_s[served]).all()
    one = rows.n_out == 1
    assert (rows.last_token_s[served & ~one] > rows.first_token_s[served & ~one]).all()
    np.testing.assert_array_equal(rows.last_token_s[served & one], rows.first_token_s[served & one])
    # first come first served: nobody is scheduled before an earlier request of the same replica
    for replica in range(replicas):
        assert (np.diff(rows.scheduled_s[served & (rows.replica == replica)]) >= 0.0).all()


def test_the_same_seed_gives_the_same_rows() -> None:
    trace = _random_trace(1, 100, 20.0, 60, 60)
    first, again = (simulate(trace, STEPS, TIGHT, replicas=2, router="random", seed=3) for _ in range(2))
    other = simulate(trace, STEPS, TIGHT, replicas=2, router="random", seed=4)
    np.testing.assert_array_equal(first.last_token_s, again.last_token_s)
    np.testing.assert_array_equal(first.replica, again.replica)
    assert (first.replica != other.replica).any()


def test_time_scales() -> None:
    """Arrivals and step times k times as long: every stamp is, and nothing else changes."""
    trace = _random_trace(2, 150, 20.0, 60, 60)
    k = 8.0  # a power of two, so that rounding scales too
    longer = AnalyticSteps(
        step_s=k * STEPS.step_s,
        sequence_s=k * STEPS.sequence_s,
        cached_s=k * STEPS.cached_s,
        prompt_s=k * STEPS.prompt_s,
        token_s=k * STEPS.token_s,
        square_s=k * STEPS.square_s,
        first_token_s=k * STEPS.first_token_s,
    )
    slow = Trace(name="slow", t_s=k * trace.t_s, n_in=trace.n_in, n_out=trace.n_out)
    rows, slower = simulate(trace, STEPS, TIGHT), simulate(slow, longer, TIGHT)
    for name in ("scheduled_s", "first_token_s", "last_token_s"):
        np.testing.assert_allclose(getattr(slower, name), k * getattr(rows, name), rtol=1e-12)
    np.testing.assert_array_equal(slower.preemptions, rows.preemptions)


def test_relabelled_prefix_ids_change_nothing() -> None:
    rng = np.random.default_rng(3)
    count = 80
    n_in = rng.integers(1, 5, count) * 16 + rng.integers(1, 16, count)
    ids = tuple(tuple(int(rng.integers(4)) + 4 * depth for depth in range(n // 16)) for n in n_in)
    rename = rng.permutation(100)
    renamed = tuple(tuple(int(rename[one]) for one in of) for of in ids)
    limits = EngineLimits(max_num_seqs=8, max_num_batched_tokens=64, kv_tokens=480)
    rows = []
    for prefixes in (ids, renamed):
        trace = Trace(
            name="prefixes",
            t_s=np.cumsum(np.full(count, 0.02)),
            n_in=n_in,
            n_out=np.full(count, 30),
            prefix_blocks=prefixes,
            block_tokens=16,
        )
        rows.append(simulate(trace, STEPS, limits))
    assert rows[0].cached_tokens.sum() > 0
    np.testing.assert_array_equal(rows[0].last_token_s, rows[1].last_token_s)
    np.testing.assert_array_equal(rows[0].cached_tokens, rows[1].cached_tokens)


def test_relabelled_replicas_serve_alike() -> None:
    """Round robin over two replicas: each serves every second request, as one alone would serve those."""
    trace = _random_trace(4, 100, 30.0, 60, 60)
    both = simulate(trace, STEPS, TIGHT, replicas=2)
    for replica in range(2):
        half = Trace(name="half", t_s=trace.t_s[replica::2], n_in=trace.n_in[replica::2], n_out=trace.n_out[replica::2])
        np.testing.assert_array_equal(both.last_token_s[replica::2], simulate(half, STEPS, TIGHT).last_token_s)


# Hand examples


def _hand_limits(kv_tokens: int = 1000, *, caching: bool = False, budget: int = 100) -> EngineLimits:
    return EngineLimits(
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        kv_tokens=kv_tokens,
        block_size=4,
        enable_prefix_caching=caching,
    )


WHOLE_SECONDS = AnalyticSteps(step_s=1.0, token_s=0.5)


def test_two_requests_by_hand() -> None:
    # hand: A prefills 4 tokens, 0 to 2 s; step 2 decodes it, 3 s. B (at 2.5 s) is seen at 3 s: its 2 tokens beside A
    # take 1 + 1 = 2 s, until 5 s, A's last; B decodes alone, 6 s.
    rows = simulate(_trace([0.0, 2.5], [4, 2], [3, 2]), WHOLE_SECONDS, _hand_limits())
    np.testing.assert_allclose(rows.scheduled_s, [0.0, 3.0], rtol=1e-12)
    np.testing.assert_allclose(rows.first_token_s, [2.0, 5.0], rtol=1e-12)
    np.testing.assert_allclose(rows.last_token_s, [5.0, 6.0], rtol=1e-12)


def test_a_chunked_prompt_by_hand() -> None:
    # hand: 10 tokens in chunks of 4, 4 and 2: 2 + 2 + 1 = 5 s; then two decode steps
    rows = simulate(_trace([0.0], [10], [3]), WHOLE_SECONDS, _hand_limits(budget=4))
    np.testing.assert_allclose([rows.first_token_s[0], rows.last_token_s[0]], [5.0, 7.0], rtol=1e-12)


def test_a_preemption_by_hand() -> None:
    # hand: 3 blocks of 4. Both prompts of 4 take one step of 4 s. Their second tokens need a block each and one is
    # free: B, the last, loses its place. A decodes 4 steps (8 cached, 2 blocks, as its last token is never fed back)
    # and B needs ceil(5 / 4) = 2 blocks: not before A has ended at 8 s. B computes 5 tokens again (2.5 s), which gives
    # its second token at 10.5 s, and its third at 11.5 s.
    rows = simulate(_trace([0.0, 0.0], [4, 4], [5, 3]), WHOLE_SECONDS, _hand_limits(12))
    np.testing.assert_array_equal(rows.preemptions, [0, 1])
    np.testing.assert_allclose(rows.first_token_s, [4.0, 4.0], rtol=1e-12)
    np.testing.assert_allclose(rows.last_token_s, [8.0, 11.5], rtol=1e-12)


def test_a_request_longer_than_the_cache_is_marked() -> None:
    # hand: 3 blocks hold 12 tokens; 10 + 4 - 1 = 13 do not fit, 10 + 3 - 1 = 12 do
    rows = simulate(_trace([0.0, 0.5, 0.7], [10, 10, 2], [4, 3, 1]), WHOLE_SECONDS, _hand_limits(12), replicas=2)
    np.testing.assert_array_equal(rows.refused, [True, False, False])
    np.testing.assert_array_equal(rows.replica, [-1, 0, 1])  # a refused request takes no turn of the router
    assert math.isnan(rows.first_token_s[0])
    assert math.isnan(rows.last_token_s[0])
    np.testing.assert_allclose(rows.first_token_s[1:], [5.5, 1.7], rtol=1e-12)


def _prefixed(t_s: list[float], n_in: list[int], n_out: list[int], ids: list[tuple[int, ...]]) -> Trace:
    return Trace(
        name="hand",
        t_s=np.array(t_s),
        n_in=np.array(n_in),
        n_out=np.array(n_out),
        prefix_blocks=tuple(ids),
        block_tokens=4,
    )


def test_a_repeated_prompt_is_computed_once() -> None:
    # hand: 10 tokens, 5 s. The second time 2 whole blocks are found and 2 tokens computed, 1 s; the third request
    # shares the first block only and computes 6, 3 s. Without caching each takes 5 s.
    trace = _prefixed([0.0, 10.0, 20.0], [10, 10, 10], [1, 1, 1], [(1, 2), (1, 2), (1, 3)])
    rows = simulate(trace, WHOLE_SECONDS, _hand_limits(caching=True))
    np.testing.assert_array_equal(rows.cached_tokens, [0, 8, 4])
    np.testing.assert_allclose(rows.first_token_s - trace.t_s, [5.0, 1.0, 3.0], rtol=1e-12)
    without = simulate(trace, WHOLE_SECONDS, _hand_limits())
    np.testing.assert_array_equal(without.cached_tokens, [0, 0, 0])
    np.testing.assert_allclose(without.first_token_s - trace.t_s, [5.0, 5.0, 5.0], rtol=1e-12)


def test_a_prompt_found_whole_computes_its_last_block() -> None:
    # vLLM: the last token is always computed, and hits are whole blocks: 4 of 8 tokens, 2 s
    trace = _prefixed([0.0, 10.0], [8, 8], [1, 1], [(1, 2), (1, 2)])
    rows = simulate(trace, WHOLE_SECONDS, _hand_limits(caching=True))
    np.testing.assert_array_equal(rows.cached_tokens, [0, 4])
    np.testing.assert_allclose(rows.first_token_s, [4.0, 12.0], rtol=1e-12)


def test_attention_replicas_in_lockstep_by_hand() -> None:
    # hand: A (4 tokens) goes to rank 0, B (8 tokens, same time) to rank 1: the step lasts as long as B's prompt, 4 s.
    # Then both decode, 1 s a step, until C (at 4.5 s, 6 tokens) is seen at 5 s; A and B have two tokens each. Rank 0
    # and 1 run one each, so that C goes to rank 0 and its step of 1 + 3 s is everybody's: 9 s. A ends there.
    trace = _trace([0.0, 0.0, 4.5], [4, 8, 6], [3, 4, 2])
    rows = simulate(trace, WHOLE_SECONDS, _hand_limits(), data_parallel=2)
    np.testing.assert_allclose(rows.first_token_s, [4.0, 4.0, 9.0], rtol=1e-12)
    np.testing.assert_allclose(rows.last_token_s, [9.0, 10.0, 10.0], rtol=1e-12)


def test_lockstep_equals_one_engine_where_one_replica_has_all_the_work() -> None:
    """A request at a time: the other attention replica idles, and a step is that of the busy one."""
    trace = _trace([0.0, 100.0, 200.0], [30, 20, 10], [20, 30, 40])
    alone = simulate(trace, STEPS, AMPLE)
    both = simulate(trace, STEPS, AMPLE, data_parallel=2)
    np.testing.assert_allclose(both.last_token_s, alone.last_token_s, rtol=1e-12)


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": 0}, "replicas must be >= 1, got 0"),
        ({"router": "best"}, "router must be one of round_robin, least_loaded, random, got 'best'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(_trace([0.0], [1], [1]), STEPS, AMPLE, **change)


def test_lockstep_needs_step_times_that_know_it() -> None:
    with pytest.raises(ValueError, match="data_parallel must be 1 with step times of a single replica, got 2"):
        simulate(_trace([0.0], [1], [1]), KNOTTED, AMPLE, data_parallel=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be >= 1, got 0"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens must be >= max_num_seqs 4, got 3"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"kv_tokens": 3}, "kv_tokens must be >= block_size 16, got 3"),
        ({"kv_tokens": math.nan}, "kv_tokens must be >= block_size 16, got nan"),
    ],
)
def test_bad_limits(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineLimits(**{"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_tokens": 1000} | change)  # type: ignore[arg-type]


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    simulate(_random_trace(0, 10, 1.0, 10, 10), STEPS, AMPLE, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(0, 10), (10, 10)]


def _peak_blocks(rows: RequestRows, block_size: int) -> NDArray[np.int64]:
    """Blocks certainly in use just before each first token: prompts computed and not yet left."""
    held = -(-rows.n_in // block_size)
    at = rows.first_token_s
    inside = (rows.first_token_s[np.newaxis] <= at[:, np.newaxis]) & (rows.last_token_s[np.newaxis] > at[:, np.newaxis])
    return np.asarray(inside @ held)


def test_cache_is_never_above_capacity() -> None:
    """Without a preemption a request holds at least its prompt from first to last token."""
    trace = _random_trace(11, 300, 40.0, 80, 4)
    limits = EngineLimits(max_num_seqs=64, max_num_batched_tokens=8192, kv_tokens=640, enable_prefix_caching=False)
    rows = simulate(trace, STEPS, limits)
    kept = np.flatnonzero(rows.preemptions == 0)
    assert kept.size > 200
    whole = RequestRows(
        **{name: getattr(rows, name)[kept] for name in RequestRows.__dataclass_fields__}  # one request per row
    )
    peak = _peak_blocks(whole, limits.block_size).max()
    assert 30 < peak <= limits.blocks  # 40 blocks, nearly full

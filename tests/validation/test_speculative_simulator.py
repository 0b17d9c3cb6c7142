"""Rounds of drafts and verifications: against the plain simulator, closed forms of acceptance, and hand examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from analytic_steps import AnalyticSteps
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from plain_speculation import plain_speculation

from servecast.model.batch_steps import Chunk
from servecast.model.request_rows import RequestRows
from servecast.model.speculation import TwoState, tokens_per_step
from servecast.model.workload import Trace
from servecast.validation.acceptance_draws import (
    AcceptanceDraws,
    AlikeTokens,
    BetaTokens,
    DrawnAcceptance,
    TwoStateTokens,
)
from servecast.validation.draft_controllers import (
    ConfidenceStop,
    DraftController,
    DraftDecision,
    NextConfidence,
    RoundState,
    StaticLength,
    uniform,
)
from servecast.validation.simulator import EngineLimits, Router, simulate
from servecast.validation.speculative_simulator import SpeculativeRows, simulate_speculative

PLAIN = AnalyticSteps(
    step_s=0.01, sequence_s=2e-4, cached_s=1e-7, prompt_s=0.004, token_s=5e-5, square_s=1e-9, first_token_s=0.003
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Steps of `plain`, and row_s a row, gamma_s a drafted token, armed_s a round without one."""

    plain: AnalyticSteps = PLAIN
    row_s: float = 0.0
    gamma_s: float = 0.0
    armed_s: float = 0.0

    @property
    def first_token_s(self) -> float:
        """See `servecast.validation.speculative_steps.SpeculativeStepTimes`, as the rest."""
        return self.plain.first_token_s

    def verify_s(self, rows: int, requests: int, cached: int) -> float:
        """The plain step, and its rows."""
        assert rows >= requests
        return self.plain.decode(requests, cached)[0] + self.row_s * rows

    def draft_s(self, requests: int, gamma: int, cached: int) -> float:  # noqa: ARG002 (the protocol's)
        """Linear in the draft length."""
        assert requests > 0
        return self.gamma_s * gamma

    def idle_s(self, requests: int, cached: int) -> float:  # noqa: ARG002 (the protocol's)
        """A constant."""
        return self.armed_s

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """The plain chunks."""
        return self.plain.mixed(chunks, 0, 0, 0)


AMPLE = EngineLimits(max_num_seqs=64, max_num_batched_tokens=8192, kv_tokens=1e6, enable_prefix_caching=False)
TIGHT = replace(AMPLE, kv_tokens=1600)
CHUNKED_TIGHT = EngineLimits(
    max_num_seqs=12, max_num_batched_tokens=48, kv_tokens=900, block_size=4, enable_prefix_caching=False
)
NARROW = replace(AMPLE, max_num_seqs=3)
MIXED = DrawnAcceptance(process=BetaTokens(mean=0.7, concentration=2.0), seed=5)


def _alike(alpha: float, seed: int = 0) -> DrawnAcceptance:
    return DrawnAcceptance(process=AlikeTokens(alpha=alpha), seed=seed)


def _static(length: int) -> Callable[[], DraftController]:
    return lambda: StaticLength(length)


def _random_trace(seed: int, count: int, rate_rps: float, n_in: int, n_out: int) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(
        name="random",
        t_s=np.cumsum(rng.exponential(1.0 / rate_rps, count)),
        n_in=rng.integers(1, 2 * n_in, count),
        n_out=1 + rng.geometric(1.0 / n_out, count) % (4 * n_out),
    )


def _trace(t_s: ArrayLike, n_in: ArrayLike, n_out: ArrayLike) -> Trace:
    return Trace(name="hand", t_s=np.array(t_s, dtype=np.float64), n_in=np.array(n_in), n_out=np.array(n_out))


def _run(
    trace: Trace,
    acceptance: AcceptanceDraws,
    length: int,
    *,
    limits: EngineLimits = AMPLE,
    steps: Rounds | None = None,
    replicas: int = 1,
    router: Router = "round_robin",
) -> SpeculativeRows:
    return simulate_speculative(
        trace,
        steps or Rounds(),
        limits,
        acceptance,
        _static(length),
        num_speculative_tokens=length,
        replicas=replicas,
        router=router,
    )


# Without speculation it is the plain simulator


def _assert_equal_stamps(ours: RequestRows, theirs: RequestRows) -> None:
    for name in ("scheduled_s", "first_token_s", "last_token_s"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=0.0, atol=1e-9)
    for name in ("preemptions", "cached_tokens", "replica", "refused"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize(
    ("limits", "rate_rps", "n_in", "n_out", "preempts"),
    [
        (AMPLE, 20.0, 200, 30, False),
        (TIGHT, 20.0, 60, 60, True),
        (CHUNKED_TIGHT, 10.0, 60, 60, True),
        (NARROW, 5.0, 100, 20, False),
    ],
    ids=["ample", "tight", "chunked_tight", "narrow"],
)
def test_length_zero_equals_the_plain_simulator(
    limits: EngineLimits, rate_rps: float, n_in: int, n_out: int, preempts: bool
) -> None:
    trace = _random_trace(1, 150, rate_rps, n_in, n_out)
    plain = simulate(trace, PLAIN, limits)
    _assert_equal_stamps(_run(trace, MIXED, 0, limits=limits), plain)
    assert (plain.preemptions.sum() > 0) == preempts  # the case is the one it says it is


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    seqs=st.integers(1, 12),
    budget=st.integers(0, 200),
    block_size=st.sampled_from([1, 3, 16]),
    spare_tokens=st.integers(0, 400),
    rate_rps=st.floats(0.5, 200.0),
    replicas=st.integers(1, 2),
)
def test_length_zero_equals_the_plain_simulator_on_any_engine(
    seed: int, seqs: int, budget: int, block_size: int, spare_tokens: int, rate_rps: float, replicas: int
) -> None:
    trace = _random_trace(seed, 40, rate_rps, 30, 12)
    limits = EngineLimits(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        kv_tokens=int((trace.n_in + trace.n_out).max()) + block_size + spare_tokens,
        block_size=block_size,
        enable_prefix_caching=False,
    )
    plain = simulate(trace, PLAIN, limits, replicas=replicas, router="least_loaded")
    _assert_equal_stamps(_run(trace, MIXED, 0, limits=limits, replicas=replicas, router="least_loaded"), plain)


def test_length_zero_equals_the_plain_simulator_with_shared_prefixes() -> None:
    rng = np.random.default_rng(3)
    n_in = rng.integers(1, 5, 120) * 16 + rng.integers(1, 16, 120)
    trace = replace(
        _trace(0.02 * np.arange(120), n_in, np.full(120, 30)),
        prefix_blocks=tuple(tuple(int(rng.integers(4)) + 4 * depth for depth in range(n // 16)) for n in n_in),
        block_tokens=16,
    )
    limits = EngineLimits(max_num_seqs=8, max_num_batched_tokens=64, kv_tokens=480)
    plain = simulate(trace, PLAIN, limits)
    assert plain.cached_tokens.sum() > 0
    assert plain.preemptions.sum() > 0
    _assert_equal_stamps(_run(trace, MIXED, 0, limits=limits), plain)


def test_drafts_that_are_all_wrong_cost_their_seconds_and_nothing_else() -> None:
    """Acceptance 0 with free drafts: the plain simulator's stamps where neither memory nor budget binds."""
    trace = _random_trace(2, 150, 20.0, 60, 60)
    rows = _run(trace, _alike(0.0), 3)
    _assert_equal_stamps(rows, simulate(trace, PLAIN, AMPLE))
    np.testing.assert_array_equal(rows.rounds, trace.n_out - 1)
    np.testing.assert_array_equal(rows.drafted, 3 * rows.rounds)
    np.testing.assert_array_equal(rows.accepted, 0)


# With it, a step-by-step walk


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    longest=st.integers(1, 6),
    static=st.booleans(),
    seqs=st.integers(1, 12),
    budget=st.integers(0, 100),
    block_size=st.sampled_from([1, 3, 16]),
    spare_tokens=st.integers(0, 200),
    rate_rps=st.floats(0.5, 200.0),
)
def test_equals_a_step_by_step_walk_on_any_engine(
    seed: int,
    longest: int,
    static: bool,
    seqs: int,
    budget: int,
    block_size: int,
    spare_tokens: int,
    rate_rps: float,
) -> None:
    trace = _random_trace(seed, 40, rate_rps, 30, 12)
    limits = EngineLimits(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        kv_tokens=int((trace.n_in + trace.n_out).max()) + block_size + spare_tokens,
        block_size=block_size,
        enable_prefix_caching=False,
    )
    _assert_equal_to_a_walk(trace, limits, longest, (lambda: StaticLength(longest)) if static else None)


@pytest.mark.parametrize("limits", [TIGHT, CHUNKED_TIGHT], ids=["tight", "chunked_tight"])
def test_equals_a_step_by_step_walk_with_preemptions(limits: EngineLimits) -> None:
    rows = _assert_equal_to_a_walk(_random_trace(1, 150, 20.0, 60, 60), limits, 4, None)
    assert rows.preemptions.sum() > 20  # the case is the one it says it is


def _assert_equal_to_a_walk(
    trace: Trace, limits: EngineLimits, longest: int, factory: Callable[[], DraftController] | None
) -> SpeculativeRows:
    make = factory or (lambda: Restless(7, longest))
    steps = Rounds(row_s=1e-4, gamma_s=1e-3, armed_s=5e-4)
    rows = simulate_speculative(trace, steps, limits, MIXED, make, num_speculative_tokens=longest)
    requests = plain_speculation(trace, steps, limits, MIXED, make(), longest)
    for name in ("scheduled_s", "first_s", "last_s"):
        ours = getattr(rows, name.replace("first", "first_token").replace("last", "last_token"))
        np.testing.assert_allclose(ours, [getattr(one, name) for one in requests], rtol=0.0, atol=1e-9)
    for name in ("preemptions", "rounds", "drafted", "accepted"):
        np.testing.assert_array_equal(getattr(rows, name), [getattr(one, name) for one in requests])
    return rows


# Tokens of a round


@pytest.mark.parametrize("k", [1, 3, 7])
def test_drafts_that_are_all_right_need_the_fewest_rounds(k: int) -> None:
    # hand: the prompt gives one token, each round k + 1
    trace = _random_trace(3, 100, 20.0, 60, 60)
    rows = _run(trace, _alike(1.0), k)
    np.testing.assert_array_equal(rows.rounds, np.ceil((trace.n_out - 1) / (k + 1)))
    np.testing.assert_array_equal(rows.accepted + rows.rounds, trace.n_out - 1)
    assert rows.rounds_by_length[:k].sum() == 0


LONG = _trace(np.zeros(60), np.full(60, 8), np.full(60, 3000))


def _assert_tokens_per_round(acceptance: AcceptanceDraws, k: int, expected: float) -> None:
    rows = _run(LONG, acceptance, k)
    tokens = rows.accepted + rows.rounds
    mean = tokens.sum() / rows.rounds.sum()
    sem = math.sqrt(((tokens - mean * rows.rounds) ** 2).sum()) / rows.rounds.sum()
    # the last round of a request is cut at its end: at most k tokens of 3,000
    assert abs(mean - expected) < 4.0 * sem + k / 3000 * expected
    assert sem < 0.02


@pytest.mark.parametrize(("alpha", "k"), [(0.7, 3), (0.8, 5), (0.3, 1)])
def test_mean_tokens_of_a_round(alpha: float, k: int) -> None:
    # theory: Leviathan et al., eq. 1
    _assert_tokens_per_round(_alike(alpha, seed=4), k, float(tokens_per_step(alpha, k)))


@pytest.mark.parametrize(("k", "expected"), [(1, 1.689516), (3, 2.508478), (7, 3.193868)])  # reference page, 4.4 [D]
def test_mean_tokens_of_a_round_with_bursty_tokens(k: int, expected: float) -> None:
    bursty = TwoState(a_easy=0.9, a_hard=0.3, easy_to_hard=0.15, hard_to_easy=0.35)
    _assert_tokens_per_round(DrawnAcceptance(process=TwoStateTokens(parameters=bursty), seed=4), k, expected)


def test_rounds_of_a_request_scatter_as_a_renewal_sum() -> None:
    # reference page, 4.6 [D], alpha .7, K 5, 256 tokens: mean 87.5615 rounds (exact renewal sum), s.d. 5.79 (simulated
    # there); hand: a step of 1 s and free prompts, so that TPOT = rounds / 256
    count = 2000
    trace = _trace(np.zeros(count), np.ones(count, dtype=int), np.full(count, 257))
    limits = EngineLimits(
        max_num_seqs=count, max_num_batched_tokens=8 * count, kv_tokens=1e6, enable_prefix_caching=False
    )
    rows = _run(trace, _alike(0.7, seed=9), 5, limits=limits, steps=Rounds(plain=AnalyticSteps(step_s=1.0)))
    tpot_s = (rows.last_token_s - rows.first_token_s) / 256
    np.testing.assert_allclose(tpot_s, rows.rounds / 256, rtol=1e-9)
    assert abs(tpot_s.mean() * 256 - 87.5615) < 4.0 * 5.79 / math.sqrt(count)
    assert abs(tpot_s.std() * 256 - 5.79) < 4.0 * 5.79 / math.sqrt(2 * count)
    # normal approximation at the 95th percentile: 87.5615 + 1.6449 * 5.77 = 97.05 rounds; whole rounds, so +- 1
    assert abs(np.quantile(rows.rounds, 0.95) - 97.05) < 1.0


# What must hold of any run


@dataclass(slots=True)
class Restless:
    """Lengths at random, ragged; keeps what it was told."""

    seed: int
    longest: int
    accepted: int = 0
    chunk_tokens: int = 0
    most_rows: int = 0
    """Of a step, its prompt tokens included."""
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:
        """Any length."""
        assert state.contexts is not None
        assert sum(state.contexts) == state.cached
        self.chunk_tokens = state.chunk_tokens
        drafted = int(self.rng.integers(0, self.longest + 1))
        for _ in range(drafted):
            confidence = next_confidence()
            assert confidence.shape == (state.batch,)
        return DraftDecision(lengths=self.rng.integers(0, drafted + 1, state.batch), drafted=drafted)

    def observe(self, accepted: NDArray[np.int64], lengths: NDArray[np.int64], step_s: float) -> None:
        """Never more accepted than verified."""
        assert (accepted <= lengths).all()
        assert step_s > 0.0
        self.accepted += int(accepted.sum())
        self.most_rows = max(self.most_rows, lengths.size + int(lengths.sum()) + self.chunk_tokens)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    longest=st.integers(0, 6),
    seqs=st.integers(1, 12),
    budget=st.integers(0, 100),
    block_size=st.sampled_from([1, 3, 16]),
    spare_tokens=st.integers(0, 200),
    rate_rps=st.floats(0.5, 200.0),
    caching=st.booleans(),
)
def test_every_token_is_emitted_once_within_memory_and_budget(
    seed: int,
    longest: int,
    seqs: int,
    budget: int,
    block_size: int,
    spare_tokens: int,
    rate_rps: float,
    caching: bool,
) -> None:
    trace = _random_trace(seed, 40, rate_rps, 30, 12)
    limits = EngineLimits(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        kv_tokens=int((trace.n_in + trace.n_out).max()) + block_size + spare_tokens,
        block_size=block_size,
        enable_prefix_caching=caching,
    )
    controller = Restless(seed, longest)
    rows = simulate_speculative(
        trace, Rounds(gamma_s=1e-3), limits, MIXED, lambda: controller, num_speculative_tokens=longest, slo_s=0.05
    )
    assert not rows.refused.any()
    # a prompt gives one token, and so does one that a preemption sent back
    by_prompts = trace.n_out - rows.accepted - rows.rounds
    assert ((by_prompts >= 1) & (by_prompts <= 1 + rows.preemptions)).all()
    assert (rows.accepted <= rows.drafted).all()
    assert controller.accepted >= rows.accepted.sum()  # it also sees what lies behind the end of an output
    assert rows.peak_blocks <= limits.blocks
    assert controller.most_rows <= limits.max_num_batched_tokens
    assert rows.rounds_by_length.sum() <= rows.rounds.sum() <= seqs * rows.rounds_by_length.sum()
    assert (np.diff(rows.scheduled_s) >= 0.0).all()
    assert (rows.last_token_s >= rows.first_token_s).all()


def test_the_same_seed_gives_the_same_rows() -> None:
    trace = _random_trace(1, 100, 20.0, 60, 60)
    first, again = (_run(trace, _alike(0.7, seed=3), 4, limits=TIGHT) for _ in range(2))
    other = _run(trace, _alike(0.7, seed=4), 4, limits=TIGHT)
    np.testing.assert_array_equal(first.last_token_s, again.last_token_s)
    np.testing.assert_array_equal(first.rounds, again.rounds)
    assert (first.rounds != other.rounds).any()


def test_two_policies_meet_the_same_text() -> None:
    """Whatever the load and the engine, a request is cut into the rounds that its text and the length make."""
    trace = _random_trace(1, 100, 20.0, 60, 60)
    slow = replace(trace, t_s=50.0 * trace.t_s)
    busy, idle = (_run(one, MIXED, 4, steps=Rounds(gamma_s=s)) for one, s in ((trace, 0.0), (slow, 0.01)))
    np.testing.assert_array_equal(busy.rounds, idle.rounds)
    texts = [MIXED.text(number, n, 4) for number, n in enumerate(trace.n_out.tolist())]
    for length, rows in ((4, busy), (2, _run(trace, MIXED, 2))):
        walked = []
        for text, n_out in zip(texts, trace.n_out.tolist(), strict=True):
            place, rounds = 1, 0
            while place < n_out:
                place += 1 + min(text.accepted[place], length)
                rounds += 1
            walked.append(rounds)
        np.testing.assert_array_equal(rows.rounds, walked)


def test_a_longer_draft_never_needs_more_rounds() -> None:
    trace = _random_trace(1, 100, 20.0, 60, 60)
    rounds = [_run(trace, MIXED, length).rounds for length in range(5)]
    for shorter, longer in pairwise(rounds):
        assert (longer <= shorter).all()  # the same text: a longer draft is never behind
    assert rounds[4].sum() < rounds[0].sum() / 2


def test_time_scales() -> None:
    """Arrivals and step times k times as long: every stamp is, and nothing else changes."""
    trace, k = _random_trace(2, 150, 20.0, 60, 60), 8.0  # a power of two, so that rounding scales too
    longer = AnalyticSteps(**{name: k * getattr(PLAIN, name) for name in AnalyticSteps.__dataclass_fields__})
    rows = _run(trace, MIXED, 3, limits=TIGHT, steps=Rounds(row_s=1e-4, gamma_s=1e-3))
    slower = _run(
        replace(trace, t_s=k * trace.t_s),
        MIXED,
        3,
        limits=TIGHT,
        steps=Rounds(plain=longer, row_s=k * 1e-4, gamma_s=k * 1e-3),
    )
    assert rows.preemptions.sum() > 0
    np.testing.assert_allclose(slower.last_token_s, k * rows.last_token_s, rtol=1e-12)
    np.testing.assert_array_equal(slower.rounds, rows.rounds)


def test_replicas_have_controllers_of_their_own() -> None:
    trace = _random_trace(4, 100, 30.0, 60, 60)
    made: list[DraftController] = []

    def factory() -> DraftController:
        made.append(ConfidenceStop(max_length=4))
        return made[-1]

    both = simulate_speculative(trace, Rounds(), TIGHT, _alike(0.7), factory, num_speculative_tokens=4, replicas=2)
    assert len(made) == 2
    np.testing.assert_array_equal(both.replica, np.arange(100) % 2)


# Hand examples

WHOLE = Rounds(plain=AnalyticSteps(step_s=1.0, token_s=0.5), gamma_s=0.25)


def _hand_limits(kv_tokens: int, budget: int = 100) -> EngineLimits:
    return EngineLimits(
        max_num_seqs=4, max_num_batched_tokens=budget, kv_tokens=kv_tokens, block_size=4, enable_prefix_caching=False
    )


def test_lookahead_slots_take_memory_by_hand() -> None:
    # hand: 3 blocks of 4. Both prompts of 3 take one block each and 3 s together. A round needs 3 + 1 + 2 = 6 slots, 2
    # blocks each, 4 in all: B loses its place. A emits 3 tokens until 4.5 s (1 + 2 * 0.25 s a round) and has 6 cached;
    # the next round needs 9 slots, the third block, so that B still waits. A's fifth token ends it at 6 s; B computes
    # its 4 tokens in 2 s, which gives its second and last one.
    rows = _run(_trace([0.0, 0.0], [3, 3], [5, 2]), _alike(1.0), 2, limits=_hand_limits(12), steps=WHOLE)
    np.testing.assert_allclose(rows.first_token_s, [3.0, 3.0], rtol=1e-12)
    np.testing.assert_allclose(rows.last_token_s, [6.0, 8.0], rtol=1e-12)
    np.testing.assert_array_equal(rows.preemptions, [0, 1])
    np.testing.assert_array_equal(rows.rounds, [2, 0])
    np.testing.assert_array_equal(rows.drafted, [4, 0])
    np.testing.assert_array_equal(rows.accepted, [2, 0])
    np.testing.assert_array_equal(rows.rounds_by_length, [0, 0, 2])
    assert (rows.switches, rows.peak_blocks) == (0, 3)
    # hand: without lookahead slots 4 cached tokens fit into one block each and nobody goes
    assert _run(_trace([0.0, 0.0], [3, 3], [2, 2]), _alike(1.0), 0, limits=_hand_limits(12)).preemptions.sum() == 0


def test_drafts_behind_the_whole_cache_are_not_verified() -> None:
    # hand: 8 slots, 4 of them the prompt's: one round of 1 + 3 tokens fills them, where 4 drafts were made (2 s)
    rows = _run(_trace([0.0], [4], [5]), _alike(1.0), 4, limits=_hand_limits(8), steps=WHOLE)
    assert (rows.rounds[0], rows.drafted[0], rows.accepted[0]) == (1, 3, 3)
    assert rows.last_token_s[0] == pytest.approx(2.0 + 1.0 + 1.0, rel=1e-12)


def test_drafts_are_cut_to_the_budget_in_order() -> None:
    # hand: a budget of 4 rows, two sequences: A verifies its 2 drafts, B none
    seen = Scripted([2])
    simulate_speculative(
        _trace([0.0, 0.0], [2, 2], [9, 9]),
        WHOLE,
        EngineLimits(max_num_seqs=2, max_num_batched_tokens=4, kv_tokens=100, enable_prefix_caching=False),
        _alike(1.0),
        lambda: seen,
        num_speculative_tokens=2,
    )
    assert seen.lengths[0] == [2, 0]
    assert seen.accepted[0] == [2, 0]


class Scripted:
    """Given lengths, the last one for good; keeps states and outcomes."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = list(script)
        self.states: list[RoundState] = []
        self.confidences: list[list[float]] = []
        self.accepted: list[list[int]] = []
        self.lengths: list[list[int]] = []
        self.step_s: list[float] = []

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:
        """The next of the script."""
        length = self.script[min(len(self.states), len(self.script) - 1)]
        self.states.append(state)
        self.confidences.extend(next_confidence().tolist() for _ in range(length))
        return uniform(state.batch, length)

    def observe(self, accepted: NDArray[np.int64], lengths: NDArray[np.int64], step_s: float) -> None:
        """Keeps all."""
        self.accepted.append(accepted.tolist())
        self.lengths.append(lengths.tolist())
        self.step_s.append(step_s)


def test_a_mixed_round_and_what_the_controller_sees_by_hand() -> None:
    # hand: A's prompt of 4 until 2 s. Round 1 (2 drafts, 1.5 s) until 3.5 s: A has 4 of 6 tokens and 7 cached. B (at 3
    # s, 6 tokens, 3 s) shares round 2 (1 draft): 1 + 0.25 + 3 = 4.25 s, until 7.75 s: A's end, its second draft right.
    # Round 3 without a draft pays 0.125 s: B's second and last token at 8.875 s.
    seen = Scripted([2, 1, 0])
    acceptance = DrawnAcceptance(process=AlikeTokens(alpha=1.0), seed=0)
    rows = simulate_speculative(
        _trace([0.0, 3.0], [4, 6], [6, 2]),
        replace(WHOLE, armed_s=0.125),
        _hand_limits(1000),
        acceptance,
        lambda: seen,
        num_speculative_tokens=3,
        slo_s=2.0,
    )
    np.testing.assert_allclose(rows.first_token_s, [2.0, 7.75], rtol=1e-12)
    np.testing.assert_allclose(rows.last_token_s, [7.75, 8.875], rtol=1e-12)
    assert [(s.batch, s.cached, s.chunk_tokens, s.prefills, s.slo_s) for s in seen.states] == [
        (1, 4, 0, 0, 2.0),
        (1, 7, 6, 1, 2.0),
        (1, 6, 0, 0, 2.0),
    ]
    assert seen.accepted == [[2], [1], [0]]
    assert seen.confidences == [[1.0], [1.0], [1.0]]
    np.testing.assert_allclose(seen.step_s, [1.5, 4.25, 1.125], rtol=1e-12)
    np.testing.assert_array_equal(rows.rounds_by_length, [1, 1, 1, 0])
    assert rows.switches == 2


def test_a_controller_sees_what_is_right_behind_the_end() -> None:
    # hand: 3 tokens to come, 5 right drafts: 2 become output, and the acceptance seen is still 5
    seen = Scripted([5])
    rows = simulate_speculative(
        _trace([0.0], [4], [4]), WHOLE, _hand_limits(1000), _alike(1.0), lambda: seen, num_speculative_tokens=5
    )
    assert seen.accepted == [[5]]
    assert (rows.accepted[0], rows.drafted[0]) == (2, 5)


def test_confidences_are_those_of_the_text() -> None:
    draws = DrawnAcceptance(process=BetaTokens(mean=0.7, concentration=2.0), seed=3, depth_decay=0.9)
    seen = Scripted([3])
    simulate_speculative(
        _trace([0.0], [4], [2]), WHOLE, _hand_limits(1000), draws, lambda: seen, num_speculative_tokens=3
    )
    text = draws.text(0, 2, 3)
    # definition: the prompt gives place 0, the first round drafts places 1, 2, 3
    assert seen.confidences == [[text.confidence(1, 0)], [text.confidence(2, 1)], [text.confidence(3, 2)]]


# Refusals


@dataclass(slots=True)
class Fixed:
    """The same answer to everything, right or wrong."""

    lengths: list[int]
    drafted: int
    asks: int = 0

    def round(self, state: RoundState, next_confidence: NextConfidence) -> DraftDecision:  # noqa: ARG002 (the protocol's)
        """That answer."""
        for _ in range(self.asks):
            next_confidence()
        return DraftDecision(lengths=np.array(self.lengths, dtype=np.int64), drafted=self.drafted)

    def observe(self, accepted: NDArray[np.int64], lengths: NDArray[np.int64], step_s: float) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("controller", "message"),
    [
        (Fixed([1, 1], 1), "lengths must be one per request of 1, got 2"),
        (Fixed([3], 3), "drafted must be between 0 and 2, got 3"),
        (Fixed([2], 1), r"lengths must be between 0 and drafted 1, got \[2\]"),
        (Fixed([-1], 1), r"lengths must be between 0 and drafted 1, got \[-1\]"),
        (Fixed([2], 2, asks=3), "drafted must be <= num_speculative_tokens 2, got 3"),
    ],
)
def test_a_wrong_decision_is_refused(controller: Fixed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_speculative(_trace([0.0], [4], [9]), WHOLE, AMPLE, MIXED, lambda: controller, num_speculative_tokens=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": 0}, "replicas must be >= 1, got 0"),
        ({"router": "best"}, "router must be one of round_robin, least_loaded, random, got 'best'"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens must be between 0 and 255, got -1"),
        ({"num_speculative_tokens": 256}, "num_speculative_tokens must be between 0 and 255, got 256"),
        ({"slo_s": math.nan}, "slo_s must be > 0, got nan"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_speculative(
            _trace([0.0], [4], [9]), WHOLE, AMPLE, MIXED, _static(1), **{"num_speculative_tokens": 1} | change
        )

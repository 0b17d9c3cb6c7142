"""Comparisons of a made-up run whose truth is known (live_samples)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from live_samples import LIMITS, TRUTH, live_run, scenario

from servecast.model.workload import Trace
from servecast.validation.comparing import compare, not_reached, unanswered
from servecast.validation.draft_choice import AcceptanceCount, measured_goodput, regrets
from servecast.validation.executors import capacity_rps, closed_form, figures, simulated
from servecast.validation.live_facts import LoadRun
from servecast.validation.pace import Probe
from servecast.validation.validated import Validated
from servecast.validation.verdicts import Comparison, Verdict, overall


def _of(comparisons: list[Comparison], part: str, metric: str = "", executor: str = "") -> list[Comparison]:
    return [
        one
        for one in comparisons
        if one.part.startswith(part) and metric in one.metric and executor in ("", one.executor)
    ]


def test_an_engine_that_is_as_calibrated_is_within_every_budget() -> None:
    found = compare(scenario(), live_run())
    judged = [one for one in found if one.executor == "simulator" or not one.part.startswith("load")]
    assert overall(judged) is Verdict.WITHIN
    assert not not_reached(scenario(), live_run())
    (steps,) = _of(found, "decode steps", "mean absolute")
    assert 0.0 <= steps.error < 0.02
    assert steps.baseline is not None
    assert steps.baseline > steps.error


def test_an_engine_that_is_slower_than_calibrated_is_found_out() -> None:
    """Steps 1.5 times as long: predicted / measured - 1 = -1/3."""
    found = compare(scenario(), live_run(factor=1.5))
    (steps,) = _of(found, "decode steps", "mean absolute")
    assert steps.error == pytest.approx(1.0 / 3.0, rel=0.05)
    assert steps.verdict is Verdict.BROKEN
    (tpot,) = _of(found, "load light", "tpot mean", "simulator")
    assert tpot.error < -0.3
    assert overall(found) is Verdict.BROKEN


def test_noise_takes_a_verdict_away_and_gives_none() -> None:
    noisy = compare(scenario(), live_run(noise=0.12))
    assert {one.verdict for one in _of(noisy, "decode steps", "mean absolute")} == {Verdict.NOT_JUDGED}
    # hand: probes of 1 and 1.8 leave 0.4 / 1.4 of a pace open, over two seeds 20 %; half the budgets are 15 and 10 %
    unsteady = compare(scenario(), live_run(pace_after=1.8))
    assert {one.verdict for one in _of(unsteady, "load") if one.budget is not None} == {Verdict.NOT_JUDGED}
    assert overall(unsteady) is Verdict.NOT_JUDGED


def test_a_gate_is_a_share_of_the_figures_own_budget() -> None:
    """Probes of 1 and 1.3 over two seeds leave 9 % of a step and, with a queue, 12 % of a TTFT: less than half of 30 %,
    more than three tenths of it."""
    found = compare(scenario(), live_run(pace_after=1.3))
    tpot, ttft = (_of(found, "load light", one, "simulator")[0] for one in ("tpot mean", "ttft p50"))
    assert (tpot.noise_limit, ttft.noise_limit) == (0.10, 0.15)
    assert 0.09 < ttft.noise < 0.15
    assert ttft.verdict is not Verdict.NOT_JUDGED
    plan = scenario()
    strict = plan.model_copy(update={"noise": plan.noise.model_copy(update={"of_budget": 0.3})})
    (ttft, *_) = _of(compare(strict, live_run(pace_after=1.3)), "load light", "ttft p50", "simulator")
    assert ttft.verdict is Verdict.NOT_JUDGED


def test_a_scatter_that_cannot_tell_lengths_apart_judges_none_by_hand() -> None:
    """Four rounds, a budget of 0.10: the difference of two medians has 0.886 times the scatter; 0.05 at 5.6 %, above a
    step's own limit. With a budget of 0.04 it is 2.3 %."""
    plan = scenario()
    tight = plan.model_copy(update={"budgets": plan.budgets.model_copy(update={"draft_length_regret": 0.04})})
    facts = live_run(noise=0.08)
    wide, narrow = (_of(compare(one, facts), "draft length", "batch") for one in (plan, tight))
    assert {one.noise_limit for one in wide} == {0.05}
    for one in narrow:
        assert one.noise_limit == pytest.approx(0.02 / 0.8862, rel=1e-3)
        assert one.verdict is Verdict.NOT_JUDGED
    stricter = tight.model_copy(update={"noise": tight.noise.model_copy(update={"of_budget": 0.25})})
    for one in _of(compare(stricter, facts), "draft length", "batch"):
        assert one.noise_limit == pytest.approx(0.01 / 0.8862, rel=1e-3)


def test_a_mean_regret_is_known_better_than_one_by_hand() -> None:
    """Three batch sizes, a budget of 0.02 for their mean: 0.01 / 0.8862 times the root of 3."""
    plan = scenario()
    told = plan.model_copy(update={"budgets": plan.budgets.model_copy(update={"mean_draft_length_regret": 0.02})})
    assert plan.speculation is not None
    assert len(plan.speculation.batches) == 3
    (one,) = _of(compare(told, live_run()), "draft length", "mean")
    assert one.noise_limit == pytest.approx(0.01 / 0.8862 * math.sqrt(3.0), rel=1e-3)
    (one,) = _of(compare(plan, live_run()), "draft length", "mean")
    assert (one.noise_limit, one.verdict) == (None, Verdict.REPORTED)


def test_steps_of_a_paired_run_scatter_as_all_of_it_does() -> None:
    """Judged cells as quiet as can be, among cells that scatter by 8 %: the run's noise is what is told."""
    facts = live_run()
    assert facts.drafted is not None
    facts.compared = live_run(noise=0.08).drafted
    (one,) = _of(compare(scenario(), facts), "speculative steps", "mean absolute")
    assert 0.05 < one.noise < 0.11


def test_too_few_rounds_of_acceptance_are_not_judged_by_hand() -> None:
    """25 rounds of which 16, 9 keep one, two drafts: N is 1, 2, 3 with 9, 7, 9 of 25, variance 0.72, error 0.17; half
    of a budget of 0.2 is 0.1."""
    facts = live_run()
    facts.acceptance_validated = [
        AcceptanceCount(draft_length=2, rounds=25, survived=(16, 9)) if one.draft_length == 2 else one
        for one in facts.acceptance_validated
    ]
    few, *_ = _of(compare(scenario(), facts), "acceptance", "at 2")
    assert few.noise * few.measured == pytest.approx(math.sqrt(0.72 / 25.0), rel=1e-9)
    assert few.noise_limit is not None
    assert few.noise_limit * few.measured == pytest.approx(0.1, rel=1e-12)
    assert few.verdict is Verdict.NOT_JUDGED


def test_loads_are_told_in_the_scenarios_order() -> None:
    facts = live_run()
    facts.loads = facts.loads[::-1]
    assert list(dict.fromkeys(one.part for one in _of(compare(scenario(), facts), "load"))) == [
        "load light",
        "load heavy",
        "load bursty",
    ]


def test_failed_requests_take_verdicts_away() -> None:
    """Two of forty failed: what the others saw is another load's."""
    facts = live_run()
    bad = np.arange(40) < 2
    facts.loads = [replace(run, rows=replace(run.rows, refused=bad)) for run in facts.loads]
    found = [one for one in _of(compare(scenario(), facts), "load") if one.budget is not None]
    assert {one.verdict for one in found} == {Verdict.NOT_JUDGED}


def test_noise_of_a_load_is_that_of_its_mean_over_seeds() -> None:
    """Two probes, 1 and 1.3, of one seed of several: half their difference, a share of the seeds, in every step."""
    facts = live_run(name="torch")
    (quiet,) = _of(compare(scenario("torch"), facts), "load light", "tpot mean", "simulator")
    assert quiet.noise < 0.02
    seeds = sum(run.case == "light" for run in facts.loads)
    moved = (Probe(0.0, 1.0), Probe(9.0, 1.3))
    facts.loads = [replace(run, probes=moved) if run.seed == 2 else run for run in facts.loads]
    (one,) = _of(compare(scenario("torch"), facts), "load light", "tpot mean", "simulator")
    # hand: TPOT is at least its steps, 0.15 / 1.15 of them, and a light queue adds to it; the seed's own error, 0.15 at
    # least and with a light queue less than 0.25, is its scatter
    assert 0.12 / seeds < one.noise < 0.25 / seeds


def test_noise_of_a_load_knows_what_nobody_probed() -> None:
    """Quiet probes, and one seed of two measured twice as long: half the difference of their errors, 1 and 1/2."""
    facts = live_run(noise=0.0)
    assert sum(run.case == "light" for run in facts.loads) == 2

    def slow(run: LoadRun) -> LoadRun:
        late = 2.0 * (run.rows.first_token_s - run.rows.arrival_s) + run.rows.arrival_s
        return replace(run, rows=replace(run.rows, first_token_s=late, last_token_s=late + 10.0))

    facts.loads = [slow(run) if run.seed == 2 else run for run in facts.loads]
    (one,) = _of(compare(scenario(), facts), "load light", "ttft p50", "simulator")
    assert one.noise == pytest.approx(0.25, rel=0.02)
    assert one.verdict is Verdict.NOT_JUDGED


def test_a_server_that_is_gone_leaves_a_pace_that_nobody_knows() -> None:
    """Its probe after the load could not be made: nothing is judged, and all is still compared."""
    found = _of(compare(scenario(), live_run(pace_after=math.nan)), "load")
    assert {one.verdict for one in found if one.budget is not None} == {Verdict.NOT_JUDGED}
    assert all(math.isfinite(one.error) for one in found)


def test_steps_with_prompts_have_a_pace_of_their_own() -> None:
    """Prompt steps twice as long: of a TTFT the wait for the running decode step stays, and the queue adds to it."""
    facts = live_run(noise=0.0, name="torch")
    before = _of(compare(scenario("torch"), facts), "load light", "ttft p50", "simulator")[0]
    facts.loads = [
        replace(run, probes=(*run.probes, Probe(1.0, 2.0, prompts=True), Probe(2.0, 2.0, prompts=True)))
        for run in facts.loads
    ]
    after = _of(compare(scenario("torch"), facts), "load light", "ttft p50", "simulator")[0]
    assert 1.3 < after.predicted / before.predicted < 2.6


def test_a_run_that_stopped_is_never_within() -> None:
    facts = live_run()
    found = [one for one in compare(scenario(), facts) if one.verdict is Verdict.WITHIN]
    whole = Validated(scenario=scenario(), facts=facts, comparisons=tuple(found), missing=(), wall_s=1.0)
    assert whole.verdict is Verdict.WITHIN
    facts.stopped = "interrupted"
    assert whole.verdict is Verdict.NOT_JUDGED


def test_a_budget_that_nothing_answers_is_named() -> None:
    assert unanswered(scenario("vllm-cpu"), compare(scenario(), live_run())) == [
        "budget kv_blocks",
        "budget table_followed",
    ]


def test_lengths_that_were_not_all_counted_choose_nothing() -> None:
    facts = live_run()
    facts.acceptance_validated = facts.acceptance_validated[:2]
    assert not _of(compare(scenario(), facts), "draft length")
    assert not_reached(scenario(), facts) == ["acceptance at 2 of 4 draft lengths"]


def test_acceptance_by_hand() -> None:
    """Calibrated survivals 0.7^j at length 5; length 2 measured 1 + 0.7 + 0.49 = 2.19, to a round in a thousand."""
    found = _of(compare(scenario(), live_run()), "acceptance", "at 2")
    assert found[0].measured == pytest.approx(2.19, abs=0.002)
    assert abs(found[0].error) < 0.1


def test_standard_error_of_a_mean_length_by_hand() -> None:
    """Half of 100 rounds keep their one draft: N is 1 or 2, variance 1/4, error 0.05."""
    count = AcceptanceCount(draft_length=1, rounds=100, survived=(50,))
    assert count.mean_acceptance_length == 1.5
    assert count.standard_error == pytest.approx(0.05, rel=1e-12)
    assert math.isnan(AcceptanceCount(draft_length=1, rounds=0, survived=(0,)).mean_acceptance_length)


def test_regret_by_hand() -> None:
    """2 sequences; 1 token in 10 ms, 2 in 16 ms: 200 and 250 tokens/s; length 0 loses a fifth."""
    goodput = measured_goodput(np.array([[0.010, 0.016]]), [2], np.array([1.0, 2.0]))
    assert goodput.tolist() == [[200.0, 250.0]]
    np.testing.assert_allclose(regrets(goodput, np.array([0])), [0.2], rtol=1e-12)
    np.testing.assert_allclose(regrets(goodput, np.array([1])), [0.0], atol=1e-15)


def test_one_request_alone_by_hand() -> None:
    """Prompt of 32: 10 + 31 x 0.5 ms; then 3 steps of one row with 32, 33, 34 cached."""
    trace = Trace(name="t", t_s=np.zeros(1), n_in=np.array([32]), n_out=np.array([4]))
    rows = simulated(trace, TRUTH, LIMITS)
    assert figures(rows)["ttft_mean_s"] == pytest.approx(0.010 + 31 * 0.0005, rel=1e-9)
    assert figures(rows)["tpot_mean_s"] == pytest.approx(0.010 + 1e-7 * 33.0, rel=1e-6)
    fluid = figures(closed_form(trace, TRUTH, LIMITS))
    assert fluid["tpot_mean_s"] == pytest.approx(0.010, rel=0.01)


def test_capacity_is_what_a_full_engine_completes() -> None:
    """The simulator with all requests at once, long enough to be full most of the time."""
    count = 1500
    trace = Trace(name="t", t_s=np.zeros(count), n_in=np.full(count, 64), n_out=np.full(count, 32))
    rows = simulated(trace, TRUTH, LIMITS)
    expected = capacity_rps(TRUTH, LIMITS, np.array([64.0]), np.array([32.0]))
    assert count / float(rows.last_token_s.max()) == pytest.approx(expected, rel=0.06)


def test_a_run_that_ended_early_is_compared_as_far_as_it_came() -> None:
    facts = live_run()
    facts.loads = facts.loads[:3]
    facts.acceptance_validated = []
    facts.stopped = "interrupted"
    found = compare(scenario(), facts)
    assert _of(found, "decode steps")
    assert not _of(found, "draft length")
    assert not_reached(scenario(), facts) == ["3 of 6 loads", "acceptance at 4 of 4 draft lengths"]


def test_exact_facts() -> None:
    plan = scenario("vllm-cpu")
    facts = live_run(name="vllm-cpu")
    facts.kv_blocks = [("one", 1365.0, 1365.0), ("two", 1260.0, 1261.0)]
    facts.table, facts.table_seen = {1: 3, 8: 1, 32: 0}, {1: 3.0, 8: 2.0}
    by_metric = {one.metric: one.verdict for one in compare(plan, facts) if one.executor == "policy"}
    assert by_metric == {
        "one": Verdict.WITHIN,
        "two": Verdict.BROKEN,
        "draft tokens per draft at batch 1": Verdict.WITHIN,
        "draft tokens per draft at batch 8": Verdict.BROKEN,
        "draft tokens per draft at batch 32": Verdict.NOT_JUDGED,
    }


def test_nothing_judged_is_no_pass() -> None:
    assert overall([]) is Verdict.NOT_JUDGED
    (one, *_) = _of(compare(scenario(), live_run()), "decode steps", "mean absolute")
    assert overall([replace(one, budget=None)]) is Verdict.NOT_JUDGED
    assert replace(one, error=math.nan).verdict is Verdict.NOT_JUDGED

"""Draft-length policies compared: step times against the profile they tabulate, small runs, and arithmetic by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.profiled_speculation import ProfiledCost
from servecast.model.speculation import depth_decay_survival
from servecast.model.speculation_cost import step_seconds
from servecast.readers.deployments import deployment
from servecast.validation import speculation_comparison as comparison
from servecast.validation.draft_controllers import RoundState
from servecast.validation.speculation_comparison import (
    LONGEST,
    MAX_NUM_SEQS,
    POLICIES,
    STEP_RANGE,
    SYSTEMS,
    Result,
    TabulatedTimes,
    capacity_rps,
    compare,
    csv_text,
    main,
    opened,
    our_table,
    policies,
    ratios,
    ready,
    run,
)
from servecast.validation.speculative_steps import TabulatedSpeculation

DataPath = Callable[..., Path]

PROFILED = ProfiledCost(load_profile(SHIPPED), deployment(SYSTEMS["8B"].model, SYSTEMS["8B"].gpu, "vllm", tp=1), "vllm")
COUNT = 40


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one trace, "tiny": 60 requests with pauses of 0.1 to 1.9 s, of which 40 count."""
    pauses = 0.1 + 0.09 * (np.arange(60) * 7 % 20)
    lines = [f"{t:.3f},{200 + 37 * i % 900},{20 + 13 * i % 80}" for i, t in enumerate(np.cumsum(pauses))]
    (tmp_path / "tiny.csv").write_text("\n".join(["t_s,n_in,n_out", *lines]) + "\n")
    monkeypatch.setattr(comparison, "TRACES", {"tiny": ("tiny.csv",)})
    monkeypatch.setattr(comparison, "REQUESTS", {"tiny": COUNT})
    return tmp_path


# ---- step times and tables -----------------------------------------------------------------------------


def test_tables_are_the_profile_s_cost() -> None:
    # Origin: the profile's own passes. Exact at tabulated contexts; a line between them, as attention nearly is.
    cost = ready("8B").cost
    rows, batch = np.array([1, 8, 100, 640]), np.array([1, 8, 25, 128])
    for context, rtol in ((256.0, 1e-9), (4096.0, 1e-9), (700.0, 0.01), (9000.0, 0.01)):
        whole = PROFILED.verify(rows, batch, context)
        np.testing.assert_allclose(cost.verify(rows, batch, context), whole, rtol=rtol)
        np.testing.assert_allclose(cost.idle(batch, context), PROFILED.idle(batch, context), rtol=rtol)
        np.testing.assert_allclose(cost.draft(batch, 3, context), 3 * cost.idle(batch, context), rtol=1e-12)
    # beyond the table a row costs what the last one does
    last = cost.verify(np.array([STEP_RANGE - 1, STEP_RANGE, STEP_RANGE + 2]), 1, 256.0)
    assert float(last[2] - last[1]) == pytest.approx(2 * float(last[1] - last[0]), rel=1e-6)


def test_acceptance_is_that_of_a_measured_drafter() -> None:
    # Origin: EAGLE-3 on MT-bench, vLLM issue 20780: 2.36, 3.08 and 3.54 tokens per step at lengths 2, 4 and 7; three
    # numbers are not met exactly by two.
    for system in SYSTEMS.values():
        survival = depth_decay_survival(system.first_acceptance, system.decay, LONGEST)
        tokens = 1.0 + np.cumsum(survival)
        np.testing.assert_allclose(tokens[[1, 3, 6]], [2.36, 3.08, 3.54], rtol=0.05)


@pytest.mark.parametrize(("system", "context", "best"), [("8B", 1000.0, 3), ("70B", 100.0, 6)])
def test_our_table_is_the_best_of_three_lengths(system: str, context: float, best: int) -> None:
    # Origin: definition, by hand from the cost. Within the limit, at most three lengths where `best` are the fastest
    # somewhere, and on average within 1 % of the fastest of every batch, which no single length is closer to.
    made = ready(system)
    limit = next(one.limit_s for one in made.system.slo if one.metric == "tpot")
    lengths, row = np.array(our_table(made, context)), np.arange(MAX_NUM_SEQS)
    assert lengths.shape == (MAX_NUM_SEQS,)
    assert len(set(lengths.tolist())) <= 3
    batch, k = np.arange(1, MAX_NUM_SEQS + 1)[:, np.newaxis], np.arange(LONGEST + 1)
    survival = depth_decay_survival(made.system.first_acceptance, made.system.decay, LONGEST)
    tpot = step_seconds(made.cost, batch, k, context, armed=True) / np.append(1.0, 1.0 + np.cumsum(survival))
    assert np.unique(tpot.argmin(axis=1)).size >= best
    assert (tpot[row, lengths] <= limit).all()
    lost = 1.0 - tpot.min(axis=1, keepdims=True) / tpot
    weights = (1.0 / batch[:, 0]) / (1.0 / batch[:, 0]).sum()
    ours = float(weights @ lost[row, lengths])
    assert ours < 0.01
    assert ours <= (weights @ lost).min() + 1e-12


def test_what_a_controller_with_true_times_believes() -> None:
    # Origin: the simulator's own times; 4 requests of 100 tokens each, 2 drafts are 12 rows.
    made = ready("8B")
    steps = TabulatedSpeculation(made.cost, made.prompts)
    believed, state = TabulatedTimes(steps), RoundState(batch=4, cached=400)
    assert believed.verify_s(state, 2) == steps.verify_s(12, 4, 400)
    assert believed.ragged_s(state, np.array([2, 2, 2, 2])) == steps.verify_s(12, 4, 400)
    assert believed.ragged_s(state, np.array([0, 3, 0, 0])) == steps.verify_s(7, 4, 400)
    assert believed.rows_s(state, np.array([4, 7, 12])).tolist() == [steps.verify_s(n, 4, 400) for n in (4, 7, 12)]
    assert believed.draft_s(state, 2) == steps.draft_s(4, 2, 400)


def test_every_policy_has_a_fresh_controller() -> None:
    made = policies(ready("8B"), [3] * MAX_NUM_SEQS)
    assert tuple(made) == POLICIES
    assert all(make() is not make() for make in made.values())


# ---- runs ----------------------------------------------------------------------------------------------


def test_a_trace_is_cut_to_its_first_requests(tiny: Path) -> None:
    trace = opened("tiny", tiny)
    assert len(trace.t_s) == len(trace.n_in) == len(trace.n_out) == COUNT
    assert trace.n_in[:3].tolist() == [200, 237, 274]


@pytest.fixture
def results(tiny: Path) -> dict[str, Result]:
    return {policy: run("8B", "tiny", 0.3, policy, tiny) for policy in POLICIES}


def test_small_runs_of_every_policy(results: dict[str, Result], tiny: Path) -> None:
    # Origin: definitions. The rate is a share of the capacity; a static length is what is drafted, and yields what
    # the tokens' law says, here over some hundred rounds; drafts speed a lightly loaded engine up.
    rate = 0.3 * capacity_rps(ready("8B"), opened("tiny", tiny))
    assert all(one.rate_rps == pytest.approx(rate, rel=1e-12) for one in results.values())
    off = results["no speculation"]
    assert (off.tokens_per_round, off.mean_length) == (1.0, 0.0)
    for k in (1, 3, 5):
        static = results[f"static {k}"]
        assert static.mean_length == k
        tokens = 1.0 + float(depth_decay_survival(0.78, 0.95, k).sum())
        assert static.tokens_per_round == pytest.approx(tokens, rel=0.1)
    for name in POLICIES[1:]:
        assert results[name].tpot_mean_s < off.tpot_mean_s
        assert 1.0 < results[name].tokens_per_round <= 1.0 + results[name].mean_length + 1e-12
        assert results[name].mean_length <= LONGEST
    for one in results.values():
        assert 0.0 <= one.slo_attainment <= 1.0
        assert one.tpot_mean_s <= one.tpot_p99_s
        assert one.e2e_mean_s <= one.e2e_p99_s
        assert one.ttft_p99_s <= one.e2e_p99_s


def test_our_policies_are_near_the_best(results: dict[str, Result]) -> None:
    # Origin: the aim. On the cost and acceptance that it was solved for the table loses no more than 3 % of the best
    # policy's time per token, whichever that is.
    best = min(one.tpot_mean_s for one in results.values())
    assert results["ours: table"].tpot_mean_s <= 1.03 * best
    assert results["ours: per step"].tpot_mean_s <= 1.03 * best


def test_a_run_repeats_itself(tiny: Path) -> None:
    first, second = (run("8B", "tiny", 0.6, "SmartSpec", tiny) for _ in range(2))
    assert first == second
    assert first.rate_rps == pytest.approx(2.0 * run("8B", "tiny", 0.3, "static 1", tiny).rate_rps, rel=1e-12)


def test_comparisons_run_everything_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Origin: the product of what is asked for, in order.
    monkeypatch.setattr(comparison, "POLICIES", ("no speculation", "static 3"))
    seen: list[tuple[int, int]] = []
    found = compare(
        tiny,
        systems=["8B"],
        traces=["tiny"],
        shares=[0.3, 0.6],
        jobs=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(one.share, one.policy) for one in found] == [
        (0.3, "no speculation"),
        (0.3, "static 3"),
        (0.6, "no speculation"),
        (0.6, "static 3"),
    ]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_public_trace(data_path: DataPath, monkeypatch: pytest.MonkeyPatch) -> None:
    # Origin: Azure's conversation trace opens and is served; what is drafted is what was asked for.
    data = data_path("azure-llm-2023", "conv.csv.gz").parents[1]
    monkeypatch.setattr(comparison, "REQUESTS", {"azure-conv": COUNT})
    found = run("8B", "azure-conv", 0.6, "static 3", data)
    assert found.mean_length == 3.0
    assert found.tokens_per_round == pytest.approx(1.0 + float(depth_decay_survival(0.78, 0.95, 3).sum()), rel=0.1)


# ---- tables --------------------------------------------------------------------------------------------

ONE = Result(
    system="8B",
    trace="tiny",
    share=0.3,
    rate_rps=2.0,
    policy="",
    tpot_mean_s=0.010,
    tpot_p99_s=0.02,
    ttft_p99_s=0.5,
    e2e_mean_s=1.0,
    e2e_p99_s=2.0,
    slo_attainment=0.9,
    tokens_per_round=2.0,
    mean_length=3.0,
)
MS = (10.0, 8.0, 6.0, 5.0, 7.0, 5.5, 6.0, 6.5, 5.0, 4.0, 2.5)


def by_hand() -> list[Result]:
    return [replace(ONE, policy=name, tpot_mean_s=ms / 1e3) for name, ms in zip(POLICIES, MS, strict=True)]


def test_ratios_by_hand() -> None:
    # Origin: hand; of the five scripted policies the best has 5 ms and the worst 10 ms.
    (row,) = ratios(by_hand())
    assert (row["system"], row["trace"], row["share"]) == ("8B", "tiny", 0.3)
    assert row["ours: table over best"] == pytest.approx(5.0 / 4.0, rel=1e-12)
    assert row["ours: table over worst"] == pytest.approx(10.0 / 4.0, rel=1e-12)
    assert row["SmartSpec over best"] == pytest.approx(5.0 / 5.5, rel=1e-12)
    assert "static 3 over best" not in row
    both = [*by_hand(), *(replace(one, share=0.6, tpot_mean_s=2 * one.tpot_mean_s) for one in by_hand())]
    assert [one["share"] for one in ratios(both)] == [0.3, 0.6]
    assert ratios(both)[1]["ours: table over best"] == pytest.approx(1.25, rel=1e-12)


def test_csv_by_hand() -> None:
    # Origin: the records; six digits.
    text = csv_text([replace(ONE, policy="static 3", rate_rps=1 / 3)])
    assert text.count("\n") == 2
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["policy"] == "static 3"
    assert row["rate_rps"] == "0.333333"
    assert float(row["tpot_mean_s"]) == pytest.approx(0.010, rel=1e-12)
    assert set(row) == set(Result.__slots__)


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Origin: what was asked for arrives, what was found leaves.
    asked: dict[str, object] = {}

    def fake(data: Path, **given: object) -> list[Result]:
        asked.update(given, data=data)
        return by_hand()

    monkeypatch.setattr(comparison, "compare", fake)
    out = tmp_path / "found.csv"
    main(["--data", str(tmp_path), "--system", "70B", "--share", "0.5", "--share", "0.7", "--out", str(out)])
    assert (asked["data"], asked["systems"], asked["shares"]) == (tmp_path, ["70B"], [0.5, 0.7])
    assert asked["traces"] == tuple(comparison.TRACES)
    assert capsys.readouterr().out == out.read_text() == csv_text(by_hand())
    main(["--data", str(tmp_path), "--json"])
    assert [one["policy"] for one in json.loads(capsys.readouterr().out)] == list(POLICIES)

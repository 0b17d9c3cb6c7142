"""A draft-length plan as JSON, text and engine table. Expected values: the answer itself, hand calculations, the
engine's own reading of its file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from speculation_plans import speed_table, sweep

from servecast.calibration.fits.acceptance import fit_acceptance
from servecast.calibration.fits.speculation_cells import CellsFit, fit_cells
from servecast.cli.output import to_json
from servecast.model.acceptance import AcceptanceSample
from servecast.policies.speculation import SpeculationTable
from servecast.policies.vllm_speculation import read_vllm_schedule
from servecast.speculating import plan_speculation
from servecast.speculation_answers import DecodeLimits, SpeculationAnswer
from servecast.speculation_document import (
    acceptance_document,
    plan_document,
    plan_text,
    policy_document,
    speculation_table,
)

PROVENANCE = {"servecast": "0", "profile": "hand", "acceptance": "hand", "date": "2026-01-01"}
SPEED = np.array([[50.0, 80.0, 95.0], [50.0, 80.0, 95.0], [50.0, 80.0, 70.0], [50.0, 80.0, 70.0]])
"""Length 2 is best up to batch 2, length 1 beyond."""


@pytest.fixture(scope="module")
def answer() -> SpeculationAnswer:
    return plan_speculation(speed_table(SPEED, off=[60.0] * 4))


@pytest.fixture(scope="module")
def fit() -> CellsFit:
    return fit_cells(sweep())


def engine_table(answer: SpeculationAnswer, **changed: Any) -> SpeculationTable:
    given: dict[str, Any] = {
        "engine": "vllm",
        "version": "0.32",
        "model": "some/model",
        "method": "eagle3",
        "draft_model": "some/head",
        "data_parallel": 1,
        "model_runner": "v2",
        "provenance": PROVENANCE,
    }
    return speculation_table(answer, **{**given, **changed})


# ---- the plan ------------------------------------------------------------------------------------------

KEYS = {
    "schema",
    "status",
    "schedule",
    "predicted",
    "gain",
    "regret",
    "binding",
    "infeasible_batches",
    "static",
    "by_context",
    "limits",
    "acceptance",
    "fit",
    "measure_next",
    "methods",
    "policy",
    "advice",
    "warnings",
}


def test_plan_by_hand(answer: SpeculationAnswer) -> None:
    # Origin: docs/json.md for the keys, `SPEED` for the values: weights 12, 6, 4, 3 of 25 for batches 1 to 4.
    found = plan_document(answer, policy=None)
    assert set(found) == KEYS
    assert found["schema"] == "servecast.speculation-plan/1"
    assert found["status"] == "optimal"
    assert found["schedule"] == [
        {"lo": 1, "hi": 2, "draft_length": 2},
        {"lo": 3, "hi": 4, "draft_length": 1},
    ]
    assert [one["batch_size"] for one in found["predicted"]] == [1, 2, 3, 4]
    first, last = found["predicted"][0], found["predicted"][-1]
    assert (first["draft_length"], last["draft_length"]) == (2, 1)
    assert last["goodput_tok_s"]["value"] == pytest.approx(4 * 80.0, rel=1e-12)
    assert last["tpot_s"]["value"] == pytest.approx(1 / 80.0, rel=1e-12)
    assert last["step_s"] == pytest.approx(2 / 80.0, rel=1e-12)
    assert last["over_no_speculation"] == pytest.approx(80 / 60 - 1, rel=1e-12)
    assert last["meets"] is True
    assert last["calibrated"] is True
    # length 2 throughout loses 1 - 70 / 80 at batches 3 and 4, length 1 loses 15 / 95 at 1 and 2
    static = {one["draft_length"]: one for one in found["static"]}
    assert static[2]["mean_regret"] == pytest.approx(7 / 25 * 0.125, rel=1e-12)
    assert static[1]["mean_regret"] == pytest.approx(18 / 25 * 15 / 95, rel=1e-12)
    assert static[1]["worst_regret"] == pytest.approx(15 / 95, rel=1e-12)
    assert found["gain"]["best_static_length"] == 2
    assert found["gain"]["over_best_static"] == pytest.approx(7 / 25 * (80 / 70 - 1), rel=1e-12)
    assert found["gain"]["over_no_speculation"] == pytest.approx((18 * 95 + 7 * 80) / 25 / 60 - 1, rel=1e-12)
    assert found["regret"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert found["regret"]["gap"] == 0.0
    # one edge, at the price of 0.2 %
    assert found["regret"]["objective"] == pytest.approx(0.002, rel=1e-9)
    assert found["limits"]["output_tokens"] == 256.0
    assert (found["fit"], found["policy"], found["methods"], found["measure_next"]) == (None, None, [], [])


def test_plan_is_strict_json(answer: SpeculationAnswer) -> None:
    # Origin: rule, no NaN; the one context is not known, which is null.
    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    found = json.loads(to_json(plan_document(answer, policy=None)), parse_constant=refuse)
    assert found["by_context"][0]["context"] is None
    assert found["predicted"][0]["context"] is None


def test_plan_with_a_fit_and_methods(answer: SpeculationAnswer, fit: CellsFit) -> None:
    # Origin: the fit's own record; 16 cells of batches 1 to 64.
    found = plan_document(answer, policy=None, fit=fit, methods=[("a", 0.9, [(1, 2), (4, 4)])])
    assert found["methods"] == [
        {"method": "a", "relative_goodput": 0.9, "wins": [{"lo": 1, "hi": 2}, {"lo": 4, "hi": 4}]}
    ]
    record = found["fit"]
    assert (record["cells"], record["dropped"]) == (16, [])
    assert record["range"] == {"batch_size": [1.0, 64.0], "draft_length": [0, 5]}
    assert record["in_sample_mape"] < 0.02
    assert [one["form"] for one in record["forms"]] == [str(member.form) for member in fit.members]
    assert sum(one["weight"] for one in record["forms"]) == pytest.approx(1.0, rel=1e-12)
    assert all(len(one["residuals"]) == 16 for one in record["forms"])
    names = [one["name"] for one in record["forms"][0]["parameters"]]
    assert names[0] == "base_s"
    assert names[-2:] == ["acceptance", "decay"]
    assert all(one["standard_error"] > 0.0 for form in record["forms"] for one in form["parameters"])
    assert [one["batch_size"] for one in record["held_out"]["by_batch"]] == [1.0, 4.0, 16.0, 64.0]
    assert fit.heldout is not None
    assert record["held_out"]["mape"] == pytest.approx(float(np.abs(fit.heldout.error).mean()), rel=1e-12)
    assert json.loads(to_json(found))["fit"]["forms"][0]["residuals"] == pytest.approx(
        fit.members[0].residuals.tolist(), rel=1e-9, abs=1e-15
    )


def test_a_fit_of_two_batch_sizes_leaves_none_out() -> None:
    found = plan_document(plan_speculation(speed_table(SPEED)), policy=None, fit=fit_cells(sweep(batches=(1, 16))))
    assert found["fit"]["held_out"] is None


def test_acceptance_of_a_plan(answer: SpeculationAnswer) -> None:
    # Origin: hand; without a file only the tokens are known.
    assert acceptance_document(answer, None) == {
        "tokens_per_step": [
            {"draft_length": k, "mean_acceptance_length": k + 1.0, "lo": k + 1.0, "hi": k + 1.0} for k in range(3)
        ]
    }
    samples = [AcceptanceSample(draft_length=k, mean_acceptance_length=a) for k, a in ((2, 2.36), (4, 3.08))]
    fitted = fit_acceptance(samples, max_length=4)
    found = acceptance_document(answer, fitted)
    assert found["form"] == fitted.form
    assert found["measured"] == [2, 4]
    assert found["notes"] == list(fitted.notes)
    assert {one["form"] for one in found["rivals"]} == {one.form for one in fitted.rivals}


# ---- the engine's table --------------------------------------------------------------------------------


def test_engine_table_by_hand(answer: SpeculationAnswer) -> None:
    # Origin: `SPEED`, at the upper end of each segment.
    table = engine_table(answer)
    assert [(one.lo, one.hi, one.draft_length) for one in table.segments] == [(1, 2, 2), (3, 4, 1)]
    assert (table.max_batch, table.num_speculative_tokens, table.best_static_length) == (4, 2, 2)
    goodput = [one.goodput_tokens_per_s.value for one in table.predicted]
    assert goodput == pytest.approx([190.0, 320.0], rel=1e-12)
    assert [one.tpot_s.value for one in table.predicted] == pytest.approx([1 / 95, 1 / 80], rel=1e-12)


def test_the_longest_context_speaks() -> None:
    # Origin: hand, at the longer context everything is half as fast.
    both = speed_table(np.array([SPEED, 0.5 * SPEED]), contexts=(100.0, 200.0))
    table = engine_table(plan_speculation(both))
    assert table.predicted[0].tpot_s.value == pytest.approx(2 / 95, rel=1e-12)


def test_vllm_reads_the_schedule_back(answer: SpeculationAnswer) -> None:
    # Origin: vLLM's own reading of its configuration.
    document = policy_document(engine_table(answer))
    assert read_vllm_schedule(document["speculative_config"], 4) == answer.lengths.tolist() == [2, 2, 1, 1]
    assert json.loads(document["files"]["vllm_speculation.json"]) == document["speculative_config"]
    assert set(document["files"]) == {"speculation.json", "vllm_speculation.json", "vllm_speculation.sh"}
    assert document["missing"] == []


def test_names_that_are_missing_are_never_written(answer: SpeculationAnswer) -> None:
    # Origin: rule; a config for eyes has no model, files there are none.
    document = policy_document(engine_table(answer, model=None, draft_model=None))
    assert document["missing"] == ["model", "draft_model"]
    assert document["files"] == {}
    assert document["speculative_config"]["method"] == "eagle3"
    assert "TO-BE-NAMED" not in json.dumps(document)
    # a drafter inside the target's own checkpoint needs no name
    assert policy_document(engine_table(answer, method="mtp", draft_model=None))["missing"] == []


def test_an_engine_without_a_schedule(answer: SpeculationAnswer) -> None:
    # Origin: the schedule is in vLLM from 0.24.0 on (policies.vllm_speculation); length 2 is the best single one.
    old = engine_table(answer, version="0.22.1", model_runner=None)
    with pytest.raises(ValueError, match=r"vllm 0\.22\.1 has no num_speculative_tokens_per_batch_size"):
        policy_document(old)
    config = policy_document(old, allow_static=True)["speculative_config"]
    assert read_vllm_schedule(config, 4) == [2, 2, 2, 2]


def test_the_best_static_length_fits_into_the_schedule_s_room() -> None:
    # Origin: hand. Length 3 is 0.4 % faster than length 2, within a doubt of 0.8 %: the schedule has the shorter, and
    # so has an engine without one, which has no room for more.
    speed = [[50.0, 90.0, 99.6, 100.0]] * 4
    answer = plan_speculation(speed_table(speed, ratio_sd=0.008))
    assert answer.schedule.segments == ((1, 4, 2),)
    assert answer.best_static == 2
    document = policy_document(engine_table(answer))
    assert read_vllm_schedule(document["speculative_config"], 4) == [2, 2, 2, 2]


def test_other_engines_get_their_own_files(answer: SpeculationAnswer) -> None:
    # Origin: the names of policies.speculation_files.
    sglang = policy_document(engine_table(answer, engine="sglang", version="0.5.14", model_runner=None))
    assert set(sglang["files"]) == {"speculation.json", "sglang_speculation.json", "sglang_speculation.sh"}
    assert "speculative_config" not in sglang
    trtllm = policy_document(engine_table(answer, engine="trtllm", version="1.3.0rc22", model_runner=None))
    assert "trtllm_speculation.yaml" in trtllm["files"]


# ---- text ----------------------------------------------------------------------------------------------


def test_text_tells_the_plan(answer: SpeculationAnswer) -> None:
    # Origin: the plan by hand, above.
    policy = policy_document(engine_table(answer, model=None))
    lines = plan_text(answer, policy, "hand.csv", methods=[("mine", 1.0, [(1, 4)])]).splitlines()
    assert lines[0] == "draft length 2 up to batch 2, 1 up to batch 4"
    assert any(line.split() == ["source", "hand.csv"] for line in lines)
    assert any("+4.0% over length 2 throughout, +51.3% [+44%, +59%] over no speculation" in line for line in lines)
    shown = [line.split() for line in lines if line.strip().startswith("4 ")]
    assert shown[0][:3] == ["4", "1", "320"]
    assert shown[0][-2:] == ["+14.3%", "+33.3%"]
    assert "  method mine: 100.0% of the best method's goodput, best at batch 1 to 4" in lines
    assert any(line.startswith("--speculative-config '{") for line in lines)
    assert lines[-1] == "name --model for the files"
    config = json.loads(next(line for line in lines if line.startswith("--spec")).split(" ", 1)[1].strip("'"))
    assert config == policy["speculative_config"]


def test_text_without_a_policy_has_the_advice() -> None:
    off = plan_speculation(speed_table(SPEED, off=[200.0] * 4))
    text = plan_text(off, None, "hand")
    assert any(line.startswith("advice: switch speculation off") for line in text.splitlines())


def test_text_marks_limits_that_are_missed() -> None:
    # Origin: hand, 12 ms per token is kept up to batch 2 (10.5 ms) and missed beyond (12.5 ms).
    found = plan_speculation(speed_table(SPEED), limits=DecodeLimits(tpot_mean_s=0.012))
    assert found.schedule.infeasible_batches == (3, 4)
    lines = plan_text(found, None, "hand").splitlines()
    assert sum(line.endswith("misses the limits") for line in lines) == 2
    assert any(line.startswith("  limits       tpot_mean; binds: ") for line in lines)


def test_text_of_several_contexts() -> None:
    both = plan_speculation(speed_table(np.array([SPEED, 0.5 * SPEED]), contexts=(100.0, 20000.0)))
    lines = plan_text(both, None, "hand").splitlines()
    assert "  at 100 cached tokens" in lines
    assert "  at 20,000 cached tokens" in lines

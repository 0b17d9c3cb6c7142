"""``servecast speculate`` as a program. Expected values: sweeps whose true cost is known, hand calculations, vLLM's own
reading of its file."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from speculation_plans import ACCEPTANCE, COST, HEADER, LENGTHS, NAMES, PASSES, PLAN, sweep, true_speed, write_sweep

import servecast
from servecast import speculation_sources
from servecast.cli import main, speculate_command
from servecast.model.speculation_cells import SpeculationCells
from servecast.model.speculation_cost import step_seconds
from servecast.policies.vllm_speculation import read_vllm_schedule
from servecast.speculation_sources import method_of

DataPath = Callable[..., Path]

DEAR = replace(COST, row_s=2e-4)
"""A row costs five times as much, so that long drafts do not pay in large batches."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with a sweep, acceptance and passes."""
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path / "cells.csv", sweep(cost=DEAR))
    (tmp_path / "acceptance.csv").write_text(ACCEPTANCE)
    (tmp_path / "passes.csv").write_text(PASSES)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["speculate", *arguments])
    assert result.exit_code == 0, result.stderr
    return result


def document(*arguments: str) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    parsed = json.loads(run(*arguments, "--json").stdout, parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed


def dense(found: dict[str, Any]) -> list[int]:
    """Draft length at batch 1, 2, ..."""
    return [one["draft_length"] for one in found["schedule"] for _ in range(one["lo"], one["hi"] + 1)]


# ---- plans ---------------------------------------------------------------------------------------------


def test_a_plan_from_a_sweep() -> None:
    # Origin: the sweep's true cost. At every batch the chosen length is within 2 % of the best of the true speeds
    # (1 % may be given away, edges lie at captured sizes), and what is predicted is within 2 % of what is true.
    found = document(*PLAN)
    assert found["schema"] == "servecast.speculation-plan/1"
    assert found["status"] == "optimal"
    lengths = dense(found)
    assert len(lengths) == 64
    assert len(set(lengths)) >= 2
    batch = np.arange(1, 65)
    speeds = np.array([true_speed(batch, k, cost=DEAR) for k in range(6)])
    speeds[0] = 1.0 / step_seconds(DEAR, batch, 0, armed=True)
    assert (speeds[lengths, batch - 1] >= 0.98 * speeds.max(axis=0)).all()
    for one in found["predicted"]:
        true = one["batch_size"] * speeds[one["draft_length"], one["batch_size"] - 1]
        assert one["goodput_tok_s"]["value"] == pytest.approx(true, rel=0.02)
        assert one["goodput_tok_s"]["lo"] < true < one["goodput_tok_s"]["hi"]
        # goodput is requests over time per token
        assert one["goodput_tok_s"]["value"] * one["tpot_s"]["value"] == pytest.approx(one["batch_size"], rel=1e-9)
    assert found["gain"]["over_no_speculation"] > 0.0
    assert found["fit"]["cells"] == 16
    assert found["acceptance"]["tokens_per_step"][5]["mean_acceptance_length"] == pytest.approx(LENGTHS[5], rel=0.01)


def test_vllm_reads_the_schedule_back() -> None:
    # Origin: vLLM's own reading of its configuration.
    found = document(*PLAN, *NAMES)
    assert read_vllm_schedule(found["policy"]["speculative_config"], 64) == dense(found)
    assert found["policy"]["speculative_config"]["model"] == "some/head"


def test_text_tells_the_same() -> None:
    found, text = document(*PLAN), run(*PLAN).stdout
    said = ", ".join(f"{one['draft_length']} up to batch {one['hi']}" for one in found["schedule"])
    assert text.startswith(f"draft length {said}\n")
    assert f"--speculative-config '{json.dumps(found['policy']['speculative_config'])}'" in text
    for line in found["warnings"]:
        assert f"warning: {line}" in text


def test_limits_load_and_rules_arrive() -> None:
    # Origin: the limits as typed, and what they must not exceed.
    found = document(*PLAN, "--slo", "tpot_p99=12ms", "--slo", "step=40ms", "--slo", "tpot_mean=11ms")
    assert found["limits"]["tpot_mean_s"] == pytest.approx(0.011, rel=1e-12)
    assert found["limits"]["tpot_quantiles"] == [[99.0, pytest.approx(0.012, rel=1e-12)]]
    assert found["limits"]["step_s"] == pytest.approx(0.040, rel=1e-12)
    for one in found["predicted"]:
        if one["meets"]:
            assert one["tpot_s"]["value"] <= 0.011
            assert one["step_s"] <= 0.040 or one["draft_length"] == 0
    assert any(one["meets"] for one in found["predicted"])
    assert len({one["draft_length"] for one in document(*PLAN, "--max-lengths", "1")["schedule"]}) == 1
    assert len(document(*PLAN, "--max-segments", "1")["schedule"]) == 1
    assert 0 not in dense(document(*PLAN, "--no-zero"))
    assert len(dense(document(*PLAN, "--max-batch", "20"))) == 20
    assert max(dense(document(*PLAN, "--max-length", "2"))) <= 2
    loaded = document(*PLAN, "--rate", "10/s", "--output-tokens", "100", "--switch-cost", "1s")
    assert len(loaded["schedule"]) == 1


def test_another_text_s_acceptance_replaces_the_sweep_s() -> None:
    # Origin: the file; the same seconds with fewer tokens.
    own, other = document(*PLAN), document(*PLAN, "--acceptance", "acceptance.csv")
    tokens = [one["mean_acceptance_length"] for one in other["acceptance"]["tokens_per_step"]]
    assert (tokens[1], tokens[2], tokens[4]) == (1.8, 2.3, 3.0)
    assert other["acceptance"]["measured"] == [1, 2, 4]
    assert other["predicted"][0]["goodput_tok_s"]["value"] < own["predicted"][0]["goodput_tok_s"]["value"]


def test_acceptance_fills_cells_that_have_none(folder: Path) -> None:
    # Origin: round trip; cells without lengths, whose lengths are in a file of their own, give the true tokens.
    cells = sweep(lengths=(0, 1, 2, 4), cost=DEAR)
    (folder / "bare.csv").write_text(
        HEADER
        + "".join(
            f"{b:g},{k},{y:.8g}\n" for b, k, y in zip(cells.batch, cells.gamma, cells.tok_s_per_request, strict=True)
        )
    )
    (folder / "true.csv").write_text(
        "draft_length,mean_acceptance_length\n" + "".join(f"{k},{LENGTHS[k]:.6f}\n" for k in (1, 2, 4))
    )
    found = document("--cells", "bare.csv", "--acceptance", "true.csv")
    tokens = [one["mean_acceptance_length"] for one in found["acceptance"]["tokens_per_step"]]
    assert [tokens[k] for k in (1, 2, 4)] == pytest.approx([LENGTHS[k] for k in (1, 2, 4)], rel=1e-4)
    batch = found["predicted"][-1]
    assert batch["goodput_tok_s"]["value"] == pytest.approx(
        batch["batch_size"] * float(true_speed(batch["batch_size"], batch["draft_length"], cost=DEAR)), rel=0.02
    )


def test_a_plan_from_measured_passes_by_hand() -> None:
    # Origin: hand. One request: 2 tokens of length 1 are padded to 8 rows: 12 + 1 ms for 1.8 tokens, length 2
    # 12 + 2 ms for 2.3, length 4 12 + 4 ms for 3.0: 138, 164 and 188 tokens/s; off 10 ms, 100 tokens/s.
    alone = document("--step-cost", "passes.csv", "--acceptance", "acceptance.csv", "--max-batch", "1")
    first = alone["predicted"][0]
    assert first["draft_length"] == 4
    assert first["goodput_tok_s"]["value"] == pytest.approx(3.0 / 0.016, rel=1e-9)
    assert first["over_no_speculation"] == pytest.approx(1.875 - 1.0, rel=1e-9)
    found = document("--step-cost", "passes.csv", "--acceptance", "acceptance.csv")
    assert found["schedule"][-1]["hi"] == 16
    assert found["fit"] is None
    assert found["measure_next"] == []
    # 16 requests of 5 tokens are 80 rows, beyond the 64 measured
    last = found["predicted"][-1]
    assert last["calibrated"] is (16 * (last["draft_length"] + 1) <= 64)


def test_all_positions_in_one_pass_where_the_method_does_so() -> None:
    # Origin: hand, above; length 4 then takes 12 + 1 ms.
    passes = ("--step-cost", "passes.csv", "--acceptance", "acceptance.csv", "--max-batch", "1")
    found = document(*passes, "--method", "dflash", *NAMES)
    assert found["predicted"][0]["goodput_tok_s"]["value"] == pytest.approx(3.0 / 0.013, rel=1e-9)


def test_a_plan_from_a_profile() -> None:
    # Origin: laws. A longer context is slower; the table keeps its limit at both.
    found = document(
        *("--model", "llama-3.1-8b", "--gpu", "h100", "--acceptance", "acceptance.csv", "--max-batch", "64"),
        *("--context", "16000", "--context", "1000", "--slo", "tpot_mean=15ms"),
    )
    assert [one["context"] for one in found["by_context"]] == [1000.0, 16000.0]
    by_context = {c: [one for one in found["predicted"] if one["context"] == c] for c in (1000.0, 16000.0)}
    pairs = list(zip(by_context[1000.0], by_context[16000.0], strict=True))
    assert all(short["tpot_s"]["value"] < long["tpot_s"]["value"] for short, long in pairs)
    assert all(one["tpot_s"]["value"] <= 0.015 for one in found["predicted"] if one["meets"])


def test_contexts_of_a_sweep_without_that_column() -> None:
    # Origin: hand. Llama 3.1 8B keeps 2 x 32 x 8 x 128 x 2 bytes = 128 KiB a token; an H100 reads 3.35 TB/s.
    plain = document(*PLAN, "--max-lengths", "1")
    carried = ("--model", "llama-3.1-8b", "--gpu", "h100", "--context", "4500", "--measured-context", "500")
    found = document(*PLAN, "--max-lengths", "1", *carried)
    one, other = found["predicted"][0], plain["predicted"][0]
    assert one["draft_length"] == other["draft_length"]
    assert one["step_s"] - other["step_s"] == pytest.approx(4000 * 131072 / 3.35e12, rel=1e-6)


def test_contexts_of_a_sweep_that_has_them(folder: Path) -> None:
    # Origin: the true cost, 20 ns a token.
    cost = replace(DEAR, cached_token_s=2e-8)
    write_sweep(folder / "long.csv", sweep(contexts=(1000.0, 16000.0), cost=cost))
    found = document("--cells", "long.csv", "--context", "8000")
    one = found["predicted"][0]
    assert one["context"] == 8000.0
    assert one["goodput_tok_s"]["value"] == pytest.approx(
        float(true_speed(1, one["draft_length"], 8000, cost)), rel=0.02
    )


def test_rivals_are_compared(folder: Path) -> None:
    # Origin: a drafter of the same steps whose tokens are 10 % fewer is nowhere better where drafts pay.
    cells = sweep(cost=DEAR)
    slower = np.where(cells.gamma > 0, 0.9, 1.0)
    worse = replace(
        cells,
        tok_s_per_request=cells.tok_s_per_request * slower,
        mean_acceptance_length=np.maximum(cells.mean_acceptance_length * slower, 1.0),
    )
    write_sweep(folder / "rival.csv", worse)
    methods = document(*PLAN, "--no-zero", "--compare", "rival=rival.csv")["methods"]
    assert [one["method"] for one in methods] == ["this", "rival"]
    assert methods[0]["relative_goodput"] == pytest.approx(1.0, rel=0.005)
    assert methods[1]["relative_goodput"] == pytest.approx(0.9, rel=0.02)
    assert "method rival: " in run(*PLAN, "--no-zero", "--compare", "rival=rival.csv").stdout


def test_trtllm_lengths_never_rise(folder: Path) -> None:
    # Origin: a sweep in which a long draft is best for large batches alone; TensorRT-LLM pads as if it never were.
    cells = sweep(batches=(1, 4, 16, 64), lengths=(0, 1, 3))
    rising = np.where((cells.gamma == 3) & (cells.batch < 10), 0.5, 1.0)
    write_sweep(folder / "rising.csv", replace(cells, tok_s_per_request=cells.tok_s_per_request * rising))
    names = ("--method", "eagle3", *NAMES)
    free = dense(document("--cells", "rising.csv", *names))
    assert free != sorted(free, reverse=True)
    bound = dense(document("--cells", "rising.csv", *names, "--engine", "trtllm@1.3.0rc22", "--allow-static"))
    assert bound == sorted(bound, reverse=True)


def test_an_engine_without_a_schedule_gets_the_best_length_if_asked() -> None:
    # Origin: policies.vllm_speculation, the schedule is in vLLM from 0.24.0 on.
    found = document(*PLAN, "--engine", "vllm@0.20.0", "--allow-static")
    assert len(found["schedule"]) > 1
    config = found["policy"]["speculative_config"]
    assert read_vllm_schedule(config, 64) == [found["gain"]["best_static_length"]] * 64


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("EAGLE3", "eagle3"),
        ("EAGLE chain topk 1", "eagle"),
        ("Eagle-3", "eagle3"),
        ("DSpark", "dspark"),
        ("", "eagle3"),
    ],
)
def test_methods_of_labels(label: str, method: str) -> None:
    # Origin: the engines' own words.
    assert method_of(label) == method


# ---- files ---------------------------------------------------------------------------------------------


def test_files_are_written_whole(folder: Path) -> None:
    # Origin: the JSON of the same query.
    found = document(*PLAN, *NAMES)
    result = run(*PLAN, *NAMES, "--out", "new/policy")
    written = sorted(path.name for path in (folder / "new" / "policy").iterdir())
    assert written == ["speculation.json", "vllm_speculation.json", "vllm_speculation.sh"]
    assert result.stderr.splitlines() == [f"wrote new/policy/{name}" for name in found["policy"]["files"]]
    config = json.loads((folder / "new/policy/vllm_speculation.json").read_text())
    assert config == found["policy"]["speculative_config"]
    table = json.loads((folder / "new/policy/speculation.json").read_text())
    assert table["schema"] == "servecast.speculation/1"
    assert [(one["lo"], one["hi"], one["draft_length"]) for one in table["segments"]] == [
        (one["lo"], one["hi"], one["draft_length"]) for one in found["schedule"]
    ]
    run(*PLAN, *NAMES, "--out", "new/policy")  # once more over the same files


def test_labels_of_the_sweep_name_model_and_method(folder: Path) -> None:
    # Origin: the file's own columns.
    write_sweep(folder / "named.csv", sweep(cost=DEAR), labels=(("model", "some/target"), ("drafter", "MTP")))
    policy = document("--cells", "named.csv")["policy"]
    assert policy["missing"] == []  # the drafter is in the target's checkpoint
    assert policy["speculative_config"]["method"] == "mtp"
    assert json.loads(policy["files"]["speculation.json"])["model"] == "some/target"


@pytest.mark.skipif(
    importlib.util.find_spec("servecast.reports.speculation_page") is None, reason="no page of a draft-length plan"
)
@pytest.mark.parametrize("page", ["page.html", "policy/page.html"])
def test_a_page_is_written(folder: Path, page: str) -> None:
    result = run(*PLAN, *NAMES, "--report", page, "--out", "policy")
    text = (folder / page).read_text()
    assert text.lower().startswith("<!doctype html>")
    assert "some/model" in text
    assert f"wrote {page}" in result.stderr.splitlines()
    assert len(list((folder / "policy").glob("*speculation*"))) == 3


# ---- scores --------------------------------------------------------------------------------------------


def test_scores_by_hand(folder: Path) -> None:
    # Origin: hand, from the predictions printed: measured speeds are chosen numbers. At batch 8 length 3 is
    # truly the faster by far and is said to have 90 where length 0 has 100.
    assert true_speed(8, 3, cost=DEAR) > 1.2 * true_speed(8, 0, cost=DEAR)
    (folder / "score.csv").write_text(HEADER + "8,0,100\n8,3,90\n32,1,70\n32,5,\n")
    found = document(*PLAN, "--predict", "score.csv")
    assert set(found) >= {"mape", "max_error", "regret_max", "cells"}
    assert found["schema"] == "servecast.speculation-score/1"
    predicted = [one["predicted_tok_s_per_request"] for one in found["cells"]]
    truth = [float(true_speed(b, k, cost=DEAR)) for b, k in ((8, 0), (8, 3), (32, 1), (32, 5))]
    assert predicted == pytest.approx(truth, rel=0.02)
    errors = [abs(predicted[0] / 100 - 1), abs(predicted[1] / 90 - 1), abs(predicted[2] / 70 - 1)]
    assert found["mape"] == pytest.approx(sum(errors) / 3, rel=1e-12)
    assert found["max_error"] == pytest.approx(max(errors), rel=1e-12)
    assert found["regret_max"] == pytest.approx(0.1, rel=1e-12)
    assert found["cells"][3]["measured_tok_s_per_request"] is None
    assert found["cells"][3]["error"] is None
    assert [one["draft_length"] for one in found["cells"]] == [0, 3, 1, 5]
    text = run(*PLAN, "--predict", "score.csv").stdout
    assert text.startswith("4 cells: mean absolute error ")
    assert "regret at most 10.00%" in text


def test_scores_without_speeds(folder: Path) -> None:
    # Origin: rule, a missing metric is missing.
    (folder / "ask.csv").write_text("batch_size,draft_length\n8,2\n")
    found = document(*PLAN, "--predict", "ask.csv")
    assert (found["mape"], found["max_error"], found["regret_max"]) == (None, None, None)
    assert found["cells"][0]["predicted_tok_s_per_request"] == pytest.approx(
        float(true_speed(8, 2, cost=DEAR)), rel=0.02
    )
    assert "mean absolute error -" in run(*PLAN, "--predict", "ask.csv").stdout


def test_an_open_sweep_fitted_on_one_half_and_scored_on_the_other(data_path: DataPath, folder: Path) -> None:
    # Origin: vLLM's published sweep of 24 cells (batch 1, 16, 32, 64); 12 of them fitted, the other 12 predicted. The
    # bounds are the requirement: 10 % on average, 5 % of speed lost by what is chosen.
    with data_path("speculation", "dspark_v4pro_8xb300.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for name, part in (("first.csv", rows[::2]), ("second.csv", rows[1::2])):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(part)
    found = document("--cells", "first.csv", "--predict", "second.csv")
    assert len(found["cells"]) == 12
    assert found["mape"] < 0.10
    assert found["regret_max"] < 0.05


# ---- acceptance of the sweep, and of the load ----------------------------------------------------------


def unmeasured(cells: SpeculationCells) -> SpeculationCells:
    """The speeds alone."""
    return replace(cells, mean_acceptance_length=np.full(cells.size, np.nan))


def test_acceptance_of_the_load_moves_the_speeds() -> None:
    # Origin: hand. T stays what the sweep says, so the speed of length 1 goes with its tokens per step: 1.4 of the load
    # over the sweep's own.
    only = ("--max-length", "1", "--no-zero")
    Path("half.csv").write_text("draft_length,mean_acceptance_length\n1,1.4\n")
    own, other = document(*PLAN, *only), document(*PLAN, *only, "--acceptance", "half.csv")
    tokens = own["acceptance"]["tokens_per_step"][1]["mean_acceptance_length"]
    for before, after in zip(own["predicted"], other["predicted"], strict=True):
        assert before["draft_length"] == after["draft_length"] == 1
        ratio = after["goodput_tok_s"]["value"] / before["goodput_tok_s"]["value"]
        assert ratio == pytest.approx(1.4 / tokens, rel=1e-6)


def test_acceptance_of_the_sweep_is_an_observation() -> None:
    # Origin: what was measured holds within its 1 % of noise, and the speeds are still those of the cells.
    rows = "".join(f"{k},{LENGTHS[k]:.4f}\n" for k in range(1, 6))
    Path("own.csv").write_text("draft_length,mean_acceptance_length\n" + rows)
    write_sweep(Path("speeds.csv"), unmeasured(sweep(cost=DEAR)))
    found = document("--cells", "speeds.csv", "--sweep-acceptance", "own.csv")
    for k, one in enumerate(found["acceptance"]["tokens_per_step"][:6]):
        assert one["mean_acceptance_length"] == pytest.approx(LENGTHS[k], rel=0.01)
        assert one["lo"] <= one["mean_acceptance_length"] <= one["hi"]


def test_counters_are_read_as_a_difference() -> None:
    # Origin: hand. Between the snapshots 100 drafts of 3 tokens, 160 accepted: 90, 50 and 20 at the three positions;
    # before the first one the engine warmed up with other numbers.
    def scrape(drafts: int, accepted: tuple[int, int, int]) -> str:
        name = "vllm:spec_decode_num"
        lines = [
            f'{name}_drafts_total{{model_name="m"}} {drafts}',
            f'{name}_draft_tokens_total{{model_name="m"}} {3 * drafts}',
            f'{name}_accepted_tokens_total{{model_name="m"}} {sum(accepted)}',
        ]
        lines += [
            f'{name}_accepted_tokens_per_pos_total{{model_name="m",position="{j}"}} {one}'
            for j, one in enumerate(accepted)
        ]
        return "\n".join(lines) + "\n"

    Path("before.prom").write_text(scrape(50, (10, 5, 1)))
    Path("after.prom").write_text(scrape(150, (100, 55, 21)))
    found = document(*PLAN, "--max-length", "3", "--acceptance-before", "before.prom", "--acceptance", "after.prom")
    assert found["acceptance"]["measured"] == [3]
    assert found["acceptance"]["tokens_per_step"][3]["mean_acceptance_length"] == pytest.approx(2.6, rel=1e-9)


def test_what_was_not_measured_is_said() -> None:
    # Origin: a sweep without length 0 knows neither speculation off nor tokens and seconds apart.
    write_sweep(Path("drafts.csv"), unmeasured(sweep(lengths=(1, 2, 4), cost=DEAR)))
    found = document("--cells", "drafts.csv", "--slo", "step=1s")
    assert found["gain"]["no_speculation_measured"] is False
    ends = found["gain"]["over_no_speculation_lo"], found["gain"]["over_no_speculation_hi"]
    assert ends[0] < found["gain"]["over_no_speculation"] < ends[1]
    assert any(text.startswith("no cell was measured with speculation off") for text in found["warnings"])
    assert any(text.startswith("limits on steps and on quantiles rest on") for text in found["warnings"])
    full = document(*PLAN)
    assert full["gain"]["no_speculation_measured"] is True
    width = full["gain"]["over_no_speculation_hi"] - full["gain"]["over_no_speculation_lo"]
    assert width < ends[1] - ends[0]


def test_the_same_from_python() -> None:
    # Origin: the command is the query.
    source = servecast.speed_source(servecast.SpeedRequest(cells=Path("cells.csv")))
    answer = servecast.plan_speculation(source.table)
    assert [list(one) for one in answer.schedule.segments] == [
        [one["lo"], one["hi"], one["draft_length"]] for one in document(*PLAN)["schedule"]
    ]


def test_the_help_knows_the_limits() -> None:
    # Origin: the module that keeps them, which the help does not load.
    assert (speculate_command.MAX_BATCH, speculate_command.MAX_LENGTH) == (
        speculation_sources.MAX_BATCH,
        speculation_sources.MAX_LENGTH,
    )


def test_the_engine_gets_the_name_in_full() -> None:
    # Origin: the catalogue; an engine knows no short names.
    at = ("--model", "llama-3.1-8b", "--gpu", "h100", "--acceptance", "acceptance.csv", "--draft-model", "some/head")
    run(*at, "--max-batch", "32", "--method", "eagle3", "--out", "engine")
    assert "vllm serve meta-llama/Llama-3.1-8B" in Path("engine/vllm_speculation.sh").read_text()

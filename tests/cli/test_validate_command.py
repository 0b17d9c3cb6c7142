"""`servecast validate`: refusals, exit status, JSON and page, on a made-up run; a tiny real run in the slow tier."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "validation"))
from live_samples import live_run

from servecast.cli import main
from servecast.validation.live_facts import LiveFacts


def _run(*words: str) -> Any:
    return CliRunner().invoke(main, ["validate", *words])


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> LiveFacts:
    facts = live_run()
    monkeypatch.setattr("servecast.validating._live", lambda *_: (facts, []))
    return facts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one SCENARIO, or --quick"),
        (("torch", "--quick"), "give one SCENARIO, or --quick"),
        (("none.yaml",), "scenario must be a file or one of torch, torch-quick, vllm-cpu, got 'none.yaml'"),
        (("--quick", "--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("--quick", "--seed", "-1"), "--seed must be >= 0, got -1"),
        (("--quick", "--report", "no/such/page.html"), "the folder no/such does not exist"),
        (("--quick", "--out", "rows.xml"), "rows.xml"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: tuple[str, ...], message: str) -> None:
    result = _run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_vllm_needs_to_be_told_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.delenv("SERVECAST_VLLM_PYTHON", raising=False)
    result = _run("vllm-cpu")
    assert result.exit_code == 2
    assert "--vllm-python" in result.stderr


def test_a_wrong_file_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "must be UTF-8" in _run(str(path)).stderr
    path.write_text("schema: servecast.plan/1\n")
    result = _run(str(path))
    assert (result.exit_code, "schema must be servecast.scenario/1" in result.stderr) == (2, True)


@pytest.mark.usefixtures("pretended")
def test_json_has_every_figure_and_the_status_is_the_verdicts(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.csv", tmp_path / "page.html"
    result = _run("--quick", "--json", "--out", str(rows), "--report", str(page))
    document = json.loads(result.stdout)
    assert document["schema"] == "servecast.validation/1"
    assert result.exit_code == {"within": 0, "broken": 1, "not judged": 3}[document["verdict"]]
    metrics = {(one["part"], one["metric"], one["executor"]) for one in document["comparisons"]}
    assert ("load heavy", "ttft p95", "simulator") in metrics
    assert ("load bursty", "tpot mean", "closed_form") in metrics
    assert len(document["loads"]) == 6
    assert len(rows.read_text().splitlines()) == 1 + 6 * 40
    text = page.read_text()
    assert text.count("<h1>") == 1
    assert "<script" not in text


@pytest.mark.usefixtures("pretended")
def test_text_names_the_verdict_and_every_budget() -> None:
    result = _run("--quick")
    assert result.stdout.startswith("torch-quick: ")
    for word in ("decode steps", "load light (utilisation 0.4)", "acceptance", "draft length", "budget"):
        assert word in result.stdout


def test_a_broken_budget_is_status_1_and_a_short_run_3(pretended: LiveFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended.loads = []
    pretended.stopped = "interrupted"
    result = _run("--quick")
    assert result.exit_code == 3
    assert "not reached: 6 of 6 loads" in result.stdout
    assert "stopped: interrupted" in result.stdout
    slow = live_run(factor=2.0)
    monkeypatch.setattr("servecast.validating._live", lambda *_: (slow, []))
    assert _run("--quick").exit_code == 1


def test_names_in_a_page_are_escaped(pretended: LiveFacts, tmp_path: Path) -> None:
    pretended.engine["engine"] = "<script>alert(1)</script>"
    page = tmp_path / "page.html"
    _run("--quick", "--report", str(page))
    assert "<script" not in page.read_text()


def test_the_list_of_scenarios() -> None:
    assert _run("--list").stdout.split() == ["torch", "torch-quick", "vllm-cpu"]


def test_results_of_a_load_generator_against_a_profile(tmp_path: Path) -> None:
    """A file of `vllm bench serve`: rows that the simulator itself made are predicted without error."""
    import numpy as np

    from servecast.model.workload import Trace
    from servecast.readers.catalogues import gpu, llm
    from servecast.simulating import simulate_fleet

    rng = np.random.default_rng(1)
    trace = Trace(
        name="t",
        t_s=np.cumsum(rng.exponential(0.5, 40)) - 0.0,
        n_in=rng.integers(100, 900, 40),
        n_out=rng.integers(20, 200, 40),
    )
    model, device = llm("llama-3.1-8b"), gpu("h100")
    rows = simulate_fleet(trace, model, device, replicas=1, max_num_seqs=64, max_num_batched_tokens=2048).rows
    latency = (rows.last_token_s - rows.first_token_s).tolist()
    document = {
        "date": "20260101-000000",
        "backend": "vllm",
        "model_id": "m",
        "num_prompts": 40,
        "completed": 40,
        "duration": 60.0,
        "request_throughput": 40 / 60.0,
        "input_lens": rows.n_in.tolist(),
        "output_lens": rows.n_out.tolist(),
        "ttfts": (rows.first_token_s - rows.arrival_s).tolist(),
        "itls": [[gap / (n - 1)] * (n - 1) for gap, n in zip(latency, rows.n_out.tolist(), strict=True)],
        "start_times": (100.0 + rows.arrival_s).tolist(),
        "errors": [""] * 40,
        "generated_texts": [""] * 40,
    }
    (tmp_path / "result.json").write_text(json.dumps(document))
    (tmp_path / "s.yaml").write_text(
        "schema: servecast.scenario/1\nname: mine\n"
        "engine: {kind: results, file: result.json, model: llama-3.1-8b, gpu: h100, max_num_seqs: 64,"
        " max_num_batched_tokens: 2048}\n"
        "budgets: {ttft_mean: 0.02, tpot_mean: 0.02, closed_form: 0.5}\n"
    )
    result = _run(str(tmp_path / "s.yaml"), "--json")
    assert result.stdout, result.stderr
    found = {(one["metric"], one["executor"]): one for one in json.loads(result.stdout)["comparisons"] if one["budget"]}
    for metric in ("ttft mean", "tpot mean"):
        assert abs(found[metric, "simulator"]["error"]) < 0.02
    assert result.exit_code in (0, 1)


@pytest.mark.slow
def test_the_quick_scenario_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts are reached and judged, or not judged for noise; a verdict of its own is the machine's business."""
    pytest.importorskip("torch")
    monkeypatch.setenv("SERVECAST_CACHE", str(tmp_path))
    document = json.loads(_run("--quick", "--json").stdout)
    assert document["missing"] == []
    assert document["stopped"] is None
    assert {one["case"] for one in document["loads"]} == {"light", "heavy", "bursty"}
    assert all(one["failed"] == 0 for one in document["loads"])

"""`servecast validate`: refusals, exit status, JSON and page, on a made-up run; a tiny real run in the slow tier."""

from __future__ import annotations

import json
import math
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
        (("--quick", "--report", "page.txt"), "--report must end in .html, got 'page.txt'"),
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
    result = _run("vllm-cpu", "--vllm-python", "/nowhere/python")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "servecast: error: --vllm-python or SERVECAST_VLLM_PYTHON must be an interpreter that can be run, "
        "got '/nowhere/python'"
    ]


def test_a_wrong_file_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "must be UTF-8" in _run(str(path)).stderr
    path.write_text("schema: servecast.plan/1\n")
    result = _run(str(path))
    assert (result.exit_code, "schema must be 'servecast.scenario/1'" in result.stderr) == (2, True)


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
    assert [line.split()[0] for line in _run("--list").stdout.splitlines()] == ["torch", "torch-quick", "vllm-cpu"]
    document = json.loads(_run("--list", "--json").stdout)
    assert document["schema"] == "servecast.list/1"
    assert all(one["about"] for one in document["scenarios"])


def test_a_shipped_scenario_is_shown_and_read_back(tmp_path: Path) -> None:
    from servecast.validating import load_scenario

    (tmp_path / "mine.yaml").write_text(_run("--show", "torch").stdout)
    assert load_scenario(str(tmp_path / "mine.yaml"))[0] == load_scenario("torch")[0]
    assert "--show must be one of torch, torch-quick, vllm-cpu, got 'toch'" in _run("--show", "toch").stderr


ENGINE = (
    "kind: results, file: result.json, model: llama-3.1-8b, gpu: h100, max_num_seqs: 64, max_num_batched_tokens: 2048"
)


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    """A file of `vllm bench serve` whose requests the simulator itself served."""
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
    return {
        "date": "20260101-000000",
        "backend": "vllm",
        "model_id": "meta-llama/Llama-3.1-8B-Instruct",
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


def _results(tmp_path: Path, document: dict[str, Any], *, engine: str = "", more: str = "", lines: int = 1) -> Any:
    """`servecast validate` of a scenario beside the file."""
    (tmp_path / "result.json").write_text((json.dumps(document) + "\n") * lines)
    (tmp_path / "s.yaml").write_text(
        f"schema: servecast.scenario/1\nname: mine\nengine: {{{ENGINE}{engine}}}\n"
        + (more or "budgets: {ttft_mean: 0.02, tpot_mean: 0.02, closed_form: 0.5}\n")
    )
    return _run(str(tmp_path / "s.yaml"), "--json")


def test_results_of_a_load_generator_against_a_profile(tmp_path: Path, bench: dict[str, Any]) -> None:
    """Rows that the simulator made are predicted without error, in intervals as wide as `servecast predict` has."""
    from servecast.calibration.profile import SHIPPED, load_profile

    result = _results(tmp_path, bench)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    found = {(one["metric"], one["executor"]): one for one in document["comparisons"] if one["budget"]}
    for metric in ("ttft mean", "tpot mean"):
        assert abs(found[metric, "simulator"]["error"]) < 0.02
    ttft, tpot = (found[metric, "simulator"] for metric in ("ttft mean", "tpot mean"))
    band = load_profile(SHIPPED).bands["ttft", False, "group"]
    assert ttft["hi"] / ttft["predicted"] >= 0.99 * math.exp(band.hi)
    assert tpot["hi"] / tpot["predicted"] < ttft["hi"] / ttft["predicted"]
    assert (document["notes"], document["reasons"]) == ([], [])
    text = CliRunner().invoke(main, ["validate", str(tmp_path / "s.yaml")]).stdout
    assert "naive" not in text
    assert "noise" not in text
    places = {line.index("%") for line in text.splitlines() if ", simulator " in line or ", closed_form " in line}
    assert len(places) == 1


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (
            {"model_id": "Qwen/Qwen3-32B"},
            "the file is of model Qwen/Qwen3-32B, the prediction of meta-llama/",
        ),
        ({"spec_decode_acceptance_length": 2.5}, "the server speculated; the prediction is of one that does not"),
        ({"input_lens": [200_000] + [300] * 39}, "1 of 40 requests"),
    ],
)
def test_what_the_prediction_does_not_know_is_noted(
    tmp_path: Path, bench: dict[str, Any], change: dict[str, Any], note: str
) -> None:
    document = json.loads(_results(tmp_path, bench | change).stdout)
    assert any(note in one for one in document["notes"])


def test_failed_requests_and_missing_budgets_are_reasons(tmp_path: Path, bench: dict[str, Any]) -> None:
    errors = ["boom"] * 3 + [""] * 37
    failed = bench | {"errors": errors, "output_lens": [0] * 3 + bench["output_lens"][3:]}
    result = _results(tmp_path, failed)
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert document["reasons"] == ["load result.json: 3 of 40 requests failed, above 1% of a run"]
    assert "failed with: boom" in document["notes"]
    result = _results(tmp_path, bench, more="seed: 1\n")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["reasons"] == ["no budget is written"]
    # of requests with one token each nobody can tell a TPOT
    one_token = bench | {"output_lens": [1] * 40, "itls": [[]] * 40}
    result = _results(tmp_path, one_token, more="budgets: {tpot_mean: 0.02}\n")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["reasons"] == ["load result.json: 2 figures not measured"]
    # a failed load without a budget takes nothing from the others
    (only,) = {one["verdict"] for one in json.loads(_results(tmp_path, failed, more="seed: 1\n").stdout)["comparisons"]}
    assert only == "reported"


def test_a_run_of_several_is_chosen_by_its_number(tmp_path: Path, bench: dict[str, Any]) -> None:
    result = _results(tmp_path, bench, lines=2)
    assert (result.exit_code, "holds 2 benchmarks" in result.stderr) == (2, True)
    assert _results(tmp_path, bench, lines=2, engine=", benchmark: 1").exit_code == 0
    result = _results(tmp_path, bench, lines=2, engine=", benchmark: 2")
    assert (result.exit_code, "benchmark must be from 0 to 1, got 2" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_times": None}, "got latencies without the starts (save with"),
        ({"start_times": [1e300] + [5.0] * 39}, "requests must start within 1e+08 s, got 1e+300 s"),
        ({"ttfts": [1e12] + [0.1] * 39}, "a request must last 1e+08 s at most, got 1e+12 s"),
        ({"output_lens": [1 << 40] + [20] * 39}, "a request must have 1000000000 tokens at most, got 1099511627776"),
    ],
)
def test_result_files_that_cannot_be_compared_are_one_line(
    tmp_path: Path, bench: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    document = {name: value for name, value in (bench | change).items() if value is not None}
    result = _results(tmp_path, document)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("loads: {seeds: [1], cases: [{name: a, utilisation: 0.5}]}\n", "a file of kind results holds its own"),
        ("speculation: {}\n", "speculation goes with an engine of kind torch or vllm, got kind results"),
    ],
)
def test_parts_that_a_file_cannot_answer_are_refused(
    tmp_path: Path, bench: dict[str, Any], more: str, message: str
) -> None:
    result = _results(tmp_path, bench, more=more)
    assert (result.exit_code, message in result.stderr) == (2, True)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
SERVER = """\
schema: servecast.scenario/1
name: server
engine: {{kind: server, url: "{url}", served_model: fake, model: {model}, gpu: h100, max_num_seqs: 8,
  max_num_batched_tokens: 512}}
loads: {{prompt_tokens: [4, 8], output_tokens: [2, 4], requests: 12, seeds: [1],
  cases: [{{name: light, utilisation: 0.3}}]}}
budgets: {{ttft_mean: 10.0, tpot_mean: 10.0}}
"""


def test_a_server_over_http_is_compared(tmp_path: Path) -> None:
    """A server that answers at once is far faster than predicted; its model is a folder beside the scenario."""
    from fake_server import FakeServer

    (tmp_path / "mymodel").mkdir()
    (tmp_path / "mymodel" / "config.json").write_text(json.dumps(CONFIG))
    with FakeServer(first_token_s=0.001, gap_s=0.001) as server:
        (tmp_path / "s.yaml").write_text(SERVER.format(url=server.url, model="mymodel"))
        result = _run(str(tmp_path / "s.yaml"), "--json")
        assert len(server.received) == 12
    assert result.exit_code in (0, 1), result.stderr
    document = json.loads(result.stdout)
    assert document["loads"][0]["failed"] == 0
    figures = {(one["metric"], one["executor"]): one for one in document["comparisons"]}
    assert {executor for _, executor in figures} == {"simulator", "closed_form"}
    assert all(one["predicted"] > 0.0 and one["measured"] > 0.0 for one in figures.values())
    assert 0.0005 < figures["tpot mean", "simulator"]["measured"] < figures["tpot mean", "simulator"]["predicted"]
    assert document["notes"] == []


def test_a_server_of_another_name_is_bad_input(tmp_path: Path) -> None:
    from fake_server import FakeServer

    with FakeServer(fault=lambda _: "500") as server:
        (tmp_path / "s.yaml").write_text(SERVER.format(url=server.url, model="llama-3.1-8b"))
        result = _run(str(tmp_path / "s.yaml"))
    assert result.exit_code == 2
    assert "where every request failed" in result.stderr


def test_a_server_that_fails_in_the_second_load_leaves_the_first(tmp_path: Path) -> None:
    from fake_server import FakeServer

    with FakeServer(fault=lambda number: "500" if number >= 12 else None) as server:
        text = SERVER.format(url=server.url, model="llama-3.1-8b").replace("seeds: [1]", "seeds: [1, 2]")
        (tmp_path / "s.yaml").write_text(text)
        result = _run(str(tmp_path / "s.yaml"), "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert [one["failed"] for one in document["loads"]] == [0, 12]
    assert document["reasons"] == ["load light: 12 of 12 requests failed, above 1% of a run"]
    assert any("500" in one for one in document["notes"])


def test_a_server_that_nobody_runs_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SERVER.format(url="http://127.0.0.1:9", model="llama-3.1-8b"))
    result = _run(str(tmp_path / "s.yaml"))
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "servecast: error: engine.url must be of a server that answers for fake, got http://127.0.0.1:9"
    )
    assert result.stderr.count("\n") == 1


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

"""``servecast plan`` as a program: what it prints and writes. Expected values: the documented keys, the files
that the policy room names, and that text, JSON and files tell the same plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from servecast.cli import main
from servecast.cli.output import to_json
from servecast.planning import result_document

DataPath = Callable[..., Path]

EXAMPLE = ["plan", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "h100=2.9:16", "--gpu", "l40s=1.1"]
EXAMPLE += ["--slo", "ttft_p99=2s", "--slo", "tpot_p99=50ms"]
REQUEST = """\
schema: servecast.plan/1
workload: {trace: example}
model: llama-3.1-8b
gpus: {h100: {usd_per_hour: 2.9, limit: 16}, l40s: {usd_per_hour: 1.1}}
slo: {ttft_p99: 2s, tpot_p99: 50ms}
"""
PLAN_KEYS = {"gpu", "tp", "pp", "replicas", "max_num_seqs", "cost_usd_per_hour"}
PREDICTED_KEYS = {"ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "slo_attainment"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return result


def document(*arguments: str) -> dict[str, Any]:
    parsed = json.loads(run(*arguments, "--json").stdout)
    assert isinstance(parsed, dict)
    return parsed


def test_json_has_the_documented_keys() -> None:
    """Keys: the documented list; every interval in order."""
    found = document(*EXAMPLE)
    assert set(found["plan"]) >= PLAN_KEYS
    assert set(found["predicted"]) == PREDICTED_KEYS
    assert {"binds", "alternatives", "warnings", "profile"} <= set(found)
    for interval in found["predicted"].values():
        assert interval["lo"] <= interval["value"] <= interval["hi"]
    assert len(found["alternatives"]) >= 5


def test_json_goes_to_stdout_alone() -> None:
    """Rule: nothing on stderr where nothing was written and stderr is no terminal."""
    assert run(*EXAMPLE, "--json").stderr == ""


def test_file_and_flags_plan_the_same(folder: Path) -> None:
    """The same request in both forms; and twice the same answer."""
    (folder / "request.yaml").write_text(REQUEST)
    assert document("plan", "request.yaml") == document(*EXAMPLE) == document(*EXAMPLE)


def test_trace_of_a_file_is_relative_to_it(folder: Path) -> None:
    """Rule: docs/traces: a relative path starts at the request's folder."""
    (folder / "deep").mkdir()
    (folder / "deep" / "t.csv").write_text("t_s,n_in,n_out\n" + "".join(f"{0.4 * i},300,50\n" for i in range(60)))
    (folder / "deep" / "request.yaml").write_text(REQUEST.replace("example", "t.csv"))
    assert document("plan", "deep/request.yaml")["workload"]["requests"] == 60


def test_parameters_instead_of_a_trace(folder: Path) -> None:
    """Hand: 330 a minute are 5.5 a second; lengths as stated."""
    load = "{rate_rps: 330/min, input_tokens: 500, output_tokens: {low: 50, high: 150}}"
    (folder / "request.yaml").write_text(REQUEST.replace("{trace: example}", load))
    workload = document("plan", "request.yaml")["workload"]
    assert (workload["rate_rps"], workload["mean_input_tokens"]) == (5.5, 500.0)
    assert workload["mean_output_tokens"] == pytest.approx(100.0, rel=1e-3)


def test_text_tells_the_plan() -> None:
    """The same plan as the JSON: name, cost, batch limit, what binds, one line an alternative."""
    found, text = document(*EXAMPLE), run(*EXAMPLE).stdout
    chosen = found["plan"]
    degrees = f"tp{chosen['tp']}" + (f" pp{chosen['pp']}" if chosen["pp"] > 1 else "")
    cost = f"{chosen['cost_usd_per_hour']:.2f}"
    assert text.startswith(f"{chosen['replicas']} x {chosen['gpu']} {degrees} at {cost} USD/h serves")
    assert f"max_num_seqs {chosen['max_num_seqs']}" in text
    assert found["binds"] in text
    assert found["profile"] in text
    assert sum(", batch " in line for line in text.splitlines()) == len(found["alternatives"])
    assert [line.removeprefix("warning: ") for line in text.splitlines() if line.startswith("warning: ")] == found[
        "warnings"
    ]


@pytest.mark.parametrize(
    ("engine", "files"),
    [
        ("vllm", {"policy.json", "vllm.yaml", "vllm.sh"}),
        ("sglang", {"policy.json", "sglang.sh"}),
        ("trtllm", {"policy.json", "trtllm.sh", "llm_api_options.yaml"}),
    ],
)
def test_folder_of_a_plan(engine: str, files: set[str], folder: Path) -> None:
    """Files: docs/policies; plan.json is what --json prints."""
    result = run(*EXAMPLE, "--engine", engine, "--out", "out", "--json")
    assert (folder / "out" / "plan.json").read_text() == result.stdout
    found = {path.name for path in (folder / "out").iterdir()}
    assert {"plan.json", "policy.json"} <= found
    assert len(found) == len(files) + 1
    assert {name for name in files if not name.startswith("llm_api")} <= found
    policy = json.loads((folder / "out" / "policy.json").read_text())
    chosen = json.loads(result.stdout)["plan"]
    assert {name: policy[name] for name in ("tp", "pp", "replicas", "max_num_seqs")} == {
        name: chosen[name] for name in ("tp", "pp", "replicas", "max_num_seqs")
    }
    assert sorted(result.stderr.split()[1::2]) == sorted(f"out/{name}" for name in found)


def test_an_existing_folder_is_written_over(folder: Path) -> None:
    """Rule: our own files are replaced, what else lies there stays."""
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    (folder / "out" / "plan.json").write_text("old")
    run(*EXAMPLE, "--out", "out")
    assert (folder / "out" / "mine.txt").read_text() == "mine"
    assert json.loads((folder / "out" / "plan.json").read_text())["status"] == "optimal"


def test_report_is_one_page(folder: Path) -> None:
    """A report: one self-contained page, the answer in it, nothing fetched."""
    run(*EXAMPLE, "--report", "report.html")
    page = (folder / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "Llama-3.1-8B" in page
    assert "2.90" in page
    assert not [word for word in ('src="http', "src='http", "<link", "@import", "url(http") if word in page]


def test_report_of_parameters_has_no_trace(folder: Path) -> None:
    load = "{rate_rps: 5, input_tokens: 500, output_tokens: 100}"
    (folder / "request.yaml").write_text(REQUEST.replace("{trace: example}", load))
    run("plan", "request.yaml", "--report", "report.html")
    assert (folder / "report.html").stat().st_size > 5_000


@pytest.mark.parametrize("trace", ["conv", "code"])
def test_azure_from_flags(trace: str, data_path: DataPath) -> None:
    """The main query, through the command line: the same document as from Python."""
    from servecast.confirming import confirm
    from servecast.model.arrivals import workload_from_trace
    from servecast.model.hardware import Offer
    from servecast.model.slo import Slo
    from servecast.planning import plan, with_arrivals
    from servecast.readers.catalogues import gpu, llm
    from servecast.readers.traces import read_trace

    path = data_path("azure-llm-2023", f"{trace}.csv.gz")
    prices = {"h100": 2.9, "h200": 3.5, "b200": 5.0, "l40s": 1.1}
    offers = [part for name, price in prices.items() for part in ("--gpu", f"{name}={price}")]
    limits = ["--slo", "ttft_p99=2s", "--slo", "tpot_p99=50ms"]
    found = document("plan", "--trace", str(path), "--model", "Llama-3.1-8B", *offers, *limits)
    recorded = read_trace(path)
    answer = plan(
        workload_from_trace(recorded),
        llm("Llama-3.1-8B"),
        [Offer(gpu=gpu(name), usd_per_hour=price) for name, price in prices.items()],
        [Slo(metric=metric, percentile=99.0, limit_s=limit) for metric, limit in (("ttft", 2.0), ("tpot", 0.05))],
    )
    assert found == json.loads(to_json(result_document(confirm(with_arrivals(answer, recorded), recorded))))

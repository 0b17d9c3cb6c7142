"""``servecast schedule`` as a program. Expected values: the documented keys, and that text, JSON and file tell the same
schedule; one line for every mistake."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from servecast.cli import main

DataPath = Callable[..., Path]

EXAMPLE = ["schedule", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "h200=3.5"]
EXAMPLE += ["--slo", "ttft_p99=2s", "--slo", "tpot_p99=50ms", "--tp", "1", "--max-num-seqs", "64", "--rate-scale", "20"]
KEYS = {
    "schema",
    "status",
    "model",
    "engine",
    "replica",
    "window_s",
    "lead_time_s",
    "min_dwell_s",
    "start_usd",
    "max_replicas",
    "forecast",
    "cost_usd",
    "always_peak_usd",
    "saving",
    "lower_bound_usd",
    "slo_attainment",
    "binds",
    "windows",
    "trace",
    "slo",
    "warnings",
    "profile",
    "solver",
    "wall_s",
}


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
    """Origin: docs/json.md."""
    found = document(*EXAMPLE)
    assert set(found) == KEYS
    assert found["schema"] == "servecast.schedule-result/1"
    assert found["replica"] == {"gpu": "h200_sxm", "tp": 1, "pp": 1, "max_num_seqs": 64, "usd_per_hour": 3.5}
    assert (found["window_s"], found["lead_time_s"], found["min_dwell_s"]) == (60.0, 120.0, 600.0)
    assert set(found["windows"][0]) == {"start_s", "rate_rps", "required", "replicas", "ordered", "stopped"}
    assert all(row["replicas"] >= row["required"] for row in found["windows"])
    assert found["lower_bound_usd"] <= found["cost_usd"] <= found["always_peak_usd"]
    assert found["solver"] == {"gap": 0.0}


def test_text_and_file_tell_the_same(folder: Path) -> None:
    """Origin: the JSON of the same query."""
    found = document(*EXAMPLE)
    result = run(*EXAMPLE, "--out", "schedule.csv")
    assert f"{found['cost_usd']:.2f} USD" in result.stdout
    assert found["binds"] in result.stdout
    assert result.stderr == "wrote schedule.csv\n"
    with (folder / "schedule.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == found["windows"]


def test_durations_and_rules_arrive() -> None:
    """Origin: units; nothing to wait for and nothing to keep is the requirement itself."""
    found = document(*EXAMPLE, "--window", "0.5min", "--lead-time", "0s", "--min-dwell", "0s", "--min-replicas", "2")
    assert found["window_s"] == 30.0
    assert [row["replicas"] for row in found["windows"]] == [row["required"] for row in found["windows"]]
    assert found["cost_usd"] == pytest.approx(found["lower_bound_usd"], rel=1e-12)
    assert document(*EXAMPLE, "--forecast-quantile", "0.9")["forecast"] == 0.9
    dearer = document(*EXAMPLE, "--start-usd", "5")
    assert dearer["start_usd"] == 5.0
    assert dearer["cost_usd"] >= document(*EXAMPLE)["cost_usd"]


def test_the_degree_is_chosen_where_it_is_left_open() -> None:
    """Origin: a minimum over a larger set."""
    left_open = [part for part in EXAMPLE if part not in {"--tp", "1", "--max-num-seqs", "64"}]
    assert document(*left_open)["cost_usd"] <= document(*EXAMPLE)["cost_usd"] * (1.0 + 1e-9)


def test_azure_conversation(data_path: DataPath) -> None:
    """Origin: 58 whole minutes of the published trace."""
    path = str(data_path("azure-llm-2023", "conv.csv.gz"))
    found = document(*[path if part == "example" else part for part in EXAMPLE])
    assert len(found["windows"]) == 58
    assert found["saving"] > 0.0


HEADER = "t_s,n_in,n_out\n"
SHORT = HEADER + "".join(f"{0.5 * i},{100 + i},{20 + i % 7}\n" for i in range(40))
BAD = {
    "no model": (
        ["schedule", "--trace", "example", "--gpu", "h200=3", "--slo", "ttft_p99=2s"],
        "--model must be given",
    ),
    "no trace": ([*EXAMPLE[:1], *EXAMPLE[3:]], "--trace must be given"),
    "no such trace": ([*EXAMPLE, "--trace", "absent.csv"], "absent.csv: no such file"),
    "a short trace": ([*EXAMPLE, "--trace", "short.csv"], "trace must span at least 3 windows of 60 s, got 19.5 s"),
    "window without unit": ([*EXAMPLE, "--window", "60"], "--window '60': the value needs a unit"),
    "window of nothing": ([*EXAMPLE, "--window", "0s"], "window_s must be at least 5 s"),
    "lead time in words": ([*EXAMPLE, "--lead-time", "soon"], "--lead-time 'soon': the value must be a number"),
    "negative dwell": ([*EXAMPLE, "--min-dwell", "-1min"], "--min-dwell '-1min': the value must be >= 0"),
    "negative start": ([*EXAMPLE, "--start-usd", "-1"], "start_usd must be >= 0"),
    "NaN start": ([*EXAMPLE, "--start-usd", "nan"], "start_usd must be >= 0"),
    "quantile of 99": ([*EXAMPLE, "--forecast-quantile", "99"], "forecast must be known or a quantile"),
    "rate scale of NaN": ([*EXAMPLE, "--rate-scale", "nan"], "rate_scale must be"),
    "unknown GPU": ([*EXAMPLE[:5], "--gpu", "h2000=1", *EXAMPLE[7:]], "h200_sxm"),
    "unknown profile": ([*EXAMPLE, "--profile", "mine"], "profile must be a file or one of"),
    "impossible limit": ([*EXAMPLE, "--slo", "e2e_p99=1ms"], "no schedule meets the request: e2e_p99 <= 0.001 s"),
    "too few replicas": ([*EXAMPLE, "--max-replicas", "1"], "no schedule meets the request: count: window "),
    "too few GPUs": ([*EXAMPLE[:5], "--gpu", "h200=1:2", *EXAMPLE[7:]], "2 replicas"),
    "folder that is not there": ([*EXAMPLE, "--out", "absent/out.csv"], "the folder absent does not exist"),
    "folder for a file": ([*EXAMPLE, "--out", "."], "is a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name: str, folder: Path) -> None:
    arguments, message = BAD[name]
    (folder / "short.csv").write_text(SHORT)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "schedule.csv"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 2, result.stdout + result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("servecast: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert [path.name for path in folder.iterdir()] == ["short.csv"]


@pytest.mark.parametrize("flag", ["--tp", "--max-num-seqs", "--max-replicas"])
def test_counts_of_zero_are_refused(flag: str) -> None:
    """Origin: click's own usage error."""
    result = CliRunner().invoke(main, [*EXAMPLE, flag, "0"])
    assert result.exit_code == 2
    assert "not in the range" in result.stderr

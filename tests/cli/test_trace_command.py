"""``servecast trace`` as a program. Expected values: published counts of the Azure traces, and hand counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from servecast.cli import main

DataPath = Callable[..., Path]

EVEN = "t_s,n_in,n_out\n" + "".join(f"{0.5 * i},{100 + 100 * (i % 2)},10\n" for i in range(201))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "even.csv").write_text(EVEN)
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["trace", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def document(*arguments: str) -> dict[str, Any]:
    parsed = json.loads(run(*arguments, "--json"))
    assert isinstance(parsed, dict)
    return parsed


def test_statistics_of_an_even_trace() -> None:
    """Hand: 200 gaps of 0.5 s in 100 s, no dispersion; prompts of 100 and 200 tokens in turn, 101 and 100 times."""
    found = document("even.csv")
    assert (found["arrivals"]["requests"], found["arrivals"]["rate_rps"]) == (201, 2.0)
    assert found["arrivals"]["gap_cv"] == pytest.approx(0.0, abs=1e-9)
    assert dict(found["arrivals"]["idc"])[1.0] == pytest.approx(0.0, abs=1e-9)
    assert found["lengths"]["mean_in"] == pytest.approx((101 * 100 + 100 * 200) / 201, rel=1e-12)
    assert found["lengths"]["p50_out"] == 10.0


def test_text_has_the_numbers() -> None:
    text = run("even.csv")
    assert text.startswith("even: 201 requests in 100 s, 2 requests/s\n")
    assert "dispersion" in text
    assert "mean_in" in text


@pytest.mark.parametrize(("name", "requests"), [("conv", 19366), ("code", 8819)])
def test_azure(name: str, requests: int, data_path: DataPath) -> None:
    """Published: the number of requests of the Azure LLM inference traces of 2023."""
    found = document(str(data_path("azure-llm-2023", f"{name}.csv.gz")))
    assert found["arrivals"]["requests"] == requests
    assert any("non-stationary" in warning for warning in found["warnings"])
    assert found["arrival_model"]["stationary"] is False


def test_shipped_example() -> None:
    """Rule: the shipped trace is of chat: an hour or less, some requests a second, prompts longer than outputs."""
    found = document("example")
    assert 1000 < found["arrivals"]["requests"] < 50_000
    assert found["lengths"]["mean_in"] > found["lengths"]["mean_out"] > 50.0


def test_arrival_model_of_a_timer() -> None:
    """Hand: even gaps are no Poisson process; nothing says that their rate changes."""
    model = document("even.csv")["arrival_model"]
    assert model["accepted"] is False
    assert model["verdict"].startswith("rejected: gaps")
    assert model["stationary"] is True
    assert model["windows"] == []
    text = run("even.csv")
    assert "  model      Poisson, 2/s, gap cv 1\n" in text
    assert "  rate       steady\n" in text


def test_arrival_model_in_windows(folder: Path) -> None:
    """Hand: 2 requests/s for 200 s, then 8 requests/s for 200 s, hardly jittered: two windows, cut at 200 s."""
    jitter = [0.02 * (i * 7 % 11) / 11 for i in range(2000)]
    times = [0.5 * i for i in range(400)] + [200.0 + 0.125 * i for i in range(1600)]
    rows = "".join(f"{t + extra:.6f},100,10\n" for t, extra in zip(times, jitter, strict=True))
    (folder / "step.csv").write_text("t_s,n_in,n_out\n" + rows)
    model = document("step.csv")["arrival_model"]
    assert model["stationary"] is False
    assert [one["rate_rps"] for one in model["windows"]] == pytest.approx([2.0, 8.0], rel=0.02)
    assert model["windows"][0]["end_s"] == pytest.approx(200.0, abs=2.0)
    text = run("step.csv")
    assert "  rate       not steady: " in text
    assert "second half at " in text
    assert text.count("  windows ") == 1


def test_arrival_model_of_a_few_requests(folder: Path) -> None:
    """Rule: three requests are read, and nothing is claimed about their arrivals."""
    (folder / "few.csv").write_text("t_s,n_in,n_out\n0,1,1\n1,1,1\n4,1,1\n")
    text = run("few.csv")
    assert "undecided" in text
    assert "not tested for steadiness" in text


def test_many_windows_are_shortened(data_path: DataPath) -> None:
    """Rule: the text lists six windows and says how many more there are; JSON has all."""
    path = str(data_path("azure-llm-2023", "code.csv.gz"))
    windows = document(path)["arrival_model"]["windows"]
    assert len(windows) > 6
    assert f"and {len(windows) - 6} more (--json)" in run(path)


def test_one_run_of_several(folder: Path) -> None:
    """Hand: three requests of run b."""
    rows = "0,1,1,a\n1,1,1,a\n0,2,2,b\n1,2,2,b\n4,2,2,b\n"
    (folder / "runs.csv").write_text("t_s,n_in,n_out,run\n" + rows)
    assert document("runs.csv", "--run", "b")["arrivals"]["requests"] == 3


def test_chart_as_json(folder: Path) -> None:
    """A Vega-Lite document beside the statistics."""
    run("even.csv", "--chart", "chart.json")
    assert "vega-lite" in json.loads((folder / "chart.json").read_text())["$schema"]


@pytest.mark.parametrize("name", ["chart.pdf", "chart", "absent/chart.json"])
def test_chart_that_cannot_be_written(name: str, folder: Path) -> None:
    """Rule: exit status 2 in one line before anything is read; nothing written."""
    result = CliRunner().invoke(main, ["trace", "even.csv", "--chart", name])
    assert result.exit_code == 2
    assert result.stderr.startswith("servecast: error: ")
    assert result.stderr.count("\n") == 1
    assert [one.name for one in folder.iterdir()] == ["even.csv"]

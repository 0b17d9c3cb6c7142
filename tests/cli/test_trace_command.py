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


def test_shipped_example() -> None:
    """Rule: the shipped trace is of chat: an hour or less, some requests a second, prompts longer than outputs."""
    found = document("example")
    assert 1000 < found["arrivals"]["requests"] < 50_000
    assert found["lengths"]["mean_in"] > found["lengths"]["mean_out"] > 50.0


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

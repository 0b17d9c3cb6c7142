"""``servecast predict`` as a program. Expected values: those of the Python interface, and the documented columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from servecast.cli import main
from servecast.predicting import RESULTS, Point, predict

DataPath = Callable[..., Path]

POINT = ["predict", "--model", "llama-3.1-8b", "--gpu", "h100", "--concurrency", "16", "--isl", "1000", "--osl", "200"]
HEADER = "model,gpu,engine,precision,tp,pp,dp,ep,concurrency,isl,osl"
ROWS = [
    "llama-3.1-8b,h100,vllm,auto,1,1,1,1,16,1000,200",
    "llama-3.1-70b,l40s,vllm,auto,1,1,1,1,16,1000,200",
    "llama-3.1-9b,h100,vllm,auto,1,1,1,1,16,1000,200",
    "llama-3.1-8b,l40s,sglang,fp8,2,1,1,1,16,1000,200",
]
EXPECTED = Point(model="llama-3.1-8b", gpu="h100", engine="vllm", concurrency=16.0, isl=1000.0, osl=200.0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("\n".join((HEADER, *ROWS)) + "\n")
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return result


def test_one_point_as_json() -> None:
    """Python's own prediction of the same point."""
    found = json.loads(run(*POINT, "--json").stdout)
    values = predict([EXPECTED])[0].values
    assert found["status"] == "ok"
    for name in RESULTS:
        assert (found[name]["value"], found[name]["lo"], found[name]["hi"]) == pytest.approx(values[name], rel=1e-12)


def test_one_point_as_text() -> None:
    """Python's own prediction, three digits."""
    text = run(*POINT).stdout
    tpot = predict([EXPECTED])[0].values["tpot_s"][0]
    assert f"{1e3 * tpot:.3g} ms" in text
    assert "TTFT" in text
    assert "output tokens/s" in text


def test_table_to_a_file(folder: Path) -> None:
    """Documented: inputs, results with intervals, status; stdout stays empty, stderr counts."""
    result = run("predict", "--rows", "rows.csv", "--out", "out.csv")
    assert result.stdout == ""
    assert result.stderr == "wrote out.csv: 1 does_not_fit, 1 extrapolated, 1 ok, 1 unsupported\n"
    with (folder / "out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    ends = [f"{name}{end}" for name in RESULTS for end in ("", "_lo", "_hi")]
    assert list(found[0]) == [*HEADER.split(","), *ends, "status", "reason"]
    assert [row["status"] for row in found] == ["ok", "does_not_fit", "unsupported", "extrapolated"]
    assert [row["ttft_s"] == "" for row in found] == [False, True, True, False]
    assert float(found[0]["tpot_s"]) == pytest.approx(predict([EXPECTED])[0].values["tpot_s"][0], rel=1e-5)


def test_table_to_stdout_is_the_file(folder: Path) -> None:
    shown = run("predict", "--rows", "rows.csv").stdout
    run("predict", "--rows", "rows.csv", "--out", "out.csv")
    assert shown == (folder / "out.csv").read_text()


def test_an_output_table_is_an_input_table(folder: Path) -> None:
    """Round trip: results of a first run are replaced by the second, which gives the same."""
    run("predict", "--rows", "rows.csv", "--out", "out.csv")
    run("predict", "--rows", "out.csv", "--out", "again.csv")
    assert (folder / "again.csv").read_text() == (folder / "out.csv").read_text()


def test_table_as_json() -> None:
    found = json.loads(run("predict", "--rows", "rows.csv", "--json").stdout)
    assert [one["status"] for one in found] == ["ok", "does_not_fit", "unsupported", "extrapolated"]
    assert found[1]["ttft_s"] is None


def test_silicon_table(data_path: DataPath) -> None:
    """Documented: the silicon table's own column names are accepted; at least 95 % of its rows get numbers."""
    result = run("predict", "--rows", str(data_path("aic-silicon", "agg.csv")), "--out", "out.csv")
    with Path("out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2281
    assert all(row["status"] for row in found)
    assert sum(row["tpot_s"] != "" for row in found) >= 0.95 * 2281
    assert result.stderr.startswith("wrote out.csv: ")


def test_byte_order_mark_and_carriage_returns(folder: Path) -> None:
    """A table that a spreadsheet wrote: the same rows."""
    plain = run("predict", "--rows", "rows.csv").stdout
    (folder / "rows.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join((HEADER, *ROWS, "")).encode())
    assert run("predict", "--rows", "rows.csv").stdout == plain

"""`servecast calibrate`: refusals, fits of given samples, an interrupt that is gone on from, a small real session."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine_samples import HEADER, both

from servecast.calibration.machine_document import samples_bytes
from servecast.cli import main


def _run(*words: str) -> Any:
    return CliRunner().invoke(main, ["calibrate", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "soon"), "budget"),
        (("--budget", "-5s"), "budget"),
        (("--memory", "lots"), "memory"),
        (("--only", "gemm,fft"), "fft"),
        (("--device", "tpu"), "tpu"),
        (("--out", "machine.txt"), "--out must end in .json"),
        (("--report", "page.pdf"), "--report must end in .html"),
        (("--out", "no/such/machine.json"), "no/such"),
        (("--name", "../x"), "--name must be"),
        (("--from-samples", "none.jsonl"), "--from-samples must be a file"),
        (("--from-samples", "none.jsonl", "--threads", "2"), "must stand without --threads"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: tuple[str, ...], message: str) -> None:
    result = _run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(gzip.decompress(samples_bytes(HEADER, both(drift=0.02, noise=0.02))))
    return path


def test_samples_that_are_there_are_fitted_without_torch(
    journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    out, page = tmp_path / "machine.json", tmp_path / "machine.html"
    result = _run("--from-samples", str(journal), "--out", str(out), "--report", str(page), "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema"] == "servecast.machine/1"
    assert {one["kernel"] for one in document["fits"]} == {"memory_copy", "gemm"}
    assert str(tmp_path) not in result.stdout
    assert out.with_name("machine.samples.jsonl.gz").is_file()
    assert CliRunner().invoke(main, ["profile", "check", str(out)]).exit_code == 0
    assert "<script" not in page.read_text()


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = _run("--budget", "5s")
    assert result.exit_code == 2
    assert "servecast[calibrate]" in result.stderr


def test_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"schema": "something else"}\n')
    result = _run("--from-samples", str(path))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def _forms(text: str) -> list[tuple[str, str]]:
    return [(one["kernel"], one["form"]) for one in json.loads(text)["fits"]]


def test_a_small_session_for_real(tmp_path: Path) -> None:
    """Copies and launch overhead for 4 s; the budget is the whole time, so the same command again only fits."""
    pytest.importorskip("torch", reason="needs torch: pip install 'servecast[calibrate]'")
    journal, out = tmp_path / "samples.jsonl", tmp_path / "machine.json"
    words = ["--budget", "4s", "--only", "overhead,copies", "--memory", "256MiB", "--samples", str(journal)]
    first = _run(*words, "--out", str(out), "--json")
    assert first.exit_code == 0, first.stderr
    lines = len(journal.read_text().splitlines())
    assert json.loads(first.stdout)["fits"]
    second = _run(*words, "--json")
    assert second.exit_code == 0, second.stderr
    assert len(journal.read_text().splitlines()) == lines
    # the journal keeps six digits of a time
    assert _forms(second.stdout) == _forms(first.stdout)

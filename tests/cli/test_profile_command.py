"""`servecast profile show | diff | check` on both kinds of documents. Truth: the documents that were written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine_samples import HEADER, both, document

from servecast.calibration.machine_document import dumps, samples_bytes
from servecast.cli import main


def _run(*words: str) -> Any:
    return CliRunner().invoke(main, ["profile", *words])


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    taken = both(drift=0.02, noise=0.02)
    path = tmp_path / "machine.json"
    path.write_text(dumps(document(taken=taken)))
    (tmp_path / "machine.samples.jsonl.gz").write_bytes(samples_bytes(HEADER, taken))
    return path


def test_show_prints_parameters_with_their_units(machine: Path) -> None:
    result = _run("show", str(machine))
    assert result.exit_code == 0, result.stderr
    for word in ("memory_copy", "gemm", "A machine", "bandwidth_bytes_per_s", "B/s", "90 % interval"):
        assert word in result.stdout
    shown = json.loads(_run("show", str(machine), "--json").stdout)
    assert shown["schema"] == "servecast.machine/1"


def test_show_of_a_shipped_engine_profile() -> None:
    assert json.loads(_run("show", "public-2026.11", "--json").stdout)["schema"] == "servecast.profile/1"
    assert "public-2026.11" in _run("show", "public-2026.11").stdout


def test_diff_of_a_profile_with_itself_finds_nothing(machine: Path) -> None:
    found = json.loads(_run("diff", str(machine), str(machine), "--json").stdout)
    assert found["share_agree"] == 1.0
    assert found["disagree"] == []


def test_diff_finds_a_machine_of_half_the_speed(machine: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    slow = [replace(one, seconds=tuple(2.0 * s for s in one.seconds)) for one in both(drift=0.02, noise=0.02, seed=5)]
    other = tmp_path / "slow.json"
    other.write_text(dumps(document("slow", slow)))
    found = json.loads(_run("diff", str(machine), str(other), "--json").stdout)
    assert found["share_agree"] < 0.6


def test_two_kinds_of_documents_are_not_compared(machine: Path) -> None:
    result = _run("diff", str(machine), "public-2026.11")
    assert result.exit_code == 2
    assert "profiles must be of one schema" in result.stderr


def test_check_knows_whole_and_changed_samples(machine: Path) -> None:
    assert _run("check", str(machine)).exit_code == 0
    samples = machine.with_name("machine.samples.jsonl.gz")
    samples.write_bytes(samples.read_bytes()[:-4] + b"abcd")
    result = _run("check", str(machine), "--json")
    assert result.exit_code == 2
    answer = json.loads(result.stdout)
    assert answer["valid"] is False
    assert "samples" in answer["error"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"[1]", "schema must be"),
        (b'{"schema": "servecast.machine/9"}', "schema must be"),
        (b'{"schema": "servecast.machine/1"}', "name: Field required"),
    ],
)
def test_a_corrupt_profile_is_one_line_and_status_2(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "machine-1.json"
    path.write_bytes(content)
    for command in ("show", "check"):
        result = _run(command, str(path))
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert words in result.stderr
        assert result.stdout == ""


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    result = _run("show", "nope")
    assert result.exit_code == 2
    assert "public-2026.11" in result.stderr

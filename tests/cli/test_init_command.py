"""``servecast init``: the file that it writes is planned as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from servecast.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_what_init_writes_plan_accepts(folder: Path) -> None:
    """Documented: `servecast init` writes a commented request file; `servecast plan` takes it."""
    written = run("init")
    assert (written.exit_code, written.stderr) == (0, "")
    assert "servecast plan request.yaml" in written.stdout
    assert (folder / "request.yaml").read_text().count("#") > 10
    planned = run("plan", "request.yaml", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["status"] == "optimal"


def test_another_name_and_json(folder: Path) -> None:
    found = json.loads(run("init", "mine.yaml", "--json").stdout)
    assert found["wrote"] == "mine.yaml"
    assert (folder / "mine.yaml").exists()


def test_a_file_that_is_there_is_kept(folder: Path) -> None:
    """Rule: exit status 2 and nothing changed, unless --force."""
    (folder / "request.yaml").write_text("mine")
    refused = run("init")
    assert refused.exit_code == 2
    assert refused.stderr == "servecast: error: request.yaml: exists; --force replaces it\n"
    assert (folder / "request.yaml").read_text() == "mine"
    assert run("init", "--force").exit_code == 0
    assert "schema: servecast.plan/1" in (folder / "request.yaml").read_text()


@pytest.mark.parametrize("name", ["absent/request.yaml", "file/request.yaml"])
def test_places_that_cannot_be_written(name: str, folder: Path) -> None:
    (folder / "file").write_text("")
    refused = run("init", name)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"servecast: error: {name}")
    assert refused.stderr.count("\n") == 1
    assert [one.name for one in folder.iterdir()] == ["file"]

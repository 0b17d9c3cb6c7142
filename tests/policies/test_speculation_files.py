"""Everything for one speculation table, run through a real shell; and that each engine reads the same dense table."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from policy_documents import HOSTILE
from speculation_documents import NEWEST, Ranges, expanded, schedules, table

from servecast.policies import speculation_files
from servecast.policies.sglang_speculation import read_sglang_schedule
from servecast.policies.speculation import SpeculationTable, loads
from servecast.policies.speculation_files import emit_speculation
from servecast.policies.trtllm_speculation import read_trtllm_schedule
from servecast.policies.vllm_speculation import read_vllm_schedule

FILES = {
    "vllm": {"speculation.json", "vllm_speculation.json", "vllm_speculation.sh"},
    "sglang": {"speculation.json", "sglang_speculation.json", "sglang_speculation.sh"},
    "trtllm": {"speculation.json", "trtllm_speculation.yaml", "trtllm_speculation.sh"},
}


def of(engine: str, ranges: Ranges = ((1, 16, 5), (17, 64, 3), (65, 256, 1)), **changes: Any) -> SpeculationTable:
    return table(ranges, **{"engine": engine, "engine_version": NEWEST[engine]} | changes)


@pytest.mark.parametrize("engine", FILES)
def test_emit_gives_the_table_and_the_engine_files(engine: str) -> None:
    files = emit_speculation(of(engine))
    assert set(files) == FILES[engine]
    assert loads(files["speculation.json"]) == of(engine)
    assert all(text.endswith("\n") and "\r" not in text for text in files.values())
    script = files[f"{engine}_speculation.sh"]
    assert script.startswith(
        f'#!/bin/sh\n# Written by servecast "0.2.0" for {engine} {NEWEST[engine]} on "2026-11-26"\n'
    )
    assert "# batch 17 to 64: draft 3, 0.2 tok/s (0.1 to 0.4), TPOT 0.2 s (0.1 to 0.4)\n" in script
    assert '# advice: "measure the edge at 64"\n' in script


@settings(max_examples=30)
@given(ranges=schedules())
def test_three_engines_read_one_table(ranges: Ranges) -> None:
    """Falling lengths, which every engine can have."""
    lengths = sorted((length for _, _, length in ranges), reverse=True)
    wanted = [(lo, hi, length) for (lo, hi, _), length in zip(ranges, lengths, strict=True)]
    files: dict[str, str] = {}
    for engine in FILES:
        files |= emit_speculation(of(engine, wanted))
    dense, most = expanded(wanted), wanted[-1][1]
    assert read_vllm_schedule(json.loads(files["vllm_speculation.json"]), most) == dense
    assert read_sglang_schedule(json.loads(files["sglang_speculation.json"]), most) == dense
    section = yaml.safe_load(files["trtllm_speculation.yaml"])["speculative_config"]
    assert read_trtllm_schedule(section, NEWEST["trtllm"], most) == dense


@pytest.mark.skipif(shutil.which("sh") is None, reason="no POSIX shell")
@pytest.mark.parametrize("engine", FILES)
def test_shell_runs_the_script_with_hostile_names(engine: str, tmp_path: Path) -> None:
    """The engine is replaced by a program that prints its arguments, one per NUL."""
    folder, bin_folder = tmp_path / "a folder $(x)", tmp_path / "bin"
    folder.mkdir()
    bin_folder.mkdir()
    for program in ("vllm", "python", "trtllm-serve"):
        stub = bin_folder / program
        stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n", encoding="utf-8")
        stub.chmod(0o755)
    name = "".join(HOSTILE)
    wanted = of(engine, model=name, draft_model=name, advice=[name])
    for file, text in emit_speculation(wanted).items():
        (folder / file).write_text(text, encoding="utf-8", newline="")
    done = subprocess.run(
        ["sh", str(folder / f"{engine}_speculation.sh"), "--port", "80 80"],
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": f"{bin_folder}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    )
    words = done.stdout.decode().split("\0")[:-1]
    assert name in words
    assert words[-2:] == ["--port", "80 80"]
    assert not (tmp_path / "pwned").exists()
    if engine == "vllm":
        config = json.loads(words[words.index("--speculative-config") + 1])
        assert config == json.loads((folder / "vllm_speculation.json").read_text(encoding="utf-8"))
        assert config["model"] == name
    else:
        option = {"sglang": "--speculative-adaptive-config", "trtllm": "--extra_llm_api_options"}[engine]
        ending = {"sglang": "json", "trtllm": "yaml"}[engine]
        named = Path(words[words.index(option) + 1])
        assert named.resolve() == (folder / f"{engine}_speculation.{ending}").resolve()
    if engine == "trtllm":
        assert yaml.safe_load(named.read_text(encoding="utf-8"))["speculative_config"]["speculative_model"] == name


@pytest.mark.parametrize(("engine", "version"), [("vllm", "0.20.0"), ("sglang", "0.5.12"), ("trtllm", "1.1.0")])
def test_nothing_falls_back_in_silence(engine: str, version: str) -> None:
    with pytest.raises(ValueError, match=rf"^{engine} {version} has no "):
        emit_speculation(of(engine, engine_version=version, best_static_length=3))
    files = emit_speculation(of(engine, engine_version=version, best_static_length=3), allow_static=True)
    script = files[f"{engine}_speculation.sh"]
    assert "# not that schedule: draft 3 at every batch size, so these figures do not apply\n" in script
    assert f'# error: "{engine} {version} has no ' in script


def test_forced_files_say_so() -> None:
    wanted = of("vllm", data_parallel=2)
    with pytest.raises(ValueError, match=r"^data_parallel must be 1 with a schedule, got 2"):
        emit_speculation(wanted)
    script = emit_speculation(wanted, force=True)["vllm_speculation.sh"]
    assert '# error: "data_parallel must be 1 with a schedule' in script


@pytest.mark.parametrize("engine", FILES)
def test_one_length_has_no_schedule_file(engine: str) -> None:
    files = emit_speculation(of(engine, [(1, 64, 3)]))
    script = files[f"{engine}_speculation.sh"]
    assert "not that schedule" not in script
    assert "sglang_speculation.json" not in files
    off = emit_speculation(of(engine, [(1, 64, 0)]))
    assert set(off) == {"speculation.json", f"{engine}_speculation.sh"}


def test_findings_have_errors_first() -> None:
    found = speculation_files.findings(of("vllm", [(1, 4, 2), (5, 8, 0)], data_parallel=2, method="mtp"))
    assert [finding.rule for finding in found] == ["data_parallel", "idle", "method"]

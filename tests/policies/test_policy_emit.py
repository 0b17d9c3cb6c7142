"""Everything for one table, run through a real shell; and the engine argument of a user."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from policy_documents import HOSTILE, table

from servecast.policies import ENGINES, emit, loads, parse_engine

FILES = {
    "vllm": {"policy.json", "vllm.yaml", "vllm.sh"},
    "sglang": {"policy.json", "sglang.sh"},
    "trtllm": {"policy.json", "trtllm.yaml", "trtllm.sh"},
}


@pytest.mark.parametrize("engine", FILES)
def test_emit_gives_the_table_and_the_engine_files(engine: str) -> None:
    wanted = table(engine=engine, engine_version=parse_engine(engine)[1])
    files = emit(wanted)
    assert set(files) == FILES[engine]
    assert loads(files["policy.json"]) == wanted
    assert all(text.endswith("\n") and "\r" not in text for text in files.values())
    script = files[f"{engine}.sh"]
    assert script.startswith('#!/bin/sh\n# Written by servecast "0.1.0" for ')
    assert "# start 3 servers with these options behind one load balancer\n" in script


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
    files = emit(table(engine=engine, engine_version=parse_engine(engine)[1], model=name, gpu=name))
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8", newline="")
    done = subprocess.run(
        ["sh", str(folder / f"{engine}.sh"), "--port", "80 80"],
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": f"{bin_folder}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    )
    words = done.stdout.decode().split("\0")[:-1]
    assert name in words
    assert words[-2:] == ["--port", "80 80"]
    assert not (tmp_path / "pwned").exists()
    if engine != "sglang":
        named = [Path(word) for word in words if word.endswith(".yaml")]
        assert [path.resolve() for path in named] == [(folder / f"{engine}.yaml").resolve()]
        assert isinstance(yaml.safe_load(named[0].read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vllm@0.32", ("vllm", "0.32")),
        ("VLLM@0.6.3.post1", ("vllm", "0.6.3.post1")),
        ("vllm", ("vllm", "0.32.0")),
        ("sglang", ("sglang", "0.5.23")),
        ("trtllm", ("trtllm", "1.2.1")),
        ("TensorRT-LLM@1.1.0", ("trtllm", "1.1.0")),
    ],
)
def test_parse_engine(text: str, expected: tuple[str, str]) -> None:
    assert parse_engine(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vlm@0.32", r"got 'vlm@0.32' \(did you mean vllm\?\)$"),
        ("sglan", r"\(did you mean sglang\?\)$"),
        ("trt", r"\(did you mean trtllm\?\)$"),
        ("", r"^engine must be one of vllm, sglang, trtllm, got ''$"),
        ("zzz\nzzz", r"^engine must be one of vllm, sglang, trtllm, got 'zzz\\nzzz'$"),
        ("vllm@", r"^engine_version must be a release such as 0.32.0, got ''$"),
        ("vllm@latest", r"^engine_version must be a release such as 0.32.0, got 'latest'$"),
        ("vllm@0.40", r"^vllm 0.40 is newer than 0.32.0, the newest version known$"),
    ],
)
def test_parse_engine_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_engine(text)


def test_every_engine_has_a_default_version_it_accepts() -> None:
    for name, engine in ENGINES.items():
        assert engine.check(parse_engine(name)[1]) == engine.newest

"""Start and end of a server: a stand-in script plays one that serves, dies, never gets healthy or leaves a child."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from servecast.validation import vllm_server
from servecast.validation.vllm_server import VllmServer, flag_arguments, free_port, run_paired, vllm_environment

STAND_IN = str(Path(__file__).with_name("fake_server.py"))


def _server(tmp_path: Path, behave: str, **options: float) -> VllmServer:
    return VllmServer(
        sys.executable,
        "tiny",
        flags={"behave": behave},
        log=tmp_path / "server.log",
        entry=(STAND_IN,),
        start_limit_s=options.get("start_limit_s", 20.0),
    )


def _gone(pid: int) -> bool:
    """Whether a process ended; one that nobody has reaped yet has."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_it_serves_and_ends(tmp_path: Path) -> None:
    with _server(tmp_path, "well") as server:
        pid = server.pid
        facts = server.facts()
        assert server.alive()
        with urllib.request.urlopen(f"{server.url}/health") as answer:  # noqa: S310  # loopback
            assert answer.status == 200
    assert pid is not None
    assert _gone(pid)
    assert not server.alive()
    # printed by the stand-in in vLLM's words
    assert (facts.version, facts.kv_tokens) == ("0.32.0+fake", 174_720)
    assert 0.0 < facts.start_s < 20.0


def test_a_server_that_dies_is_told_with_its_last_lines(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"server ended with status 3 after .* its last lines:\n") as failure:
        _server(tmp_path, "die").__enter__()
    assert time.monotonic() - began < 10.0
    assert str(failure.value).splitlines()[-1] == "ValueError: the folder has no weights"


def test_a_server_that_never_gets_healthy_is_ended(tmp_path: Path) -> None:
    server = _server(tmp_path, "sick", start_limit_s=0.6)
    with pytest.raises(RuntimeError, match=r"not healthy within 0\.6 s; its last lines:\n"):
        server.__enter__()
    assert server.pid is None


@pytest.mark.parametrize("behave", ["child", "deaf"])
def test_its_children_end_with_it_also_after_a_fault(
    tmp_path: Path, behave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ignores the request to end is killed after the grace time."""
    monkeypatch.setattr(vllm_server, "GRACE_S", 0.3)
    monkeypatch.setattr(vllm_server, "LEAVE_S", 0.3)

    pids: list[int | None] = []

    def fail_inside() -> None:
        with _server(tmp_path, behave) as server:
            (line,) = [one for one in server.log.read_text().splitlines() if one.startswith("child ")]
            pids.extend([server.pid, int(line.removeprefix("child "))])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert len(pids) == 2
    assert all(pid is not None and _gone(pid) for pid in pids)


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    server = VllmServer(tmp_path / "bin" / "python", "tiny", log=tmp_path / "server.log")
    with pytest.raises(RuntimeError, match=r"could not be started with .*python: No such file"):
        server.__enter__()


def test_without_a_log_the_folder_is_removed() -> None:
    with VllmServer(sys.executable, "tiny", entry=(STAND_IN,)) as server:
        assert server.log.exists()
    assert not server.log.parent.exists()


def test_flags_become_words() -> None:
    config = {"method": "draft_model", "num_speculative_tokens_per_batch_size": [[1, 4, 3]]}
    words = flag_arguments({"speculative_config": config, "enforce_eager": True, "lora": False, "seed": None, "x": 1.5})
    assert words == ["--speculative-config", json.dumps(config), "--enforce-eager", "--x", "1.5"]


def test_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    python = tmp_path / "bin" / "python"
    plain = vllm_environment(python, kv_space_gib=2, threads=3, in_process=True)
    assert "LD_PRELOAD" not in plain
    chosen = ("VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "HF_HUB_OFFLINE")
    assert [plain[name] for name in chosen] == ["2", "3", "0", "1"]
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    monkeypatch.setenv("LD_PRELOAD", "/other.so")
    served = vllm_environment(python, in_process=False)
    assert served["LD_PRELOAD"] == f"{openmp}:/other.so"
    assert served["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


@pytest.mark.parametrize("options", [{"kv_space_gib": 0}, {"threads": 0}])
def test_a_bad_environment_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be >= 1, got"):
        vllm_environment(sys.executable, in_process=False, **options)


def test_free_ports_can_be_taken() -> None:
    assert 1024 <= free_port() < 65536


def test_the_script_refuses_before_it_starts_an_engine(tmp_path: Path) -> None:
    """This interpreter has no vLLM: the script must not need it to see that the request is impossible."""
    words = ["paired", "--model", "m", "--draft", "d", "--max-model-len", "64"]
    with pytest.raises(RuntimeError, match=r"status 2; its last lines:\nerror: --max-model-len must be >= [0-9]+"):
        run_paired(sys.executable, words, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paired", "--model", "m"], "--draft must be given, but for --lengths 0"),
        (["table", "--model", "m", "--lengths", "0"], "--draft must be given"),
        (["table", "--model", "m", "--draft", "d"], "--table must be given"),
        (["paired", "--model", "m", "--draft", "d", "--batches", "1,64"], "--batches must be from 1 to"),
        (["paired", "--model", "m", "--draft", "d", "--lengths=-1,2"], "--lengths must be >= 0, got [-1, 2]"),
    ],
)
def test_impossible_requests_of_the_script(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from servecast.validation.vllm_paired import main

    assert main([*words, "--out", str(tmp_path / "out.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_script_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(vllm_server, "PAIRED_SCRIPT", script)
    with pytest.raises(RuntimeError, match=r"did not end within 0\.3 s"):
        run_paired(sys.executable, [], tmp_path / "out.jsonl", limit_s=0.3)

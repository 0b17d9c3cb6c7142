"""What a user can get wrong, on the command line: one line on stderr, exit status 2, nothing written."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from servecast.cli import main

HEADER = "t_s,n_in,n_out\n"
TRACE = HEADER + "".join(f"{0.5 * i},{100 + i},{20 + i % 7}\n" for i in range(40))
REQUEST = """\
schema: servecast.plan/1
workload: {rate_rps: 5, input_tokens: 500, output_tokens: 100}
model: llama-3.1-8b
gpus: {h100: {usd_per_hour: 2.9}}
slo: {ttft_p99: 2s, tpot_p99: 50ms}
"""
POINTS = "model,gpu,engine,concurrency,isl,osl\n"
BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with a good trace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.csv").write_text(TRACE)
    return tmp_path


def flags(**changed: str) -> list[str]:
    """A good plan from flags, some of them replaced; it would write a folder and a page."""
    given = {"trace": "trace.csv", "model": "llama-3.1-8b", "gpu": "h100=2.9", "slo": "ttft_p99=2s", **changed}
    return ["plan", *(part for name, text in given.items() for part in (f"--{name}", text)), *outputs()]


def outputs() -> list[str]:
    return ["--out", "out", "--report", "report.html"]


def refused(arguments: list[str], *, wrote_nothing_in: Path) -> str:
    """Message of the one line on stderr."""
    before = sorted(wrote_nothing_in.rglob("*"))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.stdout + result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("servecast: error: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) <= 600
    assert sorted(wrote_nothing_in.rglob("*")) == before
    return result.stderr.removeprefix("servecast: error: ").rstrip("\n")


def test_the_good_input_is_good(folder: Path) -> None:
    """What every case below changes: it plans and writes."""
    result = CliRunner().invoke(main, flags())
    assert result.exit_code == 0, result.stderr
    assert (folder / "out" / "plan.json").exists()
    assert (folder / "report.html").exists()
    (folder / "good.yaml").write_text(REQUEST)
    assert CliRunner().invoke(main, ["plan", "good.yaml"]).exit_code == 0


TRACES = {
    "empty": ("", "is empty"),
    "only a header": (HEADER, "no requests"),
    "one request": (HEADER + "0,1,1\n", "at least 2 requests"),
    "garbled": ("lorem ipsum\ndolor sit amet\n", "no known trace format"),
    "not its own columns": (TRACE.replace("n_in", "width"), "column n_in"),
    "column missing": (TRACE.replace(",n_out", "").replace(",20", ""), "column n_out"),
    "value missing": (HEADER + "0,1,1\n1,,1\n", "line 3"),
    "field missing": (HEADER + "0,1,1\n1,2\n", "line 3"),
    "unsorted": (HEADER + "0,1,1\n9,1,1\n5,1,1\n", "line 4"),
    "negative time": (HEADER + "-1,1,1\n9,1,1\n", "line 2"),
    "NaN time": (HEADER + "0,1,1\nnan,1,1\n", "line 3"),
    "infinite time": (HEADER + "0,1,1\ninf,1,1\n", "line 3"),
    "NaN tokens": (HEADER + "0,nan,1\n1,1,1\n", "line 2"),
    "zero prompt": (HEADER + "0,1,1\n1,0,1\n", "line 3"),
    "zero output": (HEADER + "0,1,1\n1,1,0\n", "line 3"),
    "negative tokens": (HEADER + "0,1,1\n1,-4,1\n", "line 3"),
    "half a token": (HEADER + "0,1,1\n1,1.5,1\n", "whole number"),
    "a word": (HEADER + "0,1,1\n1,many,1\n", "'many'"),
    "all at once": (HEADER + "3,1,1\n3,1,1\n", "same arrival time"),
    "very long line": (HEADER + "0," + "1" * (2 << 20) + ",1\n", "longer than 1 MiB"),
    "JSON with a hole": ('{"t_s": 0, "n_in": 1, "n_out": 1}\n{"t_s": 1, "n_in": 1}\n', "column n_out"),
    "broken JSON": ('{"t_s": 0, "n_in": 1, "n_out": 1}\n{"t_s": 1, "n_in"\n', "not valid JSON"),
}
BINARIES = {
    "binary": (bytes(range(256)) * 40, "not"),
    "zero bytes": (HEADER.encode() + b"\0" * 100, "not text"),
    "damaged gzip": (gzip.compress(TRACE.encode())[:60], "damaged gzip"),
    "UTF-16": (TRACE.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize("name", TRACES)
def test_bad_trace(name: str, folder: Path) -> None:
    text, message = TRACES[name]
    (folder / "trace.csv").write_text(text)
    said = refused(flags(), wrote_nothing_in=folder)
    assert message in said
    assert said.startswith("trace.csv")
    assert refused(["trace", "trace.csv", "--chart", "chart.json"], wrote_nothing_in=folder) == said


@pytest.mark.parametrize("name", BINARIES)
def test_binary_trace(name: str, folder: Path) -> None:
    data, message = BINARIES[name]
    (folder / "trace.csv").write_bytes(data)
    assert message in refused(flags(), wrote_nothing_in=folder)


FLAGS = {
    "no such trace": (flags(trace="absent.csv"), "absent.csv: no such file"),
    "trace is a folder": (flags(trace="."), "is a directory"),
    "no such run": (flags(run="monday"), "monday"),
    "unknown model": (flags(model="llama-3.1-9b"), "nearest: "),
    "unknown GPU": (flags(gpu="h2000=3"), "h200_sxm"),
    "unknown engine": (flags(engine="vlm"), "did you mean vllm?"),
    "unknown engine version": (flags(engine="vllm@0.0.1"), "0.0.1"),
    "unknown precision": (flags(precision="fp7"), "must be one of auto, bf16"),
    "unknown cache precision": (flags(**{"kv-precision": "fp7"}), "must be one of auto, bf16"),
    "unknown profile": (flags(profile="mine"), "profile must be a file or one of"),
    "limit without unit": (flags(slo="ttft_p99=2"), "needs a unit (ms or s)"),
    "limit in the wrong unit": (flags(slo="ttft_p99=2h"), "the unit must be us, ms, s, m or min, got 'h'"),
    "limit of tokens": (flags(slo="tpot_p99=50tok"), "got 'tok'"),
    "limit of nothing": (flags(slo="ttft_p99=0s"), "must be positive"),
    "negative limit": (flags(slo="ttft_p99=-2s"), "must be positive"),
    "NaN limit": (flags(slo="ttft_p99=nans"), "nan"),
    "unknown metric": (flags(slo="tfft_p99=2s"), "nearest: ttft"),
    "no percentile": (flags(slo="ttft=2s"), "needs a percentile such as ttft_p99"),
    "percentile of 0": (flags(slo="ttft_p0=2s"), "percentile must be between 0 and 100"),
    "price of zero": (flags(gpu="h100=0"), "price must be > 0"),
    "negative price": (flags(gpu="h100=-3"), "price must be > 0"),
    "price of NaN": (flags(gpu="h100=nan"), "price must be > 0"),
    "no price": (flags(gpu="h100"), "must be name=price"),
    "count of zero": (flags(gpu="h100=3:0"), "whole number from 1"),
    "rate scale of zero": (flags(**{"rate-scale": "0"}), "rate_scale must be > 0"),
    "rate scale of NaN": (flags(**{"rate-scale": "nan"}), "rate_scale must be"),
    "nothing at all": (["plan"], "--model must be given"),
    "no trace": (["plan", "--model", "llama-3.1-8b", "--gpu", "h100=3", "--slo", "ttft_p99=2s"], "--trace must"),
    "the same limit twice": ([*flags(), "--slo", "ttft_p99=3s"], "given once"),
    "the same GPU twice": ([*flags(), "--gpu", "h100=3"], "given once"),
    "the same GPU twice by other names": ([*flags(), "--gpu", "H100-SXM=3"], "offered once"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flag(name: str, folder: Path) -> None:
    arguments, message = FLAGS[name]
    assert message in refused(arguments, wrote_nothing_in=folder)


INFEASIBLE = {
    # the message names the bound and the best achievable
    "impossible TTFT": (flags(slo="ttft_p99=1ms"), "ttft_p99 <= 0.001 s: the best achievable is 0.0"),
    "impossible TPOT": (flags(slo="tpot_p99=10us"), "tpot_p99 <= 1e-05 s: the best achievable is 0.00"),
    "unstable load": ([*flags(gpu="h100=3:1"), "--rate-scale", "10000"], "count: "),
    "does not fit": (flags(model="llama-3.1-405b", gpu="l4=1"), "memory: "),
}


@pytest.mark.parametrize("name", INFEASIBLE)
def test_what_nothing_can_meet(name: str, folder: Path) -> None:
    arguments, message = INFEASIBLE[name]
    assert f"no plan meets the request: {message}" in refused(arguments, wrote_nothing_in=folder)


REQUESTS = {
    "TP that does not divide the heads": (REQUEST + "search: {tp: [3]}\n", "tp must divide the 32 attention heads"),
    "unknown key": (REQUEST.replace("slo:", "slos:"), "slos: unknown key (nearest: slo)"),
    "unknown inner key": (REQUEST.replace("usd_per_hour", "usd_per_hr"), "unknown key (nearest: usd_per_hour)"),
    "price of zero": (REQUEST.replace("2.9", "0"), "gpus.h100.usd_per_hour must be > 0, got 0"),
    "negative price": (REQUEST.replace("2.9", "-1"), "gpus.h100.usd_per_hour must be > 0, got -1"),
    "limit without unit": (REQUEST.replace("2s", "2"), "needs a unit (ms or s)"),
    "anchor bomb": (BOMB, "anchors are not allowed"),
    "alias": (REQUEST.replace("{ttft_p99: 2s, tpot_p99: 50ms}", "*x"), "aliases are not allowed"),
    "tag": (REQUEST.replace("llama-3.1-8b", "!!python/object/apply:os.system [ls]"), "tags are not allowed"),
    "another version": (REQUEST.replace("plan/1", "plan/2"), "schema must be 'servecast.plan/1'"),
    "no YAML": ("slo: [2s", "is not valid YAML"),
    "empty": ("", "is empty"),
    "no such trace": (
        REQUEST.replace("{rate_rps: 5, input_tokens: 500, output_tokens: 100}", "{trace: x.csv}"),
        "x.csv",
    ),
    "rate of zero": (REQUEST.replace("rate_rps: 5", "rate_rps: 0"), "rate_rps must be > 0"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_request_file(name: str, folder: Path) -> None:
    text, message = REQUESTS[name]
    (folder / "request.yaml").write_text(text)
    assert message in refused(["plan", "request.yaml", *outputs()], wrote_nothing_in=folder)


def test_no_request_file(folder: Path) -> None:
    assert "absent.yaml: no such file" in refused(["plan", "absent.yaml"], wrote_nothing_in=folder)
    (folder / "request.yaml").write_text(REQUEST)
    both = ["plan", "request.yaml", "--model", "llama-3.1-8b"]
    assert "both given" in refused(both, wrote_nothing_in=folder)


PLACES = {
    "folder under a file": ["--out", "trace.csv/out"],
    "folder that is a file": ["--out", "trace.csv"],
    "folder in no folder": ["--out", "absent/out"],
    "page under a file": ["--report", "trace.csv/report.html"],
    "page that is a folder": ["--report", "."],
    "page in no folder": ["--report", "absent/report.html"],
}


@pytest.mark.parametrize("name", PLACES)
def test_places_that_cannot_be_written(name: str, folder: Path) -> None:
    said = refused([*flags()[: -len(outputs())], *PLACES[name]], wrote_nothing_in=folder)
    assert "folder" in said


POINT_ROWS = {
    "missing": (None, "rows.csv"),
    "empty": ("", "is empty"),
    "no rows": (POINTS, "has a header and no rows"),
    "column missing": (POINTS.replace("isl,", "") + "llama-3.1-8b,h100,vllm,8,100\n", "column isl is missing"),
    "garbled": ("lorem ipsum\n1\n", "column model is missing"),
    "very long line": (POINTS + "x" * (2 << 20) + "\n", "longer than 1 MiB"),
}


@pytest.mark.parametrize("name", POINT_ROWS)
def test_bad_table_of_points(name: str, folder: Path) -> None:
    text, message = POINT_ROWS[name]
    if text is not None:
        (folder / "rows.csv").write_text(text)
    assert message in refused(["predict", "--rows", "rows.csv", "--out", "out.csv"], wrote_nothing_in=folder)


POINT = ["predict", "--model", "llama-3.1-8b", "--gpu", "h100"]
POINT_FLAGS = {
    "no model": (["predict", "--gpu", "h100"], "--model must be given"),
    "unknown model": ([*POINT, "--model", "llama-3.1-9b"], "nearest: "),
    "unknown GPU": ([*POINT, "--gpu", "h2000"], "h200_sxm"),
    "unknown engine": ([*POINT, "--engine", "vlm"], "engine must be one of"),
    "unknown precision": ([*POINT, "--precision", "fp7"], "fp7"),
    "NaN in flight": ([*POINT, "--concurrency", "nan"], "--concurrency must be a positive number"),
    "nobody in flight": ([*POINT, "--concurrency", "0"], "--concurrency must be a positive number"),
    "negative prompt": ([*POINT, "--isl", "-5"], "--isl must be a positive number"),
    "endless output": ([*POINT, "--osl", "inf"], "--osl must be a positive number"),
    "wider than the heads": ([*POINT, "--tp", "64"], "tp must divide the 32 attention heads"),
    "does not fit": ([*POINT, "--model", "llama-3.1-405b"], "no room for a cache"),
    "unknown profile": ([*POINT, "--profile", "mine"], "profile must be a file or one of"),
}


@pytest.mark.parametrize("name", POINT_FLAGS)
def test_bad_point(name: str, folder: Path) -> None:
    arguments, message = POINT_FLAGS[name]
    assert message in refused(arguments, wrote_nothing_in=folder)


@pytest.mark.parametrize(
    "arguments",
    [["plan", "--nope"], ["predict", "--tp", "0"], ["predict", "--isl", "x"], ["trace"], ["list", "x"], ["pln"]],
)
def test_usage_errors_of_click(arguments: list[str], folder: Path) -> None:
    """An unknown option, a value out of range, an argument that is missing: click explains, status 2."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    assert [one.name for one in folder.iterdir()] == ["trace.csv"]


# ---- Ctrl-C --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_while_the_trace_is_read(folder: Path) -> None:
    """The trace never ends; one line, status 130 (128 + SIGINT), nothing written."""
    os.mkfifo(folder / "endless.csv")
    # a shell that starts tests in the background has SIGINT ignored, and children inherit that
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", start + "from servecast.cli import main; main()", *flags(trace="endless.csv")]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            pipe = _open_for_reader(folder / "endless.csv", process)
            os.set_blocking(pipe, True)
            _feed(pipe, 3 << 20)  # more than the pipe holds, so that the reader is at work
            _wait_until_read(pipe)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
            os.close(pipe)
        finally:
            process.kill()
    assert (process.returncode, stdout, stderr) == (130, "", "servecast: interrupted\n")
    assert sorted(one.name for one in folder.iterdir()) == ["endless.csv", "trace.csv"]


def _open_for_reader(path: Path, process: subprocess.Popen[str]) -> int:
    """Writing end of a pipe, as soon as the process has opened the reading end."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    pytest.fail("the trace was never opened")


def _wait_until_read(pipe: int) -> None:
    """Return when the pipe is drained and its reader waits: CPython's buffered read looks for signals only there."""
    import fcntl
    import termios

    left = bytearray(4)
    while fcntl.ioctl(pipe, termios.FIONREAD, left) == 0 and any(left):
        time.sleep(0.01)
    time.sleep(0.2)


def _feed(pipe: int, size: int) -> None:
    """A header and requests that all arrive at 0 s."""
    block = b"0,100,10\n" * 1000
    os.write(pipe, HEADER.encode())
    for _ in range(size // len(block)):
        os.write(pipe, block)

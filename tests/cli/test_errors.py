"""How a command ends: exit statuses as shells know them (2 misuse, 128 + signal), one line on stderr."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from servecast.cli.errors import describe, guard, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("gpu must be a catalogue name"), "gpu must be a catalogue name"),
        (ValueError("two\n  lines\r\nand\ta tab"), "two lines and a tab"),
        (ValueError("\x1b[31mred\x07\u202e\u2028end"), "\\x1b[31mred\\x07\\u202e end"),
        (ValueError("ümlaut \udcff"), "ümlaut \\udcff"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 10_000), "x" * 497 + "..."),
        (FileNotFoundError("chat.csv: no such file"), "chat.csv: no such file"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "chat.csv"),
            "chat.csv: No such file or directory",
        ),
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), None),
    ],
)
def test_mistakes_of_the_user(error: Exception, line: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, guard():
        raise error
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("servecast: error: ")
    assert err.count("\n") == 1
    if line is not None:
        assert err == f"servecast: error: {line}\n"


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, guard():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "servecast: interrupted\n")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ZeroDivisionError(), RuntimeError("x")])
def test_our_own_mistakes_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), guard():
        raise error


def test_decorated_commands_keep_name_and_result(capsys: pytest.CaptureFixture[str]) -> None:
    @guard()
    def command(value: int) -> int:
        """Says it."""
        if value < 0:
            raise ValueError(f"value must be >= 0, got {value}")
        return value

    assert (command.__name__, command.__doc__, command(3), command(4)) == ("command", "Says it.", 3, 4)
    for _ in range(2):  # not used up by the first failure
        with pytest.raises(SystemExit):
            command(-1)
    assert capsys.readouterr().err == "servecast: error: value must be >= 0, got -1\n" * 2


def test_exit_statuses_pass() -> None:
    with pytest.raises(SystemExit) as caught, guard():
        raise SystemExit(3)
    assert caught.value.code == 3


def test_description_of_a_path_in_bytes() -> None:
    assert describe(OSError(errno.EACCES, "Permission denied", b"a.csv")) == "a.csv: Permission denied"


def test_one_line_of_nothing() -> None:
    assert one_line(" \n ") == ""


def started(script: str) -> subprocess.Popen[str]:
    code = f"from servecast.cli.errors import guard\nimport time\nwith guard():\n    {script}\n"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.mark.parametrize("script", ["for i in range(100000): print(i)", "time.sleep(0.5); print('short')"])
def test_reader_that_goes_away(script: str) -> None:
    with started(script) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 141


def test_ctrl_c_in_a_process() -> None:
    with started("print('ready', flush=True); time.sleep(30)") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "servecast: interrupted\n"
        assert process.wait(timeout=30) == 130


def test_full_device() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    code = "from servecast.cli.errors import guard\nwith guard():\n    print('x')\n"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode in (2, 120)  # 120: the interpreter's own second attempt at exit
    assert done.stderr.startswith("servecast: error: [Errno 28] No space left on device\n")

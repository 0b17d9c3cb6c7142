"""Files are whole or absent. Failures are simulated at the system calls, since tests may run as root."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from servecast.cli.output import progress, require_writable, to_json, write_all_atomic, write_atomic
from servecast.model.slo import Slo

Failure = Callable[..., Any]


def failing_on(call: int, original: Failure, error: BaseException) -> Failure:
    """`original`, but its call number `call` raises."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*args, **kwargs)

    return wrapped


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- written -----------------------------------------------------------------------------------------


def test_writes_utf8_with_the_line_ends_given(tmp_path: Path) -> None:
    write_atomic(tmp_path / "out.txt", "ü\n\r\nend")
    assert (tmp_path / "out.txt").read_bytes() == b"\xc3\xbc\n\r\nend"
    assert names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_mode_is_0644_less_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "out.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.txt").stat().st_mode) == mode


def test_replaces_what_was_there_and_follows_links(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("a much longer text than the new one")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_atomic(str(tmp_path / "link.txt"), "new")
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "link.txt").is_symlink()


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_all_atomic({"a.txt": "a", "b.txt": "b"})
    assert names(tmp_path) == ["a.txt", "b.txt"]


# ---- refused -----------------------------------------------------------------------------------------


def test_refused_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    os.mkfifo("pipe")
    for path, message in {
        "absent/out.txt": "absent/out.txt: the folder absent does not exist",
        "file/out.txt": "file/out.txt: file is not a folder",
        "file/more/out.txt": "file/more/out.txt: the folder file/more does not exist",
        ".": ".: is a folder, not a file",
        "pipe": "pipe: is not a regular file",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            write_atomic(path, "x")
    assert names(tmp_path) == ["file", "pipe"]


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"^out.txt: the folder . is not writable$"):
        require_writable("out.txt")


def test_the_same_file_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out.txt: is to be written twice$"):
        write_all_atomic({tmp_path / "out.txt": "a", f"{tmp_path}/./sub/../out.txt": "b"})
    assert names(tmp_path) == []


def test_text_that_is_not_unicode_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_all_atomic({tmp_path / "a.txt": "fine", tmp_path / "b.txt": "\ud800"})
    assert names(tmp_path) == []


def test_one_bad_place_spoils_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        write_all_atomic({tmp_path / "a.txt": "a", tmp_path / "absent" / "b.txt": "b"})
    assert names(tmp_path) == []


# ---- nothing half written ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("function", ["open", "fsync"])
def test_a_full_disk_leaves_everything_as_it_was(
    function: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, function, failing_on(call, getattr(os, function), full))
    blamed = tmp_path / ("a.txt" if call == 1 else "b.txt")
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)") as caught:
        write_all_atomic({tmp_path / "a.txt": "new", tmp_path / "b.txt": "new"})
    assert caught.value.filename == str(blamed)
    monkeypatch.undo()
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(errno.EACCES, "Permission denied")])
def test_a_failed_rename_leaves_the_old_file_and_no_other(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, "replace", failing_on(1, os.replace, error))
    with pytest.raises(type(error)):
        write_atomic(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_ctrl_c_while_writing_the_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing_on(2, os.fsync, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_all_atomic({tmp_path / "a.txt": "a", tmp_path / "b.txt": "b"})
    assert names(tmp_path) == []


def test_all_are_complete_before_the_first_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    original = os.replace

    def watched(old: Path, new: Path) -> None:
        seen.append(sorted(path.stat().st_size for path in tmp_path.iterdir()))
        original(old, new)

    monkeypatch.setattr(os, "replace", watched)
    write_all_atomic({tmp_path / "a.txt": "1", tmp_path / "b.txt": "22"})
    assert seen == [[1, 2], [1, 2]]


# ---- JSON --------------------------------------------------------------------------------------------


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    b: float
    a: tuple[int, ...]


def test_json_keeps_order_and_takes_records() -> None:
    value = {
        "z": Record(b=math.nan, a=(1, 2)),
        "a": MappingProxyType({"inf": -math.inf, 3: True}),
        "slo": Slo(metric="ttft", percentile=99.0, limit_s=2.0),
        "array": np.array([[1.5, np.nan], [0.1 + 0.2, np.inf]]),
        "scalars": [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.float32("nan")],
        "other": [Colour.RED, Path("a/b"), None, "ü"],
    }
    text = to_json(value)
    assert text.startswith('{\n  "z": {\n    "b": null,\n    "a": [\n      1,\n      2\n    ]\n  },\n  "a": {')
    assert text.endswith("}\n")
    assert "ü" in text
    read = json.loads(text, parse_constant=pytest.fail)
    assert list(read) == list(value)
    assert read["a"] == {"inf": None, "3": True}
    assert read["slo"] == {"metric": "ttft", "percentile": 99.0, "limit_s": 2.0}
    assert read["array"] == [[1.5, None], [0.30000000000000004, None]]
    assert read["scalars"] == [0.5, 0.5, 3, True, None]
    assert read["other"] == ["red", "a/b", None, "ü"]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", Record])
def test_json_refuses_what_it_does_not_know(value: object) -> None:
    with pytest.raises(TypeError, match=r"^to_json takes plain data, got "):
        to_json([value])


# ---- progress ----------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_off_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("reading") as report:
        assert report is None
    monkeypatch.setattr(sys, "stderr", None)
    with progress("reading") as report:
        assert report is None


def test_progress_draws_nothing_for_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("reading") as report:
        assert report is not None
        report(100, 100)
    assert terminal.getvalue() == ""


def test_progress_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("reading [chat]") as report:
        assert report is not None
        report(50, 100)
        report(100, 100)
    assert "reading [chat]" in terminal.getvalue()
    assert "100%" in terminal.getvalue()

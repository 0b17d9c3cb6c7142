"""What a command leaves behind: files that are whole or absent, JSON without NaN, a progress bar on a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

Report = Callable[[int, int], None]
"""Takes (done, total), as the readers call it."""


def require_writable(path: str | Path) -> Path:
    """The file that `path` leads to, links followed; refuses one that cannot be written, in one line.

    Call it before the work whose result goes there.
    """
    real = Path(os.path.realpath(path))
    folder, shown = real.parent, Path(path).parent
    if real.is_dir():
        raise ValueError(f"{path}: is a folder, not a file")
    if real.exists() and not real.is_file():
        # a rename would put a file in place of the device or pipe
        raise ValueError(f"{path}: is not a regular file")
    if not folder.exists():
        raise ValueError(f"{path}: the folder {shown} does not exist")
    if not folder.is_dir():
        raise ValueError(f"{path}: {shown} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: the folder {shown} is not writable")
    return real


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes to `path`: the whole file is there afterwards, or what was there before."""
    write_all_atomic({path: content})


def write_all_atomic(files: Mapping[Any, str | bytes]) -> None:
    """Write several files, contents by path: all are complete beside their targets before the first takes its name.

    A failure or Ctrl-C before that point leaves every target as it was, and no temporary file in any case. The renames
    themselves are one by one. New files have mode 0644 less the umask.
    """
    contents: dict[str | Path, bytes] = {
        path: whole.encode("utf-8") if isinstance(whole, str) else whole for path, whole in files.items()
    }
    targets = [require_writable(path) for path in contents]
    for path, target in zip(contents, targets, strict=True):
        if targets.count(target) > 1:
            raise ValueError(f"{path}: is to be written twice")
    # names first: from here on an interrupt at any point finds every file that it has to remove
    temporary = [target.with_name(f".servecast-{secrets.token_hex(8)}.tmp") for target in targets]
    try:
        for path, temp in zip(contents, temporary, strict=True):
            with _blamed_on(path):
                _write_through(temp, contents[path])
        for path, temp, target in zip(contents, temporary, targets, strict=True):
            with _blamed_on(path):
                os.replace(temp, target)  # noqa: PTH105 (the one call that is atomic by contract)
    finally:
        for temp in temporary:
            with suppress(OSError):
                temp.unlink(missing_ok=True)


@contextmanager
def _blamed_on(path: str | Path) -> Iterator[None]:
    """The system's refusals name the file that the user asked for, not the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror or error})", str(path)) from None


def _write_through(path: Path, data: bytes) -> None:
    """A new file on the disk, not only in its cache."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:  # noqa: PTH123 (a descriptor)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def to_json(value: object) -> str:
    """JSON text, keys in the order given, indent 2, ending in a newline; NaN and infinity become null.

    Takes what JSON knows, and mappings, sequences, dataclasses, enums, paths, numpy arrays and scalars.
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object) -> Any:
    """`value` in the types of JSON."""
    match value:
        case Enum():
            return _plain(value.value)
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case Path():
            return str(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    tolist = getattr(value, "tolist", None)  # numpy, which is not imported for this
    if tolist is None:
        raise TypeError(f"to_json takes plain data, got {type(value).__name__}")
    return _plain(tolist())


@contextmanager
def progress(label: str) -> Iterator[Report | None]:
    """A callable for the readers that draws a bar on stderr; None where stderr is no terminal.

    Nothing is drawn (and rich not imported) for work that is done at its first report; the bar vanishes at the end.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    bar = _Bar(label)
    try:
        yield bar.report
    finally:
        bar.stop()


class _Bar:
    """A rich progress bar that starts with the first report that is not the last."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._update: Report | None = None
        self._stop: Callable[[], None] | None = None

    def report(self, done: int, total: int) -> None:
        if self._update is None:
            if done >= total:
                return
            self._start(total)
        if self._update is not None:
            self._update(done, total)

    def stop(self) -> None:
        if self._stop is not None:
            self._stop()

    def _start(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        drawn = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        drawn.start()
        self._stop = drawn.stop
        task = drawn.add_task(self._label, total=total)
        self._update = lambda done, total: drawn.update(task, completed=done, total=total)

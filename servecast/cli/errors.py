"""What a command does when it cannot go on: one line for the user's mistakes, a traceback for ours."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE, as the shell reports for programs that the signal ends."""
MAX_MESSAGE = 500


@contextmanager
def guard() -> Iterator[None]:
    """Around a command, as ``@guard()`` or ``with guard():``, what ends it becomes an exit status.

    ``ValueError`` (with it unreadable text and refused documents) and ``OSError`` are the user's: one line on stderr,
    status 2. Ctrl-C: one line, status 130. A reader of our output that has gone away (``| head``): silence, status 141.
    Every other exception is a defect of this package and keeps its traceback.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe is still ours to handle
    except KeyboardInterrupt:
        _say("servecast: interrupted")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        _discard_stdout()
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except (ValueError, OSError) as error:
        _say(f"servecast: error: {one_line(describe(error))}")
        raise SystemExit(EXIT_USER_ERROR) from None


def describe(error: Exception) -> str:
    """Message of an exception; what the system refused reads as ``path: reason``."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        return f"{name}: {error.strerror}"
    return str(error) or type(error).__name__


def one_line(text: str) -> str:
    """`text` without line ends, control characters escaped, at most 500 characters.

    >>> one_line("a\\n  b\\x1b[31m")
    'a b\\\\x1b[31m'
    """
    folded = " ".join(text[: 4 * MAX_MESSAGE].split())
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in folded)
    return safe if len(safe) <= MAX_MESSAGE else safe[: MAX_MESSAGE - 3] + "..."


def _say(line: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def _discard_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's own flush at exit stays silent."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)

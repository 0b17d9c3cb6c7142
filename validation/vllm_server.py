"""A vLLM server of one's own: started on a free loopback port, waited for, stopped with all its processes.

The engine lives in a Python of its own (`validation/install_vllm.py` builds one). ``python -m
vllm.entrypoints.openai.api_server`` is used throughout: the ``vllm`` command of the CPU build does not start, because
it asks for a distribution named vllm, and the module is what that command runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

ENTRY = ("-m", "vllm.entrypoints.openai.api_server")
PAIRED_SCRIPT = Path(__file__).with_name("vllm_paired.py")
LAST_LINES = 12
MAX_LOG_BYTES = 64 << 10
"""The end of a log that is searched for its last lines."""
POLL_S = 0.2
GRACE_S = 20.0
"""From the request to end to the kill; an engine needs seconds to leave its processes."""
LEAVE_S = 3.0
"""From the server's end to the kill of what is left: a tracker of its own still removes shared memory then."""
_KV_TOKENS = re.compile(r"KV cache size:\s*([0-9,]+)\s*tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a started server says of itself; None where it does not."""

    version: str | None
    kv_tokens: int | None
    """KV cache size of the log; its blocks are in :mod:`servecast.validation.engine_metrics`. [tokens]"""
    start_s: float
    """From starting the process to the first healthy answer."""


def vllm_environment(
    python: str | Path, *, kv_space_gib: int = 1, threads: int = 1, in_process: bool
) -> dict[str, str]:
    """Environment of a vLLM process on a CPU.

    Parameters
    ----------
    kv_space_gib : KV cache. [GiB]
    threads : of one engine step.
    in_process : engine inside the calling process, for scripts that reach into it; a server cannot have it.
    """
    if kv_space_gib < 1 or threads < 1:
        raise ValueError(f"kv_space_gib and threads must be >= 1, got {kv_space_gib} and {threads}")
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": str(kv_space_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not in_process)),
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # torch brings libgomp; with Intel's OpenMP steps are shorter, on AMD too, and speculation warns without it
    openmp = Path(python).absolute().parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        environment["LD_PRELOAD"] = ":".join(filter(None, [str(openmp), os.environ.get("LD_PRELOAD")]))
    return environment


def flag_arguments(flags: Mapping[str, object]) -> list[str]:
    """Command line of `flags`: True is a bare flag, False and None are left out, containers become JSON.

    >>> flag_arguments({"max_num_seqs": 16, "enforce-eager": True, "speculative_config": {"method": "ngram"}})
    ['--max-num-seqs', '16', '--enforce-eager', '--speculative-config', '{"method": "ngram"}']
    """
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(value if isinstance(value, str) else json.dumps(value))
    return words


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class VllmServer:
    """Context manager of one server; leaving it, by whatever exception, ends every process it started.

    Parameters
    ----------
    python : interpreter that has vLLM.
    model : folder or name; also the name under which it is served.
    flags : of the server, as a mapping (see :func:`flag_arguments`) or as words.
    log : file for its output; in a temporary folder, removed on leaving, without it.
    start_limit_s : longest time to the first healthy answer.
    entry : words between the interpreter and the flags.
    """

    def __init__(
        self,
        python: str | Path,
        model: str | Path,
        *,
        flags: Mapping[str, object] | Sequence[str] = (),
        log: str | Path | None = None,
        kv_space_gib: int = 1,
        threads: int = 1,
        start_limit_s: float = 300.0,
        entry: Sequence[str] = ENTRY,
    ) -> None:
        self.model = str(model)
        self._python = str(python)
        self._flags = flag_arguments(flags) if isinstance(flags, Mapping) else list(flags)
        self._environment = vllm_environment(python, kv_space_gib=kv_space_gib, threads=threads, in_process=False)
        self._start_limit_s = start_limit_s
        self._entry = list(entry)
        self._folder = tempfile.TemporaryDirectory(prefix="servecast-vllm-") if log is None else None
        self.log = Path(log) if log is not None else Path(self._folder.name if self._folder else ".") / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._start_s = 0.0

    @property
    def url(self) -> str:
        """Address without a path."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id, also the id of its process group; None before the start and after the end."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> VllmServer:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._folder is not None:
            self._folder.cleanup()

    def start(self) -> None:
        """Start and wait until healthy; RuntimeError with the log's last lines where that fails."""
        self._port = free_port()
        words = [self._python, *self._entry, "--model", self.model, "--served-model-name", self.model]
        words += ["--host", "127.0.0.1", "--port", str(self._port), *self._flags]
        began = time.monotonic()
        with self.log.open("wb") as log:
            self._process = self._spawn(words, log)
        self._wait(began)
        self._start_s = time.monotonic() - began

    def facts(self) -> ServerFacts:
        """Version and KV cache."""
        try:
            version = json.loads(self._get("/version")).get("version")
        except (OSError, ValueError, AttributeError):
            version = None
        found = _KV_TOKENS.findall(self.log.read_text(encoding="utf-8", errors="replace"))
        return ServerFacts(
            version=version if isinstance(version, str) else None,
            kv_tokens=int(found[-1].replace(",", "")) if found else None,
            start_s=self._start_s,
        )

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process is not None and self._process.poll() is None

    def last_lines(self) -> str:
        """The end of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - MAX_LOG_BYTES))
            text = log.read().decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-LAST_LINES:])

    def stop(self) -> None:
        """Ask the server to end, wait, and kill what is left of its process group. Harmless when nothing runs."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()  # the server alone: it ends its engine in order
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
                _wait_for_group(process.pid, LEAVE_S)
        finally:
            # also where the leader ended by itself: its engine may have stayed
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()

    def _spawn(self, words: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
        try:
            # a session of its own: an interrupt at the terminal reaches us first, and one signal reaches all of it
            return subprocess.Popen(  # noqa: S603  # the words are the caller's own
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise RuntimeError(f"server could not be started with {self._python}: {error.strerror}") from None

    def _wait(self, began: float) -> None:
        while not self._healthy():
            assert self._process is not None  # noqa: S101  # set by start
            spent = time.monotonic() - began
            if (status := self._process.poll()) is not None:
                raise RuntimeError(
                    f"server ended with status {status} after {spent:.1f} s, before it was healthy; its last lines:\n"
                    f"{self.last_lines()}"
                )
            if spent > self._start_limit_s:
                raise RuntimeError(
                    f"server was not healthy within {self._start_limit_s:g} s; its last lines:\n{self.last_lines()}"
                )
            time.sleep(POLL_S)

    def _healthy(self) -> bool:
        try:
            self._get("/health")
        except (OSError, ValueError):
            return False
        return True

    def _get(self, path: str) -> bytes:
        # a proxy of the environment must not come between loopback and us
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}{path}", timeout=2.0) as answer:
                return bytes(answer.read(1 << 20))
        except urllib.error.HTTPError as error:
            raise OSError(f"{path} answered {error.code}") from None


def run_paired(
    python: str | Path, arguments: Sequence[str], out: str | Path, *, threads: int = 1, limit_s: float = 900.0
) -> list[dict[str, Any]]:
    """Run ``vllm_paired.py`` in the Python that has vLLM; its records, RuntimeError with the last lines on failure.

    `arguments` are those of the script without ``--out``.
    """
    words = [str(python), str(PAIRED_SCRIPT), *arguments, "--out", str(out)]
    log = Path(out).with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603  # our own script
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=vllm_environment(python, threads=threads, in_process=True),
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"vllm_paired.py did not end within {limit_s:g} s; see {log}") from None
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
    if status != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        raise RuntimeError(f"vllm_paired.py ended with status {status}; its last lines:\n" + "\n".join(lines))
    with Path(out).open(encoding="utf-8") as file_out:
        return [json.loads(line) for line in file_out]


def _signal_group(group: int, number: signal.Signals) -> None:
    # nobody of the group is left; macOS says so by the second
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _wait_for_group(group: int, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end and _lives(group):
        time.sleep(POLL_S / 4)


def _lives(group: int) -> bool:
    """Whether a process of the group runs; dead ones that nobody has reaped count where /proc does not tell."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    stats = list(Path("/proc").glob("[0-9]*/stat"))
    return not stats or any(_runs_in(group, one) for one in stats)


def _runs_in(group: int, stat: Path) -> bool:
    # pid (name) state parent group ...; the name may hold anything
    with contextlib.suppress(OSError):
        state, _, found, *_ = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(found) == group and state not in "ZX"
    return False

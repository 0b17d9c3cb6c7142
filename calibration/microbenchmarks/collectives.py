"""All-reduce and send-receive between processes: gloo over the loopback, nccl where there are several devices.

The processes are started as commands of this module and take orders as lines of JSON, so that nothing is pickled and a
Ctrl-C that ends the session reaches them only through their parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from servecast.calibration.microbenchmarks.device import load_torch
from servecast.calibration.microbenchmarks.journal import Point
from servecast.calibration.microbenchmarks.kernel import at
from servecast.calibration.microbenchmarks.timing import (
    REPEATS,
    Measurement,
    calls_per_repeat,
    involuntary_switches,
)

_MODULE = "servecast.calibration.microbenchmarks.collectives"


class Group:
    """Two or more processes that wait for orders; started before the first order."""

    def __init__(self, backend: str, ranks: int, seed: int) -> None:
        self.backend, self.ranks, self._seed = backend, ranks, seed
        self._processes: list[subprocess.Popen[str]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._met = False

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        self._folder = tempfile.TemporaryDirectory(prefix="servecast-group-")
        store = Path(self._folder.name) / "store"
        for rank in range(self.ranks):
            command = [
                sys.executable,
                "-m",
                _MODULE,
                self.backend,
                str(rank),
                str(self.ranks),
                str(store),
                str(self._seed),
            ]
            self._processes.append(
                subprocess.Popen(  # noqa: S603 (our own module, by the interpreter that runs us)
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                )
            )

    def wait(self) -> None:
        """Until all processes have met."""
        if not self._processes:
            self.start()
        if not self._met:
            for process in self._processes:
                self._answer(process)
            self._met = True

    def order(self, what: str, nbytes: int, limit_s: float) -> Measurement:
        """All processes take part; the times are those of the first."""
        self.wait()
        line = json.dumps({"what": what, "bytes": nbytes, "limit_s": limit_s})
        for process in self._processes:
            if process.stdin is None:  # pragma: no cover (it was opened as a pipe)
                raise OSError("collectives: a process has no input")
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self._processes]
        seconds = tuple(float(one) for one in answers[0]["seconds"])
        # a process that lost its core holds up the others
        disturbed = sorted({int(turn) for answer in answers for turn in answer["disturbed"]})
        return Measurement(seconds=seconds, inner=int(answers[0]["inner"]), disturbed=tuple(disturbed))

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line:
            raise OSError(f"collectives: the processes must answer over {self.backend}, one ended instead")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        self._processes.clear()
        self._met = False
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Collective:
    """`all_reduce` of a vector, or `send_recv` there and back, half of it counted."""

    dtypes = ("u8",)

    def __init__(self, name: str, group: Group) -> None:
        self.name, self._group = name, group

    def grid(self) -> list[Point]:
        return [at(bytes=1 << power, ranks=self._group.ranks) for power in range(8, 25, 2)]

    def candidates(self) -> list[Point]:
        return [at(bytes=1 << power, ranks=self._group.ranks) for power in range(8, 26)]

    def guess_s(self, point: Point, dtype: str) -> float:  # noqa: ARG002 (32-bit numbers only)
        return 2e-4 + point[0][1] / 5e8

    def measure(self, point: Point, dtype: str, limit_s: float) -> Measurement:  # noqa: ARG002 (likewise)
        return self._group.order(self.name, point[0][1], limit_s)

    def close(self) -> None:
        self._group.close()


class _Worker:
    """One rank."""

    def __init__(self, backend: str, rank: int, ranks: int, store: str, seed: int) -> None:
        from time import perf_counter

        self._now = perf_counter
        self._torch = load_torch()
        self._torch.set_num_threads(1)
        self._distributed = self._torch.distributed
        self._where = self._torch.device("cuda", rank) if backend == "nccl" else self._torch.device("cpu")
        if backend == "nccl":
            self._torch.cuda.set_device(rank)
        self._rank, self._ranks = rank, ranks
        self._generator = self._torch.Generator().manual_seed(seed + rank)
        self._distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)

    def serve(self) -> None:
        _say({"ready": True})
        for line in sys.stdin:
            order = json.loads(line)
            _say(self._measure(order["what"], int(order["bytes"]), float(order["limit_s"])))

    def _measure(self, what: str, nbytes: int, limit_s: float) -> dict[str, Any]:
        self._fresh = self._torch.rand(max(nbytes // 4, 1), generator=self._generator).to(self._where)
        data = self._fresh.clone()
        for _ in range(2):
            self._run(what, data)
        once_s = self._timed(what, data, 1)
        # one plan for all ranks: that of the first
        plan = self._torch.tensor([calls_per_repeat(once_s), 0.0, once_s], dtype=self._torch.float64)
        plan = plan.to(self._where)
        self._distributed.broadcast(plan, 0)
        inner, once_s = int(plan[0].item()), float(plan[2].item())
        repeats = min(max(int(limit_s / max(inner * once_s, 1e-9)) - 2, 2), REPEATS)
        seconds: list[float] = []
        disturbed: list[int] = []
        before = involuntary_switches()
        for turn in range(repeats):
            seconds.append(max(self._timed(what, data, inner), 1e-12))
            after = involuntary_switches()
            if after != before:
                disturbed.append(turn)
            before = after
        return {"seconds": seconds, "inner": inner, "disturbed": disturbed}

    def _timed(self, what: str, data: Any, inner: int) -> float:
        if what == "all_reduce":
            data.copy_(self._fresh[: data.numel()])  # sums that grow without end would become infinite
        self._distributed.barrier()
        self._synchronise()
        start = self._now()
        for _ in range(inner):
            self._run(what, data)
        self._synchronise()
        seconds = (self._now() - start) / inner
        return seconds / 2.0 if what == "send_recv" else seconds

    def _run(self, what: str, data: Any) -> None:
        if what == "all_reduce":
            self._distributed.all_reduce(data)
        elif self._rank == 0:
            self._distributed.send(data, 1)
            self._distributed.recv(data, 1)
        elif self._rank == 1:
            self._distributed.recv(data, 0)
            self._distributed.send(data, 0)

    def _synchronise(self) -> None:
        if self._where.type == "cuda":
            self._torch.cuda.synchronize()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    backend, rank, ranks, store, seed = sys.argv[1:]
    _Worker(backend, int(rank), int(ranks), store, int(seed)).serve()

"""Reads from disk by size and by number of readers, past the page cache where the system allows it."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from servecast.calibration.microbenchmarks.journal import Point
from servecast.calibration.microbenchmarks.kernel import at
from servecast.calibration.microbenchmarks.timing import Clock, Measurement

FILE_BYTES = 128 << 20
_BLOCK = 1 << 20
_ALIGNED = 4096


class DiskRead:
    """Whole reads of one size at random places of a file, from `readers` threads at once.

    `bytes` of a point is what all readers read together.
    """

    dtypes = ("u8",)

    def __init__(self, file: DiskFile, readers: int, clock: Clock) -> None:
        self._file, self.readers, self._clock = file, readers, clock
        self.name = f"disk_read_x{readers}"

    def grid(self) -> list[Point]:
        return [at(bytes=self.readers << power) for power in range(12, 25, 2)]

    def candidates(self) -> list[Point]:
        return [at(bytes=self.readers << power) for power in range(13, 25)]

    def guess_s(self, point: Point, dtype: str) -> float:  # noqa: ARG002 (bytes have one format)
        nbytes = point[0][1]
        # a read of all places of the file would not be random
        return float("inf") if 4 * nbytes > self._file.nbytes else 2e-4 * self.readers + nbytes / 1e9

    def measure(self, point: Point, dtype: str, limit_s: float) -> Measurement:  # noqa: ARG002 (likewise)
        each = point[0][1] // self.readers
        read = self._file.reader(each)
        begin = self._clock.perf()
        seconds: list[float] = []
        with ThreadPoolExecutor(self.readers) as pool:
            list(pool.map(read, range(self.readers)))  # threads and buffers exist from here on
            while len(seconds) < 3 or (len(seconds) < 9 and self._clock.perf() - begin + seconds[-1] <= limit_s):
                start = self._clock.perf()
                list(pool.map(read, range(self.readers)))
                seconds.append(max(self._clock.perf() - start, 1e-12))
        return Measurement(seconds=tuple(seconds), inner=1, suspect=self._file.remark)

    def close(self) -> None:
        self._file.close()


class DiskFile:
    """A file of random bytes without a name: it goes with the process, however that ends."""

    def __init__(self, seed: int, *, folder: str | None = None, nbytes: int = FILE_BYTES) -> None:
        descriptor, name = tempfile.mkstemp(prefix="servecast-disk-", dir=folder)
        self._path, self.nbytes = Path(name), nbytes
        try:
            draw = random.Random(seed)  # noqa: S311 (data to read, not a secret)
            with os.fdopen(descriptor, "wb") as file:
                for _ in range(nbytes // _BLOCK):
                    file.write(draw.randbytes(_BLOCK))
                file.flush()
                os.fsync(file.fileno())
            self.descriptor, self.method = self._open()
        finally:
            self._path.unlink(missing_ok=True)
        self._closed = False
        self._draw = random.Random(seed + 1)  # noqa: S311 (places to read)

    @property
    def remark(self) -> str:
        """Why its times are not those of the disk; empty where they are."""
        return "the page cache could not be avoided" if self.method == "cached" else ""

    def _open(self) -> tuple[int, str]:
        """Direct reads; else advice to drop what was read; else what the cache gives."""
        if hasattr(os, "O_DIRECT"):
            with suppress(OSError):
                descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
                try:
                    os.preadv(descriptor, [mmap.mmap(-1, _ALIGNED)], 0)
                except OSError:
                    os.close(descriptor)
                    raise
                return descriptor, "direct"
        descriptor = os.open(self._path, os.O_RDONLY)
        return descriptor, "advice" if hasattr(os, "posix_fadvise") else "cached"

    def reader(self, nbytes: int) -> Callable[[int], int]:
        """A function that reads `nbytes` at a random place; its argument numbers the thread."""
        buffers: dict[int, mmap.mmap] = {}
        last = (self.nbytes - nbytes) // _ALIGNED

        def read(thread: int) -> int:
            # anonymous maps begin at a page, as direct reads demand
            buffer = buffers.get(thread) or buffers.setdefault(thread, mmap.mmap(-1, nbytes))
            offset = self._draw.randrange(last + 1) * _ALIGNED
            if self.method == "advice":
                os.posix_fadvise(self.descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
            got = os.preadv(self.descriptor, [buffer], offset)
            while got < nbytes:
                more = os.preadv(self.descriptor, [memoryview(buffer)[got:]], offset + got)
                if more == 0:
                    raise OSError(f"disk: a read of {nbytes} bytes must be whole, got {got}")
                got += more
            return got

        return read

    def close(self) -> None:
        """Once or more often."""
        if not self._closed:
            os.close(self.descriptor)
            self._closed = True

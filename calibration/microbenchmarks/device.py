"""The machine: what it is called, how its time is taken, and buffers that no cache holds."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from servecast.calibration.microbenchmarks.timing import Clock, CudaTimer, HostTimer, Timer

MISSING_TORCH = "calibrate needs torch: pip install 'servecast[calibrate]'"
DTYPES = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2), "fp16": ("float16", 2)}
"""torch's name and bytes of an element."""
MOST_SETS = 128
"""Sets of buffers to rotate through: making views takes time; a set below a 64th of the cache is bound by latency."""
_BLOCK = 1 << 20


def load_torch() -> Any:
    """The module; ValueError with the remedy where it is not installed."""
    try:
        return import_module("torch")
    except ImportError:
        raise ValueError(MISSING_TORCH) from None


class Device:
    """One CPU or one CUDA device, with its arena of random data."""

    def __init__(self, kind: str, clock: Clock, *, threads: int | None, memory_bytes: int) -> None:
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {kind[:40]!r}")
        self.torch = load_torch()
        if kind == "cuda" and not self.torch.cuda.is_available():
            raise ValueError("device must be one that torch finds, got cuda, of which it finds none")
        self.kind, self.clock, self.memory_bytes = kind, clock, memory_bytes
        self.threads = threads or physical_cores()
        self.torch.set_num_threads(self.threads)
        self.where = self.torch.device(kind)
        self.timer: Timer = CudaTimer(self.torch) if kind == "cuda" else HostTimer(clock)
        self.host_timer = HostTimer(clock)
        self.cache_bytes = self._cache_bytes()
        # a third of what is allowed: the arenas of two formats, and what the kernels write
        self.arena_bytes = min(max(3 * self.cache_bytes, self._wanted()), memory_bytes // 3)
        self._arenas: dict[str, Any] = {}
        self._seed = 0
        self._cursor = 0

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("bf16", "fp16") if self.kind == "cuda" else ("fp32", "bf16")

    def _wanted(self) -> int:
        return 1 << 30 if self.kind == "cuda" else 128 << 20

    def _cache_bytes(self) -> int:
        if self.kind == "cuda":
            found = getattr(self.torch.cuda.get_device_properties(0), "L2_cache_size", 0)
            return int(found) or 64 << 20
        return last_level_cache_bytes()

    def dtype(self, name: str) -> Any:
        return getattr(self.torch, DTYPES[name][0])

    def synchronise(self) -> None:
        if self.kind == "cuda":
            self.torch.cuda.synchronize()

    def refresh(self, seed: int) -> None:
        """Fresh random data at fresh addresses from here on: where pages lie in memory is part of the noise."""
        self._arenas.clear()
        self._seed = seed

    def take(self, dtype: str, shape: Sequence[int]) -> Any:
        """The next part of the arena, of this shape; it wraps around at the end."""
        flat = self._arena(dtype)
        size = prod(shape)
        aligned = -(-size // 64) * 64
        if aligned > flat.numel():
            raise ValueError(f"memory must hold {size} elements of {dtype}, got an arena of {flat.numel()}")
        if self._cursor + aligned > flat.numel():
            self._cursor = 0
        start, self._cursor = self._cursor, self._cursor + aligned
        return flat[start : start + size].view(*shape)

    def sets(self, nbytes: int) -> int:
        """How many sets of buffers of `nbytes` are needed so that twice the last-level cache is read in between."""
        return min(max(-(-2 * self.cache_bytes // max(nbytes, 1)), 2), MOST_SETS)

    def _arena(self, dtype: str) -> Any:
        if dtype not in self._arenas:
            torch = self.torch
            generator = torch.Generator(device=self.where).manual_seed(self._seed)
            block = torch.randn(_BLOCK, generator=generator, device=self.where).to(self.dtype(dtype))
            copies = max(self.arena_bytes // (_BLOCK * DTYPES[dtype][1]), 1)
            self._arenas[dtype] = block.repeat(copies)
            self._cursor = 0
        return self._arenas[dtype]

    def name(self) -> str:
        return str(self.torch.cuda.get_device_name(0)) if self.kind == "cuda" else cpu_model()

    def environment(self) -> dict[str, str | int | float]:
        """Names, counts and versions; nothing that tells where on the machine something lies."""
        found: dict[str, str | int | float] = {
            "device": self.name(),
            "cpu_model": cpu_model(),
            "cores": physical_cores(),
            "cache_bytes": self.cache_bytes,
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "torch": str(self.torch.__version__),
        }
        for package in ("numpy", "scipy", "servecast"):
            found[package] = _version(package)
        if self.kind == "cuda":
            found["cuda"] = str(self.torch.version.cuda)
            found["driver"] = _driver()
            found["memory_bytes"] = int(self.torch.cuda.get_device_properties(0).total_memory)
        return found


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads and the quota of a container left out of account."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return max(min(len(siblings), _quota(len(siblings))), 1)


def _quota(otherwise: int) -> int:
    """Whole cores that a container's quota leaves."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return otherwise
    return otherwise if most == "max" else max(int(most) // int(period), 1)


def last_level_cache_bytes() -> int:
    """Of the first core; 32 MiB where the system does not say."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            largest = max(largest, int(found[1]) << (10 if found[2] == "K" else 20))
    return largest or 32 << 20


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip()[:100] if found else platform.machine()


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"(\d+\.\d+(?:\.\d+)?)", text)
    return found[1] if found else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

"""The kernels of this machine, by group, and one session over them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from servecast.calibration.microbenchmarks.attention import DecodeAttention, PrefillAttention
from servecast.calibration.microbenchmarks.collectives import Collective, Group
from servecast.calibration.microbenchmarks.device import Device
from servecast.calibration.microbenchmarks.disk import DiskFile, DiskRead
from servecast.calibration.microbenchmarks.gemm import Gemm
from servecast.calibration.microbenchmarks.journal import Header, Journal
from servecast.calibration.microbenchmarks.kernel import Kernel, Rates
from servecast.calibration.microbenchmarks.layer import Layer
from servecast.calibration.microbenchmarks.memory import MemoryCopy, MemoryRead, PeerCopy, host_copies
from servecast.calibration.microbenchmarks.overhead import Host, Launch
from servecast.calibration.microbenchmarks.session import Choose, Outcome, Session
from servecast.calibration.microbenchmarks.timing import Clock, SystemClock

GROUPS = ("gemm", "attention", "layer", "overhead", "memory", "copies", "disk", "collectives")
LEAST_BUDGET_S, MOST_BUDGET_S = 1.0, 86_400.0
LEAST_MEMORY, MOST_MEMORY = 64 << 20, 1 << 44
MOST_THREADS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a session is asked for."""

    budget_s: float = 60.0
    device: str = "cpu"
    memory_bytes: int = 2 << 30
    groups: tuple[str, ...] = GROUPS
    threads: int | None = None
    """None: as many as there are cores."""
    seed: int = 1

    def __post_init__(self) -> None:
        _require("budget", self.budget_s, LEAST_BUDGET_S, MOST_BUDGET_S, "s")
        _require("memory", self.memory_bytes, LEAST_MEMORY, MOST_MEMORY, "bytes")
        _require("seed", self.seed, 0, 2**31 - 1, "")
        if self.threads is not None:
            _require("threads", self.threads, 1, MOST_THREADS, "")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device[:40]!r}")
        for group in self.groups:
            if group not in GROUPS:
                raise ValueError(f"only must be among {', '.join(GROUPS)}, got {group[:40]!r}")
        if not self.groups or len(set(self.groups)) < len(self.groups):
            raise ValueError(f"only must name groups, each once, got {','.join(self.groups)[:80]!r}")


def _require(name: str, value: float, least: float, most: float, unit: str) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least:g} to {most:g} {unit}".rstrip() + f", got {value:g}")


def kernels_of(device: Device, groups: Sequence[str], seed: int) -> list[Kernel]:
    """In the order of `GROUPS`; what they hold (a file, processes) is closed with them."""
    several = device.kind == "cuda" and device.torch.cuda.device_count() > 1
    group = Group("nccl" if several else "gloo", device.torch.cuda.device_count() if several else 2, seed)
    found: list[Kernel] = []
    try:
        if "collectives" in groups:
            group.start()  # takes seconds, in which the rest is made ready
        _collect(found, device, Rates(device), groups, seed)
        if "collectives" in groups:
            found += [Collective(name, group) for name in ("all_reduce", "send_recv")]
            group.wait()
    except BaseException:
        group.close()
        for kernel in found:
            kernel.close()
        raise
    return found


def _collect(found: list[Kernel], device: Device, rates: Rates, groups: Sequence[str], seed: int) -> None:
    if "gemm" in groups:
        found.append(Gemm(device, rates))
    if "attention" in groups:
        found += [DecodeAttention(device, rates), PrefillAttention(device, rates)]
    if "layer" in groups:
        found.append(Layer(device, rates))
    if "overhead" in groups:
        found += [Launch(device, rates), Host(device, rates)]
    if "memory" in groups:
        found += [MemoryCopy(device, rates), MemoryRead(device, rates)]
    if "copies" in groups:
        found += host_copies(device, rates)
        if device.kind == "cuda" and device.torch.cuda.device_count() > 1:
            found.append(PeerCopy(device, rates))
    if "disk" in groups:
        file = DiskFile(seed, nbytes=min(128 << 20, device.memory_bytes // 4 // (1 << 20) << 20))
        found += [DiskRead(file, readers, device.clock) for readers in (1, 4)]


def measure(
    settings: Settings,
    path: str | Path,
    *,
    environment: dict[str, str | int | float] | None = None,
    clock: Clock | None = None,
    begun_s: float | None = None,
    choose: Choose | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Journal, Outcome]:
    """Measure this machine into the journal at `path`, which may be one to go on with.

    Raises
    ------
    ValueError : torch is missing, a setting is refused, or the journal is that of another device.
    """
    clock = clock or SystemClock()
    begun_s = clock.perf() if begun_s is None else begun_s
    device = Device(settings.device, clock, threads=settings.threads, memory_bytes=settings.memory_bytes)
    header = Header(
        settings={
            "device": device.name(),
            "kind": device.kind,
            "threads": device.threads,
            "memory_bytes": settings.memory_bytes,
            "groups": ",".join(settings.groups),
            "seed": settings.seed,
            "torch": str(device.torch.__version__),
        },
        environment={**device.environment(), "load": round(load(), 2), **(environment or {})},
    )
    with Journal(path, header) as journal:
        kernels = kernels_of(device, settings.groups, settings.seed)
        outcome = Session(
            kernels,
            journal,
            clock,
            budget_s=settings.budget_s,
            seed=settings.seed,
            begun_s=begun_s,
            choose=choose,
            refresh=device.refresh,
            progress=progress,
        ).run()
    return journal, outcome


def load() -> float:
    """Mean number of processes that wanted a core over the last minute, before anything is measured; 0 if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def parse_budget(text: str) -> float:
    """Seconds of ``60s``, ``3min`` or ``1h``.

    >>> parse_budget("3min")
    180.0
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*(s|m|min|h)", text.strip())
    if found is None:
        raise ValueError(f"budget must be a number with s, min or h, such as 60s, got {text[:40]!r}")
    seconds = float(found[1]) * {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}[found[2]]
    _require("budget", seconds, LEAST_BUDGET_S, MOST_BUDGET_S, "s")
    return seconds


def parse_memory(text: str) -> int:
    """Bytes of ``2GiB`` or ``512MiB``.

    >>> parse_memory("512MiB")
    536870912
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*(MiB|GiB|TiB)", text.strip())
    if found is None:
        raise ValueError(f"memory must be a number with MiB or GiB, such as 2GiB, got {text[:40]!r}")
    nbytes = int(float(found[1]) * {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[found[2]])
    _require("memory", nbytes, LEAST_MEMORY, MOST_MEMORY, "bytes")
    return nbytes


def parse_groups(text: str) -> tuple[str, ...]:
    """Names with commas in between."""
    return tuple(part.strip() for part in text.split(","))

"""Bandwidth of memory by size: reads and copies on the device, and copies between host and device."""

from __future__ import annotations

from typing import Any

from servecast.calibration.microbenchmarks.device import Device
from servecast.calibration.microbenchmarks.journal import Point
from servecast.calibration.microbenchmarks.kernel import DeviceKernel, Rates, at
from servecast.calibration.microbenchmarks.timing import Call, Measurement, repeat

BYTES = ("u8",)


class _Bytes(DeviceKernel):
    """A kernel with one size, in bytes."""

    passes = 1
    """Bytes that memory moves for one byte of the size."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        return BYTES

    def grid(self) -> list[Point]:
        top = 30 if self.device.kind == "cuda" else 25
        return [at(bytes=1 << power) for power in range(12, top + 1, 2)]

    def candidates(self) -> list[Point]:
        top = 30 if self.device.kind == "cuda" else 26
        return [at(bytes=1 << power) for power in range(11, top + 1)]

    def guess_s(self, point: Point, dtype: str) -> float:  # noqa: ARG002 (bytes have one format)
        nbytes = point[0][1]
        if 4 * nbytes > self.device.arena_bytes:
            return float("inf")
        return self.rates.seconds(self.device.dtypes[0], 0.0, self.passes * nbytes)

    def measure(self, point: Point, dtype: str, limit_s: float) -> Measurement:  # noqa: ARG002 (likewise)
        nbytes = point[0][1]
        call = self.prepare(point, "u8", self.device.sets(self.passes * nbytes))
        with self.device.torch.inference_mode():
            return repeat(call, self.device.timer, self.device.clock, limit_s)

    def _take(self, nbytes: int) -> Any:
        dtype = self.device.dtypes[-1]  # two bytes an element on every device
        return self.device.take(dtype, (nbytes // 2,))


class MemoryCopy(_Bytes):
    """Device to device, within one device: each byte is read and written."""

    name = "memory_copy"
    passes = 2

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:  # noqa: ARG002 (likewise)
        pairs = [(self._take(point[0][1]), self._take(point[0][1])) for _ in range(sets)]

        def call(turn: int) -> Any:
            target, source = pairs[turn % sets]
            return target.copy_(source)

        return call


class MemoryRead(_Bytes):
    """Sum of 32-bit integers: each byte is read once, nothing to speak of is written."""

    name = "memory_read"

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:  # noqa: ARG002 (likewise)
        torch = self.device.torch
        parts = [self._take(point[0][1]).view(torch.int32) for _ in range(sets)]
        # the largest of integers is exact in their own format: no conversion competes with the reads
        return lambda turn: torch.amax(parts[turn % sets], dim=0)


class HostCopy(_Bytes):
    """Host to device or back, from pinned or pageable memory; on a CPU both ends are host buffers."""

    def __init__(self, device: Device, rates: Rates, *, to_device: bool, pinned: bool) -> None:
        super().__init__(device, rates)
        self.to_device, self.pinned = to_device, pinned
        kind = ("pinned" if pinned else "pageable") if device.kind == "cuda" else "buffer"
        self._name = f"copy_{'h2d' if to_device else 'd2h'}_{kind}" if device.kind == "cuda" else "copy_host"
        self._host: Any = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self._name

    def grid(self) -> list[Point]:
        top = 28 if self.device.kind == "cuda" else 24
        return [at(bytes=1 << power) for power in range(12, top + 1, 2)]

    def guess_s(self, point: Point, dtype: str) -> float:
        nbytes = point[0][1]
        if 4 * nbytes > self.device.arena_bytes:
            return float("inf")
        return super().guess_s(point, dtype) if self.device.kind == "cpu" else 1e-5 + nbytes / 4e9

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:  # noqa: ARG002 (one format)
        nbytes, device = point[0][1], self.device
        if device.kind == "cpu":
            return self._between_buffers(nbytes, sets)
        torch = device.torch
        sets = max(min(sets, (64 << 20) // nbytes), 2)
        hosts = [torch.empty(nbytes // 2, dtype=device.dtype("bf16"), pin_memory=self.pinned) for _ in range(sets)]
        for host in hosts:
            host.fill_(1.0)  # a page that was never written is a page that does not exist
        remote = [device.take("bf16", (nbytes // 2,)) for _ in range(sets)]
        ends = list(zip(remote, hosts, strict=True) if self.to_device else zip(hosts, remote, strict=True))
        return lambda turn: ends[turn % sets][0].copy_(ends[turn % sets][1], non_blocking=True)

    def _between_buffers(self, nbytes: int, sets: int) -> Call:
        """numpy's copy: one thread of memcpy, as an engine's own code would do it."""
        parts = [self._take(nbytes).view(self.device.torch.int16).numpy() for _ in range(2 * sets)]

        def call(turn: int) -> None:
            at = 2 * (turn % sets)
            parts[at][:] = parts[at + 1]

        return call


def host_copies(device: Device, rates: Rates) -> list[HostCopy]:
    """Four kinds with a device, one without."""
    if device.kind == "cpu":
        return [HostCopy(device, rates, to_device=True, pinned=False)]
    return [
        HostCopy(device, rates, to_device=to_device, pinned=pinned)
        for to_device in (True, False)
        for pinned in (True, False)
    ]


class PeerCopy(_Bytes):
    """From the first device to the second, where there are two."""

    name = "copy_d2d"

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:  # noqa: ARG002 (one format)
        sources = [self._take(point[0][1]) for _ in range(min(sets, 16))]
        target = self.device.torch.empty_like(sources[0], device="cuda:1")
        return lambda turn: target.copy_(sources[turn % len(sources)], non_blocking=True)

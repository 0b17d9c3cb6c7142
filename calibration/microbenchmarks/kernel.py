"""What a session needs to know of a kernel, and the base of those that run on the device's own arena."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Protocol

from servecast.calibration.microbenchmarks.device import DTYPES, Device
from servecast.calibration.microbenchmarks.journal import Point
from servecast.calibration.microbenchmarks.timing import Call, Measurement, repeat


class Kernel(Protocol):
    """One thing to measure over a grid of points."""

    @property
    def name(self) -> str: ...

    @property
    def dtypes(self) -> tuple[str, ...]: ...

    def grid(self) -> list[Point]:
        """Points of the first round."""

    def candidates(self) -> list[Point]:
        """Points that may be added where the fit is least certain."""

    def guess_s(self, point: Point, dtype: str) -> float:
        """Rough seconds of one call: enough to leave out what does not fit the budget; inf where memory does not."""

    def measure(self, point: Point, dtype: str, limit_s: float) -> Measurement: ...

    def close(self) -> None: ...


def points(**axes: Sequence[int]) -> list[Point]:
    """All combinations.

    >>> points(m=[1, 2], n=[8])
    [(('m', 1), ('n', 8)), (('m', 2), ('n', 8))]
    """
    return [tuple(zip(axes, values, strict=True)) for values in product(*axes.values())]


def at(**sizes: int) -> Point:
    """One point."""
    return tuple(sizes.items())


class DeviceKernel:
    """A kernel on buffers of the arena: `buffers` gives one set, `call` runs it."""

    name = ""

    def __init__(self, device: Device, rates: Rates) -> None:
        self.device, self.rates = device, rates

    @property
    def dtypes(self) -> tuple[str, ...]:
        return self.device.dtypes

    def work(self, point: Point, element: int) -> tuple[float, float]:
        """FLOP and bytes of one call with elements of so many bytes."""
        raise NotImplementedError

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:
        """The call on `sets` sets of buffers in turn."""
        raise NotImplementedError

    def guess_s(self, point: Point, dtype: str) -> float:
        flops, nbytes = self.work(point, DTYPES[dtype][1])
        if 2.0 * nbytes > self.device.arena_bytes:
            return float("inf")
        return self.rates.seconds(dtype, flops, nbytes)

    def measure(self, point: Point, dtype: str, limit_s: float) -> Measurement:
        _, nbytes = self.work(point, DTYPES[dtype][1])
        call = self.prepare(point, dtype, self.device.sets(int(nbytes)))
        with self.device.torch.inference_mode():
            return repeat(call, self.device.timer, self.device.clock, limit_s)

    def close(self) -> None:
        """Nothing is held."""


class Rates:
    """Rates of the device within a factor of two, from one product of matrices and one copy.

    Rounded to powers of two, so that two sessions on one machine choose the same points.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._flops: dict[str, float] = {}
        self._bytes_per_s = 0.0

    def seconds(self, dtype: str, flops: float, nbytes: float) -> float:
        """Of a call, overhead included."""
        overhead_s = 2e-5
        return overhead_s + flops / self.flops_per_s(dtype) + nbytes / self.bytes_per_s()

    def flops_per_s(self, dtype: str) -> float:
        if dtype not in self._flops:
            size = 4096 if self._device.kind == "cuda" else 384
            a, b = (self._device.take(dtype, (size, size)) for _ in range(2))
            mm = self._device.torch.mm
            self._flops[dtype] = power_of_two(2.0 * size**3 / self._best_s(lambda _: mm(a, b)))
        return self._flops[dtype]

    def bytes_per_s(self) -> float:
        if not self._bytes_per_s:
            dtype = self._device.dtypes[0]
            count = self._device.arena_bytes // DTYPES[dtype][1] // 4
            a, b = (self._device.take(dtype, (count,)) for _ in range(2))
            seconds = self._best_s(lambda _: b.copy_(a))
            self._bytes_per_s = power_of_two(2.0 * count * DTYPES[dtype][1] / seconds)
        return self._bytes_per_s

    def _best_s(self, call: Call) -> float:
        # so many that one is undisturbed on a busy machine: a wrong rate leaves points out
        return min(self._device.timer.time(call, turn, 1) for turn in range(24))


def power_of_two(value: float) -> float:
    """The nearest on a log scale.

    >>> power_of_two(90.0)
    64.0
    """
    from math import log2

    return float(2.0 ** round(log2(value)))

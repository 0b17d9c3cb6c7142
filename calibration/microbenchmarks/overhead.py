"""What a call costs before it does anything: queues of the smallest operations."""

from __future__ import annotations

from typing import Any

from servecast.calibration.microbenchmarks.journal import Point
from servecast.calibration.microbenchmarks.kernel import DeviceKernel, at
from servecast.calibration.microbenchmarks.timing import Call, Measurement, repeat

OPS = (1, 2, 4, 8, 16, 32, 64, 128)


class _Queue(DeviceKernel):
    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("u8",)

    def grid(self) -> list[Point]:
        return [at(ops=ops) for ops in OPS]

    def candidates(self) -> list[Point]:
        return []

    def guess_s(self, point: Point, dtype: str) -> float:  # noqa: ARG002 (one format)
        return 1e-5 * point[0][1]


class Launch(_Queue):
    """A queue of additions to one element, until they are done: launch and execution of an empty kernel."""

    name = "launch"

    def measure(self, point: Point, dtype: str, limit_s: float) -> Measurement:  # noqa: ARG002 (likewise)
        device, ops = self.device, range(point[0][1])
        one = device.torch.zeros(1, device=device.where)

        def call(turn: int) -> Any:  # noqa: ARG001 (one element, nothing to rotate)
            for _ in ops:
                one.add_(1)
            device.synchronise()

        with device.torch.inference_mode():
            return repeat(call, device.host_timer, device.clock, limit_s)


class Host(_Queue):
    """What the host alone spends on an operation: views, which launch nothing."""

    name = "host"

    def measure(self, point: Point, dtype: str, limit_s: float) -> Measurement:  # noqa: ARG002 (likewise)
        device, ops = self.device, range(point[0][1])
        one = device.torch.zeros(64, device=device.where)

        def call(turn: int) -> Call | None:  # noqa: ARG001 (likewise)
            for _ in ops:
                one.view(8, 8)
            return None

        with device.torch.inference_mode():
            return repeat(call, device.host_timer, device.clock, limit_s)

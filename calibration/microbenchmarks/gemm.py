"""Products of an activation matrix with a weight matrix, as the linear layers of a transformer have them."""

from __future__ import annotations

from typing import Any

from servecast.calibration.microbenchmarks.journal import Point
from servecast.calibration.microbenchmarks.kernel import DeviceKernel, at, points
from servecast.calibration.microbenchmarks.timing import Call


class Gemm(DeviceKernel):
    """C[m, n] = A[m, k] W[n, k]^T, weights cold."""

    name = "gemm"

    def grid(self) -> list[Point]:
        rows: tuple[int, ...]
        if self.device.kind == "cuda":
            shapes = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1024, 8192), (12288, 1536))
            rows = (1, 8, 32, 128, 512, 2048, 8192)
        else:
            shapes = ((512, 512), (1024, 1024), (2048, 1024), (1024, 2816), (3072, 768), (4096, 2048))
            rows = (1, 4, 16, 64, 256)
        return [at(m=m, n=n, k=k) for i, (n, k) in enumerate(shapes) for m in rows[i % 2 :: 2]]

    def candidates(self) -> list[Point]:
        sizes: tuple[int, ...]
        if self.device.kind == "cuda":
            sizes = (1024, 2048, 4096, 8192, 16384)
            return points(m=(1, 4, 16, 64, 128, 256, 512, 1024, 4096, 8192), n=sizes, k=sizes)
        sizes = (384, 512, 768, 1024, 2048, 4096)
        return points(m=(1, 2, 8, 16, 32, 64, 128, 256, 512), n=sizes, k=sizes)

    def work(self, point: Point, element: int) -> tuple[float, float]:
        size = dict(point)
        m, n, k = size["m"], size["n"], size["k"]
        return 2.0 * m * n * k, float(element * (m * k + n * k + m * n))

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:
        size, device = dict(point), self.device
        m, n, k = size["m"], size["n"], size["k"]
        out = device.torch.empty(m, n, dtype=device.dtype(dtype), device=device.where)
        buffers = [(device.take(dtype, (m, k)), device.take(dtype, (n, k)).t()) for _ in range(sets)]
        mm = device.torch.mm

        def call(turn: int) -> Any:
            a, w = buffers[turn % sets]
            return mm(a, w, out=out)

        return call

"""One whole decoder layer of a Llama: norms, four products, rotation, decode attention over a cache, activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from servecast.calibration.microbenchmarks.attention import HEAD_DIM
from servecast.calibration.microbenchmarks.journal import Point
from servecast.calibration.microbenchmarks.kernel import DeviceKernel, at, points
from servecast.calibration.microbenchmarks.timing import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Widths of a layer; head size 128."""

    hidden: int
    heads: int
    kv_heads: int
    intermediate: int

    @property
    def gemms(self) -> tuple[tuple[int, int], ...]:
        """(n, k) of the four products: queries with keys and values, output, gate with up, down."""
        qkv = (self.heads + 2 * self.kv_heads) * HEAD_DIM
        return (
            (qkv, self.hidden),
            (self.hidden, self.heads * HEAD_DIM),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )

    @property
    def weights(self) -> int:
        return sum(n * k for n, k in self.gemms)


SHAPES = {
    "cuda": Shape(hidden=4096, heads=32, kv_heads=8, intermediate=14336),
    "cpu": Shape(hidden=1024, heads=8, kv_heads=2, intermediate=2816),
}
"""Of Llama-3.1-8B, and an eighth of a layer of it for hosts."""


class Layer(DeviceKernel):
    """`rows` sequences with one new token each over `context` cached tokens; the step is eager, launches included."""

    name = "layer"

    @property
    def shape(self) -> Shape:
        return SHAPES[self.device.kind]

    def grid(self) -> list[Point]:
        rows, contexts = (
            ((1, 16, 64, 256), (256, 2048)) if self.device.kind == "cuda" else ((1, 4, 16, 64), (128, 1024))
        )
        return self._at(rows, contexts)

    def candidates(self) -> list[Point]:
        if self.device.kind == "cuda":
            return self._at((1, 4, 8, 32, 128, 512), (512, 1024, 4096))
        return self._at((1, 2, 8, 32, 128), (64, 256, 512, 2048))

    def _at(self, rows: tuple[int, ...], contexts: tuple[int, ...]) -> list[Point]:
        one = self.shape
        fixed = at(hidden=one.hidden, heads=one.heads, kv_heads=one.kv_heads, intermediate=one.intermediate)
        return [(*point, *fixed) for point in points(rows=rows, context=contexts)]

    def work(self, point: Point, element: int) -> tuple[float, float]:
        size, one = dict(point), self.shape
        cached = size["rows"] * size["context"] * HEAD_DIM
        flops = 2.0 * size["rows"] * one.weights + 4.0 * cached * one.heads
        return flops, float(element * (one.weights + 2 * cached * one.kv_heads))

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:
        size, device, one = dict(point), self.device, self.shape
        rows = size["rows"]
        sets = min(sets, 4)
        cache = (rows, one.kv_heads, size["context"], HEAD_DIM)
        weights = [[device.take(dtype, gemm).t() for gemm in one.gemms] for _ in range(sets)]
        caches = [[device.take(dtype, cache) for _ in range(2)] for _ in range(sets)]
        entry = device.take(dtype, (rows, one.hidden))
        angles = device.take(dtype, (rows, 1, HEAD_DIM))
        step = _Step(device.torch, one, angles)

        def call(turn: int) -> Any:
            return step(entry, weights[turn % sets], caches[turn % sets])

        return call


class _Step:
    """The layer's arithmetic; scales keep random weights from overflowing 16 bit."""

    def __init__(self, torch: Any, shape: Shape, angles: Any) -> None:
        self._torch, self._shape = torch, shape
        self._cos, self._sin = angles.cos(), angles.sin()

    def __call__(self, x: Any, weights: list[Any], cache: list[Any]) -> Any:
        functional, one = self._torch.nn.functional, self._shape
        rows, half = x.shape[0], HEAD_DIM // 2
        qkv = (self._norm(x) @ weights[0]).view(rows, one.heads + 2 * one.kv_heads, HEAD_DIM)
        turned = qkv * self._cos + self._torch.cat((-qkv[..., half:], qkv[..., :half]), -1) * self._sin
        query = turned[:, : one.heads].view(rows, one.kv_heads, one.heads // one.kv_heads, HEAD_DIM)
        cache[0][:, :, -1] = turned[:, one.heads : one.heads + one.kv_heads]
        cache[1][:, :, -1] = qkv[:, one.heads + one.kv_heads :]
        mixed = functional.scaled_dot_product_attention(query, cache[0], cache[1])
        x = x + mixed.reshape(rows, one.heads * HEAD_DIM) @ weights[1]
        gate, up = (self._norm(x) @ weights[2]).chunk(2, -1)
        return x + (functional.silu(gate) * up) @ weights[3]

    def _norm(self, x: Any) -> Any:
        return x * self._torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (x.shape[-1] ** -0.5)

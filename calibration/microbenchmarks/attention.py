"""Attention: one new token per sequence over a cache, and causal attention within a prompt."""

from __future__ import annotations

from typing import Any

from servecast.calibration.microbenchmarks.journal import Point
from servecast.calibration.microbenchmarks.kernel import DeviceKernel, at, points
from servecast.calibration.microbenchmarks.timing import Call

HEAD_DIM = 128


class DecodeAttention(DeviceKernel):
    """Batch x one token, over `context` cached tokens.

    The query heads that share a KV head are laid out as rows of one query: the cache is read once per group, as
    serving kernels do, on either device.
    """

    name = "decode_attention"

    def grid(self) -> list[Point]:
        contexts: tuple[int, ...]
        batches: tuple[int, ...]
        if self.device.kind == "cuda":
            contexts, heads, batches = (256, 1024, 4096, 16384), ((32, 8), (64, 8), (32, 32)), (1, 8, 32, 128)
        else:
            contexts, heads, batches = (128, 512, 2048), ((8, 2), (8, 8), (16, 4)), (1, 4, 16)
        return [
            at(batch=batch, context=context, heads=h, kv_heads=kv)
            for i, context in enumerate(contexts)
            for j, batch in enumerate(batches)
            for h, kv in [heads[(i + j) % len(heads)]]
        ]

    def candidates(self) -> list[Point]:
        contexts: tuple[int, ...]
        batches: tuple[int, ...]
        if self.device.kind == "cuda":
            contexts, batches, heads = (128, 512, 2048, 8192, 32768), (1, 4, 16, 64, 256), ((32, 8), (64, 8), (32, 32))
        else:
            contexts, batches, heads = (64, 256, 1024, 4096), (1, 2, 8, 32), ((8, 2), (8, 8), (16, 4))
        return [
            (*one, ("heads", h), ("kv_heads", kv)) for one in points(batch=batches, context=contexts) for h, kv in heads
        ]

    def work(self, point: Point, element: int) -> tuple[float, float]:
        size = dict(point)
        cached = size["batch"] * size["context"] * HEAD_DIM
        return 4.0 * cached * size["heads"], 2.0 * cached * size["kv_heads"] * element

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:
        size, device = dict(point), self.device
        batch, kv, group = size["batch"], size["kv_heads"], size["heads"] // size["kv_heads"]
        cache = (batch, kv, size["context"], HEAD_DIM)
        buffers = [
            (device.take(dtype, (batch, kv, group, HEAD_DIM)), device.take(dtype, cache), device.take(dtype, cache))
            for _ in range(sets)
        ]
        attend = device.torch.nn.functional.scaled_dot_product_attention

        def call(turn: int) -> Any:
            return attend(*buffers[turn % sets])

        return call


class PrefillAttention(DeviceKernel):
    """Causal self-attention of `batch` prompts of `length` tokens; KV heads are repeated beforehand."""

    name = "prefill_attention"

    def grid(self) -> list[Point]:
        lengths: tuple[int, ...]
        heads: tuple[tuple[int, int], ...]
        if self.device.kind == "cuda":
            lengths, heads, batches = (256, 1024, 2048, 4096, 8192), ((32, 8), (64, 8)), (1, 4)
        else:
            lengths, heads, batches = (32, 64, 128, 256, 512), ((8, 2), (16, 4)), (1, 4)
        return [
            at(batch=batch, length=length, heads=h, kv_heads=kv)
            for i, length in enumerate(lengths)
            for j, batch in enumerate(batches)
            for h, kv in [heads[(i + j) % len(heads)]]
        ]

    def candidates(self) -> list[Point]:
        lengths: tuple[int, ...]
        if self.device.kind == "cuda":
            lengths, batches, heads = (128, 512, 1536, 3072, 6144, 16384), (1, 2, 8), ((32, 8), (64, 8))
        else:
            lengths, batches, heads = (48, 96, 192, 384, 768), (1, 2, 8), ((8, 2), (16, 4))
        return [
            (*one, ("heads", h), ("kv_heads", kv)) for one in points(batch=batches, length=lengths) for h, kv in heads
        ]

    def work(self, point: Point, element: int) -> tuple[float, float]:
        size = dict(point)
        tokens = size["batch"] * size["length"] * HEAD_DIM
        return 2.0 * tokens * size["length"] * size["heads"], 4.0 * tokens * size["heads"] * element

    def prepare(self, point: Point, dtype: str, sets: int) -> Call:
        size, device = dict(point), self.device
        shape = (size["batch"], size["heads"], size["length"], HEAD_DIM)
        buffers = [tuple(device.take(dtype, shape) for _ in range(3)) for _ in range(sets)]
        attend = device.torch.nn.functional.scaled_dot_product_attention

        def call(turn: int) -> Any:
            return attend(*buffers[turn % sets], is_causal=True)

        return call

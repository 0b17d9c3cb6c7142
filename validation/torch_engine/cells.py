"""Seconds of single engine steps at chosen operating points, in rounds that visit every point in fresh order.

The engine is put into any state at once (:meth:`servecast.validation.torch_engine.engine.TorchEngine.place`) and steps
as it does when it serves, host work included. What a machine's drift does to one round it does to all points alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from servecast.validation.torch_engine.drafters import DraftModel
from servecast.validation.torch_engine.engine import Request, TorchEngine
from servecast.validation.torch_engine.llama import Llama


@dataclass(frozen=True, slots=True, order=True)
class StepPoint:
    """What a step computes."""

    batch: int
    """Decoding sequences; 0: the step computes prompts alone."""
    context: int
    """Cached tokens of each, on average."""
    gamma: int = 0
    """Drafted tokens of each."""
    chunks: tuple[tuple[int, int], ...] = ()
    """Start and end of the prompt chunks in the same step."""
    armed: bool = False
    """A drafter is configured: with gamma 0 it makes the pass that keeps its cache in step."""
    spread: int = 0
    """Contexts lie evenly from `context` less this to `context` and this; a batch is padded to its longest."""

    @property
    def contexts(self) -> list[int]:
        """Cached tokens sequence by sequence."""
        if self.batch < 2:
            return [self.context] * self.batch
        step = 2.0 * self.spread / (self.batch - 1)
        return [round(self.context - self.spread + step * number) for number in range(self.batch)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """One timed step."""

    point: StepPoint
    block: int
    """Round it was measured in."""
    seconds: float


class StepBench:
    """Two engines on one target, with and without a drafter, to time steps of."""

    def __init__(
        self,
        model: Llama,
        drafter: Llama | None,
        *,
        slots: int,
        length: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock, self.slots = clock, slots
        self._length = 0
        self._vocabulary = model.shape.vocab_size
        self._draw = random.Random(0)  # noqa: S311 (token ids)
        self._plain = self._engine(model, length, None)
        made = None if drafter is None else DraftModel(drafter, slots + 8, length)
        self._armed = self._plain if made is None else self._engine(model, length, made)

    def _engine(self, model: Llama, length: int, drafter: DraftModel | None) -> TorchEngine:
        """More slots than any point decodes: prompts stand behind them."""
        return TorchEngine(
            model,
            max_num_seqs=self.slots + 8,
            max_num_batched_tokens=16 * length,
            max_model_len=length,
            drafter=drafter,
            draft_length=lambda _: self._length,
        )

    def seconds(self, point: StepPoint) -> float:
        """Time of one step, as a server that is never idle sees it."""
        engine = self._armed if point.armed or point.gamma else self._plain
        self._length = point.gamma
        decoding = [self._request(context, 1) for context in point.contexts]
        engine.place(decoding, [self._request(end, 0, computed=start) for start, end in point.chunks])
        begun = self._clock()
        engine.step(self._clock)
        return self._clock() - begun

    def _request(self, tokens: int, output: int, *, computed: int = 0) -> Request:
        """A sequence of random tokens, `output` of which it has said, with more to come than a step can say."""
        said = [self._draw.randrange(2, self._vocabulary) for _ in range(tokens + output)]
        request = Request(0, said[:tokens], 1 << 20, computed=computed)
        request.output = said[tokens:]
        return request


def measure(
    bench: StepBench, points: Sequence[StepPoint], *, blocks: int, seed: int, repeats: int = 1
) -> Iterator[StepSample]:
    """Samples of `blocks` rounds over all points, each in an order of its own.

    A visit steps once to bring the point's weights and shapes in, then `repeats` times; their median counts.
    """
    rng = random.Random(seed)  # noqa: S311 (an order, not a secret)
    for point in points:
        bench.seconds(point)
    for block in range(blocks):
        order = list(points)
        rng.shuffle(order)
        for point in order:
            bench.seconds(point)
            yield StepSample(point=point, block=block, seconds=median(bench.seconds(point) for _ in range(repeats)))

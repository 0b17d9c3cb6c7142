"""Seconds of an engine step that drafts and verifies: what the speculative simulator asks, and tables that answer it.

A step cost of speculative decoding is a function of rows, requests and mean context that evaluates arrays; a simulator
asks for one number at a time, hundreds of thousands of times. Tables are made on demand, one line over the context for
each pair of whole numbers that occurs, so that stairs over captured sizes stay exact; between knots of the context the
time is taken as linear, beyond the last as on the line through the last two, as decode steps are in
:mod:`servecast.model.batch_steps`. Prompts cost what they cost without speculation: the drafter's own prefill, where it
has one, must be in the table that is given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from servecast.model.batch_steps import CONTEXT_KNOTS, Chunk
from servecast.model.speculation_cost import SpeculationCost

Floats = NDArray[np.float64]
Line = tuple[list[float], list[float]]
"""Time at context 0 and its slope, by interval between knots."""


class SpeculativeStepTimes(Protocol):
    """What the simulator asks of an engine that drafts. All in seconds."""

    @property
    def first_token_s(self) -> float:
        """Per request outside the engine's steps."""
        ...

    def verify_s(self, rows: int, requests: int, cached: int) -> float:
        """Target pass over `rows` tokens, one of each request and its drafts, with `cached` tokens in all."""
        ...

    def draft_s(self, requests: int, gamma: int, cached: int) -> float:
        """Drafting `gamma` tokens for every request; 0 for none."""
        ...

    def idle_s(self, requests: int, cached: int) -> float:
        """What a round without a draft pays for speculation that is configured; 0 where it is off."""
        ...

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """What prompt chunks add to a step, or take alone."""
        ...


class PromptTimes(Protocol):
    """Prompts and the way of the first token: `servecast.model.batch_steps.TabulatedSteps` has both."""

    first_token_s: float

    def prefill(self, tokens: int) -> float:
        """A prompt of `tokens` alone. [s]"""
        ...


class TabulatedSpeculation:
    """Step times of one cost function (module docstring)."""

    __slots__ = ("_armed", "_contexts", "_cost", "_drafts", "_idles", "_knots", "_passes", "_prompts", "first_token_s")

    def __init__(
        self, cost: SpeculationCost, prompts: PromptTimes, *, armed: bool = True, contexts: Floats = CONTEXT_KNOTS
    ) -> None:
        """`armed`: speculation is configured, so that a round without a draft pays for it; `contexts`: the knots."""
        if contexts.ndim != 1 or contexts.size < 2 or not np.all(np.diff(contexts) > 0.0):
            raise ValueError(f"contexts must be two or more rising values, got {contexts.tolist()}")
        self._cost, self._prompts, self._armed = cost, prompts, armed
        self._contexts, self._knots = contexts, [float(one) for one in contexts]
        self._passes: dict[tuple[int, int], Line] = {}
        self._drafts: dict[tuple[int, int], Line] = {}
        self._idles: dict[int, Line] = {}
        self.first_token_s = prompts.first_token_s

    def verify_s(self, rows: int, requests: int, cached: int) -> float:
        """See `SpeculativeStepTimes`."""
        line = self._passes.get((rows, requests))
        if line is None:
            line = self._passes[rows, requests] = self._line(
                self._cost.verify(rows, requests, self._contexts), "verify"
            )
        return self._at(line, cached / requests)

    def draft_s(self, requests: int, gamma: int, cached: int) -> float:
        """See `SpeculativeStepTimes`."""
        if not gamma:
            return 0.0
        line = self._drafts.get((requests, gamma))
        if line is None:
            line = self._drafts[requests, gamma] = self._line(
                self._cost.draft(requests, gamma, self._contexts), "draft"
            )
        return self._at(line, cached / requests)

    def idle_s(self, requests: int, cached: int) -> float:
        """See `SpeculativeStepTimes`."""
        if not self._armed:
            return 0.0
        line = self._idles.get(requests)
        if line is None:
            line = self._idles[requests] = self._line(self._cost.idle(requests, self._contexts), "idle")
        return self._at(line, cached / requests)

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """See `SpeculativeStepTimes`."""
        prefill = self._prompts.prefill
        return sum(prefill(end) - (prefill(start) if start else 0.0) for start, end in chunks)

    def _line(self, seconds: Floats, name: str) -> Line:
        # a part that does not depend on the context may come back as one number
        values = np.broadcast_to(np.asarray(seconds, dtype=np.float64), self._contexts.shape)
        if not (np.isfinite(values).all() and values.min() >= 0.0):
            raise ValueError(f"{name} must be finite and >= 0 s, got {values.tolist()}")
        slope = np.diff(values) / np.diff(self._contexts)
        return (values[:-1] - slope * self._contexts[:-1]).tolist(), slope.tolist()

    def _at(self, line: Line, context: float) -> float:
        i = min(max(bisect_right(self._knots, context) - 1, 0), len(self._knots) - 2)
        return line[0][i] + line[1][i] * context

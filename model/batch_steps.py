r"""Seconds of one engine step for whatever is in it: the step times of the closed forms, tabulated for a simulator.

A step holds B decoding sequences with K cached tokens in all, and chunks of prompts, each from token s to token e:

.. math:: t = t_{dec}(B, K / B) + \sum_{chunks} [P(e) - P(s)], \qquad P(n) = t_{pre}(n), \; P(0) = 0

t_dec and t_pre are those of :mod:`servecast.model.engine`, so that a simulator and a closed form differ in queueing
alone. At a fixed batch t_dec is taken as piecewise linear in the cached tokens, so that the time of many steps is one
sum: within 1.5 % between the knots from 128 tokens of mean context on, 3.5 % below, and 0.6 % for prompts. A prompt
pays its fixed cost with its first chunk; prompts that share a step share no kernel, as in the closed form, which is
pessimistic for many short prompts at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from servecast.model.deployment import Deployment
from servecast.model.forecast import Profile
from servecast.model.service import BATCH_GRID, step_seconds

Floats = NDArray[np.float64]

CONTEXT_KNOTS = np.array([1.0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576])
"""Mean cached tokens per sequence at which decode steps are evaluated."""
LENGTH_KNOTS = np.unique(np.round(2.0 ** np.arange(0.0, 20.01, 0.25)))
"""Prompt lengths at which prefills are evaluated, 19 % apart. [tokens]"""

Chunk = tuple[int, int]
"""First token and one past the last token of a prompt that a step computes."""
Work = tuple[Sequence[Chunk], int, int, int]
"""A step of one attention replica: chunks, how many of them end their prompt, decoding sequences, cached tokens."""


class StepTimes(Protocol):
    """What an executor asks of an engine's step times."""

    @property
    def first_token_s(self) -> float:
        """Per request outside the engine's steps. [s]"""
        ...

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:
        """Seconds of a decode step of `batch` sequences with `cached` tokens in all, seconds more for each further
        cached token, and the number of steps for which this line holds."""
        ...

    def mixed(self, chunks: Sequence[Chunk], finishing: int, batch: int, cached: int) -> float:
        """Seconds of a step with prompt chunks, `finishing` of which are the last of their prompt. [s]"""
        ...


@runtime_checkable
class GroupStepTimes(StepTimes, Protocol):
    """Step times of attention replicas that share their experts and go in lockstep."""

    def lockstep(self, ranks: Sequence[Work]) -> float:
        """Seconds of one step of all replicas."""
        ...


class ScaledSteps:
    """Step times, each `factor` times as long: an end of their interval, or a machine at another pace.

    Steps with prompts in them, which arithmetic binds, may have a factor of their own.
    """

    def __init__(self, steps: StepTimes, factor: float, *, prompt_factor: float | None = None) -> None:
        for name, value in (("factor", factor), ("prompt_factor", prompt_factor)):
            if value is not None and not value > 0.0:
                raise ValueError(f"{name} must be > 0, got {value}")
        self._steps, self._factor = steps, factor
        self._prompt_factor = factor if prompt_factor is None else prompt_factor
        self.first_token_s = steps.first_token_s

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:
        """See `StepTimes`."""
        now, more, holds = self._steps.decode(batch, cached)
        return now * self._factor, more * self._factor, holds

    def mixed(self, chunks: Sequence[Chunk], finishing: int, batch: int, cached: int) -> float:
        """See `StepTimes`."""
        return self._steps.mixed(chunks, finishing, batch, cached) * self._prompt_factor

    def lockstep(self, ranks: Sequence[Work]) -> float:
        """See `GroupStepTimes`."""
        if not isinstance(self._steps, GroupStepTimes):
            raise ValueError("steps must know lockstep to serve attention replicas")
        return self._steps.lockstep(ranks) * self._factor


class TabulatedSteps:
    """Step times of one deployment from a profile (module docstring)."""

    __slots__ = ("_base", "_knots", "_lengths", "_prefill", "_slope", "first_token_s", "max_batch")

    def __init__(self, decode_s: Floats, contexts: Floats, prefill_s: Floats, lengths: Floats, first_token_s: float):
        """`decode_s` [B - 1, context] for B = 1..; `prefill_s` by length; both in seconds."""
        if decode_s.ndim != 2 or decode_s.shape[1] != contexts.size or contexts.size < 2:
            raise ValueError(f"decode_s must have one column per context, got shape {decode_s.shape}")
        if prefill_s.shape != lengths.shape or not lengths.size:
            raise ValueError(f"prefill_s must have one value per length, got shape {prefill_s.shape}")
        batch = np.arange(1.0, len(decode_s) + 1.0)[:, np.newaxis]
        slope = np.diff(decode_s, axis=1) / np.diff(contexts)
        # plain lists: a simulator asks for one number at a time, hundreds of thousands of times
        self._slope: list[list[float]] = (slope / batch).tolist()
        self._base: list[list[float]] = (decode_s[:, :-1] - slope * contexts[:-1]).tolist()
        self._knots: list[float] = contexts.tolist()
        self._lengths: list[float] = [0.0, *lengths.tolist()]
        self._prefill: list[float] = [0.0, *prefill_s.tolist()]
        self.first_token_s = first_token_s
        self.max_batch = len(decode_s)

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:
        """See `StepTimes`."""
        knots = self._knots
        context = cached / batch
        i = min(max(bisect_right(knots, context) - 1, 0), len(knots) - 2)
        slope = self._slope[batch - 1][i]
        steps = int(knots[i + 1] - context) + 1 if context < knots[-2] else 1 << 40
        return self._base[batch - 1][i] + slope * cached, slope, steps

    def prefill(self, tokens: int) -> float:
        """P(n): a prompt of `tokens` alone. [s]"""
        lengths = self._lengths
        i = min(bisect_right(lengths, tokens), len(lengths) - 1)
        x0, y0 = lengths[i - 1], self._prefill[i - 1]
        return y0 + (self._prefill[i] - y0) * (tokens - x0) / (lengths[i] - x0)

    def mixed(self, chunks: Sequence[Chunk], finishing: int, batch: int, cached: int) -> float:  # noqa: ARG002 (a sampled row costs nothing here)
        """See `StepTimes`."""
        seconds = self.decode(batch, cached)[0] if batch else 0.0
        for start, end in chunks:
            seconds += self.prefill(end) - (self.prefill(start) if start else 0.0)
        return seconds


def tabulated_steps(
    profile: Profile,
    deployment: Deployment,
    engine: str,
    *,
    max_batch: int,
    longest: float,
    chunk_tokens: float,
    factor: float = 1.0,
) -> TabulatedSteps:
    """Tables of one deployment for batches up to `max_batch` and contexts up to `longest` tokens.

    `factor` makes every step that many times as long: an end of the step time's interval.
    """
    grid = BATCH_GRID[: max(int(np.searchsorted(BATCH_GRID, max_batch)) + 1, 2)]
    if max_batch > grid[-1]:
        grid = np.append(grid, float(max_batch))
    contexts = CONTEXT_KNOTS[: max(int(np.searchsorted(CONTEXT_KNOTS, longest)) + 1, 2)]
    lengths = LENGTH_KNOTS[: max(int(np.searchsorted(LENGTH_KNOTS, longest)) + 1, 2)]
    decode, prefill, first = step_seconds(profile, deployment, engine, grid, contexts, lengths, chunk_tokens)
    batches = np.arange(1.0, max_batch + 1.0)
    at = np.clip(np.searchsorted(grid, batches, side="right") - 1, 0, len(grid) - 2)
    right = ((batches - grid[at]) / (grid[at + 1] - grid[at]))[:, np.newaxis]
    every = decode[at] * (1.0 - right) + decode[at + 1] * right
    return TabulatedSteps(every * factor, contexts, prefill * factor, lengths, first * factor)

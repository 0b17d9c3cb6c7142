"""One engine's scheduler: what it may hold, who is admitted, whose prompt a step computes, who loses its place.

The rules of vLLM's engine core, shared by the simulators that decode a token a step and those that draft. How the
admitted sequences decode is theirs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from servecast.model.batch_steps import Chunk
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.validation.kv_blocks import KvBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one engine may hold at once; names as vLLM's arguments."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: float
    """Capacity of the KV cache. [tokens]"""
    block_size: int = 16
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be >= 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be >= max_num_seqs {self.max_num_seqs}, got {self.max_num_batched_tokens}"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {self.block_size}")
        if not self.kv_tokens >= self.block_size:
            raise ValueError(f"kv_tokens must be >= block_size {self.block_size}, got {self.kv_tokens:g}")

    @property
    def blocks(self) -> int:
        return int(self.kv_tokens) // self.block_size


class RequestLog:
    """Requests and their stamps, by number; flat arrays, so that a million requests take tens of megabytes."""

    def __init__(self, trace: Trace, limits: EngineLimits) -> None:
        count = len(trace.t_s)
        nothing = array("d", [math.nan]) * count
        self.n_in = array("q", trace.n_in.tobytes())
        self.n_out = array("q", trace.n_out.tobytes())
        self.scheduled, self.first, self.last = nothing[:], nothing[:], nothing[:]
        self.replica = array("i", [-1]) * count
        self.preemptions = array("i", [0]) * count
        self.hits = array("q", [0]) * count
        # the last token is never fed back, so its cache entry is never needed
        self.refused: list[bool] = (trace.n_in + trace.n_out - 1 > limits.blocks * limits.block_size).tolist()
        self.shared = trace.block_tokens if limits.enable_prefix_caching and trace.prefix_blocks is not None else 0
        self.prefixes = trace.prefix_blocks if self.shared else None

    def ids(self, number: int) -> Sequence[int]:
        """Prefix ids of the whole blocks of a prompt."""
        if self.prefixes is None:
            return ()
        return self.prefixes[number][: self.n_in[number] // self.shared]

    def rows(self, trace: Trace) -> RequestRows:
        refused = np.array(self.refused, dtype=np.bool_)
        return RequestRows(
            arrival_s=trace.t_s,
            scheduled_s=np.array(self.scheduled),
            first_token_s=np.array(self.first),
            last_token_s=np.array(self.last),
            n_in=trace.n_in,
            n_out=trace.n_out,
            replica=np.array(self.replica, dtype=np.int32),
            preemptions=np.array(self.preemptions, dtype=np.int32),
            cached_tokens=np.array(self.hits, dtype=np.int64),
            refused=refused,
        )


class Prompt:
    """A prompt in progress, or one that a preemption sends back: tokens to compute before the next one comes out."""

    __slots__ = ("done", "number", "tokens")

    def __init__(self, number: int, tokens: int, done: int) -> None:
        self.number, self.tokens, self.done = number, tokens, done


class Scheduler(ABC):
    """Queue, prompts and KV cache of one engine: who is admitted, whose prompt a step computes, who loses its place.

    How the admitted sequences decode is the subclass's.
    """

    __slots__ = (
        "_admitted",
        "_blocked",
        "_kv",
        "_limits",
        "_log",
        "_prompts",
        "_rows_each",
        "_shown_s",
        "_waiting",
        "now",
    )

    def __init__(self, limits: EngineLimits, log: RequestLog, first_token_s: float) -> None:
        self._limits, self._log, self._shown_s = limits, log, first_token_s
        self._kv = KvBlocks(
            limits.blocks, limits.block_size, shared_tokens=log.shared, caching=limits.enable_prefix_caching
        )
        self.now = 0.0
        self._waiting: deque[tuple[int, int]] = deque()
        """(request, tokens it had produced when it lost its place)."""
        self._prompts: list[Prompt] = []
        self._admitted: dict[int, int] = {}
        """Every request that holds blocks, in order of admission, and a number of the subclass's once it decodes; a
        preemption takes the last."""
        self._rows_each = 1
        """Tokens of the step's budget that a decoding sequence takes."""
        self._blocked = False
        """Nothing can be admitted before something ends."""

    @property
    def load(self) -> int:
        """Requests waiting and running."""
        return len(self._waiting) + len(self._admitted)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def receive(self, number: int, at: float) -> None:
        """A request that arrives now."""
        self.now = max(self.now, at)
        self._waiting.append((number, 0))

    @abstractmethod
    def _next_blocks(self) -> int:
        """Blocks that the decoding sequences take in the next step."""

    @abstractmethod
    def _decode(self, number: int, tokens: int, left: int) -> None:
        """A prompt of `tokens` has given a token, and `left` more are to come."""

    @abstractmethod
    def _stop_decoding(self, number: int, held: int) -> tuple[int, int]:
        """Take a decoding sequence out, `held` its number in `_admitted`: tokens it has cached, tokens produced."""

    def _schedule(self) -> tuple[list[Chunk], list[Prompt]]:
        """Chunks of the next step, and the prompts they complete; makes room for the running sequences first."""
        if not self._prompts and (self._blocked or not self._waiting):
            return [], []
        limits, kv, log = self._limits, self._kv, self._log
        reserved = self._next_blocks()
        preempted = reserved > kv.free and self._make_room()
        if preempted:
            reserved = self._next_blocks()
        decoding = len(self._admitted) - len(self._prompts)
        budget = max(limits.max_num_batched_tokens - decoding * self._rows_each, 0)
        chunks: list[Chunk] = []
        finished: list[Prompt] = []
        kept: list[Prompt] = []
        for prompt in self._prompts:
            end = min(prompt.done + budget, prompt.tokens)
            if end > prompt.done:
                chunks.append((prompt.done, end))
                budget -= end - prompt.done
                prompt.done = end
            (finished if end == prompt.tokens else kept).append(prompt)
        # blocks that the running sequences take in this very step are not for newcomers
        spare = kv.free - reserved
        while self._waiting and budget > 0 and not preempted:
            if len(self._admitted) >= limits.max_num_seqs:
                self._blocked = True
                break
            number, produced = self._waiting[0]
            tokens = log.n_in[number] + produced
            ids = log.ids(number)
            need = kv.need(ids, tokens)
            if need > spare:
                self._blocked = True
                break
            self._waiting.popleft()
            hit = kv.cached_tokens(number, ids, tokens) if ids or produced else 0
            kv.take(number, ids, tokens)
            spare -= need
            self._admitted[number] = 0
            if not produced and math.isnan(log.scheduled[number]):
                log.scheduled[number] = self.now
                log.hits[number] = hit
            prompt = Prompt(number, tokens, hit)
            end = min(hit + budget, tokens)
            chunks.append((hit, end))
            budget -= end - hit
            prompt.done = end
            (finished if end == tokens else kept).append(prompt)
        self._prompts = kept
        return chunks, finished

    def _end_prompts(self, finished: list[Prompt]) -> None:
        """The step that ends now has completed these prompts: each gives its first token."""
        log = self._log
        shown = self.now + self._shown_s
        for prompt in finished:
            number = prompt.number
            if math.isnan(log.first[number]):
                log.first[number] = shown
            left = log.n_in[number] + log.n_out[number] - prompt.tokens - 1
            if left:
                self._decode(number, prompt.tokens, left)
            else:
                self._leave(number, prompt.tokens)

    def _leave(self, number: int, tokens: int) -> None:
        self._log.last[number] = self.now + self._shown_s
        del self._admitted[number]
        self._kv.give_back(number, self._log.ids(number), tokens)
        self._blocked = False

    def _make_room(self) -> bool:
        """Preempt, last admitted first, until the next step fits; whether anyone had to go."""
        someone = False
        while self._next_blocks() > self._kv.free:
            number, held = self._admitted.popitem()
            self._preempt(number, held)
            someone = True
        return someone

    def _preempt(self, number: int, held: int) -> None:
        log = self._log
        prompt = next((one for one in self._prompts if one.number == number), None)
        if prompt is not None:
            self._prompts.remove(prompt)
            tokens = prompt.tokens
            produced = tokens - log.n_in[number]
        else:
            tokens, produced = self._stop_decoding(number, held)
        self._kv.give_back(number, log.ids(number), tokens, returns=True)
        log.preemptions[number] += 1
        self._waiting.appendleft((number, produced))
        self._blocked = False

"""Continuous batching: which tokens a step computes, what it emits, and when.

A step serves every decoding sequence (its newest token and its drafts), continues prompts in order of arrival and
admits waiting requests while the step's token budget and the slots last: the order of vLLM's engine core. Decoding
sequences stand in slots 0, 1, ..., prompts in progress behind them, so that the cache of a batch is one slice. A slot
holds a sequence's longest length, so that nothing is ever preempted.

Decoding is greedy. A draft is accepted where it is what the target would have said, so the output does not depend on
the drafter (but for ties at the precision of the arithmetic: a batch of other size may round otherwise).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from servecast.validation.torch_engine.drafters import NO_TOKEN, Drafter
from servecast.validation.torch_engine.llama import Chunk, Llama, SlotCache


@dataclass(slots=True)
class Request:
    """One request and what happened to it; stamps by the clock of whoever drives the engine. [s]"""

    number: int
    prompt: list[int]
    n_out: int
    arrival_s: float = 0.0
    scheduled_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    """One stamp per output token; tokens of one round share theirs."""
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Prompt tokens in the cache."""
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.prompt) + len(self.output)

    def tail(self, count: int) -> list[int]:
        """The last `count` tokens."""
        short = count - len(self.output)
        return (self.prompt[-short:] if short > 0 else []) + self.output[-count:]

    @property
    def done(self) -> bool:
        return len(self.output) >= self.n_out


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step computed."""

    sequences: int
    """Decoding sequences."""
    cached: int
    """Their cached tokens in all."""
    gamma: int
    chunks: tuple[tuple[int, int], ...]
    """Start and end of every prompt chunk."""
    drafted: int
    """Tokens that the drafter proposed and the target checked."""
    emitted: int
    survived: tuple[int, ...]
    """Sequences whose first 1, 2, ... drafts were all right, whether or not the output had room for them."""


class TorchEngine:
    """One engine; `step` runs one step for the requests that were submitted."""

    def __init__(
        self,
        model: Llama,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        drafter: Drafter | None = None,
        draft_length: Callable[[int], int] | None = None,
    ) -> None:
        """`draft_length` says how many tokens to draft for a batch of so many sequences; None: none, ever."""
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be >= max_num_seqs >= 1, got {max_num_batched_tokens}, {max_num_seqs}"
            )
        parameter = next(model.parameters())
        self.model, self.device = model, parameter.device
        self.cache = SlotCache(model.shape, max_num_seqs, max_model_len, parameter.dtype, parameter.device)
        self.drafter = drafter
        self.draft_length = draft_length or (lambda _: 0)
        self._budget = max_num_batched_tokens
        self._waiting: deque[Request] = deque()
        self._decoding: list[Request] = []
        """By slot."""
        self._prompting: list[Request] = []
        """In slots behind the decoding ones, by slot."""

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._decoding or self._prompting)

    def submit(self, request: Request) -> None:
        """Append to the queue.

        Raises
        ------
        ValueError : the request does not fit into a slot, or is empty.
        """
        # drafts reach past the last token of a sequence before they are cut
        room = self.cache.length - len(request.prompt) - request.n_out
        if len(request.prompt) < 2 or request.n_out < 1:
            raise ValueError(f"request {request.number}: must have 2 prompt tokens and 1 output token at least")
        if room < 16:
            raise ValueError(
                f"request {request.number}: prompt and output must leave 16 of {self.cache.length} places free, "
                f"got {len(request.prompt)} and {request.n_out} tokens"
            )
        self._waiting.append(request)

    def place(self, decoding: Sequence[Request], prompting: Sequence[Request]) -> None:
        """Set who runs, in place of whoever did, so that one step of any composition can be timed.

        Cached positions hold whatever is there: what a step costs does not depend on what its tokens say.
        """
        if len(decoding) + len(prompting) > self.cache.slots:
            raise ValueError(f"sequences must be at most {self.cache.slots}, got {len(decoding) + len(prompting)}")
        self._waiting.clear()
        self._decoding, self._prompting = list(decoding), list(prompting)

    def step(self, clock: Callable[[], float]) -> StepRecord:
        """Compute one step and stamp what it emits at its end; there must be work."""
        gamma = self._gamma()
        chunks, owners = self._schedule(gamma, clock)
        decoding = list(self._decoding)
        drafts = self._draft(gamma)
        width = 1 + (drafts.shape[1] if decoding else 0)
        cached = [one.length - 1 for one in decoding]
        tokens = [
            token
            for chunk, owner in zip(chunks, owners, strict=True)
            for token in owner.prompt[chunk.start : chunk.end]
        ]
        prompts = torch.tensor(tokens, dtype=torch.long, device=self.device)
        rows = self.model.step(
            self.cache,
            self._decode_rows(drafts),
            torch.tensor(cached, dtype=torch.long, device=self.device),
            chunks,
            prompts,
        )
        if chunks and self.drafter is not None:
            self.drafter.prompts(chunks, prompts)
        count = len(decoding) * width
        sizes = torch.tensor([chunk.end - chunk.start for chunk in chunks], dtype=torch.long)
        wanted = torch.cat([torch.arange(count), sizes.cumsum(0) - 1 + count]).to(self.device)
        said = self.model.scores(rows[wanted]).argmax(-1).cpu()
        now = clock()
        before = sum(len(one.output) for one in decoding)
        survived = self._accept(decoding, drafts.cpu(), said[:count].view(len(decoding), width), now)
        emitted = sum(len(one.output) for one in decoding) - before
        first = self._finish_prompts(chunks, owners, said[count:].tolist(), now)
        self._leave()
        return StepRecord(
            sequences=len(decoding),
            cached=sum(cached),
            gamma=width - 1,
            chunks=tuple((chunk.start, chunk.end) for chunk in chunks),
            drafted=int((drafts != NO_TOKEN).sum()) if decoding else 0,
            emitted=emitted + first,
            survived=survived,
        )

    def _gamma(self) -> int:
        if self.drafter is None or not self._decoding:
            return 0
        gamma = self.draft_length(len(self._decoding))
        if gamma < 0 or gamma > 15:
            raise ValueError(f"draft_length must be from 0 to 15, got {gamma}")
        return gamma

    def _draft(self, gamma: int) -> Tensor:
        """[sequences, gamma]; columns in which no sequence has a token are dropped."""
        if self.drafter is None or not self._decoding:
            return torch.empty(len(self._decoding), 0, dtype=torch.long, device=self.device)
        drafts = self.drafter.propose(self._decoding, gamma)
        some = int((drafts != NO_TOKEN).any(0).sum())
        return drafts[:, :some].to(self.device)

    def _decode_rows(self, drafts: Tensor) -> Tensor:
        last = torch.tensor([one.tail(1)[0] for one in self._decoding], dtype=torch.long, device=self.device)
        return torch.cat([last.unsqueeze(1), drafts.clamp(min=0)], dim=1)

    def _schedule(self, gamma: int, clock: Callable[[], float]) -> tuple[list[Chunk], list[Request]]:
        """Prompt chunks of the next step and whose they are."""
        budget = self._budget - len(self._decoding) * (gamma + 1)
        chunks: list[Chunk] = []
        owners: list[Request] = []
        for slot, request in enumerate(self._prompting, start=len(self._decoding)):
            budget = self._chunk(slot, request, budget, chunks, owners)
        while self._waiting and budget > 0 and len(self._decoding) + len(self._prompting) < self.cache.slots:
            request = self._waiting.popleft()
            request.scheduled_s = clock()
            self._prompting.append(request)
            slot = len(self._decoding) + len(self._prompting) - 1
            budget = self._chunk(slot, request, budget, chunks, owners)
        return chunks, owners

    def _chunk(self, slot: int, request: Request, budget: int, chunks: list[Chunk], owners: list[Request]) -> int:
        size = min(len(request.prompt) - request.computed, max(budget, 0))
        if size:
            chunks.append(Chunk(slot, request.computed, request.computed + size))
            owners.append(request)
        return budget - size

    def _accept(self, decoding: Sequence[Request], drafts: Tensor, said: Tensor, now: float) -> tuple[int, ...]:
        """Emit what the target said as far as the drafts agree, and one token more."""
        agreed = (drafts == said[:, :-1]).long().cumprod(1)
        survived = [0] * drafts.shape[1]
        for request, row, tokens, offered in zip(
            decoding, agreed.tolist(), said.tolist(), drafts.tolist(), strict=True
        ):
            left = request.n_out - len(request.output)
            kept = min(sum(row), left - 1)
            request.output += tokens[: kept + 1]
            request.token_s += [now] * (kept + 1)
            request.accepted += kept
            request.drafted += sum(token != NO_TOKEN for token in offered)
            request.rounds += 1
            for place in range(sum(row)):
                survived[place] += 1
        return tuple(survived)

    def _finish_prompts(self, chunks: Sequence[Chunk], owners: Sequence[Request], said: list[int], now: float) -> int:
        """First tokens of the prompts that are whole now; those sequences move behind the decoding ones."""
        first = 0
        for chunk, request, token in zip(chunks, owners, said, strict=True):
            request.computed = chunk.end
            if request.computed < len(request.prompt):
                continue
            request.output.append(token)
            request.token_s.append(now)
            first += 1
            at = self._prompting.index(request)
            if at:
                tokens = max(self._prompting[0].computed, chunk.end)
                self._swap(len(self._decoding), len(self._decoding) + at, tokens)
                self._prompting[0], self._prompting[at] = self._prompting[at], self._prompting[0]
            self._prompting.pop(0)
            self._decoding.append(request)
        return first

    def _leave(self) -> None:
        """Sequences that are complete give up their slots; the last ones fill the holes."""
        for slot in range(len(self._decoding) - 1, -1, -1):
            if not self._decoding[slot].done:
                continue
            hole = len(self._decoding) - 1
            last = self._decoding.pop()
            if slot < hole:
                self._move(hole, slot, last.length)
                self._decoding[slot] = last
            if self._prompting:
                # the hole is now between decoding sequences and prompts: the last prompt fills it
                end = hole + len(self._prompting)
                self._move(end, hole, self._prompting[-1].computed)
                self._prompting.insert(0, self._prompting.pop())

    def _swap(self, one: int, other: int, tokens: int) -> None:
        self.cache.swap(one, other, tokens)
        if self.drafter is not None:
            self.drafter.swap(one, other, tokens)

    def _move(self, source: int, target: int, tokens: int) -> None:
        self.cache.move(source, target, tokens)
        if self.drafter is not None:
            self.drafter.move(source, target, tokens)

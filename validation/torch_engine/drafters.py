"""Who proposes tokens: a draft model with its own cache, or the sequence's own past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from servecast.validation.torch_engine.llama import Chunk, Llama, SlotCache

if TYPE_CHECKING:
    from servecast.validation.torch_engine.engine import Request

NO_TOKEN = -1
"""Where a drafter proposes nothing; the place is computed and never accepted."""


class Drafter(Protocol):
    """Proposes for the decoding sequences, which stand in slots 0, 1, ..."""

    def propose(self, requests: Sequence[Request], gamma: int) -> Tensor:
        """Up to `gamma` tokens that follow each request's, [sequences, gamma], NO_TOKEN where it has none."""
        ...

    def prompts(self, chunks: Sequence[Chunk], tokens: Tensor) -> None:
        """Prompt chunks that the target computes in this step."""
        ...

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Two slots change places."""
        ...

    def move(self, source: int, target: int, tokens: int) -> None:
        """One slot takes the place of another that is not needed any more."""
        ...


class DraftModel:
    """Greedy tokens of a small model.

    The first pass takes the last two tokens of every sequence: after a round in which every draft was accepted the last
    draft is not in the cache yet, and to compute it again costs no more than to ask. With no tokens to draft that pass
    is still made, so that the cache keeps step: drafting that is armed is not free.
    """

    def __init__(self, model: Llama, slots: int, length: int) -> None:
        parameter = next(model.parameters())
        self._model = model
        self._cache = SlotCache(model.shape, slots, length, parameter.dtype, parameter.device)

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], gamma: int) -> Tensor:
        """See `Drafter`."""
        device = self._cache.keys.device
        rows = torch.tensor([one.tail(2) for one in requests], device=device)
        at = torch.tensor([one.length - 2 for one in requests], device=device)
        found: list[Tensor] = []
        for _ in range(max(gamma, 1)):
            hidden = self._model.step(self._cache, rows, at)
            last = hidden.view(*rows.shape, -1)[:, -1]
            at = at + rows.shape[1]
            rows = self._model.scores(last).argmax(-1, keepdim=True)
            found.append(rows)
        return torch.cat(found, dim=1)[:, :gamma]

    @torch.inference_mode()
    def prompts(self, chunks: Sequence[Chunk], tokens: Tensor) -> None:
        """See `Drafter`."""
        none = torch.empty(0, 0, dtype=torch.long, device=tokens.device)
        self._model.step(self._cache, none, torch.empty(0, dtype=torch.long, device=tokens.device), chunks, tokens)

    def swap(self, one: int, other: int, tokens: int) -> None:
        """See `Drafter`."""
        self._cache.swap(one, other, tokens)

    def move(self, source: int, target: int, tokens: int) -> None:
        """See `Drafter`."""
        self._cache.move(source, target, tokens)


class NgramDrafter:
    """What followed the last time that the sequence's most recent tokens stood in it: prompt lookup."""

    def __init__(self, *, longest: int = 3, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must be from 1 to longest {longest}, got {shortest}")
        self._longest, self._shortest = longest, shortest

    def propose(self, requests: Sequence[Request], gamma: int) -> Tensor:
        """See `Drafter`."""
        found = torch.full((len(requests), gamma), NO_TOKEN, dtype=torch.long)
        for row, request in enumerate(requests):
            guess = self.lookup(request.prompt + request.output, gamma)
            found[row, : len(guess)] = torch.tensor(guess, dtype=torch.long)
        return found

    def lookup(self, history: list[int], gamma: int) -> list[int]:
        """At most `gamma` tokens that followed the latest earlier place of the longest matching end."""
        for size in range(min(self._longest, len(history) - 1), self._shortest - 1, -1):
            end = history[-size:]
            for at in range(len(history) - size - 1, -1, -1):
                if history[at : at + size] == end:
                    return history[at + size : at + size + gamma]
        return []

    def prompts(self, chunks: Sequence[Chunk], tokens: Tensor) -> None:
        """Nothing to prepare."""

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Nothing is kept by slot."""

    def move(self, source: int, target: int, tokens: int) -> None:
        """Likewise."""

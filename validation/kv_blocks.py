"""KV cache of one engine in blocks: what requests hold, and what is left behind until it is overwritten.

As vLLM's block pool: free blocks stand in one queue, taken from its head and given back at its tail, the end of a
sequence before its beginning. With prefix caching a block's content stays valid until it is taken again, so that a
later prompt with the same leading ids (prefix-chained: equal ids mean equal tokens) and a preempted request find what
is left of theirs. Counts, not contents; an id stands for `shared_tokens` tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Left = tuple[str, int]
"""What free blocks still hold: ("id", prefix id), ("request", number of a preempted one), ("nothing", a count)."""


class KvBlocks:
    """All numbers are engine blocks unless they say tokens."""

    __slots__ = ("_anonymous", "_free", "_references", "_shared_tokens", "_unit", "block_size", "caching", "free")

    def __init__(self, total: int, block_size: int, *, shared_tokens: int = 0, caching: bool = True) -> None:
        """`shared_tokens` of one prefix id; 0 where requests have none."""
        if shared_tokens % block_size:
            raise ValueError(f"block_tokens must be a multiple of block_size {block_size}, got {shared_tokens}")
        self.block_size, self.caching = block_size, caching
        self.free = total
        """Blocks that can be taken, whatever they still hold."""
        self._shared_tokens, self._unit = shared_tokens, shared_tokens // block_size
        self._references: dict[int, int] = {}
        """Requests that hold the blocks of an id."""
        self._free: OrderedDict[Left, int] = OrderedDict({("nothing", 0): total})
        self._anonymous = 0

    def cached_tokens(self, number: int, ids: Sequence[int], prompt: int) -> int:
        """Leading tokens of a prompt that are still there; the last token is always computed."""
        if not self.caching:
            return 0
        hits = 0
        for one in ids:
            if one not in self._references and ("id", one) not in self._free:
                break
            hits += 1
        tokens = hits * self._shared_tokens
        if hits == len(ids):
            tokens += self._free.get(("request", number), 0) * self.block_size
        return min(tokens, (prompt - 1) // self.block_size * self.block_size)

    def need(self, ids: Sequence[int], tokens: int) -> int:
        """Blocks that a prompt of `tokens` would take from the free ones."""
        missing = sum(one not in self._references for one in ids)
        return missing * self._unit + self._own(ids, tokens)

    def take(self, number: int, ids: Sequence[int], tokens: int) -> None:
        """A prompt of `tokens`, its leading blocks known by `ids`; first what is still there, then from the head."""
        fresh = self._own(ids, tokens)
        kept = min(self._free.pop(("request", number), 0), fresh)
        self.free -= kept
        fresh -= kept
        for one in ids:
            count = self._references.get(one, 0)
            self._references[one] = count + 1
            if not count:
                found = self._free.pop(("id", one), 0)
                self.free -= found
                fresh += self._unit - found
        self.grow(fresh)

    def grow(self, blocks: int) -> None:
        """`blocks` more in use, from the head of the queue."""
        self.free -= blocks
        queue = self._free
        while blocks:
            left, count = next(iter(queue.items()))
            if count <= blocks:
                del queue[left]
                blocks -= count
                continue
            if left[0] == "id":
                # without its end the content of an id is not found again
                del queue[left]
                rest: Left = ("nothing", self._next())
                queue[rest] = count - blocks
                queue.move_to_end(rest, last=False)
            else:
                queue[left] = count - blocks
            return

    def give_back(self, number: int, ids: Sequence[int], tokens: int, *, returns: bool = False) -> None:
        """What a request with `tokens` held; one that `returns` will look for it again."""
        own = self._own(ids, tokens)
        if own:
            self._put(("request", number) if returns and self.caching else ("nothing", self._next()), own)
        for one in reversed(ids):
            count = self._references[one] - 1
            if count:
                self._references[one] = count
            else:
                del self._references[one]
                self._put(("id", one), self._unit)

    def _own(self, ids: Sequence[int], tokens: int) -> int:
        return -(-tokens // self.block_size) - len(ids) * self._unit

    def _put(self, left: Left, count: int) -> None:
        self._free[left] = self._free.pop(left, 0) + count
        self.free += count

    def _next(self) -> int:
        self._anonymous += 1
        return self._anonymous

"""A slow and obvious continuous-batching simulator: one engine step per loop, lists of requests, blocks by ceil.

Written from vLLM's rules, not from the code it checks. In each step: every decoding sequence gets one token; prompts in
progress get what is left of the token budget; waiting requests are admitted in order of arrival while budget, places
and blocks last, and not in a step that preempted someone. A prompt takes the blocks of all its tokens when admitted. If
the decoding sequences lack blocks for their next token, the last admitted request loses its place, returns to the
head of the queue and computes its prompt and the tokens it had produced again. No prefix ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from servecast.model.batch_steps import StepTimes
from servecast.model.workload import Trace
from servecast.validation.simulator import EngineLimits


@dataclass(slots=True, kw_only=True)
class PlainRequest:
    """One request and its stamps. [s]"""

    arrival_s: float
    n_in: int
    n_out: int
    produced: int = 0
    """Output tokens so far."""
    target: int = 0
    """Tokens of the prompt in progress, those produced before a preemption included."""
    computed: int = 0
    """Tokens in the cache."""
    decoding: bool = False
    scheduled_s: float = math.nan
    first_s: float = math.nan
    last_s: float = math.nan
    preemptions: int = 0


@dataclass(slots=True, kw_only=True)
class PlainEngine:
    """One replica; `most_blocks` is the largest number of blocks that was ever in use."""

    steps: StepTimes
    limits: EngineLimits
    now: float = 0.0
    queue: list[PlainRequest] = field(default_factory=list)
    running: list[PlainRequest] = field(default_factory=list)
    most_blocks: int = 0

    def blocks(self, tokens: int) -> int:
        """Whole blocks of so many tokens."""
        return math.ceil(tokens / self.limits.block_size)

    def held(self) -> int:
        """Blocks in use: a prompt's own from its admission on, a decoding sequence's by what it has cached."""
        return sum(self.blocks(one.computed if one.decoding else one.target) for one in self.running)

    def next_held(self) -> int:
        """Blocks in use at the end of a step in which every decoding sequence gets a token."""
        return sum(self.blocks(one.computed + 1 if one.decoding else one.target) for one in self.running)

    def run_until(self, at: float) -> None:
        """Every step that starts before `at`."""
        while self.now < at and (self.queue or self.running):
            self.step()

    def step(self) -> None:
        """One engine step."""
        capacity = int(self.limits.kv_tokens) // self.limits.block_size
        someone_lost = False
        while self.next_held() > capacity:
            victim = self.running.pop()
            victim.preemptions += 1
            victim.computed, victim.decoding = 0, False
            self.queue.insert(0, victim)
            someone_lost = True
        decoding = [one for one in self.running if one.decoding]
        cached = sum(one.computed for one in decoding)
        budget = self.limits.max_num_batched_tokens - len(decoding)
        chunks = []
        for one in self.running:
            if not one.decoding and budget > 0:
                tokens = min(budget, one.target - one.computed)
                chunks.append((one.computed, one.computed + tokens))
                one.computed += tokens
                budget -= tokens
        while self.queue and budget > 0 and len(self.running) < self.limits.max_num_seqs and not someone_lost:
            one = self.queue[0]
            if self.next_held() + self.blocks(one.n_in + one.produced) > capacity:
                break
            self.queue.pop(0)
            self.running.append(one)
            if math.isnan(one.scheduled_s):
                one.scheduled_s = self.now
            one.target = one.n_in + one.produced
            one.computed = min(budget, one.target)
            chunks.append((0, one.computed))
            budget -= one.computed
        finishing = [one for one in self.running if not one.decoding and one.computed == one.target]
        self.most_blocks = max(self.most_blocks, self.next_held())
        if chunks:
            self.now += self.steps.mixed(chunks, len(finishing), len(decoding), cached)
        else:
            self.now += self.steps.decode(len(decoding), cached)[0]
        shown = self.now + self.steps.first_token_s
        for one in decoding:
            one.computed += 1
        for one in decoding + finishing:
            one.decoding = True
            one.produced += 1
            if one.produced == 1:
                one.first_s = shown
            if one.produced == one.n_out:
                one.last_s = shown
                self.running.remove(one)


def plain_simulate(
    trace: Trace, steps: StepTimes, limits: EngineLimits, targets: list[int] | str, replicas: int = 1
) -> tuple[list[PlainRequest], list[PlainEngine]]:
    """Every request of the trace served; `targets` is the replica of each, or "least_loaded"."""
    engines = [PlainEngine(steps=steps, limits=limits) for _ in range(replicas)]
    requests = []
    for number, (at, n_in, n_out) in enumerate(
        zip(trace.t_s.tolist(), trace.n_in.tolist(), trace.n_out.tolist(), strict=True)
    ):
        request = PlainRequest(arrival_s=at, n_in=n_in, n_out=n_out)
        requests.append(request)
        for engine in engines:
            engine.run_until(at)
        if isinstance(targets, str):
            loads = [len(engine.queue) + len(engine.running) for engine in engines]
            chosen = engines[loads.index(min(loads))]
        else:
            chosen = engines[targets[number]]
        chosen.now = max(chosen.now, at)
        chosen.queue.append(request)
    for engine in engines:
        engine.run_until(math.inf)
    return requests, engines

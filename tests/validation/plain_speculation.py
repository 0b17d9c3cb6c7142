"""A slow and obvious simulator of speculative decoding: one round per loop, lists of requests, blocks by ceil.

Written from the rules, not from the code it checks. In each step: a decoding sequence keeps the blocks it has and needs
enough for its cached tokens, its next one and the lookahead slots, at most the whole cache; who does not fit loses its
place, last admitted first. Prompts in progress, then waiting requests, get what is left of the token budget when every
decoding sequence counts for one token and the drafts of the last round. Drafts are cut to the budget in order. No
prefix ids, one replica.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from servecast.model.workload import Trace
from servecast.validation.acceptance_draws import AcceptanceDraws
from servecast.validation.draft_controllers import DraftController, RoundState
from servecast.validation.simulator import EngineLimits
from servecast.validation.speculative_steps import SpeculativeStepTimes


@dataclass(slots=True, kw_only=True)
class PlainRequest:
    """One request, its stamps [s] and its rounds."""

    number: int
    n_in: int
    n_out: int
    produced: int = 0
    target: int = 0
    """Tokens of the prompt in progress, those produced before a preemption included."""
    computed: int = 0
    """Tokens in the cache."""
    decoding: bool = False
    blocks: int = 0
    scheduled_s: float = math.nan
    first_s: float = math.nan
    last_s: float = math.nan
    preemptions: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True, kw_only=True)
class PlainRounds:
    """One engine."""

    steps: SpeculativeStepTimes
    limits: EngineLimits
    texts: AcceptanceDraws
    controller: DraftController
    lookahead: int
    now: float = 0.0
    queue: list[PlainRequest] = field(default_factory=list)
    running: list[PlainRequest] = field(default_factory=list)
    last_length: int = -1

    def ceil(self, tokens: int) -> int:
        """Whole blocks of so many tokens."""
        return math.ceil(tokens / self.limits.block_size)

    def next_blocks(self, one: PlainRequest) -> int:
        """What a running request holds in the coming step."""
        if not one.decoding:
            return one.blocks
        whole = int(self.limits.kv_tokens) // self.limits.block_size
        return max(one.blocks, min(self.ceil(one.computed + 1 + self.lookahead), whole))

    def step(self) -> None:
        """One engine step."""
        whole = int(self.limits.kv_tokens) // self.limits.block_size
        lost = False
        while sum(map(self.next_blocks, self.running)) > whole:
            victim = self.running.pop()
            victim.preemptions += 1
            victim.computed, victim.decoding, victim.blocks = 0, False, 0
            self.queue.insert(0, victim)
            lost = True
        decoding = [one for one in self.running if one.decoding]
        charged = 1 + (self.lookahead if self.last_length < 0 else self.last_length)
        budget = max(self.limits.max_num_batched_tokens - charged * len(decoding), 0)
        chunks = []
        for one in self.running:
            tokens = min(budget, one.target - one.computed) if not one.decoding else 0
            if tokens:
                chunks.append((one.computed, one.computed + tokens))
                one.computed += tokens
                budget -= tokens
        while self.queue and budget > 0 and len(self.running) < self.limits.max_num_seqs and not lost:
            one = self.queue[0]
            need = self.ceil(one.n_in + one.produced)
            if sum(map(self.next_blocks, self.running)) + need > whole:
                break
            self.queue.pop(0)
            self.running.append(one)
            if math.isnan(one.scheduled_s):
                one.scheduled_s = self.now
            one.target, one.blocks = one.n_in + one.produced, need
            one.computed = min(budget, one.target)
            chunks.append((0, one.computed))
            budget -= one.computed
        finishing = [one for one in self.running if not one.decoding and one.computed == one.target]
        for one in decoding:
            one.blocks = self.next_blocks(one)
        chunk_tokens = sum(end - start for start, end in chunks)
        emitted = self.verify(decoding, chunk_tokens, len(chunks)) if decoding else []
        self.now += self.steps.prefill_s(chunks) if chunks else 0.0
        shown = self.now + self.steps.first_token_s
        for one, tokens in [*zip(decoding, emitted, strict=True), *((one, 1) for one in finishing)]:
            one.computed += tokens if one.decoding else 0
            one.decoding = True
            if not one.produced:
                one.first_s = shown
            one.produced += tokens
            if one.produced == one.n_out:
                one.last_s = shown
                self.running.remove(one)

    def verify(self, decoding: list[PlainRequest], chunk_tokens: int, prefills: int) -> list[int]:
        """Time and tokens of a round."""
        cached = sum(one.computed for one in decoding)
        state = RoundState(
            batch=len(decoding),
            cached=cached,
            chunk_tokens=chunk_tokens,
            prefills=prefills,
            contexts=[one.computed for one in decoding],
        )
        decision = self.controller.round(state, lambda: np.ones(len(decoding)))
        room = self.limits.max_num_batched_tokens - chunk_tokens - len(decoding)
        lengths, accepted, emitted = [], [], []
        for one, wanted in zip(decoding, decision.lengths.tolist(), strict=True):
            lengths.append(min(wanted, room, one.blocks * self.limits.block_size - one.computed - 1))
            room -= lengths[-1]
            text = self.texts.text(one.number, one.n_out, self.lookahead)
            accepted.append(min(text.accepted[one.produced], lengths[-1]))
            emitted.append(min(accepted[-1] + 1, one.n_out - one.produced))
            one.rounds += 1
            one.drafted += lengths[-1]
            one.accepted += emitted[-1] - 1
        seconds = self.steps.verify_s(len(decoding) + sum(lengths), len(decoding), cached)
        drafted = decision.drafted
        seconds += (
            self.steps.draft_s(len(decoding), drafted, cached) if drafted else self.steps.idle_s(len(decoding), cached)
        )
        self.now += seconds
        self.last_length = drafted
        self.controller.observe(np.array(accepted), np.array(lengths), seconds)
        return emitted


def plain_speculation(
    trace: Trace,
    steps: SpeculativeStepTimes,
    limits: EngineLimits,
    texts: AcceptanceDraws,
    controller: DraftController,
    lookahead: int,
) -> list[PlainRequest]:
    """Every request of the trace served by one engine."""
    engine = PlainRounds(steps=steps, limits=limits, texts=texts, controller=controller, lookahead=lookahead)
    requests = []
    for number, (at, n_in, n_out) in enumerate(
        zip(trace.t_s.tolist(), trace.n_in.tolist(), trace.n_out.tolist(), strict=True)
    ):
        requests.append(PlainRequest(number=number, n_in=n_in, n_out=n_out))
        while engine.now < at and (engine.queue or engine.running):
            engine.step()
        engine.now = max(engine.now, at)
        engine.queue.append(requests[-1])
    while engine.queue or engine.running:
        engine.step()
    return requests

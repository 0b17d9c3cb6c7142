r"""Which drafted tokens a verification accepts, text by text: draws that belong to a request, not to a policy.

Token t of the output of request i is accepted, when it is the j-th draft of a round, if

.. math:: u_{it} < a_{it} \, r^{j - 1}

with u uniform, a the acceptance probability of that token after accepted ones, r the decay with draft depth (1: none).
u and a depend on the seed, the request and the place of the token alone, so that two policies meet the same text
however they cut it into rounds (common random numbers). A policy uses each u at most once: the round that rejects a
token puts the right one in its place, and the next starts behind it.

Tokens are all alike (Leviathan et al., arXiv 2211.17192), of two hidden kinds in turn, or drawn from a Beta
distribution; or outcomes are read from a log. The confidence that a controller sees is a r^(j-1), calibrated, or with a
normal error on the logit of a.

Assumption: what a drafter proposes at a place does not depend on the round's start but for the depth.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from servecast.model.speculation import TwoState, two_state_start

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LONGEST = 255
"""Longest draft: counts are kept as bytes."""
_OUTCOMES, _TOKENS, _NOISE = range(3)
"""Streams of one request."""


class Text:
    """Outcomes of one request, by place in its output: a round that drafts from place p on reads entry p."""

    __slots__ = ("_confidences", "_decay", "_make", "accepted")

    def __init__(self, accepted: bytes, confidences: Callable[[], Floats], decay: float = 1.0) -> None:
        """`confidences` is called when one is asked for, and no more than once."""
        self.accepted = accepted
        """Drafts accepted in a row from each place on, at most the longest draft."""
        self._make, self._decay = confidences, decay
        self._confidences: array[float] | None = None

    def confidence(self, place: int, depth: int) -> float:
        """The drafter's own probability of the token at `place` as the draft after `depth` others."""
        if self._confidences is None:
            self._confidences = array("d", self._make().tobytes())
        return self._confidences[place] * self._decay**depth


class AcceptanceDraws(Protocol):
    """Texts by request."""

    def text(self, number: int, tokens: int, longest: int) -> Text:
        """Places 0 to `tokens` - 1 of request `number`, drafts of at most `longest` tokens; alike at every call."""
        ...


class TokenProcess(Protocol):
    """How hard the tokens of a text are."""

    def probabilities(self, rng: np.random.Generator, count: int) -> Floats:
        """a of the first `count` tokens; those of a shorter text are its beginning. [-]"""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AlikeTokens:
    """Every token is accepted with the same probability."""

    alpha: float

    def __post_init__(self) -> None:
        _in_unit("alpha", self.alpha)

    def probabilities(self, rng: np.random.Generator, count: int) -> Floats:  # noqa: ARG002 (the protocol's signature)
        """See `TokenProcess`."""
        return np.full(count, self.alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStateTokens:
    """Easy and hard tokens, a Markov chain along the text that starts in its stationary state."""

    parameters: TwoState

    def probabilities(self, rng: np.random.Generator, count: int) -> Floats:
        """See `TokenProcess`."""
        easy = two_state_path(self.parameters, rng.random(count))
        return np.where(easy, self.parameters.a_easy, self.parameters.a_hard)


@dataclass(frozen=True, slots=True, kw_only=True)
class BetaTokens:
    """Independent tokens, a ~ Beta(mean c, (1 - mean) c) with c = `concentration`; c to infinity makes them alike."""

    mean: float
    concentration: float

    def __post_init__(self) -> None:
        if not 0.0 < self.mean < 1.0:
            raise ValueError(f"mean must be between 0 and 1, got {self.mean}")
        if not 0.0 < self.concentration < np.inf:
            raise ValueError(f"concentration must be > 0 and finite, got {self.concentration}")

    def probabilities(self, rng: np.random.Generator, count: int) -> Floats:
        """See `TokenProcess`."""
        return rng.beta(self.mean * self.concentration, (1.0 - self.mean) * self.concentration, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnAcceptance:
    """Texts drawn from a process; each call draws them anew and alike, so that nothing is kept."""

    process: TokenProcess
    seed: int
    depth_decay: float = 1.0
    """r, in (0, 1]."""
    confidence_noise: float = 0.0
    """Standard deviation of the error of a confidence, on the logit of a."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be >= 0 and below 2^64, got {self.seed}")
        if not 0.0 < self.depth_decay <= 1.0:
            raise ValueError(f"depth_decay must be in (0, 1], got {self.depth_decay}")
        if not 0.0 <= self.confidence_noise < np.inf:
            raise ValueError(f"confidence_noise must be >= 0 and finite, got {self.confidence_noise}")

    def text(self, number: int, tokens: int, longest: int) -> Text:
        """See `AcceptanceDraws`."""
        _check_longest(longest)
        drafted = tokens + longest
        a = self.process.probabilities(self._stream(number, _TOKENS), drafted)
        u = self._stream(number, _OUTCOMES).random(drafted)
        accepted = accepted_in_a_row(u, a, self.depth_decay, longest)
        return Text(accepted.tobytes(), lambda: self._confidences(number, a), self.depth_decay)

    def _confidences(self, number: int, a: Floats) -> Floats:
        if not self.confidence_noise:
            return a
        error = self.confidence_noise * self._stream(number, _NOISE).standard_normal(a.size)
        return np.asarray(expit(logit(a) + error), dtype=np.float64)

    def _stream(self, number: int, stream: int) -> np.random.Generator:
        # the counter's top word keeps the streams 2^192 draws apart
        return np.random.Generator(np.random.Philox(key=(number << 64) | self.seed, counter=stream << 192))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedAcceptance:
    """Texts from a log: for each request the accepted drafts of its rounds, all of one draft length.

    A round of the log says which of its drafts were right and, where not all were, that the next was wrong. The bonus
    token behind a full round was never drafted: it counts like the token that follows it. Replayed at its own draft
    length a log gives its rounds back. Request i reads log i modulo their number; a log that is too short repeats.
    """

    logs: Sequence[Sequence[int]]
    draft_length: int

    def __post_init__(self) -> None:
        if not 1 <= self.draft_length <= LONGEST:
            raise ValueError(f"draft_length must be between 1 and {LONGEST}, got {self.draft_length}")
        if not len(self.logs) or not all(len(log) for log in self.logs):
            raise ValueError("logs must have at least one round for every request, got none")
        for log in self.logs:
            wrong = next((one for one in log if not 0 <= one <= self.draft_length or one != int(one)), None)
            if wrong is not None:
                raise ValueError(f"logs must be integers between 0 and {self.draft_length}, got {wrong}")

    def text(self, number: int, tokens: int, longest: int) -> Text:
        """See `AcceptanceDraws`. A confidence is the share of right tokens of the log."""
        _check_longest(longest)
        log = self.logs[number % len(self.logs)]
        drafted = tokens + longest
        # place 0 is the prompt's own token: no round drafts it
        right = np.concatenate([[True], np.resize(_outcomes(log, self.draft_length), drafted - 1)])
        accepted = _in_a_row(right, longest)
        share = float(right[1:].mean())
        return Text(accepted.tobytes(), lambda: np.full(drafted, share))


def two_state_path(parameters: TwoState, v: Floats) -> Bools:
    """Whether each token is easy, from one uniform number per token.

    Each v moves both states at once: to the same state where it falls in both rows alike, else it keeps them apart,
    in place or exchanged. So the path is known from the last v that joined them, without a loop.
    """
    to_hard, stay_hard = parameters.easy_to_hard, 1.0 - parameters.hard_to_easy
    easy_next, hard_next = v >= to_hard, v >= stay_hard
    joins = easy_next == hard_next
    joins[:1] = True
    state = easy_next.copy()
    state[:1] = v[:1] < two_state_start(parameters, 0)
    apart = ~joins if to_hard > stay_hard else np.zeros_like(joins)
    exchanged = np.cumsum(apart)
    last = np.maximum.accumulate(np.where(joins, np.arange(v.size), 0))
    path: Bools = state[last] ^ ((exchanged - exchanged[last]) % 2 == 1)
    return path


def accepted_in_a_row(u: Floats, a: Floats, decay: float, longest: int) -> NDArray[np.uint8]:
    """Drafts accepted from each place on, [places] for u and a of [places + longest] tokens."""
    if decay == 1.0:
        return _in_a_row(u < a, longest)
    places = u.size - longest
    counts = np.zeros(places, dtype=np.uint8)
    alive = np.ones(places, dtype=np.bool_)
    for depth in range(longest):
        alive &= u[depth : depth + places] < a[depth : depth + places] * decay**depth
        if not alive.any():
            break
        counts += alive
    return counts


def _in_a_row(right: Bools, longest: int) -> NDArray[np.uint8]:
    """Right tokens in a row from each place on, at most `longest`; the last `longest` places are left out."""
    at = np.arange(right.size)
    wrong = np.where(right, right.size, at)
    next_wrong = np.minimum.accumulate(wrong[::-1])[::-1]
    return np.minimum(next_wrong - at, longest)[: right.size - longest].astype(np.uint8)


def _outcomes(log: Sequence[int], draft_length: int) -> Bools:
    """Right or wrong of each token that the rounds of a log emitted."""
    right: list[bool] = []
    for accepted, following in zip(log, [*log[1:], log[0]], strict=True):
        right += [True] * accepted
        right.append(accepted == draft_length and following > 0)
    return np.array(right, dtype=np.bool_)


def _check_longest(longest: int) -> None:
    if not 0 <= longest <= LONGEST:
        raise ValueError(f"longest must be between 0 and {LONGEST}, got {longest}")


def _in_unit(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")

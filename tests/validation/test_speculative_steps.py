"""Tables of a step that drafts and verifies, against the cost function that they were made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from servecast.model.batch_steps import TabulatedSteps
from servecast.validation.speculative_steps import TabulatedSpeculation

PROMPTS = TabulatedSteps(
    decode_s=np.full((4, 2), 0.01),
    contexts=np.array([1.0, 100.0]),
    prefill_s=np.array([0.1, 0.2, 0.6]),
    lengths=np.array([1.0, 100.0, 200.0]),
    first_token_s=0.004,
)


@dataclass(slots=True)
class Stairs:
    """Rows padded to multiples of 8, a bend at 1,000 tokens of context; counts how often it is asked."""

    asked: list[str] = field(default_factory=list)

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> NDArray[np.float64]:
        """1 s for 8 rows, 0.1 s a request, 1 ms a token of context up to 1,000."""
        self.asked.append("verify")
        rows, requests, context = (np.asarray(one, dtype=np.float64) for one in (rows, requests, context))
        return np.asarray(np.ceil(rows / 8) + 0.1 * requests + 0.001 * np.minimum(context, 1000.0))

    def draft(self, requests: ArrayLike, gamma: ArrayLike, context: ArrayLike) -> NDArray[np.float64]:  # noqa: ARG002 (the protocol's signature)
        """Independent of the context, and one number as a function may return it."""
        self.asked.append("draft")
        return np.asarray(0.25 * np.asarray(gamma, dtype=np.float64) + 0.01 * np.asarray(requests, dtype=np.float64))

    def idle(self, requests: ArrayLike, context: ArrayLike) -> NDArray[np.float64]:  # noqa: ARG002 (the protocol's signature)
        """0.5 s and 1 us a token of context."""
        self.asked.append("idle")
        return np.asarray(0.5 + 1e-6 * np.asarray(context, dtype=np.float64))


KNOTS = np.array([0.0, 1000.0, 4000.0])


def test_times_are_those_of_the_cost_by_hand() -> None:
    steps = TabulatedSpeculation(Stairs(), PROMPTS, contexts=KNOTS)
    # hand: 8 and 9 rows of 3 requests, mean context 500: 1 or 2 s + 0.3 + 0.5
    assert steps.verify_s(8, 3, 1500) == pytest.approx(1.8, rel=1e-12)
    assert steps.verify_s(9, 3, 1500) == pytest.approx(2.8, rel=1e-12)
    # hand: beyond the bend the context costs nothing more, nor beyond the last knot
    assert steps.verify_s(9, 3, 6000) == pytest.approx(3.3, rel=1e-12)
    assert steps.verify_s(9, 3, 60000) == pytest.approx(3.3, rel=1e-12)
    assert steps.draft_s(3, 2, 1500) == pytest.approx(0.53, rel=1e-12)
    assert steps.draft_s(3, 0, 1500) == 0.0
    assert steps.idle_s(2, 2000) == pytest.approx(0.501, rel=1e-12)
    assert steps.first_token_s == 0.004


def test_speculation_that_is_off_idles_for_nothing() -> None:
    assert TabulatedSpeculation(Stairs(), PROMPTS, armed=False).idle_s(2, 2000) == 0.0


def test_prompt_chunks_by_hand() -> None:
    # hand: P(100) = 0.2, P(150) = 0.4, P(200) = 0.6 s; a prompt pays its fixed cost with its first chunk
    steps = TabulatedSpeculation(Stairs(), PROMPTS, contexts=KNOTS)
    assert steps.prefill_s([(0, 100)]) == pytest.approx(0.2, rel=1e-12)
    assert steps.prefill_s([(100, 200), (0, 150)]) == pytest.approx(0.4 + 0.4, rel=1e-12)


def test_the_cost_is_asked_once_for_each_shape() -> None:
    cost = Stairs()
    steps = TabulatedSpeculation(cost, PROMPTS, contexts=KNOTS)
    for cached in range(0, 3000, 100):
        steps.verify_s(8, 2, cached)
        steps.draft_s(2, 3, cached)
        steps.idle_s(2, cached)
    assert sorted(cost.asked) == ["draft", "idle", "verify"]


def test_context_is_linear_between_the_default_knots() -> None:
    # definition: the bend at 1,000 lies between the knots 512 and 1,024; linear there between 0.512 and 1.0 s
    steps = TabulatedSpeculation(Stairs(), PROMPTS)
    share = (768.0 - 512.0) / 512.0
    assert steps.verify_s(8, 1, 768) == pytest.approx(1.1 + 0.512 + share * (1.0 - 0.512), rel=1e-12)


class Broken(Stairs):
    """Times that are none."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> NDArray[np.float64]:  # noqa: ARG002 (the protocol's signature)
        """That time."""
        return np.asarray(self.seconds)


@pytest.mark.parametrize("seconds", [math.nan, -1.0, math.inf])
def test_times_that_are_none_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"verify must be finite and >= 0 s, got .*{seconds}"):
        TabulatedSpeculation(Broken(seconds), PROMPTS, contexts=KNOTS).verify_s(8, 2, 100)


@pytest.mark.parametrize(
    "contexts", [[1.0], [1.0, 1.0], [2.0, 1.0], [1.0, math.nan]], ids=["one", "equal", "falling", "nan"]
)
def test_knots_must_rise(contexts: list[float]) -> None:
    with pytest.raises(ValueError, match="contexts must be two or more rising values, got "):
        TabulatedSpeculation(Stairs(), PROMPTS, contexts=np.array(contexts))

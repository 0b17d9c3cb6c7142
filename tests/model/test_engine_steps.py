"""Step times of a measured engine. Expected values by hand; the simulator's view against the vectorised one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.engine_steps import EngineSteps, StepWork, decode_work, features, with_chunk
from servecast.model.speculation_cost import step_seconds

STEPS = EngineSteps(
    knots=(1.0, 8.0),
    base_s=0.010,
    row_s=(0.001, 0.002),
    sequence_s=0.0003,
    cached_token_s=1e-6,
    pair_s=2e-6,
    chunk_s=0.004,
    draft_pass_s=0.0005,
    draft_row_s=0.0001,
)


def test_a_step_by_hand() -> None:
    """10 rows: 10 ms + 7 x 1 ms + 2 x 2 ms; 4 sequences, 400 cached; pairs 4 x 101 + (1 + .. + 6) = 425."""
    work = with_chunk(decode_work(4, 100), 0, 6)
    assert STEPS.seconds(work) == pytest.approx(0.010 + 0.007 + 0.004 + 0.0012 + 400e-6 + 2e-6 * 425 + 0.004, rel=1e-12)


def test_drafting_by_hand() -> None:
    """Length 3 for 2 sequences: 3 passes, 2 x 4 rows of the drafter, 8 rows of the target."""
    work = decode_work(2, 0, 3)
    assert (float(np.asarray(work.draft_passes)), float(np.asarray(work.draft_rows))) == (3.0, 8.0)
    # row i of a sequence sees i keys: 1 + 2 + 3 + 4 for each of two
    assert float(np.asarray(work.pairs)) == 20.0
    assert STEPS.draft(2, 3, 0) == pytest.approx(3 * 0.0005 + 8 * 0.0001, rel=1e-12)


@given(
    st.integers(1, 40),
    st.integers(0, 300),
    st.integers(0, 6),
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), max_size=3),
)
def test_the_simulators_view_equals_the_vectorised_one(
    batch: int, context: int, gamma: int, spans: list[tuple[int, int]]
) -> None:
    chunks = [(start, start + size) for start, size in spans]
    work = decode_work(batch, context)
    for start, end in chunks:
        work = with_chunk(work, start, end)
    assert STEPS.mixed(chunks, 0, batch, batch * context) == pytest.approx(float(STEPS.seconds(work)), rel=1e-10)
    now, more, _ = STEPS.decode(batch, batch * context)
    assert now == pytest.approx(float(STEPS.seconds(decode_work(batch, context))), rel=1e-10)
    later, _, _ = STEPS.decode(batch, batch * (context + 1))
    assert later - now == pytest.approx(more * batch, rel=1e-6)
    for armed in (False, True):
        whole = step_seconds(STEPS, batch, gamma, context, armed=armed)
        assert float(whole) == pytest.approx(
            float(STEPS.seconds(decode_work(batch, context, gamma, armed=armed))), rel=1e-10
        )


@given(st.integers(0, 200), st.integers(1, 200))
def test_more_rows_never_cost_less(rows: int, more: int) -> None:
    assert STEPS.seconds(StepWork(rows=rows + more)) >= STEPS.seconds(StepWork(rows=rows))


def test_an_empty_step_costs_nothing() -> None:
    assert STEPS.seconds(StepWork(rows=0.0)) == 0.0
    assert features((1.0,), StepWork(rows=[0.0, 1.0])).shape == (2, 8)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"base_s": -1.0}, "base_s"), ({"knots": (8.0, 1.0)}, "knots"), ({"row_s": (1.0,)}, "one for each row_s")],
)
def test_refusals(change: dict[str, object], word: str) -> None:
    fields = {"knots": (1.0, 8.0), "base_s": 1.0, "row_s": (1.0, 1.0)} | change
    with pytest.raises(ValueError, match=word):
        EngineSteps(**fields)  # type: ignore[arg-type]


def test_an_interval_covers_and_says_when_it_leaves_its_range() -> None:
    steps = EngineSteps(knots=(1.0,), base_s=0.01, row_s=(0.001,), log_sd=0.1, ranges=(("rows", 1.0, 32.0),))
    inside, outside = steps.predict(StepWork(rows=10.0)), steps.predict(StepWork(rows=64.0))
    assert inside.lo < inside.value < inside.hi
    assert np.log(inside.hi / inside.value) == pytest.approx(0.1 * 1.6448536, rel=1e-6)
    assert (inside.calibrated, outside.calibrated) == (True, False)

"""Step times of a measured engine. Expected values by hand; the simulator's view against the vectorised one."""

from __future__ import annotations

from dataclasses import replace

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
TILED = replace(STEPS, tile=4, edge_s=0.0007)


def test_a_step_by_hand() -> None:
    """10 rows: 10 ms + 7 x 1 ms + 2 x 2 ms; 4 sequences, 400 cached; pairs 4 x 101 + (1 + .. + 6) = 425."""
    work = with_chunk(decode_work(4, 100), 0, 6)
    assert STEPS.seconds(work) == pytest.approx(0.010 + 0.007 + 0.004 + 0.0012 + 400e-6 + 2e-6 * 425 + 0.004, rel=1e-12)


def test_rows_that_fill_no_tile_cost_one_edge_more() -> None:
    """Tiles of 4: 12 rows fill three of them, 9 to 11 do not; nothing to compute has no edge."""
    for rows, edge in ((0, 0.0), (8, 0.0), (9, 0.0007), (10, 0.0007), (11, 0.0007), (12, 0.0)):
        work = StepWork(rows=float(rows))
        assert TILED.seconds(work) - STEPS.seconds(work) == pytest.approx(edge, abs=1e-15)
    # 3 sequences that verify 3 drafts are 12 rows, with 2 drafts 9
    for gamma, edge in ((3, 0.0), (2, 0.0007)):
        verified = TILED.verify(3 * (gamma + 1), 3, 50) - STEPS.verify(3 * (gamma + 1), 3, 50)
        assert verified == pytest.approx(edge, abs=1e-15)


def test_drafting_by_hand() -> None:
    """Length 3 for 2 sequences: 3 passes, 2 x 4 rows of the drafter, 8 rows of the target."""
    work = decode_work(2, 0, 3)
    assert (float(np.asarray(work.draft_passes)), float(np.asarray(work.draft_rows))) == (3.0, 8.0)
    # row i of a sequence sees i keys: 1 + 2 + 3 + 4 for each of two
    assert float(np.asarray(work.pairs)) == 20.0
    assert STEPS.draft(2, 3, 0) == pytest.approx(3 * 0.0005 + 8 * 0.0001, rel=1e-12)


@given(
    st.sampled_from([STEPS, TILED]),
    st.integers(1, 40),
    st.integers(0, 300),
    st.integers(0, 6),
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), max_size=3),
)
def test_the_simulators_view_equals_the_vectorised_one(
    steps: EngineSteps, batch: int, context: int, gamma: int, spans: list[tuple[int, int]]
) -> None:
    chunks = [(start, start + size) for start, size in spans]
    work = decode_work(batch, context)
    for start, end in chunks:
        work = with_chunk(work, start, end)
    assert steps.mixed(chunks, 0, batch, batch * context) == pytest.approx(float(steps.seconds(work)), rel=1e-10)
    now, more, _ = steps.decode(batch, batch * context)
    assert now == pytest.approx(float(steps.seconds(decode_work(batch, context))), rel=1e-10)
    later, _, _ = steps.decode(batch, batch * (context + 1))
    assert later - now == pytest.approx(more * batch, rel=1e-6)
    for armed in (False, True):
        whole = step_seconds(steps, batch, gamma, context, armed=armed)
        assert float(whole) == pytest.approx(
            float(steps.seconds(decode_work(batch, context, gamma, armed=armed))), rel=1e-10
        )


@given(st.integers(0, 200), st.integers(1, 200))
def test_more_rows_never_cost_less(rows: int, more: int) -> None:
    assert STEPS.seconds(StepWork(rows=rows + more)) >= STEPS.seconds(StepWork(rows=rows))


def test_an_empty_step_costs_nothing() -> None:
    assert STEPS.seconds(StepWork(rows=0.0)) == 0.0
    assert features((1.0,), StepWork(rows=[0.0, 1.0])).shape == (2, 9)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"base_s": -1.0}, "base_s"),
        ({"tile": 0}, "tile"),
        ({"edge_s": -1.0}, "edge_s"),
        ({"knots": (8.0, 1.0)}, "knots"),
        ({"row_s": (1.0,)}, "one for each row_s"),
    ],
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

"""The charts of the draft-length page: what is drawn where, and that marks stay in their places."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_samples import answer, cells, table

from servecast.reports.speculation_charts import acceptance_chart, gain_map, has_band, quantile_seconds
from servecast.reports.speculation_marks import MarkedAxis, batch_spans, hatch, runs, shown_contexts
from servecast.reports.svg import Axis, Panel
from servecast.speculating import plan_speculation
from servecast.speculation_answers import DecodeLimits, ScheduleRules


def test_map_classes_by_hand() -> None:
    """By hand: length 1 loses 1 - 0.75 (10 + 0.9 B) / (10 + 0.6 B) against length 2: 23 % at 1, 20 % at B = 2.56, 10 %
    at 11.1; from 34 on it is the best one itself."""
    _, chart = gain_map(answer("one context"), 0, None)
    assert "draft length 1, batch sizes 1 to 2: 20 to 40 % below the best length" in chart
    assert "draft length 1, batch sizes 3 to 11: 10 to 20 % below the best length" in chart
    assert re.search(r"draft length 2, batch sizes 1 to \d+: within 1 %", chart)
    assert "hatch unknown" in chart
    assert "hatch missed" not in chart


def test_measured_cells_are_dots() -> None:
    """By hand: four of the five cells lie within the lengths of the plan, one of them without a drafter."""
    _, chart = gain_map(answer("one context"), 0, cells())
    assert len(re.findall('<circle class="cell"', chart)) == 3
    assert len(re.findall('<circle class="cell off"', chart)) == 1
    several = answer("several contexts")
    counts = [gain_map(several, c, cells(context=5000.0))[1].count("<circle") for c in range(4)]
    assert counts == [0, 4, 0, 0]  # 4,000 is nearest


def test_acceptance_band_and_marks() -> None:
    one = answer("one context")
    _, chart = acceptance_chart(one, cells())
    assert 'class="band"' in chart
    assert "measured at draft length 2: 2.38 tokens" in chart
    assert "1.8 tokens (1.7 to 1.9)" in chart  # the table's own numbers
    bare = replace(one, table=replace(one.table, tokens_lo=one.table.tokens, tokens_hi=one.table.tokens))
    assert has_band(one)
    assert not has_band(bare)


def test_quantile_against_monte_carlo() -> None:
    """Independent: 40,000 requests of 256 tokens after the first, steps of 1 or 2 tokens with mean 1.8 (variance 0.16),
    4 standard errors of a p99 are below 0.3 %."""
    one = plan_speculation(
        table(longest=1), limits=DecodeLimits(output_tokens=257.0), rules=ScheduleRules(allow_zero=False)
    )
    random = np.random.default_rng(1)
    yields = 1 + (random.random((40_000, 200)) < 0.8)
    steps = 1 + np.argmax(np.cumsum(yields, axis=1) >= 256, axis=1)
    expected = np.quantile(steps, 0.99) / 256.0 * one.table.step_s[0, 9, 1]
    # a count of steps is whole: half a step of 145 is 0.35 %
    np.testing.assert_allclose(quantile_seconds(one, 0, 99.0)[9], expected, rtol=0.007)


def test_shown_contexts_by_hand() -> None:
    assert [shown_contexts(np.arange(float(n))) for n in (1, 2, 3, 4, 9)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 3],
        [0, 4, 8],
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_spans_cover_what_is_chosen(chosen: list[bool]) -> None:
    """Property: a batch size lies in a span exactly where it is chosen; runs put together give the list again."""
    spans = batch_spans(np.arange(1, len(chosen) + 1), chosen)
    for i, wanted in enumerate(chosen):
        assert any(left < i + 1 < right for left, right in spans) == wanted
    assert [value for first, last, value in runs(chosen) for _ in range(last - first + 1)] == chosen


@settings(max_examples=40, deadline=None)
@given(st.floats(1.0, 40.0), st.floats(1.5, 40.0), st.floats(0.0, 6.0), st.floats(0.3, 3.0), st.booleans())
def test_hatching_stays_in_its_box(x: float, factor: float, y: float, tall: float, rising: bool) -> None:
    """Property: both ends of every line lie in the box, and the line is diagonal."""
    panel = Panel(
        Axis(title="x", low=1.0, high=2000.0, written=str, log=True),
        MarkedAxis(title="y", low=0.0, high=10.0, written=str, marks=(0.0, 5.0)),
        summary="box",
    )
    hatch(panel, [((x, x * factor), (y, y + tall))], "hatch", rising=rising)
    (left, bottom), (right, top) = panel.pixel(x, y), panel.pixel(x * factor, y + tall)
    lines = re.findall(r"M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)", panel.render().partition('class="hatch"')[2])
    expected = math.floor((right - left + bottom - top) / 8.0)
    assert expected - 1 <= len(lines) <= expected + 1
    for x0, y0, x1, y1 in (map(float, line) for line in lines):
        assert left - 0.1 <= x0 <= x1 <= right + 0.1
        assert top - 0.1 <= min(y0, y1) <= max(y0, y1) <= bottom + 0.1
        assert abs((x1 - x0) + (y1 - y0) * (1 if rising else -1)) < 0.3  # coordinates are rounded to a tenth

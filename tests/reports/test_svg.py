"""The SVG helper: ticks against hand values, scales, and markup that parses."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.reports.formats import significant
from servecast.reports.svg import Axis, Panel, log_ticks, nice_ticks, padded


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),  # by hand
    [
        (0.0, 10.0, 6, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
        (0.0, 10.0, 5, [0.0, 5.0, 10.0]),
        (0.0, 1.0, 6, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.13, 0.42, 4, [0.2, 0.3, 0.4]),
        (-1.0, 1.0, 5, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (97.0, 1_020.0, 6, [200.0, 400.0, 600.0, 800.0, 1_000.0]),
        (0.0, 0.0007, 4, [0.0, 0.0002, 0.0004, 0.0006]),
    ],
)
def test_nice_ticks(low: float, high: float, most: int, expected: list[float]) -> None:
    assert nice_ticks(low, high, most) == expected


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),  # by hand
    [
        (1.0, 100.0, 7, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]),
        (1.0, 100.0, 5, [1.0, 3.0, 10.0, 30.0, 100.0]),
        (0.01, 100.0, 6, [0.01, 0.1, 1.0, 10.0, 100.0]),
        (1.0, 1e8, 5, [1.0, 100.0, 1e4, 1e6, 1e8]),
        (2.1, 4.4, 6, [2.5, 3.0, 3.5, 4.0]),
    ],
)
def test_log_ticks(low: float, high: float, most: int, expected: list[float]) -> None:
    assert log_ticks(low, high, most) == expected


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(3, 9))
def test_ticks_are_few_inside_and_even(low: float, span: float, most: int) -> None:
    # a span far below the resolution of the ends has no ticks that floats could tell apart
    high = low + max(span, abs(low) * 1e-6)
    ticks = nice_ticks(low, high, most)
    assert 1 <= len(ticks) <= most
    assert low - 1e-6 * (high - low) <= ticks[0] <= ticks[-1] <= high + 1e-6 * (high - low)
    steps = [right - left for left, right in itertools.pairwise(ticks)]
    assert steps == pytest.approx(steps[:1] * len(steps), rel=1e-6)


@given(st.floats(1e-9, 1e9), st.floats(1.01, 1e12), st.integers(3, 9))
def test_log_ticks_are_few_and_inside(low: float, ratio: float, most: int) -> None:
    ticks = log_ticks(low, low * ratio, most)
    assert 1 <= len(ticks) <= most
    assert all(low * (1 - 1e-6) <= tick <= low * ratio * (1 + 1e-6) for tick in ticks)
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_an_axis_needs_a_span(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low < high"):
        nice_ticks(low, high)
    with pytest.raises(ValueError, match="low < high"):
        Axis(title="x", low=low, high=high, written=significant)


def test_a_log_axis_is_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Axis(title="x", low=0.0, high=1.0, written=significant, log=True)
    with pytest.raises(ValueError, match="positive"):
        log_ticks(0.0, 1.0)


def test_positions() -> None:
    linear = Axis(title="x", low=0.0, high=8.0, written=significant)
    logarithmic = Axis(title="x", low=1.0, high=100.0, written=significant, log=True)
    assert [linear.position(x) for x in (-1.0, 0.0, 2.0, 8.0, math.inf)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert [logarithmic.position(x) for x in (-1.0, 1.0, 10.0, math.inf)] == pytest.approx([0, 0, 0.5, 1], rel=1e-12)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("values", [[], [3.0], [1.0, math.inf], [math.nan, 2.0, 9.0]])
def test_padded_holds_the_finite_values(values: list[float], log: bool) -> None:
    low, high = padded(values, log=log)
    assert low < high
    assert all(low < value < high for value in values if math.isfinite(value))


def panel(summary: str = "a chart") -> Panel:
    return Panel(
        Axis(title="load <req/s>", low=0.0, high=10.0, written=significant),
        Axis(title="latency & more", low=0.01, high=10.0, written=significant, log=True),
        summary=summary,
    )


def test_markup_is_well_formed_and_escaped() -> None:
    drawn = panel('"<script>alert(1)</script>\x00\ud800')
    drawn.bar(0.0, 1.0, 0.5, "fill", "<b>tip</b>")
    drawn.line([(0.0, 1.0), (1.0, 2.0), (2.0, math.inf), (3.0, 1.0)], "curve")
    drawn.band([(0.0, 0.5, 1.0), (1.0, 0.7, math.inf), (2.0, math.nan, 1.0)], "band")
    drawn.whisker(1.0, 0.1, math.inf, "whisker")
    drawn.dot(1.0, 1.0, 4.0, "point", "here")
    drawn.triangle(2.0, 10.0, 4.0, "point", "beyond")
    drawn.horizontal(9.9, "limit", "limit")
    drawn.vertical(10.0, "now & here", "ink")
    drawn.upright(460.0, "<saturated>", "label")
    text = drawn.render()
    root = ElementTree.fromstring(text)  # noqa: S314 (our own markup)
    assert root.get("role") == "img"
    assert root.get("aria-label") == '"<script>alert(1)</script>\ufffd\ufffd'
    assert {element.tag for element in root.iter()} <= {"svg", "rect", "path", "circle", "text", "title"}
    assert not re.search(r"nan|inf\b|<script", text)


def test_a_line_breaks_where_nothing_is_known() -> None:
    drawn = panel()
    drawn.line([(0.0, 1.0), (1.0, 1.0), (2.0, math.nan), (3.0, 1.0), (4.0, 1.0)], "curve")
    (path,) = re.findall(r'<path class="curve" d="([^"]*)"', drawn.render())
    assert path.count("M") == 2


def test_labels_do_not_cover_each_other() -> None:
    drawn = panel()
    placed = [drawn.label_near(5.0, 1.0, 5.0, f"number {i}", "label") for i in range(12)]
    assert 3 <= sum(placed) < 12
    boxes = drawn.reserved
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_labels_of_ticks_stay_inside() -> None:
    axis = Axis(title="x", low=0.0, high=1_000_000.0, written=lambda value: f"{value:,.2f}", most=9)
    drawn = Panel(axis, axis, summary="long labels")
    places = re.findall(r'<text class="axis" x="([\d.]+)" [^>]*text-anchor="middle">([^<]*)<', drawn.render())
    edges = [(float(x) - 0.28 * 15 * len(text), float(x) + 0.28 * 15 * len(text)) for x, text in places]
    assert all(right <= 480.0 for _, right in edges)
    assert all(left >= before for (_, before), (left, _) in itertools.pairwise(edges))

"""The draft-length page: safe, complete, honest about what is missing, and its figures those of the plan."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from speculation_samples import LIMITS, NAMES, answer, cells, table

from servecast.reports.speculation_charts import rival_lengths
from servecast.reports.speculation_page import speculation_page
from servecast.reports.speculation_page_tables import binding_words, limit_words, schedule_words, signed
from servecast.speculating import plan_speculation
from servecast.speculation_answers import DecodeLimits, ScheduleRules, SpeculationAnswer

_VOID = {"meta", "br"}
HOSTILE = '<script>alert("x")</script>\u202e\x00&amp;</code></pre>'
SOURCES = [("Cells", "sweep.csv, 12 cells"), ("Command", "servecast speculate sweep.csv")]


def page_of(one: SpeculationAnswer, policy: str | None = '{"num_speculative_tokens": 2}') -> str:
    return speculation_page(
        one,
        title="Model with a drafter",
        source_lines=SOURCES,
        policy_text=policy,
        engine="vLLM 0.33.0",
        measured=cells(),
    )


@functools.cache
def page(name: str) -> str:
    return page_of(answer(name))


class Page(HTMLParser):
    """Tags in balance, and all text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        self.text = " ".join(self.text.split())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        self.text += " "  # neighbouring cells are separate words
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data.replace("\u00a0", " ")


@pytest.mark.parametrize("name", NAMES)
def test_is_one_safe_document(name: str) -> None:
    text = page(name)
    parsed = Page(text)
    assert parsed.tags[0] == "html"
    assert not {"script", "link", "img", "iframe", "object", "a", "form"} & set(parsed.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", text, re.IGNORECASE)
    assert not any(attribute.startswith("on") or attribute in ("src", "href") for attribute in parsed.names)
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert len(text.encode()) < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_no_number_leaks_unformatted(name: str) -> None:
    assert not re.search(r"\b(nan|NaN|inf|None)\b|\d{4,}\.\d|\.\d{5,}", Page(page(name)).text)


@pytest.mark.parametrize("name", NAMES)
def test_charts_are_well_formed_and_described(name: str) -> None:
    charts = re.findall(r"<svg .*?</svg>", page(name), re.DOTALL)
    shown = {"several contexts": 3}.get(name, 1)
    drawn = 0
    for chart in charts:
        root = ElementTree.fromstring(chart)  # noqa: S314 (our own markup)
        drawn += root.get("role") == "img" and bool(root.get("aria-label"))
        assert root.get("role") == "img" or root.get("aria-hidden")
        assert not re.search(r'="[^"]*\b(nan|inf)\b', chart)
    assert drawn == 3 * shown + 1  # map, rivals and TPOT of every context, one acceptance curve


@pytest.mark.parametrize("name", NAMES)
def test_every_segment_is_said(name: str) -> None:
    text = Page(page(name)).text
    for number, (_, hi, length) in enumerate(answer(name).schedule.segments):
        words = "nothing" if not number and not length else str(length or "none")
        unit = f" token{'s' * (length > 1)}" if not number and length else ""
        assert f"{words}{unit} up to {'' if number else 'batch size '}{hi}" in text


def test_the_samples_are_what_they_are_called() -> None:
    assert len(answer("one segment").schedule.segments) == 1
    assert answer("zero entries").schedule.segments[-1][2] == 0
    assert answer("infeasible batches").schedule.infeasible_batches
    assert answer("one context").schedule.segments == ((1, 33, 2), (34, 64, 1))


def test_the_answer_comes_first() -> None:
    """Rule: schedule and gains in the headline, then tiles, remarks, charts, tables, configuration, provenance."""
    one = replace(
        answer("one context"), gain_over_static=0.0123, gain_over_off=-0.25, advice=("say so",), warnings=("take care",)
    )
    one = replace(one, schedule=replace(one.schedule, binding=("edges", "slo"), regret_bound=0.117))
    text = Page(page_of(one)).text
    order = [
        "Draft lengths for Model with a drafter on vLLM 0.33.0",
        f"Draft 2 tokens up to batch size 33 and 1 up to 64: goodput 1.2 % above always drafting {one.best_static} and "
        "25 % below no speculation",
        "No latency limit is set",
        "+1.2 %",
        "−25 %",
        "11.7 %",
        "What binds: the rule that the length changes at captured batch sizes only and the limits",
        "Advice: say so",
        "Warning: take care",
        "Where each draft length pays",
        "Forecasts under the schedule",
        "Configuration for vLLM 0.33.0",
        '{"num_speculative_tokens": 2}',
        "sweep.csv, 12 cells",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_forecasts_by_hand() -> None:
    """By hand: at batch size 1 and length 2 a step takes 10.9 ms, 2.4 tokens in it; the interval is exp(1.6449 * 5 %)
    = 1.0857 up and down; without a drafter 9.3 ms a token."""
    text = Page(page("one context")).text
    row = text[text.index("Forecasts under the schedule") :]
    for part in ("220", "203 to 239", "4.54 ms", "4.18 to 4.93 ms", "10.9 ms", "+104.8 %"):
        assert part in row
    assert "extrapolated 64" in row  # measured to 48 only
    assert "extrapolated 32" not in row


def test_limits_are_shown() -> None:
    text = Page(page("infeasible batches")).text
    assert "TPOT mean ≤ 25 ms, TPOT p99 ≤ 28 ms over 257 output tokens and speculative step ≤ 40 ms" in text
    for part in ("limit of mean: 25 ms", "limit of p99: 28 ms", "limit of step: 40 ms", "▲ missed", "shaded:"):
        assert part in text
    missed = len(answer("infeasible batches").schedule.infeasible_batches)
    assert missed
    assert f"at {64 - missed} of 64 batch sizes" in text
    free = Page(page("one context")).text
    assert "Limits kept" not in free
    assert "misses a limit" not in free


def test_equal_limits_share_a_line() -> None:
    limits = DecodeLimits(tpot_mean_s=0.025, tpot_quantiles=((99.0, 0.025),))
    text = Page(page_of(plan_speculation(table(), limits=limits))).text
    assert "limit of mean and p99: 25 ms" in text
    assert "limit of p99:" not in text


def test_a_curve_without_a_band_says_so() -> None:
    one = answer("one context")
    bare = replace(one, table=replace(one.table, tokens_lo=one.table.tokens, tokens_hi=one.table.tokens))
    assert "no interval of its own" in Page(page_of(bare)).text
    assert "no interval of its own" not in Page(page("one context")).text


def test_several_contexts_are_all_named() -> None:
    text = Page(page("several contexts")).text
    for context in ("1,000", "4,000", "64,000"):  # first, middle and last of four
        assert f"TPOT under the schedule, context {context} tokens" in text
    assert "TPOT under the schedule, context 16,000" not in text
    assert all(schedule_words(one.segments) in text for one in answer("several contexts").by_context)
    assert "one schedule serves all contexts" in text


def test_hostile_text_is_harmless() -> None:
    one = replace(answer("one context"), advice=(HOSTILE,), warnings=(HOSTILE,))
    one = replace(one, schedule=replace(one.schedule, binding=(HOSTILE,)))
    lines = [(HOSTILE, HOSTILE)]
    text = speculation_page(
        one, title=HOSTILE, source_lines=lines, policy_text=HOSTILE, engine=HOSTILE, fit_lines=lines, measured=None
    )
    parsed = Page(text)
    assert "<script" not in text
    assert "\u202e" not in text
    assert "\x00" not in text
    # <title>, the eyebrow twice, what binds, advice, warning, the engine's heading, its text, two lines of two
    assert parsed.text.count('<script>alert("x")</script>\ufffd\ufffd&amp;</code></pre>') == 12


def test_nothing_optional() -> None:
    one = answer("one context")
    text = speculation_page(one, title="t", source_lines=(), policy_text=None, engine="SGLang")
    assert "<pre>" not in text
    assert "<h2>Fit</h2>" not in text
    empty = replace(one, forecasts=(), advice=(), warnings=(), schedule=replace(one.schedule, regret_bound=math.nan))
    parsed = Page(page_of(empty, None)).text
    assert "Bound on the loss - " in parsed
    assert "Warning" not in parsed
    nobody = cells().take(np.zeros(5, dtype=np.bool_))
    none = speculation_page(one, title="t", source_lines=(), policy_text=None, engine="e", measured=nobody)
    assert '<circle class="cell' not in none


def test_policy_text_is_verbatim() -> None:
    policy = '{\n\t"a": [[1, 2, 6]],  \n  "b": "<&>"\n}'
    shown = re.search(r"<pre><code>(.*?)</code></pre>", page_of(answer("one context"), policy), re.DOTALL)
    assert shown
    assert shown[1] == policy.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def test_static_lengths_are_all_listed() -> None:
    one = answer("one context")
    text = Page(page("one context")).text
    assert all(f"always {k} " in text for k in range(3))
    assert text.count("best static length") >= 1
    assert one.best_static in rival_lengths(one)
    lost = tuple(replace(static, mean_regret=math.nan, worst_regret=math.nan) for static in one.schedule.static[:1])
    gone = replace(one, schedule=replace(one.schedule, static=(*lost, *one.schedule.static[1:])))
    assert "always 0 - -" in Page(page_of(gone)).text
    assert 0 not in rival_lengths(gone)


def test_a_large_plan_stays_small() -> None:
    """4,096 batch sizes, 17 lengths, steps in stairs of 64 rows, 6 contexts."""
    big = table(tuple(1e3 * 2.0**i for i in range(6)), max_batch=4096, row_s=2e-5, stairs=64, longest=16)
    one = plan_speculation(big, limits=LIMITS, rules=ScheduleRules(max_lengths=2, max_segments=3), explain=False)
    assert len(page_of(one).encode()) < 400_000


def test_same_input_same_bytes() -> None:
    assert page("several contexts") == page_of(answer("several contexts"))


@pytest.mark.parametrize(
    ("segments", "expected"),  # by hand
    [
        (((1, 64, 3),), "Draft 3 tokens up to batch size 64"),
        (((1, 64, 0),), "Draft nothing up to batch size 64"),
        (((1, 8, 1), (9, 2048, 0)), "Draft 1 token up to batch size 8 and none up to 2,048"),
    ],
)
def test_schedule_words(segments: tuple[tuple[int, int, int], ...], expected: str) -> None:
    assert schedule_words(segments) == expected


def test_phrases() -> None:
    assert [signed(share) for share in (0.9996, -0.00001, math.nan)] == ["+100 %", "0 %", "-"]
    assert limit_words(DecodeLimits()) == []
    assert binding_words(["slo"]) == "the limits: without it another schedule would be better"

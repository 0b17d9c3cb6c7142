"""The plan page: safe, complete, honest about what is missing, and the same for the same input."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import plan_samples as samples
import pytest

from servecast.model.arrivals import workload_from_parameters
from servecast.model.prediction import Prediction
from servecast.model.slo import Slo
from servecast.model.workload import FixedLength, LognormalLength
from servecast.reports import formats
from servecast.reports.plan_page import ReportContext, best_achievable, plan_page, rate_within_limits
from servecast.solvers.results import CapacityPlan, Confirmation, Replay

_VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = '<script>alert("x")</script>\u202e\x00&amp;'


class Page(HTMLParser):
    """Tags in balance, and all text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        self.text = " ".join(self.text.split())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text += " "  # neighbouring cells are separate words
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data.replace("\u00a0", " ")


@functools.cache
def page(name: str) -> str:
    plan: CapacityPlan = getattr(samples, f"{name}_plan")()
    return plan_page(plan, request=samples.context(), trace=samples.trace(), workload=samples.workload())


def page_of(plan: CapacityPlan, request: ReportContext | None = None) -> str:
    return plan_page(plan, request=request or samples.context(), trace=None, workload=samples.workload())


PLANS = ("feasible", "saturated", "infeasible", "impossible")


@pytest.mark.parametrize("name", PLANS)
def test_is_one_safe_document(name: str) -> None:
    text = page(name)
    parsed = Page(text)
    assert parsed.tags[0] == "html"
    assert not {"script", "link", "img", "iframe", "object", "a", "form"} & set(parsed.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", text, re.IGNORECASE)
    assert not any(attribute.startswith("on") or attribute in ("src", "href") for attribute, _ in parsed.attributes)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in parsed.attributes
    assert len(text.encode()) < 300_000


@pytest.mark.parametrize("name", PLANS)
def test_no_number_leaks_unformatted(name: str) -> None:
    assert not re.search(r"\b(nan|NaN|inf|None)\b|\d{4,}\.\d|\.\d{5,}", Page(page(name)).text)


@pytest.mark.parametrize("name", PLANS)
def test_charts_are_well_formed_and_described(name: str) -> None:
    charts = re.findall(r"<svg .*?</svg>", page(name), re.DOTALL)
    assert charts
    for chart in charts:
        root = ElementTree.fromstring(chart)  # noqa: S314 (our own markup)
        assert root.get("aria-hidden") or (root.get("role") == "img" and root.get("aria-label"))
        assert not re.search(r'="[^"]*\bnan\b', chart)


def test_same_input_same_bytes() -> None:
    assert page("feasible") == page.__wrapped__("feasible")


def test_the_answer_comes_first() -> None:
    text = Page(page("feasible")).text
    answer = (
        "4 × H200 SXM (tp 2) at 28.00 USD/h serves 5.53 req/s of azure-conv within TTFT p99 ≤ 2 s and TPOT p99 ≤ 50 ms"
    )
    assert answer in text
    order = [answer, "TTFT p99", "What binds:", "Warning:", "Workload", "Cost against latency", "Latency against load"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert text.index("Latency against load") < text.index("Alternatives") < text.index("Provenance")


def test_numbers_of_the_chosen_plan() -> None:
    text = Page(page("feasible")).text
    # 1.31 s with -18 % and +23.4 %, 41.2 ms with -12 % and +15.6 %, as the sample is built
    for part in ("1.31 s", "1.07 to 1.62 s", "41.2 ms", "36.3 to 47.6 ms", "99.43 %", "98.1 to 99.91 %", "34.3 %"):
        assert part in text
    assert "saturates at 7.43 req/s" in text  # 5.53 * 1.343


def test_the_chosen_one_is_listed_once_and_first() -> None:
    text = page("feasible")
    rows = re.findall(r"<tr(?: class=\"chosen\")?><td>(\d+)</td>", text)
    assert rows == [str(i) for i in range(1, 14)]
    assert text.count('<tr class="chosen"><td>1</td>') == 1


def replayed(name: str, *, holds: bool, missed: str = "") -> Replay:
    """Invented figures of a replay."""
    return Replay(
        name=name,
        replicas=4 if holds else 3,
        usd_per_hour=28.0,
        ttft_p50_s=0.25,
        ttft_p99_s=1.234,
        tpot_p50_s=0.03,
        tpot_p99_s=0.0432 if holds else math.nan,
        attainment={"ttft_p99": 0.995},
        slo_attainment=0.9951,
        refused=0,
        preemptions=0,
        holds=holds,
        missed=missed,
    )


def test_the_replay_stands_beside_the_closed_form() -> None:
    """Rule: both fleets' figures and the verdicts are shown, foreign text escaped, a missing figure a dash."""
    found = Confirmation(
        router="round_robin",
        seed=1,
        plan=replayed("4 x h200_sxm tp2", holds=True),
        one_fewer=replayed("3 x h200_sxm tp2", holds=False, missed="ttft_p99 <b>reaches</b> 3 s"),
        closed_form="4 x h200_sxm tp2",
        others=(),
    )
    plan = samples.feasible_plan()

    def with_replay(one: Confirmation | None) -> str:
        return plan_page(plan, request=samples.context(), trace=None, workload=samples.workload(), simulated=one)

    text = with_replay(found)
    section = text[text.index("Replayed on the trace") : text.index("<h2>Workload")]
    assert "It confirms the limits. One replica fewer does not hold." in section
    for shown in ("1.23 s", "43.2 ms", "99.51 %", "holds", "&lt;b&gt;reaches&lt;/b&gt;", "Replayed, 3 replicas"):
        assert shown in section
    assert "<td>-</td>" in section
    assert "nan" not in section
    alone = with_replay(replace(found, one_fewer=None, plan=replace(found.plan, replicas=1)))
    assert "One replica fewer" not in alone
    assert "Replayed, 1 replica<" in alone
    assert "Replayed on the trace" not in with_replay(None)


def test_provenance_is_complete() -> None:
    text, request = Page(page("feasible")).text, samples.context()
    for part in (request.command, request.profile, request.date, "servecast 0.1.0", "vLLM 0.11.0", *request.files):
        assert part in text
    assert "H100 SXM at 2.80 USD/h each, at most 32" in text
    assert "waiting included" in text
    assert "Nine of ten" in text


def test_infinite_values_are_saturated() -> None:
    text = Page(page("saturated")).text
    assert "1.1 s to saturated" in text
    assert "36 ms to saturated" in text
    assert "extrapolated" in text


def test_missing_values_are_dashes() -> None:
    nothing = Prediction(value=math.nan, lo=math.nan, hi=math.nan)
    plan = samples.feasible_plan()
    assert plan.plan is not None
    chosen = replace(plan.plan, ttft_p99_s=nothing, slo_attainment=nothing, headroom=math.nan, utilisation=math.nan)
    text = page_of(replace(plan, plan=chosen, alternatives=(chosen,)))
    parsed = Page(text)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert "90 % interval -" in parsed.text


def test_infeasible_names_the_bound_and_the_best() -> None:
    text = Page(page("infeasible")).text
    assert "Nothing on offer serves 5.53 req/s of azure-conv within TTFT p99 ≤ 2 s and TPOT p99 ≤ 50 ms" in text
    assert "Best achievable: 2 × B200 SXM (tp 8) at 89.60 USD/h reaches TTFT p99 370 ms and TPOT p99 61.8 ms" in text
    assert "Cannot be met: TPOT p99 ≤ 50 ms" in text
    assert "Latency against load" not in text
    assert '<tr class="chosen">' not in page("infeasible")


def test_impossible_says_so() -> None:
    text = Page(page("impossible")).text
    assert "No configuration of the offered GPUs can run this model" in text
    assert "do not fit" in text
    assert "Cost against latency" not in text


def test_best_achievable_by_its_worst_ratio() -> None:
    slos = samples.context().slos
    fast_tokens = samples.candidate(ttft_p99_s=6.0, tpot_p99_s=0.02)  # 3 times its limit
    balanced = samples.candidate(ttft_p99_s=2.2, tpot_p99_s=0.06)  # 1.2 times
    never = samples.candidate(ttft_p99_s=math.inf, tpot_p99_s=0.01)
    assert best_achievable((fast_tokens, balanced, never), slos) is balanced
    assert best_achievable((), slos) is None


def test_rate_within_limits_by_hand() -> None:
    def point(rate_rps: float, ttft_s: float) -> samples.LoadPoint:
        flat, sure = Prediction(value=0.01, lo=0.01, hi=0.01), Prediction(value=1.0, lo=1.0, hi=1.0)
        ttft = Prediction(value=ttft_s, lo=ttft_s - 0.5, hi=ttft_s + 0.5)
        return samples.LoadPoint(rate_rps=rate_rps, ttft_p99_s=ttft, tpot_p99_s=flat, slo_attainment=sure)

    points = (point(1.0, 1.0), point(2.0, 2.0), point(3.0, 3.0))
    slos = (Slo(metric="ttft", percentile=99.0, limit_s=2.25),)
    # ttft_s = rate, so the limit falls at 2.25, and half a second more or less moves it by a half
    assert rate_within_limits(points, slos) == Prediction(value=2.25, lo=1.75, hi=2.75)
    tight = rate_within_limits(points, (Slo(metric="ttft", percentile=99.0, limit_s=1.25),))
    assert tight is not None
    assert math.isnan(tight.lo)
    assert rate_within_limits(points, ()) is None


def test_hostile_text_is_harmless() -> None:
    request = replace(
        samples.context(),
        model=HOSTILE,
        engine=HOSTILE,
        engine_version=HOSTILE,
        profile=HOSTILE,
        servecast_version=HOSTILE,
        date=HOSTILE,
        command=HOSTILE,
        offers=((HOSTILE, 1.0, 2),),
        files=(HOSTILE,),
    )
    odd = replace(samples.candidate(gpu=HOSTILE), precision=HOSTILE, kv_format=HOSTILE)
    plan = samples.feasible_plan()
    plan = replace(plan, plan=odd, alternatives=(odd, *plan.alternatives), binds=HOSTILE, warnings=(HOSTILE,))
    trace = replace(samples.trace(2_000), name=HOSTILE, notes=(HOSTILE,))
    workload = replace(samples.workload(), name=HOSTILE, warnings=(HOSTILE,))
    text = plan_page(plan, request=request, trace=trace, workload=workload)
    parsed = Page(text)
    assert "<script" not in text
    assert "\u202e" not in text
    assert "\x00" not in text
    assert parsed.text.count('<script>alert("x")</script>\ufffd\ufffd&amp;') >= 15


def test_a_workload_from_parameters_has_no_arrivals() -> None:
    workload = workload_from_parameters(
        5.0, n_in=LognormalLength(mean=900.0, cv=1.2), n_out=FixedLength(150.0), name="chat"
    )
    text = plan_page(samples.feasible_plan(), request=samples.context(), trace=None, workload=workload)
    assert "no recorded arrivals" in Page(text).text
    assert "Arrivals, in windows" not in text


@pytest.mark.parametrize(
    "slos",
    [
        (),
        (Slo(metric="e2e", percentile=95.0, limit_s=20.0),),
        (Slo(metric="ttft", percentile=50.0, limit_s=0.5), Slo(metric="ttft", percentile=90.0, limit_s=1.0)),
    ],
)
@pytest.mark.parametrize("name", ["feasible", "infeasible"])
def test_any_set_of_objectives(name: str, slos: tuple[Slo, ...]) -> None:
    plan: CapacityPlan = getattr(samples, f"{name}_plan")()
    text = Page(page_of(plan, replace(samples.context(), slos=slos))).text
    assert all(formats.slo(slo) in text for slo in slos)


def test_a_large_result_stays_small() -> None:
    plan = samples.feasible_plan()
    many = tuple(samples.candidate(replicas=i, ttft_p99_s=3.0 / i) for i in range(1, 2_000))
    text = page_of(replace(plan, alternatives=many))
    assert len(text.encode()) < 300_000
    assert "more alternatives are not listed" in text


@pytest.mark.parametrize("points", [0, 1, 2])
def test_short_load_curves(points: int) -> None:
    plan = samples.feasible_plan()
    assert ("Latency against load" in page_of(replace(plan, load_curve=plan.load_curve[:points]))) == (points == 2)


def test_all_saturated_still_renders() -> None:
    lost = samples.candidate(ttft_p99_s=math.inf, tpot_p99_s=math.inf, headroom=-0.5)
    plan = samples.saturated_plan()
    never = Prediction(value=math.inf, lo=math.inf, hi=math.inf)
    curve = tuple(replace(point, ttft_p99_s=never, tpot_p99_s=never) for point in plan.load_curve)
    assert "saturated" in Page(page_of(replace(plan, plan=lost, alternatives=(lost,), load_curve=curve))).text


@pytest.mark.parametrize(
    ("value", "expected"),  # by hand
    [
        (0.0, "0 s"),
        (0.00045, "450 µs"),
        (0.0234, "23.4 ms"),
        (0.9996, "1 s"),
        (2.0, "2 s"),
        (119.4, "119 s"),
        (150.0, "2.5 min"),
        (7_200.0, "2 h"),
        (math.inf, "saturated"),
        (math.nan, "-"),
    ],
)
def test_seconds(value: float, expected: str) -> None:
    assert formats.seconds(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),  # by hand
    [(0.0, "0 %"), (0.12345, "12.3 %"), (0.9987, "99.87 %"), (0.999999, "> 99.99 %"), (1.0, "100 %"), (math.nan, "-")],
)
def test_percent(value: float, expected: str) -> None:
    assert formats.percent(value) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("h200_sxm", "H200 SXM"), ("a100_sxm_40gb", "A100 SXM 40 GB"), ("<b>", "<b>"), ("cpu", "CPU")],
)
def test_gpu_names(name: str, expected: str) -> None:
    assert formats.gpu(name) == expected

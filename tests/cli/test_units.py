"""Quantities as typed. Expected values by hand from the SI prefixes; messages from the rules of the docstrings."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.cli.units import parse_offer, parse_quantity, parse_slo, parse_tokens
from servecast.model.slo import METRICS, Slo


@pytest.mark.parametrize(
    ("text", "metric", "percentile", "limit_s"),
    [
        ("ttft_p99=2s", "ttft", 99.0, 2.0),
        ("tpot_p99=50ms", "tpot", 99.0, 0.05),
        (" tpot_p50 = 800 us ", "tpot", 50.0, 8e-4),
        ("tpot_p50=800µs", "tpot", 50.0, 8e-4),
        ("e2e_p99.9=1.5min", "e2e", 99.9, 90.0),
        ("e2e_p9=2m", "e2e", 9.0, 120.0),
        ("TTFT_P99=.5s", "ttft", 99.0, 0.5),
        ("ttft_p99=2e3ms", "ttft", 99.0, 2.0),
    ],
)
def test_slo(text: str, metric: str, percentile: float, limit_s: float) -> None:
    slo = parse_slo(text)
    assert (slo.metric, slo.percentile) == (metric, percentile)
    assert slo.limit_s == pytest.approx(limit_s, rel=1e-15)


@given(
    st.sampled_from(METRICS), st.integers(1, 9999), st.floats(1e-6, 1e9, allow_nan=False), st.sampled_from(["s", " s"])
)
def test_slo_reads_its_own_name(metric: str, hundredths: int, limit_s: float, unit: str) -> None:
    slo = Slo(metric=metric, percentile=hundredths / 100, limit_s=limit_s)
    assert parse_slo(f"{slo.name}={limit_s!r}{unit}") == slo


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft_p99=2", "the limit needs a unit (ms or s)"),
        ("ttft_p99=2h", "the unit must be us, ms, s, m or min, got 'h'"),
        ("ttft_p99=2S", "the unit must be us, ms, s, m or min, got 'S'"),
        ("ttft_p99=2s/token", "the unit must be us, ms, s, m or min, got 's/token'"),
        ("ttft_p99=1,5s", "the unit must be us, ms, s, m or min, got ',5s'"),
        ("ttft_p99=fast", "the limit must be a number with a unit (ms or s), got 'fast'"),
        ("ttft_p99=", "the limit must be a number with a unit (ms or s), got ''"),
        ("ttft_p99=nan s", "the limit must be positive and at most 1e+09 s, got 'nan s'"),
        ("ttft_p99=inf s", "the limit must be positive and at most 1e+09 s, got 'inf s'"),
        ("ttft_p99=0s", "the limit must be positive and at most 1e+09 s, got '0s'"),
        ("ttft_p99=-2s", "the limit must be positive and at most 1e+09 s, got '-2s'"),
        ("ttft_p99=1e999s", "the limit must be positive and at most 1e+09 s, got '1e999s'"),
        ("ttft_p99", "must be metric, percentile and limit, such as ttft_p99=2s"),
        ("", "must be metric, percentile and limit, such as ttft_p99=2s"),
        ("ttf_p99=2s", "the metric must be one of ttft, tpot, e2e, got 'ttf' (nearest: ttft)"),
        ("latency_p99=2s", "the metric must be one of ttft, tpot, e2e, got 'latency'"),
        ("ttft=2s", "needs a percentile such as ttft_p99, got 'ttft'"),
        ("ttft_99=2s", "needs a percentile such as ttft_p99, got 'ttft_99'"),
        ("ttft_p100=2s", "needs a percentile such as ttft_p99, got 'ttft_p100'"),
        ("ttft_p0=2s", "the percentile must be between 0 and 100, got 0"),
        ("ttft_p٩=2s", "needs a percentile such as ttft_p99, got 'ttft_p٩'"),
    ],
)
def test_slo_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'slo {text!r}: {message}')}$"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("text", "offer"),
    [
        ("h200=3.5", ("h200", 3.5, None)),
        ("h200=3.5:16", ("h200", 3.5, 16)),
        (" H200_SXM = 1e1 : 1 ", ("H200_SXM", 10.0, 1)),
        ("RTX 4090=.4", ("RTX 4090", 0.4, None)),
        ("h200=100000:1000000", ("h200", 100_000.0, 1_000_000)),
    ],
)
def test_offer(text: str, offer: tuple[str, float, int | None]) -> None:
    assert parse_offer(text) == offer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h200=0", "the price must be > 0 and finite, got 0"),
        ("h200=-0.0", "the price must be > 0 and finite, got -0.0"),
        ("h200=-3.5", "the price must be > 0 and finite, got -3.5"),
        ("h200=nan", "the price must be > 0 and finite, got nan"),
        ("h200=NaN", "the price must be > 0 and finite, got nan"),
        ("h200=inf", "the price must be > 0 and finite, got inf"),
        ("h200=1e999", "the price must be > 0 and finite, got 1e999"),
        ("h200=100001", "the price must be at most 100000 USD per hour, got 100001"),
        ("h200=$3.5", "the price must be a number in USD per hour, got '$3.5'"),
        ("h200=3,5", "the price must be a number in USD per hour, got '3,5'"),
        ("h200=", "the price must be a number in USD per hour, got ''"),
        ("h200=3.5:", "the count limit must be a whole number from 1 to 1000000, got ''"),
        ("h200=3.5:0", "the count limit must be a whole number from 1 to 1000000, got '0'"),
        ("h200=3.5:-1", "the count limit must be a whole number from 1 to 1000000, got '-1'"),
        ("h200=3.5:1.5", "the count limit must be a whole number from 1 to 1000000, got '1.5'"),
        ("h200=3.5:1000001", "the count limit must be a whole number from 1 to 1000000, got '1000001'"),
        ("h200=3.5:16:2", "the count limit must be a whole number from 1 to 1000000, got '16:2'"),
        ("h200", "must be name=price in USD per hour, such as h200=3.5, or h200=3.5:16 for at most 16"),
        ("=3.5", "must be name=price in USD per hour, such as h200=3.5, or h200=3.5:16 for at most 16"),
    ],
)
def test_offer_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'gpu {text!r}: {message}')}$"):
        parse_offer(text)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5.5/s", "rate", 5.5),
        ("330/min", "rate", 5.5),
        ("330 / min", "rate", 5.5),
        ("7200/h", "rate", 2.0),
        ("0/s", "rate", 0.0),
        ("30s", "duration", 30.0),
        ("250 ms", "duration", 0.25),
        ("5min", "duration", 300.0),
    ],
)
def test_quantity(text: str, kind: Literal["duration", "rate"], value: float) -> None:
    assert parse_quantity(text, kind) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("5.5", "rate", "rate '5.5': the value needs a unit (/s or /min)"),
        ("5 rps", "rate", "rate '5 rps': the unit must be /s, /min or /h, got 'rps'"),
        ("-5/s", "rate", "rate '-5/s': the value must be >= 0 and finite"),
        ("nan/s", "rate", "rate 'nan/s': the value must be >= 0 and finite"),
        ("inf/s", "rate", "rate 'inf/s': the value must be >= 0 and finite"),
        ("many", "rate", "rate 'many': the value must be a number with a unit (/s or /min), got 'many'"),
        ("30", "duration", "duration '30': the value needs a unit (ms or s)"),
        ("30/s", "duration", "duration '30/s': the unit must be us, ms, s, m or min, got '/s'"),
    ],
)
def test_quantity_refusals(text: str, kind: Literal["duration", "rate"], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_quantity(text, kind)


def test_quantity_is_named_as_the_caller_says() -> None:
    with pytest.raises(ValueError, match=r"^rate_rps '5': the value needs a unit \(/s or /min\)$"):
        parse_quantity("5", "rate", name="rate_rps")


def test_tokens() -> None:
    assert parse_tokens(" 4096 ") == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4k", "write the number out, a suffix can mean powers of 1000 or of 1024"),
        ("1.5 M", "write the number out, a suffix can mean powers of 1000 or of 1024"),
        ("4KiB", "write the number out, a suffix can mean powers of 1000 or of 1024"),
        ("0", "must be a whole number from 1 to 1000000000"),
        ("-4", "must be a whole number from 1 to 1000000000"),
        ("4.0", "must be a whole number from 1 to 1000000000"),
        ("1000000001", "must be a whole number from 1 to 1000000000"),
        ("", "must be a whole number from 1 to 1000000000"),
    ],
)
def test_tokens_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'isl {text!r}: {message}')}$"):
        parse_tokens(text, name="isl")


def test_a_long_text_is_cut() -> None:
    with pytest.raises(ValueError, match="must be name=price") as caught:
        parse_offer("x" * 100_000)
    assert len(str(caught.value)) < 200

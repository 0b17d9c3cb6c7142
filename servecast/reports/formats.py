"""Numbers and foreign text as a reader of a page should see them.

A value that does not exist is `MISSING` and one beyond all bounds is `SATURATED`: neither may turn into 0 or "nan".
Units inside the package are SI; milliseconds, minutes and per cent exist only here.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata

from servecast.model.prediction import Prediction
from servecast.model.slo import Slo

MISSING = "-"
SATURATED = "saturated"

_DURATIONS = ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1.0 / 60.0, "min"))
_METRICS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E latency"}
_GPU_WORDS = {"pcie": "PCIe", "server": "Server"}
# characters that reorder or hide the text around them; a name may not change how its neighbours read
_REORDERING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def escape(text: object) -> str:
    """Any text made safe for HTML and XML, in element content and in quoted attributes.

    >>> escape('<script>"')
    '&lt;script&gt;&quot;'
    """
    clean = _REORDERING.sub("\ufffd", str(text))
    # control characters and lone surrogates are not XML and cannot be written as UTF-8
    clean = "".join(
        "\ufffd" if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" else character
        for character in clean
    )
    return html.escape(clean, quote=True)


def significant(value: float, digits: int = 3) -> str:
    """A plain decimal number with thousands separators and at least `digits` significant digits, no trailing zeros.

    >>> significant(5.5), significant(0.04567), significant(12345.6)
    ('5.5', '0.0457', '12,346')
    """
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return SATURATED
    if value == 0.0:
        return "0"
    decimals = min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 12)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value: float) -> str:
    """A duration with the unit that suits it.

    >>> seconds(0.0234), seconds(2.0), seconds(0.9999), seconds(float("inf"))
    ('23.4 ms', '2 s', '1 s', 'saturated')
    """
    if not math.isfinite(value):
        return significant(value)
    if value == 0.0:
        return "0 s"
    rounded = float(f"{value:.3g}")  # so that 0.9999 s is 1 s and not 1000 ms
    for below, scale, unit in _DURATIONS:
        if abs(rounded) < below:
            return f"{significant(rounded * scale)} {unit}"
    return f"{significant(rounded / 3600.0)} h"


def percent(share: float) -> str:
    """A share in per cent; one just below 1 never reads as 100 %.

    >>> percent(0.345), percent(0.9987), percent(0.99999), percent(1.0)
    ('34.5 %', '99.87 %', '> 99.99 %', '100 %')
    """
    if not math.isfinite(share):
        return significant(share)
    if 0.9999 < share < 1.0:
        return "> 99.99 %"
    text = f"{100.0 * share:,.{2 if 0.99 <= share < 1.0 else 1}f}"
    return f"{text.rstrip('0').rstrip('.')} %"


def usd_per_hour(value: float) -> str:
    """A price, cents included. [USD/h]"""
    return f"{value:,.2f} USD/h" if math.isfinite(value) else MISSING


def rate(value: float) -> str:
    """A request rate. [requests/s]"""
    return f"{significant(value)} req/s" if math.isfinite(value) else significant(value)


def factor(value: float) -> str:
    """A ratio to a limit or a mean.

    >>> factor(0.5)
    '0.5 ×'
    """
    return f"{significant(value)} ×" if math.isfinite(value) else significant(value)


def interval(prediction: Prediction, form: str) -> str:
    """Both ends of a 90 % interval, with the unit once where it is the same.

    >>> interval(Prediction(value=1.0, lo=0.81, hi=1.2), "seconds")
    '810 ms to 1.2 s'
    >>> interval(Prediction(value=1.1, lo=1.0, hi=float("inf")), "seconds")
    '1 s to saturated'
    """
    if math.isnan(prediction.lo) or math.isnan(prediction.hi):
        return MISSING
    written = {"seconds": seconds, "percent": percent, "rate": rate}[form]
    low, high = written(prediction.lo), written(prediction.hi)
    if low == high:
        return low
    number, _, unit = low.rpartition(" ")
    return f"{number if number and high.endswith(f' {unit}') else low} to {high}"


def slo(objective: Slo) -> str:
    """An objective in words, for instance ``TTFT p99 ≤ 2 s``."""
    return f"{metric(objective.metric)} p{objective.percentile:g} ≤ {seconds(objective.limit_s)}"


def metric(name: str) -> str:
    """A metric as people write it."""
    return _METRICS.get(name, name)


def gpu(name: str) -> str:
    """A GPU's catalogue name as its vendor writes it.

    >>> gpu("h200_sxm"), gpu("a100_pcie_40gb"), gpu("my gpu")
    ('H200 SXM', 'A100 PCIe 40 GB', 'my gpu')
    """
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name):
        return name  # not a catalogue name: as the user wrote it
    words = (_GPU_WORDS.get(word, word.upper()) for word in name.split("_"))
    return " ".join(re.sub(r"^(\d+)GB$", r"\1 GB", word) for word in words)

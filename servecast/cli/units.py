"""Quantities as people type them, into SI: latency limits, prices, durations, rates, token counts.

A unit is always written: ``2`` could be seconds or milliseconds, and the difference is a data centre.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Final, Literal

from servecast.model.slo import METRICS, Slo

MAX_USD_PER_HOUR: Final = 100_000.0
"""Price of one GPU above which it is a slip of the keyboard. [USD/h]"""
MAX_LIMIT: Final = 1_000_000
"""GPUs of one type above which the count is one."""
MAX_LIMIT_S: Final = 1e9
"""Longest latency limit, that of the policy table. [s]"""
MAX_TOKENS: Final = 1_000_000_000

_SECONDS: Final = {"us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0}
_PER_SECOND: Final = {"/s": 1.0, "/m": 1.0 / 60.0, "/min": 1.0 / 60.0, "/h": 1.0 / 3600.0}
_NUMBER: Final = re.compile(r"([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?inf|nan)\s*(.*)", re.DOTALL)
_TARGET: Final = re.compile(r"([a-z0-9]+)_p([0-9]{1,2}(?:\.[0-9]{1,4})?)", re.IGNORECASE)


def parse_slo(text: str) -> Slo:
    """A latency target as ``ttft_p99=2s``: metric, percentile, limit; units us, ms, s, m or min.

    >>> parse_slo("tpot_p99.9=50ms")
    Slo(metric='tpot', percentile=99.9, limit_s=0.05)
    """
    what = f"slo {_shown(text)}"
    target, equals, limit = (part.strip() for part in text.partition("="))
    if not equals:
        raise ValueError(f"{what}: must be metric, percentile and limit, such as ttft_p99=2s")
    found = _TARGET.fullmatch(target)
    metric = (found[1] if found else target.partition("_")[0]).lower()
    if metric not in METRICS:
        raise ValueError(f"{what}: the metric must be one of {', '.join(METRICS)}, got {_shown(metric)}{_near(metric)}")
    if found is None:
        raise ValueError(f"{what}: needs a percentile such as {metric}_p99, got {_shown(target)}")
    percentile = float(found[2])
    if not percentile > 0.0:
        raise ValueError(f"{what}: the percentile must be between 0 and 100, got {found[2]}")
    limit_s = _with_unit(what, "limit", limit, _SECONDS, "us, ms, s, m or min", "ms or s")
    if not 0.0 < limit_s <= MAX_LIMIT_S:
        raise ValueError(f"{what}: the limit must be positive and at most {MAX_LIMIT_S:g} s, got {_shown(limit)}")
    return Slo(metric=metric, percentile=percentile, limit_s=limit_s)


def parse_decode_limit(text: str) -> tuple[str, float, float]:
    """A limit on decode steps: name, percentile (NaN for a mean or a step), seconds.

    ``tpot_mean=20ms`` bounds the mean, ``tpot_p99=50ms`` a quantile over requests, ``step=60ms`` any speculative step.

    >>> parse_decode_limit("tpot_p99=50ms"), parse_decode_limit("step=60ms")[::2]
    (('tpot_p99', 99.0, 0.05), ('step', 0.06))
    """
    what = f"slo {_shown(text)}"
    target, equals, limit = (part.strip() for part in text.partition("="))
    target = target.lower()
    if target in ("tpot_mean", "step") and equals:
        limit_s = _with_unit(what, "limit", limit, _SECONDS, "us, ms, s, m or min", "ms or s")
        if not 0.0 < limit_s <= MAX_LIMIT_S:
            raise ValueError(f"{what}: the limit must be positive and at most {MAX_LIMIT_S:g} s, got {_shown(limit)}")
        return target, math.nan, limit_s
    if not target.startswith("tpot_p"):
        raise ValueError(f"{what}: must be tpot_mean=, tpot_p99= (any percentile) or step=, such as tpot_mean=20ms")
    slo = parse_slo(text)
    return slo.name, slo.percentile, slo.limit_s


def parse_offer(text: str) -> tuple[str, float, int | None]:
    """GPU on offer as ``h200=3.5`` or ``h200=3.5:16``: name, price of one [USD/h], how many there are at most.

    The name is not looked up.

    >>> parse_offer("h200=3.5:16")
    ('h200', 3.5, 16)
    """
    what = f"gpu {_shown(text)}"
    name, equals, rest = (part.strip() for part in text.partition("="))
    price, colon, limit = (part.strip() for part in rest.partition(":"))
    if not name or not equals:
        raise ValueError(f"{what}: must be name=price in USD per hour, such as h200=3.5, or h200=3.5:16 for at most 16")
    found = _NUMBER.fullmatch(price.lower())
    if found is None or found[2]:
        raise ValueError(f"{what}: the price must be a number in USD per hour, got {_shown(price)}")
    usd_per_hour = float(found[1])
    if not 0.0 < usd_per_hour < math.inf:
        raise ValueError(f"{what}: the price must be > 0 and finite, got {found[1]}")
    if usd_per_hour > MAX_USD_PER_HOUR:
        raise ValueError(f"{what}: the price must be at most {MAX_USD_PER_HOUR:g} USD per hour, got {found[1]}")
    if not colon:
        return name, usd_per_hour, None
    if not re.fullmatch(r"[0-9]{1,9}", limit) or not 1 <= int(limit) <= MAX_LIMIT:
        raise ValueError(f"{what}: the count limit must be a whole number from 1 to {MAX_LIMIT}, got {_shown(limit)}")
    return name, usd_per_hour, int(limit)


def parse_quantity(text: str, kind: Literal["duration", "rate"], *, name: str | None = None) -> float:
    """Seconds of a duration such as ``30s`` or ``5min``; 1/s of a rate such as ``5.5/s`` or ``330/min``.

    Zero is allowed, a negative or an infinite value is not; `name` stands in messages in place of the kind.

    >>> parse_quantity("330/min", "rate"), parse_quantity("1.5 min", "duration")
    (5.5, 90.0)
    """
    what = f"{name or kind} {_shown(text)}"
    if kind == "duration":
        value = _with_unit(what, "value", text.strip(), _SECONDS, "us, ms, s, m or min", "ms or s")
    else:
        value = _with_unit(what, "value", text.strip(), _PER_SECOND, "/s, /min or /h", "/s or /min")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{what}: the value must be >= 0 and finite")
    return value


def parse_tokens(text: str, *, name: str = "tokens") -> int:
    """A whole number of tokens, at least 1. A suffix is refused: ``4k`` is 4000 to some and 4096 to others.

    >>> parse_tokens("4096")
    4096
    """
    what = f"{name} {_shown(text)}"
    digits = text.strip()
    if re.fullmatch(r"[0-9.]+\s*[kKmMgG]i?[bB]?", digits):
        raise ValueError(f"{what}: write the number out, a suffix can mean powers of 1000 or of 1024")
    if not re.fullmatch(r"[0-9]{1,12}", digits) or not 1 <= int(digits) <= MAX_TOKENS:
        raise ValueError(f"{what}: must be a whole number from 1 to {MAX_TOKENS}")
    return int(digits)


def _with_unit(what: str, part: str, text: str, units: dict[str, float], known: str, usual: str) -> float:
    """Number times unit; every fault names `part` of `what`."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise ValueError(f"{what}: the {part} must be a number with a unit ({usual}), got {_shown(text)}")
    number, unit = found[1], found[2].replace(" ", "")
    if not unit:
        raise ValueError(f"{what}: the {part} needs a unit ({usual})")
    if unit not in units:
        raise ValueError(f"{what}: the unit must be {known}, got {_shown(found[2])}")
    return float(number) * units[unit]


def _near(metric: str) -> str:
    close = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.5)
    return f" (nearest: {close[0]})" if close else ""


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57] + "...")

"""Latencies of request rows, computed once and alike for every executor.

TTFT runs from the arrival to the first token, TPOT is (last - first) / (n_out - 1) of requests with at least two
tokens, end to end from the arrival to the last token. A refused request has none of them, and meets no limit.
Percentiles interpolate linearly between order statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.model.request_rows import RequestRows
from servecast.model.slo import METRICS, Slo

Floats = NDArray[np.float64]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in numbers; NaN where there is nothing to measure. [s] unless said otherwise"""

    requests: int
    refused: int
    preemptions: int
    cached_share: float
    """Prompt tokens found in the prefix cache, of all prompt tokens. [-]"""
    makespan_s: float
    """First arrival to last token."""
    throughput_rps: float
    output_tokens_per_s: float
    mean: dict[str, float]
    """By metric: ttft, tpot, e2e."""
    percentiles: dict[str, dict[float, float]]
    """By metric and percentile."""
    attainment: dict[str, float]
    """Share of requests that meet a limit, by its name. [-]"""
    slo_attainment: float
    """Share that meets every limit; NaN without limits. [-]"""
    goodput_rps: float
    """Requests that meet every limit, over the makespan; NaN without limits. [1/s]"""


def latencies(rows: RequestRows, metric: str) -> Floats:
    """One metric of every request, NaN where it has none. [s]"""
    if metric == "ttft":
        return np.asarray(rows.first_token_s - rows.arrival_s)
    if metric == "e2e":
        return np.asarray(rows.last_token_s - rows.arrival_s)
    if metric != "tpot":
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    several = rows.n_out > 1
    gaps = np.where(several, rows.n_out - 1, 1)
    return np.where(several, (rows.last_token_s - rows.first_token_s) / gaps, np.nan)


def percentile(values: Floats, p: float) -> float:
    """p-th percentile of the values that are there; NaN where none is."""
    there = values[np.isfinite(values)]
    return float(np.percentile(there, p)) if there.size else math.nan


def meets(rows: RequestRows, slo: Slo) -> NDArray[np.bool_]:
    """Which requests stay within the limit; a one-token output has no TPOT to miss, a refused one misses all."""
    values = latencies(rows, slo.metric)
    return ~rows.refused & ((values <= slo.limit_s) | np.isnan(values))


def summary(rows: RequestRows, slos: Sequence[Slo] = ()) -> Summary:
    """Every figure of one run."""
    values = {metric: latencies(rows, metric) for metric in METRICS}
    last = rows.last_token_s[~rows.refused]
    makespan = float(last.max() - rows.arrival_s[0]) if last.size else math.nan
    joint = np.ones(rows.refused.shape, dtype=np.bool_)
    shares = {}
    for slo in slos:
        met = meets(rows, slo)
        # TPOT is a percentile over the requests that have one
        counted = rows.refused | (rows.n_out > 1) if slo.metric == "tpot" else np.ones_like(met)
        shares[slo.name] = float(met[counted].mean()) if counted.any() else math.nan
        joint &= met
    return Summary(
        requests=rows.refused.size,
        refused=int(rows.refused.sum()),
        preemptions=int(rows.preemptions.sum()),
        cached_share=float(rows.cached_tokens.sum() / rows.n_in.sum()),
        makespan_s=makespan,
        throughput_rps=last.size / makespan if makespan else math.nan,
        output_tokens_per_s=float(rows.n_out[~rows.refused].sum() / makespan) if makespan else math.nan,
        mean={name: float(np.nanmean(one)) if np.isfinite(one).any() else math.nan for name, one in values.items()},
        percentiles={name: {p: percentile(one, p) for p in PERCENTILES} for name, one in values.items()},
        attainment=shares,
        slo_attainment=float(joint.mean()) if slos else math.nan,
        goodput_rps=float(joint.sum() / makespan) if slos and makespan else math.nan,
    )


def holds(rows: RequestRows, slos: Sequence[Slo]) -> bool:
    """Whether every limit's percentile is met."""
    shares = summary(rows, slos).attainment
    return all(not shares[slo.name] < slo.percentile / 100.0 for slo in slos)

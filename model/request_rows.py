"""What happened to the requests of one run: the rows that every executor returns and every result file becomes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRows:
    """Stamps of every request, in order of arrival; NaN where the engine refused it. [s]"""

    arrival_s: NDArray[np.float64]
    scheduled_s: NDArray[np.float64]
    """First admitted to the running batch."""
    first_token_s: NDArray[np.float64]
    last_token_s: NDArray[np.float64]
    n_in: NDArray[np.int64]
    n_out: NDArray[np.int64]
    replica: NDArray[np.int32]
    preemptions: NDArray[np.int32]
    cached_tokens: NDArray[np.int64]
    """Prompt tokens found in the prefix cache when it was first admitted."""
    refused: NDArray[np.bool_]
    """Answered with an error: longer than the whole KV cache, or, in a live run, failed."""


def measured_rows(
    arrival_s: ArrayLike,
    first_token_s: ArrayLike,
    last_token_s: ArrayLike,
    n_in: ArrayLike,
    n_out: ArrayLike,
    *,
    scheduled_s: ArrayLike | None = None,
    failed: ArrayLike | None = None,
) -> RequestRows:
    """Rows of a run that was measured from outside, sorted by arrival; what an observer cannot see is NaN or 0.

    A request that `failed` loses its stamps: it has no latency, and meets no limit.
    """
    arrival = np.asarray(arrival_s, dtype=np.float64)
    order = np.argsort(arrival, kind="stable")
    bad = np.zeros(arrival.shape, dtype=np.bool_) if failed is None else np.asarray(failed, dtype=np.bool_)
    scheduled = np.full(arrival.shape, np.nan) if scheduled_s is None else np.asarray(scheduled_s, dtype=np.float64)

    def stamps(values: ArrayLike) -> NDArray[np.float64]:
        return np.where(bad, np.nan, np.asarray(values, dtype=np.float64))[order]

    nothing = np.zeros(arrival.shape, dtype=np.int64)
    return RequestRows(
        arrival_s=arrival[order],
        scheduled_s=stamps(scheduled),
        first_token_s=stamps(first_token_s),
        last_token_s=stamps(last_token_s),
        n_in=np.asarray(n_in, dtype=np.int64)[order],
        n_out=np.asarray(n_out, dtype=np.int64)[order],
        replica=nothing.astype(np.int32),
        preemptions=nothing.astype(np.int32),
        cached_tokens=nothing,
        refused=bad[order],
    )

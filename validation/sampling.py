"""Requests drawn for a simulation: arrival times of a process, and lengths by bootstrap of recorded rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.calibration.fits.arrival_draws import arrival_times
from servecast.model.workload import Trace, Workload

__all__ = ["arrival_times", "length_pairs"]


def length_pairs(
    lengths: Workload | Trace | tuple[ArrayLike, ArrayLike], n: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt and output lengths of `n` requests: whole rows drawn with replacement, so that their dependence is kept.

    Parameters
    ----------
    lengths : a workload or a trace, or (n_in, n_out) as equally long lists of at least 1 whole token. [tokens]
    n : requests to draw.
    rng : numpy's generator; the same state gives the same rows.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 request, got {n}")
    given = lengths if isinstance(lengths, tuple) else (lengths.n_in, lengths.n_out)
    n_in, n_out = (np.asarray(one, dtype=np.float64) for one in given)
    if n_in.ndim != 1 or n_in.shape != n_out.shape or not n_in.size:
        raise ValueError(f"n_in and n_out must be equally long lists, got shapes {n_in.shape} and {n_out.shape}")
    for name, tokens in (("n_in", n_in), ("n_out", n_out)):
        if not np.all((tokens >= 1.0) & (tokens == np.rint(tokens))):
            raise ValueError(f"{name} must be whole numbers of at least 1 token")
    rows = rng.integers(0, n_in.size, n)
    return n_in[rows].astype(np.int64), n_out[rows].astype(np.int64)

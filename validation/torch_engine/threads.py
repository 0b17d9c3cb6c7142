"""Threads of PyTorch: as many as the scenario says where steps are timed, every core where only the result counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from servecast.calibration.microbenchmarks.device import physical_cores

MOST_THREADS = 8
"""Of training and of counts; small matrices leave more of them idle."""


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """So many threads, and afterwards as many as before; None: every core up to `MOST_THREADS`.

    The command line starts the library with one, and what `OMP_NUM_THREADS` says ends at this block: to leave cores to
    others, give the process fewer, by its affinity or a quota.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(physical_cores(), MOST_THREADS) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

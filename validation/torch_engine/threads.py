"""Threads of PyTorch: one where steps are timed, every core where only the result counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from servecast.calibration.microbenchmarks.device import physical_cores

MOST_THREADS = 8
"""More gain nothing on matrices of the sizes that are trained here."""


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """So many threads, and afterwards as many as before; None: every core, for training and for counts.

    The command line starts the library with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(physical_cores(), MOST_THREADS) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

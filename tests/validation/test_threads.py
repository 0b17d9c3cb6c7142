"""Threads of training and of timed steps."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the PyTorch engine needs torch (extra live)")

import torch

from servecast.calibration.microbenchmarks.device import physical_cores
from servecast.validation.torch_engine.threads import MOST_THREADS, threads


def test_a_thread_count_ends_with_its_block() -> None:
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
        with threads():
            assert torch.get_num_threads() == min(physical_cores(), MOST_THREADS)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyboardInterrupt), threads(1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


def test_a_pair_is_trained_on_every_core_where_the_library_was_started_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors", reason="needs safetensors (extra live)")
    pytest.importorskip("tokenizers", reason="needs tokenizers (extra live)")
    from test_trained_pair import TINY

    from servecast.validation.torch_engine.trained_pair import trained_pair

    monkeypatch.setenv("SERVECAST_CACHE", str(tmp_path))
    seen: list[int] = []
    with threads(1):
        trained_pair(TINY, progress=lambda *_: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 1
    assert set(seen) == {min(physical_cores(), MOST_THREADS)}

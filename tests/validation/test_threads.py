"""Threads of training and of timed steps."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the PyTorch engine needs torch (extra live)")

import torch

from servecast.validation.torch_engine import threads as module
from servecast.validation.torch_engine.threads import threads


def test_a_thread_count_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
        for cores, expected in ((3, 3), (64, 8)):
            monkeypatch.setattr(module, "physical_cores", lambda cores=cores: cores)
            with threads():
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyboardInterrupt), threads(before + 1):
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
    monkeypatch.setattr(module, "physical_cores", lambda: 2)
    seen: list[int] = []
    with threads(1):
        trained_pair(TINY, progress=lambda *_: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 1
    assert set(seen) == {2}

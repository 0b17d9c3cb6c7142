"""One valid speculation table, written by hand, that the tests of this folder change; and random schedules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from servecast.policies.speculation import SpeculationTable, from_dict

NEWEST = {"vllm": "0.33.0", "sglang": "0.5.23", "trtllm": "1.4.0rc1"}
Ranges = Sequence[tuple[int, int, int]]


def document(ranges: Ranges = ((1, 16, 5), (17, 64, 3), (65, 256, 1)), **changes: Any) -> dict[str, Any]:
    """A valid document by hand with these (lo, hi, K), and top-level `changes`."""
    interval = {"value": 0.2, "lo": 0.1, "hi": 0.4}
    base: dict[str, Any] = {
        "schema": "servecast.speculation/1",
        "engine": "vllm",
        "engine_version": "0.33.0",
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "method": "eagle3",
        "draft_model": "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        "max_batch": ranges[-1][1],
        "segments": [{"lo": lo, "hi": hi, "draft_length": length} for lo, hi, length in ranges],
        "num_speculative_tokens": max(1, *(length for _, _, length in ranges)),
        "best_static_length": None,
        "data_parallel": 1,
        "model_runner": "v2",
        "predicted": [{"goodput_tokens_per_s": dict(interval), "tpot_s": dict(interval)} for _ in ranges],
        "advice": ["measure the edge at 64"],
        "provenance": {"servecast": "0.2.0", "profile": "h100", "acceptance": "mt-bench", "date": "2026-11-26"},
    }
    return base | copy.deepcopy(changes)


def table(ranges: Ranges = ((1, 16, 5), (17, 64, 3), (65, 256, 1)), **changes: Any) -> SpeculationTable:
    """The valid table with these (lo, hi, K), and top-level `changes`."""
    return from_dict(document(ranges, **changes))


def expanded(ranges: Ranges) -> list[int]:
    """Draft length at each batch size, by walking over the ranges."""
    dense: list[int] = []
    for lo, hi, length in ranges:
        assert lo == len(dense) + 1
        dense.extend([length] * (hi - lo + 1))
    return dense


@st.composite
def schedules(draw: st.DrawFn, lengths: st.SearchStrategy[int] | None = None) -> list[tuple[int, int, int]]:
    """Contiguous (lo, hi, K) from 1 with at least two lengths."""
    edges = sorted(draw(st.sets(st.integers(1, 200), min_size=2, max_size=7)))
    each = lengths if lengths is not None else st.integers(0, 8)
    values = draw(st.lists(each, min_size=len(edges), max_size=len(edges)).filter(lambda found: len(set(found)) > 1))
    return [(lo + 1, hi, value) for lo, hi, value in zip([0, *edges], edges, values, strict=False)]

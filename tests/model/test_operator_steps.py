"""Steps composed from operators: every sum by hand on tables that are straight lines."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from servecast.model.llm import Llm
from servecast.model.operator_steps import Curve, OperatorSteps, OperatorTables, Ring

RING = Ring(bandwidth_bytes_per_s=1e6, latency_s=0.001)
DENSE = Llm(name="tiny", layers=2, hidden=1000, heads=8, kv_heads=8, head_dim=125, vocabulary=1000, intermediate=4000)
MOE = replace(DENSE, name="tiny-moe", intermediate=0, experts=4, experts_per_token=2, moe_layers=2)


def _line(seconds: float) -> Curve:
    """So many seconds per token."""
    return Curve([1.0, 100.0], [seconds, 100.0 * seconds])


CHUNK, BEFORE, DECODES, CONTEXT = (
    np.array(axis) for axis in ([0.0, 16, 32], [0.0, 16, 32], [0.0, 4, 8], [0.0, 16, 32])
)


def _attention() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A_p = 0.1 p (1 + c / 4), A_d = 0.05 B (1 + k / 10), and 0.01 p B for the two together."""
    p, c, B, k = np.meshgrid(CHUNK, BEFORE, DECODES, CONTEXT, indexing="ij")
    return np.asarray(0.1 * p * (1.0 + c / 4.0) + 0.05 * B * (1.0 + k / 10.0) + 0.01 * p * B)


TABLES = OperatorTables(
    dense={
        "layernorm": _line(0.001),
        "qkv_proj": _line(0.004),
        "o_proj": _line(0.003),
        "gate_up_proj": _line(0.002),
        "down_proj": _line(0.001),
        "embedding": _line(0.002),
        "final_layernorm": _line(0.001),
    },
    per_sequence={"lm_head": _line(0.1), "sampler": _line(0.05)},
    attention_axes=(CHUNK, BEFORE, DECODES, CONTEXT),
    attention=_attention(),
)
STEPS = OperatorSteps(TABLES, DENSE, RING)


def test_a_decode_step_by_hand() -> None:
    # hand: 3 tokens padded to a graph of 4: 2 x 0.001 x 4 + 0.01 x 4 + A, A = 0.05 x 3 x 2 = 0.3 at context 10;
    # two layers 0.696, embedding and last norm 0.012, head and sampler 0.15 x 3
    now, more, holds = STEPS.decode(3, 30)
    np.testing.assert_allclose(now, 0.696 + 0.012 + 0.45, rtol=1e-12)
    # a cached token more is 0.005 in each of two layers
    np.testing.assert_allclose(more, 0.01, rtol=1e-9)
    assert holds >= 1


def test_a_mixed_step_by_hand() -> None:
    # hand: 5 + 3 tokens, graph of 8: norms 2 x 0.001 x 8, linears 0.08, attention 0.3 + 0.1 x 5 x 2 + 0.01 x 15
    # = 1.45; two layers 3.092; embedding and norm 0.024; 3 + 1 sequences sampled 0.6
    np.testing.assert_allclose(STEPS.mixed([(4, 9)], 1, 3, 30), 3.092 + 0.024 + 0.6, rtol=1e-12)
    # unfinished: three are sampled
    np.testing.assert_allclose(STEPS.mixed([(4, 9)], 0, 3, 30), 3.092 + 0.024 + 0.45, rtol=1e-12)


def test_two_chunks_by_hand() -> None:
    # hand: 4 + 6 tokens, graph of 16: 0.032 + 0.16 + 0.1 x 4 + 0.1 x 6 x 2 = 1.792 a layer; 0.048; 2 sampled 0.3
    np.testing.assert_allclose(STEPS.mixed([(0, 4), (4, 10)], 2, 0, 0), 3.584 + 0.048 + 0.3, rtol=1e-12)
    # beside 2 sequences with no context: mixing at the summed chunk, 0.01 x 10 x 2, and 0.05 x 2 of decode attention
    beside = 2.0 * (0.032 + 0.16 + 1.6 + 0.2 + 0.1) + 0.048 + 4 * 0.15
    np.testing.assert_allclose(STEPS.mixed([(0, 4), (4, 10)], 2, 2, 0), beside, rtol=1e-12)


def test_a_batch_beyond_every_graph_is_not_padded() -> None:
    # hand: 600 tokens, beyond 512: 0.012 x 600 + 0.1 x 600 = 67.2 a layer; 1.8; one sampled, 0.15
    np.testing.assert_allclose(STEPS.mixed([(0, 600)], 1, 0, 0), 2.0 * 67.2 + 1.8 + 0.15, rtol=1e-12)


def test_a_ring_by_hand() -> None:
    # hand: 4 ranks, 6 hops of a quarter of 4 MB at 1 GB/s and 1 us each
    ring = Ring(bandwidth_bytes_per_s=1e9, latency_s=1e-6)
    np.testing.assert_allclose(ring.all_reduce_s(4e6, 4), 6.006e-3, rtol=1e-12)
    assert ring.all_reduce_s(4e6, 1) == 0.0


def test_tensor_parallel_adds_two_rings_a_layer() -> None:
    # hand: 8 tokens x 1000 x 2 bytes: 2 hops of 8000 B at 1 MB/s and 1 ms = 0.018; twice in each of two layers
    both = OperatorSteps(TABLES, DENSE, RING, tp=2)
    np.testing.assert_allclose(both.mixed([(4, 9)], 1, 3, 30) - STEPS.mixed([(4, 9)], 1, 3, 30), 0.072, rtol=1e-9)


EXPERTS = (
    np.array([1.0, 101.0]),
    np.array([1.0, 4.0]),
    np.array([[0.011, 0.041], [0.111, 0.141]]),  # 0.001 per token and 0.01 per active expert
)
MOE_TABLES = replace(TABLES, experts=EXPERTS)


def test_experts_by_hand() -> None:
    # hand: one token visits 2 of 4 experts: 0.021 in each of two layers; 4 tokens reach 4 (1 - 1/16) = 3.75
    moe, dense = OperatorSteps(MOE_TABLES, MOE, RING), OperatorSteps(TABLES, DENSE, RING)
    np.testing.assert_allclose(moe.decode(1, 16)[0] - dense.decode(1, 16)[0], 0.042, rtol=1e-9)
    np.testing.assert_allclose(moe.decode(4, 64)[0] - dense.decode(4, 64)[0], 2.0 * 0.0415, rtol=1e-9)


def test_replicas_in_lockstep_by_hand() -> None:
    # hand: one busy replica with one sequence, the other idle; experts over two GPUs: 4 / 2 x 1/2 = 1 active, 0.011 in
    # each of two layers; gather and scatter of 2000 B: 2 hops of 1000 B and 1 ms = 0.004, twice
    steps = OperatorSteps(MOE_TABLES, MOE, RING, dp=2, ep=2)
    alone = STEPS.decode(1, 16)[0]
    idle = ((), 0, 0, 0)
    np.testing.assert_allclose(steps.lockstep([((), 0, 1, 16), idle]), alone + 0.022 + 0.008, rtol=1e-9)
    # the slowest replica counts, whichever it is
    np.testing.assert_allclose(
        steps.lockstep([idle, ((), 0, 1, 16)]), steps.lockstep([((), 0, 1, 16), idle]), rtol=1e-12
    )


def test_a_mixture_needs_its_experts() -> None:
    with pytest.raises(ValueError, match="experts must be profiled for tiny-moe, got no table"):
        OperatorSteps(TABLES, MOE, RING)


def test_decode_attention_goes_on_where_it_was_not_measured() -> None:
    # hand: context doubles from 16 to 32; 0.2 at 0, 0.52 at 16, so that 32 is 0.52 + 2 x 0.32 = 1.16, for B = 4
    attention = _attention()
    attention[0, 0, 1, 2] = math.nan
    gap = OperatorSteps(replace(TABLES, attention=attention), DENSE, RING)
    measured = STEPS.decode(4, 128)[0] - 2.0 * 0.05 * 4 * (1.0 + 3.2)
    np.testing.assert_allclose(gap.decode(4, 128)[0] - measured, 2.0 * 1.16, rtol=1e-9)


def test_a_curve() -> None:
    curve = Curve([2.0, 4.0, 8.0], [1.0, 2.0, 3.0])
    # hand: the first value below, linear between and beyond
    np.testing.assert_allclose([curve(1.0), curve(3.0), curve(6.0), curve(12.0)], [1.0, 1.5, 2.5, 4.0], rtol=1e-12)
    with pytest.raises(ValueError, match="a curve must have at least 2 samples, got 1 and 1"):
        Curve([1.0], [1.0])

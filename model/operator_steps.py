r"""Step times composed from measured operators: one table per kernel, as a layer profiler writes them.

.. math::
   t = L\,[2\,norm(m) + qkv(m) + rope(m) + A + out(m) + mlp(m)] + C(m) + embed(m) + norm_f(m) + head(s) + sampler(s)

m tokens in the step (padded to a captured graph where there is one), s sequences that are sampled. Attention of
prompt chunks :math:`(p_i, c_i)` beside B decodes with mean context k is

.. math:: A = \sum_i A_p(p_i, c_i) + A_d(B, k) + [A(p, c, B, k) - A_p(p, c) - A_d(B, k)], \qquad p = \sum_i p_i

since a mixed kernel is measured with one chunk only: what mixing adds (up to half as much again) is taken at the sum of
the chunks, the causal work at each one's own length. Collectives are rings, 2 (n - 1) / n bytes at the bandwidth and
2 (n - 1) latencies of a link. Routed experts are tabulated over tokens and active experts, and
E / ep (1 - (1 - k / E)^M) of a GPU's experts are active for the M tokens of all attention replicas (coverage, as in
:mod:`servecast.model.step_time`); replicas run in lockstep, so the slowest one's attention counts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.model.batch_steps import Chunk, Work
from servecast.model.llm import Llm

Floats = NDArray[np.float64]

GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
"""Batches that vLLM captures as graphs by default; a smaller one is padded to the next. [tokens]"""
RUN_STEPS = 8
"""Steps over which a decode step's growth with the cache is taken as a line."""


class Curve:
    """Seconds over one count, linear between samples and beyond the last."""

    __slots__ = ("_x", "_y")

    def __init__(self, x: Sequence[float], y: Sequence[float]) -> None:
        if len(x) != len(y) or len(x) < 2:
            raise ValueError(f"a curve must have at least 2 samples, got {len(x)} and {len(y)}")
        self._x, self._y = list(map(float, x)), list(map(float, y))

    def __call__(self, at: float) -> float:
        """Value at `at`; that of the first sample below it."""
        x, y = self._x, self._y
        if at <= x[0]:
            return y[0]
        i = min(bisect_right(x, at), len(x) - 1)
        return y[i - 1] + (y[i] - y[i - 1]) * (at - x[i - 1]) / (x[i] - x[i - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTables:
    """Seconds of one layer's operators on one GPU at one tensor-parallel degree."""

    dense: Mapping[str, Curve]
    """By operator, over the tokens of a step; names as the profiler's (qkv_proj, o_proj, layernorm, ...)."""
    per_sequence: Mapping[str, Curve]
    """lm_head and sampler, over the sequences sampled."""
    attention_axes: tuple[Floats, Floats, Floats, Floats]
    """Chunk tokens, tokens before the chunk, decoding sequences, mean context of these."""
    attention: Floats
    """Over the four axes; NaN where not measured."""
    experts: tuple[Floats, Floats, Floats] | None = None
    """Tokens, active experts, and seconds [tokens, active] (NaN where not measured) of the routed experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """Link between the GPUs of an engine."""

    bandwidth_bytes_per_s: float
    latency_s: float

    def all_reduce_s(self, nbytes: float, ranks: int) -> float:
        """2 (n - 1) / n bytes and 2 (n - 1) latencies. [s]"""
        hops = 2 * (ranks - 1)
        return hops * (nbytes / ranks / self.bandwidth_bytes_per_s + self.latency_s)


class OperatorSteps:
    """Step times of one engine: `tp` GPUs per attention replica, `dp` replicas with experts spread over `ep` GPUs."""

    def __init__(self, tables: OperatorTables, llm: Llm, ring: Ring, *, tp: int = 1, dp: int = 1, ep: int = 1) -> None:
        self._llm, self._ring, self._tp, self._dp, self._ep = llm, ring, tp, dp, ep
        self._tables = tables
        self._decode, self._prompt, self._mixing = _attention_parts(tables)
        self._axes = [axis.tolist() for axis in tables.attention_axes]
        self.first_token_s = 0.0
        if llm.is_moe and tables.experts is None:
            raise ValueError(f"experts must be profiled for {llm.name}, got no table")

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:
        """See `servecast.model.batch_steps.StepTimes`."""
        now = self.mixed((), 0, batch, cached)
        later = self.mixed((), 0, batch, cached + RUN_STEPS * batch)
        return now, max(later - now, 0.0) / (RUN_STEPS * batch), RUN_STEPS

    def mixed(self, chunks: Sequence[Chunk], finishing: int, batch: int, cached: int) -> float:
        """See `servecast.model.batch_steps.StepTimes`."""
        return self.lockstep(((chunks, finishing, batch, cached),) * self._dp)

    def lockstep(self, ranks: Sequence[Work]) -> float:
        """A step of all attention replicas: what each computes, as in `mixed`. [s]"""
        tokens = [_padded(sum(end - start for start, end in chunks) + batch) for chunks, _, batch, _ in ranks]
        alone = max(self._replica(rank, count) for rank, count in zip(ranks, tokens, strict=True) if count)
        return alone + self._experts(sum(tokens)) + self._collectives(tokens)

    def _replica(self, rank: Work, tokens: int) -> float:
        chunks, finishing, batch, cached = rank
        dense, head = self._tables.dense, self._tables.per_sequence
        layer = 2.0 * dense["layernorm"](tokens)
        for name in ("qkv_proj", "rotary_emb", "o_proj", "qk_norm", "gate_up_proj", "act_fn", "down_proj"):
            if name in dense:
                layer += dense[name](tokens)
        layer += self._attention(chunks, batch, cached)
        once = dense["embedding"](tokens) + dense["final_layernorm"](tokens)
        sampled = max(batch + finishing, 1)
        return self._llm.layers * layer + once + head["lm_head"](sampled) + head["sampler"](sampled)

    def _attention(self, chunks: Sequence[Chunk], batch: int, cached: int) -> float:
        context = cached / batch if batch else 0.0
        seconds = _bilinear(self._axes[2], self._axes[3], self._decode, batch, context) if batch else 0.0
        if not chunks:
            return seconds
        total = weighted = 0.0
        for start, end in chunks:
            seconds += _bilinear(self._axes[0], self._axes[1], self._prompt, end - start, start)
            total += end - start
            weighted += (end - start) * start
        if batch:
            at = (total, weighted / total, batch, context)
            seconds += _multilinear(self._axes, self._mixing, at)
        return seconds

    def _experts(self, tokens: int) -> float:
        """Routed experts of one GPU for the tokens of all replicas: each GPU's kernel is handed all of them, and
        the table's second axis says how many experts it reads."""
        if self._tables.experts is None:
            return 0.0
        llm = self._llm
        share = llm.experts_per_token / llm.experts
        active = llm.experts / self._ep * -math.expm1(tokens * math.log1p(-share))
        counts, experts, seconds = self._tables.experts
        return llm.moe_layers * _bilinear(counts.tolist(), experts.tolist(), seconds, tokens, active)

    def _collectives(self, tokens: Sequence[int]) -> float:
        llm = self._llm
        total = 0.0
        if self._tp > 1:
            total += 2.0 * llm.layers * self._ring.all_reduce_s(2.0 * max(tokens) * llm.hidden, self._tp)
        if self._ep > 1 and self._dp > 1:
            # gather before and scatter after the experts: an all-reduce in two halves
            total += llm.moe_layers * self._ring.all_reduce_s(2.0 * sum(tokens) * llm.hidden, self._dp)
        return total


def _padded(tokens: int) -> int:
    at = bisect_left(GRAPH_SIZES, tokens)
    return GRAPH_SIZES[at] if tokens and at < len(GRAPH_SIZES) else tokens


def _attention_parts(tables: OperatorTables) -> tuple[Floats, Floats, Floats]:
    """Decode alone [B, context], one chunk alone [chunk, before], and what mixing adds [all four]."""
    whole = tables.attention
    decode = _extended(whole[0, 0])
    prompt = _extended(whole[:, :, 0, 0])
    prompt[0] = decode[0] = 0.0
    mixing = whole - prompt[:, :, np.newaxis, np.newaxis] - decode
    # nothing is added where one of the two is absent
    mixing[0], mixing[:, :, 0] = 0.0, 0.0
    # a context of no tokens is not measured beside a chunk: the shortest one that is
    for axis in (3, 1, 2):
        mixing = _filled(mixing, axis)
    return decode, prompt, np.nan_to_num(mixing)


def _extended(table: Floats) -> Floats:
    """Gaps of a table filled along its last axis: by the line through the two samples before, or by the first one."""
    table = table.copy()
    for row in table:
        seen = np.flatnonzero(np.isfinite(row))
        if not seen.size:
            continue
        row[: seen[0]] = row[seen[0]]
        for i in range(seen[0] + 1, row.size):
            if not math.isfinite(row[i]):
                # the axis doubles: a kernel limited by memory doubles its growth
                row[i] = row[i - 1] + 2.0 * (row[i - 1] - row[i - 2]) if i > 1 else row[i - 1]
    return table


def _filled(table: Floats, axis: int) -> Floats:
    """Gaps take the nearest measured value before them along `axis`, else the first one after."""
    moved = np.moveaxis(table.copy(), axis, -1)
    for order in (1, -1):
        view = moved[..., ::order]
        for i in range(1, view.shape[-1]):
            gap = np.isnan(view[..., i])
            view[..., i][gap] = view[..., i - 1][gap]
    return np.moveaxis(moved, -1, axis)


def _position(axis: Sequence[float], at: float) -> tuple[int, float]:
    """Cell and weight of its right end, linear beyond the last sample, the first one below."""
    i = min(max(bisect_right(axis, at), 1), len(axis) - 1)
    return i - 1, max((at - axis[i - 1]) / (axis[i] - axis[i - 1]), 0.0)


def _bilinear(x_axis: Sequence[float], y_axis: Sequence[float], table: Floats, x: float, y: float) -> float:
    i, u = _position(x_axis, x)
    j, v = _position(y_axis, y)
    low = table[i, j] * (1.0 - v) + table[i, j + 1] * v
    high = table[i + 1, j] * (1.0 - v) + table[i + 1, j + 1] * v
    return float(low * (1.0 - u) + high * u)


def _multilinear(axes: Sequence[Sequence[float]], table: Floats, at: Sequence[float]) -> float:
    for axis, value in zip(axes, at, strict=True):
        i, u = _position(axis, value)
        u = min(u, 1.0)  # what mixing adds is not carried beyond the measured cells
        table = table[i] * (1.0 - u) + table[i + 1] * u
    return float(table)

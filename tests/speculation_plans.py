"""Tables of decode speeds by hand, a drafter by hand, and sweeps whose true cost is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.acceptance import AcceptanceCurve
from servecast.model.speculation_cells import SpeculationCells
from servecast.model.speculation_cost import FormulaCost, RowForm, step_seconds
from servecast.speculating import plan_speculation
from servecast.speculation_answers import SpeculationAnswer
from servecast.speculation_tables import SpeedTable

Floats = NDArray[np.float64]

COST = FormulaCost(
    form=RowForm.HYPERBOLIC,
    base_s=10e-3,
    rise_s=6e-3,
    rise_rows=40.0,
    row_s=4e-5,
    request_s=3e-5,
    round_s=1.5e-3,
    draft_s=2e-4,
)
"""A step of a sweep."""
LENGTHS = 1.0 + np.concatenate([[0.0], np.cumsum(np.cumprod(0.82 * 0.95 ** np.arange(8)))])
"""Tokens per step of its drafter, lengths 0 to 8."""

# files and flags of a command line
HEADER = "batch_size,draft_length,tok_s_per_request\n"
ACCEPTANCE = "draft_length,mean_acceptance_length\n1,1.8\n2,2.3\n4,3.0\n"
PASSES = """phase,mode,indexed_by,n,step_s
verify,cuda_graph,tokens,1,0.010
verify,cuda_graph,tokens,8,0.012
verify,cuda_graph,tokens,64,0.040
draft,cuda_graph,requests,1,0.001
draft,cuda_graph,requests,16,0.001
"""
PLAN = ("--cells", "cells.csv")
NAMES = ("--model", "some/model", "--draft-model", "some/head")


def speed_table(
    tok_s: ArrayLike,
    tokens: Sequence[float] | None = None,
    *,
    off: ArrayLike | None = None,
    variance: Sequence[float] | None = None,
    contexts: Sequence[float] = (math.nan,),
    sd: float = 0.02,
    ratio_sd: float = 0.0,
    calibrated: ArrayLike = True,
) -> SpeedTable:
    """[batch, length] or [context, batch, length] speeds; without `tokens` a step of length K yields K + 1."""
    speed = np.asarray(tok_s, dtype=np.float64)
    speed = speed if speed.ndim == 3 else speed[np.newaxis]
    count, size = speed.shape[1:]
    per_step = np.arange(1.0, size + 1.0) if tokens is None else np.asarray(tokens, dtype=np.float64)
    return SpeedTable(
        batches=np.arange(1, count + 1),
        contexts=np.asarray(contexts, dtype=np.float64),
        tok_s=speed,
        sd=np.full(speed.shape, sd),
        ratio_sd=np.full(speed.shape, ratio_sd),
        off_tok_s=speed[..., 0] if off is None else np.broadcast_to(np.asarray(off, dtype=np.float64), speed.shape[:2]),
        off_sd=np.full(speed.shape[:2], sd),
        tokens=per_step,
        tokens_lo=per_step,
        tokens_hi=per_step,
        variance=np.zeros(size) if variance is None else np.asarray(variance, dtype=np.float64),
        calibrated=np.broadcast_to(np.asarray(calibrated, dtype=np.bool_), (count, size)),
    )


def certain_curve(mean_length: ArrayLike) -> AcceptanceCurve:
    """A curve measured at every length, without error."""
    mean = np.asarray(mean_length, dtype=np.float64)
    return AcceptanceCurve(form="hand", mean_length=mean, lo=mean, hi=mean, measured=np.ones(mean.size, dtype=np.bool_))


def sweep(
    batches: Sequence[float] = (1, 4, 16, 64),
    lengths: Sequence[int] = (0, 1, 3, 5),
    contexts: Sequence[float] = (math.nan,),
    cost: FormulaCost = COST,
) -> SpeculationCells:
    """Cells without noise of every combination; an unknown context costs nothing."""
    b, k, c = (one.ravel() for one in np.meshgrid(batches, lengths, contexts, indexing="ij"))
    return SpeculationCells(
        batch=b.astype(np.float64),
        gamma=k.astype(np.int64),
        tok_s_per_request=true_speed(b, k, np.nan_to_num(c), cost),
        mean_acceptance_length=LENGTHS[k],
        context=c.astype(np.float64),
        armed=np.zeros(b.size, dtype=np.bool_),
    )


def true_speed(batch: ArrayLike, gamma: ArrayLike, context: ArrayLike = 0.0, cost: FormulaCost = COST) -> Floats:
    """Tokens over seconds. [tokens/s]"""
    return np.asarray(LENGTHS[np.asarray(gamma)] / step_seconds(cost, batch, gamma, context))


def write_sweep(path: Path, cells: SpeculationCells, *, labels: Sequence[tuple[str, str]] = ()) -> Path:
    """As a file that the reader takes."""
    with_context = bool(np.isfinite(cells.context).any())
    names = ["batch_size", "draft_length", "tok_s_per_request", "mean_acceptance_length"]
    names += ["context_tokens"] * with_context + [name for name, _ in labels]
    lines = [",".join(names)]
    for i in range(cells.size):
        values = [cells.batch[i], cells.gamma[i], cells.tok_s_per_request[i], cells.mean_acceptance_length[i]]
        values += [cells.context[i]] * with_context
        lines.append(
            ",".join([*("" if np.isnan(value) else f"{value:.10g}" for value in values), *(text for _, text in labels)])
        )
    path.write_text("\n".join(lines) + "\n")
    return path


TOKENS = np.array([1.0, 1.8, 2.4])
STEP_MS = 10.0 + np.arange(1, 5)[:, np.newaxis] * np.arange(1, 4)
"""Batches 1 to 4, lengths 0 to 2: 11 12 13, 12 14 16, 13 16 19, 14 18 22. Time per token: 11 6.67 5.42, 12 7.78 6.67,
13 8.89 7.92, 14 10 9.17; length 2 is the fastest everywhere."""


def small(**changed: Any) -> SpeedTable:
    """The table of `STEP_MS`."""
    return speed_table(1e3 * TOKENS / STEP_MS, TOKENS.tolist(), **changed)


def plan(table: SpeedTable, **changed: Any) -> SpeculationAnswer:
    """Without looking for what binds."""
    return plan_speculation(table, explain=False, **changed)


def best_at(*lengths: int, loss: float = 0.1, size: int = 4) -> SpeedTable:
    """Goodput 100 per batch at the given length of each batch, less by `loss` at every other."""
    relative = np.where(np.arange(size) == np.array(lengths)[:, np.newaxis], 1.0, 1.0 - loss)
    return speed_table(100.0 * relative)

"""The same requests in closed form and in the reference simulator, by step times of one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from servecast.model.batch_steps import ScaledSteps, StepTimes
from servecast.model.engine_steps import EngineSteps
from servecast.model.prediction import Z90
from servecast.model.request_rows import RequestRows, measured_rows
from servecast.model.transient import Piece, transient
from servecast.model.workload import Trace
from servecast.validation.metrics import latencies, percentile
from servecast.validation.pace import STEADY, Pace, in_time, in_work, steps_at
from servecast.validation.scheduler import EngineLimits
from servecast.validation.simulator import simulate

Floats = NDArray[np.float64]

EXECUTORS = ("simulator", "closed_form")
FIGURES = ("ttft_mean_s", "ttft_p50_s", "ttft_p95_s", "tpot_mean_s", "tpot_p95_s", "e2e_mean_s", "makespan_s")
"""What is compared of every load. [s]"""


def simulated(trace: Trace, steps: StepTimes, limits: EngineLimits) -> RequestRows:
    """Request by request through the reference simulator, with what a request pays outside the steps added."""
    return simulate(trace, steps, limits)


def closed_form(trace: Trace, steps: StepTimes, limits: EngineLimits) -> RequestRows:
    """Every request through a fluid of the others (:mod:`servecast.model.transient`)."""
    context = _mean_context(trace)
    cap = max(min(limits.max_num_seqs, int(limits.kv_tokens / context), len(trace.t_s)), 1)
    pace = [steps.decode(batch, int(batch * context))[0] for batch in range(1, cap + 1)]

    def admission(pieces: Sequence[Piece], running: int) -> float:
        chunks = [(int(start), int(end)) for _, start, end in pieces]
        return steps.mixed(chunks, len(chunks), running, int(running * context))

    first, last = transient(
        trace.t_s,
        trace.n_out,
        admission,
        pace,
        cap,
        n_in=trace.n_in,
        step_tokens=float(limits.max_num_batched_tokens),
    )
    own = steps.first_token_s
    return measured_rows(trace.t_s, first + own, last + own, trace.n_in, trace.n_out)


def _chunks(tokens: int, limits: EngineLimits) -> list[tuple[int, int]]:
    size = limits.max_num_batched_tokens
    return [(at, min(at + size, tokens)) for at in range(0, tokens, size)]


def _mean_context(trace: Trace) -> float:
    """By residence, as `Workload.mean_context`. [tokens]"""
    out = trace.n_out.astype(np.float64)
    return float((out * (trace.n_in + out / 2.0)).mean() / out.mean())


def capacity_rps(steps: StepTimes, limits: EngineLimits, n_in: Floats, n_out: Floats) -> float:
    """Requests that a full engine completes: each needs its tokens at the full batch, and its prompt. [1/s]

    With B running, B complete in one cycle of m decode steps and B prompts.
    """
    batch = limits.max_num_seqs
    context = float(np.mean(n_in) + np.mean(n_out) / 2.0)
    decode = steps.decode(batch, int(batch * context))[0]
    prompts = [steps.mixed(_chunks(int(n), limits), 1, batch, int(batch * context)) - decode for n in n_in]
    return batch / (float(np.mean(n_out)) * decode + batch * float(np.mean(prompts)))


def figures(rows: RequestRows) -> dict[str, float]:
    """`FIGURES` of one run; NaN where nothing was measured. [s]"""
    found: dict[str, float] = {}
    for name in FIGURES:
        metric, _, statistic = name.removesuffix("_s").partition("_")
        if metric == "makespan":
            last = rows.last_token_s[np.isfinite(rows.last_token_s)]
            found[name] = float(last.max() - rows.arrival_s[0]) if last.size else float("nan")
            continue
        values = latencies(rows, metric)
        if statistic == "mean":
            there = values[np.isfinite(values)]
            found[name] = float(there.mean()) if there.size else float("nan")
        else:
            found[name] = percentile(values, float(statistic.removeprefix("p")))
    return found


@dataclass(frozen=True, slots=True)
class Foretold:
    """One figure of one load by one executor. [s]"""

    value: float
    """Mean over the paces that the probes do not tell apart."""
    down: float
    """How much less with all steps shorter by what their form may be off, 90 % of the times."""
    up: float
    """How much more with all steps longer."""
    noise: float
    """Standard deviation over those paces; NaN where there is one alone."""


def predicted_figures(
    executor: str,
    trace: Trace,
    steps: StepTimes,
    limits: EngineLimits,
    *,
    log_sd: float,
    paces: Sequence[Pace] = (STEADY,),
) -> dict[str, Foretold]:
    """Every figure by one executor; `log_sd` is how far off the form of the steps may be, `paces` are the machine's."""
    low, middle, high = (
        [
            figures_at(executor, trace, ScaledSteps(steps, float(np.exp(shift * Z90 * log_sd))), limits, pace)
            for pace in paces
        ]
        for shift in (-1.0, 0.0, 1.0)
    )
    found = {}
    for name in FIGURES:
        less, values, more = (np.array([one[name] for one in runs]) for runs in (low, middle, high))
        value = float(values.mean())
        found[name] = Foretold(
            value=value,
            down=max(value - float(less.mean()), 0.0),
            up=max(float(more.mean()) - value, 0.0),
            noise=float(values.std(ddof=1)) if len(paces) > 1 else float("nan"),
        )
    return found


def figures_at(executor: str, trace: Trace, steps: StepTimes, limits: EngineLimits, pace: Pace) -> dict[str, float]:
    """`figures` by one executor on a machine that moves at this pace. [s]"""
    run = {"simulator": simulated, "closed_form": closed_form}[executor]
    return figures(in_time(run(in_work(trace, pace), steps_at(steps, pace), limits), trace, pace))


def baseline_steps(
    steps: EngineSteps, *, weight_bytes: float, params: float, bandwidth: float, flops: float
) -> EngineSteps:
    """The plain roofline of a step, as a line: weights over bandwidth, or all rows' arithmetic over its rate."""
    knee = max(weight_bytes / bandwidth / (2.0 * params / flops), 1.0)
    return replace(
        steps,
        knots=(knee,),
        base_s=weight_bytes / bandwidth,
        row_s=(2.0 * params / flops,),
        sequence_s=0.0,
        cached_token_s=0.0,
        pair_s=0.0,
        chunk_s=0.0,
        draft_pass_s=0.0,
        draft_row_s=0.0,
        first_token_s=0.0,
        covariance=None,
    )

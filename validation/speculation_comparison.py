"""Draft-length policies on real traces: ``python -m servecast.validation.speculation_comparison``.

Every policy serves the same requests with the same texts (which draft tokens are right depends on the seed, the request
and the place, not on the policy) on the same step times, so that what differs is the choice of draft lengths alone.
Step times come from the shipped profile; acceptance is modelled (tokens of a Beta law, decay with depth), since no
public log of accepted drafts is at hand. Rates are shares of what the engine completes without speculation.

The policies are those that SpecServe's scripts run (none, static 1, 3, 5, confidence stop, SmartSpec, SpecServe), its
released code with the SLO test switched on, the same code with the simulator's own step times in place of its time
model (which charges each row with its request's whole cache, as batch expansion does and current engines do not), and
ours: the table that ``servecast speculate`` writes, read as vLLM reads it, and SpecServe's drafter with the limit per
token and the optimal verifier.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.arrivals import settled_stamps, workload_from_trace
from servecast.model.batch_steps import TabulatedSteps, tabulated_steps
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.operator_steps import GRAPH_SIZES
from servecast.model.profiled_speculation import ProfiledCost
from servecast.model.service import service_curves
from servecast.model.slo import Slo
from servecast.model.speculation import depth_decay_survival
from servecast.model.speculation_cost import step_seconds
from servecast.model.workload import Trace
from servecast.readers.deployments import deployment
from servecast.readers.traces import read_trace
from servecast.solvers.draft_length import EDGE_WORTH, DraftLengthProblem, solve_draft_length
from servecast.validation.acceptance_draws import BetaTokens, DrawnAcceptance
from servecast.validation.draft_controllers import (
    ConfidenceStop,
    DraftController,
    RoundState,
    ScheduleTable,
    StaticLength,
)
from servecast.validation.goodput_controllers import SmartSpec, SpecServe
from servecast.validation.metrics import latencies, summary
from servecast.validation.profiled_times import ProfiledTimes, sampled_times
from servecast.validation.simulator import EngineLimits
from servecast.validation.speculative_simulator import simulate_speculative
from servecast.validation.speculative_steps import TabulatedSpeculation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LONGEST = 8
"""Longest draft, as in the paper's runs. [tokens]"""
MAX_NUM_SEQS = 128
REQUESTS = {"azure-conv": 1500, "azure-code": 6000, "mooncake": 1500}
"""First requests of a trace; those of the code trace have 28 output tokens on average."""
SHARES = (0.3, 0.6, 0.8, 0.95)
"""Arrival rates, as shares of the completions per second without speculation."""
STEP_RANGE = 4096
"""Rows and requests up to which a system's step times are tabulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A target with its drafter."""

    name: str
    model: str
    gpu: str
    tp: int
    first_acceptance: float
    """Mean acceptance of the first position."""
    concentration: float
    """Of the Beta law of tokens: small is a text of very easy and very hard tokens."""
    decay: float
    """Per further position."""
    slo: tuple[Slo, ...]


def _slo(ttft_s: float, tpot_s: float) -> tuple[Slo, ...]:
    return (
        Slo(metric="ttft", percentile=99.0, limit_s=ttft_s),
        Slo(metric="tpot", percentile=99.0, limit_s=tpot_s),
    )


SYSTEMS: dict[str, System] = {
    one.name: one
    for one in (
        System(
            name="8B",
            model="meta-llama/Llama-3.1-8B-Instruct",
            gpu="h100_sxm",
            tp=1,
            first_acceptance=0.78,
            concentration=1.5,
            decay=0.97,
            slo=_slo(2.0, 0.020),
        ),
        System(
            name="70B",
            model="meta-llama/Llama-3.3-70B-Instruct",
            gpu="h100_sxm",
            tp=8,
            first_acceptance=0.78,
            concentration=1.5,
            decay=0.97,
            slo=_slo(4.0, 0.040),
        ),
    )
}
"""Acceptance of both: EAGLE-3 on MT-bench has 2.36, 3.08 and 3.54 tokens per step at lengths 2, 4 and 7 (vLLM issue
20780); these numbers give 2.37, 3.11 and 3.56."""

TRACES: dict[str, tuple[str, ...]] = {
    "azure-conv": ("azure-llm-2023", "conv.csv.gz"),
    "azure-code": ("azure-llm-2023", "code.csv.gz"),
    "mooncake": ("mooncake", "conversation.csv.gz"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One policy at one rate."""

    system: str
    trace: str
    share: float
    rate_rps: float
    policy: str
    tpot_mean_s: float
    tpot_p99_s: float
    ttft_p99_s: float
    e2e_mean_s: float
    e2e_p99_s: float
    slo_attainment: float
    tokens_per_round: float
    mean_length: float
    """Draft tokens verified per request and round."""


class SeparableCost:
    """A profile's step cost in tables: seconds by rows plus seconds by requests and context, which it is."""

    def __init__(self, cost: ProfiledCost) -> None:
        counts = np.arange(1.0, STEP_RANGE + 1.0)
        self._context = np.array([1.0, 256, 1024, 4096, 16384, 65536, 131072])
        self._rows = cost.verify(counts, 1.0, 1.0)
        batch = np.arange(1.0, 4.0 * MAX_NUM_SEQS)[:, np.newaxis]
        self._cache = cost.verify(1.0, batch, self._context) - cost.verify(1.0, 1.0, 1.0)
        self._draft = cost.idle(batch, self._context)

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> Floats:
        """See `servecast.model.speculation_cost.SpeculationCost`."""
        at = np.minimum(np.asarray(rows, dtype=np.int64), STEP_RANGE) - 1
        beyond = np.maximum(np.asarray(rows) - STEP_RANGE, 0) * (self._rows[-1] - self._rows[-2])
        return np.asarray(self._rows[at] + beyond + self._at(self._cache, requests, context))

    def draft(self, requests: ArrayLike, gamma: ArrayLike, context: ArrayLike) -> Floats:
        """Likewise."""
        return np.asarray(np.asarray(gamma, dtype=np.float64) * self.idle(requests, context))

    def idle(self, requests: ArrayLike, context: ArrayLike) -> Floats:
        """Likewise."""
        return self._at(self._draft, requests, context)

    def _at(self, table: Floats, requests: ArrayLike, context: ArrayLike) -> Floats:
        row = np.minimum(np.asarray(requests, dtype=np.int64), len(table)) - 1
        c = np.asarray(context, dtype=np.float64)
        right = np.clip(np.searchsorted(self._context, c, side="right"), 1, self._context.size - 1)
        left = right - 1
        share = (c - self._context[left]) / (self._context[right] - self._context[left])
        return np.asarray(table[row, left] * (1.0 - share) + table[row, right] * share)


class TabulatedTimes:
    """What a controller that knows the simulator's own step times believes.

    The step's prompt chunks are left out: a request's prompt costs what it costs, whatever is drafted beside it. A
    controller that counts them drafts too long while prompts fill the steps, since rows then look free, and its limit
    shuts speculation off where the chunk alone breaks it: with them, 8B on Azure conversation at 0.95 fell from 89 to
    65 % of requests within the limits without a limit of its own, and to 45 % with one (drafts decaying by 0.95).
    """

    def __init__(self, steps: TabulatedSpeculation) -> None:
        self._steps = steps

    def draft_s(self, state: RoundState, gamma: int, *, overhead: bool = True) -> float:  # noqa: ARG002 (the protocol's signature)
        """See `servecast.validation.goodput_controllers.RoundTimes`."""
        return self._steps.draft_s(state.batch, gamma, state.cached)

    def verify_s(self, state: RoundState, gamma: int) -> float:
        """Likewise."""
        return self._steps.verify_s((gamma + 1) * state.batch, state.batch, state.cached)

    def ragged_s(self, state: RoundState, lengths: Ints) -> float:
        """Likewise."""
        return self._steps.verify_s(state.batch + int(lengths.sum()), state.batch, state.cached)

    def rows_s(self, state: RoundState, rows: Ints) -> Floats:
        """Likewise."""
        verify, batch, cached = self._steps.verify_s, state.batch, state.cached
        return np.array([verify(int(one), batch, cached) for one in rows])


@dataclass(frozen=True, slots=True)
class Ready:
    """A system with what its runs share."""

    system: System
    cost: SeparableCost
    prompts: TabulatedSteps
    limits: EngineLimits
    believed: ProfiledTimes


@lru_cache(maxsize=4)
def ready(name: str) -> Ready:
    """Step times and limits of a system."""
    system = SYSTEMS[name]
    profile = load_profile(SHIPPED)
    one = deployment(system.model, system.gpu, "vllm", tp=system.tp)
    prompts = tabulated_steps(profile, one, "vllm", max_batch=MAX_NUM_SEQS, longest=131072, chunk_tokens=8192)
    limits = EngineLimits(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=8192,
        kv_tokens=memory_budget(one, MEMORY_RULES["vllm"]).kv_tokens,
    )
    cost = SeparableCost(ProfiledCost(profile, one, "vllm"))
    return Ready(system, cost, prompts, limits, sampled_times(cost))


def policies(made: Ready, table: Sequence[int]) -> dict[str, Callable[[], DraftController]]:
    """Controllers by name, a fresh one for every replica."""
    known = TabulatedTimes(TabulatedSpeculation(made.cost, made.prompts))
    return {
        "no speculation": lambda: StaticLength(0),
        "static 1": lambda: StaticLength(1),
        "static 3": lambda: StaticLength(3),
        "static 5": lambda: StaticLength(5),
        "confidence stop": lambda: ConfidenceStop(max_length=LONGEST),
        "SmartSpec": lambda: SmartSpec(made.believed, max_length=LONGEST),
        "SpecServe as released": lambda: SpecServe(made.believed, max_length=LONGEST),
        "SpecServe, SLO test on": lambda: SpecServe(made.believed, max_length=LONGEST, slo="step"),
        "SpecServe, true times": lambda: SpecServe(known, max_length=LONGEST),
        "ours: table": lambda: ScheduleTable(table),
        "ours: per step": lambda: SpecServe(known, max_length=LONGEST, slo="token", trim="best"),
    }


POLICIES = (
    "no speculation",
    "static 1",
    "static 3",
    "static 5",
    "confidence stop",
    "SmartSpec",
    "SpecServe as released",
    "SpecServe, SLO test on",
    "SpecServe, true times",
    "ours: table",
    "ours: per step",
)


def our_table(made: Ready, context: float) -> list[int]:
    """The schedule of best goodput at a mean context, under the rules of `servecast speculate`: three lengths, four
    segments, edges at captured sizes that gain 0.2 %, within the TPOT limit.

    It is given the simulator's own step times, the mean of its acceptance and the trace's mean context: what is
    compared is policies, not calibrations.
    """
    system = made.system
    batches, lengths = np.arange(1, MAX_NUM_SEQS + 1), np.arange(LONGEST + 1)
    survival = depth_decay_survival(system.first_acceptance, system.decay, LONGEST)
    tokens = np.concatenate([[1.0], 1.0 + np.cumsum(survival)])
    step = step_seconds(made.cost, batches[:, np.newaxis], lengths, context, armed=True)
    limit = next(one.limit_s for one in system.slo if one.metric == "tpot")
    weights = 1.0 / batches
    problem = DraftLengthProblem(
        batches=batches,
        goodput=batches[:, np.newaxis] * tokens / step,
        weights=weights,
        feasible=step / tokens <= limit,
        violation=np.maximum(step / tokens / limit - 1.0, 0.0),
        max_lengths=3,
        max_segments=4,
        switch_cost=EDGE_WORTH * float(weights.sum()),
        edges=np.isin(batches[:-1], GRAPH_SIZES),
    )
    return [int(one) for one in solve_draft_length(problem).lengths]


def opened(name: str, data: Path) -> Trace:
    """The first requests of a public trace, stamps spread over the grid they were rounded to."""
    trace = read_trace(data.joinpath(*TRACES[name]))
    trace = replace(trace, t_s=settled_stamps(trace.t_s)[0])
    count = min(REQUESTS[name], len(trace.t_s))
    blocks = None if trace.prefix_blocks is None else trace.prefix_blocks[:count]
    return replace(
        trace, t_s=trace.t_s[:count], n_in=trace.n_in[:count], n_out=trace.n_out[:count], prefix_blocks=blocks
    )


def capacity_rps(made: Ready, trace: Trace) -> float:
    """Completions per second of one replica without speculation at its full batch."""
    one = deployment(made.system.model, made.system.gpu, "vllm", tp=made.system.tp)
    curves = service_curves(load_profile(SHIPPED), [one], "vllm", workload_from_trace(trace), max_batch=MAX_NUM_SEQS)
    held = max(min(int(curves.kv_batch[0]), MAX_NUM_SEQS), 1)
    return float(curves.completion_rps[0, :held].max())


def run(system: str, trace_name: str, share: float, policy: str, data: Path) -> Result:
    """One policy on one trace at one rate."""
    made, trace = ready(system), opened(trace_name, data)
    span = float(trace.t_s[-1] - trace.t_s[0])
    rate = share * capacity_rps(made, trace)
    trace = replace(trace, t_s=(trace.t_s - trace.t_s[0]) * ((len(trace.t_s) / span) / rate))
    context = float(trace.n_in.mean() + trace.n_out.mean() / 2.0)
    draws = DrawnAcceptance(
        process=BetaTokens(mean=made.system.first_acceptance, concentration=made.system.concentration),
        seed=7,
        depth_decay=made.system.decay,
        confidence_noise=0.5,
    )
    steps = TabulatedSpeculation(made.cost, made.prompts, armed=policy != "no speculation")
    rows = simulate_speculative(
        trace,
        steps,
        made.limits,
        draws,
        policies(made, our_table(made, context))[policy],
        num_speculative_tokens=0 if policy == "no speculation" else LONGEST,
        slo_s=next(one.limit_s for one in made.system.slo if one.metric == "tpot"),
    )
    tpot, ttft, e2e = (latencies(rows, name) for name in ("tpot", "ttft", "e2e"))
    found = summary(rows, made.system.slo)
    rounds = max(int(rows.rounds.sum()), 1)
    return Result(
        system=system,
        trace=trace_name,
        share=share,
        rate_rps=rate,
        policy=policy,
        tpot_mean_s=float(np.nanmean(tpot)),
        tpot_p99_s=float(np.nanquantile(tpot, 0.99)),
        ttft_p99_s=float(np.nanquantile(ttft, 0.99)),
        e2e_mean_s=float(np.nanmean(e2e)),
        e2e_p99_s=float(np.nanquantile(e2e, 0.99)),
        slo_attainment=found.slo_attainment,
        tokens_per_round=1.0 + float(rows.accepted.sum()) / rounds,
        mean_length=float(rows.drafted.sum()) / rounds,
    )


def compare(
    data: Path,
    *,
    systems: Iterable[str] = tuple(SYSTEMS),
    traces: Iterable[str] = tuple(TRACES),
    shares: Iterable[float] = SHARES,
    jobs: int = -1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Every policy everywhere, `jobs` at a time."""
    from joblib import Parallel, delayed

    # under `python -m` this module is __main__, which a worker cannot import
    from servecast.validation.speculation_comparison import run as run_one

    todo = [(s, t, share, p, data) for s in systems for t in traces for share in shares for p in POLICIES]
    found: list[Result] = []
    for result in Parallel(n_jobs=jobs, return_as="generator")(delayed(run_one)(*one) for one in todo):
        found.append(result)
        if progress is not None:
            progress(len(found), len(todo))
    return found


def ratios(results: Sequence[Result]) -> list[dict[str, float | str]]:
    """Per system, trace and rate: how much faster (mean TPOT) than the best of the scripted baselines SpecServe and we
    are, the baselines of the paper being no speculation, static 1, 3, 5 and the confidence stop."""
    scripted = POLICIES[:5]
    found: list[dict[str, float | str]] = []
    keys = dict.fromkeys((one.system, one.trace, one.share) for one in results)
    for system, trace, share in keys:
        here = {one.policy: one for one in results if (one.system, one.trace, one.share) == (system, trace, share)}
        best = min(here[name].tpot_mean_s for name in scripted)
        worst = max(here[name].tpot_mean_s for name in scripted)
        row: dict[str, float | str] = {"system": system, "trace": trace, "share": share}
        for name in POLICIES[5:]:
            row[f"{name} over best"] = best / here[name].tpot_mean_s
            row[f"{name} over worst"] = worst / here[name].tpot_mean_s
        found.append(row)
    return found


def csv_text(results: Iterable[Result]) -> str:
    """Results as a table."""
    out = io.StringIO()
    rows = [asdict(one) for one in results]
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m servecast.validation.speculation_comparison", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public traces")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--system", choices=list(SYSTEMS), action="append")
    parser.add_argument("--trace", choices=list(TRACES), action="append")
    parser.add_argument("--share", type=float, action="append")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)

    def report(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done}/{total}")

    results = compare(
        given.data,
        systems=given.system or tuple(SYSTEMS),
        traces=given.trace or tuple(TRACES),
        shares=given.share or SHARES,
        progress=report,
    )
    if given.out is not None:
        given.out.write_text(csv_text(results))
    if given.json:
        print(json.dumps([asdict(one) for one in results], indent=2))
    else:
        print(csv_text(results), end="")


if __name__ == "__main__":
    main()

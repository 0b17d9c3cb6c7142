"""From a table of decode speeds to a draft-length schedule: limits, weights, rules of the engine, and what it gains.

The schedule is chosen by :mod:`servecast.solvers.draft_length`; here the limits of the service become feasible cells,
the load becomes weights, the engine's habits become rules, and the choice becomes predictions and remarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from servecast.model.prediction import Z90, Prediction
from servecast.model.speculation import request_tpot_quantile
from servecast.solvers.draft_length import (
    EDGE_WORTH,
    DraftLengthProblem,
    DraftLengthSchedule,
    birth_death_occupancy,
    crossing_weights,
    solve_draft_length,
)
from servecast.speculation_answers import BatchForecast, DecodeLimits, Load, ScheduleRules, SpeculationAnswer
from servecast.speculation_tables import SpeedTable

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TIE = 0.01
"""A longer draft is not chosen for a gain below its own uncertainty, nor is more than this share given away for it."""
OCCUPANCY_ROUNDS = 2
"""The batch depends on the schedule and the schedule on the batch: solved in turn so many times."""
CENTRAL = 0.9
"""Share of the time that counts as the operating range."""
RARE = 0.1
"""Weight spread evenly over log B beside a load: a burst meets batches that its mean never does."""


def plan_speculation(
    table: SpeedTable,
    *,
    limits: DecodeLimits | None = None,
    load: Load | None = None,
    rules: ScheduleRules | None = None,
    explain: bool = True,
) -> SpeculationAnswer:
    """The schedule of best goodput within `limits`.

    Weights are those of the load, or uniform in log B without one. Raises ValueError where no batch at all can keep
    the limits, naming the one that is hardest.
    """
    limits, rules = limits or DecodeLimits(), rules or ScheduleRules()
    missed = _violations(table, limits)
    feasible = missed <= 0.0
    shortest = 0 if rules.allow_zero else 1
    if not feasible[..., shortest:].any():
        raise ValueError(_hopeless(table, limits, shortest))
    switching: Floats | float = 0.0
    weights, operating = _uniform(table), rules.operating
    schedule = _solve(table, feasible, missed, weights, switching, operating, rules, explain=load is None and explain)
    for turn in range(OCCUPANCY_ROUNDS if load is not None else 0):
        assert load is not None  # noqa: S101 (the range is empty without one)
        weights, switching, found = _occupancy(table, schedule, load)
        operating = rules.operating or found
        last = turn == OCCUPANCY_ROUNDS - 1
        schedule = _solve(table, feasible, missed, weights, switching, operating, rules, explain=last and explain)
    if not schedule.lengths.size:
        raise ValueError("no schedule keeps the rules: relax max_lengths, max_segments or the operating range")
    best_static = _best_static(schedule, allow_zero=rules.allow_zero)
    by_context = _each_context(table, feasible, missed, weights, rules) if table.contexts.size > 1 else (schedule,)
    over_off = _gain(table, schedule.lengths, weights, table.off_tok_s * table.batches)
    doubt = _off_doubt(table, schedule.lengths, weights)
    answer = SpeculationAnswer(
        table=table,
        schedule=schedule,
        by_context=by_context,
        weights=weights,
        limits=limits,
        load=load,
        feasible=feasible,
        best_static=best_static,
        forecasts=_forecasts(table, schedule, feasible, best_static),
        gain_over_static=_gain(table, schedule.lengths, weights, table.goodput[:, :, best_static]),
        gain_over_off=over_off,
        gain_over_off_lo=(1.0 + over_off) * np.exp(-Z90 * doubt) - 1.0,
        gain_over_off_hi=(1.0 + over_off) * np.exp(Z90 * doubt) - 1.0,
        advice=(),
        warnings=(),
    )
    return replace(answer, advice=_advice(answer), warnings=_warnings(answer))


def _violations(table: SpeedTable, limits: DecodeLimits) -> Floats:
    """[context, batch, length]: by how much the hardest limit is missed, as a share of it; <= 0 where all are kept."""
    worst = np.full(table.tok_s.shape, -np.inf)
    for _, seconds, limit in _limited(table, limits):
        worst = np.maximum(worst, seconds / limit - 1.0)
    return worst


def _limited(table: SpeedTable, limits: DecodeLimits) -> list[tuple[str, Floats, float]]:
    """Name, predicted seconds and limit of everything that is limited."""
    found: list[tuple[str, Floats, float]] = []
    if limits.tpot_mean_s is not None:
        found.append(("tpot_mean", 1.0 / table.tok_s, limits.tpot_mean_s))
    emitted = max(limits.output_tokens - 1.0, 1.0)
    for percentile, limit in limits.tpot_quantiles:
        z = NormalDist().inv_cdf(percentile / 100.0)
        tpot = request_tpot_quantile(table.step_s, emitted, table.tokens, table.variance, z)
        found.append((f"tpot_p{percentile:g}", tpot, limit))
    if limits.step_s is not None:
        found.append(("step", np.where(table.lengths > 0, table.step_s, 0.0), limits.step_s))
    return found


def _hopeless(table: SpeedTable, limits: DecodeLimits, shortest: int) -> str:
    least = [(name, float(seconds[..., shortest:].min()), limit) for name, seconds, limit in _limited(table, limits)]
    name, seconds, limit = max(least, key=lambda one: one[1] / one[2])
    if seconds <= limit:
        return (
            f"limits must be met together at some batch size and draft length, got {', '.join(limits.names)} "
            "that never are"
        )
    return (
        f"{name} must be at least {1e3 * seconds:.3g} ms to be met at any batch size and draft length, "
        f"got {1e3 * limit:.3g} ms"
    )


def _uniform(table: SpeedTable) -> Floats:
    weights = 1.0 / table.batches
    return np.asarray(weights / weights.sum())


def _solve(
    table: SpeedTable,
    feasible: Bools,
    missed: Floats,
    weights: Floats,
    switching: Floats | float,
    operating: tuple[int, int] | None,
    rules: ScheduleRules,
    *,
    explain: bool,
) -> DraftLengthSchedule:
    """All contexts together: the mean over contexts of goodput relative to the best of each context."""
    relative = table.goodput / np.where(feasible, table.goodput, 0.0).max(axis=2, keepdims=True, initial=1e-300)
    hopeless = ~feasible.any(axis=2, keepdims=True)
    relative = np.where(hopeless, table.goodput / table.goodput.max(axis=2, keepdims=True), relative)
    together = relative.mean(axis=0)
    sd = np.sqrt((table.ratio_sd**2).mean(axis=0))
    able = np.asarray(feasible.all(axis=0))
    best = np.where(able.any(axis=1, keepdims=True), np.where(able, together, -np.inf), together).argmax(axis=1)
    sd[np.arange(best.size), best] = 0.0  # what is compared is each length with this one
    problem = DraftLengthProblem(
        batches=table.batches,
        goodput=together,
        sigma=np.minimum(sd, TIE),
        feasible=able,
        violation=np.maximum(missed.max(axis=0), 0.0) if np.isfinite(missed).any() else None,
        weights=weights,
        max_lengths=rules.max_lengths,
        max_segments=rules.max_segments,
        switch_cost=switching + EDGE_WORTH * float(weights.sum()),
        non_increasing=rules.non_increasing,
        edges=_edges(table, rules, best, able),
        protected=operating,
        allow_zero=rules.allow_zero,
        goodput_lo=together * np.exp(-Z90 * sd),
        goodput_hi=together * np.exp(Z90 * sd),
    )
    return solve_draft_length(problem, explain=explain)


def _edges(table: SpeedTable, rules: ScheduleRules, best: NDArray[np.int64], able: Bools) -> Bools:
    """Where the length may change: behind captured sizes, and, where the engine does not pad the batch itself, wherever
    the best length or what keeps the limits changes."""
    edges = np.isin(table.batches[:-1], rules.captured)
    if not rules.captured_only:
        edges |= (best[1:] != best[:-1]) | (able[1:] != able[:-1]).any(axis=1)
    return np.asarray(edges)


def _each_context(
    table: SpeedTable, feasible: Bools, missed: Floats, weights: Floats, rules: ScheduleRules
) -> tuple[DraftLengthSchedule, ...]:
    def only(i: int) -> SpeedTable:
        at = slice(i, i + 1)
        return replace(
            table,
            contexts=table.contexts[at],
            tok_s=table.tok_s[at],
            sd=table.sd[at],
            ratio_sd=table.ratio_sd[at],
            off_tok_s=table.off_tok_s[at],
            off_sd=table.off_sd[at],
        )

    return tuple(
        _solve(only(i), feasible[i : i + 1], missed[i : i + 1], weights, 0.0, rules.operating, rules, explain=False)
        for i in range(table.contexts.size)
    )


def _occupancy(
    table: SpeedTable, schedule: DraftLengthSchedule, load: Load
) -> tuple[Floats, Floats | float, tuple[int, int]]:
    """Weights, switch costs and operating range of a load under a schedule."""
    row = np.arange(table.batches.size)
    goodput = table.goodput[:, row, schedule.lengths].mean(axis=0)
    share = birth_death_occupancy(load.rate_rps, goodput / load.output_tokens)
    busy = share[1:] / share[1:].sum()
    step = table.step_s[:, row, schedule.lengths].mean(axis=0)
    steps = busy / step
    total = np.cumsum(busy)
    low = int(table.batches[np.searchsorted(total, (1.0 - CENTRAL) / 2.0)])
    high = int(table.batches[min(int(np.searchsorted(total, (1.0 + CENTRAL) / 2.0)), row.size - 1)])
    # an edge is crossed upwards as often as downwards; a switch's seconds are a share of the time, as regret is
    switching = 2.0 * load.switch_s * crossing_weights(load.rate_rps, share)
    return (1.0 - RARE) * steps / steps.sum() + RARE * _uniform(table), switching, (low, high)


def _best_static(schedule: DraftLengthSchedule, *, allow_zero: bool) -> int:
    """The feasible length of least mean regret; of none feasible, the one of least regret.

    None longer than all of the schedule: such a length is ahead within its doubt only, and the engine makes no room.
    """
    longest = int(schedule.lengths.max())
    known = [one for one in schedule.static if np.isfinite(one.mean_regret) and one.length <= longest]
    able = [one for one in known if allow_zero or one.length]
    kept = [one for one in able if one.feasible] or able
    return min(kept, key=lambda one: one.mean_regret).length


def _gain(table: SpeedTable, lengths: NDArray[np.int64], weights: Floats, rival: Floats) -> float:
    """Weighted mean over batches and contexts of goodput over the rival's, less 1."""
    row = np.arange(lengths.size)
    return float((weights * (table.goodput[:, row, lengths] / rival).mean(axis=0)).sum() / weights.sum() - 1.0)


def _off_doubt(table: SpeedTable, lengths: NDArray[np.int64], weights: Floats) -> float:
    """Log standard deviation of the goodput over that without speculation, errors of all batches going together."""
    row = np.arange(lengths.size)
    each = np.hypot(table.off_sd, table.sd[:, row, lengths]).mean(axis=0)
    return float(each @ weights / weights.sum())


def shown_batches(schedule: DraftLengthSchedule) -> list[int]:
    """Powers of two and the ends of the segments."""
    last = int(schedule.segments[-1][1])
    powers = [2**i for i in range(int(np.log2(last)) + 1)]
    return sorted({*powers, *(hi for _, hi, _ in schedule.segments), *(lo for lo, _, _ in schedule.segments)})


def _forecasts(
    table: SpeedTable, schedule: DraftLengthSchedule, feasible: Bools, static: int
) -> tuple[BatchForecast, ...]:
    found = []
    steps = table.step_s
    for c, context in enumerate(table.contexts.tolist()):
        for batch in shown_batches(schedule):
            i = batch - 1
            k = int(schedule.lengths[i])
            speed, sd = float(table.tok_s[c, i, k]), float(table.sd[c, i, k])
            lo, hi = speed * np.exp(-Z90 * sd), speed * np.exp(Z90 * sd)
            known = bool(table.calibrated[i, k])
            found.append(
                BatchForecast(
                    batch=batch,
                    context=context,
                    draft_length=k,
                    goodput_tok_s=Prediction(value=batch * speed, lo=batch * lo, hi=batch * hi, calibrated=known),
                    tpot_s=Prediction(value=1.0 / speed, lo=1.0 / hi, hi=1.0 / lo, calibrated=known),
                    step_s=float(steps[c, i, k]),
                    over_static=speed / float(table.tok_s[c, i, static]) - 1.0,
                    over_off=speed / float(table.off_tok_s[c, i]) - 1.0,
                    meets=bool(feasible[c, i, k]),
                )
            )
    return tuple(found)


def _advice(answer: SpeculationAnswer) -> tuple[str, ...]:
    """When to switch speculation off, and whether a schedule is worth its trouble."""
    table, lengths = answer.table, answer.lengths
    said: list[str] = []
    row = np.arange(lengths.size)
    ahead = (table.off_tok_s / table.tok_s[:, row, lengths] - 1.0).mean(axis=0)
    doubt = (table.off_sd**2 + table.ratio_sd[:, row, lengths] ** 2).mean(axis=0) ** 0.5
    if not table.off_known:
        pass  # a speed that no cell shows is no ground for advice
    elif answer.gain_over_off <= 0.0:
        said.append(
            f"switch speculation off: with a drafter goodput is {-answer.gain_over_off:.1%} lower on average over "
            "these batch sizes"
        )
    else:
        faster = np.flatnonzero(ahead > doubt)
        if faster.size:
            at, most = int(table.batches[faster[0]]), float(ahead[faster].max())
            where = f"from batch size {at} on" if faster[-1] == row[-1] else f"at batch sizes around {at}"
            said.append(
                f"{where} a server without a drafter is faster, by {most:.1%} at most: serve peaks that last from "
                "replicas without one"
            )
    # one length that misses limits which the schedule keeps is no substitute, however fast
    kept = answer.feasible[:, :, answer.best_static] | ~answer.feasible[:, row, lengths]
    if len(answer.schedule.segments) > 1 and answer.gain_over_static < TIE and kept.all():
        lost = max(answer.gain_over_static, 0.0)
        said.append(
            f"draft length {answer.best_static} for every batch size loses {lost:.1%} only and needs no schedule"
        )
    return tuple(said)


def _warnings(answer: SpeculationAnswer) -> tuple[str, ...]:
    table, schedule = answer.table, answer.schedule
    said: list[str] = []
    row = np.arange(schedule.lengths.size)
    outside = np.flatnonzero(~table.calibrated[row, schedule.lengths])
    if outside.size:
        low, high = int(table.batches[outside[0]]), int(table.batches[outside[-1]])
        said.append(f"batch sizes {low} to {high} are, at least in part, beyond what was measured: extrapolated")
    if not table.off_known:
        said.append(
            "no cell was measured with speculation off: gains over it are extrapolated, between "
            f"{answer.gain_over_off_lo:+.0%} and {answer.gain_over_off_hi:+.0%}; measure draft_length 0"
        )
    if not table.steps_known and (answer.limits.step_s is not None or answer.limits.tpot_quantiles):
        said.append(
            "limits on steps and on quantiles rest on what drafters usually accept: no cell has draft_length 0 or a "
            "mean_acceptance_length; measure one"
        )
    if schedule.infeasible_batches:
        first, last = schedule.infeasible_batches[0], schedule.infeasible_batches[-1]
        said.append(
            f"the limits ({', '.join(answer.limits.names)}) are missed at {len(schedule.infeasible_batches)} batch "
            f"sizes between {first} and {last}, whatever the length: cap the batch below {first}"
        )
    if answer.load is not None and answer.weights[-1] > 0.02:
        said.append(
            f"the largest batch holds {answer.weights[-1]:.0%} of the steps: the load is near or above what the engine "
            "can serve"
        )
    return tuple(said)


def compare_methods(answers: Mapping[str, SpeculationAnswer]) -> list[tuple[str, float, Sequence[tuple[int, int]]]]:
    """Of several draft methods, each with its own schedule: name, mean goodput relative to the best method at each
    batch (weights of the first answer), and the runs of batches it wins; best first."""
    sizes = {answer.lengths.size for answer in answers.values()}
    if len(sizes) != 1:
        raise ValueError(f"methods must be planned for the same largest batch, got {sorted(sizes)}")
    names = list(answers)
    row = np.arange(sizes.pop())
    speed = np.array([answers[name].table.tok_s[:, row, answers[name].lengths].mean(axis=0) for name in names])
    weights = answers[names[0]].weights
    relative = (speed / speed.max(axis=0)) @ weights / weights.sum()
    winner = speed.argmax(axis=0)
    found = [(name, float(relative[i]), _runs(winner == i)) for i, name in enumerate(names)]
    return sorted(found, key=lambda one: -one[1])


def _runs(won: Bools) -> list[tuple[int, int]]:
    """Runs of batches, from 1, where `won`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], won, [False]]).astype(np.int8)))
    return [(int(a) + 1, int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]

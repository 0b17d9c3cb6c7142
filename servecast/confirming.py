"""The closed form's best few fleets, replayed on the user's own trace: the simulator has the last word on a plan.

Of each candidate the smallest fleet that holds in the simulator is looked for from the closed form's number on: a
larger batch limit first where it does not hold, then more replicas; then one replica less at a time while it still
holds. The cheapest of these is the plan; one replica fewer is shown to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.slo import Slo
from servecast.model.workload import Trace
from servecast.planning import Answer
from servecast.simulating import Simulated, simulate_fleet
from servecast.solvers.capacity import resized
from servecast.solvers.capacity_outcome import risk_warning
from servecast.solvers.results import Candidate, Confirmation, Replay
from servecast.validation.metrics import latencies, percentile
from servecast.validation.simulator import Router

MOST_GROWTH = 8
"""Times the closed form's replicas beyond which a candidate is given up."""

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Sized:
    """The smallest fleet of a candidate that holds, and the next smaller one."""

    best: Replay
    fewer: Replay | None


def confirm(
    answer: Answer,
    trace: Trace,
    *,
    candidates: int = 2,
    router: Router = "round_robin",
    seed: int = 1,
    profile: str = SHIPPED,
    progress: Report | None = None,
) -> Answer:
    """The answer with its plan replayed on `trace`, resized where the simulator disagrees.

    Parameters
    ----------
    candidates : how many deployments are replayed, the closed form's cheapest first.
    router, seed : of the simulator.
    profile : the one that the answer was made with.

    Notes
    -----
    Where no candidate holds within its limits, the closed form's plan stays, and a warning says what the simulator saw.
    A `rate_scale` of the answer plays the trace that many times as fast; the closed form takes so many independent
    services of its kind instead, which is burstier at the scale of a minute.
    """
    first = answer.plan.plan
    if first is None:
        return answer
    tried = _distinct((first, *answer.plan.alternatives))[:candidates]
    sized: list[tuple[Candidate, _Sized]] = []
    cheapest = float("inf")
    for number, one in enumerate(tried):
        if progress is not None:
            progress(number, len(tried))
        if _price(one) * _least(one) >= cheapest:
            continue
        one, runs = _widened(answer, trace, one, router, seed, profile)
        found = _size(runs, one, cheapest)
        sized.append((one, found))
        if found.best.holds:
            cheapest = min(cheapest, found.best.usd_per_hour)
    if progress is not None:
        progress(len(tried), len(tried))
    holding = [pair for pair in sized if pair[1].best.holds]
    chosen, size = min(holding, key=lambda pair: pair[1].best.usd_per_hour) if holding else sized[0]
    confirmation = Confirmation(
        router=router,
        seed=seed,
        plan=size.best,
        one_fewer=size.fewer,
        closed_form=first.name,
        others=tuple(other.best for one, other in sized if one is not chosen),
    )
    return _answered(answer, chosen, confirmation, profile)


def _answered(answer: Answer, chosen: Candidate, found: Confirmation, profile: str) -> Answer:
    first, named = answer.plan.plan, answer.plan
    if first is not None and (chosen != first or found.plan.replicas != first.replicas):
        # curve, warnings and binding limit are those of one fleet: the one that is named now
        other = resized(
            load_profile(profile), answer.request, chosen, found.plan.replicas, load_curve=bool(named.load_curve)
        )
        named = replace(named, plan=other.plan, binds=other.binds, load_curve=other.load_curve, warnings=other.warnings)
    plan, warnings, binds, alternatives = named.plan, list(named.warnings), named.binds, named.alternatives
    if first is None or plan is None:
        return answer
    warnings += [one for one in risk_warning(plan, alternatives, answer.request.slos) if one not in warnings]
    if not found.plan.holds:
        warnings.append(
            f"the simulator does not confirm {found.plan.name}: {found.plan.missed}; no candidate replayed holds"
        )
    elif found.one_fewer is not None:
        binds = f"{found.one_fewer.missed} with {found.one_fewer.replicas} replicas, replayed on the trace"
    if (plan.name, plan.max_num_seqs) != (first.name, first.max_num_seqs):
        warnings.append(
            f"the closed form alone would name {first.name} with batch limit {first.max_num_seqs}; the simulator names "
            f"{plan.name} with {plan.max_num_seqs}"
        )
        alternatives = (first, *(one for one in alternatives if one.name != plan.name))
    return replace(
        answer,
        plan=replace(named, binds=binds, alternatives=alternatives, warnings=tuple(warnings)),
        simulated=found,
    )


def _distinct(found: Sequence[Candidate]) -> list[Candidate]:
    """The smallest fleet of every deployment, by cost."""
    smallest: dict[tuple[str, int, int], Candidate] = {}
    for one in sorted(found, key=lambda one: one.usd_per_hour):
        smallest.setdefault((one.gpu, one.tp, one.pp), one)
    head = found[0]
    return [head, *(one for key, one in smallest.items() if key != (head.gpu, head.tp, head.pp))]


def _price(one: Candidate) -> float:
    """Of one replica. [USD/h]"""
    return one.usd_per_hour / one.replicas


def _least(one: Candidate) -> int:
    """Fewest replicas that could carry the mean rate."""
    return max(int(one.utilisation * one.replicas), 1)


class _Runs:
    """Simulations of one candidate by number of replicas, each made once."""

    def __init__(self, answer: Answer, trace: Trace, one: Candidate, router: Router, seed: int, profile: str) -> None:
        self._answer, self._trace, self._one = answer, trace, one
        self._router, self._seed, self._profile = router, seed, profile
        self._made: dict[int, Replay] = {}
        offer = next(offer for offer in answer.request.offers if offer.gpu.name == one.gpu)
        self._gpu = offer.gpu
        room = answer.request.max_replicas if offer.limit is None else offer.limit // (one.tp * one.pp)
        self.most = min(room, answer.request.max_replicas, one.replicas * MOST_GROWTH)

    def __call__(self, replicas: int) -> Replay:
        if replicas not in self._made:
            self._made[replicas] = self._replayed(replicas)
        return self._made[replicas]

    def _replayed(self, replicas: int) -> Replay:
        one, answer = self._one, self._answer
        run = simulate_fleet(
            self._trace,
            answer.request.llm,
            self._gpu,
            replicas=replicas,
            tp=one.tp,
            pp=one.pp,
            engine=f"{answer.request.engine}@{answer.engine_version}",
            precision=answer.precision,
            kv_precision=answer.kv_precision,
            max_num_seqs=one.max_num_seqs,
            max_num_batched_tokens=max(one.max_num_batched_tokens, one.max_num_seqs),
            router=self._router,
            prefix_caching=False,
            rate_scale=answer.rate_scale,
            seed=self._seed,
            slos=answer.request.slos,
            profile=self._profile,
        )
        return _replay(run, replace(one, replicas=replicas), _price(one) * replicas, answer.request.slos)


def _widened(
    answer: Answer, trace: Trace, one: Candidate, router: Router, seed: int, profile: str
) -> tuple[Candidate, _Runs]:
    """The candidate, or where it does not hold the same fleet with the least larger batch limit that does."""
    runs = _Runs(answer, trace, one, router, seed, profile)
    if runs(one.replicas).holds:
        return one, runs
    for cap in sorted(cap for cap in answer.request.caps if cap > one.max_num_seqs):
        wider = replace(one, max_num_seqs=cap)
        tried = _Runs(answer, trace, wider, router, seed, profile)
        if tried(one.replicas).holds:
            return wider, tried
    return one, runs


def _replay(run: Simulated, one: Candidate, usd_per_hour: float, slos: Sequence[Slo]) -> Replay:
    found = run.summary
    short = {slo: slo.percentile / 100.0 - found.attainment[slo.name] for slo in slos}
    missed = [slo for slo in slos if short[slo] > 0.0]
    reason = ""
    if missed:
        worst = max(missed, key=lambda slo: short[slo])
        reached = percentile(latencies(run.rows, worst.metric), worst.percentile)
        reason = f"{worst.name} reaches {reached:.3g} s, limit {worst.limit_s:g} s"
    return Replay(
        name=one.name,
        replicas=one.replicas,
        usd_per_hour=usd_per_hour,
        ttft_p50_s=found.percentiles["ttft"][50.0],
        ttft_p99_s=found.percentiles["ttft"][99.0],
        tpot_p50_s=found.percentiles["tpot"][50.0],
        tpot_p99_s=found.percentiles["tpot"][99.0],
        attainment=dict(found.attainment),
        slo_attainment=found.slo_attainment,
        refused=found.refused,
        preemptions=found.preemptions,
        holds=not missed,
        missed=reason,
    )


def _size(runs: _Runs, one: Candidate, cheapest: float) -> _Sized:
    """Smallest fleet that holds and costs less than `cheapest`; the largest tried where none does."""
    high = one.replicas
    while not runs(high).holds and high < runs.most:
        if _price(one) * (high + 1) >= cheapest:
            break
        high = min(max(high + 1, high * 5 // 4), runs.most)
    if not runs(high).holds:
        return _Sized(runs(high), None)
    low = high
    while low > 1 and runs(low - 1).holds:
        low -= 1
    return _Sized(runs(low), runs(low - 1) if low > 1 else None)

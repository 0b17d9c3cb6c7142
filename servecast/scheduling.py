r"""Capacity over time from Python: a trace and a deployment in, replicas per window out, as record, JSON and CSV.

The trace is cut into windows. In each, the *required* fleet is the smallest whose predicted attainment meets every
objective at the window's own steady rate; it must also be able to serve that rate, so that no window leaves a backlog
to the next. Burstiness within a window is the index of dispersion of short counts around *their window's* rate (what
varies from window to window is in the rates, and must not be counted twice). Prompt and output lengths are those of
the whole trace. :mod:`servecast.solvers.schedule` then finds the cheapest fleet over time.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.arrivals import scaled, settled_stamps, window_rates, workload_from_trace
from servecast.model.attainment import (
    Fleet,
    Systems,
    attainment,
    fleets,
    joint_attainment,
    rate_windows,
    solve_systems,
)
from servecast.model.deployment import Deployment
from servecast.model.hardware import Offer
from servecast.model.llm import Llm
from servecast.model.service import ServiceCurves, service_curves
from servecast.model.slo import Slo
from servecast.model.workload import Trace, Workload
from servecast.planning import Answer, plan
from servecast.solvers.results import Candidate, Status
from servecast.solvers.schedule import ReplicaSchedule, ScheduleProblem, solve_schedule

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

RESULT_SCHEMA = "servecast.schedule-result/1"
"""Name and major version of the JSON that a schedule is printed as."""
CSV_COLUMNS = ("start_s", "rate_rps", "required", "replicas", "ordered", "stopped")
SHORT_WINDOWS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0)
"""Counts that burstiness within a window is read from, where five of them fit. [s]"""
LEAST_WINDOW_S = 5.0
SHORT_PER_WINDOW = 5
FEWEST_WINDOWS = 3
FORECAST_SPAN_S = 1800.0
"""Windows this near to each other vary by chance; a quantile forecast takes them together. [s]"""
FIRST_TRY = 8
STAYS_PER_WINDOW = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleAnswer:
    """A schedule with what it was asked."""

    schedule: ReplicaSchedule
    problem: ScheduleProblem
    rates_rps: Floats
    """As counted, times the rate scale; per window. [1/s]"""
    planned_rps: Floats
    """What the fleet is sized for: the same, or a quantile of them."""
    slo_attainment: float
    """Predicted share of requests that meet every limit, at the counted rates. [-]"""
    instance: Candidate
    """Engine instance that is scheduled; its own number of replicas is that of a constant fleet."""
    llm: Llm
    engine: str
    """With version."""
    slos: tuple[Slo, ...]
    trace: str
    forecast: str | float
    profile: str
    warnings: tuple[str, ...]


def plan_schedule(
    trace: Trace,
    llm: Llm,
    offers: Sequence[Offer],
    slos: Sequence[Slo],
    *,
    window_s: float,
    lead_time_s: float,
    min_dwell_s: float,
    start_usd: float = 0.0,
    min_replicas: int = 1,
    max_replicas: int = 1000,
    forecast: str | float = "known",
    rate_scale: float = 1.0,
    tp: int | None = None,
    pp: int | None = None,
    max_num_seqs: int | None = None,
    engine: str = "vllm",
    engine_version: str | None = None,
    precision: str = "auto",
    kv_precision: str = "auto",
    profile: str = SHIPPED,
) -> ScheduleAnswer:
    """Cheapest number of replicas over the time of `trace` that meets the limits in every window.

    Parameters
    ----------
    offers : GPUs with their price. Of several, or without `tp`, `pp`, `max_num_seqs`, the engine instance is the one
        with the cheapest schedule among the plan and the alternatives of :func:`servecast.plan`.
    slos : percentile limits, each to be met in every window.
    window_s : the fleet is constant within a window; at least 5 s, and three must fit into the trace. [s]
    lead_time_s : from the order of a replica to its first request, paid. [s]
    min_dwell_s : from a rise of the fleet to its next fall. [s]
    start_usd : price of a start beside its lead time. [USD]
    min_replicas : serving even where no request comes.
    forecast : ``known`` sizes each window for its counted rate, as if it were known a lead time ahead; a number in
        (0, 1) for that quantile of the rates within a quarter of an hour before and after.
    rate_scale : schedule for this multiple of the trace's rate. [-]

    Raises
    ------
    ValueError : a malformed request, or an engine instance that no number of replicas makes fast enough. A window
        that needs more than `max_replicas` is an answer with status ``infeasible``.
    """
    _check(trace, window_s, min_replicas, max_replicas, forecast, rate_scale)
    workload = scaled(workload_from_trace(trace), rate_scale)
    answer = plan(
        workload,
        llm,
        # the limit of the only offer is the schedule's own, which names the window that exceeds it
        [replace(offers[0], limit=None)] if len(offers) == 1 else offers,
        slos,
        engine=engine,
        engine_version=engine_version,
        precision=precision,
        kv_precision=kv_precision,
        tp=None if tp is None else (tp,),
        pp=None if pp is None else (pp,),
        max_num_seqs=None if max_num_seqs is None else (max_num_seqs,),
        profile=profile,
        load_curve=False,
    )
    if answer.plan.plan is None:
        raise ValueError(f"no schedule meets the request: {answer.plan.binds}")
    stamps = settled_stamps(trace.t_s)[0]
    rates = window_rates(stamps, window_s) * rate_scale
    planned = _forecast(rates, window_s, forecast)
    idc = within_window_idc(stamps, window_s)
    cases = []
    for one, offer, most in _instances(answer, offers, max_replicas):
        replica = _replica(answer, one, offer, workload, idc, window_s, profile)
        problem = ScheduleProblem(
            window_s=window_s,
            required=np.maximum(replica.fewest(planned, slos, most), min_replicas),
            usd_per_replica_hour=offer.usd_per_hour * one.tp * one.pp,
            max_replicas=most,
            lead_time_s=lead_time_s,
            min_dwell_s=min_dwell_s,
            start_usd=start_usd,
        )
        cases.append(_Case(instance=one, replica=replica, problem=problem))
    case, schedule = _cheapest(cases, planned, slos, min_replicas)
    feasible = schedule.status is Status.OPTIMAL
    return ScheduleAnswer(
        schedule=schedule,
        problem=case.problem,
        rates_rps=rates,
        planned_rps=planned,
        slo_attainment=case.replica.attained(rates, schedule.replicas, slos) if feasible else math.nan,
        instance=case.instance,
        llm=llm,
        engine=f"{answer.request.engine}@{answer.engine_version}",
        slos=tuple(slos),
        trace=trace.name,
        forecast=forecast,
        profile=answer.profile,
        warnings=_warnings(trace, workload, case.instance, case.problem),
    )


def within_window_idc(t_s: ArrayLike, window_s: float) -> tuple[tuple[float, float], ...]:
    """Index of dispersion of short counts around the mean of the window that they lie in.

    Parameters
    ----------
    t_s : arrivals, from 0, non-decreasing. [s]
    window_s : at least 5 s; incomplete windows are left out. [s]

    Returns
    -------
    (short window [s], IDC) pairs: within-window variances (of the sample, n - 1) summed over windows, over summed
    means. 1 for Poisson arrivals, whatever their rate does from window to window.

    >>> dict(within_window_idc([0.5, 1.5, 2.5, 3.5, 4.5, 5.1, 5.2, 5.3, 5.4, 5.5, 10.0], 5.0))[1.0]
    2.5
    """
    t = np.asarray(t_s, dtype=np.float64)
    whole = int(t[-1] // window_s)
    window = np.floor(t / window_s).astype(np.int64)
    found = []
    for short_s in SHORT_WINDOWS_S:
        parts = int(window_s // short_s)
        if parts < SHORT_PER_WINDOW:
            break
        part = np.floor((t - window * window_s) / short_s).astype(np.int64)
        kept = (window < whole) & (part < parts)
        place = window[kept] * parts + part[kept]
        # only occupied short windows are held: a week has sixty million of a hundredth of a second
        starts = np.flatnonzero(np.diff(place, prepend=-1))
        counts = np.diff(np.append(starts, place.size)).astype(np.float64)
        totals = np.bincount(window[kept], minlength=whole)
        variance = (counts @ counts - totals @ (totals / parts)) / (parts - 1)
        found.append((short_s, float(variance * parts / totals.sum())))
    return tuple(found)


def schedule_document(answer: ScheduleAnswer) -> dict[str, Any]:
    """The answer as the documented JSON object (docs/json.md); seconds, US dollars, shares."""
    found, problem, one = answer.schedule, answer.problem, answer.instance
    return {
        "schema": RESULT_SCHEMA,
        "status": str(found.status),
        "model": answer.llm.name,
        "engine": answer.engine,
        "replica": {
            "gpu": one.gpu,
            "tp": one.tp,
            "pp": one.pp,
            "max_num_seqs": one.max_num_seqs,
            "usd_per_hour": problem.usd_per_replica_hour,
        },
        "window_s": problem.window_s,
        "lead_time_s": problem.lead_time_s,
        "min_dwell_s": problem.min_dwell_s,
        "start_usd": problem.start_usd,
        "max_replicas": problem.max_replicas,
        "forecast": answer.forecast,
        "cost_usd": found.cost_usd,
        "always_peak_usd": found.always_peak_usd,
        "saving": found.saving,
        "lower_bound_usd": found.lower_bound_usd,
        "slo_attainment": answer.slo_attainment,
        "binds": found.binds,
        "windows": [dict(zip(CSV_COLUMNS, row, strict=True)) for row in _rows(answer)],
        "trace": answer.trace,
        "slo": [{"name": slo.name, "limit_s": slo.limit_s} for slo in answer.slos],
        "warnings": list(answer.warnings),
        "profile": answer.profile,
        "solver": {"gap": found.gap},
    }


def schedule_csv(answer: ScheduleAnswer) -> str:
    """One line per window, with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_rows(answer))
    return text.getvalue()


def _rows(answer: ScheduleAnswer) -> list[tuple[float, float, int, int, int, int]]:
    found, window_s = answer.schedule, answer.problem.window_s
    if found.status is not Status.OPTIMAL:
        return []
    columns = (answer.rates_rps, answer.problem.required, found.replicas, found.ordered, found.stopped)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(w * window_s, *row) for w, row in enumerate(rows)]


# ---- what a window needs -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replica:
    """One engine instance, its curves, and arrivals as bursty as they are within a window."""

    curves: ServiceCurves
    cap: int
    workload: Workload
    window_s: float

    @property
    def capacity_rps(self) -> float:
        return float(self.curves.completion_rps[0, self.cap - 1])

    def systems(self, most: int) -> Systems:
        """Queue of one replica in fleets of 1 to `most`: fewer share the bursts among them."""
        return solve_systems(
            self.curves,
            np.zeros(most, dtype=np.intp),
            np.full(most, self.cap, dtype=np.int64),
            self.workload,
            np.arange(1, most + 1),
        )

    def fewest(self, rates: Floats, slos: Sequence[Slo], most: int) -> Counts:
        """Smallest fleet of each window that meets every limit; most + 1 where none does, 0 where no request comes."""
        distinct, place = np.unique(rates, return_inverse=True)
        found = np.zeros(len(distinct), dtype=np.int64)
        busy = distinct > 0.0
        # strictly more than the rate needs: what is left over would wait for the next window
        least = np.floor(distinct[busy] / self.capacity_rps).astype(np.int64) + 1
        known = min(most, max(FIRST_TRY, 2 * int(least.max(initial=0))))
        while True:
            found[busy] = self._bisect(self.systems(known), distinct[busy], np.minimum(least, known + 1), slos, known)
            if known == most or found.max() <= known:
                break
            known = min(most, 2 * known)
        return found[place]

    def _bisect(self, systems: Systems, rates: Floats, least: Counts, slos: Sequence[Slo], known: int) -> Counts:
        low, high = least - 1, np.full(len(rates), known + 1)
        open_ones = np.flatnonzero(high - low > 1)
        while len(open_ones):
            middle = (low[open_ones] + high[open_ones]) // 2
            met = self._meets(systems, rates[open_ones], middle, slos)
            high[open_ones[met]], low[open_ones[~met]] = middle[met], middle[~met]
            open_ones = open_ones[(high - low)[open_ones] > 1]
        return high

    def _meets(self, systems: Systems, rates: Floats, counts: Counts, slos: Sequence[Slo]) -> NDArray[np.bool_]:
        fleet, good = self._fleets(systems, rates, counts), np.ones(len(rates), dtype=bool)
        for slo in slos:
            good &= attainment(fleet, slo.metric, slo.limit_s) >= slo.percentile / 100.0
        return good

    def share_within(self, systems: Systems, rate: float, count: int, slo: Slo) -> float:
        """Attainment of one limit by a fleet of `count` at `rate`."""
        fleet = self._fleets(systems, np.array([rate]), np.array([count]))
        return float(attainment(fleet, slo.metric, slo.limit_s)[0])

    def _fleets(self, systems: Systems, rates: Floats, counts: Counts) -> Fleet:
        """Fleets of `counts`, each in a single window of its own rate."""
        one = rate_windows(replace(self.workload, windows=((self.window_s, np.ones(1)),)), 0.0)
        return fleets(systems, one, (counts - 1).astype(np.intp), counts, load=rates)

    def attained(self, rates: Floats, replicas: Counts, slos: Sequence[Slo]) -> float:
        """Share of all requests that meet every limit, the windows weighted by their requests. [-]"""
        busy = rates > 0.0
        fleet = self._fleets(self.systems(int(replicas.max())), rates[busy], replicas[busy])
        met = joint_attainment(fleet, slos)
        return float(met @ rates[busy] / rates[busy].sum())


def _replica(
    answer: Answer,
    one: Candidate,
    offer: Offer,
    workload: Workload,
    idc: tuple[tuple[float, float], ...],
    window_s: float,
    profile: str,
) -> _Replica:
    request = answer.request
    deployment = Deployment(
        llm=request.llm,
        gpu=offer.gpu,
        trunk_format=request.trunk_format,
        expert_format=request.expert_format,
        kv_format=one.kv_format,
        tp=one.tp,
        pp=one.pp,
    )
    short, long = (tuple(pair for pair in idc if (pair[0] < 1.0) is below) for below in (True, False))
    steady = replace(workload, arrivals=replace(workload.arrivals, idc=long, short_idc=short))
    curves = service_curves(load_profile(profile), [deployment], request.engine, steady, max_batch=one.max_num_seqs)
    return _Replica(curves=curves, cap=one.max_num_seqs, workload=steady, window_s=window_s)


def _instances(answer: Answer, offers: Sequence[Offer], max_replicas: int) -> list[tuple[Candidate, Offer, int]]:
    """Engine instances of the plan and its alternatives, each once, with the most replicas that there may be."""
    found: dict[tuple[str, int, int, int], tuple[Candidate, Offer, int]] = {}
    short = ""
    for one in (answer.plan.plan, *answer.plan.alternatives):
        if one is None:
            continue
        offer = next(offer for offer in offers if offer.gpu.name == one.gpu)
        gpus = one.tp * one.pp
        most = max_replicas if offer.limit is None else min(max_replicas, offer.limit // gpus)
        if most >= 1:
            found.setdefault((one.gpu, one.tp, one.pp, one.max_num_seqs), (one, offer, most))
        else:
            short = f"one replica is {gpus} GPUs (tp{one.tp} pp{one.pp}), {offer.limit} of {one.gpu} are on offer"
    if not found:
        raise ValueError(f"no schedule meets the request: count: {short}")
    return list(found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One engine instance and the problem that its required fleets pose."""

    instance: Candidate
    replica: _Replica
    problem: ScheduleProblem

    @property
    def feasible(self) -> bool:
        return int(self.problem.required.max()) <= self.problem.max_replicas

    @property
    def bound_usd(self) -> float:
        return float(self.problem.required.sum()) * self.problem.usd_per_window

    @property
    def always_peak_usd(self) -> float:
        return float(self.problem.required.max()) * len(self.problem.required) * self.problem.usd_per_window


def _cheapest(
    cases: Sequence[_Case], rates: Floats, slos: Sequence[Slo], min_replicas: int
) -> tuple[_Case, ReplicaSchedule]:
    """The cheapest schedule of any instance, beside the cheapest fleet of peak size of any."""
    usable = sorted((case for case in cases if case.feasible), key=lambda case: case.bound_usd)
    if not usable:
        case = cases[0]
        binds = _out_of_reach(case.replica, rates, slos, case.problem, min_replicas)
        return case, replace(solve_schedule(case.problem), binds=binds)
    best: tuple[_Case, ReplicaSchedule] | None = None
    for case in usable:
        if best is not None and case.bound_usd >= best[1].cost_usd:
            break
        schedule = solve_schedule(case.problem)
        if best is None or schedule.cost_usd < best[1].cost_usd:
            best = case, schedule
    assert best is not None  # noqa: S101 (usable is not empty)
    case, schedule = best
    always = min(one.always_peak_usd for one in usable)
    saving = 1.0 - schedule.cost_usd / always if always > 0.0 else 0.0
    return case, replace(schedule, always_peak_usd=always, saving=saving)


def _out_of_reach(
    replica: _Replica, rates: Floats, slos: Sequence[Slo], problem: ScheduleProblem, min_replicas: int
) -> str:
    """Name the first window that the largest fleet does not serve, and the limit that it misses by most."""
    most, w = problem.max_replicas, int(np.argmax(problem.required > problem.max_replicas))
    if min_replicas > most:
        return f"count: {min_replicas} replicas are to serve at any time, there may be {most}"
    where = f"window {w} (from {w * problem.window_s:g} s, {rates[w]:.4g} requests/s)"
    if most * replica.capacity_rps <= rates[w]:
        return f"count: {where} exceeds the {most * replica.capacity_rps:.4g} requests/s of {most} replicas"
    systems = replica.systems(most)
    met = {slo: replica.share_within(systems, float(rates[w]), most, slo) for slo in slos}
    worst = min(met, key=lambda slo: met[slo] - slo.percentile / 100.0)
    return (
        f"count: {where} needs more than {most} replicas; with them {met[worst]:.4g} of its requests meet "
        f"{worst.name} <= {worst.limit_s:g} s"
    )


# ---- the trace -----------------------------------------------------------------------------------------


def _check(
    trace: Trace, window_s: float, min_replicas: int, max_replicas: int, forecast: str | float, rate_scale: float
) -> None:
    if not LEAST_WINDOW_S <= window_s < math.inf:
        raise ValueError(f"window_s must be at least {LEAST_WINDOW_S:g} s and finite, got {window_s!r}")
    span = float(trace.t_s[-1])
    if span < FEWEST_WINDOWS * window_s:
        raise ValueError(f"trace must span at least {FEWEST_WINDOWS} windows of {window_s:g} s, got {span:g} s")
    if not 0.0 < rate_scale < math.inf:
        raise ValueError(f"rate_scale must be > 0 and finite, got {rate_scale!r}")
    if min_replicas < 0:
        raise ValueError(f"min_replicas must be >= 0, got {min_replicas}")
    if max_replicas < 1:
        raise ValueError(f"max_replicas must be at least 1, got {max_replicas}")
    known = forecast == "known" if isinstance(forecast, str) else 0.0 < forecast < 1.0
    if not known:
        raise ValueError(f"forecast must be known or a quantile between 0 and 1, got {forecast!r}")


def _forecast(rates: Floats, window_s: float, forecast: str | float) -> Floats:
    """Rates to size for: those given, or a quantile of each window's neighbourhood (a rate that occurred)."""
    if isinstance(forecast, str):
        return rates
    reach = round(FORECAST_SPAN_S / 2.0 / window_s)
    near = (rates[max(w - reach, 0) : w + reach + 1] for w in range(len(rates)))
    return np.array([np.quantile(values, forecast, method="higher") for values in near])


def _warnings(trace: Trace, workload: Workload, one: Candidate, problem: ScheduleProblem) -> tuple[str, ...]:
    found = [text for text in workload.warnings if "gaps are zero" in text]
    if not one.calibrated:
        found.append(f"no server run of this kind on {one.gpu} is in the profile: intervals of an unseen GPU type")
    stay = one.ttft_p50_s.value + one.tpot_p50_s.value * workload.mean_out
    if problem.window_s < STAYS_PER_WINDOW * stay:
        found.append(
            f"a typical request stays {stay:.2g} s, longer than a fifth of the {problem.window_s:g} s windows: fleets "
            "are sized as if each window reached its steady state"
        )
    if problem.first_rise >= len(problem.required):
        found.append(f"nothing ordered within the {trace.t_s[-1]:.4g} s of the trace would serve in it")
    return tuple(found)

"""A plan as text for a terminal; programs read ``--json``."""

from __future__ import annotations

from servecast.model.prediction import Prediction
from servecast.planning import Answer
from servecast.solvers.results import Candidate, Confirmation


def seconds(value: float) -> str:
    """Milliseconds below one second, else seconds, three digits.

    >>> seconds(0.0123), seconds(2.5)
    ('12.3 ms', '2.5 s')
    """
    return f"{1e3 * value:.3g} ms" if value < 1.0 else f"{value:.3g} s"


def interval(prediction: Prediction) -> str:
    """Value with its 90 % interval."""
    return f"{seconds(prediction.value)} [{seconds(prediction.lo)}, {seconds(prediction.hi)}]"


def plan_text(answer: Answer) -> str:
    """The answer, what to expect, what binds, alternatives."""
    chosen = answer.plan.plan
    if chosen is None:
        return f"infeasible: {answer.plan.binds}"
    request = answer.request
    limits = ", ".join(f"{slo.name} <= {seconds(slo.limit_s)}" for slo in request.slos)
    attained = chosen.slo_attainment
    lines = [
        f"{chosen.name} at {chosen.usd_per_hour:.2f} USD/h serves {request.workload.rate_rps:.3g} requests/s of "
        f"{request.workload.name} within {limits}",
        "",
        f"  model      {request.llm.name} ({chosen.precision} weights, {chosen.kv_format} cache), "
        f"{request.engine} {answer.engine_version}",
        f"  batch      max_num_seqs {chosen.max_num_seqs}, {chosen.running_mean:.1f} running on average",
        f"  TTFT       p50 {interval(chosen.ttft_p50_s)}   p99 {interval(chosen.ttft_p99_s)}",
        f"  TPOT       p50 {interval(chosen.tpot_p50_s)}   p99 {interval(chosen.tpot_p99_s)}",
        f"  attained   {attained.value:.2%} of requests [{attained.lo:.2%}, {attained.hi:.2%}]",
        f"  headroom   {chosen.headroom:.0%} more load to saturation (utilisation {chosen.utilisation:.0%})",
        f"  binds      {answer.plan.binds}",
        f"  profile    {answer.profile}; brackets are 90 % intervals",
        *_arrivals(answer),
        *_simulated(answer.simulated),
        "",
        "  alternatives                      USD/h    TTFT p99    TPOT p99   attained",
    ]
    lines += [_row(one) for one in answer.plan.alternatives]
    lines += [f"warning: {warning}" for warning in answer.plan.warnings]
    return "\n".join(lines)


def _arrivals(answer: Answer) -> list[str]:
    """The arrival model and why, where a trace was fitted."""
    found = answer.arrival_model
    return [] if found is None else [f"  arrivals   {found['reason']}"]


def _simulated(found: Confirmation | None) -> list[str]:
    """The replay under the closed form's figures, and one replica fewer."""
    if found is None:
        return []
    one, fewer = found.plan, found.one_fewer
    verdict = "holds" if one.holds else one.missed
    lines = [
        f"  simulated  TTFT p50 {seconds(one.ttft_p50_s)}, p99 {seconds(one.ttft_p99_s)}; TPOT p50 "
        f"{seconds(one.tpot_p50_s)}, p99 {seconds(one.tpot_p99_s)}; {one.slo_attainment:.2%} attained: {verdict}"
    ]
    if fewer is not None:
        lines.append(
            f"             with {fewer.replicas} replicas: {fewer.slo_attainment:.2%} attained, {fewer.missed}"
        )
    return lines


def _row(one: Candidate) -> str:
    name = f"{one.name}, batch {one.max_num_seqs}"
    return (
        f"  {name:<32} {one.usd_per_hour:>7.2f} {seconds(one.ttft_p99_s.value):>11} "
        f"{seconds(one.tpot_p99_s.value):>11} {one.slo_attainment.value:>10.2%}"
    )

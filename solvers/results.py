"""What a capacity search returns: frozen records that reports, policies and the command line read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from servecast.model.prediction import Prediction


class Status(StrEnum):
    """How a search ended."""

    OPTIMAL = "optimal"
    """The whole space was searched; no cheaper member meets the objectives."""
    INFEASIBLE = "infeasible"
    """No member meets the objectives; `binds` names the bound that cannot be met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to serve the workload, and what it is predicted to do."""

    gpu: str
    tp: int
    pp: int
    replicas: int
    max_num_seqs: int
    max_num_batched_tokens: int
    precision: str
    kv_format: str
    usd_per_hour: float
    """Whole fleet. [USD/h]"""
    ttft_p50_s: Prediction
    ttft_p99_s: Prediction
    tpot_p50_s: Prediction
    tpot_p99_s: Prediction
    slo_attainment: Prediction
    """Share of requests that meet every limit. [-]"""
    utilisation: float
    """Mean rate over the fleet's largest sustainable rate. [-]"""
    utilisation_hi: float
    """With steps and arrivals at the upper ends of their intervals; 1 or more says that the fleet may saturate."""
    headroom: float
    """How much the mean rate can grow before saturation, as a share of it. [-]"""
    running_mean: float
    """Mean sequences in service on one replica."""
    calibrated: bool
    """False where the profile is extrapolated for this GPU or model."""

    @property
    def gpus(self) -> int:
        return self.replicas * self.tp * self.pp

    @property
    def name(self) -> str:
        """For instance ``4 x h200_sxm tp2``: replicas, GPU type, parallel degrees."""
        degrees = f"tp{self.tp}" + (f" pp{self.pp}" if self.pp > 1 else "")
        return f"{self.replicas} x {self.gpu} {degrees}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """The chosen plan at another load."""

    rate_rps: float
    ttft_p99_s: Prediction
    tpot_p99_s: Prediction
    slo_attainment: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPlan:
    """Answer of the capacity search."""

    status: Status
    plan: Candidate | None
    """Cheapest member that meets the objectives; None where infeasible."""
    alternatives: tuple[Candidate, ...]
    """Pareto front of cost against latency first, then the cheapest of the other configurations, by cost."""
    binds: str
    """The constraint that keeps a cheaper plan from being chosen, in words."""
    gap: float
    """Relative distance to the bound; 0 for an exhaustive search. [-]"""
    evaluated: int
    """Members of the search space that were evaluated."""
    load_curve: tuple[LoadPoint, ...]
    """The plan from light load to saturation."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One fleet in the simulator, on the trace itself."""

    name: str
    replicas: int
    usd_per_hour: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    attainment: dict[str, float]
    """Share of requests within each limit, by its name. [-]"""
    slo_attainment: float
    """Share within all limits. [-]"""
    refused: int
    preemptions: int
    holds: bool
    """Every limit's percentile is met."""
    missed: str
    """The limit missed by most, with what was reached; empty where all hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """What the simulator says of the best few candidates; the last word on the plan."""

    router: str
    seed: int
    plan: Replay
    """The fleet that the answer now names."""
    one_fewer: Replay | None
    """The same with one replica less; None where there is one replica alone."""
    closed_form: str
    """Name of the fleet that the closed form alone would have named."""
    others: tuple[Replay, ...]
    """Smallest fleets of the other candidates replayed, or their largest where none holds."""

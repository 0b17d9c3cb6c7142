r"""Largest rate that one replica serves within the limits: the coefficients of the fleet program, from the predictor.

For each engine instance (deployment and batch limit) the rate of a stream with given lengths is raised until a
percentile leaves its limit, by bisection in the load :math:`u = r / \mu_{cap}`, all instances at once. The stream
keeps the workload's pattern in time and its dispersion, thinned to the replica's part. A replica is never loaded above
its capacity, and what a load of 1 % misses is out of reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servecast.model.attainment import (
    Fleet,
    Systems,
    Windows,
    attainment,
    fleets,
    joint_attainment,
    quantile,
    rate_windows,
    solve_systems,
)
from servecast.model.deployment import Deployment
from servecast.model.forecast import Profile
from servecast.model.service import service_curves
from servecast.model.slo import Slo
from servecast.model.workload import Workload
from servecast.solvers.capacity_space import USUAL_STEP_S

Floats = NDArray[np.float64]

LIGHTEST_LOAD = 0.01
HALVINGS = 14
"""Of the range from the lightest load to 1, in its logarithm: the rate is found to 0.03 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRates:
    """What replicas can do with one stream."""

    rates_rps: Floats
    """[deployment, cap]: largest rate within the limits; 0 where there is none. [1/s]"""
    reason: str
    """Why no replica serves the stream, in words; empty where one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixForecast:
    """One replica under a mixed stream at a given rate."""

    met: tuple[float, ...]
    """Share of requests within each limit, in the order of the limits. [-]"""
    slo_attainment: float
    """Share within all of them. [-]"""
    largest_rps: float
    """Rate up to which every limit holds, 0 where none does. [1/s]"""


def replica_rates(
    profile: Profile,
    deployments: Sequence[Deployment],
    engine: str,
    workload: Workload,
    slos: Sequence[Slo],
    caps: Sequence[int],
) -> ReplicaRates:
    """Largest rate of a stream with the workload's lengths on each deployment at each batch limit."""
    rates = np.zeros((len(deployments), len(caps)))
    streams = _streams(profile, deployments, engine, workload, caps)
    if streams is None:
        return ReplicaRates(rates_rps=rates, reason="no GPU type holds the weights and the cache of its longest prompt")
    rates[streams.deployment, streams.cap] = _largest(streams, slos)
    return ReplicaRates(rates_rps=rates, reason="" if rates.any() else _reason(streams, deployments, slos))


def mix_forecast(
    profile: Profile,
    deployment: Deployment,
    engine: str,
    workload: Workload,
    slos: Sequence[Slo],
    cap: int,
    rate_rps: float,
) -> MixForecast:
    """What a replica does with a mixed stream of `rate_rps`; lengths and pattern are the workload's."""
    streams = _streams(profile, [deployment], engine, workload, [cap])
    if streams is None:
        return MixForecast(met=(0.0,) * len(slos), slo_attainment=0.0, largest_rps=0.0)
    fleet = _fleet(streams, np.array([0]), rate_rps / streams.systems.capacity_rps)
    return MixForecast(
        met=tuple(float(attainment(fleet, slo.metric, slo.limit_s)[0]) for slo in slos),
        slo_attainment=float(joint_attainment(fleet, slos)[0]),
        largest_rps=float(_largest(streams, slos)[0]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streams:
    """Solved replicas; rows are pairs of deployment and batch limit."""

    systems: Systems
    windows: Windows
    rate_rps: float
    """Of the whole workload. [1/s]"""
    deployment: NDArray[np.intp]
    cap: NDArray[np.intp]
    """Index into the caps asked for."""


def _streams(
    profile: Profile, deployments: Sequence[Deployment], engine: str, workload: Workload, caps: Sequence[int]
) -> _Streams | None:
    curves = service_curves(profile, deployments, engine, workload, max_batch=max(caps))
    deployment, cap = np.nonzero(np.broadcast_to(curves.kv_batch[:, np.newaxis] > 0, (len(deployments), len(caps))))
    if not len(deployment):
        return None
    # a limit that the cache does not reach is the cache's own
    batch = np.minimum(np.array(caps, dtype=np.int64)[cap], curves.kv_batch[deployment])
    capacity = curves.completion_rps[deployment, batch - 1]
    # arrivals at a replica are thinned to its part, at most all of them
    parts = np.maximum(workload.rate_rps / capacity, 1.0)
    return _Streams(
        systems=solve_systems(curves, deployment, batch, workload, parts),
        windows=rate_windows(workload, USUAL_STEP_S * workload.mean_out),
        rate_rps=workload.rate_rps,
        deployment=deployment,
        cap=cap,
    )


def _fleet(streams: _Streams, rows: NDArray[np.intp], load: Floats) -> Fleet:
    """Replicas at a load each: the workload's rate over theirs is how many there would be.

    One that takes more than the whole stream takes all of it, several times over.
    """
    replicas = streams.rate_rps / (load * streams.systems.capacity_rps[rows])
    whole = np.maximum(replicas, 1.0)
    return fleets(streams.systems, streams.windows, rows, whole, load=whole / replicas)


def _largest(streams: _Streams, slos: Sequence[Slo]) -> Floats:
    """Largest rate of each row, 0 where the lightest load misses a limit. [1/s]"""

    def meets(rows: NDArray[np.intp], load: Floats) -> NDArray[np.bool_]:
        fleet = _fleet(streams, rows, load)
        good = np.ones(len(rows), dtype=bool)
        for slo in slos:
            good &= attainment(fleet, slo.metric, slo.limit_s) >= slo.percentile / 100.0
        return good

    rows = np.arange(len(streams.deployment))
    low, high = np.full(len(rows), LIGHTEST_LOAD), np.ones(len(rows))
    reached = meets(rows, low)
    full = reached & meets(rows, high)
    low[full] = 1.0
    rows = np.flatnonzero(reached & ~full)
    for _ in range(HALVINGS if len(rows) else 0):
        middle = np.sqrt(low[rows] * high[rows])
        good = meets(rows, middle)
        low[rows[good]], high[rows[~good]] = middle[good], middle[~good]
    return np.where(reached, low * streams.systems.capacity_rps, 0.0)


def _reason(streams: _Streams, deployments: Sequence[Deployment], slos: Sequence[Slo]) -> str:
    """Which limit no replica meets even at the lightest load, and the best that is reached."""
    rows = np.arange(len(streams.deployment))
    fleet = _fleet(streams, rows, np.full(len(rows), LIGHTEST_LOAD))
    for slo in slos:
        reached = quantile(fleet, slo.metric, slo.percentile / 100.0)
        if (reached > slo.limit_s).all():
            best = int(np.argmin(reached))
            one = deployments[streams.deployment[best]]
            return (
                f"no GPU type meets {slo.name} <= {slo.limit_s:g} s: the best achievable is {reached[best]:.3g} s "
                f"({one.gpu.name} tp{one.tp})"
            )
    names = " and ".join(slo.name for slo in slos)
    return f"no GPU type meets {names} together, though each can be met alone"

"""The space of a capacity search: what is asked, every deployment that can run, its queue, and how many replicas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from servecast.model.attainment import (
    Systems,
    Windows,
    rate_windows,
    solve_systems,
)
from servecast.model.deployment import Deployment, divisibility_error
from servecast.model.forecast import Profile
from servecast.model.hardware import Gpu, Offer
from servecast.model.llm import Llm
from servecast.model.service import ServiceCurves
from servecast.model.slo import Slo
from servecast.model.workload import Workload

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

DEFAULT_TP = (1, 2, 4, 8)
DEFAULT_PP = (1, 2)
DEFAULT_CAPS = (8, 16, 32, 64, 128, 256)
USUAL_STEP_S = 0.03
"""Time per output token that the length of the rate windows is chosen for. One figure for all: a window that depended
on what is on offer, or on the limits, would let an offer that is not taken change the answer. [s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityRequest:
    """What is asked for."""

    llm: Llm
    trunk_format: str
    expert_format: str
    kv_format: str
    """Of the KV cache, unless `kv_overrides` says otherwise."""
    engine: str
    workload: Workload
    slos: tuple[Slo, ...]
    offers: tuple[Offer, ...]
    tp: tuple[int, ...] = DEFAULT_TP
    pp: tuple[int, ...] = DEFAULT_PP
    caps: tuple[int, ...] = DEFAULT_CAPS
    max_replicas: int = 1000
    kv_overrides: tuple[tuple[str, str], ...] = ()
    """(GPU type, format of the KV cache) where recipes for that GPU differ."""

    def kv_format_on(self, gpu: str) -> str:
        """Format of the KV cache on a GPU type."""
        return dict(self.kv_overrides).get(gpu, self.kv_format)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Deployments, their systems, and what limits the number of replicas."""

    request: CapacityRequest
    profile: Profile
    offers: tuple[Offer, ...]
    """Of each deployment."""
    deployments: tuple[Deployment, ...]
    curves: ServiceCurves
    systems: Systems
    windows: Windows
    most: NDArray[np.int64]
    """Largest fleet of each system."""
    least: NDArray[np.int64]
    """Replicas below which the mean rate exceeds the capacity."""


def split_deployments(request: CapacityRequest) -> tuple[tuple[Deployment, ...], tuple[Offer, ...]]:
    made: list[Deployment] = []
    offers: list[Offer] = []
    reasons: list[str] = []
    for offer, tp, pp in product(request.offers, request.tp, request.pp):
        reason = _split_error(request.llm, offer.gpu, tp, pp)
        if reason is not None:
            reasons.append(reason)
            continue
        made.append(
            Deployment(
                llm=request.llm,
                gpu=offer.gpu,
                trunk_format=request.trunk_format,
                expert_format=request.expert_format,
                kv_format=request.kv_format_on(offer.gpu.name),
                tp=tp,
                pp=pp,
            )
        )
        offers.append(offer)
    if not made:
        raise ValueError(reasons[0])
    return tuple(made), tuple(offers)


def _split_error(llm: Llm, gpu: Gpu, tp: int, pp: int) -> str | None:
    """Why the model cannot be split so over nodes of `gpu`, in words, or None where it can."""
    reason = divisibility_error(llm, tp, pp)
    if reason is None and tp > gpu.gpus_per_node:
        return f"tp must be at most the {gpu.gpus_per_node} GPUs of a {gpu.name} node, got {tp}"
    return reason


def build_space(
    request: CapacityRequest,
    profile: Profile,
    deployments: tuple[Deployment, ...],
    offers: tuple[Offer, ...],
    curves: ServiceCurves,
) -> Space:
    pairs = [
        (number, cap)
        for number in np.flatnonzero(curves.kv_batch > 0)
        # a limit that the cache does not reach is the cache's own
        for cap in sorted({int(min(cap, curves.kv_batch[number])) for cap in request.caps})
    ]
    deployment = np.array([number for number, _ in pairs], dtype=np.intp)
    cap = np.array([cap for _, cap in pairs], dtype=np.int64)
    capacity = curves.completion_rps[deployment, cap - 1]
    least = np.maximum(np.ceil(request.workload.rate_rps / capacity), 1).astype(np.int64)
    gpus = np.array([one.gpus for one in deployments])[deployment]
    limits = [request.max_replicas * 10**6 if offer.limit is None else offer.limit for offer in offers]
    most = np.minimum(np.array(limits)[deployment] // gpus, request.max_replicas)
    return Space(
        request=request,
        profile=profile,
        offers=offers,
        deployments=deployments,
        curves=curves,
        systems=solve_systems(curves, deployment, cap, request.workload, least),
        windows=rate_windows(request.workload, USUAL_STEP_S * request.workload.mean_out),
        most=most,
        least=least,
    )


def fleet_cost(space: Space, system: Indices, replicas: NDArray[np.int64]) -> Floats:
    deployment = space.systems.deployment[system]
    price = np.array([offer.usd_per_hour for offer in space.offers])[deployment]
    gpus = np.array([one.gpus for one in space.deployments])[deployment]
    return np.asarray(price * gpus * replicas, dtype=np.float64)

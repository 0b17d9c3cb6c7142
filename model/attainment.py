r"""Distribution of TTFT and TPOT of replicas under load, and the share of requests that meet their limits.

A *system* is an engine instance with a batch limit; a *fleet* is R of them behind a router that splits arrivals evenly
at random. Time is cut into windows within which the rate is steady (the workload's own, or one for a stationary
process); in each the replica is a state-dependent queue (:mod:`servecast.model.state_queue`), and what a window cannot
serve is carried into the next as a fluid backlog. A request of window w with prompt n waits for its turn and is
prefilled:

.. math::
   TTFT = V_w + W_w^{slot} + W_w^{pre} + t_1 + t_{pre}(n) + t_{dec}(B_w)

V backlog over capacity; W slot wait of the state queue; W pre the M/G/1 wait behind other prompts (utilisation
:math:`\rho_p = \lambda E[t_{pre}]`), both atoms at 0 with exponential tails. While prompts take the share
:math:`\rho_p` of the engine, a token takes :math:`t_{dec}(B)/(1-\rho_p)`; over a request of m tokens TPOT varies with
the batch met (averaged over its stay) and with how many prompts fell into it,

.. math:: \sigma^2 = (0.86\,\sigma_B)^2 + \lambda\,TPOT\,E[t_{pre}^2] / m

0.86 is the standard deviation of the time average of a relaxing process over one relaxation time, the mean stay.
Where it holds: steady rate within a window (windows of five mean stays), light coupling of slot and prefill waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.service import LengthNodes, ServiceCurves, slowed
from servecast.model.slo import Slo
from servecast.model.state_queue import burst_factor, interpolate_idc, occupancy_quantile, relaxation_time, state_queue
from servecast.model.workload import Workload

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

LOAD_GRID = np.array([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99])
"""Utilisations at which each system's queue is solved."""
RATE_CLASSES = 16
"""Windows are grouped by rate into at most this many classes."""
STAYS_PER_WINDOW = 5.0
TIME_AVERAGE = 0.86
MAX_PREFILL_SHARE = 0.95
NO_WAIT_DECAY = 1e12
"""Decay of a wait that is always zero. [1/s]"""
STATIONARY_WINDOW_S, STATIONARY_WINDOWS = 60.0, 60
"""A stationary process is followed for an hour: a backlog above capacity grows over that long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Systems:
    """Solved queues, [system, load]."""

    curves: ServiceCurves
    deployment: Indices
    """Row of `curves` of each system."""
    cap: NDArray[np.int64]
    capacity_rps: Floats
    """mu_cap of one replica, [system]. [1/s]"""
    p_wait: Floats
    decay_rps: Floats
    tpot_s: Floats
    """Step time at the mean batch, prefill share not yet taken."""
    tpot_p99_s: Floats
    running: Floats
    """Mean sequences in service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Rate classes of a workload."""

    window_s: float
    rates_rps: Floats
    """In order of time. [1/s]"""
    order: Indices
    """Windows by rate."""
    starts: Indices
    """Where each class begins in `order`."""
    rate_rps: Floats
    """Mean rate of a class. [1/s]"""
    share: Floats
    """Requests in a class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Conditions that the requests of each class meet, [fleet, class]; times in seconds."""

    share: Floats
    """Requests in a class (classes split into served-at-once and behind a backlog)."""
    backlog_s: Floats
    slot_p: Floats
    slot_decay: Floats
    prompt_p: Floats
    prompt_decay: Floats
    service_s: Floats
    """[fleet, class, length node]: from the prompt's turn to the first token."""
    tpot_s: Floats
    tpot_batch_sd_s: Floats
    tpot_prompt_var_s2: Floats
    """Variance of TPOT times the tokens of a request. [s^2]"""
    inputs: LengthNodes
    outputs: LengthNodes
    utilisation: Floats
    """[fleet]"""
    running: Floats


def rate_windows(workload: Workload, stay_s: float) -> Windows:
    """Windows at least five mean stays long, grouped by rate."""
    choices = [one for one in workload.windows if one[0] >= STAYS_PER_WINDOW * stay_s] or list(workload.windows[-1:])
    if choices:
        window_s, rates = choices[0]
    else:
        window_s, rates = STATIONARY_WINDOW_S, np.full(STATIONARY_WINDOWS, workload.rate_rps)
    order = np.argsort(rates, kind="stable")
    starts = np.unique(np.linspace(0, len(rates), min(RATE_CLASSES, len(rates)), endpoint=False).astype(np.intp))
    counts = np.diff(np.append(starts, len(rates)))
    sums = np.add.reduceat(rates[order], starts)
    return Windows(
        window_s=window_s,
        rates_rps=rates,
        order=order,
        starts=starts,
        rate_rps=sums / counts,
        share=sums / rates.sum(),
    )


def solve_systems(
    curves: ServiceCurves, deployment: Indices, cap: NDArray[np.int64], workload: Workload, replicas: ArrayLike
) -> Systems:
    """Solve every system's queue over the load grid.

    Arrivals at one replica are the workload's thinned to 1 / R, so its index of dispersion is 1 + (I - 1) / R;
    `replicas` is the smallest fleet that is looked at, which errs on the side of burstier.
    """
    rate = curves.completion_rps[deployment]
    capacity = np.take_along_axis(rate, cap[:, np.newaxis] - 1, axis=1)[:, 0]
    stay = cap / capacity
    window = np.minimum(relaxation_time(0.8 * capacity, capacity, stay), STAYS_PER_WINDOW * stay)
    # a trace too short for counts has its gaps: the index of a renewal process is their squared variation
    idc = workload.arrivals.idc or ((1.0, workload.arrivals.gap_cv**2),)
    dispersion = 1.0 + (interpolate_idc(idc, window) - 1.0) / np.asarray(replicas, dtype=np.float64)
    factor = burst_factor(np.maximum(dispersion, 0.0), 1.0)
    queue = state_queue(
        LOAD_GRID * capacity[:, np.newaxis],
        rate[:, np.newaxis, :],
        caps=np.broadcast_to(cap[:, np.newaxis], (len(cap), len(LOAD_GRID))),
        burst=factor[:, np.newaxis],
    )
    decode = curves.decode_s[deployment]

    def step_at(batch: Floats) -> Floats:
        index = np.clip(batch.astype(np.intp) - 1, 0, decode.shape[1] - 1)
        return np.take_along_axis(decode, index, axis=1)

    running = queue.mean_in_service
    return Systems(
        curves=curves,
        deployment=deployment,
        cap=cap,
        capacity_rps=capacity,
        p_wait=queue.p_wait,
        decay_rps=queue.wait_decay_rps,
        tpot_s=step_at(np.maximum(np.round(running), 1.0)),
        tpot_p99_s=step_at(occupancy_quantile(queue, 0.99, seen_by="request").astype(np.float64)),
        running=running,
    )


def slowed_systems(systems: Systems, system: Indices, factor: Floats) -> Systems:
    """``systems[system]`` with every step `factor` times as long: the rates of the queue fall by it."""
    column = factor[:, np.newaxis]
    return Systems(
        curves=slowed(systems.curves, systems.deployment[system], factor),
        deployment=np.arange(len(system)),
        cap=systems.cap[system],
        capacity_rps=systems.capacity_rps[system] / factor,
        p_wait=systems.p_wait[system],
        decay_rps=systems.decay_rps[system] / column,
        tpot_s=systems.tpot_s[system] * column,
        tpot_p99_s=systems.tpot_p99_s[system] * column,
        running=systems.running[system],
    )


def fleets(systems: Systems, windows: Windows, system: Indices, replicas: ArrayLike) -> Fleet:
    """Fleets of `replicas` of ``systems[system]``, under the windows' load."""
    system = np.atleast_1d(system)
    count = np.broadcast_to(np.asarray(replicas, dtype=np.float64), system.shape)
    capacity = count * systems.capacity_rps[system]
    share, backlog = _backlog(windows, capacity)
    rate = np.tile(windows.rate_rps, 2) / count[:, np.newaxis]
    load = np.tile(windows.rate_rps, 2) / capacity[:, np.newaxis]
    at, right = _grid_weights(load)

    def pick(table: Floats) -> Floats:
        rows = system[:, np.newaxis]
        return table[rows, at] * (1.0 - right) + table[rows, at + 1] * right

    deployment = systems.deployment[system]
    curves = systems.curves
    prefill_share = np.minimum(rate * curves.prefill_mean_s[deployment][:, np.newaxis], MAX_PREFILL_SHARE)
    slowdown = 1.0 / (1.0 - prefill_share)
    tpot = pick(systems.tpot_s) * slowdown
    spread = (pick(systems.tpot_p99_s) - pick(systems.tpot_s)) / 2.326 * slowdown
    second = curves.prefill_m2_s2[deployment][:, np.newaxis]
    prompt_wait = rate * second / (2.0 * (1.0 - prefill_share))
    with np.errstate(divide="ignore", invalid="ignore"):
        prompt_decay = np.where(prompt_wait > 0.0, prefill_share / prompt_wait, NO_WAIT_DECAY)
    first = curves.first_token_s[deployment][:, np.newaxis, np.newaxis]
    service = first + curves.prefill_s[deployment][:, np.newaxis, :] + tpot[:, :, np.newaxis]
    mean_rate = float(windows.rates_rps.mean())
    running = (pick(systems.running) * share).sum(axis=1)
    # above the grid the batch is full and the wait is the backlog's
    slot_p = np.where(load < 1.0, pick(systems.p_wait), 1.0)
    return Fleet(
        share=share,
        backlog_s=backlog,
        slot_p=slot_p,
        slot_decay=np.maximum(pick(systems.decay_rps), 1e-3 * systems.capacity_rps[system][:, np.newaxis]),
        prompt_p=prefill_share,
        prompt_decay=prompt_decay,
        service_s=service,
        tpot_s=tpot,
        tpot_batch_sd_s=TIME_AVERAGE * np.maximum(spread, 0.0),
        tpot_prompt_var_s2=rate * tpot * second,
        inputs=curves.inputs,
        outputs=curves.outputs,
        utilisation=mean_rate / capacity,
        running=running,
    )


def attainment(fleet: Fleet, metric: str, limit_s: ArrayLike) -> Floats:
    """P(metric <= limit) per fleet; `limit_s` broadcasts over fleets. [-]"""
    limit = np.broadcast_to(np.asarray(limit_s, dtype=np.float64), fleet.utilisation.shape)[:, np.newaxis]
    if metric == "ttft":
        late = _ttft_tail(fleet, limit)
    elif metric == "tpot":
        late = _tpot_tail(fleet, limit)
    else:
        late = _e2e_tail(fleet, limit)
    met: Floats = 1.0 - (fleet.share * late).sum(axis=1)
    return np.clip(met, 0.0, 1.0)


def quantile(fleet: Fleet, metric: str, p: float) -> Floats:
    """p-quantile of a metric per fleet, by bisection to 0.1 %; NaN for the TPOT of one-token outputs. [s]"""
    if metric == "tpot" and not (fleet.outputs.tokens > 1.5).any():
        return np.full(fleet.utilisation.shape, np.nan)
    low = np.full(fleet.utilisation.shape, 1e-5)
    high = np.full(fleet.utilisation.shape, 1.0)
    for _ in range(40):
        short = attainment(fleet, metric, high) < p
        if not short.any():
            break
        high = np.where(short, high * 4.0, high)
    for _ in range(48):
        middle = np.sqrt(low * high)
        short = attainment(fleet, metric, middle) < p
        low, high = np.where(short, middle, low), np.where(short, high, middle)
        if np.all(high / low < 1.001):
            break
    return high


def joint_attainment(fleet: Fleet, slos: Sequence[Slo]) -> Floats:
    """Share of requests that meet every limit, the metrics taken as independent. [-]"""
    total = np.ones(fleet.utilisation.shape)
    for slo in slos:
        total = total * attainment(fleet, slo.metric, slo.limit_s)
    return total


def _grid_weights(load: Floats) -> tuple[Indices, Floats]:
    held = np.clip(load, LOAD_GRID[0], LOAD_GRID[-1])
    left = np.clip(np.searchsorted(LOAD_GRID, held, side="right") - 1, 0, len(LOAD_GRID) - 2)
    return left, (held - LOAD_GRID[left]) / (LOAD_GRID[left + 1] - LOAD_GRID[left])


def _backlog(windows: Windows, capacity: Floats) -> tuple[Floats, Floats]:
    """Share of requests and their wait behind a fluid backlog, [fleet, 2 classes]: first those without one."""
    excess = windows.rates_rps[np.newaxis, :] - capacity[:, np.newaxis]
    wait = np.zeros(excess.shape)
    if (excess > 0.0).any():
        queued = np.zeros(len(capacity))
        for number in range(excess.shape[1]):
            after = np.maximum(queued + excess[:, number] * windows.window_s, 0.0)
            # at 0.1 % of the capacity a backlog is a trace of rounding
            wait[:, number] = (queued + after) / 2.0 / capacity
            queued = after
    late = wait > 1e-9
    requests = (windows.rates_rps / windows.rates_rps.sum())[windows.order]
    behind = np.add.reduceat(late[:, windows.order] * requests, windows.starts, axis=1)
    total = np.add.reduceat((wait[:, windows.order] * late[:, windows.order]) * requests, windows.starts, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(behind > 0.0, total / behind, 0.0)
    share = np.concatenate([windows.share - behind, behind], axis=1)
    return np.maximum(share, 0.0), np.concatenate([np.zeros_like(mean), mean], axis=1)


def _wait_tail(fleet: Fleet, t: Floats) -> Floats:
    """P(slot wait + prefill wait > t), t [fleet, class, ...]; 1 for t < 0."""
    trailing = (slice(None), slice(None)) + (np.newaxis,) * (t.ndim - 2)
    p, a = fleet.slot_p[trailing], fleet.slot_decay[trailing]
    q, b = fleet.prompt_p[trailing], fleet.prompt_decay[trailing]
    # two equal rates are a double pole: nudged apart by a part in 10^6
    b = np.where(np.abs(b - a) < 1e-6 * a, a * (1.0 + 1e-6), b)
    held = np.maximum(t, 0.0)
    slow, fast = np.exp(-a * held), np.exp(-b * held)
    both = (b * slow - a * fast) / (b - a)
    tail = p * (1.0 - q) * slow + q * (1.0 - p) * fast + p * q * both
    return np.where(t < 0.0, 1.0, np.clip(tail, 0.0, 1.0))


def _ttft_tail(fleet: Fleet, limit: Floats) -> Floats:
    """P(TTFT > limit), [fleet, class]."""
    slack = (limit - fleet.backlog_s)[:, :, np.newaxis] - fleet.service_s
    return np.asarray(_wait_tail(fleet, slack) @ fleet.inputs.share, dtype=np.float64)


def _tpot_tail(fleet: Fleet, limit: Floats) -> Floats:
    """P(TPOT > limit), [fleet, class]; requests of one token have none and do not count."""
    several = fleet.outputs.tokens > 1.5
    if not several.any():
        return np.zeros(np.broadcast_shapes(limit.shape, fleet.tpot_s.shape))
    tokens, share = fleet.outputs.tokens[several], fleet.outputs.share[several]
    variance = (fleet.tpot_batch_sd_s**2)[:, :, np.newaxis] + fleet.tpot_prompt_var_s2[:, :, np.newaxis] / tokens
    distance = (limit - fleet.tpot_s)[:, :, np.newaxis] / np.sqrt(np.maximum(variance, 1e-18))
    return np.asarray(_normal_tail(distance) @ (share / share.sum()), dtype=np.float64)


def _e2e_tail(fleet: Fleet, limit: Floats) -> Floats:
    """P(end to end > limit), [fleet, class]: TTFT beside the mean time of the tokens after the first."""
    late = np.zeros(fleet.tpot_s.shape)
    for tokens, share in zip(fleet.outputs.tokens, fleet.outputs.share, strict=True):
        late = late + share * _ttft_tail(fleet, limit - (tokens - 1.0) * fleet.tpot_s)
    return late


def _normal_tail(x: Floats) -> Floats:
    """P(Z > x) by Abramowitz and Stegun 26.2.17, absolute error below 8e-8; scipy would cost the import of a second."""
    t = 1.0 / (1.0 + 0.2316419 * np.abs(x))
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper: Floats = np.exp(-0.5 * np.minimum(x * x, 1400.0)) / np.sqrt(2.0 * np.pi) * poly
    return np.where(x >= 0.0, upper, 1.0 - upper)

r"""From kernel sums to an engine's steps, and from steps to TTFT and TPOT of a closed loop.

Symbols: B sequences running on one attention replica, c >= B clients of that replica, n = isl, m = osl.

.. math::
   t_{dec} &= g (G + A) + X + C + u L + v L_{moe} + s B + t_0 \\
   t_{pre} &= f [g (G + A) + x X] + C + u_p L \\
   TPOT &= t_{dec} + (1 - b / 2) (B - 1) (1 + \chi (dp - 1)) t_{pre} / m \\
   TTFT &= t_1 + a t_{pre} + b (B + 1) / 2\; t_{pre} + T (c - B) / B, \qquad T = m\, TPOT + t_{pre}

G, A, X, C are the GEMM, attention, expert and collective seconds of :class:`servecast.model.step_time.PassTerms`;
experts at their fitted efficiencies, :math:`X = \sqrt{(X_{mem} / e_b)^2 + (X_{flop} / e_f)^2}`.

b is the share of requests that arrive in bursts of all B at once (0 staggered, 1 lock-step). What a burst adds to the
wait for the first token it takes from the interference of later ones: over one cycle
:math:`TTFT + m\,TPOT = c\,t_{pre} + m\,t_{dec}` whatever the order of service, hence the :math:`1 - b / 2`.
The last term of TTFT is admission: c - B clients wait for a slot, by Little's law.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.step_time import PassTerms

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConstants:
    """What a kernel sum lacks, per engine; every field may be an array over points."""

    layer_gap_s: ArrayLike
    """u: per layer and step, work between the kernels counted. [s]"""
    moe_layer_gap_s: ArrayLike
    """v: the same, extra, of a mixture-of-experts layer. [s]"""
    sequence_s: ArrayLike
    """s: per running sequence and step, host and sampler. [s]"""
    step_s: ArrayLike
    """t_0: per step. [s]"""
    kernel_factor: ArrayLike
    """g: 1 where kernels were measured on this GPU, else how its kernels compare with the closed form. [-]"""
    prefill_factor: ArrayLike
    """f: prefill kernels of the engine over the kernel tables. [-]"""
    prefill_layer_gap_s: ArrayLike
    """u_p: per layer and prompt. [s]"""
    expert_prefill_factor: ArrayLike
    """x: expert kernels in prefill over decode's efficiencies. [-]"""
    expert_bandwidth_efficiency: ArrayLike
    """e_b. [-]"""
    expert_compute_efficiency: ArrayLike
    """e_f. [-]"""
    replica_coupling: ArrayLike
    """chi: how far a prefill on one attention replica stalls the others. [-]"""
    prefill_passes: ArrayLike
    """a: prefills' worth of work between admission and the first token. [-]"""
    burst_share: ArrayLike
    """b, in [0, 1.5]. [-]"""
    first_token_s: ArrayLike
    """t_1: per request before and after the first forward pass. [s]"""


def decode_seconds(
    terms: PassTerms, k: EngineConstants, layers: ArrayLike, moe_layers: ArrayLike, batch: ArrayLike
) -> Floats:
    """One decode step of `batch` sequences per attention replica. [s]"""
    kernels = np.asarray(k.kernel_factor) * (terms.gemm_s + terms.attention_s) + expert_seconds(terms, k)
    gaps = np.asarray(k.layer_gap_s) * np.asarray(layers) + np.asarray(k.moe_layer_gap_s) * np.asarray(moe_layers)
    host = np.asarray(k.sequence_s) * np.asarray(batch) + np.asarray(k.step_s)
    return np.asarray(kernels + terms.collectives_s + gaps + host, dtype=np.float64)


def prefill_seconds(terms: PassTerms, k: EngineConstants, layers: ArrayLike) -> Floats:
    """One prompt alone, from the first layer to the last. [s]"""
    kernels = np.asarray(k.kernel_factor) * (terms.gemm_s + terms.attention_s)
    kernels = kernels + np.asarray(k.expert_prefill_factor) * expert_seconds(terms, k)
    gaps = np.asarray(k.prefill_layer_gap_s) * np.asarray(layers)
    return np.asarray(np.asarray(k.prefill_factor) * kernels + terms.collectives_s + gaps, dtype=np.float64)


def expert_seconds(terms: PassTerms, k: EngineConstants) -> Floats:
    """Routed experts of one pass at the fitted efficiencies. [s]"""
    memory = terms.experts_memory_s / np.asarray(k.expert_bandwidth_efficiency)
    compute = terms.experts_compute_s / np.asarray(k.expert_compute_efficiency)
    return np.asarray(np.hypot(memory, compute), dtype=np.float64)


def closed_loop(
    decode_s: Floats,
    prefill_s: Floats,
    k: EngineConstants,
    *,
    batch: ArrayLike,
    clients: ArrayLike,
    replicas: ArrayLike,
    osl: ArrayLike,
) -> tuple[Floats, Floats]:
    """Mean TTFT and TPOT with `clients` in flight on each attention replica, `batch` of them running. [s], [s]"""
    batch, clients, osl = (np.asarray(x, dtype=np.float64) for x in (batch, clients, osl))
    burst = np.minimum(np.asarray(k.burst_share, dtype=np.float64), 1.5)
    others = np.maximum(batch - 1.0, 0.0) * (1.0 + np.asarray(k.replica_coupling) * (np.asarray(replicas) - 1.0))
    tpot = decode_s + (1.0 - burst / 2.0) * others / osl * prefill_s
    # one stay in the running batch: its own prompt, then its tokens among the others' prompts
    cycle = osl * tpot + prefill_s
    ttft = np.asarray(k.first_token_s) + (np.asarray(k.prefill_passes) + burst * (batch + 1.0) / 2.0) * prefill_s
    ttft = ttft + cycle * (clients - batch) / batch
    return ttft, tpot

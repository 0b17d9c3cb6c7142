"""Cost of speculative steps from a calibrated profile: before any sweep was run, or any machine rented.

A verification pass is a decode pass with several rows per sequence; a draft pass is a decode pass of the draft model on
the same GPUs. Where no draft model is given, it is one layer of the target with its language-model head: the shape of
EAGLE and MTP heads. One pass brings the drafter up to date with what was accepted and yields the first position, each
further position takes one more; armed but idle it is one pass. A round that drafts costs a share of a plain step
beside its passes: the engine's other code path, sampling of drafts, rejection.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servecast.model.deployment import Deployment, stack
from servecast.model.engine import decode_seconds
from servecast.model.forecast import Points, Profile, error_band, point_constants
from servecast.model.llm import Llm
from servecast.model.prediction import Z90
from servecast.model.step_time import decode_pass

Floats = NDArray[np.float64]


ROUND_SHARE = 0.1
"""What a drafting round costs beside its passes, of a plain step at batch 1. Llama-3.1-8B on an H100 (vLLM issue
20780) takes steps of 7.74 + 0.73 K ms with EAGLE and 8.32 + 0.99 K with EAGLE-3 against 7.07 without drafts: 9 and
18 %. With this share the first is met to 3 %, the second is 12 to 19 % slower than predicted. [-]"""


class ProfiledCost:
    """See `servecast.model.speculation_cost.SpeculationCost`."""

    def __init__(self, profile: Profile, deployment: Deployment, engine: str, drafter: Llm | None = None) -> None:
        self._profile, self._engine, self._target = profile, engine, deployment
        shape = drafter or draft_head(deployment.llm)
        self._drafter = replace(deployment, llm=shape)

    @property
    def log_sd(self) -> float:
        """Log standard deviation of a step, from the profile's band of held-out TPOT. [-]"""
        lo, hi = error_band(self._profile, self._target, "tpot")
        return float(hi - lo) / (2.0 * Z90)

    def verify(self, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> Floats:
        """Seconds of a target pass."""
        return self._pass(self._target, rows, requests, context)

    def draft(self, requests: ArrayLike, gamma: ArrayLike, context: ArrayLike) -> Floats:
        """Seconds of drafting; 0 at length 0."""
        length = np.asarray(gamma, dtype=np.float64)
        once = ROUND_SHARE * float(self.verify(1.0, 1.0, 1.0))
        return np.asarray(length * self.idle(requests, context) + once * (length > 0.0))

    def idle(self, requests: ArrayLike, context: ArrayLike) -> Floats:
        """Seconds of one draft pass."""
        return self._pass(self._drafter, requests, requests, context)

    def _pass(self, deployment: Deployment, rows: ArrayLike, requests: ArrayLike, context: ArrayLike) -> Floats:
        n, b, c = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (rows, requests, context)))
        shape, (n, b, c) = n.shape, (n.ravel(), b.ravel(), np.maximum(c.ravel(), 1.0))
        index = np.zeros(n.size, dtype=np.intp)
        nothing = np.ones(n.size)
        points = Points(
            deployments=(deployment,),
            engines=(self._engine,),
            index=index,
            clients=nothing,
            isl=nothing,
            osl=nothing,
        )
        d = stack((deployment,), [self._profile.kernel_set(deployment.gpu)], index)
        k = point_constants(self._profile, points)
        terms = decode_pass(d, self._profile.kernels, np.maximum(b / d.pp, 1.0), c, np.maximum(n / d.pp, 1.0))
        return decode_seconds(terms, k, d.layers, d.moe_layers, b).reshape(shape)


def draft_head(llm: Llm) -> Llm:
    """One attention layer of `llm` with its MLP (the experts, where it has no dense one) and head."""
    dense = llm.intermediate > 0
    return replace(
        llm,
        layers=1,
        moe_layers=0 if dense else 1,
        experts=0 if dense else llm.experts,
        windowed_layers=0,
        linear_layers=0,
    )

"""Deployments by name: what a user types, as the record that the model evaluates."""

from __future__ import annotations

from servecast.model.deployment import Deployment
from servecast.model.formats import ENGINES, resolve_formats
from servecast.readers import catalogues


def deployment(
    model: str, gpu: str, engine: str, precision: str = "auto", *, tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1
) -> Deployment:
    """A deployment by names; formats as the engine runs them. Degrees are not checked here.

    Raises
    ------
    ValueError : an unknown name, in one line with the nearest known ones.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    llm, part = catalogues.llm(model), catalogues.gpu(gpu)
    trunk, experts, cache = resolve_formats(
        llm.native_format,
        llm.expert_format,
        precision,
        engine,
        quantised_cache=llm.name.startswith("nvidia/"),
        compute_capability=part.compute_capability,
    )
    return Deployment(
        llm=llm,
        gpu=part,
        trunk_format=trunk,
        expert_format=experts,
        kv_format=cache,
        tp=tp,
        pp=pp,
        dp=dp,
        ep=ep,
    )

"""Deployments by name: what a user types, as the record that the model evaluates."""

from __future__ import annotations

from servecast.model.deployment import Deployment
from servecast.model.formats import ENGINES, resolve_formats
from servecast.model.llm import Llm
from servecast.readers import catalogues

KV_PRECISIONS = ("auto", "bf16", "fp16", "fp8")


def serving_formats(
    llm: Llm,
    engine: str,
    precision: str = "auto",
    kv_precision: str = "auto",
    *,
    compute_capability: int | None = None,
) -> tuple[str, str, str]:
    """Formats of trunk weights, routed experts and KV cache as `engine` runs `llm` on a GPU; ``auto`` keeps the
    checkpoint's.

    Raises
    ------
    ValueError : a format that is not known.
    """
    if kv_precision not in KV_PRECISIONS:
        raise ValueError(f"kv_precision must be auto, bf16 or fp8, got {kv_precision!r}")
    trunk, experts, cache = resolve_formats(
        llm.native_format,
        llm.expert_format,
        precision,
        engine,
        quantised_cache=llm.name.startswith("nvidia/"),
        compute_capability=compute_capability,
    )
    return trunk, experts, {"auto": cache, "fp16": "bf16"}.get(kv_precision, kv_precision)


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
    trunk, experts, cache = serving_formats(llm, engine, precision, compute_capability=part.compute_capability)
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

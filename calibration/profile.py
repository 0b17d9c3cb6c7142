"""The profile document: the calibrated truth about engines and machines as versioned JSON, and back into the model's
record."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servecast.model.engine import EngineConstants
from servecast.model.forecast import METRICS, NOVELTY, Band, Metric, Novelty, Profile
from servecast.model.formats import ENGINES
from servecast.model.kernels import AllReduceCurve, KernelParameters
from servecast.model.step_time import KernelSet
from servecast.model.surfaces import Surface

SCHEMA = "servecast.profile/1"
SHIPPED = "public-2026.11"
"""Profile that commands use unless told otherwise."""
MAX_BYTES = 16 * 2**20

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Document(BaseModel):
    """Immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class HeldOutDoc(Document):
    """Absolute percentage errors on shapes that a second fit did not see."""

    rows: int
    mape: Finite
    median: Finite
    closed_form_median: Finite


class SurfaceDoc(Document):
    """Log-correction on a grid, values in C order."""

    knots: tuple[tuple[Finite, ...], ...]
    values: tuple[Finite, ...]


class KernelDoc(Document):
    """One kernel in one format; `same_as` points to another format of the same GPU."""

    same_as: str | None = None
    floor_s: Positive | None = None
    bandwidth_efficiency: Positive | None = None
    compute_efficiency: Positive | None = None
    exponent: Positive | None = None
    surface: SurfaceDoc | None = None
    rows: int = 0
    """Measurements behind it; 0 where it is assumed or averaged."""
    held_out: dict[str, HeldOutDoc] = {}


class CurveDoc(Document):
    """All-reduce time against size for one number of ranks."""

    ranks: Annotated[int, Field(ge=2)]
    log2_bytes: tuple[Finite, ...]
    log_seconds: tuple[Finite, ...]


class KernelSetDoc(Document):
    """Kernels of one GPU type."""

    name: str
    measured: bool
    link_bandwidth_bytes_per_s: Positive
    gemm: dict[str, KernelDoc]
    decode_attention: dict[str, KernelDoc]
    prefill_attention: KernelDoc
    latent_attention: KernelDoc
    all_reduce: tuple[CurveDoc, ...]


class ConstantDoc(Document):
    """One fitted constant."""

    value: Finite
    relative_standard_error: Finite
    unit: str


class EngineDoc(Document):
    """Constants of one engine for one class of models."""

    engine: str
    mixture_of_experts: bool
    kernels_measured: bool
    constants: dict[str, ConstantDoc]


class BandDoc(Document):
    """Quantiles of log(measured / predicted) on held-out runs."""

    metric: Metric
    mixture_of_experts: bool
    novelty: Novelty
    lo: Finite
    hi: Finite
    n: int


class KnownGpu(Document):
    """GPU type with enough end-to-end runs of one class of models."""

    gpu: str
    mixture_of_experts: bool


class Provenance(Document):
    """Where the numbers come from."""

    sources: tuple[str, ...]
    licence: str
    devices: tuple[str, ...]
    date: str
    command: str
    servecast: str
    libraries: dict[str, str]
    seed: int
    runs_fitted: int
    runs_scored: int
    log_residual_quantiles: dict[str, tuple[Finite, ...]]
    """5, 25, 50, 75, 95 % of log(measured / fitted), in sample."""


class ProfileDocument(Document):
    """The whole file."""

    schema_: Annotated[Literal["servecast.profile/1"], Field(alias="schema")]
    name: str
    provenance: Provenance
    kernels: tuple[KernelSetDoc, ...]
    engines: tuple[EngineDoc, ...]
    bands: tuple[BandDoc, ...]
    known_gpus: tuple[KnownGpu, ...]
    fitted_generations: tuple[int, ...]
    known_models: tuple[str, ...]
    ranges: dict[str, tuple[Finite, Finite]]


def load_profile(name_or_path: str | Path = SHIPPED) -> Profile:
    """A shipped profile by name, or a file. The same file is parsed once per process.

    Raises
    ------
    ValueError : the name is not shipped, or the document is not a profile; one line.
    """
    return _load(str(name_or_path))


def shipped_profiles() -> tuple[str, ...]:
    """Names that `load_profile` takes."""
    folder = resources.files("servecast.calibration.profiles")
    return tuple(sorted(one.name.removesuffix(".json") for one in folder.iterdir() if one.name.endswith(".json")))


def read_document(name_or_path: str | Path) -> ProfileDocument:
    """The document itself, with provenance and errors."""
    name = str(name_or_path)
    if name in shipped_profiles():
        text = resources.files("servecast.calibration.profiles").joinpath(f"{name}.json").read_text(encoding="utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"profile must be a file or one of {', '.join(shipped_profiles())}, got {name!r}")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"{path}: a profile must be at most {MAX_BYTES >> 20} MiB, got {path.stat().st_size} bytes"
            )
        text = path.read_text(encoding="utf-8")
    try:
        return ProfileDocument.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise ValueError(f"profile {name}: {where}: {first['msg']}") from None


@cache
def _load(name: str) -> Profile:
    return from_document(read_document(name))


def from_document(document: ProfileDocument) -> Profile:
    """The model's record of a document.

    Raises
    ------
    ValueError : a part that the model needs is missing; one line.
    """
    _require_complete(document)
    return Profile(
        name=document.name,
        kernels=tuple(_kernel_set(one) for one in document.kernels),
        constants={
            (one.engine, one.mixture_of_experts, one.kernels_measured): EngineConstants(
                **{name: constant.value for name, constant in one.constants.items()}
            )
            for one in document.engines
        },
        bands={
            (one.metric, one.mixture_of_experts, one.novelty): Band(lo=one.lo, hi=one.hi, n=one.n)
            for one in document.bands
        },
        known_gpus=frozenset((one.gpu, one.mixture_of_experts) for one in document.known_gpus),
        fitted_generations=frozenset(document.fitted_generations),
        known_models=frozenset(document.known_models),
        ranges=dict(document.ranges),
    )


def _require_complete(document: ProfileDocument) -> None:
    """Every engine, class of models and band is there, each with all its constants."""
    flags = (False, True)
    engines = {(one.engine, one.mixture_of_experts, one.kernels_measured): one for one in document.engines}
    for key in product(ENGINES, flags, flags):
        if key not in engines:
            raise ValueError(f"profile {document.name}: engines must have {key[0]} for every class of models, got none")
        lacking = set(EngineConstants.__slots__) ^ set(engines[key].constants)
        if lacking:
            raise ValueError(
                f"profile {document.name}: {key[0]} constants must be those of version 1, see {min(lacking)}"
            )
    bands = {(one.metric, one.mixture_of_experts, one.novelty) for one in document.bands}
    for band in product(METRICS, flags, NOVELTY):
        if band not in bands:
            raise ValueError(f"profile {document.name}: bands must have {band[0]} for {band[2]}, got none")
    if not document.kernels or document.kernels[-1].measured:
        raise ValueError(f"profile {document.name}: the last kernel set must be the closed form")
    for one in document.bands:
        if one.lo > one.hi:
            raise ValueError(
                f"profile {document.name}: lo of a band must be at most its hi, got {one.lo:g} and {one.hi:g}"
            )
    for kernels in document.kernels:
        _require_kernels(document.name, kernels)
    missing = {"clients", "isl", "osl", "params_active"} - set(document.ranges)
    if missing:
        raise ValueError(f"profile {document.name}: ranges must have {min(missing)}, got none")


def _require_kernels(name: str, kernels: KernelSetDoc) -> None:
    """The formats that everything falls back on, surfaces that fit their knots, curves of one length."""
    for kind, table in (("gemm", kernels.gemm), ("decode_attention", kernels.decode_attention)):
        if "bf16" not in table:
            raise ValueError(
                f"profile {name}: {kind} of {kernels.name} must have bf16, got {', '.join(table) or 'none'}"
            )
    parts = [*kernels.gemm.values(), *kernels.decode_attention.values(), kernels.prefill_attention]
    for surface in (part.surface for part in parts if part.surface is not None):
        if any(len(axis) < 2 or any(np.diff(axis) <= 0.0) for axis in surface.knots):
            raise ValueError(f"profile {name}: knots of {kernels.name} must be two or more and increase")
        if len(surface.values) != int(np.prod([len(axis) for axis in surface.knots])):
            raise ValueError(f"profile {name}: values of {kernels.name} must fill the grid of their knots")
    if not kernels.all_reduce:
        raise ValueError(f"profile {name}: all_reduce of {kernels.name} must have a curve, got none")
    for curve in kernels.all_reduce:
        if len(curve.log2_bytes) != len(curve.log_seconds) or len(curve.log2_bytes) < 2:
            raise ValueError(f"profile {name}: a curve of {kernels.name} must have as many times as sizes, two or more")


def dumps(document: ProfileDocument) -> str:
    """Compact JSON with one kernel or constant a line, six significant digits."""
    return _render(document.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)) + "\n"


def _render(value: Any, indent: int = 0) -> str:
    """JSON that a person can diff: containers of scalars on one line."""
    pad, inner = " " * indent, " " * (indent + 1)
    if isinstance(value, dict) and any(isinstance(one, dict | list | tuple) for one in value.values()):
        items = [f"{inner}{json.dumps(key)}: {_render(one, indent + 1)}" for key, one in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{pad}}}"
    if isinstance(value, list | tuple) and any(isinstance(one, dict | list | tuple) for one in value):
        return "[\n" + ",\n".join(inner + _render(one, indent + 1) for one in value) + f"\n{pad}]"
    return json.dumps(_short(value), separators=(", ", ": "))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return value


def _kernel_set(doc: KernelSetDoc) -> KernelSet:
    return KernelSet(
        name=doc.name,
        measured=doc.measured,
        gemm=_kernels(doc.gemm),
        decode_attention=_kernels(doc.decode_attention),
        prefill_attention=_kernel(doc.prefill_attention),
        latent_attention=_kernel(doc.latent_attention),
        all_reduce=tuple(
            AllReduceCurve(
                ranks=curve.ranks, log2_bytes=np.array(curve.log2_bytes), log_seconds=np.array(curve.log_seconds)
            )
            for curve in doc.all_reduce
        ),
        link_bandwidth_bytes_per_s=doc.link_bandwidth_bytes_per_s,
    )


def _kernels(docs: dict[str, KernelDoc]) -> dict[str, KernelParameters]:
    own = {name: _kernel(doc) for name, doc in docs.items() if doc.same_as is None}
    for name, doc in docs.items():
        if doc.same_as is not None and doc.same_as not in own:
            raise ValueError(f"profile: same_as of {name} must name a format with its own numbers, got {doc.same_as!r}")
    return {name: own[doc.same_as] if doc.same_as else own[name] for name, doc in docs.items()}


def _kernel(doc: KernelDoc) -> KernelParameters:
    floor_s, bandwidth, compute, exponent = (
        doc.floor_s,
        doc.bandwidth_efficiency,
        doc.compute_efficiency,
        doc.exponent,
    )
    if floor_s is None or bandwidth is None or compute is None or exponent is None:
        raise ValueError("profile: a kernel without same_as must state floor_s, both efficiencies and exponent")
    surface = None
    if doc.surface is not None:
        knots = tuple(np.array(axis) for axis in doc.surface.knots)
        surface = Surface(knots=knots, values=np.array(doc.surface.values).reshape([len(axis) for axis in knots]))
    return KernelParameters(
        floor_s=floor_s,
        bandwidth_efficiency=bandwidth,
        compute_efficiency=compute,
        exponent=exponent,
        surface=surface,
    )

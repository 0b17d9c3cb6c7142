"""The plan request: one versioned document, from a YAML file or from flags.

Unknown keys are refused with the nearest known one, numbers are numbers and not text that looks like one, and every
fault is one line: file, key, rule, value. The document holds what the user wrote, checked in form; names of GPUs and
models are looked up by :meth:`PlanRequest.offers` and :func:`servecast.readers.catalogues.llm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from servecast.cli.units import MAX_LIMIT, MAX_TOKENS, MAX_USD_PER_HOUR, parse_offer, parse_quantity, parse_slo
from servecast.model.slo import Slo
from servecast.readers.schema_faults import one_line, shown
from servecast.readers.yaml_edge import MAX_BYTES, load_yaml

if TYPE_CHECKING:
    from servecast.model.hardware import Offer
    from servecast.model.workload import LengthDistribution

SCHEMA: Final = "servecast.plan/1"
"""Name and major version of the document; a change that breaks a reader raises the number."""
EXAMPLE: Final = "example"
"""Name of the shipped trace."""
AUTO: Final = "auto"
"""The planner chooses."""

_LENGTH_FORMS: Final = "a number of tokens, {mean, cv, max}, {p50, p99, max} or {low, high}"


def _rate(value: object) -> object:
    """Text with a unit such as ``330/min`` as a number per second; every other value as it is."""
    return parse_quantity(value, "rate", name="rate_rps") if isinstance(value, str) else value


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))


Text = Annotated[str, Field(min_length=1, max_length=500, strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0.0, le=1e9)]
Tokens = Annotated[Number, Field(ge=1.0, le=MAX_TOKENS)]
Rate = Annotated[Positive, BeforeValidator(_rate)]
Degrees = Annotated[
    tuple[Annotated[int, Field(ge=1, le=4096, strict=True)], ...],
    Field(min_length=1, max_length=64),
    AfterValidator(_distinct),
]
Batches = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1_000_000, strict=True)], ...],
    Field(min_length=1, max_length=64),
    AfterValidator(_distinct),
]


class Document(BaseModel):
    """Rules that every part of the request shares: immutable, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lengths(Document):
    """Token counts of prompts or outputs: a number, or one of three distributions."""

    tokens: Tokens | None = None
    """Every request has this many; a bare number in the file."""
    mean: Tokens | None = None
    cv: Annotated[Number, Field(ge=0.0, le=1e3)] | None = None
    """With `mean`: log-normal. Standard deviation over mean. [-]"""
    p50: Tokens | None = None
    p99: Tokens | None = None
    """With `p50`: the log-normal through both."""
    max: Tokens | None = None
    """Cut-off of a log-normal."""
    low: Tokens | None = None
    high: Tokens | None = None
    """With `low`: uniform, both included."""

    @model_validator(mode="before")
    @classmethod
    def _bare_number(cls, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"tokens": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"must be {_LENGTH_FORMS}, got {shown(value)}")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        if given not in ({"tokens"}, {"low", "high"}) and given - {"max"} not in ({"mean", "cv"}, {"p50", "p99"}):
            named = f"{{{', '.join(name for name in type(self).model_fields if name in given)}}}"
            raise ValueError(f"must be {_LENGTH_FORMS}, got {named}")
        self.distribution()
        return self

    def distribution(self) -> LengthDistribution:
        """Record of the model room, which has rules of its own between the numbers."""
        from servecast.model.workload import FixedLength, LognormalLength, UniformLength

        maximum = math.inf if self.max is None else self.max
        if self.tokens is not None:
            return FixedLength(self.tokens)
        if self.mean is not None and self.cv is not None:
            return LognormalLength(mean=self.mean, cv=self.cv, maximum=maximum)
        if self.p50 is not None and self.p99 is not None:
            return LognormalLength.from_percentiles(self.p50, self.p99, maximum=maximum)
        assert self.low is not None  # noqa: S101 (the validator leaves no other form)
        assert self.high is not None  # noqa: S101 (likewise)
        return UniformLength(low=self.low, high=self.high)


class WorkloadRequest(Document):
    """The load: a recorded trace, or the parameters of a stationary stream."""

    trace: Text | None = None
    """Path, relative to the request's folder; ``example`` is the shipped one."""
    run: Text | None = None
    """Which run of a trace that holds several."""
    rate_rps: Rate | None = None
    """Mean arrival rate; text with a unit is converted. [requests/s]"""
    gap_cv: Annotated[Number, Field(ge=0.0, le=1e3)] | None = None
    """Coefficient of variation of the gaps between arrivals; None is 1, Poisson. [-]"""
    input_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    rate_scale: Annotated[Number, Field(gt=0.0, le=1e6)] = 1.0
    """The plan is for this multiple of the rate."""

    @model_validator(mode="after")
    def _trace_or_parameters(self) -> Self:
        parameters = ("rate_rps", "gap_cv", "input_tokens", "output_tokens")
        given = [name for name in parameters if getattr(self, name) is not None]
        if self.trace is not None and given:
            raise ValueError(f"must be a trace or parameters, got trace and {given[0]}")
        if self.trace is None:
            lacking = [name for name in parameters if name != "gap_cv" and name not in given]
            if len(lacking) == 3:
                raise ValueError("must have a trace, or rate_rps with input_tokens and output_tokens, got neither")
            if lacking:
                raise ValueError(f"needs {lacking[0]} beside {given[0]}")
            if self.run is not None:
                raise ValueError("run must come with a trace")
        return self


class GpuOffer(Document):
    """Price and number of one GPU type."""

    usd_per_hour: Annotated[Number, Field(gt=0.0, le=MAX_USD_PER_HOUR)]
    """Price of one GPU. [USD/h]"""
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT, strict=True)] | None = None
    """At most this many GPUs; None is no limit."""


class Search(Document):
    """What to try; None leaves it to the planner."""

    tp: Degrees | None = None
    pp: Degrees | None = None
    max_num_seqs: Batches | None = None
    max_replicas: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = 1000


class PlanRequest(Document):
    """Everything that `servecast plan` is asked."""

    schema_: Literal["servecast.plan/1"] = Field(alias="schema")
    workload: WorkloadRequest
    model: Text
    """Catalogue name, or the path of a config.json or of a folder with one."""
    gpus: Annotated[dict[Text, GpuOffer], Field(min_length=1)]
    """Offers by GPU name as the user wrote it."""
    slo: Annotated[dict[str, str], Field(min_length=1)]
    """Limits as text with a unit, by target (``ttft_p99``)."""
    engine: Text = "vllm"
    """Name, optionally with a version: ``vllm@0.32.0``."""
    precision: Text = AUTO
    """Format of the weights, canonical, or ``auto``."""
    kv_precision: Text = AUTO
    """Format of the KV cache, canonical, or ``auto``."""
    search: Search = Search()
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 1

    @field_validator("slo", mode="before")
    @classmethod
    def _slo_has_units(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        found: dict[str, str] = {}
        for target, limit in value.items():
            if isinstance(limit, Mapping | list | bool) or limit is None:
                raise ValueError(f"slo {shown(target)} must be a limit with a unit such as 2s, got {shown(limit)}")
            name = parse_slo(f"{target}={limit}").name
            if name in found:
                raise ValueError(f"slo {name} must be given once, got it twice")
            found[name] = str(limit).strip()
        return found

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, value: str) -> str:
        from servecast.policies import parse_engine

        parse_engine(value)
        return value

    @field_validator("precision", "kv_precision")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        from servecast.model.formats import PRECISIONS, canonical_format

        if value.strip().lower() == AUTO:
            return AUTO
        try:
            return canonical_format(value)
        except ValueError:
            raise ValueError(f"must be one of {AUTO}, {', '.join(PRECISIONS)}, got {shown(value)}") from None

    def slos(self) -> tuple[Slo, ...]:
        """The limits as records, in the order of the document."""
        return tuple(parse_slo(f"{target}={limit}") for target, limit in self.slo.items())

    def offers(self) -> tuple[Offer, ...]:
        """The GPUs on offer as records of the catalogue, in the order of the document."""
        from servecast.model.hardware import Offer
        from servecast.readers.catalogues import gpu

        found: dict[str, Offer] = {}
        for name, offer in self.gpus.items():
            part = gpu(name)
            if part.name in found:
                raise ValueError(f"gpu {part.name} must be offered once, got it again as {shown(name)}")
            found[part.name] = Offer(gpu=part, usd_per_hour=offer.usd_per_hour, limit=offer.limit)
        return tuple(found.values())

    def engine_and_version(self) -> tuple[str, str]:
        """Name and version of the engine; without a version the newest known one."""
        from servecast.policies import parse_engine

        return parse_engine(self.engine)


def read_request(path: str | Path) -> PlanRequest:
    """The request in a YAML file.

    Raises
    ------
    FileNotFoundError, ValueError
        One line: file, key (or line, where it is not YAML), rule, value.
    """
    source = Path(path)
    if source.is_dir():
        raise ValueError(f"{source}: is a directory, not a request file")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file")
    with source.open("rb") as file:
        data = file.read(MAX_BYTES + 8)  # enough to know that it is too long
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(data) > MAX_BYTES:  # the cut may have parted a character
            raise ValueError(f"{source}: is longer than 1 MiB") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source} line {line}: is not UTF-8 text (byte 0x{data[error.start]:02x})") from None
    value = load_yaml(text, name=str(source))
    if value is None:
        raise ValueError(f"{source}: is empty")
    if not isinstance(value, dict):
        raise ValueError(f"{source}: must be a mapping of keys such as workload, model, gpus, slo, got {shown(value)}")
    return _validated(value, str(source))


def request_from_flags(
    *,
    trace: str | None = None,
    run: str | None = None,
    model: str | None = None,
    gpu: Sequence[str] = (),
    slo: Sequence[str] = (),
    engine: str = "vllm",
    precision: str = AUTO,
    kv_precision: str = AUTO,
    rate_scale: float = 1.0,
    seed: int = 1,
    workload: Mapping[str, object] | None = None,
    search: Mapping[str, object] | None = None,
) -> PlanRequest:
    """The request of a command line: ``h200=3.5:16`` for each GPU, ``ttft_p99=2s`` for each limit.

    `workload` (instead of a trace) and `search` are in the keys of the document. Nothing is filled in for a flag that
    is needed and not given.
    """
    for needed, given in (("--model", model), ("--gpu", gpu), ("--slo", slo)):
        if not given:
            raise ValueError(f"{needed} must be given")
    if trace is None and workload is None:
        raise ValueError("--trace must be given")
    load: dict[str, object] = {"rate_scale": rate_scale, **(workload or {})}
    if trace is not None:
        load["trace"] = trace
    if run is not None:
        load["run"] = run
    document: dict[str, object] = {
        "schema": SCHEMA,
        "workload": load,
        "model": model,
        "gpus": _offers_from_flags(gpu),
        "slo": _limits_from_flags(slo),
        "engine": engine,
        "precision": precision,
        "kv_precision": kv_precision,
        "search": dict(search or {}),
        "seed": seed,
    }
    return _validated(document, "command line")


def _offers_from_flags(flags: Sequence[str]) -> dict[str, dict[str, object]]:
    gpus: dict[str, dict[str, object]] = {}
    for name, usd_per_hour, limit in map(parse_offer, flags):
        if name in gpus:
            raise ValueError(f"--gpu {name} must be given once, got it twice")
        gpus[name] = {"usd_per_hour": usd_per_hour, "limit": limit}
    return gpus


def _limits_from_flags(flags: Sequence[str]) -> dict[str, str]:
    limits: dict[str, str] = {}
    for text in flags:
        target = parse_slo(text).name
        if target in limits:
            raise ValueError(f"--slo {target} must be given once, got it twice")
        limits[target] = text.partition("=")[2].strip()
    return limits


def resolve_trace(name: str, base: str | Path) -> Path:
    """Path of a trace: ``example`` is the shipped one, a relative path starts at the folder `base`."""
    if name == EXAMPLE:
        return Path(str(resources.files("servecast").joinpath("examples", "chat.csv.gz")))
    return Path(base) / name


# ---- faults ------------------------------------------------------------------------------------------


def _validated(data: Mapping[str, Any], name: str) -> PlanRequest:
    try:
        return PlanRequest.model_validate(dict(data))
    except ValidationError as error:
        raise ValueError(f"{name}: {one_line(error, PlanRequest, schema=SCHEMA)}") from None


# ---- template ----------------------------------------------------------------------------------------

_TEMPLATE: Final = """\
# A request to `servecast plan`: what is asked of the service, and what there is to run it on.
schema: servecast.plan/1

workload:
  trace: example           # your own: CSV or JSON lines, relative to this file's folder; `example` is shipped
  # run: monday            # which run, where the trace has a column `run`
  rate_scale: 1.0          # plan for this multiple of the trace's rate
  # Without a trace, state the load instead (remove `trace` and `run` above):
  # rate_rps: 5.5          # mean rate; with a unit: 330/min
  # gap_cv: 1.0            # burstiness of arrivals, standard deviation of the gaps over their mean; 1 is Poisson
  # input_tokens: {mean: 1155, cv: 0.96, max: 8000}  # log-normal; or {p50: 800, p99: 6000}, {low: 1, high: 2000}, 512
  # output_tokens: {mean: 211, cv: 0.8, max: 1000}

model: meta-llama/Llama-3.1-8B-Instruct  # a catalogue name, or a folder with the model's config.json

gpus:                      # what you can rent, at your own prices
  h100_sxm: {usd_per_hour: 2.9, limit: 16}  # limit: how many GPUs there are at most
  l40s: {usd_per_hour: 1.1}

slo:                       # metric_percentile: limit with its unit (us, ms, s, min); metrics ttft, tpot, e2e
  ttft_p99: 2s
  tpot_p99: 50ms

engine: vllm               # vllm, sglang or trtllm; with a version: vllm@0.32.0
precision: auto            # of the weights: auto, bf16, fp8, fp8_block, int8, nvfp4, mxfp4, int4
kv_precision: auto         # of the KV cache: auto, bf16, fp8

# search:                  # narrow what is tried
#   tp: [1, 2, 4, 8]       # tensor-parallel degrees
#   pp: [1, 2]             # pipeline-parallel degrees
#   max_num_seqs: [8, 16, 32, 64, 128, 256]  # requests that run at once in one replica
#   max_replicas: 1000

seed: 1                    # of everything random: the same seed gives the same answer
"""


def template() -> str:
    """The commented request file that `servecast init` writes; it can be planned as it is."""
    return _TEMPLATE

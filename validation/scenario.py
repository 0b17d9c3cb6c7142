"""The scenario document: what is run, on which engine, and how much error is allowed, written before the run.

Schema ``servecast.scenario/1``. Calibrated and validated points are two lists that may not share a point.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from servecast.readers.schema_faults import one_line, shown

SCHEMA = "servecast.scenario/1"
ROOM = 16
"""Places of a sequence's slot that drafts may reach past its end. [tokens]"""
POSITIONS = 2048
"""That the trained pair's positions are made for. [tokens]"""

Text = Annotated[str, Field(min_length=1, max_length=200, strict=True)]
Count = Annotated[int, Field(ge=1, le=100_000, strict=True)]
Share = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0, allow_inf_nan=False)]
Batches = Annotated[tuple[Annotated[int, Field(ge=1, le=1024, strict=True)], ...], Field(min_length=1, max_length=64)]
Lengths = Annotated[tuple[Annotated[int, Field(ge=0, le=15, strict=True)], ...], Field(min_length=1, max_length=16)]
Contexts = Annotated[
    tuple[Annotated[int, Field(ge=2, le=65_536, strict=True)], ...], Field(min_length=1, max_length=64)
]
Span = tuple[Count, Count]


class Part(BaseModel):
    """Immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSpec(Part):
    """Which engine, and its limits; names as vLLM's arguments."""

    kind: Literal["torch", "vllm", "server", "results"]
    """``torch``: our own engine; ``vllm``: started here; ``server``: a URL; ``results``: a load generator's file."""
    pair: Literal["quick", "full"] = "quick"
    """Trained target and draft (torch, vllm)."""
    threads: Annotated[int, Field(ge=1, le=256, strict=True)] = 1
    max_num_seqs: Annotated[int, Field(ge=1, le=1024, strict=True)] = 32
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=65_536, strict=True)] = 256
    max_model_len: Annotated[int, Field(ge=320, le=65_536, strict=True)] = 640
    kv_cache_gib: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    """vllm on a CPU."""
    url: Annotated[str, Field(max_length=500)] | None = None
    """server: ``http://host:port``."""
    served_model: Text | None = None
    """server: the name it answers to."""
    file: Text | None = None
    """results: path, from the scenario's folder."""
    benchmark: Annotated[int, Field(ge=0, le=100_000, strict=True)] | None = None
    """results: which run, from 0, of a file that holds several."""
    model: Text | None = None
    """server, results: a catalogue name, or a folder with a config.json, from the scenario's folder."""
    gpu: Text | None = None
    tp: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    pp: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    precision: Text = "auto"
    """server, results: of the weights; auto keeps the checkpoint's."""
    kv_precision: Text = "auto"
    engine: Text = "vllm"
    """server, results: whose constants, optionally @version."""
    profile: Text | None = None
    """server, results: a shipped profile, or a file, from the scenario's folder."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        wanted = {"server": ("url", "served_model", "model", "gpu"), "results": ("file", "model", "gpu")}
        for name in wanted.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"engine.{name} must be given for kind {self.kind}, got none")
        return self


class Points(Part):
    """Operating points of single steps: every batch with every context."""

    batches: Batches
    contexts: Contexts

    def cells(self) -> list[tuple[int, int]]:
        return [(batch, context) for batch in self.batches for context in self.contexts]


class Steps(Part):
    """Timed steps: those that a fit sees and those that judge it."""

    rounds: Annotated[int, Field(ge=2, le=100, strict=True)] = 5
    repeats: Annotated[int, Field(ge=1, le=100, strict=True)] = 1
    """Timed steps of a point in one round; their median is its sample."""
    calibrated: Points
    validated: Points

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if len(self.validated.cells()) < 2:
            raise ValueError("steps.validated must hold 2 points at least, since one alone does not tell noise, got 1")
        shared = sorted(set(self.calibrated.cells()) & set(self.validated.cells()))
        if shared:
            raise ValueError(f"steps.validated must share no (batch, context) with steps.calibrated, got {shared[0]}")
        return self


class LoadCase(Part):
    """Open arrivals at a share of the engine's capacity; gamma gaps, cv 1 is Poisson."""

    name: Text
    utilisation: Annotated[float, Field(gt=0.0, le=2.0, allow_inf_nan=False)]
    gap_cv: Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)] = 1.0


class Loads(Part):
    """Requests with lengths uniform over two spans; every case is run once a seed, in shuffled order."""

    prompt_tokens: Span = (32, 96)
    output_tokens: Span = (16, 48)
    requests: Annotated[int, Field(ge=4, le=20_000, strict=True)] = 40
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31, strict=True)], ...], Field(min_length=1, max_length=32)]
    cases: Annotated[tuple[LoadCase, ...], Field(min_length=1, max_length=16)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("prompt_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"loads.{name} must rise, got {low}, {high}")
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError(f"loads.cases must have different names, got {', '.join(names)}")
        return self


class Speculation(Part):
    """Draft lengths to compare, and texts to count acceptance on; calibration and validation texts are apart.

    On vllm every second (batch, length) cell is calibrated and the others judge, in `rounds` repeats.
    """

    lengths: Lengths = (0, 1, 2, 3, 4, 5)
    batches: Batches = (1, 2, 4, 8, 16, 32)
    context: Annotated[int, Field(ge=16, le=65_536, strict=True)] = 192
    """Cached tokens at which lengths are compared."""
    prompts: Annotated[int, Field(ge=4, le=4096, strict=True)] = 64
    prompt_tokens: Annotated[int, Field(ge=2, le=65_536, strict=True)] = 64
    output_tokens: Annotated[int, Field(ge=8, le=65_536, strict=True)] = 32
    rounds: Annotated[int, Field(ge=2, le=100, strict=True)] = 4
    """vllm: repeats of every batch; texts of even ones calibrate acceptance, those of odd ones judge it."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if tuple(range(len(self.lengths))) != self.lengths or len(self.lengths) < 3:
            raise ValueError(f"speculation.lengths must be 0, 1, 2, ... without a gap, got {list(self.lengths)}")
        return self


class Budgets(Part):
    """Largest error allowed; a figure without one is reported, not judged. Shares, but for tokens and blocks."""

    decode_step_mape: Share | None = None
    speculative_step_mape: Share | None = None
    ttft_p50: Share | None = None
    ttft_p95: Share | None = None
    ttft_mean: Share | None = None
    tpot_mean: Share | None = None
    closed_form: Share | None = None
    """Of the closed form's figures of loads; None: as the simulator's."""
    mean_acceptance_length: Share | None = None
    """[tokens]"""
    draft_length_regret: Share | None = None
    """At every batch size."""
    mean_draft_length_regret: Share | None = None
    """Over batch sizes."""
    kv_blocks: Annotated[float, Field(ge=0.0)] | None = None
    """[blocks]"""
    table_followed: bool = False
    """The engine's own counters must show the emitted draft-length table, exactly."""


class NoiseLimits(Part):
    """Above these a figure is not judged."""

    step_cv: Share = 0.05
    """Median scatter of a timed step after the rounds' pace is taken out."""
    of_budget: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Standard error of a load's figure, of a mean acceptance length or of a regret, as a share of its budget."""


class Scenario(Part):
    """The whole file."""

    schema_: Annotated[Literal["servecast.scenario/1"], Field(alias="schema")]
    name: Text
    about: Annotated[str, Field(max_length=2000)] = ""
    engine: EngineSpec
    steps: Steps | None = None
    loads: Loads | None = None
    speculation: Speculation | None = None
    budgets: Budgets = Budgets()
    noise: NoiseLimits = NoiseLimits()
    seed: Annotated[int, Field(ge=0, le=2**31, strict=True)] = 1

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.engine.kind == "torch" and self.steps is None:
            raise ValueError("steps must be given for an engine of kind torch, got none")
        if self.engine.kind == "vllm" and self.speculation is None and self.loads is None:
            raise ValueError("speculation or loads must be given for an engine of kind vllm, got neither")
        if self.engine.kind != "torch" and self.steps is not None:
            raise ValueError(
                "steps goes with an engine of kind torch, whose state can be set; vllm takes its steps from "
                f"speculation.batches and speculation.lengths; got kind {self.engine.kind}"
            )
        if self.engine.kind in ("server", "results") and self.speculation is not None:
            raise ValueError(f"speculation goes with an engine of kind torch or vllm, got kind {self.engine.kind}")
        if self.engine.kind == "results" and self.loads is not None:
            raise ValueError("loads goes with an engine that is sent requests; a file of kind results holds its own")
        if self.engine.kind == "server" and self.loads is None:
            raise ValueError("loads must be given for an engine of kind server, got none")
        if self.engine.kind in ("server", "results"):
            for name in ("max_num_seqs", "max_num_batched_tokens"):
                if name not in self.engine.model_fields_set:
                    raise ValueError(f"engine.{name} must be given for kind {self.engine.kind}, got none")
        if self.steps is not None:
            self._check_steps(self.steps)
        if self.speculation is not None and self.engine.kind in ("torch", "vllm"):
            self._check_speculation(self.speculation)
        if self.loads is not None and self.engine.kind in ("torch", "vllm"):
            longest = self.loads.prompt_tokens[1] + self.loads.output_tokens[1]
            if self.loads.prompt_tokens[0] < 2:
                raise ValueError(f"loads.prompt_tokens must be at least 2, got {self.loads.prompt_tokens[0]}")
            if longest + ROOM > self.engine.max_model_len:
                raise ValueError(f"prompt and output must leave 16 of max_model_len free, got {longest} tokens")
        return self

    def _check_steps(self, steps: Steps) -> None:
        most = max(steps.calibrated.batches + steps.validated.batches)
        if most > self.engine.max_num_seqs:
            raise ValueError(f"batches must be at most max_num_seqs {self.engine.max_num_seqs}, got {most}")
        context = max(steps.calibrated.contexts + steps.validated.contexts)
        if context + ROOM > self.engine.max_model_len:
            raise ValueError(f"contexts must be below max_model_len - {ROOM}, got {context}")
        if self.engine.max_model_len > POSITIONS:
            raise ValueError(
                f"max_model_len must be at most {POSITIONS}, what the pair knows, got {self.engine.max_model_len}"
            )

    def _check_speculation(self, speculation: Speculation) -> None:
        most = max(speculation.batches)
        if most > self.engine.max_num_seqs:
            raise ValueError(f"speculation.batches must be at most max_num_seqs {self.engine.max_num_seqs}, got {most}")
        longest = max(speculation.context, speculation.prompt_tokens + speculation.output_tokens)
        if longest + ROOM > self.engine.max_model_len:
            raise ValueError(f"speculation must leave {ROOM} of max_model_len free, got {longest} tokens")
        if self.steps is not None and speculation.context in self.steps.calibrated.contexts:
            raise ValueError(
                f"speculation.context must be none of steps.calibrated.contexts, got {speculation.context} in both"
            )


def parse_scenario(value: object, *, name: str) -> Scenario:
    """A scenario from plain values, as YAML or JSON gives them.

    Raises
    ------
    ValueError : one line: file, key, rule, value.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: must be a mapping of keys such as schema, engine, budgets, got {shown(value)}")
    try:
        return Scenario.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{name}: {one_line(error, Scenario, schema=SCHEMA)}") from None


def shipped_scenarios() -> tuple[str, ...]:
    """Names of the scenarios in the package."""
    folder = resources.files("servecast.validation.scenarios")
    return tuple(sorted(one.name.removesuffix(".yaml") for one in folder.iterdir() if one.name.endswith(".yaml")))


def shipped_text(name: str) -> str:
    """YAML of one of them."""
    return resources.files("servecast.validation.scenarios").joinpath(f"{name}.yaml").read_text(encoding="utf-8")

"""What a live run showed, before anything is compared with it; the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from servecast.calibration.fits.engine_steps import StepSamples, StepsFit
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.validation.draft_choice import AcceptanceCount
from servecast.validation.pace import Probe
from servecast.validation.scheduler import EngineLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """One load case with one seed."""

    case: str
    seed: int
    utilisation: float
    """Asked for. [-]"""
    busy_share: float
    """Seen: share of the time that the engine computed; NaN where it does not say. [-]"""
    trace: Trace
    rows: RequestRows
    probes: tuple[Probe, ...] = ()
    """Of the machine's pace, in order of time; empty where nobody probed."""
    client_lag_s: float = 0.0
    """99th percentile of how late requests were sent: a client that was kept from its work. [s]"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSize:
    """What the naive roofline needs."""

    weight_bytes: float
    params: float
    bandwidth: float
    """Measured beside the run. [B/s]"""
    flops: float
    """Likewise. [1/s]"""


@dataclass(slots=True, kw_only=True)
class LiveFacts:
    """Filled as the run goes on; what is there when it stops is kept."""

    engine: dict[str, str | float] = field(default_factory=dict)
    """Name, version, device, threads and the like, for the report."""
    limits: EngineLimits | None = None
    size: EngineSize | None = None
    fit: StepsFit | None = None
    """From the calibrated points alone."""
    serving_fit: StepsFit | None = None
    """Of steps behind a server, where they are not those of `fit`."""
    validated: StepSamples | None = None
    """Plain decode steps that judge the fit."""
    drafted: StepSamples | None = None
    """Steps with drafts, likewise."""
    compared: StepSamples | None = None
    """Steps of every (batch, draft length), for the choice of lengths."""
    context: float = 0.0
    """Mean cached tokens per sequence in `compared`. [tokens]"""
    loads: list[LoadRun] = field(default_factory=list)
    acceptance_calibrated: list[AcceptanceCount] = field(default_factory=list)
    acceptance_validated: list[AcceptanceCount] = field(default_factory=list)
    kv_blocks: list[tuple[str, float, float]] = field(default_factory=list)
    """Setting, predicted, the engine's own. [blocks]"""
    table: dict[int, int] = field(default_factory=dict)
    """Draft length that was written for a batch size, by batch size that was run."""
    table_seen: dict[int, float] = field(default_factory=dict)
    """Draft tokens per draft that the engine counted there."""
    stopped: str | None = None
    """Why the run ended early."""
    notes: list[str] = field(default_factory=list)

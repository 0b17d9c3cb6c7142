"""What a live run showed, before anything is compared with it; the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from servecast.calibration.fits.engine_steps import StepSamples, StepsFit
from servecast.model.request_rows import RequestRows
from servecast.model.workload import Trace
from servecast.validation.draft_choice import AcceptanceCount
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
    paces: tuple[float, ...] = ()
    """Pace of the machine over the calibrated one, by timed decode steps in order of time; above 1 is slower. NaN where
    a probe could not be made, empty where nobody probed. [-]"""
    prompt_paces: tuple[float, ...] = ()
    """Likewise by steps with prompts in them: arithmetic binds those and memory the others, and what a neighbour takes
    of one is not what it takes of the other. Empty: as `paces`. [-]"""
    client_lag_s: float = 0.0
    """99th percentile of how late requests were sent: a client that was kept from its work. [s]"""
    notes: tuple[str, ...] = ()

    @property
    def pace(self) -> float:
        """Of decode steps, mean of the probes that were made; NaN where none was. [-]"""
        return _mean_and_error(self.paces)[0]

    @property
    def prompt_pace(self) -> float:
        """Of steps with prompts. [-]"""
        return _mean_and_error(self.prompt_paces or self.paces)[0]

    @property
    def pace_error(self) -> float:
        """Standard error of the less certain of both; NaN with fewer than two probes. [-]"""
        return max(_mean_and_error(one)[1] for one in (self.paces, self.prompt_paces or self.paces))

    @property
    def pace_before(self) -> float:
        """Of decode steps over the first half of the probes. [-]"""
        return float(np.mean(self.paces[: len(self.paces) // 2])) if len(self.paces) > 1 else float("nan")

    @property
    def pace_after(self) -> float:
        """Over the second half. [-]"""
        return float(np.mean(self.paces[len(self.paces) // 2 :])) if len(self.paces) > 1 else float("nan")

    @property
    def pace_change(self) -> float:
        """How far the machine changed its pace over the run; NaN where that is not known. [-]"""
        return abs(self.pace_after / self.pace_before - 1.0)


def _mean_and_error(probes: tuple[float, ...]) -> tuple[float, float]:
    """Of the finite ones."""
    made = np.array([one for one in probes if np.isfinite(one)])
    if made.size < 2:
        return (float(made[0]) if made.size else float("nan")), float("nan")
    return float(made.mean()), float(made.std(ddof=1) / np.sqrt(made.size))


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

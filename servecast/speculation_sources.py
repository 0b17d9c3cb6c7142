"""From what a user has, a sweep, an engine's own passes or a profile, to a table of decode speeds.

Messages name the options of ``servecast speculate``, whose fields these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.acceptance import AcceptanceFit, fit_acceptance
from servecast.calibration.fits.speculation_cells import CellsFit, fit_cells
from servecast.model.acceptance import AcceptanceCurve, AcceptanceSample, samples_by_length
from servecast.model.deployment import Deployment
from servecast.model.speculation_cells import SpeculationCells
from servecast.readers.speculation_cells import read_cells, read_labels
from servecast.speculation_tables import SpeedTable, table_from_cells, table_from_cost, with_contexts

Floats = NDArray[np.float64]

MAX_BATCH = 4096
"""Largest batch size that is planned for."""
MAX_LENGTH = 64
"""Longest draft that is planned or predicted: a fit has a parameter per length. [tokens]"""
PROFILE_BATCH, PROFILE_CONTEXT = 256, 1024.0
"""Largest batch size and cached tokens of a plan from a profile that names neither."""
PASS_SD = 0.03
"""Log standard deviation of an engine's own measured passes. [-]"""
PARALLEL_METHODS = frozenset({"dspark", "dflash"})
"""Draft methods that yield all positions in one pass."""
METHODS = ("eagle3", "eagle", "dspark", "dflash", "mtp", "ngram", "suffix")
"""Draft methods that the label of a sweep may name, longer names first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRequest:
    """Where step times and acceptance come from, and how far the table goes."""

    engine: str = "vllm"
    cells: Path | None = None
    """Measured cells of a sweep."""
    sweep_acceptance: Path | None = None
    """Acceptance that these cells had, where they have no column for it."""
    step_cost: Path | None = None
    """Measured passes."""
    model: str | None = None
    gpu: str | None = None
    tp: int = 1
    precision: str = "auto"
    profile: str | None = None
    method: str | None = None
    draft_model: str | None = None
    acceptance: Path | None = None
    """Acceptance of the load that is planned for."""
    acceptance_before: Path | None = None
    """Earlier snapshot of the same counters."""
    curve: str | None = None
    max_batch: int | None = None
    max_length: int | None = None
    contexts: tuple[float, ...] = ()
    measured_context: float | None = None
    """Cached tokens per request that cells or passes were measured at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSource:
    """A table, and what it was made from."""

    table: SpeedTable
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    """Model, drafter, engine, hardware, as a sweep names them."""
    fit: CellsFit | None = None
    model: str | None = None
    """Name of the target in full, where it was looked up."""
    acceptance: AcceptanceFit | None = None
    """Of the load, where a file was given."""


def speed_source(request: SpeedRequest) -> SpeedSource:
    """The table that `request` asks for; one-line errors where it asks for too much, or too little."""
    if request.cells is not None and request.step_cost is not None:
        raise ValueError("--cells and --step-cost were both given; costs come from one of them")
    if request.cells is not None:
        return _from_cells(request, request.cells)
    if request.acceptance is None:
        raise ValueError("--acceptance must be given where there are no --cells: nothing else says what is accepted")
    if request.step_cost is not None:
        return _from_passes(request, request.step_cost)
    if request.model and request.gpu:
        return _from_profile(request)
    raise ValueError("--cells, --step-cost, or --model with --gpu must be given: where step times come from")


def rival_source(path: Path, max_batch: int) -> SpeedSource:
    """Another draft method's sweep, for comparison at the same batch sizes."""
    fit = fit_cells(read_cells(path))
    table = table_from_cells(fit, max_batch=max_batch, max_length=fit.max_length)
    return SpeedSource(table=table, name=str(path), fit=fit)


def sweep_cells(cells: Path, sweep_acceptance: Path | None) -> SpeculationCells:
    """Cells of a sweep, with the acceptance of a file where they carry none of their own."""
    found = read_cells(cells)
    longest_draft(found, cells)
    if sweep_acceptance is None:
        return found
    if np.isfinite(found.mean_acceptance_length[found.gamma > 0]).any():
        raise ValueError("--sweep-acceptance and a column mean_acceptance_length were both given; take one away")
    from servecast.readers.acceptance import read_acceptance

    pooled = samples_by_length(read_acceptance(sweep_acceptance))
    known = {one.draft_length: one.mean_acceptance_length for one in pooled}
    length = [known.get(int(k), np.nan) if k else 1.0 for k in found.gamma]
    return replace(found, mean_acceptance_length=np.array(length))


def longest_draft(cells: SpeculationCells, path: Path) -> int:
    """Longest draft of some cells, refused where no fit would end in time. [tokens]"""
    longest = int(cells.gamma.max())
    if longest > MAX_LENGTH:
        raise ValueError(f"{path}: draft_length must be at most {MAX_LENGTH}, got {longest}")
    return longest


def method_of(drafter: str) -> str:
    """Draft method of a label such as "EAGLE3" or "DSpark"; eagle3 where the label says nothing."""
    folded = drafter.lower().replace("-", "").replace(" ", "")
    return next((name for name in METHODS if name in folded), "eagle3")


def _from_cells(request: SpeedRequest, path: Path) -> SpeedSource:
    cells = sweep_cells(path, request.sweep_acceptance)
    max_length = request.max_length or int(cells.gamma.max())
    fit = fit_cells(cells, max_length=max_length)
    acceptance, curve = _acceptance(request, max_length) if request.acceptance is not None else (None, None)
    contexts = np.unique(request.contexts) if request.contexts else None
    own = contexts if fit.has_context else None
    max_batch = request.max_batch or _largest(float(cells.batch.max()))
    table = table_from_cells(fit, max_batch=max_batch, max_length=max_length, contexts=own, curve=curve)
    if contexts is not None and own is None:
        if not (request.model and request.gpu):
            raise ValueError("--context needs a context_tokens column in the cells, or --model and --gpu")
        known = fit.reference_context if np.isfinite(cells.context).any() else None
        table = _at_contexts(table, request, known)
    return SpeedSource(table=table, name=str(path), labels=read_labels(path), fit=fit, acceptance=acceptance)


def _from_passes(request: SpeedRequest, path: Path) -> SpeedSource:
    from servecast.readers.step_costs import read_step_cost

    cost = read_step_cost(path, parallel=(request.method or "") in PARALLEL_METHODS)
    longest = _longest(request)
    acceptance, curve = _acceptance(request, longest)
    table = table_from_cost(
        cost,
        curve,
        max_batch=request.max_batch or _largest(float(cost.draft_requests[-1])),
        max_length=longest,
        cost_sd=PASS_SD,
        largest_rows=float(cost.rows[-1]),
    )
    if request.contexts:
        table = _at_contexts(table, request, None)
    return SpeedSource(table=table, name=str(path), acceptance=acceptance)


def _from_profile(request: SpeedRequest) -> SpeedSource:
    from servecast.calibration.profile import SHIPPED, load_profile
    from servecast.model.profiled_speculation import ProfiledCost
    from servecast.readers.catalogues import llm

    name = request.profile or SHIPPED
    own_drafter = request.method == "draft_model" and request.draft_model is not None
    drafter = llm(request.draft_model) if own_drafter and request.draft_model is not None else None
    target = _deployment(request)
    cost = ProfiledCost(load_profile(name), target, request.engine, drafter)
    longest = _longest(request)
    acceptance, curve = _acceptance(request, longest)
    table = table_from_cost(
        cost,
        curve,
        max_batch=request.max_batch or PROFILE_BATCH,
        max_length=longest,
        contexts=np.unique(request.contexts or (PROFILE_CONTEXT,)),
        cost_sd=cost.log_sd,
    )
    where = f"profile {name}, {target.llm.name} on {target.gpu.name} tp{target.tp}"
    return SpeedSource(table=table, name=where, model=target.llm.name, acceptance=acceptance)


def _samples(request: SpeedRequest) -> list[AcceptanceSample]:
    from servecast.readers.acceptance import read_acceptance
    from servecast.readers.acceptance_counters import counters_between, read_counters

    assert request.acceptance is not None  # noqa: S101 (callers ask for it first)
    if request.acceptance_before is None:
        return read_acceptance(request.acceptance, curve=request.curve)
    first, second = (
        read_counters(path, model=request.curve) for path in (request.acceptance_before, request.acceptance)
    )
    return [counters_between(first, second)]


def _longest(request: SpeedRequest) -> int:
    return request.max_length or max(one.draft_length for one in _samples(request))


def _acceptance(request: SpeedRequest, max_length: int) -> tuple[AcceptanceFit, AcceptanceCurve]:
    """The fit of the load's acceptance, and its curve."""
    samples = _samples(request)
    fit = fit_acceptance(samples, max_length=max(max_length, max(one.draft_length for one in samples)))
    return fit, fit.curve


def _largest(measured: float) -> int:
    """Largest batch size of a plan that names none: the largest measured, as far as a plan goes."""
    return int(min(max(measured, 1.0), MAX_BATCH))


def _deployment(request: SpeedRequest) -> Deployment:
    from servecast.readers.deployments import deployment

    if not (request.model and request.gpu):
        raise ValueError("--model and --gpu must be given for the cost of the cache")
    return deployment(request.model, request.gpu, request.engine, request.precision, tp=request.tp)


def _at_contexts(table: SpeedTable, request: SpeedRequest, known: float | None) -> SpeedTable:
    """The table at the contexts asked for, by what a cached token costs to read."""
    target = _deployment(request)
    reference = request.measured_context if request.measured_context is not None else known
    if reference is None:
        raise ValueError("--context needs --measured-context: the cached tokens that the costs were measured at")
    per_token = target.kv_bytes_per_token_per_gpu() / target.gpu.bandwidth_bytes_per_s
    return with_contexts(table, np.unique(request.contexts), cached_token_s=per_token, reference=reference)

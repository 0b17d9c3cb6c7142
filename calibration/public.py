"""The shipped profile, from public tables: AIConfigurator's kernel times and measured servers (Apache-2.0).

``python -m servecast.calibration.public_document --data DIR --out FILE`` redoes it. The measured-server rows fix a
handful of constants per engine; the kernels carry the transfer to models and widths that no server run covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits import kernels as kernel_fits
from servecast.calibration.fits.bands import bands_from, held_out_predictions
from servecast.calibration.fits.engine import EngineFit, Runs, constants, fit_engine
from servecast.model.deployment import Deployment
from servecast.model.engine import EngineConstants
from servecast.model.forecast import NOVELTY, Band, Metric, Novelty, Points, Profile, kernel_passes
from servecast.model.formats import ENGINES
from servecast.model.kernels import KernelParameters
from servecast.model.step_time import KernelSet
from servecast.readers import catalogues, kernel_tables
from servecast.readers.deployments import deployment
from servecast.readers.silicon import SiliconRow, inconsistent_series, read_silicon

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

TABLES = ("h100_sxm", "h200_sxm")
"""GPUs with public kernel tables."""
KNOWN_RUNS = 20
"""Runs of dense or of mixture-of-experts models on a GPU type from which it counts as seen."""
SUSPECT_MODELS = frozenset({"nvidia/Llama-3.1-8B-Instruct-FP8"})
"""Flagged by the table's own notes: faster than arithmetic at the stated concurrency allows."""

LATENT_ATTENTION = KernelParameters(floor_s=10e-6, bandwidth_efficiency=0.7, compute_efficiency=0.5)
"""Decode over a compressed cache: no public table, efficiencies assumed; the engines' constants absorb the rest."""
BLOCK_FP4 = KernelParameters(floor_s=5e-6, bandwidth_efficiency=0.75, compute_efficiency=0.5, exponent=1.5)
"""GEMM with 4-bit weights on GPUs with 4-bit units: no public table, assumed, corrected by `kernel_factor`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """Held-back errors of one kernel fit."""

    gpu: str
    kernel: str
    format: str
    rows: int
    numbers: int
    """Fitted numbers that stand for the table."""
    held_out: dict[str, kernel_fits.HeldOutError]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicRuns:
    """The measured-server table, ready to fit."""

    rows: list[SiliconRow]
    runs: Runs
    points: Points
    usable: Mask
    """A fit may see the row."""
    suspect: Mask
    inconsistent: Mask
    """In a series whose TPOT falls as the load rises."""
    answered: Mask
    """The log states the load; what a closed loop does without it cannot be told."""


def fit_kernels(data: Path) -> tuple[tuple[KernelSet, ...], list[KernelReport]]:
    """Kernel sets of the GPUs with tables, then the closed form for all others."""
    sets, reports = [], []
    for name in TABLES:
        kset, report = _fit_gpu(data / "aic-kernels" / name, name)
        sets.append(kset)
        reports += report
    return (*sets, _closed_form(sets)), reports


def load_runs(data: Path, kernels: tuple[KernelSet, ...]) -> PublicRuns:
    """The open aggregated rows with their kernel sums."""
    rows = read_silicon(data / "aic-silicon" / "agg.csv")
    points = silicon_points(rows)
    probe = Profile(
        name="",
        kernels=kernels,
        constants={},
        bands={},
        known_gpus=frozenset(),
        known_models=frozenset(),
        fitted_generations=frozenset(),
        ranges={},
    )
    sets = [probe.kernel_set(one.gpu) for one in points.deployments]
    passes = kernel_passes(kernels, sets, points)
    moe = np.array([one.llm.is_moe for one in points.deployments])[points.index]
    runs = Runs(
        passes=passes,
        engine=np.array([ENGINES.index(row.engine) for row in rows]),
        moe=moe,
        measured=np.array([kernels[number].measured for number in sets])[points.index],
        clients=points.clients,
        osl=points.osl,
        ttft_s=np.array([row.ttft_s for row in rows]),
        tpot_s=np.array([row.tpot_s for row in rows]),
        weight=_weights(rows, moe),
    )
    suspect = np.array([row.model in SUSPECT_MODELS for row in rows])
    flagged = inconsistent_series(rows)
    inconsistent = ~suspect & np.array([row.id in flagged for row in rows])
    answered = np.array([row.load_stated for row in rows])
    # the whole load prefilled at once, and half as much again: a longer wait is admission that the log does not show
    prompt = passes.prefill
    kernel_s = prompt.gemm_s + prompt.attention_s + prompt.collectives_s
    kernel_s = kernel_s + prompt.experts_memory_s / 0.7 + prompt.experts_compute_s / 0.5
    held_back = runs.ttft_s > 1.5 * runs.clients * kernel_s + 1.0
    limited = passes.batch < runs.clients
    usable = answered & ~suspect & ~inconsistent & ~held_back & ~limited
    return PublicRuns(
        rows=rows,
        runs=runs,
        points=points,
        usable=usable,
        suspect=suspect,
        inconsistent=inconsistent,
        answered=answered,
    )


def silicon_points(rows: Sequence[SiliconRow]) -> Points:
    """Operating points of measured rows; equal deployments are shared."""
    deployments: dict[tuple[object, ...], int] = {}
    made: list[Deployment] = []
    engines: list[str] = []
    index = np.empty(len(rows), dtype=np.intp)
    for position, row in enumerate(rows):
        key = (row.model, row.system, row.engine, row.precision, row.tp, row.dp, row.ep, row.pp)
        if key not in deployments:
            deployments[key] = len(made)
            made.append(
                deployment(row.model, row.system, row.engine, row.precision, tp=row.tp, pp=row.pp, dp=row.dp, ep=row.ep)
            )
            engines.append(row.engine)
        index[position] = deployments[key]
    return Points(
        deployments=tuple(made),
        engines=tuple(engines),
        index=index,
        clients=np.array([row.clients for row in rows]),
        isl=np.array([row.isl for row in rows]),
        osl=np.array([row.osl for row in rows]),
    )


def public_profile(data: Path) -> tuple[Profile, EngineFit, list[KernelReport], PublicRuns]:
    """Everything the shipped profile holds, and the fits behind it."""
    kernels, reports = fit_kernels(data)
    public = load_runs(data, kernels)
    fit = fit_engine(public.runs.take(np.flatnonzero(public.usable)))
    units = novelty_units(public.rows)
    bands: dict[tuple[Metric, bool, Novelty], Band] = {}
    scored = public.answered & ~public.suspect & ~public.inconsistent
    for level in NOVELTY:
        ttft, tpot = held_out_predictions(public.runs, units[level], public.usable)
        found = bands_from(public.runs, ttft, tpot, scored, units=len(set(units[level])))
        bands |= {(metric, moe, level): band for (metric, moe), band in found.items()}
    points = public.points
    gpus = np.array([one.gpus for one in points.deployments], dtype=float)[points.index]
    active = np.array([one.llm.params_active for one in points.deployments], dtype=float)[points.index]
    fitted = {"clients": points.clients, "isl": points.isl, "osl": points.osl, "gpus": gpus, "params_active": active}
    profile = Profile(
        name="public-2026.11",
        kernels=kernels,
        constants=constant_table(fit.theta),
        bands=bands,
        known_gpus=_known_gpus(public),
        fitted_generations=frozenset(
            (one.gpu.compute_capability or 0) // 10
            for position, one in enumerate(points.deployments)
            if not public.runs.measured[points.index == position].all()
        ),
        known_models=frozenset(
            points.deployments[position].llm.name for position in np.unique(points.index[public.usable])
        ),
        ranges={
            name: (float(values[public.usable].min()), float(values[public.usable].max()))
            for name, values in fitted.items()
        },
    )
    return profile, fit, reports, public


def novelty_units(rows: Sequence[SiliconRow]) -> dict[str, list[object]]:
    """What is held out together, by novelty: the shipped folds of groups, GPU types, models."""
    return {
        "group": [row.fold for row in rows],
        "gpu": [row.system for row in rows],
        "model": [row.model for row in rows],
    }


def _known_gpus(public: PublicRuns) -> frozenset[tuple[str, bool]]:
    """Pairs of GPU type and model class with enough runs in the fit to stand for it."""
    pairs = [
        (row.system, bool(moe))
        for row, moe, used in zip(public.rows, public.runs.moe, public.usable, strict=True)
        if used
    ]
    return frozenset(pair for pair in pairs if pairs.count(pair) >= KNOWN_RUNS)


def constant_table(theta: Floats) -> dict[tuple[str, bool, bool], EngineConstants]:
    """Scalar constants by (engine, mixture of experts, kernels measured)."""
    table = {}
    for number, engine in enumerate(ENGINES):
        for moe in (False, True):
            for measured in (False, True):
                one = constants(theta, np.array([number]), np.array([moe]), np.array([measured]))
                scalars = {name: float(np.asarray(getattr(one, name))[0]) for name in EngineConstants.__slots__}
                table[engine, moe, measured] = EngineConstants(**scalars)
    return table


def _weights(rows: Sequence[SiliconRow], moe: Mask) -> Floats:
    """Rows of a large group are near copies; dense and mixture-of-experts runs weigh alike, however many. [-]"""
    weight = _group_sizes(rows) ** -0.15
    weight /= np.sqrt(np.mean(weight**2))
    share = float(moe.mean())
    return np.where(moe, weight * np.sqrt(min((1.0 - share) / share, 1.0)) if share > 0.0 else weight, weight)


def _group_sizes(rows: Sequence[SiliconRow]) -> Floats:
    _, member, count = np.unique(np.array([row.group for row in rows]), return_inverse=True, return_counts=True)
    return np.asarray(count[member], dtype=np.float64)


def _fit_gpu(folder: Path, name: str) -> tuple[KernelSet, list[KernelReport]]:
    gpu = catalogues.gpu(name)
    bandwidth, bf16 = gpu.bandwidth_bytes_per_s, gpu.bf16_flops
    reports: list[KernelReport] = []

    def keep(kernel: str, fmt: str, fit: kernel_fits.KernelFit) -> KernelParameters:
        surface = fit.parameters.surface
        numbers = 4 + (surface.values.size if surface is not None else 0)
        reports.append(
            KernelReport(gpu=name, kernel=kernel, format=fmt, rows=fit.rows, numbers=numbers, held_out=fit.held_out)
        )
        return fit.parameters

    gemm = {
        fmt: keep(
            "gemm",
            fmt,
            kernel_fits.fit_gemm(columns, weight_format=fmt, peak_flops=gpu.peak_flops(fmt), bandwidth=bandwidth),
        )
        for fmt, columns in kernel_tables.read_gemm(folder / "gemm.csv.gz").items()
    }
    decode = {
        fmt: keep(
            "decode attention",
            fmt,
            kernel_fits.fit_decode_attention(columns, kv_format=fmt, peak_flops=bf16, bandwidth=bandwidth),
        )
        for fmt, columns in kernel_tables.read_decode_attention(folder / "generation_attention.csv.gz").items()
    }
    prompt = kernel_tables.read_prefill_attention(folder / "context_attention.csv.gz")["bf16"]
    prefill = keep(
        "prefill attention", "bf16", kernel_fits.fit_prefill_attention(prompt, peak_flops=bf16, bandwidth=bandwidth)
    )
    curves, held_out = kernel_fits.fit_all_reduce(kernel_tables.read_all_reduce(folder))
    rows = sum(error.rows for error in held_out.values())
    numbers = sum(len(curve.log_seconds) for curve in curves)
    reports.append(
        KernelReport(gpu=name, kernel="all-reduce", format="16 bit", rows=rows, numbers=numbers, held_out=held_out)
    )
    # weight-only formats run the 16-bit kernel on fewer bytes
    gemm |= dict.fromkeys(("fp16", "mxfp4", "nvfp4", "int4"), gemm["bf16"]) | {"int8": gemm["fp8"]}
    return (
        KernelSet(
            name=name,
            measured=True,
            gemm=gemm,
            decode_attention=decode,
            prefill_attention=prefill,
            latent_attention=LATENT_ATTENTION,
            all_reduce=curves,
            link_bandwidth_bytes_per_s=gpu.peer.bandwidth_bytes_per_s,
        ),
        reports,
    )


def _closed_form(sets: Sequence[KernelSet]) -> KernelSet:
    """Mean closed-form efficiencies of the measured GPUs, no surfaces."""

    def mean(parameters: Sequence[KernelParameters]) -> KernelParameters:
        return KernelParameters(
            floor_s=float(np.mean([one.floor_s for one in parameters])),
            bandwidth_efficiency=float(np.mean([one.bandwidth_efficiency for one in parameters])),
            compute_efficiency=float(np.mean([one.compute_efficiency for one in parameters])),
            exponent=float(np.mean([one.exponent for one in parameters])),
        )

    gemm = {fmt: mean([kset.gemm[fmt] for kset in sets]) for fmt in ("bf16", "fp8", "fp8_block")}
    # block quantisation as Hopper's kernels do it costs 80 us a call; parts of other generations have it in hardware
    gemm["fp8_block"] = gemm["fp8"]
    gemm |= {"fp16": gemm["bf16"], "mxfp4": gemm["bf16"], "int4": gemm["bf16"], "int8": gemm["fp8"], "nvfp4": BLOCK_FP4}
    last = sets[-1]
    return replace(
        last,
        name="closed form",
        measured=False,
        gemm=gemm,
        decode_attention={fmt: mean([kset.decode_attention[fmt] for kset in sets]) for fmt in ("bf16", "fp8")},
        prefill_attention=mean([kset.prefill_attention for kset in sets]),
    )

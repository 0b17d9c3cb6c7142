"""Writes the shipped profile from public tables:
``python -m servecast.calibration.public_document --data DIR --out FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from servecast.calibration.fits.engine import EngineFit, relative_error
from servecast.calibration.profile import (
    BandDoc,
    ConstantDoc,
    CurveDoc,
    EngineDoc,
    HeldOutDoc,
    KernelDoc,
    KernelSetDoc,
    KnownGpu,
    ProfileDocument,
    Provenance,
    SurfaceDoc,
    dumps,
)
from servecast.calibration.public import KernelReport, PublicRuns, public_profile
from servecast.model.engine import EngineConstants
from servecast.model.forecast import Profile
from servecast.model.kernels import KernelParameters
from servecast.model.step_time import KernelSet

SOURCES = (
    "AIConfigurator kernel tables (vLLM 0.24.0, NCCL 2.29.2; H100 SXM, H200 SXM), github.com/ai-dynamo/aiconfigurator "
    "at 095f58a",
    "AIConfigurator silicon_sample.csv, aggregated servers, open rows, same commit",
)


def document(
    profile: Profile, fit: EngineFit, reports: Sequence[KernelReport], public: PublicRuns, *, date: str
) -> ProfileDocument:
    """The profile with its errors and provenance."""
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    return ProfileDocument(
        schema_="servecast.profile/1",
        name=profile.name,
        provenance=Provenance(
            sources=SOURCES,
            licence="Apache-2.0",
            devices=tuple(sorted({gpu for gpu, _ in profile.known_gpus})),
            date=date,
            command="python -m servecast.calibration.public_document",
            servecast=version("servecast"),
            libraries={name: version(name) for name in ("numpy", "scipy")},
            seed=0,
            runs_fitted=fit.n,
            runs_scored=len(public.rows),
            log_residual_quantiles={
                "ttft": tuple(np.quantile(fit.log_residual_ttft, quantiles)),
                "tpot": tuple(np.quantile(fit.log_residual_tpot, quantiles)),
            },
        ),
        kernels=tuple(_kernel_set(kset, reports) for kset in profile.kernels),
        engines=tuple(
            EngineDoc(
                engine=engine,
                mixture_of_experts=moe,
                kernels_measured=measured,
                constants={
                    name: ConstantDoc(
                        value=float(np.asarray(getattr(constants, name))),
                        relative_standard_error=relative_error(fit, name, engine, moe=moe, measured=measured),
                        unit="s" if name.endswith("_s") else "-",
                    )
                    for name in EngineConstants.__slots__
                },
            )
            for (engine, moe, measured), constants in profile.constants.items()
        ),
        bands=tuple(
            BandDoc(metric=metric, mixture_of_experts=moe, novelty=novelty, lo=band.lo, hi=band.hi, n=band.n)
            for (metric, moe, novelty), band in profile.bands.items()
        ),
        known_gpus=tuple(KnownGpu(gpu=gpu, mixture_of_experts=moe) for gpu, moe in sorted(profile.known_gpus)),
        fitted_generations=tuple(sorted(profile.fitted_generations)),
        known_models=tuple(sorted(profile.known_models)),
        ranges=dict(profile.ranges),
    )


def _kernel_set(kset: KernelSet, reports: Sequence[KernelReport]) -> KernelSetDoc:
    def report(kernel: str, fmt: str) -> KernelReport | None:
        return next((r for r in reports if (r.gpu, r.kernel, r.format) == (kset.name, kernel, fmt)), None)

    return KernelSetDoc(
        name=kset.name,
        measured=kset.measured,
        link_bandwidth_bytes_per_s=kset.link_bandwidth_bytes_per_s,
        gemm=_kernels(dict(kset.gemm), {fmt: report("gemm", fmt) for fmt in kset.gemm}),
        decode_attention=_kernels(
            dict(kset.decode_attention), {fmt: report("decode attention", fmt) for fmt in kset.decode_attention}
        ),
        prefill_attention=_kernel(kset.prefill_attention, report("prefill attention", "bf16")),
        latent_attention=_kernel(kset.latent_attention, None),
        all_reduce=tuple(
            CurveDoc(ranks=c.ranks, log2_bytes=tuple(c.log2_bytes), log_seconds=tuple(c.log_seconds))
            for c in kset.all_reduce
        ),
    )


def _kernels(kernels: dict[str, KernelParameters], reports: dict[str, KernelReport | None]) -> dict[str, KernelDoc]:
    docs: dict[str, KernelDoc] = {}
    first: dict[int, str] = {}
    # formats that were measured come first, so that the others point to them
    for fmt in sorted(kernels, key=lambda name: (reports[name] is None, name)):
        owner = first.setdefault(id(kernels[fmt]), fmt)
        docs[fmt] = _kernel(kernels[fmt], reports[fmt]) if owner == fmt else KernelDoc(same_as=owner)
    return docs


def _kernel(kernel: KernelParameters, report: KernelReport | None) -> KernelDoc:
    surface = None
    if kernel.surface is not None:
        knots = tuple(tuple(axis) for axis in kernel.surface.knots)
        surface = SurfaceDoc(knots=knots, values=tuple(kernel.surface.values.ravel()))
    held_out = report.held_out if report else {}
    return KernelDoc(
        floor_s=kernel.floor_s,
        bandwidth_efficiency=kernel.bandwidth_efficiency,
        compute_efficiency=kernel.compute_efficiency,
        exponent=kernel.exponent,
        surface=surface,
        rows=report.rows if report else 0,
        held_out={
            name: HeldOutDoc(rows=e.rows, mape=e.mape, median=e.median, closed_form_median=e.closed_form_median)
            for name, e in held_out.items()
        },
    )


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Fit the shipped profile to public tables.")
    parser.add_argument("--data", type=Path, required=True, help="folder with aic-kernels/ and aic-silicon/")
    parser.add_argument("--out", type=Path, required=True, help="profile to write")
    parser.add_argument("--date", required=True, help="date to put into the provenance, YYYY-MM-DD")
    arguments = parser.parse_args()
    profile, fit, reports, public = public_profile(arguments.data)
    arguments.out.write_text(dumps(document(profile, fit, reports, public, date=arguments.date)), encoding="utf-8")


if __name__ == "__main__":
    main()

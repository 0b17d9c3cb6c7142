"""The records of a machine profile (`servecast.machine/1`), made from fits and turned back into them.

Samples lie in a file beside it, ``NAME.samples.jsonl.gz``, whose sha256 the document holds.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servecast.calibration.fits.curves import form_of
from servecast.calibration.fits.machine import HeldOut, KernelFit
from servecast.calibration.microbenchmarks.journal import Header, Sample, journal_text

SCHEMA = "servecast.machine/1"
MOST_FITS = 256

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Text = Annotated[str, Field(max_length=400)]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Document(BaseModel):
    """Immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ParameterDoc(Document):
    """One fitted parameter; `lo` and `hi` bound its 90 % interval."""

    value: Positive
    standard_error: NonNegative
    lo: Positive
    hi: Positive
    unit: Text


class HeldOutDoc(Document):
    """Log errors of one rival form on shapes that its fit did not see."""

    mean_abs_log: NonNegative
    rms_log: NonNegative


class FitDoc(Document):
    """One kernel in one number format."""

    kernel: Text
    dtype: Text
    form: Text
    parameters: Annotated[dict[str, ParameterDoc], Field(min_length=1, max_length=8)]
    covariance: Annotated[tuple[tuple[Finite, ...], ...], Field(max_length=8)]
    """Of the logarithms of the parameters, in their order."""
    degrees: Annotated[int, Field(ge=1, le=10**9)]
    held_out: Annotated[dict[str, HeldOutDoc], Field(max_length=16)] = {}
    error: NonNegative
    """Root mean square log error of predictions for one shape, beside that of the parameters."""
    drift: NonNegative
    """Standard deviation of the machine's common log factor between rounds."""
    residual_quantiles: Annotated[tuple[Finite, ...], Field(min_length=5, max_length=5)]
    ranges: Annotated[dict[str, tuple[Positive, Positive]], Field(max_length=8)]
    points: Count
    visits: Count
    rounds: Count
    suspects: Count
    peak_flops_per_s: NonNegative
    """Best measured; stands for a datasheet's."""
    peak_bytes_per_s: NonNegative


class MachineProvenance(Document):
    """Where the numbers come from."""

    device: Text
    environment: Annotated[dict[str, str | int | float], Field(max_length=64)]
    settings: Annotated[dict[str, str | int | float], Field(max_length=64)]
    date: Text
    command: Text
    servecast: Text
    seed: Annotated[int, Field(ge=0)]
    budget_s: Positive
    remarks: Annotated[tuple[Text, ...], Field(max_length=32)] = ()
    """What was wrong with samples."""


class SamplesDoc(Document):
    """The file of samples beside the document."""

    file: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of its unpacked content."""
    count: Count


class MachineDocument(Document):
    """The whole file."""

    schema_: Annotated[Literal["servecast.machine/1"], Field(alias="schema")]
    name: Name
    provenance: MachineProvenance
    fits: Annotated[tuple[FitDoc, ...], Field(min_length=1, max_length=MOST_FITS)]
    samples: SamplesDoc


def machine_document(
    name: str,
    fits: Sequence[KernelFit],
    header: Header,
    samples: Sequence[Sample],
    *,
    samples_file: str,
    date: str,
    command: str,
    servecast: str,
    budget_s: float,
    remarks: Sequence[str] = (),
) -> MachineDocument:
    """The document of a calibration."""
    if not fits:
        raise ValueError("samples must hold a kernel with three points or more, got none; give a larger budget")
    provenance = MachineProvenance(
        device=str(header.settings.get("device", "unknown")),
        environment=dict(header.environment),
        settings=dict(header.settings),
        date=date,
        command=command[:400],
        servecast=servecast,
        seed=int(header.settings.get("seed", 0)),
        budget_s=budget_s,
        remarks=tuple(one[:400] for one in remarks[:32]),
    )
    digest = hashlib.sha256(journal_text(header, list(samples)).encode()).hexdigest()
    return MachineDocument(
        schema_="servecast.machine/1",
        name=name,
        provenance=provenance,
        fits=tuple(map(_fit_doc, fits)),
        samples=SamplesDoc(file=samples_file, sha256=digest, count=len(samples)),
    )


def samples_bytes(header: Header, samples: Sequence[Sample]) -> bytes:
    """The file of samples: the same samples give the same bytes."""
    return gzip.compress(journal_text(header, list(samples)).encode(), mtime=0)


def _fit_doc(fit: KernelFit) -> FitDoc:
    errors = np.sqrt(np.diag(fit.covariance))
    parameters = {}
    for one, log_value, error in zip(fit.form.parameters, fit.log_values.tolist(), errors.tolist(), strict=True):
        # beyond e^+-200 an interval says "unknown" and stays a number of JSON
        half = min(fit.quantile * error, 200.0)
        parameters[one.name] = ParameterDoc(
            value=_short(math.exp(log_value)),
            standard_error=_short(math.exp(log_value) * error),
            lo=_short(math.exp(log_value - half)),
            hi=_short(math.exp(log_value + half)),
            unit=one.unit,
        )
    return FitDoc(
        kernel=fit.kernel,
        dtype=fit.dtype,
        form=fit.form.name,
        parameters=parameters,
        covariance=tuple(tuple(_short(one) for one in row) for row in fit.covariance.tolist()),
        degrees=fit.degrees,
        held_out={
            one.form: HeldOutDoc(mean_abs_log=_short(one.mean_abs_log), rms_log=_short(one.rms_log))
            for one in fit.held_out
        },
        error=_short(fit.error),
        drift=_short(fit.drift),
        residual_quantiles=tuple(map(_short, fit.residual_quantiles)),
        ranges=dict(fit.ranges),
        points=fit.points,
        visits=fit.visits,
        rounds=fit.rounds,
        suspects=fit.suspects,
        peak_flops_per_s=_short(fit.peaks[0]),
        peak_bytes_per_s=_short(fit.peaks[1]),
    )


def _short(value: float) -> float:
    return float(f"{value:.8g}")


def dumps(document: MachineDocument) -> str:
    """JSON text, indented."""
    return document.model_dump_json(by_alias=True, indent=1) + "\n"


def fit_of(doc: FitDoc) -> KernelFit:
    """The fit that a document describes, to predict with."""
    return KernelFit(
        kernel=doc.kernel,
        dtype=doc.dtype,
        form=form_of(doc.kernel, doc.form),
        log_values=np.log([one.value for one in doc.parameters.values()]),
        covariance=np.array(doc.covariance),
        degrees=doc.degrees,
        held_out=tuple(HeldOut(form=name, **one.model_dump()) for name, one in doc.held_out.items()),
        drift=doc.drift,
        residual_quantiles=doc.residual_quantiles,
        ranges=doc.ranges,
        points=doc.points,
        visits=doc.visits,
        rounds=doc.rounds,
        suspects=doc.suspects,
        peaks=(doc.peak_flops_per_s, doc.peak_bytes_per_s),
    )

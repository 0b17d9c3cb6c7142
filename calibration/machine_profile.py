"""The machine profile as a file (`servecast.machine/1`), and predictions from it with intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from servecast.calibration.fits.curves import AXES, family_of, form_of
from servecast.calibration.fits.machine import KernelFit, columns_of, kernel_sum, log_deviation, predict
from servecast.calibration.machine_document import FitDoc, MachineDocument, ParameterDoc, fit_of
from servecast.calibration.microbenchmarks.journal import read_bytes
from servecast.model.kernels import AllReduceCurve, KernelParameters
from servecast.model.prediction import Z90, Prediction

MAX_BYTES = 4 * 2**20
MOST_DEVIATION = 200.0
"""Half of an interval, in logs, that stands for "unknown": its ends are still numbers."""


class MachineModel:
    """Seconds of kernels on the machine of a profile.

    An interval covers one measurement of one shape: the parameters' uncertainty and the error that the form had on
    shapes it did not see. `calibrated` is false where a size lies outside what was measured.
    """

    def __init__(self, document: MachineDocument) -> None:
        self.name = document.name
        self._fits = {(one.kernel, one.dtype): fit_of(one) for one in document.fits}

    @property
    def kernels(self) -> tuple[tuple[str, str], ...]:
        """(kernel, dtype) of all fits."""
        return tuple(self._fits)

    def gemm_seconds(self, m: float, n: float, k: float, dtype: str) -> Prediction:
        """C[m, n] = A[m, k] W[n, k]^T. [s]"""
        return self.seconds("gemm", dtype, m=m, n=n, k=k)

    def decode_attention_seconds(
        self, batch: float, context: float, heads: float, kv_heads: float, dtype: str
    ) -> Prediction:
        """One new token for each of `batch` sequences over `context` cached ones, head size 128. [s]"""
        return self.seconds("decode_attention", dtype, batch=batch, context=context, heads=heads, kv_heads=kv_heads)

    def prefill_attention_seconds(
        self, batch: float, length: float, heads: float, kv_heads: float, dtype: str
    ) -> Prediction:
        """Causal attention within `batch` prompts of `length` tokens, head size 128. [s]"""
        return self.seconds("prefill_attention", dtype, batch=batch, length=length, heads=heads, kv_heads=kv_heads)

    def layer_seconds(self, rows: float, context: float, dtype: str) -> Prediction:
        """One decoder layer of the measured widths: `rows` sequences over `context` cached tokens. [s]"""
        widths = {name: ends[1] for name, ends in self._fit("layer", dtype).ranges.items()}
        return self.seconds("layer", dtype, **{**widths, "rows": rows, "context": context})

    def copy_seconds(self, kind: str, nbytes: float) -> Prediction:
        """A copy by the kernel's name, such as ``copy_h2d_pinned``, ``copy_host`` or ``memory_copy``. [s]"""
        return self.seconds(kind, "u8", bytes=nbytes)

    def all_reduce_seconds(self, nbytes: float) -> Prediction:
        """Over the number of processes that were measured. [s]"""
        return self.seconds("all_reduce", "u8", bytes=nbytes)

    def seconds(self, kernel: str, dtype: str, **sizes: float) -> Prediction:
        """Any kernel by its own sizes. [s]

        Raises
        ------
        ValueError : the profile has no such kernel, or a size is missing or not positive.
        """
        value, deviation, inside = self.many(kernel, dtype, **sizes)
        half = min(float(deviation[0]) * Z90, MOST_DEVIATION)
        middle = float(value[0])
        return Prediction(
            value=middle, lo=middle * math.exp(-half), hi=middle * math.exp(half), calibrated=bool(inside[0])
        )

    def many(
        self, kernel: str, dtype: str, **sizes: ArrayLike
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Arrays [n]: seconds, standard deviation of their logs (a 90 % interval is 1.645 of it), inside the range."""
        fit = self._fit(kernel, dtype)
        arrays = dict(
            zip(sizes, np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, float)) for x in sizes.values())), strict=True)
        )
        columns = columns_of(kernel, dtype, arrays)
        if fit.form.name == "kernel_sum":
            parts = self._fit("gemm", dtype), self._fit("decode_attention", dtype)
            columns["kernel_sum_s"] = kernel_sum(*parts, columns)
        of_parameters = log_deviation(fit.form, fit.log_values, fit.covariance, columns) * fit.quantile / Z90
        inside = np.ones(len(columns["flops"]), dtype=np.bool_)
        for axis, (low, high) in fit.ranges.items():
            inside &= (columns[axis] >= low) & (columns[axis] <= high)
        return predict(fit, columns), np.hypot(of_parameters, fit.error), inside

    def kernel_parameters(
        self, kernel: str, dtype: str, *, peak_flops: float | None = None, bandwidth: float | None = None
    ) -> KernelParameters:
        """The model's record of a roofline; efficiencies are over the datasheet, or over the best rates measured."""
        fit = self._fit(kernel, dtype)
        values = dict(zip((one.name for one in fit.form.parameters), np.exp(fit.log_values).tolist(), strict=True))
        if fit.form.name not in ("sum", "rounded", "free"):
            raise ValueError(f"{kernel} {dtype} must be fitted by a roofline, got the form {fit.form.name}")
        return KernelParameters(
            floor_s=values["floor_s"],
            bandwidth_efficiency=values["bandwidth_bytes_per_s"] / (bandwidth or fit.peaks[1]),
            compute_efficiency=values["compute_flops_per_s"] / (peak_flops or fit.peaks[0]),
            exponent={"sum": 1.0, "rounded": 2.0}.get(fit.form.name, values.get("exponent", 2.0)),
        )

    def all_reduce_curve(self, ranks: int = 2) -> AllReduceCurve:
        """The model's record: the fitted curve at every power of two that was measured."""
        low, high = self._fit("all_reduce", "u8").ranges["bytes"]
        log2_bytes = np.arange(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1.0)
        seconds, _, _ = self.many("all_reduce", "u8", bytes=2.0**log2_bytes)
        return AllReduceCurve(ranks=ranks, log2_bytes=log2_bytes, log_seconds=np.log(seconds))

    def _fit(self, kernel: str, dtype: str) -> KernelFit:
        if (kernel, dtype) not in self._fits:
            known = ", ".join(f"{one} {kind}" for one, kind in self._fits)
            raise ValueError(f"kernel must be one of {known}, got {kernel[:40]} {dtype[:10]}")
        return self._fits[kernel, dtype]


def parse_machine(text: str, name: str = "machine profile") -> MachineDocument:
    """A document from its text; ValueError in one line where it is none, or does not hold together."""
    try:
        document = MachineDocument.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise ValueError(f"{name}: {where[:80]}: {first['msg'][:200]}") from None
    seen: set[tuple[str, str]] = set()
    for fit in document.fits:
        what = f"{name}: fit {fit.kernel} {fit.dtype}"
        if (fit.kernel, fit.dtype) in seen:
            raise ValueError(f"{what} must be there once, got it twice")
        seen.add((fit.kernel, fit.dtype))
        try:
            _require_consistent(fit)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    return document


def _require_consistent(fit: FitDoc) -> None:
    """Parameters are those of the form, the covariance is one, ranges are those of the kernel."""
    form = form_of(fit.kernel, fit.form)
    names = [one.name for one in form.parameters]
    if list(fit.parameters) != names:
        raise ValueError(f"parameters must be {', '.join(names)}, got {', '.join(fit.parameters)[:80]}")
    matrix = fit.covariance
    if len(matrix) != len(names) or any(len(row) != len(names) for row in matrix):
        raise ValueError(f"covariance must be {len(names)} by {len(names)}")
    array = np.array(matrix)
    if np.abs(array).max() > 1e12 or not np.allclose(array, array.T, rtol=1e-6, atol=1e-12):
        raise ValueError("covariance must be symmetric and below 1e12")
    if np.linalg.eigvalsh(array).min() < -1e-6 * max(np.abs(array).max(), 1e-300):
        raise ValueError("covariance must have no negative eigenvalue")
    for name, one in fit.parameters.items():
        if not one.lo <= one.value <= one.hi:
            raise ValueError(f"{name} must lie in its interval, got {one.value:g} outside {one.lo:g} to {one.hi:g}")
    axes = AXES[family_of(fit.kernel)]
    if set(fit.ranges) != set(axes):
        raise ValueError(f"ranges must be those of {', '.join(axes)}, got {', '.join(fit.ranges)[:80]}")
    for name, (low, high) in fit.ranges.items():
        if low > high:
            raise ValueError(f"range of {name} must have its least first, got {low:g} and {high:g}")
    if list(fit.residual_quantiles) != sorted(fit.residual_quantiles):
        raise ValueError("residual_quantiles must increase")


def shipped_machines() -> dict[str, Path]:
    """Files of the shipped machine profiles, by name."""
    folder = Path(str(resources.files("servecast.calibration.machines")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read_machine(path: str | Path) -> MachineDocument:
    """A document from its file, or a shipped one by name."""
    path = shipped_machines().get(str(path), Path(path))
    if not path.is_file():
        raise ValueError(f"machine profile must be a file, got {path.name!r}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name}: must be at most {MAX_BYTES >> 20} MiB, got {path.stat().st_size} bytes")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}: must be UTF-8") from None
    return parse_machine(text, path.name)


def check_samples(document: MachineDocument, folder: Path) -> str:
    """What is to be said of the file of samples: "absent" or "matches"; ValueError where it is another file."""
    path = folder / document.samples.file
    if not path.is_file():
        return "absent"
    found = hashlib.sha256(read_bytes(path)).hexdigest()
    if found != document.samples.sha256:
        raise ValueError(
            f"{path.name}: sha256 must be {document.samples.sha256[:12]}..., got {found[:12]}...; it is another file"
        )
    return "matches"


def intervals(document: MachineDocument) -> Mapping[str, ParameterDoc]:
    """Parameters by ``kernel.dtype.name``."""
    return {f"{fit.kernel}.{fit.dtype}.{name}": one for fit in document.fits for name, one in fit.parameters.items()}

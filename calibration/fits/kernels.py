"""Kernel tables (one row per shape, seconds) to :class:`KernelParameters`, with errors on shapes that were held back.

The closed form is fitted first (soft-L1 in log time), then the surface that corrects it. The held-back error comes from
a second fit that leaves out every fifth weight shape (GEMM: a pair n, k; attention: a set of heads), never single rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from servecast.calibration.fits.surfaces import fit_surface
from servecast.model.formats import BYTES_PER_ELEMENT
from servecast.model.kernels import (
    AllReduceCurve,
    KernelParameters,
    all_reduce_seconds,
    decode_attention_seconds,
    gemm_seconds,
    prefill_attention_seconds,
)

Floats = NDArray[np.float64]
Columns = dict[str, Floats]

GEMM_KNOTS = (
    np.array([0.0, 3, 5, 6, 7, 8, 10, 12, 15]),
    np.array([5.0, 9, 11, 13, 16]),
    np.array([5.0, 9, 11, 13, 16]),
)
"""log2 of m, n, k; dense in m where kernels change tile shapes."""
DECODE_KNOTS = (
    np.array([12.0, 20, 23, 25, 27, 29, 31, 34]),
    np.array([0.0, 1, 2, 3, 4, 6]),
    np.array([0.0, 3, 6, 9, 13]),
)
"""log2 of KV bytes, of query heads per KV head, of batch x KV heads (parallel work items)."""
PREFILL_KNOTS = (
    np.array([0.0, 7, 9, 10, 11, 12, 13, 14]),
    np.array([0.0, 3, 5, 7, 10, 13]),
    np.array([6.0, 7, 8]),
)
"""log2 of prompt length, of batch x heads, of head size."""
ALL_REDUCE_KNOTS = np.array([8.0, 12, 14, 16, 18, 20, 22, 24, 26, 29])
"""log2 of message bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutError:
    """Absolute percentage errors on shapes left out of a fit; `closed_form` is the same without the surface."""

    rows: int
    mape: float
    median: float
    closed_form_median: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFit:
    """Parameters fitted to all rows, and the errors of a fit that did not see a fifth of the shapes."""

    parameters: KernelParameters
    rows: int
    held_out: dict[str, HeldOutError]
    """By slice of the table, for instance ``m >= 256``."""


Model = Callable[[KernelParameters, Columns], Floats]


def fit_gemm(columns: Columns, *, weight_format: str, peak_flops: float, bandwidth: float) -> KernelFit:
    """GEMM table with columns m, n, k, seconds."""
    element = BYTES_PER_ELEMENT[weight_format]

    def model(parameters: KernelParameters, rows: Columns) -> Floats:
        return gemm_seconds(
            parameters,
            rows["m"],
            rows["n"],
            rows["k"],
            weight_bytes_per_element=element,
            activation_bytes_per_element=element,
            peak_flops=peak_flops,
            bandwidth=bandwidth,
        )

    return _fit(
        columns,
        model,
        tuple(np.log2(columns[axis]) for axis in ("m", "n", "k")),
        GEMM_KNOTS,
        shape=columns["n"] * 1e6 + columns["k"],
        slices={"m >= 256": columns["m"] >= 256, "m < 256": columns["m"] < 256},
    )


def fit_decode_attention(columns: Columns, *, kv_format: str, peak_flops: float, bandwidth: float) -> KernelFit:
    """Decode table with columns batch, context, heads, kv_heads, head_dim, seconds."""
    element = BYTES_PER_ELEMENT[kv_format]

    def model(parameters: KernelParameters, rows: Columns) -> Floats:
        return decode_attention_seconds(
            parameters,
            *(rows[name] for name in ("batch", "context", "heads", "kv_heads", "head_dim")),
            kv_bytes_per_element=element,
            peak_flops=peak_flops,
            bandwidth=bandwidth,
        )

    nbytes = 2.0 * columns["batch"] * columns["context"] * columns["kv_heads"] * columns["head_dim"] * element
    coordinates = (
        np.log2(nbytes),
        np.log2(np.maximum(columns["heads"] / columns["kv_heads"], 1.0)),
        np.log2(columns["batch"] * columns["kv_heads"]),
    )
    slices = {"KV >= 16 MB": nbytes >= 16e6, "KV < 16 MB": nbytes < 16e6}
    return _fit(columns, model, coordinates, DECODE_KNOTS, shape=_head_shape(columns), slices=slices)


def fit_prefill_attention(columns: Columns, *, peak_flops: float, bandwidth: float) -> KernelFit:
    """Prefill table with columns batch, length, heads, kv_heads, head_dim, seconds."""

    def model(parameters: KernelParameters, rows: Columns) -> Floats:
        return prefill_attention_seconds(
            parameters,
            *(rows[name] for name in ("batch", "length", "heads", "kv_heads", "head_dim")),
            peak_flops=peak_flops,
            bandwidth=bandwidth,
        )

    coordinates = (
        np.log2(columns["length"]),
        np.log2(columns["batch"] * columns["heads"]),
        np.log2(columns["head_dim"]),
    )
    work = 2.0 * columns["batch"] * columns["heads"] * columns["head_dim"] * columns["length"] ** 2
    slices = {"work >= 1 GFLOP": work >= 1e9, "work < 1 GFLOP": work < 1e9}
    return _fit(columns, model, coordinates, PREFILL_KNOTS, shape=_head_shape(columns), slices=slices)


def fit_all_reduce(columns: Columns) -> tuple[tuple[AllReduceCurve, ...], dict[str, HeldOutError]]:
    """Table with columns ranks, bytes, seconds (the fastest implementation at each size) to curves, one per rank count.

    The held-back error drops every second message size and predicts it from the others.
    """
    keep = np.zeros(len(columns["bytes"]), dtype=bool)
    for ranks in np.unique(columns["ranks"]):
        of_ranks = np.flatnonzero(columns["ranks"] == ranks)
        keep[of_ranks[np.argsort(columns["bytes"][of_ranks])][::2]] = True
    half = _all_reduce_curves({name: column[keep] for name, column in columns.items()})
    error = np.abs(all_reduce_seconds(half, columns["bytes"], columns["ranks"]) / columns["seconds"] - 1.0)
    large = columns["bytes"] >= 2**20
    held_out = {
        name: HeldOutError(
            rows=int(rows.sum()),
            mape=float(error[rows].mean()),
            median=float(np.median(error[rows])),
            closed_form_median=_alpha_beta_error(columns, keep, rows & ~keep),
        )
        for name, rows in {"bytes >= 1 MiB": large & ~keep, "bytes < 1 MiB": ~large & ~keep}.items()
    }
    return _all_reduce_curves(columns), held_out


def closed_form(parameters: KernelParameters) -> KernelParameters:
    """The same efficiencies without the surface."""
    return replace(parameters, surface=None)


def _head_shape(columns: Columns) -> Floats:
    return columns["heads"] * 1e6 + columns["kv_heads"] * 1e3 + columns["head_dim"]


def _fit(
    columns: Columns,
    model: Model,
    coordinates: tuple[Floats, ...],
    knots: tuple[Floats, ...],
    *,
    shape: Floats,
    slices: dict[str, NDArray[np.bool_]],
) -> KernelFit:
    held = _every_fifth(shape)
    trained = _fit_rows(columns, model, coordinates, knots, ~held)
    seconds = columns["seconds"]
    error = np.abs(model(trained, columns) / seconds - 1.0)
    plain = np.abs(model(closed_form(trained), columns) / seconds - 1.0)
    held_out = {
        name: HeldOutError(
            rows=int((rows & held).sum()),
            mape=float(error[rows & held].mean()),
            median=float(np.median(error[rows & held])),
            closed_form_median=float(np.median(plain[rows & held])),
        )
        for name, rows in slices.items()
    }
    everything = np.ones(len(seconds), dtype=bool)
    parameters = _fit_rows(columns, model, coordinates, knots, everything)
    return KernelFit(parameters=parameters, rows=len(seconds), held_out=held_out)


def _every_fifth(shape: Floats) -> NDArray[np.bool_]:
    """Rows of one fifth of the distinct shapes, drawn with a fixed seed."""
    distinct, group = np.unique(shape, return_inverse=True)
    return np.asarray(np.random.default_rng(0).permutation(len(distinct))[group] % 5 == 0)


def _fit_rows(
    columns: Columns, model: Model, coordinates: tuple[Floats, ...], knots: tuple[Floats, ...], rows: NDArray[np.bool_]
) -> KernelParameters:
    chosen = {name: column[rows] for name, column in columns.items()}
    log_seconds = np.log(chosen["seconds"])

    def parameters(theta: Floats) -> KernelParameters:
        return KernelParameters(
            floor_s=float(np.exp(theta[0])) * 1e-6,
            bandwidth_efficiency=float(theta[1]),
            compute_efficiency=float(theta[2]),
            exponent=float(theta[3]),
        )

    def residuals(theta: Floats) -> Floats:
        return np.log(model(parameters(theta), chosen)) - log_seconds

    solution = least_squares(
        residuals,
        np.array([np.log(5.0), 0.75, 0.7, 2.0]),
        # efficiencies stay physical: a constant of the kernel must not hide in a bandwidth above the datasheet's
        bounds=([np.log(0.5), 0.02, 0.02, 1.0], [np.log(200.0), 1.0, 1.0, 6.0]),
        loss="soft_l1",
        f_scale=0.1,
    )
    plain = parameters(solution.x)
    ratio = log_seconds - np.log(model(plain, chosen))
    return replace(plain, surface=fit_surface(tuple(x[rows] for x in coordinates), ratio, knots))


def _all_reduce_curves(columns: Columns) -> tuple[AllReduceCurve, ...]:
    """An alpha-beta line per rank count, corrected at the knots: protocols switch with size, one line misses them."""
    curves = []
    for ranks in np.unique(columns["ranks"]):
        of_ranks = columns["ranks"] == ranks
        size, seconds = columns["bytes"][of_ranks], columns["seconds"][of_ranks]
        line = _alpha_beta(size, seconds)
        ratio = np.log(seconds / line(size))
        surface = fit_surface((np.log2(size),), ratio, (ALL_REDUCE_KNOTS,), ridge=1e-3)
        at_knots = np.log(line(2.0**ALL_REDUCE_KNOTS)) + surface.values
        curves.append(AllReduceCurve(ranks=int(ranks), log2_bytes=ALL_REDUCE_KNOTS, log_seconds=at_knots))
    return tuple(curves)


def _alpha_beta(size: Floats, seconds: Floats) -> Callable[[Floats], Floats]:
    """``alpha + bytes / beta`` by least squares on log time."""

    def line(theta: Floats, nbytes: Floats) -> Floats:
        return np.asarray(np.exp(theta[0]) + nbytes * np.exp(theta[1]), dtype=np.float64)

    def residuals(theta: Floats) -> Floats:
        return np.log(line(theta, size) / seconds)

    return partial(line, least_squares(residuals, np.log([1e-5, 5e-12])).x)


def _alpha_beta_error(columns: Columns, keep: NDArray[np.bool_], rows: NDArray[np.bool_]) -> float:
    """Median error on `rows` of one alpha-beta line per rank count fitted on `keep`: the usual baseline."""
    errors = []
    for ranks in np.unique(columns["ranks"]):
        trained, tested = (columns["ranks"] == ranks) & keep, (columns["ranks"] == ranks) & rows
        line = _alpha_beta(columns["bytes"][trained], columns["seconds"][trained])
        errors.append(np.abs(line(columns["bytes"][tested]) / columns["seconds"][tested] - 1.0))
    return float(np.median(np.concatenate(errors)))

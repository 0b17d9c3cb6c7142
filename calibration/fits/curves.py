r"""Rival forms of a kernel's time, each through the model's own functions, with parameters that are all positive.

Families and their sizes stand in `AXES`. A roofline is :math:`t_0 + ((bytes / B)^q + (flop / F)^q)^{1/q}`
(:func:`servecast.model.kernels.roofline_seconds`); its rivals fix q at 1 (nothing overlaps) or 2, fit it, or add
work of `half` further rows (units that fill up: rate F m / (m + half)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.model.formats import BYTES_PER_ELEMENT
from servecast.model.kernels import (
    KernelParameters,
    decode_attention_seconds,
    gemm_seconds,
    prefill_attention_seconds,
    roofline_seconds,
)

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]

HEAD_DIM = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One positive parameter, fitted in its logarithm."""

    name: str
    unit: str
    time_power: int
    """1 for a time, -1 for a rate, 0 else: how it moves when every measured time is scaled."""
    spread: float = 3.0
    """Standard deviation, in logs, of a weak prior around the start: bounds what the data do not determine."""


FLOOR = Parameter(name="floor_s", unit="s", time_power=1, spread=1.5)
LATENCY = Parameter(name="latency_s", unit="s", time_power=1)
BANDWIDTH = Parameter(name="bandwidth_bytes_per_s", unit="B/s", time_power=-1)
COMPUTE = Parameter(name="compute_flops_per_s", unit="FLOP/s", time_power=-1)
EXPONENT = Parameter(name="exponent", unit="", time_power=0, spread=0.7)
HALF = Parameter(name="half_rows", unit="", time_power=0, spread=1.5)
KNEE = Parameter(name="knee_bytes", unit="B", time_power=0, spread=2.0)
BEYOND = Parameter(name="bandwidth_beyond_bytes_per_s", unit="B/s", time_power=-1)
PER_OP = Parameter(name="per_op_s", unit="s", time_power=1)
PER_LAYER = Parameter(name="per_layer_s", unit="s", time_power=1, spread=1.5)
FACTOR = Parameter(name="kernel_factor", unit="", time_power=1, spread=0.7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A rival: named parameters and seconds as a function of them."""

    name: str
    parameters: tuple[Parameter, ...]
    seconds: Callable[[Floats, Columns], Floats]
    """Parameters [..., p] and columns [n] to seconds [..., n]."""
    start: Callable[[Columns, Floats], tuple[float, ...]]
    """Columns and measured seconds to a first guess."""


def forms_of(kernel: str, columns: Columns) -> tuple[Form, ...]:
    """Rivals of a kernel, the simplest first."""
    family = family_of(kernel)
    if family == "layer" and "kernel_sum_s" in columns:
        return (*FORMS[family], KERNEL_SUM)
    return FORMS[family]


def form_of(kernel: str, name: str) -> Form:
    """By the names that a document holds."""
    family = family_of(kernel)
    for one in (*FORMS[family], KERNEL_SUM):
        if one.name == name:
            return one
    raise ValueError(f"form of {kernel} must be one of {', '.join(one.name for one in FORMS[family])}, got {name!r}")


def family_of(kernel: str) -> str:
    """The family that a kernel's name belongs to; ValueError for a name that is not known."""
    known = {"gemm": "gemm", "decode_attention": "decode", "prefill_attention": "prefill", "layer": "layer"}
    if kernel in known:
        return known[kernel]
    if kernel in ("launch", "host"):
        return "ops"
    if kernel in ("all_reduce", "send_recv") or kernel.startswith(("memory_", "copy_", "disk_read_")):
        return "bytes"
    raise ValueError(f"kernel must be one that is measured, such as gemm, got {kernel[:40]!r}")


AXES: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "decode": ("batch", "context", "heads", "kv_heads"),
    "prefill": ("batch", "length", "heads", "kv_heads"),
    "layer": ("rows", "context", "hidden", "heads", "kv_heads", "intermediate"),
    "bytes": ("bytes",),
    "ops": ("ops",),
}
"""Sizes that a point of a family must have."""
GROUPS: dict[str, tuple[str, ...]] = {
    "gemm": ("n", "k"),
    "decode": ("context",),
    "prefill": ("length",),
    "layer": ("rows",),
    "bytes": ("bytes",),
    "ops": ("ops",),
}
"""Sizes that are held out together."""


def work(kernel: str, dtype: str, columns: Columns) -> tuple[Floats, Floats]:
    """FLOP and bytes of one call [n]; zero FLOP for what only moves bytes."""
    family, element = family_of(kernel), BYTES_PER_ELEMENT.get(dtype, 1.0)
    c = columns
    if family == "gemm":
        m, n, k = c["m"], c["n"], c["k"]
        return 2.0 * m * n * k, element * (n * k + m * k) + 2.0 * m * n
    if family == "decode":
        cached = c["batch"] * c["context"] * HEAD_DIM
        return 4.0 * cached * c["heads"], 2.0 * cached * c["kv_heads"] * element
    if family == "prefill":
        tokens = c["batch"] * c["length"] * HEAD_DIM
        return 2.0 * tokens * c["length"] * c["heads"], 4.0 * tokens * (c["heads"] + c["kv_heads"])
    if family == "layer":
        return _layer_work(c, element)
    size = c[AXES[family][0]]
    return np.zeros_like(size), size


def layer_gemms(columns: Columns) -> list[tuple[Floats, Floats]]:
    """(n, k) of the four products of a layer [n]: queries with keys and values, output, gate with up, down."""
    hidden, ff = columns["hidden"], columns["intermediate"]
    heads, kv = columns["heads"] * HEAD_DIM, columns["kv_heads"] * HEAD_DIM
    return [(heads + 2.0 * kv, hidden), (hidden, heads), (2.0 * ff, hidden), (hidden, ff)]


def _layer_work(c: Columns, element: float) -> tuple[Floats, Floats]:
    weights = sum((n * k for n, k in layer_gemms(c)), np.zeros_like(c["rows"]))
    cached = c["rows"] * c["context"] * HEAD_DIM
    flops = 2.0 * c["rows"] * weights + 4.0 * cached * c["heads"]
    return flops, element * (weights + 2.0 * cached * c["kv_heads"])


# ---- rooflines ---------------------------------------------------------------------------------------


def _kernel_seconds(floor: Floats, bandwidth: Floats, compute: Floats, q: Any, half: Any, c: Columns) -> Floats:
    """The model's function of the family that the columns belong to, at the rates themselves."""
    # efficiencies are rates over a peak; with the peak 1 they are the rates, and stacks of them broadcast
    parameters = KernelParameters(
        floor_s=floor,  # type: ignore[arg-type]  # arrays over problems, which it takes
        bandwidth_efficiency=bandwidth,  # type: ignore[arg-type]  # arrays over problems, which it takes
        compute_efficiency=compute,  # type: ignore[arg-type]  # arrays over problems, which it takes
        exponent=q,
    )
    element = c["element"]
    if "m" in c:
        return gemm_seconds(
            parameters,
            c["m"] + half,
            c["n"],
            c["k"],
            weight_bytes_per_element=element,
            activation_bytes_per_element=element,
            peak_flops=1.0,
            bandwidth=1.0,
        )
    if "length" in c:
        sizes = (c["batch"], c["length"] + half, c["heads"], c["kv_heads"], HEAD_DIM)
        return prefill_attention_seconds(parameters, *sizes, peak_flops=1.0, bandwidth=1.0)
    if "rows" in c:
        moved = {**c, "rows": c["rows"] + half}
        return roofline_seconds(parameters, *_layer_work(moved, 1.0 * element), 1.0, 1.0)  # type: ignore[arg-type]  # arrays over problems, which it takes
    sizes = (c["batch"], c["context"] + half, c["heads"], c["kv_heads"], HEAD_DIM)
    return decode_attention_seconds(parameters, *sizes, kv_bytes_per_element=element, peak_flops=1.0, bandwidth=1.0)


def _fixed(q: float) -> Callable[[Floats, Columns], Floats]:
    def seconds(theta: Floats, c: Columns) -> Floats:
        floor, bandwidth, compute = _split(theta)
        return _kernel_seconds(floor, bandwidth, compute, q, 0.0, c)

    return seconds


def _free(theta: Floats, c: Columns) -> Floats:
    floor, bandwidth, compute, q = _split(theta)
    return _kernel_seconds(floor, bandwidth, compute, q, 0.0, c)


def _ramp(theta: Floats, c: Columns) -> Floats:
    floor, bandwidth, compute, half = _split(theta)
    return _kernel_seconds(floor, bandwidth, compute, 2.0, half, c)


def _split(theta: Floats) -> list[Floats]:
    """Parameters [..., p] as p arrays [..., 1]."""
    return [theta[..., i, np.newaxis] for i in range(theta.shape[-1])]


def _start_roofline(*further: float) -> Callable[[Columns, Floats], tuple[float, ...]]:
    def start(c: Columns, seconds: Floats) -> tuple[float, ...]:
        flops, nbytes = c["flops"], c["nbytes"]
        return (0.3 * float(seconds.min()), float((nbytes / seconds).max()), float((flops / seconds).max()), *further)

    return start


def _start_half(name: str) -> Callable[[Columns, Floats], tuple[float, ...]]:
    def start(c: Columns, seconds: Floats) -> tuple[float, ...]:
        return (*_start_roofline()(c, seconds), float(c[name].min()))

    return start


def _rooflines(rows: str) -> tuple[Form, ...]:
    three = (FLOOR, BANDWIDTH, COMPUTE)
    return (
        Form(name="sum", parameters=three, seconds=_fixed(1.0), start=_start_roofline()),
        Form(name="rounded", parameters=three, seconds=_fixed(2.0), start=_start_roofline()),
        Form(name="free", parameters=(*three, EXPONENT), seconds=_free, start=_start_roofline(2.0)),
        Form(name="ramp", parameters=(*three, HALF), seconds=_ramp, start=_start_half(rows)),
    )


# ---- sizes -------------------------------------------------------------------------------------------


def _line(latency: Floats, bandwidth: Floats, nbytes: Floats) -> Floats:
    """Alpha-beta: the roofline without work. [s]"""
    parameters = KernelParameters(
        floor_s=latency,  # type: ignore[arg-type]  # arrays over problems, which it takes
        bandwidth_efficiency=bandwidth,  # type: ignore[arg-type]  # arrays over problems, which it takes
        compute_efficiency=1.0,
    )
    return roofline_seconds(parameters, 0.0, nbytes, 1.0, 1.0)


def _alpha_beta(theta: Floats, c: Columns) -> Floats:
    latency, bandwidth = _split(theta)
    return _line(latency, bandwidth, c["nbytes"])


def _ridge(theta: Floats, c: Columns) -> Floats:
    """A rounded maximum of latency and transfer: the start of a transfer hides behind its latency."""
    latency, bandwidth, q = _split(theta)
    parameters = KernelParameters(
        floor_s=0.0,
        bandwidth_efficiency=bandwidth,  # type: ignore[arg-type]  # arrays over problems, which it takes
        compute_efficiency=1.0,
        exponent=q,  # type: ignore[arg-type]  # arrays over problems, which it takes
    )
    return roofline_seconds(parameters, latency, c["nbytes"], 1.0, 1.0)


def _segmented(theta: Floats, c: Columns) -> Floats:
    """Two bandwidths that meet at a knee: protocols and pools switch with size."""
    latency, bandwidth, knee, beyond = _split(theta)
    nbytes = c["nbytes"]
    below = np.minimum(nbytes, knee)
    return _line(latency, bandwidth, below) + (nbytes - below) / beyond


def _per_op(theta: Floats, c: Columns) -> Floats:
    latency, per_op = _split(theta)
    return _line(latency, 1.0 / per_op, c["nbytes"])


def _start_line(*further: float) -> Callable[[Columns, Floats], tuple[float, ...]]:
    def start(c: Columns, seconds: Floats) -> tuple[float, ...]:
        return (0.7 * float(seconds.min()), float((c["nbytes"] / seconds).max()), *further)

    return start


def _start_knee(c: Columns, seconds: Floats) -> tuple[float, ...]:
    rates, middle = c["nbytes"] / seconds, float(np.exp(np.log(c["nbytes"]).mean()))
    return 0.7 * float(seconds.min()), float(rates.max()), middle, float(rates[np.argmax(c["nbytes"])])


def _start_ops(c: Columns, seconds: Floats) -> tuple[float, ...]:
    return 0.5 * float(seconds.min()), float((seconds / c["nbytes"]).min())


def _kernel_sum(theta: Floats, c: Columns) -> Floats:
    """What the kernels of the layer take by their own fits, and a constant for norms, rotation and launches."""
    constant, factor = _split(theta)
    return np.asarray(constant + factor * c["kernel_sum_s"], dtype=np.float64)


def _start_sum(c: Columns, seconds: Floats) -> tuple[float, ...]:
    return float(max((seconds - c["kernel_sum_s"]).min(), 0.1 * seconds.min())), 1.0


KERNEL_SUM = Form(name="kernel_sum", parameters=(PER_LAYER, FACTOR), seconds=_kernel_sum, start=_start_sum)
"""Needs a column `kernel_sum_s`. Reference: kernel sums plus constants transfer across models."""
FORMS: dict[str, tuple[Form, ...]] = {
    "gemm": _rooflines("m"),
    "decode": _rooflines("context"),
    "prefill": _rooflines("length"),
    "layer": _rooflines("rows"),
    "bytes": (
        Form(name="alpha_beta", parameters=(LATENCY, BANDWIDTH), seconds=_alpha_beta, start=_start_line()),
        Form(name="ridge", parameters=(LATENCY, BANDWIDTH, EXPONENT), seconds=_ridge, start=_start_line(2.0)),
        Form(
            name="segmented",
            parameters=(LATENCY, BANDWIDTH, KNEE, BEYOND),
            seconds=_segmented,
            start=_start_knee,
        ),
    ),
    "ops": (Form(name="alpha_beta", parameters=(LATENCY, PER_OP), seconds=_per_op, start=_start_ops),),
}
"""Rivals by family, the simplest first."""

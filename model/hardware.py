"""Hardware records: one accelerator, one link, a set of them. Datasheet rates, dense, SI units."""

from __future__ import annotations

from dataclasses import dataclass

from servecast.model.formats import COMPUTE_CLASS


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A point-to-point path; moving `n` bytes takes ``latency_s + n / bandwidth_bytes_per_s``."""

    bandwidth_bytes_per_s: float
    """One way. [B/s]"""
    latency_s: float = 0.0
    """Start-up cost of one message. [s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator as its datasheet describes it (a plain CPU is one, too)."""

    name: str
    title: str
    memory_bytes: float
    """Device memory the driver reports as total. [B]"""
    bandwidth_bytes_per_s: float
    """Device memory bandwidth. [B/s]"""
    bf16_flops: float
    """Dense 16-bit rate of the matrix units (fp16 where the part has no bf16). [FLOP/s]"""
    fp8_flops: float | None = None
    fp4_flops: float | None = None
    peer: Link
    """To another GPU of the same node (NVLink, xGMI, else PCIe)."""
    inter_node: Link
    pcie: Link
    gpus_per_node: int = 8
    power_w: float | None = None
    compute_capability: int | None = None
    """NVIDIA SM version x 10 (90 is Hopper); None elsewhere."""
    sources: tuple[tuple[str, str], ...] = ()
    """(field, where its figure comes from)."""

    def peak_flops(self, weight_format: str) -> float:
        """Dense rate that bounds a GEMM with weights in `weight_format`. [FLOP/s]

        A part without units for a narrow format runs it at the next wider rate it has (weights are converted on load).
        """
        compute = COMPUTE_CLASS[weight_format]
        rates = {"fp4": (self.fp4_flops, self.fp8_flops, self.bf16_flops), "fp8": (self.fp8_flops, self.bf16_flops)}
        candidates: tuple[float | None, ...] = rates.get(compute, (self.bf16_flops,))
        return next(rate for rate in candidates if rate is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """GPUs that can be rented: type, price and how many there are."""

    gpu: Gpu
    usd_per_hour: float
    """Price of one GPU. [USD/h]"""
    limit: int | None = None
    """At most this many GPUs; None is no limit."""

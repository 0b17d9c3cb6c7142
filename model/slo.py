"""Service-level objectives: bounds on percentiles of latency."""

from __future__ import annotations

from dataclasses import dataclass

METRICS: tuple[str, ...] = ("ttft", "tpot", "e2e")
"""What can be bounded; definitions in docs/nomenclature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """``P(metric <= limit_s) >= percentile / 100``, for instance TTFT p99 <= 2 s."""

    metric: str
    percentile: float
    """In (0, 100)."""
    limit_s: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"slo metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if not 0.0 < self.percentile < 100.0:
            raise ValueError(f"slo percentile must be between 0 and 100, got {self.percentile:g}")
        if not 0.0 < self.limit_s < float("inf"):
            raise ValueError(f"slo limit_s must be positive and finite, got {self.limit_s!r}")

    @property
    def name(self) -> str:
        """As a user writes it, for instance ``ttft_p99``."""
        return f"{self.metric}_p{self.percentile:g}"

"""Samples of a machine that does not exist: known parameters, drift between rounds, noise between visits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from servecast.calibration.fits.machine import fit_machine
from servecast.calibration.machine_document import MachineDocument, machine_document
from servecast.calibration.microbenchmarks.journal import Header, Point, Sample

HEADER = Header(
    settings={"device": "A machine", "kind": "cpu", "threads": 2, "seed": 1},
    environment={"torch": "2.13.0", "date": "2026-11-26", "budget_s": 60.0},
)
SIZES = [(("bytes", 1 << power),) for power in range(12, 27, 2)]
GEMMS: list[Point] = [
    (("m", m), ("n", n), ("k", k)) for m in (1, 8, 64, 512) for n, k in ((512, 512), (1024, 2048), (4096, 1024))
]
LATENCY_S, BANDWIDTH = 2e-6, 1.2e10
FLOOR_S, GEMM_BANDWIDTH, GEMM_RATE = 5e-6, 2e10, 3e11


def copy_s(point: Point) -> float:
    """Alpha-beta, by hand."""
    return LATENCY_S + dict(point)["bytes"] / BANDWIDTH


def gemm_s(point: Point) -> float:
    """Floor, memory and arithmetic in turn, by hand; bf16: two bytes for every element."""
    size = dict(point)
    m, n, k = size["m"], size["n"], size["k"]
    return FLOOR_S + 2.0 * (m * n + m * k + n * k) / GEMM_BANDWIDTH + 2.0 * m * n * k / GEMM_RATE


def samples(
    kernel: str = "memory_copy",
    dtype: str = "u8",
    seconds: Callable[[Point], float] = copy_s,
    points: Sequence[Point] = SIZES,
    *,
    rounds: int = 6,
    session: float = 0.0,
    drift: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> list[Sample]:
    """Log standard deviations: of the whole session, of a round, of a visit."""
    draw = np.random.default_rng(seed)
    whole = session * draw.standard_normal()
    found = []
    for number in range(rounds):
        common = whole + drift * draw.standard_normal()
        for point in points:
            value = seconds(point) * float(np.exp(common + noise * draw.standard_normal()))
            found.append(
                Sample(
                    kernel=kernel,
                    dtype=dtype,
                    point=point,
                    round=number,
                    session=0,
                    elapsed_s=float(len(found)),
                    seconds=(value, 1.01 * value, 0.99 * value),
                    inner=1,
                )
            )
    return found


def both(**scatter: float) -> list[Sample]:
    """A copy and a GEMM."""
    gemm = samples("gemm", "bf16", gemm_s, GEMMS, **scatter)  # type: ignore[arg-type]
    return samples(**scatter) + gemm  # type: ignore[arg-type]


def document(name: str = "machine", taken: Sequence[Sample] | None = None) -> MachineDocument:
    """The profile of these samples."""
    taken = both(drift=0.02, noise=0.02) if taken is None else taken
    return machine_document(
        name,
        fit_machine(taken),
        HEADER,
        taken,
        samples_file=f"{name}.samples.jsonl.gz",
        date="2026-11-26",
        command="servecast calibrate",
        servecast="0.1.0",
        budget_s=60.0,
    )

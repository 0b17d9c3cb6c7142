"""The closed form against the reference simulator, point by point: ``python -m servecast.validation.attainment_grid``.

Three grids of one replica under renewal arrivals with gamma gaps. On `chosen` the constants and the range of
:mod:`servecast.model.attainment` were chosen. `second` has other lengths, models, GPUs and batch limits and chose no
constant, but it is not blind: at first sight its errors in range reached 17.3 % at the 95th percentile, and the form of
the gamma tail was replaced after looking at which of its points failed. `fresh` was written down, and committed, before
any of its points was run. Both executors take the same step times, so that what differs is queueing alone.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.arrivals import workload_from_parameters
from servecast.model.attainment import fleets, out_of_range, quantile, rate_windows, solve_systems
from servecast.model.batch_steps import tabulated_steps
from servecast.model.deployment import Deployment
from servecast.model.memory import MEMORY_RULES, memory_budget
from servecast.model.request_rows import RequestRows
from servecast.model.service import ServiceCurves, service_curves
from servecast.model.workload import LognormalLength, Trace
from servecast.readers.catalogues import gpu, llm
from servecast.validation.metrics import latencies, percentile
from servecast.validation.simulator import EngineLimits, simulate

FIGURES: tuple[tuple[str, float], ...] = (
    ("ttft", 50.0),
    ("ttft", 95.0),
    ("ttft", 99.0),
    ("tpot", 50.0),
    ("tpot", 99.0),
)
REQUESTS, SEEDS = 30_000, (1, 2)
WARM_UP = 10
"""One request in so many is left out at the beginning."""
CHUNK_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Log-normal lengths, cut off. [tokens]"""

    mean_in: float
    cv_in: float
    max_in: float
    mean_out: float
    cv_out: float
    max_out: float
    cap: int
    """Batch limit that the mix is served with."""

    @property
    def laws(self) -> tuple[LognormalLength, LognormalLength]:
        return (
            LognormalLength(mean=self.mean_in, cv=self.cv_in, maximum=self.max_in),
            LognormalLength(mean=self.mean_out, cv=self.cv_out, maximum=self.max_out),
        )


def _mix(row: tuple[float, float, float, float, float, float, int]) -> Mix:
    mean_in, cv_in, max_in, mean_out, cv_out, max_out, cap = row
    return Mix(mean_in=mean_in, cv_in=cv_in, max_in=max_in, mean_out=mean_out, cv_out=cv_out, max_out=max_out, cap=cap)


MIXES: dict[str, Mix] = {
    "chat": _mix((1155, 0.96, 8000, 211, 0.8, 1000, 128)),
    "code": _mix((2048, 0.9, 7400, 28, 1.5, 400, 64)),
    "reasoning": _mix((400, 0.8, 4000, 1200, 0.6, 6000, 128)),
    "assistant": _mix((800, 1.1, 6000, 400, 0.7, 2000, 96)),
    "retrieval": _mix((4000, 0.6, 12000, 300, 0.7, 1500, 64)),
    "agent": _mix((2500, 0.8, 10000, 800, 1.0, 4000, 96)),
    "support": _mix((1500, 0.7, 6000, 150, 0.9, 800, 112)),
    "summary": _mix((3000, 0.8, 12000, 250, 0.6, 1000, 80)),
    "draft": _mix((500, 1.2, 4000, 700, 0.9, 3000, 160)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """One replica at one load."""

    grid: str
    mix: str
    model: str
    gpu: str
    tp: int
    gap_cv: float
    utilisation: float


def _grid(
    name: str,
    mixes: Sequence[str],
    places: Sequence[tuple[str, str, int]],
    cvs: Sequence[float],
    loads: Sequence[float],
) -> tuple[GridPoint, ...]:
    return tuple(
        GridPoint(grid=name, mix=mix, model=model, gpu=device, tp=tp, gap_cv=cv, utilisation=load)
        for mix, (model, device, tp), cv, load in product(mixes, places, cvs, loads)
    )


GRIDS: dict[str, tuple[GridPoint, ...]] = {
    "chosen": _grid(
        "chosen",
        ("chat", "code", "reasoning"),
        (("Llama-3.1-70B", "h100", 4), ("Llama-3.1-8B", "h100", 1)),
        (0.5, 1.0, 2.0, 4.0),
        (0.2, 0.35, 0.5, 0.65, 0.8, 0.875, 0.9, 0.95),
    ),
    "second": _grid(
        "second",
        ("assistant", "retrieval", "agent"),
        (("Qwen/Qwen3-32B", "h200", 2), ("Llama-3.1-8B", "l40s", 1)),
        (0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
        (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95),
    ),
    "fresh": _grid(
        "fresh",
        ("support", "summary", "draft"),
        (("Qwen/Qwen3-32B", "h100", 4), ("Llama-3.1-70B", "h200", 4)),
        (0.6, 1.0, 1.4, 1.8, 2.5, 3.5),
        (0.25, 0.45, 0.6, 0.75, 0.85, 0.92, 0.95),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GridScore:
    """One percentile at one point. [s]"""

    grid: str
    mix: str
    model: str
    gpu: str
    tp: int
    cap: int
    gap_cv: float
    utilisation: float
    metric: str
    percentile: float
    simulated_s: float
    spread: float
    """Largest over smallest simulated value of the seeds, less one. [-]"""
    closed_form_s: float
    error: float
    """Closed form over simulation, less one. [-]"""
    in_range: bool


@dataclass(frozen=True, slots=True)
class _Scene:
    """A point resolved: what both executors are given."""

    mix: Mix
    deployment: Deployment
    curves: ServiceCurves
    cap: int
    rate_rps: float


def _scene(point: GridPoint) -> _Scene:
    mix = MIXES[point.mix]
    n_in, n_out = mix.laws
    deployment = Deployment(
        llm=llm(point.model),
        gpu=gpu(point.gpu),
        trunk_format="bf16",
        expert_format="bf16",
        kv_format="bf16",
        tp=point.tp,
    )
    workload = workload_from_parameters(1.0, n_in=n_in, n_out=n_out)
    curves = service_curves(load_profile(SHIPPED), [deployment], "vllm", workload, max_batch=mix.cap)
    cap = int(min(mix.cap, curves.kv_batch[0]))
    return _Scene(mix, deployment, curves, cap, point.utilisation * float(curves.completion_rps[0, cap - 1]))


def simulate_point(
    point: GridPoint, *, requests: int = REQUESTS, seeds: Sequence[int] = SEEDS
) -> dict[tuple[str, float], NDArray[np.float64]]:
    """The five percentiles by (metric, percentile), simulated; one value a seed. [s]"""
    scene = _scene(point)
    mix = scene.mix
    steps = tabulated_steps(
        load_profile(SHIPPED),
        scene.deployment,
        "vllm",
        max_batch=mix.cap,
        longest=mix.max_in + mix.max_out,
        chunk_tokens=float(CHUNK_TOKENS),
    )
    limits = EngineLimits(
        max_num_seqs=mix.cap,
        max_num_batched_tokens=CHUNK_TOKENS,
        kv_tokens=memory_budget(scene.deployment, MEMORY_RULES["vllm"]).kv_tokens,
    )
    runs = [simulate(_trace(mix, scene.rate_rps, point.gap_cv, requests, seed), steps, limits) for seed in seeds]
    return {(metric, p): np.array([percentile(_settled(rows, metric), p) for rows in runs]) for metric, p in FIGURES}


def score_point(point: GridPoint, *, requests: int = REQUESTS, seeds: Sequence[int] = SEEDS) -> list[GridScore]:
    """The five percentiles of one point by both executors."""
    scene = _scene(point)
    n_in, n_out = scene.mix.laws
    workload = workload_from_parameters(scene.rate_rps, n_in=n_in, n_out=n_out, gap_cv=point.gap_cv)
    systems = solve_systems(scene.curves, np.array([0]), np.array([scene.cap]), workload, [1])
    fleet = fleets(systems, rate_windows(workload, 1.0), np.array([0]), [1.0])
    scores = []
    for (metric, p), seen in simulate_point(point, requests=requests, seeds=seeds).items():
        predicted = float(quantile(fleet, metric, p / 100.0)[0])
        scores.append(
            GridScore(
                **asdict(point),
                cap=scene.cap,
                metric=metric,
                percentile=p,
                simulated_s=float(seen.mean()),
                spread=float(seen.max() / seen.min() - 1.0),
                closed_form_s=predicted,
                error=predicted / float(seen.mean()) - 1.0,
                in_range=not bool(out_of_range(fleet, metric, p / 100.0)[0]),
            )
        )
    return scores


def _trace(mix: Mix, rate: float, gap_cv: float, requests: int, seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    shape = 1.0 / gap_cv**2
    t = np.cumsum(rng.gamma(shape, 1.0 / (shape * rate), requests))
    prompts, outputs = (
        np.maximum(np.round(law.quantile(rng.random(requests))), 1.0).astype(np.int64) for law in mix.laws
    )
    return Trace(name="grid", t_s=t - t[0], n_in=prompts, n_out=outputs)


def _settled(rows: RequestRows, metric: str) -> NDArray[np.float64]:
    values = latencies(rows, metric)
    return values[len(values) // WARM_UP :]


def score_grid(
    points: Iterable[GridPoint], *, jobs: int = -1, progress: Callable[[int, int], None] | None = None
) -> list[GridScore]:
    """Every point, in processes; `progress` is called with (points done, points)."""
    from joblib import Parallel, delayed

    every = list(points)
    scores: list[GridScore] = []
    for done, rows in enumerate(
        Parallel(n_jobs=jobs, return_as="generator")(delayed(score_point)(point) for point in every), start=1
    ):
        scores += rows
        if progress is not None:
            progress(done, len(every))
    return scores


def spaced(points: Sequence[GridPoint], count: int) -> tuple[GridPoint, ...]:
    """`count` points evenly through a grid, or all where it has no more."""
    if count < 1:
        raise ValueError(f"points must be >= 1, got {count}")
    if count >= len(points):
        return tuple(points)
    return tuple(points[number * len(points) // count] for number in range(count))


def markdown(scores: Sequence[GridScore]) -> str:
    """Median and 95th percentile of the absolute error by figure, inside the range and outside; per cent."""
    lines = [
        "| grid | figure | in range | median | 95th | outside | median | 95th |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for grid in dict.fromkeys(one.grid for one in scores):
        mine = [one for one in scores if one.grid == grid]
        for metric, p in FIGURES:
            some = [one for one in mine if (one.metric, one.percentile) == (metric, p)]
            lines.append(f"| {grid} | {metric.upper()} p{p:g} | {_errors(some)} |")
        lines.append(f"| {grid} | **all** | {_errors(mine)} |")
    return "\n".join(lines)


def _errors(scores: Sequence[GridScore]) -> str:
    cells = []
    for inside in (True, False):
        errors = [100.0 * abs(one.error) for one in scores if one.in_range is inside]
        shown = (np.median(errors), np.percentile(errors, 95.0)) if errors else ("", "")
        cells += [str(len(errors)), *(f"{value:.1f}" if errors else "" for value in shown)]
    return " | ".join(cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m servecast.validation.attainment_grid", description=__doc__)
    parser.add_argument("--grid", choices=tuple(GRIDS), help="one grid instead of both")
    parser.add_argument("--points", type=int, help="so many of each grid, evenly through it, instead of all")
    parser.add_argument("--out", type=Path, help="write every row to this CSV file")
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of a table")
    given = parser.parse_args(arguments)
    chosen = GRIDS if given.grid is None else {given.grid: GRIDS[given.grid]}
    try:
        points = [
            one for grid in chosen.values() for one in spaced(grid, len(grid) if given.points is None else given.points)
        ]
    except ValueError as fault:
        parser.error(str(fault))
    scores = score_grid(points, progress=_tick if sys.stderr.isatty() else None)
    if given.out is not None:
        given.out.write_text(csv_text(scores), encoding="utf-8")
    print(json.dumps([asdict(one) for one in scores], indent=1) if given.json else markdown(scores))
    return 0


def _tick(done: int, count: int) -> None:
    print(f"\r{done} of {count} points", end="\n" if done == count else "", file=sys.stderr, flush=True)


def csv_text(scores: Sequence[GridScore]) -> str:
    """Every row, four digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(scores[0])), lineterminator="\n")
    writer.writeheader()
    for one in scores:
        writer.writerow(
            {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in asdict(one).items()}
        )
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())

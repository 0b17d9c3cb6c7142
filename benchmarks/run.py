"""Speed and size, beside the bars set for them and what a peer needs.

``python benchmarks/run.py [--install] [--json]``.

The Azure conversation trace of 2023 is used where SERVECAST_DATA names a folder of public data, else the shipped
example. The peer is NVIDIA's aiconfigurator 0.12.0 on a machine of the same class: its main query 22.6 s (16.2 s by its
own report), one point 11.8 s cold and about 2 s warm, installation 851 MB in 75 s.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MODEL = "meta-llama/Llama-3.1-70B"
PRICES = {"h100_sxm": 2.9, "h200_sxm": 3.5, "b200_sxm": 5.5, "a100_sxm": 1.8, "l40s": 1.1, "mi300x": 3.0}
LIMITS = {"ttft_p99": 2.0, "tpot_p99": 0.05}
POINTS = 200_000
GROWTH = (100_000, 200_000, 400_000)
MODULES = ("servecast", "servecast.cli", "servecast.planning", "servecast.predicting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    bar: str = ""
    peer: str = ""


def shown(value: float) -> str:
    """Three digits, thousands separated."""
    return f"{value:,.0f}" if value >= 1000.0 else f"{value:.3g}"


def median_seconds(repeats: int, work: Callable[[], object]) -> float:
    """Median seconds of `work`, which has run once before. [s]"""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def process_seconds(arguments: Sequence[str], repeats: int = 5) -> float:
    """Median wall time of a fresh process. [s]"""

    def once() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=tempfile.gettempdir())

    return median_seconds(repeats, once)


@contextmanager
def trace_file() -> Iterator[tuple[str, Path]]:
    """What to call the trace, and where it is."""
    from servecast.cli.request import resolve_trace

    data = os.environ.get("SERVECAST_DATA")
    path = Path(data, "azure-llm-2023", "conv.csv.gz").resolve() if data else None
    if path is not None and path.exists():
        yield "Azure conversation trace", path
    else:
        yield "example trace", resolve_trace("example", Path())


def planning(name: str, path: Path) -> list[Figure]:
    """The capacity query, warm in one process and as a process of its own."""
    import servecast

    workload = servecast.workload_from_trace(servecast.read_trace(path))
    llm = servecast.llm(MODEL)
    offers = [servecast.Offer(gpu=servecast.gpu(gpu), usd_per_hour=price) for gpu, price in PRICES.items()]
    slos = [
        servecast.Slo(metric=metric, percentile=float(p), limit_s=limit)
        for (metric, p), limit in zip((key.split("_p") for key in LIMITS), LIMITS.values(), strict=True)
    ]
    found: list[int] = []

    def query(*, load_curve: bool) -> None:
        answer = servecast.plan(workload, llm, offers, slos, load_curve=load_curve)
        found.append(answer.plan.evaluated)

    bare = median_seconds(9, lambda: query(load_curve=False))
    full = median_seconds(9, lambda: query(load_curve=True))
    flags = [part for gpu, price in PRICES.items() for part in ("--gpu", f"{gpu}={price}")]
    flags += [part for key, limit in LIMITS.items() for part in ("--slo", f"{key}={limit:g}s")]
    command = ["-c", "from servecast.cli import main; main()", "plan", "--trace", str(path), "--model", MODEL, *flags]
    cold = process_seconds(command)
    numpy_alone = process_seconds(["-c", "import numpy"])
    return [
        Figure(
            name=f"plan query, warm ({name}, 6 GPU types, {found[-1]:,} fleets)",
            value=1e3 * bare,
            unit="ms",
            bar="<= 100",
            peer="22,600 (16,200 by its own report)",
        ),
        Figure(name="the same with the load curve of the report", value=1e3 * full, unit="ms"),
        Figure(name="`servecast plan`, cold process", value=cold, unit="s", bar="<= 1.0", peer="22.6"),
        Figure(name="cold process over `python -c 'import numpy'`", value=cold / numpy_alone, unit="times"),
    ]


def mixing() -> list[Figure]:
    """The program of a mixed fleet with random coefficients, with what binds, and the whole query on the example."""
    import servecast
    from servecast.cli.request import resolve_trace
    from servecast.fleeting import plan_fleet
    from servecast.solvers.fleet import FleetProblem, ReplicaType, solve_fleet

    rng = np.random.default_rng(1)
    names = [f"type {j}" for j in range(5)]
    size = rng.uniform(0.5, 4.0, 5)
    problem = FleetProblem(
        classes=tuple(f"class {i}" for i in range(20)),
        rates_rps=rng.uniform(0.1, 8.0, 20),
        types=tuple(
            ReplicaType(name=name, family=name, gpus=1, usd_per_hour=float(price))
            for name, price in zip(names, size * rng.uniform(0.7, 1.3, 5), strict=True)
        ),
        throughput_rps=2.0 * size * rng.uniform(0.4, 1.6, (20, 5)),
        available=dict(zip(names[:3], (6, 9, 5), strict=True)),
    )
    assert solve_fleet(problem).gap == 0.0
    trace = servecast.read_trace(resolve_trace("example", Path()))
    llm = servecast.llm("llama-3.1-8b")
    offers = [servecast.Offer(gpu=servecast.gpu(gpu), usd_per_hour=price) for gpu, price in PRICES.items()]
    slos = [servecast.Slo(metric="ttft", percentile=99.0, limit_s=2.0)]
    query = median_seconds(3, lambda: plan_fleet(trace, llm, offers, slos, rate_scale=8.0))
    return [
        Figure(
            name="mixed-fleet program, 5 GPU types x 20 classes, gap 0, with what binds",
            value=median_seconds(9, lambda: solve_fleet(problem)),
            unit="s",
            bar="<= 1.0",
        ),
        Figure(
            name="mixed-fleet query with comparisons (example trace x 8, 6 GPU types, 4 degrees)", value=query, unit="s"
        ),
    ]


MILLION = """\
import resource, sys
import numpy as np
import servecast
from servecast.simulating import simulate_fleet
rng = np.random.default_rng(1)
n = 1_000_000
t = np.cumsum(rng.exponential(1.0 / 40.0, n))
trace = servecast.Trace(
    name="made",
    t_s=t - t[0],
    n_in=np.maximum(rng.lognormal(6.5, 1.0, n), 1.0).astype(np.int64).clip(max=8000),
    n_out=np.maximum(rng.lognormal(4.5, 1.0, n), 1.0).astype(np.int64).clip(max=2000),
)
found = simulate_fleet(trace, servecast.llm("llama-3.1-8b"), servecast.gpu("h100"), replicas=8)
assert found.summary.requests == n and not found.summary.refused
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
"""Peak memory of a process that makes and simulates a million requests, as the system counts it. [KiB]"""


def simulating(name: str, path: Path) -> list[Figure]:
    """The reference simulator: the trace at hand, and a million made-up requests in a process of its own."""
    import servecast

    trace = servecast.read_trace(path)
    llm, gpu = servecast.llm("llama-3.1-8b"), servecast.gpu("h100")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MILLION], check=True, capture_output=True, text=True)
    million = time.perf_counter() - start
    return [
        Figure(
            name=f"simulation of the {name} on 4 replicas ({trace.t_s.size:,} requests)",
            value=median_seconds(5, lambda: servecast.simulate_fleet(trace, llm, gpu, replicas=4)),
            unit="s",
            bar="<= 2.0",
        ),
        Figure(
            name="peak memory of a simulation of 1,000,000 requests, Python and numpy included",
            value=1024.0 * int(done.stdout) / 1e6,
            unit="MB",
            bar="< 500",
        ),
        Figure(name="its process, start and drawing included", value=million, unit="s"),
    ]


def percentiles() -> list[Figure]:
    """p50 to p99.9 of TTFT and TPOT from the closed form: one candidate, and 10,000 at once."""
    import servecast
    from servecast.calibration.profile import SHIPPED, load_profile
    from servecast.model.attainment import fleets, quantiles, rate_windows, solve_systems
    from servecast.model.deployment import Deployment
    from servecast.model.service import service_curves
    from servecast.model.workload import LognormalLength

    workload = servecast.workload_from_parameters(
        10.0, n_in=LognormalLength(mean=1155.0, cv=0.96), n_out=LognormalLength(mean=211.0, cv=0.8)
    )
    llm = servecast.llm(MODEL)
    made = [
        Deployment(llm=llm, gpu=servecast.gpu(gpu), trunk_format="bf16", expert_format="bf16", kv_format="bf16", tp=tp)
        for gpu in PRICES
        for tp in (2, 4, 8)
    ]
    curves = service_curves(load_profile(SHIPPED), made, "vllm", workload)
    pairs = [
        (at, min(cap, room)) for at, room in enumerate(curves.kv_batch.tolist()) if room for cap in (16, 64, 128, 256)
    ]
    deployment, cap = (np.array(column) for column in zip(*pairs, strict=True))
    systems = solve_systems(curves, deployment, cap, workload, np.ones(len(cap)))
    windows = rate_windows(workload, 6.0)
    rng = np.random.default_rng(1)
    system = rng.integers(0, len(cap), 10_000)
    replicas = np.ceil(workload.rate_rps / systems.capacity_rps[system] / rng.uniform(0.3, 0.95, 10_000))

    def every(some: slice) -> None:
        fleet = fleets(systems, windows, system[some], replicas[some])
        for metric in ("ttft", "tpot"):
            quantiles(fleet, metric, (0.5, 0.9, 0.95, 0.99, 0.999))

    one = median_seconds(101, lambda: every(slice(0, 1)))
    many = median_seconds(3, lambda: every(slice(None)))
    return [
        Figure(name="TTFT and TPOT p50 to p99.9 of one candidate", value=1e3 * one, unit="ms", bar="<= 1"),
        Figure(name="the same of 10,000 candidates", value=many, unit="s", bar="<= 1"),
    ]


def speculating() -> list[Figure]:
    """A sweep of 18 made-up cells: its fit, the whole table with its schedules, and the command as a process."""
    from servecast.calibration.fits.speculation_cells import fit_cells
    from servecast.model.speculation_cells import SpeculationCells
    from servecast.model.speculation_cost import FormulaCost, RowForm, step_seconds
    from servecast.speculating import plan_speculation
    from servecast.speculation_tables import table_from_cells

    cost = FormulaCost(
        form=RowForm.HYPERBOLIC,
        base_s=9e-3,
        rise_s=1.2e-2,
        rise_rows=40.0,
        row_s=4e-5,
        request_s=2e-5,
        round_s=1e-3,
        draft_s=2e-4,
        cached_token_s=2e-9,
    )
    grid = [(b, k, c) for b in (1, 16, 64) for k in (0, 3, 6) for c in (1000, 8000)]
    batch, gamma, context = np.array(grid, dtype=np.float64).T
    tokens = (1.0 - 0.75 ** (gamma + 1.0)) / 0.25
    cells = SpeculationCells(
        batch=batch,
        gamma=gamma.astype(np.int64),
        tok_s_per_request=tokens / step_seconds(cost, batch, gamma, context),
        mean_acceptance_length=np.full(batch.size, np.nan),
        context=context,
        armed=np.zeros(batch.size, dtype=np.bool_),
    )
    fit = fit_cells(cells, max_length=16)

    def table() -> object:
        return table_from_cells(fit, max_batch=512, max_length=16, contexts=np.linspace(1000.0, 32000.0, 8))

    made = table_from_cells(fit, max_batch=512, max_length=16, contexts=np.linspace(1000.0, 32000.0, 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cells.csv")
        rows = [f"{b:g},{k:g},{c:g},{y:.6g}" for (b, k, c), y in zip(grid, cells.tok_s_per_request, strict=True)]
        path.write_text("\n".join(["batch_size,draft_length,context_tokens,tok_s_per_request", *rows]) + "\n")
        command = ["-c", "from servecast.cli import main; main()", "speculate", "--cells", str(path), "--json"]
        cold = process_seconds(command)
    return [
        Figure(
            name="draft-length table, batch 1-512 x length 0-16 x 8 contexts, with intervals",
            value=1e3 * median_seconds(9, table),
            unit="ms",
            bar="<= 50",
        ),
        Figure(
            name="its schedules, one per context and one for all",
            value=1e3 * median_seconds(9, lambda: plan_speculation(made, explain=False)),
            unit="ms",
        ),
        Figure(
            name="fit of 18 cells with every batch size left out in turn",
            value=1e3 * median_seconds(5, lambda: fit_cells(cells, max_length=16)),
            unit="ms",
        ),
        Figure(name="`servecast speculate`, cold process", value=cold, unit="s", bar="<= 1.0"),
    ]


def predicting() -> list[Figure]:
    """A large table of operating points, as records and as CSV."""
    import servecast
    from servecast.predicting import COLUMNS, Point, predict, read_points, table_text

    rng = np.random.default_rng(1)
    places = [(model, gpu, tp) for model in (MODEL, "Qwen/Qwen3-32B") for gpu in PRICES for tp in (2, 4, 8)]
    picks = rng.integers(0, len(places), POINTS)
    loads = np.round(2.0 ** rng.uniform(0.0, 8.0, POINTS))
    isl, osl = (np.round(np.exp(rng.normal(mean, 0.7, POINTS))) + 1.0 for mean in (6.9, 5.3))
    points: list[Point | str] = [
        servecast.Point(
            model=places[pick][0],
            gpu=places[pick][1],
            engine="vllm",
            tp=places[pick][2],
            concurrency=float(load),
            isl=float(n),
            osl=float(m),
        )
        for pick, load, n, m in zip(picks, loads, isl, osl, strict=True)
    ]
    records = median_seconds(3, lambda: predict(points))
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "points.csv")
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([getattr(point, column) for column in COLUMNS] for point in points)

        def whole() -> str:
            names, rows, read = read_points(table)
            return table_text(names, rows, predict(read))

        text = median_seconds(1, whole)
    return [
        Figure(
            name=f"predict, {POINTS:,} records",
            value=POINTS / records,
            unit="points/s",
            bar=">= 100,000",
            peer="about 0.5 (warm)",
        ),
        Figure(name="predict, CSV to CSV", value=POINTS / text, unit="points/s"),
    ]


def reading(name: str, path: Path) -> list[Figure]:
    """The trace at hand, and how the time grows with the rows."""
    from servecast.readers.traces import read_trace

    rows = len(read_trace(path).t_s)
    bar = "<= 0.3" if rows == 19_366 else ""
    figures = [
        Figure(
            name=f"reading the {name} ({rows:,} rows)",
            value=median_seconds(5, lambda: read_trace(path)),
            unit="s",
            bar=bar,
        )
    ]
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        for count in GROWTH:
            made = Path(folder, f"{count}.csv.gz")
            times = np.cumsum(rng.exponential(0.1, count))
            lengths = rng.integers(1, 4000, (count, 2))
            with gzip.open(made, "wt", encoding="utf-8", compresslevel=1) as file:
                file.write("t_s,n_in,n_out\n")
                file.writelines(f"{t:.6f},{n},{m}\n" for t, (n, m) in zip(times, lengths, strict=True))
            seconds = median_seconds(1, lambda made=made: read_trace(made))  # type: ignore[misc]  # a lambda of a default
            figures.append(Figure(name=f"reading {count:,} generated rows", value=1e6 * seconds / count, unit="us/row"))
    return figures


def importing() -> list[Figure]:
    """Fresh processes that import one module, less a bare interpreter."""
    bare = process_seconds(["-c", "pass"])
    figures = []
    for module in ("numpy", *MODULES):
        seconds = process_seconds(["-c", f"import {module}"]) - bare
        figures.append(Figure(name=f"import {module}", value=float(round(1e3 * seconds)), unit="ms"))
    return figures


def installing() -> list[Figure]:
    """A wheel of this tree into an empty environment, dependencies from the configured index."""
    with tempfile.TemporaryDirectory() as folder:
        wheels, target = Path(folder, "wheels"), Path(folder, "venv")
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        pip = ["-m", "pip", "--disable-pip-version-check"]
        subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], **quiet)  # type: ignore[call-overload]  # options in a dict
        subprocess.run([sys.executable, "-m", "venv", str(target)], **quiet)  # type: ignore[call-overload]  # options in a dict
        before = _megabytes(target)
        wheel = next(wheels.glob("servecast-*.whl"))
        start = time.perf_counter()
        subprocess.run([str(target / "bin" / "python"), *pip, "install", str(wheel)], **quiet)  # type: ignore[call-overload]  # options in a dict
        seconds = time.perf_counter() - start
        return [
            Figure(
                name="core installation, size",
                value=_megabytes(target) - before,
                unit="MB",
                bar="<= 400",
                peer="851",
            ),
            Figure(name="core installation, time", value=seconds, unit="s", bar="<= 60", peer="75"),
            Figure(name="the wheel itself", value=wheel.stat().st_size / 1e6, unit="MB"),
        ]


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 1e6


def markdown(figures: Sequence[Figure]) -> str:
    """Table for people and for the README."""
    lines = ["| what | measured | bar | aiconfigurator 0.12 |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {shown(one.value)} {one.unit} | {one.bar} | {one.peer} |" for one in figures]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="also install the wheel into an empty environment")
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of a table")
    given = parser.parse_args()
    with trace_file() as (name, path):
        figures = (
            planning(name, path)
            + mixing()
            + simulating(name, path)
            + speculating()
            + predicting()
            + reading(name, path)
            + importing()
        )
    if given.install:
        figures += installing()
    if given.json:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        print(json.dumps({**machine, "figures": [asdict(one) for one in figures]}, indent=1))
    else:
        print(markdown(figures))


if __name__ == "__main__":
    main()

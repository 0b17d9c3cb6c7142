"""Operator profiles and runs in the layout of the `llmservingsim-vllm` data set (LLMServingSim's layer profiler).

Files: ``runs.csv``, ``requests_input.csv``, ``profile_{dense,per_sequence,attention,moe}.csv[.gz]`` and, where the
truth of a run is open, ``requests_truth.csv``. Times of the profiles are microseconds of one layer.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from servecast.model.operator_steps import Curve, OperatorTables, Ring

Floats = NDArray[np.float64]
Key = tuple[str, str, int]
"""GPU, model, tensor-parallel degree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledRun:
    """One run's settings and inputs."""

    name: str
    gpu: str
    model: str
    tp: int
    dp: int
    ep: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    gpu_memory_utilization: float
    kv_tokens: float | None
    """Of one engine, where its log said; None where it did not."""
    gpu_memory_bytes: float
    ring: Ring
    request_ids: tuple[str, ...]
    arrival_s: Floats
    n_in: NDArray[np.int64]
    n_out: NDArray[np.int64]


def read_runs(folder: Path) -> list[ProfiledRun]:
    """Every run with its requests in order of arrival."""
    requests: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in _rows(folder, "requests_input.csv"):
        requests[row["run"]].append(row)
    return [_run(row, sorted(requests[row["run"]], key=_arrival)) for row in _rows(folder, "runs.csv")]


def read_truth(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Stamps and latencies by run and request; runs whose truth is not here are absent."""
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    if not any((folder / name).exists() for name in ("requests_truth.csv", "requests_truth.csv.gz")):
        return {}
    for row in _rows(folder, "requests_truth.csv"):
        found[row["run"]][row["request_id"]] = {
            name: float(value) for name, value in row.items() if name not in ("run", "request_id") and value
        }
    return dict(found)


def read_summary(folder: Path) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(run, metric, statistic) to (vLLM, LLMServingSim), in seconds; empty where the file is absent."""
    try:
        rows = list(_rows(folder, "summary_with_llmservingsim.csv"))
    except FileNotFoundError:
        return {}
    return {
        (row["run"], row["metric"], row["stat"]): (1e-3 * float(row["vllm_ms"]), 1e-3 * float(row["llmservingsim_ms"]))
        for row in rows
    }


def operator_tables(folder: Path, gpu: str, model: str, tp: int) -> OperatorTables:
    """Tables of one GPU, model and degree.

    Raises
    ------
    ValueError : no profile of them.
    """
    key = (gpu, model, tp)
    dense, sequences = _curves(folder, "dense", "tokens"), _curves(folder, "per_sequence", "sequences")
    attended = _attention(folder)
    if key not in dense or key not in sequences or key not in attended:
        raise ValueError(f"{folder}: no operator profile of {model} on {gpu} at tp {tp}")
    axes, attention = attended[key]
    return OperatorTables(
        dense=dense[key],
        per_sequence=sequences[key],
        attention_axes=axes,
        attention=attention,
        experts=_experts(folder).get((gpu, model, 1)),
    )


def _arrival(row: dict[str, str]) -> float:
    return float(row["arrival_s"])


def _run(row: dict[str, str], requests: list[dict[str, str]]) -> ProfiledRun:
    if not requests:
        raise ValueError(f"requests_input.csv: has no requests of run {row['run']}")
    gpus = int(row["tensor_parallel_size"]) * int(row["data_parallel_size"])
    return ProfiledRun(
        name=row["run"],
        gpu=row["gpu"],
        model=row["model"],
        tp=int(row["tensor_parallel_size"]),
        dp=int(row["data_parallel_size"]),
        ep=gpus if int(row["expert_parallel"]) else 1,
        max_num_seqs=int(row["max_num_seqs"]),
        max_num_batched_tokens=int(row["max_num_batched_tokens"]),
        block_size=int(row["block_size"]),
        gpu_memory_utilization=float(row["gpu_memory_utilization"]),
        kv_tokens=float(row["num_kv_tokens"]) if row["num_kv_tokens"] else None,
        gpu_memory_bytes=float(row["gpu_mem_gb"]) * 2.0**30,
        ring=Ring(
            bandwidth_bytes_per_s=float(row["link_bw_gb_per_s"]) * 1e9, latency_s=float(row["link_latency_ns"]) * 1e-9
        ),
        request_ids=tuple(one["request_id"] for one in requests),
        arrival_s=np.array([float(one["arrival_s"]) for one in requests]),
        n_in=np.array([int(one["input_tokens"]) for one in requests]),
        n_out=np.array([int(one["output_tokens"]) for one in requests]),
    )


@cache
def _curves(folder: Path, kind: str, count: str) -> dict[Key, dict[str, Curve]]:
    samples: dict[Key, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder, f"profile_{kind}.csv"):
        samples[_key(row)][row["layer"]].append((float(row[count]), 1e-6 * float(row["time_us"])))
    return {
        key: {layer: Curve(*zip(*sorted(points), strict=True)) for layer, points in layers.items()}
        for key, layers in samples.items()
    }


@cache
def _attention(folder: Path) -> dict[Key, tuple[tuple[Floats, Floats, Floats, Floats], Floats]]:
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    samples: dict[Key, list[list[float]]] = defaultdict(list)
    for row in _rows(folder, "profile_attention.csv"):
        samples[_key(row)].append([*(float(row[name]) for name in names), 1e-6 * float(row["time_us"])])
    tables = {}
    for key, rows in samples.items():
        data = np.array(rows)
        a, b, c, d = (np.unique(data[:, column]) for column in range(4))
        table = np.full((a.size, b.size, c.size, d.size), math.nan)
        index = tuple(np.searchsorted(axis, data[:, column]) for column, axis in enumerate((a, b, c, d)))
        table[index] = data[:, 4]
        tables[key] = ((a, b, c, d), table)
    return tables


@cache
def _experts(folder: Path) -> dict[Key, tuple[Floats, Floats, Floats]]:
    samples: dict[Key, list[tuple[float, float, float]]] = defaultdict(list)
    for row in _rows(folder, "profile_moe.csv"):
        key = _key(row)
        samples[key].append((float(row["tokens"]), float(row["activated_experts"]), 1e-6 * float(row["time_us"])))
    tables = {}
    for key, rows in samples.items():
        data = np.array(rows)
        counts, experts = np.unique(data[:, 0]), np.unique(data[:, 1])
        table = np.full((counts.size, experts.size), math.nan)
        table[np.searchsorted(counts, data[:, 0]), np.searchsorted(experts, data[:, 1])] = data[:, 2]
        for line in table:
            # few tokens cannot reach many experts: the most they reach stands for more
            seen = np.flatnonzero(np.isfinite(line))
            line[seen[-1] + 1 :] = line[seen[-1]]
        tables[key] = (counts, experts, table)
    return tables


def _key(row: dict[str, str]) -> Key:
    return row["gpu"], row["model"], int(row["tp"])


def _rows(folder: Path, name: str) -> Iterator[dict[str, str]]:
    path = folder / name
    if not path.exists():
        path = folder / f"{name}.gz"
    if not path.exists():
        raise FileNotFoundError(f"{folder / name}: no such file")
    with path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        with io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
            yield from csv.DictReader(text)

"""AIConfigurator's kernel tables (GEMM, attention, collectives) as columns of SI numbers."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[np.float64]]

_GEMM_DTYPE = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block"}
_KV_DTYPE = {"bfloat16": "bf16", "fp8": "fp8"}


def read_gemm(path: Path) -> dict[str, Columns]:
    """Fastest kernel of each (m, n, k) by weight format; columns m, n, k, seconds."""
    best: dict[str, dict[tuple[float, ...], float]] = {}
    for row in _rows(path):
        table = best.setdefault(_GEMM_DTYPE[row["gemm_dtype"]], {})
        shape = tuple(float(row[axis]) for axis in ("m", "n", "k"))
        table[shape] = min(float(row["latency_ms"]) * 1e-3, table.get(shape, np.inf))
    names = ("m", "n", "k")
    return {
        fmt: {**dict(zip(names, np.array(list(table)).T, strict=True)), "seconds": np.array(list(table.values()))}
        for fmt, table in best.items()
    }


def read_decode_attention(path: Path) -> dict[str, Columns]:
    """Full-attention decode by KV format; columns batch, context, heads, kv_heads, head_dim, seconds."""
    sources = ("batch_size", "step", "num_heads", "num_key_value_heads", "head_dim")
    tables = _attention(path, ("batch", "context", "heads", "kv_heads", "head_dim"), sources)
    for table in tables.values():
        table["context"] += 1.0  # the table counts cached tokens before the new one
    return tables


def read_prefill_attention(path: Path) -> dict[str, Columns]:
    """Causal prefill by KV format; columns batch, length, heads, kv_heads, head_dim, seconds."""
    sources = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim")
    return _attention(path, ("batch", "length", "heads", "kv_heads", "head_dim"), sources)


def read_all_reduce(folder: Path) -> Columns:
    """Fastest all-reduce of each size and rank count (NCCL, or vLLM's own inside a graph);
    columns ranks, bytes, seconds."""
    best: dict[tuple[float, float], float] = {}
    files: tuple[tuple[str, Callable[[Mapping[str, str]], bool]], ...] = (
        ("nccl.csv", lambda row: row["op_name"] == "all_reduce" and row["nccl_dtype"] == "half"),
        ("custom_allreduce.csv", lambda row: row["backend"] == "vllm_graph"),
    )
    for name, wanted in files:
        for row in filter(wanted, _rows(folder / name)):
            key = (float(row["num_gpus"]), float(row["bytes"]))
            best[key] = min(float(row["latency_ms"]) * 1e-3, best.get(key, np.inf))
    ranks, nbytes = np.array(sorted(best)).T
    return {"ranks": ranks, "bytes": nbytes, "seconds": np.array([best[key] for key in sorted(best)])}


def _attention(path: Path, names: tuple[str, ...], sources: tuple[str, ...]) -> dict[str, Columns]:
    rows: dict[str, list[list[float]]] = {}
    for row in _rows(path):
        if row["window_size"] != "0" or float(row["head_dim"]) > 256:
            continue
        values = [float(row[source]) for source in sources]
        rows.setdefault(_KV_DTYPE[row["kv_cache_dtype"]], []).append([*values, float(row["latency_ms"]) * 1e-3])
    return {fmt: dict(zip((*names, "seconds"), np.array(table).T.copy(), strict=True)) for fmt, table in rows.items()}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as lines:
        yield from csv.DictReader(lines)

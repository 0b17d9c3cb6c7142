"""Kernel tables: columns, units and choices on small files, and the public tables against published figures."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from servecast.readers.kernel_tables import (
    read_all_reduce,
    read_decode_attention,
    read_gemm,
    read_prefill_attention,
)

ATTENTION = (
    "batch_size,isl,num_heads,num_key_value_heads,head_dim,attn_dtype,kv_cache_dtype,step,window_size,kernel_source,"
    "latency_ms\n"
)


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["gemm.csv", "gemm.csv.gz"])
def test_gemm_keeps_the_fastest_kernel_in_seconds(tmp_path: Path, name: str) -> None:
    # Origin: hand; the shape (8, 16, 32) was timed with two kernels.
    table = write(
        tmp_path / name,
        "gemm_dtype,m,n,k,kernel_source,latency_ms\n"
        "bfloat16,8,16,32,a,0.5\nbfloat16,8,16,32,b,0.25\nfp8,8,16,32,a,0.125\nbfloat16,1,2,3,a,2\n",
    )
    found = read_gemm(table)
    assert set(found) == {"bf16", "fp8"}
    np.testing.assert_array_equal(found["bf16"]["m"], [8, 1])
    np.testing.assert_array_equal(found["bf16"]["n"], [16, 2])
    np.testing.assert_array_equal(found["bf16"]["k"], [32, 3])
    np.testing.assert_allclose(found["bf16"]["seconds"], [0.25e-3, 2e-3], rtol=1e-12)
    np.testing.assert_allclose(found["fp8"]["seconds"], [0.125e-3], rtol=1e-12)


def test_decode_counts_the_new_token_and_leaves_windows_out(tmp_path: Path) -> None:
    # Origin: the notes of aic-kernels: "KV length = step + 1"; window_size 0 is full attention. Heads of 512 are left
    # out.
    table = write(
        tmp_path / "generation_attention.csv",
        ATTENTION
        + "4,1,32,8,128,bfloat16,bfloat16,1023,0,fa3,0.02\n"
        + "4,1,32,8,128,bfloat16,bfloat16,1023,128,fa3,0.01\n"
        + "4,1,32,8,512,bfloat16,bfloat16,1023,0,fa3,0.09\n"
        + "2,1,16,8,64,bfloat16,fp8,7,0,fa3,0.03\n",
    )
    found = read_decode_attention(table)
    assert {fmt: {name: list(column) for name, column in columns.items()} for fmt, columns in found.items()} == {
        "bf16": {
            "batch": [4.0],
            "context": [1024.0],
            "heads": [32.0],
            "kv_heads": [8.0],
            "head_dim": [128.0],
            "seconds": [0.02 * 1e-3],
        },
        "fp8": {
            "batch": [2.0],
            "context": [8.0],
            "heads": [16.0],
            "kv_heads": [8.0],
            "head_dim": [64.0],
            "seconds": [0.03 * 1e-3],
        },
    }


def test_prefill_reads_the_prompt_length(tmp_path: Path) -> None:
    # Origin: hand.
    table = write(tmp_path / "context_attention.csv", ATTENTION + "2,4096,32,8,128,bfloat16,bfloat16,0,0,fa3,1.5\n")
    found = read_prefill_attention(table)["bf16"]
    assert (found["batch"][0], found["length"][0], found["heads"][0], found["kv_heads"][0]) == (2, 4096, 32, 8)
    assert found["seconds"][0] == pytest.approx(1.5e-3, rel=1e-12)


def test_all_reduce_takes_the_fastest_that_can_run_in_a_graph(tmp_path: Path) -> None:
    # Origin: hand. Other collectives, other types and eager runs do not count.
    write(
        tmp_path / "nccl.csv",
        "op_name,nccl_dtype,num_gpus,elements,latency_ms,bytes\n"
        "all_reduce,half,2,128,0.010,256\nall_reduce,int8,2,256,0.001,256\nall_gather,half,2,128,0.001,256\n"
        "all_reduce,half,8,128,0.020,256\n",
    )
    write(
        tmp_path / "custom_allreduce.csv",
        "backend,allreduce_dtype,num_gpus,elements,latency_ms,bytes\n"
        "vllm_eager,bfloat16,2,128,0.001,256\nvllm_graph,bfloat16,2,128,0.004,256\n",
    )
    found = read_all_reduce(tmp_path)
    np.testing.assert_array_equal(found["ranks"], [2, 8])
    np.testing.assert_array_equal(found["bytes"], [256, 256])
    np.testing.assert_allclose(found["seconds"], [4e-6, 20e-6], rtol=1e-12)


# ---- public tables -------------------------------------------------------------------------------------------


def test_public_gemm_points(data_path: Callable[..., Path]) -> None:
    # Origin: step notes 6.3 [P]: bf16 4096^3 0.168 ms, m = 64: 0.0120 ms; best 940 TFLOP/s; smallest 2.4 us.
    table = read_gemm(data_path("aic-kernels", "h200_sxm", "gemm.csv.gz"))["bf16"]
    square = (table["n"] == 4096) & (table["k"] == 4096)
    for m, published_ms in ((4096, 0.168), (64, 0.0120), (8192, 0.382)):
        assert table["seconds"][square & (table["m"] == m)][0] * 1e3 == pytest.approx(published_ms, rel=0.01)
    rate = 2.0 * table["m"] * table["n"] * table["k"] / table["seconds"]
    assert rate.max() == pytest.approx(940e12, rel=0.01)
    assert table["seconds"].min() == pytest.approx(2.4e-6, rel=0.02)


def test_public_all_reduce_points(data_path: Callable[..., Path]) -> None:
    # Origin: step notes 6.2, vLLM inside a graph, H200: 2 GPUs 256 B 4.4 us, 8 GPUs 1 MiB 14.1 us.
    table = read_all_reduce(data_path("aic-kernels", "h200_sxm", "nccl.csv").parent)
    for ranks, nbytes, published_us in ((2, 256, 4.4), (8, 2**20, 14.1), (4, 2**23, 51.8)):
        at = (table["ranks"] == ranks) & (table["bytes"] == nbytes)
        assert table["seconds"][at][0] * 1e6 == pytest.approx(published_us, rel=0.02)

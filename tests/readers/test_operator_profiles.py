"""Operator profiles: units and axes on small files, and the public runs against their own description."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from servecast.readers.operator_profiles import operator_tables, read_runs, read_summary, read_truth

RUNS = (
    "run,truth,gpu,model,vllm_version,tensor_parallel_size,data_parallel_size,expert_parallel,gpus,max_num_seqs,"
    "max_num_batched_tokens,max_model_len,dtype,block_size,gpu_memory_utilization,num_kv_tokens,"
    "enable_prefix_caching,gpu_mem_gb,gpu_mem_bw_gb_per_s,link_bw_gb_per_s,link_latency_ns,requests\n"
    "a,open,G,M,0.19.0,2,2,1,4,128,2048,,bfloat16,16,0.9,,True,96,1597,16,20000,2\n"
    "b,open,G,M,0.19.0,1,1,0,1,256,2048,,bfloat16,16,0.9,41408.0,True,24,1008,16,1000,1\n"
)
REQUESTS = "run,request_id,input_tokens,output_tokens,arrival_s\na,x,10,20,0.5\nb,z,3,4,0.0\na,y,30,40,0.25\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of two runs and one profile."""
    files = {
        "runs.csv": RUNS,
        "requests_input.csv": REQUESTS,
        "requests_truth.csv": "run,request_id,ttft_s,tpot_s\nb,z,0.5,\n",
        "profile_dense.csv": "gpu,model,tp,layer,tokens,time_us\nG,M,1,qkv_proj,8,30\nG,M,1,qkv_proj,4,10\n",
        "profile_per_sequence.csv": "gpu,model,tp,layer,sequences,time_us\nG,M,1,lm_head,1,5\nG,M,1,lm_head,3,7\n",
        "profile_attention.csv": (
            "gpu,model,tp,prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
            "G,M,1,0,0,1,16,2\nG,M,1,16,0,0,0,4\nG,M,1,16,0,1,16,8\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "profile_moe.csv.gz", "wt", encoding="utf-8") as file:
        file.write("gpu,model,tp,tokens,activated_experts,time_us\nG,M,1,1,2,20\nG,M,1,8,2,30\nG,M,1,8,4,40\n")
    return tmp_path


def test_runs_by_hand(folder: Path) -> None:
    two, one = read_runs(folder)
    assert (two.name, two.tp, two.dp, two.ep, two.max_num_seqs, two.block_size) == ("a", 2, 2, 4, 128, 16)
    assert two.kv_tokens is None  # not logged is not 0
    assert (one.ep, one.kv_tokens) == (1, 41408.0)
    # requests in order of arrival, whatever the order of the file
    assert two.request_ids == ("y", "x")
    np.testing.assert_array_equal(two.arrival_s, [0.25, 0.5])
    np.testing.assert_array_equal(two.n_in, [30, 10])
    np.testing.assert_array_equal(two.n_out, [40, 20])
    # 16 GB/s and 20 000 ns; device memory in GiB
    np.testing.assert_allclose([two.ring.bandwidth_bytes_per_s, two.ring.latency_s], [16e9, 2e-5], rtol=1e-12)
    np.testing.assert_allclose(one.gpu_memory_bytes, 24 * 2**30, rtol=1e-12)


def test_profiles_by_hand(folder: Path) -> None:
    tables = operator_tables(folder, "G", "M", 1)
    # microseconds become seconds, samples are sorted: half way from 10 to 30 us
    np.testing.assert_allclose(tables.dense["qkv_proj"](6.0), 20e-6, rtol=1e-12)
    np.testing.assert_allclose(tables.per_sequence["lm_head"](2.0), 6e-6, rtol=1e-12)
    assert [axis.tolist() for axis in tables.attention_axes] == [[0, 16], [0], [0, 1], [0, 16]]
    np.testing.assert_allclose(tables.attention[1, 0, 1, 1], 8e-6, rtol=1e-12)
    np.testing.assert_allclose(tables.attention[0, 0, 1, 1], 2e-6, rtol=1e-12)
    assert np.isnan(tables.attention[0, 0, 0, 0])  # not measured
    assert tables.experts is not None
    # one token cannot reach four experts: the two it reaches stand for more
    np.testing.assert_allclose(tables.experts[2], [[20e-6, 20e-6], [30e-6, 40e-6]], rtol=1e-12)


def test_truth_by_hand(folder: Path) -> None:
    assert read_truth(folder) == {"b": {"z": {"ttft_s": 0.5}}}  # an empty cell is absent, and so is run a
    assert read_summary(folder) == {}


def test_summary_by_hand(folder: Path) -> None:
    (folder / "summary_with_llmservingsim.csv").write_text(
        "run,metric,stat,vllm_ms,llmservingsim_ms\nb,ttft,mean,500,750\n"
    )
    found = read_summary(folder)[("b", "ttft", "mean")]
    np.testing.assert_allclose(found, [0.5, 0.75], rtol=1e-12)


@pytest.mark.parametrize("name", ["runs.csv", "requests_input.csv"])
def test_a_missing_file_is_named_in_one_line(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file$") as caught:
        read_runs(folder)
    assert "\n" not in str(caught.value)


def test_a_profile_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no operator profile of M on G at tp 2$"):
        operator_tables(folder, "G", "M", 2)


def test_a_run_without_requests(folder: Path) -> None:
    (folder / "requests_input.csv").write_text(REQUESTS.replace("\nb,z,3,4,0.0", ""))
    with pytest.raises(ValueError, match=r"requests_input.csv: has no requests of run b$"):
        read_runs(folder)


def test_the_public_runs(data_path: Callable[..., Path]) -> None:
    """The data set's own description: four runs of 300 requests each, two of them open."""
    folder = data_path("llmservingsim-vllm")
    runs = read_runs(folder)
    assert [len(run.request_ids) for run in runs] == [300] * 4
    assert set(read_truth(folder)) == {"rtx4090-llama31-8b", "rtxpro6000-qwen3-30b-a3b"}
    for run in runs:
        assert (np.diff(run.arrival_s) >= 0.0).all()
        tables = operator_tables(folder, run.gpu, run.model, run.tp)
        assert all(0.0 < curve(100.0) < 1.0 for curve in tables.dense.values())

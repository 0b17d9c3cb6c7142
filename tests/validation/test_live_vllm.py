"""A real vLLM on this machine's processor: draft-length table, KV blocks, paired steps, and one served load.

Needs ``SERVECAST_VLLM_PYTHON``, a Python that has vLLM 0.32.0's CPU build (``validation/install_vllm.py`` makes one).
Models have random weights, so that times, counts and KV blocks are real and acceptance means nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from servecast.model.workload import Trace
from servecast.policies.speculation import SpeculationTable
from servecast.policies.vllm_speculation import read_vllm_schedule, speculative_config
from servecast.validation.engine_metrics import scrape, snapshot, window
from servecast.validation.http_load import load_requests, run_open_loop
from servecast.validation.metrics import latencies
from servecast.validation.vllm_server import VllmServer, run_paired, vllm_environment

pytestmark = pytest.mark.live

PAIR = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
torch.manual_seed(0)
vocabulary = {"<eos>": 0}
for word in sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"<t{n}>" for n in range(767)]:
    vocabulary[word] = len(vocabulary)
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
for name, layers, width, inner, heads in (("target", 12, 384, 3072, 6), ("draft", 1, 256, 768, 4)):
    config = LlamaConfig(
        vocab_size=len(vocabulary), num_hidden_layers=layers, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(f"{sys.argv[1]}/{name}")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(f"{sys.argv[1]}/{name}")
"""


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("SERVECAST_VLLM_PYTHON")
    if not found:
        pytest.skip("no vLLM: SERVECAST_VLLM_PYTHON names no Python that has it")
    if subprocess.run([found, "-c", "import vllm"], capture_output=True).returncode != 0:
        pytest.skip(f"no vLLM: SERVECAST_VLLM_PYTHON={found} cannot import it")
    return found


@pytest.fixture(scope="module")
def pair(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    environment = vllm_environment(python, in_process=True)
    subprocess.run([python, "-c", PAIR, str(folder)], check=True, env=environment, capture_output=True)
    return folder


def _words(mode: str, pair: Path, options: Mapping[str, object], *, draft: bool = True) -> list[str]:
    words = [mode, "--model", str(pair / "target")]
    if draft:
        words += ["--draft", str(pair / "draft")]
    return words + [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def test_the_engine_drafts_what_the_table_says(python: str, pair: Path, tmp_path: Path) -> None:
    """Gaps and the tail take the length before them; the engine's lookup is the one our reader predicts."""
    table = [[1, 4, 4], [5, 12, 2], [20, 24, 0]]
    options = {"table": table, "batches": "1,4,5,13,20,32", "max-model-len": 512}
    engine, *records, _ = run_paired(python, _words("table", pair, options), tmp_path / "table.jsonl")
    expected = read_vllm_schedule({"num_speculative_tokens": 4, "num_speculative_tokens_per_batch_size": table}, 32)
    assert engine["lookup"][1:] == expected
    assert [one["batch"] for one in records] == [1, 4, 5, 13, 20, 32]
    for one in records:
        length = expected[one["batch"] - 1]
        assert one["draft_length"] == length
        assert one["drafts"] == (one["steps"] * one["batch"] if length else 0)


# floor(1 GiB / (bytes of a token * block size)); a token is 2 (K, V) * layers * 2 heads * 64 * 2 bytes
@pytest.mark.parametrize(("draft", "block", "blocks"), [(False, 128, 1365), (True, 128, 1260), (False, 32, 5461)])
def test_kv_blocks(python: str, pair: Path, tmp_path: Path, draft: bool, block: int, blocks: int) -> None:
    layers = 13 if draft else 12
    assert blocks == (1 << 30) // (2 * layers * 2 * 64 * 2 * block)
    options = {"max-model-len": 512, "engine": f'{{"block_size": {block}}}'}
    engine, _ = run_paired(python, _words("kv", pair, options, draft=draft), tmp_path / "kv.jsonl")
    assert (engine["num_gpu_blocks"], engine["block_size"]) == (blocks, block)


def test_paired_steps(python: str, pair: Path, tmp_path: Path) -> None:
    """After two dropped steps every sequence verifies the length in force; times are a step's, not a compilation's."""
    options = {"batches": "1,4", "lengths": "0,1,3", "repeats": 2, "cycles": 3}
    _, *steps, end = run_paired(python, _words("paired", pair, options), tmp_path / "paired.jsonl")
    assert end["kind"] == "end"
    assert len(steps) == 2 * 2 * 3 * 3 * 2  # batches, repeats, cycles, lengths, timed steps
    for one in steps:
        assert one["sequences"] == one["batch"]
        assert one["drafted"] == one["draft_length"] * one["batch"]
        assert one["emitted"] == one["accepted"] + one["batch"]
        assert 0.0 < one["seconds"] < 5.0
    for batch in (1, 4):
        median = {
            k: np.median([one["seconds"] for one in steps if (one["batch"], one["draft_length"]) == (batch, k)])
            for k in (0, 3)
        }
        assert median[3] > 0.9 * median[0]


def test_a_served_load(python: str, pair: Path) -> None:
    """One request at a time at a rate far below capacity; the table says 3 drafts for one, and 1 for more."""
    count = 12
    table = SpeculationTable.model_validate(
        {
            "engine": "vllm",
            "engine_version": "0.32.0",
            "model": "target",
            "method": "draft_model",
            "draft_model": str(pair / "draft"),
            "max_batch": 8,
            "segments": [{"lo": 1, "hi": 1, "draft_length": 3}, {"lo": 2, "hi": 8, "draft_length": 1}],
            "num_speculative_tokens": 3,
            "predicted": [{"goodput_tokens_per_s": BAND, "tpot_s": BAND}] * 2,
            "provenance": {"servecast": "0", "profile": "none", "acceptance": "none", "date": "2026-01-01"},
        }
    )
    flags = {
        "max_num_seqs": 8,
        "max_model_len": 512,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "speculative_config": speculative_config(table, force=True),
    }
    trace = Trace(name="t", t_s=2.0 * np.arange(count), n_in=np.full(count, 64), n_out=np.full(count, 32))
    requests = load_requests(trace, vocabulary=1024)
    with VllmServer(python, pair / "target", flags=flags) as server:
        run_open_loop(server.url, requests[:1], model=server.model)  # the first request pays for what is lazy
        before = snapshot(scrape(server.url))
        run = run_open_loop(server.url, requests, model=server.model)
        seen = window(before, snapshot(scrape(server.url)))
        facts = server.facts()
    assert (run.errors, run.aborted, run.clock_warning) == ((), None, None)
    assert run.rows.n_in.tolist() == [64] * count
    assert run.rows.n_out.tolist() == [32] * count
    assert (facts.version, facts.kv_tokens) == ("0.32.0", 1260 * 128)
    assert (seen.requests, seen.kv_blocks, seen.block_tokens) == (count, 1260, 128)
    assert seen.totals["generation_tokens"] == 32 * count
    assert seen.totals["preemptions"] == 0
    assert seen.phase_mean_s["queue"] < 0.05
    # the client sees the server's part of a request and the way there and back
    assert latencies(run.rows, "e2e").mean() >= seen.phase_mean_s["inference"]
    assert seen.speculation is not None
    assert seen.speculation.draft_tokens / seen.speculation.drafts == pytest.approx(3.0, rel=0.05)


BAND = {"value": 1.0, "lo": 1.0, "hi": 1.0}

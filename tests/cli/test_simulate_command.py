"""``servecast simulate`` as a program. Expected values: those of the Python interface, the documented keys and columns,
equality to the byte of two equal commands, and one line with exit 2 for the user's mistakes."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from servecast.cli import main
from servecast.readers.catalogues import gpu, llm
from servecast.readers.traces import read_trace
from servecast.simulating import rows_table, simulate_fleet

FLEET = ["--model", "llama-3.1-8b", "--gpu", "h100"]
COLUMNS = (
    "request,arrival_s,scheduled_s,first_token_s,last_token_s,ttft_s,tpot_s,e2e_s,n_in,n_out,replica,preemptions,"
    "cached_tokens,status"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    t = np.cumsum(rng.exponential(0.05, 300))
    rows = zip(t.tolist(), rng.integers(1, 4000, 300).tolist(), rng.integers(1, 60, 300).tolist(), strict=True)
    lines = ["t_s,n_in,n_out", *(f"{at:.6f},{n_in},{n_out}" for at, n_in, n_out in rows)]
    lines.insert(4, f"{t[2]:.6f},900000,5")  # longer than any cache here
    (tmp_path / "trace.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "empty.csv").write_text("t_s,n_in,n_out\n")
    return tmp_path


def run(*arguments: str, trace: str = "trace.csv") -> Result:
    result = CliRunner().invoke(main, ["simulate", "--trace", trace, *FLEET, *arguments])
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: str) -> str:
    """The one line of a refusal; nothing printed, nothing left behind."""
    before = sorted(Path().iterdir())
    result = CliRunner().invoke(main, ["simulate", *arguments])
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert result.stderr.startswith("servecast: error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(Path().iterdir()) == before
    return result.stderr


def without_time(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "wall_s"}


def test_json_is_the_python_interface() -> None:
    found = json.loads(run("--replicas", "2", "--slo", "ttft_p99=200ms", "--slo", "tpot_p90=1ms", "--json").stdout)
    same = simulate_fleet(read_trace("trace.csv"), llm("llama-3.1-8b"), gpu("h100"), replicas=2)
    assert found["schema"] == "servecast.simulation/1"
    assert (found["replicas"], found["router"], found["seed"], found["tp"], found["pp"]) == (2, "round_robin", 1, 1, 1)
    assert found["kv_tokens"] == same.limits.blocks * 16
    metrics = found["metrics"]
    assert metrics["requests"] == 301
    assert metrics["refused"] == 1
    for name in ("ttft", "tpot", "e2e"):
        assert metrics[name]["mean_s"] == pytest.approx(same.summary.mean[name], rel=1e-12)
        assert list(metrics[name]) == ["mean_s", "p50_s", "p90_s", "p95_s", "p99_s", "p99.9_s"]
    assert set(metrics["attainment"]) == {"ttft_p99", "tpot_p90"}
    assert 0.0 <= metrics["slo_attainment"] <= metrics["attainment"]["ttft_p99"]
    assert metrics["goodput_rps"] == pytest.approx(metrics["slo_attainment"] * 301 / metrics["makespan_s"], rel=1e-9)
    assert "the first is request 3 with 900000 prompt and 5 output tokens" in found["warnings"][0]
    assert found["ensemble"] is None
    assert found["wall_s"] > 0.0


def test_without_limits_there_is_no_attainment() -> None:
    metrics = json.loads(run("--json").stdout)["metrics"]
    assert metrics["attainment"] == {}
    assert metrics["slo_attainment"] is None
    assert metrics["goodput_rps"] is None


def test_csv_holds_every_request(folder: Path) -> None:
    """Documented columns; empty where a request has no such time, all digits elsewhere."""
    result = run("--out", "rows.csv")
    assert result.stderr.startswith("wrote rows.csv\ntook ")
    text = (folder / "rows.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["request"] for row in rows] == [str(i) for i in range(301)]
    lost = rows[3]
    assert (lost["status"], lost["replica"], lost["scheduled_s"], lost["ttft_s"]) == ("refused", "-1", "", "")
    assert all(row["status"] == "ok" for row in rows if row is not lost)
    assert all((row["tpot_s"] == "") == (row["n_out"] == "1") for row in rows if row is not lost)
    table = rows_table(simulate_fleet(read_trace("trace.csv"), llm("llama-3.1-8b"), gpu("h100"), replicas=1).rows)
    for name in ("arrival_s", "last_token_s"):
        read = np.array([float(row[name] or "nan") for row in rows])
        np.testing.assert_array_equal(read, table[name])


def test_parquet_is_the_csv(folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run("--out", "rows.csv")
    run("--out", "rows.parquet")
    table = parquet.read_table("rows.parquet")
    assert ",".join(table.column_names) == COLUMNS
    with (folder / "rows.csv").open(newline="") as file:
        for ours, theirs in zip(csv.DictReader(file), table.to_pylist(), strict=True):
            assert ours == {name: "" if value is None else str(value) for name, value in theirs.items()}


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.parquet"])
def test_the_same_command_writes_the_same_bytes(name: str, folder: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    same = ["--replicas", "3", "--router", "random", "--ensemble", "2", "--backend", "serial"]
    first = run(*same, "--out", name, "--json").stdout
    (folder / name).rename("before")
    second = run(*same, "--out", name, "--json").stdout
    assert (folder / name).read_bytes() == (folder / "before").read_bytes()
    assert without_time(json.loads(first)) == without_time(json.loads(second))
    assert list(json.loads(first)) == list(json.loads(second))
    assert run(*same).stdout == run(*same).stdout
    other = without_time(json.loads(run(*same, "--seed", "2", "--json").stdout))
    assert other["metrics"] != json.loads(first)["metrics"]


def test_gzip_holds_the_csv(folder: Path) -> None:
    run("--out", "rows.csv")
    run("--out", "rows.csv.gz")
    assert gzip.decompress((folder / "rows.csv.gz").read_bytes()) == (folder / "rows.csv").read_bytes()


def test_text_for_eyes() -> None:
    text = run("--replicas", "2", "--slo", "ttft_p99=200ms").stdout
    assert text.startswith("trace: 301 requests on 2 x h100_sxm tp1 pp1, ")
    assert "  ttft_p99    " in text
    assert "warning: 1 of 301 requests are longer than the KV cache" in text
    assert "took" not in text


def test_ensemble_in_text_and_json() -> None:
    """Documented: median, lo and hi of every figure; no backend changes a number."""
    found = json.loads(run("--ensemble", "3", "--backend", "serial", "--json").stdout)["ensemble"]
    assert found["members"] == 3
    assert found["metrics"]["ttft_p99_s"]["lo"] <= found["metrics"]["ttft_p99_s"]["median"]
    assert json.loads(run("--ensemble", "3", "--jobs", "2", "--json").stdout)["ensemble"] == found
    text = run("--ensemble", "3", "--backend", "serial").stdout
    assert "median [5 %, 95 %] of 3 resampled traces:" in text


def test_prefix_caching_reads_the_ids(folder: Path) -> None:
    """Hand: 1024 of the second prompt's 1536 tokens, of 3072 in all, are in the cache."""
    lines = [
        {"timestamp": 0, "input_length": 1536, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 9000, "input_length": 1536, "output_length": 5, "hash_ids": [1, 2, 4]},
    ]
    (folder / "prefix.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    shares = [
        json.loads(run("--json", *more, trace="prefix.jsonl").stdout)["metrics"]["cached_share"]
        for more in ([], ["--prefix-caching"])
    ]
    assert shares == [0.0, pytest.approx(1024 / 3072, rel=1e-12)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-9"], "llama-9"),
        (["--model", "llama-3.1-70b"], "does not fit on h100_sxm at tp 1, pp 1"),
        (["--gpu", "h1000"], "h1000"),
        (["--router", "nearest"], "router must be one of round_robin, least_loaded, random, got 'nearest'"),
        (["--replicas", "0"], "replicas must be >= 1, got 0"),
        (["--tp", "3"], "tp must divide the 32 attention heads"),
        (["--trace", "empty.csv"], "empty.csv: has a header but no requests"),
        (["--trace", "none.csv"], "none.csv: no such file"),
        (["--prefix-caching"], "prefixes were asked for, but there is no column"),
        (["--out", "missing/rows.csv"], "the folder missing does not exist"),
        (["--out", "rows.xlsx"], "--out must end in .csv, .csv.gz, .parquet, got 'rows.xlsx'"),
        (["--slo", "ttft_p99=1"], "needs a unit"),
        (["--slo", "ttft_p99=1s", "--slo", "ttft_p99=2s"], "--slo ttft_p99 must be given once, got it twice"),
        (["--rate-scale", "0"], "rate_scale must be positive and finite, got 0.0"),
        (["--seed", "-1"], "seed must be >= 0, got -1"),
        (["--ensemble", "0"], "--ensemble must be >= 1, got 0"),
        (["--ensemble", "2", "--backend", "threads"], "--backend must be one of processes, dask, serial"),
        (["--ensemble", "2", "--jobs", "0"], "--jobs must be >= 1, or -1 for one per core, got 0"),
        (["--max-num-batched-tokens", "10"], "max_num_batched_tokens must be >= max_num_seqs 256, got 10"),
        (["--engine", "vlm"], "engine"),
        (["--profile", "no-such-profile"], "no-such-profile"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    assert message in refused("--trace", "trace.csv", *FLEET, *arguments)


@pytest.mark.parametrize("missing", ["--trace", "--model", "--gpu"])
def test_what_is_missing_is_named(missing: str) -> None:
    flags = {"--trace": "trace.csv", "--model": "llama-3.1-8b", "--gpu": "h100"}
    given = [part for flag, value in flags.items() if flag != missing for part in (flag, value)]
    assert f"{missing} must be given" in refused(*given)


def test_parquet_without_pyarrow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "servecast[parquet]" in refused("--trace", "trace.csv", *FLEET, "--out", "rows.parquet")

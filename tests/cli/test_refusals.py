"""Refusals that are easy to miss: flags that would be ignored, folders left behind, widths that cannot run, profiles
that are not whole. Expected values: the rule that one clear line is said and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from servecast.calibration.profile import SHIPPED, dumps, load_profile, read_document
from servecast.cli import main

PLAN = ["plan", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "h100=2.9", "--slo", "ttft_p99=2s"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: str) -> str:
    result: Result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    "flag", [["--engine", "sglang"], ["--rate-scale", "2"], ["--precision", "fp8"], ["--run", "a"], ["--gpu", "h200=3"]]
)
def test_a_flag_beside_a_request_file_is_not_ignored(flag: list[str], folder: Path) -> None:
    CliRunner().invoke(main, ["init", "request.yaml"])
    assert f"{flag[0]} were both given" in refused("plan", "request.yaml", *flag)


@pytest.mark.parametrize("arguments", [["--model", "llama-3.1-8b"], ["--tp", "4"]])
def test_a_flag_beside_a_table_is_not_ignored(arguments: list[str], folder: Path) -> None:
    (folder / "rows.csv").write_text("model,gpu,engine,concurrency,isl,osl\nllama-3.1-8b,h100,vllm,8,100,100\n")
    assert f"{arguments[0]} were both given" in refused("predict", "--rows", "rows.csv", *arguments)


def test_an_output_file_needs_a_table(folder: Path) -> None:
    assert "--rows" in refused("predict", "--model", "llama-3.1-8b", "--gpu", "h100", "--out", "x.csv")
    assert list(folder.iterdir()) == []


def test_a_refused_policy_leaves_no_folder(folder: Path) -> None:
    """sglang 0.4.0 has no fp8 cache option in its table; the refusal comes after the plan is found."""
    refused(*PLAN, "--engine", "vllm@0.1.0", "--out", "there")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("8,1000,1,1", "pp must be at most the 32 layers"),
        ("8,1,1,8", "ep must be 1"),
        ("inf,1,1,1", "tp must be a whole number"),
        ("64,1,1,1", "tp must divide the 32 attention heads"),
    ],
)
def test_widths_that_cannot_run_are_unsupported(columns: str, words: str, folder: Path) -> None:
    """Origin: Llama-3.1-8B has 32 layers, 32 heads and no experts (its published config)."""
    header = "model,gpu,engine,tp,pp,dp,ep,concurrency,isl,osl"
    (folder / "rows.csv").write_text(f"{header}\nllama-3.1-8b,h100,vllm,{columns},8,100,100\n")
    result = CliRunner().invoke(main, ["predict", "--rows", "rows.csv", "--json"])
    assert result.exit_code == 0
    row = json.loads(result.stdout)[0]
    assert row["status"] == "unsupported"
    assert words in row["reason"]


def test_an_uneven_width_is_extrapolated(folder: Path) -> None:
    """32 heads over 12 GPUs: engines pad, nothing was measured so for this model."""
    (folder / "rows.csv").write_text("model,gpu,engine,tp,concurrency,isl,osl\nllama-3.1-8b,h100,vllm,12,8,100,100\n")
    row = json.loads(CliRunner().invoke(main, ["predict", "--rows", "rows.csv", "--json"]).stdout)[0]
    assert row["status"] == "extrapolated"
    assert "padded" in row["reason"]


def test_engine_names_are_read_as_in_plan() -> None:
    result = CliRunner().invoke(main, ["predict", "--model", "llama-3.1-8b", "--gpu", "h100", "--engine", "VLLM@0.32"])
    assert result.exit_code == 0, result.stderr


def test_a_trace_of_three_seconds_can_be_planned(folder: Path) -> None:
    (folder / "t.csv").write_text("t_s,n_in,n_out\n" + "".join(f"{0.1 * i},{100 + i},{20 + i}\n" for i in range(30)))
    arguments = [part if part != "example" else "t.csv" for part in PLAN]
    assert CliRunner().invoke(main, arguments).exit_code == 0


@pytest.mark.parametrize(
    ("part", "words"),
    [("engines", "engines must have"), ("bands", "bands must have"), ("kernels", "closed form"), ("ranges", "ranges")],
)
def test_a_profile_with_a_part_missing_is_refused(part: str, words: str, folder: Path) -> None:
    document = json.loads(dumps(read_document(SHIPPED)))
    document[part] = {} if part == "ranges" else document[part][:-1]
    (folder / "profile.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=words):
        load_profile(folder / "profile.json")


def test_a_surface_that_does_not_fill_its_grid_is_refused(folder: Path) -> None:
    document = json.loads(dumps(read_document(SHIPPED)))
    document["kernels"][0]["gemm"]["bf16"]["surface"]["values"].pop()
    (folder / "profile.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="must fill the grid"):
        load_profile(folder / "profile.json")

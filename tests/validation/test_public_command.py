"""``python -m servecast.validation.public``: its table, its JSON and its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from servecast.calibration.fits.kernels import HeldOutError
from servecast.calibration.public import KernelReport
from servecast.validation.public import data_folder, kernel_markdown, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # one thread: the matrices are small, and the other cores run other tests
    return subprocess.run(
        [sys.executable, "-m", "servecast.validation.public", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def cells(text: str) -> list[dict[str, str]]:
    """Rows of the first markdown table in `text`."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    names, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_kernel_table_of_the_public_data(data_path: Callable[..., Path]) -> None:
    # Origin: acceptance bars, per cent; step notes 6.3 for the closed form, median error 8.7 (H200) and 8.2 (H100)
    # over all m, between those of small and large m.
    done = run("--only", "kernels", "--data", str(data_path("aic-kernels").parent))
    assert done.returncode == 0, done.stderr
    rows = cells(done.stdout)
    assert {row["GPU"] for row in rows} == {"h100_sxm", "h200_sxm"}
    assert {row["kernel"] for row in rows} == {"gemm", "decode attention", "prefill attention", "all-reduce"}
    bars = {"m >= 256": 10.0, "m < 256": 20.0, "bytes >= 1 MiB": 10.0}
    for row in rows:
        assert int(row["held back"]) > 0
        assert float(row["median"]) <= bars.get(row["slice"], 20.0)
        assert float(row["median"]) <= float(row["closed form, median"])
    for gpu, published in (("h200_sxm", 8.7), ("h100_sxm", 8.2)):
        medians = [
            float(row["closed form, median"])
            for row in rows
            if (row["GPU"], row["kernel"], row["format"]) == (gpu, "gemm", "bf16")
        ]
        assert min(medians) <= published <= max(medians)
    assert "Measured servers" not in done.stdout


def test_markdown_of_a_report_by_hand() -> None:
    # Origin: hand.
    error = HeldOutError(rows=7, mape=0.1234, median=0.05, closed_form_median=0.2)
    report = KernelReport(gpu="g", kernel="gemm", format="fp8", rows=42, numbers=9, held_out={"m >= 256": error})
    assert kernel_markdown([report]).splitlines()[-1] == (
        "| g | gemm | fp8 | 42 | 9 | m >= 256 | 7 | 12.3 | 5.0 | 20.0 |"
    )


def test_a_missing_folder_is_the_users_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert main(["--data", str(missing)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"got '{missing}'" in captured.err


def test_a_folder_without_tables_is_the_users_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--data", str(tmp_path), "--only", "kernels"]) == 2
    assert capsys.readouterr().err.startswith("servecast: error: ")


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "weather"])
    assert stopped.value.code == 2
    assert "invalid choice: 'weather'" in capsys.readouterr().err


def test_the_data_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SERVECAST_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("SERVECAST_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"data must be a folder of public measurements .*, got '.*gone'"):
        data_folder()


def test_vllm_runs_alone_are_a_list(
    data_path: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documented: a list of rows with truth null where it is held back, from a tree with that folder alone, without
    fits. Bars: the mean TPOT of an open run within 5 %, its makespan within 5 %."""
    (tmp_path / "llmservingsim-vllm").symlink_to(data_path("llmservingsim-vllm"))
    monkeypatch.setattr("servecast.validation.public.fit_kernels", None)
    assert main(["--data", str(tmp_path), "--only", "vllm-runs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(
        list(row) == ["run", "executor", "metric", "predicted", "lo", "hi", "truth", "peer", "error"] for row in rows
    )
    assert {row["executor"] for row in rows} == {"simulator", "closed_form"}
    opened = [row for row in rows if row["truth"] is not None]
    assert {row["run"] for row in opened} == {"rtx4090-llama31-8b", "rtxpro6000-qwen3-30b-a3b"}
    for row in rows:
        assert row["lo"] <= row["predicted"] <= row["hi"]
        assert (row["error"] is None) == (row["truth"] is None)
    for row in opened:
        assert row["error"] == pytest.approx(row["predicted"] / row["truth"] - 1.0, rel=1e-9)
        if row["executor"] == "simulator" and row["metric"] in {"tpot_mean_s", "makespan_s"}:
            assert abs(row["error"]) <= 0.05
    assert main(["--data", str(tmp_path), "--only", "vllm-runs"]) == 0
    shown = cells(capsys.readouterr().out)
    assert len(shown) == len(rows) / 2
    assert {row["measured"] for row in shown if "qwen3-32b" in row["run"]} == {"held back"}


def test_a_folder_without_vllm_runs_is_the_users_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--data", str(tmp_path), "--only", "vllm-runs"]) == 2
    assert "data must hold a folder llmservingsim-vllm" in capsys.readouterr().err


@pytest.mark.slow
def test_silicon_scores_as_json(data_path: Callable[..., Path]) -> None:
    # Origin: acceptance bars, through the command itself.
    done = run("--only", "silicon", "--json", "--data", str(data_path("aic-silicon").parent))
    assert done.returncode == 0, done.stderr
    found = {(one["split"], one["slice"], one["metric"]): one for one in json.loads(done.stdout)["silicon"]}
    assert len(found) == 3 * 5 * 2
    clean = "dense, without suspect and inconsistent rows"
    assert found["group", clean, "tpot"]["mape"] <= 0.10
    assert found["group", clean, "ttft"]["mape"] <= 0.25
    for one in found.values():
        assert one["predicted"] >= 0.95

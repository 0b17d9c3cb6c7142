"""Runs of vLLM: the bars that were written before the comparison, and folders that lack something."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from servecast.validation.vllm_runs import FOLDER, METRICS, RunScore, markdown, score_runs

OPEN = ("rtx4090-llama31-8b", "rtxpro6000-qwen3-30b-a3b")
BARS = {
    "simulator": {"tpot_mean_s": 0.05, "ttft_p50_s": 0.10, "ttft_p95_s": 0.10, "makespan_s": 0.10},
    "closed_form": {"tpot_mean_s": 0.20, "ttft_p95_s": 0.25},
}
"""Largest error of a metric as a share of what was measured, or LLMServingSim's own error where that is larger and the
executor is the simulator."""
NEEDED = ("profile_attention.csv.gz", "profile_dense.csv.gz", "profile_moe.csv.gz", "profile_per_sequence.csv.gz")


@cache
def _scores(data: Path) -> tuple[RunScore, ...]:
    return tuple(score_runs(data))


def _error_allowed(one: RunScore) -> float:
    bar = BARS[one.executor][one.metric]
    if one.executor == "simulator" and one.peer is not None and one.truth is not None:
        return max(bar, abs(one.peer / one.truth - 1.0))
    return bar


@pytest.mark.parametrize("executor", BARS)
@pytest.mark.parametrize("run", OPEN)
def test_bars_of_the_open_runs(run: str, executor: str, data_path: Callable[..., Path]) -> None:
    scores = _scores(data_path(FOLDER).parent)
    judged = [one for one in scores if (one.run, one.executor) == (run, executor) and one.metric in BARS[executor]]
    assert [one.metric for one in judged] == [metric for metric in METRICS if metric in BARS[executor]]
    for one in judged:
        assert one.error is not None
        assert abs(one.error) <= _error_allowed(one), one


def test_every_run_is_predicted(data_path: Callable[..., Path]) -> None:
    scores = _scores(data_path(FOLDER).parent)
    assert len(scores) == 4 * 2 * len(METRICS)
    for one in scores:
        assert 0.0 < one.lo <= one.predicted <= one.hi
        if one.run not in OPEN:
            assert one.truth is None
            assert one.error is None
    table = markdown(scores)
    assert table.count("\n") == 1 + 4 * len(METRICS)
    assert "held back" in table


def _copied(source: Path, to: Path, *, without: str = "") -> Path:
    folder = to / FOLDER
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name != without:
            shutil.copy(path, folder / path.name)
    return folder


def test_without_truth_a_run_is_still_predicted(tmp_path: Path, data_path: Callable[..., Path]) -> None:
    """The stamps are no input: without a single row of them every figure is the same."""
    folder = _copied(data_path(FOLDER), tmp_path)
    header = (folder / "requests_truth.csv").read_text().splitlines()[0]
    (folder / "requests_truth.csv").write_text(header + "\n")
    (folder / "summary_with_llmservingsim.csv").unlink()
    blind = score_runs(tmp_path)
    seen = _scores(data_path(FOLDER).parent)
    assert [one.predicted for one in blind] == [one.predicted for one in seen]
    assert [(one.lo, one.hi) for one in blind] == [(one.lo, one.hi) for one in seen]
    assert all(one.truth is None and one.error is None and one.peer is None for one in blind)


@pytest.mark.parametrize("name", [*NEEDED, "runs.csv", "requests_input.csv"])
def test_a_missing_file_is_named_in_one_line(name: str, tmp_path: Path, data_path: Callable[..., Path]) -> None:
    _copied(data_path(FOLDER), tmp_path, without=name)
    with pytest.raises(FileNotFoundError, match=name.removesuffix(".gz")) as caught:
        score_runs(tmp_path)
    assert str(caught.value).count("\n") == 0


def test_no_truth_file_at_all(tmp_path: Path, data_path: Callable[..., Path]) -> None:
    _copied(data_path(FOLDER), tmp_path, without="requests_truth.csv")
    scores = score_runs(tmp_path)
    assert all(one.truth is None for one in scores)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"data must hold a folder {FOLDER}, got"):
        score_runs(tmp_path)

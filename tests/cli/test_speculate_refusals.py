"""What a user can get wrong with ``servecast speculate``: one line on stderr, exit status 2, nothing half-written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from speculation_plans import ACCEPTANCE, COST, HEADER, NAMES, PASSES, PLAN, sweep, write_sweep

from servecast.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with a sweep that needs a schedule, acceptance and passes."""
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path / "cells.csv", sweep(cost=replace(COST, row_s=2e-4)))
    (tmp_path / "acceptance.csv").write_text(ACCEPTANCE)
    (tmp_path / "passes.csv").write_text(PASSES)
    return tmp_path


# ---- mistakes ------------------------------------------------------------------------------------------

FOUR = HEADER + "1,0,100\n1,3,200\n16,0,50\n16,3,100\n"
FILES = {
    "few.csv": HEADER + "1,0,100\n1,3,200\n16,3,100\n",
    "nan.csv": FOUR.replace("1,3,200", "1,3,nan"),
    "inf.csv": FOUR.replace("1,3,200", "1,3,inf"),
    "negative.csv": FOUR.replace("1,3,200", "1,3,-200"),
    "disagree.csv": FOUR + "1,3,230\n",
    "typo.csv": FOUR.replace("batch_size", "batchsize"),
    "empty.csv": "",
    "header.csv": HEADER,
    "gap.csv": FOUR.replace("1,3,200", "1,3,"),
    "mixed.csv": "model," + FOUR.replace("\n", "\na,").removesuffix("a,").replace("a,16,3", "b,16,3"),
    "endless.csv": FOUR + "1,1024,50\n",
    "beyond.json": '{"per_position": [1.2, 0.5], "kind": "unconditional"}',
    "rising.json": '{"per_position": [0.5, 0.7], "kind": "unconditional"}',
    "long.csv": "draft_length,mean_acceptance_length\n2,3.5\n",
    "curves.csv": "curve,draft_length,mean_acceptance_length\na,2,2.36\nb,4,3.08\n",
    "passes_typo.csv": PASSES.replace("step_s", "seconds"),
}
BINARY = bytes(range(256))
PROFILED = ("--model", "llama-3.1-8b", "--gpu", "h100", "--acceptance", "acceptance.csv")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "--acceptance must be given where there are no --cells"),
    "no acceptance": (("--model", "llama-3.1-8b", "--gpu", "h100"), "--acceptance must be given"),
    "no source": (("--acceptance", "acceptance.csv"), "--cells, --step-cost, or --model with --gpu must be given"),
    "no gpu": (("--model", "llama-3.1-8b", "--acceptance", "acceptance.csv"), "or --model with --gpu must be given"),
    "two sources": ((*PLAN, "--step-cost", "passes.csv"), "--cells and --step-cost were both given"),
    "missing cells": (("--cells", "absent.csv"), "absent.csv: no such file"),
    "missing acceptance": ((*PLAN, "--acceptance", "absent.csv"), "absent.csv: no such file"),
    "missing passes": (("--step-cost", "absent.csv", *PROFILED[4:]), "absent.csv: "),
    "cells that are a folder": (("--cells", "."), "directory"),
    "binary cells": (("--cells", "binary.csv"), "binary.csv: "),
    "empty cells": (("--cells", "empty.csv"), "empty.csv: is empty"),
    "header alone": (("--cells", "header.csv"), "header.csv: must hold cells, got a header alone"),
    "typo in a column": (("--cells", "typo.csv"), "column batch_size must be given (is it 'batchsize'?)"),
    "typo in a column of passes": (("--step-cost", "passes_typo.csv", *PROFILED[4:]), "column step_s must be given"),
    "too few cells": (
        ("--cells", "few.csv"),
        "cells must be at least 4 with 2 draft lengths, got 3 with 2; measure (batch_size 16, draft_length 0)",
    ),
    "NaN": (("--cells", "nan.csv"), "nan.csv: line 3: tok_s_per_request must be a finite number, got 'nan'"),
    "infinity": (("--cells", "inf.csv"), "inf.csv: line 3: tok_s_per_request must be a finite number, got 'inf'"),
    "negative": (("--cells", "negative.csv"), "negative.csv: line 3: tok_s_per_request must be > 0, got -200"),
    "a cell without speed": (("--cells", "gap.csv"), "gap.csv: line 3: tok_s_per_request must be a finite number"),
    "cells that disagree": (
        ("--cells", "disagree.csv"),
        "cells of batch_size 1, draft_length 3 must agree within 5%, got tok_s_per_request 200 and 230",
    ),
    "two sweeps in one": (("--cells", "mixed.csv"), "model must be the same in all cells of a sweep, got 'a' and 'b'"),
    "endless drafts": (("--cells", "endless.csv"), "endless.csv: draft_length must be at most 64, got 1024"),
    "acceptance above 1": ((*PLAN, "--acceptance", "beyond.json"), "must be from 0 to 1, got 1.2"),
    "increasing survival": ((*PLAN, "--acceptance", "rising.json"), "must not increase, got 0.7 after 0.5"),
    "more tokens than drafted": ((*PLAN, "--acceptance", "long.csv"), "must be from 1 to 3 at draft length 2, got 3.5"),
    "which curve": ((*PLAN, "--acceptance", "curves.csv"), "curves.csv: holds 2 curves"),
    "a curve of nothing": ((*PLAN, "--curve", "a"), "--curve needs --acceptance"),
    "an engine without schedules": (
        (*PLAN, "--engine", "vllm@0.20.0"),
        "vllm 0.20.0 has no num_speculative_tokens_per_batch_size (since 0.24.0)",
    ),
    "an engine too new": ((*PLAN, "--engine", "vllm@9.0"), "vllm 9.0"),
    "a version that is none": ((*PLAN, "--engine", "vllm@latest"), "engine_version must be a release"),
    "no version": ((*PLAN, "--engine", "vllm@"), "engine_version must be a release"),
    "unknown engine": ((*PLAN, "--engine", "tgi"), "engine must be one of vllm, sglang, trtllm, got 'tgi'"),
    "unknown method": ((*PLAN, "--method", "eagle4"), "method must be 'eagle', "),
    "a schedule with data parallel": ((*PLAN, "--dp", "2"), "data_parallel must be 1 with a schedule, got 2"),
    "another metric": ((*PLAN, "--slo", "ttft_p99=2s"), "must be tpot_mean=, tpot_p99= (any percentile) or step="),
    "limit without unit": ((*PLAN, "--slo", "tpot_p99=50"), "needs a unit"),
    "limit of zero": ((*PLAN, "--slo", "step=0ms"), "the limit must be positive"),
    "limit of NaN": ((*PLAN, "--slo", "tpot_mean=nanms"), "the limit must be"),
    "limit twice": ((*PLAN, "--slo", "step=50ms", "--slo", "step=60ms"), "--slo step must be given once"),
    "hopeless limit": ((*PLAN, "--slo", "tpot_mean=1ms"), "tpot_mean must be at least "),
    "context of nothing known": ((*PLAN, "--context", "1000"), "--context needs a context_tokens column"),
    "context with passes": (
        ("--step-cost", "passes.csv", *PROFILED[4:], "--context", "9"),
        "--model and --gpu must be given",
    ),
    "context measured at no known one": (
        (*PLAN, *PROFILED[:4], "--context", "1000"),
        "--context needs --measured-context",
    ),
    "context NaN": ((*PROFILED, "--context", "nan"), "contexts must be finite, >= 0 and increasing, got [nan]"),
    "context negative": (
        (*PLAN, *PROFILED[:4], "--context", "-1", "--measured-context", "0"),
        "contexts must be finite, >= 0 and increasing, got [-1.0]",
    ),
    "context of what": ((*PLAN, *PROFILED[:4], "--context", "4000"), "--context needs --measured-context"),
    "acceptance of a score": (
        (*PLAN, "--predict", "cells.csv", "--acceptance", "acceptance.csv"),
        "--sweep-acceptance is its acceptance, not --acceptance",
    ),
    "before without after": (
        (*PLAN, "--acceptance-before", "acceptance.csv"),
        "--acceptance-before needs --acceptance",
    ),
    "rival at a context": (
        (*PLAN, *PROFILED[:4], "--context", "4000", "--measured-context", "0", "--compare", "other=cells.csv"),
        "--compare and --context were both given",
    ),
    "rival of a profile": (
        ("--model", "llama-3.1-8b", "--gpu", "h100", "--acceptance", "acceptance.csv", "--compare", "other=cells.csv"),
        "--compare and --acceptance were both given",
    ),
    "switch without load": ((*PLAN, "--switch-cost", "5ms"), "--switch-cost needs --rate"),
    "rate without unit": ((*PLAN, "--rate", "5"), "needs a unit"),
    "output tokens NaN": ((*PLAN, "--output-tokens", "nan"), "must be positive and finite, got nan"),
    "operating backwards": ((*PLAN, "--operating", "5:3"), "--operating must be LOW:HIGH batch sizes, got '5:3'"),
    "operating in words": ((*PLAN, "--operating", "all"), "--operating must be LOW:HIGH batch sizes, got 'all'"),
    "compare without name": ((*PLAN, "--compare", "cells.csv"), "--compare must be NAME=CELLS.csv"),
    "compare missing": ((*PLAN, "--compare", "a=absent.csv"), "absent.csv: no such file"),
    "compare itself": ((*PLAN, "--compare", "this=cells.csv"), "--compare must name every method once"),
    "unknown model": (("--model", "llama-99", *PROFILED[2:]), "llm must be a catalogue name"),
    "unknown gpu": ((*PROFILED, "--gpu", "h9000"), "h9000"),
    "unknown profile": ((*PROFILED, "--profile", "mine"), "profile must be a file or one of"),
    "predict alone": (("--predict", "cells.csv"), "--predict needs --cells to fit"),
    "predict a typo": ((*PLAN, "--predict", "typo.csv"), "column batch_size must be given"),
    "predict without end": ((*PLAN, "--predict", "endless.csv"), "endless.csv: draft_length must be at most 64"),
}


@pytest.fixture
def files(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "binary.csv").write_bytes(BINARY)
    return folder


def refused(arguments: tuple[str, ...], folder: Path) -> str:
    """The one line on stderr; nothing is written."""
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(main, ["speculate", *arguments])
    assert result.exit_code == 2, result.stdout + result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("servecast: error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return result.stderr


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line_and_write_nothing(name: str, files: Path) -> None:
    arguments, message = BAD[name]
    if "--predict" not in arguments:
        named = () if "--model" in arguments else NAMES[:2]
        arguments = (*arguments, *named, *NAMES[2:], "--out", "out")
    assert message in refused((*arguments, "--json"), files)


OUTPUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no names": (("--out", "out"), "--model and --draft-model must be given for --out"),
    "no drafter": (("--out", "out", "--model", "m"), "--draft-model must be given for --out"),
    "a file for a folder": ((*NAMES, "--out", "cells.csv"), "--out must be a folder, got the file cells.csv"),
    "page over an engine's file": (
        (*NAMES, "--out", ".", "--report", "vllm_speculation.json"),
        "--report must not be one of the engine's files",
    ),
    "no folder for the page": (
        (*NAMES, "--out", "out", "--report", "absent/p.html"),
        "the folder absent does not exist",
    ),
    "a folder for the page": ((*NAMES, "--out", "out", "--report", "."), "is a folder"),
    "one place for both": ((*NAMES, "--out", "out", "--report", "out"), "--report must be a file beside --out"),
    "a file on the way": ((*NAMES, "--out", "cells.csv/out"), "cells.csv/out"),
    "a page without the files it stands beside": (("--out", "out", "--report", "p.html"), "must be given for --out"),
    "files of a score": (("--predict", "cells.csv", "--out", "out"), "--predict writes no files"),
    "a page of a score": (("--predict", "cells.csv", "--report", "p.html"), "--predict writes no files"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be_are_refused_before_anything_is_written(name: str, folder: Path) -> None:
    arguments, message = OUTPUTS[name]
    assert message in refused((*PLAN, *arguments), folder)


def test_a_failed_write_leaves_what_was_there(folder: Path) -> None:
    # Origin: rule; a folder stands where one of the files should go.
    out = folder / "out"
    (out / "vllm_speculation.sh").mkdir(parents=True)
    (out / "speculation.json").write_text("before")
    refused((*PLAN, *NAMES, "--out", "out", "--report", "page.html"), folder)
    assert (out / "speculation.json").read_text() == "before"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max-batch", "0"), ("--max-length", "65"), ("--max-lengths", "0"), ("--max-segments", "33"), ("--dp", "0")],
)
def test_counts_out_of_range_are_refused(flag: str, value: str) -> None:
    # Origin: click's own usage error.
    result = CliRunner().invoke(main, ["speculate", *PLAN, flag, value])
    assert result.exit_code == 2
    assert "is not in the range" in result.stderr

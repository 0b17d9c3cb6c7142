"""What users and their programs stand on: the names of the package, and help and JSON of every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import servecast
from servecast.cli import COMMANDS, main

FLAGS = {
    "plan": ("--trace", "--model", "--gpu", "--slo", "--engine", "--precision", "--out", "--report", "--json"),
    "fleet": (
        "--trace",
        "--model",
        "--gpu",
        "--slo",
        "--input-edges",
        "--output-edges",
        "--rate-quantile",
        "--out",
        "--json",
    ),
    "schedule": ("--trace", "--model", "--gpu", "--slo", "--window", "--lead-time", "--min-dwell", "--out", "--json"),
    "predict": (
        "--rows",
        "--out",
        "--model",
        "--gpu",
        "--tp",
        "--pp",
        "--dp",
        "--ep",
        "--concurrency",
        "--isl",
        "--osl",
    ),
    "simulate": (
        "--trace",
        "--model",
        "--gpu",
        "--replicas",
        "--tp",
        "--pp",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--router",
        "--prefix-caching",
        "--slo",
        "--seed",
        "--ensemble",
        "--out",
        "--json",
    ),
    "speculate": (
        "--cells",
        "--predict",
        "--acceptance",
        "--step-cost",
        "--model",
        "--gpu",
        "--tp",
        "--dp",
        "--engine",
        "--method",
        "--draft-model",
        "--slo",
        "--max-batch",
        "--max-length",
        "--max-lengths",
        "--max-segments",
        "--context",
        "--rate",
        "--output-tokens",
        "--compare",
        "--allow-static",
        "--out",
        "--report",
        "--json",
    ),
    "trace": ("--json", "--chart"),
    "calibrate": (
        "--budget",
        "--device",
        "--memory",
        "--only",
        "--threads",
        "--out",
        "--samples",
        "--from-samples",
        "--report",
        "--seed",
        "--name",
        "--json",
    ),
    "profile": (),
    "validate": ("--quick", "--device", "--vllm-python", "--seed", "--report", "--out", "--list", "--json"),
    "init": ("--json",),
    "list": ("--json",),
}
"""Options that users rely on, or that programs need."""
PLAN = ["plan", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "h100=2.9", "--slo", "ttft_p99=2s"]
POINT = ["predict", "--model", "llama-3.1-8b", "--gpu", "h100"]


# ---- the package ---------------------------------------------------------------------------------------


def test_import_costs_nothing(tmp_path: Path) -> None:
    """Rule: `import servecast` imports no library and no room of its own; in a fresh process, in another folder."""
    code = "import sys; before = set(sys.modules); import servecast; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert {name for name in found if name.startswith("servecast")} == {"servecast"}
    third = {name.partition(".")[0] for name in found} - {"servecast"}
    assert not third - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", servecast.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(servecast, name) is not None


def test_names_are_sorted_and_an_unknown_one_is_refused() -> None:
    assert list(servecast.__all__) == sorted(set(servecast.__all__))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        servecast.nope  # noqa: B018 (the access is the test)


def test_a_plan_from_the_public_names_alone() -> None:
    """The main query in Python: trace or parameters, model, offers, limits."""
    from servecast.model.workload import FixedLength

    load = servecast.workload_from_parameters(5.0, n_in=FixedLength(500.0), n_out=FixedLength(100.0))
    answer = servecast.plan(
        load,
        servecast.llm("llama-3.1-8b"),
        [servecast.Offer(gpu=servecast.gpu("h100"), usd_per_hour=2.9)],
        [servecast.Slo(metric="ttft", percentile=99.0, limit_s=2.0)],
    )
    assert answer.plan.plan is not None
    point = servecast.Point(model="llama-3.1-8b", gpu="h100", engine="vllm", concurrency=1.0, isl=500.0, osl=100.0)
    assert servecast.predict([point])[0].status == "ok"


# ---- the commands --------------------------------------------------------------------------------------


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def command_of(name: str) -> click.Command:
    assert isinstance(main, click.Group)
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_help_names_every_command() -> None:
    text = invoke("--help")
    unfolded = " ".join(text.split())
    for name, summary in COMMANDS.items():
        assert f"{name} {summary}" in unfolded
    assert invoke("-h") == text
    assert invoke("--version").startswith("servecast ")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_mentions_every_option(name: str) -> None:
    """click's own list of the options, each with words of explanation; and those that users rely on."""
    text = invoke(name, "--help")
    options = [one for one in command_of(name).params if isinstance(one, click.Option)]
    for option in options:
        assert all(flag in text for flag in option.opts)
        assert option.help
    assert set(FLAGS[name]) <= {flag for option in options for flag in option.opts}
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    "arguments",
    [
        PLAN,
        POINT,
        ["predict", "--rows", "rows.csv"],
        ["simulate", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "h100"],
        ["speculate", "--cells", "cells.csv"],
        ["speculate", "--cells", "cells.csv", "--predict", "cells.csv"],
        ["trace", "example"],
        ["init", "request.yaml"],
        ["list", "models"],
        ["list", "gpus"],
        ["list", "profiles"],
        ["list", "machines"],
        ["list", "engines"],
    ],
    ids=" ".join,
)
def test_json_of_every_command_parses(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: strict JSON (no NaN), each object with the name and version of its schema."""
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("model,gpu,engine,concurrency,isl,osl\nllama-3.1-8b,h100,vllm,8,1000,100\n")
    Path("cells.csv").write_text("batch_size,draft_length,tpot_ms\n1,0,10\n1,3,5\n16,0,20\n16,3,11\n")

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    found = json.loads(invoke(*arguments, "--json"), parse_constant=refuse)
    for one in found if isinstance(found, list) else [found]:
        assert one["schema"].startswith("servecast.")
        assert one["schema"].partition("/")[2].isdigit()

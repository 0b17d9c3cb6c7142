"""What a process imports: a query that takes a second cannot afford libraries that take one to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("scipy", "pandas", "altair", "torch", "pulp", "cvxpy", "rich", "matplotlib", "hypothesis")
"""Imports that a cold start cannot pay for, and what tests alone may need."""
PLAN = ["plan", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "h100=2.9", "--gpu", "l40s=1.1"]
PLAN += ["--slo", "ttft_p99=2s", "--slo", "tpot_p99=50ms"]
POINT = ["predict", "--model", "llama-3.1-8b", "--gpu", "h100", "--concurrency", "16"]
SPECULATE = ["speculate", "--cells", "cells.csv"]
CELLS = "batch_size,draft_length,tok_s_per_request\n1,0,100\n1,3,220\n16,0,60\n16,3,110\n64,0,40\n64,3,60\n"

SCRIPT = """\
import sys
sys.argv = ["servecast", *sys.argv[1:]]
from servecast.cli import main
main(standalone_mode=False)
print("modules:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def imported(folder: Path, *arguments: str) -> set[str]:
    """Top-level modules of a process that has run a command."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("modules: ")
    return set(last.split()[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        [*PLAN, "--json"],
        [*PLAN, "--out", "out", "--report", "report.html"],
        [*POINT, "--json"],
        ["trace", "example"],
        [*SPECULATE, "--json"],
        [*SPECULATE, "--slo", "tpot_p99=30ms", "--rate", "5/s"],
        [*SPECULATE, "--draft-model", "head", "--model", "target", "--out", "out", "--report", "out/page.html"],
        [*SPECULATE, "--predict", "cells.csv"],
    ],
    ids=["plan", "plan with files", "predict", "trace", "speculate", "with a load", "files of a table", "scored"],
)
def test_a_query_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    """Documented: a cold query cannot afford most of them."""
    (tmp_path / "cells.csv").write_text(CELLS)
    found = imported(tmp_path, *arguments)
    assert "numpy" in found
    assert not found & set(HEAVY)


def test_help_imports_no_numbers(tmp_path: Path) -> None:
    """Rule: help of the group costs click alone; a command's module is imported when it is called."""
    code = "import sys, servecast.cli; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert not {name.partition(".")[0] for name in modules} & {*HEAVY, "numpy", "pydantic", "yaml"}
    assert not [name for name in modules if name.startswith("servecast.cli.") and name.endswith("_command")]

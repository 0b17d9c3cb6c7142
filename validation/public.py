"""Scores on public data, in one command:
``python -m servecast.validation.public [--data DIR] [--only PART] [--json]``."""

from __future__ import annotations

import argparse
import json
import os

# many small fits: threads of the linear algebra library cost more than they save; read when numpy is loaded
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from servecast.calibration.public import KernelReport, fit_kernels, load_runs
from servecast.validation import silicon

PARTS = ("kernels", "silicon")


def data_folder(given: Path | None = None) -> Path:
    """Folder of the public data: `given`, else SERVECAST_DATA, else ../shared/data."""
    folder = given or Path(os.environ.get("SERVECAST_DATA", "../shared/data"))
    if not folder.is_dir():
        raise ValueError(f"data must be a folder of public measurements (or set SERVECAST_DATA), got {str(folder)!r}")
    return folder


def kernel_markdown(reports: Sequence[KernelReport]) -> str:
    """Held-back errors of the kernel surfaces, in per cent."""
    lines = [
        "| GPU | kernel | format | rows | numbers | slice | held back | MAPE | median | closed form, median |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for name, error in report.held_out.items():
            numbers = [error.mape, error.median, error.closed_form_median]
            lines.append(
                f"| {report.gpu} | {report.kernel} | {report.format} | {report.rows} | {report.numbers} | {name} "
                f"| {error.rows} | " + " | ".join(f"{100.0 * number:.1f}" for number in numbers) + " |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the module; 2 on a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m servecast.validation.public", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder laid out like the public data (default: SERVECAST_DATA)")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of tables")
    given = parser.parse_args(arguments)
    try:
        folder = data_folder(given.data)
        results = _run(folder, PARTS if given.only is None else (given.only,))
    except (ValueError, OSError) as error:
        print(f"servecast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("servecast: interrupted", file=sys.stderr)
        return 130
    kernels, scores = results
    if given.json:
        print(
            json.dumps(
                {"kernels": [asdict(one) for one in kernels], "silicon": [asdict(one) for one in scores]}, indent=1
            )
        )
        return 0
    if kernels and given.only != "silicon":
        print("Kernel surfaces, errors in % on shapes held back from the fit\n\n" + kernel_markdown(kernels) + "\n")
    if scores:
        print("Measured servers, errors in % on rows held out from the fit\n\n" + silicon.markdown(scores))
    return 0


def _run(folder: Path, parts: Sequence[str]) -> tuple[list[KernelReport], list[silicon.Score]]:
    kernels, reports = fit_kernels(folder)
    if "silicon" not in parts:
        return reports, []
    return reports, silicon.all_scores(load_runs(folder, kernels), tick=_tick if sys.stderr.isatty() else None)


def _tick(message: str) -> None:
    print(f"\r\x1b[Kheld out {message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Scores on public data, in one command:
``python -m servecast.validation.public [--data DIR] [--only PART] [--json]``."""

from __future__ import annotations

import argparse
import json
import math
import os

# many small fits: threads of the linear algebra library cost more than they save; read when numpy is loaded
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from servecast.calibration.fits.acceptance_transfer import Transfer
from servecast.calibration.public import KernelReport, fit_kernels, load_runs
from servecast.validation import silicon, speculation_scores, vllm_runs

PARTS = ("kernels", "silicon", "vllm-runs", "speculation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What was asked for; empty where it was not."""

    kernels: Sequence[KernelReport] = ()
    silicon: Sequence[silicon.Score] = ()
    vllm_runs: Sequence[vllm_runs.RunScore] = ()
    sweeps: Sequence[speculation_scores.SweepScore] = ()
    settings: Sequence[speculation_scores.SettingScore] = ()
    transfers: Sequence[Transfer] = ()


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
    print(_json(results, given.only) if given.json else _text(results, given.only))
    return 0


def _run(folder: Path, parts: Sequence[str]) -> Scores:
    # first what takes a second: a folder that lacks something is refused before the fits
    runs = vllm_runs.score_runs(folder) if "vllm-runs" in parts else ()
    if parts == ("vllm-runs",):
        return Scores(vllm_runs=runs)
    speculation = _speculation(folder) if "speculation" in parts else Scores()
    if parts == ("speculation",):
        return speculation
    kernels, reports = fit_kernels(folder)
    if "silicon" not in parts:
        return Scores(kernels=reports)
    tick = _tick if sys.stderr.isatty() else None
    measured = silicon.all_scores(load_runs(folder, kernels), tick=tick)
    return replace(speculation, kernels=reports, silicon=measured, vllm_runs=runs)


def _speculation(folder: Path) -> Scores:
    return Scores(
        sweeps=speculation_scores.sweep_scores(folder),
        settings=speculation_scores.setting_scores(folder),
        transfers=speculation_scores.transfers(folder),
    )


def _json(found: Scores, only: str | None) -> str:
    runs = [_row(one) for one in found.vllm_runs]
    if only == "vllm-runs":
        return json.dumps(runs, indent=1, allow_nan=False)
    drafts = {
        "sweeps": [_plain(asdict(one)) for one in found.sweeps],
        "settings": [_plain(asdict(one)) for one in found.settings],
        "transfers": [_plain(asdict(one)) for one in found.transfers],
    }
    if only == "speculation":
        return json.dumps(drafts, indent=1, allow_nan=False)
    whole: dict[str, Any] = {
        "kernels": [asdict(one) for one in found.kernels],
        "silicon": [asdict(one) for one in found.silicon],
    }
    return json.dumps(whole if only else whole | {"vllm_runs": runs, "speculation": drafts}, indent=1)


def _row(one: vllm_runs.RunScore) -> dict[str, Any]:
    """One figure; null where the truth or the peer's figure is not published, or there is nothing to measure."""
    return _plain(asdict(one) | {"error": one.error})


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Arrays as lists, NaN as null."""
    values = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _text(found: Scores, only: str | None) -> str:
    parts = []
    if found.kernels and only != "silicon":
        parts.append(
            "Kernel surfaces, errors in % on shapes held back from the fit\n\n" + kernel_markdown(found.kernels)
        )
    if found.silicon:
        parts.append(
            "Measured servers, errors in % on rows held out from the fit\n\n" + silicon.markdown(found.silicon)
        )
    if found.vllm_runs:
        parts.append("Whole runs of vLLM, seconds and errors in %\n\n" + vllm_runs.markdown(found.vllm_runs))
    if found.sweeps:
        parts.append(
            "Draft-length sweeps, each batch size from the others\n\n" + speculation_scores.sweep_markdown(found.sweeps)
        )
        parts.append("EAGLE-3 settings from the 3-step run\n\n" + speculation_scores.setting_markdown(found.settings))
        parts.append("Acceptance carried to longer drafts\n\n" + speculation_scores.transfer_markdown(found.transfers))
    return "\n\n".join(parts)


def _tick(message: str) -> None:
    print(f"\r\x1b[Kheld out {message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

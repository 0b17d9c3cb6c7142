"""Speculation on public data: sweeps held out by batch size, EAGLE-3 settings chosen from one, acceptance carried over.

No fit sees what it is scored on: a batch size is predicted from the others of its sweep, a (model, benchmark) pair
from its own 3-step run and its baseline alone, a draft length from shorter ones with what other curves taught. The
forms and priors of the fit were chosen with these sweeps and runs in view (docs, speculation).
Each figure stands beside a baseline that needs no model: speeds interpolated between measured batch sizes, one setting
for all, one alpha.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.acceptance_transfer import Transfer, transfer_table
from servecast.calibration.fits.speculation_cells import fit_cells
from servecast.model.acceptance import AcceptanceSample
from servecast.model.speculation_cells import SpeculationCells
from servecast.readers.speculation_cells import read_cells

Floats = NDArray[np.float64]

SWEEPS = "speculation"
SETTINGS = ((3, 1, 4), (5, 1, 6), (7, 1, 8))
"""Chains among SpecForge's settings: steps, top k, draft tokens. Trees of the same drafts verify as much and accept
less, so the choice is among chains; regret counts all settings."""
FITTED_SETTING = SETTINGS[0]
LOST = 0.05
"""A choice is good that loses at most this share of the best setting's throughput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepScore:
    """One batch size of a sweep predicted from the others."""

    sweep: str
    batch: float
    cells: int
    outside: bool
    """The smallest or largest batch size: an extrapolation."""
    mape: float
    max_error: float
    regret: float
    """Measured speed lost by the draft length predicted best. [-]"""
    covered: float
    """Share of cells within their 90 % interval. [-]"""
    interpolated_mape: float
    """Of speeds interpolated, or carried on, in log B between the measured neighbours. [-]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingScore:
    """One (model, benchmark, drafter) of SpecForge: what is lost by a choice."""

    model: str
    benchmark: str
    draft: str
    chosen: int
    """Steps of the chain that was chosen."""
    regret: float
    always: tuple[float, ...]
    """Regret of each setting of `SETTINGS` taken blindly. [-]"""


def sweep_scores(folder: Path) -> list[SweepScore]:
    """Every sweep of at least three batch sizes."""
    found: list[SweepScore] = []
    for path in sorted((folder / SWEEPS).glob("*.csv")):
        cells = read_cells(path)
        if np.unique(cells.batch).size >= 3:
            found += [_left_out(path.stem, cells, float(batch)) for batch in np.unique(cells.batch)]
    if not found:
        raise ValueError(f"{folder / SWEEPS}: must hold a sweep of at least 3 batch sizes, got none")
    return found


def _left_out(name: str, cells: SpeculationCells, batch: float) -> SweepScore:
    held, others = cells.take(cells.batch == batch), cells.take(cells.batch != batch)
    fit = fit_cells(others, max_length=int(cells.gamma.max()))
    found = fit.predict(held.batch, held.gamma)
    measured = held.tok_s_per_request
    error = found.tok_s_per_request / measured - 1.0
    plain = np.array([_interpolated(others, batch, int(k)) for k in held.gamma]) / measured - 1.0
    known = np.isfinite(plain)
    return SweepScore(
        sweep=name,
        batch=batch,
        cells=held.size,
        outside=bool(batch in (cells.batch.min(), cells.batch.max())),
        mape=float(np.abs(error).mean()),
        max_error=float(np.abs(error).max()),
        regret=float(1.0 - measured[found.tok_s_per_request.argmax()] / measured.max()),
        covered=float(((found.lo <= measured) & (measured <= found.hi)).mean()),
        interpolated_mape=float(np.abs(plain[known]).mean()) if known.any() else float("nan"),
    )


def _interpolated(cells: SpeculationCells, batch: float, gamma: int) -> float:
    """Log speed linear in log B through the two measured batch sizes next to `batch`; NaN with fewer than two."""
    rows = np.flatnonzero(cells.gamma == gamma)
    if rows.size < 2:
        return float("nan")
    rows = rows[np.argsort(cells.batch[rows])]
    x, y = np.log(cells.batch[rows]), np.log(cells.tok_s_per_request[rows])
    i = int(np.clip(np.searchsorted(x, np.log(batch)), 1, rows.size - 1))
    slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1])
    return float(np.exp(y[i - 1] + slope * (np.log(batch) - x[i - 1])))


def setting_scores(folder: Path) -> list[SettingScore]:
    """SpecForge's EAGLE-3 runs: the number of steps chosen from the 3-step run and the run without speculation."""
    path = folder / "specforge-eagle3" / "runs.csv"
    with path.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["draft"] != "none"]
    runs: dict[tuple[str, str, str], dict[tuple[int, int, int], dict[str, str]]] = {}
    for row in rows:
        setting = int(row["steps"]), int(row["topk"]), int(row["num_draft_tokens"])
        runs.setdefault((row["model"], row["benchmark"], row["draft"]), {})[setting] = row
    whole = {key: by_setting for key, by_setting in runs.items() if all(one in by_setting for one in SETTINGS)}
    return [_setting(key, by_setting) for key, by_setting in whole.items()]


def _setting(key: tuple[str, str, str], by_setting: dict[tuple[int, int, int], dict[str, str]]) -> SettingScore:
    seen = by_setting[FITTED_SETTING]
    batch, steps = float(seen["batch_size"]), FITTED_SETTING[0]
    cells = SpeculationCells(
        batch=np.array([batch, batch]),
        gamma=np.array([0, steps]),
        tok_s_per_request=np.array([float(seen["no_spec_tok_s"]), float(seen["output_tok_s"])]) / batch,
        mean_acceptance_length=np.array([1.0, float(seen["accept_length"])]),
        context=np.full(2, np.nan),
        armed=np.zeros(2, dtype=np.bool_),
    )
    lengths = np.array([one[0] for one in SETTINGS])
    fit = fit_cells(cells, max_length=int(lengths.max()), few=True)
    predicted = fit.predict(np.full(lengths.size, batch), lengths).tok_s_per_request
    measured = {one: float(row["output_tok_s"]) for one, row in by_setting.items()}
    best = max(measured.values())
    lost = tuple(1.0 - measured[one] / best for one in SETTINGS)
    i = int(predicted.argmax())
    model, benchmark, draft = key
    return SettingScore(
        model=model, benchmark=benchmark, draft=draft, chosen=int(lengths[i]), regret=lost[i], always=lost
    )


def transfers(folder: Path) -> tuple[Transfer, ...]:
    """Acceptance of draft lengths 4 to 8 from shorter ones, on the open curves."""
    path = folder / "inferencex-acceptance" / "acceptance_curves.csv"
    curves: dict[str, list[AcceptanceSample]] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            sample = AcceptanceSample(
                draft_length=int(row["draft_length"]), mean_acceptance_length=float(row["mean_acceptance_length"])
            )
            curves.setdefault(row["curve"], []).append(sample)
    return transfer_table(curves)


def sweep_markdown(scores: Sequence[SweepScore]) -> str:
    """One line per batch size, and the means of those inside and at the ends."""
    lines = [
        "| sweep | batch left out | cells | MAPE | largest | regret | within 90 % | interpolation, MAPE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in scores:
        where = f"{one.batch:g}" + (" (end)" if one.outside else "")
        lines.append(
            f"| {one.sweep} | {where} | {one.cells} | {one.mape:.1%} | {one.max_error:.1%} | {one.regret:.1%} "
            f"| {one.covered:.0%} | {_percent(one.interpolated_mape)} |"
        )
    for title, outside in (("all, inside", False), ("all, ends", True)):
        rows = [one for one in scores if one.outside is outside]
        count = sum(one.cells for one in rows)
        if count:
            lines.append(
                f"| **{title}** | | {count} | {_mean(rows, 'mape'):.1%} | {max(one.max_error for one in rows):.1%} "
                f"| {max(one.regret for one in rows):.1%} | {_mean(rows, 'covered'):.0%} "
                f"| {_percent(_mean(rows, 'interpolated_mape'))} |"
            )
    return "\n".join(lines)


def _mean(rows: Sequence[SweepScore], name: str) -> float:
    """Over cells."""
    return float(np.average([getattr(one, name) for one in rows], weights=[one.cells for one in rows]))


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1%}"


def setting_markdown(scores: Sequence[SettingScore]) -> str:
    """Regret of ours and of each setting for all."""
    columns = [("chosen by the model", np.array([one.regret for one in scores]))]
    columns += [
        (f"always {steps} steps", np.array([one.always[i] for one in scores]))
        for i, (steps, _, _) in enumerate(SETTINGS)
    ]
    lines = ["| choice | mean regret | largest | within 5 % |", "|---|---|---|---|"]
    for name, regret in columns:
        lines.append(f"| {name} | {regret.mean():.1%} | {regret.max():.1%} | {(regret <= LOST).mean():.1%} |")
    return "\n".join(lines)


def transfer_markdown(scores: Sequence[Transfer]) -> str:
    """Mean and largest error in tokens per step by what was fitted and by form."""
    lines = ["| fitted lengths | form | mean error [tokens] | largest | within 90 % |", "|---|---|---|---|---|"]
    for fitted in dict.fromkeys(one.fitted for one in scores):
        for form in dict.fromkeys(one.form for one in scores):
            rows = [one for one in scores if one.fitted == fitted and one.form == form]
            if not rows:
                continue
            errors = np.abs(np.concatenate([one.errors for one in rows]))
            inside = [one.inside for one in rows if one.inside is not None]
            held = f"{np.concatenate(inside).mean():.0%}" if inside else "-"
            lines.append(
                f"| {', '.join(map(str, fitted))} | {form} | {errors.mean():.3f} | {errors.max():.3f} | {held} |"
            )
    return "\n".join(lines)

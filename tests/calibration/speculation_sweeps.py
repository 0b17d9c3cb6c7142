"""Synthetic sweeps with a known cost and known acceptance, and cells typed in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.speculation_cells import CellsFit
from servecast.model.speculation_cells import SpeculationCells
from servecast.model.speculation_cost import FormulaCost, RowForm, step_seconds

Floats = NDArray[np.float64]
FORMS = list(RowForm)

# a step like that of reference page 4.8 (DeepSeek-V4-Pro on 8 B300), away from the fit's priors
TRUTH: dict[str, Any] = {
    "base_s": 9.5e-3,
    "rise_s": 10e-3,
    "rise_rows": 30.0,
    "row_s": 4.5e-5,
    "request_s": 2e-5,
    "round_s": 1.2e-3,
    "draft_s": 1.5e-4,
}
SWEEP = ((1, 4, 16, 64), (0, 1, 2, 3, 5))


def true_lengths(first: float = 0.84, decay: float = 0.94, longest: int = 8) -> Floats:
    """1 + a + a (a r) + ..., position by position."""
    lengths, survival = [1.0], 1.0
    for position in range(longest):
        survival *= first * decay**position
        lengths.append(lengths[-1] + survival)
    return np.array(lengths)


def synthetic(
    cost: FormulaCost,
    batches: Sequence[int] = SWEEP[0],
    gammas: Sequence[int] = SWEEP[1],
    contexts: Sequence[float] = (math.nan,),
    lengths: Floats | None = None,
) -> SpeculationCells:
    """Noise-free cells of every combination; an unknown context costs nothing."""
    batch, gamma, context = (one.ravel() for one in np.meshgrid(batches, gammas, contexts, indexing="ij"))
    known = true_lengths() if lengths is None else lengths
    seconds = step_seconds(cost, batch, gamma, np.nan_to_num(context))
    return cells_of(batch, gamma, known[gamma] / seconds, context=context)


def cells_of(batch: Any, gamma: Any, speed: Any, **columns: Any) -> SpeculationCells:
    size = len(np.asarray(batch))
    return SpeculationCells(
        batch=np.asarray(batch, dtype=np.float64),
        gamma=np.asarray(gamma, dtype=np.int64),
        tok_s_per_request=np.asarray(speed, dtype=np.float64),
        mean_acceptance_length=np.asarray(columns.get("lengths", [math.nan] * size), dtype=np.float64),
        context=np.asarray(columns.get("context", [math.nan] * size), dtype=np.float64),
        armed=np.asarray(columns.get("armed", [False] * size), dtype=np.bool_),
    )


def joined(*parts: SpeculationCells) -> SpeculationCells:
    names = [field.name for field in dataclasses.fields(SpeculationCells)]
    return SpeculationCells(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def everywhere(fit: CellsFit) -> Floats:
    """Predictions over the plane, as logarithms."""
    batch, gamma = np.meshgrid([1.0, 3.0, 24.0, 64.0, 128.0], np.arange(fit.max_length + 1), indexing="ij")
    return np.asarray(np.log(fit.predict(batch, gamma).tok_s_per_request))


def noisy_sweep() -> SpeculationCells:
    """A sweep with 2 % of noise."""
    rng = np.random.default_rng(7)
    cells = synthetic(FormulaCost(form=RowForm.LOGARITHMIC, **TRUTH))
    return dataclasses.replace(cells, tok_s_per_request=cells.tok_s_per_request * rng.normal(1.0, 0.02, cells.size))

"""Which cells to measure next."""

from __future__ import annotations

import numpy as np
import pytest
from speculation_plans import sweep

from servecast.calibration.fits.speculation_cells import CellsFit, fit_cells
from servecast.calibration.fits.sweep_design import informative_cells
from servecast.model.speculation_cells import SpeculationCells


@pytest.fixture(scope="module")
def fit() -> CellsFit:
    return fit_cells(sweep((1, 8, 32), (0, 2, 4)), max_length=6)


def spread(fit: CellsFit, batch: float, first: int, second: int) -> float:
    """Variance of the contrast of two lengths under the leading form, from its covariance alone."""
    from servecast.calibration.fits.sweep_problem import Query

    query = Query(
        batch=np.full(2, batch),
        gamma=np.array([first, second]),
        context=np.full(2, np.nan),
        armed=np.zeros(2, dtype=np.bool_),
    )
    _, slopes, covariance = fit.leading_form(query)
    apart = slopes[0] - slopes[1]
    return float(apart @ covariance @ apart)


def test_where_the_decision_matters_it_is_measured(fit: CellsFit) -> None:
    # Origin: the weights say that only batch 256, three octaves beyond the sweep, matters; no cell near batch 1 can
    # tell more of its contrasts than one out there.
    batches = np.array([1.0, 8.0, 64.0, 256.0])
    found = informative_cells(fit, batches, np.array([0.0, 0.0, 0.0, 1.0]), max_length=6)
    assert found[0].batch >= 64
    assert 0.0 < found[0].gain <= 1.0


def test_cells_are_distinct_and_gains_add_up_to_less_than_one(fit: CellsFit) -> None:
    # Origin: variance cannot be removed twice.
    found = informative_cells(fit, 2.0 ** np.arange(9), np.ones(9), max_length=6, count=6)
    assert len({(one.batch, one.gamma) for one in found}) == len(found)
    assert sum(one.gain for one in found) <= 1.0 + 1e-9
    assert [one.gain for one in found[:1]] == [max(one.gain for one in found)]


def test_measuring_the_cell_narrows_the_contrast_as_said() -> None:
    # Origin: a refit with the proposed cell added, whose speed is what the truth says: the variance of contrasts at
    # the batch that counts must fall.
    cells = sweep((1, 8, 32), (0, 2, 4))
    fit = fit_cells(cells, max_length=6)
    batches, weights = np.array([1.0, 16.0, 128.0]), np.array([0.0, 0.0, 1.0])
    best = informative_cells(fit, batches, weights, max_length=6, count=1)[0]
    more = sweep((best.batch,), (best.gamma,))
    joined = SpeculationCells(
        **{
            name: np.concatenate([getattr(cells, name), getattr(more, name)])
            for name in ("batch", "gamma", "tok_s_per_request", "mean_acceptance_length", "context", "armed")
        }
    )
    after = fit_cells(joined, max_length=6, few=True)
    assert spread(after, 128.0, 2, 4) < 0.9 * spread(fit, 128.0, 2, 4)

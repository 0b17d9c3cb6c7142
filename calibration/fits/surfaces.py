"""Fit of a log-correction surface: robust ridge regression on the interpolation weights the model itself uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, identity
from scipy.sparse.linalg import spsolve

from servecast.model.surfaces import Surface, corner_terms

Floats = NDArray[np.float64]

RIDGE = 0.3
"""Pull of a knot's value towards 0 (the closed form), in units of one observation of weight 1."""
ROBUST_SCALE = 0.08
"""Log-residual from which an observation loses weight; kernel switches make isolated outliers. [-]"""


def design_matrix(coordinates: tuple[Floats, ...], knots: tuple[Floats, ...]) -> csr_matrix:
    """Interpolation weights, one row per observation and one column per knot of the grid."""
    rows = np.arange(len(coordinates[0]))
    terms = corner_terms(coordinates, knots)
    columns = np.concatenate([np.broadcast_to(index, rows.shape) for index, _ in terms])
    weights = np.concatenate([np.broadcast_to(weight, rows.shape) for _, weight in terms])
    size = int(np.prod([len(axis) for axis in knots]))
    return csr_matrix((weights, (np.tile(rows, len(terms)), columns)), shape=(len(rows), size))


def fit_surface(
    coordinates: tuple[Floats, ...], log_ratio: Floats, knots: tuple[Floats, ...], *, ridge: float = RIDGE
) -> Surface:
    """Surface through `log_ratio` (log of measured over closed form), by four rounds of reweighted least squares."""
    design = design_matrix(coordinates, knots)
    weight = np.ones(len(log_ratio))
    values = np.zeros(design.shape[1])
    for _ in range(4):
        transposed = csr_matrix(design.T.multiply(weight))
        normal = (transposed @ design + ridge * identity(design.shape[1])).tocsc()
        values = spsolve(normal, transposed @ log_ratio)
        weight = 1.0 / np.sqrt(1.0 + ((log_ratio - design @ values) / ROBUST_SCALE) ** 2)
    return Surface(knots=knots, values=values.reshape([len(axis) for axis in knots]))

"""Fits of surfaces: round trips, independent least squares, robustness."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from servecast.calibration.fits.surfaces import design_matrix, fit_surface
from servecast.model.surfaces import Surface, interpolate

KNOTS = (np.array([0.0, 2.0, 3.0, 7.0]), np.array([0.0, 1.0, 4.0]))


def truth(seed: int = 0) -> Surface:
    values = np.random.default_rng(seed).normal(scale=0.4, size=(4, 3))
    return Surface(knots=KNOTS, values=values)


def points(size: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0.0, 7.0, size), rng.uniform(0.0, 4.0, size)


def test_a_surface_is_recovered_from_its_own_values() -> None:
    # Origin: round trip fit(model(theta)) = theta; a negligible ridge.
    at = points(500)
    fitted = fit_surface(at, interpolate(truth(), *at), KNOTS, ridge=1e-9)
    np.testing.assert_allclose(fitted.values, truth().values, rtol=1e-6, atol=1e-7)


def test_a_surface_is_recovered_from_noisy_values() -> None:
    # Origin: theory. Each of 12 knots sees about 5 000 / 12 points of noise 0.05: standard error below 0.01.
    at = points(5000)
    noise = np.random.default_rng(2).normal(scale=0.05, size=5000)
    fitted = fit_surface(at, interpolate(truth(), *at) + noise, KNOTS)
    np.testing.assert_allclose(fitted.values, truth().values, rtol=0.0, atol=0.04)


def test_the_design_matrix_is_the_interpolation_itself() -> None:
    # Origin: independent code, scipy on unit vectors: column j is the hat function of knot j.
    at = points(30)
    dense = design_matrix(at, KNOTS).toarray()
    for j in range(12):
        unit = np.zeros(12)
        unit[j] = 1.0
        hat = RegularGridInterpolator(KNOTS, unit.reshape(4, 3))(np.column_stack(at))
        np.testing.assert_allclose(dense[:, j], hat, rtol=1e-12, atol=1e-12)


def test_the_ridge_of_a_single_knot_by_hand() -> None:
    # Origin: hand. n equal observations y at one knot, weights 1: n y / (n + ridge). Small residuals keep the weights:
    # at y = 1e-3 they change by less than (1e-3 / 0.08)^2 / 2 = 1e-4.
    at = (np.zeros(9), np.zeros(9))
    fitted = fit_surface(at, np.full(9, 1e-3), KNOTS, ridge=1.0)
    assert fitted.values[0, 0] == pytest.approx(1e-3 * 9 / 10, rel=1e-3)


def test_knots_without_observations_stay_at_the_closed_form() -> None:
    at = (np.full(50, 0.5), np.full(50, 0.5))
    fitted = fit_surface(at, np.full(50, 0.3), KNOTS)
    np.testing.assert_array_equal(fitted.values[2:], 0.0)
    np.testing.assert_array_equal(fitted.values[:, 2], 0.0)


def test_outliers_lose_their_weight() -> None:
    # Origin: comparison with plain least squares (numpy), which a tenth of the points at +2 pulls away.
    at = points(2000)
    values = interpolate(truth(), *at)
    values[::10] += 2.0
    robust = fit_surface(at, values, KNOTS, ridge=1e-6).values
    plain = np.linalg.lstsq(design_matrix(at, KNOTS).toarray(), values, rcond=None)[0].reshape(4, 3)
    assert np.abs(robust - truth().values).mean() < 0.2 * np.abs(plain - truth().values).mean()

"""Interpolation of fitted surfaces against scipy, hand values and the theory of multilinear interpolation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from servecast.model.surfaces import Surface, corner_terms, hat_weights, interpolate

AXES = (np.array([0.0, 1.0, 3.0, 3.5]), np.array([-2.0, 0.0, 5.0]), np.array([10.0, 11.0]))


def random_surface(seed: int) -> Surface:
    shape = tuple(len(axis) for axis in AXES)
    return Surface(knots=AXES, values=np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("seed", range(5))
def test_equals_scipy_inside_the_grid(seed: int) -> None:
    # Origin: independent code, scipy.interpolate.RegularGridInterpolator.
    surface = random_surface(seed)
    points = np.random.default_rng(seed + 100).uniform([a[0] for a in AXES], [a[-1] for a in AXES], size=(200, 3))
    reference = RegularGridInterpolator(AXES, surface.values)(points)
    np.testing.assert_allclose(interpolate(surface, *points.T), reference, rtol=1e-12, atol=1e-12)


def test_values_beyond_the_ends_are_those_of_the_nearest_point_inside() -> None:
    # Origin: independent code, scipy on coordinates clipped by hand.
    surface = random_surface(7)
    points = np.random.default_rng(8).uniform(-20.0, 40.0, size=(200, 3))
    held = np.column_stack([np.minimum(np.maximum(x, a[0]), a[-1]) for x, a in zip(points.T, AXES, strict=True)])
    reference = RegularGridInterpolator(AXES, surface.values)(held)
    np.testing.assert_allclose(interpolate(surface, *points.T), reference, rtol=1e-12, atol=1e-12)


def test_a_value_at_a_knot_is_the_knot_itself() -> None:
    surface = random_surface(3)
    grid = np.meshgrid(*AXES, indexing="ij")
    np.testing.assert_allclose(interpolate(surface, *grid), surface.values, rtol=1e-12)


def test_bilinear_value_by_hand() -> None:
    # Origin: hand. Unit square with corners 0, 1, 2, 5 at (0.5, 0.25): 0.5 (0.75 0 + 0.25 1) + 0.5 (0.75 2 + 0.25 5) =
    # 1.5
    square = Surface(knots=(np.array([0.0, 1.0]), np.array([0.0, 1.0])), values=np.array([[0.0, 1.0], [2.0, 5.0]]))
    np.testing.assert_allclose(interpolate(square, [0.5], [0.25]), [1.5], rtol=1e-15)


@given(
    st.lists(st.floats(-10, 50), min_size=3, max_size=3),
)
def test_weights_of_the_corners_are_a_partition_of_unity(point: list[float]) -> None:
    # Origin: theory. Multilinear weights are in [0, 1] and sum to 1.
    terms = corner_terms(tuple(np.array([x]) for x in point), AXES)
    weights = np.array([weight[0] for _, weight in terms])
    assert len(terms) == 2 ** len(AXES)
    assert np.all((weights >= 0.0) & (weights <= 1.0))
    assert weights.sum() == pytest.approx(1.0, rel=1e-12)


def test_a_multilinear_function_is_reproduced_exactly() -> None:
    # Origin: theory. Products of linear functions of one coordinate each lie in the interpolation space.
    x, y, z = np.meshgrid(*AXES, indexing="ij")
    surface = Surface(knots=AXES, values=(2.0 * x - 1.0) * (y + 3.0) * (0.5 * z))
    points = np.random.default_rng(1).uniform([a[0] for a in AXES], [a[-1] for a in AXES], size=(50, 3)).T
    expected = (2.0 * points[0] - 1.0) * (points[1] + 3.0) * (0.5 * points[2])
    np.testing.assert_allclose(interpolate(surface, *points), expected, rtol=1e-10, atol=1e-10)


def test_hat_weights_by_hand() -> None:
    # Origin: hand. Knots 0, 1, 3, 3.5: x = 2 lies half way in the second interval; the ends are held.
    left, right = hat_weights([-4.0, 0.0, 2.0, 3.5, 9.0], AXES[0])
    np.testing.assert_array_equal(left, [0, 0, 1, 2, 2])
    np.testing.assert_allclose(right, [0.0, 0.0, 0.5, 1.0, 1.0], rtol=1e-15)


def test_coordinates_are_broadcast_together() -> None:
    # Origin: the same points one by one.
    surface = random_surface(5)
    x, y = np.array([0.2, 1.4, 2.0])[:, np.newaxis], np.array([-1.0, 4.0])[np.newaxis, :]
    table = interpolate(surface, x, y, 10.3)
    assert table.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            one = interpolate(surface, [x[i, 0]], [y[0, j]], [10.3])
            np.testing.assert_allclose(table[i, j], one[0], rtol=1e-14)


def test_nan_stays_nan() -> None:
    assert np.isnan(interpolate(random_surface(0), [np.nan], [0.0], [10.5])).all()

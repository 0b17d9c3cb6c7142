"""Smooth corrections of a closed form: multilinear interpolation of a few hundred fitted numbers.

A kernel's time is its closed form times ``exp(C(x))``, where C is piecewise linear in the logarithms of the shape
between fixed knots and constant beyond them. The knots are few on purpose: a surface is a compressed description of a
kernel table, small enough to ship, and its value at a knot is a fitted parameter, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Log-correction on a grid: `values` has one axis per entry of `knots`."""

    knots: tuple[NDArray[np.float64], ...]
    """Increasing knots of each coordinate (base-2 logarithms of a shape)."""
    values: NDArray[np.float64]
    """Natural log of measured over closed form at the knots. [-]"""


def hat_weights(x: ArrayLike, knots: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Index of the left knot and weight of the right one; coordinates beyond the ends are held at the ends.

    >>> hat_weights([0.0, 1.5, 9.0], np.array([0.0, 1.0, 2.0]))
    (array([0, 1, 1]), array([0. , 0.5, 1. ]))
    """
    held = np.clip(np.asarray(x, dtype=np.float64), knots[0], knots[-1])
    left = np.clip(np.searchsorted(knots, held, side="right") - 1, 0, len(knots) - 2)
    return left, (held - knots[left]) / (knots[left + 1] - knots[left])


def corner_terms(
    coordinates: tuple[ArrayLike, ...], knots: tuple[NDArray[np.float64], ...]
) -> list[tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """Flat grid index and weight of each of the 2^d corners around every point (the fit's design matrix uses
    them, too)."""
    terms: list[tuple[NDArray[np.intp], NDArray[np.float64]]] = [(np.zeros(1, dtype=np.intp), np.ones(1))]
    for x, axis in zip(coordinates, knots, strict=True):
        left, right_weight = hat_weights(x, axis)
        size = len(axis)
        terms = [
            (index * size + left + side, weight * (right_weight if side else 1.0 - right_weight))
            for index, weight in terms
            for side in (0, 1)
        ]
    return terms


def interpolate(surface: Surface, *coordinates: ArrayLike) -> NDArray[np.float64]:
    """Log-correction at `coordinates` (broadcast together). [-]"""
    points = tuple(np.broadcast_arrays(*[np.asarray(x, dtype=np.float64) for x in coordinates]))
    flat = surface.values.ravel()
    total = np.zeros(points[0].shape)
    for index, weight in corner_terms(points, surface.knots):
        total = total + weight * flat[index]
    return total

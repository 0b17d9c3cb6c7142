"""Gamma-family functions against scipy (independent code), over the range that fits ask for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from servecast.model.gamma_functions import digamma, log_gamma, lower_gamma, trigamma

SHAPES = np.logspace(-3, 5, 300)


def test_log_gamma() -> None:
    np.testing.assert_allclose(log_gamma(SHAPES), special.gammaln(SHAPES), rtol=1e-12, atol=1e-13)


def test_digamma_and_trigamma() -> None:
    np.testing.assert_allclose(digamma(SHAPES), special.digamma(SHAPES), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(trigamma(SHAPES), special.polygamma(1, SHAPES), rtol=1e-12)


def test_lower_gamma() -> None:
    shape = np.logspace(-2, 3.5, 40)[:, None]
    x = np.concatenate([[0.0], np.logspace(-6, 4, 120)])
    np.testing.assert_allclose(lower_gamma(shape, x), special.gammainc(shape, x), rtol=1e-9, atol=1e-11)


def test_ends_of_lower_gamma() -> None:
    """Limits: 0 at 0, 1 at infinity; and e^-x for shape 1 (hand)."""
    assert lower_gamma(2.5, 0.0) == 0.0
    assert lower_gamma(2.5, np.inf) == 1.0
    np.testing.assert_allclose(lower_gamma(1.0, [0.3, 30.0]), -np.expm1([-0.3, -30.0]), rtol=1e-12)


@pytest.mark.parametrize("call", [lambda: log_gamma(0.0), lambda: digamma([1.0, -1.0]), lambda: lower_gamma(0.0, 1.0)])
def test_refuses_shapes_that_are_not_positive(call: object) -> None:
    with pytest.raises(ValueError, match="a must be positive"):
        call()  # type: ignore[operator]


def test_refuses_negative_ends() -> None:
    with pytest.raises(ValueError, match="x must be >= 0"):
        lower_gamma(1.0, [1.0, -1e-9])

"""Stacked least squares against certified values, scipy's optimum, linear algebra, and itself one problem at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import least_squares

from servecast.calibration.fits.least_squares import minimise

Floats = NDArray[np.float64]
Model = Callable[[Floats, Floats], Floats]

# NIST StRD, Misra1a: y, x of 14 observations.
MISRA = np.array(
    [
        [10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78],
        [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0],
    ]
)
# NIST StRD, Thurber: y, x of 37 observations.
THURBER = np.array(
    [
        [80.574, -3.067], [84.248, -2.981], [87.264, -2.921], [87.195, -2.912], [89.076, -2.840], [89.608, -2.797],
        [89.868, -2.702], [90.101, -2.699], [92.405, -2.633], [95.854, -2.481], [100.696, -2.363], [101.060, -2.322],
        [401.672, -1.501], [390.724, -1.460], [567.534, -1.274], [635.316, -1.212], [733.054, -1.100],
        [759.087, -1.046], [894.206, -0.915], [990.785, -0.714], [1090.109, -0.566], [1080.914, -0.545],
        [1122.643, -0.400], [1178.351, -0.309], [1260.531, -0.109], [1273.514, -0.103], [1288.339, 0.010],
        [1327.543, 0.119], [1353.863, 0.377], [1414.509, 0.790], [1425.208, 0.963], [1421.384, 1.006],
        [1442.962, 1.115], [1464.350, 1.572], [1468.705, 1.841], [1447.894, 2.047], [1457.628, 2.200],
    ]
).T  # fmt: skip


def misra(theta: Floats, x: Floats) -> Floats:
    """b1 (1 - exp(-b2 x)), parameters as logarithms: b2 is of the order of the difference step itself."""
    return np.asarray(-np.exp(theta[..., 0:1]) * np.expm1(-np.exp(theta[..., 1:2]) * x))


def thurber(theta: Floats, x: Floats) -> Floats:
    above = theta[..., 0:1] + x * (theta[..., 1:2] + x * (theta[..., 2:3] + x * theta[..., 3:4]))
    return np.asarray(above / (1.0 + x * (theta[..., 4:5] + x * (theta[..., 5:6] + x * theta[..., 6:7]))))


def residuals_of(model: Model, data: Floats) -> Callable[[Floats], Floats]:
    return lambda theta: model(theta, data[1]) - data[0]


PROBLEMS = {
    "misra": (misra, MISRA, np.log([[500.0, 1e-4], [250.0, 5e-4]])),
    "thurber": (
        thurber,
        THURBER,
        np.array([[1000, 1000, 400, 40, 0.7, 0.3, 0.03], [1300, 1500, 500, 75, 1.0, 0.4, 0.05]], dtype=np.float64),
    ),
}


def test_misra_certified() -> None:
    # Origin: NIST StRD certified values: b1, b2, sum of squares, standard errors, from both of its starts.
    model, data, starts = PROBLEMS["misra"]
    solved = minimise(residuals_of(model, data), starts)
    assert solved.converged.all()
    certified = np.array([2.3894212918e2, 5.5015643181e-4])
    np.testing.assert_allclose(np.exp(solved.parameters), np.tile(certified, (2, 1)), rtol=1e-6)
    np.testing.assert_allclose(2.0 * solved.cost, 1.2455138894e-1, rtol=1e-8)
    spread = 2.0 * solved.cost[0] / (14 - 2)
    of_logs = np.sqrt(np.diag(np.linalg.inv(solved.jacobian[0].T @ solved.jacobian[0])) * spread)
    np.testing.assert_allclose(of_logs * certified, [2.7070075241, 7.2668688436e-6], rtol=1e-4)


def test_thurber_certified() -> None:
    # Origin: NIST StRD certified values (higher difficulty), from both of its starts.
    model, data, starts = PROBLEMS["thurber"]
    solved = minimise(residuals_of(model, data), starts)
    assert solved.converged.all()
    certified = [1.2881396800e3, 1.4910792535e3, 5.8323836877e2, 7.5416644291e1, 0.96629502864, 0.39797285797]
    np.testing.assert_allclose(solved.parameters, np.tile([*certified, 4.9727297349e-2], (2, 1)), rtol=1e-4)
    np.testing.assert_allclose(2.0 * solved.cost, 5.6427082397e3, rtol=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
def test_optimum_of_scipy(name: str) -> None:
    # Origin: independent code.
    model, data, starts = PROBLEMS[name]
    residuals = residuals_of(model, data)
    solved = minimise(residuals, starts)
    for start, found, cost in zip(starts, solved.parameters, solved.cost, strict=True):
        reference = least_squares(residuals, start, method="lm", xtol=1e-12, ftol=1e-12, gtol=1e-12)
        np.testing.assert_allclose(found, reference.x, rtol=1e-4)
        assert cost == pytest.approx(float(reference.cost), rel=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
def test_jacobian_at_the_optimum(name: str) -> None:
    # Origin: independent code, central differences with a step of their own.
    model, data, starts = PROBLEMS[name]
    residuals = residuals_of(model, data)
    solved = minimise(residuals, starts[:1])
    theta = solved.parameters[0]
    central = np.empty_like(solved.jacobian[0])
    for i in range(theta.size):
        step = np.zeros_like(theta)
        step[i] = 1e-5 * max(abs(theta[i]), 1e-2)
        central[:, i] = (residuals(theta + step) - residuals(theta - step)) / (2.0 * step[i])
    scale = np.abs(central).max(axis=0)
    np.testing.assert_allclose(solved.jacobian[0] / scale, central / scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_stack_is_its_problems_one_by_one(name: str) -> None:
    # Origin: the same solver with a stack of one. Data differ by problem, as folds do.
    model, data, starts = PROBLEMS[name]
    rng = np.random.default_rng(5)
    measured = data[0] * (1.0 + 0.02 * rng.standard_normal((6, data.shape[1])))
    begin = np.tile(starts, (3, 1))

    def folds(theta: Floats) -> Floats:
        return np.asarray(model(theta, data[1]) - (measured if theta.ndim == 2 else measured[:, np.newaxis]))

    together = minimise(folds, begin)
    for i in range(6):
        alone = minimise(residuals_of(model, np.array([measured[i], data[1]])), begin[i : i + 1])
        np.testing.assert_allclose(together.parameters[i], alone.parameters[0], rtol=1e-6)
        assert together.cost[i] == pytest.approx(float(alone.cost[0]), rel=1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), p=st.integers(1, 5), m=st.integers(1, 4))
def test_linear_problems(seed: int, p: int, m: int) -> None:
    # Origin: linear algebra, numpy's lstsq.
    rng = np.random.default_rng(seed)
    matrix, target = rng.standard_normal((12, p)), rng.standard_normal((m, 12))

    def residuals(theta: Floats) -> Floats:
        return np.asarray(theta @ matrix.T - (target if theta.ndim == 2 else target[:, np.newaxis]))

    solved = minimise(residuals, rng.standard_normal((m, p)))
    exact = np.linalg.lstsq(matrix, target.T, rcond=None)[0].T
    np.testing.assert_allclose(solved.parameters, exact, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(solved.cost, 0.5 * ((exact @ matrix.T - target) ** 2).sum(axis=1), rtol=1e-7)
    assert solved.converged.all()


def test_curved_valley_with_no_residual_left() -> None:
    # Origin: Rosenbrock's function, minimum 0 at (1, 1).
    def residuals(theta: Floats) -> Floats:
        return np.stack([10.0 * (theta[..., 1] - theta[..., 0] ** 2), 1.0 - theta[..., 0]], axis=-1)

    solved = minimise(residuals, np.array([[-1.2, 1.0], [3.0, -4.0]]), iterations=300)
    np.testing.assert_allclose(solved.parameters, 1.0, rtol=1e-4)
    assert (solved.cost < 1e-9).all()


def test_a_step_where_the_model_is_undefined_is_not_taken() -> None:
    # Origin: hand. ln theta = -3 from theta = 20, where Newton's step leads below zero; optimum e^-3.
    solved = minimise(lambda theta: np.log(theta) + 3.0, np.array([[20.0]]))
    np.testing.assert_allclose(solved.parameters, np.exp(-3.0), rtol=1e-6)


def test_what_has_not_converged_says_so() -> None:
    model, data, starts = PROBLEMS["thurber"]
    short = minimise(residuals_of(model, data), starts, iterations=1)
    assert not short.converged.any()
    lost = minimise(lambda theta: np.log(theta), np.array([[-1.0], [2.0]]))
    assert lost.converged.tolist() == [False, True]
    assert lost.parameters[1, 0] == pytest.approx(1.0, rel=1e-6)

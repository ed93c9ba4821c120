"""Both ends of a spectrum from products alone, against NumPy's eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.theory.lanczos import Floats, extreme_eigenvalues


def symmetric(eigenvalues: Floats, seed: int) -> Floats:
    n = len(eigenvalues)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return np.asarray((Q * eigenvalues) @ Q.T)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.linspace(-3, 5, 40), np.linspace(1, 2, 40), -np.linspace(1, 2, 40) ** 3,
        np.r_[np.zeros(37), 1, 2, 9.0], np.r_[-4.0, np.ones(39)], np.geomspace(1e-6, 10, 40),
    ],
)  # fmt: skip
def test_against_dense_eigenvalues(eigenvalues: Floats) -> None:
    A = symmetric(eigenvalues, 1)
    found = extreme_eigenvalues(lambda v: A @ v, 40, tolerance=1e-10)
    values = np.linalg.eigvalsh(A)
    scale = np.abs(values).max()
    assert (found.low, found.high) == pytest.approx((values[0], values[-1]), abs=1e-6 * scale)
    assert found.largest_modulus == pytest.approx(scale, rel=1e-6)
    assert found.products <= 60


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.integers(1, 12))
def test_what_is_found_lies_inside_and_near_an_eigenvalue(n: int, seed: int, most: int) -> None:
    random = np.random.default_rng(seed)
    A = random.standard_normal((n, n))
    A = A + A.T
    found = extreme_eigenvalues(lambda v: A @ v, n, most=most, tolerance=1e-12, seed=seed)
    values = np.linalg.eigvalsh(A)
    rest = 1e-9 * np.abs(values).max()
    assert values[0] - rest <= found.low <= found.high <= values[-1] + rest
    assert np.abs(values - found.low).min() <= found.low_residual + rest
    assert np.abs(values - found.high).min() <= found.high_residual + rest
    assert found.products <= most
    assert found.residual == max(found.low_residual, found.high_residual)
    if most >= n:
        ends = (values[0], values[-1])
        assert (found.low, found.high) == pytest.approx(ends, abs=1e-5 * np.abs(values).max())


def test_it_stops_where_it_is_near_enough() -> None:
    A = symmetric(np.r_[np.linspace(0, 100, 200)], 2)
    rough = extreme_eigenvalues(lambda v: A @ v, 200, most=150, tolerance=1e-2)
    fine = extreme_eigenvalues(lambda v: A @ v, 200, most=150, tolerance=1e-6)
    assert rough.products < fine.products < 150
    assert rough.residual <= 1e-2 * rough.largest_modulus
    assert fine.high == pytest.approx(100, rel=1e-9)


def test_the_zero_matrix_and_one_number() -> None:
    zero = extreme_eigenvalues(lambda v: 0 * v, 5)
    assert (zero.low, zero.high, zero.residual, zero.products) == (0, 0, 0, 1)
    one = extreme_eigenvalues(lambda v: -7 * v, 1)
    assert (one.low, one.high) == pytest.approx((-7, -7))
    assert one.residual < 1e-12

"""The ends of a symmetric matrix's spectrum from its products with vectors alone, by Lanczos.

    T = Q^T H Q, tridiagonal, of the Krylov space of a random start; its eigenvalues theta lie
    within those of H, and H has one within beta_m |s_m| of theta, s the eigenvector of T to it

Three vectors are kept, whatever the number of products: without reorthogonalisation an end that was
found may be found again, which changes neither end.

Source: Paige 1980; Parlett, The Symmetric Eigenvalue Problem, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Extremes:
    """The smallest and the largest eigenvalue, both from inside the spectrum.

    Attributes:
        low, high: the eigenvalues.
        low_residual, high_residual: within this of each lies an eigenvalue.
        products: products with the matrix that were made.
    """

    low: float
    high: float
    low_residual: float
    high_residual: float
    products: int

    @property
    def largest_modulus(self) -> float:
        """max |eigenvalue|."""
        return max(abs(self.low), abs(self.high))

    @property
    def residual(self) -> float:
        """The larger one."""
        return max(self.low_residual, self.high_residual)


def extreme_eigenvalues(
    product: Callable[[Floats], Floats],
    size: int,
    *,
    most: int = 60,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Extremes:
    """Both ends of the spectrum of a symmetric matrix, shape (size, size).

    Args:
        product: H times a vector, float64, shape (size,).
        most: products at most.
        tolerance: stop where both residuals are below this share of the largest modulus.
        seed: of the random start.
    """
    assert size >= 1
    assert most >= 1
    q = np.random.default_rng(seed).standard_normal(size)
    q /= np.linalg.norm(q)
    before = np.zeros(size)
    beta = 0.0
    diagonal: list[float] = []
    off: list[float] = []
    found = Extremes(0.0, 0.0, 0.0, 0.0, 0)
    for k in range(most):
        w = np.asarray(product(q), dtype=np.float64) - beta * before
        diagonal.append(float(q @ w))
        w -= diagonal[-1] * q
        beta = float(np.linalg.norm(w))
        T = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
        theta, S = np.linalg.eigh(T)
        ends = np.abs(beta * S[-1, [0, -1]])
        found = Extremes(float(theta[0]), float(theta[-1]), float(ends[0]), float(ends[1]), k + 1)
        if not found.residual > tolerance * found.largest_modulus:
            break
        off.append(beta)
        before, q = q, w / beta
    return found

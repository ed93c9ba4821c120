"""Minima of strongly convex functions, against solutions by linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn
from torch.nn import functional

from mpicdsgd.data.samples import ArraySamples
from mpicdsgd.graphs.mixing_rules import lazy, metropolis
from mpicdsgd.graphs.topologies import ring
from mpicdsgd.theory import formulas, minimise
from mpicdsgd.theory.objective import Objective, in_float64

N, D, DECAY = 4, 3, 0.1


def problem(seed: int) -> tuple[list[Objective], list[np.ndarray], list[np.ndarray]]:
    """f_j = mean (x^T a - y)^2 + decay/2 |x|^2: its objective, Hessian and linear part."""
    random = np.random.default_rng(seed)
    model = in_float64(nn.Linear(D, 1, bias=False))
    objectives, A, b = [], [], []
    for _ in range(N):
        x = random.standard_normal((9, D)).astype(np.float32)
        y = 3 * random.standard_normal((9, 1)).astype(np.float32)
        objectives.append(Objective(model, functional.mse_loss, ArraySamples(x, y), DECAY))
        X, Y = x.astype(float), y.astype(float)[:, 0]
        A.append(2 * X.T @ X / 9 + DECAY * np.eye(D))
        b.append(2 * X.T @ Y / 9)
    return objectives, A, b


@pytest.mark.parametrize("alpha", [0.3, 1e-3])
def test_of_v(alpha: float) -> None:
    objectives, A, b = problem(1)
    Pi = lazy(metropolis(ring(N))).Pi
    H = min(float(np.linalg.eigvalsh(one)[0]) for one in A)
    found = minimise.minimise(minimise.of_v(objectives, Pi, alpha), np.ones((N, D)), H)
    whole = np.kron(np.eye(N) - Pi, np.eye(D)) / alpha
    for j, one in enumerate(A):
        whole[j * D : (j + 1) * D, j * D : (j + 1) * D] += one
    expected = np.linalg.solve(whole, np.concatenate(b)).reshape(N, D)
    assert found.x == pytest.approx(expected, abs=1e-6)
    value, gradient = minimise.of_v(objectives, Pi, alpha)(expected)
    assert 0 <= found.value - value + 1e-11 <= found.slack + 2e-11
    assert found.slack < 1e-9
    assert np.abs(gradient).max() < 1e-9
    losses = [o.value(x) for o, x in zip(objectives, expected, strict=True)]
    V = formulas.lyapunov(losses, formulas.disagreement(expected, Pi), alpha)
    assert value == pytest.approx(V, rel=1e-12)


def test_of_mean() -> None:
    objectives, A, b = problem(2)
    found = minimise.minimise(minimise.of_mean(objectives), np.zeros(D), 0.1)
    assert found.x == pytest.approx(np.linalg.solve(sum(A), sum(b)), abs=1e-7)


def test_the_slack_is_honest_where_the_search_is_not_through() -> None:
    """Of x^2 H/2 from afar, whatever the function returns."""
    H = 2.0
    calls = 0

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal calls
        calls += 1
        return float(H / 2 * x @ x), H * x

    found = minimise.minimise(function, np.full(3, 7.0), H)
    assert found.slack == pytest.approx(H / 2 * float(found.x @ found.x))
    assert found.value == pytest.approx(0, abs=1e-12)
    assert calls < 50

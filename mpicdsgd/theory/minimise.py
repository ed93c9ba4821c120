"""Where a strongly convex function has its minimum, with what is still missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpicdsgd.graphs.mixing_matrix import Matrix
from mpicdsgd.theory.objective import Floats, Objective

_ROUNDS, _ITERATIONS = 20, 200


@dataclass(frozen=True)
class Minimum:
    """The lowest point found.

    Attributes:
        x: where, shape as it began.
        value: the function there, at most ``slack`` above its minimum.
        slack: |gradient|^2/(2 H), which bounds that for an H-strongly convex function.
    """

    x: Floats
    value: float
    slack: float


def minimise(
    function: Callable[[Floats], tuple[float, Floats]], start: Floats, H: float
) -> Minimum:
    """The minimum of an H-strongly convex function by L-BFGS, in float64.

    Args:
        function: x to its value and gradient, of the shape of x.
        start: where to begin, any shape.
    """
    assert H > 0
    x = torch.from_numpy(np.array(start, dtype=np.float64)).requires_grad_()
    best: Minimum | None = None

    def evaluate() -> torch.Tensor:
        nonlocal best
        value, gradient = function(x.detach().numpy())
        x.grad = torch.from_numpy(gradient)
        slack = float(np.vdot(gradient, gradient)) / (2 * H)
        if best is None or slack < best.slack:
            best = Minimum(x.detach().numpy().copy(), value, slack)
        return torch.tensor(value, dtype=torch.float64)

    evaluate()
    assert best is not None
    for _ in range(_ROUNDS):
        before = best.slack
        optimizer = torch.optim.LBFGS(
            [x], max_iter=_ITERATIONS, history_size=20, tolerance_grad=0.0, tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip
        optimizer.step(evaluate)  # type: ignore[no-untyped-call]
        if best.slack < 1e-13 * abs(best.value) or best.slack > 0.5 * before:
            break
        with torch.no_grad():
            x.copy_(torch.from_numpy(best.x))
    return best


def of_v(
    objectives: Sequence[Objective], Pi: Matrix, alpha: float
) -> Callable[[Floats], tuple[float, Floats]]:
    """V and grad V of X, shape (N, D). Source: eqs. (7), (9)."""

    def function(X_ND: Floats) -> tuple[float, Floats]:
        found = [o.gradient(x) for o, x in zip(objectives, X_ND, strict=True)]
        apart = X_ND - Pi @ X_ND
        value = sum(f for f, _ in found) + float(np.vdot(X_ND, apart)) / (2 * alpha)
        return value, np.stack([g for _, g in found]) + apart / alpha

    return function


def of_mean(objectives: Sequence[Objective]) -> Callable[[Floats], tuple[float, Floats]]:
    """f = mean_j f_j and its gradient, of x, shape (D,)."""

    def function(x_D: Floats) -> tuple[float, Floats]:
        found = [o.gradient(x_D) for o in objectives]
        mean = np.mean([g for _, g in found], axis=0)
        return float(np.mean([f for f, _ in found])), np.asarray(mean)

    return function

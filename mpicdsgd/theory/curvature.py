"""How curved an agent's objective is: its smoothness gamma_j and its strong convexity H_j.

    X~    inputs, flattened, with a 1 appended where the layer has a bias; M = X~^T X~ / n
    o, l  outputs of a model, and the loss of one sample; C = the Hessian of l in o

- One linear layer: the Hessian is the mean of C (x) x~ x~^T. Where C is the same everywhere, as
  with squares, it is C (x) M, and its eigenvalues are exact. With softmax and cross-entropy C =
  diag(p) - p p^T, whose eigenvalues lie in [0, 1/2] (two equal probabilities reach 1/2) and which
  is 0 along equal shifts of all outputs: gamma_j <= lambda_max(M)/2 + decay, and H_j = decay.
- Few parameters, and the Hessian the same wherever it is looked at: a quadratic, exact.
- All else: Lanczos on products with the Hessian at given points. The greatest eigenvalue at a point
  is a lower bound of gamma_j, and no smallest one makes a function strongly convex: H_j is 0 then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpicdsgd.models import build, losses
from mpicdsgd.theory.estimates import Estimate, Kind, points
from mpicdsgd.theory.lanczos import extreme_eigenvalues
from mpicdsgd.theory.objective import Floats, Objective, doubled, point

_DENSE = 500  # parameters up to which a Hessian is formed
_OUTPUTS = 500  # of a linear layer, likewise
_WIDE = 5000  # inputs of a linear layer up to which M is formed
_SAME = 1e-9  # up to here two Hessians differ by rounding


@dataclass(frozen=True)
class Curvature:
    """Of one agent's objective.

    Attributes:
        kind: "quadratic", "logistic" or "network".
        gamma, H: of f_j, the decay within.
        lowest: the smallest eigenvalue found at a point, for a network: below 0, f_j is not convex.
    """

    kind: str
    gamma: Estimate
    H: Estimate
    lowest: float | None = None


def curvature(
    objective: Objective,
    points_PD: Sequence[Floats],
    *,
    thinned: Objective | None = None,
    most: int = 60,
) -> Curvature:
    """Of ``objective``; the points, each of shape (D,), serve networks only.

    Args:
        thinned: the objective with fewer samples, for a network's Hessian.
        most: products with the Hessian at a point, at most.

    Raises:
        UserError: for a network that has no second derivatives.
    """
    layer = linear_layer(objective.model)
    if layer is not None and layer.in_features <= _WIDE and layer.out_features <= _OUTPUTS:
        if _is_softmax(objective):
            top = float(np.linalg.eigvalsh(second_moment(objective, layer))[-1])
            return Curvature(
                "logistic",
                Estimate(
                    top / 2 + objective.decay,
                    None,
                    Kind.BOUND,
                    "half the inputs' largest second moment",
                ),
                Estimate(objective.decay),
            )
        C = _constant_output_hessian(objective)
        if C is not None:
            c = np.linalg.eigvalsh(C)[[0, -1]]
            m = np.linalg.eigvalsh(second_moment(objective, layer))[[0, -1]]
            return _quadratic(np.outer(c, m).min(), np.outer(c, m).max(), objective.decay)
    if len(point(objective.model)) <= _DENSE and (A := _constant_hessian(objective)) is not None:
        low, *_, high = np.repeat(np.linalg.eigvalsh(A), 2)
        return _quadratic(low - objective.decay, high - objective.decay, objective.decay)
    return _local(thinned or objective, points_PD, most)


def linear_layer(model: nn.Module) -> nn.Linear | None:
    """The one layer of a model that is linear in its parameters; None: of another kind."""
    parts = list(model) if isinstance(model, nn.Sequential) else [model]
    while parts and isinstance(parts[0], nn.Flatten | nn.Identity):
        parts.pop(0)
    if len(parts) != 1 or not isinstance(parts[0], nn.Linear):
        return None
    frozen = any(not p.requires_grad for p in parts[0].parameters())
    return None if frozen else parts[0]


def second_moment(objective: Objective, layer: nn.Linear) -> Floats:
    """M of the module, float64."""
    width = layer.in_features + (layer.bias is not None)
    M = torch.zeros(width, width, dtype=torch.float64)
    for part, inputs, _ in objective.parts():
        X = inputs.reshape(-1, layer.in_features)
        if layer.bias is not None:
            X = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], dim=1)
        M += part * (X.T @ X) / len(X)
    return np.asarray(M.numpy(), dtype=np.float64)


def hessian(objective: Objective, x_D: Floats) -> Floats:
    """f_j's Hessian at x, float64, shape (D, D), column by column."""
    product = objective.curvature(x_D)
    columns = [product(e) for e in np.eye(len(x_D))]
    H = np.stack(columns, axis=1)
    return (H + H.T) / 2


def _quadratic(low: float, high: float, decay: float) -> Curvature:
    # What is left of an eigenvalue 0 by rounding would pass for strong convexity.
    low = 0.0 if abs(low) < 1e-13 * abs(high) else float(low)
    gamma = max(abs(low + decay), abs(high + decay))
    return Curvature("quadratic", Estimate(float(gamma)), Estimate(max(low + decay, 0.0)))


def _is_softmax(objective: Objective) -> bool:
    known = (
        losses.loss_function(build.ModelConfig(loss="cross_entropy")),
        functional.cross_entropy,
    )
    if not (objective.loss_fn in known or isinstance(objective.loss_fn, nn.CrossEntropyLoss)):
        return False
    if isinstance(objective.loss_fn, nn.CrossEntropyLoss):
        loss = objective.loss_fn
        if loss.weight is not None or loss.reduction != "mean":
            return False
    for _, _, targets in objective.parts():
        if targets.is_floating_point() and not torch.allclose(
            targets.sum(1), torch.ones(len(targets), dtype=targets.dtype), atol=1e-5
        ):
            return False  # C is as many times larger as the weights add up to
    return True


def _constant_output_hessian(objective: Objective) -> Floats | None:
    """C of the module, if the loss is quadratic in the outputs; None: it is not."""
    first, targets = doubled(*objective.samples.batch(np.arange(min(3, len(objective.samples)))))
    with torch.no_grad():
        outputs = objective.model(first)
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for i, scale in enumerate((0.0, 1.0, 30.0)):
        one = i % len(outputs)
        noise = torch.randn(outputs[one].shape, generator=generator, dtype=torch.float64)
        o = outputs[one] + scale * noise
        target = targets[one : one + 1]

        def loss(o: Tensor, target: Tensor = target) -> Tensor:
            return objective.loss_fn(o[None], target)

        found.append(torch.autograd.functional.hessian(loss, o))  # type: ignore[no-untyped-call]
    C = found[0].reshape(outputs[0].numel(), -1)
    if not all(_alike(C, other.reshape(C.shape)) for other in found[1:]):
        return None
    return np.asarray(((C + C.T) / 2).numpy(), dtype=np.float64)


def _constant_hessian(objective: Objective) -> Floats | None:
    """The Hessian, if it is the same wherever it is looked at."""
    x = point(objective.model)
    random = np.random.default_rng(0)
    v = random.standard_normal(len(x))
    places = [x, *(x + scale * random.standard_normal(len(x)) for scale in (0.1, 1.0, 30.0))]
    first, *others = (torch.from_numpy(objective.curvature(at)(v)) for at in places)
    if not all(_alike(first, other) for other in others):
        return None
    return hessian(objective, x)


def _alike(one: Tensor, other: Tensor) -> bool:
    scale = max(float(one.abs().max()), float(other.abs().max()))
    return scale > 0 and float((one - other).abs().max()) <= _SAME * scale


def _local(objective: Objective, points_PD: Sequence[Floats], most: int) -> Curvature:
    found = [
        extreme_eigenvalues(objective.curvature(x), len(x), most=most, seed=i)
        for i, x in enumerate(points_PD)
    ]
    gammas = [one.largest_modulus for one in found]
    best = int(np.argmax(gammas))
    spread = f"{min(gammas):.4g} to {max(gammas):.4g}, " if len(gammas) > 1 else ""
    how = (
        f"{points(len(found))}, a lower bound ({spread}Lanczos residual {found[best].residual:.1g})"
    )
    return Curvature(
        "network",
        Estimate(gammas[best], found[best].residual, Kind.ESTIMATED, how),
        Estimate(0.0, None, Kind.BOUND, "no convexity is known, lowest eigenvalue found "
                                        f"{min(one.low for one in found):.4g}"),
        lowest=min(one.low for one in found),
    )  # fmt: skip

"""Assumption 3, measured: the noise of minibatch gradients and their bias, at a few points.

    X_ND   a point of all agents, x_j its row j;  grad V = grad F + (I - Pi) X / alpha
    g      stacked minibatch gradients, with dropout where the model has it

The rule: Q_V = 0, and Q is the largest variance over the points and its standard error. Where the
model is deterministic a minibatch's gradient is unbiased, so zeta_1 = zeta_2 = 1 exactly; with
dropout they are the extremes over the points of <grad V, E S>/|grad V|^2 and |E S|/|grad V|, where
S is grad V with g in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mpicdsgd.theory import estimates
from mpicdsgd.theory.estimates import Estimate, Kind, Noise, largest, points
from mpicdsgd.theory.objective import Floats, Objective


@dataclass(frozen=True)
class AtPoint:
    """What was measured at one point of all agents.

    Attributes:
        losses: sum_j f_j(x_j).
        squared: sum_j |grad f_j(x_j)|^2.
        noises: of each agent.
        along: <grad V, E grad V as minibatches have it>/|grad V|^2.
        length: |E grad V as minibatches have it|/|grad V|.
    """

    losses: float
    squared: float
    noises: tuple[Noise, ...]
    along: float = 1.0
    length: float = 1.0


@dataclass(frozen=True)
class GradientNoise:
    """Assumption 3's constants, for the smallest minibatch of the run.

    Attributes:
        at: every point's measurements.
    """

    Q: Estimate
    zeta_1: Estimate
    zeta_2: Estimate
    at: tuple[AtPoint, ...]

    def variance(self, batch: float) -> tuple[float, float]:
        """The mean over the points of E|g - E g|^2 with this batch size, and its error.

        The error is the standard error or the spread over the points, whichever is larger.
        """
        found = [estimates.variance(one.noises, batch) for one in self.at]
        values = np.array([value for value, _ in found])
        return float(values.mean()), max(float(values.std()), *(error for _, error in found))


def has_dropout(model: nn.Module) -> bool:
    """Whether the model is another one at every step."""
    return any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules())


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a sample's loss depends on the others in its minibatch: no f_j is a mean then."""
    return any(
        isinstance(m, _BatchNorm) or type(m).__name__ == "SyncBatchNorm" for m in model.modules()
    )


def gradient_noise(
    objectives: Sequence[Objective],
    points_PND: Sequence[Floats],
    mixing_gradients_PND: Sequence[Floats | None],
    batch: int,
    draws: int,
    seed: int = 0,
) -> GradientNoise:
    """Measure it. Local.

    Args:
        objectives: of all agents.
        points_PND: each of shape (N, D).
        mixing_gradients_PND: (I - Pi) X / alpha at each, or None where it is 0.
        batch: samples in the smallest minibatch of the run.
        draws: minibatches of each agent at each point.
        seed: of the minibatches.
    """
    assert draws >= 2
    dropout = has_dropout(objectives[0].model)
    whole = all(batch == len(o.samples) for o in objectives) and not dropout
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        at = tuple(
            _at_point(objectives, X, M, batch, draws, dropout, random)
            for X, M in zip(points_PND, mixing_gradients_PND, strict=True)
        )
    one = Estimate(1.0)
    if whole:
        return GradientNoise(Estimate(0.0), one, one, at)
    where = f"{points(len(at))}, {draws} minibatches of each agent"
    found = [estimates.variance(p.noises, batch) for p in at]
    Q = largest([v for v, _ in found], [e for _, e in found], f"{where}: the largest and its error")
    if not dropout:
        return GradientNoise(Q, one, one, at)
    alongs, lengths = [p.along for p in at], [p.length for p in at]
    return GradientNoise(
        Q,
        _between(alongs, min(alongs), f"{where}: smallest; spread"),
        _between(lengths, max(lengths), f"{where}: largest; spread"),
        at,
    )


def _between(values: Sequence[float], value: float, detail: str) -> Estimate:
    """``value`` of those at several points, with their spread."""
    return Estimate(value, max(values) - min(values), Kind.ESTIMATED, detail)


def _at_point(
    objectives: Sequence[Objective],
    X_ND: Floats,
    mixing_ND: Floats | None,
    batch: int,
    draws: int,
    dropout: bool,
    random: np.random.Generator,
) -> AtPoint:
    losses = squared = along = length = whole = 0.0
    noises = []
    for j, (objective, x) in enumerate(zip(objectives, X_ND, strict=True)):
        n = len(objective.samples)
        loss, full = objective.gradient(x)
        losses, squared = losses + loss, squared + float(full @ full)
        if batch == n and not dropout:
            noises.append(Noise(0.0, 0.0, n))
            continue
        mean, squares = np.zeros_like(full), []
        for _ in range(draws):
            # With dropout as in training; without, the mode changes nothing.
            _, g = objective.gradient(x, random.choice(n, batch, replace=False), training=dropout)
            mean += g / draws
            squares.append(float((g - full) @ (g - full)))
        if not dropout:
            noises.append(estimates.noise(squares, batch, n))
            continue
        # About the mean of the draws, of which one is used up by that.
        off = float((mean - full) @ (mean - full))
        noise = estimates.noise(np.array(squares), batch, np.inf)
        unit = (noise.unit - off * batch) * draws / (draws - 1)
        noises.append(Noise(unit, noise.error, np.inf))
        V = full if mixing_ND is None else full + mixing_ND[j]
        E = V + mean - full
        along, whole = along + float(E @ V), whole + float(V @ V)
        length += float(E @ E) - unit / batch / draws  # the mean's own noise
    if not dropout or whole == 0:
        return AtPoint(losses, squared, tuple(noises))
    return AtPoint(
        losses, squared, tuple(noises), along / whole, float(np.sqrt(max(length, 0.0) / whole))
    )

"""What `measure` says of agents, of all of them in one process."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpicdsgd.data import Samples
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.models.evaluate import evaluate
from mpicdsgd.runs.evaluation import accuracy, ratio, spread
from mpicdsgd.simulation.minibatches import Together
from mpicdsgd.simulation.rows import Rows
from mpicdsgd.simulation.vmap_trial import Loss
from mpicdsgd.simulation.vmapped import Sums

_BLOCK = 1 << 20  # elements in float64 at once


class Evaluates(Protocol):
    """See `simulation.vmapped.ManyAtATime`."""

    def evaluate(self, samples: Samples, batch_size: int) -> Sums: ...

    def evaluate_shares(self, together: Together, batch_size: int) -> Sums: ...

    def mean_buffers(self) -> None: ...


def measure(
    population: Evaluates,
    stack: Rows,
    model: nn.Module,
    layout: Arena,
    test: Samples,
    loss_fn: Loss,
    batch_size: int,
    training: Sums,
) -> dict[str, Any]:
    """Evaluate every agent's model and the averaged one on ``test``. Local.

    Args:
        model: for the averaged one; its parameters are in ``layout``.
        training: of each agent's minibatches or share.

    Returns:
        As `runs.evaluation.measure`.
    """
    own = population.evaluate(test, batch_size)
    mean_D = mean(stack.x)
    layout.flat.copy_(torch.from_numpy(mean_D))
    population.mean_buffers()
    loss, correct, count = evaluate(model, test, loss_fn, batch_size)
    centre_D = stack.algorithm.centre(stack)
    central = None
    if centre_D is not None:
        layout.flat.copy_(centre_D)
        central = evaluate(model, test, loss_fn, batch_size)
    squared = _squared_distances(stack.x, mean_D, layout.parameters_end)
    train_loss, train_accuracy = _ratios(training)
    test_loss, test_accuracy = _ratios(own)
    return {
        "train_loss": spread(train_loss),
        "train_accuracy": spread(train_accuracy),
        "test_loss": spread(test_loss),
        "test_accuracy": spread(test_accuracy),
        "averaged_model": _of_one(loss, correct, count),
        **({} if central is None else {"centre": _of_one(*central)}),
        "consensus": {
            "max": float(np.sqrt(squared.max())),
            "rms": float(np.sqrt(squared.mean())),
        },
    }


def _of_one(loss: float, correct: int, count: int) -> dict[str, float]:
    return {"test_loss": ratio(loss, count), "test_accuracy": accuracy(correct, count)}


def mean(x_ND: torch.Tensor) -> NDArray[np.float32]:
    """Mean over agents, shape (D,), summed in float64."""
    n, size = x_ND.shape
    x, out = x_ND.numpy(), np.empty(size, np.float32)
    step = max(1, _BLOCK // n)
    for start in range(0, size, step):
        part = slice(start, start + step)
        out[part] = x[:, part].sum(axis=0, dtype=np.float64) / n
    return out


def _squared_distances(
    x_ND: torch.Tensor, mean_D: NDArray[np.float32], end: int
) -> NDArray[np.float64]:
    """||x_j - mean||^2 of each agent's parameters, shape (N,)."""
    x = x_ND.numpy()
    found = np.zeros(len(x))
    for start in range(0, end, _BLOCK):
        part = slice(start, min(end, start + _BLOCK))
        for j, row in enumerate(x):
            difference = row[part].astype(np.float64) - mean_D[part]
            found[j] += float(difference @ difference)
    return found


def _ratios(sums: Sums) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean loss and accuracy of each agent."""
    pairs = [
        (ratio(loss, count), accuracy(int(correct), count))
        for loss, correct, count in zip(*sums, strict=True)
    ]
    table = np.array(pairs, np.float64)
    return table[:, 0], table[:, 1]

"""What is measured at an evaluation: every agent, their average, and how far they are apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.agreement import agree, wait_for
from mpicdsgd.data import Samples
from mpicdsgd.models.evaluate import evaluate
from mpicdsgd.models.losses import Loss
from mpicdsgd.runs.agent_state import local_buffers

NO_ACCURACY = float("nan")  # where targets are no class labels; null in the metrics file


@dataclass
class RunningMeans:
    """Sums over an epoch's minibatches so far; tensors of a GPU are added up there.

    Attributes:
        loss_sum: float64, number or tensor, with the same bits.
        correct: -1 where accuracy has no meaning.
    """

    loss_sum: float | torch.Tensor = 0.0
    correct: int | torch.Tensor = 0
    count: int = 0

    def add(
        self, loss: float | torch.Tensor, correct: int | torch.Tensor | None, count: int
    ) -> None:
        """Add a minibatch: its mean loss, its right answers (None: no accuracy) and its size.

        Tensors are float64 and int64, shape (), and are not waited for.
        """
        self.loss_sum = self.loss_sum + loss * count
        self.correct = -1 if correct is None else self.correct + correct
        self.count += count

    def numbers(self) -> dict[str, Any]:
        """The attributes as numbers. Waits for a GPU."""
        correct = int(self.correct)
        return {"loss_sum": float(self.loss_sum), "correct": correct, "count": self.count}

    def mean_loss(self) -> float:
        """The mean loss. Waits for a GPU."""
        return ratio(float(self.loss_sum), self.count)

    def values(self) -> tuple[float, float]:
        """Mean loss and accuracy. Waits for a GPU."""
        return self.mean_loss(), accuracy(int(self.correct), self.count)


def measure(
    agents: Agents,
    optimizer: AgentOptimizer,
    model: torch.nn.Module,
    test: Samples,
    loss_fn: Loss,
    batch_size: int,
    training: tuple[float, float],
) -> dict[str, Any]:
    """Evaluate every agent's model and the averaged one on ``test``. Collective.

    The averaged model's test set is shared out over the agents. Consensus distance:
    max_j ||x_j - mean|| and its root mean square over agents, parameters only, in float64.

    Args:
        training: this agent's training loss and accuracy, to be gathered.

    Raises:
        Silence: another rank takes `Agents.timeout_s` longer than this one.

    Returns:
        ``train_loss``, ``train_accuracy``, ``test_loss``, ``test_accuracy``, ``averaged_model``,
        ``consensus`` of a metrics line, the same on every rank; also ``centre``, where the
        algorithm has a model beside the agents' own.
    """
    share = np.arange(agents.rank, len(test), agents.size)
    centre_D = optimizer.exchange.centre()
    with optimizer.evaluating():
        own = evaluate(model, test, loss_fn, batch_size)
        agree(agents.comm, "evaluation", None, agents.timeout_s)  # the sums below have no timeout
        x_D = optimizer.x
        mean_D = agents.mean(x_D)
        with _instead(agents, optimizer, model, torch.from_numpy(mean_D)):
            part = evaluate(model, test, loss_fn, batch_size, share)
        central = (0.0, 0, 0)
        if centre_D is not None:
            with _instead(agents, optimizer, model, centre_D):
                central = evaluate(model, test, loss_fn, batch_size, share)
    row = [
        *training,
        ratio(own[0], own[2]),
        accuracy(own[1], own[2]),
        _squared_distance(x_D, mean_D, optimizer.arena.parameters_end),
        *part,
        *central,
    ]
    table = np.empty((agents.size, len(row)))
    request = agents.comm.Iallgather(np.array(row, dtype=np.float64), table)
    wait_for(request, agents.timeout_s, f"rank {agents.rank} in an evaluation")
    return _line(table, has_centre=centre_D is not None)


def _line(table: NDArray[np.float64], has_centre: bool) -> dict[str, Any]:
    """What `measure` returns, of every agent's row: shape (N, 11)."""
    squared = table[:, 4]
    return {
        "train_loss": spread(table[:, 0]),
        "train_accuracy": spread(table[:, 1]),
        "test_loss": spread(table[:, 2]),
        "test_accuracy": spread(table[:, 3]),
        "averaged_model": _of_parts(table[:, 5:8]),
        **({"centre": _of_parts(table[:, 8:11])} if has_centre else {}),
        "consensus": {
            "max": float(np.sqrt(squared.max())),
            "rms": float(np.sqrt(squared.mean())),
        },
    }


def spread(values: NDArray[np.float64]) -> dict[str, Any]:
    """Mean, standard deviation over the agents (not N - 1: they are all there are), and each.

    Agents that have none (NaN: no part in training, no accuracy) count only where all have none.
    """
    some = values[~np.isnan(values)] if not np.isnan(values).all() else values
    with np.errstate(invalid="ignore", over="ignore"):  # an infinite loss is reported as it is
        return {"mean": float(some.mean()), "std": float(some.std()), "agents": values.tolist()}


def _of_parts(parts: NDArray[np.float64]) -> dict[str, float]:
    """Loss and accuracy of one model on the agents' parts of a set: loss sum, right ones, count."""
    count = parts[:, 2].sum()
    correct = -1 if (parts[:, 1] < 0).any() else int(parts[:, 1].sum())
    return {
        "test_loss": ratio(parts[:, 0].sum(), count),
        "test_accuracy": accuracy(correct, count),
    }


def ratio(total: float, count: float) -> float:
    """``total / count``, NaN where nothing was counted."""
    return float(total / count) if count else float("nan")


def accuracy(correct: int, count: float) -> float:
    """Share of right answers, NaN where the task has none."""
    return NO_ACCURACY if correct < 0 else ratio(correct, count)


@contextlib.contextmanager
def _instead(
    agents: Agents,
    optimizer: AgentOptimizer,
    model: torch.nn.Module,
    x_D: torch.Tensor,
) -> Iterator[None]:
    """A block in which ``model`` has parameters ``x_D``, and the mean of what is not in them.

    Collective at its begin.
    """
    buffers = local_buffers(optimizer, model)
    kept = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    means = agents.average(buffers.values()) if buffers else {}
    try:
        with optimizer.holding(x_D):
            for buffer, mean in zip(buffers.values(), means.values(), strict=True):
                buffer.detach().copy_(mean)
            yield
    finally:
        for name, buffer in buffers.items():
            buffer.detach().copy_(kept[name])


def _squared_distance(x_D: NDArray[np.floating], mean_D: NDArray[np.floating], end: int) -> float:
    total = 0.0
    for start in range(0, end, 1 << 20):
        part = slice(start, min(end, start + (1 << 20)))
        difference = x_D[part].astype(np.float64) - mean_D[part]
        total += float(difference @ difference)
    return total

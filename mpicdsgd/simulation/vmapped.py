"""Losses and gradients of many agents at a time, in one process.

torch.func maps one function of the model over stacked parameters and minibatches. It serves models
whose outputs depend on parameters and inputs alone; `try_out` finds that out. The others go by
`sequential`, which has the same face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from mpicdsgd.data import Samples
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.coefficients import Coefficients
from mpicdsgd.models.evaluate import is_classification
from mpicdsgd.simulation.gradients import Part
from mpicdsgd.simulation.minibatches import Group, Together
from mpicdsgd.simulation.rows import Rows
from mpicdsgd.simulation.stacked_views import stacked_views
from mpicdsgd.simulation.vmap_trial import Loss, Trial, loss_of

Take: TypeAlias = Callable[[range], list[Group]]
Sums: TypeAlias = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]

_BUDGET_BYTES = 1 << 27  # of gradients and what autograd keeps: more is not faster
_COEFFICIENTS = ("alpha", "decay", "mu", "c_v", "c_g")


class ManyAtATime:
    """See the module.

    Args:
        model: its parameters are in ``layout``; in training and evaluation it gives the same.
        loss_fn: (outputs, targets) to the mean over the batch, shape ().
        layout, stack: of the agents' rows.
        clip_norm: clip each agent's gradient to this; 0: do not.
        trial: of this model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        layout: Arena,
        stack: Rows,
        clip_norm: float,
        trial: Trial,
    ) -> None:
        self._model, self._layout, self._clip_norm, self._trial = model, layout, clip_norm, trial
        self._agents = stack.size
        names = [name for name, _ in model.named_parameters()]
        self._views = dict(zip(names, stacked_views(layout, stack.flat), strict=True))
        self._x_views = dict(zip(names, stacked_views(layout, stack.x), strict=True))
        self._wanted = [
            name for name, given in zip(names, trial.has_gradient, strict=True) if given
        ]
        self._place = [names.index(name) for name in self._wanted]
        loss = loss_of(model, loss_fn)
        self._gradients = vmap(grad_and_value(loss, has_aux=True), randomness="error")
        self._of_shares = vmap(loss)
        self._of_all = vmap(loss, in_dims=(0, 0, None, None))
        self._chunk = self._fitting(trial.batch)
        self._segments = np.tile(layout.segments, (self._chunk, 1))
        self._frozen = [i for i, p in enumerate(layout.parameters) if not p.requires_grad]
        self._rows = list(self._segments)
        self._keep_alive: list[Tensor] = []

    def parts(
        self, take: Take, coefficients: Coefficients, taking_part: NDArray[np.bool_]
    ) -> Iterator[Part]:
        """Yield every agent's loss and gradient at its row of `Rows.flat`.

        A row may be changed as soon as its part is there.

        Args:
            take: gives the minibatches of a range of agents.
            coefficients: of the step, on all agents.
            taking_part: which agents compute a gradient, shape (N,).
        """
        self._model.train()
        for name in _COEFFICIENTS:
            self._segments[name] = getattr(coefficients, name)
        self._segments["decay"][:, self._frozen] = (
            0  # as `kernels.arena.Arena.fill_segments` has it
        )
        for agents in self._chunks(range(self._agents), self._chunk):
            for group in take(agents):
                part = self._part(group)
                yield part if taking_part[part.agents].all() else _those(part, taking_part)

    def _part(self, group: Group) -> Part:
        views = _rows_of(self._views, group.agents)
        wanted = {name: views.pop(name) for name in self._wanted}
        made, (loss, outputs) = self._gradients(wanted, views, group.inputs, group.targets)
        gradients = [made[name] for name in self._wanted]
        if self._clip_norm > 0:
            gradients = _clipped(gradients, self._clip_norm)
        self._keep_alive = []
        for place, gradient in zip(self._place, gradients, strict=True):
            self._point_at(place, gradient)
        return Part(
            group.agents,
            loss.double().numpy(),
            right_answers(outputs, group.targets),
            group.targets.shape[1],
            self._rows[: len(group.agents)],
        )

    def _point_at(self, place: int, gradient: Tensor) -> None:
        """Write the addresses of one parameter's gradients into the table."""
        view, n = self._layout.views[place], len(gradient)
        if gradient.numel() == 0:
            return
        if gradient.dtype != torch.float32 or gradient.stride()[1:] != view.stride():
            # The kernel reads a segment in the parameter's own order.
            own = torch.empty_strided((n, *view.shape), (view.numel(), *view.stride()))
            gradient = own.copy_(gradient)
        self._keep_alive.append(gradient)
        step_bytes = gradient.stride(0) * gradient.element_size()
        addresses = gradient.data_ptr() + step_bytes * np.arange(n, dtype=np.int64)
        self._segments["grad"][:n, place] = addresses.astype(np.uint64)

    @torch.no_grad()
    def evaluate(self, samples: Samples, batch_size: int) -> Sums:
        """`evaluate.evaluate` of every agent's x on the same samples, each result of shape (N,)."""
        indices = np.arange(len(samples))
        sums = no_sums(self._agents)
        self._model.eval()
        for start in range(0, len(indices), batch_size):
            inputs, targets = samples.batch(indices[start : start + batch_size])
            for agents in self._chunks(range(self._agents), self._fitting(len(targets))):
                views = {name: v[agents.start : agents.stop] for name, v in self._x_views.items()}
                loss, outputs = self._of_all({}, views, inputs, targets)
                right = right_answers(outputs, targets)
                add(sums, np.array(agents), loss.double().numpy(), right, len(targets))
        return sums

    @torch.no_grad()
    def evaluate_shares(self, together: Together, batch_size: int) -> Sums:
        """The same of every agent on its own share."""
        sums = no_sums(self._agents)
        self._model.eval()
        shares = np.array(together.shares)
        for size in np.unique(shares).tolist():
            alike = np.flatnonzero(shares == size)
            for start in range(0, size, batch_size):
                indices = np.arange(start, min(size, start + batch_size))
                for part in self._chunks(range(len(alike)), self._fitting(len(indices))):
                    agents = alike[part.start : part.stop]
                    for group in together.take(agents.tolist(), [indices] * len(agents), 0):
                        views = _rows_of(self._x_views, group.agents)
                        loss, outputs = self._of_shares({}, views, group.inputs, group.targets)
                        right = right_answers(outputs, group.targets)
                        add(sums, group.agents, loss.double().numpy(), right, len(indices))
        return sums

    def mean_buffers(self) -> None:
        """There are none. See `simulation.sequential.OneByOne`."""

    def _fitting(self, batch: int) -> int:
        bytes_ = self._trial.sample_bytes * batch + 8 * self._layout.size
        return int(max(1, min(self._agents, _BUDGET_BYTES // bytes_)))

    @staticmethod
    def _chunks(agents: range, size: int) -> Iterator[range]:
        return (agents[start : start + size] for start in range(0, len(agents), size))


def _those(part: Part, taking_part: NDArray[np.bool_]) -> Part:
    """What ``part`` has of the agents that take part."""
    some = taking_part[part.agents]
    segments = [rows for rows, is_one in zip(part.segments, some, strict=True) if is_one]
    return Part(part.agents[some], part.loss[some], part.right[some], part.batch, segments)


def right_answers(outputs: Tensor, targets: Tensor) -> NDArray[np.int64]:
    """How many of each agent's answers are right, -1 where that has no meaning: shape (n,).

    Args:
        outputs: shape (n, B, ...).
        targets: shape (n, B), or (B,) for all.
    """
    alike = targets if targets.dim() == 1 else targets[0]
    if not is_classification(outputs[0], alike):
        return np.full(len(outputs), -1)
    return (outputs.argmax(dim=2) == targets).sum(dim=1).numpy()


def no_sums(agents: int) -> Sums:
    """Zeros: losses, right answers, samples."""
    return np.zeros(agents), np.zeros(agents, np.int64), np.zeros(agents, np.int64)


def add(
    sums: Sums,
    agents: NDArray[np.int64],
    loss: NDArray[np.float64],
    right: NDArray[np.int64],
    batch: int,
) -> None:
    """Add a batch of each of ``agents``: its mean loss and its right answers, shape (n,)."""
    losses, correct, count = sums
    losses[agents] += loss * batch
    correct[agents] = np.where(right < 0, -1, correct[agents] + right)
    count[agents] += batch


def _rows_of(views: dict[str, Tensor], agents: NDArray[np.int64]) -> dict[str, Tensor]:
    first, last = int(agents[0]), int(agents[-1])
    if last - first + 1 == len(agents):
        return {name: view[first : last + 1] for name, view in views.items()}
    return {name: view[torch.from_numpy(agents)] for name, view in views.items()}


def _clipped(gradients: list[Tensor], clip_norm: float) -> list[Tensor]:
    """`torch.nn.utils.clip_grad_norm_` of each agent, in its order of operations."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients])
    factor = (clip_norm / (norms.norm(dim=0) + 1e-6)).clamp(max=1.0)
    return [g * factor.reshape(-1, *(1,) * (g.dim() - 1)) for g in gradients]

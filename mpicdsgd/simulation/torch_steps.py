"""A torch optimizer for each agent: the local step in a simulation; `torch_step` is a job's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.torch_step import TorchStep
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.simulation.gradients import Part


class TorchSteps:
    """See the module. Local.

    Args:
        layout: of a row.
        flat: the agents' parameters, float32, shape (N, D).
        make: the optimizer of an agent's parameters.

    Attributes:
        gradient, penalty: of the last step, as `measured.Measured` has them, shape (N,).
    """

    def __init__(
        self,
        layout: Arena,
        flat: torch.Tensor,
        make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self._layout = layout
        self._parameters = [
            [
                torch.nn.Parameter(view, requires_grad=like.requires_grad)
                for view, like in zip(layout.views_of(row), layout.parameters, strict=False)
            ]
            for row in flat
        ]
        self._optimizers = [make(parameters) for parameters in self._parameters]
        self.gradient, self.penalty = np.zeros((2, len(flat)))

    def apply(
        self, parts: Iterable[Part], seen: Callable[[Part], None], group: dict[str, Any]
    ) -> list[Part]:
        """Have every agent's optimizer make its step; nothing is left for the algorithm's pass."""
        for part in parts:
            seen(part)
            for j, rows in zip(part.agents.tolist(), part.segments, strict=True):
                self._step(j, rows, float(group["lr"]))
        return []

    @torch.no_grad()
    def _step(self, j: int, rows: NDArray[np.void], lr: float) -> None:
        for i, parameter in enumerate(self._parameters[j]):
            address, length = int(rows["grad"][i]), int(rows["length"][i])
            parameter.grad = None
            if address and length:
                memory = (ctypes.c_float * length).from_address(address)
                flat = torch.from_numpy(np.ctypeslib.as_array(memory))
                parameter.grad = flat.as_strided(parameter.shape, parameter.stride())
        local = TorchStep(self._optimizers[j])
        for own in self._optimizers[j].param_groups:
            own["lr"] = lr
        self.gradient[j] = sum(
            float(p.grad.double().square().sum()) for p in self._parameters[j] if p.grad is not None
        )
        self.penalty[j] = float(local.penalty(self._layout))
        self._optimizers[j].step()

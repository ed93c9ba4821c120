"""One agent's objective as the theory has it, in float64, with its derivatives.

    f_j(x) = mean over its samples of the loss  +  decay/2 |x|^2

x is all trainable parameters in the model's order, flattened, shape (D,). The model is evaluated,
not trained: dropout is out of f_j, and belongs to the noise of its gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mpicdsgd.common.errors import UserError
from mpicdsgd.data.samples import Indices, Samples
from mpicdsgd.models.losses import Loss

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """f_j. `in_float64` gives the model that it wants; agents may share one.

    Attributes:
        model: float64, on the host; its parameters are written, its training flag too.
        loss_fn: (outputs, targets) to the mean over the batch, shape ().
        samples: the agent's share, or the part of it that is looked at.
        decay: weight decay.
        batch_size: samples at a time.
        only: mean over these of the samples instead, indices of shape (n,).
    """

    model: nn.Module
    loss_fn: Loss
    samples: Samples
    decay: float = 0.0
    batch_size: int = 500
    only: Indices | None = None

    def value(self, x_D: Floats) -> float:
        """f_j(x)."""
        place(self.model, x_D)
        self.model.eval()
        total = 0.0
        with torch.no_grad():
            for part, inputs, targets in self.parts():
                total += part * float(self.loss_fn(self.model(inputs), targets))
        return total + 0.5 * self.decay * float(x_D @ x_D)

    def gradient(
        self, x_D: Floats, indices: Indices | None = None, *, training: bool = False
    ) -> tuple[float, Floats]:
        """f_j(x) and grad f_j(x), shape (D,); of the minibatch ``indices`` of its samples.

        ``training``: with the model in training mode, in one go.
        """
        parameters = place(self.model, x_D)
        self.model.train(training)
        total, sums = 0.0, [torch.zeros_like(p) for p in parameters]
        size = len(indices) if training and indices is not None else None
        for part, inputs, targets in self.parts(indices, size):
            loss = self.loss_fn(self.model(inputs), targets)
            for one, g in zip(sums, _gradients(loss, parameters), strict=True):
                one += part * g
            total += part * float(loss.detach())
        self.model.eval()
        g_D = _flat(sums) + self.decay * x_D
        return total + 0.5 * self.decay * float(x_D @ x_D), g_D

    def curvature(self, x_D: Floats) -> Callable[[Floats], Floats]:
        """The product of f_j's Hessian at x with a vector, both of shape (D,).

        Raises:
            UserError: when called, if an operation of the model has no second derivative.
        """

        def product(v_D: Floats) -> Floats:
            parameters = place(self.model, x_D)
            self.model.eval()
            v = _like(v_D, parameters)
            sums = [torch.zeros_like(p) for p in parameters]
            for part, inputs, targets in self.parts():
                loss = self.loss_fn(self.model(inputs), targets)
                try:
                    g = _gradients(loss, parameters, create_graph=True)
                    along = sum((a * b).sum() for a, b in zip(g, v, strict=True))
                    assert isinstance(along, Tensor)
                    if not along.requires_grad:
                        continue  # the loss is linear in the parameters
                    # Not autograd.grad: that goes round nodes which only raise an error.
                    for p in parameters:
                        p.grad = None
                    along.backward()  # type: ignore[no-untyped-call]
                except RuntimeError as error:
                    raise UserError(
                        "the model or its loss has an operation without a second derivative "
                        f"({str(error).splitlines()[0]}): its curvature cannot be measured"
                    ) from None
                for one, p in zip(sums, parameters, strict=True):
                    if p.grad is not None:
                        one += part * p.grad
            return _flat(sums) + self.decay * v_D

        return product

    def parts(
        self, indices: Indices | None = None, size: int | None = None
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Batches in float64, each with the share of the mean that it is."""
        if indices is None:
            indices = np.arange(len(self.samples)) if self.only is None else self.only
        size = size or self.batch_size
        for start in range(0, len(indices), size):
            inputs, targets = self.samples.batch(indices[start : start + size])
            yield len(targets) / len(indices), *doubled(inputs, targets)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the host, in float64."""
    return copy.deepcopy(model).cpu().double()


def doubled(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A batch with its floating parts in float64."""
    return (
        inputs.double() if inputs.is_floating_point() else inputs,
        targets.double() if targets.is_floating_point() else targets,
    )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that x is made of, in order."""
    return [p for p in model.parameters() if p.requires_grad]


def point(model: nn.Module) -> Floats:
    """x of a model, float64, shape (D,)."""
    return _flat([p.detach() for p in trainable(model)])


def place(model: nn.Module, x_D: Floats) -> list[nn.Parameter]:
    """Have ``model`` hold x; returns its trainable parameters."""
    parameters = trainable(model)
    with torch.no_grad():
        for parameter, values in zip(parameters, _like(x_D, parameters), strict=True):
            parameter.copy_(values)
    return parameters


def _gradients(
    value: Tensor, parameters: list[nn.Parameter], *, create_graph: bool = False
) -> list[Tensor]:
    found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _flat(tensors: list[Tensor]) -> Floats:
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    return flat.double().cpu().numpy().astype(np.float64)


def _like(x_D: Floats, parameters: list[nn.Parameter]) -> list[Tensor]:
    flat = torch.from_numpy(np.array(x_D, dtype=np.float64))
    sizes = [p.numel() for p in parameters]
    return [
        part.view(p.shape) for part, p in zip(torch.split(flat, sizes), parameters, strict=True)
    ]

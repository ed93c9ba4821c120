"""Losses by their names in a config."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.plugins import load_function, nearest
from mpicdsgd.models.build import ModelConfig

Loss = Callable[[Tensor, Tensor], Tensor]


def loss_function(config: ModelConfig) -> Loss:
    """Return the function of (outputs, targets) that gives the batch's mean loss, shape ().

    ``cross_entropy``: outputs are logits, targets class labels or probabilities. ``mse``: targets
    as many numbers as outputs; class labels become one-hot rows; the mean is over outputs too.
    ``least_squares``: |output - target|^2 / 2, targets as of ``mse``.

    Raises:
        UserError: unknown name.
    """
    losses: dict[str, Loss] = {
        "cross_entropy": _cross_entropy, "least_squares": _least_squares, "mse": _mse
    }  # fmt: skip
    if ":" in config.loss:
        return load_function(config.loss, "model.loss")
    if config.loss not in losses:
        raise UserError(
            f'model.loss = "{config.loss}" is not known{nearest(config.loss, losses)} '
            f'({", ".join(losses)} or "package.module:function")'
        )
    return losses[config.loss]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point() and targets.shape != outputs.shape:
        raise UserError(
            f'model.loss = "cross_entropy" needs class labels, but the targets are '
            f'{targets.dtype} of shape {tuple(targets.shape)}: use "mse" or integer targets'
        )
    return functional.cross_entropy(outputs, targets)


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, _as_outputs("mse", outputs, targets))


def _least_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    error = outputs - _as_outputs("least_squares", outputs, targets)
    return 0.5 * (error * error).sum() / len(outputs)


def _as_outputs(loss: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets as numbers of the outputs' shape and dtype; class labels become one-hot rows."""
    if not targets.is_floating_point() and targets.dim() == 1 and outputs.dim() == 2:
        targets = functional.one_hot(targets, outputs.shape[1])
    if targets.numel() != outputs.numel():  # torch would broadcast
        raise UserError(
            f'model.loss = "{loss}": outputs of shape {tuple(outputs.shape)} do not fit targets of '
            f"shape {tuple(targets.shape)}: set model.args.outputs"
        )
    return targets.reshape(outputs.shape).to(outputs.dtype)

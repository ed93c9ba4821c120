"""Section ``[model]`` of a config, and the model that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import nn

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.plugins import check_arguments, load_function, nearest
from mpicdsgd.models.networks import (
    Shape,
    _is_count,
    big_cnn,
    cnn,
    fcn,
    linear,
    logistic,
    mlp,
    quadratic,
    resnet20,
)


@dataclass(frozen=True)
class ModelConfig:
    """The config's [model] section."""

    #: cnn, big-cnn, fcn (the authors'), linear, logistic, mlp, quadratic, resnet20, or
    #: "package.module:factory", which is called with args
    name: str = "cnn"
    #: cross_entropy, least_squares, mse, or "package.module:function" of (outputs, targets) to
    #: their mean loss
    loss: str = "cross_entropy"
    #: the factory's keyword arguments
    args: dict[str, Any] = field(default_factory=dict)
    #: BatchNorm's running statistics: local, or mixed with Pi as the parameters are
    buffers: str = "local"


def build(config: ModelConfig, input_shape: Shape, classes: int | None) -> nn.Module:
    """Return a new model on the host; its weights come from torch's global generator.

    Args:
        config: the model's name and arguments.
        input_shape: of one sample, images (channels, height, width).
        classes: number of outputs, unless ``config.args`` has ``outputs`` (not smaller). A factory
            of the user's gets neither: only ``config.args``.

    Raises:
        UserError: unknown name, arguments that do not fit the factory, an input shape that the
            model cannot take.
    """
    if config.buffers not in ("local", "mixed"):
        raise UserError(f'model.buffers = "{config.buffers}": it must be local or mixed')
    if ":" in config.name:
        factory = load_function(config.name, "model.name")
        check_arguments(factory, config.args, "model.args")
        made = factory(**config.args)
        if not isinstance(made, nn.Module):
            raise UserError(
                f'model.name = "{config.name}" must return a torch.nn.Module, '
                f"got a {type(made).__name__}"
            )
        if any(isinstance(p, nn.UninitializedParameter) for p in made.parameters()):
            raise UserError(
                f'model.name = "{config.name}" has lazy parameters: let the factory run '
                "a batch through the model before it returns it"
            )
        return made
    if config.name not in MODELS:
        raise UserError(
            f'model.name = "{config.name}" is not known{nearest(config.name, MODELS)} '
            f'({", ".join(MODELS)} or "package.module:factory")'
        )
    builtin = MODELS[config.name]
    check_arguments(builtin, config.args, "model.args", given=2, optional=("outputs",))
    args = dict(config.args)
    outputs = args.pop("outputs", classes)
    if outputs is None and builtin is quadratic:
        outputs = prod(input_shape)
    if outputs is None:
        raise UserError("the data have no classes: set model.args.outputs, the number of outputs")
    if not _is_count(outputs) or outputs < (classes or 1):
        raise UserError(
            f"model.args.outputs = {outputs!r}: it must be an integer >= {classes or 1}"
        )
    return builtin(input_shape, outputs, **args)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn,
    "big-cnn": big_cnn,
    "fcn": fcn,
    "linear": linear,
    "logistic": logistic,
    "mlp": mlp,
    "quadratic": quadratic,
    "resnet20": resnet20,
}

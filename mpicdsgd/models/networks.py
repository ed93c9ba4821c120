"""Models and losses: the authors' three, common small ones, and the user's own."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpicdsgd.common.errors import UserError

Shape = tuple[int, ...]


def cnn(input_shape: Shape, outputs: int, dropout: float = 0.25) -> nn.Module:
    """The authors' CNN: twice (two 3x3 convolutions, max-pooling, dropout), dense 512, outputs.

    32, 32, then 64, 64 channels, same padding, ReLU; initialised as Keras does.

    Source: the released code of arXiv 1706.07880.
    """
    _check_dropout(dropout)
    channels, height, width = _image(input_shape, "cnn", 4)
    return _keras_init(
        nn.Sequential(
            *_block(channels, 32, 2, dropout),
            *_block(32, 64, 2, dropout),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 512),
            nn.ReLU(),
            nn.Linear(512, outputs),
        )
    )


def big_cnn(input_shape: Shape, outputs: int, dropout: float = 0.5) -> nn.Module:
    """The authors' Big_CNN: three blocks of three 3x3 convolutions, dense 512, 512, outputs.

    64, 128, 256 channels, each block with max-pooling and dropout; else as ``cnn``.

    Source: the released code of arXiv 1706.07880.
    """
    _check_dropout(dropout)
    channels, height, width = _image(input_shape, "big-cnn", 8)
    return _keras_init(
        nn.Sequential(
            *_block(channels, 64, 3, dropout),
            *_block(64, 128, 3, dropout),
            *_block(128, 256, 3, dropout),
            nn.Flatten(),
            nn.Linear(256 * (height // 8) * (width // 8), 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, outputs),
        )
    )


def fcn(input_shape: Shape, outputs: int) -> nn.Module:
    """The authors' FCN: 20 dense layers of 50 with ReLU, then outputs; initialised as Keras does.

    Source: the released code of arXiv 1706.07880.
    """
    return _keras_init(mlp(input_shape, outputs, hidden=[50] * 20))


def logistic(input_shape: Shape, outputs: int) -> nn.Module:
    """Logistic (softmax) regression: one dense layer, zero at the start."""
    return linear(input_shape, outputs)


def linear(input_shape: Shape, outputs: int) -> nn.Module:
    """Linear regression: one dense layer, zero at the start."""
    model = mlp(input_shape, outputs, hidden=[])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def mlp(input_shape: Shape, outputs: int, hidden: Sequence[int] = (256, 128)) -> nn.Module:
    """Dense layers of the widths ``hidden`` with ReLU, then outputs; initialised as torch does."""
    if not isinstance(hidden, list | tuple) or not all(_is_count(width) for width in hidden):
        raise UserError(f"model.args.hidden = {hidden!r}: it must be a list of positive integers")
    widths = [prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def quadratic(input_shape: Shape, outputs: int) -> nn.Module:
    """A point x, zero at the start, that is the output for every input.

    With the loss ``least_squares`` and targets b it is the mean of |x - b|^2 / 2.

    Args:
        input_shape: of one sample; where there are no classes, its size is that of x.
        outputs: coordinates of x.
    """
    return _Quadratic(outputs)


class _Quadratic(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.x.expand(len(inputs), -1)


def resnet20(input_shape: Shape, outputs: int) -> nn.Module:
    """ResNet-20 for CIFAR: 16, 32, 64 channels in three stages of three blocks, with BatchNorm.

    Shortcuts between stages are option A: every second pixel, new channels zero, no parameters.
    Convolutions are initialised after He et al.; 269,722 parameters for (3, 32, 32) and 10 classes.

    Source: He, Zhang, Ren, Sun 2016, section 4.2, arXiv 1512.03385.
    """
    channels, _, _ = _image(input_shape, "resnet20", 4)
    layers: list[nn.Module] = [_conv(channels, 16, 1), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for after in (16, 32, 64):
        for i in range(3):
            layers.append(_Residual(before, after, stride=2 if i == 0 and after > 16 else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, outputs))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = after - before
        self.conv1, self.norm1 = _conv(before, after, stride), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = _conv(after, after, 1), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        low = self.new_channels // 2
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, low, self.new_channels - low))
        return functional.relu(y + shortcut)


def _conv(before: int, after: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def _block(before: int, after: int, convolutions: int, dropout: float) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(before, after, 3, padding="same"), nn.ReLU()]
        before = after
    return [*layers, nn.MaxPool2d(2), nn.Dropout(dropout)]


def _keras_init(model: nn.Module) -> nn.Module:
    """Glorot-uniform weights, zero biases: Keras's default, which the authors' code left alone."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return model


def _image(input_shape: Shape, model: str, least: int) -> Shape:
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise UserError(
            f'model.name = "{model}" takes images (channels, height, width) of at least '
            f"{least}x{least} pixels, but the data's samples have the shape {input_shape}: "
            "use mlp or logistic"
        )
    return input_shape


def _check_dropout(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"model.args.dropout = {dropout!r}: it must be a number in [0, 1)")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

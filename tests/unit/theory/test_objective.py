"""An agent's objective and its derivatives, against torch's dense ones and NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpicdsgd.common.errors import UserError
from mpicdsgd.data.samples import ArraySamples
from mpicdsgd.theory.curvature import hessian
from mpicdsgd.theory.objective import Floats, Objective, in_float64, place, point


def samples(n: int = 11, inputs: int = 3, outputs: int = 2, seed: int = 1) -> ArraySamples:
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, inputs)).astype(np.float32)
    return ArraySamples(x, random.standard_normal((n, outputs)).astype(np.float32))


def network(seed: int = 0, p: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 2))


def objective(**more: Any) -> Objective:
    made = Objective(in_float64(network()), functional.mse_loss, samples(), 0.3, 4)
    return replace(made, **more)


def direct(x_D: Tensor, one: Objective, rows: Any = slice(None)) -> Tensor:
    """f written out, for a network of two layers."""
    W1, b1, W2, b2 = torch.split(x_D, [12, 4, 8, 2])
    assert isinstance(one.samples, ArraySamples)
    X = torch.from_numpy(one.samples.inputs[rows]).double()
    y = torch.from_numpy(one.samples.targets[rows]).double()
    outputs = torch.tanh(X @ W1.view(4, 3).T + b1) @ W2.view(2, 4).T + b2
    return ((outputs - y) ** 2).mean() + one.decay / 2 * (x_D**2).sum()


def at(one: Objective, seed: int = 5) -> Floats:
    return np.random.default_rng(seed).standard_normal(len(point(one.model)))


@pytest.mark.parametrize("rows", [None, np.array([0, 3, 7])])
def test_value_gradient_and_hessian(rows: Any) -> None:
    one = objective(only=rows)
    x = at(one)
    t = torch.from_numpy(x).requires_grad_()
    where = slice(None) if rows is None else rows
    f = direct(t, one, where)
    (g,) = torch.autograd.grad(f, t)
    H = torch.autograd.functional.hessian(lambda z: direct(z, one, where), t).numpy()
    assert one.value(x) == pytest.approx(f.item(), rel=1e-12)
    value, gradient = one.gradient(x)
    assert value == pytest.approx(f.item(), rel=1e-12)
    assert gradient == pytest.approx(g.numpy(), rel=1e-10, abs=1e-12)
    assert hessian(one, x) == pytest.approx(H, rel=1e-9, abs=1e-11)
    v = at(one, 6)
    assert one.curvature(x)(v) == pytest.approx(H @ v, rel=1e-9, abs=1e-11)


def test_a_minibatch() -> None:
    one, rows = objective(), np.array([2, 2, 9])
    x = at(one)
    t = torch.from_numpy(x).requires_grad_()
    f = direct(t, one, rows)
    value, gradient = one.gradient(x, rows)
    assert value == pytest.approx(f.item(), rel=1e-12)
    assert gradient == pytest.approx(torch.autograd.grad(f, t)[0].numpy(), rel=1e-10, abs=1e-12)


def test_dropout_is_in_training_only() -> None:
    one = objective(model=in_float64(network(p=0.5)))
    x, rows = at(one), np.arange(5)
    still = [one.gradient(x, rows)[1] for _ in range(2)]
    torch.manual_seed(0)
    moving = [one.gradient(x, rows, training=True)[1] for _ in range(2)]
    assert (still[0] == still[1]).all()
    assert (moving[0] != moving[1]).any()
    assert not one.model.training


def test_frozen_parameters_are_no_part_of_x() -> None:
    model = network()
    next(model.parameters()).requires_grad_(False)
    one = objective(model=in_float64(model))
    x = point(one.model)
    assert len(x) == 26 - 12
    assert len(one.gradient(x)[1]) == 14
    place(one.model, x + 1)
    assert point(one.model) == pytest.approx(x + 1)


def test_the_model_is_copied() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    one = objective(model=in_float64(model))
    one.value(at(one))
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_linear_loss_has_no_curvature() -> None:
    one = objective(model=in_float64(nn.Linear(3, 2)), loss_fn=lambda o, t: o.mean())
    assert one.curvature(at(one))(np.ones(8)) == pytest.approx(0.3 * np.ones(8))


class Once(torch.autograd.Function):
    """An operation with a first derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_no_second_derivative_is_said() -> None:
    one = objective(loss_fn=lambda o, t: (Once.apply(o) ** 2).mean())
    with pytest.raises(UserError, match="without a second derivative"):
        one.curvature(at(one))(np.ones(26))

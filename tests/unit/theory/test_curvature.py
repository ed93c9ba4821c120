"""gamma_j and H_j against eigenvalues of dense Hessians, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpicdsgd.data.samples import ArraySamples
from mpicdsgd.models import build, losses, networks
from mpicdsgd.theory.curvature import curvature, hessian, linear_layer
from mpicdsgd.theory.objective import Floats, Objective, in_float64, point

LOSSES = {
    "mse": losses.loss_function(build.ModelConfig(loss="mse")),
    "cross_entropy": losses.loss_function(build.ModelConfig(loss="cross_entropy")),
}


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((outputs - targets.reshape(outputs.shape)) ** 2).sum(1).mean()


def labelled(n: int = 30, inputs: int = 4, classes: int = 3) -> ArraySamples:
    random = np.random.default_rng(2)
    x = (2 * random.standard_normal((n, inputs)) + 1).astype(np.float32)
    return ArraySamples(x, random.integers(0, classes, n))


def real(n: int = 30, inputs: int = 4, outputs: int = 3) -> ArraySamples:
    random = np.random.default_rng(3)
    x = (2 * random.standard_normal((n, inputs)) + 1).astype(np.float32)
    return ArraySamples(x, random.standard_normal((n, outputs)).astype(np.float32))


def make(model: nn.Module, loss: Any, data: ArraySamples, decay: float = 0.0) -> Objective:
    return Objective(in_float64(model), loss, data, decay, 7)


def near(one: Objective, scale: float, seed: int = 0) -> Floats:
    return scale * np.random.default_rng(seed).standard_normal(len(point(one.model)))


def eigenvalues(one: Objective, x: Floats) -> Floats:
    return np.asarray(np.linalg.eigvalsh(hessian(one, x)))


@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("loss", [LOSSES["mse"], half_squares, functional.mse_loss])
def test_least_squares_are_exact(loss: Any, flatten: bool, bias: bool, decay: float) -> None:
    layer = nn.Linear(4, 3, bias=bias)
    one = make(nn.Sequential(nn.Flatten(), layer) if flatten else layer, loss, real(), decay)
    found = curvature(one, [])
    values = eigenvalues(one, near(one, 1))
    assert found.kind == "quadratic"
    assert found.gamma.how == found.H.how == "exact"
    assert found.gamma.value == pytest.approx(values[-1], rel=1e-10)
    assert found.H.value == pytest.approx(values[0], rel=1e-9)


def test_fewer_samples_than_inputs_are_not_strongly_convex() -> None:
    one = make(nn.Linear(4, 1), LOSSES["mse"], real(n=3, outputs=1))
    assert curvature(one, []).H.value == 0
    one = make(nn.Linear(4, 1), LOSSES["mse"], real(n=3, outputs=1), 0.125)
    assert curvature(one, []).H.value == 0.125


class Quadratic(nn.Module):
    """Outputs x - a, with a the input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.x - inputs


def test_any_quadratic_is_found_by_its_hessian() -> None:
    data = real(inputs=4, outputs=4)
    scale = torch.tensor([1.0, 2.0, 5.0, 0.5], dtype=torch.float64)
    one = make(Quadratic(4), lambda o, t: 0.5 * (scale * (o - t) ** 2).sum(1).mean(), data, 0.1)
    found = curvature(one, [])
    assert (found.kind, found.gamma.how) == ("quadratic", "exact")
    assert (found.gamma.value, found.H.value) == pytest.approx((5.1, 0.6), rel=1e-12)
    downwards = make(Quadratic(4), lambda o, t: -(scale * o**2).sum(1).mean(), data)
    found = curvature(downwards, [])
    assert (found.gamma.value, found.H.value) == pytest.approx((10, 0), rel=1e-12)


@pytest.mark.parametrize("loss", [LOSSES["cross_entropy"], functional.cross_entropy])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_bound_of_softmax_holds_and_is_reached(classes: int, loss: Any) -> None:
    data, decay = labelled(classes=classes), 0.2
    one = make(nn.Sequential(nn.Flatten(), nn.Linear(4, classes)), loss, data, decay)
    found = curvature(one, [])
    assert found.kind == "logistic"
    assert found.gamma.how.startswith("bound")
    assert (found.H.value, found.H.how) == (decay, "exact")
    for seed, scale in enumerate((0, 0.1, 1, 10)):
        values = eigenvalues(one, near(one, scale, seed))
        assert values[-1] <= found.gamma.value * (1 + 1e-12)
        assert values[0] == pytest.approx(decay, abs=1e-10)  # equal shifts of all outputs
    # Two outputs are equal and the others far below: the bound is reached.
    x = np.zeros(5 * classes)
    x[4 * classes + 2 :] = -60
    assert eigenvalues(one, x)[-1] == pytest.approx(found.gamma.value, rel=1e-9)


def test_what_weighs_classes_is_no_plain_softmax() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 50.0, 1.0], dtype=torch.float64))
    one = make(nn.Linear(4, 3), weighted, labelled())
    assert curvature(one, [near(one, 1)]).kind == "network"
    twice = ArraySamples(real().inputs, 2 * np.eye(3, dtype=np.float32)[np.arange(30) % 3])
    one = make(nn.Linear(4, 3), LOSSES["cross_entropy"], twice)
    assert curvature(one, [near(one, 1)]).kind == "network"


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_network_at_points(decay: float) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    one = make(model, LOSSES["cross_entropy"], labelled(), decay)
    places = [near(one, 0.3, 1), near(one, 1.5, 2), near(one, 0.7, 3)]
    values = [eigenvalues(one, x) for x in places]
    moduli = [float(np.abs(v).max()) for v in values]
    found = curvature(one, places)
    assert found.kind == "network"
    assert found.gamma.value == pytest.approx(max(moduli), rel=1e-4)
    assert found.lowest == pytest.approx(min(v[0] for v in values), abs=2e-3 * max(moduli))
    assert found.H.value == 0
    assert not found.gamma.certain
    assert f"{min(moduli):.2g}" in found.gamma.how
    assert "estimated at 3 points, a lower bound" in found.gamma.how
    assert found.gamma.uncertainty is not None
    assert found.gamma.uncertainty <= 1e-3 * found.gamma.value


def test_relu_networks_are_no_quadratics() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    one = make(model, LOSSES["mse"], real())
    assert curvature(one, [near(one, 1)]).kind == "network"


def test_the_thinned_share_serves_networks_alone() -> None:
    torch.manual_seed(2)
    one = make(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), LOSSES["mse"], real())
    few = Objective(one.model, one.loss_fn, one.samples, 0.0, 7, np.arange(3))
    x = near(one, 1)
    found = curvature(one, [x], thinned=few)
    assert found.gamma.value == pytest.approx(np.abs(eigenvalues(few, x)).max(), rel=1e-4)
    line = make(nn.Linear(4, 3), LOSSES["mse"], real())
    part = Objective(line.model, line.loss_fn, line.samples, 0.0, 7, np.arange(3))
    assert curvature(line, [], thinned=part) == curvature(line, [])


def test_which_models_are_linear() -> None:
    layer = nn.Linear(2, 2)
    assert linear_layer(layer) is layer
    assert linear_layer(nn.Sequential(nn.Flatten(), layer)) is layer
    assert linear_layer(networks.logistic((2,), 2)) is not None
    for other in (
        nn.Sequential(layer, nn.Linear(2, 2)), nn.Sequential(layer, nn.ReLU()), nn.ReLU(),
        nn.Sequential(), nn.Sequential(nn.ReLU(), layer), Quadratic(2),
    ):  # fmt: skip
        assert linear_layer(other) is None
    layer.bias.requires_grad_(False)
    assert linear_layer(layer) is None

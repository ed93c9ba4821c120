"""Made-up data: what the distributions are, that agents have their own, and bad settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mpicdsgd.common.errors import UserError
from mpicdsgd.data import Data, DataConfig, Shuffler, load, load_everyone
from mpicdsgd.models.build import ModelConfig, build
from mpicdsgd.models.losses import loss_function
from mpicdsgd.simulation.minibatches import Together


def data(name: str, rank: int, size: int, seed: int = 0, **args: Any) -> Data:
    return load(DataConfig(name, partition="contiguous", args=args), seed, rank, size)


def samples(one: Data) -> tuple[Any, Any]:
    inputs, targets = one.train.batch(np.arange(len(one.train)))
    return inputs.numpy(), targets.numpy()


@pytest.mark.parametrize(("name", "args"), [
    ("gaussians", {"samples": 7}), ("linear", {"samples": 7}), ("points", {"samples": 7}),
])  # fmt: skip
def test_an_agents_samples_depend_on_seed_and_agent_alone(name: str, args: dict[str, Any]) -> None:
    args["heterogeneity"] = 1.0
    few, many = samples(data(name, 2, 3, **args)), samples(data(name, 2, 9, **args))
    for a, b in zip(few, many, strict=True):
        assert len(a) == 7
        assert (a == b).all()
    assert (samples(data(name, 1, 3, **args))[0] != few[0]).any()
    assert (samples(data(name, 2, 3, seed=1, **args))[0] != few[0]).any()
    assert data(name, 0, 3, **args).shares == (7, 7, 7)


def test_gaussians() -> None:
    """Means of classes are the agent's, the deviation is the noise, classes equally frequent."""
    args = {"samples": 20_000, "features": 4, "classes": 3, "noise": 0.5, "heterogeneity": 2.0}
    one, other = data("gaussians", 0, 2, **args), data("gaussians", 1, 2, **args)
    assert (one.classes, one.input_shape) == (3, (4,))
    means = []
    for x, y in (samples(one), samples(other)):
        assert np.bincount(y) / len(y) == pytest.approx(np.full(3, 1 / 3), abs=0.02)
        of_class = np.array([x[y == c].mean(axis=0) for c in range(3)])
        assert (x - of_class[y]).std(axis=0) == pytest.approx(np.full(4, 0.5), rel=0.03)
        means.append(of_class)
    assert np.abs(means[0] - means[1]).max() > 1
    alike = [samples(data("gaussians", j, 2, **{**args, "heterogeneity": 0.0})) for j in range(2)]
    same = [np.array([x[y == c].mean(axis=0) for c in range(3)]) for x, y in alike]
    assert same[0] == pytest.approx(same[1], abs=0.05)


def test_the_test_set_is_of_all_agents() -> None:
    """Ten samples of three agents' distributions: four, three, three."""
    args = {"samples": 1, "features": 2, "noise": 0.0, "heterogeneity": 5.0, "test_samples": 10,
            "classes": 2}  # fmt: skip
    x, y = data("gaussians", 0, 3, **args).test.batch(np.arange(10))
    for j, part in enumerate((slice(0, 4), slice(4, 7), slice(7, 10))):
        ours, label = samples(data("gaussians", j, 3, **{**args, "samples": 20}))
        for u, c in zip(x[part].numpy(), y[part].tolist(), strict=True):
            assert u == pytest.approx(ours[label == c][0], rel=1e-6)


def test_linear() -> None:
    """Least squares find w + delta_j, of about the size 1 / sqrt(features) each, and the noise."""
    args = {"samples": 5000, "features": 16, "noise": 0.3, "heterogeneity": 1.0}
    found = []
    for j in range(2):
        u, y = samples(data("linear", j, 2, **args))
        assert y.shape == (5000, 1)
        w, (rest,), *_ = np.linalg.lstsq(u.astype(np.float64), y[:, 0], rcond=None)
        assert np.sqrt(rest / 5000) == pytest.approx(0.3, rel=0.05)
        found.append(w)
    assert 0.5 < np.linalg.norm(found[0]) < 3
    assert np.linalg.norm(found[0] - found[1]) > 0.5
    assert data("linear", 0, 2).classes is None


def test_points() -> None:
    """One point each; the test set is all of them; the model's loss is |x - b|^2 / 2."""
    points = np.concatenate([samples(data("points", j, 4, features=3))[1] for j in range(4)])
    one = data("points", 2, 4, features=3)
    _, targets = one.test.batch(np.arange(4))
    assert (targets.numpy() == points).all()
    model = build(ModelConfig("quadratic"), one.input_shape, one.classes)
    (x,) = model.parameters()
    assert x.shape == (3,)
    with torch.no_grad():
        x.copy_(torch.tensor([1.0, -2.0, 0.5]))
    inputs, b = one.train.batch(np.arange(1))
    loss = loss_function(ModelConfig(loss="least_squares"))(model(inputs), b)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * float(((x.detach() - b[0]) ** 2).sum()), rel=1e-6)
    assert x.grad is not None
    assert torch.allclose(x.grad, x.detach() - b[0])


def test_least_squares_is_the_mean_over_samples_only() -> None:
    outputs, targets = (
        torch.tensor([[1.0, 2.0], [3.0, 5.0]]),
        torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
    )
    loss = loss_function(ModelConfig(loss="least_squares"))
    assert float(loss(outputs, targets)) == 0.5 * (1 + 4 + 4 + 16) / 2
    assert float(loss(outputs, torch.tensor([1, 0]))) == 0.5 * (1 + 1 + 4 + 25) / 2
    with pytest.raises(UserError, match=r'model\.loss = "least_squares": outputs of shape'):
        loss(outputs, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gaussians", {"classes": 1}, "data.args.classes = 1: it must be a whole number >= 2"),
        ("gaussians", {"samples": True}, "data.args.samples = True: it must be a whole number"),
        ("linear", {"classes": 3}, 'data.args.classes: data.name = "linear" takes samples'),
        ("linear", {"noise": float("inf")}, "it must be a finite number >= 0"),
        ("points", {"featurs": 3}, "did you mean features"),
    ],
)
def test_bad_settings(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data(name, 0, 2, **args)


def test_own_distributions_are_not_shuffled_together() -> None:
    args = {"heterogeneity": 0.5}
    with pytest.raises(UserError, match=r"has samples of each agent's own: set data.partition"):
        load(DataConfig("linear", args=args), 0, 0, 2)
    load(DataConfig("linear", args=args), 0, 0, 1)
    load(DataConfig("linear", partition="iid"), 0, 0, 2)
    with pytest.raises(UserError, match=r"leave data\.limit"):
        load(DataConfig("linear", partition="contiguous", limit=10, args=args), 0, 0, 2)


@pytest.mark.parametrize("partition", ["iid", "dirichlet:2.0"])
def test_together_is_what_each_would_take(partition: str) -> None:
    """Shares, orders and minibatches are those of `load` and `Shuffler`."""

    config = DataConfig("gaussians", partition=partition, batch_size=3, limit=97,
                        args={"classes": 3})  # fmt: skip
    together = Together(load_everyone(config, 5, 4), 3, 5, False)
    for j in range(4):
        own = load(config, 5, j, 4)
        assert together.shares == own.shares
        shuffler = Shuffler(own.shares, j, 3, 5)
        assert together.steps_per_epoch == shuffler.steps_per_epoch
        for epoch in (0, 1):
            for position, batch in enumerate(shuffler.batches(epoch)):
                (group,) = together.minibatches(epoch, position, range(j, j + 1))
                inputs, targets = own.train.batch(batch)
                assert group.agents.tolist() == [j]
                assert torch.equal(group.inputs[0], inputs)
                assert torch.equal(group.targets[0], targets)

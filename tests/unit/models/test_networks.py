"""The models and losses."""

import sys
import types

import pytest
import torch
from torch import nn

from mpicdsgd.common.errors import UserError
from mpicdsgd.models.build import MODELS, ModelConfig, build
from mpicdsgd.models.losses import loss_function


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        # By hand: kernel sizes times channels plus biases, layer by layer, of the description.
        ("cnn", (3, 32, 32), 896 + 9248 + 18496 + 36928 + 4096 * 512 + 512 + 5130),
        ("cnn", (1, 28, 28), 320 + 9248 + 18496 + 36928 + 3136 * 512 + 512 + 5130),
        (
            "big-cnn",
            (3, 32, 32),
            (1792 + 2 * 36928)
            + (73856 + 2 * 147584)
            + (295168 + 2 * 590080)
            + (4096 * 512 + 512 + 512 * 512 + 512 + 5130),
        ),
        ("fcn", (1, 28, 28), 784 * 50 + 50 + 19 * 2550 + 510),
        ("logistic", (1, 28, 28), 7850),
        ("mlp", (1, 8, 8), 64 * 256 + 256 + 256 * 128 + 128 + 1290),
        ("resnet20", (3, 32, 32), 269_722),  # 0.27 million in He et al., table 6
    ],
)
def test_parameter_counts(name, shape, parameters):
    assert count(build(ModelConfig(name), shape, 10)) == parameters


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 13)])
def test_logits_and_a_gradient_everywhere(name, shape):
    torch.manual_seed(0)
    model = build(ModelConfig(name), shape, 7)
    outputs = model(torch.randn(4, *shape))
    assert outputs.shape == (4, 7)
    loss_function(ModelConfig())(outputs, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if name not in ("linear", "logistic", "quadratic"):  # all zero at the start
        assert (outputs < 0).any()  # neither ReLU nor softmax at the end


def test_the_authors_layers_in_order():
    def names(model):
        return [type(layer).__name__ for layer in model]

    block = ["Conv2d", "ReLU"]
    assert names(build(ModelConfig("cnn"), (3, 32, 32), 10)) == [
        *(2 * [*block, *block, "MaxPool2d", "Dropout"]),
        *["Flatten", "Linear", "ReLU", "Linear"],
    ]
    big = build(ModelConfig("big-cnn"), (3, 32, 32), 10)
    assert names(big) == [
        *(3 * [*block, *block, *block, "MaxPool2d", "Dropout"]),
        *["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"],
    ]
    assert {layer.p for layer in big if isinstance(layer, nn.Dropout)} == {0.5}
    layers = [m for m in build(ModelConfig("fcn"), (4,), 10) if isinstance(m, nn.Linear)]
    assert [layer.out_features for layer in layers] == [50] * 20 + [10]


def test_keras_initialisation():
    model = build(ModelConfig("cnn"), (3, 32, 32), 10)
    conv = model[0]
    bound = (6 / (9 * 3 + 9 * 32)) ** 0.5
    assert 0.9 * bound < conv.weight.abs().max() <= bound
    assert not conv.bias.any()


def test_resnet_shortcut_is_option_a():
    block = build(ModelConfig("resnet20"), (3, 8, 8), 10)[6]  # the first of stage two
    block.eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_arguments():
    assert count(build(ModelConfig("mlp", args={"hidden": [5]}), (2,), 3)) == 15 + 18
    assert (
        build(ModelConfig("mlp", args={"outputs": 4}), (2,), None)(torch.ones(1, 2)).shape[1] == 4
    )
    assert build(ModelConfig("cnn", args={"dropout": 0}), (1, 8, 8), 3)[5].p == 0


@pytest.mark.parametrize(
    ("config", "shape", "classes", "message"),
    [
        ({"name": "resnet"}, (3, 32, 32), 10, "not known: did you mean resnet20"),
        (
            {"name": "mlp", "args": {"hiden": [3]}},
            (3,),
            10,
            "mean hidden.; it takes outputs, hidden",
        ),
        ({"name": "mlp", "args": {"hidden": "wide"}}, (3,), 10, "a list of positive integers"),
        ({"name": "mlp", "args": {"hidden": [3, 0]}}, (3,), 10, "a list of positive integers"),
        ({"name": "cnn", "args": {"dropout": 1}}, (3, 32, 32), 10, "a number in"),
        ({"name": "cnn", "args": {"input_shape": 3}}, (3, 32, 32), 10, "no argument input_shape"),
        ({"name": "cnn"}, (64,), 10, r"shape \(64,\): use mlp or logistic"),
        ({"name": "big-cnn"}, (3, 7, 32), 10, "at least 8x8 pixels"),
        ({"name": "resnet20"}, (3, 3, 3), 10, "at least 4x4 pixels"),
        ({"name": "mlp"}, (3,), None, "set model.args.outputs"),
        ({"name": "mlp", "args": {"outputs": 9}}, (3,), 10, "an integer >= 10"),
        ({"name": "mlp", "args": {"outputs": "ten"}}, (3,), 10, "an integer >= 10"),
        ({"name": "mlp", "buffers": "shared"}, (3,), 10, "must be local or mixed"),
    ],
)
def test_bad_configs(config, shape, classes, message):
    with pytest.raises(UserError, match=message):
        build(ModelConfig(**config), shape, classes)


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("users_models")
    module.make = lambda width, depth=1: nn.Linear(width, depth)
    module.lazy = lambda: nn.LazyLinear(3)
    module.text = lambda: "no module"
    module.loss = lambda outputs, targets: outputs.sum()
    monkeypatch.setitem(sys.modules, "users_models", module)


@pytest.mark.usefixtures("own")
def test_own_factory_and_loss():
    model = build(ModelConfig("users_models:make", args={"width": 4}), (9,), 10)
    assert model.weight.shape == (1, 4)
    loss = loss_function(ModelConfig(loss="users_models:loss"))
    assert loss(torch.ones(2, 2), torch.zeros(2)) == 4


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_models:make", "also needs width; it takes width, depth"),
        ("users_models:text", "must return a torch.nn.Module, got a str"),
        ("users_models:lazy", "has lazy parameters"),
        ("users_models:mak", "did you mean make"),
    ],
)
def test_bad_own_factories(name, message):
    with pytest.raises(UserError, match=message):
        build(ModelConfig(name), (9,), 10)


def test_mse():
    mse = loss_function(ModelConfig(loss="mse"))
    outputs = torch.tensor([[1.0], [2.0], [4.0]])
    # (3, 1) against (3,) would broadcast to (3, 3).
    assert mse(outputs, torch.tensor([1.0, 3.0, 2.0])).item() == pytest.approx(5 / 3)
    labels = torch.tensor([1, 0])
    logits = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    assert mse(logits, labels).item() == pytest.approx(0.25 / 4)
    with pytest.raises(UserError, match="do not fit targets of shape"):
        mse(outputs, torch.zeros(2))


def test_cross_entropy():
    cross_entropy = loss_function(ModelConfig())
    logits = torch.tensor([[1.0, 2.0], [0.0, 0.5]])
    labels = torch.tensor([1, 0])
    expected = -torch.log(torch.softmax(logits, 1)[[0, 1], labels]).mean()
    assert cross_entropy(logits, labels).item() == pytest.approx(expected.item())
    one_hot = nn.functional.one_hot(labels).float()
    assert cross_entropy(logits, one_hot).item() == pytest.approx(expected.item())
    with pytest.raises(UserError, match="needs class labels"):
        cross_entropy(logits, torch.tensor([1.0, 0.0]))


def test_unknown_loss():
    with pytest.raises(UserError, match="did you mean cross_entropy"):
        loss_function(ModelConfig(loss="crossentropy"))

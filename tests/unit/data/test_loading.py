"""From the config to an agent's samples: digits, the user's own function, limits, errors."""

import importlib.machinery
import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from mpicdsgd.common.errors import UserError
from mpicdsgd.data import DataConfig, digits, load

HERE = __name__.replace(".", "_") + "_plugin"


@pytest.fixture
def own(monkeypatch):
    """Make a data function importable; gives its config from (function, **config)."""
    spec = importlib.machinery.ModuleSpec(HERE, None)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, HERE, module)

    def config(function, **rest):
        module.make = function
        return DataConfig(name=f"{HERE}:make", **({"partition": "contiguous"} | rest))

    return config


X, Y = np.arange(24.0).reshape(12, 2), np.arange(12) % 3
DATASET = TensorDataset(torch.tensor(X, dtype=torch.float32), torch.tensor(Y))


def test_digits(monkeypatch):
    pytest.importorskip("sklearn")
    parts = [load(DataConfig(name="digits"), 0, rank, 5) for rank in range(5)]
    data = parts[0]
    assert (sum(data.shares), len(data.test)) == (1437, 360)
    assert (data.classes, data.input_shape) == (10, (1, 8, 8))
    assert all(len(p.train) == p.shares[rank] for rank, p in enumerate(parts))
    assert all(p.shares == data.shares for p in parts)
    x, y = data.test.batch(np.arange(360))
    assert (x.min(), x.max()) == (0, 1)
    assert set(y.tolist()) == set(range(10))
    # Train and test together are scikit-learn's set, and the run's seed does not change the split.
    from sklearn.datasets import load_digits

    rows = [r.tobytes() for p in parts for r in p.train.batch(np.arange(len(p.train)))[0].numpy()]
    rows += [r.tobytes() for r in x.numpy()]
    expected = (load_digits().images / 16).astype(np.float32)
    assert sorted(rows) == sorted(r.tobytes() for r in expected)
    assert torch.equal(load(DataConfig(name="digits"), 1, 0, 1).test.batch(np.arange(360))[0], x)
    # As does a scikit-learn that keeps the file elsewhere.
    monkeypatch.setattr(digits, "FILE", "elsewhere")
    assert torch.equal(load(DataConfig(name="digits"), 1, 0, 1).test.batch(np.arange(360))[0], x)


def test_digits_need_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"digits.*pip install .mpicdsgd\[demo\]"):
        load(DataConfig(name="digits"), 0, 0, 1)


def test_limits(own):
    config = own(lambda path, seed: ((X, Y), (X, Y)), limit=5, test_limit=3)
    data = load(config, 0, 1, 2)
    assert (data.shares, len(data.test), data.classes) == ((3, 2), 3, 3)
    assert data.train.batch(np.arange(2))[0].tolist() == X[3:5].tolist()
    assert load(own(lambda path, seed: ((X, Y), (X, Y)), limit=99), 0, 0, 1).shares == (12,)


def test_own_arrays_get_path_seed_and_args(own):
    def make(path, seed, *, scale):
        assert (path, seed) == ("some/where", 4)
        return (X * scale, Y), (torch.tensor(X), torch.tensor(Y))

    data = load(own(make, path="some/where", args={"scale": 2}), 4, 0, 1)
    inputs, targets = data.train.batch(np.array([4]))
    assert (inputs.tolist(), targets.tolist()) == ([[16.0, 18.0]], [1])
    assert inputs.dtype == torch.float32
    assert (data.classes, data.input_shape) == (3, (2,))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(Subset(d, range(12)), range(12))])
def test_own_torch_datasets(own, wrap):
    data = load(
        own(lambda path, seed: (wrap(DATASET), wrap(DATASET)), partition="by-class"), 0, 1, 3
    )
    inputs, targets = data.train.batch(np.arange(4))
    assert (data.classes, data.input_shape, data.shares) == (3, (2,), (4, 4, 4))
    assert targets.tolist() == [1, 1, 1, 1]
    assert inputs.tolist() == X[Y == 1].tolist()
    assert len(data.test) == 12


def test_torch_dataset_with_targets_like_torchvisions(own):
    pairs = [(X[i], int(Y[i])) for i in range(12)]

    class Listed(list):
        targets = Y.tolist()

    def make(path, seed):
        return Listed(pairs), pairs

    assert load(own(make, partition="by-class"), 0, 0, 3).shares == (4, 4, 4)
    Listed.targets = [[1], [2, 3]]  # not labels: then there are none
    assert load(own(make), 0, 0, 3).classes is None
    assert load(own(make, args={"classes": 3}), 0, 0, 3).classes == 3
    with pytest.raises(UserError, match="needs class labels"):
        load(own(make, partition="by-class"), 0, 0, 3)


def test_classes_goes_to_a_function_that_takes_it(own):
    seen = []

    def make(path, seed, classes):
        seen.append(classes)
        return (X, Y), (X, Y)

    assert load(own(make, args={"classes": 5}), 0, 0, 1).classes == 5
    assert seen == [5]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"must return \(train, test\), got a NoneType"),
        ((DATASET, iter(DATASET)), "test is a .*; it must be a torch dataset"),
        ((DATASET, (X, Y)), "test is a tuple; it must be a torch dataset"),
        ((DATASET, []), "test holds no samples"),
        (((X, Y[:5]), (X, Y)), r"train has inputs of shape \(12, 2\) and targets of shape \(5,\)"),
        (((X[:0], Y[:0]), (X, Y)), "train holds no samples"),
        (((X, Y), (X[:, :1], Y)), r"a training input has the shape \(2,\), a test input \(1,\)"),
        (((X * np.nan, Y), (X, Y)), "train: sample 0 has an input that is not a finite float32"),
        (((X.astype(str), Y), (X, Y)), "inputs must be numbers"),
        (((X, Y - 1), (X, Y)), "label -1 of sample 0"),
        (([1, 2, 3], [1, 2, 3]), "items must be pairs"),
    ],
)
def test_what_an_own_function_must_return(own, result, message):
    with pytest.raises(UserError, match=message):
        load(own(lambda path, seed: result), 0, 0, 1)


def test_args_that_an_own_function_does_not_take(own):
    def make(path, seed, size=3):
        return (X, Y), (X, Y)

    with pytest.raises(UserError, match=r"data\.args: make has no argument sizes"):
        load(own(make, args={"sizes": 3}), 0, 0, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "mnsit"}, "did you mean mnist"),
        ({"name": "digits", "args": {"x": 1}}, "takes no data.args"),
        ({"name": "digits", "batch_size": 0}, "must be at least 1"),
        ({"name": "digits", "limit": -1}, "must not be negative"),
        ({"name": "digits", "workers": -1}, "must not be negative"),
        ({"name": "digits", "limit": 1}, "1 training samples are too few for 2 agents"),
        ({"name": "nowhere.at.all:f"}, "no module nowhere"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(UserError, match=message):
        load(DataConfig(**config), 0, 0, 2)


def test_negative_seed():
    with pytest.raises(UserError, match=r"run\.seed = -1"):
        load(DataConfig(name="digits"), -1, 0, 2)

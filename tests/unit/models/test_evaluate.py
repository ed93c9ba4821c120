"""Loss and accuracy of a model on a set."""

import numpy as np
import pytest
import torch
from torch import nn

from mpicdsgd.data.samples import ArraySamples
from mpicdsgd.models.build import ModelConfig
from mpicdsgd.models.evaluate import evaluate
from mpicdsgd.models.losses import loss_function

N = 23


def classification():
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    return model, ArraySamples(x, np.arange(N) % 4)


CROSS_ENTROPY = loss_function(ModelConfig())
MSE = loss_function(ModelConfig(loss="mse"))


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
@pytest.mark.parametrize("indices", [None, np.array([3, 3, 20]), np.arange(7, 19)])
def test_sums_over_samples(batch_size, indices):
    model, samples = classification()
    rows = np.arange(N) if indices is None else indices
    model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(samples.inputs[rows])).double()
    labels = samples.targets[rows]
    log_p = torch.log_softmax(logits, 1)
    expected = -sum(log_p[i, label].item() for i, label in enumerate(labels))
    model.train()
    loss_sum, correct, count = evaluate(model, samples, CROSS_ENTROPY, batch_size, indices)
    assert loss_sum == pytest.approx(expected, rel=1e-5)
    assert correct == sum(logits.argmax(1).numpy() == labels)
    assert count == len(rows)
    assert (type(loss_sum), type(correct), type(count)) == (float, int, int)


def test_leaves_everything_as_it_was():
    model, samples = classification()
    model[1].eval()  # a frozen BatchNorm in a training model
    flags = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    evaluate(model, samples, CROSS_ENTROPY, 4)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


class Noisy(nn.Module):
    """Draws random numbers in eval mode, too."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


def test_random_state_is_put_back_even_so():
    _, samples = classification()
    rng = torch.get_rng_state()
    evaluate(Noisy(), samples, CROSS_ENTROPY, 4)
    assert torch.equal(torch.get_rng_state(), rng)


class Failing(nn.Module):
    def forward(self, x):
        raise ZeroDivisionError


def test_flags_are_restored_after_an_exception():
    _, samples = classification()
    model = Failing().train()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, samples, CROSS_ENTROPY, 4)
    assert model.training


def test_no_accuracy_for_regression():
    x = np.arange(5, dtype=np.float32)[:, None]
    samples = ArraySamples(x, (2 * x).astype(np.float32))
    loss_sum, correct, count = evaluate(nn.Identity(), samples, MSE, 2)
    assert (loss_sum, correct, count) == (30.0, -1, 5)


def test_no_accuracy_for_labels_without_logits():
    samples = ArraySamples(np.zeros((4, 1), np.float32), np.zeros(4, np.int64))
    assert evaluate(nn.Flatten(0), samples, lambda o, t: o.mean(), 2)[1] == -1


def test_no_samples():
    model, samples = classification()
    assert evaluate(model, samples, CROSS_ENTROPY, 4, np.array([], np.int64)) == (0.0, 0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_gpu_gives_what_the_host_gives(batch_size):
    model, samples = classification()
    expected = evaluate(model, samples, CROSS_ENTROPY, batch_size)
    model.to("cuda:0")
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    loss_sum, correct, count = evaluate(model, samples, CROSS_ENTROPY, batch_size)
    evaluate(nn.Sequential(model, Noisy()), samples, CROSS_ENTROPY, batch_size)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert loss_sum == pytest.approx(expected[0], rel=1e-5)
    assert (correct, count) == expected[1:]

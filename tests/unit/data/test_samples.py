"""Batches from arrays and from torch datasets."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mpicdsgd.common.errors import UserError
from mpicdsgd.data.samples import ArraySamples, DatasetSamples


class Augmented(Dataset):
    """Item i is i plus noise from each of the three global generators."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        noise = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor([float(i), *noise]), i % 3


class Fails(Augmented):
    def __getitem__(self, i):
        return "no pair" if i == 4 else super().__getitem__(i)


PARTS = [np.array([3, 1]), np.array([0, 2, 5]), np.array([4])]


def global_states():
    return (
        torch.get_rng_state().tolist(),
        [np.asarray(part).tolist() for part in np.random.get_state()],
        random.getstate(),
    )


def equal(some, others):
    pairs = list(zip(some, others, strict=True))
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


def test_arrays():
    x = np.arange(24, dtype=np.uint8).reshape(4, 2, 3, 1)
    samples = ArraySamples(x, np.arange(4), mean=(1.0, 2.0), std=(4.0,))
    inputs, targets = samples.batch(np.array([2, 0]))
    expected = (x[[2, 0]] - np.array([1.0, 2.0])[:, None, None]) / 4
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(inputs.numpy(), expected)
    np.testing.assert_array_equal(targets.numpy(), [2, 0])
    assert equal(samples.batches([np.array([2, 0])]), [(inputs, targets)])


def test_a_batch_of_arrays_is_a_copy():
    x = np.zeros((3, 2), np.float32)
    inputs, _ = ArraySamples(x, np.arange(3), mean=(1.0,)).batch(np.arange(3))
    inputs += 5
    assert not x.any()


def test_datasets_items_are_mapped_and_cast():
    samples = DatasetSamples(Augmented(), np.array([7, 9, 11]))
    inputs, targets = samples.batch(np.array([2, 0]))
    assert len(samples) == 3
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert inputs[:, 0].tolist() == [11, 7]
    assert targets.tolist() == [11 % 3, 7 % 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_arguments_only(workers):
    items = np.arange(20)
    expected = [DatasetSamples(Augmented(), items, seed=1).batch(part) for part in PARTS]
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    before = global_states()
    samples = DatasetSamples(Augmented(), items, seed=1, workers=workers)
    assert equal(samples.batches(PARTS), expected)
    assert equal(samples.batches(PARTS[1:]), expected[1:])  # as after a restart
    assert global_states() == before
    assert not equal(samples.batches(PARTS, epoch=1), expected)
    assert not equal(DatasetSamples(Augmented(), items, 2, workers).batches(PARTS), expected)


def test_an_abandoned_loader_ends():
    batches = DatasetSamples(Augmented(), np.arange(20), workers=2).batches(PARTS * 5)
    next(batches)
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_that_is_no_pair(workers):
    samples = DatasetSamples(Fails(), np.arange(20), workers=workers)
    with pytest.raises(UserError, match=r"^the dataset's items must be pairs .* got a str$"):
        list(samples.batches(PARTS))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(torch.zeros(2), 0), (torch.zeros(3), 0)], "cannot be made into a batch"),
        ([(object(), 0), (object(), 0)], "cannot be made into a batch"),
        ([("text", 0), ("text", 1)], "must be pairs of tensors"),
    ],
)
def test_items_that_do_not_collate(items, message):
    with pytest.raises(UserError, match=message) as caught:
        DatasetSamples(items, np.arange(2)).batch(np.arange(2))
    assert "\n" not in str(caught.value)


def test_float_targets_stay_float():
    samples = DatasetSamples([(1.0, 0.5), (2.0, 1.5)], np.arange(2))
    inputs, targets = samples.batch(np.arange(2))
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.float32)
    assert targets.tolist() == [0.5, 1.5]

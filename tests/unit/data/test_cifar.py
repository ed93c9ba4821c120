"""The reader of CIFAR's binary version, on files made here in that format."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.data import DataConfig, load

EACH = 4


def write_cifar10(where, seed=0):
    """Write five batches and a test batch of EACH records; return labels and images."""
    random = np.random.default_rng(seed)
    where.mkdir(exist_ok=True)
    labels = random.integers(0, 10, (6, EACH), np.uint8)
    images = random.integers(0, 256, (6, EACH, 3, 32, 32), np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        records = np.concatenate([labels[i, :, None], images[i].reshape(EACH, -1)], axis=1)
        (where / name).write_bytes(records.tobytes())
    return labels, images


def write_cifar100(where):
    random = np.random.default_rng(0)
    where.mkdir(exist_ok=True)
    made = []
    for name, count in (("train.bin", 5 * EACH), ("test.bin", EACH)):
        labels = random.integers(0, [20, 100], (count, 2)).astype(np.uint8)
        images = random.integers(0, 256, (count, 3 * 1024), np.uint8)
        (where / name).write_bytes(np.concatenate([labels, images], axis=1).tobytes())
        made.append((labels, images.reshape(-1, 3, 32, 32)))
    return made


def read(name, path, **config):
    config = {"partition": "contiguous", "normalize": False} | config
    return load(DataConfig(name=name, path=str(path), **config), seed=0, rank=0, size=1)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, below):
    labels, images = write_cifar10(tmp_path / below)
    data = read("cifar10", tmp_path)
    assert (data.classes, data.input_shape) == (10, (3, 32, 32))
    for samples, part in ((data.train, slice(0, 5)), (data.test, slice(5, 6))):
        x, y = samples.batch(np.arange(len(samples)))
        np.testing.assert_array_equal(y.numpy(), labels[part].ravel())
        np.testing.assert_allclose(x.numpy(), images[part].reshape(-1, 3, 32, 32) / 255, rtol=1e-6)


@pytest.mark.parametrize("below", ["", "cifar-100-binary"])
def test_cifar100_takes_the_fine_label(tmp_path, below):
    (labels, images), (test_labels, _) = write_cifar100(tmp_path / below)
    data = read("cifar100", tmp_path)
    assert (data.classes, len(data.train), len(data.test)) == (100, 5 * EACH, EACH)
    x, y = data.train.batch(np.arange(len(data.train)))
    np.testing.assert_array_equal(y.numpy(), labels[:, 1])
    np.testing.assert_allclose(x.numpy(), images / 255, rtol=1e-6)
    np.testing.assert_array_equal(data.test.batch(np.arange(EACH))[1].numpy(), test_labels[:, 1])


def test_normalised_per_channel(tmp_path):
    _, images = write_cifar10(tmp_path)
    x, _ = read("cifar10", tmp_path, normalize=True).train.batch(np.array([5]))
    mean = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
    std = np.array([0.2470, 0.2435, 0.2616])[:, None, None]
    np.testing.assert_allclose(x[0].numpy(), (images[1, 1] / 255 - mean) / std, atol=1e-5)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"data_batch_1.bin|test_batch.bin"):
        read("cifar10", tmp_path)
    write_cifar10(tmp_path)
    third = tmp_path / "data_batch_3.bin"
    good = third.read_bytes()
    for bad, message in (
        (None, "has no data_batch_3.bin"),
        (b"", "is truncated or not CIFAR-10: 0 bytes"),
        (good[:-1], "are not a whole number of records of 3073 bytes"),
        (good[:-3073], "holds 3 images and test_batch.bin 4"),
        (good + good[:3073], "holds 5 images and test_batch.bin 4"),
        (b"\x0a" + good[1:], "label 10 of sample 0 is not in 0 .. 9"),
    ):
        third.unlink()
        if bad is not None:
            third.write_bytes(bad)
        with pytest.raises(UserError, match=message) as caught:
            read("cifar10", tmp_path)
        assert "data_batch_3.bin" in str(caught.value)
        third.write_bytes(good)


def test_cifar100_checks_both_labels_and_the_proportion(tmp_path):
    write_cifar100(tmp_path)
    train = tmp_path / "train.bin"
    good = train.read_bytes()
    for bad, message in (
        (b"\x14" + good[1:], "label 20 of sample 0 is not in 0 .. 19"),
        (good[:1] + b"\x64" + good[2:], "label 100 of sample 0 is not in 0 .. 99"),
        (good[:-3074], "holds 19 images and test.bin 4, .*five times"),
    ):
        train.write_bytes(bad)
        with pytest.raises(UserError, match=message):
            read("cifar100", tmp_path)


@settings(max_examples=50, deadline=None)
@given(
    cut=st.integers(1, EACH * 3073), file=st.sampled_from(["data_batch_2.bin", "test_batch.bin"])
)
def test_any_cut_is_a_user_error(tmp_path_factory, cut, file):
    where = tmp_path_factory.getbasetemp() / "cut"
    write_cifar10(where)
    (where / file).write_bytes((where / file).read_bytes()[:-cut])
    with pytest.raises(UserError, match=file):
        read("cifar10", where)

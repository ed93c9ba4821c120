"""The HDF5 reader."""

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.data import DataConfig, hdf5, load

N, SHAPE = 40, (3, 4, 2)


def arrays():
    random = np.random.default_rng(0)
    return {
        "train/x": random.integers(0, 256, (N, *SHAPE), np.uint8),
        "train/y": np.arange(N) % 4,
        "test/x": random.integers(0, 256, (6, *SHAPE), np.uint8),
        "test/y": np.arange(6) % 4,
    }


def write(where, **changes):
    """Write a small good file; a change of value None leaves the dataset out."""
    made = arrays() | {key.replace("_", "/"): value for key, value in changes.items()}
    file = where / "data.h5"
    with h5py.File(file, "w") as root:
        for name, value in made.items():
            if value is not None:
                root[name] = value
    return file


def read(file, rank=0, size=1, **config):
    config = {"batch_size": 2} | config
    return load(DataConfig(name="hdf5", path=str(file), **config), seed=3, rank=rank, size=size)


@pytest.mark.parametrize("partition", ["iid", "contiguous", "by-class", "dirichlet:0.5"])
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_agents_together_have_every_row_once(tmp_path, monkeypatch, partition, block_bytes):
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", block_bytes)
    file = write(tmp_path)
    rows = {}
    for rank in range(3):
        data = read(file, rank, 3, partition=partition)
        assert data.shares[rank] == len(data.train)
        x, y = data.train.batch(np.arange(len(data.train)))
        rows |= {row.tobytes(): int(label) for row, label in zip(x.numpy(), y, strict=True)}
    expected = arrays()
    assert rows == {
        row.astype(np.float32).tobytes(): label
        for row, label in zip(expected["train/x"], expected["train/y"].tolist(), strict=True)
    }


def test_only_own_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", 1)
    file = write(tmp_path)
    read_rows = []
    plain = h5py.Dataset.__getitem__

    def spy(self, key, *args, **kwargs):
        if self.name == "/train/x":
            read_rows.extend(range(key.start, key.stop))
        return plain(self, key, *args, **kwargs)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    read(file, 1, 4, partition="contiguous")
    assert read_rows == list(range(10, 20))


def test_dtypes(tmp_path):
    x = np.linspace(-1, 1, N * 5).reshape(N, 5).astype(">f8")
    targets = np.arange(N * 2.0).reshape(N, 2)
    file = write(tmp_path, train_x=x, test_x=x[:6], train_y=targets, test_y=targets[:6])
    data = read(file, partition="contiguous")
    inputs, y = data.train.batch(np.array([7, 1]))
    assert (data.classes, data.input_shape) == (None, (5,))
    np.testing.assert_array_equal(inputs.numpy(), x[[7, 1]].astype(np.float32))
    np.testing.assert_array_equal(y.numpy(), targets[[7, 1]].astype(np.float32))


def test_labels_in_a_column_and_classes_given(tmp_path):
    file = write(tmp_path, train_y=(np.arange(N) % 4)[:, None].astype(np.uint64))
    assert read(file).classes == 4
    assert read(file, args={"classes": 7}).classes == 7


def test_mean_and_std_in_the_files_units(tmp_path):
    data = read(
        write(tmp_path), partition="contiguous", args={"mean": [1, 2, 3], "std": [2.0, 4.0, 8.0]}
    )
    x, _ = data.train.batch(np.array([9]))
    expected = (arrays()["train/x"][9] - np.array([1, 2, 3])[:, None, None]) / np.array([2, 4, 8])[
        :, None, None
    ]
    np.testing.assert_allclose(x[0].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": None}, "no dataset train/x"),
        ({"train_x": None, "train_y": None, "train": np.arange(3)}, "no dataset train/x|cannot be"),
        ({"test_y": np.arange(5) % 4}, "6 rows in test/x, but 5 in test/y"),
        ({"train_y": np.arange(N) - 1}, r"label -1 of sample 0 is not in"),
        ({"train_y": np.full(N, 10**9)}, "label 1000000000 among 46 samples"),
        ({"train_y": np.full(N, 2**64 - 1, np.uint64)}, "is too large"),
        ({"train_y": np.full(N, np.nan)}, "a target is not a finite float32"),
        ({"test_y": np.arange(6.0)}, "class labels in one of train and test only"),
        ({"train_x": np.full((N, *SHAPE), np.inf)}, "not a finite float32"),
        ({"train_x": np.full((N, *SHAPE), 1e300)}, "sample 0 has an input that is not a finite"),
        ({"train_x": np.zeros((N, 2))}, "has the shape"),
        ({"train_x": np.zeros((N, 2), complex)}, "must be an array of numbers"),
        ({"train_x": [b"text"] * N}, "must be an array of numbers"),
        ({"train_x": 3.0}, "must be an array of numbers"),
        ({"train_x": np.zeros((0, *SHAPE)), "train_y": np.zeros(0, int)}, "holds no samples"),
    ],
)
def test_bad_contents(tmp_path, changes, message):
    file = write(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        read(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"classes": 3}, "label 3 of sample 3 is not in 0 .. 2"),
        ({"classes": "ten"}, "must be a positive integer"),
        ({"mean": [1.0, 2.0]}, "a number or a list of 3"),
        ({"std": 0}, "positive number"),
        ({"clases": 3}, "takes classes, mean, std: did you mean classes?"),
    ],
)
def test_bad_args(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path), args=args)


def test_missing_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.h5"):
        with pytest.raises(UserError, match="no such file; expected an HDF5 file with"):
            read(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_is_a_user_error(tmp_path_factory, data):
    file = write(tmp_path_factory.getbasetemp())
    good = file.read_bytes()
    file.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(UserError, match=r"data\.h5"):
        read(file)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 95), flip=st.integers(1, 255))
def test_a_flip_in_the_superblock_is_a_user_error_or_harmless(tmp_path_factory, at, flip):
    file = write(tmp_path_factory.getbasetemp())
    bad = bytearray(file.read_bytes())
    bad[at] ^= flip
    file.write_bytes(bad)
    try:
        data = read(file, partition="contiguous")
    except UserError:
        return
    x, y = data.train.batch(np.arange(N))
    np.testing.assert_array_equal(x.numpy(), arrays()["train/x"].astype(np.float32))
    np.testing.assert_array_equal(y.numpy(), arrays()["train/y"])

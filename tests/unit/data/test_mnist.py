"""The idx reader, on files made here in MNIST's format and on MNIST itself."""

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.data import DataConfig, load
from mpicdsgd.data.mnist import read_idx

TRAIN, TEST = 12, 5


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(where: Path, joint: str = "-", zipped: bool = False) -> dict[str, np.ndarray]:
    """Write a small MNIST into the folder ``where``; return its arrays by file stem."""
    random = np.random.default_rng(0)
    arrays = {
        "train-images": random.integers(0, 256, (TRAIN, 4, 5), np.uint8),
        "train-labels": np.arange(TRAIN, dtype=np.uint8) % 10,
        "t10k-images": random.integers(0, 256, (TEST, 4, 5), np.uint8),
        "t10k-labels": np.arange(TEST, dtype=np.uint8),
    }
    where.mkdir(exist_ok=True)
    for stem, array in arrays.items():
        name = f"{stem}{joint}idx{array.ndim}-ubyte"
        if zipped:
            (where / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (where / name).write_bytes(idx(array))
    return arrays


def read(where: Path, **config):
    config = {"name": "mnist", "path": str(where), "batch_size": 2} | config
    return load(DataConfig(**config), seed=0, rank=0, size=1)


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_reads_the_four_files(tmp_path, joint, zipped):
    arrays = write_mnist(tmp_path, joint, zipped)
    data = read(tmp_path, partition="contiguous")
    assert (data.classes, data.input_shape, data.shares) == (10, (1, 4, 5), (TRAIN,))
    for samples, split in ((data.train, "train"), (data.test, "t10k")):
        images, labels = samples.batch(np.arange(len(samples)))
        expected = (arrays[f"{split}-images"][:, None] / 255 - 0.1307) / 0.3081
        np.testing.assert_allclose(images.numpy(), expected, atol=1e-5)
        np.testing.assert_array_equal(labels.numpy(), arrays[f"{split}-labels"])


def test_pixels_are_in_0_to_1_without_normalize(tmp_path):
    arrays = write_mnist(tmp_path)
    images, _ = read(tmp_path, normalize=False, partition="contiguous").train.batch(np.array([3]))
    np.testing.assert_allclose(images[0, 0].numpy(), arrays["train-images"][3] / 255, rtol=1e-6)


def test_a_gzip_file_is_known_by_its_contents(tmp_path):
    arrays = write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(gzip.compress(file.read_bytes()))
    np.testing.assert_array_equal(read_idx(file, 3), arrays["train-images"])


def test_bad_paths(tmp_path):
    for path, message in (
        ("", "data.path is empty"),
        ("a\0b", "not a path"),
        (str(tmp_path / "nowhere"), "no such folder"),
        (__file__, "is not a folder"),
        (str(tmp_path), "has no train-images-idx3-ubyte"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "t10k-labels-idx1-ubyte"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="has no t10k-labels-idx1-ubyte"):
        read(tmp_path)


def damage(data: bytes, kind: str) -> bytes:
    return {
        "empty": b"",
        "header only": data[:9],
        "cut short": data[:-1],
        "trailing": data + b"\0",
        "wrong type": data[:2] + b"\x0d" + data[3:],
        "text": b"<html>404</html>",
        "no samples": data[:4] + bytes(12),
        "fewer": idx(np.zeros((TRAIN - 1, 4, 5), np.uint8)),
        "other shape": idx(np.zeros((TRAIN, 5, 4), np.uint8)),
        "cut gzip": gzip.compress(data)[:-3],
        "gzip of noise": b"\x1f\x8b" + bytes(30),
        "damaged gzip": gzip.compress(data)[:20] + b"\xff" * 9 + gzip.compress(data)[29:],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is truncated: 0 bytes"),
        ("header only", "is truncated: 9 bytes"),
        ("cut short", "is truncated: its header says 12 x 4 x 5 = 240 bytes, 239 follow"),
        ("trailing", "has bytes left over"),
        ("wrong type", "begins with 00000d03, not 00000803"),
        ("text", "not an idx file"),
        ("no samples", "holds no samples"),
        ("fewer", "holds 11 images, but .* 12 labels"),
        ("other shape", "training images are 5x4, test images 4x5"),
        ("cut gzip", "is truncated: the compressed data end too early"),
        ("gzip of noise", "cannot be read"),
        ("damaged gzip", "is damaged|cannot be read"),
    ],
)
def test_damaged_images(tmp_path, kind, message):
    write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes(), kind))
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_label_out_of_range(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(TRAIN, 10, np.uint8)))
    with pytest.raises(UserError, match=r"label 10 of sample 0 is not in 0 \.\. 9"):
        read(tmp_path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_header_byte_or_a_cut_is_a_user_error(tmp_path_factory, data):
    where = tmp_path_factory.getbasetemp() / "flips"
    zipped = data.draw(st.booleans())
    arrays = write_mnist(where, zipped=zipped)
    end = ".gz" if zipped else ""
    stem, axes = data.draw(
        st.sampled_from([("train-images", 3), ("train-labels", 1), ("t10k-images", 3)])
    )
    file = where / f"{stem}-idx{axes}-ubyte{end}"
    good = file.read_bytes()
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        at = data.draw(st.integers(0, len(good) - 1 if zipped else 4 + 4 * axes - 1))
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    file.write_bytes(bad)
    try:
        found = read_idx(file, axes)
    except UserError:
        pass
    else:  # in gzip's own header there are bytes that mean nothing here (a time stamp)
        assert zipped
        np.testing.assert_array_equal(found, arrays[stem])
    finally:
        for leftover in where.iterdir():
            leftover.unlink()


def test_mnist_itself():
    root = os.environ.get("MPICDSGD_DATA")
    if not root or not (Path(root) / "mnist").is_dir():
        pytest.skip("set MPICDSGD_DATA to a folder with mnist/ to test on MNIST itself")
    where = Path(root) / "mnist"
    images = read_idx(where / "train-images-idx3-ubyte.gz", 3)
    # The published md5 of the uncompressed file covers its header as well.
    assert hashlib.md5(idx(images)).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"
    data = load(DataConfig(path=str(where), partition="by-class"), seed=0, rank=1, size=5)
    assert data.shares == (12665, 12089, 11263, 12183, 11800)
    images, labels = data.train.batch(np.arange(len(data.train)))
    assert set(labels.tolist()) == {2, 3}
    assert images.shape == (12089, 1, 28, 28)
    assert len(data.test) == 10_000
    normalised, _ = load(DataConfig(path=str(where)), 0, 0, 1).train.batch(np.arange(0, 60000, 3))
    assert abs(float(normalised.mean())) < 0.01
    assert abs(float(normalised.std()) - 1) < 0.01

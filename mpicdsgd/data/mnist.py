"""MNIST in its original format: idx files, compressed or not."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.data.files import first_existing, folder, read
from mpicdsgd.data.source import Source, check_labels, from_arrays

CLASSES = 10
MEAN, STD = 0.1307, 0.3081  # of the training set's pixels in 0..1

EXPECTED = (
    "MNIST's folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, "
    "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each as it is or as .gz"
)


def mnist(path: str, normalize: bool) -> Source:
    """Return the source of the folder ``path``; images (1, rows, columns), pixels / 255.

    Other sets in MNIST's format and of 10 classes (Fashion-MNIST, KMNIST) are read as well.

    Args:
        path: folder of the four files; ``train-images.idx3-ubyte`` and so on will also do.
        normalize: then subtract MNIST's mean 0.1307 and divide by its deviation 0.3081.

    Raises:
        UserError: missing, truncated or damaged files, labels out of range; names the file.

    Source: the format's description at yann.lecun.com/exdb/mnist.
    """
    where = folder(path, EXPECTED)
    train, test = _pair(where, "train"), _pair(where, "t10k")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise UserError(
            f"{where}: training images are {_by(train[0])}, test images {_by(test[0])}: "
            "the files do not belong together"
        )
    mean, std = ((255 * MEAN,), (255 * STD,)) if normalize else ((), (255.0,))
    return from_arrays(train, test, CLASSES, mean, std)


def _pair(where: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images_file = _find(where, f"{split}-images", "idx3-ubyte")
    labels_file = _find(where, f"{split}-labels", "idx1-ubyte")
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{images_file} holds {len(images)} images, but {labels_file} {len(labels)} labels"
        )
    check_labels(labels.astype(np.int64), CLASSES, labels_file)
    return images[:, None], labels.astype(np.int64)


def _find(where: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{joint}{kind}{end}" for joint in "-." for end in ("", ".gz")]
    return first_existing(where, names)


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes in an idx file; read-only, not empty.

    The header: two zero bytes, 8 for "unsigned byte", the number of axes, and each axis's
    length as a big-endian 32-bit integer.
    """
    data = read(path)
    start = 4 + 4 * axes
    if len(data) < start:
        raise UserError(f"{path} is truncated: {len(data)} bytes, and its header alone has {start}")
    magic = bytes((0, 0, 8, axes))
    if data[:4] != magic:
        raise UserError(
            f"{path} is not an idx file of bytes with {axes} axes: "
            f"it begins with {data[:4].hex()}, not {magic.hex()}"
        )
    shape = [int(length) for length in np.frombuffer(data, ">u4", axes, offset=4)]
    expected, found = math.prod(shape), len(data) - start
    if found != expected:
        what = "is truncated" if found < expected else "has bytes left over"
        lengths = " x ".join(map(str, shape))
        raise UserError(
            f"{path} {what}: its header says {lengths} = {expected} bytes, {found} follow"
        )
    if expected == 0:
        raise UserError(f"{path} holds no samples")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _by(images: NDArray[Any]) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"

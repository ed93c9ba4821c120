"""CIFAR-10 and CIFAR-100 in their original binary version."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.data.files import first_existing, folder, read
from mpicdsgd.data.source import Source, check_labels, from_arrays

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Format:
    title: str
    below: str
    train_files: tuple[str, ...]
    test_file: str
    label_bytes: tuple[int, ...]  # classes of each label byte; the last is the label used
    mean: tuple[float, ...]  # per channel, of the training set's pixels in 0..1
    std: tuple[float, ...]


CIFAR10 = _Format(
    title="CIFAR-10",
    below="cifar-10-batches-bin",
    train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test_file="test_batch.bin",
    label_bytes=(10,),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = _Format(
    title="CIFAR-100",
    below="cifar-100-binary",
    train_files=("train.bin",),
    test_file="test.bin",
    label_bytes=(20, 100),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def cifar(format_: _Format, path: str, normalize: bool) -> Source:
    """Return the source of the folder ``path``; images (3, 32, 32), pixels / 255.

    A record is one label byte (CIFAR-100: the coarse label, then the fine one, which is used),
    then 32 x 32 red pixels, green, blue. The files have no header, so a file cut at the end of a
    record shows only in the proportions: like the originals, CIFAR-10's six files must be equally
    long, and CIFAR-100's ``train.bin`` five times as long as its ``test.bin``.

    Args:
        format_: ``CIFAR10`` or ``CIFAR100``.
        path: the folder of the .bin files, or the one above it.
        normalize: then subtract the channel's mean and divide by its deviation.

    Raises:
        UserError: missing, truncated or damaged files, labels out of range; names the file.

    Source: www.cs.toronto.edu/~kriz/cifar.html.
    """
    f = format_
    files = ", ".join([*f.train_files, f.test_file])
    where = folder(path, f"the folder of {f.title}'s binary version ({files})", f.below)
    test_file = first_existing(where, [f.test_file])
    train_files = [first_existing(where, [name]) for name in f.train_files]
    test = _records(test_file, f)
    train = [_records(file, f) for file in train_files]
    of_test = 5 // len(train_files)
    for file, records in zip(train_files, train, strict=True):
        if len(records) != of_test * len(test):
            raise UserError(
                f"{file} holds {len(records)} images and {test_file.name} {len(test)}, but in "
                f"{f.title} it holds {'as many' if of_test == 1 else 'five times as many'}: "
                "one of them is truncated"
            )
    mean, std = (f.mean, f.std) if normalize else ((), (1.0,))
    return from_arrays(
        _split(np.concatenate(train), f),
        _split(test, f),
        f.label_bytes[-1],
        tuple(255 * value for value in mean),
        tuple(255 * value for value in std),
    )


def _records(file: Path, f: _Format) -> NDArray[np.uint8]:
    data = read(file)
    size = len(f.label_bytes) + PIXELS
    if not data or len(data) % size:
        raise UserError(
            f"{file} is truncated or not {f.title}: {len(data)} bytes are not a whole number of "
            f"records of {size} bytes"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    for column, classes in enumerate(f.label_bytes):
        check_labels(records[:, column].astype(np.int64), classes, file)
    return records


def _split(records: NDArray[np.uint8], f: _Format) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    used = len(f.label_bytes)
    return records[:, used:].reshape(-1, 3, 32, 32), records[:, used - 1].astype(np.int64)

"""What a reader hands over: a training set of which only a part is taken, and a test set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.data.samples import ArraySamples, Indices, Samples


@dataclass(frozen=True)
class Source:
    """A data set before it is divided.

    Args:
        train_count: samples in the training set.
        labels: class of every training sample, int64, shape (train_count,); None: no classes,
            or not known.
        classes: number of classes; labels are in 0 .. classes-1.
        train: makes the samples of some of the training set, given by ascending indices; keeps
            nothing of the others.
        test: makes the first so many samples of the test set.
        test_count: samples in the test set.
        input_shape: of one sample.
    """

    train_count: int
    labels: NDArray[np.int64] | None
    classes: int | None
    train: Callable[[Indices], Samples]
    test: Callable[[int], Samples]
    test_count: int
    input_shape: tuple[int, ...]


def from_arrays(
    train: tuple[NDArray[Any], NDArray[Any]],
    test: tuple[NDArray[Any], NDArray[Any]],
    classes: int | None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Source:
    """Return the source of two pairs (inputs, targets) of arrays; see ``ArraySamples``."""

    def take(pair: tuple[NDArray[Any], NDArray[Any]], indices: Indices) -> Samples:
        # Indexing with an array copies, so the whole set can be released.
        return ArraySamples(pair[0][indices], pair[1][indices], mean, std)

    return Source(
        train_count=len(train[0]),
        labels=train[1] if classes is not None else None,
        classes=classes,
        train=lambda indices: take(train, indices),
        test=lambda count: take(test, np.arange(count)),
        test_count=len(test[0]),
        input_shape=train[0].shape[1:],
    )


def check_labels(labels: NDArray[np.int64], classes: int, where: str | Path) -> None:
    """Raise UserError naming the first label that is not in 0 .. classes-1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise UserError(
            f"{where}: label {labels[wrong[0]]} of sample {wrong[0]} is not in 0 .. {classes - 1}"
        )


def as_inputs(inputs: NDArray[Any], where: str | Path) -> NDArray[Any]:
    """Return ``inputs`` as uint8 where they are, else float32; UserError if not finite numbers."""
    if inputs.dtype == np.uint8:
        return inputs
    if inputs.dtype.kind not in "biuf":
        raise UserError(f"{where}: inputs must be numbers, got {inputs.dtype}")
    with np.errstate(over="ignore"):  # what is too large for float32 is found right below
        inputs = inputs.astype(np.float32, copy=False)
    for i in range(0, len(inputs), 4096):
        finite = np.isfinite(inputs[i : i + 4096].reshape(len(inputs[i : i + 4096]), -1)).all(1)
        if not finite.all():
            bad = i + int(np.argmin(finite))
            raise UserError(f"{where}: sample {bad} has an input that is not a finite float32")
    return inputs


def as_targets(targets: NDArray[Any], where: str | Path) -> NDArray[Any]:
    """Return integers of shape (n,) or (n, 1) as labels, int64, shape (n,); all else as float32."""
    if targets.dtype.kind not in "biuf":
        raise UserError(f"{where}: targets must be numbers, got {targets.dtype}")
    if targets.dtype.kind in "biu" and targets.shape in ((len(targets),), (len(targets), 1)):
        if targets.dtype == np.uint64 and len(targets) and targets.max() > np.iinfo(np.int64).max:
            raise UserError(f"{where}: label {targets.max()} is too large")
        return targets.reshape(-1).astype(np.int64, copy=False)
    with np.errstate(over="ignore"):
        targets = targets.astype(np.float32, copy=False)
    if not np.isfinite(targets).all():
        raise UserError(f"{where}: a target is not a finite float32")
    return targets


def count_classes(
    train: NDArray[Any], test: NDArray[Any], given: Any, where: str | Path
) -> int | None:
    """Return the number of classes of checked labels, or None where the targets are not labels.

    Args:
        train: targets as ``as_targets`` gives them; ``test`` likewise.
        given: the user's ``data.args.classes``, or None: one more than the largest label.
        where: for messages.
    """
    if train.dtype != np.int64 or test.dtype != np.int64:
        if train.dtype != test.dtype:
            raise UserError(f"{where}: targets are class labels in one of train and test only")
        return None
    if given is None:
        classes = 1 + max(int(train.max(initial=0)), int(test.max(initial=0)))
        if classes > len(train) + len(test):
            raise UserError(
                f"{where}: label {classes - 1} among {len(train) + len(test)} samples: labels "
                "must be 0 .. classes-1; if it is meant, set data.args.classes"
            )
    elif isinstance(given, int) and given >= 1:
        classes = given
    else:
        raise UserError(f"data.args.classes = {given!r}: it must be a positive integer")
    check_labels(train, classes, f"{where}, train")
    check_labels(test, classes, f"{where}, test")
    return classes

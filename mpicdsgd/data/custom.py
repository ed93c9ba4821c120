"""Data sets that a function of the user's makes: torch datasets or arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.plugins import check_arguments, load_function
from mpicdsgd.data.samples import DatasetSamples, Indices, Samples
from mpicdsgd.data.source import Source, as_inputs, as_targets, count_classes, from_arrays


def custom(name: str, path: str, seed: int, args: Mapping[str, Any], workers: int) -> Source:
    """Return the source made by the user's function, called as ``function(path, seed, **args)``.

    It returns ``(train, test)``, on every agent the same: two torch map-style datasets of items
    (input, target), or two pairs (inputs, targets) of arrays or tensors, treated as the HDF5
    reader treats its datasets. Inputs are not normalised. Class labels of a torch dataset are
    looked for in its ``targets`` or ``labels``, in a ``TensorDataset``'s second tensor, and
    through ``Subset``.

    Args:
        name: ``"package.module:function"``.
        path: ``data.path``, as it was given.
        seed: the run's.
        args: ``data.args``; ``classes``, where the function has no such argument, is the number of
            classes (default: one more than the largest label).
        workers: processes that load a torch dataset.

    Raises:
        UserError: no such function, wrong arguments, not the return value above.
    """
    function = load_function(name, "data.name")
    args = dict(args)
    classes = args.pop("classes", None) if not _takes_classes(function) else args.get("classes")
    check_arguments(function, args, "data.args", given=2)
    made = function(path, seed, **args)
    where = f'data.name = "{name}"'
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise UserError(f"{where} must return (train, test), got a {type(made).__name__}")
    train, test = made
    if _is_pair(train) and _is_pair(test):
        return _from_pairs(train, test, classes, where)
    for split, dataset in (("train", train), ("test", test)):
        sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not sized or _is_pair(dataset):
            raise UserError(
                f"{where}: {split} is a {type(dataset).__name__}; it must be a torch dataset with "
                "__getitem__ and __len__, or a pair (inputs, targets) of arrays, like the other"
            )
        if len(dataset) == 0:
            raise UserError(f"{where}: {split} holds no samples")
    return _from_datasets(train, test, classes, seed, workers, where)


def _takes_classes(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and "classes" in code.co_varnames[2 : code.co_argcount]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(part, np.ndarray | Tensor) for part in value)
    )


def _from_pairs(train: Any, test: Any, classes: Any, where: str) -> Source:
    pairs = []
    for split, pair in (("train", train), ("test", test)):
        x, y = (p.detach().cpu().numpy() if isinstance(p, Tensor) else p for p in pair)
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise UserError(
                f"{where}: {split} has inputs of shape {x.shape} and targets of shape {y.shape}: "
                "the first axis of both must be the samples"
            )
        if x.size == 0:
            raise UserError(f"{where}: {split} holds no samples")
        pairs.append((as_inputs(x, f"{where}, {split}"), as_targets(y, f"{where}, {split}")))
    (train_x, train_y), (test_x, test_y) = pairs
    if train_x.shape[1:] != test_x.shape[1:]:
        raise UserError(
            f"{where}: a training input has the shape {train_x.shape[1:]}, "
            f"a test input {test_x.shape[1:]}"
        )
    return from_arrays(
        (train_x, train_y), (test_x, test_y), count_classes(train_y, test_y, classes, where)
    )


def _from_datasets(
    train: Any, test: Any, classes: Any, seed: int, workers: int, where: str
) -> Source:
    labels, test_labels = _labels(train, f"{where}, train"), _labels(test, f"{where}, test")
    if labels is None and isinstance(classes, int):
        known: int | None = classes
    elif labels is None:
        known = None
    else:
        known = count_classes(
            labels, labels[:0] if test_labels is None else test_labels, classes, where
        )

    def take(dataset: Any, indices: Indices) -> Samples:
        return DatasetSamples(dataset, indices, seed, workers)

    first, _ = take(train, np.arange(1)).batch(np.arange(1))
    return Source(
        train_count=len(train),
        labels=labels if known is not None else None,
        classes=known,
        train=lambda indices: take(train, indices),
        test=lambda count: take(test, np.arange(count)),
        test_count=len(test),
        input_shape=tuple(first.shape[1:]),
    )


def _labels(dataset: Any, where: str) -> NDArray[np.int64] | None:
    """Return the class labels of a torch dataset without reading its items, or None."""
    if isinstance(dataset, Subset):
        inner = _labels(dataset.dataset, where)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        found = dataset.tensors[1]
    if found is None or not isinstance(found, list | tuple | np.ndarray | Tensor):
        return None
    try:
        array = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    except ValueError:  # a ragged list
        return None
    if array.shape != (len(dataset),) or array.dtype.kind not in "biu":
        return None
    targets: NDArray[np.int64] = as_targets(array, where)
    return targets

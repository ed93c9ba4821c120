"""Data of the user's in an HDF5 file, of which an agent reads its own rows only."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.data.files import expand
from mpicdsgd.data.samples import ArraySamples, Indices, Samples
from mpicdsgd.data.source import Source, as_inputs, as_targets, count_classes

EXPECTED = "an HDF5 file with the datasets train/x, train/y, test/x and test/y"
BLOCK_BYTES = 16 << 20


def hdf5(path: str, args: Mapping[str, Any]) -> Source:
    """Return the source of the file ``path``. Nothing stays open between reads.

    ``train/x`` and ``test/x``: numbers, shape (n, ...), images as (n, channels, height, width);
    uint8 stay as they are in memory, all else becomes float32. ``train/y`` and ``test/y``:
    integers, shape (n,) or (n, 1), are class labels; all else are float32 targets. Of ``train/x``
    the rows of the agent's share are read, in blocks of about 16 MB; targets are read whole.

    Args:
        path: the file.
        args: ``data.args``: ``classes`` (default: one more than the largest label) and ``mean``
            and ``std``, a number or one per channel, in the units of the file: an input becomes
            (x - mean) / std.

    Raises:
        UserError: no such file, truncated or damaged, a dataset missing or of the wrong kind,
            counts that differ, labels out of range, inputs that are not finite; names the file.
    """
    file = expand(path, EXPECTED)
    if not os.path.isfile(file):
        raise UserError(f'data.path = "{path}": no such file; expected {EXPECTED}')
    with _open(file) as root:
        shapes = {split: _check(root, split, file) for split in ("train", "test")}
        targets = {s: as_targets(root[f"{s}/y"][()], f"{file}, {s}/y") for s in shapes}
    if shapes["train"][1:] != shapes["test"][1:]:
        raise UserError(
            f"{file}: a sample of train/x has the shape {shapes['train'][1:]}, "
            f"one of test/x {shapes['test'][1:]}"
        )
    classes = count_classes(targets["train"], targets["test"], args.get("classes"), file)
    channels = shapes["train"][1] if len(shapes["train"]) > 1 else 1
    mean = _numbers(args, "mean", channels)
    std = _numbers(args, "std", channels)

    def take(split: str, rows: Indices) -> Samples:
        with _open(file) as root:
            inputs = _rows(root[f"{split}/x"], rows)
        inputs = as_inputs(inputs, f"{file}, {split}/x (rows of this agent)")
        return ArraySamples(inputs, targets[split][rows], mean, std)

    return Source(
        train_count=shapes["train"][0],
        labels=targets["train"] if classes is not None else None,
        classes=classes,
        train=lambda indices: take("train", indices),
        test=lambda count: take("test", np.arange(count)),
        test_count=shapes["test"][0],
        input_shape=shapes["train"][1:],
    )


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open for reading; h5py's many kinds of exception become a UserError."""
    try:
        with h5py.File(file, "r") as root:
            yield root
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise UserError(f"{file} cannot be read as HDF5: {reason}") from err
    except MemoryError as err:
        raise UserError(f"{file}: what it says it holds does not fit into memory") from err


def _check(root: Any, split: str, file: Path) -> tuple[int, ...]:
    """Return the shape of split/x after checking it and split/y."""
    for name in (f"{split}/x", f"{split}/y"):
        if not isinstance(root.get(name), h5py.Dataset):
            raise UserError(f"{file} has no dataset {name}; expected {EXPECTED}")
        if root[name].dtype.kind not in "biuf" or not root[name].shape:
            raise UserError(
                f"{file}: {name} must be an array of numbers with a first axis of samples, "
                f"got {root[name].dtype} of shape {root[name].shape}"
            )
    x, y = root[f"{split}/x"], root[f"{split}/y"]
    if len(x) != len(y):
        raise UserError(f"{file} holds {len(x)} rows in {split}/x, but {len(y)} in {split}/y")
    if x.size == 0:
        raise UserError(f"{file}: {split}/x holds no samples")
    return tuple(int(length) for length in x.shape)


def _rows(dataset: Any, rows: Indices) -> NDArray[Any]:
    """Return the ascending ``rows`` of an HDF5 dataset.

    Block by block of neighbouring rows: picking single rows is many times slower in HDF5.
    """
    out = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype.newbyteorder("="))
    row_bytes = max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:])))
    step = max(1, BLOCK_BYTES // row_bytes)
    done = 0
    while done < len(rows):
        begin = int(rows[done])
        end = int(np.searchsorted(rows, begin + step))
        block = dataset[begin : int(rows[end - 1]) + 1]
        out[done:end] = block[rows[done:end] - begin]
        done = end
    return out


def _numbers(args: Mapping[str, Any], key: str, channels: int) -> tuple[float, ...]:
    given = args.get(key)
    if given is None:
        return ()
    values = given if isinstance(given, list | tuple) else [given]
    good = all(
        isinstance(v, int | float) and np.isfinite(v) and (key == "mean" or v > 0) for v in values
    )
    if not good or len(values) not in (1, channels):
        positive = "" if key == "mean" else "positive "
        raise UserError(
            f"data.args.{key} = {given!r}: it must be a {positive}number or a list of {channels}"
        )
    return tuple(float(v) for v in values)

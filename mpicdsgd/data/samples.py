"""Sets of samples: arrays, or a torch dataset of the user's."""

import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mpicdsgd.common import signals
from mpicdsgd.common.errors import UserError

Indices: TypeAlias = NDArray[np.int64]
Batch: TypeAlias = tuple[Tensor, Tensor]


class Samples(Protocol):
    """Samples 0 .. len-1, each an input and a target.

    A batch is ``(inputs, targets)`` on the host: inputs float32, shape (B, ...), images as
    (B, channels, height, width); targets int64, shape (B,), where they are class labels, else
    float32. Batches depend on nothing but the arguments: torch's, NumPy's and Python's global
    random states are neither used nor changed.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> Batch:
        """Return the samples ``indices``, shape (B,), in that order."""
        ...

    def batches(self, index_arrays: Iterable[Indices], epoch: int = 0) -> Iterator[Batch]:
        """Yield the batch of each index array; ``epoch`` varies random augmentation only."""
        ...


@dataclass(frozen=True)
class ArraySamples:
    """Samples held in memory as they are stored (uint8, say), scaled when they are taken.

    Args:
        inputs: uint8 or float32, shape (n, ...).
        targets: int64, shape (n,), or float32, shape (n, ...).
        mean: subtracted from the inputs, in their stored units; shape () or (channels,).
        std: then divides them; shape () or (channels,).
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.targets)
        assert self.inputs.dtype in (np.uint8, np.float32)
        assert self.targets.dtype in (np.int64, np.float32)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Indices) -> Batch:
        inputs = torch.from_numpy(self.inputs[indices]).to(torch.float32)
        if self.mean:
            inputs.sub_(self._per_channel(self.mean))
        if self.std:
            inputs.div_(self._per_channel(self.std))
        return inputs, torch.from_numpy(self.targets[indices])

    def batches(self, index_arrays: Iterable[Indices], epoch: int = 0) -> Iterator[Batch]:
        return map(self.batch, index_arrays)

    def _per_channel(self, values: tuple[float, ...]) -> Tensor:
        axes = (1,) * (self.inputs.ndim - 2) if len(values) > 1 else ()
        return torch.tensor(values, dtype=torch.float32).reshape(-1, *axes)


@dataclass(frozen=True)
class DatasetSamples:
    """Some items of a torch map-style dataset, collated by torch's ``default_collate``.

    Random augmentation inside the dataset may use torch's, NumPy's or Python's global generator:
    while a batch is made they are seeded from (seed, epoch, the batch's items) and then put back,
    so a batch is the same whoever makes it and whenever, with any number of workers.

    Args:
        dataset: with ``__len__`` and ``__getitem__`` to (input, target).
        items: those of the dataset's items that are samples 0, 1, ... here, int64, shape (n,).
        seed: not negative.
        workers: processes that make batches ahead; 0: made when they are asked for. They are
            forked, so the dataset must use neither MPI nor a GPU.
    """

    dataset: Any
    items: Indices
    seed: int = 0
    workers: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Indices) -> Batch:
        return self._make(indices, epoch=0)

    def batches(self, index_arrays: Iterable[Indices], epoch: int = 0) -> Iterator[Batch]:
        if self.workers == 0:
            for indices in index_arrays:
                yield self._make(indices, epoch)
            return
        loader: DataLoader[Batch] = DataLoader(
            _Batches(self, epoch),
            batch_size=None,
            sampler=list(index_arrays),
            num_workers=self.workers,
            multiprocessing_context="fork",
            worker_init_fn=signals.in_worker,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        with warnings.catch_warnings():
            # Python >= 3.12 warns of forking with threads; torch runs its workers on one thread.
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            made = iter(loader)
        try:
            yield from made
        except UserError as err:  # torch puts the worker's whole traceback into the message
            raise UserError(str(err).strip().rpartition("UserError: ")[2]) from None

    def _make(self, indices: Indices, epoch: int) -> Batch:
        items = self.items[indices]
        entropy = [self.seed, epoch, *items.tolist()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            try:
                rows = [self.dataset[i] for i in items.tolist()]
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
        return _collate(rows)


@dataclass(frozen=True)
class _Batches(Dataset[Batch]):
    """What a DataLoader takes for a dataset: its "items" are whole batches."""

    samples: DatasetSamples
    epoch: int

    def __getitem__(self, indices: Indices) -> Batch:
        return self.samples._make(indices, self.epoch)


def _collate(rows: Sequence[Any]) -> Batch:
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != 2:
            raise UserError(
                f"the dataset's items must be pairs (input, target), got a {type(row).__name__}"
            )
    try:
        inputs, targets = default_collate([tuple(row) for row in rows])
    except (TypeError, RuntimeError) as err:
        reason = str(err).splitlines()[0]
        raise UserError(f"the dataset's items cannot be made into a batch: {reason}") from err
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise UserError("the dataset's items must be pairs of tensors, arrays or numbers")
    labels = not targets.is_floating_point() and targets.dim() == 1
    return inputs.to(torch.float32), targets.to(torch.int64 if labels else torch.float32)

"""Batches on the agent's device: each is copied to a GPU while the one before is in use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from mpicdsgd.data.samples import Batch


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Return ``batches`` with their tensors on ``device``. Local.

    On the host they are handed on as they are. On a GPU the next batch is made, and its copy begun,
    before a batch is handed over; torch's current stream waits for the copies, the host does not.
    Batches depend on nothing but their indices (see `Samples`), so making one early changes none.

    Args:
        batches: from `Samples.batches`, of any sizes.
        device: where the model is.
    """
    if device.type == "cpu":
        return batches
    if device.type == "cuda":
        return one_ahead(batches, CudaCopies(device))
    return ((inputs.to(device), targets.to(device)) for inputs, targets in batches)


class Copies(Protocol):
    """What `one_ahead` needs of a GPU."""

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """Page-locked host memory of ``count`` elements, shape (count,)."""
        ...

    def start(self, hosts: list[Tensor]) -> tuple[list[Tensor], Any]:
        """Begin copies of page-locked tensors, and return them with the event of their end."""
        ...

    def wait(self, event: Any) -> None:
        """Have the host wait for ``event``."""
        ...

    def hand_over(self, tensors: list[Tensor], event: Any) -> None:
        """Have all that is given to the current stream from now on find ``tensors`` complete."""
        ...


def one_ahead(batches: Iterator[Batch], copies: Copies) -> Iterator[Batch]:
    """Yield ``batches`` from a GPU, the copy of each begun before the one before is yielded."""
    slots = _Slot(copies), _Slot(copies)
    previous: _Slot | None = None
    for i, batch in enumerate(batches):
        slot = slots[i % 2]
        slot.send(batch)
        if previous is not None:
            yield previous.receive()
        previous = slot
    if previous is not None:
        yield previous.receive()
    # Whoever stops in between leaves a copy under way: torch keeps page-locked memory for it.


class _Slot:
    """Page-locked memory for one batch, and the copy that reads it."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._memory: list[Tensor | None] = [None, None]
        self._sent: list[Tensor] = []
        self._event: Any = None

    def send(self, batch: Batch) -> None:
        if self._event is not None:
            self._copies.wait(self._event)  # two batches ago, so it has ended long since
        hosts = [self._put(part, tensor) for part, tensor in enumerate(batch)]
        self._sent, self._event = self._copies.start(hosts)

    def receive(self) -> Batch:
        sent, self._sent = self._sent, []  # only the user's references keep a batch on the GPU
        self._copies.hand_over(sent, self._event)
        inputs, targets = sent
        return inputs, targets

    def _put(self, part: int, tensor: Tensor) -> Tensor:
        memory = self._memory[part]
        if memory is None or memory.dtype != tensor.dtype or memory.numel() < tensor.numel():
            memory = self._copies.pinned(tensor.numel(), tensor.dtype)
            self._memory[part] = memory
        return memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


class CudaCopies:
    """`Copies` to a CUDA device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _copy_stream(device)

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def start(self, hosts: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            tensors = [host.to(self._device, non_blocking=True) for host in hosts]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return tensors, event

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def hand_over(self, tensors: list[Tensor], event: torch.cuda.Event) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in tensors:
            # They belong to the copies' stream, which may not have them back before this one is
            # through with them.
            tensor.record_stream(current)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: torch keeps freed memory apart by the stream that it was made for.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

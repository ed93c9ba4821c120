"""A sum over all agents of a flat buffer, begun and ended apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm.links.link import Link
from mpicdsgd.comm.waiting import All

_PART = 1 << 26  # elements at once: no MPI library takes more than 2^31 bytes everywhere


class Sum:
    """Sums ``buffer`` over all agents of ``link``, in place. Collective, in the same order.

    Attributes:
        buffer: float32, shape (D,), on the agents' device, to be filled before `start`.
    """

    def __init__(self, link: Link, size: int) -> None:
        self._link = link
        self.buffer = torch.zeros(size, device=link.agents.device)
        self._host = self.buffer
        if self.buffer.device.type != "cpu":
            self._host = torch.zeros(size, pin_memory=True)
        self._parts: list[MPI.Request] = []

    def start(self) -> None:
        """Begin the sum of what `buffer` holds; on a GPU the host waits for it."""
        if self._host is not self.buffer:
            self._host.copy_(self.buffer)
        self._parts = [
            self._link.comm.Iallreduce(MPI.IN_PLACE, part, MPI.SUM) for part in self._pieces()
        ]
        self._link.counted(4 * self.buffer.numel())

    def progress(self) -> bool:
        """Let MPI move data; whether nothing is under way."""
        return MPI.Request.Testall(self._parts) if self._parts else True

    def complete(self) -> None:
        """Wait for the sum."""
        if self._parts:
            self._link.waiter.wait(All(list(self._parts)), "the other agents")
            self._parts = []

    def result(self) -> torch.Tensor:
        """The sum, in `buffer`."""
        self.complete()
        if self._host is not self.buffer:
            self.buffer.copy_(self._host)
        return self.buffer

    def looks(self) -> Iterator[None]:
        """As `complete`, yielding while it waits."""
        for _ in self._link.waiter.looks(All(list(self._parts)), "the others to close"):
            yield
        self._parts = []

    def broadcast(self, values_D: torch.Tensor) -> None:
        """Give every agent agent 0's ``values_D``, in place. Collective."""
        self._host.copy_(values_D)
        for part in self._pieces():
            self._link.waiter.wait(self._link.comm.Ibcast(part, root=0), "agent 0")
        values_D.copy_(self._host)

    def _pieces(self) -> list[NDArray[np.float32]]:
        host = self._host.numpy()
        return [host[start : start + _PART] for start in range(0, host.size, _PART)]

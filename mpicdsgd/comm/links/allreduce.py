"""A sum over all agents of a flat buffer, begun and ended apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm.links.assembly import Assembly, pieces
from mpicdsgd.comm.waiting import All

SUMS = ("mpi", "ordered")


class Sum:
    """Sums ``buffer`` over all agents of ``link``, in place, as a part of it. Collective.

    Args:
        is_ordered: add up in agent order, as the simulation does: the same bits everywhere. Every
            agent then receives all agents' buffers, N times the memory and more bytes; else the
            order is the MPI library's.

    Attributes:
        buffer: float32, shape (D,), on the agents' device, to be filled before `start`.
    """

    def __init__(self, link: Assembly, size: int, is_ordered: bool = False) -> None:
        self._link = link
        self.buffer = torch.zeros(size, device=link.agents.device)
        self._host = self.buffer
        if self.buffer.device.type != "cpu":
            self._host = torch.zeros(size, pin_memory=True)
        self._all = np.empty((link.agents.size, size) if is_ordered else (0, 0), np.float32)
        self._is_ordered = is_ordered
        self._requests: list[MPI.Request] = []
        link.parts.append(self)

    def start(self) -> None:
        """Begin the sum of what `buffer` holds; on a GPU the host waits for it."""
        if self._host is not self.buffer:
            self._host.copy_(self.buffer)
        host = self._host.numpy()
        if self._is_ordered:
            self._requests = [self._link.comm.Iallgather(host, self._all)]
            self._link.bytes_sent += host.nbytes * (self._link.agents.size - 1)
            return
        self._requests = [
            self._link.comm.Iallreduce(MPI.IN_PLACE, part, MPI.SUM) for part in pieces(host)
        ]
        self._link.counted(host.nbytes)

    def progress(self) -> bool:
        """Let MPI move data; whether nothing is under way."""
        return MPI.Request.Testall(self._requests) if self._requests else True

    def rest(self) -> None:
        """Wait for the sum."""
        if self._requests:
            self._link.waiter.wait(All(list(self._requests)), "the other agents")
            self._requests = []

    def result(self) -> torch.Tensor:
        """The sum, in `buffer`."""
        self.rest()
        if self._is_ordered:
            in_order(self._all, self._host.numpy())
        if self._host is not self.buffer:
            self.buffer.copy_(self._host)
        return self.buffer

    def end(self) -> Iterator[None]:
        """As `rest`, yielding while it waits."""
        for _ in self._link.waiter.looks(All(list(self._requests)), "the others to close"):
            yield
        self._requests = []


def in_order(rows_ND: NDArray[np.float32], out_D: NDArray[np.float32]) -> None:
    """out <- the sum of the rows, the first ones first, in float32."""
    out_D[:] = rows_ND[0]
    for row in rows_ND[1:]:
        out_D += row

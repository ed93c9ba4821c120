"""The direct route on the host: neighbours' published buffers in shared memory, read in place.

The buffers lie in an MPI window that the ranks of a node allocate together; only tokens travel. A
pass is done when its call returns, so a token that follows it needs no event, but both sides
synchronise the window, as MPI asks, and the kernel has fenced its streaming stores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.buffer_layout import PAGE, bytes_of, staggered
from mpicdsgd.comm.exchange.header import HEADER_BYTES
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE

SHARED_MEMORY = "/dev/shm"
_SPARE = 1.1  # of what is needed, for the MPI library's own


class SharedPublished:
    """See the module, and `token_transport.Published`. Making one is collective over the agents.

    Args:
        size: elements D; ``wire``: their type.
    """

    def __init__(self, agents: Agents, size: int, wire: str) -> None:
        self._dtype, self._size = np.dtype(WIRE_DTYPE[wire]), size
        self.size_bytes = bytes_of(size, wire)
        self._node = cast(MPI.Intracomm, agents.comm.Split(agents.node, agents.rank))
        self._local = {rank: i for i, rank in enumerate(self._node.allgather(agents.rank))}
        info = MPI.Info.Create()
        # Else the segments lie one behind the other, unaligned and on the first rank's memory.
        info.Set("alloc_shared_noncontig", "true")
        room = 2 * self.size_bytes + HEADER_BYTES + PAGE
        self._window = MPI.Win.Allocate_shared(room, 1, info=info, comm=self._node)
        info.Free()
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._mine = self.of(agents.rank)
        for buffer in self._mine:
            buffer[:] = 0  # by its owner first, so that the pages are near
        self._window.Sync()
        self._node.Barrier()

    def buffer(self, post: int) -> NDArray[Any]:
        return self._mine[post % 2]

    def mark(self, post: int) -> None:
        self._window.Sync()

    def begin_pass(self, post: int) -> None:
        self._window.Sync()

    def settle(self) -> None:
        pass

    def free(self) -> None:
        self._mine = []
        self._window.Unlock_all()
        self._window.Free()
        self._node.Free()

    def of(self, agent: int) -> list[NDArray[Any]]:
        """The two buffers of an agent on this node, shape (D,). Local."""
        memory: Any = self._window.Shared_query(self._local[agent])[0]
        raw: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        # Every process maps a segment at a page, so all find the same beginning.
        start = -raw.ctypes.data % HEADER_BYTES + staggered(self._local[agent])
        values = self._size * self._dtype.itemsize
        starts = (start, start + self.size_bytes)
        return [raw[i : i + values].view(self._dtype) for i in starts]


class SharedRoute:
    """See the module, and `token_transport.Route`. Local.

    Args:
        sources: the agents on this node whose values this one reads, ascending.
    """

    def __init__(self, published: SharedPublished, sources: Sequence[int]) -> None:
        self._near = {source: published.of(source) for source in sources}

    def start(self, post: int, turn: int) -> None:
        pass

    def advance(self, post: int, partners: frozenset[int] | None) -> bool:
        return partners is not None

    def take(self, post: int) -> dict[int, NDArray[Any]]:
        return {source: buffers[post % 2] for source, buffers in self._near.items()}

    def settle(self) -> None:
        pass

    def release(self) -> None:
        self._near = {}

    def free(self) -> None:
        pass


def why_not(ranks: int, size: int, wire: str) -> str:
    """Why this node cannot hold the window of its ``ranks``, "" where it can. Local.

    A window larger than what is left there would end the job by SIGBUS when it is written to.
    """
    needed = ranks * (2 * bytes_of(size, wire) + 2 * HEADER_BYTES) * _SPARE
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return f"{SHARED_MEMORY} cannot be looked at ({error.strerror})"
    free = found.f_bavail * found.f_frsize
    if free < needed:
        return (
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB left, the published buffers of a node need "
            f"{needed / 1e6:.0f} MB"
        )
    return ""

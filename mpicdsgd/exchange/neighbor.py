"""The neighbour transport on the host: one nonblocking MPI neighbourhood collective per exchange.

All send displacements are 0, so the one published buffer goes to every reader without a copy.
Counts are always explicit and in blocks of 64 bytes: Open MPI truncates inferred counts where a
rank has degree 0, and blocks keep MPI's int counts good for buffers of up to 128 GB.

Every exchange has a graph communicator of its own: on a shared one, two exchanges posted in a
different order would swap their data without any error from MPI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.agents import Agents
from mpicdsgd.exchange.carrier import WIRE_DTYPE, Edge
from mpicdsgd.exchange.header import HEADER_BYTES


class Blocks:
    """A neighbourhood collective of blocks of 64 bytes on a communicator of its own.

    Making one is collective over ``comm``, and so is `free`.

    Args:
        comm: whose ranks are the agents.
        sources, destinations: from whom this agent receives and to whom it sends.
    """

    def __init__(
        self, comm: MPI.Intracomm, sources: Sequence[int], destinations: Sequence[int]
    ) -> None:
        self._comm: MPI.Distgraphcomm = comm.Create_dist_graph_adjacent(
            list(sources), list(destinations), reorder=False
        )
        self._block = MPI.BYTE.Create_contiguous(HEADER_BYTES).Commit()
        self._degree, self._readers = len(sources), len(destinations)

    def start(
        self, send: Any, receive: Any, count: int, first: int = 0, slot: int | None = None
    ) -> MPI.Request:
        """Send blocks [first, first + count) to every destination, receive the same. Collective.

        Args:
            send: contiguous buffer; unchanged until the request is complete.
            receive: contiguous buffer of a slot for each source.
            slot: blocks from one slot to the next; None: ``count``.
        """
        slot = count if slot is None else slot
        return self._comm.Ineighbor_alltoallv(
            [send, ([count] * self._readers, [first] * self._readers), self._block],
            [
                receive,
                ([count] * self._degree, [first + i * slot for i in range(self._degree)]),
                self._block,
            ],
        )

    def free(self) -> None:
        self._block.Free()
        self._comm.Free()


class HostCarrier:
    """Header and values of shape (D,) in one message; see `carrier.Carrier`.

    Opening is collective over the agents.
    """

    def __init__(self, agents: Agents, size: int, wire: str) -> None:
        dtype = np.dtype(WIRE_DTYPE[wire])
        payload = slice(HEADER_BYTES, HEADER_BYTES + size * dtype.itemsize)
        self._count = 1 + blocks_of(size * dtype.itemsize)
        slot_bytes = HEADER_BYTES * self._count
        self._blocks = Blocks(agents.comm, agents.sources, agents.destinations)
        self._send = aligned(slot_bytes)
        self._receive = aligned(slot_bytes * len(agents.sources))
        slots = np.split(self._receive, len(agents.sources)) if agents.sources else []
        self.header = self._send[:HEADER_BYTES]
        self.headers = [slot[:HEADER_BYTES] for slot in slots]
        self.peers = agents.sources
        self.published: NDArray[Any] = self._send[payload].view(dtype)
        self.previous = self.published
        self._neighbours = [slot[payload].view(dtype) for slot in slots]
        self.bytes_per_post = slot_bytes * len(agents.destinations)
        self.edges = [Edge(source, "neighbor", "by messages") for source in agents.sources]
        self._request: MPI.Request | None = None

    def start(self) -> None:
        self._request = self._blocks.start(self._send, self._receive, self._count)

    def advance(self) -> bool:
        assert self._request is not None
        return self._request.Test()

    def take(self) -> list[Any]:
        return list(self._neighbours)

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass

    def free(self) -> None:
        self._blocks.free()


def blocks_of(size_bytes: int) -> int:
    """Blocks of 64 bytes that hold ``size_bytes``."""
    return -(-size_bytes // HEADER_BYTES)


def aligned(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that begins at a multiple of 64 bytes, a cache line."""
    raw = np.zeros(size_bytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size_bytes]

"""Between hosts: values in messages.

`HostCarrier` serves where all values go so, on a graph that does not change; else they go by a
`MessageRoute` beside the tokens of `token_transport.TokenCarrier`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.buffer_layout import aligned, blocks_of, bytes_of
from mpicdsgd.comm.exchange.header import HEADER_BYTES, clear
from mpicdsgd.comm.exchange.messages import Ends, Messages, Requests
from mpicdsgd.comm.exchange.token_transport import Published
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE, Edge


class HostCarrier:
    """Header and values of shape (D,) in one message; see `transport.Carrier`.

    The one published buffer goes to every reader without a copy. Opening is collective over the
    agents, whose graph has one turn.
    """

    def __init__(self, agents: Agents, size: int, wire: str) -> None:
        dtype = np.dtype(WIRE_DTYPE[wire])
        payload = slice(HEADER_BYTES, HEADER_BYTES + size * dtype.itemsize)
        self._count = 1 + blocks_of(size * dtype.itemsize)
        slot_bytes = HEADER_BYTES * self._count
        self._messages = Messages(agents.comm, [(agents.sources, agents.destinations)])
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
        self._requests: Requests | None = None

    def start(self, turn: int) -> None:
        for slot in self.headers:
            clear(slot)
        self._requests = self._messages.start(self._send, self._receive, self._count)

    def advance(self) -> bool:
        assert self._requests is not None
        return self._requests.Test()

    def take(self) -> list[Any]:
        return list(self._neighbours)

    def abandon(self) -> bool:
        return self._requests is None or self._requests.abandon()

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass

    def free(self) -> None:
        self._messages.free()


class OwnPublished:
    """One buffer of this agent's own; see `token_transport.Published`.

    One will do: a post is over only when its messages are, those from here too.
    """

    def __init__(self, size: int, wire: str) -> None:
        dtype = np.dtype(WIRE_DTYPE[wire])
        self.size_bytes = bytes_of(size, wire)
        self._buffer = aligned(self.size_bytes)[: size * dtype.itemsize].view(dtype)

    def buffer(self, post: int) -> NDArray[Any]:
        return self._buffer

    def mark(self, post: int) -> None:
        pass

    def begin_pass(self, post: int) -> None:
        pass

    def settle(self) -> None:
        pass

    def free(self) -> None:
        pass


class MessageRoute:
    """Values without headers. See `token_transport.Route`; made and freed by all agents together.

    Args:
        published: whose buffers are arrays.
        turns: of each turn, what goes this way; see `messages.Messages`.
    """

    def __init__(self, comm: MPI.Intracomm, published: Published, turns: Sequence[Ends]) -> None:
        self._published = published
        self._messages = Messages(comm, turns)
        self._receive = aligned(published.size_bytes * self._messages.slots)
        buffer = published.buffer(0)
        slots = self._receive.reshape(self._messages.slots, published.size_bytes)
        self._near = [slot[: buffer.nbytes].view(buffer.dtype) for slot in slots]
        self._turn = 0
        self._requests: Requests | None = None

    def start(self, post: int, turn: int) -> None:
        self._turn, self._requests = turn, None
        self.advance(post, None)

    def advance(self, post: int, partners: frozenset[int] | None) -> bool:
        if self._requests is None and self._messages.may_start(partners):
            count = self._published.size_bytes // HEADER_BYTES
            send = MPI.buffer.fromaddress(
                self._published.buffer(post).ctypes.data, self._published.size_bytes
            )
            self._requests = self._messages.start(
                send, self._receive, count, self._turn, partners=partners
            )
        return self._requests is not None and self._requests.Test()

    def take(self, post: int) -> dict[int, NDArray[Any]]:
        return dict(zip(self._messages.turns[self._turn][0], self._near, strict=False))

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass

    def free(self) -> None:
        self._messages.free()

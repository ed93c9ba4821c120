"""The carrier on GPUs: published values stay in device memory, headers travel as tokens over MPI.

An agent publishes into two buffers in turn: post n shows what lies in buffer n % 2. With each post
goes one event, recorded on the stream of the pass before it; to the agent's readers it says that
post n may be read, to its sources that it has done with reading their post n - 1, whose buffer
their next pass will overwrite. So tokens go both ways along every edge, and before each pass the
stream waits for the events of all peers.

A stream waits only for what was recorded before the call, so the token, which makes the peer call,
is sent after the record. There are two events so that an agent which comes late to wait for a post
does not wait for the next one, which a peer may have recorded meanwhile.

What carries the values from a source is its edge's `Route`: `direct` or `staged`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from mpicdsgd.agents import Agents
from mpicdsgd.exchange.carrier import WIRE_DTYPE, Edge
from mpicdsgd.exchange.header import HEADER_BYTES
from mpicdsgd.exchange.neighbor import Blocks, aligned, blocks_of
from mpicdsgd.gpu import Gpu


class Published:
    """This agent's two published buffers in device memory, and their two events. Local.

    Args:
        size: elements D; ``wire``: their type.

    Attributes:
        size_bytes: of a buffer, in whole blocks of 64.
        memory: device address of both, one after the other.
        events: for post n, ``events[n % 2]``.
    """

    def __init__(self, gpu: Gpu, size: int, wire: str) -> None:
        self._gpu = gpu
        self.size_bytes = HEADER_BYTES * blocks_of(size * np.dtype(WIRE_DTYPE[wire]).itemsize)
        self.memory = gpu.malloc(2 * self.size_bytes)
        self.events = [gpu.event(shared=True) for _ in range(2)]

    def buffer(self, post: int) -> int:
        """Device address of what post ``post`` shows."""
        return self.memory + self.size_bytes * (post % 2)

    def free(self) -> None:
        for event in self.events:
            self._gpu.destroy_event(event)
        self._gpu.free(self.memory)


class Route(Protocol):
    """How the values of some edges come here. All methods but `free` are local.

    Attributes:
        sources: the agents whose values come this way, ascending.
    """

    sources: tuple[int, ...]

    def start(self, post: int) -> None:
        """Post ``post`` was recorded: begin to send it."""

    def advance(self, post: int, told: bool) -> bool:
        """Move things on; True once all has come. ``told``: the peers' tokens are here."""

    def take(self, post: int, stream: int) -> list[int]:
        """Make ``stream`` wait for the values; device addresses, one for each source."""

    def settle(self) -> None:
        """Wait until nothing given to this route's streams is left to do."""

    def release(self) -> None:
        """Give back what belongs to others."""

    def free(self) -> None:
        """Give back the rest. Collective over communicators of its own."""


class DeviceCarrier:
    """See the module, and `carrier.Carrier`. Making one is collective over the agents.

    Args:
        published: this agent's buffers; freed by the carrier.
        routes: every edge's, made by `routing`.
        edges: what to say of them.
    """

    def __init__(
        self,
        agents: Agents,
        gpu: Gpu,
        published: Published,
        routes: Sequence[Route],
        edges: list[Edge],
    ) -> None:
        self._gpu, self._published, self._routes = gpu, published, routes
        self._sources = agents.sources
        self.peers = peers_of(agents)
        self._tokens = Blocks(agents.comm, self.peers, self.peers)
        self.header = aligned(HEADER_BYTES)
        self._received = aligned(HEADER_BYTES * len(self.peers))
        self.headers = np.split(self._received, len(self.peers)) if self.peers else []
        tokens = HEADER_BYTES * len(self.peers)
        self.bytes_per_post = tokens + published.size_bytes * len(agents.destinations)
        self.edges = edges
        self._posts = 0
        self._stream: int | None = None  # of the last pass
        self._request: MPI.Request | None = None
        self._told = False

    @property
    def published(self) -> Any:
        return self._published.buffer(self._posts)

    @property
    def previous(self) -> Any:
        return self._published.buffer(self._posts - 1)

    def start(self) -> None:
        if self._stream is None:
            self._stream = self._gpu.stream()
        post = self._posts
        # At exit, whoever closes may be on another stream than the last pass.
        self._gpu.record(self._published.events[post % 2], self._stream)
        self._posts += 1
        for route in self._routes:
            route.start(post)
        self._told = False
        self._request = self._tokens.start(self.header, self._received, 1)

    def advance(self) -> bool:
        assert self._request is not None
        if not self._told:
            self._told = self._request.Test()
        done = self._told
        for route in self._routes:  # each moves on, whatever the others say
            done = route.advance(self._posts - 1, self._told) and done
        return done

    def take(self) -> list[Any]:
        post, stream = self._posts - 1, self._gpu.stream()
        self._stream = stream
        # It may be another one than at the last pass.
        self._gpu.wait(stream, self._published.events[post % 2])
        near: dict[int, int] = {}
        for route in self._routes:
            near |= zip(route.sources, route.take(post, stream), strict=True)
        return [near[source] for source in self._sources]

    def settle(self) -> None:
        if self._stream is not None:
            self._gpu.finish(self._stream)
        for route in self._routes:
            route.settle()

    def release(self) -> None:
        for route in self._routes:
            route.release()

    def free(self) -> None:
        for route in self._routes:
            route.free()
        self._published.free()
        self._tokens.free()


def peers_of(agents: Agents) -> tuple[int, ...]:
    """The agents with an edge from or to this one, ascending."""
    return tuple(sorted({*agents.sources, *agents.destinations}))

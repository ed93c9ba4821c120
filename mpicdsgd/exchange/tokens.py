"""The carrier whose values are not in its messages: only headers travel, as tokens, over MPI.

An agent publishes into two buffers in turn: post n shows what lies in buffer n % 2, and each edge's
`Route` says how the reader comes to it. Tokens go both ways along every edge. To an agent's readers
its token n says that post n may be read; to its sources, that it has done with reading their post
n - 1, whose buffer their next pass will overwrite. So before pass n an agent holds token n of all
its peers. (Along the edges alone, agents on directed graphs would overwrite what is being read.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from mpicdsgd.agents import Agents
from mpicdsgd.exchange.carrier import Edge
from mpicdsgd.exchange.header import HEADER_BYTES
from mpicdsgd.exchange.neighbor import Blocks, aligned


class Published(Protocol):
    """This agent's two published buffers. All methods but `free` are local.

    Attributes:
        size_bytes: of a buffer, in whole blocks of 64.
    """

    size_bytes: int

    def buffer(self, post: int) -> Any:
        """What post ``post`` shows: an array of shape (D,), or a device address."""

    def mark(self, post: int) -> None:
        """Post ``post`` is about to be told; what was written to it may be seen from now on."""

    def begin_pass(self, post: int) -> None:
        """A pass is about to read what belongs to post ``post``."""

    def settle(self) -> None:
        """Wait until the last pass is done."""

    def free(self) -> None:
        """Give the buffers back. Collective over communicators of its own."""


class Route(Protocol):
    """How the values of some edges come here. All methods but `free` are local.

    Attributes:
        sources: the agents whose values come this way, ascending.
    """

    sources: tuple[int, ...]

    def start(self, post: int) -> None:
        """Post ``post`` was marked: begin to send it."""

    def advance(self, post: int, told: bool) -> bool:
        """Move things on; True once all has come. ``told``: the peers' tokens are here."""

    def take(self, post: int) -> list[Any]:
        """The values for the pass that was begun, one buffer for each source."""

    def settle(self) -> None:
        """Wait until this route has nothing left to do."""

    def release(self) -> None:
        """Give back what belongs to others."""

    def free(self) -> None:
        """Give back the rest. Collective over communicators of its own."""


class TokenCarrier:
    """See the module, and `carrier.Carrier`. Making one is collective over the agents.

    Args:
        published: this agent's buffers; freed by the carrier.
        routes: for every edge one; each is called by all agents alike, also without such an edge.
        edges: what to say of them.
    """

    def __init__(
        self,
        agents: Agents,
        published: Published,
        routes: Sequence[Route],
        edges: list[Edge],
    ) -> None:
        self._published, self._routes = published, routes
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
        self._request: MPI.Request | None = None
        self._told = False

    @property
    def published(self) -> Any:
        return self._published.buffer(self._posts)

    @property
    def previous(self) -> Any:
        return self._published.buffer(self._posts - 1)

    def start(self) -> None:
        post = self._posts
        self._published.mark(post)
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
        post = self._posts - 1
        self._published.begin_pass(post)
        near: dict[int, Any] = {}
        for route in self._routes:
            near |= zip(route.sources, route.take(post), strict=True)
        return [near[source] for source in self._sources]

    def settle(self) -> None:
        self._published.settle()
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

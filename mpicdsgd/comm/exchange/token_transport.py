"""The carrier whose values are not in its messages: only headers travel, as tokens, over MPI.

An agent publishes into two buffers in turn: post n shows what lies in buffer n % 2, and each edge's
`Route` says how the reader comes to it. Tokens go both ways along every edge. To an agent's readers
its token n says that post n may be read; to its sources, that it has done with reading their post
n - 1, whose buffer their next pass will overwrite. So before pass n an agent holds token n of all
its peers. (Along the edges alone, agents on directed graphs would overwrite what is being read.)
Where the graph changes by turns, the peers are those of all turns: 64 bytes to each, in every post.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.buffer_layout import aligned
from mpicdsgd.comm.exchange.header import HEADER_BYTES, together
from mpicdsgd.comm.exchange.messages import Messages, Requests
from mpicdsgd.comm.exchange.transport import Edge


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
    """How the values of some edges come here. All methods but `free` are local."""

    def start(self, post: int, turn: int) -> None:
        """Post ``post`` was marked: begin to send it along the turn's edges."""

    def advance(self, post: int, partners: frozenset[int] | None) -> bool:
        """Move things on; True once all has come.

        Args:
            partners: None until the peers' tokens are here; then those who are at the same mixing
                as this agent, as they, too, will find: where turns differ, values go to them alone.
        """

    def take(self, post: int) -> dict[int, Any]:
        """The values for the pass that was begun: for each source of the turn a buffer."""

    def settle(self) -> None:
        """Wait until this route has nothing left to do."""

    def release(self) -> None:
        """Give back what belongs to others."""

    def free(self) -> None:
        """Give back the rest. Collective over communicators of its own."""


class TokenCarrier:
    """See the module, and `transport.Carrier`. Making one is collective over the agents.

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
        self._turns = agents.turns
        self._turn = 0
        self.peers = peers_of(agents)
        self._tokens = Messages(agents.comm, [(self.peers, self.peers)])
        self.header = aligned(HEADER_BYTES)
        self._received = aligned(HEADER_BYTES * len(self.peers))
        self.headers = np.split(self._received, len(self.peers)) if self.peers else []
        self.edges = edges
        self._posts = 0
        self._requests: Requests | None = None
        self._partners: frozenset[int] | None = None

    @property
    def published(self) -> Any:
        return self._published.buffer(self._posts)

    @property
    def previous(self) -> Any:
        return self._published.buffer(self._posts - 1)

    @property
    def bytes_per_post(self) -> int:
        values = self._published.size_bytes * len(self._turns[self._turn].destinations)
        return HEADER_BYTES * len(self.peers) + values

    def start(self, turn: int) -> None:
        post = self._posts
        self._turn = turn
        self._published.mark(post)
        self._posts += 1
        for route in self._routes:
            route.start(post, turn)
        self._partners = None
        self._received[:] = 0
        self._requests = self._tokens.start(self.header, self._received, 1)

    def advance(self) -> bool:
        assert self._requests is not None
        if self._partners is None and self._requests.Test():
            near = zip(self.peers, self.headers, strict=True)
            self._partners = frozenset(p for p, slot in near if together(self.header, slot))
        done = self._partners is not None
        for route in self._routes:  # each moves on, whatever the others say
            done = route.advance(self._posts - 1, self._partners) and done
        return done

    def take(self) -> list[Any]:
        post = self._posts - 1
        self._published.begin_pass(post)
        near: dict[int, Any] = {}
        for route in self._routes:
            near |= route.take(post)
        return [near[source] for source in self._turns[self._turn].sources]

    def abandon(self) -> bool:
        return False

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
    """The agents that ever have an edge from or to this one, ascending."""
    return tuple(sorted({*agents.sources, *agents.destinations}))

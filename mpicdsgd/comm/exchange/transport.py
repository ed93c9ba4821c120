"""The face of what moves published values from agent to agent.

The protocol (headers, stop, faults, leaving) is in `exchange`; a carrier knows nothing of it. It
sends this agent's 64-byte header and its published buffer with every `start`, and has the peers'
headers and the neighbours' buffers when `advance` has returned True.

Of a cycle of mixing matrices each post serves one turn, the same on all agents. Values go along the
edges of that turn only; headers along those of all turns in every post, so that who is out of step,
leaves or stops is known as soon as on a graph that does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

WIRE_DTYPE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}


@dataclass(frozen=True)
class Edge:
    """How one neighbour's values come here, and why that way."""

    source: int
    transport: str
    why: str


class Carrier(Protocol):
    """See the module; all methods are called by `exchange.Exchange` alone.

    Attributes:
        header: uint8, shape (64,), filled before `start`.
        peers: the agents whose headers come, ascending.
        headers: where, in this post; cleared by `start`.
        published: what to fill before `start`: an array of shape (D,), or a device address.
        previous: what was published last, likewise.
        bytes_per_post: of this post, header and values, once for every reader.
        edges: how each neighbour's values come.
    """

    header: NDArray[np.uint8]
    peers: tuple[int, ...]
    edges: list[Edge]

    @property
    def headers(self) -> list[NDArray[np.uint8]]: ...

    @property
    def bytes_per_post(self) -> int: ...

    @property
    def published(self) -> Any: ...

    @property
    def previous(self) -> Any: ...

    def start(self, turn: int) -> None:
        """Begin a post; whatever is written to `published` must be under way by now. Local."""

    def advance(self) -> bool:
        """Move things on, without waiting; True once all has come. Local."""

    def take(self) -> list[Any]:
        """The buffers of the turn's sources, in agent order, for a pass that follows. Local."""

    def abandon(self) -> bool:
        """Let go of what is under way on revoked communicators; True if MPI has, too. Local."""

    def settle(self) -> None:
        """Finish this agent's own reading and writing. Local; may wait for its own GPU."""

    def release(self) -> None:
        """Give back what belongs to others, after all have settled. Local."""

    def free(self) -> None:
        """Give back what others had, after all have released. Collective over communicators."""

"""Messages along the edges of a graph: point to point, on a communicator of their own.

Sends are posted before receives. A large message is announced, the receiver answers, and only then
does it come. Where the receive is posted first and finds the announcement there already, the peer
is answered at once and fills the one connection of the two; the answer to this agent's own
announcement waits behind that. The two directions then take turns, and over TCP a ring's exchange
takes four times a one-way shift, not two; Open MPI's neighbourhood collectives are made so.

Counts are in blocks of 64 bytes, which keeps MPI's int counts good for buffers of up to 128 GB.
Every exchange has a communicator of its own: on a shared one, two exchanges posted in a different
order would swap their data without any error from MPI.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.header import HEADER_BYTES

_LETTING_GO_S = 5.0

# Of a turn: from whom values come and to whom they go, ascending.
Ends = tuple[Sequence[int], Sequence[int]]


class Requests:
    """Several requests as one."""

    def __init__(self, requests: list[MPI.Request]) -> None:
        self._requests = requests

    def Test(self) -> bool:  # noqa: N802, as MPI's requests have it
        return MPI.Request.Testall(self._requests)

    def abandon(self) -> bool:
        """Have those on revoked communicators end; False if one has not after a while. Local."""
        end = time.monotonic() + _LETTING_GO_S
        for request in self._requests:
            with contextlib.suppress(MPI.Exception):  # which is an end
                while not request.Test():
                    if time.monotonic() > end:
                        return False
        return True


class Messages:
    """See the module. Making one is collective over ``comm``, and so is `free`.

    Args:
        comm: whose ranks are the agents.
        turns: what goes this way, turn by turn.

    Attributes:
        turns: as given.
        slots: of the receive buffer, as many as a turn has sources at most; they fill them in
            their order.
    """

    def __init__(self, comm: MPI.Intracomm, turns: Sequence[Ends]) -> None:
        self.turns = list(turns)
        self.slots = max(len(sources) for sources, _ in turns)
        self._comm: MPI.Intracomm = comm.Dup()
        self._block = MPI.BYTE.Create_contiguous(HEADER_BYTES).Commit()

    def may_start(self, partners: frozenset[int] | None) -> bool:
        """Whether values may go yet; ``partners``: as `token_transport.Route.advance` is told.

        Along edges that are always the same, at once. Else an agent that is out of step would send
        what nobody receives, and its next message would be taken for it: values go when both ends
        know that they are together.
        """
        return len(self.turns) == 1 or partners is not None

    def start(
        self,
        send: Any,
        receive: Any,
        count: int,
        turn: int = 0,
        *,
        partners: frozenset[int] | None = None,
        first: int = 0,
        slot: int | None = None,
    ) -> Requests:
        """Send blocks [first, first + count) to the turn's readers, receive the same. Local.

        Args:
            send: contiguous memory; unchanged until the requests are complete.
            receive: contiguous memory of `slots` slots.
            partners: see `may_start`; where turns differ, values go to and from these alone.
            slot: blocks from one slot to the next; None: ``count``.
        """
        slot = count if slot is None else slot
        sources, readers = self.turns[turn]
        if len(self.turns) == 1:
            partners = None
        requests = [
            self._comm.Isend([send, (count, first), self._block], reader)
            for reader in readers
            if partners is None or reader in partners
        ]
        requests += [
            self._comm.Irecv([receive, (count, first + i * slot), self._block], source)
            for i, source in enumerate(sources)
            if partners is None or source in partners
        ]
        return Requests(requests)

    def free(self) -> None:
        self._block.Free()
        self._comm.Free()


def along(agents: Agents, sources: Sequence[int], readers: Sequence[int]) -> list[Ends]:
    """What is left of each turn where only edges from ``sources`` and to ``readers`` count."""
    return [
        (
            tuple(source for source in turn.sources if source in sources),
            tuple(reader for reader in turn.destinations if reader in readers),
        )
        for turn in agents.turns
    ]

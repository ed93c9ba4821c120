"""A parameter server: the last rank of a job keeps a model, the others ask.

Messages to it carry what they are as their tag and are handled one at a time, those of an agent in
the order in which it sent them. So no update is lost or applied twice; both sides count.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from typing import cast

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.algorithms.server.rules import Rule, rule_from
from mpicdsgd.comm import shutdown
from mpicdsgd.comm.agreement import agreement
from mpicdsgd.common import signals
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.patience import TIMEOUT_S, Patience

OPEN, DUMP, LOAD, EXCHANGE, PUSH, FETCH, COUNT, CLOSE, NEWS = range(1, 10)  # tags
ANSWER = 0
HEAD = 16  # float32 elements before the values of a message


class Server:
    """The last rank of ``comm`` as a server, the others as agents. Collective over ``comm``.

        server = mpicdsgd.Server(MPI.COMM_WORLD)
        if server.is_here:
            server.serve()
        else:
            agents = mpicdsgd.Agents(server.comm, mixing)  # for one agent less than ranks
            opt = mpicdsgd.Downpour(model.parameters(), agents=agents, server=server)

    Attributes:
        is_here: whether this rank is the server.
        comm: the agents' communicator, MPI.COMM_NULL on the server.
        line: the communicator with the server, whose last rank it is.
        signal: on agent 0, the one that the server got and that means a stop, as far as known.

    Raises:
        UserError: on every rank, if there are fewer than two.
    """

    def __init__(self, comm: MPI.Intracomm, timeout_s: float = TIMEOUT_S) -> None:
        with agreement(comm, "Server()", timeout_s):
            if comm.size < 2:
                raise UserError(
                    "no rank is left for the server: it has one of its own, so for N agents start "
                    f"N + 1 ranks, at least 2; got {comm.size}"
                )
        self.line: MPI.Intracomm = comm.Dup()
        self.rank = comm.size - 1
        self.is_here = comm.rank == self.rank
        self.comm = cast(MPI.Intracomm, comm.Split(MPI.UNDEFINED if self.is_here else 0))
        self.is_used = False  # by an optimizer
        self.signal = ""
        self._code = np.zeros(1, np.int64)
        self._is_open = True
        shutdown.watch(self)

    def serve(self) -> int:
        """Answer until all agents have closed; the greatest code that they gave. On the server."""
        assert self.is_here
        agents, code = self.rank, 0
        desk = _Desk(self.line)
        while agents:
            tag, body = desk.next()
            if tag == CLOSE:
                agents -= 1
                code = max(code, int(body[:2].view(np.int64)[0]))
        desk.settle()
        self._is_open = False
        shutdown.forget(self)
        return code

    def close(self, code: int = 0) -> None:
        """Tell the server that this agent will ask no more; a second call does nothing. Local.

        Args:
            code: what the server is to return from `serve`.
        """
        if self._is_open and not self.is_here:
            self._is_open = False
            self._code[0] = code
            self.line.Send(self._code.view(np.float32), self.rank, CLOSE)
            shutdown.forget(self)

    def abandon(self) -> None:
        """Nothing: a job with a server ends with its first dead rank."""

    def drain(self) -> Iterator[None]:
        """`close` at exit."""
        self.close(1 if hasattr(sys, "last_value") else 0)
        yield from ()


class _Desk:
    """The server's side: its state, and one message after the other."""

    def __init__(self, line: MPI.Intracomm) -> None:
        self._line = line
        self._rule: Rule | None = None
        self._body = np.zeros(HEAD, np.float32)
        self._applied = np.zeros(line.size - 1, np.int64)
        self._replies: dict[int, deque[MPI.Request]] = {}  # under way, to each agent

    def next(self) -> tuple[int, NDArray[np.float32]]:
        """Handle the next message; its tag and body."""
        status = MPI.Status()
        patience = Patience(float("inf"))  # agents may compute for as long as they like
        while (message := self._line.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)) is None:
            self._collect()
            patience.pause()
        agent, tag = status.Get_source(), status.Get_tag()
        count = status.Get_count(MPI.FLOAT)
        if count > self._body.size:
            self._body = np.zeros(count, np.float32)
        body = self._body[:count]
        request = message.Irecv(body)
        patience = Patience(float("inf"))
        while not request.Test():
            patience.pause()
        if tag != CLOSE:
            self._handle(agent, tag, body)
        return tag, body

    def settle(self) -> None:
        """Wait for all replies."""
        patience = Patience(float("inf"))
        while any(self._replies.values()):
            self._collect()
            patience.pause()

    def _handle(self, agent: int, tag: int, body: NDArray[np.float32]) -> None:
        if tag == OPEN:
            self._rule = rule_from(body)
            self._applied[:] = 0
            self._answer(agent, np.zeros(0, np.float32))
            return
        if tag == COUNT:
            self._answer(agent, self._applied[agent : agent + 1].view(np.float32))
            return
        if tag == NEWS:
            got = np.array([signals.received() or 0], np.int64)
            self._answer(agent, got.view(np.float32), NEWS)
            return
        rule = self._rule
        assert rule is not None, "the first message is OPEN"
        if tag == DUMP:
            for array in self._arrays(rule):
                self._answer(agent, array)
        elif tag == LOAD:
            self._load(body, rule)
            self._answer(agent, np.zeros(0, np.float32))
        elif tag == EXCHANGE:
            self._answer(agent, rule.x)  # as it was
            rule.exchange(body[HEAD:])
            self._applied[agent] += 1
        elif tag == PUSH:
            rule.push(body)
            self._applied[agent] += 1
        elif tag == FETCH:
            self._answer(agent, rule.x)

    def _load(self, body: NDArray[np.float32], rule: Rule) -> None:
        end = 0
        for array in self._arrays(rule):
            array[:] = body[end : end + array.size]
            end += array.size

    def _arrays(self, rule: Rule) -> list[NDArray[np.float32]]:
        """The whole state, to be written in place; bits, whatever their type."""
        return [*rule.arrays(), self._applied.view(np.float32)]

    def _answer(self, agent: int, values: NDArray[np.float32], tag: int = ANSWER) -> None:
        """Send a copy, without waiting for the agent: it may be computing."""
        # A request keeps its buffer. An agent waits for what it asked before it asks again, so
        # there is no more than one model on its way to each.
        request = self._line.Isend(values.copy(), agent, tag)
        self._replies.setdefault(agent, deque()).append(request)

    def _collect(self) -> None:
        for requests in self._replies.values():
            while requests and requests[0].Test():
                requests.popleft()

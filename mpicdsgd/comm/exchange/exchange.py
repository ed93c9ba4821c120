"""The exchange's protocol: posting, waiting, how a stop and a fault spread, and how it ends.

What moves the values is a `transport.Carrier`; everything here is about the 64-byte headers that
travel with them.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm import shutdown
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.communication import Hooks, NoHooks, Quiet
from mpicdsgd.comm.exchange import header as hd
from mpicdsgd.comm.exchange.errors import AgentFault, AgentLeft, AgentMissing, OutOfStep
from mpicdsgd.comm.exchange.header import NEVER, Fault, Header, Reason
from mpicdsgd.comm.exchange.notices import Notices
from mpicdsgd.comm.exchange.progress_thread import Helper
from mpicdsgd.comm.exchange.transport import Carrier, Edge
from mpicdsgd.common.patience import Patience

log = logging.getLogger("mpicdsgd")

_GRACE_S = 1.0  # how long close() waits for the others before it tells them that it left

_kept: list[Carrier] = []  # with their buffers: MPI may yet write into them


class Exchange(Notices, Quiet):
    """What this agent shows its neighbours, and what it sees of them.

    `post` and `wait` alternate; between them `published` must not be written. Between `wait` and
    the next `post` the neighbours' buffers are valid and `published` is free. On a GPU all this is
    meant in the order of the stream that was current at `wait` and `post`.

    Args:
        agents: the agents; opening is collective over their communicator.
        carrier: what moves the values; the exchange closes it.
        timeout_s: how long `wait` and `close` wait for neighbours, in seconds.
        by_thread: whether a thread moves the data between `post` and `wait`, not `progress` alone.

    Attributes:
        published: the buffer to fill before `post`, shape (D,) (on a GPU: its address).
        previous: what this agent published last, likewise; it may be the same memory.
        edges: how each neighbour's values come, and why that way.
        stop_step, stops_within, fault, fault_raised, wait_s, bytes_sent, before_closing: as
            `communication.Communication` has them.
    """

    carries_values = True
    averages_gradients = False

    def __init__(
        self, agents: Agents, carrier: Carrier, timeout_s: float, by_thread: bool = False
    ) -> None:
        super().__init__(agents.rank, agents.graph.diameter)
        self._carrier = carrier
        self.hooks: Hooks = NoHooks()
        self._helper = Helper(carrier.advance) if by_thread else None
        self._all: MPI.Intracomm = agents.comm.Dup()
        self._destinations = agents.destinations
        self._sources = [turn.sources for turn in agents.turns]
        self._timeout_s = timeout_s
        self._generation = agents.generation
        self.wait_s = 0.0
        self.bytes_sent = 0
        self._left: tuple[int, int] | None = None  # (steps, agent) of the first that left
        self._posted = 0
        self._turn = 0
        self._under_way = False
        self._closed = False
        self._numbers: dict[int, tuple[float, ...]] = {}  # of each peer, in the last post
        self.before_closing: Callable[[], None] = _nothing
        shutdown.watch(self)

    @property
    def published(self) -> Any:
        return self._carrier.published

    @property
    def previous(self) -> Any:
        return self._carrier.previous

    @property
    def edges(self) -> list[Edge]:
        return self._carrier.edges

    def post(
        self, step: int, mixing_round: int = 0, turn: int = 0, numbers: tuple[float, ...] = ()
    ) -> None:
        """Start showing `published`, which holds ``step`` completed steps. Returns at once.

        Args:
            mixing_round: of this step; ``turn``: of the cycle of mixing matrices, for this round.
            numbers: at most `header.NUMBERS`, float64.
        """
        self.tell(step)
        header = Header(
            step, mixing_round, self._generation, self.stop_step, self.fault, numbers=numbers
        )
        self._post(header, turn)

    def after(self, step: int) -> None:
        """Others hear of it by the next header, which an agent alone need not wait for."""
        self._step = step
        self.tell_alone()

    def withdraw(self, step: int) -> None:
        """End the exchange under way without using what comes, as parameters are to be changed."""
        if self._under_way:
            self.wait(step)

    def numbers(self) -> list[tuple[float, ...]]:
        """What came beside the buffers that `wait` gave, in the same order."""
        return [self._numbers[agent] for agent in self._sources[self._turn]]

    def progress(self) -> bool:
        """Let MPI move data, for a moment; whether nothing is under way any more.

        May be called at any time.
        """
        if not self._under_way:
            return True
        return self._carrier.advance() if self._helper is None else self._helper.is_done

    def wait(self, step: int, mixing_round: int = 0) -> list[Any]:
        """The neighbours' buffers after ``step`` steps, in agent order, once all have come.

        Raises:
            AgentMissing: some did not post within the timeout.
            AgentLeft: some have closed their exchange.
            OutOfStep: some are at another step or round, or of another generation of the run.
            RuntimeError: if the step before was interrupted, or in a forked child.
        """
        if not self._under_way or not shutdown.is_rank():
            raise RuntimeError(
                "no exchange is under way: nothing was published, or this is a forked child process"
            )
        start = time.perf_counter()
        if self._helper is not None:
            self._helper.end()
        patience = Patience(self._timeout_s)
        while not self._carrier.advance():
            if not patience.pause():
                raise AgentMissing(self._missing())
        self._under_way = False
        self.wait_s += time.perf_counter() - start
        for agent, slot in zip(self._carrier.peers, self._carrier.headers, strict=True):
            header = hd.read(slot)
            self._check(agent, header, step, mixing_round)
            self._numbers[agent] = header.numbers if header is not None else ()
        return self._carrier.take()

    def close(self) -> None:
        """Complete what is under way, tell agents that go on, free the communicators.

        Collective, though not at the same step: agents that go on learn of it in their next
        `wait`. A second call does nothing.

        Raises:
            AgentMissing: if some neither close nor go on within the timeout.
            AgentFault: on all agents, for a fault that the last steps found and none has raised.
        """
        active = sys.exc_info()[1]
        if active is not None and not self._closed and shutdown.in_job():
            # In a `finally`: the others hear of the end before the exception is seen.
            print(f"[rank {self._rank}] closing because of:", file=sys.stderr)
            traceback.print_exception(active)
        for _ in self.drain():
            pass

    def abandon(self) -> None:
        """End this agent's part when its communicators have been revoked, for good. Local.

        Where others are dead there is no closing with them.
        """
        self._closed = True
        helper, self._helper = self._helper, None
        if helper is not None:
            with contextlib.suppress(Exception):  # it met what has led here
                helper.stop()
        self._under_way = False
        self.before_closing = _nothing
        shutdown.forget(self)
        if not self._carrier.abandon():
            _kept.append(self._carrier)

    def drain(self) -> Iterator[None]:
        """`close`, yielding after every pause; `shutdown` drains several exchanges at once."""
        if self._closed:
            return
        self._closed = True
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.stop()
        self.before_closing()
        self.before_closing = _nothing  # it refers to who refers to this: memory is given back now
        self.tell_at_last()
        everybody_closes = self._all.Ibarrier()
        patience = Patience(self._timeout_s)
        while not everybody_closes.Test():
            if self._under_way:
                if self._carrier.advance():
                    self._learn_of_leavers()
            elif patience.waited_s > _GRACE_S:
                self._post_leaving()
            if not patience.pause():
                raise AgentMissing(self._missing())
            yield
        ends = yield from self._gather([self._posted, self._step], patience)
        while self._under_way or self._posted < ends[:, 0].max():
            if not self._under_way:
                self._post_leaving()
            elif self._carrier.advance():
                self._learn_of_leavers()
            elif not patience.pause():
                raise AgentMissing(self._missing())
            yield
        fault = [self.fault.step, self.fault.at, self.fault.reason, self.fault.agent]
        faults = yield from self._gather(fault, patience)
        self.fault = min(Fault(f[0], f[1], Reason(f[2]), f[3]) for f in faults.tolist())
        steps = ends[:, 1]
        if self._rank == 0 and steps.min() != steps.max():
            log.warning("the agents closed after different numbers of steps: %s", steps.tolist())
        # Others may yet read what is ours: nobody gives back before all have settled.
        self._carrier.settle()
        yield from self._gather([1], patience)
        self._carrier.release()
        yield from self._gather([1], patience)
        shutdown.forget(self)
        self._carrier.free()
        self._all.Free()
        if self.fault.reason and not self.fault_raised:
            self.fault_raised = True
            raise AgentFault(self.fault)

    def _gather(
        self, values: list[int], patience: Patience
    ) -> Generator[None, None, NDArray[np.int64]]:
        """All ranks' values, a row each; without blocking, as another exchange may come first."""
        mine = np.array(values, np.int64)
        rows = np.empty((self._all.size, mine.size), np.int64)
        # Kept with its buffers even after the timeout, as MPI may yet write into them.
        self._gathering = self._all.Iallgather(mine, rows)
        while not self._gathering.Test():
            if not patience.pause():
                raise AgentMissing(self._missing())
            yield
        return rows

    def _post(self, header: Header, turn: int) -> None:
        assert not self._under_way, "post() before wait()"
        hd.write(header, self._carrier.header)
        self._step = header.step
        self._turn = turn
        self._posted += 1
        self._under_way = True
        self._carrier.start(turn)
        self.bytes_sent += self._carrier.bytes_per_post
        if self._helper is not None:
            self._helper.begin()

    def _post_leaving(self) -> None:
        self._left = self._left or (self._step, self._rank)
        step, agent = self._left
        header = Header(self._step, 0, self._generation, NEVER, self.fault, agent, step)
        self._post(header, self._turn)

    def _learn_of_leavers(self) -> None:
        self._under_way = False
        for slot in self._carrier.headers:
            header = hd.read(slot)
            if header is not None and header.leaving:
                left = (header.leaver_step, header.leaver)
                self._left = min(self._left or left, left)

    def _check(self, agent: int, header: Header | None, step: int, mixing_round: int) -> None:
        if header is None:
            raise OutOfStep(f"agent {agent} sent no valid header to agent {self._rank}")
        self.stop_step = min(self.stop_step, header.stop_step)
        self.fault = min(self.fault, header.fault)
        if header.leaving:
            self._learn_of_leavers()  # more than one may have left: the first is named
            assert self._left is not None
            last_step, leaver = self._left
            raise AgentLeft(
                f"agent {leaver} left after step {last_step}, agent {self._rank} is at step "
                f"{step}: all agents must take the same number of steps"
            )
        if header.generation != self._generation:
            raise OutOfStep(
                f"agent {agent} is of generation {header.generation} of the run, agent "
                f"{self._rank} of {self._generation}"
            )
        if (header.step, header.round) != (step, mixing_round):
            raise OutOfStep(
                f"agent {agent} is at step {header.step}, agent {self._rank} at step {step}: "
                "step(), publish() and load_state_dict() must be called on all agents alike"
            )

    def _missing(self) -> str:
        missing = [
            agent
            for agent, slot in zip(self._carrier.peers, self._carrier.headers, strict=True)
            if hd.read(slot) is None
        ]
        who = (
            f"nothing came from agents {missing} (which may themselves be waiting)"
            if missing and self._under_way
            else f"agents {list(self._destinations)} do not receive"
        )
        return (
            f"agent {self._rank} waited {self._timeout_s:g} s after step {self._step}: {who}; "
            "exchange.timeout_s sets the limit"
        )


def _nothing() -> None:
    pass

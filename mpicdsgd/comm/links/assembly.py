"""All agents together, where no graph's edges carry a stop or a fault; see `comm.communication`.

The algorithms that the paper compares with average over all agents, or ask a server, or meet one
other agent at a time. What moves the values is a part of its own (a file beside this one); how a
stop and a fault spread, how all end and what is counted is here.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm import shutdown
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.communication import Hooks, NoHooks, Quiet
from mpicdsgd.comm.exchange.errors import AgentFault, AgentLeft
from mpicdsgd.comm.exchange.header import Fault, Reason
from mpicdsgd.comm.links.notices import Signals
from mpicdsgd.comm.waiting import Waiter

log = logging.getLogger("mpicdsgd")

_GRACE_S = 1.0  # how long close() waits for the others before it tells them that it left
_LEFT = 1  # tag
_PART = 1 << 26  # elements at once: no MPI library takes more than 2^31 bytes everywhere


def pieces(host_D: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Views of ``host_D`` that MPI can take, one after the other."""
    return [host_D[start : start + _PART] for start in range(0, host_D.size, _PART)]


class Part(Protocol):
    """What moves values between agents, a part of an assembly."""

    def progress(self) -> bool:
        """Let MPI move data, for a moment; whether nothing is under way. During backward, too."""

    def rest(self) -> None:
        """Bring everything under way to its end. Collective, after the same step on all agents."""

    def end(self) -> Iterator[None]:
        """As `rest`, for the last time, yielding while there is something to wait for."""


class Assembly(Quiet):
    """See the module and `communication.Communication`. Making one is collective over ``agents``.

    Args:
        every: steps between two `Signals`; agents are never more than twice that apart.
        timeout_s: how long to wait for an agent that is a step behind, in seconds; for one that may
            be many steps behind, ``every`` / 4 times as long.

    Attributes:
        parts: what is under way, in the order in which it is ended.
        comm: for the parts; waiter: waits for what they have under way.
        bytes_sent: by this agent since opening. A sum over all agents counts as what an optimal
            Allreduce sends, 2 (N - 1) / N of its bytes, as MPI does not say what it sends.
    """

    carries_values = False
    averages_gradients = False
    published: Any = None  # nothing is published by the pass itself
    previous: Any = None

    def __init__(self, agents: Agents, every: int, timeout_s: float) -> None:
        self.agents = agents
        self.parts: list[Part] = []
        self.hooks: Hooks = NoHooks()
        self.comm: MPI.Intracomm = agents.comm.Dup()
        self.bytes_sent = 0
        self.fault_raised = False
        self.stops_within = 2 * every
        self.before_closing: Callable[[], None] = _nothing
        self.waiter = Waiter(agents.rank, timeout_s * max(1.0, every / 4))
        self.waiter.meanwhile = self._meanwhile
        self._signals = Signals(agents, every, self.waiter)
        self._closing: MPI.Intracomm = agents.comm.Dup()  # ranks may close at different steps
        self._left: NDArray[np.int64] | None = None
        self._leavers: dict[int, int] = {}  # agents that told so, and after which step
        self._closed = False
        shutdown.watch(self)

    def begin(self, step: int) -> None:
        self._signals.begin(step)
        self.waiter.step = step

    def after(self, step: int) -> None:
        self._signals.after(step)
        self.waiter.step = step  # only now: an agent that left after it has done all this, too

    def post(
        self, step: int, mixing_round: int = 0, turn: int = 0, numbers: tuple[float, ...] = ()
    ) -> None:
        raise NotImplementedError("nothing is published here: there are no edges")

    def wait(self, step: int, mixing_round: int = 0) -> list[Any]:
        return []

    def numbers(self) -> list[tuple[float, ...]]:
        return []

    def progress(self) -> bool:
        self._signals.progress()
        return all([part.progress() for part in self.parts])  # noqa: C419 - each of them

    def look(self) -> None:
        self.hooks.look()

    def rest(self) -> None:
        for part in self.parts:
            part.rest()
        self.hooks.rest()

    def free(self) -> None:
        """Give back communicators and memory."""

    def withdraw(self, step: int) -> None:
        """Have nothing under way, as parameters are to be changed. Collective."""
        self.rest()

    def request_stop(self) -> None:
        self._signals.request_stop()

    @property
    def stop_wanted(self) -> bool:
        return self._signals.stop_wanted

    @property
    def stop_step(self) -> int:
        return self._signals.stop_step

    @property
    def fault(self) -> Fault:
        return self._signals.fault

    @property
    def fault_known(self) -> Fault:
        return self._signals.fault_known

    def report(self, reason: Reason, at: int | None = None) -> None:
        self._signals.report(reason, at)

    @property
    def wait_s(self) -> float:
        return self.waiter.wait_s

    def close(self) -> None:
        """End it. Collective; a second call does nothing. Raises as `Exchange.close`."""
        for _ in self.drain():
            pass

    def drain(self) -> Iterator[None]:
        """`close`, yielding after every look; `shutdown` drains several at once."""
        if self._closed:
            return
        self._closed = True
        self.before_closing()
        self.before_closing = _nothing
        step = self.waiter.step
        for waited_s in self.waiter.looks(self._closing.Ibarrier(), "the others to close"):
            if waited_s > _GRACE_S and self._left is None:
                self._tell_that_left(step)
            yield
        ends = np.empty((self.agents.size, 2), np.int64)
        mine = np.array([step, self._left is not None], np.int64)
        yield from self._quietly(self._closing.Iallgather(mine, ends))
        for rank in np.flatnonzero(ends[:, 1]).tolist():
            if rank != self.agents.rank and rank not in self._leavers:
                self._closing.Recv(np.empty(1, np.int64), rank, _LEFT)
        if self.agents.rank == 0 and ends[:, 0].min() != ends[:, 0].max():
            log.warning(
                "the agents closed after different numbers of steps: %s", ends[:, 0].tolist()
            )
        for part in self.parts:
            yield from part.end()
        self.parts = []  # what they refer to may refer to this
        yield from self._signals.conclude()
        yield from self._quietly(self._closing.Ibarrier())
        shutdown.forget(self)
        self.free()
        self._signals.free()
        self._closing.Free()
        self.comm.Free()
        if self.fault.reason and not self.fault_raised:
            self.fault_raised = True
            raise AgentFault(self.fault)

    def alike(self, replica_D: torch.Tensor, what: str) -> None:
        """Raise a RuntimeError unless ``replica_D`` is the same on all agents. Collective.

        MPI does not promise the same bits of a sum on all ranks; where it gives others, what should
        be one model would slowly become several.
        """
        mine = np.array([zlib.crc32(replica_D.cpu().numpy().data)], np.int64)
        all_ = np.empty(self.agents.size, np.int64)
        self.waiter.wait(self.comm.Iallgather(mine, all_), "the other agents")
        if (all_ != all_[0]).any():
            raise RuntimeError(
                f"{what} is not the same on all agents: this MPI library's Allreduce does not give "
                "all ranks the same bits; choose another algorithm in its settings"
            )

    def broadcast(self, values_D: torch.Tensor) -> None:
        """Give every agent agent 0's ``values_D``, in place. Collective."""
        host = values_D.cpu().contiguous()
        for part in pieces(host.numpy()):
            self.waiter.wait(self.comm.Ibcast(part, root=0), "agent 0")
        values_D.copy_(host)

    def everyones(self, value: float) -> NDArray[np.float64]:
        """``value`` of every agent, shape (N,). Collective."""
        mine, all_ = np.array([value], np.float64), np.empty(self.agents.size, np.float64)
        self.waiter.wait(self.comm.Iallgather(mine, all_), "the other agents")
        return all_

    def meet(self) -> None:
        """Have all agents here before they raise: the first to end would take rank 0's message."""
        self.together()

    def together(self) -> None:
        """Wait until all agents are here. Collective."""
        self.waiter.wait(self.comm.Ibarrier(), "the other agents")

    def counted(self, bytes_: int) -> None:
        """Count a sum over all agents of so many bytes."""
        self.bytes_sent += 2 * bytes_ * (self.agents.size - 1) // self.agents.size

    def _quietly(self, request: MPI.Request) -> Iterator[None]:
        for _ in self.waiter.looks(request, "the others to close"):
            yield

    def _tell_that_left(self, step: int) -> None:
        self._left = np.array([step], np.int64)
        others = [rank for rank in range(self.agents.size) if rank != self.agents.rank]
        self._telling = [self._closing.Isend(self._left, rank, _LEFT) for rank in others]

    def _meanwhile(self, waited_s: float) -> None:
        self.look()
        if waited_s < _GRACE_S or self._closed:
            return
        status = MPI.Status()
        while self._closing.Iprobe(MPI.ANY_SOURCE, _LEFT, status):
            agent, last = status.Get_source(), np.empty(1, np.int64)
            self._closing.Recv(last, agent, _LEFT)
            self._leavers[agent] = int(last[0])
        for agent, step in self._leavers.items():
            if step <= self.waiter.step:  # else it has only been faster
                raise AgentLeft(
                    f"agent {agent} left after step {step}, agent {self.agents.rank} is at step "
                    f"{self.waiter.step}: all agents must take the same number of steps"
                )


def _nothing() -> None:
    pass

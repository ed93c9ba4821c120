"""What agents share by other ways than a graph's edges, behind the face of an `Exchange`.

The algorithms that the paper compares with average over all agents, or ask a server, or meet one
other agent at a time. Each has a link (a file beside this one) that says what happens after a step
and before the next pass; how a stop and a fault spread, how it ends and what is counted is here.
"""

from __future__ import annotations

import contextlib
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
from mpicdsgd.comm.exchange.errors import AgentFault, AgentLeft
from mpicdsgd.comm.exchange.header import Fault, Reason
from mpicdsgd.comm.links.notices import Signals
from mpicdsgd.comm.waiting import Waiter

log = logging.getLogger("mpicdsgd")

_GRACE_S = 1.0  # how long close() waits for the others before it tells them that it left
_LEFT = 1  # tag


class Memory(Protocol):
    """The agent's parameters, as a `Stepper` has them."""

    @property
    def x(self) -> torch.Tensor:
        """Shape (D,), on the agent's device; to be written by the two below only."""

    def mix_in(self, other_D: torch.Tensor, weight: float) -> None:
        """x <- x + weight (other - x), by the kernel."""

    def replace(self, values_D: torch.Tensor) -> None:
        """x <- values."""


class Link:
    """Base of the links. Making one is collective over ``agents``.

    `begin`, then `wait` and `post` in turn, as an `Exchange`'s.

    Args:
        every: steps between two `Signals`; agents are never more than twice that apart.
        timeout_s: how long to wait for an agent that is a step behind, in seconds; for one that may
            be many steps behind, ``every`` / 4 times as long.

    Attributes:
        memory: the agent's parameters, set by `attach`.
        bytes_sent: by this agent since opening. A sum over all agents counts as what an optimal
            Allreduce sends, 2 (N - 1) / N of its bytes, as MPI does not say what it sends.
        stop_step, stops_within, fault, fault_raised, wait_s, before_closing: as of an `Exchange`.
    """

    published: Any = None  # nothing is published by the pass itself
    previous: Any = None
    memory: Memory

    def __init__(self, agents: Agents, every: int, timeout_s: float) -> None:
        self.agents = agents
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
        self._closed = self._is_loaded = self._is_busy = False
        shutdown.watch(self)

    # What a link is made of: each does nothing here.

    def began(self, step: int, is_new: bool) -> None:
        """The parameters were given from outside, after ``step`` steps. Collective, at rest.

        Args:
            is_new: whether what the agents share begins with them; else `load` gave that.
        """

    def stepped(self, step: int) -> None:
        """The pass of step ``step`` is done; `x` may be changed here."""

    def neighbours(self) -> list[torch.Tensor]:
        """What the next pass mixes in, shape (D,) each, with the stepper's weights."""
        return []

    def advance(self) -> bool:
        """Let MPI move data, for a moment; whether nothing is under way. During backward, too."""
        return True

    def look(self) -> None:
        """What can be done while this agent waits for others, between two steps."""

    def rest(self) -> None:
        """Bring everything under way to its end. Collective, after the same step on all agents."""

    def arrays(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beside the agent's own arrays, by name; written in place."""
        return {}

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave; `begin` follows. Local."""
        for name, tensor in self.arrays().items():
            tensor.copy_(torch.from_numpy(np.array(arrays[name])))
        self._is_loaded = True

    def centre(self) -> torch.Tensor | None:
        """The model beside the agents' own, shape (D,), if there is one. Collective, at rest."""
        return None

    def end(self) -> Iterator[None]:
        """As `rest`, for the last time, yielding while there is something to wait for."""
        yield from ()

    def free(self) -> None:
        """Give back communicators and memory."""

    # The face of an exchange.

    def attach(self, memory: Memory) -> None:
        """Work on the parameters in ``memory``. Before anything else."""
        self.memory = memory

    def begin(self, step: int, turn: int = 0) -> None:
        """Take the parameters as they are. Collective."""
        with self._uninterrupted():
            self._signals.begin(step)
            self.began(step, not self._is_loaded)
            self._is_loaded = False
            self.waiter.step = step

    def post(self, step: int, mixing_round: int = 0, turn: int = 0) -> None:
        """What follows the pass that completed ``step``."""
        with self._uninterrupted():
            self.stepped(step)
            self._signals.after(step)
            self.waiter.step = step  # only now: an agent that left after it has done all this, too

    def wait(self, step: int, mixing_round: int = 0) -> list[Any]:
        """What the next pass mixes in."""
        with self._uninterrupted():
            return [self._address(buffer) for buffer in self.neighbours()]

    def progress(self) -> bool:
        """Let MPI move data, for a moment; whether nothing is under way. At any time."""
        self._signals.progress()
        return self.advance()

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
        yield from self.end()
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

    def meet(self) -> None:
        """Have all agents here before they raise: the first to end would take rank 0's message."""
        self.together()

    def together(self) -> None:
        """Wait until all agents are here. Collective."""
        self.waiter.wait(self.comm.Ibarrier(), "the other agents")

    @contextlib.contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        if self._is_busy:
            raise RuntimeError(
                "the last step was interrupted by an exception: the agents are out of step, end "
                "the job and go on from a checkpoint"
            )
        self._is_busy = True
        yield
        self._is_busy = False

    def counted(self, bytes_: int) -> None:
        """Count a sum over all agents of so many bytes."""
        self.bytes_sent += 2 * bytes_ * (self.agents.size - 1) // self.agents.size

    def _quietly(self, request: MPI.Request) -> Iterator[None]:
        for _ in self.waiter.looks(request, "the others to close"):
            yield

    def _address(self, buffer: torch.Tensor) -> Any:
        return buffer.numpy() if buffer.device.type == "cpu" else buffer.data_ptr()

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

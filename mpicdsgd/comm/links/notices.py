"""How a stop and a fault become known to all agents where no headers travel with the values.

Every agent posts a small nonblocking Allreduce after each step s that is a multiple of ``every``,
and completes the one before it at the same place. What that one says is the same on all agents, so
all stop, or raise, after the same step s: at most 2 * ``every`` steps after somebody asked. Agents
are never further apart than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from mpi4py import MPI

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.header import NEVER, Fault, Reason
from mpicdsgd.comm.waiting import Waiter

_AT, _REASON, _AGENT = 32, 4, 20  # bits of a fault in one word: the earliest is the least
_NO_STOP = 1


class Signals:
    """See the module. Making one is collective over ``agents``.

    Args:
        every: steps between two messages.
        waiter: waits for them, with a timeout.

    Attributes:
        stop_step: after so many steps all agents stop, as far as known here.
        fault: the fault that all agents raise, as far as known here.
    """

    def __init__(self, agents: Agents, every: int, waiter: Waiter) -> None:
        assert agents.size <= 1 << _AGENT
        self._comm: MPI.Intracomm = agents.comm.Dup()
        self._rank, self._every, self._waiter = agents.rank, every, waiter
        self.stop_step = NEVER
        self.fault = Fault()
        self._wants_stop = False
        self._found: tuple[Reason, int] | None = None
        self._sent = np.empty(2, np.int64)
        self._heard = np.empty(2, np.int64)
        self._under_way: MPI.Request | None = None
        self._step = 0

    @property
    def stop_wanted(self) -> bool:
        return self._wants_stop or self.stop_step < NEVER

    @property
    def fault_known(self) -> Fault:
        """`fault`, or one found here that the others do not know yet, if that is less."""
        return self.fault if self._found is None else min(self.fault, self._own(NEVER - 1))

    def request_stop(self) -> None:
        self._wants_stop = True

    def report(self, reason: Reason, at: int | None = None) -> None:
        self._found = self._found or (reason, self._step if at is None else at)

    def progress(self) -> None:
        """Let MPI move what is under way."""
        if self._under_way is not None:
            self._under_way.Test()

    def begin(self, step: int) -> None:
        """Start anew from ``step``; all agents alike. What is under way is completed."""
        self.complete()
        self._step = step
        self._post()

    def after(self, step: int) -> None:
        """Tell and hear, at the steps that are due. Waits for agents that are far behind.

        Raises:
            AgentMissing: see `Waiter`.
        """
        self._step = step
        if step % self._every == 0:
            self.complete()
            self._post()

    def complete(self) -> None:
        """Complete what is under way, for the step of now."""
        if self._under_way is not None:
            self._waiter.wait(self._under_way, "the other agents")
            self._hear()

    def conclude(self) -> Iterator[None]:
        """Hear of every fault found by now, also after the last message. Collective; yields."""
        if self._under_way is None:
            self._post()
        for last in (False, True):
            assert self._under_way is not None
            for _ in self._waiter.looks(self._under_way, "the others to close"):
                yield
            self._hear()
            if not last:
                self._post()

    def free(self) -> None:
        self._comm.Free()

    def _hear(self) -> None:
        self._under_way = None
        stop, fault = (int(word) for word in self._heard)
        if stop < _NO_STOP:
            self.stop_step = min(self.stop_step, self._step)
        if fault < NEVER:
            self.fault = min(self.fault, _unpacked(fault, self._step))

    def _post(self) -> None:
        self._sent[0] = 0 if self._wants_stop else _NO_STOP
        self._sent[1] = NEVER if self._found is None else _packed(self._own(self._step))
        # The wish is told again until it is known, for who asks while a message is under way.
        self._under_way = self._comm.Iallreduce(self._sent, self._heard, MPI.MIN)

    def _own(self, step: int) -> Fault:
        assert self._found is not None
        reason, at = self._found
        return Fault(step, at, reason, self._rank)


def _packed(fault: Fault) -> int:
    return ((fault.at << _REASON | int(fault.reason)) << _AGENT) | fault.agent


def _unpacked(word: int, step: int) -> Fault:
    agent = word & (1 << _AGENT) - 1
    reason = word >> _AGENT & (1 << _REASON) - 1
    return Fault(step, word >> _AGENT + _REASON, Reason(reason), agent)

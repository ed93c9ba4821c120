"""The neighbour transport: one nonblocking MPI neighbourhood collective per exchange.

All send displacements are 0, so the one published buffer goes to every reader without a copy.
Counts are always explicit and in blocks of 64 bytes: Open MPI truncates inferred counts where a
rank has degree 0, and blocks keep MPI's int counts good for buffers of up to 128 GB.

Every exchange has a graph communicator of its own: on a shared one, two exchanges posted in a
different order would swap their data without any error from MPI.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Generator, Iterator

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd import shutdown
from mpicdsgd.agents import Agents
from mpicdsgd.agreement import Patience
from mpicdsgd.exchange import header as hd
from mpicdsgd.exchange.errors import AgentFault, AgentLeft, AgentMissing, OutOfStep
from mpicdsgd.exchange.header import HEADER_BYTES, NEVER, Fault, Header, Reason

log = logging.getLogger("mpicdsgd")

WIRE_DTYPE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}

_GRACE_S = 1.0  # how long close() waits for the others before it tells them that it left


class NeighborExchange:
    """What this agent shows its neighbours and what it sees of them, over MPI messages.

    `post` and `wait` alternate; between them `published` must not be written. Between `wait` and
    the next `post` the neighbours' buffers are valid and `published` is free.

    Args:
        agents: the agents; opening is collective over their communicator.
        size: elements D of a published buffer, the same on every rank.
        wire: "float32", "bfloat16" or "float16", the type of a published element.
        timeout_s: how long `wait` and `close` wait for neighbours, in seconds.

    Attributes:
        published: the buffer to fill before `post`, shape (D,).
        previous: what this agent published last, shape (D,); here the same memory.
        stop_step: after so many steps all agents stop, as far as known here.
        fault: the least fault known here.
        fault_raised: whether it has been raised already, so that closing need not raise it again.
        wait_s, bytes_sent: totals since opening.
    """

    def __init__(self, agents: Agents, size: int, wire: str, timeout_s: float) -> None:
        self._comm: MPI.Distgraphcomm = agents.comm.Create_dist_graph_adjacent(
            list(agents.sources), list(agents.destinations), reorder=False
        )
        self._all: MPI.Intracomm = agents.comm.Dup()
        self._rank = agents.rank
        self._sources = agents.sources
        self._destinations = agents.destinations
        self._diameter = agents.graph.diameter
        self._timeout_s = timeout_s
        dtype = np.dtype(WIRE_DTYPE[wire])
        payload = slice(HEADER_BYTES, HEADER_BYTES + size * dtype.itemsize)
        slot_bytes = HEADER_BYTES * (1 + -(-size * dtype.itemsize // HEADER_BYTES))
        blocks, degree, readers = slot_bytes // HEADER_BYTES, len(self._sources), len(
            agents.destinations
        )  # fmt: skip
        self._block = MPI.BYTE.Create_contiguous(HEADER_BYTES).Commit()
        self._send = _aligned(slot_bytes)
        self._receive = _aligned(slot_bytes * degree)
        self._send_spec = [self._send, ([blocks] * readers, [0] * readers), self._block]
        displacements = [i * blocks for i in range(degree)]
        self._receive_spec = [self._receive, ([blocks] * degree, displacements), self._block]
        slots = [self._receive[i * slot_bytes : (i + 1) * slot_bytes] for i in range(degree)]
        self._headers = [slot[:HEADER_BYTES] for slot in slots]
        self._neighbours = [slot[payload].view(dtype) for slot in slots]
        self.published = self._send[payload].view(dtype)
        self.previous = self.published

        self._generation = agents.generation
        self.stop_step = NEVER
        self.fault = Fault()
        self.fault_raised = False
        self.wait_s = 0.0
        self.bytes_sent = 0
        self._bytes_per_post = slot_bytes * readers
        self._stop_wanted = False
        self._found = Reason.NONE
        self._left: tuple[int, int] | None = None  # (steps, agent) of the first that left
        self._posted = 0
        self._step = 0
        self._request: MPI.Request | None = None
        self._closed = False
        shutdown.watch(self)

    def request_stop(self) -> None:
        """Have all agents stop after the same step. Local, also in a signal handler."""
        self._stop_wanted = True  # the tuple is made in post(), where the step is certain

    @property
    def stop_wanted(self) -> bool:
        """Whether a stop was asked for here, or is known to have been elsewhere."""
        return self._stop_wanted or self.stop_step < NEVER

    def report(self, reason: Reason) -> None:
        """Have all agents raise the fault after the same step. Local."""
        self._found = self._found or reason

    def post(self, step: int, mixing_round: int = 0) -> None:
        """Start showing `published`, which holds ``step`` completed steps. Returns at once."""
        if self._stop_wanted:
            self.stop_step = min(self.stop_step, step + self._diameter)
            self._stop_wanted = False
        if self._found:
            self.fault = min(self.fault, self._own_fault(step))
            self._found = Reason.NONE
        self._post(Header(step, mixing_round, self._generation, self.stop_step, self.fault))

    def progress(self) -> None:
        """Let MPI move data, for a moment. May be called at any time."""
        if self._request is not None:
            self._request.Test()

    def wait(self, step: int, mixing_round: int = 0) -> list[NDArray[np.generic]]:
        """The neighbours' buffers after ``step`` steps, in agent order, once all have come.

        Raises:
            AgentMissing: some did not post within the timeout.
            AgentLeft: some have closed their exchange.
            OutOfStep: some are at another step or round, or of another generation of the run.
            RuntimeError: if the step before was interrupted, or in a forked child.
        """
        if self._request is None or not shutdown.is_rank():
            raise RuntimeError(
                "no exchange is under way: the last step was interrupted by an exception, or this "
                "is a forked child process"
            )
        start = time.perf_counter()
        patience = Patience(self._timeout_s)
        while not self._request.Test():
            if not patience.pause():
                raise AgentMissing(self._missing())
        self._request = None
        self.wait_s += time.perf_counter() - start
        for agent, slot in zip(self._sources, self._headers, strict=True):
            self._check(agent, hd.read(slot), step, mixing_round)
        return list(self._neighbours)

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

    def drain(self) -> Iterator[None]:
        """`close`, yielding after every pause; `shutdown` drains several exchanges at once."""
        if self._closed:
            return
        self._closed = True
        if self._found:  # after the last post
            self.fault = min(self.fault, self._own_fault(self._step))
        everybody_closes = self._all.Ibarrier()
        patience = Patience(self._timeout_s)
        while not everybody_closes.Test():
            if self._request is not None:
                if self._request.Test():
                    self._learn_of_leavers()
            elif patience.waited_s > _GRACE_S:
                self._post_leaving()
            if not patience.pause():
                raise AgentMissing(self._missing())
            yield
        ends = yield from self._gather([self._posted, self._step], patience)
        while self._request is not None or self._posted < ends[:, 0].max():
            if self._request is None:
                self._post_leaving()
            elif self._request.Test():
                self._learn_of_leavers()
            elif not patience.pause():
                raise AgentMissing(self._missing())
            yield
        fault = [self.fault.step, self.fault.reason, self.fault.agent, self.fault.at]
        faults = yield from self._gather(fault, patience)
        self.fault = min(Fault(f[0], Reason(f[1]), f[2], f[3]) for f in faults.tolist())
        steps = ends[:, 1]
        if self._rank == 0 and steps.min() != steps.max():
            log.warning("the agents closed after different numbers of steps: %s", steps.tolist())
        shutdown.forget(self)
        self._block.Free()
        self._comm.Free()
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

    def _own_fault(self, step: int) -> Fault:
        return Fault(step + self._diameter, self._found, self._rank, step)

    def _post(self, header: Header) -> None:
        assert self._request is None, "post() before wait()"
        hd.write(header, self._send[:HEADER_BYTES])
        for slot in self._headers:
            hd.clear(slot)
        self._step = header.step
        self._posted += 1
        self.bytes_sent += self._bytes_per_post
        self._request = self._comm.Ineighbor_alltoallv(self._send_spec, self._receive_spec)

    def _post_leaving(self) -> None:
        self._left = self._left or (self._step, self._rank)
        step, agent = self._left
        self._post(Header(self._step, 0, self._generation, NEVER, self.fault, agent, step))

    def _learn_of_leavers(self) -> None:
        self._request = None
        for slot in self._headers:
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
            for agent, slot in zip(self._sources, self._headers, strict=True)
            if hd.read(slot) is None
        ]
        who = (
            f"nothing came from agents {missing} (which may themselves be waiting)"
            if missing and self._request is not None
            else f"agents {list(self._destinations)} do not receive"
        )
        return (
            f"agent {self._rank} waited {self._timeout_s:g} s after step {self._step}: {who}; "
            "exchange.timeout_s sets the limit"
        )


def _aligned(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that begins at a multiple of 64 bytes, a cache line."""
    raw = np.zeros(size_bytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size_bytes]

"""An agent's side of a server: asynchronous EASGD's and Downpour SGD's links."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.algorithms.server import rules
from mpicdsgd.algorithms.server import server as server_line
from mpicdsgd.algorithms.server.rules import Setup
from mpicdsgd.algorithms.server.server import HEAD, Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.comm.links.allreduce import Sum
from mpicdsgd.comm.links.link import Link
from mpicdsgd.comm.waiting import All
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Arena

_NOTHING = np.zeros(0, np.float32)
_SERVER = "the server: is the last rank in Server.serve()?"
EVERY = 32  # steps between signals: at their own pace, the agents are at most twice that apart


class Client(Link):
    """Base: opens the server's model, keeps its state for checkpoints. Collective.

    Args:
        server: the job's.
        arena: the parameters.
        kind, elasticity: see `rules.Setup`.
    """

    def __init__(
        self,
        agents: Agents,
        server: Server,
        arena: Arena,
        timeout_s: float,
        kind: int,
        elasticity: float = 0.0,
    ) -> None:
        super().__init__(agents, EVERY, timeout_s)
        with agents.agreement("the server"):
            if server.is_used:
                raise UserError("the server is in use by another optimizer: close that one first")
        server.is_used = True
        self._server, self._line, self._arena = server, server.line, arena
        self._kind, self._elasticity = kind, elasticity
        self._sent = torch.zeros(1, dtype=torch.int64)  # updates
        self._requests: list[MPI.Request] = []
        self._news: list[MPI.Request] = []
        self._signal = np.zeros(1, np.int64)
        self._state: dict[str, torch.Tensor] = {}  # on agent 0: the server's at the last rest
        if agents.rank == 0:
            names = ["x", "squares"] if kind == rules.ADAGRAD else ["x"]
            self._state = {name: torch.zeros(arena.size) for name in names}
            self._state["applied"] = torch.zeros(agents.size, dtype=torch.int64)

    def began(self, step: int, is_new: bool) -> None:
        # What was sent before has been applied: by `withdraw`, or by the first counting.
        self._count()
        self.together()
        if is_new:
            start = Sum(self, self._arena.size)
            start.buffer.copy_(self.memory.x)
            start.broadcast(start.buffer)
            self._sent[0] = 0
            if self.agents.rank == 0:
                rows = self._arena.segments
                segments = np.stack([rows["offset"], rows["length"]], axis=1)
                x = start.buffer.cpu().numpy()
                self._ask(
                    server_line.OPEN, Setup(self._kind, x, segments, self._elasticity).body(), []
                )
            self.opened(start.buffer)
        elif self.agents.rank == 0:
            state = [array.numpy().view(np.float32) for array in self._state.values()]
            self._ask(server_line.LOAD, np.concatenate(state), [])
        self.together()

    def opened(self, model_D: torch.Tensor) -> None:
        """The server has begun with ``model_D``."""

    def post(self, step: int, mixing_round: int = 0, turn: int = 0) -> None:
        super().post(step, mixing_round, turn)
        if self.agents.rank == 0 and MPI.Request.Testall(self._news):
            self._heard()
            where = self._line.size - 1
            self._news = [
                self._line.Irecv(self._signal.view(np.float32), where, server_line.NEWS),
                self._line.Isend(_NOTHING, where, server_line.NEWS),
            ]

    def _heard(self) -> None:
        if self._signal[0]:
            self._server.signal = signal.Signals(int(self._signal[0])).name.removeprefix("SIG")

    def rest(self) -> None:
        self._settle()
        applied = self._count()
        if applied != int(self._sent):
            raise RuntimeError(
                f"the server has applied {applied} of the {int(self._sent)} updates that agent "
                f"{self.agents.rank} sent"
            )
        self.together()  # before all have come, updates of others may be under way
        if self.agents.rank == 0:
            self._ask(server_line.DUMP, _NOTHING, [array.numpy() for array in self._state.values()])
            if not bool(self._state["x"].isfinite().all()):
                self.report(Reason.NON_FINITE)
        self.together()

    def arrays(self) -> dict[str, torch.Tensor]:
        state = {f"server/{name}": array for name, array in self._state.items()}
        return {"server/sent": self._sent, **state}

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        self._settle()
        super().load(arrays)

    def centre(self) -> torch.Tensor:
        x = self._state["x"] if self.agents.rank == 0 else torch.zeros(self._arena.size)
        copy = x.to(self.agents.device)
        Sum(self, self._arena.size).broadcast(copy)
        return copy

    def end(self) -> Iterator[None]:
        for _ in self.waiter.looks(All([*self._requests, *self._news]), _SERVER):
            yield

    def advance(self) -> bool:
        return MPI.Request.Testall(self._requests) if self._requests else True

    def _settle(self) -> None:
        """Complete what is under way."""
        self.waiter.wait(All(list(self._requests)), _SERVER)
        self._requests = []

    def _send(self, tag: int, body: NDArray[Any]) -> None:
        """Begin to send ``body``, which is not to be written until `_settle`."""
        self._requests.append(self._line.Isend(body.view(np.float32), self._line.size - 1, tag))
        self.bytes_sent += body.nbytes

    def _receive(self, into: NDArray[Any]) -> None:
        request = self._line.Irecv(into.view(np.float32), self._line.size - 1, server_line.ANSWER)
        self._requests.append(request)

    def _ask(self, tag: int, body: NDArray[Any], answers: list[NDArray[Any]]) -> None:
        """Send, and wait for the answers; with none, for an empty one."""
        self._send(tag, body)
        for array in answers or [_NOTHING.copy()]:
            self._receive(array)
        self._settle()

    def _count(self) -> int:
        """How many of this agent's updates the server has applied: all that were sent."""
        applied = np.zeros(1, np.int64)
        self._ask(server_line.COUNT, _NOTHING, [applied])
        return int(applied[0])

    def free(self) -> None:
        self._server.is_used = False


class ServedCentre(Client):
    """EASGD with a server. See `Client`; each agent alone, every tau steps:

        x_i <- x_i - alpha g_i(x_i) + e (c - x_i)
        c   <- c + e (x_i - c)                                          with the old x_i and c

    (Zhang, Choromanska, LeCun 2015, algorithm 1.) c is under way while the gradient is computed.

    Args:
        period: tau.
        elasticity: e.
    """

    def __init__(
        self,
        agents: Agents,
        server: Server,
        arena: Arena,
        timeout_s: float,
        *,
        period: int,
        elasticity: float,
    ) -> None:
        super().__init__(agents, server, arena, timeout_s, rules.ELASTIC, elasticity)
        self._period = period
        self._mine = _host(agents, HEAD + arena.size)
        self._centre = _host(agents, arena.size)
        # Whether the centre's pull is due in the next pass: the server has made its own already.
        self._is_due = torch.zeros(1, dtype=torch.int64)

    def began(self, step: int, is_new: bool) -> None:
        super().began(step, is_new)
        if is_new:
            self._is_due[0] = 0
            self._start(step)

    def stepped(self, step: int) -> None:
        self._start(step)

    def neighbours(self) -> list[torch.Tensor]:
        if not self._is_due:
            return []
        self._settle()
        self._is_due[0] = 0
        self._device_centre = self._centre.to(self.agents.device)
        return [self._device_centre]

    def _start(self, step: int) -> None:
        if step % self._period == 0:
            self._settle()
            self._mine[HEAD:].copy_(self.memory.x)
            self._send(server_line.EXCHANGE, self._mine.numpy())
            self._receive(self._centre.numpy())
            self._sent += 1
            self._is_due[0] = 1

    def arrays(self) -> dict[str, torch.Tensor]:
        return {**super().arrays(), "pull/centre": self._centre, "pull/is_due": self._is_due}


class Downpour(Client):
    """Downpour SGD's link (Dean et al. 2012). See `Client`; each agent at its own pace:

    a local step with every gradient, which is also added up; every ``push`` steps the sum goes to
    the server; every ``fetch`` steps the agent takes over the server's model.

    Args:
        adagrad: whether the server's step is Adagrad's.
    """

    def __init__(
        self,
        agents: Agents,
        server: Server,
        arena: Arena,
        timeout_s: float,
        *,
        push: int,
        fetch: int,
        adagrad: bool,
    ) -> None:
        kind = rules.ADAGRAD if adagrad else rules.DOWNPOUR
        super().__init__(agents, server, arena, timeout_s, kind)
        self._push, self._fetch = push, fetch
        self._accrued = torch.zeros(arena.size, device=agents.device)
        self._views = arena.views_of(self._accrued)
        self._alphas = np.zeros(len(arena.tensors), np.float32)
        self._mail = _host(agents, HEAD + len(arena.tensors) + arena.size)
        self._model = _host(agents, arena.size)

    def opened(self, model_D: torch.Tensor) -> None:
        self._accrued.zero_()
        self.memory.replace(model_D)

    def accrue(self, alphas: list[float], decays: list[float], scale: float) -> None:
        """Add the parameters' gradients to the sum.

        Args:
            alphas, decays: step size and weight decay of each parameter, of now.
            scale: the gradients are divided by it.
        """
        self._alphas[: len(alphas)] = alphas
        for parameter, view, decay in zip(
            self._arena.parameters, self._views, decays, strict=False
        ):
            if parameter.grad is not None:
                gradient = parameter.grad
                view.add_(gradient.to_dense() if gradient.is_sparse else gradient, alpha=1 / scale)
                if decay:
                    view.add_(parameter.detach(), alpha=decay)

    def stepped(self, step: int) -> None:
        if step % self._push == 0:
            self._settle()  # the push before
            end = HEAD + len(self._alphas)
            self._mail[HEAD:end] = torch.from_numpy(self._alphas)
            self._mail[end:].copy_(self._accrued)
            self._accrued.zero_()
            self._send(server_line.PUSH, self._mail.numpy())
            self._sent += 1
        if step % self._fetch == 0:
            self._ask(server_line.FETCH, _NOTHING, [self._model.numpy()])
            self.memory.replace(self._model.to(self.agents.device))

    def arrays(self) -> dict[str, torch.Tensor]:
        return {**super().arrays(), "accrued": self._accrued}


def _host(agents: Agents, size: int) -> torch.Tensor:
    return torch.zeros(size, pin_memory=agents.device.type == "cuda")

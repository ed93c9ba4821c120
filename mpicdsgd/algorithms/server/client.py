"""An agent's side of a server: an assembly whose agents talk to the job's last rank, too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.algorithms.server import rules, server
from mpicdsgd.algorithms.server.rules import Setup
from mpicdsgd.algorithms.server.server import HEAD, Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.comm.links.assembly import Assembly
from mpicdsgd.comm.waiting import All
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Arena

_NOTHING = np.zeros(0, np.float32)
_SERVER = "the server: is the last rank in Server.serve()?"


class Client(Assembly):
    """Opens the server's model, asks it, and keeps its state for checkpoints. Collective.

    Args:
        server_: the job's.
        arena: the parameters.
        kind, elasticity: see `rules.Setup`.
    """

    def __init__(
        self,
        agents: Agents,
        server_: Server,
        arena: Arena,
        every: int,
        timeout_s: float,
        *,
        kind: int,
        elasticity: float = 0.0,
    ) -> None:
        super().__init__(agents, every, timeout_s)
        with agents.agreement("the server"):
            if server_.is_used:
                raise UserError("the server is in use by another optimizer: close that one first")
        server_.is_used = True
        self._server, self._line, self._arena = server_, server_.line, arena
        self._kind, self._elasticity = kind, elasticity
        self._sent = torch.zeros(1, dtype=torch.int64)  # updates
        self._requests: list[MPI.Request] = []
        self._news: list[MPI.Request] = []
        self._signal = np.zeros(1, np.int64)
        self._state: dict[str, torch.Tensor] = {}  # on agent 0: the server's at the last rest
        self._mail = _host(agents, HEAD + len(arena.tensors) + arena.size)
        self._model = _host(agents, arena.size)  # the last that came
        # Whether the centre's pull is due in the next pass: the server has made its own already.
        self._is_due = torch.zeros(1, dtype=torch.int64)
        self.parts.append(_Requests(self))
        if agents.rank == 0:
            names = ["x", "squares"] if kind == rules.ADAGRAD else ["x"]
            self._state = {name: torch.zeros(arena.size) for name in names}
            self._state["applied"] = torch.zeros(agents.size, dtype=torch.int64)

    def open(self, x_D: torch.Tensor, is_new: bool) -> torch.Tensor:
        """Begin: with agent 0's ``x_D``, or with what a checkpoint gave. Collective.

        Returns the model that a new server has begun with, shape (D,).
        """
        # What was sent before has been applied: by `withdraw`, or by the first counting.
        self._count()
        self.together()
        model = x_D.clone()
        if is_new:
            self.broadcast(model)
            self._sent[0] = self._is_due[0] = 0
            if self.agents.rank == 0:
                rows = self._arena.segments
                segments = np.stack([rows["offset"], rows["length"]], axis=1)
                setup = Setup(self._kind, model.cpu().numpy(), segments, self._elasticity)
                self._ask(server.OPEN, setup.body(), [])
        elif self.agents.rank == 0:
            state = [array.numpy().view(np.float32) for array in self._state.values()]
            self._ask(server.LOAD, np.concatenate(state), [])
        self.together()
        return model

    def start_pull(self, x_D: torch.Tensor) -> None:
        """Have the server pulled at ``x_D``; what it was is under way."""
        self._settle()
        sent = self._mail[: HEAD + self._arena.size]
        sent[HEAD:].copy_(x_D)
        self._send(server.EXCHANGE, sent.numpy())
        self._receive(self._model.numpy())
        self._sent += 1
        self._is_due[0] = 1

    def pulled(self) -> torch.Tensor | None:
        """The server's model before the pull that was begun, shape (D,), or None. Waits."""
        if not self._is_due:
            return None
        self._settle()
        self._is_due[0] = 0
        return self._model.to(self.agents.device)

    def push(self, gradients_D: torch.Tensor, alphas: list[float]) -> None:
        """Send the sum of gradients since the last push; step sizes by tensor."""
        self._settle()  # the push before
        end = HEAD + len(self._arena.tensors)
        self._mail[HEAD:end] = 0
        self._mail[HEAD : HEAD + len(alphas)] = torch.tensor(alphas, dtype=torch.float32)
        self._mail[end:].copy_(gradients_D)
        self._send(server.PUSH, self._mail.numpy())
        self._sent += 1

    def fetch(self) -> torch.Tensor:
        """The server's model, shape (D,). Waits."""
        self._ask(server.FETCH, _NOTHING, [self._model.numpy()])
        return self._model.to(self.agents.device)

    def after(self, step: int) -> None:
        super().after(step)
        if self.agents.rank == 0 and MPI.Request.Testall(self._news):
            self._heard()
            where = self._line.size - 1
            self._news = [
                self._line.Irecv(self._signal.view(np.float32), where, server.NEWS),
                self._line.Isend(_NOTHING, where, server.NEWS),
            ]

    def _heard(self) -> None:
        if self._signal[0]:
            self._server.signal = signal.Signals(int(self._signal[0])).name.removeprefix("SIG")

    def rest(self) -> None:
        super().rest()
        applied = self._count()
        if applied != int(self._sent):
            raise RuntimeError(
                f"the server has applied {applied} of the {int(self._sent)} updates that agent "
                f"{self.agents.rank} sent"
            )
        self.together()  # before all have come, updates of others may be under way
        if self.agents.rank == 0:
            self._ask(server.DUMP, _NOTHING, [array.numpy() for array in self._state.values()])
            if not bool(self._state["x"].isfinite().all()):
                self.report(Reason.NON_FINITE)
        self.together()

    def arrays(self) -> dict[str, torch.Tensor]:
        state = {f"server/{name}": array for name, array in self._state.items()}
        arrays = {"server/sent": self._sent, **state}
        if self._kind == rules.ELASTIC:
            arrays |= {"pull/centre": self._model, "pull/is_due": self._is_due}
        return arrays

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        self._settle()
        super().load(arrays)

    def centre(self) -> torch.Tensor:
        x = self._state["x"] if self.agents.rank == 0 else torch.zeros(self._arena.size)
        copy = x.to(self.agents.device, copy=True)
        self.broadcast(copy)
        return copy

    def _settle(self) -> None:
        """Complete what is under way."""
        self.waiter.wait(All(list(self._requests)), _SERVER)
        self._requests = []

    def _send(self, tag: int, body: NDArray[Any]) -> None:
        """Begin to send ``body``, which is not to be written until `_settle`."""
        self._requests.append(self._line.Isend(body.view(np.float32), self._line.size - 1, tag))
        self.bytes_sent += body.nbytes

    def _receive(self, into: NDArray[Any]) -> None:
        request = self._line.Irecv(into.view(np.float32), self._line.size - 1, server.ANSWER)
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
        self._ask(server.COUNT, _NOTHING, [applied])
        return int(applied[0])

    def free(self) -> None:
        self._server.is_used = False


class _Requests:
    """The part of the assembly that messages to the server are."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def progress(self) -> bool:
        requests = self._client._requests
        return MPI.Request.Testall(requests) if requests else True

    def rest(self) -> None:
        self._client._settle()

    def end(self) -> Iterator[None]:
        waiter = self._client.waiter
        for _ in waiter.looks(All([*self._client._requests, *self._client._news]), _SERVER):
            yield


def _host(agents: Agents, size: int) -> torch.Tensor:
    return torch.zeros(size, pin_memory=agents.device.type == "cuda")

"""The verbs of a step that go over no graph's edges: sums over all agents, pairs, mail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.agent_memory import AgentMemory
from mpicdsgd.algorithms.contract import MAIL, PAIRS, SUMS
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.comm.links.allreduce import Sum
from mpicdsgd.comm.links.assembly import Assembly
from mpicdsgd.comm.links.mailbox import Mailbox
from mpicdsgd.comm.links.swap import Swap
from mpicdsgd.kernels.coefficients import Coefficients


class AgentLinks(AgentMemory):
    """See the module and `contract.Context`; what the communication asks of them is here, too."""

    parameters_end: int
    coefficients: Sequence[Coefficients]
    _gradient: NDArray[np.void] | None
    _scale: torch.Tensor | None
    _overflow: torch.Tensor | None

    def _open_parts(self, config: ExchangeConfig, agents: Agents) -> None:
        if self.communication.carries_values:
            return
        link, size = cast(Assembly, self.communication), self.arena.size
        if self.algorithm.over == SUMS:
            self._sum = Sum(link, size, config.sums == "ordered")
        elif self.algorithm.over == PAIRS:
            self._swap = Swap(link, size)
        elif self.algorithm.over == MAIL:
            self._mailbox = Mailbox(link, size, self._mail_has_come)
        self._assembly = link

    def everyones(self, values: NDArray[Any]) -> NDArray[np.float64]:
        self._walk.require_no_graph("everyones()")
        return self._assembly.everyones(float(values[0]))

    def start_sum(self, values: torch.Tensor) -> None:
        self._walk.require(SUMS, "start_sum()")
        self._walk.sums(begins=True)
        self._sum.buffer.copy_(values[0])
        self._sum.start()

    def summed(self) -> torch.Tensor:
        self._walk.require(SUMS, "summed()")
        self._walk.sums(begins=False)
        return self._sum.result().view(1, -1)

    def broadcast(self, values: torch.Tensor) -> None:
        self._walk.require_no_graph("broadcast()")
        self._assembly.broadcast(values[0])

    def swap(self, partners: NDArray[np.int64]) -> torch.Tensor:
        self._walk.require(PAIRS, "swap()")
        partner = int(partners[0])
        return (self._swap.swap(self.x, partner) if partner >= 0 else self.x.clone()).view(1, -1)

    def require_alike(self, name: str, what: str) -> None:
        self._walk.require_no_graph("require_alike()")
        end = self.parameters_end if name == "x" else None  # BatchNorm's statistics are their own
        self._assembly.alike(self._flat(name)[:end], what)

    def read_mail(self) -> None:
        self._mailbox.read()

    def wait_for_mail_room(self) -> None:
        self._mailbox.wait_for_room()

    def send_mail(self, to: int, weight: float) -> None:
        self._mailbox.send(to, self.x, weight)

    def _mail_has_come(self, x_D: torch.Tensor, weight: float) -> None:
        raise NotImplementedError

    def look(self) -> None:
        if self.algorithm.over == MAIL:
            self.read_mail()  # who waits for this one to receive may be the one that it waits for

    def add_gradient(self, into: str) -> None:
        if self._gradient is None or (self._overflow is not None and float(self._overflow)):
            return
        scale = 1.0 if self._scale is None else float(self._scale)
        views = self.arena.views_of(self._flat(into))
        for parameter, view, one in zip(
            self.arena.parameters, views, self.coefficients, strict=False
        ):
            if parameter.grad is not None:
                gradient = parameter.grad
                view.add_(gradient.to_dense() if gradient.is_sparse else gradient, alpha=1 / scale)
                if one.decay:
                    view.add_(parameter.detach(), alpha=one.decay)

    def step_sizes(self) -> list[float]:
        return [one.alpha for one in self.coefficients]

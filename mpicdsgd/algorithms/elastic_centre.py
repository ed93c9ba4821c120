"""EASGD's link, synchronous: an elastic pull between every agent and a centre.

    x_i <- x_i - alpha g_i(x_i) + e (c - x_i)
    c   <- c + e sum_i (x_i - c)                                    both with the old x_i and c

(Zhang, Choromanska, LeCun 2015, equations 5 and 6), every tau steps; between them e is 0. No rank
is the centre: all agents keep c, with the sum from one Allreduce, which is under way while the
gradient is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.links.allreduce import Sum
from mpicdsgd.comm.links.link import Link

EVERY = 8  # steps between signals


class Centre(Link):
    """See the module. Collective over ``agents``.

    Args:
        size: D.
        period: tau.
        elasticity: e.
    """

    def __init__(
        self, agents: Agents, size: int, timeout_s: float, *, period: int, elasticity: float
    ) -> None:
        super().__init__(agents, EVERY, timeout_s)
        self._period, self._elasticity = period, elasticity
        self._centre = torch.zeros(size, device=agents.device)
        self._sum = Sum(self, size)
        self._is_due = self._is_used = False

    def began(self, step: int, is_new: bool) -> None:
        self._sum.complete()  # of parameters that are no more
        if is_new:
            self._centre.copy_(self.memory.x)
            self._sum.broadcast(self._centre)
        self._is_used = self._is_due = False
        self._start(step)

    def neighbours(self) -> list[torch.Tensor]:
        self._is_used, self._is_due = self._is_due, False
        return [self._centre] if self._is_used else []

    def stepped(self, step: int) -> None:
        if self._is_used:  # the pass has read the old one
            self._centre.add_(self._sum.result(), alpha=self._elasticity)
            self._is_used = False
        self._start(step)

    def advance(self) -> bool:
        return self._sum.progress()

    def rest(self) -> None:
        self._sum.complete()
        self.alike(self._centre, "the centre")

    def arrays(self) -> dict[str, torch.Tensor]:
        return {"centre": self._centre}

    def centre(self) -> torch.Tensor:
        return self._centre

    def end(self) -> Iterator[None]:
        yield from self._sum.looks()

    def _start(self, step: int) -> None:
        if step % self._period == 0:
            self._sum.buffer.copy_(self.memory.x).sub_(self._centre)
            self._sum.start()
            self._is_due = True

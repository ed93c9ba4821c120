"""FedAvg's link: rounds of local steps, then the weighted average of the agents that took part.

    m   <-  beta m + sum_k (n_k / n) (x_k - s)          n: the sum of n_k over those that took part
    s   <-  s + m
    x_k <-  s

(McMahan et al. 2017, algorithm 1; beta: server momentum, Hsu et al. 2019.) No rank is the server:
all agents keep s and m and do the same to them, with the sum from one Allreduce.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.links.allreduce import Sum
from mpicdsgd.comm.links.link import Link
from mpicdsgd.kernels.arena import Arena

EVERY = 8  # steps between signals


class RoundAverage(Link):
    """See the module. Collective over ``agents``.

    Args:
        arena: the parameters.
        period: steps of a round.
        fraction: of the agents that take part in a round, C; at least one does.
        samples: n_k of this agent.
        server_momentum: beta.
        seed: of the choice, the same on all agents.
        shift: added to the step before it is divided by ``period``.
    """

    def __init__(
        self,
        agents: Agents,
        arena: Arena,
        timeout_s: float,
        *,
        period: int,
        fraction: float,
        samples: int,
        server_momentum: float,
        seed: int,
        shift: int,
    ) -> None:
        super().__init__(agents, EVERY, timeout_s)
        self._period, self._fraction, self._seed = period, fraction, seed
        self._shift = shift
        self._beta, self._parameters_end = server_momentum, arena.parameters_end
        size = arena.size
        self._samples = np.array(self.comm.allgather(samples), np.float64)
        self._server = torch.zeros(size, device=agents.device)
        self._velocity = torch.zeros(size, device=agents.device) if server_momentum else None
        self._sum = Sum(self, size)

    def chosen(self, round_: int) -> NDArray[np.int64]:
        """The agents that take part in round ``round_``, ascending."""
        n = self.agents.size
        count = max(1, int(self._fraction * n + 1e-9))
        draw = np.random.Generator(np.random.PCG64([self._seed, round_]))
        return np.sort(draw.permutation(n)[:count])

    def takes_part(self, step: int) -> bool:
        """Whether this agent makes the step after ``step``."""
        return self.agents.rank in self.chosen((step + self._shift) // self._period)

    def began(self, step: int, is_new: bool) -> None:
        if is_new:
            self._server.copy_(self.memory.x)
            self._sum.broadcast(self._server)
            self.memory.replace(self._server)

    def stepped(self, step: int) -> None:
        round_, begun = divmod(step + self._shift, self._period)
        if begun:
            return
        chosen = self.chosen(round_ - 1)
        share = 0.0
        if self.agents.rank in chosen:
            share = self._samples[self.agents.rank] / self._samples[chosen].sum()
        self._sum.buffer.copy_(self.memory.x).sub_(self._server).mul_(share)
        self._sum.start()
        moved = self._sum.result()
        if self._velocity is not None:
            self._velocity.mul_(self._beta).add_(moved)
            # Statistics of BatchNorm are averaged as they are: a momentum may make variances < 0.
            moved[: self._parameters_end] = self._velocity[: self._parameters_end]
        self._server.add_(moved)
        self.memory.replace(self._server)

    def rest(self) -> None:
        self.alike(self._server, "the server's model")

    def centre(self) -> torch.Tensor:
        return self._server

    def arrays(self) -> dict[str, torch.Tensor]:
        arrays = {"server/x": self._server}
        if self._velocity is not None:
            arrays["server/velocity"] = self._velocity
        return arrays

"""Gossip SGD's link: after a step, random pairs of neighbours average.

    x_j, x_l <- (x_j + x_l) / 2

(Boyd et al. 2006; Jin et al. 2016.) Who meets whom every agent draws from the same random numbers,
so nobody asks: the agents in random order; each that is not paired yet wakes with probability p and
picks one of its neighbours; if that one is not paired either, they are a pair.
"""

from __future__ import annotations

import numpy as np
import torch

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.links.link import Link
from mpicdsgd.comm.waiting import All

EVERY = 8  # steps between signals
_PART = 1 << 26  # elements of a message


class Pairs(Link):
    """See the module. Collective over ``agents``, whose graph is undirected.

    Args:
        size: D.
        probability: p.
        seed: of the draws, the same on all agents.
    """

    def __init__(
        self, agents: Agents, size: int, timeout_s: float, *, probability: float, seed: int
    ) -> None:
        super().__init__(agents, EVERY, timeout_s)
        self._probability, self._seed = probability, seed
        self._other = torch.zeros(size, pin_memory=agents.device.type == "cuda")

    def partner(self, step: int) -> int | None:
        """Whom this agent meets after ``step``."""
        graph, n = self.agents.graph, self.agents.size
        draw = np.random.Generator(np.random.PCG64([self._seed, step]))
        order, wakes, picks = draw.permutation(n), draw.random(n), draw.random(n)
        partner: dict[int, int] = {}
        for j in order.tolist():
            near = graph.sources[j]
            if j in partner or not near or wakes[j] >= self._probability:
                continue
            other = near[int(picks[j] * len(near))]
            if other not in partner:
                partner[j], partner[other] = other, j
        return partner.get(self.agents.rank)

    def stepped(self, step: int) -> None:
        partner = self.partner(step)
        if partner is None:
            return
        mine = self.memory.x.cpu().numpy()
        other = self._other.numpy()
        requests = []
        for start in range(0, mine.size, _PART):
            part = slice(start, start + _PART)
            requests.append(self.comm.Isend(mine[part], partner))
            requests.append(self.comm.Irecv(other[part], partner))
        self.waiter.wait(All(list(requests)), f"agent {partner}")
        self.bytes_sent += mine.nbytes
        self.memory.mix_in(self._other.to(self.agents.device), 0.5)

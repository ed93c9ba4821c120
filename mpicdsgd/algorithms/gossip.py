"""Gossip SGD: after a local step, random pairs of neighbours average.

    x_j, x_l <- (x_j + x_l) / 2

(Boyd et al. 2006; Jin et al. 2016.) Who meets whom every agent draws from the same random numbers,
so nobody asks: the agents in random order; each that is not paired yet wakes with probability p and
picks one of its neighbours; if that one is not paired either, they are a pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.algorithms import hyperparameters
from mpicdsgd.algorithms.contract import PAIRS, Admits, Algorithm, Context, setting
from mpicdsgd.algorithms.local_steps import Plain
from mpicdsgd.algorithms.registry import algorithm


@dataclass(frozen=True)
class GossipSettings(Plain):
    """Settings of gossip SGD and GoSGD."""

    probability: float = setting(0.5, "p in [0, 1], to meet or to push after a step")

    def check(self) -> None:
        hyperparameters.probability("probability (p)", self.probability)


@algorithm("gossip", "gossip SGD", source="Boyd et al. 2006; Jin et al. 2016")
class PairwiseGossip(Algorithm):
    """See the module."""

    Settings = GossipSettings
    over = PAIRS
    admits = Admits(
        directed=False,
        changing=False,
        undirected_because="averages in pairs, which need an undirected graph",
        instead=', or optim.name = "gosgd"',
    )
    order = "adapt, then combine: a pair waits for each other"
    settings: GossipSettings

    def partners(self, ctx: Context, step: int) -> NDArray[np.int64]:
        """Whom each agent of this process meets after ``step`` steps; -1: nobody. Shape (n,)."""
        draw = np.random.Generator(np.random.PCG64([self.run.seed, step]))
        n = ctx.size
        order, wakes, picks = draw.permutation(n), draw.random(n), draw.random(n)
        partner = np.full(n, -1)
        for j in order.tolist():
            near = ctx.neighbours[j]
            if partner[j] >= 0 or not near or wakes[j] >= self.settings.probability:
                continue
            other = near[int(picks[j] * len(near))]
            if partner[other] < 0:
                partner[j], partner[other] = other, j
        return partner[ctx.ranks]

    def step(self, ctx: Context) -> None:
        ctx.update(gradient=True)
        partners = self.partners(ctx, ctx.step + 1)
        if (partners >= 0).any():
            ctx.update(mix=ctx.swap(partners), weight=np.where(partners >= 0, 0.5, 0.0))

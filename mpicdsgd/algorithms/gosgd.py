"""GoSGD: agents push their parameters to random neighbours, each at its own pace.

    with probability p after a step:   w_j <- w_j / 2,  send (w_j, x_j) to a random neighbour
    who finds (w, x) in its mail:      x_j <- x_j + w / (w_j + w) (x - x_j),  w_j <- w_j + w

(Blot et al. 2016.) The weights begin as 1/N; they and those in the mail always add up to 1, and
sum_j w_j x_j with what is in the mail is what the local steps alone have made of it. A neighbour is
one that reads this agent: on a directed graph the push goes along the edge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpicdsgd.algorithms.contract import (
    MAIL,
    Admits,
    Algorithm,
    Circumstances,
    Context,
)
from mpicdsgd.algorithms.gossip import GossipSettings
from mpicdsgd.algorithms.registry import algorithm

if TYPE_CHECKING:
    import torch


@algorithm("gosgd", "gossip SGD by weighted pushes", source="Blot et al. 2016")
class WeightedPushes(Algorithm):
    """See the module. Mail is read after a step, and while this agent waits for others."""

    Settings = GossipSettings
    over = MAIL
    admits = Admits(changing=False)
    order = "adapt, then send: nobody waits"
    synchronous = False
    counts = True
    signals = 32  # at their own pace, the agents are at most twice that apart
    settings: GossipSettings

    def __init__(self, settings: GossipSettings, run: Circumstances) -> None:
        super().__init__(settings, run)
        self.numbers = {"gossip/weight": 1.0 / run.agents}

    def begin(self, ctx: Context, is_new: bool) -> None:
        if is_new:
            ctx.number("gossip/weight")[:] = 1.0 / ctx.size

    def step(self, ctx: Context) -> None:
        ctx.update(gradient=True)
        ctx.read_mail()
        (rank,) = ctx.ranks.tolist()
        draw = np.random.Generator(np.random.PCG64([self.run.seed, rank, ctx.step + 1]))
        near = ctx.readers[rank]
        if near and draw.random() < self.settings.probability:
            to = near[int(draw.integers(len(near)))]
            ctx.wait_for_mail_room()  # it reads mail, which adds to the weight
            weight = ctx.number("gossip/weight")
            weight *= 0.5
            ctx.send_mail(to, float(weight[0]))

    def mail(self, ctx: Context, x: torch.Tensor, weight: float) -> None:
        own = ctx.number("gossip/weight")
        own += weight
        ctx.update(mix=x, weight=weight / own)

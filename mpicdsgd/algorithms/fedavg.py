"""FedAvg (McMahan et al. 2017): rounds of local SGD, then the average weighted by sample counts.

    m   <-  beta m + sum_k (n_k / n) (x_k - s)          n: the sum of n_k over those that took part
    s   <-  s + m
    x_k <-  s

after every round (algorithm 1; beta: server momentum, Hsu et al. 2019). In a round a fraction C of
the agents makes E local epochs of SGD from the server's model s. No rank is the server: all agents
keep s and m and do the same to them. The paper has E = 1, C = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.algorithms.contract import SUMS, Algorithm, Circumstances, Context, setting
from mpicdsgd.algorithms.hyperparameters import below_one
from mpicdsgd.algorithms.local_steps import Plain
from mpicdsgd.algorithms.registry import algorithm
from mpicdsgd.common.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FedAvgSettings(Plain):
    """Settings of FedAvg."""

    local_epochs: int = setting(1, "E >= 1, local epochs of a round")
    fraction: float = setting(
        1.0, "C in (0, 1]: floor(C N) agents, at least one, take part in a round"
    )
    server_momentum: float = setting(0.0, "beta in [0, 1), of the server's step")

    def check(self) -> None:
        if self.local_epochs < 1:
            raise UserError(f"local_epochs (E) must be at least 1, got {self.local_epochs}")
        below_one("server_momentum", self.server_momentum)
        if not 0 < self.fraction <= 1:
            raise UserError(
                f"fraction (C, of the agents that take part in a round) must be in (0, 1], "
                f"got {self.fraction}"
            )


@algorithm("fedavg", "federated averaging", source="McMahan et al. 2017, algorithm 1")
class FederatedAverage(Algorithm):
    """See the module. A round ends where its length divides step + shift."""

    Settings = FedAvgSettings
    over = SUMS
    admits = None
    order = "adapt; at a round's end all wait for the sum"
    settings: FedAvgSettings

    def __init__(self, settings: FedAvgSettings, run: Circumstances) -> None:
        super().__init__(settings, run)
        self.period = settings.local_epochs * run.steps_per_epoch
        self.has_momentum = settings.server_momentum != 0
        self.vectors = ("server/x", *(("server/velocity",) if self.has_momentum else ()))
        self._samples = np.ones(run.agents)

    def chosen(self, round_: int, agents: int) -> NDArray[np.int64]:
        """The agents that take part in round ``round_``, ascending; at least one."""
        count = max(1, int(self.settings.fraction * agents + 1e-9))
        draw = np.random.Generator(np.random.PCG64([self.run.seed, round_]))
        return np.sort(draw.permutation(agents)[:count])

    def takes_part(self, step: int, rank: int) -> bool:
        return rank in self.chosen((step + self.run.shift) // self.period, self.run.agents)

    def begin(self, ctx: Context, is_new: bool) -> None:
        self._samples = ctx.everyones(self.run.samples)
        if is_new:
            ctx["server/x"].copy_(ctx["x"])
            ctx.broadcast(ctx["server/x"])
            ctx.replace(ctx["server/x"])

    def step(self, ctx: Context) -> None:
        ctx.update(gradient=True)
        round_, begun = divmod(ctx.step + 1 + self.run.shift, self.period)
        if begun:
            return
        server, end = ctx["server/x"], ctx.parameters_end
        shares = ctx.column(self._shares(ctx, round_ - 1))
        ctx.start_sum((ctx["x"] - server).mul_(shares))
        moved = ctx.summed()
        if self.has_momentum:
            velocity = ctx["server/velocity"].mul_(self.settings.server_momentum).add_(moved)
            # Statistics of BatchNorm are averaged as they are: a momentum may make variances < 0.
            moved[:, :end] = velocity[:, :end]
        server.add_(moved)
        ctx.replace(server)

    def _shares(self, ctx: Context, round_: int) -> NDArray[np.float64]:
        """n_k / n of each agent here, 0 where it did not take part."""
        chosen = self.chosen(round_, ctx.size)
        shares = np.where(np.isin(ctx.ranks, chosen), self._samples[ctx.ranks], 0.0)
        found: NDArray[np.float64] = shares / self._samples[chosen].sum()
        return found

    def rest(self, ctx: Context) -> None:
        ctx.require_alike("server/x", "the server's model")

    def centre(self, ctx: Context) -> torch.Tensor:
        return ctx["server/x"][0]

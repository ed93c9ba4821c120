"""EASGD with a server (Zhang, Choromanska, LeCun 2015, algorithm 1); each agent every tau steps:

    x_i <- x_i - alpha g_i(x_i) + e (c - x_i)
    c   <- c + e (x_i - c)                                          with the old x_i and c

c is under way while the gradient is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpicdsgd.algorithms.contract import SERVER, Context
from mpicdsgd.algorithms.easgd import ElasticAverage
from mpicdsgd.algorithms.server.rules import ELASTIC

if TYPE_CHECKING:
    import torch


class ServedElasticAverage(ElasticAverage):
    """`easgd` and `eamsgd` with ``asynchronous = true``."""

    over = SERVER
    order = "the server's answer is hidden behind the gradient"
    synchronous = False
    counts = True
    signals = 32  # at their own pace, the agents are at most twice that apart
    vectors = ()
    server_rule = ELASTIC

    def begin(self, ctx: Context, is_new: bool) -> None:
        ctx.server.open(ctx["x"][0], is_new)
        if is_new:
            self._ahead(ctx, ctx.step)

    def step(self, ctx: Context) -> None:
        centre = ctx.server.pulled()
        mix = None if centre is None else centre[None]
        ctx.update(mix=mix, weight=self.elasticity, gradient=True)
        self._ahead(ctx, ctx.step + 1)

    def _ahead(self, ctx: Context, step: int) -> None:
        if step % self.settings.period == 0:
            ctx.server.start_pull(ctx["x"][0])

    def rest(self, ctx: Context) -> None:
        pass

    def centre(self, ctx: Context) -> torch.Tensor:
        centre: torch.Tensor = ctx.server.centre()
        return centre


ElasticAverage.served = ServedElasticAverage

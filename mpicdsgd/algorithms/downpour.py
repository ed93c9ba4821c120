"""Downpour SGD (Dean et al. 2012): a server, and agents that push and fetch at their own pace.

    every step           h = g_i(x_i) + lambda x_i,   x_i <- x_i - alpha h,   H_i <- H_i + h
    every n_push steps   the server does x <- x - alpha H_i, or Adagrad's step with H_i;   H_i <- 0
    every n_fetch steps  x_i <- x

See `server.rules` for the server's side. The server takes alpha as it is when an agent pushes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpicdsgd.algorithms.contract import SERVER, Algorithm, Circumstances, Context, setting
from mpicdsgd.algorithms.hyperparameters import at_least_one
from mpicdsgd.algorithms.local_steps import Plain
from mpicdsgd.algorithms.registry import algorithm
from mpicdsgd.algorithms.server.rules import ADAGRAD, DOWNPOUR

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DownpourSettings(Plain):
    """Settings of Downpour SGD."""

    n_push: int = setting(1, "steps between two pushes to the server, >= 1")
    n_fetch: int = setting(1, "steps between two fetches of its model, >= 1")
    adagrad: bool = setting(False, "the server's step is Adagrad's (Duchi et al. 2011)")

    def check(self) -> None:
        at_least_one("n_push", self.n_push)
        at_least_one("n_fetch", self.n_fetch)


@algorithm("downpour", "Downpour SGD", source="Dean et al. 2012")
class ServedDownpour(Algorithm):
    """See the module. All begin with agent 0's parameters, and so does the server."""

    Settings = DownpourSettings
    over = SERVER
    admits = None
    order = "adapt, then send; a fetch waits for the server"
    synchronous = False
    counts = True
    signals = 32  # at their own pace, the agents are at most twice that apart
    mixes_buffers = False  # gradients are exchanged, which buffers do not have
    vectors = ("accrued",)
    settings: DownpourSettings

    def __init__(self, settings: DownpourSettings, run: Circumstances) -> None:
        super().__init__(settings, run)
        self.server_rule = ADAGRAD if settings.adagrad else DOWNPOUR

    def begin(self, ctx: Context, is_new: bool) -> None:
        model = ctx.server.open(ctx["x"][0], is_new)
        if is_new:
            ctx["accrued"].zero_()
            ctx.replace(model[None])

    def step(self, ctx: Context) -> None:
        ctx.add_gradient("accrued")
        ctx.update(gradient=True)
        if (ctx.step + 1) % self.settings.n_push == 0:
            ctx.server.push(ctx["accrued"][0], ctx.step_sizes())
            ctx["accrued"].zero_()
        if (ctx.step + 1) % self.settings.n_fetch == 0:
            ctx.replace(ctx.server.fetch()[None])

    def centre(self, ctx: Context) -> torch.Tensor:
        centre: torch.Tensor = ctx.server.centre()
        return centre

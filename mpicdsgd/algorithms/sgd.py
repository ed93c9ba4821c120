"""Centralised SGD and its momentum form: one model, the gradient averaged over all agents.

    SGD          x <- x - alpha h,          h = 1/N sum_j g_j(x) + lambda x
    MSGD         v <- mu v - alpha h
      Polyak     x <- x + v
      Nesterov   x <- x + mu v - alpha h

The baseline of the paper's section 5. Gradients are averaged during `backward`, which is
collective, too: all agents call it equally often and on the same parameters, as with
DistributedDataParallel. All agents hold the same x and do the same to it; v contains the step size,
as everywhere here. Statistics of BatchNorm stay each agent's own.
"""

from __future__ import annotations

from mpicdsgd.algorithms.contract import GRADIENTS, Algorithm, Context
from mpicdsgd.algorithms.local_steps import Momentum, Plain
from mpicdsgd.algorithms.registry import algorithm


@algorithm("sgd", "centralised SGD", source="arXiv 1706.07880, section 5")
class MeanGradient(Algorithm):
    """Every agent makes the same step with the mean gradient. All begin with agent 0's x."""

    Settings = Plain
    over = GRADIENTS
    admits = None
    order = "sums gradients during backward"
    signals = 1  # the agents meet in every step anyway

    def begin(self, ctx: Context, is_new: bool) -> None:
        if is_new:
            start = ctx["x"].clone()
            ctx.broadcast(start)
            ctx.replace(start)

    def step(self, ctx: Context) -> None:
        ctx.update(gradient=True)

    def rest(self, ctx: Context) -> None:
        ctx.require_alike("x", "the model")


@algorithm("msgd", "centralised SGD with momentum", source="arXiv 1706.07880, section 5")
class MeanGradientMomentum(MeanGradient):
    """The same step, with momentum."""

    Settings = Momentum

"""Stochastic gradient push (Assran et al. 2019, arXiv 1811.10792), by push-sum (Kempe et al. 2003).

    X <- P (X - alpha G(Z));      w <- P w;      z_j = x_j / w_j;      w_j = 1 at first

P is column-stochastic: each agent divides what it has among those that read it, which needs no
more than its own out-degree, so it serves on any strongly connected directed graph. z goes to the
agents' mean where x alone would not.

The model holds z, and what is sent is u_l = z_l - alpha / w_l g_l with w_l beside. In these terms
the mixing is one with weights that sum to 1:

    z_j <- sum_l (P[j,l] w_l / w_j') u_l,        w_j' = sum_l P[j,l] w_l

With a 16-bit wire the mean moves by what (w_j' - w_j) times its rounding adds up to: nothing once
the weights have settled, or where the graph is regular.
"""

from __future__ import annotations

from mpicdsgd.algorithms.contract import COLUMN, Admits, Algorithm, Circumstances, Context
from mpicdsgd.algorithms.local_steps import Plain
from mpicdsgd.algorithms.registry import algorithm


@algorithm("push-sum", "stochastic gradient push", source="arXiv 1811.10792, algorithm 1")
class PushSum(Algorithm):
    """See the module. One number is sent beside the parameters; the agents' add up to N."""

    Settings = Plain
    admits = Admits(matrix=COLUMN)
    order = "adapt, then combine: what is sent needs the gradient"
    anew = ("weight",)
    any_local_step = False  # its step is divided by the weight

    def __init__(self, settings: Plain, run: Circumstances) -> None:
        super().__init__(settings, run)
        self.numbers = {"weight": 1.0}

    def begin(self, ctx: Context, is_new: bool) -> None:
        if is_new:
            ctx.number("weight")[:] = 1.0

    def step(self, ctx: Context) -> None:
        weight = ctx.number("weight")
        ctx.update(gradient=True, factor=1 / weight)
        ctx.publish(weight=weight)
        near = ctx.received()
        total = near.mixed("weight")
        ctx.update(mix=near.reweighted("weight", total), publish=False)
        weight[:] = total

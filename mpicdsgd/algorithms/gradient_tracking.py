"""Gradient tracking (DIGing; Nedic, Olshevsky, Shi 2017, arXiv 1607.03218; Qu, Li 2018).

    Y <- Pi Y + G(X) - G_before;      X <- Pi X - alpha Y;      Y_0 = G(X_0)

y_j follows the agents' mean gradient: mean(Y) = mean(G) after every step, so a fixed step reaches
the optimum where CDSGD stops O(alpha) beside it when the agents' data differ. With minibatches both
gradients are those of their own step (DSGT: Pu, Nedic 2021, arXiv 1805.11454).
"""

from __future__ import annotations

from mpicdsgd.algorithms.contract import Algorithm, Context
from mpicdsgd.algorithms.local_steps import Plain
from mpicdsgd.algorithms.registry import algorithm


@algorithm("gradient-tracking", "gradient tracking", source="arXiv 1607.03218; arXiv 1805.11454")
class GradientTracking(Algorithm):
    """Two vectors are sent, x and y; y and the last gradient are kept.

    Both are ready before the gradient, so the exchange hides behind it. A step without a gradient
    takes the last one.
    """

    Settings = Plain
    sends = ("x", "y")
    vectors = ("y", "gradient")
    anew = ("y", "gradient")  # both 0: then y is the next gradient, as at first
    any_local_step = False  # the gradient goes into y, not into x

    def step(self, ctx: Context) -> None:
        before = ctx["gradient"].clone()
        ctx.take_gradient("gradient")
        ctx["y"].add_(ctx["gradient"] - before)
        near = ctx.received()
        ctx.update("y", mix=near, moved=True)
        ctx.update("x", mix=near, gradient="y")
        ctx.publish()

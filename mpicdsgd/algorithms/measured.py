"""What a step says of itself: measured sums, and what became of its passes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpicdsgd.kernels.update import Outcome


class Measured(NamedTuple):
    """What this agent measured at x_k, before step k; parameters only, no mixed buffers.

    Attributes:
        step: k.
        disagreement: D_j = 1/2 sum_l Pi[j,l] |p_l - p_j|^2, of what is published. Over all agents
            these add up to 1/2 sum_jl Pi[j,l] |x_l - x_j|^2, which for a doubly stochastic Pi is
            |X|^2_(I - Pi) of the paper's V = sum_j f_j + 1/(2 alpha) |X|^2_(I - Pi), eq. (9).
        gradient: |h|^2, h the gradient that is applied, with weight decay; 0 where there was none.
        penalty: P_j = 1/2 sum lambda x^2 where the gradient is taken, lambda the weight decay.
        moved: |x_(k+1),j - x_k,j|^2 by the pass.
    """

    step: int
    disagreement: float
    gradient: float
    penalty: float
    moved: float


class Beside(NamedTuple):
    """What is measured of a step that was made before the pass, which does not see it.

    Attributes:
        gradient, penalty: as `Measured` has them, shape (), not waited for.
    """

    gradient: torch.Tensor
    penalty: torch.Tensor


class Passes(NamedTuple):
    """A step's passes, whose outcomes are still to be heard of.

    Attributes:
        last: the pass that brought x to where the step leaves it; others: all before it.
        local: the local step's, where it was a pass.
        at_x: the first one that mixed x as it was sent.
        alone: how many passes came before what neighbours sent in this same step; 0: none did.
        is_measured: whether the step is.
    """

    step: int
    last: Outcome
    others: tuple[Outcome, ...] = ()
    local: Outcome | None = None
    at_x: Outcome | None = None
    beside: Beside | None = None
    alone: int = 0
    is_measured: bool = False

"""CDMSGD: CDSGD with momentum, in three forms. Only x is mixed, never v.

    v_j <- mu v_j - alpha g_j(x_j)
    Polyak      x_j <- sum_l Pi[j,l] x_l + v_j
    Nesterov    x_j <- sum_l Pi[j,l] x_l + mu v_j - alpha g_j(x_j)

as the authors released them (Nesterov is Keras's and PyTorch's form, used in the paper's
experiments), and the textbook's look-ahead (Sutskever et al. 2013),

    v_j <- mu v_j - alpha g_j(x_j + mu v_j);     x_j <- sum_l Pi[j,l] x_l + v_j

v contains the step size, as in the paper: a schedule scales what comes into v from then on, not
what is already in it. (torch.optim.SGD multiplies the whole buffer by the present lr.)
"""

from __future__ import annotations

from dataclasses import dataclass

from mpicdsgd.algorithms.cdsgd import Consensus, check_rounds
from mpicdsgd.algorithms.contract import setting
from mpicdsgd.algorithms.local_steps import Momentum
from mpicdsgd.algorithms.registry import algorithm


@dataclass(frozen=True)
class CDMSGDSettings(Momentum):
    """Settings of CDMSGD."""

    rounds: int = setting(1, "tau >= 1, mixing rounds in a step")

    def check(self) -> None:
        super().check()
        check_rounds(self.rounds)


@algorithm("cdmsgd", "CDSGD with momentum", source="arXiv 1706.07880, Algorithms 2 and 3")
class MomentumConsensus(Consensus):
    """CDSGD's step: the momentum is the local step's."""

    Settings = CDMSGDSettings
    descends = False

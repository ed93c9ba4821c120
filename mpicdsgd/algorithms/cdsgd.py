"""CDSGD: consensus-based distributed SGD, and i-CDSGD.

    x_j <- sum_l Pi[j,l] x_l - alpha g_j(x_j)               eq. (5), Algorithm 1, arXiv 1706.07880

The gradient is taken at the old x_j, so it needs nothing from the exchange. With tau mixing rounds
per step it is i-CDSGD (arXiv 1805.12120): x <- Pi^tau x - alpha g(x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mpicdsgd.algorithms.contract import Algorithm, Circumstances, Context, setting
from mpicdsgd.algorithms.local_steps import Plain
from mpicdsgd.algorithms.registry import algorithm
from mpicdsgd.common.errors import UserError


@dataclass(frozen=True)
class CDSGDSettings(Plain):
    """Settings of CDSGD."""

    rounds: int = setting(1, "tau >= 1, mixing rounds in a step")

    def check(self) -> None:
        super().check()
        check_rounds(self.rounds)


@dataclass(frozen=True)
class ICDSGDSettings(CDSGDSettings):
    """Settings of i-CDSGD."""

    rounds: int = setting(2, "tau >= 1, mixing rounds in a step")


def check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise UserError(f"rounds (tau) must be at least 1, got {rounds}")


@algorithm("cdsgd", "consensus-based distributed SGD", source="arXiv 1706.07880, eq. (5)")
class Consensus(Algorithm):
    """x <- Pi^tau x, with the gradient in the last round. See the module."""

    Settings: ClassVar[type[Any]] = CDSGDSettings
    descends = True

    def __init__(self, settings: Any, run: Circumstances) -> None:
        super().__init__(settings, run)
        self.posts = settings.rounds

    def step(self, ctx: Context) -> None:
        mixed = "x"
        for _ in range(self.posts - 1):
            ctx.update("mixed", start=mixed, mix=ctx.received())
            ctx.publish()
            mixed = "mixed"
        ctx.update(start=mixed, mix=ctx.received(), gradient=True)
        ctx.publish()


@algorithm("icdsgd", "CDSGD with several mixing rounds", source="arXiv 1805.12120")
class MoreConsensus(Consensus):
    """i-CDSGD: the same, with two rounds unless told otherwise."""

    Settings = ICDSGDSettings

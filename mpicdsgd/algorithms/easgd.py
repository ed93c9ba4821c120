"""Elastic averaging SGD (Zhang, Choromanska, LeCun 2015), and its momentum form.

    EASGD      x_i <- x_i - alpha g_i(x_i) + e (c - x_i)
    EAMSGD     v_i <- mu v_i - alpha g_i(x_i + mu v_i)
               x_i <- x_i + v_i + e (c - x_i)
    centre     c   <- c + e sum_i (x_i - c)                         all with the old x_i and c

with a pull from the centre c in every tau-th step, between which e is 0 (equations 5 and 6). No
rank is the centre: all agents keep c, with a sum that is under way while the gradient is computed.
With a server (`asynchronous`, algorithms 1 and 2) the agents pull at c one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mpicdsgd.algorithms.contract import SUMS, Algorithm, Circumstances, Context, setting
from mpicdsgd.algorithms.hyperparameters import at_least_one
from mpicdsgd.algorithms.local_steps import Momentum, Plain
from mpicdsgd.algorithms.registry import algorithm
from mpicdsgd.common.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Pull:
    period: int = setting(4, "tau >= 1, steps between two pulls")
    elasticity: float = setting(
        0.0, "e = alpha rho in (0, 1), at most 1 / N without a server; 0: 0.9 / N"
    )
    asynchronous: bool = setting(
        False, "true: each agent at its own pace, by a server; not simulated"
    )

    def check(self) -> None:
        super().check()  # type: ignore[misc]
        at_least_one("period (tau)", self.period)
        if not 0 <= self.elasticity < 1:
            raise UserError(
                f"elasticity (e) must be in (0, 1), or 0 for 0.9 / agents, got {self.elasticity}"
            )


@dataclass(frozen=True)
class EASGDSettings(_Pull, Plain):
    """Settings of EASGD."""


@dataclass(frozen=True)
class EAMSGDSettings(_Pull, Momentum):
    """Settings of EAMSGD: the momentum is a look-ahead, whatever ``nesterov`` says."""

    @property
    def form(self) -> str:
        return "look-ahead"


@algorithm("easgd", "elastic averaging SGD", source="Zhang, Choromanska, LeCun 2015, (5), (6)")
class ElasticAverage(Algorithm):
    """See the module."""

    Settings: ClassVar[type[Any]] = EASGDSettings
    over = SUMS
    admits = None
    order = "the centre's sum is hidden behind the gradient"
    vectors: tuple[str, ...] = ("centre",)
    served: ClassVar[type[Algorithm] | None] = None  # the variant with a server: `easgd_served`
    settings: EASGDSettings | EAMSGDSettings

    def __init__(self, settings: EASGDSettings | EAMSGDSettings, run: Circumstances) -> None:
        super().__init__(settings, run)
        self.elasticity = float(np.float32(settings.elasticity or 0.9 / run.agents))

    @classmethod
    def of(cls, settings: EASGDSettings | EAMSGDSettings) -> type[Algorithm]:
        if not settings.asynchronous:
            return cls
        assert cls.served is not None, "easgd_served is imported"
        return cls.served

    def check(self, agents: int) -> None:
        super().check(agents)
        given = self.settings.elasticity
        if not self.settings.asynchronous and given * agents > 1 + 1e-6:
            raise UserError(
                f"elasticity (e = alpha rho) must be at most 1 / N = {1 / agents:g} where "
                f"all {agents} agents pull at once, got {given}"
            )

    def begin(self, ctx: Context, is_new: bool) -> None:
        if is_new:
            ctx["centre"].copy_(ctx["x"])
            ctx.broadcast(ctx["centre"])
        self._ahead(ctx, ctx.step)

    def step(self, ctx: Context) -> None:
        is_due = ctx.step % self.settings.period == 0
        centre = ctx["centre"]
        ctx.update(mix=centre if is_due else None, weight=self.elasticity, gradient=True)
        if is_due:
            centre.add_(ctx.summed(), alpha=self.elasticity)
        self._ahead(ctx, ctx.step + 1)

    def _ahead(self, ctx: Context, step: int) -> None:
        if step % self.settings.period == 0:
            ctx.start_sum(ctx["x"] - ctx["centre"])

    def rest(self, ctx: Context) -> None:
        ctx.require_alike("centre", "the centre")

    def centre(self, ctx: Context) -> torch.Tensor:
        return ctx["centre"][0]


@algorithm("eamsgd", "EASGD with momentum", source="Zhang, Choromanska, LeCun 2015, section 3.1")
class ElasticMomentum(ElasticAverage):
    """The same step, with look-ahead momentum."""

    Settings = EAMSGDSettings
    fixed = ("nesterov",)

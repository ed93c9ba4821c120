"""The local steps: what a gradient does to an agent's own parameters, as settings of an algorithm.

    Plain       x <- x - alpha h,                 h = g + lambda x
    Momentum    v <- mu v - alpha h
      Polyak    x <- x + v
      Nesterov  x <- x + mu v - alpha h
      look-ahead  as Polyak, and the next gradient is taken at x + mu v

v contains the step size: a schedule scales what comes into v from then on. These two are made by
the fused kernel; any torch optimizer is a third (`torch_step`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mpicdsgd.algorithms.contract import setting
from mpicdsgd.algorithms.hyperparameters import at_least_zero, below_one
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.coefficients import Coefficients


@dataclass(frozen=True)
class Plain:
    """x <- x - alpha h."""

    lr: float = setting(0.01, "step size alpha, >= 0", per_group=True)
    weight_decay: float = setting(0.0, "lambda >= 0; the gradient is g + lambda x", per_group=True)

    @property
    def has_momentum(self) -> bool:
        return False

    @property
    def look_ahead(self) -> bool:
        return False

    def check(self) -> None:
        """Raise a UserError for a setting out of range that no parameter group has."""

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        """Of a parameter group. Raises UserError for values out of range."""
        return Coefficients(
            alpha=at_least_zero("lr", group["lr"]),
            decay=at_least_zero("weight_decay", group["weight_decay"]),
        )


@dataclass(frozen=True)
class Momentum(Plain):
    """v <- mu v - alpha h, then x <- x + v or, with Nesterov, x + mu v - alpha h."""

    momentum: float = setting(0.95, "mu in [0, 1)", per_group=True)
    nesterov: bool | Literal["look-ahead"] | str = setting(
        True, 'true, false (Polyak) or "look-ahead"'
    )

    @property
    def has_momentum(self) -> bool:
        return True

    @property
    def form(self) -> bool | str:
        """Which of the three: True for Nesterov, False for Polyak, "look-ahead"."""
        return self.nesterov

    @property
    def look_ahead(self) -> bool:
        return self.form == "look-ahead"

    def check(self) -> None:
        if self.nesterov not in (True, False, "look-ahead"):
            raise UserError(f'nesterov must be true, false or "look-ahead", got {self.nesterov!r}')

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        mu = below_one("momentum", group["momentum"])
        is_nesterov = self.form is True
        return Coefficients(
            alpha=at_least_zero("lr", group["lr"]),
            decay=at_least_zero("weight_decay", group["weight_decay"]),
            mu=mu,
            c_v=mu if is_nesterov else 1.0,
            c_g=1.0 if is_nesterov else 0.0,
        )

"""The two forms of a local step that the algorithms share, from a parameter group."""

from __future__ import annotations

from typing import Any

from mpicdsgd.algorithms.hyperparameters import at_least_zero, below_one
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Coefficients


def plain(group: dict[str, Any]) -> Coefficients:
    """x <- x - alpha h. Raises UserError for values out of range."""
    return Coefficients(
        alpha=at_least_zero("lr", group["lr"]),
        decay=at_least_zero("weight_decay", group["weight_decay"]),
    )


def check_nesterov(value: object) -> None:
    """Raise a UserError unless ``value`` is one of `CDMSGD`'s forms."""
    if value not in (True, False, "look-ahead"):
        raise UserError(f'nesterov must be true, false or "look-ahead", got {value!r}')


def with_momentum(group: dict[str, Any], nesterov: bool) -> Coefficients:
    """v <- mu v - alpha h, then x <- x + v or, with Nesterov, x + mu v - alpha h. As `plain`."""
    mu = below_one("momentum", group["momentum"])
    return Coefficients(
        alpha=at_least_zero("lr", group["lr"]),
        decay=at_least_zero("weight_decay", group["weight_decay"]),
        mu=mu,
        c_v=mu if nesterov else 1.0,
        c_g=1.0 if nesterov else 0.0,
    )

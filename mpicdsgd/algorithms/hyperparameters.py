"""Ranges of hyperparameters, checked when an optimizer is made and at every step."""

from __future__ import annotations

import math

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common.errors import UserError


def at_least_zero(name: str, value: object) -> float:
    """``value`` as a float; UserError unless it is finite and >= 0."""
    number = float(value)  # type: ignore[arg-type]
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"{name} must be a finite number >= 0, got {value}")
    return number


def below_one(name: str, value: object) -> float:
    """``value`` as a float; UserError unless it is in [0, 1)."""
    number = float(value)  # type: ignore[arg-type]
    if not 0 <= number < 1:
        raise UserError(f"{name} must be in [0, 1), got {value}")
    return number


def at_least_one(name: str, value: object) -> int:
    """``value`` as an int; UserError unless it is a whole number >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a whole number >= 1, got {value}")
    return value


def probability(name: str, value: object) -> float:
    """``value`` as a float; UserError unless it is in [0, 1]."""
    number = float(value)  # type: ignore[arg-type]
    if not 0 <= number <= 1:
        raise UserError(f"{name} is a probability and must be in [0, 1], got {value}")
    return number


def seconds(name: str, config: ExchangeConfig, agents: Agents) -> float:
    """The timeout of ``config``, where nothing is published on a graph's edges.

    Raises:
        UserError: it asks for a wire type or a transport, or ``agents`` for a matrix that changes
            by step, which algorithm ``name`` does not have.
    """
    if len(agents.turns) > 1:
        raise UserError(
            f"mixing {agents.mixing.name} changes by step, but {name} mixes by no matrix: give one "
            'that does not change, as mixing = "metropolis"'
        )
    if config.wire != "float32":
        raise UserError(f'exchange.wire = "{config.wire}": {name} exchanges float32 only')
    if config.transport != "auto":
        raise UserError(
            f'exchange.transport = "{config.transport}": {name} has no graph\'s edges to choose '
            'one for, leave it at "auto"'
        )
    if not config.timeout_s > 0:
        raise UserError(f"exchange.timeout_s must be positive, got {config.timeout_s}")
    return config.timeout_s

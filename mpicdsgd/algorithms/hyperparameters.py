"""Ranges of hyperparameters."""

from __future__ import annotations

import math

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

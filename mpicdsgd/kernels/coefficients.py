"""The coefficients of the fused update for one parameter group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coefficients:
    """v <- mu v - alpha h;  x <- mix + c_v v - c_g alpha h;  h = g + decay x.

    See `kernels.native.update`.
    """

    alpha: float
    decay: float = 0.0
    mu: float = 0.0
    c_v: float = 0.0
    c_g: float = 1.0

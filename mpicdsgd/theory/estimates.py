"""Numbers that stand for the constants of `formulas.Constants`, each with how it was come by.

    b, n_j    samples in a minibatch of agent j, and in its share
    s_j       E|grad of one sample - grad f_j|^2 over j's share, times n_j/(n_j - 1)

A minibatch is drawn from a share without replacement, so its gradient's variance carries the factor
for a finite population: E|g_j - grad f_j|^2 = s_j (1/b - 1/n_j), 0 for the whole share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt


class Kind(StrEnum):
    """How a number was come by; a theorem may rest on the first two."""

    EXACT = "exact"
    BOUND = "bound"  # from above for gamma, L and Q; from below for H and zeta_1
    ESTIMATED = "estimated"


_BEFORE_DETAIL = {Kind.EXACT: "; ", Kind.BOUND: ": ", Kind.ESTIMATED: " "}


@dataclass(frozen=True)
class Estimate:
    """A constant.

    Attributes:
        value: the number.
        uncertainty: standard error, residual or spread, as ``detail`` says; None: there is none.
        kind: see there.
        detail: from what, in words.
    """

    value: float
    uncertainty: float | None = None
    kind: Kind = Kind.EXACT
    detail: str = ""

    @property
    def certain(self) -> bool:
        """Whether a theorem may rest on it."""
        return self.kind != Kind.ESTIMATED

    @property
    def how(self) -> str:
        """Kind and detail in words."""
        return f"{self.kind}{_BEFORE_DETAIL[self.kind]}{self.detail}" if self.detail else self.kind

    def as_json(self) -> dict[str, Any]:
        """What a report has of it."""
        return {"value": self.value, "uncertainty": self.uncertainty, "how": self.how}


@dataclass(frozen=True)
class Noise:
    """What minibatches say of one agent's gradient at one point.

    Attributes:
        unit: s_j of the module.
        error: its standard error.
        share: n_j; infinite where even the whole share has noise, as with dropout.
    """

    unit: float
    error: float
    share: float

    def factor(self, batch: float) -> float:
        """1/b - 1/n_j."""
        return max(1.0 / batch - 1.0 / self.share, 0.0)


def noise(squares: npt.ArrayLike, batch: int, share: float) -> Noise:
    """s_j from |g_j - grad f_j|^2 of minibatches of one size, shape (draws,), at least two.

    A minibatch that is the whole share tells nothing of s_j, and there is no noise: 0.
    """
    values = np.asarray(squares, dtype=np.float64)
    factor = Noise(0.0, 0.0, share).factor(batch)
    if factor == 0:
        return Noise(0.0, 0.0, share)
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    return Noise(float(values.mean()) / factor, error / factor, share)


def variance(agents: Sequence[Noise], batch: float) -> tuple[float, float]:
    """E|g - E g|^2 of the stacked gradient with minibatches of size ``batch``; standard error.

    The agents draw apart from each other, so their variances add up.
    """
    total = sum(one.unit * one.factor(batch) for one in agents)
    squared = sum((one.error * one.factor(batch)) ** 2 for one in agents)
    return float(total), float(squared) ** 0.5


def largest(values: Sequence[float], errors: Sequence[float], where: str) -> Estimate:
    """An honest rule for a bound from points: the largest value, and its standard error on top."""
    i = int(np.argmax(values))
    return Estimate(values[i] + errors[i], errors[i], Kind.ESTIMATED, where)


def points(count: int) -> str:
    """So many points, in words."""
    return f"at {count} point{'' if count == 1 else 's'}"

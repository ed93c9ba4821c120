"""Step size schedules: the factor on the base step size as a plain function of the step k.

    step size at step k = lr * factor(k),  k = 0, 1, 2, ...

Momentum holds the step size (v <- mu v - alpha h), so a falling schedule takes effect on new
gradients only; what is in v keeps the step size it was added with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mpicdsgd.common.errors import UserError

Schedule = Callable[[int], float]

NAMES = ("fixed", "diminishing", "inverse-sqrt", "cosine")
_ALLOWED = "fixed, diminishing:E with E in (0.5, 1], inverse-sqrt:DECAY, cosine"


def fixed() -> Schedule:
    """1 at every step."""
    return lambda k: 1.0


def diminishing(exponent: float) -> Schedule:
    """1 / (k + 1)**exponent.

    Raises:
        UserError: exponent outside (0.5, 1]: the sum of the steps must diverge, that of their
            squares converge.

    Source: Table 1, arXiv 1706.07880.
    """
    if not 0.5 < exponent <= 1:
        raise UserError(
            f"schedule diminishing needs an exponent in (0.5, 1], got {exponent:g}: "
            f"for instance diminishing:0.6"
        )
    return lambda k: float((k + 1) ** -exponent)


def inverse_sqrt(decay: float) -> Schedule:
    """1 / sqrt(1 + decay * k). Raises UserError for a negative or infinite decay.

    Source: the authors' released code.
    """
    if not (math.isfinite(decay) and decay >= 0):
        raise UserError(
            f"schedule inverse-sqrt needs a finite decay >= 0, got {decay:g}: "
            f"for instance inverse-sqrt:1e-4"
        )
    return lambda k: 1.0 / math.sqrt(1.0 + decay * k)


def cosine(total_steps: int) -> Schedule:
    """(1 + cos(pi k / total_steps)) / 2: from 1 down to 0 at k = total_steps, 0 afterwards.

    Raises UserError for total_steps < 1. Source: Loshchilov and Hutter, arXiv 1608.03983.
    """
    if total_steps < 1:
        raise UserError(f"schedule cosine needs at least one step in all, got {total_steps}")
    return lambda k: 0.5 * (1.0 + math.cos(math.pi * min(k, total_steps) / total_steps))


def parse(spec: str, total_steps: int, shift: int = 0) -> Schedule:
    """The schedule that ``spec`` names: fixed, diminishing:0.6, inverse-sqrt:1e-4, cosine.

    Args:
        spec: name, and after a colon the number it needs.
        total_steps: length of the run in steps; cosine ends there.
        shift: of the run's `runs.epochs.Course`: cosine ends with the epochs, and so goes by them.

    Raises:
        UserError: anything else.
    """
    name, colon, text = spec.strip().partition(":")
    match name:
        case "fixed" | "cosine" if not colon:
            if name == "fixed":
                return fixed()
            by_epochs = cosine(total_steps + shift)
            return lambda k: by_epochs(k + shift)
        case "diminishing" | "inverse-sqrt" if colon:
            try:
                number = float(text)
            except ValueError:
                shown = text[:60]
                raise UserError(
                    f"schedule {name} needs a number after the colon, got {shown!r}: "
                    f"allowed are {_ALLOWED}"
                ) from None
            return diminishing(number) if name == "diminishing" else inverse_sqrt(number)
    raise UserError(f"unknown schedule {spec[:60]!r}: allowed are {_ALLOWED}")

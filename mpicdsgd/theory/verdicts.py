"""A measured run beside a bound: what is said of it, and where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HOLDS = "holds"
VIOLATED = "violated"
NOT_APPLICABLE = "not applicable"

PRINTED = "as printed"
CORRECTED = "corrected"


@dataclass(frozen=True)
class Verdict:
    """One line of the report.

    Attributes:
        bound: its name. version: "as printed", "corrected", or "" where they are the same.
        verdict: "holds", "violated" or "not applicable".
        detail: why not applicable, or what is to be known.
        since: the first step at which it is violated.
        violations, compared: at so many of so many steps.
        step, measured, limit: where it is tightest, or first violated.
    """

    bound: str
    version: str
    verdict: str
    detail: str = ""
    since: int | None = None
    violations: int = 0
    compared: int = 0
    step: int | None = None
    measured: float | None = None
    limit: float | None = None

    @property
    def factor(self) -> float | None:
        """limit/measured; None where that says nothing."""
        if self.measured is None or self.limit is None or not self.measured > 0:
            return None
        return self.limit / self.measured

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.verdict == VIOLATED:
            if self.since is None:
                return VIOLATED
            return f"{VIOLATED} from step {self.since} on (at {self.violations} of {self.compared})"
        if self.verdict == NOT_APPLICABLE:
            return f"{NOT_APPLICABLE}: {self.detail}"
        return self.verdict


def not_applicable(bound: str, version: str, why: str) -> Verdict:
    """That there is nothing to compare, and why."""
    return Verdict(bound, version, NOT_APPLICABLE, why)


def compare(
    bound: str,
    version: str,
    steps: npt.ArrayLike,
    measured: npt.ArrayLike,
    limit: npt.ArrayLike,
    *,
    resolution: npt.ArrayLike = 0.0,
    detail: str = "",
) -> Verdict:
    """Whether measured <= limit at all steps; what is no number does not hold.

    Args:
        steps, measured, limit: shape (M,), M >= 1.
        resolution: up to here a measurement says nothing, shape () or (M,).
    """
    k = np.asarray(steps)
    m, b = np.broadcast_arrays(np.asarray(measured, float), np.asarray(limit, float))
    allowed = b + np.asarray(resolution, float)
    assert k.shape == m.shape
    assert len(k) >= 1
    wrong = np.flatnonzero(~(m <= allowed))
    if len(wrong):
        i = int(wrong[0])
        since: int | None = int(k[i])
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            # Of 0 beside 0 nothing is said.
            tightness = np.where(m > 0, m / allowed, 0.0)
        i, since = int(np.argmax(tightness)), None
    return Verdict(
        bound,
        version,
        VIOLATED if len(wrong) else HOLDS,
        detail,
        since,
        len(wrong),
        len(k),
        int(k[i]),
        float(m[i]),
        float(b[i]),
    )


def window_means(
    steps: npt.NDArray[np.int64], window: int, *values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float64]]]:
    """Means over windows of so many steps, k // window; only whole ones, if there are any.

    Returns:
        The last step of each window, and each of ``values`` averaged, shape (windows,).
    """
    starts = np.flatnonzero(np.diff(steps // window, prepend=-1))
    counts = np.diff(starts, append=len(steps))
    whole = counts == window
    if not whole.any():
        whole[:] = True
    means = [np.add.reduceat(one, starts) / counts for one in values]
    return steps[starts + counts - 1][whole], [one[whole] for one in means]

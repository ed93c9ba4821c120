"""Proposition 1 beside every CDSGD run of `run.py`: how far the agents may be apart, and are.

|X - 1 s|, the root of the agents' summed squared distances from their mean s, is in the metrics at
every evaluation. The bound is `theory.bounds.consensus_bound` with the run's own step sizes and
L, the largest norm of all agents' gradients together that any of its steps had, from the run's
trace. With a fixed step it rises to the proposition's radius alpha L / gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np

from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.runs import metrics_file, trace
from mpicdsgd.theory import bounds

_ROUNDING = 1e-6  # of a distance in float32


@dataclass(frozen=True)
class Radius:
    """One run beside the bound, at its evaluations.

    Args:
        L: see the module.
        measured, bound: at the evaluation where they are nearest to each other.
        factor: bound / measured, the smallest and the largest of all evaluations.
        violations: evaluations at which the bound does not hold.
    """

    L: float
    measured: float
    bound: float
    factor: tuple[float, float]
    violations: int
    evaluations: int


def covered(settings: common.Record, agents: int) -> bool:
    """Whether the proposition speaks of a run: CDSGD, and somebody to differ from."""
    return settings["optim"]["name"] == "cdsgd" and agents > 1


def beside(folder: Path, settings: common.Record, agents: int) -> Radius:
    """A finished run that `covered`. Raises UserError where it has no trace."""
    steps = trace.read(folder)
    graph = graph_from_spec(settings["agents"]["topology"], agents)
    spectrum = mixing_from_spec(settings["agents"]["mixing"], graph).spectrum
    L = float(np.sqrt(steps.gradient.max()))
    bound = bounds.consensus_bound(steps.lr, L, spectrum)
    lines = metrics_file.read(folder)
    measured = np.array([line["consensus"]["rms"] * np.sqrt(agents) for line in lines])
    limit = bound[[line["step"] for line in lines]]
    factor = limit / measured
    nearest = int(np.argmin(factor))
    return Radius(
        L=L,
        measured=float(measured[nearest]),
        bound=float(limit[nearest]),
        factor=(float(factor.min()), float(factor.max())),
        violations=int((measured > limit * (1 + _ROUNDING)).sum()),
        evaluations=len(lines),
    )


def section(title: str, found: dict[str, Sequence[Radius]]) -> list[str]:
    """The page's table; ``found``: by setup, of every seed."""
    if not found:
        return []
    rows = []
    for label, radii in found.items():
        nearest = min(radii, key=lambda one: one.factor[0])
        largest = max(one.factor[1] for one in radii)
        broken = sum(one.violations for one in radii)
        rows.append([
            label,
            str(len(radii)),
            f"{sum(one.evaluations for one in radii)}",
            f"violated at {broken}" if broken else "holds at all",
            f"{nearest.L:.3g}",
            f"{nearest.measured:.3g}",
            f"{nearest.bound:.3g}",
            f"{nearest.factor[0]:.2f} to {largest:.2f}",
        ])  # fmt: skip
    head = ["", "runs", "evaluations", "Proposition 1", "L", "distance", "bound",
            "bound / distance"]  # fmt: skip
    return [
        f"## Proposition 1 on every CDSGD run: {title}",
        "",
        "The agents' distance from their mean, all together, at every evaluation, beside "
        "alpha L/gap (where steps diminish, its form for that), L measured in the run. L, distance "
        "and bound are those of the evaluation at which they are nearest. It says nothing of "
        "momentum: no CDMSGD run is in the table.",
        "",
        *common.table(head, rows),
        "",
    ]

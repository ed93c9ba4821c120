"""What was found on one data set, and the words and tables that the page makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import common

from paper.consensus import Radius
from paper.curves import Curves, diverged
from paper.runs import Setup

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32),
          "digits": (1, 8, 8)}  # fmt: skip
CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100, "digits": 10}


@dataclass
class Part:
    """What was found on one data set.

    Args:
        name, title: of the data set.
        found: curves by (experiment, label), None where no seed is finished.
        setups: by experiment.
        settings: resolved, by (experiment, label).
        lambda_2: of the mixing matrix, by (experiment, label).
        figures: file names, by experiment.
        radii: Proposition 1 beside the finished runs that it speaks of, by (experiment, label).
    """

    name: str
    title: str
    found: dict[tuple[str, str], Curves | None]
    setups: dict[str, list[Setup]]
    settings: dict[tuple[str, str], common.Record]
    lambda_2: dict[tuple[str, str], float] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    radii: dict[tuple[str, str], list[Radius]] = field(default_factory=dict)

    @property
    def guess(self) -> float:
        """The loss of guessing: a training loss above it is divergence."""
        return math.log(CLASSES[self.name])


def remarks(part: Part, experiment: str, seeds: int) -> list[str]:
    """What a reader of an experiment's table must know: what is not there, and what diverged."""
    out = []
    for setup in part.setups[experiment]:
        one = part.found[experiment, setup.label]
        if one is None:
            out.append(f"- **{setup.label} is missing**: no run of it is finished.")
            continue
        if len(one.seeds) < seeds:
            there = ", ".join(map(str, one.seeds))
            out.append(
                f"- **{setup.label} is not complete**: finished are seeds {there} of {seeds}."
            )
        if diverged(one, part.guess):
            out.append(
                f"- **{setup.label} diverged**: its training loss ends at "
                f"{one.late('train_loss').mean():.2f}, and guessing has {part.guess:.2f}. What is "
                "compared with it says nothing."
            )
    return out

"""What is made of a setup's metrics: curves over seeds, early and late means, differences.

Shapes: S seeds, E evaluations. Accuracies are in percent, their differences in points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_FIELDS = {  # where a line of metrics has it, and the factor
    "time_s": (("time_s",), 1),
    "step": (("step",), 1),
    "bytes": (("bytes_sent",), 1),
    "wait_s": (("wait_s",), 1),
    "train_loss": (("train_loss", "mean"), 1),
    "test_loss": (("test_loss", "mean"), 1),
    "train": (("train_accuracy", "mean"), 100),
    "test": (("test_accuracy", "mean"), 100),
    "std": (("test_accuracy", "std"), 100),
    "averaged": (("averaged_model", "test_accuracy"), 100),
    "centre": (("centre", "test_accuracy"), 100),
    "consensus": (("consensus", "rms"), 1),
}
# Whose course over the epochs is kept; of the others it is the end.
_KEPT = ("time_s", "bytes", "train_loss", "test_loss", "train", "test", "std", "consensus")
LATE = 3  # evaluations at the end that are averaged
# Student's t for a 95% confidence interval of the mean of so many seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass(frozen=True)
class Curves:
    """A setup's metrics over its seeds.

    Args:
        seeds: those that are finished.
        epoch: of every evaluation, shape (E,).
        values: by name, shape (S, E); *gap* is training minus test accuracy.
    """

    seeds: tuple[int, ...]
    epoch: Array
    values: dict[str, Array]

    def early(self, name: str) -> Array:
        """The mean over the first third of the epochs, shape (S,)."""
        early = self.epoch <= max(self.epoch[-1] / 3, self.epoch[0])
        return np.asarray(self.values[name][:, early].mean(axis=1))

    def late(self, name: str) -> Array:
        """The mean over the last evaluations, shape (S,)."""
        return np.asarray(self.values[name][:, -LATE:].mean(axis=1))

    def whole(self, name: str) -> Array:
        """The mean over all evaluations, shape (S,)."""
        return np.asarray(self.values[name].mean(axis=1))

    def of(self, seeds: Sequence[int]) -> Curves:
        """Of these seeds only, in their order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Curves(tuple(seeds), self.epoch, {k: v[rows] for k, v in self.values.items()})


@dataclass(frozen=True)
class Difference:
    """A mean over seeds, pair by pair, and half its 95% confidence interval."""

    mean: float
    half: float

    def above(self, least: float) -> bool:
        """Whether it is surely above 0, and by more than ``least``."""
        return self.mean > max(least, self.half)


def curves(lines_by_seed: dict[int, list[dict[str, Any]]]) -> Curves | None:
    """Of the metrics of all seeds; None where there are none. Epochs that all seeds have."""
    if not lines_by_seed:
        return None
    by_epoch = {seed: {line["epoch"]: line for line in lines}
                for seed, lines in lines_by_seed.items()}  # fmt: skip
    epochs = sorted(set.intersection(*(set(lines) for lines in by_epoch.values())))
    values = {
        name: np.array([[_at(lines[e], place) * factor for e in epochs]
                        for lines in by_epoch.values()], dtype=np.float64)
        for name, (place, factor) in _FIELDS.items()
    }  # fmt: skip
    values["gap"] = values["train"] - values["test"]
    return Curves(tuple(by_epoch), np.array(epochs, dtype=np.float64), values)


def _at(line: dict[str, Any], place: tuple[str, ...]) -> float:
    value: Any = line
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return float("nan") if value is None else float(value)


def diverged(found: Curves, guess: float) -> bool:
    """Whether the training loss of any seed ends above ``guess``, that of guessing, or as NaN."""
    return not bool((found.late("train_loss") <= guess).all())


def difference(a_S: Array, b_S: Array) -> Difference:
    """Of a minus b, seed by seed; needs two seeds."""
    pairs = a_S - b_S
    error = float(pairs.std(ddof=1)) / len(pairs) ** 0.5
    return Difference(float(pairs.mean()), STUDENT.get(len(pairs), 2.26) * error)


def summary(found: Curves) -> dict[str, Any]:
    """What the record keeps: ends by seed, and curves as means over seeds."""
    ends = {name: _numbers(found.late(name)) for name in found.values}
    courses: dict[str, Any] = {
        name: {"mean": _numbers(found.values[name].mean(axis=0))} for name in _KEPT
    }
    for name in ("train", "test"):
        courses[name]["std"] = _numbers(deviation(found.values[name]))
    return {"seeds": list(found.seeds), "late": ends, "epoch": _numbers(found.epoch),
            "curves": courses}  # fmt: skip


def deviation(values: Array) -> Array:
    """Over the seeds, which come first; 0 for one."""
    return np.asarray(values.std(axis=0, ddof=min(1, len(values) - 1)))


def _numbers(values: Array) -> list[float | None]:
    return [None if np.isnan(v) else float(f"{v:.5g}") for v in values.tolist()]

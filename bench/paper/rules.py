"""The rules by which a claim is decided, each from the curves of what it compares.

A decision compares the seeds that all setups have, pair by pair. *Sure* is a mean difference
outside half the 95% confidence interval over seeds and larger than `POINTS`. *Early* is the mean
over the first third of the epochs, *late* the mean of the last three evaluations. Accuracies are
means over agents: on the test set, or each agent's on its own share of the training set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from paper.curves import Curves, Difference, deviation, difference

POINTS = 0.2  # a smaller difference of accuracies is none
EQUAL = 1.0  # points within which two accuracies are called equal


@dataclass(frozen=True)
class Verdict:
    """Whether a claim was seen (None: not testable here), and the numbers that decided."""

    seen: bool | None
    numbers: str


Decision = Callable[[list[Curves]], Verdict]


def paired(found: list[Curves]) -> list[Curves] | None:
    """The same with the seeds that all have; None for fewer than two."""
    shared = sorted(set.intersection(*(set(one.seeds) for one in found)))
    return [one.of(shared) for one in found] if len(shared) > 1 else None


def ahead_early(found: list[Curves]) -> Verdict:
    """First before second, early."""
    first, second = found
    d = difference(first.early("test"), second.early("test"))
    return Verdict(d.above(POINTS), f"early {_pm(d)}")


def equal_late(found: list[Curves]) -> Verdict:
    """First and second at the end."""
    first, second = found
    d = difference(first.late("test"), second.late("test"))
    return Verdict(abs(d.mean) <= EQUAL, f"late {_pm(d)}{_ends(found)}")


def smaller_gap(found: list[Curves]) -> Verdict:
    """Training minus test accuracy at the end: the first's larger than the second's."""
    first, second = found
    d = difference(first.late("gap"), second.late("gap"))
    gaps = " and ".join(f"{one.late('gap').mean():.2f}" for one in found)
    return Verdict(d.above(POINTS), f"gaps {gaps}, difference {_pm(d)}")


def smaller_gap_at_equal_training(found: list[Curves]) -> Verdict:
    """The same where the two have the same training accuracy: the highest that both reach."""
    first, second = found
    at_S = np.minimum(first.values["train"].max(axis=1), second.values["train"].max(axis=1))
    gaps_S = [np.array([_gap_at(one, row, level) for row, level in enumerate(at_S)])
              for one in found]  # fmt: skip
    d = difference(*gaps_S)
    gaps = " and ".join(f"{gap_S.mean():.2f}" for gap_S in gaps_S)
    return Verdict(
        d.above(POINTS),
        f"at training accuracy {at_S.mean():.2f}: gaps {gaps}, difference {_pm(d)}",
    )


def _gap_at(one: Curves, row: int, level: float) -> float:
    """The gap where the training accuracy first is ``level``, between evaluations linear."""
    train_E, gap_E = one.values["train"][row], one.values["gap"][row]
    after = int(np.argmax(train_E >= level - 1e-9))
    if after == 0:
        return float(gap_E[0])
    low, high = train_E[after - 1], train_E[after]
    share = (level - low) / (high - low)
    return float(gap_E[after - 1] + share * (gap_E[after] - gap_E[after - 1]))


def not_below_late(found: list[Curves]) -> Verdict:
    """First at least as good as second at the end."""
    first, second = found
    d = difference(first.late("test"), second.late("test"))
    sure = "surely above" if d.above(POINTS) else "surely below" if _below(d) else "not sure"
    return Verdict(d.mean >= -POINTS, f"late {_pm(d)} ({sure}){_ends(found)}")


def slows(found: list[Curves], on: str) -> Verdict:
    """Early accuracy falls from each to the next, and surely from first to last.

    Args:
        on: "test" or "train".
    """
    early = [float(one.early(on).mean()) for one in found]
    d = difference(found[0].early(on), found[-1].early(on))
    falls = all(a >= b for a, b in pairwise(early))
    return Verdict(falls and d.above(POINTS), f"early {_each(found, on)}; first - last {_pm(d)}")


def last_is_faster(found: list[Curves], on: str) -> Verdict:
    """The last (sparsest, fewest) before the first, early, in the agents' mean; see `slows`."""
    d = difference(found[-1].early(on), found[0].early(on))
    return Verdict(d.above(POINTS), f"early {_each(found, on)}; last - first {_pm(d)}")


def wider_spread(found: list[Curves]) -> Verdict:
    """The deviation of the accuracy over agents: the last's larger, over the whole run."""
    d = difference(found[-1].whole("std"), found[0].whole("std"))
    values = ", ".join(f"{one.whole('std').mean():.2f}" for one in found)
    late_S = [one.late("std") for one in found]
    late = ", ".join(f"{s.mean():.2f} ± {deviation(s):.2f}" for s in late_S)
    part = max(float(deviation(s) / s.mean()) if s.mean() > 0 else 0.0 for s in late_S)
    return Verdict(
        d.above(0),
        f"{values}; last - first {_pm(d)}; late {late} over seeds: between seeds it varies by up "
        f"to {100 * part:.0f}% of its size",
    )


def farther_apart(found: list[Curves]) -> Verdict:
    """The consensus distance: the last's larger, over the whole run."""
    d = difference(found[-1].whole("consensus"), found[0].whole("consensus"))
    values = ", ".join(f"{one.whole('consensus').mean():.2g}" for one in found)
    return Verdict(d.above(0), f"{values}; last - first {_pm(d, '.2g')}")


def less_stable(found: list[Curves]) -> Verdict:
    """How much the deviation over agents changes from one evaluation to the next: the last's more.

    Over the second half of the run, where it is not the learning that changes it.
    """
    changes_S = []
    for one in found:
        late = one.values["std"][:, one.epoch >= one.epoch[-1] / 2]
        changes_S.append(np.abs(np.diff(late, axis=1)).mean(axis=1))
    d = difference(changes_S[-1], changes_S[0])
    values = ", ".join(f"{s.mean():.3f}" for s in changes_S)
    return Verdict(d.above(0), f"{values}; last - first {_pm(d, '.3f')}")


def _each(found: list[Curves], on: str) -> str:
    return ", ".join(f"{one.early(on).mean():.2f}" for one in found)


def _pm(d: Difference, form: str = ".2f") -> str:
    return f"{d.mean:+{form}} ± {d.half:{form}}"


def _ends(found: list[Curves]) -> str:
    means = [f"{one.late('test').mean():.2f}" for one in found]
    return f" ({' and '.join(means)})"


def _below(d: Difference) -> bool:
    return d.mean < -max(POINTS, d.half)

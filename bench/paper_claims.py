"""The claims of the paper's section 5, each with the rule by which it is decided here.

A decision compares the seeds that both setups have, pair by pair. *Sure* is a mean difference
outside half the 95% confidence interval over seeds and larger than `POINTS`. *Early* is the mean
over the first third of the epochs, *late* the mean of the last three evaluations. Accuracies are
means over agents, on the test set unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from paper_curves import Curves, Difference, difference

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
    sure = "surely above" if d.above(POINTS) else "surely below" if _below(d) else "no difference"
    return Verdict(d.mean >= -POINTS, f"late {_pm(d)} ({sure}){_ends(found)}")


def slows(found: list[Curves]) -> Verdict:
    """Early training accuracy falls from each to the next, and surely from first to last."""
    early = [float(one.early("train").mean()) for one in found]
    d = difference(found[0].early("train"), found[-1].early("train"))
    falls = all(a >= b for a, b in pairwise(early))
    values = ", ".join(f"{v:.2f}" for v in early)
    return Verdict(falls and d.above(POINTS), f"early, training: {values}; first - last {_pm(d)}")


def faster_when_sparse(found: list[Curves]) -> Verdict:
    """The last (sparsest) before the first (densest), early, in the agents' mean."""
    d = difference(found[-1].early("test"), found[0].early("test"))
    values = ", ".join(f"{one.early('test').mean():.2f}" for one in found)
    return Verdict(d.above(POINTS), f"early {values}; sparsest - densest {_pm(d)}")


def less_consensus(found: list[Curves]) -> Verdict:
    """The deviation of the accuracy over agents: the sparsest's larger, over the whole run."""
    d = difference(found[-1].whole("std"), found[0].whole("std"))
    values = ", ".join(f"{one.whole('std').mean():.2f}" for one in found)
    apart = ", ".join(f"{one.late('consensus').mean():.2g}" for one in found)
    return Verdict(
        d.above(0),
        f"deviation over agents {values}; sparsest - densest {_pm(d)}; consensus distance {apart}",
    )


def _pm(d: Difference) -> str:
    return f"{d.mean:+.2f} ± {d.half:.2f}"


def _ends(found: list[Curves]) -> str:
    means = [f"{one.late('test').mean():.2f}" for one in found]
    return f" ({' and '.join(means)})"


def _below(d: Difference) -> bool:
    return d.mean < -max(POINTS, d.half)


@dataclass(frozen=True)
class Claim:
    """A sentence of section 5.

    Args:
        setups: (experiment, label) of what is compared, in the decision's order.
        where: what is different from the paper's settings, if anything.
    """

    text: str
    rule: str
    decide: Decision
    setups: tuple[tuple[str, str], ...]
    where: str = field(default="step size 0.01 for all")


_SGD = (("1a", "SGD, one machine"), ("1a", "CDSGD"))
_EVEN = (("1a", "SGD, Allreduce"), ("1a", "CDSGD"))
_TUNED = (("algorithms", "SGD, Allreduce"), ("algorithms", "CDSGD"))
_FEDAVG = (("1b", "CDMSGD"), ("1b", "FedAvg"))
_SUITED = (("algorithms", "CDMSGD"), ("algorithms", "FedAvg"))
_AGENTS = tuple(("2a", f"N = {n}") for n in (2, 8, 16))
_GRAPHS = tuple(("2b", name) for name in ("complete", "hypercube", "ring", "chain"))
_SLOWER_RULE = f"SGD - CDSGD early: sure, above {POINTS} points"
_EQUAL_RULE = f"SGD - CDSGD late: within {EQUAL:g} point"
_GAP_RULE = f"gap of SGD - gap of CDSGD late: sure, above {POINTS} points"
_BEST_RULE = f"CDMSGD - FedAvg late: not below -{POINTS} points"
_BEFORE_RULE = f"FedAvg - CDMSGD early: sure, above {POINTS} points"
ONE, ALL, RATES = "0.01, SGD on one machine", "0.01, SGD by Allreduce", "each at its own rate"

CLAIMS = (
    Claim("CDSGD is slower than SGD", _SLOWER_RULE, ahead_early, _SGD, ONE),
    Claim("CDSGD is slower than SGD", _SLOWER_RULE, ahead_early, _EVEN, ALL),
    Claim("CDSGD is slower than SGD", _SLOWER_RULE, ahead_early, _TUNED, RATES),
    Claim("CDSGD is equal to SGD late", _EQUAL_RULE, equal_late, _SGD, ONE),
    Claim("CDSGD is equal to SGD late", _EQUAL_RULE, equal_late, _EVEN, ALL),
    Claim("CDSGD is equal to SGD late", _EQUAL_RULE, equal_late, _TUNED, RATES),
    Claim("CDSGD's generalisation gap is smaller", _GAP_RULE, smaller_gap, _SGD, ONE),
    Claim("CDSGD's generalisation gap is smaller", _GAP_RULE, smaller_gap, _EVEN, ALL),
    Claim("CDSGD's generalisation gap is smaller", _GAP_RULE, smaller_gap, _TUNED, RATES),
    Claim("... also at equal training accuracy (not in the paper)",
          "the same at the highest training accuracy that both reach",
          smaller_gap_at_equal_training, _SGD, ONE),
    Claim("CDMSGD is at least as good as FedAvg late", _BEST_RULE, not_below_late, _FEDAVG),
    Claim("CDMSGD is at least as good as FedAvg late", _BEST_RULE, not_below_late, _SUITED, RATES),
    Claim("CDMSGD reaches SGD's level", f"CDMSGD - SGD late: not below -{POINTS} points",
          not_below_late, (("1b", "CDMSGD"), ("1b", "SGD, one machine")), ONE),
    Claim("FedAvg is slightly faster than CDMSGD before", _BEFORE_RULE, ahead_early,
          _FEDAVG[::-1]),
    Claim("FedAvg is slightly faster than CDMSGD before", _BEFORE_RULE, ahead_early,
          _SUITED[::-1], RATES),
    Claim("More agents slow the convergence",
          f"early training accuracy falls with N = 2, 8, 16; first - last sure, above {POINTS}",
          slows, _AGENTS),
    Claim("More agents reach a similar accuracy", f"N=2 - N=16 late: within {EQUAL:g} point",
          equal_late, (_AGENTS[0], _AGENTS[-1])),
    Claim("A sparser topology is faster on average",
          f"chain - complete early: sure, above {POINTS} points", faster_when_sparse, _GRAPHS),
    Claim("A sparser topology has less consensus",
          "accuracy's deviation over agents, mean of the run: chain - complete sure, above 0",
          less_consensus, _GRAPHS),
)  # fmt: skip


def decide(claim: Claim, found: Mapping[tuple[str, str], Curves | None]) -> Verdict:
    """The verdict, from the curves of a data set by (experiment, label)."""
    given = [found.get(place) for place in claim.setups]
    if absent := [f"{label} ({e})" for (e, label), one in zip(claim.setups, given, strict=True)
                  if one is None]:  # fmt: skip
        return Verdict(None, f"no runs of {', '.join(absent)}")
    both = paired([one for one in given if one is not None])
    if both is None:
        return Verdict(None, "needs two seeds or more")
    return claim.decide(both)

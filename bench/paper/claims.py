"""The claims of the paper's section 5 and Table 1, each with its rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from paper.curves import Curves, diverged
from paper.rules import (
    EQUAL,
    POINTS,
    Decision,
    Verdict,
    ahead_early,
    equal_late,
    farther_apart,
    last_is_faster,
    less_stable,
    not_below_late,
    paired,
    slows,
    smaller_gap,
    smaller_gap_at_equal_training,
    wider_spread,
)

Place = tuple[str, str]  # experiment, label


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper.

    Args:
        setups: (experiment, label) of what is compared, in the decision's order.
        where: under which settings.
    """

    text: str
    rule: str
    decide: Decision
    setups: tuple[Place, ...]
    where: str = field(default="step size 0.01 for all")


def decide(claim: Claim, found: Mapping[Place, Curves | None], guess: float) -> Verdict:
    """The verdict, from the curves of a data set.

    Args:
        guess: the loss of guessing there, by which a setup is seen to have diverged.
    """
    given = [(label, experiment, found.get((experiment, label)))
             for experiment, label in claim.setups]  # fmt: skip
    if absent := [f"{label} ({experiment})" for label, experiment, one in given if one is None]:
        return Verdict(None, f"no finished runs of {', '.join(absent)}")
    if lost := [label for label, _, one in given if one is not None and diverged(one, guess)]:
        return Verdict(None, f"{' and '.join(lost)} diverged, and what is beside it says nothing")
    both = paired([one for _, _, one in given if one is not None])
    if both is None:
        return Verdict(None, "needs two seeds or more")
    return claim.decide(both)


def _rows(
    text: str, rule: str, decision: Decision, *places: tuple[str, Place, Place]
) -> list[Claim]:
    """The same claim in several circumstances."""
    return [Claim(text, rule, decision, (a, b), where) for where, a, b in places]


def _on_both(text: str, rule: str, decision: partial[Verdict], setups: tuple[Place, ...],
             where: str = "step size 0.01 for all") -> list[Claim]:  # fmt: skip
    """The same claim on test and on training accuracy."""
    words = {"test": "test accuracy", "train": "training accuracy, on own shares"}
    return [Claim(f"{text}: {name}", rule, partial(decision, on=on), setups, where)
            for on, name in words.items()]  # fmt: skip


ONE, ALL, RATES = "0.01, SGD on one machine", "0.01, SGD by Allreduce", "each at its own rate"
RATES_ONE, SAME = "each at its own rate, SGD on one machine", "step size 0.01 for all"
CNN = "0.01, the authors' CNN"
_SGD_ONE, _SGD_ALL, _CDSGD = (
    ("1a", label) for label in ("SGD, one machine", "SGD, Allreduce", "CDSGD")
)
_CDMSGD, _FEDAVG, _MSGD_ONE = (("1b", label) for label in ("CDMSGD", "FedAvg", "MSGD, one machine"))


def _own(label: str) -> Place:
    return "algorithms", label


_SGD = ((ONE, _SGD_ONE, _CDSGD), (ALL, _SGD_ALL, _CDSGD),
        (RATES, _own("SGD, Allreduce"), _own("CDSGD")))  # fmt: skip
_BEST = ((SAME, _CDMSGD, _FEDAVG), (RATES, _own("CDMSGD"), _own("FedAvg")))
_AGENTS = tuple(("2a", f"N = {n}") for n in (2, 8, 16))
_GRAPHS = tuple(("2b", name) for name in ("complete", "hypercube", "ring", "chain"))
_CLIENTS = tuple(("fraction", f"C = {c}, 0.01") for c in ("1.0", "0.6", "0.2"))
_CLIENTS_SUITED = tuple(("fraction", f"C = {c}, own rate") for c in ("1.0", "0.6", "0.2"))
_FASTER = f"the other - CDSGD early: sure, above {POINTS} points"
_LEVEL = f"CDMSGD - the other late: not below -{POINTS} points"
_LAST = f"last - first early: sure, above {POINTS} points"

CLAIMS = (
    *_rows("CDSGD is slower than SGD", f"SGD - CDSGD early: sure, above {POINTS} points",
           ahead_early, *_SGD),
    *_rows("CDSGD is equal to SGD late", f"SGD - CDSGD late: within {EQUAL:g} point",
           equal_late, *_SGD),
    *_rows("CDSGD's generalisation gap is smaller",
           f"gap of SGD - gap of CDSGD late: sure, above {POINTS} points", smaller_gap, *_SGD),
    Claim("... also at equal training accuracy (not in the paper)",
          "the same at the highest training accuracy that both reach",
          smaller_gap_at_equal_training, (_SGD_ONE, _CDSGD), ONE),
    *_rows("CDSGD is slow beside FedAvg", _FASTER, ahead_early, (SAME, _FEDAVG, ("1b", "CDSGD")),
           (RATES, _own("FedAvg"), _own("CDSGD"))),
    *_rows("CDSGD is slow beside CDMSGD", _FASTER, ahead_early, (SAME, _CDMSGD, ("1b", "CDSGD")),
           (RATES, _own("CDMSGD"), _own("CDSGD")), (CNN, ("cnn", "CDMSGD"), ("cnn", "CDSGD"))),
    *_rows("FedAvg is slightly faster than CDMSGD before",
           f"FedAvg - CDMSGD early: sure, above {POINTS} points", ahead_early,
           *((where, b, a) for where, a, b in _BEST)),
    *_rows("CDMSGD is at least as good as FedAvg late",
           f"CDMSGD - FedAvg late: not below -{POINTS} points", not_below_late, *_BEST),
    *_rows("CDMSGD reaches SGD's level", _LEVEL, not_below_late, (ONE, _CDMSGD, _SGD_ONE),
           (RATES, _own("CDMSGD"), _own("SGD, Allreduce")),
           (RATES_ONE, _own("CDMSGD"), _own("SGD, one machine"))),
    *_rows("CDMSGD reaches MSGD's level (SGD with its momentum)", _LEVEL, not_below_late,
           ("0.01, MSGD on one machine", _CDMSGD, _MSGD_ONE),
           ("0.01, MSGD by Allreduce", _CDMSGD, ("1b", "MSGD, Allreduce"))),
    *_on_both("More agents slow the convergence",
              f"early accuracy falls with N = 2, 8, 16; first - last sure, above {POINTS}",
              partial(slows), _AGENTS),
    Claim("More agents reach a similar accuracy", f"N=2 - N=16 late: within {EQUAL:g} point",
          equal_late, (_AGENTS[0], _AGENTS[-1])),
    *_on_both("A sparser topology is faster on average (complete to chain)", _LAST,
              partial(last_is_faster), _GRAPHS),
    *_on_both("A smaller C of FedAvg is faster, too (C = 1, 0.6, 0.2)", _LAST,
              partial(last_is_faster), _CLIENTS),
    *_on_both("A smaller C of FedAvg is faster, too (C = 1, 0.6, 0.2)", _LAST,
              partial(last_is_faster), _CLIENTS_SUITED, RATES),
    Claim("A sparser topology has less consensus: spread of accuracies",
          "accuracy's deviation over agents, mean of the run: chain - complete sure, above 0",
          wider_spread, _GRAPHS),
    Claim("A sparser topology has less consensus: consensus distance",
          "mean of the run: chain - complete sure, above 0", farther_apart, _GRAPHS),
    Claim("Consensus is more stable on denser topologies",
          "mean change of the deviation over agents from epoch to epoch, second half of the run: "
          "chain - complete sure, above 0", less_stable, _GRAPHS),
    Claim("CDSGD works with diminishing steps as with fixed ones (Table 1)",
          f"diminishing - fixed late: not below -{POINTS} points", not_below_late,
          (("steps", "CDSGD, 1/(k+1)^0.6"), ("steps", "CDSGD, 0.1")),
          "1/(k+1)^0.6 and 0.1"),
    Claim("i-CDSGD's agents are closer together than CDSGD's (not in the paper)",
          "consensus distance, mean of the run: CDSGD - i-CDSGD sure, above 0", farther_apart,
          (_own("i-CDSGD, ring"), _own("CDSGD, ring")), RATES),
)  # fmt: skip

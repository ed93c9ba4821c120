"""What bench/against.py makes of two checkouts' figures."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))
import against

QUIET = [1.0, 1.01, 0.99, 1.0]
TIME, SHARE = "step: cnn: ours, direct, median_s", "kernel: fused, degree 2, of_triad"


def test_figures_are_times_and_shares_of_the_triad() -> None:
    row = {"median_s": 2.0, "min_s": 1.0, "max_s": 3.0, "gb_per_s": 9.0, "of_triad": 0.5}
    rows = {"fused, degree 2": row, "cnn: local": {"median_s": 1.0, "cpu_s": 0.0}}
    assert against.figures_of("b", {"results": rows}) == {
        "b: fused, degree 2, median_s": 2.0,
        "b: fused, degree 2, of_triad": 0.5,
        "b: cnn: local, median_s": 1.0,
    }


@pytest.mark.parametrize(
    ("figure", "ours"),
    [
        (TIME, True),
        (SHARE, True),
        ("exchange: ring, 4 ranks: ours, neighbor, median_s", True),
        ("start: imports, cpu_s", True),
        ("exchange: ring, 4 ranks: gloo all_reduce + torch SGD, median_s", False),
        ("step: cnn, 2 ranks: local, fused=True, cpu_s", False),
        ("kernel: numpy, degree 2, median_s", False),
    ],
)
def test_what_is_ours(figure: str, ours: bool) -> None:
    assert against.is_ours(figure) is ours


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=7))
def test_no_two_halves_are_farther_apart(values: list[float]) -> None:
    half = len(values) // 2
    pairs = [
        median(a) / median(b)
        for a in combinations(values, half)
        for b in combinations(values, half)
        if half
    ]
    assert against.of_halves(values) == (pytest.approx(max(pairs)) if pairs else None)


def test_worse_is_slower_by_more_than_the_goal_and_the_noise() -> None:
    def worse(factor: float, old: list[float], more_is_better: bool = False) -> bool:
        return against.compare(old, [factor * v for v in old], more_is_better).worse

    noisy = [1.0, 1.2, 1.0, 1.2]
    assert [worse(f, QUIET) for f in (0.5, 1.0, 1.025, 1.04)] == [False, False, False, True]
    assert [worse(f, noisy) for f in (1.04, 1.19, 1.21)] == [False, False, True]
    assert [worse(f, QUIET, True) for f in (2.0, 0.98, 0.96)] == [False, False, True]
    assert not worse(2.0, [1.0])  # of one round nobody knows what noise is


def test_ratios_are_within_rounds() -> None:
    found = against.compare([1.0, 2.0, 4.0], [1.1, 1.8, 4.0], False)  # the machine slows both
    assert (found.ratio, found.low, found.high) == (1.0, 0.9, 1.1)
    assert found.noise == 4.0


def test_only_what_all_runs_have_is_compared() -> None:
    old = [{TIME: 1.0, SHARE: 0.5}] * 4
    new = [{TIME: 1.1, SHARE: 0.5, "start: imports, cpu_s": 1.0}] * 3 + [{SHARE: 0.4}]
    found = against.compare_all(old, new)
    assert found.keys() == {SHARE}
    assert not found[SHARE].worse
    found = against.compare_all(old, [{TIME: 1.1, SHARE: 0.45}] * 4)
    assert all(c.worse for c in found.values())

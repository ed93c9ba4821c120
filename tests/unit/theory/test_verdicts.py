"""What is said of a measured run beside a bound."""

from __future__ import annotations

import numpy as np
import pytest

from mpicdsgd.graphs.mixing_matrix import powered
from mpicdsgd.graphs.mixing_rules import metropolis
from mpicdsgd.graphs.topologies import ring, star
from mpicdsgd.theory import verdicts
from mpicdsgd.theory.verdicts import HOLDS, NOT_APPLICABLE, VIOLATED, compare, not_applicable


def test_holds() -> None:
    one = compare("B", "corrected", [10, 20, 30], [1.0, 3.0, 2.0], [4.0, 6.0, 8.0], detail="d")
    assert (one.verdict, one.text, one.since, one.violations, one.compared) == (
        HOLDS, "holds", None, 0, 3,
    )  # fmt: skip
    assert (one.step, one.measured, one.limit, one.factor) == (20, 3.0, 6.0, 2.0)
    assert one.detail == "d"


def test_violated() -> None:
    one = compare("B", "as printed", [10, 20, 30, 40], [1.0, 7.0, 9.0, 1.0], [4.0, 6.0, 8.0, 9.0])
    assert one.verdict == VIOLATED
    assert one.text == "violated from step 20 on (at 2 of 4)"
    assert (one.step, one.measured, one.limit) == (20, 7.0, 6.0)
    assert one.factor == pytest.approx(6 / 7)


def test_not_applicable() -> None:
    one = not_applicable("B", "", "the steps are of different sizes")
    assert one.verdict == NOT_APPLICABLE
    assert one.text == "not applicable: the steps are of different sizes"
    assert (one.factor, one.measured) == (None, None)


def test_a_resolution_is_granted_and_no_more() -> None:
    assert compare("B", "", [0], [1.0], [0.9], resolution=0.2).verdict == HOLDS
    assert compare("B", "", [0], [1.0], [0.9], resolution=0.05).verdict == VIOLATED
    each = compare("B", "", [0, 1], [1.0, 1.0], [0.9, 0.9], resolution=[0.2, 0.0])
    assert each.since == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_does_not_hold(bad: float) -> None:
    assert compare("B", "", [0, 1], [1.0, bad], [2.0, 2.0]).since == 1
    assert compare("B", "", [0, 1], [1.0, 1.0], [2.0, np.nan]).since == 1


def test_nothing_beside_nothing() -> None:
    one = compare("B", "", [3], [0.0], [0.0])
    assert (one.verdict, one.factor) == (HOLDS, None)


def test_window_means() -> None:
    steps = np.arange(2, 11)
    last, (mean,) = verdicts.window_means(steps, 3, steps.astype(float))
    assert (last.tolist(), mean.tolist()) == ([5, 8], [4.0, 7.0])
    last, (mean,) = verdicts.window_means(steps[:1], 3, np.array([5.0]))
    assert (last.tolist(), mean.tolist()) == ([2], [5.0])


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("graph", [ring(5), star(6), ring(2), ring(1)])
def test_the_spectrum_of_a_power(graph: object, rounds: int) -> None:
    matrix = metropolis(graph)  # type: ignore[arg-type]
    values = np.linalg.eigvalsh(np.linalg.matrix_power(matrix.Pi, rounds))[::-1]
    found = powered(matrix.spectrum, rounds)
    assert np.array(found.eigenvalues) == pytest.approx(values, abs=1e-12)
    if len(values) > 1:
        assert (found.lambda_2, found.lambda_n) == pytest.approx((values[1], values[-1]), abs=1e-12)
        assert found.gap == pytest.approx(1 - np.abs(values[1:]).max(), abs=1e-12)

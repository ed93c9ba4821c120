"""The noise of minibatches drawn without replacement, against all minibatches that there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpicdsgd.theory import estimates
from mpicdsgd.theory.estimates import Estimate, Kind, Noise


def all_squares(g_nD: np.ndarray, b: int) -> np.ndarray:
    """|mean of a minibatch - mean|^2 of every minibatch of b samples."""
    rows = [
        g_nD[list(c)].mean(0) - g_nD.mean(0) for c in itertools.combinations(range(len(g_nD)), b)
    ]
    return np.array([float(r @ r) for r in rows])


@pytest.mark.parametrize("b", [1, 2, 5, 6])
def test_a_batch_tells_of_other_sizes(b: int) -> None:
    """The factor for a finite population is what makes sizes comparable, and it is exact."""
    g = np.random.default_rng(3).standard_normal((7, 4))
    unit = float(((g - g.mean(0)) ** 2).sum() / 6)
    found = estimates.noise(all_squares(g, b), b, 7)
    assert found.unit == pytest.approx(unit, rel=1e-12)
    for other in (1, 3, 7):
        expected = all_squares(g, other).mean()
        assert found.unit * found.factor(other) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_whole_share_has_none() -> None:
    assert estimates.noise([0.0, 0.0], 7, 7) == Noise(0.0, 0.0, 7)
    assert Noise(4.0, 1.0, 7).factor(7) == 0
    assert Noise(4.0, 1.0, 7).factor(9) == 0
    assert Noise(4.0, 1.0, np.inf).factor(8) == 1 / 8


def test_the_error_is_that_of_a_mean() -> None:
    found = estimates.noise([1.0, 2.0, 6.0], 1, 2)
    assert found.unit == pytest.approx(6)
    assert found.error == pytest.approx(2 * np.std([1, 2, 6], ddof=1) / np.sqrt(3))


def test_agents_add_up() -> None:
    value, error = estimates.variance([Noise(4.0, 3.0, 4), Noise(8.0, 4.0, np.inf)], 2)
    assert value == pytest.approx(4 / 4 + 8 / 2)
    assert error == pytest.approx(np.hypot(3 / 4, 4 / 2))


def test_the_rule_for_a_bound() -> None:
    one = estimates.largest([1.0, 3.0, 2.0], [0.1, 0.5, 4.0], "at 3 points")
    assert one == Estimate(3.5, 0.5, Kind.ESTIMATED, "at 3 points")
    assert one.how == "estimated at 3 points"
    assert not one.certain
    assert Estimate(1.0).certain
    assert Estimate(1.0, None, Kind.BOUND, "of the data").certain
    assert Estimate(1.0, None, Kind.BOUND, "of the data").how == "bound: of the data"
    assert Estimate(1.0).as_json() == {"value": 1.0, "uncertainty": None, "how": "exact"}
    assert (estimates.points(1), estimates.points(2)) == ("at 1 point", "at 2 points")

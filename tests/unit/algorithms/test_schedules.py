"""Schedules against their formulas; the specs that name them."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicdsgd.algorithms import schedules
from mpicdsgd.common.errors import UserError
from mpicdsgd.runs.epochs import Course


@pytest.mark.parametrize("k", [0, 1, 7, 1000])
def test_factors(k: int) -> None:
    assert schedules.parse("fixed", 10)(k) == 1
    assert schedules.parse("diminishing:0.6", 10)(k) == pytest.approx(1 / (k + 1) ** 0.6)
    assert schedules.parse("inverse-sqrt:1e-4", 10)(k) == pytest.approx(1 / math.sqrt(1 + 1e-4 * k))


def test_cosine_falls_from_one_to_zero_and_stays() -> None:
    factor = schedules.parse("cosine", 8)
    assert [factor(k) for k in (0, 4, 8, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert all(factor(k + 1) < factor(k) for k in range(8))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9), st.integers(0, 8))
def test_cosine_goes_on_where_the_epochs_are(then: int, now: int, epochs: int, done: int) -> None:
    """Another number of agents makes other steps of an epoch, and no jump of the step size."""
    step = min(done, epochs) * then
    before = Course(epochs, then)
    after = Course(epochs, now).going_on(before, step)
    old = schedules.parse("cosine", before.total_steps)
    new = schedules.parse("cosine", after.total_steps, after.shift)
    assert new(step) == pytest.approx(old(step), abs=1e-12)
    assert new(after.total_steps) == pytest.approx(0, abs=1e-12)


@given(st.floats(0.5, 1, exclude_min=True), st.integers(0, 10**6))
def test_factors_never_grow(exponent: float, k: int) -> None:
    for spec in ("fixed", f"diminishing:{exponent!r}", "inverse-sqrt:0.01", "cosine"):
        factor = schedules.parse(spec, 10**6)
        assert 0 <= factor(k + 1) <= factor(k) <= factor(0) == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "allowed are fixed, diminishing:E"),
        ("fixed:1", "allowed are fixed"),
        ("cosine:3", "allowed are fixed"),
        ("diminishing", "allowed are fixed"),
        ("diminishing:", "needs a number"),
        ("diminishing:fast", "needs a number after the colon, got 'fast'"),
        ("diminishing:0.5", "in (0.5, 1], got 0.5"),
        ("diminishing:1.01", "in (0.5, 1], got 1.01"),
        ("diminishing:nan", "in (0.5, 1], got nan"),
        ("inverse-sqrt:-1", "finite decay >= 0, got -1"),
        ("inverse-sqrt:inf", "finite decay >= 0, got inf"),
        ("exponential:0.9", "unknown schedule 'exponential:0.9'"),
        ("a\nb", "unknown schedule"),
    ],
)
def test_mistakes(spec: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        schedules.parse(spec, 10)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cosine_needs_steps() -> None:
    with pytest.raises(UserError, match="at least one step"):
        schedules.parse("cosine", 0)


@given(st.text(max_size=20))
def test_any_text_is_a_schedule_or_a_user_error(spec: str) -> None:
    with contextlib.suppress(UserError):
        assert schedules.parse(spec, 5)(0) == 1

"""Where in its epochs a run is, also after the number of agents has changed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mpicdsgd.runs.epochs import Course

sizes = st.integers(1, 500)


def test_a_plain_run() -> None:
    course = Course(3, 5)
    assert course.total_steps == 15
    assert [course.place(k) for k in (0, 4, 5, 14, 15)] == [(0, 0), (0, 4), (1, 0), (2, 4), (3, 0)]
    assert course.epoch(7) == 1.4
    assert [k for k in range(16) if course.is_due(k, 4)] == [0, 4, 8, 12]
    assert not any(course.is_due(k, 0) for k in range(16))


def test_half_the_agents() -> None:
    """After 7 of 5 a epoch, 10 a epoch: the epoch's second fifth is done, 26 steps are left."""
    course = Course(4, 10).going_on(Course(3, 5), 7)
    assert course == Course(4, 10, 7)
    assert course.place(7) == (1, 4)
    assert course.epoch(7) == 1.4
    assert course.total_steps == 33


@given(sizes, sizes, sizes, st.integers(-500, 500), st.integers(0, 10_000))
def test_going_on(epochs: int, then: int, now: int, shift: int, step: int) -> None:
    before = Course(epochs, then, max(shift, -step))
    course = Course(epochs, now).going_on(before, step)
    assert course.place(step)[0] == before.place(step)[0], "no epoch is skipped or begun again"
    assert abs(course.epoch(step) - before.epoch(step)) <= 1 / now, "but for a step's rounding"
    left = course.total_steps - step
    assert course.place(step + left) == (epochs, 0), "all epochs are done then"
    assert course.going_on(course, step) == course, "nothing changes where nothing has"


@given(sizes, sizes, st.integers(0, 100))
def test_whole_epochs_stay_whole(then: int, now: int, epoch: int) -> None:
    course = Course(101, now).going_on(Course(101, then), epoch * then)
    assert course.place(epoch * then) == (epoch, 0)
    assert course.is_due(epoch * then, now)


@given(sizes, st.integers(0, 60), st.integers(-40, 500), st.integers(0, 300), st.integers(0, 60))
def test_what_was_due_since(per_epoch: int, every: int, shift: int, since: int, steps: int) -> None:
    course = Course(9, per_epoch, max(shift, -since))
    due = any(course.is_due(k, every) for k in range(since + 1, since + steps + 1))
    assert course.was_due(since + steps, every, course.epoch(since)) == due

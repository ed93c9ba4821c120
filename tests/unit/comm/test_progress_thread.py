"""The thread that moves messages: it works alone, leaves off when told, hands over what it met."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mpicdsgd.comm.exchange.progress_thread import Helper

Make = Callable[[Callable[[], bool]], Helper]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Helper] = []

    def new(advance: Callable[[], bool]) -> Helper:
        made.append(Helper(advance))
        return made[-1]

    yield new
    for helper in made:
        helper.stop()
    assert not any(t.name == "mpicdsgd exchange" for t in threading.enumerate())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the thread does nothing"
        time.sleep(1e-3)


def test_it_looks_until_all_has_come(make: Make) -> None:
    looks: list[int] = []

    def advance() -> bool:
        looks.append(threading.get_ident())
        return len(looks) % 5 == 0

    helper = make(advance)
    time.sleep(0.01)
    assert not looks, "nobody began"
    for rounds in (1, 2):
        helper.begin()
        until(lambda: len(looks) >= 5 * rounds)  # noqa: B023
        time.sleep(0.01)
        assert len(looks) == 5 * rounds, "it looks although all has come"
        helper.end()
    assert threading.get_ident() not in looks


def test_it_leaves_off_at_once(make: Make) -> None:
    """After `end` the carrier is the caller's alone."""
    busy = threading.Event()
    looks: list[bool] = []

    def advance() -> bool:
        busy.set()
        time.sleep(2e-3)
        busy.clear()
        looks.append(True)
        return False

    helper = make(advance)
    for _ in range(20):
        helper.begin()
        until(lambda: len(looks) > 0)
        helper.end()
        assert not busy.is_set()
        looks.clear()
        time.sleep(3e-3)
        assert not looks


def test_what_it_meets_is_raised_at_the_end(make: Make) -> None:
    def advance() -> bool:
        raise OSError("the network is down")

    helper = make(advance)
    for over in (helper.end, helper.stop):
        helper.begin()
        until(lambda: helper._error is not None)
        with pytest.raises(OSError, match="the network is down"):
            over()
        over()


def test_stopping_in_the_middle(make: Make) -> None:
    helper = make(lambda: False)
    helper.begin()
    helper.stop()
    helper.stop()


def test_stopping_as_the_last_look_succeeds(make: Make) -> None:
    """The thread must not take `stop` for something that it has done."""
    ended = []

    def stop(helper: Helper) -> None:
        helper.stop()
        ended.append(helper)

    for turn in range(300):
        looking = threading.Event()

        def advance(looking: threading.Event = looking, turn: int = turn) -> bool:
            looking.set()
            time.sleep(1e-5 * (turn % 30))
            return True

        helper = make(advance)
        helper.begin()
        looking.wait()
        stopping = threading.Thread(target=stop, args=(helper,), daemon=True)
        stopping.start()
        stopping.join(60)
        assert len(ended) == turn + 1, "it does not end"


class _LateLock:
    """A lock that the thread gets only after somebody else had it."""

    def __init__(self) -> None:
        self._lock, self._used = threading.Lock(), threading.Event()
        self._main = threading.get_ident()

    def __enter__(self) -> None:
        assert threading.get_ident() == self._main or self._used.wait(60)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._used.set()


def test_stopping_before_the_last_look(make: Make) -> None:
    """The thread was about to look when `stop` came, and finds that all has come."""
    helper = make(lambda: True)
    helper._lock = _LateLock()  # type: ignore[assignment]
    helper.begin()
    time.sleep(0.01)
    with helper._lock:
        helper._over.set()
        helper._wanted.set()
    helper._thread.join(30)
    assert not helper._thread.is_alive(), "it does not end"

"""When a run asks to be stopped before a limit, and what children hear of a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpicdsgd.common import signals
from mpicdsgd.runs import stop
from mpicdsgd.runs.config import RunConfig
from mpicdsgd.runs.requeue_marker import MARKER, Marker
from mpicdsgd.runs.stop import Stop


@pytest.fixture
def caught() -> Iterator[None]:
    """USR1 and TERM remembered, as in a run."""
    before = [signal.getsignal(number) for number in signals.STOP]
    signals.catch()
    signals.forget()
    yield
    signals.forget()
    for number, handler in zip(signals.STOP, before, strict=True):
        signal.signal(number, handler)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Optimizer:
    """What `Stop` needs of one: 10 steps until all stop, 2 vectors of 10,000 elements."""

    def __init__(self) -> None:
        self.exchange = SimpleNamespace(stops_within=10)
        self.arena = SimpleNamespace(size=10_000)
        self.context = SimpleNamespace(flats={"x": None, "v": None})
        self.asked = 0

    def request_stop(self) -> None:
        self.asked += 1


class Course:
    """A run of steps that take ``step_s`` each, under a limit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_seconds: float) -> None:
        self.clock, self.optimizer = Clock(), Optimizer()
        monkeypatch.setattr(stop, "time", self.clock)
        monkeypatch.setattr(signals, "STARTED", self.clock.now)
        agents: Any = SimpleNamespace(rank=0, size=5)
        marker: Any = None
        self.stop = Stop(agents, RunConfig(max_seconds=max_seconds), None, None, marker)
        self.write_s = 0.0

    def margin_s(self) -> float:
        optimizer: Any = self.optimizer
        return self.stop.margin_s(optimizer, self.write_s)

    def steps(self, count: int, step_s: float) -> None:
        optimizer: Any = self.optimizer
        for _ in range(count):
            self.stop.look(optimizer, self.write_s)
            self.clock.now += step_s

    def beside(self, seconds: float) -> None:
        with self.stop.beside():
            self.clock.now += seconds


def test_the_margin_is_twice_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch, 10_000)
    course.steps(4, 0.5)
    # 10 steps, and 5 agents' 2 vectors of 40,000 bytes at 100 MB/s: yet not less than a minute.
    assert course.margin_s() == 60
    course.steps(20, 5.0)
    assert course.margin_s() == pytest.approx(2 * (10 * 5.0 + 5 * 2 * 40_000 / 1e8))
    course.beside(7.0)
    course.beside(2.0)
    course.write_s = 30.0
    assert course.margin_s() == pytest.approx(2 * (10 * 5.0 + 30 + 7))
    course.steps(17, 0.5)  # the slow steps are long ago
    assert course.margin_s() == pytest.approx(2 * (10 * 0.5 + 30 + 7))


def test_what_is_no_step_is_not_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch, 10_000)
    course.steps(3, 4.0)
    course.beside(500.0)
    course.steps(3, 4.0)
    assert course.margin_s() == pytest.approx(2 * (10 * 4.0 + 5 * 2 * 40_000 / 1e8 + 500))


def test_a_short_limit_has_a_short_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Course(monkeypatch, 20).margin_s() == 1.0


def test_a_run_asks_once_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch, 1000)
    course.steps(93, 10.0)  # 5 % of 1000 s are less than twice 10 steps of 10 s
    assert course.optimizer.asked == 1
    course = Course(monkeypatch, 1000)
    course.steps(79, 10.0)
    assert course.optimizer.asked == 0
    course.steps(3, 10.0)
    assert course.optimizer.asked == 1


def test_a_limit_shorter_than_the_start_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each start would make a few steps, and nobody would see why."""
    course = Course(monkeypatch, 100)
    course.clock.now += 96
    course.steps(3, 0.1)
    assert course.optimizer.asked == 1
    assert (
        caplog.text.count("run.max_seconds = 100 leaves no time to train: this start took 96 s")
        == 1
    )
    course = Course(monkeypatch, 100)
    course.clock.now += 94
    course.steps(1, 10.0)
    course.steps(1, 10.0)
    assert course.optimizer.asked == 1
    assert caplog.text.count("leaves no time") == 1


def test_without_a_limit_it_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch, 0)
    course.steps(5, 1e9)
    assert course.optimizer.asked == 0


def test_a_folder_that_is_anothers_is_not_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even under the same generation, where somebody removed the folder in between."""
    agents: Any = SimpleNamespace(rank=0, size=1)
    owner: Any = SimpleNamespace(is_taken_over=True)
    marker = Marker(tmp_path, 1, owner, None, resumes=True)
    one = stop.Stop(agents, RunConfig(dir=str(tmp_path)), None, owner, marker)
    assert one._mark(7, 7, 1, "USR1 on rank 0") == 1
    assert "a newer run has taken over" in caplog.text
    owner.is_taken_over = False
    assert one._mark(7, 7, 1, "USR1 on rank 0") == 80
    assert (tmp_path / MARKER).exists()


def test_what_is_told_of_the_ranks() -> None:
    assert stop._told(["", "USR1", "", ""]) == "USR1 on rank 1"
    assert stop._told(["TERM", "USR1", "TERM", ""]) == "TERM on ranks 0, 2; USR1 on rank 1"
    many = "USR1 on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 more"
    assert stop._told(["USR1"] * 1000) == many


def test_the_first_signal_is_remembered(caught: None) -> None:
    assert signals.received() is None
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGUSR1)
    assert signals.received() == signal.SIGTERM
    signals.ignore()
    signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_children_hear_nothing(caught: None) -> None:
    """Batch systems signal all processes of a job; the reader of a file must not die of it."""
    code = "import os, signal, time; os.kill(os.getpid(), signal.SIGUSR1); print('lives')"
    command = [sys.executable, "-c", code]
    with signals.not_for_children():
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert (child.returncode, child.stdout) == (0, "lives\n")
    assert signals.received() == signal.SIGUSR1, "the run itself hears of it at the end"
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGUSR1, "outside the block they are as ever"


def forked(do: str) -> int:
    """The exit code of a forked child, which then sleeps; what it does is its own matter."""
    code = f"""
import os, signal, time
from mpicdsgd.common import signals
signals.catch()
child = os.fork()
if child == 0:
    {do}
    time.sleep(0.2)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


def test_a_data_loaders_process_bears_the_signals() -> None:
    both = "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM)"
    assert forked(f"signals.in_worker(); {both}") == 7
    later = f"signals._WORKER_S = 1; signals.in_worker(); {both}; time.sleep(30)"
    assert forked(later) == -signal.SIGALRM, "a TERM of its parent's must end it some day"


def test_any_other_forked_child_dies_of_them() -> None:
    """It would otherwise outlive its parent's TERM for ever."""
    for name in ("SIGUSR1", "SIGTERM"):
        assert forked(f"os.kill(os.getpid(), signal.{name})") == -getattr(signal, name)

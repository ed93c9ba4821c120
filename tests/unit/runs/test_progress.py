"""The display: sparse plain lines in a batch log, a live bar that log lines do not tear."""

import io
import logging
import sys

import pytest

from mpicdsgd.runs import progress
from mpicdsgd.runs.progress import Progress


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_are_sparse(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    said: list[int] = []
    with Progress(1000, terminal=False) as display:
        for step in range(1, 601):
            clock.now = step * 0.1
            display.update(step, lambda step=step: said.append(step) or f"loss {step}")
        display.line("epoch 1: accuracy 0.9")
    assert said == [300, 600], "a text is made only to be shown: it may have to wait for a GPU"
    assert capsys.readouterr().err.splitlines() == [
        "step 300/1000  loss 300  0:01:10 left",
        "step 600/1000  loss 600  0:00:40 left",
        "epoch 1: accuracy 0.9",
    ]


def test_time_left_counts_this_jobs_steps_only(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress(1000, terminal=False, done=900) as display:
        clock.now = 30.0
        display.update(930, str)
    assert "0:01:10 left" in capsys.readouterr().err


def test_disabled_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, enabled=False, terminal=True) as display:
        display.update(10, pytest.fail)
        display.line("y")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_bar_and_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    handler = logging.StreamHandler(screen)
    logger = logging.getLogger("mpicdsgd")
    logger.addHandler(handler)
    try:
        with Progress(10, terminal=True) as display:
            display.update(10, lambda: "loss [0.5]")
            assert handler.stream is not screen, "goes through the bar"
            logger.warning("a warning")
            display.line("epoch [1]")
        assert handler.stream is screen, "and back"
        assert sys.stderr is screen
    finally:
        logger.removeHandler(handler)
    text = screen.getvalue()
    assert "loss [0.5]" in text
    assert "epoch [1]" in text
    assert "10/10" in text
    # The bar is wiped before the line is written and drawn again after it.
    before, after = text.split("a warning")
    assert before.endswith("\x1b[2K")
    assert "10/10" in after


def test_bar_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(RuntimeError), Progress(10, terminal=True):
        raise RuntimeError
    assert sys.stderr is screen
    assert screen.getvalue().rstrip("\n").endswith("\x1b[?25h"), "the cursor is back"


def test_the_bar_asks_for_its_text_only_now_and_then(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    said: list[int] = []
    with Progress(100, terminal=True) as display:
        for step in range(1, 101):
            clock.now = step * 0.051
            display.update(step, lambda step=step: said.append(step) or f"loss {step}")
    assert said == [*range(4, 101, 4)]
    assert "100/100" in screen.getvalue()
    assert "loss 100" in screen.getvalue()

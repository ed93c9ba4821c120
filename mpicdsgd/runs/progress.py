"""What the user sees while a run goes on: a live bar in a terminal, plain lines in a batch log.

Under mpirun a rank's stderr is a pipe to the launcher, never a terminal, so the launcher's own is
looked at: whoever types ``mpirun`` into a terminal gets the bar.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

_LAUNCHERS = ("mpiexec", "mpirun", "hydra", "prterun", "orterun", "srun")
_BAR_S = 0.2  # between two redraws
_LINE_S = 30.0  # between two plain lines


class Progress:
    """One rank's display on stderr, a context manager. Local.

    Args:
        total_steps: steps of the whole run.
        enabled: False makes every method do nothing (all ranks but one).
        terminal: whether stderr ends in a terminal; None: find out.
        done: steps that a checkpoint has brought already.
    """

    def __init__(
        self, total_steps: int, enabled: bool = True, terminal: bool | None = None, *, done: int = 0
    ) -> None:
        self._total, self._done = total_steps, done
        self._enabled = enabled
        self._began = self._shown = time.monotonic()
        self._step = done
        self._bar: Bar | None = None
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []
        device = _terminal(2) if enabled and terminal is None else None
        if enabled and (terminal or device):
            width = _width(device) if device and not sys.stderr.isatty() else None
            console = Console(stderr=True, force_terminal=True, width=width, highlight=False)
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=console,
                auto_refresh=False,  # no thread: it would take turns with the training loop
                redirect_stderr=True,
                redirect_stdout=_terminal(1) is not None,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done, text="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            stderr = sys.stderr
            self._bar.start()
            # Handlers that hold the stderr of before would write across the bar.
            for name in ("mpicdsgd", None):
                for handler in logging.getLogger(name).handlers:
                    if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                        self._moved.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.refresh()
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._moved.clear()
            self._bar.stop()

    def update(self, step: int, text: Callable[[], str]) -> None:
        """Show that ``step`` steps are done; ``text`` gives loss and the like, in a few words.

        It is called only when it will be seen: for a loss, a GPU must be waited for.
        """
        self._step = step
        if not self._enabled:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if now - self._shown >= _BAR_S or step >= self._total:
                self._shown = now
                self._bar.update(self._task, text=text())
                self._bar.refresh()
        elif now - self._shown >= _LINE_S:
            self.line(f"step {step}/{self._total}  {text()}  {self._remaining(now)}")

    def line(self, text: str) -> None:
        """Show a line that stays: an evaluation's result."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(Text(text))
        else:
            self._shown = time.monotonic()
            with contextlib.suppress(OSError):  # a reader that has gone away ends no run
                print(text, file=sys.stderr, flush=True)

    def _remaining(self, now: float) -> str:
        steps = self._step - self._done
        if steps <= 0:
            return ""
        left_s = round((now - self._began) / steps * (self._total - self._step))
        return f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d} left"


def _terminal(descriptor: int) -> str | None:
    """The terminal in which stdout (1) or stderr (2) ends, directly or through the launcher."""
    with contextlib.suppress(OSError):
        return os.ttyname(descriptor)
    launcher = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        process = os.getppid()
        for _ in range(8):
            status = Path(f"/proc/{process}/stat").read_text()
            name, rest = status.split("(", 1)[1].rsplit(")", 1)
            if name.startswith(_LAUNCHERS):
                launcher = process
            process = int(rest.split()[1])
    if launcher is not None:
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{launcher}/fd/{descriptor}")
            if target.startswith(("/dev/pts/", "/dev/tty")):
                return target
    return None


def _width(device: str) -> int | None:
    """Columns of the terminal ``device``."""
    with contextlib.suppress(OSError):
        handle = os.open(device, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            return os.get_terminal_size(handle).columns or None
        finally:
            os.close(handle)
    return None

"""USR1 and TERM, which ask a run to stop with a checkpoint: they are remembered, nothing else.

A handler that did more would do it in the middle of a step, a checkpoint or an MPI call. Batch
systems signal every process of a job, so the ones that a rank starts must bear them too: a reader
of a file or a data loader that dies of a signal would end the run that is about to stop in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator

STOP = (signal.SIGUSR1, signal.SIGTERM)
STARTED = time.monotonic()  # of the program, as near as can be
_WORKER_S = 60  # that a data loader's process goes on after a TERM that may be its parent's

_first: signal.Signals | None = None
_pid = os.getpid()


def catch() -> None:
    """Remember USR1 and TERM from now on, instead of dying of them. Local, in the main thread."""
    global _pid
    if threading.current_thread() is not threading.main_thread():
        return
    _pid = os.getpid()
    for number in STOP:
        signal.signal(number, _remember)
        # Else a signal ends system calls of MPI and HDF5 that are not begun anew by themselves.
        signal.siginterrupt(number, False)


def ignore() -> None:
    """From now on they say nothing new: the program is at its end. Local, in the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP:
            if signal.getsignal(number) is _remember:
                signal.signal(number, signal.SIG_IGN)  # the interpreter's end would undo a handler


def received() -> signal.Signals | None:
    """The first of them that came, if any has. Local."""
    return _first


def forget() -> None:
    """As if none had come yet. Local; for another run in the same process."""
    global _first
    _first = None


@contextlib.contextmanager
def not_for_children(signals: Iterable[signal.Signals] = STOP) -> Iterator[None]:
    """A block whose child processes never see them; here they are heard of at its end. Local."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_worker(_: int = 0) -> None:
    """What a data loader's process does first: USR1 is not for it, TERM has time. Local.

    A TERM may be the batch system's, who means the run, or the parent's, who means it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _remember(number: int, _: object) -> None:
    global _first
    if os.getpid() != _pid:  # a forked child that nobody told otherwise
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif _first is None:
        _first = signal.Signals(number)


def _end_later(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(_WORKER_S)

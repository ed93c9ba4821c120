"""Who moves messages while the user computes the gradient: MPI libraries do not, by themselves.

Neither MPICH nor Open MPI moves a large message unless somebody calls into MPI. Gradient hooks do
so only during the backward pass, and only as often as there are parameters; a thread does from the
moment of the post. It looks, sleeps, and looks again: a blocking wait would take a core.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_PERIOD_S = 5e-4  # between two looks: 6 MB at 100 Gbit/s, within what sockets and cards buffer


class Helper:
    """A thread that calls ``advance`` from `begin` until it is True or `end` comes. Local.

    MPI must have been started for several threads.
    """

    def __init__(self, advance: Callable[[], bool]) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mpicdsgd exchange", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Have the thread begin to look; it must not be looking."""
        self._wanted.set()

    @property
    def is_done(self) -> bool:
        """Whether it has nothing to look for, or no more."""
        return not self._wanted.is_set()

    def end(self) -> None:
        """Have the thread leave ``advance`` alone from now on; raise what it met there."""
        with self._lock:
            self._wanted.clear()
        self._raise()

    def stop(self) -> None:
        """End the thread for good, and raise what it met; a second call does nothing."""
        with self._lock:  # else the thread could take this for what it has done, and clear it
            self._over.set()
            self._wanted.set()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while not self._over.is_set():
            self._wanted.wait()
            with self._lock:
                if self._wanted.is_set() and not self._over.is_set():
                    try:
                        done = self._advance()
                    except BaseException as error:  # whatever it is, `end` or `stop` raises it
                        self._error, done = error, True
                    if done:
                        self._wanted.clear()
            self._over.wait(_PERIOD_S)

"""How a job ends: open exchanges are drained at exit, and an uncaught exception ends all ranks.

A rank that raises while others wait for its message would leave them waiting for ever. Two hooks,
installed when `comm.agents` is imported, prevent it: `sys.excepthook` prints the traceback with the
rank and aborts the whole job with exit code 1; `atexit` (which runs before mpi4py's finalize)
closes what is still open. This is about the job and not about one communicator, so it is the one
place below the entry points that speaks of COMM_WORLD. Forked children (data loaders) inherit the
hooks, and must not act on them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from mpi4py import MPI

# How long a rank that only suffers from another's error waits before it aborts the job, so that
# the other's message comes out first: the first abort ends all ranks within milliseconds.
AFTER_YOU_S = 3.0
_FORWARDING_S = 0.5  # for the launcher to pass on what was printed: what it has not, an abort loses


class Drainable(Protocol):
    def drain(self) -> Iterator[None]:
        """Close, yielding whenever there is something to wait for."""

    def abandon(self) -> None:
        """End this rank's part where others are dead. Local."""


_open: list[Drainable] = []
_is_first: bool | None = None
_leaves_by: MPI.Intracomm | None = None
_pid = os.getpid()
_installed = False


def install() -> None:
    """Install both hooks, once. Local."""
    global _installed, _pid
    if _installed:
        return
    _installed, _pid = True, os.getpid()
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not in_job():
            previous(kind, error, trace)
            return
        rank = MPI.COMM_WORLD.rank
        if is_first() or not getattr(error, "raised_on_all_ranks", False):
            print(f"[rank {rank}] uncaught exception, ending the job:", file=sys.stderr)
            previous(kind, error, trace)
        if getattr(error, "raised_on_all_ranks", False) or getattr(error, "of_another", False):
            time.sleep(AFTER_YOU_S)
        abort(1)

    sys.excepthook = hook
    atexit.register(_at_exit)


def watch(resource: Drainable) -> None:
    """Drain ``resource`` at exit unless `forget` comes first."""
    _open.append(resource)


def forget(resource: Drainable) -> None:
    """Take back a `watch`."""
    with contextlib.suppress(ValueError):
        _open.remove(resource)


def watched() -> list[Drainable]:
    """What would be drained at exit now."""
    return list(_open)


def is_first() -> bool:
    """Whether this rank speaks for all: rank 0, or its heir."""
    return MPI.COMM_WORLD.rank == 0 if _is_first is None else _is_first


def set_first(is_first: bool) -> None:
    """Rank 0 may be dead: say whether this rank speaks for all now."""
    global _is_first
    _is_first = is_first


def leave_by(comm: MPI.Intracomm) -> None:
    """Have `leave` end this process: once a rank is dead, MPI's own end may wait for ever. Local.

    Args:
        comm: of all who live.
    """
    global _leaves_by
    _leaves_by = comm


def leave(code: int) -> None:
    """End this process with ``code`` where `leave_by` was called. Not collective.

    The others are given some time to come here, too, so that nobody meets a rank that has left.
    """
    if _leaves_by is None or not is_rank():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    everybody = False
    with contextlib.suppress(MPI.Exception):
        request = _leaves_by.Ibarrier()
        end = time.monotonic() + AFTER_YOU_S
        while not everybody and time.monotonic() < end:
            everybody = bool(request.Test())
            time.sleep(0.001)
    if code not in (0, 80) and not everybody:
        abort(code)  # who leaves so is not taken for dead, and others would wait for it
    os._exit(code)


def in_job() -> bool:
    """Whether this process is a rank among several, and not a child of one."""
    if os.getpid() != _pid or not MPI.Is_initialized() or MPI.Is_finalized():
        return False
    return MPI.COMM_WORLD.size > 1


def is_rank() -> bool:
    """Whether this process is a rank itself, not a forked child of one."""
    return os.getpid() == _pid


def abort(code: int) -> None:
    """End all ranks of the job with exit code ``code``; nothing in a forked child."""
    if not in_job():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_FORWARDING_S)
    MPI.COMM_WORLD.Abort(code)


def _at_exit() -> None:
    if not is_rank() or MPI.Is_finalized() or not _open:
        return
    # An uncaught exception whose hook somebody replaced: the others must not wait for a drain.
    if in_job() and getattr(sys, "last_value", None) is not None:
        abort(1)
    try:
        # All at once: two ranks may close the same exchanges in different order.
        draining = [resource.drain() for resource in list(_open)]
        while draining:
            draining = [d for d in draining if next(d, _END) is not _END]
    except BaseException as error:
        # What an atexit handler raises is printed and then forgotten, with exit code 0.
        print(f"[rank {MPI.COMM_WORLD.rank}] at exit: {error}", file=sys.stderr)
        if in_job():
            time.sleep(AFTER_YOU_S)
            abort(1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


_END = object()

"""Agree, then raise: one rank's mistake becomes an error on every rank.

Each agreement is one small nonblocking allgather with a timeout and a name, so that ranks which
came to different places in a program are told so instead of waiting for each other for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from mpi4py import MPI

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.patience import TIMEOUT_S, Patience

_NAME_BYTES = 64
_RECORD_BYTES = 1024


class Testable(Protocol):
    """An MPI request, or several as one."""

    def Test(self) -> bool: ...  # noqa: N802, MPI's own name


_abandoned: list[Testable] = []  # kept, with their buffers: MPI may yet write into them


class Disagreement(RuntimeError):
    """Ranks came to different collective calls, or some came to none."""


class Silence(Disagreement):
    """Some came to none within the timeout."""

    of_another = True


def collect(comm: MPI.Intracomm, name: str, text: str, timeout_s: float = TIMEOUT_S) -> list[str]:
    """Every rank's ``text``, cut at 900 bytes, by rank. Collective; ``name`` must be the same.

    Raises:
        Disagreement: if a rank is at another agreement, or comes to none within ``timeout_s``.
    """
    record = np.zeros(_RECORD_BYTES, np.uint8)
    _put(record[:_NAME_BYTES], name)
    _put(record[_NAME_BYTES:], text)
    records = np.zeros((comm.size, _RECORD_BYTES), np.uint8)
    wait_for(comm.Iallgather(record, records), timeout_s, f"rank {comm.rank} at {name}")
    for rank, row in enumerate(records):
        other = _get(row[:_NAME_BYTES])
        if other != name[:_NAME_BYTES]:
            raise Disagreement(
                f"rank {comm.rank} is at {name}, rank {rank} at {other}: all ranks must call the "
                "same collective functions in the same order"
            )
    return [_get(row[_NAME_BYTES:]) for row in records]


def agree(
    comm: MPI.Intracomm, name: str, error: UserError | None, timeout_s: float = TIMEOUT_S
) -> None:
    """Raise the lowest failing rank's ``error`` on every rank, if any has one. Collective."""
    texts = collect(comm, name, "" if error is None else f"!{error}", timeout_s)
    for rank, text in enumerate(texts):
        if text:
            raised = error if error is not None and rank == comm.rank else UserError(text[1:])
            raise raised.everywhere()


@contextlib.contextmanager
def agreement(comm: MPI.Intracomm, name: str, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """A block whose `UserError` on any rank is raised on every rank. Collective at its end."""
    error: UserError | None = None
    try:
        yield
    except UserError as mistake:
        error = mistake
    agree(comm, name, error, timeout_s)


def require_same(comm: MPI.Intracomm, what: str, value: str, timeout_s: float = TIMEOUT_S) -> None:
    """Raise a UserError on every rank unless ``value`` is the same on all. Collective.

    The message names the ranks that differ from the most common value.
    """
    digests = collect(comm, what, hashlib.sha256(value.encode()).hexdigest(), timeout_s)
    common = max(digests, key=digests.count)
    odd = [rank for rank, digest in enumerate(digests) if digest != common]
    if not odd:
        return
    raise UserError(
        f"{what} must be the same on all ranks, but differs on "
        f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}: "
        "give every rank the same files and arguments"
    ).everywhere()


def wait_for(request: Testable, timeout_s: float, who: str) -> None:
    """Complete ``request``, or raise `Silence` after ``timeout_s``."""
    patience = Patience(timeout_s)
    try:
        while not request.Test():
            if not patience.pause():
                raise Silence(
                    f"{who}: waited {timeout_s:g} s for the other ranks; did one leave, or not "
                    "come to this call?"
                )
    except BaseException:
        _abandoned.append(request)
        raise


def _put(field: np.ndarray[tuple[int], np.dtype[np.uint8]], text: str) -> None:
    data = text.encode()[: field.size]
    field[: len(data)] = np.frombuffer(data, np.uint8)


def _get(field: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> str:
    return field.tobytes().rstrip(b"\0").decode(errors="ignore")

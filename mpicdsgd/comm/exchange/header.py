"""The 64 bytes before every published buffer, and how a stop or a fault spreads through them.

A stop needs no Allreduce. Whoever wants one writes "after s + diameter steps" into the next header
that it builds, s being the steps that this header announces, and into all later ones; a receiver
keeps the least that it has seen. The header that announces step s is read one hop away in step s,
at distance d in step s + d - 1, hence everywhere before s + diameter steps are completed; and a
later originator's stop is later. A fault travels beside the stop, not in its place: a signal must
not hide a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 64
NUMBERS = 2  # that may travel beside a published buffer
NEVER = 2**62
_MAGIC = 0x6364_7367  # "cdsg"
_LAYOUT = np.dtype(
    [
        ("magic", "<u4"),
        ("generation", "<i4"),
        ("step", "<u4"),
        ("leaver_step", "<u4"),
        ("round", "<u2"),
        ("fault_reason", "<u2"),
        ("leaver", "<i4"),
        ("stop_step", "<i8"),
        ("fault_step", "<i8"),
        ("fault_at", "<u4"),
        ("fault_agent", "<i4"),
        ("numbers", "<f8", (2,)),
    ]
)
assert _LAYOUT.itemsize == HEADER_BYTES
_WORDS = tuple(name for name in _LAYOUT.names or () if name != "numbers")
_ZEROS = (0.0,) * NUMBERS


class Reason(IntEnum):
    """What an agent found wrong."""

    NONE = 0
    CHANGED_BY_HAND = 1
    NON_FINITE = 2
    NON_FINITE_LOSS = 3


@dataclass(frozen=True, order=True)
class Fault:
    """After ``step`` completed steps all agents raise; of two faults the lesser one holds.

    Of two that are raised at the same step, that is the one which happened first: a neighbour whom
    it infected is not to blame.
    """

    step: int = NEVER
    at: int = 0  # completed steps of ``agent`` when it happened
    reason: Reason = Reason.NONE
    agent: int = 0


@dataclass(frozen=True)
class Header:
    """What an agent says of the buffer it publishes."""

    step: int  # completed steps that the buffer holds; below 2^32
    round: int = 0  # mixing round within the step (tau > 1)
    generation: int = 0  # of the run: each restart is a new one
    stop_step: int = NEVER
    fault: Fault = Fault()
    leaver: int = -1  # the agent that left first, if any has ...
    leaver_step: int = 0  # ... and its completed steps
    numbers: tuple[float, ...] = (
        0.0,
        0.0,
    )  # of the algorithm, beside the buffer; at most `NUMBERS`

    @property
    def leaving(self) -> bool:
        return self.leaver >= 0


def write(header: Header, slot: NDArray[np.uint8]) -> None:
    """Write ``header`` into ``slot``, uint8, shape (64,)."""
    fault = header.fault
    slot.view(_LAYOUT)[0] = (
        _MAGIC,
        header.generation,
        header.step,
        header.leaver_step,
        header.round,
        int(fault.reason),
        header.leaver,
        header.stop_step,
        fault.step,
        fault.at,
        fault.agent,
        header.numbers + _ZEROS[len(header.numbers) :],
    )


def read(slot: NDArray[np.uint8]) -> Header | None:
    """The header in ``slot``, or None where none has arrived since `clear`."""
    row: Any = slot.view(_LAYOUT)[0]
    if row["magic"] != _MAGIC:
        return None
    word = {name: int(row[name]) for name in _WORDS}
    fault = Fault(
        word["fault_step"], word["fault_at"], Reason(word["fault_reason"]), word["fault_agent"]
    )
    return Header(
        word["step"],
        word["round"],
        word["generation"],
        word["stop_step"],
        fault,
        word["leaver"],
        word["leaver_step"],
        tuple(row["numbers"].tolist()),
    )


def together(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether the agents that wrote two slots are at the same mixing, and both go on.

    An agent that leaves says round 0, whatever its turn is: two of them need not be together.
    """
    a, b = read(one), read(other)
    return (
        a is not None
        and b is not None
        and (a.generation, a.step, a.round) == (b.generation, b.step, b.round)
        and not (a.leaving or b.leaving)
    )


def clear(slot: NDArray[np.uint8]) -> None:
    """Make ``slot`` read as empty."""
    slot[:] = 0

"""Exchange: what this agent shows its neighbours, and what it sees of them.

A transport has the methods and attributes of `Exchange`, explained at `neighbor.NeighborExchange`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.agents import Agents
from mpicdsgd.errors import UserError
from mpicdsgd.exchange.errors import (
    AgentFault,
    AgentLeft,
    AgentMissing,
    ExchangeError,
    OutOfStep,
)
from mpicdsgd.exchange.header import Fault, Reason
from mpicdsgd.exchange.neighbor import WIRE_DTYPE, NeighborExchange

__all__ = [
    "AgentFault",
    "AgentLeft",
    "AgentMissing",
    "Exchange",
    "ExchangeConfig",
    "ExchangeError",
    "Fault",
    "OutOfStep",
    "Reason",
    "open_exchange",
]


@dataclass(frozen=True)
class ExchangeConfig:
    """Section ``[exchange]`` of a run's config."""

    transport: str = "auto"
    wire: str = "float32"
    timeout_s: float = 300.0


class Exchange(Protocol):
    """The face that every transport has."""

    published: NDArray[np.generic]
    previous: NDArray[np.generic]
    stop_step: int
    fault: Fault
    fault_raised: bool
    wait_s: float
    bytes_sent: int

    @property
    def stop_wanted(self) -> bool: ...

    def post(self, step: int, mixing_round: int = 0) -> None: ...
    def wait(self, step: int, mixing_round: int = 0) -> list[NDArray[np.generic]]: ...
    def progress(self) -> None: ...
    def request_stop(self) -> None: ...
    def report(self, reason: Reason) -> None: ...
    def close(self) -> None: ...


def open_exchange(agents: Agents, size: int, config: ExchangeConfig) -> Exchange:
    """Open an exchange of buffers of ``size`` elements. Collective over ``agents``.

    Raises:
        UserError: on every rank, for a transport, wire type or timeout that is not offered, or a
            size or wire type that is not the same on all.
    """
    with agents.agreement("the exchange's settings"):
        if config.transport not in ("auto", "neighbor"):
            raise UserError(
                f'exchange.transport must be "auto" or "neighbor", got "{config.transport}"'
            )
        if config.wire not in WIRE_DTYPE:
            raise UserError(
                f'exchange.wire must be one of {", ".join(WIRE_DTYPE)}, got "{config.wire}"'
            )
        if not config.timeout_s > 0:
            raise UserError(f"exchange.timeout_s must be positive, got {config.timeout_s}")
    agents.require_same("the exchange's buffers", f"{size} elements of {config.wire}")
    return NeighborExchange(agents, size, config.wire, config.timeout_s)

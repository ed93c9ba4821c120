"""Exchange: what this agent shows its neighbours, and what it sees of them.

`engine.Exchange` is the one face; beneath it a `carrier.Carrier` moves the values: `neighbor` on
the host, `device` on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpi4py import MPI

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.errors import (
    AgentFault,
    AgentLeft,
    AgentMissing,
    ExchangeError,
    OutOfStep,
)
from mpicdsgd.comm.exchange.exchange import Exchange
from mpicdsgd.comm.exchange.gpu_routing import PREFETCH, TRANSPORTS, open_device_carrier
from mpicdsgd.comm.exchange.header import Fault, Reason
from mpicdsgd.comm.exchange.host_routing import open_host_carrier
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE, Carrier, Edge
from mpicdsgd.common.errors import UserError

__all__ = [
    "AgentFault",
    "AgentLeft",
    "AgentMissing",
    "Edge",
    "Exchange",
    "ExchangeConfig",
    "ExchangeError",
    "Fault",
    "OutOfStep",
    "Reason",
    "open_exchange",
]


PROGRESS = ("auto", "thread", "hooks")


@dataclass(frozen=True)
class ExchangeConfig:
    """Section ``[exchange]`` of a run's config."""

    transport: str = "auto"  # "direct", "neighbor", on GPUs "staged": see `hosting`, `routing`
    wire: str = "float32"
    timeout_s: float = 300.0
    prefetch: str = "auto"  # "always", "never": fetch direct neighbours' values from other GPUs
    # "thread", "hooks": who moves messages during the gradient, see `progress_thread`
    progress: str = "auto"
    sums: str = "mpi"  # "ordered": sums over all agents in agent order, as simulated; see `Sum`


def open_exchange(agents: Agents, size: int, config: ExchangeConfig) -> Exchange:
    """Open an exchange of buffers of ``size`` elements. Collective over ``agents``.

    Raises:
        UserError: on every rank, for a transport, wire type or timeout that is not offered, or a
            size or wire type that is not the same on all.
    """
    with agents.agreement("the exchange's settings"):
        if config.transport not in TRANSPORTS:
            raise UserError(
                f"exchange.transport must be one of {', '.join(TRANSPORTS)}, "
                f'got "{config.transport}"'
            )
        if agents.gpu is None and config.transport == "staged":
            raise UserError(
                f'exchange.transport = "{config.transport}" is for GPUs, and these agents are on '
                'the CPU: use "auto", "direct" or "neighbor"'
            )
        if config.prefetch not in PREFETCH:
            raise UserError(
                f'exchange.prefetch must be one of {", ".join(PREFETCH)}, got "{config.prefetch}"'
            )
        if config.progress not in PROGRESS:
            raise UserError(
                f'exchange.progress must be one of {", ".join(PROGRESS)}, got "{config.progress}"'
            )
        if config.progress == "thread" and (why := _why_no_thread(agents)):
            raise UserError(f'exchange.progress = "thread": {why}; use "auto" or "hooks"')
        if config.wire not in WIRE_DTYPE:
            raise UserError(
                f'exchange.wire must be one of {", ".join(WIRE_DTYPE)}, got "{config.wire}"'
            )
        if not config.timeout_s > 0:
            raise UserError(f"exchange.timeout_s must be positive, got {config.timeout_s}")
    agents.require_same("the exchange's buffers", f"{size} elements of {config.wire}")
    agents.require_same(
        "exchange.transport", f"{config.transport} {config.prefetch} {config.progress}"
    )
    carrier: Carrier = (
        open_host_carrier(agents, size, config.wire, config.transport)
        if agents.gpu is None
        else open_device_carrier(
            agents, agents.gpu, size, config.wire, config.transport, config.prefetch
        )
    )
    by_message = any(edge.transport != "direct" for edge in carrier.edges)
    by_thread = config.progress == "thread" or (
        config.progress == "auto"
        and not _why_no_thread(agents)
        and agents.comm.allreduce(by_message, MPI.LOR)
    )
    return Exchange(agents, carrier, config.timeout_s, by_thread)


def _why_no_thread(agents: Agents) -> str:
    if agents.gpu is not None:
        return "on GPUs the hooks do it: the host runs ahead of the GPU and waits there"
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return "MPI was started without support for several threads at once"
    return ""

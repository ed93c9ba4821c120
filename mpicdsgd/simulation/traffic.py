"""The bytes that a job would count, of all agents together."""

from __future__ import annotations

from mpicdsgd.comm.exchange.buffer_layout import bytes_of
from mpicdsgd.comm.exchange.header import HEADER_BYTES
from mpicdsgd.comm.links.mean_gradients import buckets
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.kernels.arena import Arena


def of_post(mixing: Mixing, turn: int, size: int, wire: str, messages: bool) -> int:
    """What all agents' posts of this turn count, as the transports of `comm.exchange` do."""
    values = bytes_of(size, wire) * sum(map(len, mixing.turns[turn].graph.sources))
    graph = mixing.graph
    if messages and len(mixing.turns) == 1:
        return values + HEADER_BYTES * sum(map(len, graph.sources))
    peers = (
        len({*sources, *readers})
        for sources, readers in zip(graph.sources, graph.destinations, strict=True)
    )
    return values + HEADER_BYTES * sum(peers)


def of_sum(size_bytes: int, agents: int, is_ordered: bool) -> int:
    """What a sum over all agents counts: see `comm.links.allreduce.Sum`."""
    if is_ordered:
        return agents * size_bytes * (agents - 1)
    return agents * (2 * size_bytes * (agents - 1) // agents)


def of_gradients(layout: Arena, agents: int, is_ordered: bool) -> int:
    """What the gradients' sums of one backward count."""
    trained = [i for i, p in enumerate(layout.parameters) if p.requires_grad and p.numel()]
    _, ranges = buckets(layout.segments, trained)
    return sum(of_sum(4 * (end - begin), agents, is_ordered) for begin, end in ranges)

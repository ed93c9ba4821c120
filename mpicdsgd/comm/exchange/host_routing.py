"""Which way each edge's values go between agents on the host: in place on a node, else by messages.

Where no two neighbours share a node, or their memory has no room, everything goes by messages, on a
graph that does not change header and values in one.
"""

from __future__ import annotations

import logging

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.agreement import collect
from mpicdsgd.comm.exchange import shared_memory
from mpicdsgd.comm.exchange.message_transport import HostCarrier, MessageRoute, OwnPublished
from mpicdsgd.comm.exchange.messages import along
from mpicdsgd.comm.exchange.shared_memory import SharedPublished, SharedRoute
from mpicdsgd.comm.exchange.token_transport import Published, Route, TokenCarrier
from mpicdsgd.comm.exchange.transport import Carrier, Edge
from mpicdsgd.common.errors import UserError

log = logging.getLogger("mpicdsgd")


def open_host_carrier(agents: Agents, size: int, wire: str, transport: str) -> Carrier:
    """The carrier with a way for every edge. Collective over the agents.

    Args:
        transport: "auto", "direct" or "neighbor".

    Raises:
        UserError: on every rank, where "direct" cannot serve an edge.
    """
    nodes: list[int] = agents.comm.allgather(agents.node)
    edges = [(s, r) for r in range(agents.size) for s in agents.graph.sources[r]]
    apart = [(s, r) for s, r in edges if nodes[s] != nodes[r]]
    error = ""
    if transport == "direct" and apart:
        error = "agents {} and {} are on different nodes".format(*apart[0])
    refused = ""
    if transport != "neighbor" and len(apart) < len(edges) and not error:
        why = shared_memory.why_not(nodes.count(agents.node), size, wire)
        refused = next((w for w in collect(agents.comm, "shared memory", why) if w), "")
        error = refused if transport == "direct" else ""
    with agents.agreement("exchange.transport"):
        if error:
            raise UserError(f'exchange.transport = "direct": {error}; use "auto" or "neighbor"')
    if refused and agents.rank == 0:
        log.warning("neighbours on a node exchange messages: %s", refused)
    if transport == "neighbor" or refused:
        apart = edges
    if len(apart) == len(edges) and len(agents.turns) == 1:
        return HostCarrier(agents, size, wire)
    me = agents.rank
    here = [s for s in agents.sources if (s, me) not in apart]
    published: Published
    routes: list[Route] = []
    if len(apart) < len(edges):
        published = in_place = SharedPublished(agents, size, wire)
        routes.append(SharedRoute(in_place, here))
    else:
        published = OwnPublished(size, wire)
    if apart:
        sources = [s for s, r in apart if r == me]
        readers = [r for s, r in apart if s == me]
        routes.append(MessageRoute(agents.comm, published, along(agents, sources, readers)))
    ways = [
        Edge(s, "direct", "in place, in shared memory")
        if s in here
        else Edge(s, "neighbor", "by messages" if nodes[s] == agents.node else "on another node")
        for s in agents.sources
    ]
    return TokenCarrier(agents, published, routes, ways)

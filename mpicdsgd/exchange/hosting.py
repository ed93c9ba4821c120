"""Which way each edge's values go between agents on the host: in place on a node, else by messages.

Where no two neighbours share a node, or their memory has no room, everything goes by messages, and
header and values in one.
"""

from __future__ import annotations

import logging

from mpicdsgd.agents import Agents
from mpicdsgd.agreement import collect
from mpicdsgd.errors import UserError
from mpicdsgd.exchange import shared
from mpicdsgd.exchange.carrier import Carrier, Edge
from mpicdsgd.exchange.neighbor import HostCarrier
from mpicdsgd.exchange.shared import MessageRoute, SharedPublished, SharedRoute
from mpicdsgd.exchange.tokens import Route, TokenCarrier

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
        why = shared.why_not(nodes.count(agents.node), size, wire)
        refused = next((w for w in collect(agents.comm, "shared memory", why) if w), "")
        error = refused if transport == "direct" else ""
    with agents.agreement("exchange.transport"):
        if error:
            raise UserError(f'exchange.transport = "direct": {error}; use "auto" or "neighbor"')
    if transport == "neighbor" or refused or len(apart) == len(edges):
        if refused and agents.rank == 0:
            log.warning("neighbours on a node exchange messages: %s", refused)
        return HostCarrier(agents, size, wire)
    published = SharedPublished(agents, size, wire)
    here = [s for s in agents.sources if nodes[s] == agents.node]
    routes: list[Route] = [SharedRoute(published, here)]
    if apart:
        sources = [s for s, r in apart if r == agents.rank]
        readers = [r for s, r in apart if s == agents.rank]
        routes.append(MessageRoute(agents, published, sources, readers))
    ways = [
        Edge(s, "direct", "in place, in shared memory")
        if s in here
        else Edge(s, "neighbor", "on another node")
        for s in agents.sources
    ]
    return TokenCarrier(agents, published, routes, ways)

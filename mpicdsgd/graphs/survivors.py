"""The graph and the mixing matrix of the agents that remain when others have died.

The graph is what is left of the old one. Where it fell apart, the dead agents' neighbours are
joined: agents that died and were neighbours make one gap, and the parts on its border are joined in
a chain, each time by the agents on it that have the fewest neighbours. The old graph was connected,
and every path between two parts led through gaps, so what comes is connected. No MPI here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import networkx as nx

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.graph import Graph, connected_parts
from mpicdsgd.graphs.mixing_matrix import MixingMatrix
from mpicdsgd.graphs.mixing_rules import metropolis
from mpicdsgd.graphs.specs import mixing_from_spec

Edges = tuple[tuple[int, int], ...]

_LEFT = "what is left of "


def remaining_graph(graph: Graph, alive: Sequence[int]) -> tuple[Graph, Edges]:
    """The connected graph of the agents ``alive``, numbered anew in their order. Local.

    A directed graph stays directed if what is left is strongly connected as it is; else its edges
    run both ways from now on.

    Args:
        alive: agents of ``graph``, ascending, at least one.

    Returns:
        The graph, and those of its edges that were added, as pairs (a, b) with a < b.
    """
    number = {agent: k for k, agent in enumerate(alive)}
    n = len(alive)
    kept = [(number[a], number[b]) for a, b in graph.edges if a in number and b in number]
    name = f"{_LEFT}{graph.name.removeprefix(_LEFT) or 'the graph'}"
    if graph.directed:
        sources: list[set[int]] = [set() for _ in range(n)]
        for a, b in kept:
            sources[b].add(a)
        directed = Graph(n, tuple(tuple(sorted(s)) for s in sources), True, name)
        if len(connected_parts(directed)) == 1:
            return directed, ()
    G = nx.Graph()
    G.add_nodes_from(range(n))
    G.add_edges_from(kept)
    added = _join(G, _borders(graph, number))
    return Graph.from_edges(n, sorted(G.edges()), name=name), added


def remaining_mixing(spec: str, graph: Graph) -> tuple[MixingMatrix, str]:
    """The matrix on ``graph`` by ``spec``'s rule, or by Metropolis' where that does not fit.

    Local, and without reading a file: one that was given for all agents has no weights for fewer.

    Args:
        graph: from `remaining_graph`.
        spec: see `graphs.specs.mixing_from_spec`; not of a cycle.

    Returns:
        The matrix, and why it is not made by the rule of ``spec``; "" where it is.
    """
    rule = spec.strip()
    lazies = ""
    while rule.startswith("lazy:"):
        lazies, rule = f"lazy:{lazies}", rule.removeprefix("lazy:").lstrip()
    why = "a file's weights are for all agents"
    if not rule.startswith("file:"):
        try:
            made = mixing_from_spec(spec, graph)
            assert isinstance(made, MixingMatrix), "cycles are refused at the start"
            return made, ""
        except UserError as error:
            why = str(error).partition(": ")[0]
    if graph.directed:
        graph = Graph.from_edges(graph.n, [*graph.edges, *((b, a) for a, b in graph.edges)],
                                 name=graph.name)  # fmt: skip
        why += "; its edges run both ways from now on"
    made = mixing_from_spec(f"{lazies}metropolis", graph) if lazies else metropolis(graph)
    assert isinstance(made, MixingMatrix)
    return made, why


def _borders(graph: Graph, number: dict[int, int]) -> list[list[int]]:
    """Of each gap, the new numbers of the agents alive that were neighbours of one in it."""
    G = nx.Graph()
    G.add_nodes_from(range(graph.n))
    G.add_edges_from(graph.edges)
    gaps = nx.connected_components(G.subgraph([a for a in range(graph.n) if a not in number]))
    return [
        sorted({number[b] for a in gap for b in G[a] if b in number})
        for gap in sorted(gaps, key=min)
    ]


def _join(G: nx.Graph, borders: list[list[int]]) -> Edges:
    """Add to ``G``, in place, what joins its parts over their ``borders``."""
    added = []
    for border in borders:
        parts: list[list[int]] = []
        for part in sorted(nx.connected_components(G), key=min):
            if here := [agent for agent in border if agent in part]:
                parts.append(here)
        for one, other in pairwise(parts):
            a, b = (min(p, key=lambda agent: (G.degree(agent), agent)) for p in (one, other))
            G.add_edge(a, b)
            added.append((min(a, b), max(a, b)))
    return tuple(added)

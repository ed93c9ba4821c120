"""Agents and who reads whom: ``Graph``. The families (ring, torus, ...) stand in ``topologies.py``.

A graph is simple (no multi-edges, no self loops); ``mixing_rules.py`` has the weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import networkx as nx
import numpy as np
import numpy.typing as npt

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import shorten


class NotConnected(UserError):
    """A graph fell into parts.

    Attributes:
        what: the graph and its parts, in words; the message also says what helps.
    """

    def __init__(self, what: str, instead: str) -> None:
        super().__init__(f"{what}: {instead}")
        self.what = what


@dataclass(frozen=True)
class Graph:
    """Agents 0 to n - 1 and whose parameters each of them reads.

    Made by ``Graph.from_edges`` or by a family (``ring``, ...), which check connectivity.

    Attributes:
        n: number of agents, at least 1.
        sources: ``sources[j]``: the agents that agent j reads, ascending, without j.
        directed: False: every edge runs both ways.
        name: how messages and records call it.
        remarks: what was merged or renumbered on the way in, a line each, for the caller to log.
    """

    n: int
    sources: tuple[tuple[int, ...], ...]
    directed: bool = False
    name: str = ""
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        assert self.n == len(self.sources) >= 1, "one tuple of sources per agent"
        for j, agents in enumerate(self.sources):
            assert all(a < b for a, b in pairwise(agents)), "ascending"
            assert all(0 <= a < self.n and a != j for a in agents), "in range, without j"
        assert self.directed or self.destinations == self.sources, "undirected: symmetric"

    @classmethod
    def from_edges(
        cls, n: int, edges: Iterable[Sequence[int]], *, directed: bool = False, name: str = ""
    ) -> Graph:
        """Build a connected graph from pairs (a, b): information flows from a to b.

        Undirected: the order in a pair is of no account. Duplicates and self loops are merged;
        ``remarks`` says so.

        Args:
            n: number of agents.
            edges: pairs of agents, each in 0 to n - 1.
            directed: whether (a, b) leaves out (b, a).
            name: how messages call the graph.

        Raises:
            UserError: n < 1, an agent out of range, not connected (directed: not strongly).
        """
        title = f"graph {name}" if name else "graph"
        if n < 1:
            raise UserError(f"{title} needs at least one agent, got {n}")
        sources: list[set[int]] = [set() for _ in range(n)]
        duplicates: list[tuple[int, int]] = []
        loops: list[tuple[int, int]] = []
        for edge in edges:
            a, b = _pair(edge, n, title)
            if a == b:
                loops.append((a, b))
            elif a in sources[b]:
                duplicates.append((a, b))
            else:
                sources[b].add(a)
                if not directed:
                    sources[a].add(b)
        remarks = tuple(
            f"{title}: {len(merged)} {what}: {shorten(merged)}"
            for merged, what in (
                (duplicates, "duplicate edge(s) merged"),
                (loops, "self loop(s) dropped (an agent's own weight is Pi[j, j])"),
            )
            if merged
        )
        frozen = tuple(tuple(sorted(s)) for s in sources)
        graph = cls(n, frozen, directed, name, remarks)
        parts = connected_parts(graph)
        if len(parts) > 1:
            word = "strongly connected" if directed else "connected"
            listed = shorten([f"{{{shorten(part)}}}" for part in parts])
            raise NotConnected(
                f"{title} is not {word}: its {len(parts)} parts are {listed}",
                "add edges so that information can flow from every agent to every other",
            )
        return graph

    @cached_property
    def destinations(self) -> tuple[tuple[int, ...], ...]:
        """``destinations[l]``: the agents that read agent l, ascending."""
        readers: list[list[int]] = [[] for _ in range(self.n)]
        for j, agents in enumerate(self.sources):
            for source in agents:
                readers[source].append(j)
        return tuple(tuple(r) for r in readers)

    @property
    def title(self) -> str:
        """The graph's name in a sentence."""
        return f"graph {self.name}" if self.name else "the graph"

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Ordered pairs (a, b): b reads a. An undirected edge is there in both orders."""
        return tuple((a, b) for a, readers in enumerate(self.destinations) for b in readers)

    @property
    def degrees(self) -> tuple[int, ...]:
        """In-degrees: how many agents each agent reads."""
        return tuple(len(agents) for agents in self.sources)

    @property
    def is_regular(self) -> bool:
        """Whether all agents read equally many, and are read by as many."""
        degree = len(self.sources[0])
        return all(len(s) == degree for s in (*self.sources, *self.destinations))

    @cached_property
    def diameter(self) -> int:
        """The longest shortest path along the flow of information; 0 for one agent."""
        # Bit a of known[j]: agent j has heard of agent a. One round of hearsay over all edges
        # lengthens every path by one, in n/64 words an edge.
        everyone = (1 << self.n) - 1
        known = [1 << j for j in range(self.n)]
        rounds = 0
        while any(k != everyone for k in known):
            heard = list(known)
            for j, agents in enumerate(self.sources):
                for source in agents:
                    heard[j] |= known[source]
            assert heard != known, "a graph that is not connected has no diameter"
            known = heard
            rounds += 1
        return rounds

    def adjacency(self) -> npt.NDArray[np.bool_]:
        """The adjacency matrix A, bool, shape (n, n): A[j, l] means that agent j reads agent l."""
        A = np.zeros((self.n, self.n), dtype=np.bool_)
        for j, agents in enumerate(self.sources):
            A[j, list(agents)] = True
        return A


def connected_parts(graph: Graph) -> list[list[int]]:
    """The connected (directed: strongly connected) parts, each ascending, by their first agent."""
    G = nx.DiGraph() if graph.directed else nx.Graph()
    G.add_nodes_from(range(graph.n))
    G.add_edges_from(graph.edges)
    find = nx.strongly_connected_components if graph.directed else nx.connected_components
    return sorted(sorted(part) for part in find(G))


def _pair(edge: Sequence[int], n: int, title: str) -> tuple[int, int]:
    try:
        a, b = (operator.index(agent) for agent in edge)
    except (TypeError, ValueError):
        text = repr(edge)[:60]
        raise UserError(f"{title}: an edge is a pair of agents (a, b), got {text}") from None
    for agent in (a, b):
        if not 0 <= agent < n:
            raise UserError(
                f"{title}: edge ({a}, {b}) names agent {agent}, but there are {n} agents: "
                f"number them from 0 to {n - 1}"
            )
    return a, b

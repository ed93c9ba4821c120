"""The families of graphs: ring, torus, hypercube, random ones. ``Graph`` itself is in ``graph.py``.

networkx generates where it has a generator. A random graph is a function of its seed (and of the
networkx version: the ranks compare ``MixingMatrix.digest``, so two versions cannot pass unseen).
"""

from __future__ import annotations

import math

import networkx as nx

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.graph import Graph, NotConnected, connected_parts

__all__ = [
    "Graph",
    "chain",
    "complete",
    "connected_parts",
    "erdos_renyi",
    "exponential",
    "grid",
    "hypercube",
    "random_regular",
    "ring",
    "star",
    "torus",
    "watts_strogatz",
]


def complete(n: int) -> Graph:
    """Everybody reads everybody. Raises UserError for n < 1."""
    return _build(n, nx.complete_graph(_at_least_one("complete", n)), "complete")


def ring(n: int) -> Graph:
    """A cycle; two agents make one edge. Raises UserError for n < 1."""
    return _build(n, nx.cycle_graph(_at_least_one("ring", n)), "ring")


def chain(n: int) -> Graph:
    """A path, agent 0 at one end. Raises UserError for n < 1."""
    return _build(n, nx.path_graph(_at_least_one("chain", n)), "chain")


def star(n: int) -> Graph:
    """Agent 0 in the middle, all others joined to it alone. Raises UserError for n < 1."""
    return _build(n, nx.star_graph(_at_least_one("star", n) - 1), "star")


def torus(n: int, rows: int | None = None, cols: int | None = None) -> Graph:
    """A 2-D grid that wraps around both ways; agent r * cols + c stands in row r, column c.

    Without sizes the most square factorisation. Rows or columns of two wrap onto the same edge.

    Raises:
        UserError: rows * cols != n; without sizes: n is prime.
    """
    return _lattice("torus", n, rows, cols, periodic=True, instead="ring")


def grid(n: int, rows: int | None = None, cols: int | None = None) -> Graph:
    """A 2-D grid with borders; agent r * cols + c stands in row r, column c.

    Without sizes the most square factorisation.

    Raises:
        UserError: rows * cols != n; without sizes: n is prime.
    """
    return _lattice("grid", n, rows, cols, periodic=False, instead="chain")


def hypercube(n: int) -> Graph:
    """Agents whose numbers differ in one bit are joined. Raises UserError unless n is 2**d."""
    _at_least_one("hypercube", n)
    dimension = n.bit_length() - 1
    if n != 1 << dimension:
        raise UserError(
            f"hypercube needs a power of two agents, got {n}: use {1 << dimension} or "
            f'{2 << dimension} agents, or topology = "ring"'
        )
    edges = [(j, j ^ (1 << bit)) for j in range(n) for bit in range(dimension) if not j >> bit & 1]
    return Graph.from_edges(n, edges, name="hypercube")


def exponential(n: int) -> Graph:
    """Agent j reads j - 1, j - 2, j - 4, ... mod n, as far as 2**i < n: directed, static.

    Raises UserError for n < 1. Source: Assran et al. 2019, arXiv 1811.10792 (there in turns).
    """
    _at_least_one("exponential", n)
    hops = [1 << i for i in range((n - 1).bit_length())]
    edges = [((j - hop) % n, j) for j in range(n) for hop in hops]
    return Graph.from_edges(n, edges, directed=True, name="exponential")


def random_regular(n: int, degree: int, seed: int = 0) -> Graph:
    """A random graph in which every agent has ``degree`` neighbours.

    Raises:
        UserError: no such graph exists (degree >= n, or n * degree odd), or this one came out in
            parts.
    """
    _at_least_one("regular", n)
    _seeded("regular", seed)
    if not 0 <= degree < n:
        raise UserError(
            f"regular needs a degree in 0 to {n - 1} with {n} agents, got {degree}: "
            f"use a smaller degree or more agents"
        )
    if n * degree % 2:
        raise UserError(
            f"regular:{degree} needs an even number of agents (n * degree counts every edge "
            f"twice), got {n}: use an even degree or one agent more"
        )
    G = nx.random_regular_graph(degree, n, seed=seed)
    return _random(n, G, f"regular:{degree},seed={seed}", "a larger degree")


def erdos_renyi(n: int, p: float, seed: int = 0) -> Graph:
    """Every pair is joined with probability p. Raises UserError for p outside [0, 1], or parts."""
    _at_least_one("erdos-renyi", n)
    _seeded("erdos-renyi", seed)
    _probability("erdos-renyi", p)
    G = nx.gnp_random_graph(n, p, seed=seed)
    return _random(n, G, f"erdos-renyi:{p:g},seed={seed}", "a larger p")


def watts_strogatz(n: int, k: int, p: float, seed: int = 0) -> Graph:
    """A small world: a ring with the k nearest neighbours, each edge rewired with probability p.

    Raises:
        UserError: k odd or outside 2 to n - 1, p outside [0, 1], or the graph came out in parts.
    """
    _at_least_one("watts-strogatz", n)
    _seeded("watts-strogatz", seed)
    _probability("watts-strogatz", p)
    if k % 2 or not 2 <= k < n:
        raise UserError(
            f"watts-strogatz needs an even number k of neighbours, 2 <= k < {n} with {n} agents, "
            f'got {k}: use another k, or topology = "complete"'
        )
    G = nx.watts_strogatz_graph(n, k, p, seed=seed)
    return _random(n, G, f"watts-strogatz:{k},{p:g},seed={seed}", "a larger k or a smaller p")


def _build(n: int, G: nx.Graph, name: str) -> Graph:
    # Sorted, since networkx gives a random graph's edges in the order of its own sets. networkx's
    # cycle of one agent is a self loop.
    return Graph.from_edges(n, sorted((a, b) for a, b in G.edges() if a != b), name=name)


def _random(n: int, G: nx.Graph, name: str, instead: str) -> Graph:
    try:
        return _build(n, G, name)
    except NotConnected as error:
        # Drawing again in silence would make another graph than the one the seed names.
        raise NotConnected(error.what, f"try another seed or {instead}") from None


def _lattice(
    name: str, n: int, rows: int | None, cols: int | None, *, periodic: bool, instead: str
) -> Graph:
    _at_least_one(name, n)
    root = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    if rows is None and cols is None:
        if root == 1 and n > 1:
            raise UserError(
                f'{name} needs a composite number of agents, got {n}: use topology = "{instead}"'
            )
        rows, cols = root, n // root
    else:
        rows = n // cols if rows is None and cols else rows
        cols = n // rows if cols is None and rows else cols
    if not rows or not cols or rows < 1 or cols < 1 or rows * cols != n:
        raise UserError(
            f"{name}:{rows}x{cols} does not have {n} agents: use {name}:{root}x{n // root}, or "
            f"rows x columns that multiply to the number of agents"
        )
    sites = nx.grid_2d_graph(rows, cols, periodic=periodic)
    edges = sorted((a * cols + b, c * cols + d) for (a, b), (c, d) in sites.edges())
    edges = [(a, b) for a, b in edges if a != b]
    return Graph.from_edges(n, edges, name=f"{name}:{rows}x{cols}")


def _at_least_one(name: str, n: int) -> int:
    if n < 1:
        raise UserError(f"{name} needs at least one agent, got {n}")
    return n


def _probability(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise UserError(f"{name} needs a probability in 0 to 1, got {p:g}")


def _seeded(name: str, seed: int) -> None:
    if seed < 0:
        raise UserError(f"{name} needs a seed of 0 or more, got {seed}")

"""Graphs: every family against its definition, edges in and out, connectivity."""

import re
from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs import topologies
from mpicdsgd.graphs.graph import Graph

SIZES = range(1, 10)


def as_networkx(graph: Graph) -> nx.DiGraph:
    G = nx.DiGraph()
    G.add_nodes_from(range(graph.n))
    G.add_edges_from(graph.edges)
    return G


def attempt(make: Callable[[], Graph]) -> tuple[Graph | None, str]:
    """The graph, or the message of the UserError."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


# Degrees and diameters from the families' definitions, not from networkx.
EXPECTED = [
    (topologies.complete, lambda n: [n - 1] * n, lambda n: min(1, n - 1)),
    (topologies.ring, lambda n: [min(2, n - 1)] * n, lambda n: n // 2),
    (
        topologies.chain,
        lambda n: [0] if n == 1 else [1, *[2] * (n - 2), 1],
        lambda n: n - 1,
    ),
    (topologies.star, lambda n: [n - 1, *[1] * (n - 1)], lambda n: min(2, n - 1)),
]


@pytest.mark.parametrize(("family", "degrees", "diameter"), EXPECTED)
@pytest.mark.parametrize("n", SIZES)
def test_plain_family(
    family: Callable[[int], Graph],
    degrees: Callable[[int], list[int]],
    diameter: Callable[[int], int],
    n: int,
) -> None:
    graph = family(n)
    assert graph.n == n
    assert not graph.directed
    assert graph.name == family.__name__
    assert list(graph.degrees) == degrees(n)
    assert graph.diameter == diameter(n)
    assert graph.is_regular == (len(set(degrees(n))) == 1)
    assert graph.remarks == ()


def test_ring_neighbours_are_the_agents_beside() -> None:
    assert topologies.ring(5).sources == ((1, 4), (0, 2), (1, 3), (2, 4), (0, 3))
    assert topologies.ring(2).edges == ((0, 1), (1, 0))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("periodic", [True, False])
def test_lattice_without_sizes(n: int, periodic: bool) -> None:
    family = topologies.torus if periodic else topologies.grid
    sizes = {1: (1, 1), 4: (2, 2), 6: (2, 3), 8: (2, 4), 9: (3, 3)}
    if n not in sizes:
        with pytest.raises(UserError, match=rf"composite number of agents, got {n}: use topology"):
            family(n)
        return
    rows, cols = sizes[n]
    graph = family(n)
    for j in range(n):
        r, c = divmod(j, cols)
        steps = [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        if periodic:
            steps = [(a % rows, b % cols) for a, b in steps]
        near = {a * cols + b for a, b in steps if 0 <= a < rows and 0 <= b < cols} - {j}
        assert graph.sources[j] == tuple(sorted(near))
    assert graph.name == f"{family.__name__}:{rows}x{cols}"


def test_prime_torus_message_is_the_designs() -> None:
    with pytest.raises(UserError) as caught:
        topologies.torus(5)
    assert (
        str(caught.value)
        == 'torus needs a composite number of agents, got 5: use topology = "ring"'
    )


def test_lattice_with_sizes() -> None:
    assert topologies.torus(5, 1, 5).sources == topologies.ring(5).sources
    assert topologies.grid(5, 5, 1).sources == topologies.chain(5).sources
    assert topologies.grid(12, cols=4).name == "grid:3x4"
    assert set(topologies.torus(16, 4, 4).degrees) == {4}
    with pytest.raises(UserError, match="torus:4x4 does not have 12 agents: use torus:3x4"):
        topologies.torus(12, 4, 4)
    for rows, cols in ((0, 4), (-2, -2), (0, 0)):
        with pytest.raises(UserError, match="does not have 4 agents"):
            topologies.grid(4, rows, cols)


@pytest.mark.parametrize("n", SIZES)
def test_hypercube(n: int) -> None:
    if n not in (1, 2, 4, 8):
        with pytest.raises(UserError, match=f"power of two agents, got {n}: use"):
            topologies.hypercube(n)
        return
    graph = topologies.hypercube(n)
    assert all((a ^ b).bit_count() == 1 for a, b in graph.edges)
    dimension = n.bit_length() - 1
    assert set(graph.degrees) == {dimension}
    assert graph.diameter == dimension


@pytest.mark.parametrize("n", SIZES)
def test_exponential_reads_powers_of_two_behind(n: int) -> None:
    graph = topologies.exponential(n)
    for j in range(n):
        behind = {(j - hop) % n for hop in (1, 2, 4, 8) if hop < n}
        assert set(graph.sources[j]) == behind
    assert graph.directed
    assert graph.is_regular
    if n > 1:
        assert nx.is_strongly_connected(as_networkx(graph))


def test_exponential_reads_behind_not_ahead() -> None:
    assert topologies.exponential(5).sources[0] == (1, 3, 4)  # -4, -2, -1
    assert topologies.exponential(5).destinations[0] == (1, 2, 4)


@given(st.integers(1, 9), st.integers(0, 8), st.integers(0, 50))
def test_random_regular(n: int, degree: int, seed: int) -> None:
    graph, message = attempt(lambda: topologies.random_regular(n, degree, seed))
    if graph is None:
        impossible = degree >= n or n * degree % 2 == 1
        assert impossible or "try another seed or a larger degree" in message
    else:
        assert set(graph.degrees) == {degree}
        assert graph == topologies.random_regular(n, degree, seed)


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 50))
def test_erdos_renyi(n: int, p: float, seed: int) -> None:
    graph, message = attempt(lambda: topologies.erdos_renyi(n, p, seed))
    if graph is None:
        assert re.search("parts are .*: try another seed or a larger p$", message)
    else:
        assert graph == topologies.erdos_renyi(n, p, seed)
        assert nx.is_strongly_connected(as_networkx(graph))


@given(st.integers(3, 9), st.sampled_from([2, 4]), st.floats(0, 1), st.integers(0, 50))
def test_watts_strogatz(n: int, k: int, p: float, seed: int) -> None:
    graph, message = attempt(lambda: topologies.watts_strogatz(n, k, p, seed))
    if graph is None:
        assert k >= n or "try another seed" in message
    else:
        assert len(graph.edges) == n * k
        assert graph == topologies.watts_strogatz(n, k, p, seed)


def test_random_families_depend_on_the_seed() -> None:
    assert len({topologies.random_regular(12, 3, s).sources for s in range(8)}) > 1
    assert len({topologies.erdos_renyi(8, 0.9, s).sources for s in range(8)}) > 1
    assert len({topologies.watts_strogatz(9, 4, 0.3, s).sources for s in range(8)}) > 1
    assert topologies.watts_strogatz(9, 2, 0.0).sources == topologies.ring(9).sources


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: topologies.ring(0), "ring needs at least one agent, got 0"),
        (lambda: topologies.random_regular(5, 3), "even degree or one agent more"),
        (lambda: topologies.random_regular(4, 4), "smaller degree or more agents"),
        (lambda: topologies.random_regular(4, 2, -1), "seed of 0 or more"),
        (lambda: topologies.erdos_renyi(4, 1.5), "probability in 0 to 1, got 1.5"),
        (lambda: topologies.erdos_renyi(4, float("nan")), "probability in 0 to 1, got nan"),
        (lambda: topologies.watts_strogatz(6, 3, 0.1), "even number k"),
        (lambda: topologies.watts_strogatz(4, 4, 0.1), "another k"),
        (lambda: Graph.from_edges(0, []), "at least one agent"),
        (lambda: Graph.from_edges(3, [(0, 3)], name="g"), "number them from 0 to 2"),
        (lambda: Graph.from_edges(3, [(0, -1)]), "names agent -1"),
        (lambda: Graph.from_edges(3, [(0, 1, 2)]), "pair of agents"),
        (lambda: Graph.from_edges(3, [(0, 1.5)]), "pair of agents"),  # type: ignore[list-item]
        (lambda: Graph.from_edges(3, [7]), "pair of agents"),  # type: ignore[list-item]
    ],
)
def test_mistakes_are_one_line_with_a_remedy(make: Callable[[], Graph], words: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_are_named() -> None:
    with pytest.raises(UserError, match=r"3 parts are \{0, 2\}, \{1\}, \{3\}: add edges"):
        Graph.from_edges(4, [(0, 2)])
    with pytest.raises(UserError, match=r"not strongly connected: its 2 parts are \{0, 1\}, \{2\}"):
        Graph.from_edges(3, [(0, 1), (1, 0), (1, 2)], directed=True)
    with pytest.raises(UserError, match=r"and 92 more") as caught:
        Graph.from_edges(100, [])
    assert len(str(caught.value)) < 250


def test_direction_of_information() -> None:
    graph = Graph.from_edges(3, [(0, 1), (1, 2), (2, 0)], directed=True)
    assert graph.sources == ((2,), (0,), (1,))
    assert graph.destinations == ((1,), (2,), (0,))
    assert graph.edges == ((0, 1), (1, 2), (2, 0))
    assert graph.diameter == 2
    assert graph.adjacency()[1, 0]
    assert not graph.adjacency()[0, 1]


def test_merged_edges_are_remarked() -> None:
    graph = Graph.from_edges(2, [(0, 1), (1, 0), (1, 1)])
    assert graph.edges == ((0, 1), (1, 0))
    assert graph.remarks == (
        "graph: 1 duplicate edge(s) merged: (1, 0)",
        "graph: 1 self loop(s) dropped (an agent's own weight is Pi[j, j]): (1, 1)",
    )
    both = Graph.from_edges(2, [(0, 1), (1, 0)], directed=True)
    assert both.remarks == ()


def test_equal_in_degrees_alone_are_not_regular() -> None:
    reads = [(1, 3), (0, 2), (0, 1), (0, 2)]
    edges = [(a, j) for j, agents in enumerate(reads) for a in agents]
    graph = Graph.from_edges(4, edges, directed=True)
    assert set(graph.degrees) == {2}
    assert not graph.is_regular


@st.composite
def edge_lists(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], bool]:
    n = draw(st.integers(1, 8))
    agent = st.integers(0, n - 1)
    return n, draw(st.lists(st.tuples(agent, agent), max_size=40)), draw(st.booleans())


@given(edge_lists())
def test_from_edges_agrees_with_networkx(case: tuple[int, list[tuple[int, int]], bool]) -> None:
    n, edges, directed = case
    G = nx.DiGraph() if directed else nx.Graph()
    G.add_nodes_from(range(n))
    G.add_edges_from((a, b) for a, b in edges if a != b)
    G = G if directed else G.to_directed()
    try:
        graph = Graph.from_edges(n, edges, directed=directed)
    except UserError:
        assert not nx.is_strongly_connected(G)
        return
    assert nx.is_strongly_connected(G)
    assert set(graph.edges) == set(G.edges)
    assert graph.diameter == nx.diameter(G)
    assert np.array_equal(graph.adjacency(), nx.to_numpy_array(G, range(n)).T.astype(bool))
    assert graph.degrees == tuple(d for _, d in G.in_degree(range(n)))

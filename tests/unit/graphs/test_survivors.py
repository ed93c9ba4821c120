"""The graph and the matrix of the agents that remain when others have died."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.specs import graph_from_spec
from mpicdsgd.graphs.survivors import remaining_graph, remaining_mixing

SPECS = [
    "ring",
    "chain",
    "star",
    "complete",
    "torus",
    "grid",
    "expo",
    "watts-strogatz:2,0.2,seed=1",
]


def left(graph: Graph, *dead: int) -> tuple[Graph, tuple[tuple[int, int], ...]]:
    return remaining_graph(graph, [agent for agent in range(graph.n) if agent not in dead])


@st.composite
def deaths(draw: st.DrawFn) -> tuple[Graph, list[int]]:
    """A connected graph, often a tree or nearly one, and who is alive."""
    n = draw(st.integers(2, 14))
    edges = [(draw(st.integers(0, b - 1)), b) for b in range(1, n)]
    agent = st.integers(0, n - 1)
    more = draw(st.lists(st.tuples(agent, agent).filter(lambda e: e[0] != e[1]), max_size=n))
    graph = Graph.from_edges(n, {tuple(sorted(e)) for e in [*edges, *more]}, name="drawn")
    return graph, sorted(draw(st.sets(agent, min_size=1, max_size=n)))


def test_a_ring_becomes_a_chain() -> None:
    graph, added = left(graph_from_spec("ring", 5), 0)
    assert (graph.edges, added) == (graph_from_spec("chain", 4).edges, ())
    assert graph.title == "graph what is left of ring"


def test_a_ring_in_two_parts_is_joined_once() -> None:
    """0 - 1 - (2) - 3 - 4 - (5): 0, 1, 3, 4 are 0, 1, 2, 3 now; 1 and 2 are joined over 2's gap."""
    graph, added = left(graph_from_spec("ring", 6), 2, 5)
    assert added == ((1, 2),)
    assert graph.edges == graph_from_spec("chain", 4).edges


def test_neighbours_that_die_make_one_gap() -> None:
    graph, added = left(graph_from_spec("chain", 6), 2, 3)
    assert added == ((1, 2),)
    assert graph.edges == graph_from_spec("chain", 4).edges


def test_a_star_without_its_middle_is_a_chain() -> None:
    graph, added = left(graph_from_spec("star", 6), 0)
    assert added == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert max(graph.degrees) == 2


def test_the_agents_with_the_fewest_neighbours_are_joined() -> None:
    """Of the dead agent's neighbours 1 has two others, 4 has 6, and 5 and 6 have each other."""
    old = Graph.from_edges(7, [(0, 1), (0, 4), (0, 5), (0, 6), (1, 2), (1, 3), (5, 6), (4, 6)])
    graph, added = left(old, 0)
    assert added == ((0, 3),), "agents 1 and 4 of before"
    assert graph.n == 6


def test_one_agent_alone_is_left() -> None:
    graph, added = left(graph_from_spec("ring", 3), 0, 2)
    assert (graph.n, graph.edges, added) == (1, (), ())
    assert remaining_mixing("metropolis", graph)[0].Pi.tolist() == [[1.0]]


def test_the_name_does_not_grow() -> None:
    graph, _ = left(left(graph_from_spec("ring", 6), 1)[0], 1)
    assert graph.name == "what is left of ring"


@given(deaths())
def test_any_graph(case: tuple[Graph, list[int]]) -> None:
    """Connected (`Graph.from_edges` sees to that), the old edges all there, few added."""
    old, alive = case
    graph, added = remaining_graph(old, alive)
    pairs = {(a, b) for a, b in graph.edges if a < b}
    number = {agent: k for k, agent in enumerate(alive)}
    kept = {(number[a], number[b]) for a, b in old.edges if a < b and {a, b} <= number.keys()}
    assert pairs == kept | set(added)
    assert not kept & set(added)
    G = nx.Graph(kept)
    G.add_nodes_from(range(len(alive)))
    assert len(added) == nx.number_connected_components(G) - 1, "none too many"
    gaps = nx.connected_components(nx.Graph(old.edges).subgraph(set(range(old.n)) - set(alive)))
    near = dict.fromkeys(alive, 0)
    for gap in gaps:
        for agent in alive:
            near[agent] += any(source in gap for source in old.sources[agent])
    for agent in alive:
        more = graph.degrees[number[agent]] - G.degree(number[agent])
        assert more <= 2 * near[agent], "a chain over each gap"


@pytest.mark.parametrize("spec", ["metropolis", "max-degree", "uniform", "lazy:uniform", "file:p"])
@given(deaths())
def test_any_matrix(spec: str, case: tuple[Graph, list[int]]) -> None:
    graph, _ = remaining_graph(*case)
    mixing, why = remaining_mixing(spec, graph)
    Pi = mixing.Pi
    for axis in (0, 1):
        np.testing.assert_allclose(Pi.sum(axis), 1, rtol=0, atol=1e-12)
    assert not (Pi[~(graph.adjacency() | np.eye(graph.n, dtype=bool))]).any()
    assert (Pi >= 0).all()
    assert graph.n == 1 or mixing.spectrum.gap > 0 or graph.n == 2, "two halves may swing"
    fits = spec in ("metropolis", "max-degree") or (spec != "file:p" and graph.is_regular)
    assert (why == "") == fits
    assert mixing.name.rpartition(":")[2] == (spec.rpartition(":")[2] if fits else "metropolis")
    assert mixing.name.startswith("lazy:") == spec.startswith("lazy:")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [4, 6, 8])
def test_families_with_every_agent_dead(spec: str, n: int) -> None:
    for dead in range(n):
        graph, _ = left(graph_from_spec(spec, n), dead)
        mixing, _ = remaining_mixing("uniform", graph)
        np.testing.assert_allclose(mixing.Pi.sum(0), 1, rtol=0, atol=1e-12)
        assert mixing.graph.n == n - 1


def test_a_directed_graph_stays_directed_where_it_can() -> None:
    complete = Graph.from_edges(
        4, [(a, b) for a in range(4) for b in range(4) if a != b], directed=True, name="all"
    )
    graph, added = left(complete, 3)
    assert graph.directed
    assert (len(graph.edges), added) == (6, ())
    assert remaining_mixing("uniform", graph)[1] == ""


def test_a_directed_graph_with_no_rule_runs_both_ways() -> None:
    graph, _ = left(graph_from_spec("expo", 6), 2)
    assert graph.directed, "5 agents that can still all hear of each other"
    mixing, why = remaining_mixing("uniform", graph)
    assert not mixing.graph.directed
    assert set(graph.edges) <= set(mixing.graph.edges)
    assert why.startswith("mixing uniform needs a regular graph")
    assert why.endswith("; its edges run both ways from now on")


def test_a_directed_ring_that_is_cut_runs_both_ways() -> None:
    old = Graph.from_edges(5, [(a, (a + 1) % 5) for a in range(5)], directed=True)
    graph, added = left(old, 2)
    assert not graph.directed
    assert graph.edges == ((0, 1), (0, 3), (1, 0), (2, 3), (3, 0), (3, 2))
    assert added == (), "3 - 4 - 0 - 1 hang together"
    assert graph.name == "what is left of the graph"

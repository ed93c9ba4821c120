"""Fastest mixing: closed forms, never worse than Metropolis, and nothing near it is better."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest

import mpicdsgd
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs import topologies
from mpicdsgd.graphs.fastest_mixing import MAX_EDGES, _Edges, fastest
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_matrix import Matrix
from mpicdsgd.graphs.mixing_rules import metropolis


def modulus(Pi: Matrix) -> float:
    """max(|lambda_2|, |lambda_N|)."""
    values = np.sort(np.linalg.eigvals(Pi).real)[:-1]
    return float(np.abs(values).max(initial=0.0))


def check(graph: Graph) -> Matrix:
    """Its Pi, after a look at all that is asked of one."""
    Pi = fastest(graph).Pi
    allowed = graph.adjacency() | np.eye(graph.n, dtype=np.bool_)
    assert (Pi >= 0).all()
    assert not Pi[~allowed].any()
    assert np.array_equal(Pi, Pi.T)
    assert np.abs(Pi.sum(axis=1) - 1).max() < 1e-12
    return Pi


def of(G: nx.Graph) -> Graph:
    G = nx.convert_node_labels_to_integers(G)
    return Graph.from_edges(len(G), G.edges)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 16, 40])
def test_a_path(n: int) -> None:
    """Boyd, Diaconis, Sun, Xiao 2006."""
    assert modulus(check(topologies.chain(n))) == pytest.approx(math.cos(math.pi / n), abs=1e-6)


@pytest.mark.parametrize(
    "G",
    [
        nx.cycle_graph(9),
        nx.cycle_graph(12),
        nx.star_graph(6),
        nx.complete_graph(2),
        nx.complete_graph(7),
        nx.hypercube_graph(4),
        nx.complete_bipartite_graph(3, 5),
        nx.petersen_graph(),
    ],
)
def test_edge_transitive_graphs(G: nx.Graph) -> None:
    """All weights are equal there. Source: Boyd, Diaconis, Xiao 2004."""
    values = np.linalg.eigvalsh(nx.laplacian_matrix(G).toarray().astype(float))
    weight = min(1 / max(degree for _, degree in G.degree), 2 / (values[1] + values[-1]))
    expected = float(np.abs(1 - weight * values[1:]).max())
    assert modulus(check(of(G))) == pytest.approx(expected, abs=1e-6)


def test_the_barrier_alone() -> None:
    """Without the constant weight, which is tried first."""
    graph = of(nx.petersen_graph())
    a, b = np.array([edge for edge in graph.edges if edge[0] < edge[1]]).T
    edges = _Edges(graph.n, a, b)
    # Laplacian 2 and 5: the weight 2/7.
    w = edges.minimise(np.full(15, 0.2))
    assert modulus(edges.matrix(w)) == pytest.approx(3 / 7, abs=1e-7)
    grid = topologies.grid(9, 3, 3)
    assert modulus(check(grid)) < modulus(metropolis(grid).Pi) - 0.01


def test_random_graphs() -> None:
    """Never worse than Metropolis; no feasible step in any of 20 directions improves it."""
    rng = np.random.default_rng(0)
    for seed in range(200):
        n = 3 + seed % 12
        G = nx.gnp_random_graph(n, 0.4, seed=seed)
        G.add_edges_from((int(rng.integers(j)), j) for j in range(1, n))
        graph = of(G)
        Pi = check(graph)
        least = modulus(Pi)
        assert least <= modulus(metropolis(graph).Pi) + 1e-12
        for size in np.geomspace(1e-4, 0.3, 20):
            other = np.zeros((n, n))
            for a, b in G.edges:
                other[a, b] = other[b, a] = max(0.0, Pi[a, b] + size * rng.normal())
            other /= max(1.0, float(other.sum(axis=1).max()))
            np.fill_diagonal(other, 1 - other.sum(axis=1))
            assert modulus(other) >= least - 1e-7


def test_small_and_refused() -> None:
    assert fastest(topologies.complete(1)).Pi.tolist() == [[1.0]]
    assert mpicdsgd.fastest is fastest, "the function, not a module of that name"
    with pytest.raises(UserError, match="is directed"):
        fastest(topologies.exponential(5))
    with pytest.raises(UserError, match=f"at most {MAX_EDGES} edges"):
        fastest(topologies.complete(70))


@pytest.mark.parametrize(("n", "seed", "modulus"), [(36, 68, 0.784573489), (33, 299, 0.783764161)])
def test_the_solver_goes_to_the_end_on_large_random_graphs(
    n: int, seed: int, modulus: float
) -> None:
    """Graphs on which a path of too large steps stalls 2e-3 above; figures of a slower path."""
    assert 1 - fastest(topologies.random_regular(n, 4, seed)).spectrum.gap == pytest.approx(
        modulus, abs=1e-6
    )

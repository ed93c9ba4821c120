"""Cycles of mixing matrices: what each turn is, what their product does, what is refused."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd import (
    Graph,
    UserError,
    alternating_matchings,
    chain,
    complete,
    erdos_renyi,
    exponential,
    graph_from_spec,
    hypercube,
    metropolis,
    mixing_cycle,
    mixing_from_spec,
    one_peer_exponential,
    ring,
    star,
)
from mpicdsgd.graphs.mixing_cycle import MixingCycle


@settings(deadline=None)
@given(n=st.integers(1, 40))
def test_one_peer_exponential(n: int) -> None:
    """In each turn one reads and one is read; after m turns of 2**m agents all are equal."""
    mixing = one_peer_exponential(n)
    assert mixing.graph.sources == exponential(n).sources
    assert len(mixing.turns) == max(1, (n - 1).bit_length())
    for i, turn in enumerate(mixing.turns):
        for j in range(n if n > 1 else 0):
            assert turn.row(j) == (0.5, ((j - 2**i) % n,), (0.5,))
            assert len(turn.graph.destinations[j]) == 1
    X = np.random.default_rng(n).standard_normal((n, 3))
    after = reduce(lambda X, turn: turn.Pi @ X, mixing.turns, X)
    if n & (n - 1) == 0:
        assert np.abs(after - X.mean(axis=0)).max() <= 1e-12
    assert np.abs(after.mean(axis=0) - X.mean(axis=0)).max() <= 1e-12
    assert all(c.holds for c in mixing.conditions if not c.name.startswith("b)"))


@settings(deadline=None)
@given(n=st.integers(1, 12), p=st.floats(0.3, 1), seed=st.integers(0, 50))
def test_matchings_cover_every_edge_once(n: int, p: float, seed: int) -> None:
    try:
        graph = erdos_renyi(n, p, seed)
    except UserError:
        return  # it came out in parts
    mixing = alternating_matchings(graph)
    pairs = [edge for turn in mixing.turns for edge in turn.graph.edges]
    assert sorted(pairs) == sorted(graph.edges)
    assert mixing.graph.sources == graph.sources
    for turn in mixing.turns:
        assert max(turn.graph.degrees) <= 1
        assert set(np.unique(turn.Pi)) <= {0.0, 0.5, 1.0}
    assert all(c.holds for c in mixing.conditions)
    assert len(mixing.turns) <= 2 * max(max(graph.degrees), 1)


@pytest.mark.parametrize(
    ("graph", "turns"), [(ring(8), 2), (ring(5), 3), (chain(6), 2), (star(5), 4), (complete(4), 3)]
)
def test_how_many_matchings(graph: Graph, turns: int) -> None:
    assert len(alternating_matchings(graph).turns) == turns


def test_gaps() -> None:
    """Two turns of an even ring bring more than two of its Metropolis matrix."""
    mixing, once = alternating_matchings(ring(8)), metropolis(ring(8))
    P = mixing.turns[1].Pi @ mixing.turns[0].Pi
    moduli = np.sort(np.abs(np.linalg.eigvals(P)))[::-1]
    assert mixing.spectrum.gap == pytest.approx(1 - moduli[1])
    assert mixing.gap_per_turn == pytest.approx(1 - moduli[1] ** 0.5)
    assert mixing.gap_per_turn > once.gap_per_turn == once.spectrum.gap
    assert one_peer_exponential(16).gap_per_turn == 1.0
    assert once.turns == (once,)


def test_own_matrices() -> None:
    """On a directed graph, some agents idle, entries that sum to 1 up to few digits repaired."""
    swap = np.eye(4)[[1, 0, 3, 2]]
    third = np.array([[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3]]) / 3
    rounded = third + 1e-8 * np.eye(4)
    mixing = mixing_cycle([(swap + np.eye(4)) / 2, rounded, metropolis(ring(4)).Pi], ring(4))
    assert mixing.graph.sources == ring(4).sources
    assert mixing.turns[1].graph.sources == ((1,), (0,), (), ())
    assert "turn 1: made exactly symmetric" in mixing.remarks[0]
    assert "the same Pi in every step" in mixing.remarks[-1]
    other = mixing_cycle([third, (swap + np.eye(4)) / 2, metropolis(ring(4)).Pi], ring(4))
    assert mixing.digest != other.digest  # the order matters
    again = mixing_cycle([turn.Pi for turn in mixing.turns], ring(4))
    assert again.digest == mixing.digest


@pytest.mark.parametrize(
    ("matrices", "graph", "text"),
    [
        ([], ring(4), "needs at least one matrix"),
        ([np.eye(3)], ring(4), "turn 0: Pi must be 4 x 4"),
        ([np.full((4, 4), 0.25)], ring(4), "turn 0: Pi[0, 2] = 0.25, but agent 0 does not read"),
        ([metropolis(ring(4)).Pi, np.eye(4) * 2], ring(4), "turn 1: Pi[0, 0] = 2"),
        ([np.eye(2), [[0.5, 0.5], [0.4, 0.6]]], complete(2), "turn 1 is not symmetric"),
        ([[[0.5, 0.5], [0.2, 0.8]]], exponential(2), "turn 0: column 0 sums to 0.7"),
        ([np.eye(4)], ring(4), "is not connected: its 4 parts"),
        ([np.eye(2)[::-1], np.eye(2)[::-1]], complete(2), "give each agent more weight on itself"),
        ([[[np.nan, 1], [1, 0]]], complete(2), "every weight must be finite"),
    ],
)
def test_refused(matrices: list[np.ndarray], graph: Graph, text: str) -> None:
    with pytest.raises(UserError) as raised:
        mixing_cycle(matrices, graph)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("topology", "mixing", "turns"),
    [("expo", "one-peer", 3), ("ring", "matchings", 2), ("expo", "lazy:one_peer", 3)],
)
def test_specs(topology: str, mixing: str, turns: int) -> None:
    made = mixing_from_spec(mixing, graph_from_spec(topology, 8))
    assert isinstance(made, MixingCycle)
    assert len(made.turns) == turns
    assert made.name.replace("-", "_") == mixing.replace("-", "_")


def test_spec_of_files(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for name, turn in zip("ab", alternating_matchings(ring(4)).turns, strict=True):
        np.savetxt(f"{name}.csv", turn.Pi, delimiter=",")
    made = mixing_from_spec("cycle:a.csv, b.csv", ring(4))
    assert made.digest == alternating_matchings(ring(4)).digest


@pytest.mark.parametrize(
    ("topology", "mixing", "text"),
    [
        ("ring", "one-peer", 'needs topology = "expo"'),
        ("expo", "matchings", 'use mixing = "one-peer"'),
        ("ring", "cycle:", "needs a path after the colon, as in cycle:a.csv,b.csv"),
        ("ring", "cycle:a.csv,", "needs a path after the colon"),
        ("ring", "matching", 'did you mean "matchings"'),
    ],
)
def test_spec_mistakes(topology: str, mixing: str, text: str, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    np.savetxt("a.csv", hypercube(8).adjacency() / 3, delimiter=",")
    with pytest.raises(UserError) as raised:
        mixing_from_spec(mixing, graph_from_spec(topology, 8))
    assert text in str(raised.value)


def test_a_cycle_of_one_matrix_remarks_what_the_matrix_does() -> None:
    cycle = one_peer_exponential(2)
    assert len(cycle.turns) == 1
    assert cycle.remarks == cycle.turns[0].remarks

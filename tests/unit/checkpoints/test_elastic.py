"""Where the agents' states come from when there are more or fewer than before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicdsgd.checkpoints.elastic import mixed, origins
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec


def mixing(topology: str, n: int, name: str = "metropolis") -> Mixing:
    return mixing_from_spec(name, graph_from_spec(topology, n))


def test_fewer_agents_keep_their_own() -> None:
    assert np.array_equal(origins(mixing("ring", 3), 5), np.eye(3, 5))


def test_as_many_agents_keep_their_own() -> None:
    assert np.array_equal(origins(mixing("star", 6), 6), np.eye(6))


def test_newcomers_on_a_chain() -> None:
    """0 - 1 - 2 - 3 - 4, of which 0 and 1 were there: each newcomer has one neighbour before it."""
    W = origins(mixing("chain", 5), 2)
    assert np.array_equal(W, [[1, 0], [0, 1], [0, 1], [0, 1], [0, 1]])


def test_newcomers_on_a_ring_meet() -> None:
    """0 and 1 are neighbours, 2 joins 1, 4 joins 0, and 3 then lies between 2 and 4."""
    W = origins(mixing("ring", 5), 2)
    assert np.array_equal(W, [[1, 0], [0, 1], [0, 1], [0.5, 0.5], [1, 0]])


def test_the_weights_are_the_matrix_s() -> None:
    """The corner of a grid lies between a corner and the middle, which Metropolis weighs unlike."""
    made = mixing("grid:2x3", 6)
    Pi, W = made.turns[0].Pi, origins(made, 5)
    assert 0 < Pi[5, 4] < Pi[5, 2]
    assert np.allclose(W[5], [0, 0, Pi[5, 2], 0, Pi[5, 4]] / (Pi[5, 2] + Pi[5, 4]), rtol=1e-15)


@pytest.mark.parametrize("name", ["metropolis", "fastest", "matchings", "uniform"])
@given(st.data())
def test_any(name: str, data: st.DataObject) -> None:
    topologies = ["complete"] if name == "uniform" else ["ring", "chain", "star", "complete"]
    n, before = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    made = mixing(data.draw(st.sampled_from(topologies)), n, name)
    W = origins(made, before)
    assert W.shape == (n, before)
    kept = min(n, before)
    assert np.array_equal(W[:kept], np.eye(kept, before))
    assert (W >= 0).all()
    assert np.allclose(W.sum(1), 1, rtol=0, atol=1e-12)


def test_arrays_are_mixed_in_float64() -> None:
    big, small = np.float32(2**24), np.float32(1)
    parts: list[tuple[float, dict[str, Any]]] = [
        (0.25, {"x": np.array([big, 3, 0], np.float32), "count": np.array(3), "only": np.ones(2)}),
        (0.5, {"x": np.array([small, 3, 1], np.float32), "count": np.array(7)}),
        (0.25, {"x": np.array([-big, 3, 0], np.float32), "count": np.array(5)}),
    ]
    found = mixed(parts)
    assert found.keys() == {"x", "count"}, "as the heaviest has them"
    assert found["x"].dtype == np.float32
    assert found["x"].tolist() == [0.5, 3, 0.5]
    assert found["count"] == 7


def test_the_first_of_equals_has_what_is_no_float() -> None:
    one: dict[str, Any] = {"x": np.zeros(1), "n": np.array(1), "odd": np.ones(2)}
    two: dict[str, Any] = {"x": np.ones(1), "n": np.array(2), "odd": np.ones(3)}
    found = mixed([(0.5, one), (0.5, two)])
    assert (found["x"].tolist(), int(found["n"]), found["odd"].tolist()) == ([0.5], 1, [1, 1])


def test_a_part_alone_is_taken_as_it_is() -> None:
    one: dict[str, Any] = {"x": np.array([0.1], np.float32)}
    assert mixed([(1.0, one)]) is one


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_equal_states_stay_equal_bit_by_bit(weights: list[float], seed: int) -> None:
    """What all agents have alike (a server's model, SGD's parameters) newcomers have, too."""
    x = np.random.default_rng(seed).normal(size=50).astype(np.float32)
    parts = [(w / sum(weights), {"x": x.copy()}) for w in weights]
    assert np.array_equal(mixed(parts)["x"], x)

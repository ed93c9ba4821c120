"""A server's rules against plain NumPy; who meets whom in Gossip SGD.

D       elements of the model
T       tensors in it
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpicdsgd.algorithms.contract import Circumstances
from mpicdsgd.algorithms.gossip import GossipSettings, PairwiseGossip
from mpicdsgd.algorithms.server.rules import ADAGRAD, DOWNPOUR, ELASTIC, Rule, Setup, rule_from
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.specs import graph_from_spec

HEAD = 16
KINDS = [ELASTIC, DOWNPOUR, ADAGRAD]

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5)
seeds = st.integers(0, 2**32 - 1)
steps = st.lists(st.sampled_from([0.0, 1e-4, 0.1, 1.0, 30.0]), min_size=5, max_size=5)


def segments_of(lengths_T: list[int]) -> NDArray[np.int64]:
    offsets = np.cumsum([0, *lengths_T[:-1]])
    return np.stack([offsets, lengths_T], axis=1).astype(np.int64)


def values(seed: int, count: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def push(alphas_T: list[float], h_D: NDArray[np.float32]) -> NDArray[np.float32]:
    """The message of an agent's push; its head means nothing."""
    return np.concatenate([np.full(HEAD, np.nan), alphas_T, h_D]).astype(np.float32)


def spread(lengths_T: list[int], alphas_T: list[float]) -> NDArray[np.float64]:
    return np.repeat(np.array(alphas_T[: len(lengths_T)]), lengths_T)


def near(found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@given(st.sampled_from(KINDS), lengths, st.floats(0, 1, width=32), seeds)
def test_a_setup_survives_its_message(
    kind: int, lengths_T: list[int], elasticity: float, seed: int
) -> None:
    x, segments = values(seed, sum(lengths_T)), segments_of(lengths_T)
    body = Setup(kind, x, segments, elasticity).body()
    assert body.dtype == np.float32
    assert body.shape == (HEAD + 4 * len(lengths_T) + x.size,)
    # Sent as bytes, in a buffer of the server's that it will use again.
    sent = np.frombuffer(bytearray(body.tobytes()), np.float32)
    rule = rule_from(sent)
    again = Setup(kind, rule.x, np.array(rule._segments), float(rule._elasticity)).body()
    assert again.tobytes() == body.tobytes()
    kept = rule.x.copy()
    sent[:] = np.nan
    np.testing.assert_array_equal(rule.x, kept)
    np.testing.assert_array_equal(np.array(rule._segments), segments)


def test_a_setup_larger_than_float32_counts() -> None:
    """Offsets beyond 2^24 and 2^32 are not rounded on their way."""
    segments = np.array([[0, 2**24 + 1], [2**24 + 1, 2**33 + 7]], np.int64)
    rule = rule_from(Setup(DOWNPOUR, np.ones(3, np.float32), segments).body())
    assert rule._segments == segments.tolist()
    assert rule.x.tolist() == [1, 1, 1]


def test_bits_that_look_like_nan_survive() -> None:
    segments = np.array([[0, -1]], np.int64)  # in float32's eyes two NaN
    x = np.array([0x7F800001, 0xFFFFFFFF, 0x80000000], np.uint32).view(np.float32)
    rule = rule_from(Setup(ELASTIC, x, segments, 0.25).body())
    assert rule.x.tobytes() == x.tobytes()
    assert rule._segments == [[0, -1]]


@given(lengths, st.floats(0.001, 0.999), st.lists(seeds, min_size=1, max_size=4))
def test_elastic(lengths_T: list[int], elasticity: float, agents: list[int]) -> None:
    size = sum(lengths_T)
    c = values(1, size)
    rule = Rule(Setup(ELASTIC, c, segments_of(lengths_T), elasticity))
    e, expected = float(np.float32(elasticity)), c.astype(np.float64)
    for seed in agents:
        x = values(seed, size)
        before, kept = rule.x.copy(), x.copy()
        rule.exchange(x)
        expected = expected + e * (x - expected)
        near(rule.x, expected)
        # What the centre gains the agent, which adds e (c - x) of the old c, loses.
        near(rule.x + (x + e * (before.astype(np.float64) - x)), before.astype(np.float64) + x)
        # Between the two, but for rounding.
        slack = 1e-6 * (1 + np.abs(x) + np.abs(before))
        assert (rule.x >= np.minimum(before, x) - slack).all()
        assert (rule.x <= np.maximum(before, x) + slack).all()
        np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(c, values(1, size))


@given(lengths, st.lists(st.tuples(seeds, steps), min_size=1, max_size=4))
def test_downpour(lengths_T: list[int], pushes: list[tuple[int, list[float]]]) -> None:
    size = sum(lengths_T)
    rule = Rule(Setup(DOWNPOUR, values(1, size), segments_of(lengths_T)))
    expected = values(1, size).astype(np.float64)
    for seed, alphas in pushes:
        h, alphas_T = values(seed, size), alphas[: len(lengths_T)]
        rule.push(push(alphas_T, h))
        expected = expected - spread(lengths_T, alphas_T) * h
        np.testing.assert_allclose(rule.x, expected, rtol=1e-5, atol=1e-4)
    assert len(rule.arrays()) == 1


@given(lengths, st.lists(st.tuples(seeds, steps), min_size=1, max_size=4))
def test_adagrad(lengths_T: list[int], pushes: list[tuple[int, list[float]]]) -> None:
    size = sum(lengths_T)
    rule = Rule(Setup(ADAGRAD, values(1, size), segments_of(lengths_T)))
    expected, squares = values(1, size).astype(np.float64), np.zeros(size)
    for seed, alphas in pushes:
        h, alphas_T = values(seed, size), alphas[: len(lengths_T)]
        rule.push(push(alphas_T, h))
        squares = squares + h.astype(np.float64) ** 2
        step = spread(lengths_T, alphas_T) * h / (np.sqrt(squares) + 1e-10)
        before, expected = expected, expected - step
        # No step is longer than alpha.
        assert (np.abs(expected - before) <= spread(lengths_T, alphas_T)).all()
        np.testing.assert_allclose(rule.x, expected, rtol=1e-5, atol=1e-4)
    x, found = rule.arrays()
    assert x is rule.x
    near(found, squares)


@pytest.mark.parametrize("kind", [DOWNPOUR, ADAGRAD])
def test_each_tensor_has_its_own_step_size(kind: int) -> None:
    lengths_T = [2, 0, 3]
    rule = Rule(Setup(kind, np.zeros(5, np.float32), segments_of(lengths_T)))
    rule.push(push([0.5, 7.0, 0.0], np.full(5, 2.0, np.float32)))
    moved = -1.0 if kind == DOWNPOUR else -0.5
    assert rule.x.tolist() == [moved, moved, 0, 0, 0]


def test_what_no_tensor_holds_stays() -> None:
    """Offsets are aligned: there are gaps between tensors, and messages have them too."""
    segments = np.array([[0, 2], [4, 1]], np.int64)
    for kind in (DOWNPOUR, ADAGRAD):
        rule = Rule(Setup(kind, np.ones(6, np.float32), segments))
        rule.push(push([1.0, 2.0], np.full(6, 0.5, np.float32)))
        assert rule.x[[2, 3, 5]].tolist() == [1, 1, 1]
        assert (rule.x[[0, 1, 4]] < 1).all()


def test_a_push_of_another_number_of_tensors_is_not_taken() -> None:
    rule = Rule(Setup(DOWNPOUR, np.ones(4, np.float32), np.array([[0, 2], [2, 2]])))
    with pytest.raises(ValueError, match=r"zip|broadcast"):
        rule.push(push([1.0], np.ones(1, np.float32)))


def test_adagrad_with_a_gradient_of_zero() -> None:
    rule = Rule(Setup(ADAGRAD, np.ones(2, np.float32), np.array([[0, 2]])))
    rule.push(push([0.1], np.zeros(2, np.float32)))
    assert rule.x.tolist() == [1, 1], "not 0 / 0"


@given(st.sampled_from(KINDS), seeds)
def test_the_arrays_are_the_whole_state(kind: int, seed: int) -> None:
    setup = Setup(kind, values(1, 6), segments_of([2, 4]), 0.25)

    def act(rule: Rule, seed: int) -> None:
        x = values(seed, 6)
        rule.exchange(x) if kind == ELASTIC else rule.push(push([0.1, 0.2], x))

    one, other = Rule(setup), Rule(setup)
    act(one, seed)
    act(other, seed + 1)
    for array, kept in zip(other.arrays(), one.arrays(), strict=True):
        array[:] = kept  # as a server loads a checkpoint
    act(one, seed + 2)
    act(other, seed + 2)
    assert [a.tobytes() for a in one.arrays()] == [a.tobytes() for a in other.arrays()]


def test_a_rule_owns_its_model() -> None:
    x = np.ones(3, np.float32)
    rule = Rule(Setup(ELASTIC, x, np.array([[0, 3]]), 0.5))
    rule.exchange(np.zeros(3, np.float32))
    assert x.tolist() == [1, 1, 1]
    assert rule.x.tolist() == [0.5, 0.5, 0.5]


# Pairs of Gossip SGD: who meets whom is drawn without MPI.


def meetings(graph: Graph, step: int, probability: float, seed: int = 0) -> list[int | None]:
    """Whom each agent thinks that it meets."""

    run = Circumstances(agents=graph.n, seed=seed)
    algorithm = PairwiseGossip(GossipSettings(probability=probability), run)

    def partner(rank: int) -> int | None:
        ctx: Any = SimpleNamespace(size=graph.n, ranks=np.array([rank]), neighbours=graph.sources)
        (other,) = algorithm.partners(ctx, step).tolist()
        return other if other >= 0 else None

    return [partner(rank) for rank in range(graph.n)]


@settings(max_examples=50)
@given(
    st.sampled_from(["ring", "star", "chain", "complete"]),
    st.integers(2, 9),
    st.integers(0, 10**9),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_partners_are_mutual_neighbours(
    spec: str, n: int, step: int, probability: float, seed: int
) -> None:
    graph = graph_from_spec(spec, n)
    partners = meetings(graph, step, probability, seed)
    for j, other in enumerate(partners):
        if other is not None:
            assert other != j
            assert other in graph.sources[j]
            assert partners[other] == j


def test_all_wake_or_none() -> None:
    graph = graph_from_spec("complete", 7)
    for step in range(50):
        assert meetings(graph, step, 0.0) == [None] * 7
        # All are awake, yet one that picks somebody who is paired already stays alone.
        assert any(other is not None for other in meetings(graph, step, 1.0))
    assert meetings(graph_from_spec("complete", 1), 0, 1.0) == [None]


def test_two_agents_meet_as_often_as_one_of_them_wakes() -> None:
    graph, p, count = graph_from_spec("complete", 2), 0.3, 3000
    met = sum(meetings(graph, step, p)[0] is not None for step in range(count))
    expected = 1 - (1 - p) ** 2
    assert abs(met / count - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


@pytest.mark.parametrize(("spec", "n"), [("complete", 6), ("ring", 5)])
def test_all_edges_meet_equally_often(spec: str, n: int) -> None:
    graph, count = graph_from_spec(spec, n), 2000
    met = np.zeros((n, n))
    for step in range(count):
        for j, other in enumerate(meetings(graph, step, 0.6, seed=4)):
            if other is not None:
                met[j, other] += 1
    np.testing.assert_array_equal(met, met.T)
    edges = [(j, other) for j in range(n) for other in graph.sources[j] if j < other]
    counts = np.array([met[edge] for edge in edges])
    mean = counts.mean()
    assert counts.sum() == np.triu(met).sum()
    # Independent between steps: each is binomial.
    assert np.abs(counts - mean).max() < 4.5 * (mean * (1 - mean / count)) ** 0.5


def test_the_draws_depend_on_seed_and_step_only() -> None:
    graph = graph_from_spec("complete", 8)
    first = [meetings(graph, step, 0.5, seed=1) for step in range(20)]
    assert [meetings(graph, step, 0.5, seed=1) for step in reversed(range(20))] == first[::-1]
    assert [meetings(graph, step, 0.5, seed=2) for step in range(20)] != first
    assert len({tuple(partners) for partners in first}) > 15

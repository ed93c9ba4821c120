"""Mixing matrices: spectra against closed forms, Assumption 2 by property, every refusal."""

import contextlib
from collections.abc import Callable

import networkx as nx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs import mixing_rules, topologies
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_matrix import MixingMatrix

FAMILIES = [
    topologies.complete,
    topologies.ring,
    topologies.chain,
    topologies.star,
    topologies.torus,
    topologies.grid,
    topologies.hypercube,
    topologies.exponential,
    lambda n: topologies.erdos_renyi(n, 0.8, seed=1),
    lambda n: topologies.random_regular(n, (n - 1) // 2 * 2),
]
CONSTRUCTORS = [mixing_rules.uniform, mixing_rules.metropolis, mixing_rules.max_degree]


def attempt(make: Callable[[], MixingMatrix]) -> tuple[MixingMatrix | None, str]:
    """The matrix, or the message of the UserError."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


def graphs(families: list[Callable[[int], Graph]]) -> list[Graph]:
    """Every family at every n from 1 to 9 that it can have."""
    found = []
    for n in range(1, 10):
        for family in families:
            with contextlib.suppress(UserError):
                found.append(family(n))
    return found


def label(graph: Graph) -> str:
    return f"{graph.name}-n{graph.n}"


def eigenvalues(mixing_matrix: MixingMatrix) -> npt.NDArray[np.float64]:
    return np.array(mixing_matrix.spectrum.eigenvalues, dtype=np.float64)


# --- spectra: closed forms of the textbooks, and networkx's Laplacians ---


@pytest.mark.parametrize("n", range(3, 12))
def test_ring_spectrum(n: int) -> None:
    found = mixing_rules.uniform(topologies.ring(n))
    expected = np.sort((1 + 2 * np.cos(2 * np.pi * np.arange(n) / n)) / 3)[::-1]
    assert eigenvalues(found) == pytest.approx(expected, abs=1e-12)
    assert found.spectrum.lambda_2 == pytest.approx((1 + 2 * np.cos(2 * np.pi / n)) / 3)
    assert found.spectrum.lambda_n == pytest.approx(expected[-1])


@pytest.mark.parametrize("n", range(2, 10))
def test_complete_spectrum(n: int) -> None:
    found = mixing_rules.uniform(topologies.complete(n))
    assert np.array_equal(found.Pi, np.full((n, n), 1 / n))
    assert eigenvalues(found) == pytest.approx([1] + [0] * (n - 1), abs=1e-12)
    assert found.spectrum.gap == pytest.approx(1)


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_hypercube_spectrum(dimension: int) -> None:
    found = mixing_rules.uniform(topologies.hypercube(2**dimension))
    ones = [j.bit_count() for j in range(2**dimension)]
    expected = sorted((1 - 2 * k / (dimension + 1) for k in ones), reverse=True)
    assert eigenvalues(found) == pytest.approx(expected, abs=1e-12)
    # lambda_N = 1 - 2 d/(d+1) is below 0 by more than lambda_2 is above it for d = 1 alone.
    assert found.spectrum.gap == pytest.approx(1 - max(abs(e) for e in expected[1:]))


@pytest.mark.parametrize("n", range(2, 10))
def test_chain_spectrum(n: int) -> None:
    # Path Laplacian 2 - 2 cos(pi k / n); max-degree takes Pi = I - L / (1 + d_max).
    largest = 1 if n == 2 else 2
    expected = 1 - (2 - 2 * np.cos(np.pi * np.arange(n) / n)) / (1 + largest)
    for constructor in (mixing_rules.max_degree, mixing_rules.metropolis):
        found = constructor(topologies.chain(n))
        assert eigenvalues(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("graph", graphs(FAMILIES[:7]), ids=label)
def test_max_degree_is_networkx_laplacian(graph: Graph) -> None:
    n = graph.n
    L = np.diag(graph.degrees) - nx.to_numpy_array(nx.Graph(graph.edges), range(n)) if n > 1 else 0
    expected = np.eye(n) - L / (1 + max(graph.degrees))
    assert mixing_rules.max_degree(graph).Pi == pytest.approx(expected, abs=1e-15)


def test_gap_takes_the_modulus() -> None:
    Pi = np.array([[0.1, 0.9], [0.9, 0.1]])
    spectrum = mixing_rules.from_matrix(Pi, topologies.ring(2)).spectrum
    assert spectrum.lambda_2 == spectrum.lambda_n == pytest.approx(-0.8)
    assert spectrum.gap == pytest.approx(0.2)


def test_one_agent() -> None:
    for constructor in CONSTRUCTORS:
        found = constructor(topologies.ring(1))
        assert found.Pi.tolist() == [[1.0]]
        assert found.row(0) == (1.0, (), ())
        spectrum = found.spectrum
        assert (spectrum.lambda_2, spectrum.lambda_n, spectrum.gap) == (0, 1, 1)
        assert all(condition.holds for condition in found.conditions)
        assert found.remarks == ()
    assert mixing_rules.from_matrix([[1.0]], topologies.ring(1)).Pi.tolist() == [[1.0]]


def test_directed_spectrum_is_by_modulus() -> None:
    Pi = (np.eye(3) + np.roll(np.eye(3), -1, axis=1)) / 2
    ring = Graph.from_edges(3, [(0, 1), (1, 2), (2, 0)], directed=True)
    found = mixing_rules.from_matrix(Pi, ring)
    # Eigenvalues (1 + w)/2 for the cube roots of unity w.
    expected = [1, complex(0.25, np.sqrt(3) / 4), complex(0.25, -np.sqrt(3) / 4)]
    assert found.spectrum.eigenvalues == pytest.approx(expected)
    assert found.spectrum.lambda_2 == found.spectrum.lambda_n == pytest.approx(0.5)
    assert found.spectrum.gap == pytest.approx(0.5)


# --- properties of all constructors on all families ---


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("graph", graphs(FAMILIES), ids=label)
def test_assumption_2(constructor: Callable[[Graph], MixingMatrix], graph: Graph) -> None:
    n = graph.n
    found, message = attempt(lambda: constructor(graph))
    if found is None:
        if constructor is mixing_rules.uniform:
            assert not graph.is_regular
            assert 'use mixing = "metropolis"' in message
        else:
            assert graph.directed
            assert "undirected" in message
        return
    assert_valid(found)
    if constructor is mixing_rules.uniform:
        allowed = graph.adjacency() | np.eye(n, dtype=bool)
        assert np.array_equal(found.Pi, np.where(allowed, 1 / (graph.degrees[0] + 1), 0))
    assert_valid(mixing_rules.lazy(found))


def assert_valid(found: MixingMatrix) -> None:
    Pi, graph, n = found.Pi, found.graph, found.graph.n
    assert Pi.dtype == np.float64
    assert Pi.sum(axis=1) == pytest.approx(np.ones(n), abs=1e-14)
    assert Pi.sum(axis=0) == pytest.approx(np.ones(n), abs=1e-14)
    assert not Pi[~(graph.adjacency() | np.eye(n, dtype=bool))].any()
    assert not np.signbit(Pi).any()
    if not graph.directed:
        assert np.array_equal(Pi, Pi.T)
        assert eigenvalues(found)[0] == pytest.approx(1)
    spectrum = found.spectrum
    others = np.abs(spectrum.eigenvalues[1:])
    assert spectrum.gap == pytest.approx(1 - max(others, default=0))
    assert spectrum.gap > 0
    # Mixing over and over ends at the mean of all, whatever the spectrum says.
    power = np.linalg.matrix_power(Pi, 2**14)
    assert power == pytest.approx(np.full((n, n), 1 / n), abs=1e-9)
    named = {c.name: c.holds for c in found.conditions}
    assert len(named) == 6
    for name, holds in named.items():
        if name == "eigenvalues in [0, 1]":
            assert holds == (not graph.directed and spectrum.lambda_n > -1e-12)
        elif name == "b) symmetric":
            assert holds == np.array_equal(Pi, Pi.T)
        else:
            assert holds, name
    rebuilt = np.zeros((n, n))
    for j in range(n):
        own, sources, weights = found.row(j)
        assert sources == graph.sources[j]
        rebuilt[j, j] = own
        rebuilt[j, list(sources)] = weights
    assert np.array_equal(rebuilt, Pi)


def test_metropolis_by_hand() -> None:
    found = mixing_rules.metropolis(topologies.star(3))
    expected = [[1 / 3, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 0], [1 / 3, 0, 2 / 3]]
    assert found.Pi == pytest.approx(np.array(expected), abs=1e-15)
    # Degrees 1, 2, 2, 1: an edge's weight follows its *larger* degree.
    assert mixing_rules.metropolis(topologies.chain(4)).Pi[0, 1] == pytest.approx(1 / 3)
    diamond = Graph.from_edges(4, [(0, 1), (0, 2), (0, 3), (1, 2)])
    Pi = mixing_rules.metropolis(diamond).Pi
    assert (Pi[0, 3], Pi[1, 2], Pi[1, 1]) == pytest.approx((1 / 4, 1 / 3, 5 / 12))


def test_lazy_is_half_way_to_the_identity() -> None:
    base = mixing_rules.uniform(topologies.ring(6))
    found = mixing_rules.lazy(base)
    assert np.array_equal(found.Pi, (np.eye(6) + base.Pi) / 2)
    assert found.name == "lazy:uniform"
    assert eigenvalues(found) == pytest.approx((1 + eigenvalues(base)) / 2, abs=1e-12)


@st.composite
def symmetric_matrices(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], Graph]:
    """Weights at random on the edges of a connected graph, rows filled up on the diagonal."""
    n = draw(st.integers(2, 7))
    graph = topologies.erdos_renyi(n, 1.0) if draw(st.booleans()) else topologies.chain(n)
    Pi = np.zeros((n, n))
    for a, b in graph.edges:
        if a < b:
            Pi[a, b] = Pi[b, a] = draw(st.floats(0, 1)) / n
    np.fill_diagonal(Pi, 1 - Pi.sum(axis=1))
    return Pi, graph


@given(symmetric_matrices())
def test_from_matrix_takes_what_assumption_2_allows(
    case: tuple[npt.NDArray[np.float64], Graph],
) -> None:
    Pi, graph = case
    found, message = attempt(lambda: mixing_rules.from_matrix(Pi, graph))
    values = np.linalg.eigvalsh(Pi)
    if found is None:
        assert values[-2] > 1 - 1e-8
        assert "never agree" in message
    else:
        assert np.array_equal(found.Pi, Pi)
        assert found.remarks == ()
        assert values[-2] < 1
        assert all(c.holds for c in found.conditions)


@given(symmetric_matrices(), st.data())
def test_digest_sees_every_bit(
    case: tuple[npt.NDArray[np.float64], Graph], data: st.DataObject
) -> None:
    Pi, graph = case
    base = MixingMatrix(Pi, graph, "a")
    assert base.digest == MixingMatrix(Pi.copy(), graph, "b").digest
    j, i = (data.draw(st.integers(0, graph.n - 1)) for _ in range(2))
    other = Pi.copy()
    other[j, i] = np.nextafter(other[j, i], 2)
    assert MixingMatrix(other, graph, "a").digest != base.digest


def test_digest_sees_the_graph_but_not_the_sign_of_zero() -> None:
    Pi = mixing_rules.uniform(topologies.ring(4)).Pi
    fewer = MixingMatrix(Pi, topologies.ring(4), "a")
    more = MixingMatrix(Pi, topologies.complete(4), "a")
    assert fewer.digest != more.digest
    assert MixingMatrix(np.where(Pi == 0, -0.0, Pi), topologies.ring(4), "a").digest == fewer.digest
    assert len(fewer.digest) == 64


def test_pi_is_a_read_only_copy() -> None:
    given = np.full((2, 2), 0.5)
    found = mixing_rules.from_matrix(given, topologies.ring(2))
    given[0, 0] = 7
    assert found.Pi[0, 0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        found.Pi[0, 0] = 1


# --- a matrix of the user's ---

RING3 = topologies.ring(3)
CHAIN3 = topologies.chain(3)
CYCLE3 = Graph.from_edges(3, [(0, 1), (1, 2), (2, 0)], directed=True)
THIRD = 1 / 3


def off(j: int, i: int, value: float, base: float = THIRD) -> npt.NDArray[np.float64]:
    Pi = np.full((3, 3), base)
    Pi[j, i] = value
    return Pi


@pytest.mark.parametrize(
    ("Pi", "graph", "words"),
    [
        (np.eye(2), RING3, ["must be 3 x 3 for 3 agents, got 2 x 2"]),
        (1.0, RING3, ["got a single number"]),
        ([[1, 2], [3]], RING3, ["rows equally long"]),
        ([["a"] * 3] * 3, RING3, ["real numbers"]),
        (np.full((3, 3), THIRD + 0j), RING3, ["real numbers, got dtype complex128"]),
        (off(1, 2, np.nan), RING3, ["Pi[1, 2] is nan", "finite"]),
        (off(1, 2, np.inf), RING3, ["Pi[1, 2] is inf", "finite"]),
        (off(0, 0, THIRD), CHAIN3, ["Pi[0, 2] = 0.333333", "set it to 0 or add the edge"]),
        (off(0, 1, 0.3), RING3, ["Pi[0, 1] = 0.3 but Pi[1, 0]", "make them equal"]),
        (off(1, 1, 0.3), RING3, ["row 1 sums to 0.9666", "correct the weights"]),
        (off(2, 2, 1e308), RING3, ["Pi[2, 2] = 1e+308", "lie in [-1, 1]"]),
        (np.eye(3), RING3, ["null{I - Pi}", "{0}, {1}, {2}", "give more weight"]),
        (
            [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]],
            CHAIN3,
            ["Assumption 2 c", "parts {0, 1}, {2}"],
        ),
        ([[0, 1], [1, 0]], topologies.ring(2), ["lambda_N = -1", "(I + Pi)/2"]),
        ([[1.5, -0.5], [-0.5, 1.5]], topologies.ring(2), ["lie in [-1, 1]"]),
        (
            [[0.6, -0.5, 0.9], [-0.5, 0.6, 0.9], [0.9, 0.9, -0.8]],
            RING3,
            ["largest eigenvalue is 1.1, above 1", "negative"],
        ),
        (
            [[0.5, 0, 0.5], [0.2, 0.8, 0], [0, 0.5, 0.5]],
            CYCLE3,
            ["column 0 sums to 0.7", "mean drifts"],
        ),
        ([[0, 0, 1], [1, 0, 0], [0, 1, 0]], CYCLE3, ["|lambda_2| = 1", "more weight on itself"]),
        (np.eye(3), CYCLE3, ["null{I - Pi}", "{0}, {1}, {2}"]),
        ([[1.5, 0, -0.5], [-0.5, 1.5, 0], [0, -0.5, 1.5]], CYCLE3, ["lie in [0, 1]"]),
        ([[0.5, 0, 0.4], [0.5, 0.5, 0], [0, 0.5, 0.5]], CYCLE3, ["row 0 sums to 0.9"]),
    ],
)
def test_refusals(Pi: npt.ArrayLike, graph: Graph, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        mixing_rules.from_matrix(Pi, graph, "mine")
    message = str(caught.value)
    assert message.startswith("mixing mine")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_authors_ring_carries_erratum_2() -> None:
    # Weights 0.34 on oneself, 0.33 on both neighbours; notes.md gives lambda_N = -0.19.
    ring = topologies.ring(5)
    Pi = 0.33 * ring.adjacency() + 0.34 * np.eye(5)
    found = mixing_rules.from_matrix(Pi, ring, "authors")
    assert found.spectrum.lambda_n == pytest.approx(-0.19, abs=0.005)
    (remark,) = found.remarks
    assert "admits no positive step size" in remark
    assert "lazy:authors" in remark
    assert mixing_rules.lazy(found).remarks == ()
    conditions = {c.name: c for c in found.conditions}
    assert not conditions["eigenvalues in [0, 1]"].holds
    assert conditions["d) I >= Pi > -I"].holds
    assert mixing_rules.uniform(topologies.complete(5)).remarks == ()


def test_few_digits_are_repaired_and_remarked() -> None:
    Pi = np.full((3, 3), np.float32(1 / 3))
    Pi[0, 1] += np.float32(1e-7)
    found = mixing_rules.from_matrix(Pi, RING3)
    assert np.array_equal(found.Pi, found.Pi.T)
    assert found.Pi.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-15)
    assert "made exactly symmetric" in found.remarks[0]
    exact = np.full((3, 3), 1 / 3)
    assert np.array_equal(mixing_rules.from_matrix(exact, RING3).Pi, exact)
    with pytest.raises(UserError, match="more digits"):
        mixing_rules.from_matrix(np.full((3, 3), 0.3333), RING3)


def test_negative_weights_are_allowed_and_remarked() -> None:
    # Pi = I - L with the edges' weights -0.1, 0.3, 0.3: x^T L x > 0 but for x along 1.
    Pi = [[0.8, -0.1, 0.3], [-0.1, 0.8, 0.3], [0.3, 0.3, 0.4]]
    found = mixing_rules.from_matrix(Pi, RING3)
    (remark,) = found.remarks
    assert "negative weight Pi[0, 1] = -0.1" in remark


def test_zero_weight_on_an_edge_is_kept() -> None:
    Pi = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    assert mixing_rules.from_matrix(Pi, RING3).row(0) == (0.5, (1, 2), (0.5, 0.0))


def test_directed_doubly_stochastic_is_remarked() -> None:
    found = mixing_rules.uniform(topologies.exponential(6))
    (remark,) = found.remarks
    assert "theorems" in remark
    assert "do not cover it" in remark
    lopsided = Graph.from_edges(3, [(0, 1), (0, 2), (1, 0), (2, 1)], directed=True)
    with pytest.raises(UserError, match="agent 0 reads 1 and is read by 2"):
        mixing_rules.max_degree(lopsided)
    with pytest.raises(UserError, match="degrees from 1 to 2: make them equal"):
        mixing_rules.uniform(lopsided)
    # Unequal degrees, but as many in as out: doubly stochastic on the diagonal.
    edges = [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert_valid(mixing_rules.max_degree(Graph.from_edges(3, edges, directed=True)))


@settings(max_examples=200)
@given(st.integers(1, 4), st.data())
def test_any_matrix_is_valid_or_a_user_error(n: int, data: st.DataObject) -> None:
    number = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1 / n, -0.5]), st.floats(width=64))
    Pi = data.draw(st.lists(st.lists(number, min_size=n, max_size=n), min_size=n, max_size=n))
    directed = data.draw(st.booleans())
    graph = topologies.exponential(n) if directed else topologies.complete(n)
    found, message = attempt(lambda: mixing_rules.from_matrix(Pi, graph))
    if found is None:
        assert message
        assert "\n" not in message
    else:
        power = np.linalg.matrix_power(found.Pi, 2**14)
        assert found.spectrum.gap < 1e-3 or power == pytest.approx(np.full((n, n), 1 / n))

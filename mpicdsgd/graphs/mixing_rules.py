"""Constructors of mixing matrices: the usual ones, and any matrix of the user's, checked.

Notation, Assumption 2 and ``MixingMatrix`` itself stand in ``mixing_matrix.py``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import shorten
from mpicdsgd.graphs.graph import Graph, connected_parts
from mpicdsgd.graphs.mixing_matrix import (
    COLUMN,
    DOUBLY,
    EXACT,
    Condition,
    Matrix,
    MixingMatrix,
    Spectrum,
)

__all__ = [
    "Condition",
    "MixingMatrix",
    "Spectrum",
    "from_matrix",
    "lazy",
    "max_degree",
    "metropolis",
    "out_degree",
    "uniform",
]

# Weights in files are rounded: up to here the rounding is repaired, beyond it is a mistake.
GIVEN = 1e-6
# Below this a matrix is used as given: it is the rounding of float64 sums.
FLOAT64 = 1e-12


def uniform(graph: Graph) -> MixingMatrix:
    """1 / (degree + 1) to oneself and to each neighbour; 1 / N on the complete graph.

    Raises UserError for a graph that is not regular: the columns would not sum to 1.
    """
    if not graph.is_regular:
        # Not regular can also mean: all read equally many, but are not read by as many.
        degrees = sorted({*graph.degrees, *(len(d) for d in graph.destinations)})
        remedy = "make them equal" if graph.directed else 'use mixing = "metropolis"'
        raise UserError(
            f"mixing uniform needs a regular graph, but {graph.title} has degrees from "
            f"{degrees[0]} to {degrees[-1]}: {remedy}"
        )
    weight = 1.0 / (graph.degrees[0] + 1)
    Pi = np.where(graph.adjacency() | np.eye(graph.n, dtype=np.bool_), weight, 0.0)
    return MixingMatrix(Pi, graph, "uniform")


def metropolis(graph: Graph) -> MixingMatrix:
    """Metropolis-Hastings: 1 / (1 + max(degree_j, degree_l)) on an edge, the rest to oneself.

    Raises UserError for a directed graph. Source: Xiao, Boyd 2004.
    """
    if graph.directed:
        raise UserError(
            f"mixing metropolis needs an undirected graph, but {graph.title} is directed: "
            f'use mixing = "uniform" (equal degrees in and out), "one-peer" (on expo, by turns) '
            f"or a doubly stochastic matrix from a file"
        )
    degrees = np.array(graph.degrees)
    larger = np.maximum(degrees[:, np.newaxis], degrees[np.newaxis, :])
    return MixingMatrix(_rest_to_self(graph.adjacency() / (1.0 + larger)), graph, "metropolis")


def max_degree(graph: Graph) -> MixingMatrix:
    """1 / (1 + the largest degree) on every edge, the rest to oneself.

    Raises UserError for a directed graph where an agent reads more or fewer than read it.
    """
    for j, (reads, read_by) in enumerate(zip(graph.sources, graph.destinations, strict=True)):
        if len(reads) != len(read_by):
            raise UserError(
                f"mixing max-degree needs a graph in which every agent reads as many as read it, "
                f"but in {graph.title} agent {j} reads {len(reads)} and is read by "
                f"{len(read_by)}: balance the edges, or give a doubly stochastic matrix in a file"
            )
    Pi = graph.adjacency() / (1.0 + max(graph.degrees))
    return MixingMatrix(_rest_to_self(Pi), graph, "max-degree")


def out_degree(graph: Graph) -> MixingMatrix:
    """P[j, l] = 1 / (1 + number of agents that read l): column-stochastic, on any directed graph.

    Each agent divides what it has evenly among itself and who reads it. By such weights only
    push-sum finds the agents' mean, unless the graph is regular. Source: arXiv 1811.10792.
    """
    readers = np.array([len(d) for d in graph.destinations])
    P = (graph.adjacency() | np.eye(graph.n, dtype=np.bool_)) / (1.0 + readers)[np.newaxis, :]
    return MixingMatrix(P, graph, "out-degree", stochastic=_kind(P))


def _kind(P: Matrix) -> str:
    return DOUBLY if np.abs(P.sum(axis=1) - 1).max() <= EXACT else COLUMN


def lazy(mixing: MixingMatrix) -> MixingMatrix:
    """(I + Pi) / 2: the same graph, all eigenvalues moved half way to 1, so none below 0."""
    Pi = (np.eye(mixing.graph.n) + mixing.Pi) / 2
    name = f"lazy:{mixing.name}"
    return MixingMatrix(Pi, mixing.graph, name, mixing.changes, mixing.stochastic)


def _rest_to_self(Pi: Matrix) -> Matrix:
    """``Pi`` with the diagonal that makes every row sum to 1."""
    np.fill_diagonal(Pi, 0.0)
    np.fill_diagonal(Pi, 1.0 - Pi.sum(axis=1))
    return Pi


def from_matrix(Pi: npt.ArrayLike, graph: Graph, name: str = "custom") -> MixingMatrix:
    """A matrix of the user's own, checked against Assumption 2.

    On an undirected graph, a matrix whose symmetry and row sums are off by no more than ``GIVEN``
    (weights written with few digits, or float32) is made symmetric, and its rows made to sum to 1
    on the diagonal; ``remarks`` says so. On a directed graph rows *and* columns must sum to 1, and
    there is no such repair.

    Args:
        Pi: real, shape (N, N); Pi[j, l] is the weight that agent j gives to agent l's parameters.
        graph: who reads whom.
        name: how messages call the matrix.

    Raises:
        UserError: naming the first condition that fails, where it fails, and what to do.
    """
    title = f"mixing {name}"
    repaired, changes = checked(Pi, graph, title)
    mixing = MixingMatrix(repaired, graph, name, changes)
    _check_spectrum(mixing, title)
    return mixing


def checked(Pi: npt.ArrayLike, graph: Graph, title: str) -> tuple[Matrix, tuple[str, ...]]:
    """``Pi`` as `from_matrix` takes it, but for the spectrum, and what was changed in it.

    Raises UserError: entries off the edges or out of range, not symmetric, wrong sums.
    """
    given = _as_real(Pi, graph.n, title)
    _check_entries(given, graph, title)
    if graph.directed:
        for axis, line in ((1, "row"), (0, "column")):
            _check_sums(given, axis, line, EXACT, title)
        return given, ()
    skew = np.abs(given - given.T)
    if skew.max() > GIVEN:
        j, i = _first(skew > GIVEN)
        raise UserError(
            f"{title} is not symmetric: Pi[{j}, {i}] = {given[j, i]:.9g} but Pi[{i}, {j}] = "
            f"{given[i, j]:.9g}: make them equal (Assumption 2 b), or give a directed graph"
        )
    _check_sums(given, 1, "row", GIVEN, title)
    repaired = (given + given.T) / 2
    np.fill_diagonal(repaired, 0.0)
    np.fill_diagonal(repaired, 1.0 - repaired.sum(axis=1))
    change = float(np.abs(repaired - given).max())
    if change > FLOAT64:
        return repaired, (
            f"{title}: made exactly symmetric with row sums 1, by at most {change:.1g}",
        )
    return given, ()


def _as_real(Pi: npt.ArrayLike, n: int, title: str) -> Matrix:
    try:
        given = np.asarray(Pi)
    except (TypeError, ValueError):
        raise UserError(f"{title}: Pi must be a matrix, its rows equally long") from None
    if given.dtype.kind not in "biuf":
        raise UserError(f"{title}: Pi must hold real numbers, got dtype {given.dtype}")
    if given.shape != (n, n):
        shape = " x ".join(map(str, given.shape)) or "a single number"
        raise UserError(f"{title}: Pi must be {n} x {n} for {n} agents, got {shape}")
    with np.errstate(over="ignore"):  # a longdouble beyond float64 becomes inf, and is refused so
        return given.astype(np.float64)


def _check_entries(Pi: Matrix, graph: Graph, title: str) -> None:
    """Finite, on the edges, and no larger than the conditions on the spectrum allow at all."""
    if not np.isfinite(Pi).all():
        j, i = _first(~np.isfinite(Pi))
        raise UserError(f"{title}: Pi[{j}, {i}] is {Pi[j, i]}: every weight must be finite")
    outside = (Pi != 0) & ~graph.adjacency() & ~np.eye(graph.n, dtype=np.bool_)
    if outside.any():
        j, i = _first(outside)
        raise UserError(
            f"{title}: Pi[{j}, {i}] = {Pi[j, i]:.6g}, but agent {j} does not read agent {i} in "
            f"{graph.title} (Assumption 2 a): set it to 0 or add the edge"
        )
    # |Pi[j, l]| <= ||Pi||_2 = max |lambda_i| where Pi is symmetric. Checked here, since what is
    # larger could overflow in the sums.
    lowest = 0.0 if graph.directed else -1.0
    wrong = (Pi > 1 + GIVEN) | (Pi < lowest - (0 if graph.directed else GIVEN))
    if wrong.any():
        j, i = _first(wrong)
        raise UserError(
            f"{title}: Pi[{j}, {i}] = {Pi[j, i]:.6g}: weights on "
            f"{'a directed' if graph.directed else 'an undirected'} graph lie in [{lowest:g}, 1]"
        )


def _check_sums(Pi: Matrix, axis: int, line: str, tolerance: float, title: str) -> None:
    sums = Pi.sum(axis=axis)
    wrong = np.flatnonzero(np.abs(sums - 1) > tolerance)
    if not len(wrong):
        return
    k = int(wrong[0])
    why = (
        "the agents' mean drifts unless Pi is doubly stochastic: choose weights whose columns sum "
        "to 1 too"
        if line == "column"
        else "rows must sum to 1: correct the weights, or write them with more digits"
    )
    raise UserError(f"{title}: {line} {k} sums to {sums[k]:.12g}: {why}")


def _check_spectrum(mixing: MixingMatrix, title: str) -> None:
    """Assumption 2 c) and d). Raises UserError."""
    graph, spectrum = mixing.graph, mixing.spectrum
    l1, l2, ln = abs(spectrum.eigenvalues[0]), spectrum.lambda_2, spectrum.lambda_n
    if l1 > 1 + EXACT:
        raise UserError(
            f"{title}: its largest eigenvalue is {l1:.6g}, above 1 (Assumption 2 d), so the agents "
            f"diverge: use smaller negative weights, or none"
        )
    weighted = tuple(tuple(i for i in s if mixing.Pi[j, i]) for j, s in enumerate(graph.sources))
    parts = connected_parts(Graph(graph.n, weighted, graph.directed))
    if l2 >= 1 - EXACT and (len(parts) > 1 or not graph.directed):
        listed = shorten([f"{{{shorten(part)}}}" for part in parts])
        where = f"edges between the parts {listed}" if len(parts) > 1 else "the edges"
        raise UserError(
            f"{title}: null{{I - Pi}} is larger than span{{1}} (lambda_2 = {l2:.6g}, Assumption 2 "
            f"c), so the agents never agree: give more weight to {where}"
        )
    if l2 >= 1 - EXACT or (not graph.directed and ln <= -1 + EXACT):
        which = f"|lambda_2| = {l2:.6g}" if graph.directed else f"lambda_N = {ln:.6g}"
        raise UserError(
            f"{title}: {which} (Assumption 2 d), so the agents swing and never agree: give each "
            f"agent more weight on itself, for instance (I + Pi)/2"
        )


def _first(where: npt.NDArray[np.bool_]) -> tuple[int, int]:
    j, i = np.argwhere(where)[0]
    return int(j), int(i)

"""Mixing matrices used in turn, so that who reads whom changes from mixing to mixing.

    Pi_0 ... Pi_(M-1)   the turns; mixing k (from 0) uses Pi_(k mod M)
    k                   with tau mixing rounds in each step, round r of step s is k = s tau + r
    P                   the product Pi_(M-1) ... Pi_0: what a whole cycle does to the parameters

Every turn is doubly stochastic, so each keeps the agents' mean; a single one need not be connected.
What agrees them is the product, whose gap is checked. A ``MixingMatrix`` is a cycle of one turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import networkx as nx
import numpy as np
import numpy.typing as npt

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_matrix import (
    COLUMN,
    DOUBLY,
    EXACT,
    Condition,
    Matrix,
    MixingMatrix,
    Spectrum,
)
from mpicdsgd.graphs.mixing_rules import checked, lazy
from mpicdsgd.graphs.topologies import exponential

__all__ = [
    "Mixing",
    "MixingCycle",
    "alternating_matchings",
    "lazy_cycle",
    "mixing_cycle",
    "one_peer_exponential",
    "one_peer_on",
]


@dataclass(frozen=True, eq=False)
class MixingCycle:
    """See the module. Made by ``mixing_cycle`` and by the constructors below it.

    Attributes:
        turns: the matrices, each on the graph of its own weights.
        graph: the union of their graphs, (strongly) connected: all who ever read each other.
        name: how messages and records call it.
    """

    turns: tuple[MixingMatrix, ...]
    graph: Graph
    name: str

    @cached_property
    def product(self) -> MixingMatrix:
        """P, float64, shape (N, N)."""
        P = reduce(lambda product, turn: turn.Pi @ product, self.turns, np.eye(self.graph.n))
        n = self.graph.n
        everybody = tuple(tuple(i for i in range(n) if i != j) for j in range(n))
        return MixingMatrix(P, Graph(n, everybody, directed=True), f"product of {self.name}")

    @property
    def spectrum(self) -> Spectrum:
        """The product's, as of a directed graph's matrix: its gap is a whole cycle's."""
        return self.product.spectrum

    @property
    def stochastic(self) -> str:
        """DOUBLY where all turns are, else COLUMN."""
        return DOUBLY if all(turn.stochastic == DOUBLY for turn in self.turns) else COLUMN

    @property
    def gap_per_turn(self) -> float:
        """1 - |lambda_2(P)|^(1/M), to be compared with a single matrix's gap."""
        # What is left by rounding of a product that averages exactly would look slow by its root.
        lambda_2 = self.spectrum.lambda_2
        return 1.0 - float((lambda_2 if lambda_2 > EXACT else 0.0) ** (1.0 / len(self.turns)))

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """What is asked of the turns and of their product."""
        outside, rows, columns, skew = 0, 0.0, 0.0, 0.0
        allowed = self.graph.adjacency() | np.eye(self.graph.n, dtype=np.bool_)
        for Pi in (turn.Pi for turn in self.turns):
            outside += int(np.count_nonzero(Pi[~allowed]))
            rows = max(rows, float(np.abs(Pi.sum(axis=1) - 1).max()))
            columns = max(columns, float(np.abs(Pi.sum(axis=0) - 1).max()))
            skew = max(skew, float(np.abs(Pi - Pi.T).max()))
        l2, gap = self.spectrum.lambda_2, self.spectrum.gap
        return (
            Condition("a) support on the edges", outside == 0, f"{outside} weights off the edges"),
            Condition("b) every turn symmetric", skew <= EXACT, f"max |Pi - Pi^T| = {skew:.3g}"),
            Condition(
                "every turn doubly stochastic",
                max(rows, columns) <= EXACT,
                f"max |row sum - 1| = {rows:.1g}, max |column sum - 1| = {columns:.1g}",
            ),
            Condition(
                "c) the product agrees all agents",
                l2 < 1 - EXACT,
                f"|lambda_2| = {l2:.6g}, gap {gap:.6g} in {len(self.turns)} turns",
            ),
        )

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """Warnings, a line each, for the caller to log once."""
        changes = tuple(change for turn in self.turns for change in turn.changes)
        if len(self.turns) == 1:
            return self.turns[0].remarks
        return (
            *changes,
            f"mixing {self.name}: {len(self.turns)} matrices are used in turn; each keeps the "
            f"agents' mean, but the paper's theorems take the same Pi in every step",
        )

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, of every turn's graph and bits: equal on all ranks of a run."""
        return hashlib.sha256(" ".join(turn.digest for turn in self.turns).encode()).hexdigest()


Mixing = MixingMatrix | MixingCycle


def mixing_cycle(
    matrices: Sequence[npt.ArrayLike], graph: Graph, name: str = "cycle"
) -> MixingCycle:
    """Matrices of the user's own, used in turn.

    Each is checked (and repaired) as ``from_matrix`` does it, but for its spectrum.

    Args:
        matrices: real, shape (N, N) each; Pi[j, l] is the weight that agent j gives to agent l's.
        graph: who may read whom; undirected: the matrices are symmetric.
        name: how messages call it.

    Raises:
        UserError: no matrix; a weight off the edges; wrong sums; a union of the turns' edges that
            is not connected; a product that never agrees the agents.
    """
    if not len(matrices):
        raise UserError(f"mixing {name} needs at least one matrix")
    turns = []
    for k, given in enumerate(matrices):
        title = f"{name}, turn {k}"
        Pi, changes = checked(given, graph, f"mixing {title}")
        near = (Pi != 0) & ~np.eye(graph.n, dtype=np.bool_)
        sources = tuple(tuple(np.flatnonzero(row).tolist()) for row in near)
        turns.append(MixingMatrix(Pi, Graph(graph.n, sources, graph.directed), title, changes))
    edges = sorted({edge for turn in turns for edge in turn.graph.edges})
    pairs = edges if graph.directed else [(a, b) for a, b in edges if a < b]
    union = Graph.from_edges(graph.n, pairs, directed=graph.directed, name=graph.name)
    made = MixingCycle(tuple(turns), union, name)
    if made.spectrum.lambda_2 >= 1 - EXACT:
        raise UserError(
            f"mixing {name}: the product of its {len(turns)} matrices has |lambda_2| = "
            f"{made.spectrum.lambda_2:.6g}, so the agents never agree: give each agent more weight "
            f"on itself, for instance (I + Pi)/2"
        )
    return made


def one_peer_exponential(n: int) -> MixingCycle:
    """In turn i agent j averages with agent j - 2**i mod n: one sends, one receives, i = 0 to m-1.

    Where n = 2**m the parameters of all agents are equal after m turns, whatever they were.
    Raises UserError for n < 1. Source: Ying et al. 2021, arXiv 2110.13363.
    """
    graph = exponential(n)
    eye = np.eye(n)
    hops = [1 << i for i in range((n - 1).bit_length())]
    matrices = [(eye + np.roll(eye, hop, axis=0)) / 2 for hop in hops]
    return mixing_cycle(matrices or [eye], graph, "one-peer")


def one_peer_on(graph: Graph) -> MixingCycle:
    """``one_peer_exponential`` on the graph of that family. Raises UserError for another."""
    if graph.sources != exponential(graph.n).sources:
        raise UserError(
            f'mixing one-peer needs topology = "expo", whose edges it uses in turn, got '
            f'{graph.title}: for others use mixing = "matchings"'
        )
    return one_peer_exponential(graph.n)


def alternating_matchings(graph: Graph) -> MixingCycle:
    """The edges of ``graph`` in matchings, used in turn: each pair of a matching averages.

    An edge colouring by networkx (DSATUR on the line graph): two turns on an even ring.

    Raises:
        UserError: a directed graph.
    """
    if graph.directed:
        raise UserError(
            f"mixing matchings needs an undirected graph, but {graph.title} is directed: "
            f'for topology = "expo" use mixing = "one-peer"'
        )
    G = nx.Graph((a, b) for a, b in graph.edges if a < b)
    colours = nx.greedy_color(nx.line_graph(G), strategy="DSATUR")
    matrices: list[Matrix] = [np.eye(graph.n) for _ in range(1 + max(colours.values(), default=0))]
    for (a, b), colour in colours.items():
        matrices[colour][np.ix_([a, b], [a, b])] = 0.5
    return mixing_cycle(matrices, graph, "matchings")


def lazy_cycle(mixing: Mixing) -> Mixing:
    """(I + Pi) / 2 for each turn."""
    if isinstance(mixing, MixingMatrix):
        return lazy(mixing)
    matrices = [lazy(turn).Pi for turn in mixing.turns]
    return mixing_cycle(matrices, mixing.graph, f"lazy:{mixing.name}")


def covered(mixing: Mixing) -> bool:
    """Whether the paper's theorems speak of it: one symmetric Pi for all steps."""
    return len(mixing.turns) == 1 and not mixing.turns[0].graph.directed

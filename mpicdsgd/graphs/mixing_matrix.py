"""``MixingMatrix``: weights on a graph, their spectrum, and what the paper assumes of them.

    Pi    float64 (N, N); Pi[j, l]: the weight that agent j gives to agent l's parameters
    N     number of agents
    Assumption 2 (arXiv 1706.07880): a) Pi[j, l] = 0 where j does not read l; b) Pi symmetric;
          c) null{I - Pi} = span{1}; d) I >= Pi > -I

The paper goes on from there to eigenvalues in [0, 1], which a) to d) do not give: that is a further
condition here, and a matrix that fails it carries a remark. The constructors: ``mixing_rules.py``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mpicdsgd.graphs.graph import Graph

Matrix = npt.NDArray[np.float64]

# What is taken for exact: sums, symmetry, eigenvalues. A ring's gap falls below it at N = 1e5.
EXACT = 1e-9

DOUBLY, COLUMN = "doubly stochastic", "column-stochastic"


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of Pi.

    Undirected graph: real, descending; ``lambda_2`` and ``lambda_n`` are the second largest and the
    smallest. Directed graph: complex, by descending modulus; ``lambda_2`` and ``lambda_n`` are the
    second largest and the smallest *modulus*. One agent: lambda_2 = 0 (there is nothing left to
    agree on), lambda_n = 1, gap = 1.

    Attributes:
        eigenvalues: all N of them.
        lambda_2: see above.
        lambda_n: see above.
        gap: 1 - max over i >= 2 of |lambda_i|.
    """

    eigenvalues: tuple[float, ...] | tuple[complex, ...]
    lambda_2: float
    lambda_n: float
    gap: float


@dataclass(frozen=True)
class Condition:
    """One condition on Pi: its name, whether it holds, and the figures that say so."""

    name: str
    holds: bool
    detail: str


@dataclass(frozen=True, eq=False)
class MixingMatrix:
    """A weight matrix on a graph. Made by ``uniform``, ``metropolis``, ``from_matrix``, ...

    Compare two by ``digest``.

    Attributes:
        Pi: float64, shape (N, N), read-only; columns sum to 1, and rows unless it is COLUMN.
        graph: who reads whom; Pi is 0 off its edges. A weight of 0 on an edge is kept.
        name: how messages and records call it.
        changes: what was changed in the matrix as given; part of ``remarks``.
        stochastic: DOUBLY, or COLUMN: then only push-sum finds the mean by it.
    """

    Pi: Matrix
    graph: Graph
    name: str
    changes: tuple[str, ...] = ()
    stochastic: str = DOUBLY

    def __post_init__(self) -> None:
        n = self.graph.n
        assert self.Pi.shape == (n, n), "Pi is N by N"
        # A copy, so that the caller's array cannot change it; + 0.0 turns -0.0 into 0.0, which
        # would otherwise give equal matrices unequal digests.
        Pi = np.array(self.Pi, dtype=np.float64, order="C") + 0.0
        Pi.setflags(write=False)
        object.__setattr__(self, "Pi", Pi)

    @property
    def turns(self) -> tuple[MixingMatrix, ...]:
        """The matrices that are used in turn, as `mixing_cycle.MixingCycle` has them: this one."""
        return (self,)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The eigenvalues of Pi, in O(N^3) when first asked for."""
        eigenvalues: tuple[float, ...] | tuple[complex, ...]
        if self.graph.directed:
            values = np.linalg.eigvals(self.Pi).astype(np.complex128)
            # Rounded, so that the order of a conjugate pair is not left to the last bit.
            order = np.lexsort((-values.imag, -values.real.round(12), -np.abs(values).round(12)))
            eigenvalues = tuple(complex(v) for v in values[order])
            ranked = [abs(v) for v in eigenvalues]
        else:
            ranked = [float(v) for v in np.linalg.eigvalsh(self.Pi)[::-1]]
            eigenvalues = tuple(ranked)
        if len(ranked) == 1:
            return Spectrum(eigenvalues, lambda_2=0.0, lambda_n=ranked[0], gap=1.0)
        gap = 1.0 - max(abs(v) for v in ranked[1:])
        return Spectrum(eigenvalues, lambda_2=ranked[1], lambda_n=ranked[-1], gap=gap)

    @property
    def gap_per_turn(self) -> float:
        """The gap; ``graphs.mixing_cycle.MixingCycle`` says what it is for several."""
        return self.spectrum.gap

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """Assumption 2 a) to d), the row sums, and the stricter spectrum that the paper uses."""
        Pi, spectrum, directed = self.Pi, self.spectrum, self.graph.directed
        allowed = self.graph.adjacency() | np.eye(self.graph.n, dtype=np.bool_)
        outside = int(np.count_nonzero(Pi[~allowed]))
        skew = float(np.abs(Pi - Pi.T).max())
        rows = float(np.abs(Pi.sum(axis=1) - 1).max())
        columns = float(np.abs(Pi.sum(axis=0) - 1).max())
        l2, ln, gap = spectrum.lambda_2, spectrum.lambda_n, spectrum.gap
        l1 = abs(spectrum.eigenvalues[0])
        if directed:
            first, bounds = "|lambda_2|", f"|lambda_i| <= {l2:.6g} for i >= 2"
            inside, positive = l2 < 1 - EXACT, False
            stricter = "a directed graph's may be complex"
        else:
            first, bounds = "lambda_2", f"lambda_1 = {l1:.6g}, lambda_N = {ln:.6g}"
            inside, positive = ln > -1 + EXACT and l1 <= 1 + EXACT, ln >= -EXACT
            stricter = f"lambda_N = {ln:.6g}"
        return (
            Condition("a) support on the edges", outside == 0, f"{outside} weights off the edges"),
            Condition(
                "b) symmetric",
                skew <= EXACT,
                f"max |Pi - Pi^T| = {skew:.3g}"
                + (f", doubly stochastic to {max(rows, columns):.1g}" if directed else ""),
            ),
            Condition(
                "c) null{I - Pi} = span{1}", l2 < 1 - EXACT, f"{first} = {l2:.6g}, gap {gap:.6g}"
            ),
            Condition("d) I >= Pi > -I", inside, bounds),
            Condition("rows sum to 1", rows <= EXACT, f"max |row sum - 1| = {rows:.1g}"),
            Condition("eigenvalues in [0, 1]", positive, stricter),
        )

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """Warnings, a line each, for the caller to log once."""
        found = list(self.changes)
        if self.stochastic == COLUMN:
            found.append(
                f"mixing {self.name}: {self.graph.title}: the columns of Pi sum to 1 and its rows "
                f"do not: only push-sum finds the agents' mean by it, and the paper's theorems "
                f"(Assumption 2 b) do not cover it"
            )
        elif self.graph.directed:
            found.append(
                f"mixing {self.name}: {self.graph.title} is directed: Pi is doubly "
                f"stochastic and keeps the mean, but the paper's theorems ask for undirected edges "
                f"(Assumption 2 b) and do not cover it"
            )
        elif self.spectrum.lambda_n < -EXACT:
            found.append(
                f"mixing {self.name}: lambda_N = {self.spectrum.lambda_n:.6g} < 0: the agents "
                f"still reach consensus, but the paper's theorems take eigenvalues in [0, 1], and "
                f"its condition (15) (with zeta_1 = Q_m = 1) admits no positive step size; "
                f"lazy:{self.name} has none below 0"
            )
        negative = np.argwhere(self.Pi < 0)
        if len(negative):
            j, i = (int(index) for index in negative[0])
            found.append(
                f"mixing {self.name}: negative weight Pi[{j}, {i}] = {self.Pi[j, i]:.6g}: "
                f"Assumption 2 allows it, but x_j is then no average of its neighbourhood and can "
                f"leave its range"
            )
        return tuple(found)

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, of the graph and every bit of Pi: equal on all ranks of a run."""
        parts = hashlib.sha256(f"{self.graph.n} {self.graph.directed} ".encode())
        parts.update(f"{self.graph.edges} ".encode())
        parts.update(self.Pi.astype("<f8").tobytes())
        return parts.hexdigest()

    def row(self, j: int) -> tuple[float, tuple[int, ...], tuple[float, ...]]:
        """Agent j's own weight Pi[j, j], its sources in agent order, and their weights."""
        assert 0 <= j < self.graph.n
        sources = self.graph.sources[j]
        return float(self.Pi[j, j]), sources, tuple(float(self.Pi[j, i]) for i in sources)


def powered(spectrum: Spectrum, rounds: int) -> Spectrum:
    """Of Pi^rounds, symmetric Pi: so many mixing rounds in a step are one with that matrix."""
    if rounds == 1 or len(spectrum.eigenvalues) == 1:
        return spectrum
    first, *others = (float(np.real(value)) for value in spectrum.eigenvalues)
    ranked = sorted((value**rounds for value in others), reverse=True)
    gap = 1.0 - max(abs(value) for value in ranked)
    return Spectrum((first**rounds, *ranked), ranked[0], ranked[-1], gap)

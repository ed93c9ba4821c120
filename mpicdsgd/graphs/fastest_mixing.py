"""The fastest mixing weights of a graph: a symmetric Pi >= 0 with the largest gap.

    w    float64 (M,): the weight of each undirected edge, at least 0
    B    (M, N): row e has 1 at one end of edge e and -1 at the other; J = 1 1^T / N
    Pi   I - B^T diag(w) B, its diagonal at least 0
    s    a bound on max(|lambda_2|, |lambda_N|), the largest modulus of an eigenvalue of Pi - J

It is a semidefinite programme: minimise s where -s I <= Pi - J <= s I. Solved here by Newton steps
on t s plus a logarithmic barrier, which at its minimum is no more than (barrier's terms) / t above
the optimum; t grows until that is `GAP`. An edge's matrix is of rank one, so the barrier's
derivatives are entries of B A^-1 B^T and their squares.

Source: Boyd, Diaconis, Xiao 2004, Fastest mixing Markov chain on a graph, (6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_matrix import Matrix, MixingMatrix
from mpicdsgd.graphs.mixing_rules import metropolis

__all__ = ["GAP", "MAX_AGENTS", "MAX_EDGES", "fastest"]

# How far above the optimum the largest modulus may be.
GAP = 1e-9
# A Newton step takes M^3 operations, and N^3 for the eigenvalues: above this, minutes in all.
MAX_EDGES = 2100
MAX_AGENTS = 600

_GROWTH = 10.0  # more of it ends nearer the border, and takes longer
_CENTRED = 1e-3  # squared Newton decrement at which the barrier counts as minimised
_NEARER = 0.05  # of its distance from the border is what a step leaves at least
_MAX_STEPS = 200  # Newton steps for one t: some ten are usual

Vector = npt.NDArray[np.float64]


def fastest(graph: Graph) -> MixingMatrix:
    """The weights that mix fastest, of all symmetric Pi >= 0 on ``graph``.

    max(|lambda_2|, |lambda_N|) is within `GAP` of the least possible, or where float64 ends before,
    within some 1e-7; never above that of ``metropolis`` by more than `GAP`. Several matrices can be
    fastest: this is one of them, the same for the same graph up to rounding.

    Raises:
        UserError: a directed graph, or one of more than `MAX_EDGES` edges or `MAX_AGENTS` agents.

    Source: Boyd, Diaconis, Xiao 2004.
    """
    if graph.directed:
        raise UserError(
            f"mixing fastest needs an undirected graph, but {graph.title} is directed: "
            f'use mixing = "uniform" (equal degrees in and out), "one-peer" (on expo, by turns) '
            f"or a doubly stochastic matrix from a file"
        )
    pairs = [(a, b) for a, b in graph.edges if a < b]
    if len(pairs) > MAX_EDGES or graph.n > MAX_AGENTS:
        raise UserError(
            f"mixing fastest takes at most {MAX_EDGES} edges and {MAX_AGENTS} agents, but "
            f'{graph.title} has {len(pairs)} and {graph.n}: use mixing = "metropolis"'
        )
    usual = metropolis(graph)
    if not pairs:
        return MixingMatrix(usual.Pi, graph, "fastest")
    ends = np.array(pairs)
    edges = _Edges(graph.n, ends[:, 0], ends[:, 1])
    start = usual.Pi[edges.a, edges.b]
    # Where the constant weight is fastest (edge-transitive graphs), it is so exactly.
    constant = np.full(len(pairs), edges.best_constant())
    found = edges.minimise(start) if edges.modulus(constant) > GAP else constant
    # On an optimum's border the barrier leaves weights near 0: gone, unless that costs anything.
    cleared = np.where(found < GAP, 0.0, found)
    # The first of those that are equally good, and rounding does not decide.
    candidates = [constant, start, cleared, found]
    moduli = [edges.modulus(w) for w in candidates]
    chosen = next(w for w, m in zip(candidates, moduli, strict=True) if m <= min(moduli) + GAP)
    return MixingMatrix(edges.matrix(chosen), graph, "fastest")


@dataclass(frozen=True)
class _Point:
    """A strictly feasible (w, s), with what all derivatives are made of."""

    w: Vector
    s: float
    own: Vector  # the diagonal of Pi
    eigenvalues: Vector  # of Pi - J
    vectors: Matrix

    def slacks(self) -> Vector:
        """All that must be positive: the barrier is the sum of their -log."""
        both = (self.s - self.eigenvalues, self.s + self.eigenvalues)
        return np.concatenate([*both, self.w, self.own])


@dataclass(frozen=True)
class _Edges:
    """Edge e joins agents a[e] and b[e] of n."""

    n: int
    a: npt.NDArray[np.intp]
    b: npt.NDArray[np.intp]

    def matrix(self, w: Vector) -> Matrix:
        """Pi of the weights ``w``; rounding leaves no diagonal below 0."""
        Pi = np.zeros((self.n, self.n))
        Pi[self.a, self.b] = Pi[self.b, self.a] = w
        np.fill_diagonal(Pi, np.maximum(1.0 - Pi.sum(axis=1), 0.0))
        return Pi

    def modulus(self, w: Vector) -> float:
        """max(|lambda_2|, |lambda_N|)."""
        values = np.linalg.eigvalsh(self.matrix(w) - 1.0 / self.n)
        return float(np.abs(values).max())

    def best_constant(self) -> float:
        """The fastest of all weights that are equal: by the Laplacian's eigenvalues."""
        adjacency = self.matrix(np.ones(len(self.a)))
        np.fill_diagonal(adjacency, 0.0)
        degrees = adjacency.sum(axis=1)
        laplacian = np.linalg.eigvalsh(np.diag(degrees) - adjacency)
        return float(min(1.0 / degrees.max(), 2.0 / (laplacian[1] + laplacian[-1])))

    def point(self, w: Vector, s: float) -> _Point:
        given = np.bincount(self.a, w, self.n) + np.bincount(self.b, w, self.n)
        own = np.asarray(1.0 - given, np.float64)
        Pi = np.zeros((self.n, self.n))
        Pi[self.a, self.b] = Pi[self.b, self.a] = w
        np.fill_diagonal(Pi, own)
        return _Point(w, s, own, *np.linalg.eigh(Pi - 1.0 / self.n))

    def minimise(self, w: Vector) -> Vector:
        """Follow the barrier's minima from ``w``, strictly feasible, until `GAP` or rounding."""
        at = self.point(w, self.modulus(w) + 0.1)
        terms = len(at.slacks())
        t = float(terms)
        best = at
        while True:
            centred, at = self._centre(at, t)
            if float(np.abs(at.eigenvalues).max()) < float(np.abs(best.eigenvalues).max()):
                best = at
            if not centred or terms / t <= GAP:
                return best.w
            t = min(t * _GROWTH, terms / GAP)

    def _centre(self, at: _Point, t: float) -> tuple[bool, _Point]:
        """Newton's method for one t. False: rounding has stopped it."""
        for _ in range(_MAX_STEPS):
            gradient, hessian = self._derivatives(at, t)
            # The barrier's curvatures span many orders: to unit diagonal before solving.
            scale = 1.0 / np.sqrt(np.diagonal(hessian))
            hessian *= scale[:, np.newaxis]
            hessian *= scale
            try:
                step = -scale * np.linalg.solve(hessian, scale * gradient)
            except np.linalg.LinAlgError:
                return False, at
            fall = -float(gradient @ step)
            if not fall > 0:
                return False, at
            if fall < _CENTRED:
                return True, at
            moved = self._search(at, t, step, fall)
            if moved is None:
                return False, at
            at = moved
        return False, at

    def _search(self, at: _Point, t: float, step: Vector, fall: float) -> _Point | None:
        """Backtrack along ``step`` until the objective has fallen by its due."""
        here = at.slacks()
        size = 1.0
        while size > 1e-6:
            to = self.point(at.w + size * step[:-1], at.s + size * float(step[-1]))
            there = to.slacks()
            # From a point that all but touches the border, Newton's steps are short for long.
            if (there > _NEARER * here).all():
                # As a difference: t s alone would swallow the last digits.
                change = t * (to.s - at.s) - float(np.log(there / here).sum())
                if change <= -0.1 * size * fall:
                    return to
            size /= 2
        return None

    def _derivatives(self, at: _Point, t: float) -> tuple[Vector, Matrix]:
        """Gradient and Hessian of t s + barrier, in the order (w, s)."""
        m = len(self.a)
        gradient, hessian = np.zeros(m + 1), np.zeros((m + 1, m + 1))
        H_ww = hessian[:m, :m]
        Z = at.vectors[self.a] - at.vectors[self.b]  # B times the eigenvectors
        gradient[m] = t
        # A = s I - (Pi - J) grows with an edge's weight, s I + (Pi - J) shrinks.
        for sign in (1.0, -1.0):
            inverse = 1.0 / (at.s - sign * at.eigenvalues)
            R = (Z * inverse) @ Z.T
            gradient[:m] -= sign * np.diagonal(R)
            gradient[m] -= inverse.sum()
            hessian[:m, m] += sign * (Z**2 @ inverse**2)
            hessian[m, m] += inverse @ inverse
            R *= R
            H_ww += R
        hessian[m, :m] = hessian[:m, m]
        gradient[:m] += 1 / at.own[self.a] + 1 / at.own[self.b] - 1 / at.w
        # Two edges share the curvature of an agent at which both end.
        ends = np.zeros((m, self.n))
        ends[np.arange(m), self.a] = ends[np.arange(m), self.b] = 1.0
        H_ww += (ends / at.own**2) @ ends.T
        H_ww[np.diag_indices(m)] += 1 / at.w**2
        return gradient, hessian

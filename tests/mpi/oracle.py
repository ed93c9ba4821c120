"""The dense oracle: all agents' parameters as one float64 matrix, in NumPy, without MPI or torch.

    N       agents
    D       parameters of one agent, the tensors of `SHAPES` one after the other
    X, V    float64 (N, D), parameters and momentum of all agents
    G       float64 (N, D), gradients; given: bool (N, D), where there is one

Below it stands the same problem in torch, and what several test files need to set up agents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd import (
    CDMSGD,
    CDSGD,
    Agents,
    Graph,
    Mixed,
    MixingMatrix,
    UserError,
    complete,
    from_matrix,
    graph_from_spec,
    mixing_from_spec,
    optimizer,
)
from mpicdsgd.graphs.mixing_cycle import Mixing

Matrix = NDArray[np.float64]
Gradient = Callable[[int, Matrix], tuple[Matrix, NDArray[np.bool_]]]
After = Callable[[int, Matrix], Matrix]

SHAPES = {"W1": (4, 3), "b1": (4,), "W2": (2, 4), "b2": (2,), "s": ()}
NAMES = tuple(SHAPES)
D = sum(math.prod(shape) for shape in SHAPES.values())
BATCH, BATCHES = 6, 3


def spread(**values: Any) -> Matrix:
    """A value for each tensor, by name, as an array of shape (D,)."""
    return np.concatenate([np.full(math.prod(SHAPES[n]), values[n], float) for n in NAMES])


class Problem:
    """A small tanh network, y = s (W2 tanh(W1 u + b1) + b2), with own data for every agent.

    Args:
        n: agents.
        unused: on some steps of some agents b2 takes no part, and its gradient is None.
        frozen: names of tensors without a gradient.
    """

    def __init__(
        self, n: int, *, unused: bool = False, frozen: tuple[str, ...] = (), seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.unused, self.frozen = n, unused, frozen
        self.inputs = rng.standard_normal((n, BATCHES, BATCH, 3)).astype(np.float32)
        self.targets = rng.standard_normal((n, BATCHES, BATCH, 2)).astype(np.float32)
        self.start = (0.5 * rng.standard_normal((n, D))).astype(np.float32)

    def uses_b2(self, k: int, agent: int) -> bool:
        return not self.unused or (k + agent) % 3 != 0

    def gradient(self, k: int, X: Matrix) -> tuple[Matrix, NDArray[np.bool_]]:
        """Gradients of all agents at X for their minibatches of step k, and where there is one."""
        pairs = [self._of_agent(k, j, X[j]) for j in range(self.n)]
        return np.array([g for g, _ in pairs]), np.array([given for _, given in pairs])

    def _of_agent(self, k: int, j: int, x: Matrix) -> tuple[Matrix, NDArray[np.bool_]]:
        w = dict(zip(NAMES, unflatten(x), strict=True))
        U = self.inputs[j, k % BATCHES].astype(np.float64)
        T = self.targets[j, k % BATCHES].astype(np.float64)
        used = self.uses_b2(k, j)
        H = np.tanh(U @ w["W1"].T + w["b1"])
        O = H @ w["W2"].T + (w["b2"] if used else 0.0)  # noqa: E741
        E = (w["s"] * O - T) / BATCH
        dO = w["s"] * E
        dH = dO @ w["W2"] * (1 - H**2)
        g = {
            "W1": dH.T @ U,
            "b1": dH.sum(0),
            "W2": dO.T @ H,
            "b2": dO.sum(0),
            "s": np.array((E * O).sum()),
        }
        given = {name: name not in self.frozen and (name != "b2" or used) for name in NAMES}
        flat = np.concatenate([g[name].reshape(-1) * given[name] for name in NAMES])
        return flat, spread(**given).astype(bool)


def unflatten(x_D: NDArray[Any]) -> list[NDArray[Any]]:
    ends = np.cumsum([math.prod(shape) for shape in SHAPES.values()])
    parts = np.split(x_D, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES.values(), strict=True)]


def cdmsgd(
    Pi: Matrix | list[Matrix],
    X: Matrix,
    gradient: Gradient,
    steps: int,
    alpha: Callable[[int], Any],
    *,
    form: str = "none",
    mu: Any = 0.0,
    decay: Any = 0.0,
    tau: int = 1,
    after: After = lambda k, X: X,
    V: Matrix | None = None,
    start: int = 0,
) -> tuple[Matrix, Matrix]:
    """X and V after ``steps`` steps of CDSGD ("none"), "polyak", "nesterov" or "look-ahead".

    Args:
        Pi: the mixing matrix, or those that are used in turn.
        alpha: step size at step k, a number or an array of shape (D,).
        mu, decay: numbers or arrays of shape (D,).
        V, start: momentum and number of the first step, to go on.
        after: what somebody makes of X by hand after step k.
    """
    turns = Pi if isinstance(Pi, list) else [Pi]
    X = X.astype(np.float64)
    V = np.zeros_like(X) if V is None else V
    for k in range(start, start + steps):
        at = X + mu * V if form == "look-ahead" else X
        G, given = gradient(k, at)
        A = alpha(k) * (G + decay * at)
        V = np.where(given, mu * V - A, V)
        push = {"none": -A, "polyak": V, "nesterov": mu * V - A, "look-ahead": V}[form]
        for mixing in range(k * tau, (k + 1) * tau):
            X = turns[mixing % len(turns)] @ X
        X = after(k, X + np.where(given, push, 0.0))
    return X, V


def mixed_adamw(
    Pi: Matrix,
    X: Matrix,
    gradient: Gradient,
    steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float = 0.0,
    after: After = lambda k, X: X,
) -> Matrix:
    """X after ``steps`` steps of AdamW (Loshchilov, Hutter 2019), each with the mixing beside."""
    X = X.astype(np.float64)
    first, second, count = np.zeros_like(X), np.zeros_like(X), np.zeros_like(X)
    b1, b2 = betas
    for k in range(steps):
        G, given = gradient(k, X)
        count += given
        first = np.where(given, b1 * first + (1 - b1) * G, first)
        second = np.where(given, b2 * second + (1 - b2) * G**2, second)
        c = np.maximum(count, 1)
        root = np.sqrt(second / (1 - b2**c)) + eps
        stepped = X * (1 - lr * decay) - lr * first / (1 - b1**c) / root
        X = after(k, np.where(given, stepped, X) + Pi @ X - X)
    return X


def relative(X: NDArray[Any], Y: NDArray[Any]) -> float:
    """||X - Y|| / ||Y||, 2-norms over everything."""
    return float(np.linalg.norm(X.astype(np.float64) - Y) / np.linalg.norm(Y))


class Net(torch.nn.Module):
    """Agent j's network of `Problem`, in torch float32."""

    def __init__(self, problem: Problem, j: int) -> None:
        super().__init__()
        self.problem, self.j = problem, j
        for name, value in zip(NAMES, unflatten(problem.start[j]), strict=True):
            tensor = torch.from_numpy(value.copy())
            self.register_parameter(
                name, torch.nn.Parameter(tensor, requires_grad=name not in problem.frozen)
            )
        self.inputs = torch.from_numpy(problem.inputs[j])
        self.targets = torch.from_numpy(problem.targets[j])

    def forward(self, u: torch.Tensor, use_b2: bool = True) -> torch.Tensor:
        out = torch.tanh(u @ self.W1.T + self.b1) @ self.W2.T
        return self.s * (out + self.b2 if use_b2 else out)

    def loss(self, k: int) -> torch.Tensor:
        y = self(self.inputs[k % BATCHES], self.problem.uses_b2(k, self.j))
        return ((y - self.targets[k % BATCHES]) ** 2).sum() / (2 * BATCH)

    def vector(self) -> NDArray[np.float32]:
        """All parameters, a copy, shape (D,)."""
        return flatten([p.detach() for p in self.parameters()])


def flatten(tensors: list[torch.Tensor]) -> NDArray[np.float32]:
    return np.concatenate([t.reshape(-1).numpy() for t in tensors])


def train(opt: Any, net: Any, steps: int, start: int = 0) -> None:
    """Plain training; ``start`` is the first step's number."""
    for k in range(start, start + steps):
        opt.zero_grad()
        net.loss(k).backward()
        opt.step()


def gather(comm: MPI.Intracomm, x_D: NDArray[Any]) -> Matrix:
    """All ranks' vectors, float64, shape (N, D). Collective."""
    return np.array(comm.allgather(x_D), dtype=np.float64)


def matrix(n: int, topology: str = "ring", mixing: str = "metropolis") -> Mixing:
    """The mixing matrix; the test is skipped, on all ranks alike, where n does not fit."""
    try:
        return mixing_from_spec(mixing, graph_from_spec(topology, n))
    except UserError as error:
        pytest.skip(str(error))


def turns_of(agents: Agents) -> list[Matrix]:
    return [turn.Pi for turn in agents.mixing.turns]


def random_matrix(n: int, symmetric: bool) -> MixingMatrix:
    """A doubly stochastic matrix on the complete graph: a mean of permutations (Birkhoff)."""
    rng = np.random.default_rng(n)
    shares = rng.dirichlet(np.ones(6))
    Pi = sum(share * np.eye(n)[rng.permutation(n)] for share in shares) * 0.7 + 0.3 / n
    if symmetric:
        return from_matrix((Pi + Pi.T) / 2, complete(n), "random")
    everybody = [(a, b) for a in range(n) for b in range(n) if a != b]
    return from_matrix(Pi, Graph.from_edges(n, everybody, directed=True), "random")


_made: dict[tuple[int, str, str], Agents] = {}


def make_agents(
    comm: MPI.Intracomm, topology: str = "ring", mixing: str = "metropolis", **options: Any
) -> Agents:
    """Agents on a graph, skipping where it cannot be. Collective; made once, but for options."""
    Pi = matrix(comm.size, topology, mixing)
    options.setdefault("device", "cpu")
    if options != {"device": "cpu"}:
        return Agents(comm, Pi, **options)
    key = (comm.size, topology, mixing)
    if key not in _made:
        world = MPI.COMM_WORLD if comm.size > 1 else MPI.COMM_SELF
        _made[key] = Agents(world, Pi, device="cpu")
    return _made[key]


def step_and_check(
    comm: MPI.Intracomm, opt: Any, parameters: list[torch.Tensor], Pi: Matrix, lr: float
) -> None:
    """Take a CDSGD step with the gradients that are there, and compare it with Pi X - lr G."""
    X = gather(comm, flatten([p.detach() for p in parameters]))
    dense = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    G = gather(comm, flatten(dense))
    opt.step()
    found = gather(comm, flatten([p.detach() for p in parameters]))
    expected = Pi @ X - lr * G
    assert np.abs(G).max() > 0
    assert relative(found, expected) <= 1e-6


def of_kind(kind: str, parameters: Any, agents: Agents, **options: Any) -> Any:
    parameters = list(parameters)
    if kind == "cdsgd":
        return CDSGD(parameters, lr=0.05, agents=agents, **options)
    if kind == "adamw":
        return Mixed(torch.optim.AdamW(parameters, lr=0.01), agents, **options)
    if kind in ("gradient-tracking", "push-sum"):
        return optimizer(kind, parameters, lr=0.05, agents=agents, **options)
    if kind == "fused":
        return Mixed(torch.optim.AdamW(parameters, lr=0.01, fused=True), agents, **options)
    nesterov: Any = True if kind == "nesterov" else kind
    return CDMSGD(parameters, lr=0.05, momentum=0.9, nesterov=nesterov, agents=agents, **options)


def pair(agents: Agents, kind: str, **options: Any) -> tuple[Net, Any]:
    net = Net(Problem(agents.size), agents.rank)
    return net, of_kind(kind, net.parameters(), agents, **options)

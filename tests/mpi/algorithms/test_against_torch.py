"""Against code that nobody here wrote: torch's SGD, and gradient descent on the joint objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from oracle import (
    BATCH,
    BATCHES,
    Problem,
    flatten,
    gather,
    make_agents,
    matrix,
    random_matrix,
    relative,
    train,
)

from mpicdsgd import CDMSGD, CDSGD, Agents, MixingMatrix, ring

pytestmark = pytest.mark.ranks(1, 4)

STEPS = 200
TOLERANCE = 1e-6


def alone() -> Agents:
    """One agent on each rank, for itself."""
    return make_agents(MPI.COMM_SELF)


class Regression(torch.nn.Module):
    """Cross entropy of a linear map: convex, so that rounding does not grow over the steps."""

    def __init__(self, problem: Problem, j: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(problem.start[j, :15].reshape(5, 3)))
            self.linear.bias.copy_(torch.from_numpy(problem.start[j, 15:20]))
        self.inputs = torch.from_numpy(problem.inputs[j])

    def loss(self, k: int) -> torch.Tensor:
        targets = (torch.arange(BATCH) + k) % 5
        return torch.nn.functional.cross_entropy(self.linear(self.inputs[k % BATCHES]), targets)

    def vector(self) -> NDArray[np.float32]:
        return flatten([p.detach() for p in self.parameters()])


@pytest.mark.parametrize("nesterov", [True, False])
def test_one_agent_is_torch_sgd_with_momentum(comm: MPI.Intracomm, nesterov: bool) -> None:
    """Over 200 steps, and v = -lr * torch's momentum_buffer at a fixed step size."""
    lr, mu, decay = 0.02, 0.9, 0.01
    problem = Problem(comm.size)
    ours, theirs = Regression(problem, comm.rank), Regression(problem, comm.rank)
    opt = CDMSGD(
        ours.parameters(), lr=lr, momentum=mu, nesterov=nesterov, weight_decay=decay, agents=alone()
    )
    sgd = torch.optim.SGD(
        theirs.parameters(), lr=lr, momentum=mu, nesterov=nesterov, weight_decay=decay
    )
    train(opt, ours, STEPS)
    train(sgd, theirs, STEPS)
    assert relative(ours.vector(), theirs.vector()) <= TOLERANCE
    v = flatten([opt.state[p]["v"] for p in ours.parameters()])
    buffer = flatten([sgd.state[p]["momentum_buffer"] for p in theirs.parameters()])
    assert relative(v, -lr * buffer) <= 10 * TOLERANCE
    opt.close()


def test_one_agent_is_torch_sgd_without_momentum(comm: MPI.Intracomm) -> None:
    """With a step size that changes every step; without momentum that makes no difference."""
    problem = Problem(comm.size)
    ours, theirs = Regression(problem, comm.rank), Regression(problem, comm.rank)
    opt = CDSGD(ours.parameters(), lr=0.1, weight_decay=0.01, agents=alone())
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=0.01)
    for optimizer, net in ((opt, ours), (sgd, theirs)):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for k in range(STEPS):
            train(optimizer, net, 1, start=k)
            scheduler.step()
    assert relative(ours.vector(), theirs.vector()) <= TOLERANCE
    opt.close()


def mixing_of(n: int, kind: str) -> MixingMatrix:
    if kind.startswith("random"):
        return random_matrix(n, symmetric=kind == "random symmetric")
    topology, _, name = kind.partition(" ")
    return matrix(n, topology, name)


QUADRATICS = [
    "complete uniform",
    "ring uniform",
    "star metropolis",
    "star max-degree",
    "ring lazy:metropolis",
    "random symmetric",
    "random directed",
]


@pytest.mark.parametrize("kind", QUADRATICS)
def test_the_mean_follows_gradient_descent(comm: MPI.Intracomm, kind: str) -> None:
    """f_j = (x - b_j)^T A (x - b_j) / 2 with a common A: the mean is torch's GD on the mean of f.

    With gradients at different points x_j, since A takes their mean, whatever Pi.
    """
    n, size, lr, mu = comm.size, 10, 0.05, 0.8
    rng = np.random.default_rng(7)
    root = rng.standard_normal((size, size))
    A = torch.from_numpy((root @ root.T / size + np.eye(size)).astype(np.float32))
    b = torch.from_numpy(rng.standard_normal((n, size)).astype(np.float32))
    start = rng.standard_normal((n, size)).astype(np.float32)

    x = torch.nn.Parameter(torch.from_numpy(start[comm.rank].copy()))
    opt = CDMSGD([x], lr=lr, momentum=mu, agents=Agents(comm, mixing_of(n, kind)))
    joint = torch.nn.Parameter(torch.from_numpy(start.astype(np.float64).mean(axis=0)))
    descent = torch.optim.SGD([joint], lr=lr, momentum=mu, nesterov=True)
    spread_over_agents = []
    for k in range(60):
        opt.zero_grad()
        d = x - b[comm.rank]
        (d @ A @ d / 2).backward()
        opt.step()
        descent.zero_grad()
        D = joint - b.double()
        ((D @ A.double()) * D / 2).sum(1).mean().backward()
        descent.step()
        if k % 20 == 19:
            X = gather(comm, x.detach().numpy())
            expected = joint.detach().numpy()
            assert relative(X.mean(axis=0), expected) <= TOLERANCE
            spread_over_agents.append(relative(X, np.broadcast_to(expected, X.shape)))
    if n > 2:
        assert min(spread_over_agents) > 1e-3  # the agents were at different points
    opt.close()


def test_ring_of_one_and_of_two_are_allowed(comm: MPI.Intracomm) -> None:
    """The smallest graphs; two agents share one edge."""
    assert ring(1).edges == ()
    assert ring(2).edges == ((0, 1), (1, 0))
    x: Any = torch.nn.Parameter(torch.ones(3))
    opt = CDSGD([x], lr=0.5, agents=alone())
    x.sum().backward()
    opt.step()
    assert x.tolist() == [0.5, 0.5, 0.5]
    opt.close()

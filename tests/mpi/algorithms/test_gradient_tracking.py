"""Gradient tracking over MPI: its recursion in float64, what holds of y, and a job's manners."""

from __future__ import annotations

from typing import Any

import numpy as np
import on_graphs
import pytest
import torch
from mpi4py import MPI
from on_graphs import DECAY, LR, everyones, exact, is_near, ready
from oracle import Matrix, Problem, flatten, gather, make_agents, relative, train

from mpicdsgd import ExchangeConfig, UserError, optimizer
from mpicdsgd.algorithms.contract import Circumstances
from mpicdsgd.algorithms.gradient_tracking import GradientTracking
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.torch_step import TorchStep
from mpicdsgd.graphs.mixing_matrix import DOUBLY

NAME = "gradient-tracking"
TOPOLOGIES = [
    ("ring", "metropolis"), ("star", "metropolis"), ("chain", "lazy:metropolis"),
    ("complete", "uniform"), ("exponential", "uniform"), ("expo", "one-peer"),
    ("ring", "matchings"),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "mixing"), TOPOLOGIES)
def test_the_recursion(comm: MPI.Intracomm, topology: str, mixing: str) -> None:
    agents = make_agents(comm, topology, mixing)
    net, opt = ready(NAME, agents)
    train(opt, net, 30)
    twin = exact(NAME, agents, net.problem)
    is_near(comm, net, twin.run(30))
    assert relative(everyones(comm, opt, "link/y"), twin["y"].numpy()) <= 1e-5
    opt.close()


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_y_has_the_mean_of_the_gradients(comm: MPI.Intracomm, wire: str) -> None:
    """Also where what is sent is rounded: rounding moves y among agents, it is not lost."""
    agents = make_agents(comm)
    net, opt = ready(NAME, agents, exchange=ExchangeConfig(wire=wire))
    for k in range(20):
        train(opt, net, 1, start=k)
        G = everyones(comm, opt, "link/gradient")
        off = everyones(comm, opt, "link/y").mean(axis=0) - G.mean(axis=0)
        assert np.abs(off).max() <= 2e-7 * (k + 1) * np.abs(G).max()
    error = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[wire]
    is_near(comm, net, exact(NAME, agents, net.problem).run(20), max(1e-5, 8 * error))
    opt.close()


@pytest.mark.parametrize(("topology", "mixing"), [("ring", "metropolis"), ("expo", "one-peer")])
def test_the_optimum_of_unequal_quadratics(comm: MPI.Intracomm, topology: str, mixing: str) -> None:
    """h_j |x - b_j|^2 / 2, whose agents CDSGD leaves apart."""
    agents = make_agents(comm, topology, mixing)
    rng = np.random.default_rng(0)
    H, B = rng.uniform(0.5, 1.5, comm.size), rng.standard_normal((comm.size, 5))
    x = torch.nn.Parameter(torch.zeros(5))
    b = torch.from_numpy(B[comm.rank]).float()
    with optimizer(NAME, [x], agents=agents, lr=0.2) as opt:
        for _ in range(300):
            x.grad = float(H[comm.rank]) * (x.detach() - b)
            opt.step()
    optimum = H @ B / H.sum()
    assert np.abs(x.detach().numpy() - optimum).max() <= 2e-6


def with_holes(problem: Problem, Pi: Matrix, steps: int) -> tuple[Matrix, Matrix]:
    """X and Y, where a gradient that is not there is the last one."""
    X = problem.start.astype(np.float64)
    Y, before = np.zeros_like(X), np.zeros_like(X)
    for k in range(steps):
        G, given = problem.gradient(k, X)
        G = np.where(given, G + DECAY * X, before)
        Y, before = Pi @ Y + G - before, G
        X = Pi @ X - LR * Y
    return X, Y


def test_unused_and_frozen(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    problem = Problem(comm.size, unused=True, frozen=("W1",))
    net, opt = ready(NAME, agents, problem)
    train(opt, net, 20)
    X, Y = with_holes(problem, agents.mixing.Pi, 20)
    is_near(comm, net, X)
    assert relative(everyones(comm, opt, "link/y"), Y) <= 1e-5
    opt.close()


def test_mix_is_a_step_with_the_last_gradient(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net, opt = ready(NAME, agents)
    opt.mix()  # there is none yet
    train(opt, net, 2)
    opt.mix()
    Pi = agents.mixing.Pi
    X = Pi @ net.problem.start.astype(np.float64)
    Y, before = np.zeros_like(X), np.zeros_like(X)
    for k in range(2):
        G = net.problem.gradient(k, X)[0] + DECAY * X
        Y, before = Pi @ Y + G - before, G
        X = Pi @ X - LR * Y
    Y = Pi @ Y
    is_near(comm, net, Pi @ X - LR * Y)
    opt.close()


def test_two_groups(comm: MPI.Intracomm) -> None:
    """alpha is each parameter's own."""
    agents = make_agents(comm)
    net, _ = ready(NAME, agents)
    groups = [{"params": [net.W2, net.s], "lr": 0.02}, {"params": [net.b2, net.W1, net.b1]}]
    opt = optimizer(NAME, groups, agents=agents, lr=LR)
    before = net.vector().astype(np.float64)
    train(opt, net, 1)
    X, Pi = gather(comm, before), agents.mixing.Pi
    shapes = [net.W1, net.b1, net.W2, net.b2, net.s]
    alpha = flatten(
        [torch.full(p.shape, 0.02 if p is net.W2 or p is net.s else LR) for p in shapes]
    )
    is_near(comm, net, Pi @ X - alpha * net.problem.gradient(0, X)[0])
    opt.close()


@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_going_on_bit_by_bit(comm: MPI.Intracomm, wire: str) -> None:
    on_graphs.goes_on_bit_by_bit(comm, NAME, make_agents(comm, "expo", "one-peer"), wire)


def test_a_group_added_on_the_way(comm: MPI.Intracomm) -> None:
    """y goes on; mean(Y) is mean(G) of all parameters."""
    _, opt, _ = on_graphs.a_group_added_on_the_way(comm, NAME)
    G = everyones(comm, opt, "link/gradient")
    off = everyones(comm, opt, "link/y").mean(axis=0) - G.mean(axis=0)
    assert np.abs(off).max() <= 1e-6
    opt.close()


def test_publishing_by_hand_keeps_y(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net, opt = ready(NAME, agents)
    train(opt, net, 3)
    Y = everyones(comm, opt, "link/y")
    with torch.no_grad():
        net.b1 += comm.rank
    opt.publish()
    np.testing.assert_array_equal(everyones(comm, opt, "link/y"), Y)
    train(opt, net, 3, start=3)
    off = everyones(comm, opt, "link/y") - everyones(comm, opt, "link/gradient")
    assert np.abs(off.mean(axis=0)).max() <= 1e-6
    opt.close()


def test_another_number_of_agents(comm: MPI.Intracomm) -> None:
    """y begins anew, or its mean would be off for good."""
    agents = make_agents(comm)
    net, opt = ready(NAME, agents)
    train(opt, net, 3)
    arrays = {key: np.array(values) for key, values in opt.arrays().items()}
    arrays["link/y"] += 1.0  # as if others had had the rest
    opt.load_arrays(3, opt.context.begun_anew(arrays))
    np.testing.assert_array_equal(
        everyones(comm, opt, "link/y"), everyones(comm, opt, "link/gradient")
    )
    train(opt, net, 3, start=3)
    off = everyones(comm, opt, "link/y") - everyones(comm, opt, "link/gradient")
    assert np.abs(off.mean(axis=0)).max() <= 1e-6
    opt.close()


@pytest.mark.parametrize("topology", ["chain", "complete"])
def test_stops_and_faults(comm: MPI.Intracomm, topology: str) -> None:
    agents = make_agents(comm, topology)
    on_graphs.stops_at_the_same_step(comm, NAME, agents)
    on_graphs.faults_at_the_same_step(comm, NAME, agents)
    on_graphs.a_last_fault_is_told_by_close(comm, NAME, agents)
    on_graphs.changes_by_hand_are_found(comm, NAME, agents)
    on_graphs.a_loss_that_is_no_number_is_a_fault(comm, NAME, agents)


def test_who_leaves(comm: MPI.Intracomm) -> None:
    on_graphs.who_leaves_is_named(comm, NAME, make_agents(comm))


def test_an_overflow(comm: MPI.Intracomm) -> None:
    on_graphs.an_overflow_leaves_out_one_gradient(comm, NAME, make_agents(comm))


def test_a_torch_optimizer_cannot_be_its_step(comm: MPI.Intracomm) -> None:
    net, _ = ready(NAME, make_agents(comm))
    algorithm = GradientTracking(GradientTracking.Settings(), Circumstances())
    inner = torch.optim.AdamW(net.parameters())
    more: Any = {"torch_step": TorchStep(inner)}
    with pytest.raises(UserError, match=r"gradient-tracking makes its own step with the gradient"):
        AgentOptimizer(inner.param_groups, algorithm, make_agents(comm), **more)


def test_column_stochastic_weights_are_refused(comm: MPI.Intracomm) -> None:
    agents = on_graphs.directed(comm)
    if agents.mixing.stochastic == DOUBLY:
        pytest.skip("the graph is regular")
    with pytest.raises(UserError, match=r'out-degree is column-stochastic.*"push-sum"'):
        ready(NAME, agents)

"""50 steps of every algorithm on every graph against the dense float64 oracle Pi @ X - a G."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import (
    Matrix,
    Net,
    Problem,
    cdmsgd,
    flatten,
    gather,
    make_agents,
    mixed_adamw,
    random_matrix,
    relative,
    spread,
    train,
    turns_of,
)

from mpicdsgd import CDMSGD, CDSGD, Agents, ExchangeConfig, Mixed
from mpicdsgd.algorithms import schedules

STEPS = 50
TOLERANCE = 1e-5

TOPOLOGIES = [
    ("complete", "uniform"),
    ("ring", "metropolis"),
    ("chain", "metropolis"),
    ("star", "metropolis"),
    ("star", "max-degree"),
    ("torus", "uniform"),
    ("grid", "lazy:metropolis"),
    ("hypercube", "uniform"),
    ("exponential", "uniform"),
    ("regular:2,seed=1", "uniform"),
    ("erdos-renyi:0.8,seed=1", "metropolis"),
    ("watts-strogatz:2,0.3,seed=1", "metropolis"),
    ("expo", "one-peer"),
    ("ring", "matchings"),
    ("complete", "matchings"),
    ("star", "lazy:matchings"),
]


def velocity(opt: torch.optim.Optimizer, net: Net) -> np.ndarray[Any, Any]:
    return flatten([opt.state[p]["v"] for p in net.parameters()])


def compare(comm: MPI.Intracomm, opt: Any, net: Net, X: Any, V: Any = None) -> None:
    """Assert that the agents hold X and V; close. Collective."""
    with opt.evaluating():
        error = relative(gather(comm, net.vector()), X)
    assert error <= TOLERANCE
    if V is not None:
        assert relative(gather(comm, velocity(opt, net)), V) <= 10 * TOLERANCE
    opt.close()


@pytest.mark.parametrize(("topology", "mixing"), TOPOLOGIES)
def test_topologies(comm: MPI.Intracomm, topology: str, mixing: str) -> None:
    agents = make_agents(comm, topology, mixing)
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    opt = CDMSGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, agents=agents)
    train(opt, net, STEPS)
    X, V = cdmsgd(
        turns_of(agents), problem.start, problem.gradient, STEPS, lambda k: 0.05,
        form="nesterov", mu=0.9, decay=0.01,
    )  # fmt: skip
    compare(comm, opt, net, X, V)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_all_differ(comm: MPI.Intracomm, symmetric: bool) -> None:
    """Who confused two neighbours, or Pi and its transpose, would be found here."""
    agents = Agents(comm, random_matrix(comm.size, symmetric))
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    opt = CDSGD(net.parameters(), lr=0.05, agents=agents)
    train(opt, net, 10)
    X, _ = cdmsgd(agents.mixing.Pi, problem.start, problem.gradient, 10, lambda k: 0.05)
    compare(comm, opt, net, X)


def of_kind(form: str, net: Net, agents: Agents, lr: float, **options: Any) -> Any:
    if form == "none":
        return CDSGD(net.parameters(), lr=lr, agents=agents, **options)
    nesterov: Any = {"polyak": False, "nesterov": True, "look-ahead": "look-ahead"}[form]
    return CDMSGD(
        net.parameters(), lr=lr, momentum=0.9, nesterov=nesterov, agents=agents, **options
    )


FORMS = ["none", "polyak", "nesterov", "look-ahead"]


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("topology", "mixing"), [("ring", "metropolis"), ("expo", "one-peer")])
def test_algorithms(comm: MPI.Intracomm, topology: str, mixing: str, form: str, tau: int) -> None:
    """The four forms, with weight decay, with one and with three mixing rounds per step."""
    agents = make_agents(comm, topology, mixing)
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    opt = of_kind(form, net, agents, 0.05, weight_decay=0.02, rounds=tau)
    train(opt, net, STEPS)
    X, V = cdmsgd(
        turns_of(agents), problem.start, problem.gradient, STEPS, lambda k: 0.05,
        form=form, mu=0.9, decay=0.02, tau=tau,
    )  # fmt: skip
    compare(comm, opt, net, X, None if form == "none" else V)


Schedule = tuple[Callable[[Any], Any], Callable[[int], float]]
SCHEDULES: dict[str, Schedule] = {
    "step": (
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, step_size=7, gamma=0.7),
        lambda k: 0.7 ** (k // 7),
    ),
    "diminishing": (
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, schedules.diminishing(0.6)),
        lambda k: (k + 1) ** -0.6,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", ["none", "nesterov"])
def test_changing_step_size(comm: MPI.Intracomm, form: str, name: str) -> None:
    """v holds the step size that each gradient came in with."""
    make, factor = SCHEDULES[name]
    agents = make_agents(comm)
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    opt = of_kind(form, net, agents, 0.08)
    scheduler = make(opt)
    for k in range(STEPS):
        train(opt, net, 1, start=k)
        scheduler.step()
    X, V = cdmsgd(
        agents.mixing.Pi, problem.start, problem.gradient, STEPS, lambda k: 0.08 * factor(k),
        form=form, mu=0.9,
    )  # fmt: skip
    compare(comm, opt, net, X, None if form == "none" else V)


@pytest.mark.parametrize("nesterov", [True, "look-ahead"])
def test_two_parameter_groups(comm: MPI.Intracomm, nesterov: Any) -> None:
    """Own lr, weight decay and momentum; the arena's order is not the model's."""
    agents = make_agents(comm, "chain")
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    groups = [
        {"params": [net.W2, net.s], "lr": 0.02, "momentum": 0.5, "weight_decay": 0.1},
        {"params": [net.b2, net.W1, net.b1]},
    ]
    opt = CDMSGD(groups, lr=0.07, momentum=0.9, nesterov=nesterov, agents=agents)
    train(opt, net, STEPS)
    second = {"W1": 0.07, "b1": 0.07, "b2": 0.07}
    alpha = spread(**second, W2=0.02, s=0.02)
    X, V = cdmsgd(
        agents.mixing.Pi, problem.start, problem.gradient, STEPS, lambda k: alpha,
        form="look-ahead" if nesterov == "look-ahead" else "nesterov",
        mu=np.where(alpha == 0.02, 0.5, 0.9), decay=np.where(alpha == 0.02, 0.1, 0.0),
    )  # fmt: skip
    compare(comm, opt, net, X, V)


@pytest.mark.parametrize("form", FORMS)
def test_unused_and_frozen(comm: MPI.Intracomm, form: str) -> None:
    """Without a gradient x is mixed all the same, v and the decay stand still."""
    agents = make_agents(comm)
    problem = Problem(comm.size, unused=True, frozen=("W1",))
    net = Net(problem, comm.rank)
    opt = of_kind(form, net, agents, 0.05, weight_decay=0.02)
    train(opt, net, STEPS)
    X, V = cdmsgd(
        agents.mixing.Pi, problem.start, problem.gradient, STEPS, lambda k: 0.05,
        form=form, mu=0.9, decay=0.02,
    )  # fmt: skip
    compare(comm, opt, net, X, None if form == "none" else V)


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("topology", ["ring", "star"])
def test_mixed_adamw(comm: MPI.Intracomm, topology: str, unused: bool) -> None:
    agents = make_agents(comm, topology)
    problem = Problem(comm.size, unused=unused)
    net = Net(problem, comm.rank)
    settings: Any = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    inner = torch.optim.AdamW(net.parameters(), weight_decay=0.05, **settings)
    opt = Mixed(inner, agents)
    train(opt, net, STEPS)
    X = mixed_adamw(
        agents.mixing.Pi, problem.start, problem.gradient, STEPS, **settings, decay=0.05
    )
    compare(comm, opt, net, X)


def test_mixed_sgd_is_cdsgd(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    problem = Problem(comm.size, unused=True)
    net = Net(problem, comm.rank)
    opt = Mixed(torch.optim.SGD(net.parameters(), lr=0.05, weight_decay=0.02), agents)
    train(opt, net, STEPS)
    X, _ = cdmsgd(
        agents.mixing.Pi, problem.start, problem.gradient, STEPS, lambda k: 0.05, decay=0.02
    )
    compare(comm, opt, net, X)


def test_mix_is_a_step_without_gradient(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    opt = CDMSGD(net.parameters(), lr=0.05, momentum=0.9, agents=agents, rounds=2)
    net.loss(0).backward()
    opt.step()
    opt.mix()
    Pi = agents.mixing.Pi
    X, V = cdmsgd(
        Pi, problem.start, problem.gradient, 1, lambda k: 0.05, form="nesterov", mu=0.9, tau=2
    )
    compare(comm, opt, net, Pi @ Pi @ X, V)


@pytest.mark.parametrize("form", ["nesterov", "look-ahead", "adamw"])
def test_publish_after_changes_by_hand(comm: MPI.Intracomm, form: str) -> None:
    """Every tenth step agent j adds j + 1/2 to its b1, and all publish."""
    agents = make_agents(comm)
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    settings: Any = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    opt: Any
    if form == "adamw":
        inner = torch.optim.AdamW(net.parameters(), weight_decay=0.0, **settings)
        opt = Mixed(inner, agents)
    else:
        opt = of_kind(form, net, agents, 0.05)
    for k in range(STEPS):
        train(opt, net, 1, start=k)
        if k % 10 == 9:
            with torch.no_grad():
                net.b1 += comm.rank + 0.5
            opt.publish()

    jump = (np.arange(comm.size)[:, None] + 0.5) * spread(W1=0, b1=1, W2=0, b2=0, s=0)

    def after(k: int, X: Matrix) -> Matrix:
        return X + jump if k % 10 == 9 else X

    arguments: Any = (agents.mixing.Pi, problem.start, problem.gradient, STEPS)
    if form == "adamw":
        X = mixed_adamw(*arguments, **settings, after=after)
    else:
        X, _ = cdmsgd(*arguments, lambda k: 0.05, form=form, mu=0.9, after=after)
    compare(comm, opt, net, X)


@pytest.mark.parametrize(
    ("topology", "mixing", "tau"),
    [
        ("ring", "metropolis", 1),
        ("star", "metropolis", 1),
        ("expo", "uniform", 1),
        ("ring", "metropolis", 2),
    ],
)
@pytest.mark.parametrize(("wire", "error"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_wires_keep_the_mean(
    comm: MPI.Intracomm, wire: str, error: float, topology: str, mixing: str, tau: int
) -> None:
    """A 16-bit wire rounds what the neighbours see, never the mean.

    The mean's exact recursion takes the gradients that the agents really had; each sums up its own
    in float64.
    """
    agents = make_agents(comm, topology, mixing)
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    opt = CDMSGD(
        net.parameters(), lr=0.05, momentum=0.9, agents=agents, rounds=tau,
        exchange=ExchangeConfig(wire=wire),
    )  # fmt: skip
    pushed = net.vector().astype(np.float64)
    v = np.zeros_like(pushed)
    for k in range(STEPS):
        train(opt, net, 1, start=k)
        a = 0.05 * flatten([p.grad for p in net.parameters()]).astype(np.float64)  # type: ignore[misc]
        v = 0.9 * v - a
        pushed += 0.9 * v - a
    mean = gather(comm, net.vector()).mean(axis=0)
    assert relative(mean, gather(comm, pushed).mean(axis=0)) <= 2e-6
    X, _ = cdmsgd(
        agents.mixing.Pi, problem.start, problem.gradient, STEPS, lambda k: 0.05,
        form="nesterov", mu=0.9, tau=tau,
    )  # fmt: skip
    found = relative(gather(comm, net.vector()), X)
    assert found <= 8 * error
    if comm.size > 1:
        assert found > 1e-6  # the wire was rounded at all
    opt.close()

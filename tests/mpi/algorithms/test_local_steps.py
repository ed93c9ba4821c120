"""A torch optimizer as the local step of any algorithm: for plain SGD it is the fused one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import Net, Problem, gather, make_agents, relative

from mpicdsgd import Agents, Mixed, UserError, optimizer
from mpicdsgd.algorithms import registry
from mpicdsgd.algorithms.contract import Algorithm, Circumstances

ALPHA = 0.05
SETTINGS: dict[str, dict[str, Any]] = {
    "cdsgd": {},
    "sgd": {},
    "fedavg": {"server_momentum": 0.5},
    "easgd": {"period": 2},
    "gossip": {"probability": 0.8},
}


def made(name: str, agents: Agents) -> Algorithm:
    kind = registry.algorithms()[name]
    run = Circumstances(3, np.ones(1), 7, agents.size)
    return kind(kind.Settings(lr=ALPHA, **SETTINGS[name]), run)


def trained(agents: Agents, comm: MPI.Intracomm, make: Callable[[Net], Any]) -> Any:
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    with make(net) as opt:
        for k in range(8):
            opt.zero_grad()
            net.loss(k).backward()
            opt.step()
        opt.rest()
        return gather(comm, net.vector())


@pytest.mark.parametrize("name", SETTINGS)
def test_plain_sgd_of_torch_is_the_fused_step(comm: MPI.Intracomm, name: str) -> None:
    agents = make_agents(comm)
    run = Circumstances(3, np.ones(1), 7)
    ours = trained(
        agents, comm,
        lambda net: optimizer(
            name, net.parameters(), agents=agents, run=run, lr=ALPHA, **SETTINGS[name]
        ),
    )  # fmt: skip
    theirs = trained(
        agents, comm,
        lambda net: Mixed(
            torch.optim.SGD(net.parameters(), ALPHA), agents, algorithm=made(name, agents)
        ),
    )  # fmt: skip
    assert relative(theirs, ours) <= 1e-6


def test_adam_with_an_elastic_centre(comm: MPI.Intracomm) -> None:
    """The pull is from where x was before Adam's step."""
    agents = make_agents(comm)
    kind = registry.algorithms()["easgd"]
    settings = kind.Settings(period=1, elasticity=0.5 / comm.size)
    x = torch.nn.Parameter(torch.full((64,), float(comm.rank)))
    inner = torch.optim.Adam([x], 0.1)
    with Mixed(inner, agents, algorithm=kind(settings, Circumstances(agents=comm.size))) as opt:
        x.sum().backward()
        opt.step()
        moved = float(x.detach()[0]) - comm.rank
        assert moved == pytest.approx(-0.1 + settings.elasticity * (0 - comm.rank), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("gradient-tracking", {}, "a torch optimizer cannot stand in its place"),
        ("push-sum", {}, "a torch optimizer cannot stand in its place"),
        ("cdsgd", {"rounds": 2}, "mixes once in a step"),
    ],
)
def test_where_a_torch_optimizer_cannot_stand(
    comm: MPI.Intracomm, name: str, settings: dict[str, Any], why: str
) -> None:
    agents = make_agents(comm)
    kind = registry.algorithms()[name]
    algorithm = kind(kind.Settings(**settings), Circumstances(agents=comm.size))
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], 0.1)
    with pytest.raises(UserError, match=why):
        Mixed(inner, agents, algorithm=algorithm)

"""Faults, stops and the end: what one agent finds, all agents learn after the same step."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import Net, Problem, gather, make_agents, train

from mpicdsgd import CDMSGD, CDSGD, AgentFault, Agents, Mixed
from mpicdsgd.comm.exchange.header import Fault, Reason

pytestmark = pytest.mark.ranks(2, 5)

GRAPHS = ["complete", "ring", "chain", "star", "expo"]
CASES = [*((graph, "cdmsgd") for graph in GRAPHS), ("chain", "mixed")]


def ready(comm: MPI.Intracomm, topology: str = "ring", kind: str = "cdmsgd", **options: Any) -> Any:
    """Network, optimizer and agents."""
    agents = make_agents(comm, topology, "uniform" if topology == "expo" else "metropolis")
    net = Net(Problem(comm.size), comm.rank)
    return net, of_kind(kind, net, agents, **options), agents


def of_kind(kind: str, net: Net, agents: Agents, **options: Any) -> Any:
    if kind == "mixed":
        return Mixed(torch.optim.AdamW(net.parameters(), lr=0.01), agents, **options)
    if kind == "cdsgd":
        return CDSGD(net.parameters(), lr=0.05, agents=agents, **options)
    return CDMSGD(net.parameters(), lr=0.05, momentum=0.9, agents=agents, **options)


def until_fault(opt: Any, net: Net, steps: int = 30) -> Fault:
    """Train until all agents are told; then `close` says it once more. Collective."""
    with pytest.raises(AgentFault) as raised:
        train(opt, net, steps, start=opt.steps)
    with pytest.raises(AgentFault, match=re.escape(str(raised.value))):
        opt.close()
    return raised.value.fault


def same_everywhere(comm: MPI.Intracomm, value: Any) -> None:
    assert len(set(comm.allgather(value))) == 1


@pytest.mark.parametrize(("topology", "kind"), CASES)
def test_changed_by_hand_without_publishing(comm: MPI.Intracomm, topology: str, kind: str) -> None:
    """By one agent, found by the version counter."""
    net, opt, agents = ready(comm, topology, kind)
    train(opt, net, 3)
    culprit = comm.size - 1
    if comm.rank == culprit:
        with torch.no_grad():
            net.b1[0] += 1.0
    fault = until_fault(opt, net)
    assert (fault.agent, fault.reason) == (culprit, Reason.CHANGED_BY_HAND)
    assert opt.steps == fault.step <= 3 + 1 + agents.graph.diameter
    same_everywhere(comm, (opt.steps, fault))


def test_loading_a_model_without_publishing(comm: MPI.Intracomm) -> None:
    net, opt, _ = ready(comm)
    train(opt, net, 2)
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    fault = until_fault(opt, net)
    assert fault.reason == Reason.CHANGED_BY_HAND
    same_everywhere(comm, (opt.steps, fault))


@pytest.mark.parametrize("kind", ["cdmsgd", "mixed"])
def test_debug_finds_writes_through_data(comm: MPI.Intracomm, kind: str) -> None:
    net, opt, _ = ready(comm, kind=kind, debug=True)
    train(opt, net, 3)
    if comm.rank == 0:
        net.b1.data[0] += 1.0
    fault = until_fault(opt, net)
    assert (fault.agent, fault.reason) == (0, Reason.CHANGED_BY_HAND)
    same_everywhere(comm, (opt.steps, fault))


def test_debug_alone_is_no_fault(comm: MPI.Intracomm) -> None:
    """Nor are publish(), evaluating(), closures and buffers written by the forward pass."""
    agents = make_agents(comm)
    norm = torch.nn.BatchNorm1d(3)
    opt = CDMSGD(
        norm.parameters(), lr=0.01, nesterov="look-ahead", agents=agents, debug=True,
        buffers=[norm.running_mean, norm.running_var],
    )  # fmt: skip
    for k in range(6):
        opt.zero_grad()
        norm(torch.randn(8, 3)).square().sum().backward()
        opt.step()
        with opt.evaluating():
            norm(torch.randn(8, 3))
        if k % 2:
            norm.weight.data += 0.5
            opt.publish()
    opt.close()


@pytest.mark.parametrize(("topology", "kind"), CASES)
def test_not_finite(comm: MPI.Intracomm, topology: str, kind: str) -> None:
    """Infinity spreads through the mixing; the agent that it came from is named."""
    net, opt, agents = ready(comm, topology, kind)
    culprit = comm.size // 2
    train(opt, net, 2)
    opt.zero_grad()
    net.loss(2).backward()
    if comm.rank == culprit:
        net.W1.grad[0, 0] = float("inf")

    def go_on() -> None:
        opt.step()
        train(opt, net, 30)

    with pytest.raises(AgentFault, match=rf"agent {culprit}, step 3: .*NaN or infinite") as raised:
        go_on()
    fault = raised.value.fault
    assert (fault.agent, fault.reason, fault.at) == (culprit, Reason.NON_FINITE, 3)
    assert opt.steps == fault.step == 3 + agents.graph.diameter
    same_everywhere(comm, (opt.steps, fault))
    with pytest.raises(AgentFault):
        opt.close()


def test_not_finite_from_the_start(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net = Net(Problem(comm.size), comm.rank)
    if comm.rank == comm.size - 1:
        with torch.no_grad():
            net.b1[0] = float("nan")
    opt = of_kind("cdsgd", net, agents)
    fault = until_fault(opt, net)
    assert (fault.agent, fault.reason, fault.at) == (comm.size - 1, Reason.NON_FINITE, 0)
    same_everywhere(comm, (opt.steps, fault))


@pytest.mark.parametrize("topology", GRAPHS)
def test_the_loop_may_end_before_the_fault_is_known(comm: MPI.Intracomm, topology: str) -> None:
    """A fault at the last step reaches agents far away only through close()."""
    net, opt, _ = ready(comm, topology)
    train(opt, net, 2)
    opt.zero_grad()
    net.loss(2).backward()
    if comm.rank == comm.size - 1:
        opt.report(Reason.NON_FINITE_LOSS)
    if comm.size > 1:
        opt.step()
    else:
        with pytest.raises(AgentFault):
            opt.step()
    with pytest.raises(AgentFault, match=rf"agent {comm.size - 1}, step 3: the loss"):
        opt.close()


def test_a_fault_reported_after_the_last_step(comm: MPI.Intracomm) -> None:
    net, opt, _ = ready(comm)
    train(opt, net, 2)
    if comm.rank == 0:
        opt.report(Reason.NON_FINITE_LOSS)
    with pytest.raises(AgentFault, match="agent 0, step 2: the loss"):
        opt.close()


@pytest.mark.parametrize(("topology", "tau"), [*((graph, 1) for graph in GRAPHS), ("chain", 3)])
def test_a_stop_reaches_all_after_the_same_step(
    comm: MPI.Intracomm, topology: str, tau: int
) -> None:
    """Wanted by one agent, at any of its steps; of two the earlier one holds."""
    net, opt, agents = ready(comm, topology, rounds=tau)
    stopped = None
    for k in range(40):
        train(opt, net, 1, start=k)
        assert stopped is None or opt.stopping
        if opt.stopping and stopped is None:
            stopped = opt.steps
        if comm.rank == comm.size - 1 and k == 4:
            opt.request_stop()
        if comm.rank == 0 and k == 5:
            opt.request_stop()
        if stopped is not None and opt.steps >= stopped + 2:
            break
    assert stopped is not None
    assert 5 <= stopped <= 5 + 1 + agents.graph.diameter
    same_everywhere(comm, stopped)
    opt.close()


def test_a_stop_does_not_hide_a_fault(comm: MPI.Intracomm) -> None:
    net, opt, _ = ready(comm)
    train(opt, net, 2)
    opt.zero_grad()
    net.loss(2).backward()
    if comm.rank == 0:
        opt.request_stop()
        net.W1.grad.fill_(float("nan"))

    def go_on() -> None:
        opt.step()
        for _ in range(30):
            if opt.stopping:
                opt.close()
                return
            opt.zero_grad()
            net.loss(0).backward()
            opt.step()

    with pytest.raises(AgentFault, match="agent 0, step 3"):
        go_on()
    with pytest.raises(AgentFault):
        opt.close()


def test_a_stop_is_kept_when_a_group_is_added(comm: MPI.Intracomm) -> None:
    """The exchange is made anew; who only wanted a stop and who knew of one still do."""
    agents = make_agents(comm, "chain")
    net = Net(Problem(comm.size), comm.rank)
    opt = CDMSGD([net.W1], lr=0.05, agents=agents)
    if comm.rank == 0:
        opt.request_stop()
    opt.add_param_group({"params": [net.b1]})
    steps = 0
    while not opt.stopping and steps < 20:
        train(opt, net, 1)
        steps += 1
    assert opt.stopping
    same_everywhere(comm, steps)
    if comm.rank == comm.size - 1:
        assert steps <= 1 + agents.graph.diameter
    opt.close()


def test_faults_leave_the_others_intact(comm: MPI.Intracomm) -> None:
    """Two optimizers at once: a fault of one is none of the other."""
    net, opt, agents = ready(comm)
    other = Net(Problem(comm.size, seed=1), comm.rank)
    sound = of_kind("cdsgd", other, agents)
    if comm.rank == 0:
        opt.report(Reason.NON_FINITE_LOSS)
    train(sound, other, 2)
    until_fault(opt, net)
    train(sound, other, 2)
    assert np.isfinite(gather(comm, other.vector())).all()
    sound.close()

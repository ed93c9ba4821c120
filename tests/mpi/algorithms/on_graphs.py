"""Checks that any algorithm over a graph passes, by its name: used for each of the newer ones."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import Matrix, Net, Problem, gather, make_agents, relative, train

from mpicdsgd import AgentFault, AgentLeft, AgentMissing, Agents, ExchangeConfig, Graph, optimizer
from mpicdsgd.algorithms.contract import Circumstances
from mpicdsgd.algorithms.registry import algorithms
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.graphs import mixing_rules
from mpicdsgd.simulation.exact import ExactRows

LR, DECAY = 0.05, 0.02


def directed(comm: MPI.Intracomm, lazy: bool = False) -> Agents:
    """A ring one way with chords: other degrees in and out, column-stochastic weights."""
    n = comm.size
    edges = [(j, (j + 1) % n) for j in range(n if n > 1 else 0)]
    edges += [(0, 2), (0, 3)] if n > 3 else []
    mixing = mixing_rules.out_degree(Graph.from_edges(n, edges, directed=True))
    return Agents(comm, mixing_rules.lazy(mixing) if lazy else mixing, device="cpu")


def ready(
    name: str, agents: Agents, problem: Problem | None = None, **options: Any
) -> tuple[Net, Any]:
    net = Net(problem or Problem(agents.size), agents.rank)
    settings = {"lr": LR, "weight_decay": DECAY} | options
    return net, optimizer(name, net.parameters(), agents=agents, **settings)


def exact(name: str, agents: Agents, problem: Problem, **settings: Any) -> ExactRows:
    kind = algorithms()[name]
    made = kind(kind.Settings(**{"lr": LR, "weight_decay": DECAY} | settings),
                Circumstances(agents=agents.size))  # fmt: skip
    start = problem.start.astype(np.float64)
    return ExactRows(start, agents.mixing, made, lambda k, X: problem.gradient(k, X)[0])


def everyones(comm: MPI.Intracomm, opt: Any, name: str) -> Matrix:
    """A vector of all agents without the padding, in the order of the tensors. Collective."""
    values = opt.arrays()[name]
    views = opt.arena.views_of(torch.from_numpy(np.array(values)))
    return gather(comm, np.concatenate([view.reshape(-1).numpy() for view in views]))


def same_state(comm: MPI.Intracomm, opt: Any, other: Any) -> None:
    assert opt.steps == other.steps
    found, expected = other.arrays(), opt.arrays()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def goes_on_bit_by_bit(comm: MPI.Intracomm, name: str, agents: Agents, wire: str) -> None:
    """From `arrays`, and from `state_dict` with the model's own."""
    exchange = ExchangeConfig(wire=wire)
    net, opt = ready(name, agents, exchange=exchange)
    train(opt, net, 5)
    arrays = {key: np.array(values) for key, values in opt.arrays().items()}
    state = opt.state_dict()
    model = {key: values.clone() for key, values in net.state_dict().items()}
    train(opt, net, 4, start=5)
    again, other = ready(name, agents, exchange=exchange)
    other.load_arrays(5, arrays)
    train(other, again, 4, start=5)
    same_state(comm, opt, other)
    third, last = ready(name, agents, exchange=exchange)
    train(last, third, 2)  # what it has is to be forgotten
    third.load_state_dict(model)
    last.load_state_dict(state)
    train(last, third, 4, start=5)
    same_state(comm, opt, last)
    for one in (opt, other, last):
        one.close()


def stops_at_the_same_step(comm: MPI.Intracomm, name: str, agents: Agents) -> None:
    net, opt = ready(name, agents)
    stopped = 0
    for k in range(30):
        train(opt, net, 1, start=k)
        if comm.rank == comm.size - 1 and k == 4:
            opt.request_stop()
        if opt.stopping:
            stopped = opt.steps
            break
    assert 5 <= stopped <= 6 + agents.graph.diameter
    assert set(comm.allgather(stopped)) == {stopped}
    opt.close()


def faults_at_the_same_step(comm: MPI.Intracomm, name: str, agents: Agents) -> None:
    net, opt = ready(name, agents)
    train(opt, net, 2)
    culprit = comm.size // 2

    def go_on() -> None:
        for k in range(2, 30):
            opt.zero_grad()
            net.loss(k).backward()
            if k == 3 and comm.rank == culprit:
                net.W1.grad[0, 0] = float("inf")  # type: ignore[index]
            opt.step()

    with pytest.raises(AgentFault, match=rf"agent {culprit}, step 4: .*NaN or infinite") as raised:
        go_on()
    assert raised.value.fault.step == opt.steps
    assert set(comm.allgather(opt.steps)) == {opt.steps}
    with pytest.raises(AgentFault, match=re.escape(str(raised.value))):
        opt.close()


def a_last_fault_is_told_by_close(comm: MPI.Intracomm, name: str, agents: Agents) -> None:
    net, opt = ready(name, agents)
    train(opt, net, 3)
    if comm.rank == 0:
        opt.report(Reason.NON_FINITE_LOSS)
    with pytest.raises(AgentFault, match="agent 0, step 3: the loss"):
        opt.close()


def changes_by_hand_are_found(comm: MPI.Intracomm, name: str, agents: Agents) -> None:
    net, opt = ready(name, agents)
    train(opt, net, 3)
    if comm.rank == 0:
        with torch.no_grad():
            net.b1[0] += 1.0
    with pytest.raises(AgentFault, match="agent 0"):
        train(opt, net, 20, start=3)
    assert set(comm.allgather(opt.steps)) == {opt.steps}
    with pytest.raises(AgentFault):
        opt.close()


def who_leaves_is_named(comm: MPI.Intracomm, name: str, agents: Agents) -> None:
    """An agent that makes fewer steps than the others."""
    if comm.size == 1:
        pytest.skip("nobody else is there")
    net, opt = ready(name, agents)
    leaver = comm.size - 1
    train(opt, net, 3)
    if comm.rank != leaver:
        with pytest.raises(AgentLeft, match=f"agent {leaver} left after step 3"):
            train(opt, net, 30, start=3)
    opt.close()


def who_is_missing_is_named(comm: MPI.Intracomm, name: str, agents: Agents) -> None:
    """The others wait no longer than the timeout."""
    if comm.size == 1:
        pytest.skip("nobody else is there")
    net, opt = ready(name, agents, exchange=ExchangeConfig(timeout_s=0.5))
    train(opt, net, 2)
    missing = comm.size - 1
    if comm.rank != missing:
        with pytest.raises(AgentMissing, match=r"nothing came from agents|do not receive"):
            train(opt, net, 30, start=2)
    comm.Barrier()
    opt.close()


def an_overflow_leaves_out_one_gradient(comm: MPI.Intracomm, name: str, agents: Agents) -> None:
    """As `mix` on that agent alone."""
    net, opt = ready(name, agents)
    plain, other = ready(name, agents)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    overflows = comm.rank == comm.size - 1
    for k in range(4):
        plain.zero_grad()
        plain.loss(k).backward()
        if k == 2 and overflows:
            other.mix()
        else:
            other.step()
        opt.zero_grad()
        scaler.scale(net.loss(k)).backward()
        if k == 2 and overflows:
            net.b1.grad[0] = float("inf")  # type: ignore[index]
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == (32.0 if overflows else 64.0)
    for key, values in other.arrays().items():
        np.testing.assert_allclose(opt.arrays()[key], values, rtol=2e-6, atol=1e-7)
    opt.close()
    other.close()


def a_loss_that_is_no_number_is_a_fault(comm: MPI.Intracomm, name: str, agents: Agents) -> None:
    """Told by ``found_inf``, as a run on a GPU does it."""
    net, opt = ready(name, agents)
    opt.skipped_means_fault = True

    def go_on() -> None:
        for k in range(30):
            opt.zero_grad()
            net.loss(k).backward()
            opt.found_inf = torch.full((), float(k == 2 and comm.rank == 0))
            opt.step()
            del opt.found_inf

    with pytest.raises(AgentFault, match="agent 0, step 3: the loss is NaN"):
        go_on()
    assert np.isfinite(opt.x).all()
    with pytest.raises(AgentFault):
        opt.close()


def a_group_added_on_the_way(comm: MPI.Intracomm, name: str) -> tuple[Net, Any, Any]:
    """Three steps with some parameters, then one step with all; what was kept before it."""
    agents = make_agents(comm)
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    opt = optimizer(name, [net.W1, net.b1, net.W2], agents=agents, lr=LR)
    train(opt, net, 3)
    kept = {key: everyones(comm, opt, key) for key in opt.arrays() if opt.arrays()[key].size > 1}
    opt.add_param_group({"params": [net.b2, net.s], "lr": 0.02})
    for key, values in kept.items():
        found = everyones(comm, opt, key)
        np.testing.assert_array_equal(found[:, : values.shape[1]], values, err_msg=key)
    net.zero_grad()
    train(opt, net, 3, start=3)
    assert np.isfinite(opt.x).all()
    assert opt.steps == 6
    return net, opt, kept


def is_near(comm: MPI.Intracomm, net: Net, X: Matrix, tolerance: float = 1e-5) -> None:
    assert relative(gather(comm, net.vector()), X) <= tolerance

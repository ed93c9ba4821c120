"""Stochastic gradient push over MPI: its recursion in float64, its weights, and a job's manners.

P, w    column-stochastic weights of the graph, and the agents' numbers; z = x / w is the model
"""

from __future__ import annotations

import numpy as np
import on_graphs
import pytest
import torch
from mpi4py import MPI
from on_graphs import DECAY, LR, directed, exact, is_near, ready
from oracle import Problem, gather, make_agents, relative, train

from mpicdsgd import CDSGD, Agents, ExchangeConfig, UserError
from mpicdsgd.graphs.mixing_matrix import DOUBLY

NAME = "push-sum"
GRAPHS = [
    "directed", "lazy", "ring/metropolis", "star/metropolis", "complete/uniform", "expo/one-peer",
    "expo/out-degree", "ring/matchings",
]  # fmt: skip


def agents_on(comm: MPI.Intracomm, graph: str) -> Agents:
    if graph in ("directed", "lazy"):
        return directed(comm, lazy=graph == "lazy")
    topology, _, mixing = graph.partition("/")
    return make_agents(comm, topology, mixing)


def weights(comm: MPI.Intracomm, opt: object) -> np.ndarray:
    return np.array(comm.allgather(float(opt.arrays()["link/weight"][0])))  # type: ignore[attr-defined]


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_recursion(comm: MPI.Intracomm, graph: str) -> None:
    agents = agents_on(comm, graph)
    net, opt = ready(NAME, agents)
    twin = exact(NAME, agents, net.problem)
    for k in range(30):
        train(opt, net, 1, start=k)
        twin.run(1)
        w = weights(comm, opt)
        assert w.sum() == pytest.approx(comm.size, abs=1e-13 * comm.size)
        np.testing.assert_allclose(w, twin.number("weight"), rtol=1e-13)
    is_near(comm, net, twin.x.numpy())
    if comm.size > 3 and graph == "directed":
        assert w.max() - w.min() > 0.2
    opt.close()


@pytest.mark.parametrize("graph", ["directed", "expo/one-peer"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_without_gradients_all_have_the_mean(comm: MPI.Intracomm, graph: str, wire: str) -> None:
    """With a 16-bit wire it moves by less than the wire's rounding, while the weights settle."""
    agents = agents_on(comm, graph)
    net, opt = ready(NAME, agents, exchange=ExchangeConfig(wire=wire))
    mean = net.problem.start.astype(np.float64).mean(axis=0)
    for _ in range(60):
        opt.mix()
    w, Z = weights(comm, opt), gather(comm, net.vector())
    error = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[wire]
    assert np.abs(w @ Z / comm.size - mean).max() <= max(1e-6, error / 8) * np.abs(mean).max()
    assert np.abs(Z - mean).max() <= max(1e-5, 4 * error) * np.abs(mean).max()
    opt.close()


def test_a_regular_graph_is_adapt_then_combine(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm, "expo", "uniform")
    net, opt = ready(NAME, agents)
    train(opt, net, 20)
    X = net.problem.start.astype(np.float64)
    for k in range(20):
        X = agents.mixing.Pi @ (X - LR * (net.problem.gradient(k, X)[0] + DECAY * X))
    is_near(comm, net, X)
    np.testing.assert_allclose(weights(comm, opt), 1.0, rtol=1e-14)
    opt.close()


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_wires(comm: MPI.Intracomm, wire: str) -> None:
    agents = directed(comm)
    net, opt = ready(NAME, agents, exchange=ExchangeConfig(wire=wire))
    train(opt, net, 30)
    error = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[wire]
    is_near(comm, net, exact(NAME, agents, net.problem).run(30), max(1e-5, 8 * error))
    opt.close()


def test_unused_and_frozen(comm: MPI.Intracomm) -> None:
    agents = directed(comm)
    problem = Problem(comm.size, unused=True, frozen=("W1",))
    net, opt = ready(NAME, agents, problem)
    train(opt, net, 20)
    P, X, w = agents.mixing.Pi, problem.start.astype(np.float64), np.ones((comm.size, 1))
    for k in range(20):
        Z = X / w
        G, given = problem.gradient(k, Z)
        X, w = P @ (X - LR * np.where(given, G + DECAY * Z, 0)), P @ w
    is_near(comm, net, X / w)
    opt.close()


@pytest.mark.parametrize("graph", ["directed", "expo/one-peer"])
@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_going_on_bit_by_bit(comm: MPI.Intracomm, graph: str, wire: str) -> None:
    on_graphs.goes_on_bit_by_bit(comm, NAME, agents_on(comm, graph), wire)


def test_a_group_added_on_the_way(comm: MPI.Intracomm) -> None:
    _, opt, _ = on_graphs.a_group_added_on_the_way(comm, NAME)
    assert weights(comm, opt).sum() == pytest.approx(comm.size)
    opt.close()


def test_parameters_changed_by_hand_weigh_the_same(comm: MPI.Intracomm) -> None:
    """What agents publish anew is what their mean is taken of."""
    agents = directed(comm)
    net, opt = ready(NAME, agents, lr=0.0)
    train(opt, net, 3)
    with torch.no_grad():
        net.b1 += comm.rank
    opt.publish()
    np.testing.assert_array_equal(weights(comm, opt), 1.0)
    mean = gather(comm, net.vector()).mean(axis=0)
    for _ in range(60):
        opt.mix()
    assert relative(gather(comm, net.vector()), np.tile(mean, (comm.size, 1))) <= 1e-5
    opt.close()


def test_another_number_of_agents(comm: MPI.Intracomm) -> None:
    """The weights begin anew, as they would not add up to N."""
    net, opt = ready(NAME, directed(comm))
    train(opt, net, 3)
    arrays = {key: np.array(values) for key, values in opt.arrays().items()}
    opt.load_arrays(3, opt.context.begun_anew(arrays))
    np.testing.assert_array_equal(weights(comm, opt), 1.0)
    train(opt, net, 3, start=3)
    assert weights(comm, opt).sum() == pytest.approx(comm.size)
    opt.close()


@pytest.mark.parametrize("graph", ["directed", "star/metropolis", "expo/one-peer"])
def test_stops_and_faults(comm: MPI.Intracomm, graph: str) -> None:
    """Nothing is under way between two steps: all is told in the next one."""
    agents = agents_on(comm, graph)
    on_graphs.stops_at_the_same_step(comm, NAME, agents)
    on_graphs.faults_at_the_same_step(comm, NAME, agents)
    on_graphs.a_last_fault_is_told_by_close(comm, NAME, agents)
    on_graphs.changes_by_hand_are_found(comm, NAME, agents)
    on_graphs.a_loss_that_is_no_number_is_a_fault(comm, NAME, agents)


def test_who_leaves(comm: MPI.Intracomm) -> None:
    on_graphs.who_leaves_is_named(comm, NAME, directed(comm))


def test_who_is_missing(comm: MPI.Intracomm) -> None:
    on_graphs.who_is_missing_is_named(comm, NAME, directed(comm))


def test_close_without_a_step_and_twice(comm: MPI.Intracomm) -> None:
    _, opt = ready(NAME, directed(comm))
    opt.close()
    opt.close()
    with pytest.raises(RuntimeError, match="was closed"):
        opt.mix()


def test_an_overflow(comm: MPI.Intracomm) -> None:
    on_graphs.an_overflow_leaves_out_one_gradient(comm, NAME, directed(comm))


def test_others_refuse_column_stochastic_weights(comm: MPI.Intracomm) -> None:
    for agents in (directed(comm), directed(comm, lazy=True)):
        if agents.mixing.stochastic == DOUBLY:
            assert comm.size < 4
            continue
        x = torch.nn.Parameter(torch.zeros(3))
        text = f"mixing {agents.mixing.name} is column-stochastic, with which CDSGD would not.*"
        with pytest.raises(UserError, match=text + '"push-sum", which corrects for it'):
            CDSGD([x], agents=agents)

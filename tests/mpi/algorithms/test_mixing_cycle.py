"""Training on graphs that change by turns: exact averages, restarts and publishing in mid-cycle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import (
    Net,
    Problem,
    cdmsgd,
    gather,
    make_agents,
    of_kind,
    pair,
    relative,
    train,
    turns_of,
)

from mpicdsgd import (
    CDMSGD,
    Agents,
    ExchangeConfig,
    Graph,
    UserError,
    alternating_matchings,
    complete,
    mixing_cycle,
    ring,
)

CYCLES = [("expo", "one-peer"), ("ring", "matchings")]


def random_cycle(n: int, turns: int) -> Any:
    """Doubly stochastic turns on a directed graph, each a mean of few permutations."""
    rng = np.random.default_rng(n)
    everybody = [(a, b) for a in range(n) for b in range(n) if a != b]
    graph = Graph.from_edges(n, everybody, directed=True)
    eye = np.eye(n)
    matrices = []
    for _ in range(turns):
        own, *shares = rng.dirichlet(np.ones(3))
        matrices.append(own * eye + sum(s * eye[rng.permutation(n)] for s in shares))
    matrices.append((eye + np.roll(eye, 1, axis=0)) / 2)  # connects them for certain
    return mixing_cycle(matrices, graph)


@pytest.mark.parametrize("tau", [1, 2, 3])
@pytest.mark.parametrize("transport", ["direct", "neighbor"])
def test_turns_that_all_differ(comm: MPI.Intracomm, transport: str, tau: int) -> None:
    """Who took another turn's weights or sources, or Pi's transpose, would be found here."""
    agents = Agents(comm, random_cycle(comm.size, 3))
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    config = ExchangeConfig(transport=transport)
    opt = of_kind("nesterov", net.parameters(), agents, rounds=tau, exchange=config)
    train(opt, net, 11)
    X, _ = cdmsgd(
        turns_of(agents), problem.start, problem.gradient, 11, lambda k: 0.05,
        form="nesterov", mu=0.9, tau=tau,
    )  # fmt: skip
    assert relative(gather(comm, net.vector()), X) <= 1e-5
    opt.close()


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_one_peer_turns_make_all_agents_equal(comm: MPI.Intracomm, wire: str) -> None:
    if comm.size & (comm.size - 1):
        pytest.skip("exact for a power of two")
    agents = make_agents(comm, "expo", "one-peer")
    net, opt = pair(agents, "cdsgd", exchange=ExchangeConfig(wire=wire))
    mean = gather(comm, net.vector()).mean(axis=0)
    for _ in agents.turns:
        opt.mix()
    tolerance = 1e-6 if wire == "float32" else 2e-2
    assert np.abs(gather(comm, net.vector()) - mean).max() <= tolerance
    opt.close()


@pytest.mark.parametrize(("topology", "mixing"), CYCLES)
@pytest.mark.parametrize("form", ["nesterov", "look-ahead", "adamw"])
def test_going_on_in_mid_cycle(comm: MPI.Intracomm, topology: str, mixing: str, form: str) -> None:
    """After 4 steps, which no cycle of 3 turns divides: the same bits as without a stop."""
    agents = make_agents(comm, topology, mixing)
    whole, opt = pair(agents, form)
    train(opt, whole, 9)
    opt.close()
    first, opt = pair(agents, form)
    train(opt, first, 4)
    kept = {name: array.copy() for name, array in opt.arrays().items()}
    opt.close()
    second, opt = pair(agents, form)
    opt.load_arrays(4, kept)
    train(opt, second, 5, start=4)
    opt.close()
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("topology", "mixing"), CYCLES)
def test_publishing_keeps_the_turn(comm: MPI.Intracomm, topology: str, mixing: str) -> None:
    agents = make_agents(comm, topology, mixing)
    net, opt = pair(agents, "cdsgd")
    train(opt, net, 1)
    X = gather(comm, net.vector())
    opt.publish()
    opt.publish()
    opt.mix()
    turn = agents.mixing.turns[1 % len(agents.turns)]
    assert relative(gather(comm, net.vector()), turn.Pi @ X) <= 1e-6
    opt.close()


@pytest.mark.parametrize("transport", ["direct", "neighbor"])
def test_bytes_of_one_peer(comm: MPI.Intracomm, transport: str) -> None:
    """A step sends the values once, and 64 bytes to all who are ever a neighbour."""
    if comm.size == 1:
        pytest.skip("nobody to send to")
    agents = make_agents(comm, "expo", "one-peer")
    p = torch.nn.Parameter(torch.zeros(1000))
    opt = CDMSGD([p], lr=0.1, agents=agents, exchange=ExchangeConfig(transport=transport))
    before = opt.exchange.bytes_sent
    for _ in range(6):
        opt.mix()
    peers = {*agents.sources, *agents.destinations}
    values = -(-opt.arena.size * 4 // 64)
    assert opt.exchange.bytes_sent - before == 6 * 64 * (values + len(peers))
    opt.close()


def test_ranks_with_cycles_in_another_order(comm: MPI.Intracomm) -> None:
    if comm.size < 3:
        pytest.skip("needs two turns")
    turns = [turn.Pi for turn in alternating_matchings(ring(comm.size)).turns]
    if comm.rank == 1:
        turns = turns[::-1]
    with pytest.raises(UserError, match="must be the same on all ranks"):
        Agents(comm, mixing_cycle(turns, complete(comm.size)))

"""The systems that the paper compares with, each against its formula in dense float64 NumPy."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import (
    D,
    Matrix,
    Net,
    Problem,
    flatten,
    gather,
    make_agents,
    matrix,
    relative,
    train,
)

from mpicdsgd import (
    EAMSGD,
    EASGD,
    MSGD,
    SGD,
    Agents,
    Downpour,
    ExchangeConfig,
    FedAvg,
    GoSGD,
    GossipSGD,
    Server,
    UserError,
)
from mpicdsgd.cli import parser
from mpicdsgd.comm import shutdown
from mpicdsgd.comm.exchange.errors import AgentFault
from mpicdsgd.comm.exchange.header import Reason

pytestmark = pytest.mark.ranks(1, 2, 5)

ALPHA, MU = 0.05, 0.9


def problem_of(agents: Agents, **options: Any) -> tuple[Problem, Net]:
    problem = Problem(agents.size, **options)
    return problem, Net(problem, agents.rank)


def everybody_at_first(problem: Problem) -> Matrix:
    """All at agent 0's parameters."""
    return np.repeat(problem.start[:1].astype(np.float64), problem.n, axis=0)


# Centralised SGD


def centralised(problem: Problem, steps: int, form: str, decay: float = 0.0) -> Matrix:
    x, v = problem.start[0].astype(np.float64), np.zeros(D)
    for k in range(steps):
        at = x + MU * v if form == "look-ahead" else x
        G, _ = problem.gradient(k, np.repeat(at[None], problem.n, axis=0))
        h = ALPHA * (G.mean(0) + decay * at)
        v = MU * v - h
        x = x + {"none": -h, "polyak": v, "nesterov": MU * v - h, "look-ahead": v}[form]
    return np.repeat(x[None], problem.n, axis=0)


@pytest.mark.parametrize("form", ["none", "polyak", "nesterov", "look-ahead"])
@pytest.mark.parametrize("unused", [False, True])
def test_sgd_averages_gradients(comm: MPI.Intracomm, form: str, unused: bool) -> None:
    agents = make_agents(comm)
    problem, net = problem_of(agents, unused=unused)
    nesterov: Any = {"polyak": False, "nesterov": True}.get(form, form)
    opt: Any = (
        SGD(net.parameters(), ALPHA, 0.01, agents=agents)
        if form == "none"
        else MSGD(net.parameters(), ALPHA, MU, nesterov, 0.01, agents=agents)
    )
    train(opt, net, 12)
    X = gather(comm, np.array(opt.arrays()["x"]))
    with opt.evaluating():
        found = gather(comm, net.vector())
    assert relative(found, centralised(problem, 12, form, 0.01)) <= 1e-5
    np.testing.assert_array_equal(X, np.repeat(X[:1], comm.size, axis=0))
    opt.close()


def test_several_backwards_and_clipping_see_the_mean(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    problem, net = problem_of(agents)
    opt = SGD(net.parameters(), ALPHA, agents=agents)
    x = problem.start[0].astype(np.float64)
    for k in range(6):
        opt.zero_grad(set_to_none=k % 2 == 0)
        net.loss(k).backward()
        net.loss(k + 1).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        X = np.repeat(x[None], problem.n, axis=0)
        g = (problem.gradient(k, X)[0] + problem.gradient(k + 1, X)[0]).mean(0)
        assert float(norm) == pytest.approx(np.linalg.norm(g), rel=1e-4)
        x = x - ALPHA * g * min(1.0, 0.1 / np.linalg.norm(g))
        opt.step()
    assert relative(net.vector(), x) <= 1e-5
    opt.close()


def test_backwards_over_parts_of_the_model(comm: MPI.Intracomm, monkeypatch: Any) -> None:
    """Buckets of one parameter each; two losses that share some parameters."""
    monkeypatch.setattr("mpicdsgd.comm.links.mean_gradients.BUCKET", 1)
    agents = make_agents(comm)
    torch.manual_seed(0)
    one, two, three = (torch.nn.Parameter(torch.randn(3)) for _ in range(3))
    frozen = torch.nn.Parameter(torch.randn(2), requires_grad=False)
    opt = SGD([one, frozen, two, three], 1.0, agents=agents)
    before = [p.detach().clone() for p in (one, two, three)]
    r = float(agents.rank)
    opt.zero_grad()
    (one.sum() * r + two.sum()).backward()
    (two.sum() * 2 * r + three.sum() * 3).backward()
    opt.step()
    mean = (comm.size - 1) / 2
    for p, was, g in zip((one, two, three), before, (mean, 1 + 2 * mean, 3.0), strict=True):
        torch.testing.assert_close(p.detach(), was - g)
    frozen.requires_grad_(True)
    assert frozen.grad is None
    opt.close()


def test_sgd_without_own_gradient(comm: MPI.Intracomm) -> None:
    """An agent that calls mix() in the place of its step does not leave the others waiting."""
    agents = make_agents(comm)
    problem, net = problem_of(agents)
    opt = SGD(net.parameters(), ALPHA, agents=agents)
    opt.zero_grad()
    if agents.rank == 0:
        opt.mix()
    else:
        net.loss(0).backward()
        opt.step()
    G, _ = problem.gradient(0, everybody_at_first(problem))
    expected = problem.start[0] - ALPHA * G[1:].sum(0) / problem.n
    assert relative(net.vector(), expected) <= 1e-5
    opt.close()


# FedAvg


@pytest.mark.parametrize(("fraction", "beta"), [(1.0, 0.0), (0.5, 0.0), (0.5, 0.9), (0.01, 0.5)])
def test_fedavg(comm: MPI.Intracomm, fraction: float, beta: float) -> None:
    agents = make_agents(comm)
    problem, net = problem_of(agents)
    period, n = 3, comm.size
    samples = np.arange(n) + 1
    opt = FedAvg(
        net.parameters(), ALPHA, agents=agents, period=period, fraction=fraction,
        samples=int(samples[agents.rank]), server_momentum=beta, seed=7,
    )  # fmt: skip
    X, s, m = everybody_at_first(problem), problem.start[0].astype(np.float64), np.zeros(D)
    chosen_ever = set()
    for k in range(4 * period + 1):
        chosen = opt.algorithm.chosen(k // period, n)
        assert len(chosen) == max(1, int(fraction * n))
        chosen_ever |= set(chosen.tolist())
        assert opt.takes_part == (agents.rank in chosen)
        if opt.takes_part:
            train(opt, net, 1, start=k)
        else:
            opt.mix()
        G, _ = problem.gradient(k, X)
        X[chosen] -= ALPHA * G[chosen]
        if (k + 1) % period == 0:
            share = samples[chosen] / samples[chosen].sum()
            m = beta * m + share @ (X[chosen] - s)
            s = s + m
            X = np.repeat(s[None], n, axis=0)
    assert relative(gather(comm, net.vector()), X) <= 1e-5
    assert len(chosen_ever) > 1 or n == 1 or fraction == 0.01
    opt.close()


# EASGD


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("kind", [EASGD, EAMSGD])
def test_easgd_synchronous(comm: MPI.Intracomm, kind: Any, period: int) -> None:
    agents = make_agents(comm)
    problem, net = problem_of(agents)
    e = 0.5 / comm.size
    more = {"momentum": MU} if kind is EAMSGD else {}
    opt = kind(net.parameters(), ALPHA, agents=agents, period=period, elasticity=e, **more)
    X, c = problem.start.astype(np.float64), problem.start[0].astype(np.float64)
    V = np.zeros_like(X)
    for k in range(10):
        mu = MU if kind is EAMSGD else 0.0
        G, _ = problem.gradient(k, X + mu * V)
        V = mu * V - ALPHA * G
        pull = e * (c - X) if k % period == 0 else np.zeros_like(X)
        X, c = X + pull + V, c - pull.sum(0)
    train(opt, net, 10)
    with opt.evaluating():
        assert relative(gather(comm, net.vector()), X) <= 1e-5
    # The pull that is due after the last step is the centre's and the agents' at once.
    opt.rest()
    assert relative(flatten(centre_of(opt)), c) <= 1e-5
    opt.close()


# Gossip


@pytest.mark.parametrize("topology", ["ring", "star", "complete"])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_gossip_in_pairs(comm: MPI.Intracomm, topology: str, p: float) -> None:
    agents = make_agents(comm, topology)
    problem, net = problem_of(agents)
    opt = GossipSGD(net.parameters(), ALPHA, agents=agents, probability=p, seed=3)
    algorithm: Any = opt.algorithm
    X = problem.start.astype(np.float64)
    met = 0
    for k in range(8):
        train(opt, net, 1, start=k)
        X = X - ALPHA * problem.gradient(k, X)[0]
        partners = comm.allgather(int(algorithm.partners(opt.context, k + 1)[0]))
        partners = [other if other >= 0 else None for other in partners]
        for j, other in enumerate(partners):
            if other is not None:
                assert partners[other] == j
                assert other in agents.graph.sources[j]
                met += 1
        Pi = np.eye(comm.size)
        for j, other in enumerate(partners):
            if other is not None:
                Pi[j, j] = Pi[j, other] = 0.5
        X = Pi @ X
    assert relative(gather(comm, net.vector()), X) <= 1e-5
    assert (met > 0) == (p > 0 and comm.size > 1)
    assert comm.allreduce(opt.exchange.bytes_sent) == 4 * opt.arena.size * met
    opt.close()


@pytest.mark.parametrize("topology", ["ring", "expo", "complete"])
def test_gosgd_keeps_weights_and_weighted_mean(comm: MPI.Intracomm, topology: str) -> None:
    agents = make_agents(comm, topology)
    _, net = problem_of(agents)
    opt = GoSGD(net.parameters(), ALPHA, agents=agents, probability=0.7, seed=1)
    start = gather(comm, net.vector())
    for _ in range(50):
        opt.mix()
    opt.rest()
    w = np.array(comm.allgather(opt.weight))
    assert w.sum() == pytest.approx(1.0, abs=1e-12)
    assert (w > 0).all()
    assert relative(w @ gather(comm, net.vector()), start.mean(0)) <= 1e-5
    if comm.size > 1:
        assert comm.allreduce(opt.exchange.bytes_sent) > 0
    opt.close()


def test_gosgd_learns_as_centralised_sgd_does(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm, "complete")
    losses = {}
    for kind in (SGD, GoSGD):
        _, net = problem_of(agents)
        agents.broadcast(net)
        more = {"probability": 1.0} if kind is GoSGD else {}
        with kind(net.parameters(), 0.2, agents=agents, **more) as opt:
            for k in range(150):
                train(opt, net, 1, start=k)
                opt.rest()  # else one may run ahead for as long as another is not scheduled
        losses[kind] = comm.allreduce(sum(net.loss(k).item() for k in range(3)))
    _, net = problem_of(agents)
    agents.broadcast(net)
    start = comm.allreduce(sum(net.loss(k).item() for k in range(3)))
    assert start - losses[GoSGD] > 0.5 * (start - losses[SGD]) > 0


# With a server


@contextmanager
def serving(comm: MPI.Intracomm) -> Iterator[tuple[Agents | None, Server]]:
    """Agents and the server's handle; agents are None on the server's rank, which serves."""
    if comm.size < 2:
        pytest.skip("a server needs a rank of its own")
    server = Server(comm)
    if server.is_here:
        assert server.serve() == 0
        yield None, server
    else:
        yield Agents(server.comm, matrix(server.comm.size), device="cpu"), server
        server.close()


def test_a_server_needs_a_rank() -> None:
    with pytest.raises(UserError, match="no rank is left for the server"):
        Server(MPI.COMM_SELF)


def in_turn(agents: Agents, act: Callable[[], None]) -> None:
    """One agent after the other, each when the one before is through."""
    for rank in range(agents.size):
        if rank == agents.rank:
            act()
        agents.comm.Barrier()


@pytest.mark.parametrize("adagrad", [False, True])
@pytest.mark.parametrize(("push", "fetch"), [(1, 1), (2, 1), (2, 3)])
def test_downpour_in_lock_step(comm: MPI.Intracomm, push: int, fetch: int, adagrad: bool) -> None:
    with serving(comm) as (agents, server):
        if agents is None:
            return
        problem, net = problem_of(agents)
        opt = Downpour(
            net.parameters(), ALPHA, 0.01, agents=agents, server=server,
            n_push=push, n_fetch=fetch, adagrad=adagrad,
        )  # fmt: skip
        X, s = everybody_at_first(problem), problem.start[0].astype(np.float64)
        H, squares = np.zeros_like(X), np.zeros(D)
        for k in range(7):

            def act(k: int = k) -> None:
                train(opt, net, 1, start=k)
                opt.exchange._ask(7, np.zeros(0, np.float32), [np.zeros(1, np.int64)])  # applied

            in_turn(agents, act)
            G, _ = problem.gradient(k, X)
            for j in range(agents.size):
                h = G[j] + 0.01 * X[j]
                X[j] -= ALPHA * h
                H[j] += h
                if (k + 1) % push == 0:
                    step = ALPHA * H[j]
                    if adagrad:
                        squares += H[j] ** 2
                        step = step / (np.sqrt(squares) + 1e-10)
                    s = s - step
                    H[j] = 0
                if (k + 1) % fetch == 0:
                    X[j] = s
        assert relative(gather(agents.comm, net.vector()), X) <= 1e-5
        opt.rest()
        assert relative(flatten(centre_of(opt)), s) <= 1e-5
        opt.close()


def centre_of(opt: Any) -> list[torch.Tensor]:
    centre = opt.exchange.centre()
    return opt.arena.views_of(centre)[: len(opt.arena.parameters)]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [EASGD, EAMSGD])
@pytest.mark.parametrize("period", [1, 2])
def test_easgd_with_a_server_in_lock_step(comm: MPI.Intracomm, kind: Any, period: int) -> None:
    with serving(comm) as (agents, server):
        if agents is None:
            return
        problem, net = problem_of(agents)
        e = 0.3
        agents.broadcast(net)
        more = {"momentum": MU} if kind is EAMSGD else {}
        opt = kind(net.parameters(), ALPHA, agents=agents, server=server, period=period,
                   elasticity=e, **more)  # fmt: skip
        mu = MU if kind is EAMSGD else 0.0
        # The first pulls are 0, in any order, as long as they come before all others.
        in_turn(agents, opt.exchange._settle)
        X, c = everybody_at_first(problem), problem.start[0].astype(np.float64)
        V, pulls = np.zeros_like(X), np.zeros_like(X)
        for k in range(7):

            def act(k: int = k) -> None:
                train(opt, net, 1, start=k)
                opt.exchange._settle()

            in_turn(agents, act)
            G, _ = problem.gradient(k, X + mu * V)
            for j in range(agents.size):
                V[j] = mu * V[j] - ALPHA * G[j]
                X[j] += pulls[j] + V[j]
                pulls[j] = e * (c - X[j]) if (k + 1) % period == 0 else 0
                c = c - pulls[j]
        with opt.evaluating():
            assert relative(gather(agents.comm, net.vector()), X) <= 1e-5
        opt.rest()
        assert relative(flatten(centre_of(opt)), c) <= 1e-5
        opt.close()


def test_elastic_symmetry(comm: MPI.Intracomm) -> None:
    """What the agents lose the centre gains, at any pace: their sum stays."""
    with serving(comm) as (agents, server):
        if agents is None:
            return
        problem, net = problem_of(agents)
        before = problem.start.sum(0) + problem.start[0]
        opt = EASGD(net.parameters(), ALPHA, agents=agents, server=server, period=1, elasticity=0.2)
        for _ in range(20):
            opt.mix()
        # The pull of the last step is the server's already: have it made here, too.
        opt.rest()
        opt.algorithm.settings = dataclasses.replace(opt.algorithm.settings, period=1000)
        opt.mix()
        opt.rest()
        after = gather(agents.comm, net.vector()).sum(0) + flatten(centre_of(opt))
        assert relative(after, before) <= 1e-5
        opt.close()


def test_server_and_agents_count_alike(comm: MPI.Intracomm) -> None:
    with serving(comm) as (agents, server):
        if agents is None:
            return
        _, net = problem_of(agents)
        opt = Downpour(net.parameters(), 0.001, agents=agents, server=server, n_push=2, n_fetch=5)
        train(opt, net, 31)
        opt.rest()  # raises where they do not
        arrays = opt.arrays()
        assert int(arrays["link/server/sent"][0]) == 15
        if agents.rank == 0:
            assert arrays["link/server/applied"].tolist() == [15] * agents.size
        opt.close()


# What they share


def makers(agents: Agents, server: Server | None) -> dict[str, Callable[[Any], Any]]:
    common: dict[str, Any] = {"agents": agents}
    made: dict[str, Callable[[Any], Any]] = {
        "sgd": lambda p: SGD(p, ALPHA, **common),
        "msgd": lambda p: MSGD(p, ALPHA, MU, **common),
        "fedavg": lambda p: FedAvg(p, ALPHA, period=3, server_momentum=0.5, fraction=0.6, **common),
        "easgd": lambda p: EASGD(p, ALPHA, period=2, elasticity=0.1, **common),
        "eamsgd": lambda p: EAMSGD(p, ALPHA, MU, period=2, elasticity=0.1, **common),
        "gossip": lambda p: GossipSGD(p, ALPHA, probability=0.8, **common),
    }
    if server is not None and agents.size == 1:  # alone it is deterministic
        more = {**common, "server": server}
        made["easgd, server"] = lambda p: EASGD(p, ALPHA, period=2, elasticity=0.1, **more)
        made["downpour"] = lambda p: Downpour(p, ALPHA, n_push=2, n_fetch=3, adagrad=True, **more)
    if agents.size == 1:
        made["gosgd"] = lambda p: GoSGD(p, ALPHA, **common)
    return made


def go(opt: Any, net: Net, steps: int, start: int = 0) -> None:
    for k in range(start, start + steps):
        if opt.takes_part:
            train(opt, net, 1, start=k)
        else:
            opt.mix()


def check_restarts(agents: Agents, server: Server | None, name: str) -> None:
    make = makers(agents, server)[name]
    _, net = problem_of(agents)
    with make(net.parameters()) as opt:
        go(opt, net, 12)
        opt.rest()
        expected = {key: np.array(value) for key, value in opt.arrays().items()}
    _, net = problem_of(agents)
    with make(net.parameters()) as opt:
        go(opt, net, 7)
        opt.rest()
        kept = {key: np.array(value) for key, value in opt.arrays().items()}
    for how in ("arrays", "state_dict"):
        _, net = problem_of(agents)
        with make(net.parameters()) as opt:
            go(opt, net, 2)  # of another run
            opt.rest()
            if how == "arrays":
                opt.load_arrays(7, kept)
                saved = copy.deepcopy(opt.state_dict())
                model = {k: v.clone() for k, v in net.state_dict().items()}
            else:
                net.load_state_dict(model)
                opt.load_state_dict(saved)
            go(opt, net, 5, start=7)
            opt.rest()
            for key, value in opt.arrays().items():
                np.testing.assert_array_equal(value, expected[key], err_msg=f"{how}: {key}")


@pytest.mark.parametrize("name", ["sgd", "msgd", "fedavg", "easgd", "eamsgd", "gossip", "gosgd"])
def test_restarts_are_bit_identical(comm: MPI.Intracomm, name: str) -> None:
    agents = make_agents(comm)
    if name not in makers(agents, None):
        pytest.skip("deterministic for one agent only")
    check_restarts(agents, None, name)


@pytest.mark.parametrize("name", ["easgd, server", "downpour"])
def test_restarts_with_a_server(name: str) -> None:
    """Pairs of ranks, one of them the server: with one agent the order of updates is certain."""
    world = MPI.COMM_WORLD
    pair = world.Split(world.rank // 2, world.rank)
    if pair.size == 2:
        with serving(pair) as (agents, server):
            if agents is not None:
                check_restarts(agents, server, name)
    pair.Free()
    world.Barrier()


@pytest.mark.parametrize("name", ["sgd", "fedavg", "easgd", "gossip", "gosgd"])
def test_a_stop_reaches_all_at_the_same_step(comm: MPI.Intracomm, name: str) -> None:
    agents = make_agents(comm)
    _, net = problem_of(agents)
    make = {**makers(agents, None), "gosgd": lambda p: GoSGD(p, ALPHA, agents=agents)}[name]
    with make(net.parameters()) as opt:
        for k in range(200):
            if opt.steps == 5 and agents.rank == agents.size - 1:
                opt.request_stop()
            go(opt, net, 1, start=k)
            if opt.stopping:
                break
        steps = comm.allgather(opt.steps)
        assert set(steps) == {steps[0]}
        assert 5 <= steps[0] <= 5 + 2 * 32


@pytest.mark.parametrize("name", ["sgd", "fedavg", "easgd", "gossip", "gosgd"])
def test_a_fault_is_raised_on_all_at_the_same_step(comm: MPI.Intracomm, name: str) -> None:
    agents = make_agents(comm)
    _, net = problem_of(agents)
    make = {**makers(agents, None), "gosgd": lambda p: GoSGD(p, ALPHA, agents=agents)}[name]
    opt = make(net.parameters())
    go(opt, net, 5)
    if agents.rank == agents.size - 1:
        opt.report(Reason.NON_FINITE_LOSS)
    with pytest.raises(AgentFault, match=f"agent {agents.size - 1}, step 5: the loss is NaN"):
        go(opt, net, 200, start=5)
    steps = comm.allgather(opt.steps)
    assert set(steps) == {steps[0]}
    with pytest.raises(AgentFault):
        opt.close()


@pytest.mark.parametrize("name", ["sgd", "fedavg", "easgd", "gossip", "gosgd"])
def test_a_fault_after_the_last_message_is_raised_by_close(comm: MPI.Intracomm, name: str) -> None:
    agents = make_agents(comm)
    _, net = problem_of(agents)
    make = {**makers(agents, None), "gosgd": lambda p: GoSGD(p, ALPHA, agents=agents)}[name]
    opt = make(net.parameters())
    go(opt, net, 3)
    if agents.rank == 0:
        opt.report(Reason.NON_FINITE)
    with pytest.raises(AgentFault, match="agent 0, step 3"):
        opt.close()


def test_settings_that_cannot_be(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)

    def refused(match: str, make: Callable[[Any], Any]) -> None:
        net = Net(Problem(comm.size), comm.rank)
        with pytest.raises(UserError, match=match):
            make(net.parameters())

    more: Any = {"agents": agents}
    for fraction in (0.0, -1.0, 1.5, float("nan")):
        refused("fraction", lambda p, f=fraction: FedAvg(p, period=2, fraction=f, **more))
    refused("period", lambda p: FedAvg(p, period=0, **more))
    refused("samples", lambda p: FedAvg(p, period=1, samples=0, **more))
    refused("server_momentum", lambda p: FedAvg(p, period=1, server_momentum=1.0, **more))
    refused("period", lambda p: EASGD(p, period=0, **more))
    for e in (0.0, 1.0, float("nan")):
        refused("elasticity", lambda p, e=e: EASGD(p, elasticity=e, **more))
    for p_ in (-0.1, 1.1, float("nan")):
        refused("probability", lambda p, q=p_: GossipSGD(p, probability=q, **more))
        refused("probability", lambda p, q=p_: GoSGD(p, probability=q, **more))
    refused("momentum", lambda p: MSGD(p, momentum=1.0, **more))
    refused("nesterov", lambda p: MSGD(p, nesterov="yes", **more))  # type: ignore[arg-type]
    for config in (ExchangeConfig(wire="bfloat16"), ExchangeConfig(transport="direct")):
        refused("exchange", lambda p, c=config: SGD(p, exchange=c, **more))


# As runs of ``mpicdsgd train``: mistakes end on every rank with exit code 2, also on the server's

RUN = """
[run]
dir = "r"
epochs = 2
[agents]
topology = "complete"
[model]
name = "mlp"
args = { hidden = [8] }
[data]
name = "test_systems:pictures"
batch_size = 4
"""

Refuses = Callable[..., None]


def pictures(path: str, seed: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(100, 1, 4, 4)).astype(np.float32), np.arange(100) % 10
    return (x, y), (x[:20], y[:20])


@pytest.fixture
def refuses(
    comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Refuses]:
    """``refuses(text, name, *settings)``: all ranks return 2, rank 0 says ``text`` in one line."""
    folder = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    monkeypatch.chdir(folder)
    Path(f"{comm.rank}.toml").write_text(RUN)
    aborts: list[int] = []
    monkeypatch.setattr(shutdown, "abort", aborts.append)  # would end the tests

    def refuses(text: str, name: str, *settings: str) -> None:
        capfd.readouterr()
        code = parser.main(["train", f"{comm.rank}.toml", f"optim.name={name}", *settings])
        err = capfd.readouterr().err
        assert (code, aborts) == (2, []), err
        said = [line for line in err.splitlines() if "as the server" not in line]
        assert len(said) == (comm.rank == 0), err
        assert all(line.startswith("mpicdsgd: ") and text in line for line in said), err
        assert comm.allreduce(len(err.splitlines())) <= 2
        comm.barrier()

    yield refuses
    monkeypatch.undo()
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


SERVER = "optim.asynchronous=true"


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("fedavg", ["optim.fraction=0"], "optim.fraction (C, of the agents"),
        ("fedavg", ["optim.fraction=1.5"], "must be in (0, 1], got 1.5"),
        ("fedavg", ["optim.fraction=nan"], "must be in (0, 1], got nan"),
        ("fedavg", ["optim.local_epochs=0"], "optim.local_epochs (E) must be at least 1, got 0"),
        ("fedavg", ["optim.server_momentum=1"], "optim.server_momentum must be in [0, 1), got 1"),
        ("easgd", ["optim.period=0"], "optim.period (tau) must be a whole number >= 1, got 0"),
        ("easgd", ["optim.elasticity=2"], "optim.elasticity (e) must be in (0, 1)"),
        ("eamsgd", ["optim.elasticity=nan"], "optim.elasticity (e) must be in (0, 1)"),
        ("eamsgd", ["optim.momentum=1"], "optim.momentum must be in [0, 1), got 1"),
        ("gossip", ["optim.probability=1.1"], "optim.probability (p) is a probability"),
        ("gosgd", ["optim.probability=1.1"], "must be in [0, 1], got 1.1"),
        ("gosgd", ["optim.lr=-1"], "optim.lr must be a finite number >= 0, got -1"),
        ("cdsgd", ["optim.fraction=0.5"], "optim.fraction = 0.5 is for fedavg only"),
        ("sgd", ["optim.rounds=2"], "optim.rounds = 2 is for cdsgd, icdsgd and cdmsgd only"),
        ("sgd", [SERVER], "optim.asynchronous = true is for easgd and eamsgd only"),
        ("gossip", ["optim.n_fetch=2"], "optim.n_fetch = 2 is for downpour only"),
        ("sgd", ["exchange.wire=bfloat16"], "sgd exchanges float32 only"),
        ("msgd", ["exchange.transport=direct"], "msgd has no graph's edges"),
        ("gossip", ["optim.momentum=0.95"], "optim.momentum = 0.95 is for cdmsgd, msgd and"),
        ("gosgd", ["exchange.timeout_s=0"], "exchange.timeout_s must be positive"),
        ("fedvag", [], 'unknown optim.name "fedvag": did you mean fedavg?'),
    ],
)
def test_a_bad_setting_of_a_run(
    refuses: Refuses, name: str, settings: list[str], text: str
) -> None:
    refuses(text, name, *settings)
    assert not Path("r", "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("downpour", [], "optim.lr must be a finite number >= 0, got -1"),
        ("downpour", ["optim.n_push=0"], "optim.n_push must be a whole number >= 1, got 0"),
        ("downpour", ["optim.n_fetch=-1"], "optim.n_fetch must be a whole number >= 1, got -1"),
        ("downpour", ["model.buffers=mixed", "model.name=test_systems:batch_norm",
                      "model.args={}"], "downpour exchanges gradients"),
        ("downpour", ["optim.probability=0.1"], "is for gossip and gosgd only"),
        ("downpour", ["exchange.wire=bfloat16"], "downpour exchanges float32 only"),
        ("downpour", ["data.name=minst"], "did you mean mnist?"),
        ("downpour", ["agents.topology=rnig"], "unknown topology"),
        ("downpour", ["run.epochs=0"], "run.epochs must be at least 1"),
        ("easgd", [SERVER, "optim.elasticity=2"], "optim.elasticity (e) must be in (0, 1)"),
        ("easgd", [SERVER, "optim.period=0"], "optim.period (tau) must be a whole number >= 1"),
        ("eamsgd", [SERVER, "optim.momentum=1"], "optim.momentum must be in [0, 1), got 1"),
        ("eamsgd", [SERVER, "run.dir=0.toml"], "set run.dir to another folder"),
    ],
)  # fmt: skip
def test_a_bad_setting_of_a_run_with_a_server(
    refuses: Refuses, name: str, settings: list[str], text: str
) -> None:
    if MPI.COMM_WORLD.size == 1 and "is for" not in text:  # which is found in the config itself
        text = "no rank is left for the server: it has one of its own"
    refuses(text, name, *(settings or ["optim.lr=-1"]))
    assert not Path("r", "checkpoints").exists()


def batch_norm() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 10)
    )


def test_a_run_in_pairs_needs_an_undirected_graph(refuses: Refuses, comm: MPI.Intracomm) -> None:
    if comm.size < 3:
        pytest.skip("with two agents no graph is directed")
    refuses("an undirected graph", "gossip", "agents.topology=expo")


@pytest.mark.parametrize("setting", ["optim.name=sgd", "optim.lr=0.02"])
def test_a_config_that_differs_on_the_servers_rank(
    refuses: Refuses, comm: MPI.Intracomm, setting: str
) -> None:
    if comm.size == 1:
        pytest.skip("there is no other rank")
    mine = [setting] if comm.rank == comm.size - 1 else []
    refuses("the config must be the same on all ranks, but differs on", "downpour", *mine)


@pytest.mark.parametrize("seldom", [False, True])
@pytest.mark.parametrize("lr", ["1e9", "1e30"])
@pytest.mark.parametrize(
    "name",
    ["sgd", "msgd", "fedavg", "easgd", "eamsgd", "gossip", "gosgd", "downpour", "easgd, server"],
)
def test_divergence_of_a_run(
    refuses: Refuses, comm: MPI.Intracomm, name: str, lr: str, seldom: bool
) -> None:
    """It is found at the next evaluation or checkpoint, or where there are none, at the end."""
    name, _, has_server = name.partition(", ")
    settings = [SERVER] if has_server else []
    if comm.size == 1 and (has_server or name == "downpour"):
        pytest.skip("a server needs a rank of its own")
    if seldom:
        settings += ["run.evaluate_every=never", "run.checkpoint_every=never", "run.epochs=9"]
    refuses("try a smaller lr", name, f"optim.lr={lr}", *settings)
    assert not Path("r", "checkpoints").exists()


def test_gosgd_rests_only_when_late_mail_has_been_read(comm: MPI.Intracomm) -> None:
    """As on a slow network: nothing is found in the mail before its 600th reading."""
    agents = make_agents(comm, "complete")
    x = torch.nn.Parameter(torch.full((64,), float(agents.rank)))
    opt = GoSGD([x], agents=agents, probability=1.0)
    box: Any = opt.context._mailbox
    read, readings = box.read, iter(range(10**9))
    box.read = lambda: read() if next(readings) > 600 else None
    opt.mix()
    opt.rest()
    w = np.array(comm.allgather(opt.weight))
    assert w.sum() == pytest.approx(1.0, abs=1e-12)
    means = np.array(comm.allgather(float(x.detach().mean())))
    assert w @ means == pytest.approx((comm.size - 1) / 2, rel=1e-5)
    opt.close()

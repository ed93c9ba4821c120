"""What every step measures, against the dense float64 oracle of what the agents really held."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from devices import agents_with
from mpi4py import MPI
from numpy.typing import NDArray
from oracle import (
    Net,
    Problem,
    flatten,
    gather,
    make_agents,
    of_kind,
    random_matrix,
    train,
    turns_of,
)

from mpicdsgd import Agents, ExchangeConfig, FedAvg, Mixed, UserError
from mpicdsgd.kernels.native import reference

pytestmark = pytest.mark.ranks(2, 5)

STEPS = 6
FORMS = ["cdsgd", "polyak", "nesterov", "look-ahead"]
ADAMW_DECAY = 0.01  # of torch.optim.AdamW, if not told: the penalty counts it, the gradient not


def rounded(X: NDArray[Any], wire: str) -> NDArray[np.float64]:
    x = np.ascontiguousarray(X, np.float32)
    return reference.from_wire(reference.to_wire(x, wire), wire).astype(np.float64)


def disagreement(X_ND: NDArray[np.float64], Pi: NDArray[np.float64], j: int) -> float:
    """D_j = 1/2 sum_l Pi[j,l] |x_l - x_j|^2."""
    return float(0.5 * Pi[j] @ ((X_ND - X_ND[j]) ** 2).sum(axis=1))


def optimizer(agents: Agents, form: str, **options: Any) -> tuple[Net, Any]:
    net = Net(Problem(agents.size), agents.rank)
    opt = of_kind(False if form == "polyak" else form, net.parameters(), agents, **options)
    opt.measure()
    return net, opt


def check(
    comm: MPI.Intracomm, net: Net, opt: Any, Pi: list[Any], *, wire: str = "float32",
    decay: float = 0.0, tau: int = 1, own_decay: float | None = None,
) -> None:  # fmt: skip
    """Some steps, each against what was gathered before it; then close. Collective.

    Args:
        own_decay: of a torch optimizer that makes its step before the pass.
    """
    for k in range(STEPS):
        opt.zero_grad()
        net.loss(k).backward()
        at = net.vector().astype(np.float64)
        with opt.evaluating():
            X = gather(comm, net.vector())
        h = flatten([p.grad for p in net.parameters()]) + decay * at  # type: ignore[misc]
        opt.step()
        (found,) = opt.measured()
        turn = Pi[k * tau % len(Pi)]
        expected = disagreement(rounded(X, wire), turn, comm.rank)
        assert found.step == k
        assert found.disagreement == pytest.approx(expected, rel=1e-5, abs=1e-12)
        assert found.gradient == pytest.approx(float(h @ h), rel=1e-5)
        assert found.gradient > 0
        with opt.evaluating():
            moved = net.vector().astype(np.float64) - X[comm.rank]
        assert found.penalty == pytest.approx(0.5 * (own_decay or decay) * float(at @ at), rel=1e-5)
        if own_decay is None:
            assert found.moved == pytest.approx(float(moved @ moved), rel=1e-4)
            assert found.moved > 0
        if comm.size > 1 and len(Pi) == 1:
            assert expected > 1e-6
    assert opt.measured() == []
    opt.close()


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("topology", "mixing"), [("ring", "metropolis"), ("expo", "one-peer")])
def test_forms(comm: MPI.Intracomm, topology: str, mixing: str, form: str, tau: int) -> None:
    """Of several mixing rounds the first one is at x_k."""
    agents = make_agents(comm, topology, mixing)
    net, opt = optimizer(agents, form, weight_decay=0.3, rounds=tau)
    check(comm, net, opt, turns_of(agents), decay=0.3, tau=tau)


@pytest.mark.parametrize("form", ["adamw", "fused"])
def test_any_torch_optimizer(comm: MPI.Intracomm, form: str) -> None:
    """At the x before its own step; the gradient is the one it was given."""
    agents = make_agents(comm, "star")
    net, opt = optimizer(agents, form)
    check(comm, net, opt, turns_of(agents), own_decay=ADAMW_DECAY)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("transport", ["direct", "neighbor"])
def test_wires_and_transports(comm: MPI.Intracomm, transport: str, wire: str) -> None:
    """What is compared is what is published, the own copy too."""
    agents = make_agents(comm, "complete")
    exchange = ExchangeConfig(transport=transport, wire=wire)
    net, opt = optimizer(agents, "nesterov", exchange=exchange)
    check(comm, net, opt, turns_of(agents), wire=wire)


@pytest.mark.parametrize("form", ["cdsgd", "look-ahead", "adamw"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_on_a_gpu(comm: MPI.Intracomm, form: str, wire: str) -> None:
    agents = agents_with(comm, "ring", "emulated")
    options: Any = {} if form == "adamw" else {"weight_decay": 0.3, "rounds": 2}
    net, opt = optimizer(agents, form, exchange=ExchangeConfig(wire=wire), **options)
    decay, tau = options.get("weight_decay", 0.0), options.get("rounds", 1)
    check(
        comm, net, opt, turns_of(agents), wire=wire, decay=decay, tau=tau,
        own_decay=ADAMW_DECAY if form == "adamw" else None,
    )  # fmt: skip


@pytest.mark.parametrize("device", ["host", "emulated"])
def test_nothing_waits_and_nothing_is_lost(comm: MPI.Intracomm, device: str) -> None:
    """Asked for at the end only, every step is there, in order."""
    agents = agents_with(comm, "ring", device)
    net, opt = optimizer(agents, "nesterov")
    train(opt, net, STEPS)
    opt.mix()
    assert len(opt.context.measured) == STEPS + 1 - (2 if device == "emulated" else 0)
    found = opt.measured()
    assert [one.step for one in found] == list(range(STEPS + 1))
    assert found[-1].gradient == 0.0
    assert min(one.gradient for one in found[:-1]) > 0
    opt.close()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_sum_over_agents_is_the_papers_norm(comm: MPI.Intracomm, symmetric: bool) -> None:
    """sum_j D_j = |X|^2_(I - Pi) for a symmetric Pi, and 1/2 sum Pi[j,l] |x_l - x_j|^2 for any."""
    Pi = random_matrix(comm.size, symmetric)
    agents = Agents(comm, Pi, device="cpu")
    net, opt = optimizer(agents, "cdsgd")
    X, dense = gather(comm, net.vector()), agents.mixing.Pi
    net.loss(0).backward()
    opt.step()
    total = comm.allreduce(opt.measured()[0].disagreement)
    apart = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    assert total == pytest.approx(0.5 * float((dense * apart).sum()), rel=1e-5, abs=1e-12)
    if symmetric:
        laplacian = np.eye(comm.size) - dense
        norm = float(np.einsum("jd,jl,ld->", X, laplacian, X))
        assert total == pytest.approx(norm, rel=1e-5, abs=1e-12)
    opt.close()


@pytest.mark.parametrize("form", ["nesterov", "adamw"])
def test_mixed_buffers_do_not_count(comm: MPI.Intracomm, form: str) -> None:
    agents = make_agents(comm)
    buffer = torch.full((1000,), 10.0 * comm.rank)
    net, opt = optimizer(agents, form, buffers=[buffer])
    check(comm, net, opt, turns_of(agents), own_decay=ADAMW_DECAY if form == "adamw" else None)


@pytest.mark.parametrize("form", [*FORMS, "adamw"])
def test_measuring_changes_no_bit(comm: MPI.Intracomm, form: str) -> None:
    agents = make_agents(comm)
    states = []
    for measure in (False, True):
        net = Net(Problem(agents.size), agents.rank)
        opt = of_kind(False if form == "polyak" else form, net.parameters(), agents)
        if measure:
            opt.measure()
        train(opt, net, STEPS)
        assert len(opt.measured()) == (STEPS if measure else 0)
        states.append({name: np.array(a).tobytes() for name, a in opt.arrays().items()})
        opt.close()
    assert states[0] == states[1]


def test_a_new_group_is_measured_too(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net, opt = optimizer(agents, "cdsgd")
    train(opt, net, 2)
    more = torch.nn.Parameter(torch.full((40,), float(comm.rank)))
    opt.add_param_group({"params": [more]})
    opt.zero_grad()
    (net.loss(2) + 3 * more.sum()).backward()
    opt.step()
    found = opt.measured()
    assert [one.step for one in found] == [0, 1, 2]
    apart = disagreement(np.outer(np.arange(comm.size), np.ones(40)), agents.mixing.Pi, comm.rank)
    assert found[2].disagreement >= apart
    assert found[2].gradient >= 9 * 40
    opt.close()


def test_an_overflow_has_no_gradient(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    for form in ("nesterov", "adamw"):
        net, opt = optimizer(agents, form)
        net.loss(0).backward()
        opt.found_inf, opt.grad_scale = torch.ones(()), None
        opt.step()
        assert opt.measured()[0].gradient == 0.0
        opt.close()


def test_only_a_graph_has_a_disagreement(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net = Net(Problem(agents.size), agents.rank)
    opt = FedAvg(net.parameters(), lr=0.1, agents=agents, period=2)
    with pytest.raises(UserError, match="FedAvg has no disagreement"):
        opt.measure()
    opt.close()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    mixed = Mixed(inner, agents)
    mixed.measure()
    mixed.close()

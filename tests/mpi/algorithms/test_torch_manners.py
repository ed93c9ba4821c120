"""The optimizers among torch's own ways: closures, schedulers, state, compile, formats."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import (
    Net,
    Problem,
    cdmsgd,
    flatten,
    gather,
    make_agents,
    of_kind,
    pair,
    relative,
    spread,
    step_and_check,
    train,
)

from mpicdsgd import CDMSGD, CDSGD, Mixed, UserError

pytestmark = pytest.mark.ranks(1, 2)

TOLERANCE = 1e-5
KINDS = ["cdsgd", "nesterov", "look-ahead", "adamw"]


@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_closure(comm: MPI.Intracomm, kind: str) -> None:
    agents = make_agents(comm)
    (net, opt), (other, plain) = pair(agents, kind), pair(agents, kind)
    for k in range(5):

        def closure(k: int = k) -> torch.Tensor:
            opt.zero_grad()
            loss = net.loss(k)
            loss.backward()
            return loss

        loss = opt.step(closure)
        assert loss.item() == other.loss(k).item()
        train(plain, other, 1, start=k)
    assert np.array_equal(net.vector(), other.vector())
    opt.close()
    plain.close()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_goes_on_bit_by_bit(comm: MPI.Intracomm, kind: str) -> None:
    agents = make_agents(comm)
    net, opt = pair(agents, kind)
    train(opt, net, 7)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": opt.state_dict()}, file)
    train(opt, net, 8, start=7)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, again = pair(agents, kind)
    train(again, other, 2)  # what is loaded replaces everything
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert again.steps == 7
    train(again, other, 8, start=7)
    assert again.steps == opt.steps == 15
    assert np.array_equal(net.vector(), other.vector())
    for name, array in opt.arrays().items():
        assert np.array_equal(array, again.arrays()[name])
    opt.close()
    again.close()


def test_state_dict_of_look_ahead_saved_while_evaluating(comm: MPI.Intracomm) -> None:
    """The model may have been saved as x or as y = x + mu v: both go on alike."""
    agents = make_agents(comm)
    net, opt = pair(agents, "look-ahead")
    train(opt, net, 7)
    state = copy.deepcopy(opt.state_dict())
    with opt.evaluating():
        model = copy.deepcopy(net.state_dict())
    other, again = pair(agents, "look-ahead")
    other.load_state_dict(model)
    again.load_state_dict(state)
    train(opt, net, 5, start=7)
    train(again, other, 5, start=7)
    assert np.array_equal(net.vector(), other.vector())
    opt.close()
    again.close()


def test_one_cycle_schedule_cycles_momentum(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net, opt = pair(agents, "nesterov")
    problem, steps = net.problem, 20
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=steps)
    X, V = problem.start, None
    momenta = set()
    for k in range(steps):
        lr, mu = opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]
        momenta.add(mu)
        X, V = cdmsgd(
            agents.mixing.Pi, X, problem.gradient, 1, lambda k, lr=lr: lr,
            form="nesterov", mu=mu, V=V, start=k,
        )  # fmt: skip
        train(opt, net, 1, start=k)
        scheduler.step()
    assert len(momenta) > 5
    assert relative(gather(comm, net.vector()), X) <= TOLERANCE
    opt.close()


def test_zero_grad_in_both_forms(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    (net, opt), (other, plain) = pair(agents, "nesterov"), pair(agents, "nesterov")
    for k in range(5):
        opt.zero_grad(set_to_none=False)
        assert k == 0 or all(p.grad is not None and not p.grad.any() for p in net.parameters())
        net.loss(k).backward()
        opt.step()
        train(plain, other, 1, start=k)
    assert np.array_equal(net.vector(), other.vector())
    opt.close()
    plain.close()


def test_clipping_and_accumulation(comm: MPI.Intracomm) -> None:
    """Two minibatches a step, their summed gradient clipped."""
    agents = make_agents(comm)
    net, opt = pair(agents, "nesterov")
    norm, clipped = 0.2, []
    for k in range(20):
        opt.zero_grad()
        net.loss(2 * k).backward()
        net.loss(2 * k + 1).backward()
        clipped.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), norm)) > norm)
        opt.step()

    def gradient(k: int, X: Any) -> Any:
        (first, given), (second, _) = (net.problem.gradient(2 * k + i, X) for i in (0, 1))
        G = first + second
        factors = norm / (np.linalg.norm(G, axis=1, keepdims=True) + 1e-6)
        return G * np.minimum(factors, 1.0), given

    X, _ = cdmsgd(
        agents.mixing.Pi, net.problem.start, gradient, 20, lambda k: 0.05, form="nesterov", mu=0.9
    )
    assert any(clipped)
    assert relative(gather(comm, net.vector()), X) <= TOLERANCE
    opt.close()


def test_autocast_to_bfloat16(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net, opt = pair(agents, "cdsgd")
    for k in range(3):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (net.inputs[0] @ net.W1.T).dtype == torch.bfloat16
            loss = net.loss(k)
        loss.backward()
        step_and_check(comm, opt, list(net.parameters()), agents.mixing.Pi, 0.05)
    opt.close()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(comm: MPI.Intracomm, backend: str) -> None:
    """The compiled code must see the arena's values of every step."""
    if comm.size > 2:
        pytest.skip("compiling on many ranks takes long and shows nothing more")
    agents = make_agents(comm)
    (net, opt), (other, plain) = pair(agents, "nesterov"), pair(agents, "nesterov")
    compiled = torch.compile(net, backend=backend)
    for k in range(4):
        opt.zero_grad()
        y = compiled(net.inputs[k % 3])
        ((y - net.targets[k % 3]) ** 2).sum().div(12).backward()
        opt.step()
        train(plain, other, 1, start=k)
    assert relative(net.vector(), other.vector()) <= 1e-6
    opt.close()
    plain.close()


def test_the_optimizer_cannot_be_copied(comm: MPI.Intracomm) -> None:
    _, opt = pair(make_agents(comm), "cdsgd")
    with pytest.raises(TypeError, match="use state_dict"):
        copy.deepcopy(opt)
    with pytest.raises(TypeError, match="use state_dict"):
        torch.save(opt, io.BytesIO())
    opt.close()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_through_a_graph_from_before_the_step(comm: MPI.Intracomm, kind: str) -> None:
    """torch must see that the parameters were written: else the gradient would be wrong."""
    agents = make_agents(comm)
    net, opt = pair(agents, kind)
    loss = net.loss(0)
    train(opt, net, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = net.loss(0)
    opt.zero_grad()
    opt.mix()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = net.loss(0)
    opt.load_arrays(3, {name: array * 2 for name, array in opt.arrays().items()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    opt.close()


@pytest.mark.parametrize("form", ["nesterov", "look-ahead"])
def test_a_group_added_on_the_way(comm: MPI.Intracomm, form: str) -> None:
    """Momentum goes on; the new group has its own settings and starts with none."""
    agents = make_agents(comm)
    problem = Problem(comm.size)
    late = spread(W1=0, b1=0, W2=0, b2=1, s=1).astype(bool)
    problem.start[:, late] = problem.start[0, late]  # not mixed at first, so equal
    net = Net(problem, comm.rank)
    opt = of_kind(form, [net.W1, net.b1, net.W2], agents)
    train(opt, net, 10)
    opt.add_param_group({"params": [net.b2, net.s], "lr": 0.02})
    assert opt.steps == 10
    net.zero_grad()
    train(opt, net, 10, start=10)

    def without_late(k: int, X: Any) -> Any:
        G, given = problem.gradient(k, X)
        return G, given & ~late

    Pi = agents.mixing.Pi
    options: Any = {"form": form, "mu": 0.9}
    X, V = cdmsgd(Pi, problem.start, without_late, 10, lambda k: 0.05, **options)
    alpha = np.where(late, 0.02, 0.05)
    X, V = cdmsgd(Pi, X, problem.gradient, 10, lambda k: alpha, **options, V=V, start=10)
    with opt.evaluating():
        assert relative(gather(comm, net.vector()), X) <= TOLERANCE
    opt.close()


def test_a_group_added_to_a_mixed_optimizer(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    problem = Problem(comm.size)
    net = Net(problem, comm.rank)
    inner = torch.optim.SGD([net.W1, net.b1], lr=0.05)
    opt = Mixed(inner, agents)
    train(opt, net, 3)
    opt.add_param_group({"params": [net.W2, net.b2, net.s]})
    assert len(inner.param_groups) == 2
    opt.zero_grad()
    net.loss(3).backward()
    step_and_check(comm, opt, list(net.parameters()), agents.mixing.Pi, 0.05)
    opt.close()


@pytest.mark.parametrize("kind", ["cdsgd", "adamw"])
def test_no_gradient_is_an_error(comm: MPI.Intracomm, kind: str) -> None:
    net, opt = pair(make_agents(comm), kind)
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        opt.step()
    train(opt, net, 1)  # nothing was lost
    assert opt.steps == 1
    opt.close()


@pytest.mark.parametrize("kind", ["nesterov", "look-ahead"])
def test_evaluating_shows_x_and_puts_back_y(comm: MPI.Intracomm, kind: str) -> None:
    net, opt = pair(make_agents(comm), kind)
    train(opt, net, 3)
    y = net.vector()
    v = flatten([opt.state[p]["v"] for p in net.parameters()])
    with opt.evaluating():
        x = net.vector()
    assert np.array_equal(net.vector(), y)
    expected = x + 0.9 * v if kind == "look-ahead" else x
    assert relative(y, expected.astype(np.float64)) <= 1e-6
    assert np.abs(v).max() > 1e-3
    train(opt, net, 1, start=3)  # and that was no change by hand
    opt.close()


def test_closed_optimizer_and_context_manager(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net = Net(Problem(comm.size), comm.rank)
    with CDSGD(net.parameters(), lr=0.05, agents=agents) as opt:
        train(opt, net, 1)
    opt.close()
    net.loss(0).backward()  # the hooks are gone
    for collective in (opt.step, opt.publish, opt.mix):
        with pytest.raises(RuntimeError, match="closed"):
            collective()
    again = CDSGD(net.parameters(), lr=0.05, agents=agents)  # the parameters are still good
    opt_parameters = list(net.parameters())
    step_and_check(comm, again, opt_parameters, agents.mixing.Pi, 0.05)
    again.close()


def test_bad_arguments_on_one_rank_are_an_error_on_all(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    last = comm.rank == comm.size - 1
    p = torch.nn.Parameter(torch.zeros(3))

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            CDMSGD(options.pop("params", [p]), agents=agents, **options)

    refused("lr must be a finite number >= 0, got -1", lr=-1.0 if last else 0.1)
    refused(r"momentum must be in \[0, 1\), got 1", momentum=1.0 if last else 0.1)
    refused("weight_decay must be", weight_decay=float("nan") if last else 0.0)
    refused("rounds", rounds=0 if last else 1)
    refused("nesterov must be", nesterov="lookahead" if last else True)
    double: Any = [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    refused("float64", params=double if last else [p])
    if comm.size > 1:
        other: Any = [torch.nn.Parameter(torch.zeros(4))]
        refused("must be the same on all ranks", params=other if last else [p])
        refused("must be the same on all ranks", nesterov="look-ahead" if last else True)
        refused("must be the same on all ranks", rounds=2 if last else 1)

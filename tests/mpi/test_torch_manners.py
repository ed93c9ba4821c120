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
    relative,
    spread,
    step_and_check,
    train,
)

from mpicdsgd import CDMSGD, CDSGD, Agents, Mixed, UserError

TOLERANCE = 1e-5
KINDS = ["cdsgd", "nesterov", "look-ahead", "adamw"]


def of_kind(kind: str, parameters: Any, agents: Agents, **options: Any) -> Any:
    parameters = list(parameters)
    if kind == "cdsgd":
        return CDSGD(parameters, lr=0.05, agents=agents, **options)
    if kind == "adamw":
        return Mixed(torch.optim.AdamW(parameters, lr=0.01), agents, **options)
    nesterov: Any = True if kind == "nesterov" else kind
    return CDMSGD(parameters, lr=0.05, momentum=0.9, nesterov=nesterov, agents=agents, **options)


def pair(agents: Agents, kind: str, **options: Any) -> tuple[Net, Any]:
    net = Net(Problem(agents.size), agents.rank)
    return net, of_kind(kind, net.parameters(), agents, **options)


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


class Conv(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Conv2d(3, 4, 3)
        self.second = torch.nn.Conv2d(4, 2, 1)
        self.inputs = torch.randn(2, 3, 5, 5)

    def loss(self) -> torch.Tensor:
        return self.second(torch.tanh(self.first(self.inputs))).square().sum()


def test_channels_last_before_the_optimizer_is_made(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net = Conv(comm.rank).to(memory_format=torch.channels_last)
    strides = [p.stride() for p in net.parameters()]
    opt = CDSGD(net.parameters(), lr=0.05, agents=agents)
    assert [p.stride() for p in net.parameters()] == strides
    assert net.first.weight.is_contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        opt.zero_grad()
        net.loss().backward()
        step_and_check(comm, opt, list(net.parameters()), agents.mixing.Pi, 0.05)
    opt.close()


def test_channels_last_afterwards_is_repaired(comm: MPI.Intracomm) -> None:
    """On one agent only, before and after backward; the values are the same, so no fault."""
    agents = make_agents(comm)
    net = Conv(comm.rank)
    opt = CDSGD(net.parameters(), lr=0.05, agents=agents)
    for k in range(4):
        opt.zero_grad()
        if comm.rank == 0 and k == 1:
            net.to(memory_format=torch.channels_last)
        net.loss().backward()
        if comm.rank == comm.size - 1 and k == 2:
            net.to(memory_format=torch.channels_last)
        step_and_check(comm, opt, list(net.parameters()), agents.mixing.Pi, 0.05)
        assert net.first.weight.is_contiguous()
    opt.close()


@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_another_dtype_is_an_error_and_can_be_taken_back(comm: MPI.Intracomm, kind: str) -> None:
    agents = make_agents(comm)
    net, opt = pair(agents, kind)
    train(opt, net, 2)
    kept = net.vector()
    net.to(torch.float64)
    opt.zero_grad()
    net.inputs, net.targets = net.inputs.double(), net.targets.double()
    net.loss(2).backward()
    with pytest.raises(UserError, match=r"float64.*\.float\(\)"):
        opt.step()
    net.float()
    net.inputs, net.targets = net.inputs.float(), net.targets.float()
    assert np.array_equal(net.vector(), kept)
    train(opt, net, 2, start=2)
    opt.close()


@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_assigned_parameters_are_an_error(comm: MPI.Intracomm, kind: str) -> None:
    agents = make_agents(comm)
    net, opt = pair(agents, kind)
    train(opt, net, 2)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    opt.zero_grad()
    net.load_state_dict(state, assign=True)
    net.loss(2).backward()
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient.*assign=True"):
        opt.step()
    opt.close()


@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_a_copy_of_the_model_is_independent(comm: MPI.Intracomm, kind: str) -> None:
    agents = make_agents(comm)
    net, opt = pair(agents, kind)
    train(opt, net, 2)
    other = copy.deepcopy(net)
    kept = net.vector()
    assert np.array_equal(other.vector(), kept)
    train(opt, net, 2)
    assert np.array_equal(other.vector(), kept)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    trained = net.vector()
    opt.zero_grad()
    train(sgd, other, 2)
    assert np.array_equal(net.vector(), trained)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        opt.step()
    opt.close()


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [1, 2])
def test_batch_norm_statistics_are_mixed(comm: MPI.Intracomm, kind: str, tau: int) -> None:
    """What the forward pass F made of them is kept: R <- F + Pi R - R, then more rounds of Pi."""
    if kind == "adamw" and tau > 1:
        pytest.skip("Mixed has one round")
    agents = make_agents(comm, "star")
    torch.manual_seed(comm.rank)
    norm = torch.nn.BatchNorm1d(3)
    opt = of_kind(
        kind, norm.parameters(), agents, buffers=[norm.running_mean, norm.running_var],
        **({} if kind == "adamw" else {"rounds": tau}),
    )  # fmt: skip
    Pi = agents.mixing.Pi
    R = np.tile([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], (comm.size, 1))
    for _ in range(4):
        inputs = torch.randn(8, 3) * (comm.rank + 1) + comm.rank
        batch = np.concatenate([inputs.mean(0).numpy(), inputs.var(0).numpy()])
        F = 0.9 * R + 0.1 * gather(comm, batch)
        R = np.linalg.matrix_power(Pi, tau - 1) @ (F + Pi @ R - R)
        opt.zero_grad()
        norm(inputs).square().sum().backward()
        opt.step()
        found = gather(comm, flatten([norm.running_mean, norm.running_var]))  # type: ignore[list-item]
        assert relative(found, R) <= TOLERANCE
    opt.close()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_with_mixed_buffers(comm: MPI.Intracomm, kind: str) -> None:
    """The statistics come with the model's state, and are published with it."""
    agents = make_agents(comm)
    torch.manual_seed(comm.rank)
    inputs = torch.randn(6, 8, 3) * (comm.rank + 1)

    def ready() -> tuple[Any, Any]:
        model = torch.nn.BatchNorm1d(3)
        buffers = [model.running_mean, model.running_var]
        return model, of_kind(kind, model.parameters(), agents, buffers=buffers)

    def run(model: Any, opt: Any, steps: range) -> None:
        for k in steps:
            opt.zero_grad()
            model(inputs[k]).square().sum().backward()
            opt.step()

    model, opt = ready()
    run(model, opt, range(3))
    states = copy.deepcopy((model.state_dict(), opt.state_dict()))
    other, again = ready()
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    run(model, opt, range(3, 6))
    run(other, again, range(3, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    opt.close()
    again.close()


@pytest.mark.parametrize("kind", ["cdsgd", "adamw"])
def test_no_gradient_is_an_error(comm: MPI.Intracomm, kind: str) -> None:
    net, opt = pair(make_agents(comm), kind)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
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
    assert np.abs(v).max() > 0.01
    train(opt, net, 1, start=3)  # and that was no change by hand
    opt.close()


def test_parameters_of_every_shape(comm: MPI.Intracomm) -> None:
    """0-d, empty, transposed, with gaps, and of sizes that are no multiple of 16."""
    agents = make_agents(comm)
    torch.manual_seed(comm.rank)
    tensors = [
        torch.randn(()),
        torch.randn(0, 3),
        torch.randn(4, 3).t(),
        torch.randn(10, 7)[::2, 1::3],
        torch.randn(17),
        torch.randn(1, 1, 33),
        torch.randn(2, 3, 4).permute(2, 0, 1),
    ]
    parameters: list[Any] = [torch.nn.Parameter(t) for t in tensors]
    kept = [p.detach().clone() for p in parameters]
    opt = CDSGD(parameters, lr=0.05, agents=agents)
    assert all(torch.equal(p, k) for p, k in zip(parameters, kept, strict=True))
    for k in range(3):
        opt.zero_grad()
        sum((torch.sin(p * (k + 1)).sum() for p in parameters), torch.zeros(())).backward()
        step_and_check(comm, opt, parameters, agents.mixing.Pi, 0.05)
    opt.close()


def test_gradients_with_other_strides(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    torch.manual_seed(comm.rank)
    p = torch.nn.Parameter(torch.randn(4, 3))
    opt = CDSGD([p], lr=0.05, agents=agents)
    for gradient in (torch.randn(3, 4).t(), torch.randn(8, 3)[::2], torch.randn(3).expand(4, 3)):
        p.grad = gradient
        assert p.grad.stride() != p.stride()
        step_and_check(comm, opt, [p], agents.mixing.Pi, 0.05)
    opt.close()


def test_tied_parameters_stay_tied(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    torch.manual_seed(comm.rank)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    model = torch.nn.Sequential(first, torch.nn.Tanh(), second)
    opt = CDSGD(model.parameters(), lr=0.05, agents=agents)
    model(torch.randn(5, 3)).square().sum().backward()
    step_and_check(comm, opt, [first.weight, first.bias, second.bias], agents.mixing.Pi, 0.05)
    assert second.weight is first.weight
    opt.close()


def test_parameters_that_share_memory_are_refused(comm: MPI.Intracomm) -> None:
    """Two parameters over one memory would be torn apart."""
    agents = make_agents(comm)
    p = torch.nn.Parameter(torch.randn(3, 3))
    q = torch.nn.Parameter(p.data)
    with pytest.raises(UserError, match="share memory"):
        CDSGD([p, q], lr=0.05, agents=agents)
    assert p.data_ptr() == q.data_ptr()
    with pytest.raises(UserError, match="share memory"):
        CDSGD([p], lr=0.05, agents=agents, buffers=[p.detach()[1:]])


def test_sparse_gradients(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    torch.manual_seed(comm.rank)
    embedding = torch.nn.Embedding(7, 3, sparse=True)
    opt = CDSGD(embedding.parameters(), lr=0.05, agents=agents)
    for _ in range(2):
        opt.zero_grad()
        embedding(torch.tensor([1, 5, 5, comm.rank])).square().sum().backward()
        assert embedding.weight.grad is not None
        assert embedding.weight.grad.is_sparse
        step_and_check(comm, opt, [embedding.weight], agents.mixing.Pi, 0.05)
    opt.close()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_steps_and_reopening_leak_no_memory(comm: MPI.Intracomm) -> None:
    """A leak of one buffer a step or an optimizer would be over 100 MB."""
    agents = make_agents(comm)
    p = torch.nn.Parameter(torch.zeros(1 << 18))
    size = 4 << 18

    def rounds(n: int) -> None:
        for _ in range(n):
            opt = CDMSGD([p], lr=1e-3, agents=agents)
            for _ in range(5):
                opt.zero_grad()
                p.sum().backward()
                opt.step()
            opt.close()

    rounds(3)
    before = resident_bytes()
    rounds(20)
    assert resident_bytes() - before < 30 * size


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

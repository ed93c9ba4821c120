"""Parameters and buffers of every kind, moved, replaced, copied, tied: repaired or refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import flatten, gather, make_agents, of_kind, pair, relative, step_and_check, train

from mpicdsgd import CDMSGD, CDSGD, UserError

pytestmark = pytest.mark.ranks(2, 5)

TOLERANCE = 1e-5
KINDS = ["cdsgd", "nesterov", "look-ahead", "adamw"]


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
    with pytest.raises(RuntimeError, match=r"no parameter has a new gradient.*assign=True"):
        opt.step()
    opt.close()


def test_old_gradients_of_replaced_parameters_are_not_used_again(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    net, opt = pair(agents, "nesterov")
    train(opt, net, 2)
    net.load_state_dict({n: v.clone() for n, v in net.state_dict().items()}, assign=True)
    net.zero_grad()  # the model's new parameters; the optimizer's keep their gradients
    net.loss(2).backward()
    with pytest.raises(RuntimeError, match=r"no parameter has a new gradient.*assign=True"):
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
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        opt.step()
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

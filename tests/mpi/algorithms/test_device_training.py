"""Optimizers on a GPU: the host's bits, the oracle's trajectories, and torch's manners there.

The emulated GPU computes in the host's memory by the real kernels' source; with a real GPU
(marker `gpu`) the same tests run there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from devices import agents_with, on_all_devices, on_devices
from mpi4py import MPI
from oracle import (
    Net,
    Problem,
    cdmsgd,
    flatten,
    gather,
    of_kind,
    relative,
    train,
)

from mpicdsgd import AgentFault, Agents, ExchangeConfig

pytestmark = pytest.mark.ranks(1, 2, 4)

KINDS = ["cdsgd", "polyak", "nesterov", "look-ahead", "adamw", "gradient-tracking", "push-sum"]
SCALED = [*KINDS, "fused"]


def optimizer(agents: Agents, kind: str, polyak: bool = False, **options: Any) -> tuple[Net, Any]:
    net = Net(Problem(agents.size), agents.rank)
    net.inputs, net.targets = net.inputs.to(agents.device), net.targets.to(agents.device)
    net.to(agents.device)
    given: Any = False if kind == "polyak" else kind
    return net, of_kind(given, net.parameters(), agents, **options)


def given_gradients(net: Net, rng: np.random.Generator, *, spare: int = -1) -> None:
    """Gradients that are the same bits on every device; parameter ``spare`` has none."""
    for i, p in enumerate(net.parameters()):
        values = torch.from_numpy(rng.standard_normal(p.shape, np.float32).reshape(p.shape))
        p.grad = None if i == spare else values.to(p.device)


@on_devices
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in KINDS]
    + [
        ("nesterov", {"rounds": 3}),
        ("look-ahead", {"weight_decay": 0.1}),
        ("nesterov", {"exchange": {"wire": "bfloat16"}}),
        ("gradient-tracking", {"exchange": {"wire": "bfloat16"}}),
        ("push-sum", {"exchange": {"wire": "float16"}}),
        ("polyak", {"exchange": {"wire": "float16", "transport": "auto"}}),
    ],
    ids=lambda value: str(value),
)
def test_the_hosts_bits(
    comm: MPI.Intracomm, device: str, kind: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    if "exchange" in options:
        options["exchange"] = ExchangeConfig(**options["exchange"])
    found = []
    for place in ("host", device):
        net, opt = optimizer(agents_with(comm, "complete", place), kind, **options)
        assert opt.arena.flat.is_cuda == (place == "cuda")
        rng = np.random.default_rng(comm.rank)
        for k in range(6):
            given_gradients(net, rng, spare=k % 7)
            opt.step()
        opt.mix()
        found.append({name: np.array(a) for name, a in opt.arrays().items()})
        opt.close()
    host, there = found
    assert host.keys() == there.keys()
    for name, array in host.items():
        if name.startswith("optimizer/") and device == "cuda":  # AdamW's own kernels are torch's
            assert np.allclose(array, there[name], rtol=1e-5)
        elif kind == "adamw" and device == "cuda":
            assert np.allclose(array, there[name], rtol=1e-4, atol=1e-6)
        else:
            assert np.array_equal(array, there[name]), name


@on_devices
@pytest.mark.parametrize("transport", ["direct", "staged"])
@pytest.mark.parametrize("topology", ["ring", "complete", "star", "torus", "expo", "one-way"])
def test_the_oracles_trajectories(
    comm: MPI.Intracomm, device: str, topology: str, transport: str
) -> None:
    agents = agents_with(comm, topology, device)
    exchange = ExchangeConfig(transport=transport)
    net, opt = optimizer(agents, "nesterov", exchange=exchange)
    problem = net.problem
    train(opt, net, 50)
    X, _ = cdmsgd(agents.mixing.Pi, problem.start, problem.gradient, 50, lambda k: 0.05,
                  form="nesterov", mu=0.9)  # fmt: skip
    assert relative(gather(comm, opt.x[: opt.x.size]), padded(opt, X)) <= 1e-5
    opt.close()


def padded(opt: Any, X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The oracle's rows laid out as the arena is."""
    rows = np.zeros((len(X), opt.arena.size))
    start = 0
    for s in opt.arena.segments:
        rows[:, s["offset"] : s["offset"] + s["length"]] = X[:, start : start + s["length"]]
        start += s["length"]
    return rows


@on_all_devices
@pytest.mark.parametrize("kind", SCALED)
def test_an_overflow_leaves_out_one_agents_gradient(
    comm: MPI.Intracomm, device: str, kind: str
) -> None:
    """GradScaler's protocol: no agent skips the step; who overflowed only mixes."""
    agents = agents_with(comm, "ring", device)
    net, opt = optimizer(agents, kind)
    plain, other = optimizer(agents, kind)
    scaler = torch.amp.GradScaler(agents.device.type, init_scale=1024.0, growth_interval=100)
    overflows = comm.rank == comm.size - 1
    for k in range(4):
        rng = np.random.default_rng([comm.rank, k])
        given_gradients(plain, rng)
        if k == 2 and overflows:
            other.mix()
        else:
            other.step()
        given_gradients(net, np.random.default_rng([comm.rank, k]))
        for p in net.parameters():
            assert p.grad is not None
            p.grad.mul_(scaler.get_scale())
            if k == 2 and overflows:
                p.grad.view(-1)[:1] = float("inf")
        scaler.scale(torch.ones((), device=agents.device))  # it begins with the first loss
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == (512.0 if overflows else 1024.0)
    assert opt.steps == other.steps == 4
    for name, array in other.arrays().items():
        assert np.array_equal(array, opt.arrays()[name]), name
    opt.close()
    other.close()


@on_all_devices
def test_unscaling_first(comm: MPI.Intracomm, device: str) -> None:
    """``scaler.unscale_`` before clipping, as torch documents it."""
    agents = agents_with(comm, "ring", device)
    net, opt = optimizer(agents, "nesterov")
    plain, other = optimizer(agents, "nesterov")
    scaler = torch.amp.GradScaler(agents.device.type, init_scale=64.0)
    for k in range(3):
        scaler.scale(net.loss(k)).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        scaler.step(opt)
        scaler.update()
        plain.loss(k).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        other.step()
        opt.zero_grad()
        other.zero_grad()
    assert np.allclose(opt.x, other.x, rtol=1e-5, atol=1e-7)
    opt.close()
    other.close()


@on_all_devices
@pytest.mark.parametrize("kind", ["nesterov", "adamw", "gradient-tracking", "push-sum"])
def test_a_fault_is_raised_by_all_at_one_step(comm: MPI.Intracomm, device: str, kind: str) -> None:
    agents = agents_with(comm, "chain", device)
    net, opt = optimizer(agents, kind)
    lag = 0 if device == "host" else 2
    rng = np.random.default_rng(comm.rank)

    def go_on() -> None:
        for k in range(30):
            given_gradients(net, rng)
            if k == 3 and comm.rank == 0:
                next(net.parameters()).grad[0] = float("nan")  # type: ignore[index]
            opt.step()

    with pytest.raises(AgentFault, match=r"agent 0, step 4: parameters became NaN"):
        go_on()
    assert opt.steps == 4 + lag + agents.graph.diameter
    with pytest.raises(AgentFault):
        opt.close()


@on_all_devices
def test_a_fault_of_the_last_step_is_not_lost(comm: MPI.Intracomm, device: str) -> None:
    """Also where the exchange is drained at exit, without the optimizer."""
    if comm.size == 1 and device == "host":
        pytest.skip("one agent on the host raises it at once")
    agents = agents_with(comm, "ring", device)
    net, opt = optimizer(agents, "nesterov")
    rng = np.random.default_rng(comm.rank)
    for k in range(3):
        given_gradients(net, rng)
        if k == 2 and comm.rank == 0:
            next(net.parameters()).grad[0] = float("nan")  # type: ignore[index]
        opt.step()
    with pytest.raises(AgentFault, match=r"agent 0, step 3: parameters became NaN"):
        opt.exchange.close()
    with pytest.raises(AgentFault):
        opt.close()


@on_all_devices
@pytest.mark.parametrize("kind", ["nesterov", "adamw", "fused", "gradient-tracking", "push-sum"])
def test_a_gradient_left_out_without_a_scaler(comm: MPI.Intracomm, device: str, kind: str) -> None:
    """How a run on a GPU learns of a loss that is no number: x <- mix, and a fault of all."""
    agents = agents_with(comm, "ring", device)
    net, opt = optimizer(agents, kind)
    opt.skipped_means_fault = True
    rng = np.random.default_rng(comm.rank)

    def go_on() -> None:
        for k in range(30):
            given_gradients(net, rng)
            opt.found_inf = torch.full((), float(k == 2 and comm.rank == 0), device=agents.device)
            if k == 2 and comm.rank == 0:
                for p in net.parameters():
                    p.grad.fill_(float("nan"))  # type: ignore[union-attr]
            opt.step()
            del opt.found_inf

    with pytest.raises(AgentFault, match=r"agent 0, step 3: the loss is NaN"):
        go_on()
    assert np.isfinite(opt.x).all()
    with pytest.raises(AgentFault):
        opt.close()


@on_all_devices
@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_on_bit_by_bit(comm: MPI.Intracomm, device: str, kind: str) -> None:
    agents = agents_with(comm, "ring", device)
    net, opt = optimizer(agents, kind)
    train(opt, net, 5)
    arrays = {name: np.array(a) for name, a in opt.arrays().items()}
    train(opt, net, 5, start=5)
    again, other = optimizer(agents, kind)
    other.load_arrays(5, arrays)
    train(other, again, 5, start=5)
    for name, array in opt.arrays().items():
        assert np.array_equal(array, other.arrays()[name]), name
    opt.close()
    other.close()


@on_all_devices
def test_channels_last(comm: MPI.Intracomm, device: str) -> None:
    """Gradients whose memory format is not the parameter's are read right."""
    agents = agents_with(comm, "ring", device)

    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3)
        )

    one = model(comm.rank).to(agents.device, memory_format=torch.channels_last)
    two = model(comm.rank).to(agents.device)
    opts = [of_kind("nesterov", m.parameters(), agents) for m in (one, two)]
    for k in range(3):
        for m, opt in zip((one, two), opts, strict=True):
            rng = np.random.default_rng([comm.rank, k])
            for p in m.parameters():
                g = torch.from_numpy(rng.standard_normal(p.shape, np.float32)).to(p.device)
                odd = g.dim() == 4 and k == 1
                p.grad = g.to(memory_format=torch.channels_last) if odd else g
            opt.step()
    a = flatten([p.detach().cpu().contiguous() for p in one.parameters()])
    b = flatten([p.detach().cpu().contiguous() for p in two.parameters()])
    assert np.array_equal(a, b)
    for opt in opts:
        opt.close()


@on_all_devices
def test_restored_moments_keep_the_memory_format(comm: MPI.Intracomm, device: str) -> None:
    """Fused optimizers refuse moments that are laid out otherwise than their parameter."""
    agents = agents_with(comm, "ring", device)

    def fresh() -> tuple[torch.nn.Module, Any]:
        conv = torch.nn.Conv2d(3, 8, 3).to(agents.device, memory_format=torch.channels_last)
        return conv, of_kind("fused", conv.parameters(), agents)

    conv, opt = fresh()
    conv(torch.ones(1, 3, 5, 5, device=agents.device)).sum().backward()
    opt.step()
    again, other = fresh()
    # As a file gives them back.
    stored = {name: np.array(a, order="C") for name, a in opt.arrays().items()}
    other.load_arrays(1, stored)
    for p, q in zip(conv.parameters(), again.parameters(), strict=True):
        then, now = opt.optimizer.state[p], other.optimizer.state[q]
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(then[name], now[name])
            assert now[name].stride() == q.stride()
            assert now[name].dtype == then[name].dtype
    again(torch.ones(1, 3, 5, 5, device=agents.device)).sum().backward()
    conv(torch.ones(1, 3, 5, 5, device=agents.device)).sum().backward()
    other.step()
    opt.step()
    for one in (opt, other):
        one.close()


@pytest.mark.filterwarnings("ignore:TensorFloat32")
@on_all_devices
def test_a_compiled_model(comm: MPI.Intracomm, device: str) -> None:
    """The compiled code must see the arena's values of every step."""
    if comm.size > 2:
        pytest.skip("compiling on many ranks takes long and shows nothing more")
    agents = agents_with(comm, "ring", device)
    (net, opt), (other, plain) = optimizer(agents, "nesterov"), optimizer(agents, "nesterov")
    compiled = torch.compile(net, backend="inductor" if device == "cuda" else "aot_eager")
    for k in range(4):
        opt.zero_grad()
        y = compiled(net.inputs[k % 3])
        ((y - net.targets[k % 3]) ** 2).sum().div(12).backward()
        opt.step()
        train(plain, other, 1, start=k)
    assert relative(opt.x, plain.x) <= 1e-5
    opt.close()
    plain.close()


@on_all_devices
def test_autocast(comm: MPI.Intracomm, device: str) -> None:
    """Computing in bfloat16 gives float32 gradients; the step is Pi X - lr G all the same."""
    agents = agents_with(comm, "ring", device)
    net, opt = optimizer(agents, "cdsgd")
    for k in range(3):
        opt.zero_grad()
        with torch.autocast(agents.device.type, dtype=torch.bfloat16):
            assert (net.inputs[0] @ net.W1.T).dtype == torch.bfloat16
            loss = net.loss(k)
        loss.backward()
        X = gather(comm, np.array(opt.x))
        gradients = [p.grad.cpu() for p in net.parameters()]  # type: ignore[union-attr]
        G = padded(opt, gather(comm, flatten(gradients)))
        opt.step()
        assert relative(gather(comm, opt.x), agents.mixing.Pi @ X - 0.05 * G) <= 1e-6
    opt.close()


@on_devices
def test_what_lies_elsewhere_is_refused(comm: MPI.Intracomm, device: str) -> None:
    agents = agents_with(comm, "ring", device)
    net = Net(Problem(comm.size), comm.rank).to("meta")
    with pytest.raises(ValueError, match=r"must be dense on .*model.to\(agents.device\)"):
        of_kind("cdsgd", net.parameters(), agents)


@on_devices
def test_everything_is_given_back(comm: MPI.Intracomm, device: str) -> None:
    if device != "emulated":
        pytest.skip("a real GPU does not say what is in use by this library alone")
    agents = agents_with(comm, "ring", device)
    for _ in range(2):
        net, opt = optimizer(agents, "look-ahead", rounds=2)
        train(opt, net, 3)
        opt.close()
    assert agents.gpu is not None
    assert agents.gpu.in_use == 0  # type: ignore[attr-defined]

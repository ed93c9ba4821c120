"""A minibatch's step, and its means: deferred to the device it comes to the same, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import make_agents, of_kind
from torch import nn

from mpicdsgd import AgentFault, Agents
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.kernels import gpu
from mpicdsgd.runs.evaluation import RunningMeans
from mpicdsgd.runs.minibatch import minibatch_step

pytestmark = pytest.mark.ranks(1, 2, 5)

KINDS = ["cdsgd", "nesterov", "look-ahead", "adamw", "fused"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_model(agents: Agents) -> nn.Module:
    torch.manual_seed(agents.rank)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    return model.to(agents.device)


def minibatch(agents: Agents, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng([k, agents.rank])
    x = torch.from_numpy(random.normal(size=(5 + k % 2, 6)).astype(np.float32))
    return x.to(agents.device), torch.from_numpy(random.integers(0, 3, len(x))).to(agents.device)


def bits(opt: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in opt.arrays().items()}


def results(
    agents: Agents,
    kind: str,
    steps: int,
    deferred: bool,
    loss_fn: Loss = nn.functional.cross_entropy,
    clip_norm: float = 0.0,
) -> tuple[list[Any], RunningMeans, Any]:
    """Loss, right answers and the optimizer's arrays of each step; the means; the optimizer."""
    model, means = make_model(agents), RunningMeans()
    opt = of_kind(kind, model.parameters(), agents)
    found: list[Any] = []
    for k in range(steps):
        batch = minibatch(agents, k)
        try:
            loss, right = minibatch_step(
                model, loss_fn, opt, *batch, clip_norm=clip_norm, deferred=deferred
            )
        except AgentFault as fault:
            found.append((k, bits(opt), fault.fault))
            break
        assert isinstance(loss, torch.Tensor) == isinstance(right, torch.Tensor) == deferred
        assert not {"found_inf", "grad_scale"} & vars(opt).keys(), "they are of one step"
        means.add(loss, right, len(batch[1]))
        assert right is not None
        found.append((float(loss), int(right), bits(opt)))
    return found, means, opt


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_deferred_comes_to_the_same(comm: MPI.Intracomm, kind: str, clip_norm: float) -> None:
    agents = make_agents(comm)
    expected, direct_means, opt = results(agents, kind, 6, False, clip_norm=clip_norm)
    opt.close()
    found, means, opt = results(agents, kind, 6, True, clip_norm=clip_norm)
    opt.close()
    assert found == expected
    assert isinstance(means.loss_sum, torch.Tensor)
    assert isinstance(means.correct, torch.Tensor)
    assert means.numbers() == direct_means.numbers()
    assert means.values() == direct_means.values()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_no_number(
    comm: MPI.Intracomm, kind: str, clip_norm: float, bad: float
) -> None:
    """The agent that has it takes no gradient in, and all raise, naming it."""
    agents = make_agents(comm)
    culprit, calls = comm.size // 2, 0

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss * bad if comm.rank == culprit and calls == 3 else loss

    def run(deferred: bool) -> list[Any]:
        nonlocal calls
        calls = 0
        found, _, opt = results(agents, kind, 30, deferred, loss_fn, clip_norm)
        with pytest.raises(AgentFault):
            opt.close()
        assert np.isfinite(opt.x).all()
        return found

    expected, found = run(False), run(True)
    *_, (step, _, fault) = found
    assert (fault.agent, fault.at, fault.reason) == (culprit, 3, Reason.NON_FINITE_LOSS)
    assert step < 29
    if agents.gpu is None:  # on a GPU it is heard of later
        assert repr(found) == repr(expected)  # a NaN among them is itself


def test_no_accuracy(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    for deferred in (False, True):
        model, means = nn.Linear(6, 1).to(agents.device), RunningMeans()
        opt = of_kind("cdsgd", model.parameters(), agents)
        x, _ = minibatch(agents, 0)
        result = minibatch_step(
            model, nn.functional.mse_loss, opt, x, x.sum(1, keepdim=True), deferred=deferred
        )
        assert result[1] is None
        means.add(*result, len(x))
        assert np.isnan(means.values()[1])
        assert means.numbers()["correct"] == -1
        opt.close()


def test_means_go_on_after_a_checkpoint() -> None:
    """With the bits that they had, whether they were numbers or tensors before or after."""
    random = np.random.default_rng(0)
    batches = [(float(np.float32(random.normal())), int(random.integers(9)), 9) for _ in range(50)]
    whole = RunningMeans()
    for batch in batches:
        whole.add(*batch)
    for first in (False, True):
        for second in (False, True):
            means = RunningMeans()
            for i, (loss, right, count) in enumerate(batches):
                if i == 20:
                    means = RunningMeans(**json.loads(json.dumps(means.numbers())))
                if first if i < 20 else second:
                    value = torch.tensor(loss, dtype=torch.float32)
                    means.add(value.double(), torch.tensor(right), count)
                else:
                    means.add(loss, right, count)
            assert means.numbers() == whole.numbers()
            assert means.values() == whole.values()


@pytest.mark.gpu
@pytest.mark.skipif(bool(gpu.why_not()), reason=f"no GPU: {gpu.why_not()}")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adamw"])
def test_nothing_waits_for_the_gpu(comm: MPI.Intracomm, kind: str) -> None:
    agents = make_agents(comm, device="cuda")
    model, means = make_model(agents), RunningMeans()
    opt = of_kind(kind, model.parameters(), agents)
    batches = [minibatch(agents, k) for k in range(10)]
    torch.cuda.synchronize()
    try:
        for k, batch in enumerate(batches):
            if k == 4:  # kernels are loaded and memory is there
                torch.cuda.set_sync_debug_mode("error")
            loss, right = minibatch_step(
                model, nn.functional.cross_entropy, opt, *batch, clip_norm=0.1, deferred=True
            )
            means.add(loss, right, len(batch[1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(means.values()).all()
    opt.close()

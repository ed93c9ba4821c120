"""Runs that go on with another number of agents: among the ranks of one job, as many as take part.

Who has which state is checked against W @ X in NumPy; that what follows is bit by bit the same
however often it is stopped, against a run that was not.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI
from samerun import last_state, metrics
from torch import nn

from mpicdsgd import UserError
from mpicdsgd.checkpoints.elastic import origins
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.runs import metrics_file, owner
from mpicdsgd.runs.config import Config, load_config
from mpicdsgd.runs.rng import seed_generators
from mpicdsgd.runs.run import Run

pytestmark = pytest.mark.ranks(2, 5)

N = MPI.COMM_WORLD.size
if N in (1, 4):
    pytest.skip(
        "one rank has nobody to come or go; two and five say it all", allow_module_level=True
    )

CONFIG = """
run = {epochs = 4, evaluate_every = "1 epoch", checkpoint_every = "3 steps", seed = 5}
agents = {topology = "ring", device = "cpu"}
model = {name = "test_elastic:model"}
data = {name = "test_elastic:clouds", batch_size = 8}
optim = {lr = 0.05, momentum = 0.9}
resume = {elastic = true}
"""


def clouds(path: str, seed: int) -> tuple[Any, Any]:
    random = np.random.default_rng(1)
    y = random.integers(0, 3, 400)
    x = (random.normal(size=(400, 6)) + 0.7 * np.eye(3, 6)[y]).astype(np.float32)
    return (x[:240], y[:240]), (x[240:], y[240:])


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 3)
    )


@pytest.fixture(autouse=True)
def folder(comm: MPI.Intracomm, shared_folder: Path) -> Path:
    if comm.rank == 0:
        (shared_folder / "r.toml").write_text(CONFIG)
    comm.barrier()
    return shared_folder


def config(*overrides: str) -> Config:
    return load_config(Path("r.toml"), ("run.dir=run", *overrides))


class Left(Exception):
    """Raised on all ranks, where a run is left."""


def first(comm: MPI.Intracomm, agents: int, *overrides: str, until: int = 0) -> Run | None:
    """The run of the first ``agents`` ranks, trained to the end or ``until`` so many steps."""
    some = comm.Split(0 if comm.rank < agents else MPI.UNDEFINED, comm.rank)
    run = None
    if some != MPI.COMM_NULL:
        run = Run(config(*overrides), some)
        _train(run, until)
        some.Free()
    comm.barrier()
    return run


def _train(run: Run, until: int) -> None:
    step = run._step

    def counted(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        if run.optimizer.steps == until:
            raise Left
        step(inputs, targets)

    if until:
        run._step = counted  # type: ignore[method-assign]
        with pytest.raises(Left):
            run.train()
        run._writer.close()
        run.optimizer.close()
        run._metrics.close()
    else:
        run.train()


def saved(agents: int, step: int, name: str) -> np.ndarray:
    """An array of all agents in the newest generation's checkpoint, shape (N, ...)."""
    found = []
    for rank in range(agents):
        path = max(Path(f"run/checkpoints/step-{step:08d}").glob(f"rank-{rank:04d}.*.h5"))
        with h5py.File(path, locking=False) as file:
            found.append(file[f"arrays/{name}"][()])
    return np.stack(found)


FEWER = max(1, N - 2)


@pytest.mark.parametrize(
    ("optim", "buffers"),
    [
        ("cdmsgd", "local"),
        ("cdmsgd optim.nesterov=look-ahead", "mixed"),
        ("torch.optim:AdamW optim.lr=0.01", "local"),
        ("easgd", "mixed"),
        ("sgd", "local"),
        ("fedavg", "mixed"),
        ("gossip", "local"),
    ],
)
def test_newcomers_have_the_mix_of_their_neighbours(
    comm: MPI.Intracomm, optim: str, buffers: str
) -> None:
    """Every array of floating-point numbers is W times those of before; the rest goes on."""
    settings = [f"optim.name={optim.split()[0]}", *optim.split()[1:], f"model.buffers={buffers}"]
    first(comm, FEWER, *settings, until=7)
    run = Run(config(*settings), comm)
    assert run.optimizer.steps == 6
    graph = graph_from_spec("ring", N)
    W = origins(mixing_from_spec("metropolis", graph), FEWER)
    arrays = dict(run.optimizer.arrays())
    for name, array in arrays.items():
        before = saved(FEWER, 6, name)
        if before.dtype.kind == "f":
            expected = np.tensordot(W, before.astype(np.float64), 1)[comm.rank]
            np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    assert "x" in arrays
    assert np.ptp(saved(FEWER, 6, "x"), axis=0).max() > 0 or FEWER == 1 or optim in ("sgd",)
    if buffers == "local":
        statistics = dict(run.model.named_buffers())["1.running_var"].numpy()
        expected = (W @ saved(FEWER, 6, "buffers/1.running_var").astype(np.float64))[comm.rank]
        np.testing.assert_allclose(statistics, expected, rtol=1e-6)
    run.train()
    assert [line["epoch"] for line in metrics_file.read(Path("run"))][-1] == 4
    assert len(metrics_file.read(Path("run"))[-1]["test_loss"]["agents"]) == N


@pytest.mark.parametrize(
    ("name", "first_values"),
    [("gradient-tracking", {"y": 0, "gradient": 0}), ("push-sum", {"weight": 1})],
)
def test_what_adds_up_over_agents_begins_anew(
    comm: MPI.Intracomm, name: str, first_values: dict[str, float]
) -> None:
    first(comm, FEWER, f"optim.name={name}", until=7)
    run = Run(config(f"optim.name={name}"), comm)
    arrays = run.optimizer.arrays()
    for key, value in first_values.items():
        assert (arrays[f"link/{key}"] == value).all()
    run.train()
    if name == "gradient-tracking":
        apart = arrays["link/y"].astype(np.float64) - arrays["link/gradient"]
        assert np.abs(comm.allreduce(apart)).max() < 1e-4, "mean(Y) = mean(G)"


def test_fewer_go_on_with_their_own(comm: MPI.Intracomm) -> None:
    first(comm, N, until=7)
    x = saved(N, 6, "x")
    run = first(comm, FEWER)
    if run is not None:
        lines = metrics_file.read(Path("run"))
        assert [len(line["test_loss"]["agents"]) for line in lines][-1] == FEWER
        assert lines[-1]["epoch"] == 4
        per_epoch = run.course.per_epoch
        assert run.optimizer.steps == run.total_steps
        done = 6 / -(-240 // N // 8)  # epochs before the change
        assert abs(run.total_steps - 6 - (4 - done) * per_epoch) <= 1
    comm.barrier()
    again = Run(config("run.dir=run"), comm)  # and more than those: they come anew
    W = origins(again.agents.mixing, FEWER)
    last = saved(FEWER, again.optimizer.steps, "x").astype(np.float64)
    np.testing.assert_allclose(again.optimizer.x, (W @ last)[comm.rank], rtol=1e-6, atol=1e-7)
    assert not np.array_equal(last[0], x[0])
    assert again.train() is not None
    assert again.optimizer.steps == again.total_steps == again.course.total_steps


def test_a_newcomer_draws_its_own_numbers(comm: MPI.Intracomm) -> None:
    first(comm, FEWER, until=7)
    run = Run(config(), comm)
    states = comm.allgather(torch.get_rng_state().numpy().tobytes())
    assert len(set(states)) == N, "or two agents would drop the same units"
    before = saved(FEWER, 6, "random/torch")
    for rank in range(FEWER):
        assert states[rank] == before[rank].tobytes()
    run.train()
    seed_generators(5, comm.rank + 1)
    began = comm.allgather(torch.get_rng_state().numpy().tobytes())
    assert not set(states) & set(began), "nor what an agent of that number drew at first"


def test_stopped_again_it_is_the_same_run(comm: MPI.Intracomm, folder: Path) -> None:
    """After the change a restart loses no bit, though the epochs' count is shifted."""
    first(comm, FEWER, until=7)
    if comm.rank == 0:
        owner.release_all()  # else who comes to the copy waits for this process's end
        shutil.copytree("run", "other", symlinks=True)
    comm.barrier()
    run = first(comm, N)
    assert run is not None
    whole = last_state(folder / "run", N)
    assert run.course.shift != 0 or N == FEWER
    first(comm, N, "run.dir=other", until=run.total_steps - 2)
    first(comm, N, "run.dir=other", "resume.elastic=false")
    assert repr(metrics(folder / "other")) == repr(metrics(folder / "run"))
    found = last_state(folder / "other", N)
    assert [key for key in whole if found[key] != whole[key]] == []


def test_what_was_to_stay_stays(comm: MPI.Intracomm) -> None:
    settings = ("run.keep=1", "run.keep_every=3 steps")
    first(comm, FEWER, *settings, until=7)
    first(comm, N, *settings, "run.keep_every=never")
    there = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert there[:2] == ["step-00000003", "step-00000006"]
    assert len(there) == 3


def test_fedavg_averages_at_the_ends_of_epochs(comm: MPI.Intracomm) -> None:
    settings = ("optim.name=fedavg", "run.keep=9", "run.checkpoint_every=1 steps")
    first(comm, FEWER, *settings, until=7)
    run = Run(config(*settings), comm)
    run.train()
    alike = [
        np.ptp(saved(N, step, "x"), axis=0).max() == 0
        for step in range(run.total_steps - 8, run.total_steps + 1)
    ]
    ends = [
        run.course.place(step)[1] == 0 for step in range(run.total_steps - 8, run.total_steps + 1)
    ]
    assert alike == ends
    assert any(ends)


def test_cosine_falls_without_a_jump_to_zero(comm: MPI.Intracomm) -> None:
    settings = ("optim.schedule=cosine", "run.evaluate_every=1 steps")
    first(comm, FEWER, *settings, until=7)
    first(comm, N, *settings)
    found = metrics_file.read(Path("run"))
    epochs, lr = (np.array([line[key] for line in found]) for key in ("epoch", "lr"))
    np.testing.assert_allclose(lr, 0.05 * (1 + np.cos(np.pi * epochs / 4)) / 2, atol=0.05 / 40)
    assert epochs[-1] == 4


def test_without_it_the_number_must_be_the_same(comm: MPI.Intracomm) -> None:
    first(comm, FEWER, until=7)
    with pytest.raises(UserError, match=rf"is of {FEWER} agents.*set resume.elastic = true"):
        Run(config("resume.elastic=false"), comm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.name=gosgd"], 'optim.name = "gosgd" counts'),
        (["run.theory=true"], "run.theory = true records a run of one matrix"),
    ],
)
def test_refused(comm: MPI.Intracomm, settings: list[str], message: str) -> None:
    first(comm, FEWER, *settings, until=7)
    with pytest.raises(UserError, match=message):
        Run(config(*settings), comm)


def test_a_damaged_part_of_a_mix_is_found(comm: MPI.Intracomm) -> None:
    """The newest checkpoint misses a byte of agent 0's, of which a newcomer has its state."""
    first(comm, FEWER, until=7)
    if comm.rank == 0:
        (path,) = Path("run/checkpoints/step-00000006").glob("rank-0000.*")
        path.write_bytes(path.read_bytes()[:-1])
    comm.barrier()
    run = Run(config(), comm)
    assert run.optimizer.steps == 3
    run.train()


def test_the_log_says_who_came(comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture) -> None:
    first(comm, FEWER, until=7)
    with caplog.at_level(logging.INFO, "mpicdsgd"):
        run = Run(config(), comm)
    texts = [r.getMessage() for r in caplog.records if f"instead of {FEWER}" in r.getMessage()]
    assert len(texts) == (comm.rank == 0)
    who = f"agents {FEWER} to {comm.size - 1} begin" if comm.size - FEWER > 1 else "agent 1 begins"
    assert all(f"{who} with the mix of" in text for text in texts)
    run.train()

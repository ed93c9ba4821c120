"""Runs and the owner of their folder: claimed first, refused to others, left when taken over."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI
from torch import Tensor

from mpicdsgd import UserError
from mpicdsgd.checkpoints import reading
from mpicdsgd.common.run_folder import claim_file, newest_generation
from mpicdsgd.runs import owner
from mpicdsgd.runs.config import load_config
from mpicdsgd.runs.run import Run

if MPI.COMM_WORLD.size in (1, 4):
    pytest.skip("two ranks and five say it all", allow_module_level=True)
pytestmark = pytest.mark.ranks(2)

CONFIG = """
run = {dir = "run", epochs = 4, checkpoint_every = "2 steps", evaluate_every = "never"}
agents = {topology = "ring", device = "cpu"}
data = {name = "gaussians", batch_size = 8, args = {samples = 32, features = 4, classes = 3}}
model = {name = "mlp", args = {hidden = [5]}}
"""


@pytest.fixture(autouse=True)
def folder(comm: MPI.Intracomm, shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if comm.rank == 0:
        (shared_folder / "r.toml").write_text(CONFIG)
    comm.barrier()
    for name, value in {"BEAT_S": 0.01, "SILENT_S": 20.0, "PATIENCE_S": 0.5}.items():
        monkeypatch.setattr(owner, name, value)
    return shared_folder


def make(comm: MPI.Intracomm, *overrides: str) -> Run:
    return Run(load_config(Path("r.toml"), overrides), comm)


def test_the_folder_is_claimed_before_checkpoints_are_listed(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner that was taken for dead removes no checkpoint once there is a newer claim."""
    make(comm).train()
    seen = []
    read = reading.read_newest

    def noted(*arguments: Any) -> Any:
        seen.append(newest_generation(Path("run")))
        return read(*arguments)

    monkeypatch.setattr(reading, "read_newest", noted)
    make(comm).train()
    assert seen == [2]


def test_a_living_owner_is_an_error_on_all_ranks(comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        Path("run").mkdir()
        claim_file(Path("run"), 1).write_text('{"host": "node7", "pid": 5}')
    comm.barrier()
    with pytest.raises(UserError, match="in use by process 5 on node7"):
        make(comm)
    assert newest_generation(Path("run")) == 1


def test_who_is_taken_over_stops(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make(comm, "run.epochs=1000")
    step = run._step

    def counted(inputs: Tensor, targets: Tensor) -> None:
        if run.optimizer.steps == 3 and comm.rank == 0:
            claim_file(Path("run"), 2).touch()
        step(inputs, targets)

    monkeypatch.setattr(run, "_step", counted)
    run.train()
    assert 3 < run.optimizer.steps < run.total_steps
    assert run.code == 1
    assert not Path("run/requeue.json").exists()
    assert ("a newer run has taken over run" in caplog.text) == (comm.rank == 0)


def test_a_refused_start_gives_the_folder_up(comm: MPI.Intracomm) -> None:
    make(comm).train()
    with pytest.raises(UserError, match="is of another model"):
        make(comm, "model.args.hidden=[6]")
    if comm.rank == 0:
        assert '"until"' in claim_file(Path("run"), 2).read_text()


def test_a_last_checkpoint_that_cannot_be_written_is_no_good_end(
    comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture
) -> None:
    run = make(comm)
    last = run.total_steps
    if comm.rank == 0:  # what is to be a file cannot be one
        name = f".rank-0000.g{run.agents.generation:04d}.h5.tmp"
        Path(f"run/checkpoints/step-{last:08d}/{name}").mkdir(parents=True)
    comm.barrier()
    with caplog.at_level(logging.ERROR):
        run.train()
    assert run.code == 1
    text = f"its checkpoint could not be written: the checkpoint of step {last - 2} is kept"
    assert (text in caplog.text) == (comm.rank == 0)
    again = make(comm)
    assert again.optimizer.steps == last - 2
    if comm.rank == 0:
        Path(f"run/checkpoints/step-{last:08d}/{name}").rmdir()
    comm.barrier()
    again.train()
    assert again.code == 0

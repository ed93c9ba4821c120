"""The part of a run's survival that any MPI library can do: a run that goes on from memory.

The last rank leaves instead of dying, and the others go on as after a death. With ranks that really
die: `tests/jobs/test_survival.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpicdsgd import UserError
from mpicdsgd.graphs.survivors import remaining_graph, remaining_mixing
from mpicdsgd.runs import metrics_file
from mpicdsgd.runs.config import Config, load_config
from mpicdsgd.runs.prepared import Inherited
from mpicdsgd.runs.run import Run
from mpicdsgd.runs.survival import _together, train

pytestmark = pytest.mark.ranks(2, 5)

N = MPI.COMM_WORLD.size

CONFIG = """
run = {epochs = 4, evaluate_every = "1 epoch", checkpoint_every = "3 steps", seed = 5}
agents = {topology = "ring", device = "cpu", on_death = "continue"}
model = {name = "test_elastic:model"}
data = {name = "test_elastic:clouds", batch_size = 8}
optim = {lr = 0.05, momentum = 0.9, schedule = "cosine"}
"""


@pytest.fixture(autouse=True)
def folder(comm: MPI.Intracomm, shared_folder: Path) -> Path:
    if comm.rank == 0:
        (shared_folder / "r.toml").write_text(CONFIG)
    comm.barrier()
    return shared_folder


def config(*overrides: str) -> Config:
    return load_config(Path("r.toml"), ("run.dir=run", *overrides))


def some_steps(comm: MPI.Intracomm, steps: int) -> Run:
    """A run whose optimizer has made so many steps, and whose exchange is closed."""
    run = Run(config(), comm)
    done = 0
    for epoch in range(4):
        for batch in run.data.train.batches(run.shuffler.batches(epoch), epoch):
            if done < steps:
                run._step(*batch)
                done += 1
    run._writer.close()
    run.optimizer.close()
    return run


@pytest.mark.skipif(N == 1, reason="one rank alone has nobody to lose")
@pytest.mark.parametrize("left", [2, 0])
def test_the_others_go_on(comm: MPI.Intracomm, left: int) -> None:
    """From within the first epoch, and from its end, whose evaluation is due."""
    per_epoch = -(-240 // N // 8)
    steps = per_epoch - left
    old = some_steps(comm, steps)
    part = old.abandon()
    living = comm.Split(0 if comm.rank < N - 1 else MPI.UNDEFINED, comm.rank)
    if comm.rank < N - 1:
        graph, _ = remaining_graph(old.agents.graph, range(N - 1))
        mixing, _ = remaining_mixing("metropolis", graph)
        # As if the others were one step behind, and rank 0 had the schedule of the step.
        if comm.rank > 0:
            part = dataclasses.replace(part, step=steps - 1)
        inherited = Inherited(mixing, *_together(living, part, [3, None][comm.rank % 2]))
        run = Run(config(), living, inherited=inherited)
        assert run.optimizer.steps == run.scheduler.last_epoch == steps
        assert run.agents.generation == 2
        assert run.saved_step == 3, "as rank 0 knew"
        for name, array in part.arrays.items():
            if name in ("x", "v"):
                assert np.array_equal(run.optimizer.arrays()[name], array), name
        run.train()
        lines = metrics_file.read(Path("run"))
        first = lines[0]
        assert [len(line["test_loss"]["agents"]) for line in lines] == [N - 1] * 4
        assert first["epoch"] == 1
        assert (first["step"] == steps) == (steps == per_epoch), "made up for, as it was due"
        assert lines[-1]["epoch"] == 4
        living.Free()
    comm.barrier()


def test_a_schedule_that_was_left_behind_catches_up(comm: MPI.Intracomm) -> None:
    """A death may come between the step's post and the schedule."""
    run = some_steps(comm, 5)
    meta = run._standing.snapshot().meta
    run.optimizer.context.steps += 1
    part = run.abandon()
    assert part.step == part.meta["scheduler"]["last_epoch"] == 6
    assert part.meta["groups"][0]["lr"] < meta["groups"][0]["lr"]


def test_one_without_a_part_has_all_begin_anew(comm: MPI.Intracomm) -> None:
    part = some_steps(comm, 2).abandon()
    mine = part if comm.rank < N - 1 else None
    assert _together(comm, mine, comm.rank) == (None, N - 1)


@pytest.mark.skipif(
    "Open MPI" in MPI.Get_library_version(), reason="this library may be able to go on"
)
def test_this_library_cannot(comm: MPI.Intracomm) -> None:
    with pytest.raises(UserError, match=r"ends the job when a rank dies: use Open MPI 5"):
        train(config(), comm)


@pytest.mark.skipif(N < 3, reason="two agents have one matching only, which is no cycle")
def test_no_cycles(comm: MPI.Intracomm) -> None:
    with pytest.raises(UserError, match=r"one mixing matrix, not a cycle"):
        Run(config("agents.mixing=matchings"), comm)

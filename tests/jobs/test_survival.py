"""Runs whose ranks die by ``kill -9``: the others go on, and come to where all would have come.

They need Open MPI, see `openmpi`. A hang fails the test after its job's time limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openmpi
import pytest
from job import Ended, Job

from mpicdsgd.runs import metrics_file

pytestmark = pytest.mark.slow

CONFIG = """
run = {epochs = 6, checkpoint_every = "20 steps", seed = 3}
agents = {topology = "ring", device = "cpu", on_death = "continue"}
model = {name = "mortal:model", loss = "mortal:loss"}
data = {name = "digits", batch_size = 16}
optim = {lr = 0.02, momentum = 0.9}
"""

Train = Callable[..., Ended]


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """``train(ranks, plan, *overrides, options=...)``: a job of Open MPI's that has ended."""
    if openmpi.find() is None:
        pytest.skip(
            "this Python's MPI is not Open MPI: MPICDSGD_OPENMPI=FOLDER has one made there for it"
        )
    (tmp_path / "r.toml").write_text(CONFIG)
    jobs: list[Job] = []

    def train(
        ranks: int,
        plan: list[dict[str, Any]],
        *overrides: str,
        options: tuple[str, ...] = ("--with-ft", "ulfm"),
    ) -> Ended:
        command = ["-m", "mpicdsgd", "train", "r.toml", "run.dir=run", *overrides]
        environment = {**openmpi.ENVIRONMENT, "MORTAL": json.dumps(plan)}
        launcher = openmpi.launcher(ranks, *options)
        jobs.append(Job(tmp_path, ranks, command, environment, launcher))
        return jobs[-1].wait(300.0)

    yield train
    for job in jobs:
        job.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return metrics_file.read(folder / "run")


def went_on(ended: Ended, folder: Path, ranks: int, deaths: int) -> list[dict[str, Any]]:
    """Assert that it came to its end with so many fewer agents; its metrics."""
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert ended.out.startswith(f"{ranks - deaths} agents on ")
    found = lines(folder)
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps)), "every evaluation once"
    assert [line["epoch"] for line in found][-1] == 6
    assert len(found[-1]["test_accuracy"]["agents"]) == ranks - deaths
    assert found[-1]["test_accuracy"]["mean"] > 0.88
    return found


def test_a_ring_loses_one(train: Train, tmp_path: Path) -> None:
    ended = train(4, [{"rank": 2, "at": "step", "nth": 40}])
    found = went_on(ended, tmp_path, 4, 1)
    assert [len(line["test_loss"]["agents"]) for line in found] == [4, 3, 3, 3, 3, 3]
    (said,) = ended.lines("agent 2 died: 3 agents go on from step ")
    assert "numbered anew, on graph what is left of ring, mixing metropolis (spectral gap" in said
    step = int(said.split("step ")[1].split()[0])
    assert step in (39, 40, 41)
    assert found[0]["step"] == 23
    config = (tmp_path / "run/config.g0002.toml").read_text()
    assert f"# resumed from step: {step}\n" in config
    assert "elastic = true" in config
    assert 'transport = "neighbor"' in config


def test_two_at_once_and_rank_0_among_them(train: Train, tmp_path: Path) -> None:
    """Another rank is rank 0 now: it speaks, keeps the metrics and writes the manifests."""
    plan = [{"rank": 0, "at": "step", "nth": 60}, {"rank": 3, "at": "step", "nth": 60}]
    ended = train(5, plan, "agents.topology=complete", "agents.mixing=uniform")
    found = went_on(ended, tmp_path, 5, 2)
    assert ended.lines("going on from step ")
    assert "mixing uniform (spectral gap 1)" in ended.err
    assert len(ended.lines(f"epoch 6  step {found[-1]['step']}")) == 1
    manifests = sorted((tmp_path / "run/checkpoints").glob("step-*/manifest.g*.json"))
    newest = json.loads(manifests[-1].read_text())
    assert (newest["step"], newest["agents"]) == (found[-1]["step"], 3)


def test_one_after_the_other_on_a_torus(train: Train, tmp_path: Path) -> None:
    """In an evaluation, and in a later step; uniform weights fit no longer."""
    plan = [
        {"rank": 4, "at": "evaluation", "nth": 3, "delay_s": 0.002},
        {"rank": 0, "at": "step", "nth": 50},
    ]
    ended = train(6, plan, "agents.topology=torus:2x3", "agents.mixing=uniform")
    found = went_on(ended, tmp_path, 6, 2)
    assert len(ended.lines("agent 4 died: 5 agents go on ")) == 1
    assert len(ended.lines("agent 0 died: 4 agents go on ")) == 1
    assert "mixing uniform needs a regular graph" in ended.err
    assert "mixing metropolis from now on" in ended.err
    assert len(found) == 6, "the evaluation that a death fell into was made up for"
    assert found[0]["step"] - 15 in (0, 1), "there, or after the step that an agent had done since"


def test_one_dies_while_the_others_recover(train: Train, tmp_path: Path) -> None:
    plan = [{"rank": 1, "at": "step", "nth": 30}, {"rank": 2, "at": "model", "nth": 2}]
    ended = train(5, plan)
    went_on(ended, tmp_path, 5, 2)
    assert len(ended.lines("agent 1 died")) + len(ended.lines("agents 1, 2 died")) <= 1
    assert "3 agents go on from step" in ended.err


def test_one_dies_before_there_is_a_step(train: Train, tmp_path: Path) -> None:
    ended = train(4, [{"rank": 1, "at": "model", "nth": 1}], "optim.name=torch.optim:AdamW",
                  "optim.lr=0.003")  # fmt: skip
    found = went_on(ended, tmp_path, 4, 1)
    assert all(len(line["test_loss"]["agents"]) == 3 for line in found)
    assert "3 agents go on from step 0" in ended.err


def test_one_dies_in_the_last_evaluation(train: Train, tmp_path: Path) -> None:
    """The step is at the run's end: what was due there is done, and the run over."""
    # Losses: of a trial when the run begins, then in each epoch of the own and the averaged model.
    plan = [{"rank": 3, "at": "evaluation", "nth": 1 + 2 * 6 - 1}]
    ended = train(4, plan)
    found = went_on(ended, tmp_path, 4, 1)
    assert [len(line["test_loss"]["agents"]) for line in found] == [4, 4, 4, 4, 4, 3]
    steps = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert f"step-{found[-1]['step']:08d}" in steps


def test_half_without_rank_0_is_too_few(train: Train, tmp_path: Path) -> None:
    """They might be a part that the network cut off; the job ends, and a restart goes on."""
    plan = [{"rank": r, "at": "step", "nth": 50} for r in (0, 1)]
    ended = train(4, plan)
    assert ended.code not in (0, 2, 80)
    assert "agents 0, 1 died: 2 of 4 are too few to go on" in ended.err
    assert (tmp_path / "run/requeue.json").exists(), "with as many as before it may go on"
    again = train(3, [])
    assert again.code == 0, again.err
    assert "3 agents instead of 4" in again.err


def test_a_stop_after_a_death(train: Train, tmp_path: Path) -> None:
    """Exit code 80 in spite of the dead rank; the next start goes on with as many as are left."""
    plan = [
        {"rank": 0, "at": "step", "nth": 30},
        {"rank": 2, "at": "step", "nth": 60, "signal": "SIGUSR1"},
    ]
    ended = train(4, plan)
    assert ended.code == 80, ended.err
    marker = json.loads((tmp_path / "run/requeue.json").read_text())
    assert marker["reason"] == "USR1 on rank 1", "as the three are numbered now"
    again = train(3, [])
    assert again.code == 0, again.err
    assert again.lines(f"going on from step {marker['step']} in run")
    assert not (tmp_path / "run/requeue.json").exists()


def test_a_mistake_is_still_one(train: Train) -> None:
    """Raised on all ranks, told once, also after a death; nobody waits for who has left."""
    plan = [{"rank": 0, "at": "step", "nth": 10}]
    ended = train(4, plan, "optim.lr=1e30", "optim.clip_norm=0")
    assert ended.code == 2, ended.err
    assert len(ended.lines("mpicdsgd: agent ")) == 1


def test_without_ulfm_it_says_so(train: Train) -> None:
    ended = train(2, [], options=())
    assert ended.code == 2
    (said,) = ended.lines("mpicdsgd: ")
    assert said.startswith('mpicdsgd: agents.on_death = "continue": mpirun was started without ')
    assert "use mpirun --with-ft ulfm -n N mpicdsgd train" in said

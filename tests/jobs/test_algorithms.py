"""Every algorithm as whole jobs: killed in its middle it goes on, and bad settings end it with 2.

One job runs several algorithms one after the other, as starting ranks takes longer than these runs.
This file is also what its ranks run, see `ranks`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from job import Ended, Job
from samerun import checkpoints, last_state, metrics

pytestmark = pytest.mark.slow

AGENTS = 3
STEPS = 24  # three epochs; checkpoints fall within epochs, rounds and the steps between pulls
SAVED, HALTED = 10, 12

CONFIG = f"""
[run]
epochs = 3
evaluate_every = "9 steps"
checkpoint_every = "5 steps"
[agents]
topology = "complete"
[model]
name = "victim:model"
[data]
name = "victim:data"
batch_size = 60
limit = {AGENTS * 480}
[optim]
lr = 0.02
schedule = "cosine"
"""
MIXED = "model.buffers=mixed"
SYNCHRONOUS = {
    "cdsgd": [MIXED],
    "cdmsgd": ["optim.nesterov=look-ahead"],
    "icdsgd": ["optim.rounds=3"],
    "sgd": [],
    "msgd": ["optim.nesterov=false"],
    "fedavg": ["optim.fraction=0.7", "optim.server_momentum=0.5", MIXED],
    "easgd": ["optim.period=3"],
    "eamsgd": ["optim.period=5", MIXED],
    "gossip": ["optim.probability=0.7", MIXED],
}
SHARED = {  # what agents have in common is in a checkpoint, too
    "fedavg": ["0/link/server/x", "2/link/server/velocity"],
    "easgd": ["0/link/centre"],
    "eamsgd": ["2/link/centre", "2/v"],
}
GOSGD = {"gosgd": ["optim.probability=0.7"]}
SERVED = {
    "downpour": ["optim.n_push=3", "optim.n_fetch=4"],
    "adagrad": ["optim.name=downpour", "optim.lr=0.001", "optim.n_push=2", "optim.adagrad=true"],
    "easgd-server": ["optim.name=easgd", "optim.asynchronous=true", "optim.period=5"],
    "eamsgd-server": ["optim.name=eamsgd", "optim.asynchronous=true", "optim.period=2"],
}
SENT = {"downpour": 8, "adagrad": 12, "easgd-server": 5, "eamsgd-server": 13}


# What the ranks run


def ranks(plan: list[dict[str, Any]]) -> int:
    """``mpicdsgd train`` for each entry of ``plan``; the greatest of their exit codes.

    One with "halt" runs in a thread of its own and halts before that step, which is plus its rank
    with "apart", so that all of them can be killed in their middle at once. A server halts when it
    begins to serve, and goes on serving.
    """
    from mpi4py import MPI

    from mpicdsgd.algorithms.server.server import Server
    from mpicdsgd.cli import parser
    from mpicdsgd.runs.run import Run

    rank, codes = MPI.COMM_WORLD.rank, [0]
    halted = threading.Event()
    halt_at = -1
    step, serve = Run._step, Server.serve

    def halting_step(run: Run, *batch: Any) -> None:
        if run.optimizer.steps == halt_at:
            halted.set()
            while True:  # others may wait for it to read their mail, or for its checkpoint
                run.optimizer.exchange.look()
                run._writer.progress()
                time.sleep(0.01)
        step(run, *batch)

    def telling_serve(server: Server) -> int:
        halted.set()
        return serve(server)

    Run._step, Server.serve = halting_step, telling_serve  # type: ignore[method-assign]
    for one in plan:
        command = ["train", "r.toml", *one["train"]]
        if "halt" not in one:
            codes.append(parser.main(command))
            continue
        halted.clear()
        halt_at = one["halt"] + (rank if one["apart"] else 0)
        threading.Thread(target=parser.main, args=(command,), daemon=True).start()
        while not halted.wait(0.01):
            MPI.COMM_WORLD.Iprobe()  # what halted agents sent is to arrive
    if halt_at >= 0:
        Path(f"halted-{rank}").touch()
        while True:
            MPI.COMM_WORLD.Iprobe()
            time.sleep(0.01)
    return max(codes)


def job(folder: Path, ranks: int, plan: list[dict[str, Any]]) -> Job:
    (folder / "r.toml").write_text(CONFIG)
    return Job(folder, ranks, [__file__, json.dumps(plan)], {})


def entry(label: str, where: str, more: list[str], **rest: Any) -> dict[str, Any]:
    return {"train": [f"optim.name={label}", f"run.dir={label}/{where}", *more], **rest}


# Killed and started again


@dataclass(frozen=True)
class Killed:
    """Runs LABEL/killed that were killed and have gone on; beside some, LABEL/whole was not."""

    folder: Path
    log: str

    def run(self, label: str) -> Path:
        return self.folder / label / "killed"

    def arrays(self, label: str, name: str) -> list[np.ndarray]:
        """An array of the last checkpoint, of all agents that have it."""
        paths = sorted(checkpoints(self.run(label))[-1].parent.glob("rank-*.h5"))
        assert len(paths) == AGENTS
        found = []
        for path in paths:
            with h5py.File(path) as file:
                if name in file["arrays"]:
                    found.append(file["arrays"][name][()])
        return found


def kill_and_go_on(
    folder: Path, size: int, whole: dict[str, list[str]], killed: dict[str, list[str]]
) -> Killed:
    """Run ``whole`` to the end; run ``killed`` up to their middle, kill all ranks, and go on."""
    plan = [entry(label, "whole", more) for label, more in whole.items()]
    plan += [
        entry(label, "killed", more, halt=HALTED, apart=label not in whole)
        for label, more in killed.items()
    ]
    first = job(folder, size, plan)
    deadline = time.monotonic() + 100
    while len(list(folder.glob("halted-*"))) < size:
        assert first.running, first.wait().err
        assert time.monotonic() < deadline, first.output()
        time.sleep(0.01)
    expected = ["step-00000005", f"step-{SAVED:08d}"]
    for label in killed:  # the last ones may be on their way to the disk
        while (found := [p.parent.name for p in checkpoints(folder / label / "killed")]) < expected:
            assert time.monotonic() < deadline, (label, found)
            time.sleep(0.01)
        assert found == expected, label
    first.kill()
    first.close()
    again = job(folder, size, [entry(label, "killed", more) for label, more in killed.items()])
    ended = again.wait()
    again.close()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    return Killed(folder, ended.err)


@pytest.fixture(scope="module")
def without_server(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("without_server")
    return kill_and_go_on(folder, AGENTS, SYNCHRONOUS, {**SYNCHRONOUS, **GOSGD})


@pytest.fixture(scope="module")
def with_server(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("with_server")
    return kill_and_go_on(folder, AGENTS + 1, {}, SERVED)


def went_on(runs: Killed, label: str) -> None:
    assert f"going on from step {SAVED} in {label}/killed" in runs.log
    assert checkpoints(runs.run(label))[-1].parent.name == f"step-{STEPS:08d}"
    lines = metrics(runs.run(label))
    assert [line["step"] for line in lines] == [9, 18, STEPS]
    assert all(len(line["test_loss"]["agents"]) == AGENTS for line in lines)
    # Guessing one of four classes gives log 4 and 1/4.
    assert lines[-1]["test_loss"]["mean"] < lines[0]["test_loss"]["mean"] < 3
    assert lines[-1]["test_accuracy"]["mean"] > 0.3


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_a_killed_run_ends_as_an_undisturbed_one(without_server: Killed, name: str) -> None:
    went_on(without_server, name)
    whole, killed = without_server.folder / name / "whole", without_server.run(name)
    assert metrics(killed) == metrics(whole)
    expected, found = last_state(whole, AGENTS), last_state(killed, AGENTS)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    assert {"0/x", "2/random/torch", *SHARED.get(name, ())} <= expected.keys()


def test_gosgds_weights_survive(without_server: Killed) -> None:
    went_on(without_server, "gosgd")
    weights = np.concatenate(without_server.arrays("gosgd", "link/gossip/weight"))
    assert weights.shape == (AGENTS,)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights > 0).all()
    assert len(set(weights)) > 1, "they have pushed"


@pytest.mark.parametrize("label", SERVED)
def test_no_update_is_lost_or_applied_twice(with_server: Killed, label: str) -> None:
    went_on(with_server, label)
    sent = np.concatenate(with_server.arrays(label, "link/server/sent"))
    (applied,) = with_server.arrays(label, "link/server/applied")
    assert sent.tolist() == [SENT[label]] * AGENTS
    assert applied.tolist() == sent.tolist()
    (model,) = with_server.arrays(label, "link/server/x")
    assert np.isfinite(model).all()


# Mistakes


def refused(ended: Ended, text: str) -> None:
    """Exit code 2, and one line, after what is said about the job."""
    assert ended.code == 2, ended.err
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if "as the server" not in line]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("mpicdsgd: ")
    assert text in lines[0]


@pytest.mark.parametrize(
    ("size", "arguments", "text"),
    [
        (0, ["optim.name=downpour"], "no rank is left for the server"),
        (1, ["optim.name=downpour"], "no rank is left for the server"),
        (2, ["optim.name=fedavg", "optim.fraction=0"], "fraction (C"),
        (0, ["--agents", "3", "optim.name=downpour", "optim.n_push=0"], "n_push must be a whole"),
    ],
)
def test_a_bad_setting(
    run: Callable[..., Ended], tmp_path: Path, size: int, arguments: list[str], text: str
) -> None:
    (tmp_path / "r.toml").write_text(CONFIG)
    refused(run(size, "-m", "mpicdsgd", "train", "r.toml", *arguments, timeout_s=60), text)


def test_divergence_with_a_server(run: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(CONFIG)
    command = ("-m", "mpicdsgd", "train", "r.toml", "optim.name=downpour", "optim.lr=1e30")
    ended = run(3, *command, "run.evaluate_every=never", "run.checkpoint_every=never", timeout_s=60)
    refused(ended, "try a smaller lr")


if __name__ == "__main__":
    sys.exit(ranks(json.loads(sys.argv[1])))

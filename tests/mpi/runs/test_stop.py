"""A stop before the end: who gets the signal and when, at which step all stop, what they leave.

The ranks are the tests' own; a rank raises the signal in itself at a chosen moment, which Python
then handles where it would handle another's. Whole jobs are ``tests/jobs``' matter.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from samerun import checkpoints, same_run
from torch import nn

from mpicdsgd import UserError
from mpicdsgd.checkpoints.background_writer import Background
from mpicdsgd.checkpoints.writer_process import WriterProcess
from mpicdsgd.common import signals
from mpicdsgd.graphs.specs import graph_from_spec
from mpicdsgd.runs import owner, trace
from mpicdsgd.runs.config import load_config
from mpicdsgd.runs.run import Run
from mpicdsgd.runs.train import train as train_job

if MPI.COMM_WORLD.size == 2:
    pytest.skip("one rank, four and five say it all", allow_module_level=True)
pytestmark = pytest.mark.ranks(1, 4)

# 6 steps an epoch, 36 in all, whatever the number of agents.
CONFIG = """
[run]
epochs = 6
evaluate_every = "5 steps"
checkpoint_every = "7 steps"
[agents]
topology = "ring"
device = "cpu"
[model]
name = "test_stop:model"
loss = "test_stop:loss"
[data]
name = "test_stop:data"
limit = {limit}
batch_size = 8
[optim]
lr = 0.1
momentum = 0.9
"""
STEPS = 36

plan: dict[str, Callable[[], None]] = {}  # by moment, of this rank
steps_begun = 0


def data(path: str, seed: int) -> tuple[Any, Any]:
    random = np.random.default_rng(1)
    y = random.integers(0, 3, 400)
    x = (random.normal(size=(400, 6)) + 0.7 * np.eye(3, 6)[y]).astype(np.float32)
    return (x[:360], y[:360]), (x[360:], y[360:])


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 3)
    )


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    global steps_begun
    value = nn.functional.cross_entropy(outputs, targets)
    steps_begun += outputs.requires_grad
    moment = f"step {steps_begun}" if outputs.requires_grad else f"evaluation {steps_begun}"
    if moment in plan:
        plan[moment]()
    return value * math.nan if plan.get("nan") and moment in plan else value


def usr1() -> None:
    signal.raise_signal(signal.SIGUSR1)


def term_twice() -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def folder(comm: MPI.Intracomm, shared_folder: Path) -> Iterator[Path]:
    """A folder that all ranks see and in which they are, and signals that are caught."""
    if comm.rank == 0:
        (shared_folder / "r.toml").write_text(CONFIG.format(limit=48 * comm.size))
    comm.barrier()
    signals.catch()
    fresh()
    yield shared_folder
    fresh()


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[Path]:
    """The folder of the undisturbed run; `whole` makes it."""
    path = Path(MPI.COMM_WORLD.bcast(tempfile.mkdtemp() if MPI.COMM_WORLD.rank == 0 else None))
    yield path
    MPI.COMM_WORLD.barrier()
    if MPI.COMM_WORLD.rank == 0:
        shutil.rmtree(path)


@pytest.fixture
def whole(comm: MPI.Intracomm, folder: Path, undisturbed: Path) -> Path:
    """The undisturbed run of the config as it is, made once."""
    made = comm.bcast((undisturbed / "metrics.jsonl").exists())
    if not made:
        assert start(comm, str(undisturbed)) == 0
        assert marker(str(undisturbed)) is None
    return undisturbed


def fresh() -> None:
    """As in a process of its own."""
    global steps_begun
    steps_begun = 0
    plan.clear()
    signals.forget()


def start(comm: MPI.Intracomm, run_dir: str, *overrides: str) -> int:
    """A run of all ranks, with a server where the algorithm has one; its exit code."""
    overrides = (f"run.dir={run_dir}", *overrides)
    code, _ = train_job(load_config(Path("r.toml"), overrides), comm)
    fresh()
    assert comm.allgather(code) == [code] * comm.size, "all ranks leave with the same code"
    comm.barrier()
    return code


def marker(run_dir: str) -> Any:
    path = Path(run_dir) / "requeue.json"
    return json.loads(path.read_text()) if path.exists() else None


def newest(run_dir: str) -> int:
    return int(checkpoints(Path(run_dir))[-1].parent.name.removeprefix("step-"))


def diameter(comm: MPI.Intracomm, topology: str = "ring") -> int:
    return graph_from_spec(topology, comm.size).diameter


def stopped(comm: MPI.Intracomm, run_dir: str, step: int, why: str) -> None:
    """All stopped there, for that reason, and say so."""
    job = os.environ.get("SLURM_JOB_ID", "")
    assert marker(run_dir) == {"generation": 1, "job": job, "step": step, "reason": why}
    assert newest(run_dir) == step
    (path,) = (p for p in checkpoints(Path(run_dir)) if p.parent.name == f"step-{step:08d}")
    assert json.loads(path.read_text())["agents"] == comm.size
    comm.barrier()


MOMENTS = {
    "in the first step": ("step 1", usr1, 1),
    "in the last step of an epoch": ("step 6", usr1, 6),
    "in a step": ("step 16", term_twice, 16),
    "before the first step": ("evaluation 0", usr1, 0),
    "in an evaluation": ("evaluation 10", usr1, 10),
}


@pytest.mark.parametrize("when", MOMENTS)
def test_one_rank_gets_a_signal(comm: MPI.Intracomm, whole: Path, when: str) -> None:
    moment, sent, step = MOMENTS[when]
    rank = step % comm.size
    if comm.rank == rank:
        plan[moment] = sent
    assert start(comm, "stopped") == 80
    name = "TERM" if sent is term_twice else "USR1"
    stopped(comm, "stopped", step + 1 + diameter(comm), f"{name} on rank {rank}")
    assert start(comm, "stopped") == 0
    assert marker("stopped") is None
    same_run(whole, Path("stopped"), comm.size)


def test_a_signal_while_a_checkpoint_is_written(
    comm: MPI.Intracomm, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of step 7; and a second one while the last checkpoint is written."""
    save, last = Background.save, comm.rank == comm.size - 1
    with monkeypatch.context() as patched:

        def signalled(writer: Background, snapshot: Any) -> None:
            if last:
                usr1()
            save(writer, snapshot)
            if last:
                term_twice()

        patched.setattr(Background, "save", signalled)
        assert start(comm, "stopped") == 80
    stopped(comm, "stopped", 8 + diameter(comm), f"USR1 on rank {comm.size - 1}")
    assert start(comm, "stopped") == 0
    same_run(whole, Path("stopped"), comm.size)


def test_a_checkpoint_of_the_stop_step_is_not_written_twice(
    comm: MPI.Intracomm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = WriterProcess.write

    def counted(process: WriterProcess, run_dir: Path, about: Any, *more: Any) -> None:
        written.append(about.step)
        write(process, run_dir, about, *more)

    monkeypatch.setattr(WriterProcess, "write", counted)
    step = 14 - 1 - diameter(comm)
    if comm.rank == 0:
        plan[f"step {step}"] = usr1
    assert start(comm, "stopped") == 80
    assert written == [7, 14]
    stopped(comm, "stopped", 14, "USR1 on rank 0")


def test_signals_on_all_ranks(comm: MPI.Intracomm, folder: Path) -> None:
    """The earliest decides, and all are named."""
    first = min(3, comm.size - 1)
    plan["step 4" if comm.rank == first else f"step {5 + comm.rank % 2}"] = (
        usr1 if comm.rank % 2 else term_twice
    )
    assert start(comm, "stopped") == 80
    found = marker("stopped")
    assert found["step"] == 5 + diameter(comm)
    for name, ranks in (("TERM", range(0, comm.size, 2)), ("USR1", range(1, comm.size, 2))):
        if ranks:
            plural = "s" if len(ranks) > 1 else ""
            assert f"{name} on rank{plural} {', '.join(map(str, ranks))}" in found["reason"]
    comm.barrier()


# Where all stop after a signal in step 9, seen before step 10; None: the diameter says it.
# Told at the next multiple of 8 (msgd: 1), it is heard at the one after. A FedAvg agent may make
# no step at all for a while, and has it from the start.
ALGORITHMS: dict[str, tuple[str, list[str], int | None]] = {
    "fedavg": ("evaluation 0", ["optim.fraction=0.5"], 16),
    "easgd": ("step 9", ["optim.period=3"], 24),
    "gossip": ("step 9", [], 24),
    "msgd": ("step 9", [], 11),
    "torch.optim:Adam": ("step 9", ["optim.lr=0.01"], None),
    "icdsgd": ("step 9", ["optim.rounds=2"], None),
    "cdmsgd": ("step 9", ["optim.nesterov=look-ahead", "exchange.transport=neighbor"], None),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(comm: MPI.Intracomm, folder: Path, name: str) -> None:
    """Also those whose agents do not all take part, and those without headers."""
    moment, overrides, step = ALGORITHMS[name]
    overrides = [f"optim.name={name}", *overrides]
    assert start(comm, "whole", *overrides) == 0
    if comm.rank == comm.size - 1:
        plan[moment] = usr1
    assert start(comm, "stopped", *overrides) == 80
    expected = 10 + diameter(comm) if step is None else step
    if name == "icdsgd":  # its first mixing round still announces step 9
        expected = max(10, 9 + diameter(comm))
    stopped(comm, "stopped", expected, f"USR1 on rank {comm.size - 1}")
    assert start(comm, "stopped", *overrides) == 0
    same_run(Path("whole"), Path("stopped"), comm.size)


@pytest.mark.parametrize(
    ("name", "who"),
    [("gosgd", "first"), ("gosgd", "last"), ("easgd", "last"), ("downpour", "first")],
)
def test_asynchronous_algorithms(comm: MPI.Intracomm, folder: Path, name: str, who: str) -> None:
    """The last rank of two of them is the server. Where they stop is up to their paces."""
    served = name != "gosgd"
    if served and comm.size == 1:
        pytest.skip("a server needs a rank of its own")
    overrides = [f"optim.name={name}", "run.epochs=60"]
    overrides += ["optim.asynchronous=true"] if name == "easgd" else []
    if served and who == "last":
        # Without a step of its own: the signal is there before the first agent asks.
        if comm.rank == comm.size - 1:
            usr1()
    elif comm.rank == (0 if who == "first" else comm.size - 1):
        plan["step 3"] = usr1
    assert start(comm, "stopped", *overrides) == 80
    found = marker("stopped")
    assert found["step"] == newest("stopped")
    assert found["step"] % 32 == 0
    assert found["step"] <= 128
    if served and who == "last":
        expected = f"USR1 on rank {comm.size - 1}, the server, told on rank 0"
    else:
        expected = f"USR1 on rank {0 if who == 'first' else comm.size - 1}"
    assert found["reason"] == expected
    comm.barrier()
    rarely = ("run.evaluate_every=never", "run.checkpoint_every=90 steps")
    assert start(comm, "stopped", *rarely, *overrides) == 0
    assert newest("stopped") > found["step"]
    assert marker("stopped") is None


def test_a_signal_near_the_end_changes_nothing(comm: MPI.Intracomm, whole: Path) -> None:
    if comm.rank == comm.size - 1:
        plan[f"step {STEPS - 1 - diameter(comm)}"] = usr1  # would stop at the last step, or after
    assert start(comm, "late") == 0
    assert marker("late") is None
    same_run(whole, Path("late"), comm.size)
    if comm.rank == 0:
        usr1()
    assert start(comm, "late") == 0, "there is nothing to do for a run that is at its end"


def test_every_start_makes_progress(comm: MPI.Intracomm, folder: Path) -> None:
    """A job that is told to stop as soon as it starts, over and over, comes to its end."""
    overrides = ["run.epochs=2", "run.checkpoint_every=never"]
    assert start(comm, "whole", *overrides) == 0
    for starts in range(1, 13):
        usr1()
        code = start(comm, "stopped", *overrides)
        assert newest("stopped") == min(starts * (1 + diameter(comm)), 12)
        if code == 0:
            break
    assert code == 0
    same_run(Path("whole"), Path("stopped"), comm.size)


def test_the_clock_of_one_rank(
    comm: MPI.Intracomm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks differ: the first to be through decides for all."""
    last = comm.rank == comm.size - 1
    monkeypatch.setattr(signals, "STARTED", time.monotonic())
    if last:
        plan["step 8"] = lambda: monkeypatch.setattr(signals, "STARTED", -1e9)
    assert start(comm, "stopped", "run.max_seconds=100000") == 80
    why = f"run.max_seconds = 100000 on rank {comm.size - 1}"
    stopped(comm, "stopped", 9 + diameter(comm), why)


def test_a_fault_goes_before_a_stop(comm: MPI.Intracomm, folder: Path) -> None:
    if comm.rank == 0:
        plan["step 9"] = usr1
    elif comm.rank == comm.size - 1:
        plan.update({"step 10": lambda: None, "nan": lambda: None})
    if comm.size == 1:
        plan.update({"step 10": lambda: None, "nan": lambda: None})
    with pytest.raises(UserError, match=r"the checkpoint of step 7 is kept") as raised:
        Run(load_config(Path("r.toml"), ["run.dir=bad"]), comm).train()
    assert raised.value.raised_on_all_ranks
    assert marker("bad") is None
    assert newest("bad") == 7
    comm.barrier()


def test_a_checkpoint_that_cannot_be_written(
    comm: MPI.Intracomm,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The job is not sent back: it would come to the same place over and over."""
    monkeypatch.setattr(Background, "save", lambda *_: None)
    if comm.rank == 0:
        plan["step 2"] = usr1
    assert start(comm, "full") == 1
    assert marker("full") is None
    if comm.rank == 0:
        step = 3 + diameter(comm)
        assert f"stopped after step {step} (USR1 on rank 0), but its checkpoint" in caplog.text
        assert "there is none in full" in caplog.text
    comm.barrier()


def test_a_zombie_leaves_no_marker(
    comm: MPI.Intracomm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run that another start has taken over meanwhile."""
    if comm.rank == 0:

        def overtaken() -> None:
            owner.claim(Path("zombie"))
            usr1()

        plan["step 3"] = overtaken
    assert start(comm, "zombie") == 1
    assert marker("zombie") is None
    if comm.rank == 0:
        assert "a newer run has taken over zombie" in caplog.text
    comm.barrier()


def test_a_run_that_would_begin_anew_is_not_sent_back(
    comm: MPI.Intracomm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For ever."""
    if comm.rank == 0:
        plan["step 2"] = usr1
    assert start(comm, "anew", "run.resume=never") == 1
    assert marker("anew") is None
    if comm.rank == 0:
        assert 'with run.resume = "never" the next start would begin anew' in caplog.text
    comm.barrier()


def test_an_old_marker_goes_when_a_run_starts(
    comm: MPI.Intracomm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mpicdsgd")
    if comm.rank == 0:
        plan["step 2"] = usr1
    assert start(comm, "again") == 80
    run = Run(load_config(Path("r.toml"), ["run.dir=again"]), comm)
    assert marker("again") is None, "before the first step"
    comm.barrier()
    run.train()
    assert run.code == 0
    if comm.rank == 0:
        step = 3 + diameter(comm)
        assert f"stopped after step {step} (USR1 on rank 0): its checkpoint is in" in caplog.text


def test_who_is_killed_is_sent_back(comm: MPI.Intracomm, folder: Path) -> None:
    """From the first step on there is a marker, till the end; it is rank 0's to leave."""
    seen: dict[str, Any] = {}
    for moment in ("step 1", f"step {STEPS}") if comm.rank == 0 else (f"step {STEPS}",):
        plan[moment] = lambda moment=moment: seen.update({moment: marker("killed")})  # type: ignore[misc]
    assert start(comm, "killed") == 0
    assert f"step {STEPS}" in seen
    about = {"generation": 1, "job": os.environ.get("SLURM_JOB_ID", "")}
    for found in seen.values():
        assert {**found, **about} == found
        assert found["reason"].startswith("ended before it could say why")
    assert marker("killed") is None


def test_who_gets_no_further_is_sent_back_no_more(
    comm: MPI.Intracomm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three starts have come to no checkpoint; this one has, and may be tried again."""
    seen: dict[str, Any] = {}
    if comm.rank == 0:
        Path("vain").mkdir()
        Path("vain/starts.json").write_text('{"from_step": null, "starts": 3}')
    comm.barrier()
    for moment in ("step 1", "step 7", "step 16"):
        plan[moment] = lambda moment=moment: seen.update({moment: marker("vain")})  # type: ignore[misc]
    assert start(comm, "vain") == 0
    assert seen["step 1"] is None
    assert seen["step 7"] is None
    assert seen["step 16"]["generation"] == 1
    assert ("3 starts from the beginning have ended" in caplog.text) == (comm.rank == 0)


def test_a_mistake_of_one_rank_is_not_sent_back(comm: MPI.Intracomm, folder: Path) -> None:
    """It would be made again."""
    if comm.size == 1:
        pytest.skip("a rank alone is all ranks")
    run = Run(load_config(Path("r.toml"), ["run.dir=wrong"]), comm)
    is_last = comm.rank == comm.size - 1

    def first_epoch() -> None:
        assert marker("wrong") is not None
        comm.barrier()
        raise UserError("of this rank only") if is_last else KeyError("away")

    run._epoch = first_epoch  # type: ignore[method-assign]
    with pytest.raises(UserError if is_last else KeyError):
        run.train()
    comm.barrier()
    assert marker("wrong") is None


def test_an_overtaken_run_leaves_the_newer_ones(comm: MPI.Intracomm, folder: Path) -> None:
    """It may come to its end before it notices."""
    text = '{"generation": 2, "job": "88", "reason": ""}'
    if comm.rank == 0:
        plan["step 30"] = lambda: Path("over/requeue.json").write_text(text) and None
    assert start(comm, "over") == 0
    if comm.rank == 0:
        assert Path("over/requeue.json").read_text() == text
    comm.barrier()


def test_a_stop_loses_nothing_of_the_trace(comm: MPI.Intracomm, folder: Path) -> None:
    """It is written at the stop, too, so its lines are others, but not what they hold."""
    assert start(comm, "whole", "run.theory=true") == 0
    if comm.rank == comm.size - 1:
        plan["step 9"] = usr1
    assert start(comm, "stopped", "run.theory=true") == 80
    assert start(comm, "stopped", "run.theory=true") == 0
    whole, other = (vars(trace.read(Path(d))) for d in ("whole", "stopped"))
    assert whole.keys() == other.keys()
    assert len(whole["loss"]) == STEPS
    for key in whole:
        assert np.array_equal(whole[key], other[key], equal_nan=True), key
    same_run(Path("whole"), Path("stopped"), comm.size)

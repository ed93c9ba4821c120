"""Whole runs within the tests' own ranks: what the metrics say, and what a restart continues.

That a process is killed is ``tests/jobs``' matter; here a run is left in the middle of an epoch.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from emulation.gpu import EmulatedGpu
from mpi4py import MPI
from torch import nn

from mpicdsgd import AgentFault, UserError
from mpicdsgd.checkpoints import reading
from mpicdsgd.comm.agreement import Silence, agree
from mpicdsgd.data import DataConfig, load
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.kernels import gpu
from mpicdsgd.models import evaluate as evaluate_
from mpicdsgd.runs import agent_state, evaluation, metrics_file, trace
from mpicdsgd.runs import run as run_module
from mpicdsgd.runs.config import Config, load_config
from mpicdsgd.runs.minibatch import minibatch_step
from mpicdsgd.runs.run import Run

if MPI.COMM_WORLD.size == 4:
    pytest.skip("one, two and five ranks say it all", allow_module_level=True)
pytestmark = pytest.mark.ranks(1, 2)

# 5 steps an epoch, whatever the number of agents.
CONFIG = """
[run]
epochs = 3
evaluate_every = "5 steps"
checkpoint_every = "4 steps"
[agents]
topology = "{topology}"
device = "cpu"
[model]
name = "test_run:normalised"
loss = "test_run:loss"
[data]
name = "test_run:clouds"
limit = {limit}
batch_size = 8
[optim]
lr = 0.1
momentum = 0.9
"""
STEPS_PER_EPOCH = 5

losses: list[tuple[float, int]] = []  # of the training batches so far, and their sizes


def clouds(path: str, seed: int) -> tuple[Any, Any]:
    """Three overlapping clouds of points."""
    random = np.random.default_rng(1)
    y = random.integers(0, 3, 400)
    x = (random.normal(size=(400, 6)) + 0.7 * np.eye(3, 6)[y]).astype(np.float32)
    return (x[:360], y[:360]), (x[369:], y[369:])


def line(path: str, seed: int) -> tuple[Any, Any]:
    """Regression: y = sum of x."""
    x = np.random.default_rng(1).normal(size=(400, 6)).astype(np.float32)
    y = x.sum(1, keepdims=True)
    return (x[:360], y[:360]), (x[369:], y[369:])


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 3)
    )


def convolutional() -> nn.Module:
    """Buffers of BatchNorm between parameters, and a random state drawn from twice a step."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.Dropout(0.3),
        nn.Conv1d(4, 5, 2),
        nn.BatchNorm1d(5),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(15, 3),
    )


def linear() -> nn.Module:
    return nn.Linear(6, 1)


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    value = nn.functional.cross_entropy(outputs, targets)
    if outputs.requires_grad:
        losses.append((float(value.detach()), len(targets)))
    return value


def nan_in_the_fifth(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    value = loss(outputs, targets)
    last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
    return value * math.nan if len(losses) == 5 and last else value


@pytest.fixture
def folder(comm: MPI.Intracomm, shared_folder: Path) -> Path:
    """A folder that all ranks see, with a config, and in which they are."""
    if comm.rank == 0:
        topology = "ring" if comm.size != 5 else "star"  # unequal degrees
        (shared_folder / "r.toml").write_text(
            CONFIG.format(topology=topology, limit=40 * comm.size)
        )
    comm.barrier()
    losses.clear()
    return shared_folder


def config(*overrides: str) -> Config:
    return load_config(Path("r.toml"), overrides)


def train(comm: MPI.Intracomm, *overrides: str) -> Run:
    """The run, trained to its end."""
    run = Run(config(*overrides), comm)
    run.train()
    comm.barrier()
    return run


class Left(Exception):
    """Raised on all ranks, where a run is left."""


def leave(comm: MPI.Intracomm, steps: int, *overrides: str) -> None:
    """Train until so many steps are done, then leave the run with its checkpoints on the disk."""
    run = Run(config(*overrides), comm)
    step = run._step

    def counted(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        if run.optimizer.steps == steps:
            raise Left
        step(inputs, targets)

    run._step = counted  # type: ignore[method-assign]
    with pytest.raises(Left):
        run.train()
    run._writer.close()
    run.optimizer.close()
    run._metrics.close()
    if run._trace is not None:
        run._trace.close()
    comm.barrier()


def metrics(run_dir: str, *, times: bool = False) -> list[dict[str, Any]]:
    """The lines; without what may differ from one start to the next."""
    lines = metrics_file.read(Path(run_dir))
    if not times:
        for found in lines:
            del found["time_s"], found["wait_s"]
    return lines


def last_checkpoint(run_dir: str) -> Path:
    return sorted(Path(run_dir, "checkpoints").iterdir())[-1]


def state(run_dir: str, comm: MPI.Intracomm) -> dict[str, Any]:
    """This rank's part of the last checkpoint, arrays as bytes; without times."""
    found = reading.read_newest(Path(run_dir), comm, lambda shared: None)
    assert found is not None
    meta = {k: v for k, v in found.meta.items() if k not in ("time_s", "wait_s")}
    meta["last"] = {k: v for k, v in meta["last"].items() if k not in ("time_s", "wait_s")}
    arrays = {k: (str(v.dtype), v.shape, v.tobytes()) for k, v in found.arrays.items()}
    return {"step": found.step, "meta": repr(meta), **arrays}  # repr: NaN is itself


def same(comm: MPI.Intracomm, whole: str, other: str) -> None:
    expected, found = state(whole, comm), state(other, comm)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    assert repr(metrics(other)) == repr(metrics(whole))


@dataclasses.dataclass(frozen=True)
class Agent:
    """What a checkpoint holds of an agent."""

    x: np.ndarray  # shape (D,)
    buffers: dict[str, np.ndarray]


def agents_of(run_dir: str, size: int) -> list[Agent]:
    folder = last_checkpoint(run_dir)
    found = []
    for rank in range(size):
        (path,) = folder.glob(f"rank-{rank:04d}.*.h5")
        with h5py.File(path, locking=False) as file:
            buffers: dict[str, np.ndarray] = {}
            if "buffers" in file["arrays"]:
                file["arrays/buffers"].visititems(
                    lambda name, item, to=buffers: to.update({name: item[()]})
                )
            found.append(Agent(file["arrays/x"][()], buffers))
    return found


def model_of(make: Any, agent: Agent) -> nn.Module:
    """A model with these parameters; each begins at a multiple of 16 elements."""
    model: nn.Module = make()
    offset = 0
    with torch.no_grad():
        for parameter in model.parameters():
            values = agent.x[offset : offset + parameter.numel()]
            parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))
            offset += -(-parameter.numel() // 16) * 16
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.from_numpy(np.array(agent.buffers[name])))
    assert offset == len(agent.x)
    return model.eval()


def loss_and_accuracy(model: nn.Module, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    with torch.no_grad():
        outputs = model(torch.from_numpy(x))
    targets = torch.from_numpy(y)
    value = nn.functional.cross_entropy(outputs.double(), targets)
    return float(value), float((outputs.argmax(1) == targets).double().mean())


def test_the_metrics_are_what_the_checkpoint_says(comm: MPI.Intracomm, folder: Path) -> None:
    run = train(comm)
    lines = metrics("runs/r", times=True)
    assert [found["step"] for found in lines] == [5, 10, 15]
    assert [found["epoch"] for found in lines] == [1, 2, 3]
    found = lines[-1]
    assert set(found) >= {
        "step", "epoch", "time_s", "lr", "train_loss", "test_loss", "test_accuracy",
        "averaged_model", "consensus", "bytes_sent", "wait_s",
    }  # fmt: skip
    for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        values = np.array(found[key]["agents"])
        assert found[key].keys() == {"mean", "std", "agents"}
        assert values.shape == (comm.size,)
        assert found[key]["mean"] == pytest.approx(values.mean())
        assert found[key]["std"] == pytest.approx(values.std())
    assert found["lr"] == 0.1
    assert 0 <= found["wait_s"] <= found["time_s"]

    agents = agents_of("runs/r", comm.size)
    test_x, test_y = clouds("", 0)[1]
    for agent, loss_, accuracy in zip(
        agents, found["test_loss"]["agents"], found["test_accuracy"]["agents"], strict=True
    ):
        expected = loss_and_accuracy(model_of(normalised, agent), test_x, test_y)
        assert (loss_, accuracy) == pytest.approx(expected, rel=1e-5)

    x_ND = np.array([agent.x for agent in agents], dtype=np.float64)
    distances = np.linalg.norm(x_ND - x_ND.mean(0), axis=1)
    assert found["consensus"]["max"] == pytest.approx(distances.max(), rel=1e-4)
    rms = math.sqrt((distances**2).mean())
    assert found["consensus"]["rms"] == pytest.approx(rms, rel=1e-4)
    assert (distances.max() > 1e-3) == (comm.size > 1), "there is something to measure"

    names = agents[0].buffers
    mean = Agent(
        x_ND.mean(0).astype(np.float32),
        {n: np.mean([a.buffers[n] for a in agents], 0).astype(names[n].dtype) for n in names},
    )
    expected = loss_and_accuracy(model_of(normalised, mean), test_x, test_y)
    averaged = found["averaged_model"]
    assert (averaged["test_loss"], averaged["test_accuracy"]) == pytest.approx(expected, rel=1e-5)

    # Of the last epoch: the mean over its minibatches while it trained.
    assert len(losses) == 15
    values, counts = np.array(losses[-STEPS_PER_EPOCH:]).T
    assert found["train_loss"]["agents"][comm.rank] == pytest.approx(values @ counts / counts.sum())

    # A message: 64 bytes of header, then x, 4 bytes an element, padded to 64. One for every step
    # and one before the first, to each reader.
    readers = sum(run.agents.graph.degrees)
    message = 64 * (1 + -(-4 * len(agents[0].x) // 64))
    for before in lines:
        assert before["bytes_sent"] == (before["step"] + 1) * message * readers // comm.size


def test_training_loss_on_the_whole_share(comm: MPI.Intracomm, folder: Path) -> None:
    train(comm, "run.evaluate_train=true", "run.epochs=1", "run.evaluate_batch=7")
    (found,) = metrics("runs/r")
    data = DataConfig("test_run:clouds", limit=40 * comm.size, batch_size=8)
    share = load(data, 0, comm.rank, comm.size).train
    x, y = share.batch(np.arange(len(share)))
    assert len(x) == 40
    model = model_of(normalised, agents_of("runs/r", comm.size)[comm.rank])
    expected = loss_and_accuracy(model, x.numpy(), y.numpy())
    loss_, accuracy = (found[k]["agents"][comm.rank] for k in ("train_loss", "train_accuracy"))
    assert (loss_, accuracy) == pytest.approx(expected, rel=1e-5)


RUNS = pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="nesterov"),
        pytest.param(("optim.nesterov=look-ahead", "optim.schedule=cosine"), id="look-ahead"),
        pytest.param(
            (
                "optim.name=torch.optim:AdamW",
                "optim.lr=0.01",
                "optim.weight_decay=0.1",
                "optim.args={betas=[0.8, 0.99]}",
                "optim.schedule=torch.optim.lr_scheduler:StepLR",
                "optim.schedule_args={step_size=3, gamma=0.7}",
                "model.name=test_run:convolutional",
            ),
            id="adamw",
        ),
        pytest.param(
            ("model.name=test_run:convolutional", "model.buffers=mixed", "optim.clip_norm=0.5"),
            id="mixed-buffers",
        ),
        pytest.param(
            (
                "optim.name=cdsgd",
                "optim.rounds=2",
                "optim.schedule=diminishing:0.6",
                "model.name=test_run:convolutional",
                "agents.init=local",
                "exchange.wire=bfloat16",
            ),
            id="rounds",
        ),
    ],
)
needs_gpu = pytest.mark.skipif(bool(gpu.why_not()), reason=f"no GPU: {gpu.why_not()}")
on_gpu = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)


@pytest.mark.ranks(1, 2, 5)
@on_gpu
@RUNS
def test_a_restart_goes_on_bit_by_bit(
    comm: MPI.Intracomm, folder: Path, overrides: tuple[str, ...], device: str
) -> None:
    overrides = (*overrides, f"agents.device={device}", "run.theory=true")
    train(comm, *overrides, "run.dir=whole")
    # Left after 11 steps: on from the checkpoint of step 8, the line of step 10 is written anew.
    leave(comm, 11, *overrides, "run.dir=left")
    assert [found["step"] for found in metrics("left")] == [5, 10]
    assert last_checkpoint("left").name == "step-00000008"
    leave(comm, 9, *overrides, "run.dir=left")
    assert [found["step"] for found in metrics("left")] == [5]
    train(comm, *overrides, "run.dir=left")
    assert [found["step"] for found in metrics("left")] == [5, 10, 15]
    same(comm, "whole", "left")
    assert Path("left/trace.jsonl").read_bytes() == Path("whole/trace.jsonl").read_bytes()
    assert Path("left/trace.jsonl").resolve().name == "trace.g0003.jsonl"
    assert trace.read(Path("left")).step.tolist() == list(range(15))


@pytest.fixture
def emulated(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank has an emulated GPU, whatever ``agents.device`` says."""
    monkeypatch.setattr(
        "mpicdsgd.comm.agents.choose_gpu", lambda *_: EmulatedGpu(card=f"card {comm.rank}")
    )


@pytest.mark.ranks(1, 2, 5)
@RUNS
def test_a_run_on_emulated_gpus_is_the_same(
    comm: MPI.Intracomm, folder: Path, overrides: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    if comm.size == 5 and "model.buffers=mixed" not in overrides:
        pytest.skip("the emulation is slow: of five ranks one run")
    overrides = (*overrides, "run.theory=true")
    train(comm, *overrides, "run.dir=whole")
    request.getfixturevalue("emulated")
    leave(comm, 11, *overrides, "run.dir=left")
    train(comm, *overrides, "run.dir=left")
    same(comm, "whole", "left")
    host, there = (vars(trace.read(Path(run_dir))) for run_dir in ("whole", "left"))
    for name, values in host.items():  # sums in another order
        assert there[name] == pytest.approx(values, rel=1e-5, abs=1e-12, nan_ok=True), name
    assert "\n# device: emulated GPU" in Path("left/config.g0002.toml").read_text()


@pytest.mark.ranks(1, 2, 5)
@RUNS
def test_the_trace(comm: MPI.Intracomm, folder: Path, overrides: tuple[str, ...]) -> None:
    """Every step's sums over agents, and not a bit of the run is another for it."""
    train(comm, *overrides, "run.dir=plain")
    assert not Path("plain/trace.jsonl").exists()
    losses.clear()
    run = train(comm, *overrides, "run.dir=traced", "run.theory=true")
    same(comm, "plain", "traced")
    found = trace.read(Path("traced"))
    assert found.step.tolist() == list(range(15))
    assert found.batch.tolist() == [8 * comm.size] * 15
    expected = np.array(comm.allgather([value for value, _ in losses])).sum(axis=0)
    assert found.loss == pytest.approx(expected, rel=1e-12)
    assert found.gradient.min() > 0
    descends = run.config.optim.name in ("cdsgd", "icdsgd")
    assert (np.isfinite(found.moved) if descends else np.isnan(found.moved)).all()
    assert found.lr[0] == run.config.optim.lr
    assert (found.lr[14] < found.lr[0]) == (run.config.optim.schedule != "fixed")
    if comm.size == 1:
        assert not found.disagreement.any()
    else:
        assert found.disagreement[1:].min() > 0
        assert (found.disagreement[0] > 0) == (run.config.agents.init == "local")


def test_the_traces_disagreement_is_the_checkpoints(comm: MPI.Intracomm, folder: Path) -> None:
    """sum_j D_j = |X|^2_(I - Pi), of the parameters that a checkpoint holds."""
    more = ("optim.nesterov=false", "run.epochs=2", "run.theory=true")
    train(comm, *more, "run.checkpoint_every=8 steps", "run.keep=9", "run.dir=r")
    steps = sorted(Path("r/checkpoints").iterdir())
    assert [path.name for path in steps] == ["step-00000008", "step-00000010"]
    comm.barrier()  # all have seen them
    if comm.rank == 0:
        shutil.rmtree(steps[1])
    comm.barrier()
    X = np.array([agent.x for agent in agents_of("r", comm.size)], np.float64)
    graph = graph_from_spec(config().agents.topology, comm.size)
    laplacian = np.eye(comm.size) - mixing_from_spec("metropolis", graph).Pi
    norm = np.einsum("jd,jl,ld->", X, laplacian, X)
    assert trace.read(Path("r")).disagreement[8] == pytest.approx(norm, rel=1e-5, abs=1e-12)


def test_what_has_no_trace(comm: MPI.Intracomm, folder: Path) -> None:
    with pytest.raises(UserError, match=r"run.theory = true is for .*cdmsgd.* not .*fedavg"):
        Run(config("run.theory=true", "optim.name=fedavg", "run.dir=r"), comm)
    assert not Path("r").exists()


def test_a_trace_that_begins_later(comm: MPI.Intracomm, folder: Path) -> None:
    leave(comm, 11, "run.dir=r")
    train(comm, "run.dir=r", "run.theory=true")
    assert trace.read(Path("r")).step.tolist() == list(range(8, 15))


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are left to the device, as on a GPU."""

    def step(*arguments: Any, **options: Any) -> Any:
        return minibatch_step(*arguments, **{**options, "deferred": True})

    monkeypatch.setattr(run_module, "minibatch_step", step)


def test_a_run_that_defers_is_the_same(
    comm: MPI.Intracomm, folder: Path, request: pytest.FixtureRequest
) -> None:
    train(comm, "run.dir=whole", "run.theory=true")
    request.getfixturevalue("deferred")
    leave(comm, 11, "run.dir=left", "run.theory=true")  # in the middle of an epoch
    train(comm, "run.dir=left", "run.theory=true")
    same(comm, "whole", "left")
    assert Path("left/trace.jsonl").read_bytes() == Path("whole/trace.jsonl").read_bytes()


@pytest.mark.parametrize("way", ["deferred", "emulated"])
def test_a_loss_that_is_no_number_is_found_late(
    comm: MPI.Intracomm, folder: Path, way: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(way)
    for every in (2, 5):
        losses.clear()
        kept = "checkpoint of step 4 is kept" if every == 2 else "there is no checkpoint yet"
        text = f"agent {comm.size - 1}, step 5: the loss is NaN or infinite: .*{kept}"
        own = (f"run.dir={every}", f"run.checkpoint_every={every} steps")
        run = Run(config(*own, "model.loss=test_run:nan_in_the_fifth"), comm)
        with pytest.raises(UserError, match=text):
            run.train()
        with pytest.raises(AgentFault):
            run.optimizer.close()  # which gives back the memory
        run._metrics.close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda", "cpu", marks=[pytest.mark.gpu, needs_gpu]),
        pytest.param("cpu", "cuda", marks=[pytest.mark.gpu, needs_gpu]),
    ],
)
def test_going_on_on_another_device_is_said(
    comm: MPI.Intracomm,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
) -> None:
    train(comm, "run.dir=whole")
    with monkeypatch.context() as patch:
        if first == second:  # a checkpoint as if from a GPU
            capture = agent_state.capture_arrays

            def with_cuda(*arguments: Any) -> dict[str, Any]:
                return {**capture(*arguments), "random/cuda": np.zeros(16, np.uint8)}

            patch.setattr(agent_state, "capture_arrays", with_cuda)
        leave(comm, 9, "run.dir=left", f"agents.device={first}")
    train(comm, "run.dir=left", f"agents.device={second}")
    said = [text for text in caplog.messages if "the checkpoint was written on" in text]
    places = ("the CPU", "a GPU") if second == "cuda" else ("a GPU", "the CPU")
    expected = f"written on {places[0]} and the run continues on {places[1]}: random numbers"
    assert len(said) == (comm.rank == 0)
    assert all(expected in text for text in said)
    if first == second:
        same(comm, "whole", "left")
    assert [found["step"] for found in metrics("left")] == [5, 10, 15]


def test_a_finished_run_stays_as_it_is(comm: MPI.Intracomm, folder: Path) -> None:
    first = train(comm)._standing.last
    before = state("runs/r", comm), metrics("runs/r", times=True)
    again = train(comm)
    assert again._standing.last == first
    assert again.optimizer.steps == 15
    assert (state("runs/r", comm), metrics("runs/r", times=True)) == before


def test_keeping_what_is_never_written_is_said(
    comm: MPI.Intracomm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for keep, said in (("10 steps", comm.rank == 0), ("14 steps", False)):
        caplog.clear()
        train(comm, "run.checkpoint_every=7 steps", f"run.keep_every={keep}", f"run.dir={keep}")
        assert ("run.keep_every" in caplog.text) == said


@pytest.mark.parametrize("where", ["own", "averaged"])
def test_a_rank_that_stalls_in_an_evaluation(
    comm: MPI.Intracomm, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The others do not wait for ever."""
    if comm.size == 1:
        pytest.skip("nobody waits for a rank that is alone")
    run = Run(config("exchange.timeout_s=1", "run.dir=stalled"), comm)
    is_late = comm.rank == comm.size - 1
    evaluate, calls = evaluate_.evaluate, 0

    def slow(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if is_late and calls == (1 if where == "own" else 2):
            time.sleep(3)
            raise InterruptedError
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", slow)
    with pytest.raises(InterruptedError if is_late else Silence, match=None if is_late else "1 s"):
        run._evaluate()
    # What the others have begun is completed by who was late.
    if is_late:
        if where == "own":
            agree(run.agents.comm, "evaluation", None)
        else:
            run.agents.comm.Iallgather(np.zeros(11), np.zeros((comm.size, 11))).Wait()
    comm.barrier()
    run.optimizer.close()


def test_more_epochs_later(comm: MPI.Intracomm, folder: Path) -> None:
    train(comm, "run.dir=whole")
    train(comm, "run.dir=left", "run.epochs=1")
    train(comm, "run.dir=left")
    same(comm, "whole", "left")


def test_beginning_anew(comm: MPI.Intracomm, folder: Path) -> None:
    train(comm, "run.dir=whole")
    leave(comm, 11, "run.dir=left", "optim.lr=0.3")
    train(comm, "run.dir=left", "run.resume=never")
    same(comm, "whole", "left")


def test_another_step_size_after_a_restart_is_said(
    comm: MPI.Intracomm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(comm, 6, "optim.schedule=cosine")
    train(comm, "optim.schedule=cosine", "optim.lr=0.2")
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    expected = "optim.lr = 0.2 (was 0.1) is not what it was before this checkpoint"
    assert (expected in said) == (comm.rank == 0)
    (_, second, _) = metrics("runs/r")
    assert second["lr"] == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi * 10 / 15)))


def test_the_same_seed_gives_the_same_run_and_another_another(
    comm: MPI.Intracomm, folder: Path
) -> None:
    train(comm, "run.dir=a", "run.epochs=1")
    torch.rand(3)  # what was drawn before is of no account
    train(comm, "run.dir=b", "run.epochs=1")
    train(comm, "run.dir=c", "run.epochs=1", "run.seed=1")
    same(comm, "a", "b")
    assert state("c", comm)["x"] != state("a", comm)["x"]


def test_initial_parameters(comm: MPI.Intracomm, folder: Path) -> None:
    still = ("optim.lr=0", "model.name=test_run:normalised", "run.epochs=1")
    train(comm, *still, "run.dir=same")
    assert metrics("same")[0]["consensus"] == {"max": 0, "rms": 0}
    train(comm, *still, "run.dir=own", "agents.init=local", "run.evaluate_every=1 steps")
    lines = metrics("own")
    distances = [found["consensus"]["max"] for found in lines]
    if comm.size > 1:
        assert distances[0] > distances[-1]
        start = Run(config(*still, "run.dir=start", "agents.init=local"), comm)
        x = np.array(start.optimizer.x)
        start.optimizer.close()
        all_x = comm.allgather(x)
        assert not np.array_equal(all_x[0], all_x[1])
        means = [np.mean(all_x, 0), np.mean([a.x for a in agents_of("own", comm.size)], 0)]
        assert means[1] == pytest.approx(means[0], abs=1e-6), "mixing keeps the mean"


def test_regression(comm: MPI.Intracomm, folder: Path) -> None:
    train(
        comm,
        "data.name=test_run:line",
        "model.name=test_run:linear",
        "model.loss=mse",
        "optim.lr=0.05",
        "optim.momentum=0.5",
    )
    lines = metrics("runs/r")
    assert lines[-1]["test_loss"]["mean"] < 0.2 * lines[0]["test_loss"]["mean"]
    assert math.isnan(lines[-1]["test_accuracy"]["mean"])
    assert math.isnan(lines[-1]["averaged_model"]["test_accuracy"])
    test_x, test_y = line("", 0)[1]
    model = model_of(linear, agents_of("runs/r", comm.size)[0])
    with torch.no_grad():
        residual = model(torch.from_numpy(test_x)).numpy() - test_y
    expected = float((residual**2).mean())
    assert lines[-1]["test_loss"]["agents"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("partition", ["iid", "contiguous", "by-class", "dirichlet:0.5"])
def test_partitions(comm: MPI.Intracomm, folder: Path, partition: str) -> None:
    if partition == "by-class" and comm.size > 3:
        pytest.skip("three classes")
    one = ("run.epochs=1", "data.batch_size=1", "model.name=logistic")
    run = Run(config(f"data.partition={partition}", *one), comm)
    run.optimizer.close()
    shares = run.data.shares
    assert sum(shares) == 40 * comm.size
    assert run.total_steps == max(shares)
    _, y = run.data.train.batch(np.arange(len(run.data.train)))
    classes = comm.allgather(set(y.tolist()))
    if partition == "by-class":
        assert sum(len(own) for own in classes) == 3
        assert set.union(*classes) == {0, 1, 2}


def test_the_last_batch_can_be_left_out(comm: MPI.Intracomm, folder: Path) -> None:
    one = ("run.epochs=1", "data.batch_size=12")
    train(comm, *one, "run.dir=all")
    assert [size for _, size in losses] == [12, 12, 12, 4]
    losses.clear()
    train(comm, *one, "run.dir=full", "data.drop_last=true")
    assert [size for _, size in losses] == [12, 12, 12]


def test_never_is_at_the_end_only(comm: MPI.Intracomm, folder: Path) -> None:
    train(comm, "run.evaluate_every=never", "run.checkpoint_every=never")
    assert [found["step"] for found in metrics("runs/r")] == [15]
    assert os.listdir("runs/r/checkpoints") == ["step-00000015"]


def test_so_many_checkpoints_are_kept(comm: MPI.Intracomm, folder: Path) -> None:
    train(comm, "run.checkpoint_every=2 steps", "run.keep=2")
    assert sorted(os.listdir("runs/r/checkpoints")) == ["step-00000014", "step-00000015"]


def test_the_config_is_written_as_it_was_used(comm: MPI.Intracomm, folder: Path) -> None:
    used = ("optim.args={}", "run.seed=7", "agents.threads=1", "run.epochs=1")
    train(comm, *used)
    path = Path("runs/r/config.g0001.toml")
    assert load_config(path) == config(*used)
    text = path.read_text()
    assert all(f"\n# {what}: " in f"\n{text}" for what in ("torch", "mpi", "hosts", "kernel"))


def test_mnist_itself(comm: MPI.Intracomm, folder: Path) -> None:
    where = os.environ.get("MPICDSGD_DATA")
    if not where:
        pytest.skip("MPICDSGD_DATA names no folder with mnist in it")
    train(
        comm,
        "data.name=mnist",
        f"data.path={where}/mnist",
        f"data.limit={400 * comm.size}",
        "data.test_limit=500",
        "data.batch_size=40",
        "model.name=logistic",
        "model.loss=cross_entropy",
        "optim.lr=0.02",
    )
    lines = metrics("runs/r")
    assert lines[-1]["test_accuracy"]["mean"] > 0.75
    assert lines[-1]["averaged_model"]["test_accuracy"] > 0.75

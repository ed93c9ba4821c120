"""The simulator against a real run: one by one to the bit, many at a time to float tolerance.

Every rank trains; rank 0 then simulates all of them and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from mpicdsgd import UserError
from mpicdsgd.algorithms import registry
from mpicdsgd.algorithms.contract import GRAPH
from mpicdsgd.algorithms.registry import algorithms
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.runs import metrics_file, trace
from mpicdsgd.runs.config import load_config
from mpicdsgd.runs.run import Run
from mpicdsgd.simulation.simulation import Simulation

if MPI.COMM_WORLD.size in (2, 5):
    pytest.skip("one rank and four say it all", allow_module_level=True)

# 20 samples an agent in batches of 8: three steps an epoch, the last of 4.
CONFIG = """
[run]
epochs = 3
evaluate_every = "4 steps"
checkpoint_every = "3 steps"
theory = true
[agents]
device = "cpu"
threads = 1
[model]
name = "mlp"
args = { hidden = [8] }
[data]
name = "gaussians"
partition = "contiguous"
batch_size = 8
args = { samples = 20, features = 6, classes = 3, heterogeneity = 0.5, test_samples = 90 }
[optim]
lr = 0.1
momentum = 0.9
weight_decay = 0.01
"""
TOPOLOGIES = [
    "complete", "ring", "chain", "star", "hypercube", "exponential", "torus", "grid", "regular:2",
    "erdos-renyi:0.8",
]  # fmt: skip
FORMS = {
    "cdsgd": ("optim.name=cdsgd",),
    "icdsgd": ("optim.name=icdsgd", "optim.rounds=3"),
    "polyak": ("optim.nesterov=false",),
    "nesterov": (),
    "look-ahead": ("optim.nesterov=look-ahead",),
}


def normalised() -> nn.Module:
    """Buffers, and random numbers in the forward pass."""
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3)
    )


class PartlyUsed(nn.Module):
    """A frozen parameter, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(inputs) * self.frozen
        return out


class Noisy(torch.utils.data.Dataset[Any]):
    """Items that random augmentation changes, by class as a torch dataset has them."""

    def __init__(self, count: int, noise: float) -> None:
        random = np.random.default_rng(count)
        self.noise = noise
        self.targets = random.integers(0, 3, count).tolist()
        self.inputs = (random.normal(size=(count, 6)) + np.eye(3, 6)[self.targets]).astype("f")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.inputs[i]) + self.noise * torch.randn(6), self.targets[i]


def noisy(path: str, seed: int) -> tuple[Any, Any]:
    # A job's agents share out the test set for the averaged model, in other batches.
    return Noisy(101, 0.1), Noisy(40, 0.0)


@pytest.fixture
def folder(comm: MPI.Intracomm, shared_folder: Path) -> Path:
    """A folder that all ranks see, with a config, and in which they are."""
    if comm.rank == 0:
        (shared_folder / "r.toml").write_text(CONFIG)
    comm.barrier()
    return shared_folder


def compare(comm: MPI.Intracomm, *overrides: str, mapped: float | None = 2e-6) -> Simulation | None:
    """Train, then simulate both ways on rank 0. Collective.

    Args:
        mapped: how far, relatively, parameters may be off where many agents are computed at a time;
            None: the model cannot be.
    """
    run = Run(load_config(Path("r.toml"), ["run.dir=real", *overrides]), comm)
    run.train()
    everyone = comm.gather(dict(run.optimizer.arrays()))
    if everyone is None:
        return None
    arrays = {name: np.array([one[name] for one in everyone]) for name in everyone[0]}
    end = run.optimizer.arena.parameters_end
    for way in ("one", "many"):
        config = load_config(Path("r.toml"), [f"run.dir={way}", *overrides])
        simulation = Simulation(config, comm.size, one_by_one=way == "one")
        simulation.run()
        stack = simulation.stack
        found = stack.flats
        own = {
            name for name in arrays if not name.startswith("optimizer/")
        }  # torch's, each its own
        assert set(found) == own
        exact = way == "one" or mapped is None
        for name in own:
            values = arrays[name]
            ours = found[name].numpy()
            if exact:
                assert ours.tobytes() == values.tobytes(), name
            else:
                off = np.abs(ours - values)[:, :end].max()
                assert off <= mapped * np.abs(values).max(), name
        lines(Path("real"), Path(way), 1e-6 if exact else max(1e-6, mapped or 0.0))
        if config.run.theory:
            traces(Path("real"), Path(way), 1e-5 if exact else max(1e-5, 10 * (mapped or 0.0)))
    assert bool(simulation._start.why_one_by_one) == (mapped is None)
    return simulation


def lines(real: Path, ours: Path, near: float) -> None:
    theirs, mine = metrics_file.read(real), metrics_file.read(ours)
    assert [line["step"] for line in theirs] == [line["step"] for line in mine] == [4, 8, 9]
    for a, b in zip(theirs, mine, strict=True):
        assert list(a) == list(b)
        for key in ("epoch", "lr", "bytes_sent"):
            assert a[key] == b[key], key
        assert b["wait_s"] == 0.0
        for key in ("train_loss", "test_loss"):
            theirs_of = pytest.approx(a[key]["agents"], rel=near, nan_ok=True)  # took no part
            assert b[key]["agents"] == theirs_of, key
            assert b[key]["std"] == pytest.approx(a[key]["std"], rel=1e3 * near, abs=1e-7)
        for key in ("train_accuracy", "test_accuracy"):
            assert b[key]["agents"] == pytest.approx(a[key]["agents"], abs=0.03, nan_ok=True), key
        average = a["averaged_model"]["test_loss"]
        assert b["averaged_model"]["test_loss"] == pytest.approx(average, rel=near)
        scale = max(1.0, a["consensus"]["max"])
        for key in ("max", "rms"):
            assert abs(b["consensus"][key] - a["consensus"][key]) <= 10 * near * scale


def traces(real: Path, ours: Path, near: float) -> None:
    a, b = trace.read(real), trace.read(ours)
    for name, values in vars(a).items():
        close = pytest.approx(values, rel=near, abs=1e-9, nan_ok=name == "moved")
        assert getattr(b, name) == close, name
    steps = [[line["step"] for line in metrics_file.read(d / "trace.jsonl")] for d in (real, ours)]
    assert steps[0] == steps[1]


def skip_unless_it_fits(comm: MPI.Intracomm, topology: str, mixing: str) -> tuple[str, str]:
    """Overrides; the test is skipped, on all ranks alike, where N does not fit."""
    try:
        mixing_from_spec(mixing, graph_from_spec(topology, comm.size))
    except UserError as error:
        pytest.skip(str(error))
    return f"agents.topology={topology}", f"agents.mixing={mixing}"


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_topologies(comm: MPI.Intracomm, folder: Path, topology: str) -> None:
    directed = topology == "exponential"
    mixing = "uniform" if directed else "metropolis"
    compare(comm, *skip_unless_it_fits(comm, topology, mixing))


DIRECTED = "directed\n0 1\n1 2\n2 3\n3 0\n0 2\n"  # agents 0 and 2 of other degrees than the rest
MORE = {
    "gradient-tracking": ("agents.mixing=lazy:metropolis",),
    "sgd": (),
    "msgd": ("optim.clip_norm=0.5",),
    "fedavg": ("optim.fraction=0.6", "optim.server_momentum=0.5"),
    "easgd": ("optim.period=2",),
    "eamsgd": ("optim.period=3",),
    "gossip": ("optim.probability=0.8",),
    "push-sum": (),
    "torch.optim:AdamW": (),
    "torch.optim:SGD": ("optim.args={momentum=0.9}", "model.buffers=mixed"),
}


def test_every_synchronous_algorithm_is_here() -> None:
    synchronous = {name for name, kind in algorithms().items() if kind.synchronous}
    assert synchronous == {*FORMS, *MORE, "cdmsgd"} - {
        "polyak", "nesterov", "look-ahead", "torch.optim:AdamW", "torch.optim:SGD"
    }  # fmt: skip


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MORE)
def test_other_algorithms(comm: MPI.Intracomm, folder: Path, name: str, wire: str) -> None:
    """Sums over all agents in agent order: to the bit, too."""
    kind = registry.find(name) or algorithms()["cdsgd"]
    over_graph = kind.over == GRAPH
    if wire != "float32" and not over_graph:
        pytest.skip("float32 only")
    settings = [f"optim.name={name}", f"run.theory={str(over_graph).lower()}", *MORE[name]]
    if name == "push-sum" and comm.size == 4:
        if comm.rank == 0:
            Path("net.edges").write_text(DIRECTED)
        comm.barrier()
        settings += ["agents.topology=file:net.edges", "agents.mixing=out-degree"]
    near = {"float32": 2e-5, "bfloat16": 2**-6}[wire]
    compare(comm, *settings, "exchange.sums=ordered", f"exchange.wire={wire}", mapped=near)


@pytest.mark.parametrize("name", ["sgd", "fedavg", "easgd"])
def test_in_the_mpi_librarys_order_to_rounding(
    comm: MPI.Intracomm, folder: Path, name: str
) -> None:
    overrides = [f"optim.name={name}", "run.theory=false"]
    run = Run(load_config(Path("r.toml"), ["run.dir=real", *overrides]), comm)
    run.train()
    everyone = comm.gather(run.optimizer.x.copy())
    if everyone is not None:
        config = load_config(Path("r.toml"), ["run.dir=ours", *overrides])
        simulation = Simulation(config, comm.size, one_by_one=True)
        simulation.run()
        np.testing.assert_allclose(simulation.x, np.array(everyone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_and_wires(comm: MPI.Intracomm, folder: Path, form: str, wire: str) -> None:
    # An element next to a tie may be rounded the other way, by one place of the wire type.
    mapped = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}[wire]
    compare(comm, *FORMS[form], f"exchange.wire={wire}", mapped=mapped)


@pytest.mark.parametrize("form", ["icdsgd", "look-ahead"])
@pytest.mark.parametrize("cycle", ["one-peer", "matchings", "files"])
def test_cycles(comm: MPI.Intracomm, folder: Path, cycle: str, form: str) -> None:
    topology, mixing = "expo" if cycle == "one-peer" else "ring", cycle
    if cycle == "files":
        n = comm.size
        ring = (np.eye(n) + np.roll(np.eye(n), 1, axis=0) + np.roll(np.eye(n), -1, axis=0)) / 3
        if comm.rank == 0:
            np.savetxt("a.csv", ring, delimiter=",")
            np.savetxt("b.csv", (np.eye(n) + ring) / 2, delimiter=",")
        comm.barrier()
        mixing = "cycle:a.csv,b.csv"
    compare(comm, *skip_unless_it_fits(comm, topology, mixing), *FORMS[form])


@pytest.mark.parametrize("topology", ["exponential", "ring"])
def test_bytes_by_messages(comm: MPI.Intracomm, folder: Path, topology: str) -> None:
    mixing = "uniform" if topology == "exponential" else "metropolis"
    compare(comm, *skip_unless_it_fits(comm, topology, mixing), "exchange.transport=neighbor")


@pytest.mark.parametrize(
    "settings",
    [
        ("optim.schedule=diminishing:0.6",),
        ("optim.schedule=cosine", "optim.name=cdsgd"),
        ("optim.schedule=torch.optim.lr_scheduler:StepLR",
         "optim.schedule_args={step_size=2, gamma=0.5}"),
        ("optim.clip_norm=0.5",),
        ("agents.init=local",),
        ("agents.init=local", "optim.nesterov=look-ahead"),
        ("run.evaluate_train=true", "run.evaluate_batch=7"),
        ("data.batch_size=20", "run.epochs=9"),
        ("data.drop_last=true", "data.batch_size=6"),
        ("model.name=logistic", "model.args={}", "optim.weight_decay=0"),
    ],
    ids="/".join,
)  # fmt: skip
def test_settings(comm: MPI.Intracomm, folder: Path, settings: tuple[str, ...]) -> None:
    compare(comm, *settings)


def test_unequal_shares(comm: MPI.Intracomm, folder: Path) -> None:
    """Small shares start over; on a star, where degrees differ too."""
    args = "data.args={samples=20, features=6, classes=3, heterogeneity=0.0, test_samples=90}"
    shares = ("data.partition=dirichlet:1.0", "data.batch_size=2", "run.evaluate_train=true")
    # As many epochs of unknown length as make nine steps are not to be had: whole ones, then.
    settings = [args, *shares, "agents.topology=star", "run.epochs=1", "run.evaluate_every=4 steps"]
    run = Run(load_config(Path("r.toml"), ["run.dir=real", *settings]), comm)
    run.train()
    x = comm.gather(run.optimizer.x)
    if x is None:
        return
    for way in ("one", "many"):
        config = load_config(Path("r.toml"), [f"run.dir={way}", *settings])
        simulation = Simulation(config, comm.size, one_by_one=way == "one")
        simulation.run()
        assert np.abs(simulation.stack.x.numpy() - np.array(x)).max() <= 2e-6
        last = metrics_file.read(Path(way))[-1]
        real = metrics_file.read(Path("real"))[-1]
        assert last["step"] == real["step"]
        expected = real["train_loss"]["agents"]
        assert last["train_loss"]["agents"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optim.nesterov=look-ahead",),
        ("model.buffers=mixed",),
        ("model.buffers=mixed", "optim.nesterov=look-ahead", "exchange.wire=bfloat16"),
        ("model.buffers=mixed", "optim.name=icdsgd", "optim.rounds=3"),
        ("agents.init=local", "optim.clip_norm=0.5", "run.evaluate_train=true"),
    ],
    ids="/".join,
)
def test_buffers_and_dropout(comm: MPI.Intracomm, folder: Path, settings: tuple[str, ...]) -> None:
    """Each agent has its own statistics and draws as it does in a job: the same bits."""
    own = ("model.name=test_simulation:normalised", "model.args={}")
    compare(comm, *own, *settings, mapped=None)


def test_parameters_without_a_gradient(comm: MPI.Intracomm, folder: Path) -> None:
    """They are mixed, and not decayed."""
    compare(comm, "model.name=test_simulation:PartlyUsed", "model.args={}", "agents.init=local")


def test_a_loss_that_cannot_be_mapped(comm: MPI.Intracomm, folder: Path) -> None:
    """Class labels become one-hot rows, which torch.func has no rule for."""
    compare(comm, "model.loss=mse", mapped=None)


def test_a_torch_dataset(comm: MPI.Intracomm, folder: Path) -> None:
    """Random augmentation depends on the epoch and on which items make a batch."""
    limit = f"data.limit={20 * comm.size}"
    data = ("data.name=test_simulation:noisy", "data.args={}", "data.partition=iid", limit)
    compare(comm, *data, "run.evaluate_train=true")


def test_regression(comm: MPI.Intracomm, folder: Path) -> None:
    data = ("data.name=linear", "data.args={samples=20, features=6, heterogeneity=1.0}")
    model = ("model.name=linear", "model.args={outputs=1}", "model.loss=least_squares")
    compare(comm, *data, *model)


def test_the_quadratic(comm: MPI.Intracomm, folder: Path) -> None:
    data = ("data.name=points", "data.args={features=5}", "data.batch_size=1", "run.epochs=9")
    model = ("model.name=quadratic", "model.args={}", "model.loss=least_squares")
    simulation = compare(comm, *data, *model, "optim.name=cdsgd", "optim.weight_decay=0")
    if simulation is not None:
        assert np.isnan(metrics_file.read(Path("many"))[-1]["test_accuracy"]["mean"])

"""Simulations against a dense float64 oracle, both ways against each other, and what is refused.

X, V    float64 (N, d): the agents' points and momentum
B       float64 (N, d): what each pulls to; f_j(x) = |x - b_j|^2 / 2
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from mpicdsgd.cli import parser
from mpicdsgd.common.errors import UserError
from mpicdsgd.data import DataConfig, Shuffler, load
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.runs import metrics_file, trace
from mpicdsgd.runs.compare import compare, table
from mpicdsgd.runs.config import load_config
from mpicdsgd.runs.plot import plot_runs
from mpicdsgd.simulation.simulation import Simulation

Array = NDArray[np.float64]
QUADRATIC = """
[run]
epochs = 20
evaluate_every = "5 epochs"
checkpoint_every = "never"
theory = true
[agents]
topology = "torus"
[model]
name = "quadratic"
loss = "least_squares"
[data]
name = "points"
partition = "contiguous"
batch_size = 1
args = { features = 3 }
[optim]
name = "cdsgd"
lr = 0.05
"""
CLASSES = """
[run]
epochs = 2
evaluate_every = "1 epoch"
evaluate_batch = 30
[agents]
topology = "ring"
[model]
name = "mlp"
args = { hidden = [8] }
[data]
name = "gaussians"
partition = "contiguous"
batch_size = 8
args = { samples = 20, features = 6, classes = 3, heterogeneity = 0.5, test_samples = 70 }
[optim]
lr = 0.1
momentum = 0.9
"""
LR = 0.05


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


def simulate(
    path: Path, agents: int, *overrides: str, name: str = "run", one_by_one: bool = False
) -> Simulation:
    config = load_config(path, [f"run.dir={path.parent / name}", *overrides])
    simulation = Simulation(config, agents, one_by_one=one_by_one)
    simulation.run()
    return simulation


def points(agents: int) -> Array:
    """B, from the reader that agents of a job use, each its own."""
    config = DataConfig("points", partition="contiguous", args={"features": 3})
    shares = [load(config, 0, j, agents).train.batch(np.arange(1))[1] for j in range(agents)]
    return torch.cat(shares).numpy().astype(np.float64)


def dense(
    Pi: list[Array], B: Array, steps: int, *, form: str = "none", mu: float = 0.0, tau: int = 1,
    decay: float = 0.0, clip: float = math.inf,
) -> tuple[list[Array], list[float]]:  # fmt: skip
    """X before every step and after the last; of every step the sum over agents of |h_j|^2."""
    X, V = np.zeros_like(B), np.zeros_like(B)
    found, squares = [X], []
    for k in range(steps):
        at = X + mu * V if form == "look-ahead" else X
        G = at - B
        norms = np.linalg.norm(G, axis=1, keepdims=True)
        H = G * np.minimum(1.0, clip / np.maximum(norms, 1e-30)) + decay * at
        squares.append(float((H**2).sum()))
        V = mu * V - LR * H
        push = {"none": -LR * H, "polyak": V, "nesterov": mu * V - LR * H, "look-ahead": V}[form]
        for mixing in range(k * tau, (k + 1) * tau):
            X = Pi[mixing % len(Pi)] @ X
        X = X + push
        found.append(X)
    return found, squares


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ((), {}),
        (("optim.weight_decay=0.3",), {"decay": 0.3}),
        (("optim.clip_norm=0.7",), {"clip": 0.7}),
        (("optim.name=icdsgd", "optim.rounds=3"), {"tau": 3}),
        (("optim.name=cdmsgd", "optim.momentum=0.8", "optim.nesterov=false"),
         {"form": "polyak", "mu": 0.8}),
        (("optim.name=cdmsgd", "optim.momentum=0.8"), {"form": "nesterov", "mu": 0.8}),
        (("optim.name=cdmsgd", "optim.momentum=0.8", "optim.nesterov=look-ahead"),
         {"form": "look-ahead", "mu": 0.8}),
        (("agents.topology=ring", "agents.mixing=matchings"), {}),
        (("agents.topology=expo", "agents.mixing=one-peer", "optim.rounds=3"), {"tau": 3}),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_quadratic_is_the_dense_recursion(
    tmp_path: Path, settings: tuple[str, ...], oracle: dict[str, Any], one_by_one: bool
) -> None:
    """Parameters, losses, consensus and trace."""
    n, steps = 12, 20
    made = simulate(write(tmp_path, QUADRATIC), n, *settings, one_by_one=one_by_one)
    config = made.config.agents
    mixing = mixing_from_spec(config.mixing, graph_from_spec(config.topology, n))
    Pi, B = [turn.Pi for turn in mixing.turns], points(n)
    states, squares = dense(Pi, B, steps, **oracle)
    X = states[-1]
    assert np.abs(made.stack.x.numpy()[:, :3] - X).max() <= 2e-6 * np.abs(B).max()
    assert (made.stack.x.numpy()[:, 3:] == 0).all()
    lines = metrics_file.read(tmp_path / "run")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line in lines:
        X = states[line["step"]]
        # The test set is all points, so its loss is f = 1/N sum_j f_j.
        f = 0.5 * ((X[:, None] - B) ** 2).sum(axis=2).mean(axis=1)
        assert line["test_loss"]["agents"] == pytest.approx(f.tolist(), rel=1e-5)
        mean = X.mean(axis=0)
        expected = 0.5 * ((mean - B) ** 2).sum(axis=1).mean()
        assert line["averaged_model"]["test_loss"] == pytest.approx(expected, rel=1e-5)
        far = np.linalg.norm(X - mean, axis=1)
        assert line["consensus"]["max"] == pytest.approx(far.max(), rel=1e-5)
        assert line["consensus"]["rms"] == pytest.approx(np.sqrt((far**2).mean()), rel=1e-5)
    found = trace.read(tmp_path / "run")
    assert found.step.tolist() == list(range(steps))
    assert found.gradient == pytest.approx(squares, rel=1e-5)
    tau = oracle.get("tau", 1)
    apart = []
    for k, X in enumerate(states[:-1]):
        squared = ((X[:, None] - X[None]) ** 2).sum(axis=2)
        apart.append(0.5 * float((Pi[k * tau % len(Pi)] * squared).sum()))
    assert found.disagreement == pytest.approx(apart, rel=1e-4, abs=1e-9)
    assert found.batch.tolist() == [float(n)] * steps
    if oracle.get("form") != "look-ahead":
        losses = [0.5 * float(((X - B) ** 2).sum()) for X in states[:-1]]
        assert found.loss == pytest.approx(losses, rel=1e-5)


def lines_agree(a: Path, b: Path, rel: float = 1e-5) -> None:
    ours, theirs = metrics_file.read(a), metrics_file.read(b)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for key in ("step", "epoch", "lr", "bytes_sent"):
            assert one[key] == other[key]
        for key in ("train_loss", "test_loss"):
            assert one[key]["agents"] == pytest.approx(other[key]["agents"], rel=rel)
        for key in ("train_accuracy", "test_accuracy"):
            assert one[key]["agents"] == pytest.approx(other[key]["agents"], abs=0.05)
        assert one["consensus"]["rms"] == pytest.approx(other["consensus"]["rms"], rel=1e-3)


class Own(torch.autograd.Function):
    """The identity, in the old form of a custom function, which torch.func does not take."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Own.apply(self.layer(x))  # type: ignore[no-any-return]


class Conv(nn.Module):
    """Convolutions, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (1, 3), padding="same").to(memory_format=torch.channels_last)
        self.last = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(x.reshape(-1, 2, 1, 3)).relu().flatten(1))  # type: ignore[no-any-return]


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Linear(9, 3))


def normalising() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))


class Liar(nn.Module):
    """Gives something else when mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mapped = torch._C._functorch.is_functorch_wrapped_tensor(self.layer.weight)
        return self.layer(x) * (1.5 if mapped else 1.0)  # type: ignore[no-any-return]


class Alternating(nn.Module):
    """Two heads; which of them takes part depends on the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[int(x.sum() > 0)](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optim.clip_norm=0.2", "run.evaluate_train=true"),
        ("agents.init=local", "optim.nesterov=look-ahead"),
        ("model.name=test_simulation:Conv", "model.args={}"),
        ("data.partition=dirichlet:0.5", "data.args.heterogeneity=0.0", "data.batch_size=2",
         "run.evaluate_train=true"),
        ("data.batch_size=20",),
        ("exchange.wire=float16",),
    ],
    ids="/".join,
)  # fmt: skip
def test_both_ways_agree(tmp_path: Path, settings: tuple[str, ...]) -> None:
    path = write(tmp_path, CLASSES)
    many = simulate(path, 7, *settings)
    one = simulate(path, 7, *settings, name="one", one_by_one=True)
    assert many._start.why_one_by_one == ""
    near = 2**-10 if "exchange.wire=float16" in settings else 2e-6
    off = (many.stack.x - one.stack.x).abs().max()
    assert off <= near * one.stack.x.abs().max()
    lines_agree(tmp_path / "run", tmp_path / "one", 10 * near)


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, CLASSES)
    whole = simulate(path, 7, "run.evaluate_train=true")
    monkeypatch.setattr("mpicdsgd.simulation.vmapped._BUDGET_BYTES", 15_000)
    parts = simulate(path, 7, "run.evaluate_train=true", name="parts")
    assert 1 < parts._start.population._chunk < 7  # type: ignore[union-attr]
    assert (whole.stack.x - parts.stack.x).abs().max() <= 2e-6
    lines_agree(tmp_path / "run", tmp_path / "parts")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("Custom", "torch cannot map it"),
        ("Alternating", "torch cannot map it|which parameters get a gradient differs"),
        ("dropping", "torch cannot map it .*randomness"),
        ("normalising", "the model has buffers"),
        ("Liar", "its loss or gradient is another one"),
    ],
)
def test_models_that_go_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, why: str
) -> None:
    """The log says so, once; it is what asking for it gives."""
    caplog.set_level(logging.INFO)
    path, own = write(tmp_path, CLASSES), (f"model.name=test_simulation:{model}", "model.args={}")
    made = simulate(path, 3, *own)
    said = [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("the agents' gradients are computed one by one: ")
    assert re.search(why, said[0]), said
    asked = simulate(path, 3, *own, name="asked", one_by_one=True)
    assert torch.equal(made.stack.x, asked.stack.x)
    header = (tmp_path / "run" / "config.g0001.toml").read_text()
    assert "# simulated: 3 agents in one process, one by one: " in header


def test_the_generators_stay_the_agents_own(tmp_path: Path) -> None:
    """What else draws random numbers in between changes nothing, nor does the number of agents."""
    path, own = write(tmp_path, CLASSES), ("model.name=test_simulation:dropping", "model.args={}")
    made = simulate(path, 3, *own)
    torch.manual_seed(99)
    again = simulate(path, 3, *own, "run.evaluate_every=1 steps", name="again")
    assert torch.equal(made.stack.x, again.stack.x)


def test_one_agent_is_plain_sgd(tmp_path: Path) -> None:
    made = simulate(write(tmp_path, CLASSES), 1, "optim.name=cdsgd", "model.name=logistic",
                    "model.args={}")  # fmt: skip
    config = made.config
    data = load(config.data, 0, 0, 1)
    model = nn.Linear(6, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    order = Shuffler(data.shares, 0, 8, 0)
    for epoch in range(2):
        for batch in order.batches(epoch):
            inputs, targets = data.train.batch(batch)
            sgd.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            sgd.step()
    ours = dict(zip(("weight", "bias"), made._start.layout.views_of(made.stack.x[0]), strict=True))
    for name, parameter in model.named_parameters():
        assert torch.allclose(ours[name], parameter, rtol=0, atol=1e-6)
    assert metrics_file.read(tmp_path / "run")[-1]["bytes_sent"] == 0


def test_bytes_are_those_of_the_graph(tmp_path: Path) -> None:
    """By hand: a torus of 3 x 4 has 4 readers each; 3 floats are one block of 64 bytes."""
    simulate(write(tmp_path, QUADRATIC), 12)
    assert metrics_file.read(tmp_path / "run")[-1]["bytes_sent"] == 21 * 4 * (64 + 64)


def test_plot_and_compare_take_it(tmp_path: Path) -> None:
    """Also where there is no accuracy."""
    simulate(write(tmp_path, QUADRATIC), 12)
    simulate(write(tmp_path, CLASSES), 5, name="classes")
    runs = [tmp_path / "run", tmp_path / "classes"]
    plot_runs(runs, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000
    rows = compare(runs)
    assert [row["agents"] for row in rows] == [12, 5]
    assert [rows[0][key] for key in ("mean", "lowest", "averaged", "centre")] == [None] * 4
    assert math.isfinite(rows[0]["loss"])
    *_, first, second = table(rows).splitlines()
    assert first.split()[4:8] == ["-"] * 4
    assert f"{rows[0]['loss']:.4g}" in first
    assert second.split().count("-") == 1, "it has classes, and no centre"


def test_a_simulation_begins_anew(tmp_path: Path) -> None:
    path = write(tmp_path, QUADRATIC)
    first = simulate(path, 4)
    second = simulate(path, 4)
    assert torch.equal(first.stack.x, second.stack.x)
    assert (tmp_path / "run" / "metrics.jsonl").resolve().name == "metrics.g0002.jsonl"
    assert len(metrics_file.read(tmp_path / "run")) == 4


def test_it_leaves_a_runs_folder_alone(tmp_path: Path) -> None:
    path = write(tmp_path, QUADRATIC)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints of a run.*set run.dir"):
        simulate(path, 4)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("optim.name=gosgd", "run.theory=false"), "its agents go each at its own pace"),
        (("optim.name=cdsdg",), "did you mean cdsgd"),
        (("optim.rounds=0",), "rounds \\(tau\\) must be at least 1, got 0"),
        (("optim.name=cdmsgd", "optim.nesterov=ahead"), 'true, false or "look-ahead"'),
        (("optim.lr=-1",), "lr must be a finite number >= 0"),
        (("optim.name=cdmsgd", "optim.momentum=1"), "momentum must be in \\[0, 1\\)"),
        (("optim.schedule=cosin",), "unknown schedule"),
        (("optim.clip_norm=-1",), "optim.clip_norm must be"),
        (("exchange.wire=int8",), "exchange.wire must be one of float32, bfloat16, float16"),
        (("agents.device=cuda",), "simulate computes on the CPU"),
        (("agents.topology=hypercube",), "hypercube"),
        (("data.batch_size=2",), "larger than the share of agent 0"),
        (("data.partition=iid",), 'set data.partition = "contiguous"'),
        (("data.limit=3",), "leave data.limit out"),
        (("data.args={sample=3}",), "data.args.sample: .*did you mean samples"),
        (("data.args={samples=0}",), "data.args.samples = 0: it must be a whole number >= 1"),
        (("data.args={noise=-1}",), "data.args.noise = -1: it must be a finite number >= 0"),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate(write(tmp_path, QUADRATIC), 6, *settings)
    assert not (tmp_path / "run").exists()


def nan_at_last(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NaN once the outputs are far from where they begin."""
    loss = nn.functional.cross_entropy(outputs, targets)
    return torch.where(loss < 0.9, torch.nan, loss)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_loss_that_is_no_number_ends_it(tmp_path: Path, one_by_one: bool) -> None:
    path = write(tmp_path, CLASSES)
    settings = (
        "model.name=logistic", "model.args={}", "model.loss=test_simulation:nan_at_last",
        "run.evaluate_every=1 steps",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"agent \d, step \d+: the loss is NaN.*is kept in"):
        simulate(path, 3, *settings, "run.theory=true", one_by_one=one_by_one)
    lines = metrics_file.read(tmp_path / "run")
    assert 0 < len(lines) < 6
    assert trace.read(tmp_path / "run").step.tolist() == list(range(lines[-1]["step"]))


def test_parameters_that_overflow_end_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"agent \d+, step \d+: parameters became NaN or infinite"):
        simulate(write(tmp_path, QUADRATIC), 4, "exchange.wire=float16", "optim.lr=1e30")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, QUADRATIC))
    words = ["simulate", path, "--agents", "4", f"run.dir={tmp_path / 'run'}"]
    assert parser.main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("4 agents on torus: mean test loss ")
    assert "nan" not in out + err
    assert "step 20/20" in err
    json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for wrong, message in (
        ([], "simulate needs --agents N"),
        (["--agents", "0"], "--agents must be at least 1, got 0"),
        (["--agents", "3"], "torus"),
    ):
        assert parser.main(["simulate", path, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Simulation._step

    def interrupted(self: Simulation) -> None:
        if self.steps == 7:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Simulation, "_step", interrupted)
    path = str(write(tmp_path, QUADRATIC))
    words = ["simulate", path, "--agents", "4", f"run.dir={tmp_path / 'run'}"]
    assert parser.main(words) == 1
    assert "interrupted after step 7; what was written is kept in" in capsys.readouterr().err
    assert [line["step"] for line in metrics_file.read(tmp_path / "run")] == [5]
    assert trace.read(tmp_path / "run").step.tolist() == list(range(7))

"""What a run says: of the graph only to who uses it, of the centre where there is one."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

import mpicdsgd
from mpicdsgd import ExchangeConfig, UserError
from mpicdsgd.cli import parser
from mpicdsgd.comm import shutdown

pytestmark = pytest.mark.ranks(1, 2, 4)

RUN = """
[run]
dir = "r"
epochs = 2
[agents]
topology = "ring"
mixing = "metropolis"
[model]
name = "mlp"
args = { hidden = [8] }
[data]
name = "test_systems:pictures"
batch_size = 4
[optim]
momentum = 0.9
"""
Trains = Callable[..., tuple[str, str, list[str]]]


@pytest.fixture
def trains(
    comm: MPI.Intracomm,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Trains]:
    """``trains(name, *settings)``: stdout, stderr and log of a run, rank 0's on all ranks."""
    folder = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    monkeypatch.chdir(folder)
    Path(f"{comm.rank}.toml").write_text(RUN)
    monkeypatch.setattr(shutdown, "abort", lambda code: None)  # would end the tests
    caplog.set_level(logging.INFO, "mpicdsgd")

    def trains(name: str, *settings: str) -> tuple[str, str, list[str]]:
        capfd.readouterr()
        caplog.clear()
        code = parser.main(["train", f"{comm.rank}.toml", f"optim.name={name}", *settings])
        out, err = capfd.readouterr()
        assert code == 0, err
        said = [r.getMessage() for r in caplog.records]
        found: tuple[str, str, list[str]] = comm.bcast((out, err, said))
        return found

    yield trains
    monkeypatch.undo()
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


def lambda_n(said: list[str]) -> list[str]:
    return [text for text in said if "lambda_N" in text]


def graph_says_something(comm: MPI.Intracomm) -> bool:
    return any("lambda_N" in text for text in mpicdsgd.metropolis(mpicdsgd.ring(comm.size)).remarks)


@pytest.mark.parametrize("name", ["cdmsgd", "sgd", "fedavg", "easgd", "gossip", "torch.optim:SGD"])
def test_the_graph_is_spoken_of_to_who_uses_it(
    trains: Trains, comm: MPI.Intracomm, name: str
) -> None:
    out, err, said = trains(name)
    by_matrix = name in ("cdmsgd", "torch.optim:SGD")
    assert len(lambda_n(said)) == (by_matrix and graph_says_something(comm))
    agents = "1 agent" if comm.size == 1 else f"{comm.size} agents"
    where = " on ring" if by_matrix or name == "gossip" else ""
    assert out.startswith(f"{agents}{where}: mean test accuracy 0.")
    has_centre = name in ("fedavg", "easgd")
    assert (", centre 0." in out) is has_centre
    lines = [line for line in err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    metrics = [json.loads(text) for text in Path("r/metrics.jsonl").read_text().splitlines()]
    for line, found in zip(lines, metrics, strict=True):
        if has_centre:
            assert f", centre {found['centre']['test_accuracy']:.4f})" in line
        else:
            assert "centre" not in line


def test_a_servers_run(trains: Trains, comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("the server is a rank of its own")
    out, _, said = trains("downpour", "optim.lr=0.001")
    agents = "1 agent" if comm.size == 2 else f"{comm.size - 1} agents"
    assert f"{agents}, and rank {comm.size - 1} as the server" in said
    assert lambda_n(said) == []
    assert out.startswith(f"{agents} and a server: mean test accuracy 0.")


def test_one_round_of_icdsgd_is_cdsgd(trains: Trains, comm: MPI.Intracomm) -> None:
    """As the resolved config says; and without a word of the user it is two."""
    ends = {}
    for label, words in {
        "cdsgd": ["cdsgd"],
        "one": ["icdsgd", "optim.rounds=1"],
        "two": ["icdsgd"],
        "cdsgd two": ["cdsgd", "optim.rounds=2"],
    }.items():
        trains(words[0], *words[1:], f"run.dir={label}", "optim.lr=0.1", "agents.init=local")
        line = json.loads(Path(label, "metrics.jsonl").read_text().splitlines()[-1])
        ends[label] = {key: line[key] for key in ("test_loss", "consensus", "bytes_sent")}
        rounds = 1 if label in ("cdsgd", "one") else 2
        assert f"\nrounds = {rounds}\n" in Path(label, "config.g0001.toml").read_text()
    assert ends["one"] == ends["cdsgd"]
    assert ends["two"] == ends["cdsgd two"]
    if comm.size > 1:
        assert ends["two"]["bytes_sent"] > 1.5 * ends["one"]["bytes_sent"]
    if comm.size > 3:
        assert ends["two"]["consensus"]["max"] < ends["one"]["consensus"]["max"]


def no_matrix(p: Any, agents: mpicdsgd.Agents) -> dict[str, Callable[[], Any]]:
    return {
        "SGD": lambda: mpicdsgd.SGD(p, agents=agents),
        "MSGD": lambda: mpicdsgd.MSGD(p, agents=agents),
        "FedAvg": lambda: mpicdsgd.FedAvg(p, agents=agents, period=2),
        "EASGD": lambda: mpicdsgd.EASGD(p, agents=agents),
        "EAMSGD": lambda: mpicdsgd.EAMSGD(p, agents=agents),
        "GossipSGD": lambda: mpicdsgd.GossipSGD(p, agents=agents),
        "GoSGD": lambda: mpicdsgd.GoSGD(p, agents=agents),
    }


def test_a_matrix_that_changes_is_refused_by_who_has_none(comm: MPI.Intracomm) -> None:
    if comm.size < 4:
        pytest.skip("a ring of fewer has one turn")
    mixing = mpicdsgd.alternating_matchings(mpicdsgd.ring(comm.size))
    agents = mpicdsgd.Agents(comm, mixing, device="cpu")
    p = [torch.nn.Parameter(torch.zeros(3))]
    for name, make in no_matrix(p, agents).items():
        with pytest.raises(UserError, match=f"changes by step, but {name} mixes by no matrix"):
            make()
    mpicdsgd.CDSGD(p, agents=agents, exchange=ExchangeConfig(transport="neighbor")).close()


def test_remarks_are_said_once(comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture) -> None:
    if not graph_says_something(comm):
        pytest.skip("nothing is to be said of this ring")
    caplog.set_level(logging.WARNING, "mpicdsgd")
    caplog.clear()
    agents = mpicdsgd.Agents(comm, mpicdsgd.metropolis(mpicdsgd.ring(comm.size)), device="cpu")
    assert lambda_n([r.getMessage() for r in caplog.records]) == []
    for _ in range(2):
        mpicdsgd.CDSGD([torch.nn.Parameter(torch.zeros(3))], agents=agents).close()
    assert len(lambda_n([r.getMessage() for r in caplog.records])) == (comm.rank == 0)

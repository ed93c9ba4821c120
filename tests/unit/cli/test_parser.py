"""The commands that need no job, what ``train --agents`` starts, and which commands load MPI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from team import write

import mpicdsgd
from mpicdsgd.cli import graph as graph_command
from mpicdsgd.cli import launch, parser
from mpicdsgd.common.errors import UserError


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch._SET_BY_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def done(*words: str) -> None:
    assert parser.main(words) == 0


def refused(capsys: pytest.CaptureFixture[str], text: str, *words: str) -> None:
    """Exit code 2, one line on stderr that contains ``text``, nothing on stdout."""
    capsys.readouterr()
    assert parser.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mpicdsgd: ")
    assert text in captured.err
    assert captured.err.count("\n") == 1


def usage(capsys: pytest.CaptureFixture[str], text: str, *words: str) -> None:
    with pytest.raises(SystemExit) as end:
        parser.main(words)
    assert end.value.code == 2
    assert text in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"mpicdsgd {mpicdsgd.__version__}\n"


def test_graph_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    done("graph", "star", "-n", "5", "--mixing", "lazy:metropolis")
    text = capsys.readouterr().out
    assert "star: 5 agents, 4 edges, degree 1 to 4, diameter 2" in text
    # Metropolis on a star of 5: weight 1/5 on each edge; eigenvalues 1, 4/5 (three times), 0.
    assert "lambda_2 0.900000, lambda_N 0.500000, gap 0.100000" in text
    assert text.count("  holds  ") == 6
    done("graph", "ring", "torus:2x3", "-n", "6")
    names, ring, torus = (line.split() for line in capsys.readouterr().out.splitlines())
    assert names[:5] == ["spec", "agents", "mixing", "degree", "diameter"]
    assert ring[:5] == ["ring", "6", "metropolis", "2", "3"]
    assert torus[:5] == ["torus:2x3", "6", "metropolis", "3", "2"]


def test_graph_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    done("graph", "--suggest", "-n", "8", "--max-degree", "2")
    assert capsys.readouterr().out.endswith('\ntopology = "ring"\nmixing = "matchings"\n')
    done("graph", "--suggest", "-n", "8", "--json")
    ranked = [one["gap_per_message"] for one in json.loads(capsys.readouterr().out)]
    assert ranked == pytest.approx(sorted(ranked, reverse=True), abs=1e-8)
    refused(capsys, "leave out topology ring", "graph", "ring", "--suggest", "-n", "8")
    refused(capsys, "leave out --mixing", "graph", "--suggest", "-n", "8", "--mixing", "uniform")
    refused(capsys, "Say it with -n", "graph", "--suggest")
    refused(capsys, "2 to 1024 agents, got 1", "graph", "--suggest", "-n", "1")
    refused(capsys, "at least one", "graph", "--suggest", "-n", "8", "--max-degree", "0")
    refused(capsys, "at most 1 ", "graph", "--suggest", "-n", "8", "--max-degree", "1")
    refused(capsys, "belongs to --suggest", "graph", "ring", "-n", "8", "--max-degree", "2")
    refused(capsys, "no topology given", "graph", "-n", "8")
    refused(capsys, "no topology given", "graph")


def test_graph_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    done("graph", "complete", "exponential", "-n", "6", "--mixing", "uniform", "--json")
    complete, exponential = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name)
    )
    expected = {
        "spec": "complete", "agents": 6, "directed": False, "edges": 15, "degree_min": 5,
        "degree_max": 5, "diameter": 1, "mixing": "uniform",
    }  # fmt: skip
    assert {key: complete[key] for key in expected} == expected
    assert complete["lambda_2"] == pytest.approx(0, abs=1e-12)
    assert complete["lambda_n"] == pytest.approx(0, abs=1e-12)
    assert complete["gap"] == pytest.approx(1)
    for condition in complete["assumption_2"]:
        assert condition.keys() == {"condition", "holds", "detail"}
    # Agent j sends to j + 1, j + 2, j + 4.
    assert (exponential["directed"], exponential["edges"]) == (True, 18)
    assert exponential["remarks"], "the theorems do not cover it"


def test_the_number_of_agents(capsys: pytest.CaptureFixture[str]) -> None:
    done("graph", "grid:2x3", "--json")
    assert json.loads(capsys.readouterr().out)[0]["agents"] == 6
    refused(capsys, "how many agents has ring? Say it with -n, as in -n 5", "graph", "ring")
    refused(capsys, "at least one agent, got 0", "graph", "ring", "-n", "0")
    refused(capsys, "0", "graph", "torus:4x4", "-n", "0")
    refused(capsys, "at least one agent, got -3", "graph", "ring", "-n", "-3")
    refused(capsys, "torus", "graph", "torus:4x4", "-n", "15")


def test_graph_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "net.edges"
    path.write_text("0 1\n1 2\n")
    done("graph", f"file:{path}", "-n", "3", "--json")
    assert json.loads(capsys.readouterr().out)[0]["edges"] == 2
    path.write_text("0 1\n2 3\n")
    refused(capsys, "is not connected", "graph", f"file:{path}", "-n", "4")
    refused(capsys, "none.edges", "graph", f"file:{tmp_path}/none.edges", "-n", "4")


def test_graph_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "ring.png"
    done("graph", "ring", "-n", "5", "--json", "--png", str(out))
    assert out.read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 1, "stdout is JSON alone"
    assert captured.err == f"drawing: {out}\n"
    done("graph", "ring", "chain", "-n", "5", "--png", str(tmp_path / "two.png"))
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    assert parser.main(["graph", "ring", "-n", "5", "--png", "ring.doc"]) == 2
    assert "use .png, .pdf, .svg" in capsys.readouterr().err


def spread(value: float) -> dict[str, Any]:
    return {"mean": value, "std": 0.0, "agents": [value]}


def make_run(folder: Path) -> Path:
    """A run's folder with checkpoints of two agents and metrics."""
    write(folder, 1, 10, 20, size=2)
    lines = [
        {
            "step": step,
            "epoch": step / 10,
            **{key: spread(0.5) for key in ("train_loss", "test_loss", "test_accuracy")},
            "averaged_model": {"test_loss": 0.5, "test_accuracy": 0.5},
            "consensus": {"max": 0.1, "rms": 0.1},
            "time_s": 1.5,
            "bytes_sent": 1000,
        }
        for step in (10, 20)
    ]
    (folder / "metrics.g0001.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    done("plot", str(run))
    assert capsys.readouterr().out == f"plot: {run}/metrics.png\n"
    assert (run / "metrics.png").read_bytes().startswith(b"\x89PNG")
    before = sorted(os.listdir(run))
    other = make_run(tmp_path / "other")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    done("plot", str(run), str(other))
    assert capsys.readouterr().out == "plot: metrics.png\n"
    assert os.listdir(here) == ["metrics.png"], "a figure of two belongs to neither"
    assert sorted(os.listdir(run)) == before
    assert "metrics.png" not in os.listdir(other)
    done("plot", str(run), str(run), "--out", str(tmp_path / "both.svg"))
    assert (tmp_path / "both.svg").exists()
    refused(capsys, "there are no metrics at", "plot", str(tmp_path / "none"))


def test_compare(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    lines = [json.loads(text) for text in (two / "metrics.g0001.jsonl").read_text().splitlines()]
    lines[-1]["centre"] = {"test_loss": 0.1, "test_accuracy": 0.8765}
    lines[-1]["test_accuracy"] = {"mean": 0.75, "std": 0.05, "agents": [0.7, 0.8]}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (two / "metrics.g0001.jsonl").write_text(text)
    done("compare", str(one), str(two))
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["one", "1", "2"]
    assert second.split()[:3] == ["two", "2", "2"]
    assert "0.7500  0.7000" in second
    assert "0.8765" in second
    assert "0.8765" not in first
    done("compare", str(two), "--json")
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["mean"], row["lowest"], row["centre"]) == (0.75, 0.7, 0.8765)
    refused(capsys, "there are no metrics at", "compare", str(tmp_path / "none"))
    caplog.clear()
    (tmp_path / "begun").mkdir()
    done("compare", str(tmp_path / "begun"), str(two), "--json")
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert f"left out: there are no metrics at {tmp_path / 'begun'}" in caplog.text


def test_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    done("inspect", str(run), "--json")
    newest, older = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [newest["step"], older["step"]] == [20, 10]
    assert newest["intact"]
    path = run / "checkpoints" / "step-00000020" / "rank-0001.g0001.h5"
    path.write_bytes(path.read_bytes()[:-1])
    assert parser.main(["inspect", str(run)]) == 1
    text = capsys.readouterr().out
    assert "step-00000020: step 20, generation 1, 2 agents," in text
    assert "MB, NOT INTACT\n" in text
    assert "  rank-0001.g0001.h5: has" in text
    assert f"  consensus distance: max {older['consensus']['max']:.6e}" in text
    refused(capsys, "holds no checkpoint", "inspect", str(tmp_path / "none"))


def test_inspect_what_has_no_manifest_or_a_damaged_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What was left half, or is being written, is no damage; in its place among the others."""
    run = make_run(tmp_path / "run")
    half = run / "checkpoints" / "step-00000015"
    half.mkdir()
    done("inspect", str(run))
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if ": step " in line]
    assert [line.split(": ")[1].split(",")[0] for line in told] == ["step 20", "step 15", "step 10"]
    assert told[1] == f"{half}: step 15, not finished"
    manifest = run / "checkpoints" / "step-00000010" / "manifest.g0001.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert parser.main(["inspect", str(run)]) == 1
    assert f"{manifest.parent}: step 10, generation 1, NOT INTACT\n" in capsys.readouterr().out
    assert parser.main(["inspect", str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(one["step"], one["finished"], one["intact"]) for one in found] == [
        (20, True, True), (15, False, False), (10, True, False)
    ]  # fmt: skip


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    done("info", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["mpicdsgd"] == mpicdsgd.__version__
    assert report["kernel"] in ("compiled", "numpy", "reference")
    assert report["ranks"] >= 1
    done("info")
    assert f"torch          {report['torch']}\n" in capsys.readouterr().out


def test_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    usage(capsys, "COMMAND")
    usage(capsys, "invalid choice: 'trian'", "trian")
    usage(capsys, "RUN.toml", "train")
    usage(capsys, "unrecognized arguments: --fast", "train", "r.toml", "--fast")
    usage(capsys, "unrecognized arguments: extra", "inspect", "run", "extra")
    usage(capsys, "invalid int value: 'x'", "train", "r.toml", "--agents", "x")


class Started(Exception):
    """In place of another program."""


@pytest.mark.parametrize(
    "words",
    [
        ["r.toml", "optim.lr=0.1", "run.seed=2", "--agents", "3"],
        ["--agents", "3", "r.toml", "optim.lr=0.1", "run.seed=2"],
        ["r.toml", "--agents", "3", "optim.lr=0.1", "run.seed=2"],
        ["r.toml", "optim.lr=0.1", "--agents", "3", "run.seed=2"],
    ],
)
def test_train_with_agents_starts_mpiexec(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def execv(path: str, command: list[str]) -> NoReturn:
        assert command[0] == path
        assert command[1:3] == ["-n", "3"]
        train = [sys.executable, "-m", "mpicdsgd", "train", "r.toml", "optim.lr=0.1", "run.seed=2"]
        assert command[-len(train) :] == train
        raise Started

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Started):
        parser.main(["train", *words])


def test_train_with_agents_where_it_cannot(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused(capsys, "--agents must be at least 1, got 0", "train", "r.toml", "--agents", "0")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(capsys, "no mpiexec beside this Python", "train", "r.toml", "--agents", "2")
    for name in launch._SET_BY_LAUNCHERS:
        assert not launch.inside_job()
        monkeypatch.setenv(name, "0")
        assert launch.inside_job()
        monkeypatch.delenv(name)


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mpi4py", "torch"):
            raise ImportError(f"{name} must not be loaded")
sys.meta_path.insert(0, Refuse())
from mpicdsgd import cli
for words in (
    ["graph", "ring", "-n", "4", "--png", "g.png"],
    ["plot", "run"],
    ["compare", "run"],
    ["inspect", "run"],
    ["inspect", "run", "--json"],
):
    assert cli.main(words) == 0, words
assert cli.main(["graph", "none", "-n", "4"]) == 2
"""


def test_login_node_commands_load_neither_mpi_nor_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    path = str(Path(mpicdsgd.__file__).parent.parent)
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "g.png").exists()
    assert (tmp_path / "run" / "metrics.png").exists()


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = str(Path(mpicdsgd.__file__).parent.parent)
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "mpicdsgd", "graph", "ring", "-n", "4"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_mistake_found_by_the_library_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: object) -> NoReturn:
        raise UserError("what was given: what to do")

    monkeypatch.setattr(graph_command, "graph", fail)
    refused(capsys, "mpicdsgd: what was given: what to do\n", "graph", "ring")

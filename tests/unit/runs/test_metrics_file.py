"""Metrics: every line strict JSON, a resumed run's file goes on where the checkpoint is."""

import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mpicdsgd.common.errors import UserError
from mpicdsgd.runs import metrics_file, provenance
from mpicdsgd.runs.metrics_file import Metrics


def steps(path: Path) -> list[int]:
    return [line["step"] for line in metrics_file.read(path)]


def test_lines_are_there_when_append_returns(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 1)
    metrics.append({"step": 10, "test_loss": {"mean": 0.5, "agents": [0.4, 0.6]}})
    assert metrics_file.read(tmp_path) == [
        {"step": 10, "test_loss": {"mean": 0.5, "agents": [0.4, 0.6]}}
    ]
    assert os.readlink(tmp_path / "metrics.jsonl") == "metrics.g0001.jsonl"
    metrics.close()
    metrics.close()


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 1)
    metrics.append({"step": 1, "a": math.nan, "b": [math.inf, -math.inf], "c": "NaNs"})
    metrics.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (line,) = metrics_file.read(tmp_path)
    assert math.isnan(line["a"])
    assert line["b"] == [math.inf, -math.inf]
    assert line["c"] == "NaNs"


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 1, enabled=False)
    metrics.append({"step": 1})
    metrics.close()
    assert os.listdir(tmp_path) == []


def test_resume_cuts_back_and_drops_a_half_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Metrics(tmp_path, 1)
    for step in (10, 20, 30, 40):
        first.append({"step": step, "loss": step / 7})
    first.close()
    before = (tmp_path / "metrics.g0001.jsonl").read_bytes()
    with open(tmp_path / "metrics.g0001.jsonl", "ab") as file:
        file.write(b'{"step": 25, "lo')
    with caplog.at_level(logging.WARNING, "mpicdsgd"):
        second = Metrics(tmp_path, 2, resume_step=30)
    assert "1 damaged or half line" in caplog.text
    kept = (tmp_path / "metrics.g0002.jsonl").read_bytes()
    assert kept == b"".join(before.splitlines(keepends=True)[:3])
    second.append({"step": 40})
    second.close()
    assert steps(tmp_path) == [10, 20, 30, 40]
    assert os.readlink(tmp_path / "metrics.jsonl") == "metrics.g0002.jsonl"
    assert (tmp_path / "metrics.g0001.jsonl").read_bytes().startswith(before), "not touched"


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 1)
    first.append({"step": 10})
    first.close()
    Metrics(tmp_path, 2).close()
    assert steps(tmp_path) == []


def test_resume_takes_the_checkpoints_own_generation(tmp_path: Path) -> None:
    for generation, values in ((1, (10, 20)), (2, (10,))):
        metrics = Metrics(tmp_path, generation)
        for step in values:
            metrics.append({"step": step, "by": generation})
        metrics.close()
    Metrics(tmp_path, 3, resume_step=20, resume_generation=1).close()
    assert steps(tmp_path) == [10, 20]
    Metrics(tmp_path, 4, resume_step=10).close()
    assert [line["by"] for line in metrics_file.read(tmp_path)] == [1]


@pytest.mark.parametrize("size_bytes", range(0, 60, 7))
def test_a_file_cut_anywhere_is_read(tmp_path: Path, size_bytes: int) -> None:
    metrics = Metrics(tmp_path, 1)
    for step in (1, 2, 3):
        metrics.append({"step": step, "x": 0})
    metrics.close()
    path = tmp_path / "metrics.g0001.jsonl"
    length = path.stat().st_size // 3
    os.truncate(path, size_bytes)
    assert steps(path) == [1, 2, 3][: (size_bytes + 1) // length]


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b"\xff\xfe", b"[]", b'{"step": true}', b'{"x": 1}', b"9" * 5000]
)
def test_strange_lines_are_left_out(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    assert steps(path) == [1, 2]


def test_no_metrics(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "none", tmp_path / "fifo"):
        with pytest.raises(UserError, match="no metrics"):
            metrics_file.read(path)


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Metrics(tmp_path / "file", 1)


def test_a_full_disk_costs_no_line_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, 1)
    metrics.append({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        metrics.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'
    metrics.append({"step": 3})
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_a_file_that_somebody_removes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its lines are still there to be written again, and the next ones are not written nowhere."""
    run = tmp_path / "run"
    run.mkdir()
    metrics = Metrics(run, 1)
    metrics.append({"step": 1})
    shutil.rmtree(run)
    metrics.append({"step": 2})
    metrics.append({"step": 3})
    metrics.close()
    assert steps(run) == [1, 2, 3]
    assert (run / "metrics.jsonl").is_symlink()
    assert caplog.text.count("was removed while the run goes on: it is written anew") == 1


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"mpicdsgd\[tensorboard\]"):
        Metrics(tmp_path, 1, tensorboard=True)


def test_tensorboard_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            assert log_dir == str(tmp_path / "tensorboard" / "g0001")

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            seen.append((tag, value, step))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = Metrics(tmp_path, 1, tensorboard=True)
    accuracy = {"mean": 0.9, "std": 0.1, "agents": [0.8, 1.0]}
    consensus = {"max": math.inf, "rms": 1.0}
    metrics.append({"step": 5, "lr": 0.1, "test_accuracy": accuracy, "consensus": consensus})
    metrics.close()
    assert seen == [
        ("accuracy/test", 0.9, 5),
        ("accuracy/test_std_over_agents", 0.1, 5),
        ("consensus/max", math.inf, 5),
        ("consensus/rms", 1.0, 5),
        ("run/lr", 0.1, 5),
    ]


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = provenance.versions(mpi_library="MPICH Version: 5\nABI: 1\0", kernel="numpy")
    assert found["mpi"] == "MPICH Version: 5 ABI: 1"
    assert found["kernel"] == "numpy"
    assert {"python", "mpicdsgd", "torch", "numpy", "mpi4py", "h5py"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


def test_commit_only_of_our_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "mpicdsgd" / "runs"
    package.mkdir(parents=True)
    (package / "provenance.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": "/dev/null"}
    identity |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}

    def checkout(folder: Path) -> None:
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
            subprocess.run(["git", *words], cwd=folder, check=True, env={**os.environ, **identity})

    checkout(tmp_path)
    assert "commit" not in provenance.versions(), "the user's checkout is not ours"
    checkout(tmp_path / "site")
    commit = provenance.versions()["commit"]
    assert len(commit) == 40
    (package / "provenance.py").write_text("changed")
    assert provenance.versions()["commit"] == commit + "-dirty"

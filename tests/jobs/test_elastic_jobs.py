"""Five agents, then three, then eight: whole jobs that go on from the accuracy they had."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job import Ended

pytestmark = pytest.mark.slow

DATA = os.environ.get("MPICDSGD_DATA", "")
MNIST = [
    "data.name=mnist",
    f"data.path={DATA}/mnist",
    "data.limit=6000",
    "model.name=mlp",
    "data.batch_size=20",
]
DIGITS = ["data.name=digits", "model.name=mlp", "data.batch_size=20", "optim.lr=0.05"]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_five_three_eight(run: Callable[..., Ended], tmp_path: Path) -> None:
    """On MNIST, where MPICDSGD_DATA names a folder with it."""
    data = MNIST if DATA and Path(DATA, "mnist").is_dir() else DIGITS
    (tmp_path / "r.toml").write_text('run = {dir = "run"}\nresume = {elastic = true}\n')

    def train(agents: int, epochs: int) -> str:
        command = ("-m", "mpicdsgd", "train", "r.toml", *data, f"run.epochs={epochs}")
        ended = run(agents, *command, timeout_s=300)
        assert ended.code == 0, ended.err
        return ended.err

    train(5, 4)
    said = train(3, 6)
    assert "3 agents instead of 5 on graph ring" in said
    assert "agents 3 to 4 and their momentum are left behind" in said
    said = train(8, 8)
    assert "8 agents instead of 3" in said
    found = lines(tmp_path / "run")
    assert [line["epoch"] for line in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [len(line["test_accuracy"]["agents"]) for line in found] == [5] * 4 + [3] * 2 + [8] * 2
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    accuracy = [line["test_accuracy"]["mean"] for line in found]
    assert accuracy[3] > 0.8, "it has learned something before"
    for before, after in ((3, 4), (5, 6)):
        assert accuracy[after] > accuracy[before] - 0.03, accuracy
    for key in ("time_s", "bytes_sent"):
        assert all(line[key] > 0 for line in found)

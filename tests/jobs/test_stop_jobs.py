"""A job that is told to stop from outside: exit code 80, a line that says why, the same result."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job import Job
from samerun import same_run

pytestmark = pytest.mark.slow

CONFIG = """
[run]
epochs = {epochs}
evaluate_every = "7 steps"
checkpoint_every = "5 steps"
[agents]
topology = "ring"
[model]
name = "victim:model"
loss = "victim:loss"
[data]
name = "victim:data"
batch_size = 30
workers = {workers}
[optim]
lr = 0.02
"""

Start = Callable[..., Job]


def train(start: Start, ranks: int, run_dir: str, *overrides: str, **plan: Any) -> Job:
    command = ("-m", "mpicdsgd", "train", "r.toml", f"run.dir={run_dir}", *overrides)
    return start(ranks, *command, VICTIM=json.dumps(plan))


def until_it_trains(job: Job, run_dir: Path) -> None:
    deadline = time.monotonic() + 100
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
        assert job.running, job.wait().err
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)


def stopped(job: Job, run_dir: Path) -> dict[str, Any]:
    """It ended as it should; what its marker says."""
    ended = job.wait()
    assert ended.code == 80, ended.err
    found: dict[str, Any] = json.loads((run_dir / "requeue.json").read_text())
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert len(ended.lines(f"stopped after step {found['step']} ({found['reason']}): ")) == 1
    return found


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_for_the_launcher(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    """It hands it on. Twice: an impatient batch system must not end the checkpoint's write."""
    (tmp_path / "r.toml").write_text(CONFIG.format(epochs=100000, workers=0))
    job = train(start, 2, "stopped")
    until_it_trains(job, tmp_path / "stopped")
    for _ in range(2):
        os.kill(job.pid, number)
        time.sleep(0.1)
    found = stopped(job, tmp_path / "stopped")
    assert found["reason"].startswith(f"{number.name.removeprefix('SIG')} on rank")


def test_the_result_is_the_same(start: Start, tmp_path: Path) -> None:
    """One rank of four is told by TERM, within a checkpoint's write, and the data's workers too."""
    (tmp_path / "r.toml").write_text(CONFIG.format(epochs=3, workers=1))
    assert train(start, 4, "whole").wait().code == 0
    plan = {"rank": 2, "write": ".rank-0002.*.tmp", "nth": 3, "signal": "SIGTERM"}
    found = stopped(train(start, 4, "stopped", **plan), tmp_path / "stopped")
    assert found["reason"] == "TERM on rank 2"
    again = train(start, 4, "stopped").wait()
    assert again.code == 0, again.err
    assert f"going on from step {found['step']}" in again.err
    assert not (tmp_path / "stopped" / "requeue.json").exists()
    same_run(tmp_path / "whole", tmp_path / "stopped", 4)


def test_a_servers_job(start: Start, tmp_path: Path) -> None:
    """All ranks leave with code 80, the server's too; it alone got the signal."""
    (tmp_path / "r.toml").write_text(CONFIG.format(epochs=100000, workers=0))
    overrides = ("optim.name=downpour",)
    job = train(start, 3, "stopped", *overrides)
    until_it_trains(job, tmp_path / "stopped")
    os.kill(job.ranks()[-1], signal.SIGUSR1)
    found = stopped(job, tmp_path / "stopped")
    assert found["reason"] == "USR1 on rank 2, the server, told on rank 0"


def test_max_seconds(start: Start, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(CONFIG.format(epochs=100000, workers=0))
    found = stopped(train(start, 2, "stopped", "run.max_seconds=20"), tmp_path / "stopped")
    assert found["reason"].startswith("run.max_seconds = 20 on rank")
    assert found["step"] > 0


def test_a_rank_that_stalls(start: Start, tmp_path: Path) -> None:
    """Each of those that wait for it says so in one line; nothing is lost, and the job is over."""
    (tmp_path / "r.toml").write_text(CONFIG.format(epochs=3, workers=0))
    plan = {"rank": 1, "step": 12, "signal": "SIGSTOP"}  # the checkpoint of step 10 waited for 5's
    ended = train(start, 3, "stalled", "exchange.timeout_s=2", **plan).wait()
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    said = ended.lines("mpicdsgd: rank ")
    assert sorted(line.split()[2] for line in said) == ["0:", "2:"], ended.err
    for line in said:
        assert "waited 2 s after step" in line
        assert "agents [1]" in line
        assert line.endswith("; the same command goes on from the newest checkpoint")
    again = train(start, 3, "stalled").wait()
    assert again.code == 0, again.err
    assert "going on from step 5" in again.err

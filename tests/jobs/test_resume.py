"""``kill -9`` of all ranks, then the same command again: as if nothing had happened, bit by bit."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job import Job
from samerun import checkpoints, metrics, same_run, same_trace

pytestmark = pytest.mark.slow

Start = Callable[..., Job]
Plan = dict[str, Any]

# Steps of a checkpoint and of an evaluation interleave, both fall within epochs, and step 35 is of
# both: the metrics line is written, then the checkpoint.
CONFIG = """
[run]
epochs = {epochs}
evaluate_every = "7 steps"
checkpoint_every = "5 steps"
keep = 2
theory = true
[agents]
topology = "ring"
[model]
name = "{model}"
loss = "victim:loss"
buffers = "mixed"
[data]
name = "victim:data"
batch_size = {batch}
[optim]
lr = 0.02
schedule = "cosine"
"""


def train(start: Start, folder: Path, ranks: int, run_dir: str, plan: Plan | None) -> Job:
    (folder / "halted").unlink(missing_ok=True)
    command = ("-m", "mpicdsgd", "train", "r.toml", f"run.dir={run_dir}")
    # Without a launcher there is one rank.
    return start(ranks if ranks > 1 else 0, *command, VICTIM=json.dumps(plan or {}))


def kill_there(start: Start, folder: Path, ranks: int, plan: Plan) -> None:
    """Start the run, and kill all its ranks where ``plan`` says."""
    job = train(start, folder, ranks, "killed", plan)
    deadline = time.monotonic() + 100
    while not (folder / "halted").exists():
        assert job.running, job.wait().err
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.002)
    if plan.get("run_on"):
        time.sleep(random.uniform(0, 0.2))  # the moment is to be any
    job.kill()
    out, _ = job.output()
    assert out == "", "it was killed before its end"


def test_one_rank(start: Start, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(CONFIG.format(epochs=3, model="cnn", batch=120))
    whole = train(start, tmp_path, 1, "whole", None).wait()
    assert whole.code == 0, whole.err
    killed = tmp_path / "killed"

    kill_there(start, tmp_path, 1, {"rank": 0, "write": ".rank-0000.*.tmp", "nth": 8})
    assert len(list(killed.glob("checkpoints/*/.rank-0000.g0001.h5.tmp"))) == 1, "half a file"
    # On from step 5; all but the name of the sixth manifest is there, and the metrics line.
    kill_there(start, tmp_path, 1, {"rank": 0, "rename": "manifest.g0002.json", "nth": 6})
    assert metrics(killed)[-1]["step"] >= 35, "training went on beside the writer"
    assert checkpoints(killed)[-1].parent.name == "step-00000030"
    kill_there(start, tmp_path, 1, {"rank": 0, "step": random.randint(1, 4), "run_on": True})
    again = train(start, tmp_path, 1, "killed", None).wait()
    assert again.code == 0, again.err
    assert "going on from step" in again.err
    same_run(tmp_path / "whole", tmp_path / "killed", 1)
    same_trace(tmp_path / "whole", tmp_path / "killed")


def test_four_ranks(start: Start, tmp_path: Path) -> None:
    config = CONFIG.format(epochs=3, model="victim:model", batch=30)
    (tmp_path / "r.toml").write_text(config)
    whole = train(start, tmp_path, 4, "whole", None).wait()
    assert whole.code == 0, whole.err

    # The second checkpoint: three ranks have written their files, one has not.
    kill_there(start, tmp_path, 4, {"rank": 2, "rename": "rank-0002.*.h5", "nth": 2})
    kill_there(start, tmp_path, 4, {"rank": 1, "step": random.randint(2, 20), "run_on": True})
    again = train(start, tmp_path, 4, "killed", None).wait()
    assert again.code == 0, again.err
    assert "going on from step" in again.err
    same_run(tmp_path / "whole", tmp_path / "killed", 4)
    same_trace(tmp_path / "whole", tmp_path / "killed")

"""However a rank ends, the job ends: the cause on stderr, the exit code right, nobody waiting.

Each job's timeout lies far above what it needs; the exchange's own is given where it matters.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from job import HERE, Ended, Job

pytestmark = pytest.mark.slow

Run = Callable[..., Ended]


def user(run: Run, variant: str, ranks: int = 2) -> Ended:
    return run(ranks, str(HERE / "user.py"), variant, timeout_s=60)


@pytest.mark.parametrize(
    ("variant", "ranks"),
    [
        ("plain", 3),
        ("in_with", 2),
        ("in_finally", 2),
        ("interrupted", 2),
        ("before_agents", 2),
        ("second", 2),
        ("after_close", 2),
    ],
)
def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(
    run: Run, tmp_path: Path, variant: str, ranks: int
) -> None:
    job = user(run, variant, ranks)
    assert job.code == 1, job.err
    failed = 0 if variant == "after_close" else 1
    assert f"[rank {failed}] uncaught exception, ending the job:" in job.err
    kind = "KeyboardInterrupt" if variant == "interrupted" else "RuntimeError: the user's own"
    assert kind in job.err
    assert f"in {variant}" in job.err or variant == "before_agents", "the traceback"
    ended = tmp_path / "end-of-0"
    assert not ended.exists()
    assert not (tmp_path / "end-of-1").exists()


@pytest.mark.parametrize(("variant", "ranks"), [("exit_0", 3), ("exit_3", 2), ("shorter", 2)])
def test_a_rank_that_leaves_is_named_by_the_others(
    run: Run, tmp_path: Path, variant: str, ranks: int
) -> None:
    job = user(run, variant, ranks)
    assert job.code not in (0, 2), job.err
    assert "AgentLeft: agent 1 left after step" in job.err
    assert not (tmp_path / "end-of-0").exists()


def test_a_rank_that_only_waits_is_named_after_the_timeout(run: Run) -> None:
    job = user(run, "sleeps")
    assert job.code == 1
    # Whether the sleeper still took in what was on its way when it fell asleep is up to MPI.
    waited = r"AgentMissing: agent 0 waited 3 s after step [34]: "
    named = r"(nothing came from agents \[1\]|agents \[1\] do not receive)"
    assert re.search(waited + named, job.err), job.err


def test_a_rank_that_vanishes_ends_the_job(run: Run, tmp_path: Path) -> None:
    job = user(run, "os_exit")
    assert job.code != 0
    assert not (tmp_path / "end-of-0").exists()


def test_a_fault_in_the_last_step_is_told_at_exit(run: Run) -> None:
    job = user(run, "ruined_at_the_end")
    assert job.code == 1, job.err
    assert "at exit: agent 1, step 4: parameters became NaN or infinite" in job.err


def test_ctrl_c_is_one_line(start: Callable[..., Job], tmp_path: Path) -> None:
    config = tmp_path / "long.toml"
    config.write_text('[data]\nname = "digits"\n[model]\nname = "mlp"\n[run]\nepochs = 100000\n')
    job = start(2, "-m", "mpicdsgd", "train", str(config))
    metrics = tmp_path / "runs" / "long" / "metrics.jsonl"
    while job.running and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    job.interrupt()
    ended = job.wait()
    assert ended.code != 0
    assert "Traceback" not in ended.err
    assert len(ended.lines("mpicdsgd: interrupted; the same command goes on")) == 1


def test_a_normal_end_without_close(run: Run, tmp_path: Path) -> None:
    job = user(run, "normal")
    assert (job.code, job.err) == (0, "")
    assert job.out.count("at its end") == 2, "the launcher may mix the lines"


TRAIN = """
[run]
dir = "runs/r"
epochs = 2
[data]
name = "user:data"
batch_size = 4
[model]
name = "user:model"
loss = "user:loss"
[agents]
topology = "ring"
"""


def train(run: Run, folder: Path, ranks: int, *overrides: str, **environment: str) -> Ended:
    (folder / "r.toml").write_text(TRAIN)
    command = ("-m", "mpicdsgd", "train", "r.toml", *overrides)
    return run(ranks, *command, timeout_s=60, **environment)


def test_training_ends_when_the_loss_function_raises_on_one_rank(run: Run, tmp_path: Path) -> None:
    job = train(run, tmp_path, 2, FAILS="loss")
    assert job.code == 1
    assert "[rank 1] uncaught exception, ending the job:" in job.err
    assert "RuntimeError: the user's own mistake" in job.err
    assert "in loss" in job.err
    assert job.err.count("Traceback") == 1, "the others say nothing"


def test_training_ends_when_a_dataset_item_is_bad_on_one_rank(run: Run, tmp_path: Path) -> None:
    job = train(run, tmp_path, 2, FAILS="item")
    assert job.code == 2
    assert "Traceback" not in job.err
    assert len(job.lines("mpicdsgd: rank 1: the dataset's items must be pairs")) == 1


def test_a_users_mistake_is_one_line_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    job = train(run, tmp_path, 2, "optim.momentun=0.9")
    expected = "mpicdsgd: unknown config key optim.momentun: did you mean optim.momentum?\n"
    assert (job.code, job.out, job.err) == (2, "", expected)
    assert not (tmp_path / "runs").exists()


def test_train_starts_its_own_ranks(run: Run, tmp_path: Path) -> None:
    job = train(run, tmp_path, 0, "--agents", "2", "run.epochs=1")
    assert job.code == 0, job.err
    assert job.out.startswith("2 agents on ring: mean test loss")
    assert job.out.endswith("everything is in runs/r\n")
    assert job.out.count("\n") == 1
    (line,) = (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    assert len(json.loads(line)["test_loss"]["agents"]) == 2

"""A run that is killed at any moment, again and again, and comes out as if nothing had happened.

    MPICDSGD_KILLS=100 python -m pytest tests/jobs/test_torture.py -s

makes 100 kills instead of 3 (8 with --full), and says what each was. A seeded generator chooses who
dies, and when: while the job starts, in a step, or inside a checkpoint's write, at a chosen place
or somewhat later. A writer that was halted there, and whose rank is gone, wakes up when the next
start is under way, and goes on with what it was writing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from job import Ended, Job
from samerun import same_run

from mpicdsgd.checkpoints import manifest

pytestmark = pytest.mark.slow

Start = Callable[..., Job]

KILLS = int(os.environ.get("MPICDSGD_KILLS", "0"))
SEED = 1
RANKS = 4
STEPS = 120  # of a run: 12 an epoch
PATIENCE_S = 120.0

CONFIG = """
[run]
epochs = 10
evaluate_every = "7 steps"
checkpoint_every = "3 steps"
keep = 2
[agents]
topology = "ring"
[model]
name = "victim:model"
loss = "victim:loss"
[data]
name = "victim:data"
batch_size = 30
[optim]
lr = 0.02
schedule = "cosine"
"""


@dataclass(frozen=True)
class Kill:
    """Who dies in a start of the run, and when.

    Args:
        plan: where some process halts, as `halting` has it; {}: nowhere.
        wait_s: from then on, or from the start, till the kill.
        whom: "rank", "ranks" (all, but not their writers), "all" (every process), or "writer":
            then training goes on, and after another ``wait_s`` ``then`` dies.
        rank: which one, or whose writer.
    """

    plan: dict[str, Any]
    wait_s: float
    whom: str
    rank: int
    then: str = ""

    @property
    def halts(self) -> bool:
        return bool(self.plan) and not self.plan.get("run_on")

    def __str__(self) -> str:
        place = ", ".join(f"{k} {v}" for k, v in self.plan.items()) or "at the start"
        dead = f"{self.whom} {self.rank}" if self.whom in ("rank", "writer") else self.whom
        return f"[{place}] + {self.wait_s:.2f} s: {dead}{self.then and ', then ' + self.then}"


def choose(chance: random.Random, start_s: float) -> Kill:
    """``start_s``: from the start to the first step."""
    rank, nth = chance.randrange(RANKS), chance.randint(1, 5)
    places: list[dict[str, Any]] = [
        {},
        {"rank": rank, "step": chance.randint(1, 15)},
        {"rank": rank, "step": chance.randint(1, 15), "run_on": True},
        {"rank": rank, "write": ".rank-*.tmp", "nth": nth},
        {"rank": rank, "write": ".rank-*.tmp", "nth": nth, "run_on": True},
        {"rank": rank, "rename": "rank-*.h5", "nth": nth},
        {"rank": 0, "rename": "index.*.h5", "nth": nth},
        {"rank": 0, "rename": "manifest.*.json", "nth": nth},
        {"rank": 0, "rename": "manifest.*.json", "nth": nth, "run_on": True},
    ]
    plan = chance.choice(places)
    if not plan:
        return Kill(plan, chance.uniform(0, start_s), chance.choice(["rank", "ranks", "all"]), rank)
    whom = chance.choice(["rank", "ranks", "all", "writer"])
    then = chance.choice(["rank", "ranks", "all"]) if whom == "writer" else ""
    if whom == "writer" and "step" not in plan:
        rank = plan["rank"]  # the one that halts
    return Kill(plan, chance.uniform(0, 0.3), whom, rank, then)


def train(start: Start, folder: Path, run_dir: str, *more: str, plan: dict[str, Any]) -> Job:
    (folder / "halted").unlink(missing_ok=True)  # who still sleeps there wakes up
    command = ("-m", "mpicdsgd", "train", "r.toml", f"run.dir={run_dir}", *more)
    return start(RANKS, *command, VICTIM=json.dumps(plan))


def until_halted(job: Job, folder: Path) -> bool:
    """False where the job has ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (folder / "halted").exists():
        if not job.running:
            return False
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.002)
    return True


def strike(job: Job, whom: str, rank: int) -> int:
    """``kill -9``; how many processes were hit."""
    ranks = job.ranks()
    if whom == "all" or (len(ranks) < RANKS and whom != "writer"):
        job.kill()
        return 1
    victims = {"rank": ranks[rank : rank + 1], "ranks": ranks}.get(whom)
    if victims is None:
        victims = [pid for of, pid in job.writers().items() if of == rank]
    hit = 0
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            hit += 1
    return hit


def live(start: Start, folder: Path, run_dir: str, kill: Kill | None) -> tuple[int, Ended]:
    """A start of the run, killed as ``kill`` says; how many kills hit, and how it ended."""
    job = train(start, folder, run_dir, plan=kill.plan if kill else {})
    hits = 0
    family: set[int] = set()
    if kill and (not kill.plan or until_halted(job, folder)):
        for whom in filter(None, (kill.whom, kill.then)):
            time.sleep(kill.wait_s)
            family |= set(job.family())
            if job.running:
                hits += min(strike(job, whom, kill.rank), 1)
    ended = job.wait(PATIENCE_S + 60)
    sleeper = (folder / "halted").read_text() if kill and kill.halts and hits else ""
    nobody_left(family - {int(sleeper or 0)})
    if hits == 0:
        assert ended.code == 0, ended.err
    return hits, ended


def nobody_left(family: set[int]) -> None:
    """Ranks and writers end by themselves where another rank dies."""
    deadline = time.monotonic() + 60
    for pid in family:
        while words := _words(pid):
            assert time.monotonic() < deadline, words
            time.sleep(0.01)


def _words(pid: int) -> bytes:
    """A process's command line; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def completed(run_dir: Path) -> int:
    """The step of the newest checkpoint, whose every file is whole; 0 if there is none."""
    found = manifest.places(run_dir)
    if not found:
        return 0
    listed = manifest.read_manifest(found[0])
    assert [e for e in listed.files if manifest.check_file(found[0].folder, e)] == []
    assert found[0].step == max(place.step for place in found)
    return found[0].step


def gone_on_from(ended: Ended) -> int | None:
    """The step that a start said to go on from."""
    said = re.search(r"going on from step (\d+) ", ended.err)
    return int(said[1]) if said else None


@pytest.mark.usefixtures("real_starts")
@pytest.mark.timeout(800 + 60 * KILLS)
def test_killed_again_and_again(start: Start, tmp_path: Path, full: bool) -> None:
    """No restart fails, none loses a completed checkpoint, and the result is the same."""
    (tmp_path / "r.toml").write_text(CONFIG)
    began = time.monotonic()
    job = train(start, tmp_path, "whole", plan={"rank": 0, "step": 1, "run_on": True})
    assert until_halted(job, tmp_path), job.wait().err
    start_s = time.monotonic() - began
    whole = job.wait(PATIENCE_S + 60)
    assert whole.code == 0, whole.err

    chance = random.Random(SEED)
    wanted = KILLS or (8 if full else 3)
    kills, starts, runs = 0, 0, 0
    while kills < wanted:
        runs += 1
        run_dir = tmp_path / f"killed-{runs}"
        there = 0
        while there < STEPS:
            kill = choose(chance, start_s) if kills < wanted else None
            hits, ended = live(start, tmp_path, run_dir.name, kill)
            step = gone_on_from(ended)
            print(f"{run_dir.name}, start {starts}: {there} there, on from {step}; {kill}: "
                  f"{hits} hit, code {ended.code}")  # fmt: skip
            starts, kills = starts + 1, kills + hits
            if step is None:
                assert there == 0 or (kill and not kill.plan), ended.err
            else:
                assert step >= there, ended.err
            assert "is not intact" not in ended.err
            there = completed(run_dir)
            # Who has come to the end has its last checkpoint, but for one whose writer died.
            assert ended.code != 0 or there == STEPS or (kill and kill.whom == "writer"), ended.err
        same_run(tmp_path / "whole", run_dir, RANKS)
    (tmp_path / "halted").unlink(missing_ok=True)
    print(f"{kills} kills, {starts} starts, {runs} runs, {time.monotonic() - began:.0f} s")

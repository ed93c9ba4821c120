"""Checkpoints: written, read, kept, pruned; a write that fails or is killed costs nothing.

By the protocol that runs use, with agents that are threads, and write in them;
``tests/mpi/checkpoints`` does it over MPI and with the writers' processes.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from team import Rank, Team, files, folder, listing, read, snapshot, write

from mpicdsgd.checkpoints import rank_file, reading
from mpicdsgd.checkpoints.snapshot import Problem, say
from mpicdsgd.common.errors import UserError


@pytest.mark.parametrize("size", [1, 3])
def test_round_trip(tmp_path: Path, size: int) -> None:
    assert read(tmp_path, size) is None
    assert write(tmp_path, 1, 5, size=size) == [[folder(tmp_path, 5)]] * size
    assert listing(tmp_path) == {"step-00000005": sorted(files(1, size))}
    assert read(tmp_path, size) == 5


def test_index_shows_all_agents_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, 5, size=3)
    moved = tmp_path / "moved"
    folder(tmp_path, 5).rename(moved)
    monkeypatch.chdir("/")
    with h5py.File(moved / "index.g0001.h5") as index:
        assert "sampler" not in index["arrays"], "not alike on all agents"
        for name in snapshot(5, 0).arrays.keys() - {"sampler"}:
            expected = np.stack([snapshot(5, rank).arrays[name] for rank in range(3)])
            assert np.array_equal(index["arrays"][name][()], expected), name


def test_newest_is_by_generation_then_step(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, 100)
    write(tmp_path, 2, 7, 6)
    assert read(tmp_path) == 7
    write(tmp_path, 1, 200)  # a zombie of the first generation
    assert read(tmp_path) == 7


def test_generations_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    before = {p: p.read_bytes() for p in folder(tmp_path, 5).iterdir()}
    write(tmp_path, 2, 5)
    assert listing(tmp_path) == {"step-00000005": sorted(files(1) + files(2))}
    assert all(path.read_bytes() == data for path, data in before.items())
    (folder(tmp_path, 5) / files(2)[0]).unlink()
    assert read(tmp_path) == 5


def test_a_step_written_already_is_not_written_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    before = {p: p.stat().st_mtime_ns for p in folder(tmp_path, 5).iterdir()}
    assert write(tmp_path, 1, 5) == [[folder(tmp_path, 5)]] * 2
    assert before == {p: p.stat().st_mtime_ns for p in folder(tmp_path, 5).iterdir()}


def test_keep_counts_intact_ones_only(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20, 30)
    os.truncate(folder(tmp_path, 30) / "rank-0001.g0001.h5", 100)
    write(tmp_path, 2, 40, keep=2)
    assert list(listing(tmp_path)) == ["step-00000020", "step-00000030", "step-00000040"]
    write(tmp_path, 2, 50, 60, keep=2)
    assert list(listing(tmp_path)) == ["step-00000050", "step-00000060"]
    assert read(tmp_path) == 60


def test_keep_every(tmp_path: Path) -> None:
    """The newest two, and those whose step 100 divides, once each."""
    write(tmp_path, 1, 90, 100, 150, keep=2, every=100)
    write(tmp_path, 2, 100, 200, 210, 220, 230, keep=2, every=100)
    kept = listing(tmp_path)
    assert list(kept) == ["step-00000100", "step-00000200", "step-00000220", "step-00000230"]
    assert kept["step-00000100"] == sorted(files(2)), "of the newest generation alone"


def test_prune_removes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    unlink = Path.unlink

    def spy(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        unlink(path, missing_ok)

    write(tmp_path, 1, 10)
    monkeypatch.setattr(Path, "unlink", spy)
    write(tmp_path, 1, 20, keep=1)
    assert removed[0] == "manifest.g0001.json"
    assert sorted(removed) == sorted(files(1))


def test_prune_leaves_newer_generations_and_strangers(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    write(tmp_path, 3, 20)
    (folder(tmp_path, 10) / "notes.txt").touch()
    write(tmp_path, 2, 30, keep=1)
    expected = {"step-00000010": ["notes.txt"], "step-00000020": sorted(files(3))}
    assert listing(tmp_path) == {**expected, "step-00000030": sorted(files(2))}
    (tmp_path / "generation-0004").touch()  # somebody newer may be reading now
    write(tmp_path, 3, 40, keep=1)
    assert listing(tmp_path).keys() == {*expected, "step-00000030", "step-00000040"}


def test_prune_clears_what_a_crash_left(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20)
    (folder(tmp_path, 20) / "manifest.g0001.json").unlink()
    (folder(tmp_path, 20) / ".rank-0000.g0001.h5.tmp").touch()
    assert read(tmp_path) == 10
    write(tmp_path, 2, 15)
    assert listing(tmp_path) == {
        "step-00000010": sorted(files(1)),
        "step-00000015": sorted(files(2)),
    }


@pytest.mark.parametrize("target", [0, 1, "index", "manifest"])
def test_a_write_that_fails_leaves_the_one_before(
    tmp_path: Path,
    target: int | str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, 1, 10, keep=1)
    before = listing(tmp_path)
    name = f"rank-{target:04d}" if isinstance(target, int) else target
    replace = os.replace

    def full(source: Any, destination: Any) -> None:
        if Path(destination).name.startswith(name):
            raise OSError(28, "No space left on device")
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert write(tmp_path, 1, 20, keep=1) == [[None], [None]]
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert f"rank {1 if target == 1 else 0}: No space left on device" in errors[0]
    assert "make room" in errors[0]
    assert listing(tmp_path) == before
    assert read(tmp_path) == 10
    write(tmp_path, 1, 20, keep=1)
    assert read(tmp_path) == 20


def test_a_disk_that_is_full_within_hdf5(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, 10)
    before = listing(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit_bytes in (0, 1000, 5000, 20_000, 120_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        try:
            assert write(tmp_path, 1, 20) == [[None], [None]], limit_bytes
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert listing(tmp_path) == before
    assert caplog.text.count("was not written") == 5
    write(tmp_path, 1, 20)
    assert read(tmp_path) == 20


def test_another_number_of_agents(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    with pytest.raises(UserError, match="2 agents, the job has 3 ranks"):
        read(tmp_path, size=3)


def test_expect_refuses_on_every_rank(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)

    def work(comm: Rank) -> str:
        def expect(shared: dict[str, Any]) -> None:
            assert shared == {"model": "m", "pi": "p"}
            if comm.rank == 1:
                raise UserError("another model")

        with pytest.raises(UserError) as caught:
            reading.read_newest(tmp_path, comm, expect)
        return str(caught.value)

    assert Team(2).run(work) == ["another model"] * 2


def test_nothing_but_an_unfinished_first_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    (folder(tmp_path, 10) / "manifest.g0001.json").unlink()
    assert read(tmp_path) is None


def test_names_and_dtypes_that_cannot_be_stored() -> None:
    a = np.zeros(1)
    for arrays in ({"a": a, "a/b": a}, {"a//b": a}, {"": a}, {"./a": a}, {"a": a.astype(object)}):
        with pytest.raises(AssertionError):
            rank_file.layout(arrays)


CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from team import Rank, Team, snapshot
from mpicdsgd.checkpoints import reading
from mpicdsgd.checkpoints.background_writer import Background
from mpicdsgd.checkpoints.snapshot import Keep
from mpicdsgd.runs import owner
run = Path(sys.argv[1])
generation = owner.claim(run).generation
comm = Rank(Team(1), 0)
newest = reading.read_newest(run, comm, lambda shared: None)
step = newest.step if newest else 0
print(step, flush=True)
writer = Background(run, generation, comm, Keep(2))
while True:
    step += 1
    writer.save(snapshot(step, 0))
    writer.finish()
    assert writer.step == step
    print(step, flush=True)
"""


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """Each incarnation is killed while it writes; none loses a checkpoint that was finished.

    With the process that writes for it, as where a node fails, and without: that one may have ended
    its job when the next incarnation has begun.
    """
    rng = random.Random(2)
    here = Path(__file__).resolve().parents[1]
    finished = 0
    for turn in range(6):
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(here), str(here.parents[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
            assert child.stdout is not None
            resumed = int(child.stdout.readline())
            assert resumed in (finished, finished + 1), "the last that was said, or one more"
            began = time.monotonic()
            said = [child.stdout.readline() for _ in range(rng.randrange(1, 4))]
            one_s = (time.monotonic() - began) / len(said)
            time.sleep(rng.random() * one_s)  # somewhere in the next one
            if turn % 2:
                child.send_signal(signal.SIGKILL)
            else:
                os.killpg(child.pid, signal.SIGKILL)
            said += child.stdout.read().split()
        finished = int(said[-1])
        step = read(tmp_path, size=1)
        assert (step or 0) in (finished, finished + 1)
        finished = step or 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_what_a_full_disk_needs_is_said(caplog: pytest.LogCaptureFixture, number: int) -> None:
    problems = [Problem(f"rank 0: {os.strerror(number)}", number), Problem("rank 1: the same")]
    say(30, problems, "", "there is none")
    text = f"step 30 was not written (rank 0: {os.strerror(number)}, and 1 more): there is none"
    assert text in caplog.text
    assert ("make room, or with a lower run.keep" in caplog.text) == (number != errno.EACCES)

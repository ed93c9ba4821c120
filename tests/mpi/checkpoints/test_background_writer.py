"""Checkpoints written while training goes on: whole, in order, and no rank alone with a failure."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicdsgd.checkpoints import background_writer, inspect, reading
from mpicdsgd.checkpoints.background_writer import Background
from mpicdsgd.checkpoints.snapshot import Keep, Snapshot
from mpicdsgd.checkpoints.writer_process import WriterProcess
from mpicdsgd.runs import owner

pytestmark = [pytest.mark.own_writer, pytest.mark.ranks(1, 4)]


@pytest.fixture
def run(shared_folder: Path) -> Path:
    return shared_folder


def snapshot(step: int, rank: int, size: int = 5000) -> Snapshot:
    rng = np.random.default_rng([step, rank])
    arrays = {
        "x": rng.normal(size=size).astype(np.float32),
        "sampler": np.arange(rank),  # of rank 0: empty
        "link/pulls": np.array(step),
        "flags": rng.integers(0, 2, (3, 5)).astype(np.bool_),
    }
    return Snapshot(step, arrays, {"rank": rank}, {"model": "m", "step": step})


def save(writer: Background, step: int, comm: MPI.Intracomm, size: int = 5000) -> None:
    """Save, and go on to change the state at once."""
    given = snapshot(step, comm.rank, size)
    writer.save(given)
    for array in given.arrays.values():
        array[...] = 0


def read(run: Path, comm: MPI.Intracomm, size: int = 5000) -> int | None:
    found = reading.read_newest(run, comm, lambda shared: None)
    if found is None:
        return None
    expected = snapshot(found.step, comm.rank, size)
    assert (found.meta, found.shared) == (expected.meta, expected.shared)
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found.arrays[name], array)
    return found.step


def steps_there(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_it_becomes_a_checkpoint_by_itself(run: Path, comm: MPI.Intracomm) -> None:
    """No rank waits for another, nor for the disk."""
    writer = Background(run, 1, comm, Keep(2))
    save(writer, 10, comm)
    deadline = time.monotonic() + 60
    manifest = run / "checkpoints" / "step-00000010" / "manifest.g0001.json"
    while not manifest.exists():
        writer.progress()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    writer.finish()
    assert writer.step == 10
    assert (writer.seconds > 0) == (comm.rank == 0)
    assert read(run, comm) == 10
    writer.close()


def test_many_in_a_row(run: Path, comm: MPI.Intracomm) -> None:
    """Ranks at their own pace, some of which never look after it."""
    random = np.random.default_rng(comm.rank)
    writer = Background(run, 1, comm, Keep(2, every=50), step=None)
    for step in range(10, 210, 10):
        save(writer, step, comm, size=int(1000 + 40 * step))
        for _ in range(random.integers(0, 6)):
            writer.progress()
            time.sleep(random.uniform(0, 0.003))
    writer.close()
    assert writer.step == 200
    expected = [50, 100, 150, 190, 200]
    assert steps_there(run) == [f"step-{step:08d}" for step in expected]
    found = inspect.inspect(run)["checkpoints"]
    assert [one["intact"] for one in found] == [True] * len(expected)
    assert read(run, comm, size=9000) == 200


def test_a_step_is_written_once(run: Path, comm: MPI.Intracomm) -> None:
    writer = Background(run, 1, comm, Keep(2))
    save(writer, 10, comm)
    writer.finish()
    before = [path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*.h5")]
    save(writer, 10, comm)
    writer.close()
    assert writer.step == 10
    assert before == [path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*.h5")]


def test_a_rank_that_cannot_write_is_everybodys(
    run: Path, comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture
) -> None:
    last = comm.size - 1
    writer = Background(run, 1, comm, Keep(2))
    save(writer, 10, comm)
    if comm.rank == last:  # what is to be a file cannot be one
        os.makedirs(run / "checkpoints" / "step-00000020" / f".rank-{last:04d}.g0001.h5.tmp")
    comm.barrier()
    save(writer, 20, comm)
    writer.finish()
    assert writer.step == 10
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(said) == (1 if comm.rank == 0 else 0)
    problem = f"step 20 was not written (rank {last}: Is a directory): that of step 10 is kept"
    assert all(text.endswith(problem) for text in said)
    comm.barrier()
    left = [path.name for path in (run / "checkpoints" / "step-00000020").iterdir()]
    assert left == [f".rank-{last:04d}.g0001.h5.tmp"], "what was not ours"
    assert read(run, comm) == 10
    save(writer, 30, comm)
    writer.close()
    assert read(run, comm) == 30


def test_a_writer_that_dies_once_it_is_there(
    run: Path, comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it can say so. What is older goes with the next one."""
    writer = Background(run, 1, comm, Keep(1))
    save(writer, 10, comm)
    writer.finish()
    process = writer._process
    if comm.rank == 0:
        assert process is not None
        answer = process.answer

        def ended(timeout_s: float | None = 0.0) -> Any:
            found = answer(timeout_s)
            killed = found == {"problem": ""}
            return {"problem": "the writer process ended with code -9"} if killed else found

        process.answer = ended  # type: ignore[method-assign]
    save(writer, 20, comm)
    writer.finish()
    assert writer.step == 20
    assert steps_there(run) == ["step-00000010", "step-00000020"]
    assert read(run, comm) == 20
    texts = [r.getMessage() for r in caplog.records]
    expected = "the checkpoint of step 20 is written, but the writer process ended with code -9"
    assert texts == [expected] * (comm.rank == 0)
    if process is not None:
        process.answer = WriterProcess.answer.__get__(process)  # type: ignore[method-assign]
    save(writer, 30, comm)
    writer.close()
    comm.barrier()
    assert steps_there(run) == ["step-00000030"]
    assert len(caplog.records) == len(texts)


def test_what_is_no_longer_kept_goes_without_a_wait(run: Path, comm: MPI.Intracomm) -> None:
    """The next checkpoint waits for it: there is never more than one that is not kept."""
    writer = Background(run, 1, comm, Keep(1))
    process: WriterProcess | None = None
    asked: list[Any] = []
    for step in (10, 20):
        save(writer, step, comm)
        if comm.rank == 0 and step == 20:
            process = writer._process
            assert process is not None
            process.prune = lambda *job: asked.append(job)  # type: ignore[method-assign]
        writer.finish()
    comm.barrier()
    assert steps_there(run) == ["step-00000010", "step-00000020"]
    comm.barrier()
    if process is not None:
        assert asked == [(run, 1, 20, 1)]
        for _ in range(10):
            writer.progress()  # nothing was removed yet: it does not wait either
        assert writer._pruning
        WriterProcess.prune(process, *asked[0])
        del process.prune
    save(writer, 30, comm)
    there = steps_there(run)
    assert "step-00000010" not in there, there
    writer.close()
    comm.barrier()
    assert steps_there(run) == ["step-00000030"]


@pytest.mark.parametrize("ends", [True, False])
def test_what_cannot_be_removed(
    run: Path, comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    """Is said; the checkpoint is there nevertheless."""
    writer = Background(run, 1, comm, Keep(1))
    save(writer, 10, comm)
    writer.finish()
    if comm.rank == 0:
        process = writer._process
        assert process is not None
        if ends:
            pid = process._process.pid
            process.prune = lambda *job: os.kill(pid, signal.SIGKILL)  # type: ignore[method-assign]
        else:
            path = run / "checkpoints" / "step-00000010" / "manifest.g0001.json"
            path.rename(path.with_suffix(".aside"))
            path.mkdir()
    save(writer, 20, comm)
    writer.close()
    texts = [r.getMessage() for r in caplog.records]
    expected = "old checkpoints may be left: the writer" if ends else "cannot be removed: "
    assert [expected in text for text in texts] == [True] * (comm.rank == 0)
    assert read(run, comm) == 20


@pytest.mark.parametrize("which", ["write", "removal"])
def test_a_disk_that_does_not_answer_is_said(
    run: Path,
    comm: MPI.Intracomm,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:
    """Once, by the rank that waits for it."""
    writer = Background(run, 1, comm, Keep(2))
    if comm.rank == 0:
        process = writer._start()
        assert process is not None
        answer, begun = process.answer, []

        def late(timeout_s: float | None = 0.0) -> Any:
            if writer._pruning == (which == "removal") and len(begun) < 400:
                begun.append(time.monotonic())
                monkeypatch.setattr(background_writer, "_PATIENCE_S", 0.05)
                return None
            return answer(timeout_s)

        process.answer = late  # type: ignore[method-assign]
    save(writer, 20, comm)
    writer.close()
    assert read(run, comm) == 20
    texts = [r.getMessage() for r in caplog.records]
    what = "the checkpoint of step 20 is not on the disk"
    if which == "removal":
        what = "what is no longer kept is not removed"
    expected = f"rank 0: {what} after 0.05 s: waiting"
    assert texts == [expected] * (comm.rank == 0)


@pytest.mark.parametrize("which", ["rank 0", "last rank"])
def test_a_writer_that_dies(
    run: Path, comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    """Its checkpoint is lost, said so, and the next one has a new writer."""
    victim = 0 if which == "rank 0" else comm.size - 1
    writer = Background(run, 1, comm, Keep(2))
    save(writer, 10, comm)
    writer.finish()
    writer._settle()
    if comm.rank == victim:
        assert writer._process is not None
        os.kill(writer._process._process.pid, signal.SIGSTOP)  # so that it has not done it yet
    save(writer, 20, comm)
    if comm.rank == victim:
        assert writer._process is not None
        os.kill(writer._process._process.pid, signal.SIGKILL)
    writer.finish()
    assert writer.step == 10
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    expected = f"rank {victim}: the writer process ended with code -9"
    assert [expected in text for text in said] == [True] * (comm.rank == 0)
    assert read(run, comm) == 10
    comm.barrier()  # every rank removes its own
    assert steps_there(run) == ["step-00000010"]
    comm.barrier()
    save(writer, 30, comm)
    writer.close()
    assert read(run, comm) == 30


def test_where_no_process_can_be_started(
    run: Path,
    comm: MPI.Intracomm,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That rank writes by itself, says so once, and the others need not know."""

    def refuse(on_node: int) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    odd = comm.size // 2
    if comm.rank == odd:
        monkeypatch.setattr(background_writer, "WriterProcess", refuse)
    writer = Background(run, 1, comm, Keep(2))
    for step in (10, 20):
        save(writer, step, comm)
    writer.close()
    assert writer.step == 20
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == (comm.rank == odd)
    assert all("written while training waits" in text for text in said)
    assert read(run, comm) == 20
    assert steps_there(run) == ["step-00000010", "step-00000020"]


def test_a_newer_generation_is_left_alone(
    run: Path, comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture
) -> None:
    """What a zombie still writes counts for nothing, and takes nothing away."""
    old = Background(run, 1, comm, Keep(1))
    save(old, 10, comm)
    old.finish()
    if comm.rank == 0:
        assert owner.claim(run).generation == 2
    comm.barrier()
    save(old, 20, comm)
    old.close()
    said = " ".join(r.getMessage() for r in caplog.records)
    assert ("has been taken over by a newer run" in said) == (comm.rank == 0)
    new = Background(run, 2, comm, Keep(1))
    save(new, 15, comm)
    new.close()
    assert read(run, comm) == 15

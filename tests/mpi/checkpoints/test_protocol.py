"""Checkpoints over MPI: all ranks write, read, fail and refuse together."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from mpicdsgd.checkpoints import background_writer, reading
from mpicdsgd.checkpoints.background_writer import Background
from mpicdsgd.checkpoints.snapshot import Keep, Snapshot
from mpicdsgd.common.errors import UserError
from mpicdsgd.runs import owner


@pytest.fixture
def run(shared_folder: Path) -> Path:
    return shared_folder


def snapshot(step: int, rank: int) -> Snapshot:
    rng = np.random.default_rng([step, rank])
    arrays = {"x": rng.normal(size=5000).astype(np.float32), "sampler": np.arange(rank)}
    return Snapshot(step, arrays, {"rank": rank}, {"model": "m"})


def write(run: Path, comm: MPI.Intracomm, generation: int, *steps: int) -> list[bool]:
    """Write checkpoints, wait till rank 0 has removed what is not kept; which are there."""
    writer = Background(run, generation, comm, Keep(3))
    result = []
    for step in steps:
        writer.save(snapshot(step, comm.rank))
        writer.finish()
        result.append(writer.step == step)
    writer.close()
    comm.barrier()
    return result


def read(run: Path, comm: MPI.Intracomm) -> int | None:
    found = reading.read_newest(run, comm, lambda shared: None)
    if found is None:
        return None
    expected = snapshot(found.step, comm.rank)
    assert found.meta == expected.meta
    assert found.arrays.keys() == expected.arrays.keys()
    assert all(np.array_equal(found.arrays[name], a) for name, a in expected.arrays.items())
    assert comm.allgather(found.step) == [found.step] * comm.size
    return found.step


def only(comm: MPI.Intracomm, rank: int) -> bool:
    """Whether this is the rank that acts, once all have come here."""
    comm.barrier()
    return comm.rank == rank


def test_round_trip_and_keep(run: Path, comm: MPI.Intracomm) -> None:
    assert read(run, comm) is None
    assert all(write(run, comm, 1, 10, 20, 30, 40))
    folders = sorted(os.listdir(run / "checkpoints"))
    assert folders == ["step-00000020", "step-00000030", "step-00000040"]
    assert len(os.listdir(run / "checkpoints" / folders[0])) == comm.size + 2
    assert read(run, comm) == 40
    with h5py.File(run / "checkpoints" / folders[2] / "index.g0001.h5", locking=False) as index:
        for rank in range(comm.size):
            assert np.array_equal(index["arrays/x"][rank], snapshot(40, rank).arrays["x"])


def test_damage_on_one_rank_sends_all_back(
    run: Path, comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture
) -> None:
    write(run, comm, 1, 10, 20)
    last = comm.size - 1
    if only(comm, 0):
        path = run / "checkpoints" / "step-00000020" / f"rank-{last:04d}.g0001.h5"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    comm.barrier()
    assert read(run, comm) == 10
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == (1 if comm.rank == 0 else 0), "said once in the job"
    assert all(f"rank-{last:04d}.g0001.h5" in text for text in said)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": ("rank", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "zero length": ("rank", lambda path: os.truncate(path, 0)),
    "missing": ("rank", Path.unlink),
    "mixed generation": (
        "rank",
        lambda path: shutil.copyfile(path.with_name(path.name.replace("g0002", "g0001")), path),
    ),
    "index truncated": ("index", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "index missing": ("index", Path.unlink),
    "manifest truncated": ("manifest", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "manifest empty": ("manifest", lambda path: os.truncate(path, 0)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage(
    run: Path, comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A step is there from two generations; the newer one's file is named, once in the job."""
    write(run, comm, 1, 10, 20)
    write(run, comm, 2, 15, 20)
    which, damage = DAMAGE[kind]
    last = f"rank-{comm.size - 1:04d}.g0002.h5"
    name = {"index": "index.g0002.h5", "manifest": "manifest.g0002.json"}.get(which, last)
    if only(comm, 0):
        damage(run / "checkpoints" / "step-00000020" / name)
    comm.barrier()
    assert read(run, comm) == 15
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == (1 if comm.rank == 0 else 0)
    assert all(f"step-00000020 (generation 2) is not intact ({name}: " in text for text in said)


def test_a_rank_that_cannot_write_is_everybodys(
    run: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, comm, 1, 10)
    last = comm.size - 1

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    def refuse(on_node: int) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        if comm.rank == last:  # which writes by itself, so that it can be told of a full disk
            patch.setattr(background_writer, "WriterProcess", refuse)
            patch.setattr(os, "fsync", full)
        assert write(run, comm, 1, 20) == [False]
    assert os.listdir(run / "checkpoints") == ["step-00000010"]
    assert read(run, comm) == 10


def test_refusals_reach_every_rank(run: Path, comm: MPI.Intracomm) -> None:
    write(run, comm, 1, 10)

    def expect(shared: dict[str, Any]) -> None:
        if comm.rank == comm.size - 1:
            raise UserError(f"the checkpoint is of model {shared['model']}")

    with pytest.raises(UserError, match="of model m"):
        reading.read_newest(run, comm, expect)
    alone = comm.Split(comm.rank)
    if comm.size > 1:
        with pytest.raises(UserError, match=f"of {comm.size} agents, the job has 1 ranks"):
            reading.read_newest(run, alone, lambda shared: None)
    alone.Free()
    if only(comm, 0):
        for path in (run / "checkpoints" / "step-00000010").glob("index.*"):
            path.unlink()
    comm.barrier()
    with pytest.raises(UserError, match=r"none of the 1 checkpoints .*index\.g0001\.h5: missing"):
        reading.read_newest(run, comm, lambda shared: None)


def test_claim_by_one_rank(run: Path, comm: MPI.Intracomm) -> None:
    claims = [comm.bcast(owner.claim(run).generation if comm.rank == 0 else None) for _ in range(3)]
    assert claims == [1, 2, 3]

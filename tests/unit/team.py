"""Agents as threads, which talk as MPI's ranks do, and checkpoints whose every bit is known."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mpicdsgd.checkpoints import reading
from mpicdsgd.checkpoints.snapshot import Keep, Snapshot


class Team:
    """``size`` threads that talk as ranks of a communicator do."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots: list[Any] = [None] * size

    def run(self, work: Callable[[Rank], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, [Rank(self, rank) for rank in range(self.size)]))


class Rank:
    def __init__(self, team: Team, rank: int) -> None:
        self.team, self.rank, self.size = team, rank, team.size

    def allgather(self, value: Any) -> list[Any]:
        self.team.slots[self.rank] = value
        self.team.barrier.wait()
        values = list(self.team.slots)
        self.team.barrier.wait()
        return values

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        values = self.allgather(value)
        return values if self.rank == root else None

    def bcast(self, value: Any, root: int = 0) -> Any:
        return self.allgather(value)[root]


def snapshot(step: int, rank: int) -> Snapshot:
    rng = np.random.default_rng([step, rank])
    arrays = {
        "x": rng.normal(size=700).astype(np.float32),
        "momentum/layers.0.weight": rng.normal(size=(5, 4)),
        "rng": rng.integers(0, 256, 300).astype(np.uint8),
        "best": np.array(step / 3),
        "none": np.zeros((0, 3), np.int16),
        "mask": rng.random(9) < 0.5,
        "sampler": np.arange(5 + rank),
        "wire": rng.normal(size=8).astype(">f2"),
        "z": rng.normal(size=3) + 1j,
        "strided": rng.normal(size=(6, 6))[::2, ::-3],
    }
    return Snapshot(step, arrays, {"rank": rank, "text": "å" * 40_000}, {"model": "m", "pi": "p"})


def same(read: Snapshot | None, step: int, rank: int) -> bool:
    written = snapshot(step, rank)
    assert read is not None
    assert (read.step, read.meta, read.shared) == (step, written.meta, written.shared)
    assert read.arrays.keys() == written.arrays.keys()
    for name, array in written.arrays.items():
        found = read.arrays[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape), name
        assert np.array_equal(found, array), name
        found[...] = 0  # it is the reader's own
    return True


def anything(shared: dict[str, Any]) -> None:
    pass


def write(
    run: Path, generation: int, *steps: int, size: int = 2, keep: int = 9, every: int = 0
) -> list[Any]:
    def work(comm: Rank) -> Any:
        return [
            reading.write(run, generation, snapshot(step, comm.rank), comm, Keep(keep, every))
            for step in steps
        ]

    return Team(size).run(work)


def read(run: Path, size: int = 2, expect: Any = anything) -> int | None:
    """The step that all ranks read, everything checked against what was written."""

    def work(comm: Rank) -> int | None:
        found = reading.read_newest(run, comm, expect)
        return found.step if found is not None and same(found, found.step, comm.rank) else None

    steps = Team(size).run(work)
    assert len(set(steps)) == 1
    return steps[0]


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def listing(run: Path) -> dict[str, list[str]]:
    return {f.name: sorted(os.listdir(f)) for f in sorted((run / "checkpoints").iterdir())}


def files(generation: int, size: int = 2) -> list[str]:
    g = f"g{generation:04d}"
    ranks = [f"rank-{rank:04d}.{g}.h5" for rank in range(size)]
    return [f"index.{g}.h5", f"manifest.{g}.json", *ranks]

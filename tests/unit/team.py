"""Agents as threads, which talk as MPI's ranks do, and checkpoints whose every bit is known."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.checkpoints import background_writer, reading, writer_process
from mpicdsgd.checkpoints.background_writer import Background
from mpicdsgd.checkpoints.snapshot import Keep, Snapshot


class Team:
    """``size`` threads that talk as ranks of a communicator do.

    A rank that raises alone breaks the barrier, so that nobody waits for it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size
        self.posted: dict[int, dict[int, NDArray[Any]]] = {}  # by call, by rank
        self.duplicates: list[Team] = []

    def run(self, work: Callable[[Rank], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            try:
                return work(Rank(self, rank))
            except BaseException as error:
                if not getattr(error, "raised_on_all_ranks", False):
                    self.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            agents = [pool.submit(one, rank) for rank in range(self.size)]
        errors = [error for agent in agents if (error := agent.exception()) is not None]
        if errors:  # who has only been left alone by another has the least to say
            raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
        return [agent.result() for agent in agents]

    def abort(self) -> None:
        for team in (self, *self.duplicates):
            team.barrier.abort()


class Rank:
    """A communicator, as one of its ranks has it."""

    def __init__(self, team: Team, rank: int) -> None:
        self.team, self.rank, self.size = team, rank, team.size
        self.calls = 0  # that do not wait; they meet in their order

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

    def Dup(self) -> Rank:
        made = self.bcast(Team(self.size))
        if self.rank == 0:
            self.team.duplicates.append(made)
        return Rank(made, self.rank)

    def Free(self) -> None:
        pass

    def Igather(self, own: NDArray[Any], all: NDArray[Any] | None, root: int = 0) -> Request:
        posted = self._post(own)

        def arrived() -> bool:
            if self.rank != root or len(posted) < self.size:
                return self.rank != root
            assert all is not None
            for rank, row in posted.items():
                all[rank] = row
            return True

        return Request(self.team, arrived)

    def Ibcast(self, buffer: NDArray[Any], root: int = 0) -> Request:
        posted = self._post(buffer)

        def arrived() -> bool:
            if root in posted:
                buffer[...] = posted[root]
            return root in posted

        return Request(self.team, arrived)

    def _post(self, buffer: NDArray[Any]) -> dict[int, NDArray[Any]]:
        posted = self.team.posted.setdefault(self.calls, {})
        self.calls += 1
        posted[self.rank] = buffer.copy()
        return posted


class Request:
    def __init__(self, team: Team, arrived: Callable[[], bool]) -> None:
        self.team, self.arrived = team, arrived

    def Test(self) -> bool:
        if self.team.barrier.broken:
            raise threading.BrokenBarrierError
        return self.arrived()


class InThread(writer_process.WriterProcess):
    """The writer of checkpoints without a process of its own: does what that one would do, at once.

    So a test can have the system's calls fail in it, and look at what it removes.
    """

    def __init__(self, on_node: int = 1) -> None:
        self._on_node = on_node
        self._memory = os.memfd_create("checkpoint", os.MFD_CLOEXEC)
        self._map = None
        self._end = weakref.finalize(self, os.close, self._memory)
        self._its_own = writer_process.Memory(self._memory)
        self._answers: deque[str] = deque()

    def _send(self, job: writer_process.Job) -> None:
        answer = writer_process.do(self._its_own, json.loads(json.dumps(job)))
        self._answers.append(json.dumps(answer))

    def answer(self, timeout_s: float | None = 0.0) -> writer_process.Job | None:
        return json.loads(self._answers.popleft()) if self._answers else None

    @property
    def alive(self) -> bool:
        return True


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
) -> list[list[Path | None]]:
    """Each rank's folders of the steps; None where there is no checkpoint of it now."""

    def work(comm: Rank) -> list[Path | None]:
        writer = Background(run, generation, comm, Keep(keep, every))  # type: ignore[arg-type]
        found = []
        for step in steps:
            writer.save(snapshot(step, comm.rank))
            writer.finish()
            found.append(folder(run, step) if writer.step == step else None)
        writer.close()
        return found

    with mock.patch.object(background_writer, "WriterProcess", InThread):
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

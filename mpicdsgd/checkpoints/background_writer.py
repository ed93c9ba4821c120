"""Checkpoints that are written while training goes on.

    save       every agent copies its state and gives the copy to its `WriterProcess`
    progress   whoever's file is on the disk says so to rank 0, by a gather that nobody waits for;
               when all have, rank 0's process writes the manifest: the checkpoint exists;
               then it removes what is no longer kept
    finish     waits for all this, and tells every rank what became of it; so does the next `save`

The gathers run on a communicator of their own, one for each checkpoint and in their order, so they
meet no other message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.checkpoints.manifest import FileEntry, Manifest, Place, looks_intact, place_of
from mpicdsgd.checkpoints.rank_file import About, Layout
from mpicdsgd.checkpoints.snapshot import (
    Keep,
    Problem,
    Snapshot,
    alike,
    commit,
    describe,
    discard,
    prune,
    say,
    write_own,
)
from mpicdsgd.checkpoints.writer_process import WriterProcess
from mpicdsgd.common.files import sync_folder

if TYPE_CHECKING:
    from mpi4py import MPI

log = logging.getLogger("mpicdsgd")

_RECORD_BYTES = 512  # of an agent's outcome: size and checksum, or what went wrong
_FAILED = "!"  # begins the outcome of a rank that could not write, before errno and the reason
_PAUSE_S = 0.0005
_PATIENCE_S = 60.0  # after this the log says what the run is waiting for


_left: list[_UnderWay] = []  # with their buffers: MPI may yet write into them


@dataclass
class _UnderWay:
    """A checkpoint that is being written."""

    place: Place
    about: About
    shared: dict[str, Any]
    arrays: Layout | None  # rank 0: what the index is of
    index: FileEntry | None = None  # rank 0, once it is written
    own: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(_RECORD_BYTES, np.uint8))
    all: NDArray[np.uint8] | None = None
    request: MPI.Request | None = None
    committing: bool = False
    written: bool | None = None  # rank 0, once it is known
    outcome: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1, np.uint8))


class Background:
    """Writes the checkpoints of one generation. Making it and `close` are collective.

    Args:
        run_dir: the run's folder; every rank must see it.
        generation: which rank 0 has claimed, see `runs.owner.claim`.
        comm: the agents; duplicated.
        keep: which checkpoints are kept.
        step: of the newest checkpoint that there is already.
        on_node: agents on this node.

    Attributes:
        step: of the newest checkpoint that this rank knows to be there, or None.
        seconds: how long it took at most from `save` to the manifest, as rank 0 saw it; 0.0 where
            there was none yet, and on other ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        generation: int,
        comm: MPI.Intracomm,
        keep: Keep,
        step: int | None = None,
        on_node: int = 1,
    ) -> None:
        self.step = step
        self._on_node = on_node
        self.seconds = 0.0
        self._run_dir = Path(run_dir).absolute()  # the process stays where this one begins it
        self._generation, self._keep = generation, keep
        self._comm: MPI.Intracomm = comm.Dup()
        self._process: WriterProcess | None = None
        self._cannot = self._closed = False
        self._job: _UnderWay | None = None
        self._since = 0.0
        self._pruning = self._said = False  # pruning: rank 0

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint, once the one before is done. Collective.

        ``snapshot`` may be changed as soon as this returns. A step that this generation has written
        already is not written again.
        """
        self.finish()
        self._settle()  # so that there is never more than one on the disk that is not kept
        self._since, self._said = time.monotonic(), False
        place = place_of(self._run_dir, self._generation, snapshot.step)
        about = describe(snapshot, self._generation, self._comm.rank, self._comm.size)
        first = self._comm.rank == 0
        if self._comm.bcast(os.path.lexists(place.manifest) if first else None):
            self.step = snapshot.step
            return
        layouts = self._comm.gather(about.arrays, root=0)
        arrays = None if layouts is None else alike(layouts)
        self._job = _UnderWay(place, about, snapshot.shared, arrays)
        try:
            process = self._start()
            if process is not None:
                process.write(self._run_dir, about, snapshot.arrays, arrays)
                return
        except OSError as error:  # no memory for a copy
            self._in_place(f"no copy of the state could be made ({error.strerror})")
        entries, problem = write_own(place, about, snapshot.arrays, arrays)
        self._tell(problem or entries)

    def progress(self) -> None:
        """Go on with what is under way, without waiting. Local; call it at every step."""
        if self._pruning:
            assert self._process is not None
            answer = self._process.answer()
            if answer is None:
                return
            self._pruned(answer)
        job = self._job
        if job is None or job.written is not None:
            return
        if job.request is None:
            assert self._process is not None
            answer = self._process.answer()
            if answer is not None:
                self._tell(_problem(answer) or [FileEntry(**entry) for entry in answer["entries"]])
            return
        # On every rank: what others have told may have to pass through this one.
        gathered = bool(job.request.Test())
        if self._comm.rank == 0:
            if gathered and not job.committing:
                self._commit(job)
            if job.committing and job.written is None:
                assert self._process is not None
                answer = self._process.answer()
                if answer is not None:
                    self._committed(job, _problem(answer))

    def finish(self) -> None:
        """Wait until what is under way is done; then `step` is the same on all ranks. Collective.

        If a rank could not write (disk full, no permission), it is logged once, the attempt is
        removed and the checkpoint before it kept.
        """
        job, since = self._job, time.monotonic()
        if job is None:
            return
        late = f"the checkpoint of step {job.about.step} is not on the disk"
        while not self._here(job):
            self._pause(since, late)
        job.outcome[0] = job.written is True
        told = self._comm.Ibcast(job.outcome, root=0)
        while not told.Test():
            self._pause(since)
        written = bool(job.outcome[0])
        self._job = None
        if written:
            self.step = job.about.step
        elif self._comm.rank != 0:
            discard(job.place, self._comm.rank)

    def close(self) -> None:
        """`finish`, and end the process. Collective; a second call does nothing."""
        if self._closed:
            return
        self.finish()
        self._settle()
        self._closed = True
        if self._process is not None:
            self._process.close()
            self._process = None
        self._comm.Free()

    def abandon(self) -> None:
        """Leave what is under way, as other agents are dead, and end the process. Local."""
        self._closed = True
        if self._job is not None:
            _left.append(self._job)
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _settle(self) -> None:
        """Wait until what is no longer kept is gone. Local."""
        since = time.monotonic()
        while self._pruning:
            self._pause(since, "what is no longer kept is not removed")

    def _pause(self, since: float, late: str = "") -> None:
        """Give the core to the writers, from whom a blocking call would take it."""
        self.progress()
        time.sleep(_PAUSE_S)
        if late and not self._said and time.monotonic() - since > _PATIENCE_S:
            self._said = True
            log.warning("rank %d: %s after %g s: waiting", self._comm.rank, late, _PATIENCE_S)

    def _here(self, job: _UnderWay) -> bool:
        """Whether this rank has done its part."""
        if self._comm.rank == 0:
            return job.written is not None
        return job.request is not None and bool(job.request.Test())

    def _start(self) -> WriterProcess | None:
        if self._process is not None and not self._process.alive:
            self._process.close()
            self._process = None
        if self._process is None and not self._cannot:
            try:
                self._process = WriterProcess(self._on_node)
            except OSError as error:
                self._in_place(f"no process can be started ({error.strerror})")
        return self._process

    def _in_place(self, why: str) -> None:
        if not self._cannot:
            log.warning(
                "rank %d: %s: checkpoints are written while training waits", self._comm.rank, why
            )
        self._cannot = True
        if self._process is not None:
            self._process.close()
            self._process = None

    def _tell(self, outcome: Problem | list[FileEntry]) -> None:
        """Tell rank 0 what has become of this rank's file."""
        job = self._job
        assert job is not None
        if isinstance(outcome, Problem):
            text = f"{_FAILED}{outcome.errno} {outcome.text}"
        else:
            own, *index = outcome
            job.index = index[0] if index else None
            text = f"{own.size_bytes} {own.xxh128}"
        data = text.encode()[:_RECORD_BYTES]
        job.own[: len(data)] = np.frombuffer(data, np.uint8)
        if self._comm.rank == 0:
            job.all = np.zeros((self._comm.size, _RECORD_BYTES), np.uint8)
        job.request = self._comm.Igather(job.own, job.all, root=0)

    def _commit(self, job: _UnderWay) -> None:
        """Rank 0, when all have told."""
        assert job.all is not None
        job.committing = True
        texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in job.all]
        problems = []
        for rank, text in enumerate(texts):
            if text.startswith(_FAILED):
                number, _, why = text.removeprefix(_FAILED).partition(" ")
                problems.append(Problem(f"rank {rank}: {why}", int(number)))
        if problems:
            self._outcome(job, problems, "")
            return
        assert job.index is not None
        assert job.arrays is not None
        files = []
        for rank, text in enumerate(texts):
            size, digest = text.split()
            files.append(FileEntry(job.place.rank_file(rank).name, int(size), digest))
        manifest = Manifest(
            job.place.step,
            job.place.generation,
            self._comm.size,
            (*files, job.index),
            job.arrays,
            job.shared,
            self._keep.stays(job.place.step),
        )
        if self._process is None:
            self._committed(job, commit(job.place, manifest))
        else:
            self._process.commit(self._run_dir, manifest)

    def _committed(self, job: _UnderWay, problem: Problem | None) -> None:
        """Rank 0, when the manifest is there, or cannot be."""
        place, last = job.place, self._keep.last
        if problem and looks_intact(place):  # the process ended after the manifest
            with contextlib.suppress(OSError):
                sync_folder(place.folder)
            remark = f"the checkpoint of step {place.step} is written, but {problem.text}"
            self._outcome(job, [], remark)
        elif problem:
            self._outcome(job, [problem._replace(text=f"rank 0: {problem.text}")], "")
        elif self._process is None:
            self._outcome(job, [], prune(place, last))
        else:
            self._process.prune(self._run_dir, place.generation, place.step, last)
            self._pruning = True
            self._outcome(job, [], "")

    def _pruned(self, answer: dict[str, Any]) -> None:
        self._pruning = False
        if problem := answer.get("problem"):
            answer = {"remark": f"old checkpoints may be left: {problem}"}
        if answer["remark"]:
            log.warning("%s", answer["remark"])

    def _outcome(self, job: _UnderWay, problems: list[Problem], remark: str) -> None:
        if problems:
            discard(job.place, 0)  # the manifest goes before any other rank's file does
            kept = f"that of step {self.step} is kept" if self.step is not None else "there is none"
            say(job.about.step, problems, remark, kept)
        else:
            self.step = job.about.step
            self.seconds = max(self.seconds, time.monotonic() - self._since)
            say(job.about.step, [], remark)
        job.written = not problems


def _problem(answer: dict[str, Any]) -> Problem | None:
    """What went wrong, in the words of a `WriterProcess`."""
    text = answer.get("problem")
    return Problem(text, answer.get("errno", 0)) if text else None

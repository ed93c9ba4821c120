"""A process beside a rank that writes checkpoints from shared memory, so that the step need not.

A thread would not do: HDF5 holds Python's lock, and halves the rate of the gradients. The process
knows neither MPI nor torch and starts in a quarter of a second. Jobs and answers are lines of JSON;
what is to be written lies in an unnamed file in memory that both have mapped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.checkpoints import snapshot
from mpicdsgd.checkpoints.manifest import FileEntry, Manifest, place_of
from mpicdsgd.checkpoints.memory_limit import room_bytes
from mpicdsgd.checkpoints.rank_file import About, Arrays, Layout
from mpicdsgd.common import signals

_SHARE = 0.9  # of the memory that is left, for copies
_ALIGNED = 64  # bytes: where an array may begin
# What a batch system or a terminal sends to all processes is for the rank, which stops by itself
# and waits for its writer; that one ends when the rank does.
_NOT_FOR_US = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

Job = dict[str, Any]


class WriterProcess:
    """The rank's side of it. All calls are local.

    Args:
        on_node: how many ranks of this node have one, and make their copies at the same time.

    Raises:
        OSError: no process can be started here.
    """

    def __init__(self, on_node: int = 1) -> None:
        self._on_node = on_node
        self._memory = os.memfd_create("mpicdsgd-checkpoint", os.MFD_CLOEXEC)
        self._map: mmap.mmap | None = None
        self._said = b""
        # -P: a file in the working folder that is called like a module is not that module.
        words = [
            sys.executable,
            "-P",
            "-m",
            "mpicdsgd.checkpoints.writer_process",
            str(self._memory),
        ]
        try:
            with signals.not_for_children(_NOT_FOR_US):  # also before it can ignore them
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=[self._memory],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
        except OSError:
            os.close(self._memory)
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        # Also where a run is given up, and nobody closes anything.
        self._end = weakref.finalize(self, _end, self._process, self._memory)

    def write(
        self, run_dir: Path, about: About, arrays: Arrays, index: Layout | None = None
    ) -> None:
        """Copy ``arrays`` and have them written as `checkpoints.snapshot.write_own` does.

        Raises:
            OSError: there is no memory for the copy.
        """
        where: dict[str, int] = {}
        size = 0
        for name, array in arrays.items():
            where[name] = size
            size += -(-array.nbytes // _ALIGNED) * _ALIGNED
        size = max(size, 1)
        if self._map is None or len(self._map) < size:
            if self._map is not None:
                self._map.close()
                self._map = None
            self._make_room(size)
            os.posix_fallocate(self._memory, 0, size)
            self._map = mmap.mmap(self._memory, size)
        for name, array in arrays.items():
            np.copyto(_array(self._map, where[name], about.arrays[name]), array)
        job = {"do": "write", "about": vars(about), "where": where, "index": index}
        self._send({"run_dir": str(run_dir), **job})

    def commit(self, run_dir: Path, manifest: Manifest) -> None:
        """Have `checkpoints.snapshot.commit` done."""
        self._send({"do": "commit", "run_dir": str(run_dir), "manifest": asdict(manifest)})

    def prune(self, run_dir: Path, generation: int, step: int, last: int) -> None:
        """Have `checkpoints.snapshot.prune` done."""
        job = {"do": "prune", "generation": generation, "step": step, "last": last}
        self._send({"run_dir": str(run_dir), **job})

    def answer(self, timeout_s: float | None = 0.0) -> Job | None:
        """What became of the job; None where it is not done within ``timeout_s`` (None: for ever).

        Of a write {"entries": [...]}, of a commit {"problem": ""}, of a removal {"remark": text};
        or {"problem": text}, with "errno" where the system has said one.
        """
        while b"\n" not in self._said:
            poll = select.poll()  # not select(), which knows no descriptor above 1023
            poll.register(self._answers, select.POLLIN)
            if not poll.poll(None if timeout_s is None else 1000 * timeout_s):
                return None
            part = os.read(self._answers.fileno(), 1 << 16)
            if not part:
                return {"problem": f"the writer process ended with code {self._process.wait()}"}
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        answer: Job = json.loads(line)
        return answer

    @property
    def alive(self) -> bool:
        """Whether it can take a job."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it, once it has done its job."""
        self._end()
        if self._map is not None:
            self._map.close()

    def kill(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()
        self.close()

    def _make_room(self, size: int) -> None:
        """Raise OSError where a copy of ``size`` bytes would fill the memory.

        An allocation would not fail, but have the job killed, again after every restart.
        """
        more = size - os.fstat(self._memory).st_size
        left = room_bytes()
        if left is not None and self._on_node * more > _SHARE * left:
            sizes = f"{more / 1e6:.0f} MB for each of {self._on_node} on the node"
            raise OSError(errno.ENOMEM, f"it takes {sizes}, and {left / 1e6:.0f} MB are left")

    def _send(self, job: Job) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `answer` will say
            self._jobs.write(json.dumps(job).encode() + b"\n")
            self._jobs.flush()


def _end(process: subprocess.Popen[bytes], memory: int) -> None:
    assert process.stdin is not None
    # Said, too: data loaders forked meanwhile hold the pipe open as long as they live.
    with contextlib.suppress(OSError):
        process.stdin.write(json.dumps({"do": "end"}).encode() + b"\n")
        process.stdin.flush()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()
    process.wait()
    os.close(memory)


def _array(memory: mmap.mmap, offset: int, spec: dict[str, Any]) -> NDArray[Any]:
    dtype, shape = np.dtype(spec["dtype"]), tuple(spec["shape"])
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(memory, dtype, count, offset).reshape(shape)


class Memory:
    """The rank's memory, mapped as long as it does not grow: to map it anew costs as much as a
    quarter of the write."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._map: mmap.mmap | None = None

    def arrays(self, about: About, where: dict[str, int]) -> Arrays:
        size = os.fstat(self._handle).st_size
        if self._map is None or len(self._map) != size:
            self._map = mmap.mmap(self._handle, size, prot=mmap.PROT_READ)
        return {n: _array(self._map, where[n], spec) for n, spec in about.arrays.items()}


def _answer(problem: snapshot.Problem) -> Job:
    return {"problem": problem.text, "errno": problem.errno}


def _write(memory: Memory, job: Job) -> Job:
    about = About(**job["about"])
    place = place_of(Path(job["run_dir"]), about.generation, about.step)
    arrays = memory.arrays(about, job["where"])
    entries, problem = snapshot.write_own(place, about, arrays, job["index"])
    return _answer(problem) if problem else {"entries": [vars(entry) for entry in entries]}


def _commit(memory: Memory, job: Job) -> Job:
    body = job["manifest"]
    manifest = Manifest(**{**body, "files": tuple(FileEntry(**entry) for entry in body["files"])})
    place = place_of(Path(job["run_dir"]), manifest.generation, manifest.step)
    problem = snapshot.commit(place, manifest)
    return _answer(problem) if problem else {"problem": ""}


def _prune(memory: Memory, job: Job) -> Job:
    place = place_of(Path(job["run_dir"]), job["generation"], job["step"])
    return {"remark": snapshot.prune(place, job["last"])}


_JOBS = {"write": _write, "commit": _commit, "prune": _prune}


def do(memory: Memory, job: Job) -> Job:
    """The answer to a job, of whatever kind."""
    try:
        return _JOBS[job["do"]](memory, job)
    except Exception as error:  # the rank waits for an answer
        return {"problem": f"{type(error).__name__}: {error}"}


def main(memory: int) -> int:
    """Do jobs until the rank is gone."""
    for one in _NOT_FOR_US:
        signal.signal(one, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    mapped = Memory(memory)
    for line in sys.stdin.buffer:
        job = json.loads(line)
        if job["do"] == "end":
            break
        answer = do(mapped, job)
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

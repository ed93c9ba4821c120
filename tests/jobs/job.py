"""Whole jobs as subprocesses: what a shell sees. Every job has a timeout and leaves nothing behind.

A rank imports torch, which takes seconds, so a job checks as much as it honestly can.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import costs
import pytest

import mpicdsgd

HERE = Path(__file__).parent
_PACKAGE = Path(mpicdsgd.__file__).parent.parent
_RANK = (b"PMI_RANK=", b"OMPI_COMM_WORLD_RANK=")
_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "HYDRA_", "MPI_LOCAL")  # an outer job's settings

server: Path | None = None  # the socket of a `forkserver`
_LATE = {"VICTIM", "FAILS"}  # variables that no library looks at when it is loaded


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    def lines(self, start: str) -> list[str]:
        """Lines of stderr that begin with ``start``."""
        return [line for line in self.err.splitlines() if line.startswith(start)]


class Job:
    """A started job; ``python`` is given this Python's arguments, ``ranks`` = 0: no mpiexec.

    ``launcher``: another command to start a rank's Python, instead of mpiexec and this one.
    Where there is a `server`, ranks of this package and of scripts here are forked from it.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int,
        arguments: list[str],
        env: dict[str, str],
        launcher: Sequence[str] = (),
    ) -> None:
        self._files = [open(folder / f"job.{name}", "w+b") for name in ("out", "err")]  # noqa: SIM115
        own = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)}
        path = os.pathsep.join(map(str, (_PACKAGE, HERE, HERE.parent)))
        own.update(PYTHONPATH=path, OMP_NUM_THREADS="1", **env)
        python = [sys.executable]
        ours = arguments[:2] == ["-m", "mpicdsgd"] or Path(arguments[0]).parent == HERE
        if server and ours and env.keys() <= _LATE:
            python += ["-I", "-S", str(HERE / "forkserver.py"), "start", str(server)]
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            [*(launcher or [*(_mpiexec(ranks) if ranks else []), *python]), *arguments],
            cwd=folder,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the launcher."""
        return self._process.pid

    def ranks(self) -> list[int]:
        """The ranks' processes, in the order of their ranks."""
        return list(self._by_rank(writers=False).values())

    def writers(self) -> dict[int, int]:
        """The processes that write checkpoints, by rank."""
        return self._by_rank(writers=True)

    def family(self) -> list[int]:
        """All processes below the launcher."""
        return _descendants(self._process.pid)

    def _by_rank(self, writers: bool) -> dict[int, int]:
        found: dict[int, int] = {}
        for process in _descendants(self._process.pid):
            fork = _fork_of(process)
            try:
                words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                is_writer = (
                    b"mpicdsgd.checkpoints.writer_process"
                    in Path(f"/proc/{process}/cmdline").read_bytes()
                )
            except OSError:
                continue  # it has ended
            for word in words:
                if is_writer == writers and word.startswith(_RANK):
                    found[int(word.partition(b"=")[2])] = fork or process
        return dict(sorted(found.items()))

    def kill(self) -> None:
        """``kill -9`` for the launcher and all ranks."""
        family = [*_descendants(self._process.pid), self._process.pid]
        for process in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT for the launcher and all ranks."""
        for process in [*_descendants(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGINT)

    def wait(self, timeout_s: float = 120.0) -> Ended:
        """The ended job. Fails the test if it takes longer; a busy machine is given more time."""
        timeout_s *= costs.busy()
        left_s = timeout_s - (time.monotonic() - self._start)
        try:
            code = self._process.wait(max(left_s, 0.1))
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.output()
            pytest.fail(f"the job hung for {timeout_s:g} s\n{out[-3000:]}\n{err[-3000:]}")
        return Ended(code, *self.output(), time.monotonic() - self._start)

    def output(self) -> tuple[str, str]:
        out, err = (Path(f.name).read_text(errors="replace") for f in self._files)
        return out, err

    def close(self) -> None:
        if self.running:
            self.kill()
        for file in self._files:
            file.close()


def _mpiexec(ranks: int) -> list[str]:
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("there is no mpiexec beside this Python or in PATH")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    more = ["--oversubscribe"] if "Open MPI" in version.stdout else []
    return [found, "-n", str(ranks), *more]


@contextlib.contextmanager
def forking(folder: Path) -> Iterator[None]:
    """While in it, most ranks are forked from a server, whose socket is in ``folder``."""
    global server
    path = os.pathsep.join(map(str, (_PACKAGE, HERE, HERE.parent)))
    socket = folder / "forks"
    process = subprocess.Popen(
        [sys.executable, str(HERE / "forkserver.py"), "serve", str(socket)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while not socket.exists():
        assert process.poll() is None, "the server has ended"
        time.sleep(0.05)
    server = socket
    costs.elsewhere.append(_cpu_s_of_forks)
    yield
    costs.elsewhere.remove(_cpu_s_of_forks)  # from now on in what this process has waited for
    server = None
    process.kill()
    process.wait()


def _cpu_s_of_forks() -> float:
    try:
        return float(Path(f"{server}.cpu_s").read_text())
    except FileNotFoundError:
        return 0.0


def _fork_of(process: int) -> int | None:
    """The process that this one stands for, as `forkserver` has it."""
    try:
        return int(Path(f"{server}.{process}").read_text()) if server else None
    except FileNotFoundError:
        return None


def _descendants(root: int) -> list[int]:
    """Processes below ``root``, children first: ranks lie below a launcher's proxy."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                status = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parent = int(status.rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(entry))
            if fork := _fork_of(int(entry)):
                children.setdefault(int(entry), []).append(fork)
    found: list[int] = []
    front = [root]
    while front:
        front = [child for parent in front for child in children.get(parent, [])]
        found = [*front, *found]
    return found

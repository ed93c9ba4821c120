"""The process that writes: its own death and the rank's, signals, arrays of every shape."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpicdsgd.checkpoints import rank_file
from mpicdsgd.checkpoints.manifest import FileEntry, Manifest, check_file, place_of
from mpicdsgd.checkpoints.rank_file import About
from mpicdsgd.checkpoints.writer_process import WriterProcess

ARRAYS: dict[str, Any] = {
    "x": np.arange(1000, dtype=np.float32),
    "none": np.empty((0, 3)),
    "one": np.array(7, np.int8),
    "group/turned": np.arange(12.0).reshape(3, 4).T,
}


def about(step: int, arrays: dict[str, Any]) -> About:
    return About(step, 1, 0, 1, {"text": "ü\n"}, rank_file.layout(arrays))


def answer(writer: WriterProcess) -> dict[str, Any]:
    found = writer.answer(timeout_s=60)
    assert found is not None
    return found


@pytest.mark.parametrize("grow", [1, 5000])
def test_arrays(tmp_path: Path, grow: int) -> None:
    writer = WriterProcess()
    assert writer.answer() is None
    for step, times in ((1, 1), (2, grow), (3, 1)):
        arrays = {**ARRAYS, "x": np.tile(ARRAYS["x"], times) + step}
        index = rank_file.layout({"x": arrays["x"]}) if step == 2 else None
        writer.write(tmp_path, about(step, arrays), arrays, index)
        entries = [FileEntry(**entry) for entry in answer(writer)["entries"]]
        place = place_of(tmp_path, 1, step)
        assert [entry.name for entry in entries] == [
            place.rank_file(0).name, *([place.index.name] if index else [])
        ]  # fmt: skip
        assert not any(check_file(place.folder, entry) for entry in entries)
        said, found = rank_file.read_rank(place.rank_file(0))
        assert said == about(step, arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    writer.close()
    assert not writer.alive


def test_it_does_not_hear_what_is_for_the_rank(tmp_path: Path) -> None:
    """A batch system's or a terminal's signals go to all processes."""
    writer = WriterProcess()
    os.kill(writer._process.pid, signal.SIGINT)  # while it imports
    os.kill(writer._process.pid, signal.SIGUSR1)
    writer.write(tmp_path, about(1, ARRAYS), ARRAYS)
    assert "entries" in answer(writer)
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(writer._process.pid, one)
    writer.write(tmp_path, about(2, ARRAYS), ARRAYS)
    assert "entries" in answer(writer)
    writer.close()


def test_a_mistake_is_an_answer(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder is to be")
    writer = WriterProcess()
    writer.write(tmp_path, about(1, ARRAYS), ARRAYS)
    assert answer(writer) == {"problem": "Not a directory", "errno": errno.ENOTDIR}
    writer.commit(tmp_path, Manifest(1, 1, 1, (), {}, {}, False))
    assert answer(writer) == {"problem": "Not a directory", "errno": errno.ENOTDIR}
    writer._send({"do": "commit", "run_dir": str(tmp_path)})
    assert "KeyError" in answer(writer)["problem"]
    writer.close()


def test_it_ends_with_the_rank(tmp_path: Path) -> None:
    """Also where that one is killed; what it was writing then is no checkpoint."""
    script = (
        "import sys; from mpicdsgd.checkpoints.writer_process import WriterProcess;"
        "w = WriterProcess();"
        "print(w._process.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as rank:
        assert rank.stdout is not None
        pid = int(rank.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        rank.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_needs_neither_torch_nor_mpi() -> None:
    """It is to start at once, in every rank of a large job."""
    script = (
        "import sys, mpicdsgd.checkpoints.writer_process;"
        "print(sorted({'torch', 'mpi4py', 'networkx', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_it_ends_while_a_forked_child_holds_its_pipe(tmp_path: Path) -> None:
    """As a data loader's processes do, which are forked after it and live on."""
    writer = WriterProcess()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        writer.write(tmp_path, about(1, ARRAYS), ARRAYS)
        closing = threading.Thread(target=writer.close)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
        assert not writer.alive
        assert place_of(tmp_path, 1, 1).rank_file(0).exists(), "what it had been given is done"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

"""Halts a process at a chosen moment, to be killed there.

The environment variable VICTIM holds JSON: the rank, and what to halt at: "step" (in that step's
loss function, with an exchange under way), "rename" (before a file of that pattern gets its name,
the ``nth`` time) or "write" (the ``nth`` block of such a file half written). The last two are its
writer process's. Who is halted makes the file ``halted``, which holds its process number, and
sleeps till somebody removes it; with "run_on" it goes on instead, so that the kill comes at random.
With "signal" it sends that one to the rank and its children, as batch systems do, and goes on.
"""

import fnmatch
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PLAN: dict[str, Any] = json.loads(os.environ.get("VICTIM", "{}"))
_rank = next((os.environ[k] for k in ("PMI_RANK", "OMPI_COMM_WORLD_RANK") if k in os.environ), "0")
if PLAN.get("rank") != int(_rank):
    PLAN = {}
_seen = {"step": 0, "rename": 0, "write": 0}
_replace, _pwrite = os.replace, os.pwrite


def halt() -> None:
    if "signal" in PLAN:
        rank = (
            os.getppid() if "mpicdsgd.checkpoints.writer_process" in sys.orig_argv else os.getpid()
        )
        for process in (rank, *_children(rank)):
            os.kill(process, signal.Signals[PLAN["signal"]])
        return
    Path(".halted").write_text(str(os.getpid()))
    _replace(".halted", "halted")
    deadline = time.monotonic() + 600
    while not PLAN.get("run_on") and Path("halted").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def _children(rank: int) -> list[int]:
    """The data loader's processes, and the writer of checkpoints."""
    threads = Path(f"/proc/{rank}/task").iterdir()
    return [int(child) for t in threads for child in (t / "children").read_text().split()]


def now(kind: str) -> bool:
    _seen[kind] += 1
    return _seen[kind] == PLAN.get("step" if kind == "step" else "nth", 1)


def watch_files() -> None:
    """Have this process halt at renames and writes."""
    if "rename" in PLAN:
        os.replace = _halting_replace
    if "write" in PLAN:
        os.pwrite = _halting_pwrite


def _halting_replace(source: Any, target: Any) -> None:
    if fnmatch.fnmatch(Path(target).name, PLAN["rename"]) and now("rename"):
        halt()
    _replace(source, target)


def _halting_pwrite(handle: int, data: Any, offset: int) -> int:
    name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
    if len(data) > 1000 and fnmatch.fnmatch(name, PLAN["write"]) and now("write"):
        _pwrite(handle, data[: len(data) // 2], offset)
        halt()
    return _pwrite(handle, data, offset)

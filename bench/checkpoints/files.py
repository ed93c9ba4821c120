"""What a rank opens before it trains, counted by strace, and what importing torch takes.

Thousands of ranks that start at once ask a shared file system for all of this at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CALL = re.compile(r"^(?:\d+ +)?(\w+)\((?:AT_FDCWD, )?\"([^\"]*)\".* = (-?\d+)")
_LOOKS = ("stat", "newfstatat", "statx", "lstat", "access", "faccessat", "faccessat2", "readlink")
_NO_DISK = ("/proc", "/sys", "/dev")


def traced(command: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """What ``command`` and its children open, and how often they ask; None: there is no strace.

    ``files``: those that there were, each once, outside of ``folder`` and of what is no disk.
    """
    strace = shutil.which("strace")
    if strace is None:
        return None
    log = folder / "strace"
    words = [strace, "-f", "-qq", "-e", "trace=%file", "-o", str(log), *command]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    opened: set[str] = set()
    opens = failed = looks = 0
    with log.open(errors="replace") as lines:
        for line in lines:
            call = _CALL.match(line)
            if call is None or call[2].startswith(_NO_DISK):
                continue
            if call[1] in ("open", "openat"):
                opens += int(call[3]) >= 0
                failed += int(call[3]) < 0
                if int(call[3]) >= 0:
                    opened.add(os.path.realpath(call[2]))
            elif call[1] in _LOOKS:
                looks += 1
    files = [f for f in opened if os.path.isfile(f) and not f.startswith(str(folder))]
    kinds = {kind: [f for f in files if kind_of(f) == kind] for kind in ("py", "so", "other")}
    return {
        "opens": opens,
        "failed_opens": failed,
        "looks": looks,
        "files": sorted(files),
        "count": {kind: len(found) for kind, found in kinds.items()},
        "size_bytes": {k: sum(os.path.getsize(f) for f in found) for k, found in kinds.items()},
    }


def kind_of(path: str) -> str:
    """Python's, shared libraries, others."""
    if path.endswith((".py", ".pyc")):
        return "py"
    return "so" if ".so" in Path(path).name else "other"


def forget(files: Sequence[str]) -> None:
    """Have ``files`` out of the page cache, where no process has them mapped."""
    for path in files:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)  # what is not on the disk yet stays
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def import_s(module: str) -> float:
    """Seconds of a new Python that imports ``module``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, Any]:
    """One rank's start, without a launcher: what it opens, and torch's import, warm and cold."""
    with tempfile.TemporaryDirectory(prefix="mpicdsgd-files-") as name:
        folder = Path(name)
        found: dict[str, Any] = {
            what: traced([sys.executable, "-c", f"import {module}"], folder)
            for what, module in {
                "python": "sys",
                "torch": "torch",
                "a rank": "mpicdsgd.runs.run, mpicdsgd.cli.parser",
                "a writer of checkpoints": "mpicdsgd.checkpoints.writer_process",
            }.items()
        }
    if found["torch"] is None:
        return {"skipped": "there is no strace"}
    files = found["torch"]["files"]
    import_s("torch")
    found["seconds"] = {"warm": [], "cold": []}
    for _ in range(rounds):
        found["seconds"]["warm"].append(import_s("torch"))
        forget(files)
        found["seconds"]["cold"].append(import_s("torch"))
    for row in found.values():
        row.pop("files", None)
    return found

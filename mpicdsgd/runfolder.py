"""A run's folder: its generations, and files that appear whole or not at all. No MPI here.

Every incarnation of a run claims the next *generation* (`owner`) and writes only files that carry
its number, so a process that was thought dead and still writes harms nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("mpicdsgd")

_CLAIM = re.compile(r"generation-(\d{4,9})")
_OWNED = re.compile(r"(?:config|metrics|trace)\.g(\d{4,9})\.(?:toml|jsonl)")


def claim_file(run_dir: Path, generation: int) -> Path:
    """The file whose creation claims ``generation``: see `owner`."""
    return run_dir / f"generation-{generation:04d}"


def newest_generation(run_dir: Path) -> int:
    """The highest generation that left a trace in the run's folder, 0 if none did.

    Raises:
        OSError: the folder cannot be listed.
    """
    matches = (_CLAIM.fullmatch(name) or _OWNED.fullmatch(name) for name in os.listdir(run_dir))
    return max((int(match[1]) for match in matches if match), default=0)


def write_whole(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``: after a crash at any moment all of it is there, or none.

    Raises:
        OSError: it could not be written; no trace is left.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """What ``path`` is called until all of it is on the disk."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on the disk: a rename outlives a crash only after this."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swing_link(link: Path, target: str, generation: int) -> None:
    """Point the relative symlink ``link`` at ``target`` at once, with no moment without a link.

    A file of that name that is no link is the user's, and stays. A file system without symlinks
    costs the link only, which the log says.
    """
    temporary = link.with_name(f".{link.name}.g{generation:04d}.tmp")
    try:
        if link.exists() and not link.is_symlink():
            log.warning("%s is a file of its own, not a link: left as it is", link)
            return
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        os.symlink(target, temporary)
        os.replace(temporary, link)
    except OSError as error:
        log.warning("%s cannot be linked to %s (%s): read the latter", link, target, reason(error))


def is_regular(path: Path) -> bool:
    """Whether ``path`` is there and a plain file (opening a FIFO would wait for ever)."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def reason(error: BaseException) -> str:
    """One line that says why: an OSError's own words, else the exception's."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text or type(error).__name__


def strict(value: Any) -> Any:
    """``value`` as strict JSON allows it: NaN and infinities as "NaN", "Infinity", "-Infinity".

    JSON has no such numbers, and ``null`` would not say which it was. NumPy scalars and arrays
    become numbers and lists, tuples lists, paths strings.
    """
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return strict(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value

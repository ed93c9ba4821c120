"""A run's folder: its generations, and files that appear whole or not at all. No MPI here.

Every incarnation of a run claims the next *generation* (`runs.owner`) and writes only files that
carry its number, so a process that was thought dead and still writes harms nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path

log = logging.getLogger("mpicdsgd")


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

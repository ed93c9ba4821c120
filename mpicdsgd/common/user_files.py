"""Small files of the user's, read whole: a UserError where one cannot be, never a hang."""

from __future__ import annotations

import os
import stat

from mpicdsgd.common.errors import UserError


def check_file(path: str, shown: str, max_bytes: int) -> int:
    """The size in bytes of the regular file ``path``.

    Raises UserError where there is none, or a larger one: a pipe would hang, /dev/zero never end.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"cannot read {shown}: {_reason(error)}: give an existing file") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {shown}: not a regular file: give an existing file")
    if status.st_size > max_bytes:
        raise UserError(
            f"{shown} has {status.st_size} bytes, more than the {max_bytes} that one of its kind "
            f"can need: is it the right file?"
        )
    return status.st_size


def read_bytes(path: str, shown: str, max_bytes: int) -> bytes:
    """What the file holds. Raises UserError where it cannot be read or is larger."""
    check_file(path, shown, max_bytes)
    try:
        with open(path, "rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise UserError(f"cannot read {shown}: {_reason(error)}") from None


def read_text(path: str, shown: str, max_bytes: int) -> str:
    """What the file holds, as UTF-8. Raises UserError where it is not, or cannot be read."""
    data = read_bytes(path, shown, max_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise UserError(f"{shown}:{line}: not text in UTF-8: write it as UTF-8") from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "not a path"

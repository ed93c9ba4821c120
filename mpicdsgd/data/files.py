"""Reading a file that may be anything; every way to fail is a UserError with the path."""

import gzip
import os
import zlib
from pathlib import Path

from mpicdsgd.common.errors import UserError

PIECE = 1 << 20


def folder(path: str, key_hint: str, below: str = "") -> Path:
    """Return ``path``, or its subfolder ``below`` where there is one; UserError if no folder.

    Args:
        path: ``data.path``; a leading ``~`` is the home folder.
        key_hint: what should be there, for the messages.
        below: name of a subfolder.
    """
    found = expand(path, key_hint)
    # os.path, because pathlib's questions raise where a folder above may not be entered.
    if not os.path.exists(found):
        raise UserError(f'data.path = "{path}": no such folder; expected {key_hint}')
    if not os.path.isdir(found):
        raise UserError(f'data.path = "{path}" is not a folder; expected {key_hint}')
    return found / below if below and os.path.isdir(found / below) else found


def expand(path: str, key_hint: str) -> Path:
    """Return ``path`` with a leading ``~`` resolved; UserError if it is empty or no path."""
    if not path or "\0" in path:
        raise UserError(f"data.path is {'not a path' if path else 'empty'}: name {key_hint}")
    try:
        return Path(path).expanduser()
    except RuntimeError as err:  # no home folder
        raise UserError(f'data.path = "{path}": {err}') from err


def first_existing(where: Path, names: list[str]) -> Path:
    """Return the first of the files ``names`` in the folder ``where``; UserError if none is."""
    for name in names:
        if os.path.isfile(where / name):  # no pipe: it would be waited for
            return where / name
    raise UserError(
        f"{where} has no {names[0]} (nor {', '.join(names[1:])})"
        if names[1:]
        else f"{where} has no {names[0]}"
    )


def read(path: Path) -> bytes:
    """Return the contents of a file, uncompressed if it begins as gzip does."""
    pieces = []
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not zipped:
                return file.read()
            # In pieces: what a damaged header claims is not to be allocated at once.
            with gzip.GzipFile(fileobj=file) as stream:
                while piece := stream.read(PIECE):
                    pieces.append(piece)
    except EOFError as err:
        raise UserError(f"{path} is truncated: the compressed data end too early") from err
    except zlib.error as err:
        raise UserError(f"{path} is damaged: {err}") from err
    except OSError as err:  # BadGzipFile is one
        raise UserError(f"{path} cannot be read: {err.strerror or err}") from err
    return b"".join(pieces)

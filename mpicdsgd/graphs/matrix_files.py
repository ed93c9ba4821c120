"""Matrices from files: CSV, .npy, HDF5. Whatever a file holds: numbers or a UserError.

.csv .txt     a line a row, numbers apart by commas, semicolons or blanks; # begins a comment
.npy          real numbers; nothing pickled
.h5 .hdf5     the dataset after a second colon (pi.h5:weights/Pi), else "Pi", else the only one
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpicdsgd.common import signals
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import printable
from mpicdsgd.common.user_files import check_file, read_text

# HDF5's library can loop or crash on a damaged file (of 4,000 with a flipped bit one hung): it
# reads in a process of its own, which is ended after this time.
HDF5_TIMEOUT_S = 60.0
_HDF5_READER = Path(__file__).with_name("_read_hdf5.py")


def read_matrix(path: str, n: int) -> npt.NDArray[np.float64]:
    """Read an n x n matrix, float64, from ``path``; its suffix picks the format.

    The numbers are not judged here: ``graphs.mixing_rules.from_matrix`` does that.

    Raises:
        UserError: missing, unreadable or malformed file, another shape.
    """
    dataset = ""
    if found := re.fullmatch(r"(.+\.(?:h5|hdf5))(?::(.*))?", path, re.IGNORECASE | re.DOTALL):
        path, dataset = found[1], found[2] or ""
    shown = printable(path)
    match Path(path).suffix.lower():
        case ".csv" | ".txt":
            return _read_csv(path, shown, n)
        case ".npy":
            return _read_npy(path, shown, n)
        case ".h5" | ".hdf5":
            return _read_hdf5(path, shown, dataset, n)
        case suffix:
            raise UserError(
                f"mixing file {shown}: unknown suffix {printable(suffix)!r}: allowed are .csv, "
                f".txt, .npy, .h5, .hdf5"
            )


def _read_csv(path: str, shown: str, n: int) -> npt.NDArray[np.float64]:
    rows: list[list[float]] = []
    text = read_text(path, shown, (1 << 20) + 64 * n * n)
    for number, line in enumerate(text.splitlines(), start=1):
        row: list[float] = []
        content = line.partition("#")[0].strip()
        if not content:
            continue
        for field in re.split(r"\s*[,;]\s*|\s+", content):
            try:
                row.append(float(field))
            except ValueError:
                raise UserError(
                    f"{shown}:{number}: expected a number in column {len(row) + 1}, got "
                    f"{field[:40]!r}"
                ) from None
        if len(row) != n:
            raise UserError(
                f"{shown}:{number}: expected {n} numbers for {n} agents, got {len(row)}"
            )
        rows.append(row)
    if len(rows) != n:
        raise UserError(f"{shown}: expected {n} rows for {n} agents, got {len(rows)}")
    return np.array(rows, dtype=np.float64)


def _read_npy(path: str, shown: str, n: int) -> npt.NDArray[np.float64]:
    size = check_file(path, shown, (1 << 20) + 16 * n * n)
    try:
        # Old headers (Python 2's long integers) read with a warning.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            else:
                raise ValueError("unknown version")
            start = file.tell()
            # All before any data is read: a header can claim more than the memory holds.
            if dtype.kind not in "biuf":
                raise UserError(f"{shown}: expected real numbers, got dtype {_brief(dtype)}")
            if shape != (n, n):
                raise UserError(
                    f"{shown}: expected {n} x {n} numbers for {n} agents, got {_brief(shape)}"
                )
            if size - start != n * n * dtype.itemsize:
                raise UserError(
                    f"{shown}: expected {n * n * dtype.itemsize} bytes of numbers, found "
                    f"{size - start}: the file is cut short or damaged"
                )
            file.seek(0)
            return np.load(file, allow_pickle=False).astype(np.float64)  # type: ignore[no-any-return]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror or 'the file changed'}") from None
    except Exception:  # numpy's header reader raises any kind
        raise UserError(f"{shown}: not a .npy file: write it with numpy.save") from None


def _read_hdf5(path: str, shown: str, dataset: str, n: int) -> npt.NDArray[np.float64]:
    check_file(path, shown, 1 << 62)  # any size: only the dataset is read
    if "\0" in dataset:
        raise UserError(f"{shown}: no dataset can be called {printable(dataset)[:60]!r}")
    # A lock would fail on a parallel file system without locks, and nothing is written.
    environment = {**os.environ, "HDF5_USE_FILE_LOCKING": "FALSE"}
    # -P: nothing is imported from the current folder.
    command = [sys.executable, "-P", str(_HDF5_READER), os.path.abspath(path), dataset, str(n)]
    try:
        with signals.not_for_children():
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=HDF5_TIMEOUT_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise UserError(f"{shown}: HDF5 hangs on this file: it is damaged: write it anew") from None
    except (OSError, ValueError):  # no process can be started, or a name the system cannot take
        raise UserError(f"{shown}: cannot start a reader: give the matrix as .npy") from None
    if done.returncode == 2:
        raise UserError(f"{shown}: {printable(done.stdout.decode(errors='replace'))[:200]}")
    if done.returncode or len(done.stdout) != 8 * n * n:
        raise UserError(f"{shown}: HDF5 fails on this file: it is damaged: write it anew")
    return np.frombuffer(done.stdout, dtype=np.float64).reshape(n, n)


def _brief(value: object) -> str:
    return printable(str(value))[:60]

"""Read one n x n matrix from an HDF5 file and write it to stdout, as a process of its own.

Started by ``matrix_files.py``, which says why; imports nothing of this package. Arguments: path,
dataset ("" to find it), n. Stdout: n * n native float64 and status 0; one line and status 2 where
the file is at fault; any other status: HDF5 failed.
"""

from __future__ import annotations

import sys


def _refuse(message: str) -> None:
    sys.stdout.write(message)
    sys.stdout.flush()
    raise SystemExit(2)


def main(path: str, dataset: str, n: int) -> None:
    """Write the matrix to stdout, or say why not."""
    # A parallel h5py imports mpi4py, and a second MPI_Init under a rank's environment would take
    # the launcher's connection from the rank itself.
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    import h5py
    import numpy as np

    try:
        file = h5py.File(path, "r")
    except OSError:
        _refuse("not an HDF5 file, or cut short or damaged")
    with file:
        if not dataset:
            names = [k for k in file if isinstance(file.get(k, getlink=True), h5py.HardLink)]
            names = [k for k in names if isinstance(file[k], h5py.Dataset)]
            if "Pi" not in names and len(names) != 1:
                _refuse(
                    f"which dataset? it has {names[:8]}: name one after a colon, as in pi.h5:Pi"
                )
            dataset = "Pi" if "Pi" in names else names[0]
        found = file.get(dataset)
        if not isinstance(found, h5py.Dataset):
            _refuse(f"no dataset {dataset[:60]!r}: it has {list(file)[:8]}")
        if found.dtype.kind not in "biuf":
            _refuse(f"dataset {dataset[:60]!r} must hold real numbers, got {found.dtype}"[:160])
        if found.shape != (n, n):
            _refuse(f"expected {n} x {n} numbers for {n} agents, got {found.shape}"[:160])
        try:
            values = np.ascontiguousarray(found[()], dtype=np.float64)
        except OSError:
            _refuse(f"dataset {dataset[:60]!r} cannot be read: the file is damaged")
    sys.stdout.buffer.write(values.tobytes())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

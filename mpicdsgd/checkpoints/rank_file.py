"""One agent's checkpoint file, and the index over all agents' files (HDF5). No MPI here.

    /arrays/<name>   the array as it is, contiguous; a "/" in a name makes a group
    /about           JSON: step, generation, agent, agents, meta, shape and dtype of every array

Nothing is pickled and no object dtype is written. ``about`` is a dataset: attributes end at 64 KB.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpicdsgd.checkpoints.manifest import Damaged, FileEntry, Place, entry_of
from mpicdsgd.common.files import reason, temporary_name

_PIECE = 1 << 23  # bytes
_NUMERIC = "biufc"  # NumPy's kinds: bool, integers, floats, complex

Arrays = dict[str, NDArray[Any]]
Layout = dict[str, dict[str, Any]]  # shape and dtype of every array, as JSON


@dataclass(frozen=True)
class About:
    """What a rank file says of itself."""

    step: int
    generation: int
    agent: int
    agents: int
    meta: dict[str, Any]
    arrays: Layout


def layout(arrays: Arrays) -> Layout:
    """Shape and dtype of every array, as JSON. Names and dtypes must be storable (asserted)."""
    for name, array in arrays.items():
        parts = name.split("/")
        assert all(part not in ("", ".") for part in parts), f"array name {name!r}"
        above = ("/".join(parts[:n]) for n in range(1, len(parts)))
        assert not any(group in arrays for group in above), f"{name!r} lies below another array"
        assert array.dtype.kind in _NUMERIC, f"array {name!r} has dtype {array.dtype}"
    return {n: {"shape": list(a.shape), "dtype": a.dtype.str} for n, a in arrays.items()}


def write_rank(place: Place, about: About, arrays: Arrays) -> FileEntry:
    """Write an agent's file under a temporary name, have it on the disk, rename it. Local.

    Raises:
        OSError, RuntimeError, ValueError: HDF5 could not write it (disk full, no permission).
    """

    def fill(file: h5py.File) -> None:
        for name, array in arrays.items():
            file.create_dataset(f"arrays/{name}", data=array)
        file.create_dataset("about", data=np.bytes_(json.dumps(asdict(about))))

    return _write(place.rank_file(about.agent), fill)


def write_index(place: Place, agents: int, arrays: Layout) -> FileEntry:
    """Write the index: for every array in ``arrays`` (alike on all agents) a virtual dataset of
    shape (agents, *shape) over all rank files, which lie beside it. Local.

    Raises:
        OSError, RuntimeError, ValueError: HDF5 could not write it.
    """

    def fill(file: h5py.File) -> None:
        file.attrs.update(step=place.step, generation=place.generation, agents=agents)
        file.create_group("arrays")
        for name, spec in arrays.items():
            shape, dtype = tuple(spec["shape"]), np.dtype(spec["dtype"])
            virtual = h5py.VirtualLayout((agents, *shape), dtype=dtype)
            for rank in range(agents):
                source = place.rank_file(rank).name
                virtual[rank] = h5py.VirtualSource(source, f"arrays/{name}", shape, dtype)
            file.create_virtual_dataset(f"arrays/{name}", virtual)

    return _write(place.index, fill)


def _write(path: Path, fill: Callable[[h5py.File], None]) -> FileEntry:
    temporary = temporary_name(path)
    try:
        with _Deaf(temporary) as disk:
            with h5py.File(disk, "w") as file:
                fill(file)
            disk.check()
            with ThreadPoolExecutor(1) as pool:  # the checksum, while the disk is at work
                checksum = pool.submit(entry_of, temporary, path.name)
                disk.sync()
                entry = checksum.result()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return entry


class _Deaf(io.RawIOBase):
    """A new file on the disk that tells HDF5 of no failure; `check` raises the first.

    HDF5 that learns of a full disk while it closes a file keeps half of it, and crashes soon after
    (bus error with 2.0.0): a training run would die of a checkpoint that it can do without.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._at = 0
        self._error: OSError | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def sync(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size()}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self._error is None:
                done = os.pwrite(self._handle, rest[:_PIECE], self._at)
                if done == _PIECE:  # Linux begins to write it to the disk now, not at the sync
                    os.posix_fadvise(self._handle, self._at, done, os.POSIX_FADV_DONTNEED)
                self._at, rest = self._at + done, rest[done:]
        except OSError as error:
            self._error = error
        self._at += len(rest)
        return size

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._handle, len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        try:
            os.ftruncate(self._handle, size)
        except OSError as error:
            self._error = self._error or error
        return size

    def _size(self) -> int:
        return os.fstat(self._handle).st_size


def read_rank(path: Path) -> tuple[About, Arrays]:
    """Read an agent's file, whose checksum the caller has verified. Local.

    Links, external and virtual storage are not followed, and nothing larger than the file is
    allocated, whoever wrote it.

    Raises:
        Damaged: it does not hold what it says.
    """
    try:
        size = path.stat().st_size
        with h5py.File(path, "r", locking=False) as file:
            about = _about(file["about"], path.name, size)
            found: dict[str, h5py.Dataset] = {}

            def collect(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    found[name] = item

            if "arrays" in file:
                file["arrays"].visititems(collect)
            if found.keys() != about.arrays.keys():
                raise Damaged(f"{path.name}: does not hold the arrays that it lists")
            return about, {n: _array(found[n], s, path.name, size) for n, s in about.arrays.items()}
    except Damaged:
        raise
    except Exception as error:  # h5py raises nearly any kind over a strange file
        raise Damaged(f"{path.name}: {reason(error)}") from None


def dataset_offset(path: Path, name: str) -> int | None:
    """Where array ``name`` begins in the file (bytes), if it lies there in one piece."""
    with h5py.File(path, "r", locking=False) as file:
        offset: int | None = file[f"arrays/{name}"].id.get_offset()
    return offset


def _about(item: Any, name: str, size_bytes: int) -> About:
    if not isinstance(item, h5py.Dataset) or item.shape != () or item.dtype.kind != "S":
        raise Damaged(f"{name}: has no description of itself")
    if item.dtype.itemsize > size_bytes:
        raise Damaged(f"{name}: its description is longer than the file")
    body = json.loads(bytes(item[()]))
    about = About(**{key: body[key] for key in About.__dataclass_fields__})
    numbers = (about.step, about.generation, about.agent, about.agents)
    if not all(type(number) is int for number in numbers):
        raise Damaged(f"{name}: step, generation or agent is no number")
    if not (isinstance(about.meta, dict) and isinstance(about.arrays, dict)):
        raise Damaged(f"{name}: meta or arrays is missing")
    return about


def _array(item: h5py.Dataset, spec: dict[str, Any], name: str, size_bytes: int) -> NDArray[Any]:
    dtype, shape = item.dtype, item.shape
    if shape is None or dtype.kind not in _NUMERIC or item.is_virtual or item.external:
        raise Damaged(f"{name}: {item.name} is no plain numeric array")
    if spec != {"shape": list(shape), "dtype": dtype.str}:
        raise Damaged(f"{name}: {item.name} is not of the shape and dtype that were written")
    if math.prod(shape) * dtype.itemsize > size_bytes:
        raise Damaged(f"{name}: {item.name} is larger than the file")
    return np.asarray(item[()], dtype=dtype)

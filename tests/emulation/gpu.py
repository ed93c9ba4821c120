"""An emulated GPU with the face of `mpicdsgd.kernels.gpu.Gpu`, for machines without one.

Its memory is the host's (shared files, so that other processes can import it), its streams are
threads that run what they are given later, in order, with random pauses, and its events have
CUDA's meaning: a wait is for the last record made before the call, of whatever process, and none
waits where none was made. The kernels are the real CUDA source, run by the shim. So a missing wait
shows as a wrong value, most of the time.

With ``main="inline"`` the main stream runs everything at once: torch's CPU tensors, which are
"device memory" here, know no streams.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import os
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
_FILES = (_FOLDER / f"mpicdsgd-test-{os.getpid()}-{i}" for i in count())
_PATIENCE_S = 60.0
MAIN = 1


class Shared:
    """A shared file in memory, made here or by another process."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        mode = os.O_RDWR | (os.O_CREAT | os.O_EXCL if size else 0)
        descriptor = os.open(path, mode, 0o600)
        if size:
            os.ftruncate(descriptor, size)
        self._map = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.address = self.bytes.ctypes.data


class Event:
    """Counts of records made and records reached, in shared memory."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.recorded, self.reached = shared.bytes[:16].view(np.int64).reshape(2, 1)
        self.times: dict[int, float] = {}


class EmulatedGpu:
    """See the module.

    Args:
        main: "inline", or "threaded" with a main stream like the others.
        seed: of the pauses; None: none.
        card: what `identity` is to be.
        importable: False makes every import fail, as between isolated containers.
        exportable: what can be made for other processes: "event", "memory", or both.
        slow: seconds that a copy of imported memory takes for each byte, to look like a link.
    """

    torch_device = torch.device("cpu")
    name = "emulated GPU"

    def __init__(
        self,
        *,
        main: str = "inline",
        seed: int | None = None,
        card: str = "card 0",
        importable: bool = True,
        exportable: str = "event memory",
        slow: float = 0.0,
    ) -> None:
        self.identity = card
        self._importable, self._slow = importable, slow
        self._exportable = exportable
        self._random = None if seed is None else random.Random(seed)
        _sweep()
        self._handles = count(2)
        self._memory: dict[int, Shared] = {}
        self._imported: dict[int, Shared] = {}
        self._events: dict[int, Event] = {}
        self._host: dict[int, NDArray[np.uint8]] = {}
        self._streams: dict[int, _Stream] = {}
        self._failed: list[BaseException] = []
        if main == "threaded":
            self._streams[MAIN] = _Stream(self._random, self._failed)

    def __deepcopy__(self, memo: Any) -> EmulatedGpu:
        return self

    def prepare(self) -> None:
        from emulation import shim

        shim.library()

    # Streams

    def stream(self) -> int:
        return MAIN

    def new_stream(self) -> int:
        handle = next(self._handles)
        self._streams[handle] = _Stream(self._random, self._failed)
        return handle

    def finish(self, stream: int) -> None:
        if stream in self._streams:
            self._streams[stream].finish()
        self._check()

    def destroy_stream(self, stream: int) -> None:
        self._streams.pop(stream).end()

    def _run(self, stream: int, work: Callable[[], None]) -> None:
        self._check()
        if stream in self._streams:
            self._streams[stream].put(work)
        else:
            assert stream == MAIN, f"no such stream: {stream}"
            work()

    def _check(self) -> None:
        if self._failed:
            raise RuntimeError("an earlier operation failed") from self._failed[0]

    # Memory

    def malloc(self, size_bytes: int) -> int:
        shared = Shared(next(_FILES), max(size_bytes, 1))
        self._memory[shared.address] = shared
        return shared.address

    def free(self, address: int) -> None:
        shared = self._memory.pop(address)
        shared.bytes[:] = 0xFF  # a NaN, for whoever still reads it
        shared.path.unlink()

    def pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        raw = np.zeros(size_bytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        array = raw[start : start + size_bytes]
        self._host[array.ctypes.data] = array
        return array

    def unpin(self, array: NDArray[np.uint8]) -> None:
        del self._host[array.ctypes.data]

    def copy(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        foreign = any(s.address <= source < s.address + s.bytes.size
                      for s in self._imported.values())  # fmt: skip

        def work() -> None:
            ctypes.memmove(to, source, size_bytes)
            if foreign and self._slow:
                time.sleep(size_bytes * self._slow)

        self._run(stream, work)

    # Events

    def event(self, *, shared: bool = False, timing: bool = False) -> int:
        if shared and "event" not in self._exportable:
            raise RuntimeError("not supported (emulated)")
        handle = next(self._handles)
        self._events[handle] = Event(Shared(next(_FILES), 16))
        return handle

    def record(self, event: int, stream: int) -> None:
        one = self._events[event]
        one.recorded[0] += 1
        number = int(one.recorded[0])

        def work() -> None:
            one.times[0] = time.perf_counter()
            one.reached[0] = number

        self._run(stream, work)

    def wait(self, stream: int, event: int) -> None:
        one = self._events[event]
        number = int(one.recorded[0])
        self._run(stream, lambda: _until(lambda: bool(one.reached[0] >= number)))

    def done(self, event: int) -> bool:
        self._check()
        one = self._events[event]
        return bool(one.reached[0] >= one.recorded[0])

    def synchronize(self, event: int) -> None:
        one = self._events[event]
        number = int(one.recorded[0])
        _until(lambda: bool(one.reached[0] >= number) or bool(self._failed))
        self._check()

    def elapsed_s(self, begin: int, end: int) -> float:
        return self._events[end].times[0] - self._events[begin].times[0]

    def destroy_event(self, event: int) -> None:
        one = self._events.pop(event)
        if str(os.getpid()) in one.shared.path.name.split("-"):
            with contextlib.suppress(FileNotFoundError):
                one.shared.path.unlink()

    # Other processes

    def export_memory(self, address: int) -> bytes:
        if "memory" not in self._exportable:
            raise RuntimeError("not supported (emulated)")
        return bytes(self._memory[address].path)

    def import_memory(self, handle: bytes) -> int:
        if not self._importable:
            raise RuntimeError("invalid device context (emulated)")
        shared = Shared(Path(os.fsdecode(handle)))
        self._imported[shared.address] = shared
        return shared.address

    def release_memory(self, address: int) -> None:
        del self._imported[address]

    def export_event(self, event: int) -> bytes:
        return bytes(self._events[event].shared.path)

    def import_event(self, handle: bytes) -> int:
        if not self._importable:
            raise RuntimeError("invalid device context (emulated)")
        number = next(self._handles)
        self._events[number] = Event(Shared(Path(os.fsdecode(handle))))
        return number

    # Kernels

    def launch(
        self, name: str, blocks: int, threads: int, arguments: ctypes.Structure, stream: int
    ) -> None:
        from emulation import shim

        library = shim.library()
        size = ctypes.sizeof(arguments)
        values = ctypes.create_string_buffer(bytes(arguments), size)  # by value, as CUDA takes it

        def work() -> None:
            status = library.launch(name.encode(), blocks, threads, values, size)
            assert status == 0, f"kernel {name}: status {status}"

        self._run(stream, work)

    @property
    def in_use(self) -> int:
        """Allocations, events, streams and imports that were not given back."""
        kept = (self._memory, self._imported, self._events, self._host, self._streams)
        return sum(map(len, kept))


@cache
def _sweep() -> None:
    """Remove files of processes that were aborted."""
    for path in _FOLDER.glob("mpicdsgd-test-*"):
        with contextlib.suppress(FileNotFoundError):
            if not Path("/proc", path.name.split("-")[2]).exists():
                path.unlink()


@atexit.register
def _at_exit() -> None:
    for path in _FOLDER.glob(f"mpicdsgd-test-{os.getpid()}-*"):
        path.unlink()


class _Stream:
    """A thread that runs what it is given, in order, later."""

    def __init__(self, pauses: random.Random | None, failed: list[BaseException]) -> None:
        self._random = None if pauses is None else random.Random(pauses.random())
        self._failed = failed
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def finish(self) -> None:
        reached = threading.Event()
        self.put(reached.set)
        _until(lambda: reached.is_set() or bool(self._failed))

    def end(self) -> None:
        self._work.put(None)
        self._thread.join(_PATIENCE_S)

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            if self._random is not None and self._random.random() < 0.5:
                time.sleep(self._random.random() * 2e-3)
            try:
                work()
            except BaseException as error:
                self._failed.append(error)
                return


def _until(condition: Callable[[], bool]) -> None:
    """Wait, in short naps; a wait that does not end is an error and no hang."""
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {_PATIENCE_S:g} s: a deadlock?")
        time.sleep(2e-5)

"""The few CUDA calls that the kernel and the transports need, through CuPy.

Everything else is written against this face, so that tests can put an emulated GPU in its place.
Addresses, streams and events are the integers that CUDA's own handles are. Calls are asynchronous
unless said otherwise, and every failure is CuPy's exception with CUDA's message.
"""

from __future__ import annotations

import ctypes
import socket
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.kernels.gpu import compiled

# An allocation smaller than the driver's granule shares it with others, and a handle opens it all.
_GRANULE = 2 << 20


class Gpu:
    """One GPU as this rank uses it. Local.

    Args:
        index: among the GPUs that this process sees.

    Attributes:
        torch_device: the same for torch.
        name: "NVIDIA H200", say.
        identity: the same on all ranks that use the same card, or the same slice of it.
    """

    def __init__(self, index: int) -> None:
        from cupy.cuda import driver, runtime

        self._runtime: Any = runtime
        self._driver: Any = driver
        self._index = index
        self._thread = threading.local()
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        properties = torch.cuda.get_device_properties(index)
        self.name: str = properties.name
        self.identity = f"{socket.gethostname()} {properties.uuid}"
        self._function: Any = None

    def prepare(self) -> None:
        """Load the kernels, compiling them where nobody has yet. Waits."""
        self._cuda()
        if self._function is None:
            self._function = compiled.load()

    def stream(self) -> int:
        """Torch's current stream."""
        return int(torch.cuda.current_stream(self.torch_device).cuda_stream)

    def new_stream(self) -> int:
        """A stream that the legacy default stream does not hold up."""
        return int(self._cuda().streamCreateWithFlags(self._runtime.streamNonBlocking))

    def finish(self, stream: int) -> None:
        """Wait for all that was given to ``stream``."""
        self._cuda().streamSynchronize(stream)

    def destroy_stream(self, stream: int) -> None:
        self._cuda().streamDestroy(stream)

    def malloc(self, size_bytes: int) -> int:
        """Zeroed device memory of its own allocation, which other processes may import. Waits."""
        runtime = self._cuda()
        rounded = -(-max(size_bytes, 1) // _GRANULE) * _GRANULE
        try:
            address = int(runtime.malloc(rounded))
        except runtime.CUDARuntimeError as error:
            if error.status != _NO_MEMORY:
                raise
            torch.cuda.empty_cache()  # torch keeps what it freed
            address = int(runtime.malloc(rounded))
        runtime.memset(address, 0, rounded)
        runtime.deviceSynchronize()  # streams that do not block would not wait for the memset
        return address

    def free(self, address: int) -> None:
        """Give memory back. Waits for the whole device: not for the hot path."""
        self._cuda().free(address)

    def pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        """Zeroed page-locked host memory, shape (size_bytes,), which kernels may write too."""
        flags = self._runtime.hostAllocMapped | self._runtime.hostAllocPortable
        address = int(self._cuda().hostAlloc(max(size_bytes, 1), flags))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
        array[:] = 0
        return array

    def unpin(self, array: NDArray[np.uint8]) -> None:
        """Give back what `pinned` gave; no kernel and no view may use it any more. Waits."""
        self._cuda().freeHost(array.ctypes.data)

    def copy(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy between any two memories, page-locked where they are the host's."""
        if size_bytes:
            runtime = self._cuda()
            runtime.memcpyAsync(to, source, size_bytes, runtime.memcpyDefault, stream)

    def event(self, *, shared: bool = False, timing: bool = False) -> int:
        """An event; ``shared``: one that other processes may import."""
        runtime = self._cuda()
        flags = runtime.eventDefault if timing else runtime.eventDisableTiming
        return int(runtime.eventCreateWithFlags(flags | (runtime.eventInterprocess * shared)))

    def record(self, event: int, stream: int) -> None:
        """Let ``event`` stand for all that was given to ``stream`` so far."""
        self._cuda().eventRecord(event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Hold up ``stream`` until what was last recorded in ``event``, before now, is done."""
        self._cuda().streamWaitEvent(stream, event)

    def done(self, event: int) -> bool:
        """Whether what was last recorded is done."""
        status = self._cuda().eventQuery(event)
        if status not in (0, _NOT_READY):
            raise self._runtime.CUDARuntimeError(status)
        return bool(status == 0)

    def synchronize(self, event: int) -> None:
        """Wait until what was last recorded is done."""
        self._cuda().eventSynchronize(event)

    def elapsed_s(self, begin: int, end: int) -> float:
        """Seconds between two events made with ``timing`` that are done."""
        return float(self._cuda().eventElapsedTime(begin, end)) / 1e3

    def destroy_event(self, event: int) -> None:
        self._cuda().eventDestroy(event)

    def export_memory(self, address: int) -> bytes:
        """A handle by which another process on this node can import what `malloc` gave."""
        return bytes(self._cuda().ipcGetMemHandle(address))

    def import_memory(self, handle: bytes) -> int:
        """Another process's memory, in this one's address space."""
        return int(self._cuda().ipcOpenMemHandle(handle))

    def release_memory(self, address: int) -> None:
        """Undo `import_memory`. Waits."""
        self._cuda().ipcCloseMemHandle(address)

    def export_event(self, event: int) -> bytes:
        return bytes(self._cuda().ipcGetEventHandle(event))

    def import_event(self, handle: bytes) -> int:
        return int(self._cuda().ipcOpenEventHandle(handle))

    def launch(
        self, name: str, blocks: int, threads: int, arguments: ctypes.Structure, stream: int
    ) -> None:
        """Start kernel ``name`` of native/kernel.cu with ``arguments`` by value."""
        self._cuda()
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._driver.launchKernel(
            self._function(name), blocks, 1, 1, threads, 1, 1, 0, stream,
            ctypes.addressof(parameters), 0,
        )  # fmt: skip

    def _cuda(self) -> Any:
        """CuPy's runtime, with this GPU made the calling thread's current one.

        Autograd runs hooks on threads of its own, and CuPy's CUDA runtime is not torch's.
        """
        if not getattr(self._thread, "ready", False):
            self._runtime.setDevice(self._index)
            self._thread.ready = True
        return self._runtime


_NO_MEMORY = 2  # cudaErrorMemoryAllocation
_NOT_READY = 600  # cudaErrorNotReady

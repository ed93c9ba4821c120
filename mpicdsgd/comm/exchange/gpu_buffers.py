"""Published buffers in a GPU's memory, and the events that order who writes and who reads them.

With each post goes one event, recorded on the stream of the pass before it: for the readers it says
that post n is written, for the sources that post n - 1 has been read. A stream waits only for what
was recorded before the call, so the token, which makes the peer call, is sent after the record.
There are two events so that an agent which comes late to wait for a post does not wait for the next
one, which a peer may have recorded meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpicdsgd.comm.exchange.buffer_layout import blocks_of
from mpicdsgd.comm.exchange.header import HEADER_BYTES
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE
from mpicdsgd.kernels.gpu import Gpu


@dataclass(frozen=True)
class Handles:
    """By which other processes on this node import the buffers and events."""

    memory: bytes
    events: tuple[bytes, ...]


class DevicePublished:
    """See the module, and `token_transport.Published`. Local.

    Args:
        size: elements D; ``wire``: their type.
        shared: whether other processes are to read it in place.

    Attributes:
        memory: device address of both buffers, one after the other.
        events: for post n, ``events[n % 2]``.
        handles: None where it is not shared, or cannot be: `refused` says why.
        stream: of the last pass; at exit, whoever closes may be on another one.
    """

    def __init__(self, gpu: Gpu, size: int, wire: str, *, shared: bool) -> None:
        self._gpu = gpu
        self.size_bytes = HEADER_BYTES * blocks_of(size * np.dtype(WIRE_DTYPE[wire]).itemsize)
        self.memory = gpu.malloc(2 * self.size_bytes)
        self.handles: Handles | None = None
        self.refused = ""
        self.events: list[int] = []
        if shared:
            try:
                self.events += [gpu.event(shared=True), gpu.event(shared=True)]
                exported = tuple(gpu.export_event(event) for event in self.events)
                self.handles = Handles(gpu.export_memory(self.memory), exported)
            except Exception as error:  # whatever CUDA says, there is another way
                self.refused = f"CUDA IPC is refused here ({error})"
                for event in self.events:
                    gpu.destroy_event(event)
                self.events = []
        if not self.events:
            self.events = [gpu.event(), gpu.event()]
        self.stream = gpu.stream()

    def buffer(self, post: int) -> int:
        return self.memory + self.size_bytes * (post % 2)

    def mark(self, post: int) -> None:
        self._gpu.record(self.events[post % 2], self.stream)

    def begin_pass(self, post: int) -> None:
        self.stream = self._gpu.stream()
        # It may be another one than at the last pass.
        self._gpu.wait(self.stream, self.events[post % 2])

    def settle(self) -> None:
        self._gpu.finish(self.stream)

    def free(self) -> None:
        for event in self.events:
            self._gpu.destroy_event(event)
        self._gpu.free(self.memory)

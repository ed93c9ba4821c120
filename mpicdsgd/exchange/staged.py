"""Routes over MPI: through page-locked host memory in chunks, or with device pointers.

Staged, a chunk goes from the device to the host, over the network and to the device again while
the chunks before and behind it do the other two, all of it beside the backward pass. MPI is called
only from `advance`: from gradient hooks, and while the step waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from mpicdsgd.exchange.device import DevicePublished
from mpicdsgd.exchange.header import HEADER_BYTES
from mpicdsgd.exchange.neighbor import Blocks
from mpicdsgd.gpu import Gpu

CHUNK_BYTES = 4 << 20


class StagedRoute:
    """See the module, and `tokens.Route`. Making one, and `free`, are collective over ``comm``.

    A chunk is posted only when its copy to the host is done, and that copy follows the last pass
    and the copies to the device of the post before: so the receive buffer and its copy on the
    device are free again. And `advance` has seen all sends of the post before completed, so the
    send buffer is, too.

    Args:
        comm: the agents'; all of them make the route, also those without such an edge.
        sources, destinations: whose values come this way, and to whom this agent's go, ascending.
        chunk_bytes: the same on all agents.
    """

    def __init__(
        self,
        gpu: Gpu,
        comm: MPI.Intracomm,
        published: DevicePublished,
        sources: Sequence[int],
        destinations: Sequence[int],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._gpu, self._published = gpu, published
        self.sources = tuple(sources)
        self._sends = bool(destinations)
        self._takes_part = bool(sources or destinations)
        self._blocks = Blocks(comm, sources, destinations)
        total = published.size_bytes // HEADER_BYTES
        self._slot = total
        step = max(1, chunk_bytes // HEADER_BYTES)
        self._chunks = [(i, min(step, total - i)) for i in range(0, total, step)]
        self._send = gpu.pinned(published.size_bytes if destinations else 0)
        self._receive = gpu.pinned(published.size_bytes * len(sources))
        self._memory = gpu.malloc(published.size_bytes * len(sources))
        self._down, self._up = gpu.new_stream(), gpu.new_stream()
        self._on_host = [gpu.event() for _ in self._chunks]
        self._here = gpu.event()
        self._requests: list[MPI.Request] = []
        self._arrived = 0

    def start(self, post: int) -> None:
        self._gpu.wait(self._down, self._published.events[post % 2])
        self._gpu.wait(self._down, self._here)  # for agents that leave: no pass has waited for it
        source = self._published.buffer(post)
        for (first, count), event in zip(self._chunks, self._on_host, strict=True):
            if self._sends:
                to = self._send.ctypes.data + first * HEADER_BYTES
                size = count * HEADER_BYTES
                self._gpu.copy(to, source + first * HEADER_BYTES, size, self._down)
            self._gpu.record(event, self._down)
        self._requests = []
        self._arrived = 0

    def advance(self, post: int, told: bool) -> bool:
        while len(self._requests) < len(self._chunks):
            chunk = len(self._requests)
            if self._takes_part and not self._gpu.done(self._on_host[chunk]):
                break
            first, count = self._chunks[chunk]
            request = self._blocks.start(self._send, self._receive, count, first, self._slot)
            self._requests.append(request)
        while self._arrived < len(self._requests) and self._requests[self._arrived].Test():
            self._to_device(*self._chunks[self._arrived])
            self._arrived += 1
            if self._arrived == len(self._chunks):
                self._gpu.record(self._here, self._up)
        return self._arrived == len(self._chunks)

    def take(self, post: int) -> list[int]:
        if self._chunks:
            self._gpu.wait(self._published.stream, self._here)
        size = self._published.size_bytes
        return [self._memory + i * size for i in range(len(self.sources))]

    def settle(self) -> None:
        self._gpu.finish(self._down)
        self._gpu.finish(self._up)

    def release(self) -> None:
        pass

    def free(self) -> None:
        for event in (*self._on_host, self._here):
            self._gpu.destroy_event(event)
        for stream in (self._down, self._up):
            self._gpu.destroy_stream(stream)
        self._gpu.free(self._memory)
        self._gpu.unpin(self._send)
        self._gpu.unpin(self._receive)
        self._blocks.free()

    def _to_device(self, first: int, count: int) -> None:
        for i in range(len(self.sources)):
            at = (i * self._slot + first) * HEADER_BYTES
            source = self._receive.ctypes.data + at
            self._gpu.copy(self._memory + at, source, count * HEADER_BYTES, self._up)


class MessageRoute:
    """Device pointers given to MPI, which `probe` has seen to take them; see `StagedRoute`."""

    def __init__(
        self,
        gpu: Gpu,
        comm: MPI.Intracomm,
        published: DevicePublished,
        sources: Sequence[int],
        destinations: Sequence[int],
    ) -> None:
        self._gpu, self._published = gpu, published
        self.sources = tuple(sources)
        self._blocks = Blocks(comm, sources, destinations)
        self._memory = gpu.malloc(published.size_bytes * len(sources))
        self._receive = device_buffer(self._memory, published.size_bytes * len(sources))
        self._request: MPI.Request | None = None

    def start(self, post: int) -> None:
        self._request = None

    def advance(self, post: int, told: bool) -> bool:
        # MPI knows no streams: it may read what a pass wrote, and overwrite what it read, once that
        # pass is done.
        if self._request is None and self._gpu.done(self._published.events[post % 2]):
            size = self._published.size_bytes
            send = device_buffer(self._published.buffer(post), size)
            self._request = self._blocks.start(send, self._receive, size // HEADER_BYTES)
        return self._request is not None and self._request.Test()

    def take(self, post: int) -> list[int]:
        size = self._published.size_bytes
        return [self._memory + i * size for i in range(len(self.sources))]

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass

    def free(self) -> None:
        self._gpu.free(self._memory)
        self._blocks.free()


def device_buffer(address: int, size_bytes: int) -> Any:
    """Device memory as mpi4py takes a buffer: an address and a length, never looked into."""
    return MPI.buffer.fromaddress(address, size_bytes)

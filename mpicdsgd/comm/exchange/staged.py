"""Routes over MPI: through page-locked host memory in chunks, or with device pointers.

Staged, a chunk goes from the device to the host, over the network and to the device again while
the chunks before and behind it do the other two, all of it beside the backward pass. MPI is called
only from `advance`: from gradient hooks, and while the step waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from mpicdsgd.comm.exchange.gpu_buffers import DevicePublished
from mpicdsgd.comm.exchange.header import HEADER_BYTES
from mpicdsgd.comm.exchange.messages import Ends, Messages, Requests
from mpicdsgd.kernels.gpu import Gpu

CHUNK_BYTES = 4 << 20


class StagedRoute:
    """See the module, and `token_transport.Route`.

    Making one, and `free`, are collective over ``comm``.

    A chunk is posted only when its copy to the host is done, and that copy follows the last pass
    and the copies to the device of the post before: so the receive buffer and its copy on the
    device are free again. And `advance` has seen all sends of the post before completed, so the
    send buffer is, too.

    Args:
        comm: the agents'; all of them make the route, also those without such an edge.
        turns: of each turn, what goes this way; see `messages.Messages`.
        chunk_bytes: the same on all agents.
    """

    def __init__(
        self,
        gpu: Gpu,
        comm: MPI.Intracomm,
        published: DevicePublished,
        turns: Sequence[Ends],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._gpu, self._published = gpu, published
        self._turn = 0
        self._messages = Messages(comm, turns)
        total = published.size_bytes // HEADER_BYTES
        self._slot = total
        step = max(1, chunk_bytes // HEADER_BYTES)
        self._chunks = [(i, min(step, total - i)) for i in range(0, total, step)]
        self._send = gpu.pinned(published.size_bytes if any(to for _, to in turns) else 0)
        self._receive = gpu.pinned(published.size_bytes * self._messages.slots)
        self._memory = gpu.malloc(published.size_bytes * self._messages.slots)
        self._down, self._up = gpu.new_stream(), gpu.new_stream()
        self._on_host = [gpu.event() for _ in self._chunks]
        self._here = gpu.event()
        self._requests: list[Requests] = []
        self._arrived = 0

    def start(self, post: int, turn: int) -> None:
        self._turn = turn
        _, readers = self._messages.turns[turn]
        self._gpu.wait(self._down, self._published.events[post % 2])
        self._gpu.wait(self._down, self._here)  # for agents that leave: no pass has waited for it
        source = self._published.buffer(post)
        for (first, count), event in zip(self._chunks, self._on_host, strict=True):
            if readers:
                to = self._send.ctypes.data + first * HEADER_BYTES
                size = count * HEADER_BYTES
                self._gpu.copy(to, source + first * HEADER_BYTES, size, self._down)
            self._gpu.record(event, self._down)
        self._requests = []
        self._arrived = 0

    def advance(self, post: int, partners: frozenset[int] | None) -> bool:
        may_start = self._messages.may_start(partners)
        while may_start and len(self._requests) < len(self._chunks):
            chunk = len(self._requests)
            if any(self._messages.turns[self._turn]) and not self._gpu.done(self._on_host[chunk]):
                break
            first, count = self._chunks[chunk]
            requests = self._messages.start(
                self._send, self._receive, count, self._turn,
                partners=partners, first=first, slot=self._slot,
            )  # fmt: skip
            self._requests.append(requests)
        while self._arrived < len(self._requests) and self._requests[self._arrived].Test():
            self._to_device(*self._chunks[self._arrived])
            self._arrived += 1
            if self._arrived == len(self._chunks):
                self._gpu.record(self._here, self._up)
        return self._arrived == len(self._chunks)

    def take(self, post: int) -> dict[int, int]:
        if self._chunks:
            self._gpu.wait(self._published.stream, self._here)
        sources, size = self._messages.turns[self._turn][0], self._published.size_bytes
        return {source: self._memory + i * size for i, source in enumerate(sources)}

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
        self._messages.free()

    def _to_device(self, first: int, count: int) -> None:
        for i in range(len(self._messages.turns[self._turn][0])):
            at = (i * self._slot + first) * HEADER_BYTES
            source = self._receive.ctypes.data + at
            self._gpu.copy(self._memory + at, source, count * HEADER_BYTES, self._up)


class MessageRoute:
    """Device pointers given to MPI; `gpu_aware_probe` saw it take them. See `StagedRoute`."""

    def __init__(
        self,
        gpu: Gpu,
        comm: MPI.Intracomm,
        published: DevicePublished,
        turns: Sequence[Ends],
    ) -> None:
        self._gpu, self._published = gpu, published
        self._turn = 0
        self._messages = Messages(comm, turns)
        room = published.size_bytes * self._messages.slots
        self._memory = gpu.malloc(room)
        self._receive = device_buffer(self._memory, room)
        self._requests: Requests | None = None

    def start(self, post: int, turn: int) -> None:
        self._turn = turn
        self._requests = None

    def advance(self, post: int, partners: frozenset[int] | None) -> bool:
        # MPI knows no streams: it may read what a pass wrote, and overwrite what it read, once that
        # pass is done.
        may_start = self._messages.may_start(partners) and self._requests is None
        if may_start and self._gpu.done(self._published.events[post % 2]):
            size = self._published.size_bytes
            send = device_buffer(self._published.buffer(post), size)
            count = size // HEADER_BYTES
            self._requests = self._messages.start(
                send, self._receive, count, self._turn, partners=partners
            )
        return self._requests is not None and self._requests.Test()

    def take(self, post: int) -> dict[int, int]:
        sources, size = self._messages.turns[self._turn][0], self._published.size_bytes
        return {source: self._memory + i * size for i, source in enumerate(sources)}

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass

    def free(self) -> None:
        self._gpu.free(self._memory)
        self._messages.free()


def device_buffer(address: int, size_bytes: int) -> Any:
    """Device memory as mpi4py takes a buffer: an address and a length, never looked into."""
    return MPI.buffer.fromaddress(address, size_bytes)

"""The direct route: neighbours' device memory on this node, read in place through CUDA IPC.

Where a source's card is reached over a slow link, the copy engine fetches its values as soon as its
token is here, during the backward pass, and the kernel reads the copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mpicdsgd.comm.exchange.gpu_buffers import DevicePublished
from mpicdsgd.kernels.gpu import Gpu


@dataclass(frozen=True)
class Imported:
    """A peer's published memory and events in this process; ``memory`` 0 where it is no source."""

    memory: int
    events: tuple[int, ...]


class DirectRoute:
    """See the module, and `token_transport.Route`.

    Args:
        published: this agent's own, whose layout is all agents'.
        sources: read this way, ascending; turns: whom this agent reads at all, in each turn.
        peers: the imports of the sources, and of the readers that read this agent this way.
        prefetched: the sources whose values are fetched, not read in place.
    """

    def __init__(
        self,
        gpu: Gpu,
        published: DevicePublished,
        sources: tuple[int, ...],
        turns: Sequence[tuple[int, ...]],
        peers: Mapping[int, Imported],
        prefetched: Collection[int],
    ) -> None:
        self._gpu, self._published, self._peers = gpu, published, peers
        self._turns = [[source for source in sources if source in turn] for turn in turns]
        self._now = self._turns[0]
        self._copies = {s: gpu.malloc(published.size_bytes) for s in prefetched}
        self._copied = {source: gpu.event() for source in prefetched}
        self._stream = gpu.new_stream() if prefetched else None
        self._fetching = False

    def start(self, post: int, turn: int) -> None:
        self._now = self._turns[turn]
        if self._stream is not None:
            # The last pass may still read the copies.
            self._gpu.wait(self._stream, self._published.events[post % 2])
        self._fetching = False

    def advance(self, post: int, partners: frozenset[int] | None) -> bool:
        if partners is not None and not self._fetching and self._stream is not None:
            for source in self._now:
                if source not in self._copies:
                    continue
                copy = self._copies[source]
                self._gpu.wait(self._stream, self._peers[source].events[post % 2])
                self._gpu.copy(copy, self._at(source, post), self._size, self._stream)
                self._gpu.record(self._copied[source], self._stream)
            self._fetching = True
        return partners is not None

    def take(self, post: int) -> dict[int, int]:
        stream = self._published.stream
        for peer in self._peers.values():
            self._gpu.wait(stream, peer.events[post % 2])
        for event in self._copied.values():
            self._gpu.wait(stream, event)
        return {s: self._copies.get(s) or self._at(s, post) for s in self._now}

    def settle(self) -> None:
        if self._stream is not None:
            self._gpu.finish(self._stream)

    def release(self) -> None:
        release(self._gpu, self._peers)

    def free(self) -> None:
        for event in self._copied.values():
            self._gpu.destroy_event(event)
        for copy in self._copies.values():
            self._gpu.free(copy)
        if self._stream is not None:
            self._gpu.destroy_stream(self._stream)

    @property
    def _size(self) -> int:
        return self._published.size_bytes

    def _at(self, source: int, post: int) -> int:
        return self._peers[source].memory + self._size * (post % 2)


def release(gpu: Gpu, peers: Mapping[int, Imported]) -> None:
    """Undo imports. Local."""
    for peer in peers.values():
        for event in peer.events:
            gpu.destroy_event(event)
        if peer.memory:
            gpu.release_memory(peer.memory)

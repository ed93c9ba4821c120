"""The tables that a pass on a GPU reads: tiles, segments, neighbours. Kept while they serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.kernels.gpu.cuda import Gpu
from mpicdsgd.kernels.native.reference import SEGMENT, check_layout, check_values

# Tile in kernel.cu.
TILE = np.dtype([("begin", np.int64), ("length", np.int32), ("segment", np.int32)])
SUMS = 4  # of a tile, float64
TILE_ELEMENTS = 4096  # a few packs for each thread, and many more tiles than multiprocessors

KEPT = 4  # layouts: an algorithm's passes alternate between two or three


@dataclass
class Table:
    """What is to be copied to the device before the next kernel."""

    address: int
    data: NDArray[Any]


@dataclass
class Layout:
    """How a set of segments lies in the flat buffers. Device addresses."""

    memory: int
    tiles: int
    segments: int
    partial: int
    blocks: int
    uploaded: tuple[bytes, bool] | None = None


def cut(segments: NDArray[np.void]) -> NDArray[np.void]:
    """TILE array: the segments in pieces, at least one (of no elements), so that a kernel runs."""
    length = segments["length"]
    counts = -(-length // TILE_ELEMENTS)
    total = int(counts.sum())
    if total == 0:
        return np.zeros(1, TILE)
    segment = np.repeat(np.arange(len(segments)), counts)
    start = (np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)) * TILE_ELEMENTS
    tiles = np.zeros(total, TILE)
    tiles["begin"] = segments["offset"][segment] + start
    tiles["length"] = np.minimum(length[segment] - start, TILE_ELEMENTS)
    tiles["segment"] = segment
    return tiles


class Layouts:
    """The layouts last made, and the table of neighbours. Local.

    Args:
        settle: waits until no kernel reads what is about to be freed.
    """

    def __init__(self, gpu: Gpu, settle: Callable[[], None]) -> None:
        self._gpu, self._settle = gpu, settle
        self._kept: dict[bytes, Layout] = {}
        self._near: tuple[int, int] = 0, 0  # address, and for how many neighbours
        self._near_now: bytes | None = None

    def find(
        self, segments: NDArray[np.void], size: int, has_q: bool
    ) -> tuple[Layout, list[Table]]:
        """The segments' layout, and what must be uploaded for it.

        Raises:
            ValueError: for segments that leave the arrays of ``size`` elements, or overlap.
        """
        if getattr(segments, "dtype", None) != SEGMENT or segments.ndim != 1:
            raise ValueError("segments: a 1-D SEGMENT array is needed")
        key = segments["offset"].tobytes() + segments["length"].tobytes() + b"%d" % size
        layout = self._kept.get(key)
        content = segments.tobytes(), has_q
        if layout is not None and layout.uploaded == content:
            return layout, []
        check_values(segments, has_q)
        tables = []
        if layout is None:
            check_layout(segments, size)
            if len(self._kept) == KEPT:
                self._free(next(iter(self._kept)))
            layout, tiles = self._make(segments)
            self._kept[key] = layout
            tables.append(tiles)
        layout.uploaded = content
        if len(segments):
            tables.append(Table(layout.segments, segments))
        return layout, tables

    def neighbours(
        self, addresses: Sequence[int], weights: NDArray[np.float32]
    ) -> tuple[tuple[int, int], list[Table]]:
        """Device addresses of the tables of neighbours and weights, and what must be uploaded."""
        degree = len(addresses)
        memory, room = self._near
        if degree > room:
            self._settle()
            if room:
                self._gpu.free(memory)
            self._near = memory, room = self._gpu.malloc(12 * degree), degree
        table = memory, memory + 8 * room
        near = np.array(addresses, np.uint64)
        content = near.tobytes() + weights.tobytes()
        if content == self._near_now:
            return table, []
        self._near_now = content
        return table, [Table(table[0], near), Table(table[1], weights)]

    def forget(self) -> None:
        """What was to be uploaded was not: make all anew at the next use."""
        for key in list(self._kept):
            self._free(key)
        self._near_now = None

    def close(self) -> None:
        for key in list(self._kept):
            self._free(key)
        if self._near[1]:
            self._gpu.free(self._near[0])

    def _make(self, segments: NDArray[np.void]) -> tuple[Layout, Table]:
        tiles = cut(segments)
        at_segments = -(-tiles.nbytes // 16) * 16
        at_partial = at_segments + max(len(segments), 1) * SEGMENT.itemsize
        memory = self._gpu.malloc(at_partial + 8 * SUMS * len(tiles))
        layout = Layout(memory, memory, memory + at_segments, memory + at_partial, len(tiles))
        return layout, Table(memory, tiles)

    def _free(self, key: bytes) -> None:
        self._settle()
        self._gpu.free(self._kept.pop(key).memory)

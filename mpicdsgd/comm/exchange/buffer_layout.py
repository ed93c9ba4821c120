"""Host memory as the exchange lays it out: from a cache line on, in whole blocks of 64 bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.comm.exchange.header import HEADER_BYTES
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE

PAGE = 4096  # bytes


def blocks_of(size_bytes: int) -> int:
    """Blocks of 64 bytes that hold ``size_bytes``."""
    return -(-size_bytes // HEADER_BYTES)


def bytes_of(size: int, wire: str) -> int:
    """Bytes of a published buffer of ``size`` elements, in whole blocks of 64."""
    return HEADER_BYTES * blocks_of(size * np.dtype(WIRE_DTYPE[wire]).itemsize)


def aligned(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that begins at a multiple of 64 bytes, a cache line."""
    raw = np.zeros(size_bytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size_bytes]


def staggered(i: int) -> int:
    """How far behind the beginning of a page buffer number ``i`` is to begin, bytes below `PAGE`.

    Buffers that begin alike, as pages do, fall on the same few sets of the caches: read side by
    side, nine of them take a tenth longer.
    """
    return HEADER_BYTES * (5 * i % 64)

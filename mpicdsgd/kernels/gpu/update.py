"""The fused update on a GPU: starts the kernels of native/kernel.cu, and waits for nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.common.patience import TIMEOUT_S
from mpicdsgd.kernels.gpu.cuda import Gpu
from mpicdsgd.kernels.gpu.layouts import SUMS, TILE_ELEMENTS, Layouts
from mpicdsgd.kernels.gpu.outcome import Outcome, Slot
from mpicdsgd.kernels.native.reference import WIRES

# As in kernel.cu.
THREADS = 256
MOST = 8  # neighbours, in a kernel's argument; of more the kernel reads a table

SLOTS = 4  # passes that the host may be ahead of the GPU
LAG = 2


class Arguments(ctypes.Structure):
    """Arguments in kernel.cu, which the update kernels take. Addresses are the device's."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("out", "z", "at", "v", "y", "p", "q")),
        ("segments", ctypes.c_uint64),
        ("tiles", ctypes.c_uint64),
        ("near", ctypes.c_uint64 * MOST),
        *((name, ctypes.c_uint64) for name in ("neighbours", "weights", "scale", "overflow")),
        ("partial", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("weight", ctypes.c_float * MOST),
        ("degree", ctypes.c_int),
        ("aligned", ctypes.c_int),
    ]


class Partials(ctypes.Structure):
    """The argument of add_partials."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("partial", "count", "result")]


class DeviceUpdate:
    """`kernels.native.update` on device memory: same meaning, same bits. Local.

    A call gives the pass to torch's current stream and returns. What passes share, they share in
    that stream's order; a call on another stream first makes it wait for the last pass. The host
    may be SLOTS passes ahead, then it waits.

    Args:
        gpu: the GPU that everything lies on.
        wire: float32, bfloat16 or float16.
        timeout_s: how long an outcome is waited for, in seconds.

    Raises:
        ValueError: for an unknown wire.
    """

    lag = LAG

    def __init__(self, gpu: Gpu, wire: str, timeout_s: float = TIMEOUT_S) -> None:
        if wire not in WIRES:
            raise ValueError(f"wire: float32, bfloat16 or float16, got {wire!r}")
        self._gpu, self._wire, self._timeout_s = gpu, wire, timeout_s
        self._wire_bytes = np.dtype(WIRES[wire]).itemsize
        self._results = gpu.pinned(64 * SLOTS)
        self._slots = [Slot(gpu, part) for part in self._results.reshape(SLOTS, 64)]
        self._layouts = Layouts(gpu, self._settle)
        self._turn = 0
        self._last: tuple[int, int] | None = None  # stream and event of the last pass
        self._apart: set[tuple[int, ...]] = set()

    def __call__(
        self,
        out: torch.Tensor,
        z: torch.Tensor,
        *,
        at: torch.Tensor,
        v: torch.Tensor | None,
        y: torch.Tensor | None,
        p: int | None,
        q: int | None,
        neighbours: Sequence[int],
        weights: NDArray[np.float32],
        segments: NDArray[np.void],
        scale: torch.Tensor | None = None,
        overflow: torch.Tensor | None = None,
        measure: int = 0,
    ) -> Outcome:
        """Mix, step and publish: see `kernels.native.update`.

        What the arguments point to must stay until the pass is done, or be freed in stream order
        as torch's own allocator does it; ``weights`` and ``segments`` are copied.

        Args:
            out, z, at, v, y: float32 tensors, contiguous, shape (D,), on the GPU. v, y: or None.
            p, q: device addresses of D elements of the wire's dtype, or None (or 0).
            neighbours: likewise, the neighbours' published copies.
            weights: float32, shape (len(neighbours),), on the host.
            segments: SEGMENT array on the host, with the gradients' device addresses.
            scale: float32, one element, on the GPU: the gradients are multiplied by 1 / scale
                first, rounded as torch's GradScaler does; or None.
            overflow: likewise: where it is not 0, the gradients count as absent (x <- mix, v
                kept); or None.
            measure: the first so many segments count in the sums of `Outcome`; some slower.

        Raises:
            ValueError: for an array of the wrong dtype, size, device or layout, for overlaps, for
                segments that leave the arrays.
        """
        size = 0 if z is None else z.numel()
        tensors = {"out": out, "z": z, "at": at, "v": v, "y": y}
        address = {name: self._address(name, t, size) for name, t in tensors.items()}
        address |= {"p": p or 0, "q": q or 0}
        given = {"scale": scale, "overflow": overflow}
        scalars = {name: self._address(name, t, 1) for name, t in given.items()}
        self._check(address, size, neighbours, weights)
        slot = self._slots[self._turn]
        slot.reuse()
        self._launch(slot, address, scalars, neighbours, weights, segments, size, measure)
        self._turn = (self._turn + 1) % SLOTS
        assert slot.outcome is not None
        return slot.outcome

    def _launch(
        self,
        slot: Slot,
        address: dict[str, int],
        scalars: dict[str, int],
        neighbours: Sequence[int],
        weights: NDArray[np.float32],
        segments: NDArray[np.void],
        size: int,
        measure: int,
    ) -> None:
        """Give the pass to the current stream, and its outcome to ``slot``."""
        stream = self._gpu.stream()
        degree = len(neighbours)
        general = degree > MOST or measure > 0
        table = (0, 0)
        try:
            layout, tables = self._layouts.find(segments, size, bool(address["q"]))
            if not 0 <= measure <= len(segments):
                raise ValueError(f"measure: 0 to the {len(segments)} segments, got {measure}")
            if general and degree:
                table, more = self._layouts.neighbours(neighbours, weights)
                tables += more
            if self._last is not None and self._last[0] != stream:
                self._gpu.wait(stream, self._last[1])
            if tables:
                slot.upload(tables, stream)
        except BaseException:
            self._layouts.forget()
            raise

        a = Arguments(
            **address, **scalars, segments=layout.segments, tiles=layout.tiles,
            neighbours=table[0], weights=table[1], partial=layout.partial,
            flags=slot.results.ctypes.data, degree=degree,
            aligned=self._aligned(address, neighbours),
        )  # fmt: skip
        if not general:
            a.near[:degree] = neighbours
            a.weight[:degree] = weights.tolist()
        name = f"update_{self._wire}_{'n' if general else degree}{'_m' if measure else ''}"
        self._gpu.launch(name, layout.blocks, THREADS, a, stream)
        if measure:
            # Tiles lie in the order of their segments.
            tiles = int((-(-segments["length"][:measure] // TILE_ELEMENTS)).sum())
            sums = Partials(layout.partial, tiles, slot.results.ctypes.data + 8)
            self._gpu.launch("add_partials", SUMS, THREADS, sums, stream)
        self._gpu.record(slot.event, stream)
        slot.outcome = Outcome(self._gpu, slot.event, slot.results, measure > 0, self._timeout_s)
        self._last = stream, slot.event

    def close(self) -> None:
        """Wait for all passes and give back all memory and events. Outcomes remain readable."""
        for slot in self._slots:
            slot.close()
        self._layouts.close()
        self._gpu.unpin(self._results)

    def _settle(self) -> None:
        for slot in self._slots:
            if slot.outcome is not None:
                slot.outcome.wait()

    def _address(self, name: str, tensor: torch.Tensor | None, size: int) -> int:
        if tensor is None:
            if name in ("out", "z", "at"):
                raise ValueError(f"{name}: a float32 tensor is needed, got None")
            return 0
        device = self._gpu.torch_device
        if tensor.dtype != torch.float32 or tensor.device != device or tensor.numel() != size:
            raise ValueError(
                f"{name}: {size} float32 elements on {device} are needed, got {tensor.numel()} "
                f"{tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: the tensor must be contiguous")
        return tensor.data_ptr()

    def _check(
        self,
        address: dict[str, int],
        size: int,
        neighbours: Sequence[int],
        weights: NDArray[np.float32],
    ) -> None:
        """The checks of host.cpp, but for the segments'."""
        if weights.dtype != np.float32 or weights.shape != (len(neighbours),):
            raise ValueError(f"weights: float32, shape ({len(neighbours)},) are needed")
        key = (size, *address.values(), *neighbours)
        if key in self._apart:
            return
        for name, start in (address | _numbered(neighbours)).items():
            if name not in _FLOAT32 and (
                start % self._wire_bytes or (name not in "pq" and not start)
            ):
                raise ValueError(f"{name}: no address of the wire's elements: {start:#x}")
        for (a, first), (b, second) in _pairs(address, neighbours):
            lengths = [size * (4 if name in _FLOAT32 else self._wire_bytes) for name in (a, b)]
            apart = first + lengths[0] <= second or second + lengths[1] <= first
            both = a in _WRITTEN and b in _WRITTEN
            if not apart and (both or (first, lengths[0]) != (second, lengths[1])):
                raise ValueError(f"{a} and {b}: overlap{'' if both else ' without being the same'}")
        if len(self._apart) == 64:
            self._apart.clear()
        self._apart.add(key)

    def _aligned(self, address: dict[str, int], neighbours: Sequence[int]) -> bool:
        pack = 4 * self._wire_bytes
        floats = (a for name, a in address.items() if name in _FLOAT32)
        stored = (address["p"], address["q"], *neighbours)
        return not (any(a % 16 for a in floats) or any(a % pack for a in stored))


_FLOAT32 = ("out", "z", "at", "v", "y")
_WRITTEN = ("out", "v", "y", "p")


def _numbered(neighbours: Sequence[int]) -> dict[str, int]:
    return {f"neighbours[{i}]": address for i, address in enumerate(neighbours)}


def _pairs(
    address: dict[str, int], neighbours: Sequence[int]
) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """All pairs of arrays given, of which the first is written."""
    arrays = {name: a for name, a in (address | _numbered(neighbours)).items() if a}
    for a, b in combinations(arrays.items(), 2):
        if a[0] in _WRITTEN:
            yield a, b
        elif b[0] in _WRITTEN:
            yield b, a

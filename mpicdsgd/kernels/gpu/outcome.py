"""What a pass on the GPU occupies till it is done, and what it leaves for whoever waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.patience import Patience
from mpicdsgd.kernels.gpu.cuda import Gpu
from mpicdsgd.kernels.gpu.layouts import SUMS, Table


class Outcome:
    """What became of a pass. Each method waits for it. Local."""

    def __init__(
        self,
        gpu: Gpu,
        event: int,
        memory: NDArray[np.uint8],
        measured: bool,
        timeout_s: float,
    ) -> None:
        self._gpu, self._event, self._memory = gpu, event, memory
        self._timeout_s = timeout_s
        self._measured = measured
        self._flags: tuple[bool, bool] | None = None
        self._sums = np.full(SUMS, np.nan)

    def wait(self) -> None:
        """Wait for the pass, and keep what it left before the next one gets the memory.

        Raises:
            TimeoutError: after ``timeout_s``. A pass may wait for the GPU work of a neighbour that
                was killed, which never ends.
        """
        if self._flags is None:
            patience = Patience(self._timeout_s)
            while not self._gpu.done(self._event):
                if not patience.pause():
                    raise TimeoutError(
                        f"the GPU did not finish a step within {self._timeout_s:g} s: did a "
                        "neighbour end? exchange.timeout_s sets the limit"
                    )
            bad, overflow = self._memory[:8].view(np.uint32)
            self._flags = bad == 0, overflow != 0
            self._sums = self._memory[8 : 8 + 8 * SUMS].view(np.float64).copy()

    def finite(self) -> bool:
        """Whether all that it wrote is finite, also as rounded to the wire."""
        self.wait()
        assert self._flags is not None
        return bool(self._flags[0])

    def skipped(self) -> bool:
        """Whether ``overflow`` was set, and so the gradients left out."""
        self.wait()
        assert self._flags is not None
        return bool(self._flags[1])

    def disagreement(self) -> float:
        """sum_l w_l |p_l - q_|^2 over the segments measured."""
        return self._sum(0)

    def gradient(self) -> float:
        """|h|^2 over the segments measured."""
        return self._sum(1)

    def moved(self) -> float:
        """|out - what stood there before|^2 over them."""
        return self._sum(2)

    def penalty(self) -> float:
        """Sum of decay |at|^2 over them."""
        return self._sum(3)

    def _sum(self, which: int) -> float:
        if not self._measured:
            raise ValueError("the pass was not asked to measure: measure=len(segments)")
        self.wait()
        return float(self._sums[which])


class Slot:
    """What one of the last passes occupies: page-locked memory, an event."""

    def __init__(self, gpu: Gpu, results: NDArray[np.uint8]) -> None:
        self._gpu, self.results = gpu, results
        self.event = gpu.event()
        self.outcome: Outcome | None = None
        self._staging: NDArray[np.uint8] | None = None

    def reuse(self) -> None:
        """Wait until the pass that had it is done."""
        if self.outcome is not None:
            self.outcome.wait()
            self.outcome = None
        self.results[:] = 0

    def upload(self, tables: Sequence[Table], stream: int) -> None:
        """Copy tables to the device in stream order, through memory that stays until then."""
        total = sum(-(-t.data.nbytes // 16) * 16 for t in tables)
        if self._staging is None or self._staging.size < total:
            staging, self._staging = self._staging, self._gpu.pinned(max(2 * total, 4096))
            if staging is not None:
                self._gpu.unpin(staging)
        start = 0
        for table in tables:
            size = table.data.nbytes
            part = self._staging[start : start + size]
            part[:] = np.ascontiguousarray(table.data).view(np.uint8).reshape(-1)
            self._gpu.copy(table.address, part.ctypes.data, size, stream)
            start += -(-size // 16) * 16

    def close(self) -> None:
        self.reuse()
        if self._staging is not None:
            self._gpu.unpin(self._staging)
        self._gpu.destroy_event(self.event)

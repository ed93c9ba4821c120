"""The fused update where the agent's memory is: on the host at once, on a GPU in stream order."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.kernels import native
from mpicdsgd.kernels.gpu.cuda import Gpu
from mpicdsgd.kernels.gpu.update import DeviceUpdate

_NONE = np.empty(0, np.float32)


class Outcome(Protocol):
    """What became of a pass. On a GPU each method waits for it."""

    def finite(self) -> bool:
        """Whether all that it wrote is finite, also as rounded to the wire."""

    def skipped(self) -> bool:
        """Whether ``overflow`` was set, and so the gradients left out."""

    def disagreement(self) -> float:
        """sum_l w_l |p_l - q_|^2 over the segments measured; only of a pass that was to measure."""

    def gradient(self) -> float:
        """|h|^2 over them, h the gradient with weight decay; likewise."""

    def moved(self) -> float:
        """|out - what stood there before|^2 over them; likewise."""

    def penalty(self) -> float:
        """Sum of decay |at|^2 over them; likewise."""


class Pass(NamedTuple):
    """The arguments of one pass over the flat buffers: see `native.update` for what it computes.

    Attributes:
        out, z, at, v, y: float32 tensors of shape (D,), as there.
        p, q, neighbours: published copies, as an exchange gives them.
        weights, segments: as there, on the host.
        scale: the gradients are divided by this first, as ``g * (1 / scale)``; float32, one
            element, on the agent's device.
        overflow: where it is not 0, the gradients count as absent: x <- mix, v kept; likewise.
        measure: of how many segments, the first ones; 0: do not.
    """

    out: torch.Tensor
    z: torch.Tensor
    at: torch.Tensor
    segments: NDArray[np.void]
    v: torch.Tensor | None = None
    y: torch.Tensor | None = None
    p: Any = None
    q: Any = None
    neighbours: list[Any] = []  # noqa: RUF012 - nobody writes into it
    weights: NDArray[np.float32] = _NONE
    scale: torch.Tensor | None = None
    overflow: torch.Tensor | None = None
    measure: int = 0


class Update(Protocol):
    """Makes passes where the agent's memory is.

    Attributes:
        lag: how many further steps' passes to give to a GPU before an outcome is asked for, so that
            asking waits for nothing; 0 on the host.
    """

    lag: int

    def __call__(self, a: Pass) -> Outcome: ...

    def close(self) -> None:
        """Wait for all passes and give back what they used. Outcomes remain readable."""


def make_update(gpu: Gpu | None, wire: str, timeout_s: float) -> Update:
    """The update on ``gpu``, or on the host; ``timeout_s``: how long to wait for a GPU. Local."""
    return HostUpdate(wire) if gpu is None else CardUpdate(gpu, wire, timeout_s)


class HostOutcome:
    """See `Outcome`."""

    def __init__(self, result: native.Result, skipped: bool) -> None:
        self._result, self._skipped = result, skipped

    def finite(self) -> bool:
        return self._result.finite

    def skipped(self) -> bool:
        return self._skipped

    def disagreement(self) -> float:
        return self._result.disagreement

    def gradient(self) -> float:
        return self._result.gradient

    def moved(self) -> float:
        return self._result.moved

    def penalty(self) -> float:
        return self._result.penalty


class HostUpdate:
    """`kernels.native.update` on CPU tensors."""

    lag = 0

    def __init__(self, wire: str) -> None:
        self._wire = wire

    def __call__(self, a: Pass) -> HostOutcome:
        segments = a.segments
        skipped = a.overflow is not None and float(a.overflow) != 0
        if skipped:
            segments = segments.copy()
            segments["grad"] = 0
        elif a.scale is not None:
            _unscale(segments, np.float32(1) / np.float32(float(a.scale)))
        result = native.update(
            a.out.numpy(),
            a.z.numpy(),
            at=a.at.numpy(),
            v=None if a.v is None else a.v.numpy(),
            y=None if a.y is None else a.y.numpy(),
            p=a.p,
            q=a.q,
            neighbours=a.neighbours,
            weights=a.weights,
            segments=segments,
            wire=self._wire,
            threads=torch.get_num_threads(),
            measure=a.measure,
        )
        return HostOutcome(result, skipped)

    def close(self) -> None:
        pass


class CardUpdate:
    """`gpu.update.DeviceUpdate` on a GPU's tensors."""

    lag = DeviceUpdate.lag

    def __init__(self, gpu: Gpu, wire: str, timeout_s: float) -> None:
        self._update = DeviceUpdate(gpu, wire, timeout_s)

    def __call__(self, a: Pass) -> Outcome:
        return self._update(**a._asdict())

    def close(self) -> None:
        self._update.close()


def _unscale(segments: NDArray[np.void], inverse: np.float32) -> None:
    """Multiply the gradients in place, as `torch.amp.GradScaler.unscale_` does."""
    for s in segments:
        if s["grad"] and s["length"]:
            memory = (ctypes.c_float * int(s["length"])).from_address(int(s["grad"]))
            gradient = np.ctypeslib.as_array(memory)
            np.multiply(gradient, inverse, out=gradient)

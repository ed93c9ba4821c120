"""Gradients of many agents: as they are made, kept, and averaged."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.kernels.arena import Arena


class Part(NamedTuple):
    """What some agents make of their minibatches.

    Attributes:
        agents: int64, shape (n,).
        loss: mean of each, float64, shape (n,).
        right: right answers, int64, shape (n,); -1 where accuracy has no meaning.
        batch: samples of each.
        segments: the kernel's table for each, whose gradients live until the next part is made.
    """

    agents: NDArray[np.int64]
    loss: NDArray[np.float64]
    right: NDArray[np.int64]
    batch: int
    segments: Sequence[NDArray[np.void]]


class Held:
    """Keeps gradients beyond the part that they came in.

    Args:
        layout: of a row.
        agents: N.
    """

    def __init__(self, layout: Arena, agents: int) -> None:
        self._layout = layout
        self._G = torch.zeros(agents, layout.size)

    def parts(self, parts: Iterable[Part], seen: Callable[[Part], None]) -> list[Part]:
        """The same parts, all computed, whose gradients stay as long as this does."""
        kept = []
        for part in parts:
            seen(part)
            segments = [
                self._kept(rows, j)
                for j, rows in zip(part.agents.tolist(), part.segments, strict=True)
            ]
            kept.append(part._replace(segments=segments))
        self.made = kept
        return kept

    def averaged(self, parts: Sequence[Part], clip_norm: float) -> list[Part]:
        """The parts with everybody's mean in the place of each gradient, clipped as a whole."""
        mean = torch.zeros(self._layout.size)
        for row in self._G.mul_(1.0 / len(self._G)):
            mean += row
        views = self._layout.views_of(mean)[: len(self._layout.parameters)]
        if clip_norm > 0:
            shown = [torch.nn.Parameter(view) for view in views]
            for one, view in zip(shown, views, strict=True):
                one.grad = view
            torch.nn.utils.clip_grad_norm_(shown, clip_norm)
        self._mean = mean
        base = mean.data_ptr()
        for part in parts:
            for rows in part.segments:
                self._point(rows, base)
        return list(parts)

    def _kept(self, rows: NDArray[np.void], j: int) -> NDArray[np.void]:
        rows = rows.copy()
        target = self._G[j].numpy()
        for s in rows:
            if s["grad"] and s["length"]:
                memory = (ctypes.c_float * int(s["length"])).from_address(int(s["grad"]))
                begin = int(s["offset"])
                target[begin : begin + int(s["length"])] = np.ctypeslib.as_array(memory)
                s["grad"] = self._G[j].data_ptr() + 4 * begin
        return rows

    def _point(self, rows: NDArray[np.void], base: int) -> None:
        """Every trained parameter has the mean for its gradient, also where its own is none."""
        for i, parameter in enumerate(self._layout.parameters):
            is_trained = parameter.requires_grad and parameter.numel() > 0
            rows["grad"][i] = base + 4 * int(rows["offset"][i]) if is_trained else 0
